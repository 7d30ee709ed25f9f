"""Small arithmetic on units: which indices of an axis stay when some units leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .records import BoolArray, Branch, Coupling, Cut, IntArray, Trace


def keep_mask(units: IntArray, removed: BoolArray) -> BoolArray:
    """Which indices of an axis stay; index i belongs to unit ``units[i]`` (-1: stays)."""
    if not len(removed):
        return np.ones(len(units), bool)
    gone: BoolArray = (units >= 0) & removed[np.maximum(units, 0)]
    return ~gone


def removal(coupling: Coupling, chosen: Mapping[str, Sequence[int]]) -> BoolArray:
    """Flags per unit from positions per group."""
    removed = np.zeros(coupling.units, bool)
    for group in coupling.groups:
        removed[group.units[list(chosen.get(group.name, ()))]] = True
    return removed


def vanishing(coupling: Coupling, removed: BoolArray) -> list[Branch]:
    """Branches that vanish, because all units of their group leave."""
    return [coupling.branches[group.name] for group in coupling.groups if group.name in coupling.branches and removed[group.units].all()]


def emptied(coupling: Coupling, removed: BoolArray) -> list[tuple[str, IntArray]]:
    """Tensors that a removal would leave without any channel, with the units of the emptied axis; not those of branches that vanish."""
    found = []
    vanished = {name for branch in vanishing(coupling, removed) for name in branch.dead}
    for name, channels in coupling.tensors.items():
        if name in vanished:
            continue
        found += [(name, own.units) for own in channels if not keep_mask(own.units, removed).any()]
    return found


def cuts(coupling: Coupling, trace: Trace, removed: BoolArray, dynamic: bool = False) -> list[Cut]:
    """One entry for every axis of an activation tensor that loses channels.

    Axes that are merged with a dynamic dimension (batch x heads) have no fixed size; they are listed only if ``dynamic``.
    """
    found = []
    for name, channels in [*coupling.tensors.items(), *coupling.masked_inputs.items()]:
        for own in channels:
            gone = np.flatnonzero(~keep_mask(own.units, removed))
            if len(gone) and (dynamic or own.axis not in trace.dynamic_axes.get(name, ())):
                found.append(Cut(name, own.axis, len(own.units), len(trace.shapes[name]), tuple(gone.tolist())))
    return found
