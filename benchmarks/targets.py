"""Do the targets mean something? ``python benchmarks/targets.py TABLE [FOLDER]``, with TABLE one of

  equal     top-1 at equal measured latency: plans that know the staircase against plans that count MACs (ResNet-56, with repair)
  drop      --max-drop 1% on ResNet-56 and VGG-11: what is reached, and the drop on images that the tool did not see
  default   latency (and with repair, KL) of plans for MACs targets: any width, the default's staircase, the measured one
  widths    how the default's staircase was chosen: candidates by what is left after the repair on held-out images, and by latency

FOLDER holds models/ and data/ (default: ../shared beside the repository). Calibration is unlabelled images of the training split;
everything is chosen on images of the training split that were held out (KL); top-1 is on the 2000 test images. Prints Markdown.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from ranking import RESNET20, RESNET56, SHARED, VGG11, Case

import sfp_onnx
from sfp_onnx import graph
from sfp_onnx.core.options import MeasureOptions, PlanOptions, RepairOptions
from sfp_onnx.evaluation import reading_of
from sfp_onnx.latency.measure import latencies_of
from sfp_onnx.pipeline.opened import Inputs
from sfp_onnx.pipeline.scored import Scoring, candidates
from sfp_onnx.planning.max_drop import Judge, held_out
from sfp_onnx.planning.search import plan_for
from sfp_onnx.runtime import Setup

SETUP = Setup(threads=1)
CLOSE = 0.01  # of the original's latency: two plans are equally fast
TRIALS = 10
VGG_IMAGES = 1200  # its layers of 512 channels take long to repair


class Bench:
    """A model, scored once, with images to repair on, to choose on and to report on."""

    def __init__(self, case: Case, root: Path, images: int, draw: int = 0, only: str | None = None) -> None:
        self.analysis = case.analysis(root)
        whole = case.images(root, "calib")
        order = np.random.default_rng(draw).permutation(whole.samples)
        self.seen = replace(whole.part(np.sort(order[:images])), labels=None)
        self.judge = whole.part(np.sort(order[images : images + 1024]))
        self.test = case.images(root, "test")
        self.repair = RepairOptions(force=True)
        options = PlanOptions(targets=("macs=50%",), only=only)
        self.scored = candidates(Inputs(self.analysis, self.seen), options, Scoring("obs", repair=self.repair))

    def plan(self, options: PlanOptions, ruler: object = None) -> sfp_onnx.Plan:
        return plan_for(self.scored, options, ruler=ruler)

    def cut(self, plan: sfp_onnx.Plan) -> graph.Model:
        return sfp_onnx.apply(self.analysis, plan, verify=False).model

    def repaired(self, plan: sfp_onnx.Plan) -> graph.Model:
        return sfp_onnx.apply(self.analysis, plan, self.seen, verify=False, repair=self.repair).model

    def worth(self, model: graph.Model) -> tuple[str, str, str]:
        """KL on held-out training images, top-1 and agreement on test images."""
        pairs = (sfp_onnx.evaluate([self.analysis.model, model], data, latency=False)[1] for data in (self.judge, self.test))
        chosen, reported = pairs
        return f"{chosen.kl:.4f}", f"{100 * (reported.top1 or 0):.2f}", f"{100 * (reported.agreement or 0):.2f}"

    def ratio(self, *models: graph.Model) -> list[float]:
        """Latency of each, in one interleaved run with the original."""
        first, *others = latencies_of([self.analysis.model, *models], self.analysis, SETUP, 1)
        return [own / first for own in others]


@dataclass
class Found:
    """A plan and its measured latency."""

    plan: sfp_onnx.Plan
    ratio: float


def tuned(bench: Bench, options: PlanOptions, wanted: float) -> Found:
    """The plan whose *measured* latency is nearest to ``wanted``: its MACs target is bisected (and once near, all MACs between are tried,
    since latency does not fall with every channel that leaves)."""
    low, high = max(0.1, 0.35 * wanted), min(1.0, 1.15 * wanted)
    best: Found | None = None
    for _ in range(TRIALS):
        share = (low + high) / 2
        try:
            plan = bench.plan(replace(options, targets=(f"macs={100 * share:.4f}%",)))
        except sfp_onnx.TargetError:
            low = share
            continue
        own = Found(plan, bench.ratio(bench.cut(plan))[0])
        print(f"#   {options.allocation} align {options.align} macs {share:.3f} -> {own.ratio:.3f}", file=sys.stderr, flush=True)
        if best is None or abs(own.ratio - wanted) < abs(best.ratio - wanted):
            best = own
        if abs(best.ratio - wanted) < CLOSE / 2:
            break
        low, high = (share, high) if own.ratio < wanted else (low, share)
    assert best is not None
    return best


RIVALS = {
    "MACs, any width": PlanOptions(allocation="solve", align=None),
    "MACs, multiples of 8": PlanOptions(allocation="solve", align=8),
    "MACs, multiples of 16": PlanOptions(allocation="solve", align=16),
    "uniform, any width": PlanOptions(allocation="uniform", align=None),
    "uniform, multiples of 8": PlanOptions(allocation="uniform", align=8),
}


def equal(root: Path) -> None:
    """Top-1 at equal measured latency."""
    bench = Bench(RESNET56, root, 1024)
    print("| latency | plan | measured | MACs | KL, held-out training images | top-1, test | agreement, test |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for target in (60, 40):
        plan = bench.plan(PlanOptions(targets=(f"latency={target}%",), threads=1))
        plans = {"**latency**": Found(plan, plan.figures["latency"]["actual"] / plan.figures["latency"]["before"])}
        for name, rival in RIVALS.items():
            plans[name] = tuned(bench, rival, plans["**latency**"].ratio)
        models = {name: bench.repaired(own.plan) for name, own in plans.items()}
        ratios = bench.ratio(*models.values())
        for (name, model), own, ratio in zip(models.items(), plans.values(), ratios, strict=True):
            print(f"| {target} % | {name} | {ratio:.1%} | {share(own.plan)} | {' | '.join(bench.worth(model))} |", flush=True)


def share(plan: sfp_onnx.Plan) -> str:
    return f"{plan.after.macs / plan.before.macs:.1%}"


def drop(root: Path) -> None:
    """The smallest model that loses a point at most."""
    print("| network | images (repaired on / judged on) | drop: judged, at most (95 %) | MACs | file | latency | drop on test images |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for case, images in ((RESNET56, 2048), (VGG11, VGG_IMAGES)):
        analysis, test = case.analysis(root), case.images(root, "test")
        data = case.images(root, "calib", images)
        options = PlanOptions(max_drop="1%", threads=1)
        result = sfp_onnx.prune(analysis, options, "obs", data, repair=RepairOptions(force=True))
        held = held_out(data)[1]
        reading = reading_of(analysis.model, held, MeasureOptions())
        judged = Judge(analysis.model, held, 0.01, options.confidence, reading).drop(result.model)
        before, after = (own.top1 or 0.0 for own in sfp_onnx.evaluate([analysis.model, result.model], test, latency=False))
        first, other = latencies_of([analysis.model, result.model], analysis, SETUP, 1)
        sizes = graph.save.file_bytes(result.model) / graph.save.file_bytes(analysis.model)
        seen = f"{images - held.samples} / {held.samples}"
        print(
            f"| {case.title} | {seen} | {judged.drop:.2%}, {judged.bound:.2%} | {share(result.plan)} | {sizes:.1%} | {other / first:.1%} | "
            f"{100 * (before - after):.2f} points ({before:.2%} -> {after:.2%}) |",
            flush=True,
        )


GRIDS = {"any width": None, "default (16:1:12)": "default", "4:1:12": "4:1:12", "multiples of 4": 4, "measured (16:4)": "auto"}


def default(root: Path) -> None:
    """What the default staircase of counted targets gains in latency, and what it costs in accuracy."""
    print(f"| model | MACs | {' | '.join(GRIDS)} |\n|---|---|{'---|' * len(GRIDS)}", flush=True)
    bench = Bench(RESNET56, root, 1024)
    for name in ("models/resnet56_cifar10_bn", "zoo/mobilenet_v3_small", "zoo/squeezenet1_1"):
        own = bench if "resnet56" in name else None
        analysis = own.analysis if own else sfp_onnx.inspect(root / f"{name}.onnx")
        for target in (70, 50, 30):
            options = [PlanOptions(targets=(f"macs={target}%",), allocation="solve", align=grid, threads=1) for grid in GRIDS.values()]
            plans = [own.plan(item) if own else sfp_onnx.plan(analysis, item, "magnitude") for item in options]
            models = [own.repaired(plan) if own else sfp_onnx.apply(analysis, plan, verify=False).model for plan in plans]
            times = latencies_of([analysis.model, *models], analysis, SETUP, 1)
            cells = [f"{other / times[0]:.1%}" for other in times[1:]]
            if own:
                cells = [f"{cell} (KL {own.worth(model)[0]})" for cell, model in zip(cells, models, strict=True)]
            print(f"| {Path(name).name} | {target} % | {' | '.join(cells)} |", flush=True)


STAIRCASES = ("4:1:12", "8:1:12", "16:1:12")


def widths(root: Path) -> None:
    """Candidates for the default's staircase, on block-internal channels."""
    print(f"| network, draw | MACs | {' | '.join(STAIRCASES)} |\n|---|---|{'---|' * len(STAIRCASES)}", flush=True)
    for case, draw in product((RESNET20, RESNET56), (0, 1)):
        bench = Bench(case, root, 1024, draw, case.only)
        for target in (70, 50, 30):
            plans = [bench.plan(PlanOptions(targets=(f"macs={target}%",), align=own)) for own in STAIRCASES]
            models = [bench.repaired(plan) for plan in plans]
            times = latencies_of([bench.analysis.model, *models], bench.analysis, SETUP, 16)
            found = sfp_onnx.evaluate([bench.analysis.model, *models], bench.judge, latency=False)[1:]
            pairs = zip(found, times[1:], strict=True)
            cells = [f"{100 * (own.agreement or 0):.2f}; {own.kl:.4f}; {time / times[0]:.2f}" for own, time in pairs]
            print(f"| {case.title}, {draw} | {target} % | {' | '.join(cells)} |", flush=True)


TABLES: dict[str, Callable[[Path], None]] = {"equal": equal, "drop": drop, "default": default, "widths": widths}


def main() -> None:
    """Run one table."""
    if len(sys.argv) < 2 or sys.argv[1] not in TABLES:
        sys.exit(__doc__)
    start = time.perf_counter()
    TABLES[sys.argv[1]](Path(sys.argv[2]) if len(sys.argv) > 2 else SHARED)
    print(f"# {time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
