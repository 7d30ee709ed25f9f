"""Convolutions whose kernels are block-diagonal under a permutation of channels, as grouped convolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np

from ...core.types import Array, AxisUnits, BoolArray, Coupling, IntArray, Layer, Node
from ...graph.edit import Editor
from ...graph.model import Constants, Model
from ...rules.labels import components


@dataclass(frozen=True)
class Blocks:
    """``groups`` equal blocks: the kernel matrix is block-diagonal after ``outputs`` and ``inputs`` order its rows and columns."""

    groups: int
    outputs: IntArray
    inputs: IntArray


# ---- finding blocks --------------------------------------------------------------------------------------------------


def parts(keep: BoolArray) -> list[tuple[IntArray, IntArray]]:
    """Connected components of the bipartite graph with an edge where ``keep`` (O, I): (rows, columns) of each, the first row or column
    decides the order."""
    rows, columns = keep.shape
    left, right = np.nonzero(keep)
    roots = components(rows + columns, left, right + rows)
    found = []
    for root in np.unique(roots):
        members = np.flatnonzero(roots == root)
        found.append((members[members < rows], members[members >= rows] - rows))
    return found


def blocks(keep: BoolArray) -> list[Blocks]:
    """Every way to pack the components into equal groups that first-fit finds, most groups first. Empty if all is connected."""
    found = parts(keep)
    outputs, inputs = keep.shape
    if len(found) < 2:
        return []
    common = gcd(outputs, inputs)
    counts = [count for count in range(common, 1, -1) if common % count == 0]
    packed = ((count, _pack(found, count, outputs // count, inputs // count)) for count in counts)
    return [Blocks(count, *bins) for count, bins in packed if bins is not None]


def _pack(found: Sequence[tuple[IntArray, IntArray]], count: int, rows: int, columns: int) -> tuple[IntArray, IntArray] | None:
    """First-fit decreasing into ``count`` bins of ``rows`` x ``columns``."""
    room = np.tile([rows, columns], (count, 1))
    bins: list[list[int]] = [[] for _ in range(count)]
    sizes = [(len(own), len(other)) for own, other in found]
    order = sorted(range(len(found)), key=lambda at: (-max(sizes[at][0] / rows, sizes[at][1] / columns), at))
    for at in order:
        fits = np.flatnonzero((room >= sizes[at]).all(1))
        if not len(fits):
            return None
        room[fits[0]] -= sizes[at]
        bins[fits[0]].append(at)
    each = [[np.sort(np.concatenate([found[at][side] for at in own])) for own in bins] for side in (0, 1)]
    return np.concatenate(each[0]), np.concatenate(each[1])


# ---- rewriting -------------------------------------------------------------------------------------------------------


def can_group(layer: Layer, shape: Sequence[int]) -> bool:
    """A plain convolution: filters first, channels second, one group."""
    weight = layer.weight
    plain = weight is not None and (weight.out_axis, weight.in_axis) == (0, 1)
    return plain and len(shape) > 2 and layer.node.attributes.get("group", 1) == 1


@dataclass(frozen=True)
class Grouping:
    """A layer to be grouped. ``absorb`` says for the input and the output side whether neighbours take the permutation; else a
    Gather does."""

    layer: Layer
    blocks: Blocks
    absorb: tuple[bool, bool]


def absorbable(layer: Layer) -> tuple[bool, bool]:
    """Whether the channels of either side are units of their own that could be permuted. Both sides the same units: the output only."""
    sides = [bool(len(units) and (units >= 0).all() and len(np.unique(units)) == len(units)) for units in (layer.source, layer.writes)]
    if all(sides) and len(np.intersect1d(layer.source, layer.writes)):
        sides[0] = False
    return sides[0], sides[1]


def regrouped(model: Model, coupling: Coupling, nodes: Sequence[Node], grouping: Grouping) -> Model:
    """The model with one layer as a grouped convolution."""
    layer, found = grouping.layer, grouping.blocks
    assert layer.weight is not None
    editor = Editor(model)
    content = np.arange(coupling.units)  # unit whose content each unit's slot holds
    for absorbed, units, order in zip(grouping.absorb, (layer.source, layer.writes), (found.inputs, found.outputs), strict=True):
        if absorbed:
            content[units] = units[order]
    changed = _permute(editor, model, coupling, nodes, content)
    name = layer.node.inputs[layer.weight.position]
    weight = changed.get((layer.node.index, layer.weight.position), Constants(model)[name])
    index = layer.node.index
    if not grouping.absorb[0]:
        weight = weight[:, found.inputs]
        order = editor.constant(f"{layer.node.name}/inputs", found.inputs)
        data = editor.insert_before(index, "Gather", [editor.input(index, layer.data), order], {"axis": layer.data_axis})
        editor.set_input(index, layer.data, data)
    if not grouping.absorb[1]:
        weight = weight[found.outputs]
        if len(layer.node.inputs) > 2 and layer.node.inputs[2]:
            bias = changed.get((index, 2), Constants(model)[layer.node.inputs[2]])
            editor.set_input(index, 2, editor.constant(layer.node.inputs[2], bias[found.outputs]))
        back = editor.constant(f"{layer.node.name}/outputs", np.argsort(found.outputs))
        editor.insert_after(editor.tensor(layer.node.outputs[0]), "Gather", [back], attributes={"axis": 1})
    rows, columns = weight.shape[0] // found.groups, weight.shape[1] // found.groups
    diagonal = [weight[at * rows : (at + 1) * rows, at * columns : (at + 1) * columns] for at in range(found.groups)]
    editor.set_input(index, layer.weight.position, editor.constant(name, np.ascontiguousarray(np.concatenate(diagonal))))
    editor.set_attribute(index, "group", found.groups)
    return editor.finish()


def _permute(
    editor: Editor, model: Model, coupling: Coupling, nodes: Sequence[Node], content: IntArray
) -> Mapping[tuple[int, int], Array]:
    """Reorder every constant whose axes carry permuted units; returns the new values by (node, position)."""
    changed: dict[tuple[int, int], Array] = {}
    for (index, position), channels in coupling.constants.items():
        orders = [(own.axis, _order(own, content)) for own in channels]
        orders = [(axis, order) for axis, order in orders if (order != np.arange(len(order))).any()]
        if not orders:
            continue
        array = Constants(model)[nodes[index].inputs[position]]
        for axis, order in orders:
            array = np.take(array, order, axis)
        changed[index, position] = array
        editor.set_input(index, position, editor.constant(nodes[index].inputs[position], array))
    return changed


def _order(own: AxisUnits, content: IntArray) -> IntArray:
    """New order of an axis: the k-th index of unit u takes what the k-th index of unit content[u] held."""
    units = own.units
    order = np.arange(len(units))
    moved = np.flatnonzero((units >= 0) & (content[np.maximum(units, 0)] != units))
    if not len(moved):
        return order
    places: dict[int, list[int]] = {}
    for at in moved:
        places.setdefault(int(units[at]), []).append(int(at))
    for unit, own_places in places.items():
        source = places[int(content[unit])]
        if len(source) != len(own_places):
            return order  # uneven: the comparison with the model before will say no
        order[own_places] = source
    return order
