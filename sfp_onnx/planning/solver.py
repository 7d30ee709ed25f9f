"""How wide every group shall be: the least error that holds all bounds on cost.

    minimise  sum over groups g of error_g(w_g)    subject to    cost_j(w) <= bound_j  for all j

Costs are functions of all widths at once (a layer's cost is a product of two of them), so the problem is not separable and a dynamic
programme over groups does not apply. Two heuristics are run, and the better result is taken:

* *greedy*: of all ways to narrow one group, take the one with the least error per cost saved, until the bounds hold;
* *Lagrangian sweep*: for a price p, lower error + p * cost group by group until nothing changes; bisect p.

Both end by widening groups again as far as the bounds allow. Everything is deterministic; ties go to the group that comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..core.types import FloatArray, IntArray

Cost = Callable[[IntArray], FloatArray]
"""Cost (...) of candidates (..., groups), in any unit."""
MOST_CHOICES = 24
BISECTIONS = 22
SWEEPS = 6


def choices(width: int, steps: tuple[int, int, int], minimum: int, vanish: bool = False, most: int = MOST_CHOICES) -> list[int]:
    """Widths that a group may have, widest first: all of it, multiples of the first of ``steps``, below the third multiples of the
    second, of at least ``minimum`` (``most`` of them), and none at all if its branch may ``vanish``."""
    coarse, fine, start = steps
    multiples = {own for own in range(coarse, width, coarse) if own >= start} | {*range(fine, min(start, width), fine)}
    found = sorted((own for own in multiples if own >= minimum), reverse=True)
    if len(found) >= most:
        picked = np.unique(np.linspace(0, len(found) - 1, most - 1).round().astype(int))
        found = [found[index] for index in picked]
    return [width, *found, *([0] if vanish else [])]


@dataclass(frozen=True)
class Problem:
    """Widths to choose from, errors and costs.

    Attributes:
        widths: per group, descending; a group with one width stays.
        errors: per group, the error at each of its widths (0 at the first), not falling as widths fall.
        costs, bounds: functions of the widths of all groups, and what they may be at most.
    """

    widths: Sequence[Sequence[int]]
    errors: Sequence[Sequence[float]]
    costs: Sequence[Cost]
    bounds: Sequence[float]

    def kept(self, state: IntArray) -> IntArray:
        """Widths of a state (positions in ``widths``)."""
        return np.asarray([own[at] for own, at in zip(self.widths, state, strict=True)], np.int64)

    def error(self, state: IntArray) -> float:
        """Sum of errors of a state."""
        return float(sum(own[at] for own, at in zip(self.errors, state, strict=True)))

    def load(self, kept: IntArray) -> FloatArray:
        """Costs over bounds (..., costs) of candidates (..., groups); all must be at most 1."""
        return np.stack([np.asarray(cost(kept)) / bound for cost, bound in zip(self.costs, self.bounds, strict=True)], -1)

    def holds(self, state: IntArray) -> bool:
        """Whether all bounds hold."""
        return bool((self.load(self.kept(state)) <= 1 + 1e-12).all())


@dataclass(frozen=True)
class Allocation:
    """Widths per group, their summed error, who found them, and the error that each method reached."""

    kept: IntArray
    error: float
    method: str
    errors: dict[str, float]


def solve(problem: Problem) -> Allocation | None:
    """The better of both methods; None if not even the narrowest widths hold the bounds."""
    found: dict[str, IntArray] = {}
    for name, method in (("greedy", greedy), ("Lagrangian", lagrangian)):
        state = method(problem)
        if state is not None:
            found[name] = widen(problem, state)
    if not found:
        return None
    errors = {name: problem.error(state) for name, state in found.items()}
    best = min(errors, key=lambda name: errors[name])
    return Allocation(problem.kept(found[best]), errors[best], best, errors)


def _moves(problem: Problem, state: IntArray) -> tuple[IntArray, IntArray, FloatArray]:
    """All ways to narrow one group: (group, new position) per move, and the error it adds."""
    groups, positions, added = [], [], []
    for group, at in enumerate(state):
        for position in range(int(at) + 1, len(problem.widths[group])):
            groups.append(group)
            positions.append(position)
            added.append(problem.errors[group][position] - problem.errors[group][int(at)])
    return np.asarray(groups, np.int64), np.asarray(positions, np.int64), np.asarray(added, float)


def _moved(problem: Problem, state: IntArray, groups: IntArray, positions: IntArray) -> IntArray:
    """Widths (moves, groups) after each move."""
    kept = np.tile(problem.kept(state), (len(groups), 1))
    kept[np.arange(len(groups)), groups] = [problem.widths[group][at] for group, at in zip(groups, positions, strict=True)]
    return kept


def greedy(problem: Problem) -> IntArray | None:
    """Narrow one group after the other by the least error per cost saved, until all bounds hold."""
    state = np.zeros(len(problem.widths), np.int64)
    while True:
        load = problem.load(problem.kept(state))
        if (load <= 1 + 1e-12).all():
            return state
        groups, positions, added = _moves(problem, state)
        if not len(groups):
            return None
        after = problem.load(_moved(problem, state, groups, positions))
        over = load > 1 + 1e-12
        saved = np.maximum(load - np.maximum(after, 1), 0)[:, over].sum(-1)
        if not (saved > 1e-12).any():  # a peak that no single group lowers: narrow what costs least error
            saved = np.asarray([1 - problem.widths[g][p] / problem.widths[g][state[g]] for g, p in zip(groups, positions, strict=True)])
        price = np.where(saved > 1e-12, (added + 1e-12) / np.maximum(saved, 1e-12), np.inf)
        chosen = int(np.argmin(price))
        state[groups[chosen]] = positions[chosen]


def lagrangian(problem: Problem) -> IntArray | None:
    """Bisect the price of cost; at each price, minimise error + price * largest load by coordinate descent."""
    narrowest = np.asarray([len(own) - 1 for own in problem.widths], np.int64)
    if not problem.holds(narrowest):
        return None
    low, high, best = 1e-6, 1e6, narrowest
    for _ in range(BISECTIONS):
        price = float(np.sqrt(low * high))
        state = _descend(problem, price)
        if problem.holds(state):
            if problem.error(state) <= problem.error(best):
                best = state
            high = price
        else:
            low = price
    return best


def _descend(problem: Problem, price: float) -> IntArray:
    state = np.zeros(len(problem.widths), np.int64)
    for _ in range(SWEEPS):
        changed = False
        for group, widths in enumerate(problem.widths):
            if len(widths) == 1:
                continue
            kept = np.tile(problem.kept(state), (len(widths), 1))
            kept[:, group] = widths
            load = problem.load(kept)
            total = np.asarray(problem.errors[group]) + price * (load.max(-1) + 1e-3 * load.sum(-1))
            chosen = int(np.argmin(total))
            changed |= chosen != state[group]
            state[group] = chosen
        if not changed:
            break
    return state


def widen(problem: Problem, state: IntArray) -> IntArray:
    """Give back what the bounds allow: of all wider widths that hold, the one that saves the most error per load, again and again."""
    state = state.copy()
    while True:
        load = problem.load(problem.kept(state)).max()
        groups, positions, saved = [], [], []
        for group, at in enumerate(state):
            for position in range(int(at)):
                groups.append(group)
                positions.append(position)
                saved.append(problem.errors[group][int(at)] - problem.errors[group][position])
        if not groups:
            return state
        after = problem.load(_moved(problem, state, np.asarray(groups), np.asarray(positions))).max(-1)
        usable = (after <= 1 + 1e-12) & ((np.asarray(saved) > 0) | (after <= load + 1e-12))
        if not usable.any():
            return state
        gain = np.where(usable, (np.asarray(saved) + 1e-12) / np.maximum(after - load, 1e-9), -np.inf)
        chosen = int(np.argmax(gain))
        state[groups[chosen]] = positions[chosen]
