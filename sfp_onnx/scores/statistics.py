"""Activation statistics from one streaming pass: reduced inside the graph, summed in float64, mergeable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..core.errors import DataError
from ..core.types import Array, BoolArray, Coupling, FloatArray, GroupView, IntArray, Layer, Moments, Tokens, WeightSlices
from ..coupling.analysis import Analysis, Progress, batch_size
from ..data.dataset import Dataset
from ..graph import Constants, GraphIndex, Model, Prepared, edit, extract
from ..runtime import Batches, Optimize, observe, open_model
from .scoring import STATISTICS
from .weights import per_unit

Site = tuple[str, int]
"""A tensor and the axis whose channels are counted."""


# ---- the pass --------------------------------------------------------------------------------------------------------


def sites(coupling: Coupling) -> list[Site]:
    """Activations that mixing layers read and that hold units."""
    reading = [layer for layer in coupling.layers if any((units >= 0).any() for units in layer.sources)]
    return list(dict.fromkeys((layer.data_name, layer.data_axis) for layer in reading))


@dataclass
class Statistics:
    """Moments of every site, for one batch or any number of them."""

    moments: dict[Site, Moments]

    def merge(self, other: Statistics) -> None:
        """Add statistics of disjoint data; the order does not matter beyond float64 rounding."""
        for site, new in other.moments.items():
            if (old := self.moments.get(site)) is not None:
                new = Moments({name: old.sums[name] + more for name, more in new.sums.items()}, old.count + new.count)
            self.moments[site] = new


def moments_of(analysis: Analysis, data: Dataset, needs: Iterable[str], progress: Progress) -> Mapping[Site, Moments]:
    """Statistics of everything that mixing layers read, from one pass over the data."""
    ranks = {name: len(shape) for name, shape in analysis.prepared.trace.shapes.items()}
    with progress("calibrating", data.samples) as advance:
        batches = replace(data, batch=batch_size(analysis, data)).batches()
        prepared = analysis.prepared
        return calibrate(prepared.model, ranks, sites(analysis.coupling), needs, batches, advance, prepared.tokens).moments


def calibrate(
    model: Model, ranks: Mapping[str, int], wanted: Iterable[Site], needs: Iterable[str], batches: Batches,
    progress: Callable[[int], None] = lambda done: None, tokens: Tokens | None = None,
) -> Statistics:  # fmt: skip
    """Run the data once through the model and collect per-channel sums.

    Args:
        ranks: rank of each tensor.
        needs: names of `STATISTICS`.
        batches: (inputs, number of real samples in it).
        progress: called with the number of samples after each batch.
        tokens: rows that an input may switch off: they count where it does not.

    Raises:
        ModelError: onnxruntime cannot run the model on the data.
        DataError: an activation is not finite on the data.
    """
    editor, statistics, needs = edit.Editor(model), Statistics({}), sorted(needs)
    taps = {site: _tap(editor, site, ranks[site[0]], needs, tokens) for site in wanted}
    names = [name for outputs in taps.values() for name in outputs.values()]
    for batch in observe(editor.finish(), batches, names):
        on = None if tokens is None else tokens.on(batch.feeds)
        for site, outputs in taps.items():
            found = {kind: batch.values[name] for kind, name in outputs.items()}
            statistics.merge(_moments(site, found, batch.count, batch.rows, _rows_on(tokens, site, found["shape"], on)))
        progress(batch.count)
    return statistics


def _rows_on(tokens: Tokens | None, site: Site, shape: Array, on: BoolArray | None) -> BoolArray | None:
    """Which rows of a site of this shape count (None: all), (first axis, positions)."""
    lead = [size for axis, size in enumerate(shape.tolist()) if axis != site[1] % len(shape)]
    rows = None if tokens is None or not _masked(tokens, site, len(shape)) else tokens.rows(site[0], lead, on)
    return None if rows is None else rows.reshape(len(rows), -1)


def _masked(tokens: Tokens, site: Site, rank: int) -> bool:
    """Whether a site has its tokens in front of its channels."""
    return site[0] in tokens and site[1] % rank >= (2 if site[0] in tokens.laid else 1)


def _moments(site: Site, outputs: Mapping[str, Array], samples: int, batch: int, on: BoolArray | None = None) -> Statistics:
    """Statistics of one batch, of which the first ``samples`` rows are real and the rest padding; ``on``: which positions count.

    Sums are float64. Padding is told apart where the first axis is the batch, or the batch times something; other tensors count as a whole.
    """
    shape = outputs["shape"]
    channels, first = int(shape[site[1]]), int(shape[0])
    used = first // batch * samples if site[1] != 0 and first % batch == 0 else first
    positions = float(np.prod(shape)) / channels * used / first
    sums = {}
    for kind in sorted(outputs.keys() - {"shape"}):
        rows = outputs[kind].reshape(-1, channels)[:used].astype(np.float64)  # means within each row
        sums[kind] = rows.sum(0) * (positions / len(rows))
        if not np.isfinite(sums[kind]).all():
            raise DataError(f"tensor '{site[0]}' is not finite on the data. Check --scale, --mean and --std, or the model.")
    return Statistics({site: Moments(sums, positions if on is None else float(on[:used].sum()))})


def _tap(editor: edit.Editor, site: Site, rank: int, needs: Iterable[str], tokens: Tokens | None) -> dict[str, str]:
    """Add means over all axes but the first and the channels', of 0 where tokens are off; returns the output name per statistic.

    Means within a sample are float32 (in the graph), sums over samples float64 (in numpy).
    """
    name, axis = site
    tensor = editor.append("Cast", [editor.tensor(name)], {"to": 1}, name=f"{name}/float")
    axes = [other for other in range(rank) if other not in (0, axis)]
    added = {"shape": editor.add_output(editor.append("Shape", [tensor], name=f"{name}/{axis}/shape"))}
    weights = _weights(editor, tokens, name, rank) if tokens is not None and _masked(tokens, site, rank) else None
    for kind in needs:
        summed = STATISTICS[kind].tap(editor, tensor, name)
        if weights is not None:
            summed = editor.append("Mul", [summed, weights], name=f"{name}/{axis}/{kind}/on")
        added[kind] = editor.add_output(editor.mean(summed, rank, axes, f"{name}/{axis}/{kind}"))
    return added


def _weights(editor: edit.Editor, tokens: Tokens, name: str, rank: int) -> Any:
    """1 for what counts of a tensor, 0 for tokens that are off."""
    shape = [0, 0, *[1] * (rank - 2)] if name in tokens.laid else [-1, *[1] * (rank - 1)]
    on = editor.append("Cast", [editor.tensor(tokens.mask)], {"to": 9}, name=f"{name}/mask")
    on = editor.append("Not", [on], name=f"{name}/mask/off") if tokens.inverted else on
    whole = editor.append("Cast", [on], {"to": 1}, name=f"{name}/mask/float")
    return editor.append("Reshape", [whole, editor.constant(f"{name}/mask/shape", np.asarray(shape, np.int64))], name=f"{name}/mask/laid")


# ---- what scores may look at -----------------------------------------------------------------------------------------


def views(prepared: Prepared, coupling: Coupling, moments: Mapping[Site, Moments]) -> Iterator[GroupView]:
    """One view per group, in order. Only the weights of one group are in memory at a time."""
    factors, constants = scales(prepared.index, coupling), Constants(prepared.model)

    def read(name: str) -> Array:
        if name in constants:
            return constants[name]
        program = extract.segment(prepared.model, [], {name: None}, prepared.index)
        return np.asarray(open_model(program, Optimize.NONE).run({}, [name])[0])  # dequantised, say

    position = np.full(coupling.units, -1, np.int64)
    layers = by_group(coupling, (np.concatenate([layer.reads, *layer.sources, layer.writes, layer.columns]) for layer in coupling.layers))
    affines = by_group(coupling, (affine.units for affine in coupling.affines))
    for index, group in enumerate(coupling.groups):
        position[:] = -1
        position[group.units] = np.arange(group.width)
        found = [] if group.dimensions else [coupling.layers[at] for at in layers[index]]
        slices = [part for layer in found for part in _slices(read, layer, position, factors, moments)]
        norms = [coupling.affines[at] for at in affines[index]]
        gammas = [(positions(norm.units, position), np.abs(norm.gamma)) for norm in norms]
        yield GroupView(group.name, index, group.width, tuple(slices), tuple(gammas))


def positions(units: IntArray, position: IntArray) -> IntArray:
    """Position in the group of each index of an axis; -1 outside."""
    return np.where(units >= 0, position[np.maximum(units, 0)], -1)


def by_group(coupling: Coupling, arrays: Iterable[IntArray]) -> list[list[int]]:
    """For each group, which of these arrays of units hold units of it (their numbers)."""
    group_of = np.full(coupling.units, -1, np.int64)
    for index, group in enumerate(coupling.groups):
        group_of[group.units] = index
    listed: list[list[int]] = [[] for _ in coupling.groups]
    for number, units in enumerate(arrays):
        for index in np.unique(group_of[units[units >= 0]]):
            listed[index].append(number)
    return listed


def scales(index: GraphIndex, coupling: Coupling) -> dict[str, FloatArray]:
    """Scale of a BatchNormalization that is the only reader of a tensor."""
    return {affine.tensor: np.abs(affine.scale) for affine in coupling.affines if len(index.readers(affine.tensor)) == 1}


def _slices(
    read: Callable[[str], Array], layer: Layer, position: IntArray, scales: Mapping[str, FloatArray], moments: Mapping[Site, Moments]
) -> Iterator[WeightSlices]:
    writes, reads = _own([layer.writes, layer.columns], position), _own([layer.reads], position)
    source, activation = _own(layer.sources, position), _activation(layer, moments)
    if layer.weight is None:
        yield WeightSlices(layer.node.name, "in", source, np.zeros((len(source), 0), np.float32), activation)
        return
    weight = _effective(read(layer.node.inputs[layer.weight.position]), layer, scales)
    through = layer.weight.in_axis == layer.weight.out_axis
    if (writes >= 0).any() and not through:
        yield WeightSlices(layer.node.name, "out", writes, _rows(weight, layer.weight.out_axis))
    if (reads >= 0).any():
        rows = _rows(weight, layer.weight.in_axis)
        per_row = {name: _per_row(values, layer) for name, values in activation.items()}
        yield WeightSlices(layer.node.name, "through" if through else "in", reads, rows, per_row)
    elif (source >= 0).any() and not through and len(source) == weight.shape[layer.weight.in_axis] * layer.groups():
        yield WeightSlices(layer.node.name, "in", source, _by_channel(weight, layer, len(source)), activation)


def _own(kinds: Sequence[IntArray], position: IntArray) -> IntArray:
    """Positions in the group by the first kind of units that belongs to it."""
    every = [positions(units, position) for units in kinds if len(units)] or [np.zeros(0, np.int64)]
    return next((own for own in every if (own >= 0).any()), every[0])


def _by_channel(weight: Array, layer: Layer, channels: int) -> Array:
    """One row for each channel that a layer reads, of a weight that has the same axis for those of all groups."""
    assert layer.weight is not None
    rows = np.moveaxis(weight, layer.weight.in_axis, 0)
    return np.asarray(rows.reshape(len(rows), channels // len(rows), -1).swapaxes(0, 1).reshape(channels, -1))


def _effective(weight: Array, layer: Layer, scales: Mapping[str, FloatArray]) -> Array:
    """The weight times the scale of a BatchNormalization right behind the layer, per output channel."""
    scale = scales.get(layer.node.outputs[0])
    if scale is None or layer.weight is None or len(scale) != weight.shape[layer.weight.out_axis]:
        return weight
    shape = [1] * weight.ndim
    shape[layer.weight.out_axis] = -1
    return np.asarray(weight * scale.astype(weight.dtype).reshape(shape))


def _rows(weight: Array, axis: int) -> Array:
    return np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)


def _activation(layer: Layer, moments: Mapping[Site, Moments]) -> dict[str, FloatArray]:
    """Statistics per channel of the data input."""
    known = moments.get((layer.data_name, layer.data_axis))
    if known is None:
        return {}
    return {name: STATISTICS[name].finish(total / max(known.count, 1)) for name, total in known.sums.items()}


def _per_row(values: FloatArray, layer: Layer) -> FloatArray:
    """Channel values for each row of the weight; if the weight has fewer rows than the data has channels (grouped
    convolution), the mean over the channels of the same unit."""
    if len(values) == len(layer.reads):
        return values
    mean = per_unit(layer.source, values, int(max(layer.source.max(initial=0), layer.reads.max(initial=0))) + 1)
    return np.where(layer.reads >= 0, mean[np.maximum(layer.reads, 0)], 0.0)
