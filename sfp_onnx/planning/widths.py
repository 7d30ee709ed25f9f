"""Decide which units leave, before anything is cut."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..core.errors import OptionError, TargetError
from ..core.options import PlanOptions
from ..core.types import BoolArray, Coupling, FloatArray, Group, IntArray
from ..coupling.cost import emptied

# ---- which groups may shrink -----------------------------------------------------------------------------------------


def eligible(coupling: Coupling, options: PlanOptions, weights_of: Mapping[str, str]) -> list[Group]:
    """Groups that ``--keep`` and ``--only`` leave to choose from. ``weights_of`` gives the weight's name of each layer.

    Raises:
        OptionError: a regular expression is invalid.
        TargetError: nothing is left.
    """
    keep, only = (_compiled(text) for text in (options.keep, options.only))

    def hits(pattern: re.Pattern[str], layer: str) -> bool:
        return bool(pattern.search(layer) or pattern.search(weights_of.get(layer, "")))

    chosen = []
    for group in coupling.groups:
        names = group.producers or (group.name,)
        if keep and any(hits(keep, name) for name in names):
            continue
        if only and not all(hits(only, name) for name in names):
            continue
        chosen.append(group)
    if coupling.groups and not chosen:
        raise TargetError("--keep and --only leave no group to prune. `sfp-onnx inspect` lists the names of all groups.")
    return chosen


def _compiled(text: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(text) if text else None
    except re.error as error:
        raise OptionError(f"'{text}' is not a regular expression: {error}") from error


# ---- choosing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Widths that a weight axis may end up with: multiples of ``block``, but below ``start`` multiples of ``fine``."""

    block: int = 1
    fine: int = 1
    start: int = 1


def grid_of(align: int | str | None) -> Grid:
    """Read ``None`` or "none" (any width), 8 or "8" (multiples), "16:4" (multiples of 16, below 16 of 4), "4:1:12" (multiples of 4, below
    12 any width). "auto" and "default", before a device has settled them, leave any width.

    Raises:
        OptionError: not of that form.
    """
    text = "1" if align in (None, "none", "auto", "default") else str(align)
    match = re.fullmatch(r"([1-9]\d{0,5})(?::([1-9]\d{0,5}))?(?::([1-9]\d{0,5}))?", text, re.ASCII)
    if match is None:
        raise OptionError(f"alignment '{align}': expected a positive number, such as 8, several, such as 16:4 or 4:1:12, 'auto' or 'none'")
    return Grid(int(match[1]), int(match[2] or match[1]), int(match[3] or match[1]))


def step_of(coupling: Coupling, group: Group, align: int) -> int:
    """Kept units come in multiples of this, so that every weight axis that the group fills is a multiple of ``align``."""
    step = 1
    for layer in coupling.layers if align > 1 else ():
        own = int((layer.writes == group.units[0]).sum())
        if own:
            step = math.lcm(step, align // math.gcd(align, own))
    return step


def steps_of(coupling: Coupling, group: Group, grid: Grid) -> tuple[int, int, int]:
    """Kept units come in multiples of the first, and below the third in multiples of the second."""
    coarse, fine, start = (step_of(coupling, group, own) for own in (grid.block, grid.fine, grid.start))
    return coarse, fine, start


@dataclass(frozen=True)
class _Chooser:
    """Turns a single number (how much) into a removal; monotone in it."""

    coupling: Coupling
    groups: Sequence[Group]
    scores: FloatArray
    options: PlanOptions

    @property
    def grid(self) -> Grid:
        """Widths that may be kept."""
        return grid_of(self.options.align)

    def _kept(self, group: Group, wanted: int) -> int:
        coarse, fine, start = steps_of(self.coupling, group, self.grid)
        least = max(wanted, self.options.min_channels, 1)
        step = fine if least < start else coarse
        return min(group.width, -(-least // step) * step)

    def _orders(self) -> list[IntArray]:
        """Positions of each group from least to most important; ties leave in the order of the channels."""
        return [np.argsort(self.scores[group.units], kind="stable") for group in self.groups]

    def _keys(self) -> FloatArray:
        """What all units are ranked by: their score (global), or their rank within the group as a share of it (uniform)."""
        if self.options.allocation == "global":
            return np.concatenate([self.scores[group.units] for group in self.groups])
        keys = []
        for group, order in zip(self.groups, self._orders(), strict=True):
            shares = np.empty(group.width)
            shares[order] = np.arange(1, group.width + 1) / group.width
            keys.append(shares)
        return np.concatenate(keys)

    def share(self, ratio: float) -> BoolArray:
        """A fraction of every group (uniform) or of all units (global)."""
        if self.options.allocation == "global":
            return self.ranked(int(ratio * self.total + 1e-9))
        return self._remove([int(ratio * group.width + 1e-9) for group in self.groups])

    @property
    def total(self) -> int:
        """Number of units to choose from."""
        return sum(group.width for group in self.groups)

    def ranked(self, count: int) -> BoolArray:
        """The first ``count`` units of the ranking, as far as minima and alignment let them go."""
        owner = np.repeat(np.arange(len(self.groups)), [group.width for group in self.groups])
        first = np.argsort(self._keys(), kind="stable")[:count]
        return self._remove(np.bincount(owner[first], minlength=len(self.groups)).tolist())

    def _remove(self, counts: Sequence[int]) -> BoolArray:
        """The least important units of every group, ``counts`` of them or as many as may leave."""
        return self.keeping([self._kept(group, group.width - count) for group, count in zip(self.groups, counts, strict=True)])

    def keeping(self, kept: Sequence[int]) -> BoolArray:
        """The least important units of every group, so that ``kept`` stay (one more where a tensor would be emptied)."""
        removed = np.zeros(self.coupling.units, bool)
        for group, order, count in zip(self.groups, self._orders(), kept, strict=True):
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
        if not 0 <= options.ratio < 1:
            raise OptionError(f"ratio {options.ratio}: expected a number from 0 up to, but not including, 1")
        return chooser.share(options.ratio)
    bounds = wanted or {}

    def holds(count: int) -> bool:
        after = measure(chooser.ranked(count))
        return all(after[what] <= bound * (1 + 1e-12) for what, bound in bounds.items())

    fewest = bisect_left(range(chooser.total + 1), True, key=holds)
    return chooser.ranked(fewest) if fewest <= chooser.total else None


def least(coupling: Coupling, groups: Sequence[Group], scores: FloatArray, options: PlanOptions) -> BoolArray:
    """The largest removal that minima and alignment allow."""
    chooser = _Chooser(coupling, groups, scores, options)
    return chooser.ranked(chooser.total)


def of_widths(coupling: Coupling, scores: FloatArray, kept: Sequence[int]) -> BoolArray:
    """The removal of the least important units, so that each group of the model keeps so many."""
    return _Chooser(coupling, coupling.groups, scores, PlanOptions(align=None)).keeping(kept)
