"""Small arithmetic on units: which indices of an axis stay when some units leave, and what a model costs then."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from ..core.types import (
    INPUTS,
    OUTPUTS,
    SIDES,
    Array,
    BoolArray,
    Branch,
    Channels,
    Coupling,
    Cut,
    Factor,
    Form,
    Group,
    IntArray,
    Layer,
    Node,
    Trace,
)  # fmt: skip
from ..graph import GraphIndex, Initializer, Model, Prepared, initializers, nodes, outputs
from ..rules.scales import quantised_operands


def keep_mask(units: IntArray, removed: BoolArray) -> BoolArray:
    """Which indices of an axis stay; index i belongs to unit ``units[i]`` (-1: stays), as `AxisUnits` has them."""
    if not len(removed):
        return np.ones(units.shape, bool)
    return (units < 0) | ~removed[np.maximum(units, 0)]


def kept_masks(channels: Channels, removed: BoolArray) -> dict[int, BoolArray]:
    """Which indices stay, of each axis of a tensor that carries units."""
    masks: dict[int, BoolArray] = {}
    for carried in channels:
        mask = keep_mask(carried.units, removed)
        masks[carried.axis] = masks[carried.axis] & mask if carried.axis in masks else mask
    return masks


def length(mask: BoolArray) -> int:
    """How many indices of an axis stay; of one in blocks (blocks, size) those of every block."""
    return int(mask.reshape(-1, mask.shape[-1])[0].sum())


def without(array: Array, axis: int, mask: BoolArray) -> Array:
    """What stays of an array whose axis is masked; in blocks of the first axis each its own."""
    if mask.ndim == 1:
        return np.compress(mask, array, axis)
    return np.concatenate([np.compress(own, part, axis) for own, part in zip(mask, np.split(array, len(mask)), strict=True)])


def uneven(coupling: Coupling, removed: BoolArray) -> list[Group]:
    """Groups of which the blocks do not lose as many units each."""
    counts = ((group, removed[group.units].reshape(group.blocks, -1).sum(1)) for group in coupling.groups if group.blocks > 1)
    return [group for group, lost in counts if (lost != lost[0]).any()]


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
        for axis, mask in kept_masks(channels, removed).items():
            gone = np.flatnonzero(~mask)
            if len(gone) and (dynamic or axis not in trace.dynamic_axes.get(name, ())):
                listed.append(Cut(name, axis, len(mask), len(trace.shapes[name]), tuple(gone.tolist())))
    return listed


# ---- what a model costs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """An initializer of weights: its shape, bytes of an element, and the unit-carrying axes of each distinct use."""

    name: str
    shape: tuple[int, ...]
    itemsize: float
    uses: tuple[Channels, ...]


def layer_macs(layer: Layer, removed: BoolArray) -> float:
    """Multiply-accumulates of a layer: proportional to each extent that the removal shortens."""
    macs = layer.macs
    for units in layer.extents:
        macs *= float(keep_mask(units, removed).mean()) if len(units) else 1.0
    return macs


def macs(layers: Iterable[Layer], removed: BoolArray, samples: int) -> float:
    """Multiply-accumulates for one sample; ``samples`` is the batch size of the traced run."""
    return sum(layer_macs(layer, removed) for layer in layers) / samples


def params(parameters: Iterable[Parameter], removed: BoolArray) -> int:
    """Number of weights that stay. Uses of one initializer that are cut differently count separately."""
    total = 0
    for parameter in parameters:
        sizes = set()
        for channels in parameter.uses:
            masks = kept_masks(channels, removed)
            shape = [length(masks[axis]) if axis in masks else size for axis, size in enumerate(parameter.shape)]
            sizes.add((tuple((axis, mask.tobytes()) for axis, mask in masks.items() if not mask.all()), int(np.prod(shape))))
        total += sum(size for _, size in sizes)
    return total


def parameters(weights: Mapping[str, Initializer], index: GraphIndex, coupling: Coupling) -> list[Parameter]:
    """Parameters of a model from its weights and who reads them."""
    uses = {name: [coupling.constants.get((node.index, at), ()) for node, at in index.operands(name)] for name in weights}
    return [Parameter(name, shape, np.dtype(dtype).itemsize, tuple(uses[name]) or ((),)) for name, (shape, dtype) in weights.items()]


# ---- layers that become two ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """A layer that may become two: its ``form``, and name, ``shape`` and unit-carrying axes of its weight, which is input ``at``; its
    input and output channels are on axis ``reads`` and ``makes`` of it. It reads ``stretch`` times as many positions as it makes."""

    layer: Layer
    form: Form
    weight: str
    shape: tuple[int, ...]
    carried: Channels
    at: int
    reads: int
    makes: int
    stretch: float = 1.0

    @property
    def taps(self) -> int:
        """Elements of the window."""
        return prod(self.form.kernel)

    def share(self, removed: BoolArray, factor: Factor) -> tuple[float, float]:
        """Multiply-accumulates and weights of both halves, relative to those of the whole."""
        rows, columns = self.sizes(removed, factor.narrow)
        stretch = self.stretch if factor.narrow == INPUTS else 1.0
        return factor.rank * (1 / rows + stretch / columns), factor.rank * (1 / rows + 1 / columns)

    @property
    def sides(self) -> tuple[str, ...]:
        """Which side may be narrowed; without a window both are the same."""
        return SIDES if self.taps > 1 else (OUTPUTS,)

    def masks(self, removed: BoolArray) -> list[BoolArray]:
        """Which indices of each axis of the weight stay."""
        masks = [np.ones(size, bool) for size in self.shape]
        for axis, mask in kept_masks(self.carried, removed).items():
            masks[axis] = mask
        return masks

    def sizes(self, removed: BoolArray, narrow: str = OUTPUTS) -> tuple[int, int]:
        """Rows and columns of the matrix after a removal."""
        masks = self.masks(removed)
        channels, made = (int(masks[axis].sum()) for axis in (self.reads, self.makes))
        return (channels, self.taps * made) if narrow == INPUTS else (self.taps * channels, made)

    def node(self, index: GraphIndex) -> Node:
        """The layer in a changed model."""
        return index.makers[self.layer.node.outputs[0]]

    def saved(self, removed: BoolArray, factor: Factor) -> tuple[float, int]:
        """Multiply-accumulates and weights that the halves have less than the whole."""
        macs, weights = self.share(removed, factor)
        return layer_macs(self.layer, removed) * (1 - macs), round(prod(self.sizes(removed)) * (1 - weights))


def wholes(prepared: Prepared, coupling: Coupling) -> dict[str, Whole]:
    """The layers that may become two, by name: linear in a floating weight of one block that nothing else reads."""
    held, final = initializers(prepared.model), {port.name for port in outputs(prepared.model)}
    dimensions = np.concatenate([np.zeros(0, np.int64), *(group.units for group in coupling.groups if group.dimensions)])
    found = {}
    for layer in coupling.layers:
        if layer.weight is None or layer.linear is None or not layer.linear.form.front or layer.groups() > 1:
            continue
        if np.isin(layer.columns, dimensions).any():
            continue  # queries and keys lose dimensions instead
        at, name = layer.weight.position, layer.node.inputs[layer.weight.position]
        if name in held and held[name].dtype.kind == "f" and len(prepared.index.readers(name)) == 1 and name not in final:
            carried, axes = coupling.constants.get((layer.node.index, at), ()), (layer.weight.in_axis, layer.weight.out_axis)
            data, made = (prod(prepared.trace.shapes[tensor][2:]) for tensor in (layer.data_name, layer.node.outputs[0]))
            stretch = data / made if layer.linear.form.kernel else 1.0
            found[layer.node.name] = Whole(layer, layer.linear.form, name, held[name].shape, carried, at, *axes, stretch)
    return found


# ---- what a model costs, counted on the model itself -----------------------------------------------------------------


def weights_of(model: Model) -> dict[str, Initializer]:
    """The initializers whose elements are parameters: floating numbers, and integers that stand for such (8 bits or fewer, or read as
    quantised values); not scales and zero points of quantised tensors, sizes and indices."""
    every = initializers(model)
    whole = {name for name, held in every.items() if np.dtype(held.dtype).kind in "iu" and np.dtype(held.dtype).itemsize == 1}
    values, scales = quantised_operands(nodes(model), whole)
    return {
        name: held for name, held in every.items()
        if name not in scales and np.dtype(held.dtype).kind not in "bOSU"
        and (np.dtype(held.dtype).kind not in "iu" or np.dtype(held.dtype).itemsize == 1 or name in values)
    }  # fmt: skip


def params_of(model: Model) -> int:
    """Number of parameters that a model holds."""
    return sum(prod(held.shape) for held in weights_of(model).values())
