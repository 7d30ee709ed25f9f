"""Top-1 after pruning with closed-form repair: ``python benchmarks/accuracy.py TABLE [FOLDER [ROWS [PART]]]``, with TABLE one of

  cuts    30 / 50 / 70 % of the MACs removed from block-internal channels, then from all groups; ResNet-56 (both exports) and ResNet-20;
          any width (--align none), then the default widths
  latency block-internal against all groups at 60 and 40 % of the original's latency
  moves   channels alone against channels and layers that become two, plain command, on 512 held-out images and on test images
  ladder  every score x every repair x every cut
  cost    seconds and memory of the repair against plain forward passes

(Ideas for a better repair are in ideas.py.)

ROWS (default TABLE.txt) is a file that keeps what was measured, so that an interrupted run goes on; PART a part of a model's file name.
FOLDER holds models/ and data/ (default: ../shared beside the repository). Calibration is unlabelled images of the training split;
top-1 is on the 2000 test images, which nothing else looks at. Prints Markdown.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import models
import numpy as np
from files import HOME
from ranking import CIFAR10, RESNET20, RESNET56, VGG11, Case

import sfp_onnx
from sfp_onnx import graph
from sfp_onnx.core.options import RepairOptions
from sfp_onnx.pipeline.opened import Inputs
from sfp_onnx.pipeline.scored import Scoring, candidates
from sfp_onnx.planning.search import Candidates, plan_for
from sfp_onnx.runtime import Setup, interleaved, open_model, steady_clock

CUTS = (30, 50, 70)
ALIGNS = {None: "", "default": ", default widths"}
SHARES = (60, 40)
REPAIR = RepairOptions(force=True)
# The names of the dynamo export say nothing: groups that one layer makes and one reads are chosen instead.
DYNAMO = Case("ResNet-56, dynamo export", "resnet56_cifar10_dynamo.onnx", "", "cifar10", CIFAR10)


class Bench:
    """A model opened with its data."""

    def __init__(self, case: Case, root: Path, images: int) -> None:
        self.case = case
        self.analysis = case.analysis(root)
        self.calibration = replace(case.images(root, "calib", images), labels=None)
        self.test = case.images(root, "test")
        self.only = case.only or self._inner()
        self.scores: dict[tuple[str, str | None], Candidates] = {}

    def _inner(self) -> str:
        """A pattern for the layers that alone make what one other layer alone reads."""
        coupling = self.analysis.coupling
        groups = [group for group in coupling.groups if len(group.producers) == len(group.consumers) == 1]
        return "^(" + "|".join(name for group in groups for name in group.producers) + ")$"

    def plan(
        self, score: str, target: str, only: str | None, align: str | None = None, moves: tuple[str, ...] = ("cut",)
    ) -> sfp_onnx.Plan:
        options = sfp_onnx.PlanOptions(targets=(target,), only=only, threads=1, batch=16, align=align, moves=moves)
        if (score, only) not in self.scores:
            self.scores[score, only] = candidates(Inputs(self.analysis, self.calibration), options, Scoring(score, repair=REPAIR))
        return plan_for(self.scores[score, only], options)

    def top1(self, model: graph.Model, data: sfp_onnx.Dataset | None = None) -> tuple[float, float, float]:
        """Top-1 in %, agreement with the original in %, KL divergence, on the test images (or other data)."""
        found = sfp_onnx.evaluate([self.analysis.model, model], data or self.test, latency=False)[1]
        return 100 * (found.top1 or 0), 100 * (found.agreement or 0), found.kl or 0.0

    def pruned(self, plan: sfp_onnx.Plan, fit: str) -> graph.Model:
        repair = None if fit == "none" else RepairOptions(fit=fit, force=True)
        return sfp_onnx.apply(self.analysis, plan, self.calibration, verify=False, repair=repair).model


class Rows:
    """What was measured, by name, in a text file; what it holds is not measured again, so that an interrupted run goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known = dict(line.rsplit(" | ", 1) for line in path.read_text().splitlines()) if path.exists() else {}

    def measure(self, name: str, function: Callable[..., str], *arguments: object) -> None:
        if name not in self.known:
            self.known[name] = function(*arguments)
            with self.path.open("a") as stream:
                print(name, self.known[name], sep=" | ", file=stream)

    def table(self, head: str, columns: Sequence[object], unit: str = " %") -> None:
        """Markdown: names end with the column."""
        width = head.count("|") + 1
        print(f"| {head} | {' | '.join(f'{own}{unit}' for own in columns)} |\n|{'---|' * (width + len(columns))}")
        for name in dict.fromkeys(name.rsplit(" | ", 1)[0] for name in self.known):
            print(f"| {name} | {' | '.join(self.known.get(f'{name} | {own}', '') for own in columns)} |", flush=True)


def cuts(root: Path, rows: Rows, only: str = "") -> None:
    """The default (score `obs`, repair `lstsq`) on 2048 images."""
    for case, inner in ((RESNET56, True), (RESNET20, True), (DYNAMO, True), (RESNET20, False), (RESNET56, False)):
        if only not in f"{case.file} {'block-internal' if inner else 'all'}":
            continue
        bench = Bench(case, root, 2048)
        for align, cut in product(ALIGNS, CUTS):
            name = f"{case.title}, {'block-internal' if inner else 'all'}{ALIGNS[align]} | {cut}"
            rows.measure(name, _cell, bench, cut, inner, align)
    rows.table("model, groups", CUTS)


def _cell(bench: Bench, cut: int, inner: bool, align: str | None) -> str:
    feeds, _ = next(iter(replace(bench.test, batch=16).batches()))
    model = bench.pruned(bench.plan("obs", f"macs={100 - cut}%", bench.only if inner else None, align), "lstsq")
    top1, agreement, divergence = bench.top1(model)
    return f"{top1:.2f} (agreement {agreement:.1f}, KL {divergence:.3f}; latency {latency(bench, model, feeds):.2f})"


MOVES = ("cut",), ("cut", "factor")


def by_moves(root: Path, rows: Rows, only: str = "") -> None:
    """The plain command with and without layers that become two; fitted on all images but 512, on which they are compared."""
    for case, images in ((RESNET20, 1536), (RESNET56, 1536)):
        if only not in case.file:
            continue
        bench = Bench(case, root, images)
        bench.calibration, held = bench.calibration.split(512, 0)
        for align, cut, moves in product((None, "default"), CUTS, MOVES):
            name = f"{case.title}, {' and '.join(moves)}{ALIGNS[align]} | {cut}"
            rows.measure(name, _cell_of_moves, bench, f"macs={100 - cut}%", align, moves, held)
        for moves, share in product(MOVES, SHARES):
            rows.measure(f"{case.title}, {' and '.join(moves)}, latency {share} % | latency", _cell_of_moves, bench, f"latency={share}%",
                         "default", moves, held)  # fmt: skip
    rows.table("model, moves", (*CUTS, "latency"))


def _cell_of_moves(bench: Bench, target: str, align: str | None, moves: tuple[str, ...], held: sfp_onnx.Dataset) -> str:
    plan = bench.plan("obs", target, None, align, moves)
    model = bench.pruned(plan, "lstsq")
    feeds, _ = next(iter(replace(bench.test, batch=16).batches()))
    (_, agreement, divergence), (top1, *_) = bench.top1(model, held), bench.top1(model)
    share = f"MACs {plan.after.macs / plan.before.macs:.0%}, latency {latency(bench, model, feeds):.2f}"
    return f"{top1:.2f} (held out: agreement {agreement:.1f}, KL {divergence:.3f}; {len(plan.factors)} become two; {share})"


def same_latency(root: Path, rows: Rows, only: str = "") -> None:
    """Block-internal against all groups at the same measured latency (one thread, batch 16), 1024 images."""
    for case in (RESNET20, RESNET56):
        if only not in case.file:
            continue
        bench = Bench(case, root, 1024)
        for inner, share in product((True, False), SHARES):
            name = f"{case.title}, {'block-internal' if inner else 'all'} | {share}"
            rows.measure(name, _cell_of_latency, bench, share, inner)
    rows.table("model, groups", SHARES)


def _cell_of_latency(bench: Bench, share: int, inner: bool) -> str:
    feeds, _ = next(iter(replace(bench.test, batch=16).batches()))
    plan = bench.plan("obs", f"latency={share}%", bench.only if inner else None, "default")
    model = bench.pruned(plan, "lstsq")
    top1, macs = bench.top1(model)[0], plan.after.macs / plan.before.macs
    return f"{top1:.2f} (MACs {macs:.0%}, measured latency {latency(bench, model, feeds):.2f})"


def latency(bench: Bench, model: graph.Model, feeds: dict[str, np.ndarray]) -> float:
    """Latency relative to the original, one thread, interleaved minima of processor time."""
    sessions = [open_model(own, threads=1) for own in (bench.analysis.model, model)]
    times = interleaved(sessions, [feeds] * 2, 50, steady_clock(Setup(1)))
    return min(times[1]) / min(times[0])


def ladder(root: Path, rows: Rows, only: str = "") -> None:
    """Scores x repairs x cuts."""
    for case, images in ((RESNET20, 1024), (RESNET56, 1024), (VGG11, 512)):
        if only not in case.file:
            continue
        bench = Bench(case, root, images)
        repairs = ["none", "bias", *(["bn"] if bench.analysis.coupling.affines else []), "lstsq"]
        for score, fit, cut in product(("random", "magnitude", "contribution", "sfp", "obs"), repairs, CUTS):
            name = f"{case.title}, {images} | {score} | {fit} | {cut}"
            rows.measure(name, _cell_of_ladder, bench, score, fit, cut)
    rows.table("model, images | score | repair", CUTS)


def _cell_of_ladder(bench: Bench, score: str, fit: str, cut: int) -> str:
    return f"{bench.top1(bench.pruned(bench.plan(score, f'macs={100 - cut}%', bench.only), fit))[0]:.2f}"


def cost(root: Path) -> None:
    """Selection and repair in units of a plain forward pass over the same images, in processor time (all threads), each model in a
    process of its own."""
    print("| model | images | plain pass | selection | repair | both, passes | peak memory |\n|---|---|---|---|---|---|---|")
    for name in ("resnet56", "resnet20", "resnet50"):
        subprocess.run([sys.executable, __file__, f"cost-{name}", str(root)], check=True)


def cost_of(name: str, root: Path) -> None:
    """One row of `cost`."""
    if name == "resnet50":
        model = models.resnet50()
        data = np.random.default_rng(0).standard_normal((256, 3, 224, 224), np.float32)
        analysis = sfp_onnx.inspect(model)
        calibration = sfp_onnx.data_for(analysis.model, data)
        only = None
    else:
        bench = Bench({"resnet56": RESNET56, "resnet20": RESNET20}[name], root, 1024)
        analysis, calibration, only = bench.analysis, bench.calibration, bench.only
    session = open_model(analysis.model)
    seconds = [time.process_time()]
    for feeds, _ in calibration.batches():
        session.run(feeds)
    seconds.append(time.process_time())
    del session  # its buffers do not belong to what follows
    plan = sfp_onnx.plan(analysis, sfp_onnx.PlanOptions(targets=("macs=50%",), only=only), "obs", calibration)
    seconds.append(time.process_time())
    sfp_onnx.apply(analysis, plan, calibration, verify=False, repair=RepairOptions(force=True))
    seconds.append(time.process_time())
    plain, selection, repair = np.diff(seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    passes = (selection + repair) / plain
    print(
        f"| {name} | {calibration.samples} | {plain:.1f} s | {selection:.1f} s ({selection / plain:.1f}) | {repair:.1f} s "
        f"({repair / plain:.1f}) | {passes:.1f} | {peak:.2f} GiB |",
        flush=True,
    )


def main() -> None:
    """Run one table."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    root = Path(sys.argv[2]) if len(sys.argv) > 2 else HOME
    table = sys.argv[1]
    if table.startswith("cost-"):
        cost_of(table.removeprefix("cost-"), root)
    elif table == "cost":
        cost(root)
    else:
        rows = Rows(Path(sys.argv[3] if len(sys.argv) > 3 else f"{table}.txt"))
        {"cuts": cuts, "latency": same_latency, "moves": by_moves, "ladder": ladder}[table](root, rows, *sys.argv[4:5])


if __name__ == "__main__":
    main()
