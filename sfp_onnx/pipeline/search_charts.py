"""What a report shows of a bandit search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .. import html
from ..html import Section
from ..records import BoolArray
from .deciding import Candidates

SHOWN = 10  # rounds
Key = tuple[str, int]


def searched(scored: Candidates, removed: BoolArray | None) -> list[Section]:
    """Pulls, means and intervals of every arm, round by round, and what left after each (None: no plan was made)."""
    rounds: Sequence[Mapping[str, Any]] = scored.traces.get("rounds", ())
    if not rounds:
        return []
    gone = set() if removed is None else _gone(scored, removed)
    arms = [list(zip(own["group"], own["position"], strict=True)) for own in rounds]
    charts = []
    for index, own in enumerate(rounds[:SHOWN]):
        stay = set(arms[index + 1]) if index + 1 < len(rounds) else set[Key]()
        leaves = np.array([key in gone and key not in stay for key in arms[index]], bool)
        charts.append(_chart(own, leaves, len(rounds), sum(map(int, own["pulls"]))))
    words = [
        f"{scored.recorded.get('score')}: what masking each channel costs (1 - mean reward) with its 95 % interval over images, group by "
        f"group in that order; below, how often it was pulled. {scored.traces.get('images_per_pull')} images in a pull.",
    ]
    if len(rounds) > 1:
        words.append("Each round shows what left after it; the next one pulls the pruned network.")
    return [Section("What the search saw", tuple(words), tuple(charts))]


def _gone(scored: Candidates, removed: BoolArray) -> set[Key]:
    return {(group.name, int(at)) for group in scored.groups for at in np.flatnonzero(removed[group.units])}


def _chart(own: Mapping[str, Any], leaves: BoolArray, rounds: int, pulls: int) -> html.Chart:
    number = f"Round {own['round']} of {rounds}: " if rounds > 1 else ""
    costs = 1 - np.asarray(own["mean"], np.float64)
    arms = html.Arms(own["group"], costs, np.asarray(own["half_width"]), np.asarray(own["pulls"], np.int64), leaves)
    return html.arm_chart(f"{number}{len(leaves)} arms, {pulls} pulls, {int(leaves.sum())} leave", arms)
