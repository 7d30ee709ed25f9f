"""Small arithmetic on units: which indices of an axis stay when some units leave, and what a model costs then."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..core.types import BoolArray, Branch, Channels, Coupling, Cut, IntArray, Layer, Size, Trace
from ..graph import GraphIndex


def keep_mask(units: IntArray, removed: BoolArray) -> BoolArray:
    """Which indices of an axis stay; index i belongs to unit ``units[i]`` (-1: stays)."""
    if not len(removed):
        return np.ones(len(units), bool)
    return (units < 0) | ~removed[np.maximum(units, 0)]


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
    vanished = {name for branch in vanishing(coupling, removed) for name in branch.dead}
    left = ((name, carried.units) for name, channels in coupling.tensors.items() if name not in vanished for carried in channels)
    return [(name, units) for name, units in left if not keep_mask(units, removed).any()]


def cuts(coupling: Coupling, trace: Trace, removed: BoolArray, dynamic: bool = False) -> list[Cut]:
    """One entry for every axis of an activation tensor that loses channels.

    Axes that are merged with a dynamic dimension (batch x heads) have no fixed size; they are listed only if ``dynamic``.
    """
    listed = []
    for name, channels in [*coupling.tensors.items(), *coupling.masked_inputs.items()]:
        for carried in channels:
            gone = np.flatnonzero(~keep_mask(carried.units, removed))
            if len(gone) and (dynamic or carried.axis not in trace.dynamic_axes.get(name, ())):
                listed.append(Cut(name, carried.axis, len(carried.units), len(trace.shapes[name]), tuple(gone.tolist())))
    return listed


# ---- what a model costs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """An initializer of floating or quantised weights: its shape and the unit-carrying axes of each distinct use."""

    shape: tuple[int, ...]
    uses: tuple[Channels, ...]


def layer_macs(layer: Layer, removed: BoolArray) -> float:
    """Multiply-accumulates of a layer: proportional to each extent that the removal shortens."""
    macs = layer.macs
    for units in layer.extents:
        macs *= float(keep_mask(units, removed).mean()) if len(units) else 1.0
    return macs


def macs(coupling: Coupling, removed: BoolArray, samples: int) -> float:
    """Multiply-accumulates for one sample; ``samples`` is the batch size of the traced run."""
    return sum(layer_macs(layer, removed) for layer in coupling.layers) / samples


def params(parameters: Iterable[Parameter], removed: BoolArray) -> int:
    """Number of weights that stay. Uses of one initializer that are cut differently count separately."""
    total = 0
    for parameter in parameters:
        sizes = set()
        for channels in parameter.uses:
            masks = {carried.axis: keep_mask(carried.units, removed) for carried in channels}
            shape = [int(masks[axis].sum()) if axis in masks else size for axis, size in enumerate(parameter.shape)]
            sizes.add((tuple((axis, mask.tobytes()) for axis, mask in masks.items() if not mask.all()), int(np.prod(shape))))
        total += sum(size for _, size in sizes)
    return total


def parameters(shapes: Mapping[str, tuple[int, ...]], index: GraphIndex, coupling: Coupling) -> list[Parameter]:
    """Parameters of a model from shapes of its initializers and who reads them."""
    uses = {name: [coupling.constants.get((node.index, at), ()) for node, at in index.operands(name)] for name in shapes}
    return [Parameter(shape, tuple(uses[name]) or ((),)) for name, shape in shapes.items()]


def size(coupling: Coupling, weights: Sequence[Parameter], removed: BoolArray, samples: int) -> Size:
    """MACs and parameters after a removal."""
    return Size(macs(coupling, removed, samples), params(weights, removed))
