"""What the plain command needs, and how sure its result is: ``python benchmarks/solver.py TABLE [FOLDER [ROWS [PART]]]``, TABLE one of

  pictures  top-1 at 70 % of the MACs by the number of calibration pictures, widths free and with the layer before the classifier kept;
            EfficientNet-Lite0
  seeds     top-1 and agreement at 70 / 50 / 30 % of the MACs with three draws of calibration images (1024; ResNet-56: 2048);
            ResNet-20, VGG-11, ResNet-56
  images    the same at 30 % of the MACs with 256 to 2048 images; ResNet-20, two draws
  cost      plan and repair in plain forward passes (processor time), peak memory, bytes written to files; EfficientNet-Lite0 with 1000
            pictures (ROWS: so many), `--memory` as by default (Linux)

ROWS (default TABLE.txt) keeps what was measured, so that an interrupted run goes on; PART is a part of a row's name. FOLDER holds models/,
data/ and imagenet/ (calib/: pictures; val/: pictures and labels.csv), by default ../shared beside the repository. Calibration pictures
have no labels; test pictures choose nothing. Prints Markdown.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
from accuracy import REPAIR, Rows
from files import HOME, needed
from ranking import RESNET20, RESNET56, VGG11, Case

import sfp_onnx
from sfp_onnx.core.options import PlanOptions
from sfp_onnx.pipeline.opened import Inputs
from sfp_onnx.pipeline.scored import Scoring, candidates
from sfp_onnx.planning.search import Candidates, plan_for
from sfp_onnx.runtime import open_model

LITE0, LAST = "efficientnet_lite0_imagenet.onnx", "node_Conv_865"
PIXELS = sfp_onnx.Preprocessing(mean=(127.0,) * 3, std=(128.0,) * 3, scale=1.0)
PICTURES = (64, 125, 250, 500, 1000)
SEEDS, SHARES = 3, (70, 50, 30)
IMAGES = {RESNET20.title: 1024, VGG11.title: 1024, RESNET56.title: 2048}


def pictures(root: Path, samples: int, seed: int = 0) -> tuple[sfp_onnx.Analysis, sfp_onnx.Dataset]:
    """EfficientNet-Lite0 and calibration pictures."""
    model = sfp_onnx.load(needed(root / "models" / LITE0))
    data = sfp_onnx.data_for(model, needed(root / "imagenet" / "calib"), preprocessing=PIXELS, samples=samples, seed=seed)
    return sfp_onnx.inspect(model, data=data), replace(data, labels=None)


def judged(analysis: sfp_onnx.Analysis, model: sfp_onnx.Model, test: sfp_onnx.Dataset) -> str:
    found = sfp_onnx.evaluate([analysis.model, model], test, latency=False)[1]
    return f"{100 * (found.top1 or 0):.2f} (agreement {100 * (found.agreement or 0):.1f}, KL {found.kl or 0:.3f})"


def made(analysis: sfp_onnx.Analysis, data: sfp_onnx.Dataset, share: int, **options: object) -> sfp_onnx.Model:
    """What the plain command writes."""
    asked = PlanOptions(targets=(f"macs={share}%",), **options)
    return sfp_onnx.apply(analysis, sfp_onnx.plan(analysis, asked, data=data), data, verify=False, repair=REPAIR).model


def by_pictures(root: Path, rows: Rows, only: str) -> None:
    """Top-1 by the number of pictures."""
    val = needed(root / "imagenet" / "val")
    steps = replace(PIXELS, center_crop=(224, 224))
    for samples, keep in product(PICTURES, (None, LAST)):
        name = f"{'free' if keep is None else 'last layer kept'} | {samples}"
        if only in name and name not in rows.known:
            analysis, data = pictures(root, samples)
            test = sfp_onnx.data_for(analysis.model, val, preprocessing=steps, labels=val / "labels.csv")
            rows.measure(name, judged, analysis, made(analysis, data, 70, keep=keep), test)
    rows.table("EfficientNet-Lite0, 70 % of the MACs", PICTURES, "")


def by_seeds(root: Path, rows: Rows, only: str) -> None:
    """Top-1 by the draw of the images."""
    for case, seed, share in product((RESNET20, VGG11, RESNET56), range(SEEDS), SHARES):
        name = f"{case.title} | {seed} | {share}"
        if only in name:
            rows.measure(name, _cell_of_seed, case, root, seed, share)
    rows.table("network | seed", SHARES)


def by_images(root: Path, rows: Rows, only: str) -> None:
    """Top-1 by the number of images."""
    for images, seed in product((256, 512, 1024, 2048), range(2)):
        name = f"ResNet-20 | {seed} | {images}"
        if only in name:
            rows.measure(name, _cell_of_seed, RESNET20, root, seed, 30, images)
    rows.table("network | draw", (256, 512, 1024, 2048))


@cache
def _scored(case: Case, root: Path, seed: int, images: int) -> Candidates:
    """A network that is ready to be planned for, on so many images drawn with the seed."""
    whole = case.images(root, "calib")
    drawn = np.sort(np.random.default_rng(seed).permutation(whole.samples)[:images])
    inputs = Inputs(case.analysis(root), replace(whole.part(drawn), labels=None))
    return candidates(inputs, PlanOptions(targets=("macs=50%",), align="none"), Scoring(repair=REPAIR))


def _cell_of_seed(case: Case, root: Path, seed: int, share: int, images: int = 0) -> str:
    ready = _scored(case, root, seed, images or IMAGES[case.title])
    plan = plan_for(ready, PlanOptions(targets=(f"macs={share}%",), align="none"))
    model = sfp_onnx.apply(ready.analysis, plan, ready.data, verify=False, repair=REPAIR).model
    return judged(ready.analysis, model, case.images(root, "test"))


def _spent() -> np.ndarray:
    """Processor time (s), peak memory and bytes written by now (GB)."""
    written = next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("wchar"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return np.array([time.process_time(), peak / 1e6, int(written.split()[1]) / 1e9])


@contextmanager
def _row(name: str, plain: float) -> Iterator[None]:
    start = _spent()
    yield
    now = _spent()
    seconds, written = now[0] - start[0], now[2] - start[2]
    print(f"| {name} | {seconds:.0f} s | {seconds / plain if plain else 1:.1f} | {now[1]:.2f} GB | {written:.2f} GB |", flush=True)


def cost(root: Path, samples: int) -> None:
    """Of plan and repair; the peak is that of the process so far."""
    analysis, data = pictures(root, samples)
    print("| stage | processor time | in plain passes | peak memory | written |\n|---|---|---|---|---|", flush=True)
    start, session = _spent(), open_model(analysis.model)
    with _row("one plain pass", 0):
        for feeds, _ in replace(data, batch=8).batches():
            session.run(feeds)
    plain = float((_spent() - start)[0])
    del session
    with _row("plan", plain):
        plan = sfp_onnx.plan(analysis, PlanOptions(targets=("macs=70%",)), data=data)
    with _row("apply (proof and repair)", plain):
        sfp_onnx.apply(analysis, plan, data, repair=REPAIR)


def main() -> None:
    """Run one table."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    table, root = sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else HOME
    if table == "cost":
        cost(root, int(sys.argv[3]) if len(sys.argv) > 3 else PICTURES[-1])
        return
    rows = Rows(Path(sys.argv[3] if len(sys.argv) > 3 else f"{table}.txt"))
    {"pictures": by_pictures, "seeds": by_seeds, "images": by_images}[table](root, rows, sys.argv[4] if len(sys.argv) > 4 else "")


if __name__ == "__main__":
    main()
