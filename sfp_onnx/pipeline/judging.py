"""How much a model loses on data that it was not made with, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ..confidence import jackknifed, matched, needed
from ..data import Dataset
from ..errors import DataError, TargetError
from ..graph import Model
from ..metrics import EACH, metric_for, outputs
from ..records import Array, IntArray

HELD_OUT = 1 / 3
FEWEST = 8
BY_HEART = 0.995  # right answers of the original from which on the samples look like those that it was trained on


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
    seed: int = field(default=0)

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
        found, labels, original = outputs(model, self.data.batches()), self.data.labels, self.reference
        name, metric = metric_for(self.metric, labels is not None, original)
        before, after = metric(original, labels, original), metric(found, labels, original)
        if name in EACH:
            drop, bound = matched(EACH[name](original, labels, original), EACH[name](found, labels, original), self.confidence)
            return Drop(before, after, drop, bound)

        def fallen(rows: IntArray) -> float:
            own, other = [array[rows] for array in found], [array[rows] for array in original]
            truth = None if labels is None else labels[rows]
            return metric(other, truth, other) - metric(own, truth, other)

        return Drop(before, after, *jackknifed(fallen, self.data.samples, self.confidence, self.seed))

    def holds(self, found: Drop) -> bool:
        """Whether the drop is within the limit, with the confidence."""
        return found.bound <= self.limit + 1e-12

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

    def notes(self, found: Drop) -> tuple[str, ...]:
        """What was found, and what it is worth."""
        sure = f", at most {found.bound:.4f} with {self.confidence:.0%} confidence" if self.confidence > 0.5 else ""
        drop = f"(drop {found.drop:.4f}{sure}, allowed {self.limit:.4f})"
        notes = [f"{self.name} on {self.place}: {found.before:.4f} -> {found.after:.4f} {drop}"]
        if self.name == "top-1" and found.before >= BY_HEART:
            notes.append(
                f"the original answers {found.before:.1%} of these samples right, as networks do on samples that they were trained on. "
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
