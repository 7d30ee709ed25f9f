"""Channels that a dilution left without input or output connections.

A unit that nobody reads (all kernels that read it are zero) can be cut, exactly. A unit whose incoming kernels are all zero is constant:
if the constant is zero, or can be folded into the bias of all that read it, nobody reads it either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .. import graph, runtime
from ..graph import Model, Prepared
from ..records import Array, BoolArray, Coupling, IntArray, Layer
from ..units import emptied

FLAT = 1e-6
"""A channel counts as constant if it varies by less than this, relative to its largest value."""


@dataclass(frozen=True)
class Connections:
    """Per unit: whether any kernel reads it, any kernel makes it, and whether all its readers and makers are plain weighted layers
    (others, such as grouped convolutions and products of activations, are not judged)."""

    read: BoolArray
    made: BoolArray
    plain_readers: BoolArray
    plain_makers: BoolArray


def _through(layer: Layer) -> bool:
    """A depthwise layer passes units on."""
    return layer.weight is not None and layer.weight.in_axis == layer.weight.out_axis


def _mark(flags: BoolArray, units: IntArray, chosen: BoolArray | bool = True) -> None:
    own = units[(units >= 0) & chosen]
    flags[own] = True


def connections(model: Model, coupling: Coupling) -> Connections:
    """Which units still have connections."""
    read, made, readers, makers, odd_in, odd_out = (np.zeros(coupling.units, bool) for _ in range(6))
    constants = graph.Constants(model)
    for layer in coupling.layers:
        if layer.weight is None or layer.node.inputs[layer.weight.position] not in constants:
            for units in (layer.source, layer.reads, layer.writes):
                _mark(odd_in, units)
                _mark(odd_out, units)
            continue
        if _through(layer):
            continue
        weight = np.asarray(constants[layer.node.inputs[layer.weight.position]]) != 0
        for units, axis, used, seen in (
            (layer.reads, layer.weight.in_axis, read, readers), (layer.writes, layer.weight.out_axis, made, makers),
        ):  # fmt: skip
            if len(units):
                _mark(used, units, weight.any(tuple(other for other in range(weight.ndim) if other != axis)))
                _mark(seen, units)
        _mark(odd_in, np.setdiff1d(layer.source, layer.reads))
        if len(layer.reads) != len(layer.source):
            _mark(odd_in, layer.reads)
    return Connections(read, made, readers & ~odd_in, makers & ~odd_out)


def unread(model: Model, coupling: Coupling) -> BoolArray:
    """Units that can be cut because nobody reads them; no tensor is left empty."""
    ends = connections(model, coupling)
    dead = ends.plain_readers & ~ends.read
    for _, units in emptied(coupling, dead):
        dead[units.min()] = False
    return dead


@dataclass(frozen=True)
class Folded:
    """A model whose constant channels are read by nobody. ``zero`` and ``folded`` count units that were constant at zero, and at
    another value that went into biases; ``left`` are constants that could not be folded."""

    model: Model
    zero: int
    folded: int
    left: int


def fold_constants(model: Model, prepared: Prepared, coupling: Coupling, feeds: Sequence[Mapping[str, Array]]) -> Folded:
    """Take constant channels out of the kernels that read them: with zeros they change nothing, else their contribution goes into the bias.

    ``feeds`` are batches on which the constants are seen.
    """
    ends = connections(model, coupling)
    constant = ends.plain_makers & ~ends.made & ends.plain_readers & ends.read
    readers = [layer for layer in coupling.layers if layer.weight is not None and not _through(layer) and _has(layer.reads, constant)]
    if not readers:
        return Folded(model, 0, 0, 0)
    values = _values(model, {(layer.data_name, layer.data_axis) for layer in readers}, feeds)
    flat = {site: _flat(arrays, site[1]) for site, arrays in values.items()}
    able = constant.copy()
    nonzero = np.zeros(coupling.units, bool)
    for layer in readers:
        level, steady = flat[layer.data_name, layer.data_axis]
        units = layer.source
        own = units >= 0
        able[units[own & ~steady]] = False
        nonzero[units[own & steady & (level != 0)]] = True
        if not _foldable(layer, prepared):
            able[units[own & (level != 0)]] = False
    if not able.any():
        return Folded(model, 0, 0, int(constant.sum()))
    folded = _without(model, readers, able, {site: level for site, (level, _) in flat.items()})
    return Folded(folded, int((able & ~nonzero).sum()), int((able & nonzero).sum()), int((constant & ~able).sum()))


def _has(units: IntArray, flags: BoolArray) -> bool:
    return bool(flags[units[units >= 0]].any())


def _values(model: Model, sites: set[tuple[str, int]], feeds: Sequence[Mapping[str, Array]]) -> dict[tuple[str, int], list[Array]]:
    editor = graph.Editor(model)
    names = {site: editor.add_output(editor.tensor(site[0])) for site in sorted(sites)}
    tapped = editor.finish()
    session = runtime.open_session(graph.serialized(tapped), tapped.weights, model.name)
    found: dict[tuple[str, int], list[Array]] = {site: [] for site in names}
    for batch in feeds:
        for site, value in zip(names, session.run(batch, list(names.values())), strict=True):
            found[site].append(value)
    return found


def _flat(arrays: Sequence[Array], axis: int) -> tuple[Array, BoolArray]:
    """Value of each channel, and whether it is the same everywhere in all arrays."""
    rows = np.concatenate([np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1) for array in arrays], axis=1).astype(np.float64)
    low, high = rows.min(1), rows.max(1)
    level = rows[:, 0]
    return level, high - low <= FLAT * np.maximum(np.abs(low), np.abs(high))


def _foldable(layer: Layer, prepared: Prepared) -> bool:
    """Whether a constant input adds the same to every output position, and there is a bias of its own to take it."""
    node = layer.node
    held = graph.initializers(prepared.model)
    bias = node.inputs[2] if len(node.inputs) > 2 else ""
    padded = any(node.attributes.get("pads", ())) or node.attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    scaled = any(node.attributes.get(name, 1.0) != 1.0 for name in ("alpha", "beta"))
    uses = sum(name == bias for own in prepared.nodes for name in (*own.inputs, *own.captures))
    if layer.weight is None or bias not in held or padded or scaled or uses != 1:
        return False
    shape = held[node.inputs[layer.weight.position]][0]
    outputs = shape[layer.weight.out_axis]
    return held[bias][0] == (outputs,) and (len(shape) == 2 or layer.weight.out_axis == 0) and node.attributes.get("group", 1) == 1


def _without(model: Model, readers: Sequence[Layer], gone: BoolArray, levels: Mapping[tuple[str, int], Array]) -> Model:
    constants = graph.Constants(model)
    changed: dict[str, Array] = {}
    for layer in readers:
        assert layer.weight is not None
        name, in_axis = layer.node.inputs[layer.weight.position], layer.weight.in_axis
        columns = np.flatnonzero((layer.reads >= 0) & gone[np.maximum(layer.reads, 0)])
        weight = np.moveaxis(constants[name].copy(), in_axis, 0)
        level = levels[layer.data_name, layer.data_axis][columns]
        if level.any():
            out_axis = layer.weight.out_axis if layer.weight.out_axis > in_axis else layer.weight.out_axis + 1
            slices = np.moveaxis(weight[columns].astype(np.float64), out_axis, 1)
            bias = constants[layer.node.inputs[2]]
            added = np.einsum("cok,c->o", slices.reshape(*slices.shape[:2], -1), level)
            changed[layer.node.inputs[2]] = (bias + added).astype(bias.dtype)
        weight[columns] = 0
        changed[name] = np.ascontiguousarray(np.moveaxis(weight, 0, in_axis))
    return graph.with_constants(model, changed)
