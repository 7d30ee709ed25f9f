"""What dilution costs: ``python benchmarks/dilution.py [network ...] [--shared DIR] [--rates 0.5] [--methods l1] [--refit] [--masks]``.

Prints Markdown rows: top-1 on the 2000 test images of every method at equal rates, and of those that set their rate. Calibration and
re-fit see images of the training set only. ``--masks``: accuracy of the masks alone, without files and removed channels. Networks:
vgg (convs 4-7), vgg-classifier, resnet20 and resnet56 (third stage),
resnet20-classifier.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from ranking import CIFAR10, CIFAR100

import sfp_onnx
from sfp_onnx import dilute, graph, pipeline, runtime
from sfp_onnx.pipeline import DiluteOptions
from sfp_onnx.profiles import ProfileOptions
from sfp_onnx.records import RepairOptions

NETWORKS = {
    "vgg": ("vgg11_cifar100.onnx", "cifar100", CIFAR100, "^/(15|18|22|25)/Conv$"),
    "vgg-classifier": ("vgg11_cifar100.onnx", "cifar100", CIFAR100, "Gemm"),
    "resnet20": ("resnet20_cifar10.onnx", "cifar10", CIFAR10, "layer3.*Conv"),
    "resnet20-classifier": ("resnet20_cifar10.onnx", "cifar10", CIFAR10, "Gemm"),
    "resnet56": ("resnet56_cifar10_bn.onnx", "cifar10", CIFAR10, "layer3.*Conv"),
}
RANKED = ("l1", "wanda", "soft-afcc", "magnitude", "block:1x4", "random")
FIXED = ("nm:2:4", "afcc", "random-afcc")
REFIT_SAMPLES = 1000
REPAIR = RepairOptions(ridges=(1e-2,))  # one ridge instead of four: a wide layer takes a minute per solution on one core


def rows(name: str, root: Path, rates: list[float], methods: list[str], how: argparse.Namespace) -> None:
    """Measure one network and print a row per method and rate."""
    file, images, steps, layers = NETWORKS[name]
    analysis = sfp_onnx.inspect(root / "models" / file)
    load = {"preprocessing": steps}
    calibration = sfp_onnx.data_for(analysis.model, root / "data" / f"{images}_calib.npz", **load)
    fitting = sfp_onnx.data_for(analysis.model, root / "data" / f"{images}_calib.npz", samples=REFIT_SAMPLES, **load)
    test = sfp_onnx.data_for(analysis.model, root / "data" / f"{images}_test.npz", **load)
    assert calibration is not None and fitting is not None and test is not None
    start = time.perf_counter()
    needs = {pipeline.check_dilution(DiluteOptions(method, 0.5), True)[0] for method in methods}
    profiles = ProfileOptions() if any("profiles" in own.needs for own in needs) else None
    seen = pipeline.look(analysis, layers, calibration, profiles)
    print(f"# {name}: looked at {len(seen.targets)} layers in {time.perf_counter() - start:.0f} s", flush=True)
    if how.masks:
        print(f"| {name} | - | 0.0% | original | {top1(analysis.model, test):.4f} |", flush=True)
        for method in methods:
            for rate in rates if method in RANKED else [None]:
                masks, layers_done, _, _ = pipeline.masked(analysis, seen, DiluteOptions(method, rate, force=True))
                share = np.mean([item.removed / item.total for item in layers_done])
                found = top1(dilute.zeroed(analysis.prepared.model, masks), test)
                print(f"| {name} | {method} | {share:.1%} | masked | {found:.4f} |", flush=True)
        return
    for method in methods:
        for rate in rates if method in RANKED else [None]:
            for again in (False, True) if how.refit else (False,):
                start = time.perf_counter()
                options = DiluteOptions(method, rate, refit=again, force=True, repair=REPAIR)
                result = pipeline.dilute(analysis, options, fitting, seen=seen)
                before, after = pipeline.evaluate([analysis.model, result.model], test, latency=False)
                took = time.perf_counter() - start
                share = np.mean([item.removed / item.total for item in result.layers])
                print(
                    f"| {name} | {method} | {share:.1%} | {'re-fit' if again else 'masked'} | {before.top1:.4f} | {after.top1:.4f} | "
                    f"{sizes(result)} | {result.cut} | {took:.0f} s |",
                    flush=True,
                )


def top1(model: graph.Model, test: sfp_onnx.Dataset) -> float:
    """Share of right answers."""
    session = runtime.open_session(graph.serialized(model), model.weights, model.name)
    answers = [session.run(feeds)[0][:count].argmax(1) for feeds, count in test.batches()]
    return float((np.concatenate(answers) == test.labels).mean())


def sizes(result: pipeline.Diluted) -> str:
    """File bytes of the original, and of the result stored sparse."""
    with tempfile.TemporaryDirectory() as folder:
        path = result.save(Path(folder) / "sparse.onnx", sparse=True)
        return f"{graph.file_bytes(result.original)} | {path.stat().st_size}"


def main() -> None:
    """Measure and print."""
    take = argparse.ArgumentParser(description=__doc__)
    take.add_argument("networks", nargs="*", default=list(NETWORKS))
    take.add_argument("--shared", type=Path, default=Path(__file__).parent.parent.parent / "shared")
    take.add_argument("--rates", default="0.5,0.66,0.8")
    take.add_argument("--methods", default=",".join((*RANKED, *FIXED)))
    take.add_argument("--refit", action="store_true")
    take.add_argument("--masks", action="store_true")
    given = take.parse_args()
    print("| network | method | removed | weights | top-1 before | top-1 after | bytes | bytes sparse | channels cut | time |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in given.networks:
        rows(name, given.shared, [float(item) for item in given.rates.split(",")], given.methods.split(","), given)


if __name__ == "__main__":
    main()
