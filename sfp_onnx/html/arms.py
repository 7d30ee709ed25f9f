"""A chart of what a bandit search saw of every arm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from ..records import BoolArray, FloatArray, IntArray
from .blocks import Chart, Mark
from .charts import LEFT, LONGEST, MOST_NAMED, PLOT, TOP, WIDTH, grid, short_names, ticks

PULLS, GAP = 44, 16  # height of the bars below, and room above them
NARROWEST, WIDEST, BETWEEN = 2.5, 16.0, 4.0  # of an arm, and between groups


@dataclass(frozen=True)
class Arms:
    """Arms of one round: their group, what they cost (1 - mean reward) with the half width of the 95 % interval, how often each was
    pulled, and which leave."""

    groups: Sequence[str]
    costs: FloatArray
    half_widths: FloatArray
    pulls: IntArray
    leaves: BoolArray


def arm_chart(title: str, arms: Arms) -> Chart:
    """Group by group in the order of the costs: a dot with its interval for each arm, a line at the cut where one cost separates
    what leaves from what stays, and the pulls as bars below."""
    order = _ordered(arms)
    runs = [list(own) for _, own in groupby(order, key=lambda arm: arms.groups[arm])]
    step = float(np.clip((WIDTH - LEFT - BETWEEN * len(runs)) / max(len(order), 1), NARROWEST, WIDEST))
    width = max(LEFT + step * len(order) + BETWEEN * len(runs) + 8, 420)
    scale = ticks(0, float((arms.costs + arms.half_widths).max(initial=0.0)) or 1.0)
    bottom = TOP + PLOT + GAP + PULLS
    most = int(arms.pulls.max(initial=1)) or 1

    def y(value: float) -> float:
        return TOP + PLOT * (1 - min(max(value, 0.0), scale[-1]) / scale[-1])

    marks = [*grid(scale, y, width), Mark("line", (LEFT, bottom, width - 4, bottom), "grid")]
    marks.append(Mark("text", (LEFT - 6, bottom - PULLS + 8, 0), "tick", f"{most} pulls", "end"))
    x = LEFT + BETWEEN / 2
    shown = dict(zip(names := [arms.groups[own[0]] for own in runs], short_names(names), strict=True))
    for own in runs:
        first = x
        for arm in own:
            marks += _arm(arms, arm, (x, step), y, (bottom, PULLS / most))
            x += step
        marks += _cut(arms, own, (first, step))
        if len(runs) <= MOST_NAMED:
            marks.append(Mark("text", ((first + x) / 2 + 3, bottom + 8, -90), "name", shown[arms.groups[own[0]]], "end"))
        x += BETWEEN
    room = 12 + 5.6 * min(max(map(len, shown.values()), default=0), LONGEST) if len(runs) <= MOST_NAMED else 10
    legend = (("stays", "stays"), ("leaves", "leaves"), ("cut", "cut"), ("before", "pulls"))
    return Chart(title, width, bottom + room, tuple(marks), legend)


def _ordered(arms: Arms) -> list[int]:
    """Arms by group (as the groups come), then by cost."""
    place = {name: index for index, name in enumerate(dict.fromkeys(arms.groups))}
    return sorted(range(len(arms.groups)), key=lambda arm: (place[arms.groups[arm]], float(arms.costs[arm]), arm))


def _arm(arms: Arms, arm: int, across: tuple[float, float], y: object, bars: tuple[float, float]) -> list[Mark]:
    assert callable(y)
    (x, step), (bottom, unit) = across, bars
    middle, cost, half, pulls = x + step / 2, float(arms.costs[arm]), float(arms.half_widths[arm]), int(arms.pulls[arm])
    word = "leaves" if arms.leaves[arm] else "stays"
    tip = f"{arms.groups[arm]}: {cost:.4g} \u00b1 {half:.2g}, {pulls} pulls, {word}"
    marks = [Mark("rect", (x + step * 0.1, bottom - pulls * unit, step * 0.8, pulls * unit), "before", tip)]
    if pulls:
        marks.append(Mark("line", (middle, y(cost - half), middle, y(cost + half)), "interval"))
        marks.append(Mark("dot", (middle, y(cost), float(np.clip(0.55 * step, 1.6, 3.0))), word, tip))
    return marks


def _cut(arms: Arms, own: Sequence[int], across: tuple[float, float]) -> list[Mark]:
    gone = [bool(arms.leaves[arm]) for arm in own]
    count = sum(gone)
    if not 0 < count < len(own) or not all(gone[:count]):
        return []
    x = across[0] + across[1] * count
    return [Mark("line", (x, TOP, x, TOP + PLOT), "cut")]
