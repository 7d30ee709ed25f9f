"""Do the targets mean something? ``python benchmarks/targets.py TABLE [FOLDER]``, with TABLE one of

  equal     top-1 at equal measured latency: plans that know the staircase against plans that count MACs (ResNet-56, with repair)

FOLDER holds models/ and data/ (default: ../shared beside the repository). Calibration is unlabelled images of the training split;
everything is chosen on images of the training split that were held out (KL); top-1 is on the 2000 test images. Prints Markdown.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from ranking import RESNET56, SHARED, Case

import sfp_onnx
from sfp_onnx import PlanOptions, graph, pipeline
from sfp_onnx.records import RepairOptions
from sfp_onnx.runtime import Setup

SETUP = Setup(threads=1)
CLOSE = 0.01  # of the original's latency: two plans are equally fast
TRIALS = 10


class Bench:
    """A model, scored once, with images to repair on, to choose on and to report on."""

    def __init__(self, case: Case, root: Path, images: int) -> None:
        self.analysis = case.analysis(root)
        whole = case.images(root, "calib")
        order = np.random.default_rng(0).permutation(whole.samples)
        self.seen = replace(whole.part(np.sort(order[:images])), labels=None)
        self.judge = whole.part(np.sort(order[images : images + 1024]))
        self.test = case.images(root, "test")
        self.repair = RepairOptions(force=True)
        options = PlanOptions(targets=("macs=50%",))
        self.scored = pipeline.candidates(self.analysis, options, "obs", self.seen)

    def plan(self, options: PlanOptions, ruler: object = None) -> sfp_onnx.Plan:
        return pipeline.plan_for(self.scored, options, ruler=ruler)

    def cut(self, plan: sfp_onnx.Plan) -> graph.Model:
        return sfp_onnx.apply(self.analysis, plan, verify=False).model

    def repaired(self, plan: sfp_onnx.Plan) -> graph.Model:
        return sfp_onnx.apply(self.analysis, plan, self.seen, verify=False, repair=self.repair).model

    def ratio(self, *models: graph.Model) -> list[float]:
        """Latency of each, in one interleaved run with the original."""
        first, *others = pipeline.targeting.latencies_of([self.analysis.model, *models], self.analysis, SETUP, 1)
        return [own / first for own in others]


@dataclass
class Found:
    """A plan and its measured latency."""

    plan: sfp_onnx.Plan
    ratio: float


def tuned(bench: Bench, options: PlanOptions, wanted: float) -> Found:
    """The plan whose *measured* latency is nearest to ``wanted``: its MACs target is bisected (and once near, all MACs between are tried,
    since latency does not fall with every channel that leaves)."""
    low, high = 0.02, 1.0
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
    print("| target | plan | measured latency | MACs | KL, held-out training images | top-1, test | agreement, test |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for target in (60, 40):
        plans: dict[str, Found] = {}
        for align in sys.argv[3].split(",") if len(sys.argv) > 3 else ["auto"]:
            how = int(align) if align.isdigit() else None if align == "none" else align
            options = PlanOptions(targets=(f"latency={target}%",), threads=1, align=how)
            plan = bench.plan(options)
            own = Found(plan, bench.ratio(bench.cut(plan))[0])
            plans[f"**latency** ({align})"] = own
        wanted = own.ratio
        for name, rival in RIVALS.items():
            plans[name] = tuned(bench, rival, wanted)
        models = {name: bench.repaired(own.plan) for name, own in plans.items()}
        ratios = bench.ratio(*models.values())
        for (name, model), own, ratio in zip(models.items(), plans.values(), ratios, strict=True):
            chosen, reported = (
                sfp_onnx.evaluate([bench.analysis.model, model], data, latency=False)[1] for data in (bench.judge, bench.test)
            )
            macs = own.plan.after.macs / own.plan.before.macs
            print(
                f"| {target} % | {name} | {ratio:.1%} | {macs:.1%} | {chosen.kl:.4f} | {100 * (reported.top1 or 0):.2f} | "
                f"{100 * (reported.agreement or 0):.2f} |",
                flush=True,
            )


TABLES: dict[str, Callable[[Path], None]] = {"equal": equal}


def main() -> None:
    """Run one table."""
    if len(sys.argv) < 2 or sys.argv[1] not in TABLES:
        sys.exit(__doc__)
    start = time.perf_counter()
    TABLES[sys.argv[1]](Path(sys.argv[2]) if len(sys.argv) > 2 else SHARED)
    print(f"# {time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
