"""The registry of channel scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..core.errors import OptionError
from ..core.options import ScoreOptions
from ..core.types import FloatArray, GroupView

ScoreFunction = Callable[[GroupView, ScoreOptions], FloatArray]


@dataclass(frozen=True)
class Score:
    """A score: importance per unit of a group, larger = keep. ``needs`` is what it reads of the data."""

    name: str
    function: ScoreFunction
    summary: str
    source: str
    needs: frozenset[str]


SCORES: dict[str, Score] = {}


def score(name: str, summary: str, source: str, needs: tuple[str, ...] = ()) -> Callable[[ScoreFunction], ScoreFunction]:
    """Register a score under a name; ``needs`` is a subset of {"squares", "zeros", "profile", "loss", "elimination"}."""

    def register(function: ScoreFunction) -> ScoreFunction:
        SCORES[name] = Score(name, function, summary, source, frozenset(needs))
        return function

    return register


def parts(name: str) -> tuple[Score, ...]:
    """The scores that a name stands for: one, or several joined by ``+``.

    Raises:
        OptionError: a name is not registered.
    """
    names = [own.strip() for own in name.split("+")]
    unknown = next((own for own in names if own not in SCORES), None)
    if unknown is not None:
        raise OptionError(f"unknown score '{unknown}'. Known: {', '.join(sorted(SCORES))}, and several joined by '+'")
    return tuple(SCORES[own] for own in names)


def combined(values: Sequence[FloatArray]) -> FloatArray:
    """Scores of one group by several rules as one: the mean of their ranks, as shares of the group (ties share their mean rank)."""
    if len(values) == 1:
        return values[0]
    total = np.zeros(len(values[0]))
    for own in values:
        _, inverse, counts = np.unique(own, return_inverse=True, return_counts=True)
        total += (np.cumsum(counts) - (counts - 1) / 2)[inverse] / len(own)
    return total / len(values)
