"""How wide every group shall be: by one number for all groups, or solved as the least error that holds all bounds on cost."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from ..core.errors import OptionError, TargetError
from ..core.options import PlanOptions
from ..core.types import Align, BoolArray, Coupling, FloatArray, Group, IntArray
from ..coupling.cost import emptied

# ---- which groups may shrink -----------------------------------------------------------------------------------------


def eligible(coupling: Coupling, options: PlanOptions, weights_of: Mapping[str, str]) -> list[Group]:
    """Groups that ``--keep`` and ``--only`` leave to choose from. ``weights_of`` gives the weight's name of each layer.

    Raises:
        OptionError: a regular expression is invalid, or ``--keep`` matches nothing.
        TargetError: nothing is left.
    """
    makers = [group.producers or (group.name,) for group in coupling.groups]
    free = allowed(options, {name: weights_of.get(name, "") for names in makers for name in names}, coupling.transforms)
    keep = _compiled(options.keep)
    if keep is not None and not any(_hits(keep, layer, weight) for layer, weight in weights_of.items()):
        raise OptionError(f"--keep '{options.keep}' matches no layer, so it would protect nothing. `sfp-onnx inspect` lists the names.")
    chosen = [group for group, names in zip(coupling.groups, makers, strict=True) if free.issuperset(names)]
    if coupling.groups and not chosen:
        fixed = " Fourier transforms stay unless --only names them." if coupling.transforms else ""
        raise TargetError(f"--keep and --only leave no group to prune. `sfp-onnx inspect` lists the names of all groups.{fixed}")
    return chosen


def allowed(options: PlanOptions, weights_of: Mapping[str, str], fixed: Collection[str]) -> set[str]:
    """Of these layers (with the names of their weights) those that ``--keep`` and ``--only`` leave to choose from; ``fixed`` are those
    that must be named."""
    keep, only = (_compiled(text) for text in (options.keep, options.only))
    pairs = weights_of.items()
    left = {layer for layer, weight in pairs if (layer not in fixed if only is None else _hits(only, layer, weight))}
    return left - {layer for layer, weight in pairs if keep is not None and _hits(keep, layer, weight)}


def _hits(pattern: re.Pattern[str], layer: str, weight: str) -> bool:
    return bool(pattern.search(layer) or pattern.search(weight))


def _compiled(text: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(text) if text else None
    except re.error as error:
        raise OptionError(f"'{text}' is not a regular expression: {error}") from error


# ---- choosing --------------------------------------------------------------------------------------------------------


def steps_of(coupling: Coupling, group: Group, align: Align) -> Align:
    """The alignment of a group's kept units that brings every weight axis that it fills to an alignment, and keeps blocks even."""
    widths = (align.block, align.fine, align.start)
    makers = set(group.producers)
    layers = [layer for layer in coupling.layers if layer.node.name in makers] if max(widths) > 1 else []
    counts = [count for layer in layers if (count := sum(int((made.units == group.units[0]).sum()) for made in layer.made))]
    return Align(*(math.lcm(group.blocks, *(width // math.gcd(width, count) for count in counts)) for width in widths))


@dataclass(frozen=True)
class _Chooser:
    """Turns a single number (how much) into a removal; monotone in it."""

    coupling: Coupling
    groups: Sequence[Group]
    scores: FloatArray
    options: PlanOptions

    @cached_property
    def orders(self) -> list[IntArray]:
        """Positions of each group from least to most important; ties leave in the order of the channels."""
        return [group.order(self.scores[group.units]) for group in self.groups]

    @cached_property
    def keys(self) -> FloatArray:
        """What all units are ranked by: their score (global), or their rank within the group as a share of it (uniform)."""
        if self.options.allocation == "global":
            return np.concatenate([self.scores[group.units] for group in self.groups])
        return np.concatenate([(np.argsort(order) + 1) / len(order) for order in self.orders])

    @cached_property
    def steps(self) -> list[Align]:
        """Alignment of each group's kept units."""
        return [steps_of(self.coupling, group, Align.parse(self.options.align)) for group in self.groups]

    def share(self, ratio: float) -> BoolArray:
        """A fraction of every group (uniform) or of all units (global)."""
        if self.options.allocation == "global":
            return self.ranked(int(ratio * len(self.keys) + 1e-9))
        return self.without([int(ratio * group.width + 1e-9) for group in self.groups])

    def ranked(self, count: int) -> BoolArray:
        """The first ``count`` units of the ranking, as far as minima and alignment let them go."""
        owner = np.repeat(np.arange(len(self.groups)), [group.width for group in self.groups])
        first = np.argsort(self.keys, kind="stable")[:count]
        return self.without(np.bincount(owner[first], minlength=len(self.groups)).tolist())

    def without(self, counts: Sequence[int]) -> BoolArray:
        """The least important units of every group, ``counts`` of them or as many as may leave."""
        kept = []
        for group, steps, count in zip(self.groups, self.steps, counts, strict=True):
            least = max(group.width - count, self.options.min_channels, 1)
            step = steps.fine if least < steps.start else steps.block
            kept.append(min(group.width, -(-least // step) * step))
        return self.keeping(kept)

    def keeping(self, kept: Sequence[int]) -> BoolArray:
        """The least important units of every group, so that ``kept`` stay (one more where a tensor would be emptied)."""
        removed = np.zeros(self.coupling.units, bool)
        for group, order, count in zip(self.groups, self.orders, kept, strict=True):
            removed[group.units[order[: group.width - int(count)]]] = True
        for _, units in emptied(self.coupling, removed):
            if removed[units].all():
                removed[units[np.argmax(self.scores[units])]] = False
        return removed


def choose(
    coupling: Coupling, groups: Sequence[Group], scores: FloatArray, options: PlanOptions,
    measure: Callable[[BoolArray], Mapping[str, float]], wanted: Mapping[str, float] | None = None,
) -> BoolArray | None:  # fmt: skip
    """Which units leave. ``scores`` has one value per unit; ``measure`` tells the figures after a removal, ``wanted`` their bounds.

    None if the bounds cannot be held.

    Raises:
        OptionError: neither or both of ratio and targets, or values out of range.
    """
    chooser = _Chooser(coupling, groups, scores, options)
    if (options.ratio is None) == (not options.targets):
        raise OptionError("give either --ratio or --target")
    if options.ratio is not None:
        return chooser.share(options.ratio)
    bounds = wanted or {}

    def holds(count: int) -> bool:
        after = measure(chooser.ranked(count))
        return all(after[what] <= bound * (1 + 1e-12) for what, bound in bounds.items())

    most = len(chooser.keys)
    fewest = bisect_left(range(most + 1), True, key=holds)
    return chooser.ranked(fewest) if fewest <= most else None


def least(coupling: Coupling, groups: Sequence[Group], scores: FloatArray, options: PlanOptions) -> BoolArray:
    """The largest removal that minima and alignment allow."""
    chooser = _Chooser(coupling, groups, scores, options)
    return chooser.ranked(len(chooser.keys))


def of_widths(coupling: Coupling, scores: FloatArray, kept: Sequence[int]) -> BoolArray:
    """The removal of the least important units, so that each group of the model keeps so many."""
    return _Chooser(coupling, coupling.groups, scores, PlanOptions(align=None)).keeping(kept)


# ---- the solver ------------------------------------------------------------------------------------------------------
#
#     minimise  sum over groups g of error_g(w_g)    subject to    cost_j(w) <= bound_j  for all j
#
# Costs are functions of all widths at once (a layer's cost is a product of two of them), so the problem is not separable and a dynamic
# programme over groups does not apply. Two heuristics are run, and the better result is taken:
#
# * greedy: of all ways to narrow one group, take the one with the least error per cost saved, until the bounds hold;
# * Lagrangian sweep: for a price p, lower error + p * cost group by group until nothing changes; bisect p.
#
# Both end by widening groups again as far as the bounds allow. Everything is deterministic; ties go to the group that comes first.


MOST_CHOICES, BISECTIONS, SWEEPS = 24, 22, 6
FULL_LOAD = 1 + 1e-12  # of a bound, and rounding


def choices(width: int, steps: Align, minimum: int, vanish: bool = False, most: int = MOST_CHOICES) -> list[int]:
    """Widths that a group may have, widest first: all of it, aligned ones of at least ``minimum`` (``most`` of them), and none at all if
    its branch may ``vanish``."""
    multiples = {at for at in range(steps.block, width, steps.block) if at >= steps.start}
    multiples.update(range(steps.fine, min(steps.start, width), steps.fine))
    narrower = sorted((at for at in multiples if at >= minimum), reverse=True)
    if len(narrower) >= most:
        picked = np.unique(np.linspace(0, len(narrower) - 1, most - 1).round().astype(int))
        narrower = [narrower[index] for index in picked]
    return [width, *narrower, *([0] if vanish else [])]


@dataclass(frozen=True)
class Tie:
    """Errors of a choice that depend on the width of another group: ``table`` is (widths of the ``owner``, choices); an owner of -1 has
    one. With any choice but the first the error of the group ``again`` counts a second time (-1: of none)."""

    owner: int
    table: FloatArray
    again: int = -1


@dataclass(frozen=True)
class Problem:
    """Widths to choose from, errors and costs.

    Attributes:
        widths: per group, descending; a group with one width stays.
        errors: per group, the error at each of its widths (0 at the first), not falling as widths fall.
        costs, bounds: functions from candidates (..., groups) to a cost (...) in any unit, and what it may be at most.
        ties: groups that stand for choices, of which the first is none: their widths are numbers without order, and their errors those of
            the tie.
    """

    widths: Sequence[Sequence[int]]
    errors: Sequence[Sequence[float]]
    costs: Sequence[Callable[[IntArray], FloatArray]]
    bounds: Sequence[float]
    ties: Mapping[int, Tie] = field(default_factory=dict)

    @cached_property
    def _tied(self) -> dict[int, list[int]]:
        """Choices by the group that their errors depend on."""
        return {owner: [at for at, tie in self.ties.items() if tie.owner == owner] for owner in {tie.owner for tie in self.ties.values()}}

    @cached_property
    def _doubled(self) -> dict[int, int]:
        """The choice with which the error of a group counts a second time."""
        return {tie.again: at for at, tie in self.ties.items() if tie.again >= 0}

    def terms(self, group: int, state: IntArray) -> FloatArray:
        """All errors that depend on one group, at each of its widths, the others being as in a state."""
        row = np.asarray(self.errors[group], float)
        if group in self.ties:
            tie = self.ties[group]
            twice = self.errors[tie.again][state[tie.again]] if tie.again >= 0 else 0.0
            return np.asarray(row + tie.table[state[tie.owner] if tie.owner >= 0 else 0] + twice * (np.arange(len(row)) > 0))
        row = row * (2 if group in self._doubled and state[self._doubled[group]] else 1)
        return np.asarray(sum((self.ties[at].table[:, state[at]] for at in self._tied.get(group, ())), row))

    def kept(self, state: IntArray) -> IntArray:
        """Widths of a state (positions in ``widths``)."""
        return np.asarray([widths[at] for widths, at in zip(self.widths, state, strict=True)], np.int64)

    def error(self, state: IntArray) -> float:
        """Sum of errors of a state."""
        chosen = sum(tie.table[state[tie.owner] if tie.owner >= 0 else 0, state[at]] for at, tie in self.ties.items())
        twice = sum(self.errors[group][state[group]] for group, at in self._doubled.items() if state[at])
        return float(sum(errors[at] for errors, at in zip(self.errors, state, strict=True)) + chosen + twice)

    def load(self, kept: IntArray) -> FloatArray:
        """Costs over bounds (..., costs) of candidates (..., groups); all must be at most 1."""
        return np.stack([np.asarray(cost(kept)) / bound for cost, bound in zip(self.costs, self.bounds, strict=True)], -1)

    def holds(self, state: IntArray) -> bool:
        """Whether all bounds hold."""
        return bool((self.load(self.kept(state)) <= FULL_LOAD).all())


@dataclass(frozen=True)
class Allocation:
    """Widths per group, their summed error, who found them, and the error that each method reached."""

    kept: IntArray
    error: float
    method: str
    errors: dict[str, float]


def compared(solution: Allocation) -> str:
    """Which method of the solver was better, and by how much."""
    if len(solution.errors) < 2:
        return f"allocation: {solution.method} only"
    worse = max(solution.errors, key=lambda name: (solution.errors[name], name != solution.method))
    if solution.errors[worse] == solution.error:
        return f"allocation: greedy and Lagrangian sweep reach the same error ({solution.error:.4g})"
    return f"allocation: {solution.method} ({solution.error:.4g}) better than {worse} ({solution.errors[worse]:.4g}) by estimated error"


def solve(problem: Problem) -> Allocation | None:
    """The better of both methods (with choices beside the widths the sweep alone, since the way down may lead through dearer ones); None if
    not even the narrowest widths hold the bounds."""
    results = {"Lagrangian": lagrangian(problem)} if problem.ties else {"greedy": greedy(problem), "Lagrangian": lagrangian(problem)}
    states = {name: widen(problem, state) for name, state in results.items() if state is not None}
    if not states:
        return None
    errors = {name: problem.error(state) for name, state in states.items()}
    best = min(errors, key=lambda name: errors[name])
    return Allocation(problem.kept(states[best]), errors[best], best, errors)


def widened(problem: Problem, found: Allocation) -> Allocation:
    """What was found with fewer choices, widened among all that a problem has."""
    state = np.asarray([list(widths).index(at) for widths, at in zip(problem.widths, found.kept.tolist(), strict=True)], np.int64)
    state = widen(problem, state)
    return replace(found, kept=problem.kept(state), error=problem.error(state))


@dataclass(frozen=True)
class _Moves:
    """Ways to change one group of a state: which (moves,), the state and the widths (moves, groups) that each leads to, and how much error
    it adds (moves,)."""

    group: IntArray
    states: IntArray
    kept: IntArray
    added: FloatArray


def _moves(problem: Problem, state: IntArray, narrower: bool) -> _Moves:
    """All ways to narrow, or to widen, one group, or to choose otherwise."""
    pairs = []
    for group, at in enumerate(state.tolist()):
        count = len(problem.widths[group])
        positions = [*range(at), *range(at + 1, count)] if group in problem.ties else range(at + 1, count) if narrower else range(at)
        pairs += [(group, position) for position in positions]
    group, positions = np.asarray(pairs, np.int64).reshape(-1, 2).T
    states, kept = (np.tile(row, (len(pairs), 1)) for row in (state, problem.kept(state)))
    rows = np.arange(len(pairs))
    states[rows, group], kept[rows, group] = positions, [problem.widths[group][position] for group, position in pairs]
    terms = {number: problem.terms(number, state) for number in set(group.tolist())}
    added = [terms[group][position] - terms[group][int(state[group])] for group, position in pairs]
    return _Moves(group, states, kept, np.asarray(added, float))


def greedy(problem: Problem) -> IntArray | None:
    """Narrow one group after the other by the least error per cost saved, until all bounds hold."""
    state = np.zeros(len(problem.widths), np.int64)
    while True:
        load = problem.load(problem.kept(state))
        over = load > FULL_LOAD
        if not over.any():
            return state
        moves = _moves(problem, state, narrower=True)
        if not len(moves.group):
            return None
        saved = np.maximum(load - np.maximum(problem.load(moves.kept), 1), 0)[:, over].sum(-1)
        if not (saved > 1e-12).any():  # a peak that no single group lowers: narrow what costs least error
            saved = 1 - moves.kept[np.arange(len(moves.group)), moves.group] / problem.kept(state)[moves.group]
        price = np.where(saved > 1e-12, (moves.added + 1e-12) / np.maximum(saved, 1e-12), np.inf)
        state = moves.states[np.argmin(price)]


def lagrangian(problem: Problem) -> IntArray | None:
    """Bisect the price of cost; at each price, minimise error + price * largest load by coordinate descent."""
    narrowest = np.asarray([0 if group in problem.ties else len(widths) - 1 for group, widths in enumerate(problem.widths)], np.int64)
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
    free = [(group, widths) for group, widths in enumerate(problem.widths) if len(widths) > 1]
    for _ in range(SWEEPS):
        before = state.copy()
        for group, widths in free:
            kept = np.tile(problem.kept(state), (len(widths), 1))
            kept[:, group] = widths
            load = problem.load(kept)
            total = problem.terms(group, state) + price * (load.max(-1) + 1e-3 * load.sum(-1))
            state[group] = np.argmin(total)
        if np.array_equal(before, state):
            break
    return state


def widen(problem: Problem, state: IntArray) -> IntArray:
    """Give back what the bounds allow: of all wider widths that hold, the one that saves the most error per load, again and again."""
    while True:
        load = problem.load(problem.kept(state)).max()
        moves = _moves(problem, state, narrower=False)
        saved, after = -moves.added, problem.load(moves.kept).max(-1)
        free = (after <= load + 1e-12) & (saved >= 0) & ~np.isin(moves.group, list(problem.ties))
        usable = (after <= FULL_LOAD) & ((saved > 0) | free)
        if not usable.any():
            return state
        gain = np.where(usable, (saved + 1e-12) / np.maximum(after - load, 1e-9), -np.inf)
        state = moves.states[np.argmax(gain)]
