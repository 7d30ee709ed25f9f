"""The smallest model that loses no more than allowed, and how sure a measured drop is: one-sided upper bounds from samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, sqrt
from statistics import NormalDist

import numpy as np

from ..core.errors import DataError, TargetError
from ..core.options import PlanOptions
from ..core.types import Array, BoolArray, IntArray, Plan
from ..coupling.analysis import Progress, silent
from ..data.dataset import Dataset
from ..evaluation import EACH, metric_for, outputs
from ..graph import Model
from ..repair import rebuilt
from . import removal_of
from .search import Candidates, plan_for

PARTS = 20  # of the samples, left out in turn
HELD_OUT = 1 / 3  # of the data, to judge on
FEWEST = 8  # samples to judge on
BY_HEART = 0.995  # right answers of the original from which on the samples look like those that it was trained on
TRIALS = 8  # models that are built and judged, without targets


def matched(before: BoolArray, after: BoolArray, confidence: float) -> tuple[float, float]:
    """The drop of a share of right answers to the same samples, and what it is at most with a confidence.

    With b samples that were right before only, c after only, and z the normal quantile of the confidence,

        bound = (b - c) / (n + 2) + z sqrt(b + c + 1 - (b - c)^2 / (n + 2)) / (n + 2)

    Agresti, Min: Simple improved confidence intervals for comparing matched proportions, Statistics in Medicine 24, 2005. It is above zero
    even if no answer changed: few samples prove little.
    """
    count = len(before)
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    drop, size = lost - won, count + 2
    spread = sqrt(lost + won + 1 - drop**2 / size) / size
    return drop / count, max(drop / size + NormalDist().inv_cdf(confidence) * spread, drop / count)


def needed(limit: float, confidence: float) -> int:
    """The fewest samples on which `matched` can show that a drop is at most ``limit``: none changes its answer."""
    return max(1, ceil(NormalDist().inv_cdf(confidence) / limit - 2)) if limit > 0 else 0


def jackknifed(value: Callable[[IntArray], float], samples: int, confidence: float, seed: int = 0) -> tuple[float, float]:
    """Any figure of samples (such as the drop of a metric), and what it is at most with a confidence, from its values without one part of
    the samples after the other.

        variance = (k - 1) / k sum over parts i of (value without i - their mean)^2

    Args:
        value: the figure of some samples, by their positions.
    """
    everything = np.arange(samples)
    parts = np.array_split(np.random.default_rng(seed).permutation(samples), min(PARTS, samples))
    without = np.asarray([value(np.setdiff1d(everything, part)) for part in parts]) if len(parts) > 1 else np.zeros(1)
    spread = sqrt((len(parts) - 1) / len(parts) * float(((without - without.mean()) ** 2).sum()))
    whole = value(everything)
    return whole, whole + max(0.0, NormalDist().inv_cdf(confidence)) * spread


# ---- how much a model loses on data that it was not made with --------------------------------------------------------


@dataclass(frozen=True)
class Drop:
    """A figure before and after, how much it fell, and how much at most with the confidence of the judge."""

    before: float
    after: float
    drop: float
    bound: float


@dataclass(frozen=True)
class Judge:
    """What models are judged by: ``limit`` on the drop of ``metric`` (None: top-1, without labels agreement) against the original,
    ``confidence`` with which it must hold. ``apart``: the data are not part of the calibration data."""

    original: Model
    data: Dataset
    limit: float
    confidence: float
    metric: str | None = None
    apart: bool = False
    seed: int = 0

    @cached_property
    def reference(self) -> list[Array]:
        """Outputs of the original."""
        return outputs(self.original, self.data.batches())

    @cached_property
    def name(self) -> str:
        """Name of the metric."""
        return metric_for(self.metric, self.data.labels is not None, self.reference)[0]

    @property
    def place(self) -> str:
        """What the model is judged on."""
        return f"{self.data.samples} " + ("samples of --eval-data" if self.apart else "calibration samples that were not scored with")

    def drop(self, model: Model) -> Drop:
        """How much a model loses."""
        answers, labels, original = outputs(model, self.data.batches()), self.data.labels, self.reference
        name, metric = metric_for(self.metric, labels is not None, original)
        before, after = metric(original, labels, original), metric(answers, labels, original)
        if name in EACH:
            drop, bound = matched(EACH[name](original, labels, original), EACH[name](answers, labels, original), self.confidence)
            return Drop(before, after, drop, bound)

        def fallen(rows: IntArray) -> float:
            some, reference = [array[rows] for array in answers], [array[rows] for array in original]
            truth = None if labels is None else labels[rows]
            return metric(reference, truth, reference) - metric(some, truth, reference)

        return Drop(before, after, *jackknifed(fallen, self.data.samples, self.confidence, self.seed))

    def holds(self, drop: Drop) -> bool:
        """Whether the drop is within the limit, with the confidence."""
        return drop.bound <= self.limit + 1e-12

    def check(self) -> None:
        """Refuse data on which no model could pass.

        Raises:
            TargetError: too few samples for the limit and the confidence.
        """
        least = needed(self.limit, self.confidence) if self.name in EACH else 0
        if self.confidence > 0.5 and (self.data.samples < least or (self.limit == 0 and self.name in EACH)):
            whole = "" if self.apart else f" (a third of {int(np.ceil(least / HELD_OUT))} of --data)"
            needs = f"give at least {least}{whole}, or --eval-data" if self.limit > 0 else "no number of samples could"
            raise TargetError(
                f"--max-drop {self.limit:.2%} cannot be told with {self.confidence:.0%} confidence from {self.place}, even if no answer "
                f"changes: {needs}; or ask for less: --confidence 50% takes the measured drop as it is. Nothing was written."
            )

    def notes(self, drop: Drop) -> tuple[str, ...]:
        """What was found, and what it is worth."""
        sure = f", at most {drop.bound:.4f} with {self.confidence:.0%} confidence" if self.confidence > 0.5 else ""
        words = f"(drop {drop.drop:.4f}{sure}, allowed {self.limit:.4f})"
        notes = [f"{self.name} on {self.place}: {drop.before:.4f} -> {drop.after:.4f} {words}"]
        if self.name == "top-1" and drop.before >= BY_HEART:
            notes.append(
                f"the original answers {drop.before:.1%} of these samples right, as networks do on samples that they were trained on. "
                "Elsewhere it is less sure of its answers, and may lose more: give --eval-data with samples that it has not seen"
            )
        return tuple(notes)


def held_out(data: Dataset | None, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Data to score with, and the third of the samples (seeded) that is held out from it.

    Raises:
        DataError: no data, or too few samples.
    """
    if data is None:
        raise DataError("--max-drop needs --data (with labels for top-1, without for agreement with the original)")
    count = int(data.samples * HELD_OUT)
    if count < FEWEST:
        least = f"expected at least {3 * FEWEST} samples, found {data.samples}"
        raise DataError(f"--max-drop holds a third of the data out to judge on; {least}")
    return data.split(count, seed)


# ---- the smallest model whose metric falls by no more than allowed ---------------------------------------------------


@dataclass(frozen=True)
class _Trial:
    """A plan with what its model loses."""

    plan: Plan
    drop: Drop


def plan_with_drop(candidates: Candidates, options: PlanOptions, judge: Judge, progress: Progress = silent) -> Plan:
    """The plan with the fewest MACs whose model loses no more than the judge allows; with targets, the plan that holds them too.

    Without targets the share of MACs is bisected, with eight models built and measured.

    Args:
        judge: on data that were not used to score.

    Raises:
        TargetError: no such plan; with the drop of the best one.
    """
    judge.check()
    analysis = candidates.analysis

    def trial(targets: tuple[str, ...]) -> _Trial:
        plan = plan_for(candidates, replace(options, targets=targets))
        removed = removal_of(plan, analysis.coupling, analysis.model.sha256)
        model = rebuilt(analysis, removed, candidates.data, candidates.repair) if removed.any() else analysis.model
        return _Trial(plan, judge.drop(model))

    best = trial(options.targets) if options.targets else _smallest(trial, judge, progress)
    drop = best.drop
    if not judge.holds(drop):
        where = "at the targets" if options.targets else "at the lightest cut that was tried"
        sure = f"; at most {drop.bound:.4f} with {judge.confidence:.0%} confidence" if drop.bound > drop.drop else ""
        raise TargetError(
            f"--max-drop cannot be held: {judge.name} on {judge.place} falls from {drop.before:.4f} to {drop.after:.4f} {where} "
            f"(drop {drop.drop:.4f}{sure}; allowed {judge.limit:.4f}). Nothing was written. "
            "Loosen --max-drop or the targets, or give more data."
        )
    return replace(best.plan, notes=(*best.plan.notes, *judge.notes(drop)))


def _smallest(trial: Callable[[tuple[str, ...]], _Trial], judge: Judge, progress: Progress) -> _Trial:
    """Bisect the share of MACs: the last trial that the judge allows, else the one that removed least."""
    low, high = 0.0, 1.0  # low is not tried
    best: _Trial | None = None
    lightest: _Trial | None = None
    with progress("searching", TRIALS) as advance:
        for _ in range(TRIALS):
            middle = (low + high) / 2
            try:
                tried = trial((f"macs={100 * middle:.6f}%",))
            except TargetError:
                tried = None
            if tried is not None and (lightest is None or tried.plan.after.macs > lightest.plan.after.macs):
                lightest = tried
            if tried is not None and judge.holds(tried.drop):
                best, high = tried, min(middle, tried.plan.after.macs / tried.plan.before.macs)
            else:
                low = middle
            advance(1)
    if lightest is None:
        raise TargetError("--max-drop: nothing can be removed under these options. Nothing was written.")
    return best or lightest
