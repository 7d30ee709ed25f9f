"""Removals that hold the same targets, compared by how far they leave the repaired model from the original."""

from __future__ import annotations

from collections.abc import Mapping

from ..data import Dataset
from ..records import BoolArray, RepairOptions
from .analysis import Analysis, Progress, silent
from .repairing import distances, rebuilt

HELD_OUT = 1 / 4
FEWEST = 16  # samples to compare on


def enough(data: Dataset) -> bool:
    """Whether there are samples enough to compare on."""
    return data.samples * HELD_OUT >= FEWEST


def nearest(
    analysis: Analysis, removals: Mapping[str, BoolArray], data: Dataset, repair: RepairOptions, progress: Progress = silent
) -> tuple[str, str]:
    """The name of the removal whose repaired model is nearest to the original on a quarter of the data, which the repairs do not see, and
    a word on each."""
    count = int(data.samples * HELD_OUT)
    seen, judge = data.split(count, [repair.seed, data.samples])
    models = []
    with progress("comparing widths", len(removals)) as advance:
        for removed in removals.values():
            models.append(rebuilt(analysis, removed, seen, repair))
            advance(1)
    word, found = distances(analysis, models, judge)
    left = dict(zip(removals, found, strict=True))
    best = min(left, key=lambda name: left[name])
    shown = ", ".join(f"{value:.4g} with {name}" for name, value in left.items())
    return best, f"distance from the original after the repair ({word}), on {count} samples held out for this: {shown}; taken: {best}"
