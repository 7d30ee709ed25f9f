"""One target over width and precision: ``python benchmarks/joint.py [FOLDER [NETWORKS [TARGETS [ARMS [IMAGES]]]]]``, lists with commas.

Top-1 on test images, bytes of the file and latency relative to the original (interleaved, one thread) of models that hold the same target:

  cut     widths alone, float32
  int8    onnxruntime's static quantisation of the original alone (it holds no target)
  both    cut, then quantised (``--quantize int8``; the target is that of the quantised file)
  joint   ``--precision auto``: widths and as what weights are stored, or layers computed, from one solver

IMAGES is how many calibration images are used (default: `IMAGES`). FOLDER holds models/, data/ and imagenet/ (default: ../shared beside the
repository). Calibration is unlabelled images of the training split; test images are looked at once, to report. Prints Markdown.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from files import needed
from ranking import RESNET20, RESNET56, SHARED, VGG11, Case

import sfp_onnx
from sfp_onnx import graph
from sfp_onnx.core.options import OutputOptions, PlanOptions, RepairOptions
from sfp_onnx.export.integers import nearest, quantized
from sfp_onnx.latency.measure import latencies_of
from sfp_onnx.pipeline.opened import Inputs
from sfp_onnx.pipeline.scored import Scoring, candidates
from sfp_onnx.planning.search import Candidates, form_for, plan_for
from sfp_onnx.runtime import Setup

LITE = sfp_onnx.Preprocessing(mean=(127.0,) * 3, std=(128.0,) * 3, scale=1.0, center_crop=(224, 224))
IMAGES = {"ResNet-56": 512, "ResNet-20": 512, "VGG-11": 512, "EfficientNet-Lite0": 192}
TARGETS = ("size=50%", "size=35%", "size=25%", "size=15%", "latency=80%", "latency=60%", "latency=40%")
ARMS = ("cut", "int8", "both", "joint")
REPAIR = RepairOptions(force=True)


@dataclass(frozen=True)
class Bench:
    """A network with images to calibrate on and to report on."""

    title: str
    root: Path
    count: int = 0

    @cached_property
    def analysis(self) -> sfp_onnx.Analysis:
        cases = {case.title: case for case in (RESNET56, RESNET20, VGG11)}
        if self.title in cases:
            return cases[self.title].analysis(self.root)
        return sfp_onnx.inspect(needed(self.root / "models" / "efficientnet_lite0_imagenet.onnx"))

    def images(self, part: str) -> sfp_onnx.Dataset:
        """``part`` is "calib" (without labels) or "test"."""
        cases: dict[str, Case] = {case.title: case for case in (RESNET56, RESNET20, VGG11)}
        count = (self.count or IMAGES[self.title]) if part == "calib" else None
        if self.title in cases:
            data = cases[self.title].images(self.root, part, count)
        else:
            folder = needed(self.root / "imagenet" / ("calib" if count else "val"))
            labels = None if count else folder / "labels.csv"
            found = sfp_onnx.data_for(self.analysis.model, folder, preprocessing=LITE, samples=count, labels=labels)
            assert found is not None
            data = found
        return replace(data, labels=None) if count else data

    @cached_property
    def scored(self) -> Candidates:
        """Scores and errors, once for all arms."""
        options = PlanOptions(targets=("size=50%", "latency=50%"), precision="auto", threads=1)
        return candidates(Inputs(self.analysis, self.calib), options, Scoring("obs", repair=REPAIR))

    @cached_property
    def calib(self) -> sfp_onnx.Dataset:
        return self.images("calib")

    def made(self, arm: str, target: str) -> graph.Model:
        """The model of an arm.

        Raises:
            TargetError: the arm cannot hold the target.
        """
        if arm == "int8":
            return self.whole(self.analysis.model)
        output = OutputOptions(quantize="int8") if arm == "both" else OutputOptions()
        joint = arm == "joint"
        known = self.scored.form
        form = form_for(self.analysis, REPAIR, output, True, *((known.storable, known.integers) if joint else ()))
        options = PlanOptions(targets=(target,), threads=1, precision="auto" if joint else "float32")
        plan = plan_for(replace(self.scored, form=form), options)
        done = sfp_onnx.apply(self.analysis, plan, self.calib, verify=False, repair=REPAIR)
        for note in (*done.notes, done.plan.summary()) if joint else ():
            print(f"#   {note}", file=sys.stderr)
        return self.whole(done.model) if arm == "both" else done.model

    def whole(self, model: graph.Model) -> graph.Model:
        """All layers on integers, their ranges chosen as ``--quantize int8`` chooses them."""
        return nearest(self.analysis, model, lambda ranges: quantized(model, list, ranges=ranges), self.calib)[0]


def table(bench: Bench, targets: list[str], arms: list[str]) -> None:
    """All arms at all targets; each is timed in one interleaved run with the original."""
    analysis, test = bench.analysis, bench.images("test")
    whole = graph.save.file_bytes(analysis.model)
    print(f"| {bench.title} | | original | {top1(analysis.model, test):.2f} | {whole} | | |", flush=True)
    for target in targets:
        for arm in arms:
            start = time.process_time()
            try:
                model = bench.made(arm, target)
            except sfp_onnx.SfpError as error:
                print(f"| {bench.title} | {target} | {arm} | {error} ||||", flush=True)
                continue
            before, after = latencies_of([analysis.model, model], analysis, Setup(threads=1), 1)
            size, ratio = graph.save.file_bytes(model), after / before
            figures = f"{top1(model, test):.2f} | {size} | {size / whole:.1%} | {ratio:.0%}"
            print(f"| {bench.title} | {target} | {arm} | {figures} |", flush=True)
            print(f"#   {target} {arm}: {time.process_time() - start:.0f} s of processor time", file=sys.stderr, flush=True)


def top1(model: graph.Model, test: sfp_onnx.Dataset) -> float:
    return 100 * (sfp_onnx.evaluate([model], test, latency=False)[0].top1 or 0)


def main(root: Path, networks: list[str], targets: list[str], arms: list[str], count: int) -> None:
    """One table."""
    print("| network | target | arm | top-1 | bytes | of the original's | latency |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for title in networks:
        table(Bench(title, root, count), targets, arms)


if __name__ == "__main__":
    given = sys.argv[1:]
    lists = [text.split(",") for text in given[1:4]] + [list(IMAGES), list(TARGETS), list(ARMS)][len(given[1:4]) :]
    main(Path(given[0]) if given else SHARED, *lists, int(given[4]) if len(given) > 4 else 0)
