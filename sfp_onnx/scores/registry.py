"""The registry of channel scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..records import FloatArray, GroupView, ScoreOptions

ScoreFunction = Callable[[GroupView, ScoreOptions], FloatArray]


@dataclass(frozen=True)
class Score:
    """A score: importance per unit of a group, larger = keep. ``needs`` are the activation statistics that it reads."""

    name: str
    function: ScoreFunction
    summary: str
    source: str
    needs: frozenset[str]


SCORES: dict[str, Score] = {}


def score(name: str, summary: str, source: str, needs: tuple[str, ...] = ()) -> Callable[[ScoreFunction], ScoreFunction]:
    """Register a score under a name; ``needs`` is a subset of {"squares", "zeros"}."""

    def register(function: ScoreFunction) -> ScoreFunction:
        SCORES[name] = Score(name, function, summary, source, frozenset(needs))
        return function

    return register
