"""The smallest model that loses no more than allowed, and how sure a measured drop is: one-sided upper bounds from samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import Any

import numpy as np

from ..core.errors import DataError, OptionError, TargetError
from ..core.options import PlanOptions
from ..core.system import log
from ..core.types import Factor, IntArray, Plan, Precision
from ..coupling.analysis import Progress, silent
from ..data.dataset import Dataset
from ..evaluation import TITLES, Comparison, Metric, built_in, measure as compare, outputs, unknown_meaning, user_metric
from ..evaluation.meaning import Reading
from ..evaluation.measures import PARTS, Drop, Measure, needed, quantile, spread
from ..graph import Model
from ..repair import rebuilt
from . import parse_target, removal_of
from .precision import of_plan
from .search import Candidates, plan_for

HELD_OUT = 1 / 3  # of the data, to judge on
FEWEST = 8  # samples to judge on
BY_HEART = 0.995  # right answers of the original from which on the samples look like those that it was trained on
TRIALS = 8  # models that are built and judged, without targets
MOST_ADVISED = 10**7  # samples


def jackknifed(value: Callable[[IntArray], float], samples: int, confidence: float, seed: int = 0) -> tuple[float, float]:
    """Any figure of samples (such as the drop of a metric), and what it is at most with a confidence, from its values without one part of
    the samples after the other.

    Args:
        value: the figure of some samples, by their positions.
    """
    everything = np.arange(samples)
    parts = np.array_split(np.random.default_rng(seed).permutation(samples), min(PARTS, samples))
    whole, error = value(everything), spread([np.setdiff1d(everything, part) for part in parts], value)
    return whole, whole + max(0.0, quantile(confidence, len(parts))) * error


# ---- how much a model loses on data that it was not made with --------------------------------------------------------


@dataclass(frozen=True)
class Judge:
    """What models are judged by: ``limit`` on how much worse the measure of the task (or what ``reading`` asks for) may become against the
    original, ``confidence`` with which it must hold. ``apart``: the data are not part of the calibration data."""

    original: Model
    data: Dataset
    limit: float
    confidence: float
    reading: Reading
    apart: bool = False
    seed: int = 0

    @cached_property
    def own(self) -> Metric | None:
        """The measure of the user, if there is one."""
        return None if built_in(self.reading.metric) else user_metric(str(self.reading.metric))

    @cached_property
    def reference(self) -> list[Any]:
        """Outputs of the original."""
        return outputs(self.original, self.data.batches())

    @cached_property
    def measure(self) -> Measure:
        """The measure, if it is not the user's.

        Raises:
            OptionError: nothing says what the output means.
        """
        unknown_meaning(self.reading, "--max-drop")
        found, why = self._compared(self.original).metric
        if why:
            log.warning(why)
        return found

    @property
    def name(self) -> str:
        """Name of the measure."""
        return str(self.reading.metric) if self.own else TITLES.get(self.measure.name, self.measure.name)

    @property
    def share(self) -> bool:
        """Whether it is a share of samples."""
        return self.own is None and self.measure.share

    @property
    def place(self) -> str:
        """What the model is judged on."""
        return f"{self.data.samples} " + ("samples of --max-drop-data" if self.apart else "calibration samples that were not scored with")

    def _compared(self, model: Model) -> Comparison:
        models = [self.original, model] if model is not self.original else [model]
        return compare(models, self.data.batches(), self.data.labels, self.reading)[0][-1]

    def drop(self, model: Model) -> Drop:
        """How much worse a model is.

        Raises:
            OptionError: the measure cannot be taken of it.
        """
        if self.own is not None:
            return self._own_drop(self.own, model)
        found = self._compared(model).tally(self.measure.name)
        if found is None:
            raise OptionError(f"{self.measure.name} cannot be taken of {self.reading.judged}. Give --metric or --output-name")
        return found.drop(self.confidence)

    def _own_drop(self, metric: Metric, model: Model) -> Drop:
        answers, labels, original = outputs(model, self.data.batches()), self.data.labels, self.reference
        before, after = metric(original, labels), metric(answers, labels)
        if any(isinstance(array, list) for array in (*answers, *original)):  # of what has no axis of samples there are no parts
            return Drop(before, after, before - after, before - after, self.data.samples)

        def fallen(rows: IntArray) -> float:
            truth = None if labels is None else labels[rows]
            return metric([array[rows] for array in original], truth) - metric([array[rows] for array in answers], truth)

        return Drop(before, after, *jackknifed(fallen, self.data.samples, self.confidence, self.seed), self.data.samples)

    def holds(self, drop: Drop) -> bool:
        """Whether the drop is within the limit, with the confidence."""
        return drop.bound <= self.limit + 1e-12

    def enough(self, drop: Drop) -> int | None:
        """How many such samples would show that a drop is within the limit; None if none would, or it is shown."""
        if self.holds(drop) or drop.drop >= self.limit or drop.bound == drop.drop:
            return None
        count = drop.samples * ((drop.bound - drop.drop) / (self.limit - drop.drop)) ** 2  # the error goes with 1 / sqrt(samples)
        count = max(count, needed(self.limit, self.confidence) if self.share else 0)
        return int(ceil(count / 10) * 10) if count < MOST_ADVISED else None

    def check(self) -> None:
        """Refuse data on which no model could pass.

        Raises:
            TargetError: too few samples for the limit and the confidence.
        """
        least = needed(self.limit, self.confidence) if self.share else 0
        if self.confidence > 0.5 and (self.data.samples < least or (self.limit == 0 and self.share)):
            whole = "" if self.apart else f" (a third of {int(np.ceil(least / HELD_OUT))} of --data)"
            needs = f"give at least {least}{whole}, or --max-drop-data" if self.limit > 0 else "no number of samples could"
            raise TargetError(
                f"--max-drop {self.limit:.2%} cannot be told with {self.confidence:.0%} confidence from {self.place}, even if no answer "
                f"changes: {needs}; or ask for less: --confidence 50% takes the measured drop as it is. Nothing was written."
            )

    def tried(self, where: str, drop: Drop) -> str:
        """What a trial gave, in a line."""
        sure = f", up to {drop.bound:.2%} with {drop.samples} samples" if self.confidence > 0.5 else ""
        more = self.enough(drop)
        advice = f"; {more} samples would allow it" if more else ""
        return f"{where}: drop {drop.drop:.2%}{sure}: {'held' if self.holds(drop) else 'rejected'}{advice}"

    def notes(self, drop: Drop) -> tuple[str, ...]:
        """What was found, and what it is worth."""
        sure = f", at most {drop.bound:.4f} with {self.confidence:.0%} confidence" if self.confidence > 0.5 else ""
        words = f"(drop {drop.drop:.4f}{sure}, allowed {self.limit:.4f})"
        notes = [f"{self.name} on {self.place}: {drop.before:.4f} -> {drop.after:.4f} {words}"]
        if self.name == "top-1" and drop.before >= BY_HEART:
            notes.append(
                f"the original answers {drop.before:.1%} of these samples right, as networks do on samples that they were trained on. "
                "Elsewhere it is less sure of its answers, and may lose more: give --max-drop-data with samples that it has not seen"
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
    share: float


def plan_with_drop(candidates: Candidates, options: PlanOptions, judge: Judge, progress: Progress = silent) -> Plan:
    """The plan with the fewest MACs whose model loses no more than the judge allows; with targets, the plan that holds them too.

    Without targets the share of MACs is bisected, with eight models built and measured.

    Args:
        judge: on data that were not used to score.

    Raises:
        TargetError: no such plan; with the drop of the best one.
        OptionError: nothing says what the judged output means.
    """
    judge.check()
    analysis = candidates.analysis

    known: dict[tuple[bytes, tuple[Factor, ...], tuple[Precision, ...]], Drop] = {}
    sized = not options.targets or "size" in [parse_target(text).what for text in options.targets]
    figure = "size" if options.precision == "auto" and sized else "macs"

    def trial(targets: tuple[str, ...]) -> _Trial:
        plan = plan_for(candidates, replace(options, targets=targets))
        removed = removal_of(plan, analysis.coupling, analysis.model.sha256)
        share = plan.after.macs / plan.before.macs
        if figure in plan.figures and figure != "macs":
            share = plan.figures[figure]["actual"] / plan.figures[figure]["before"]
        key = removed.tobytes(), plan.factors, plan.precisions
        if key not in known:
            held = candidates.data, candidates.repair, candidates.measures, plan.factors
            drop = judge.drop(rebuilt(analysis, removed, *held, of_plan(plan.precisions, analysis.coupling)))
            log.info(judge.tried(f"{figure}={share:.1%}", drop))
            known[key] = drop
        return _Trial(plan, known[key], share)

    best, limited = (trial(options.targets), "") if options.targets else _smallest(trial, judge, progress, figure)
    drop = best.drop
    if not judge.holds(drop):
        where = "at the targets" if options.targets else "at the lightest cut that was tried"
        sure = f"; at most {drop.bound:.4f} with {judge.confidence:.0%} confidence" if drop.bound > drop.drop else ""
        more = judge.enough(drop)
        raise TargetError(
            f"--max-drop cannot be held: {judge.name} on {judge.place} goes from {drop.before:.4f} to {drop.after:.4f} {where} "
            f"(drop {drop.drop:.4f}{sure}; allowed {judge.limit:.4f}). Nothing was written. "
            f"Loosen --max-drop or the targets, or give more data{f' to judge on ({more} samples would allow it)' if more else ''}."
        )
    return replace(best.plan, notes=(*best.plan.notes, *judge.notes(drop), *filter(None, [limited])))


def _smallest(trial: Callable[[tuple[str, ...]], _Trial], judge: Judge, progress: Progress, figure: str) -> tuple[_Trial, str]:
    """Bisect the share of a figure (MACs): the last trial that the judge allows, else the one that removed least; and what limited it."""
    low, high = 0.0, 1.0  # low is not tried
    best: _Trial | None = None
    lightest: _Trial | None = None
    refused: _Trial | None = None
    with progress("searching", TRIALS) as advance:
        for _ in range(TRIALS):
            middle = (low + high) / 2
            try:
                tried = trial((f"{figure}={100 * middle:.6f}%",))
            except TargetError:
                tried = None
            if tried is not None and (lightest is None or tried.share > lightest.share):
                lightest = tried
            if tried is not None and judge.holds(tried.drop):
                best, high = tried, min(middle, tried.share)
            else:
                low, refused = middle, tried or refused
            advance(1)
    if lightest is None:
        raise TargetError("--max-drop: nothing can be removed under these options. Nothing was written.")
    if refused is None:
        return best or lightest, "limited by what can be removed: no smaller model was refused"
    cause = "how few samples it was judged on" if refused.drop.drop <= judge.limit else "the drop itself"
    where = f"{figure}={refused.share:.1%}"
    return best or lightest, f"limited by {cause}: {judge.tried(where, refused.drop)}"
