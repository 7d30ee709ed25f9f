"""Activation statistics from one streaming pass: reduced inside the graph, summed in float64, mergeable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ..core.errors import DataError
from ..core.types import Array, Coupling, FloatArray, GroupView, IntArray, Layer, LayerProfile, Moments, WeightSlices
from ..graph import Constants, GraphIndex, Model, Prepared
from ..graph.edit import Editor
from ..graph.extract import constant_program
from ..runtime import Batches, Optimize, observe, open_model

Site = tuple[str, int]
"""A tensor and the axis whose channels are counted."""


def sites(coupling: Coupling) -> list[Site]:
    """Activations that mixing layers read and that hold units."""
    found: dict[Site, None] = {}
    for layer in coupling.layers:
        if (layer.source >= 0).any():
            found[layer.data_name, layer.data_axis] = None
    return list(found)


@dataclass
class Statistics:
    """Moments of every site, for one batch or any number of them."""

    moments: dict[Site, Moments]

    def merge(self, other: Statistics) -> None:
        """Add statistics of disjoint data; the order does not matter beyond float64 rounding."""
        for site, new in other.moments.items():
            old = self.moments.get(site)
            if old is None:
                self.moments[site] = new
            else:
                self.moments[site] = Moments(old.squares + new.squares, old.zeros + new.zeros, old.count + new.count)


def calibrate(
    model: Model,
    ranks: Mapping[str, int],
    wanted: Iterable[Site],
    needs: frozenset[str],
    batches: Batches,
    progress: Callable[[int], None] = lambda done: None,
) -> Statistics:
    """Run the data once through the model and collect per-channel sums.

    Args:
        ranks: rank of each tensor.
        needs: {"squares", "zeros"} or a part of it.
        batches: (inputs, number of real samples in it).
        progress: called with the number of samples after each batch.

    Raises:
        ModelError: onnxruntime cannot run the model on the data.
        DataError: an activation is not finite on the data.
    """
    editor = Editor(model)
    taps = {site: _tap(editor, site, ranks[site[0]], needs) for site in wanted}
    probe = editor.finish()
    names = [name for outputs in taps.values() for name in outputs.values()]
    statistics = Statistics({})
    for seen in observe(probe, batches, names):
        for site, outputs in taps.items():
            statistics.merge(_moments(site, {kind: seen.values[name] for kind, name in outputs.items()}, seen.count, seen.rows))
        progress(seen.count)
    return statistics


def _moments(site: Site, outputs: Mapping[str, Array], samples: int, batch: int) -> Statistics:
    """Statistics of one batch, of which the first ``samples`` rows are real and the rest padding.

    Padding is told apart where the first axis is the batch, or the batch times something; other tensors count as a whole.
    """
    shape = outputs["shape"]
    channels, rows = int(shape[site[1]]), int(shape[0])
    used = rows // batch * samples if site[1] != 0 and rows % batch == 0 else rows
    positions = float(np.prod(shape)) / channels * used / rows
    sums = {kind: _sums(outputs[kind], channels, positions, used) for kind in outputs if kind != "shape"}
    if not all(np.isfinite(value).all() for value in sums.values()):
        raise DataError(f"tensor '{site[0]}' is not finite on the data. Check --scale, --mean and --std, or the model.")
    nothing = np.zeros(channels)
    return Statistics({site: Moments(sums.get("squares", nothing), sums.get("zeros", nothing), positions)})


def _sums(means: Array, channels: int, positions: float, used: int) -> FloatArray:
    """Sums per channel over ``positions`` in float64, from means within each of the first ``used`` rows."""
    rows = means.reshape(-1, channels)[:used].astype(np.float64)
    total: FloatArray = rows.sum(0) * (positions / len(rows))
    return total


def _tap(editor: Editor, site: Site, rank: int, needs: frozenset[str]) -> dict[str, str]:
    """Add means over all axes but the first and the channels'; returns the output name per statistic.

    Means within a sample are float32 (in the graph), sums over samples float64 (in numpy).
    """
    name, axis = site
    tensor = editor.append("Cast", [editor.tensor(name)], {"to": 1}, name=f"{name}/float")
    axes = [other for other in range(rank) if other not in (0, axis)]
    found = {"shape": editor.add_output(editor.append("Shape", [tensor], name=f"{name}/{axis}/shape"))}
    if "squares" in needs:
        square = editor.append("Mul", [tensor, tensor], name=f"{name}/square")
        found["squares"] = editor.add_output(editor.mean(square, rank, axes, f"{name}/{axis}/squares"))
    if "zeros" in needs:
        nonzero = editor.append("Cast", [tensor], {"to": 9}, name=f"{name}/nonzero")  # Equal takes no floats before opset 11
        is_zero = editor.append("Cast", [editor.append("Not", [nonzero], name=f"{name}/zero")], {"to": 1}, name=f"{name}/is_zero")
        found["zeros"] = editor.add_output(editor.mean(is_zero, rank, axes, f"{name}/{axis}/zeros"))
    return found


# ---- what scores may look at -----------------------------------------------------------------------------------------

T = TypeVar("T")


def views(
    prepared: Prepared,
    coupling: Coupling,
    moments: Mapping[Site, Moments],
    profiles: Sequence[LayerProfile] = (),
    eliminated: Mapping[str, FloatArray] | None = None,
) -> Iterator[GroupView]:
    """One view per group, in order; ``eliminated`` is the error that each unit adds, by group.
    Only the weights of one group are in memory at a time."""
    factors, read = scales(prepared.index, coupling), _reader(prepared)
    position = np.full(coupling.units, -1, np.int64)
    layers = _by_group(coupling, ((own, np.concatenate([own.reads, own.writes, own.source])) for own in coupling.layers))
    affines = _by_group(coupling, ((own, own.units) for own in coupling.affines))
    profiled = _by_group(coupling, ((own, own.units) for own in profiles))
    for index, group in enumerate(coupling.groups):
        position[:] = -1
        position[group.units] = np.arange(group.width)
        slices = [found for layer in layers[index] for found in _slices(read, layer, position, factors, moments)]
        gammas = [(_positions(affine.units, position), np.abs(affine.gamma)) for affine in affines[index]]
        known = [(_positions(own.units, position), own) for own in profiled[index]]
        yield GroupView(group.name, index, group.width, tuple(slices), tuple(gammas), tuple(known), (eliminated or {}).get(group.name))


def _reader(prepared: Prepared) -> Callable[[str], Array]:
    """Values of weights by name; those that the graph computes from constants (dequantised ones) are computed when asked for."""
    model = prepared.model
    constants = Constants(model)

    def read(name: str) -> Array:
        if name in constants:
            return constants[name]
        program = constant_program(prepared, name)
        value: Array = open_model(program, Optimize.NONE).run({}, [name])[0]
        return value

    return read


def _positions(units: IntArray, position: IntArray) -> IntArray:
    """Position in the group of each index of an axis; -1 outside."""
    if not len(position):
        return np.full(len(units), -1, np.int64)
    return np.where(units >= 0, position[np.maximum(units, 0)], -1)


def _by_group(coupling: Coupling, items: Iterable[tuple[T, IntArray]]) -> list[list[T]]:
    """Items per group of the units that they come with."""
    group_of = np.full(coupling.units, -1, np.int64)
    for index, group in enumerate(coupling.groups):
        group_of[group.units] = index
    found: list[list[T]] = [[] for _ in coupling.groups]
    for item, units in items:
        for index in np.unique(group_of[units[units >= 0]]):
            found[index].append(item)
    return found


def scales(index: GraphIndex, coupling: Coupling) -> dict[str, FloatArray]:
    """Scale of a BatchNormalization that is the only reader of a tensor."""
    return {affine.tensor: np.abs(affine.scale) for affine in coupling.affines if len(index.readers(affine.tensor)) == 1}


def _slices(
    read: Callable[[str], Array], layer: Layer, position: IntArray, scales: Mapping[str, FloatArray], moments: Mapping[Site, Moments]
) -> Iterator[WeightSlices]:
    writes, reads = _positions(layer.writes, position), _positions(layer.reads, position)
    rms, zeros = _activation(layer, moments)
    if layer.weight is None:
        own = _positions(layer.source, position)
        yield WeightSlices(layer.node.name, "in", own, np.zeros((len(own), 0), np.float32), rms, zeros)
        return
    weight = _effective(read(layer.node.inputs[layer.weight.position]), layer, scales)
    through = layer.weight.in_axis == layer.weight.out_axis
    if (writes >= 0).any() and not through:
        yield WeightSlices(layer.node.name, "out", writes, _rows(weight, layer.weight.out_axis))
    if (reads >= 0).any():
        rows = _rows(weight, layer.weight.in_axis)
        yield WeightSlices(layer.node.name, "through" if through else "in", reads, rows, _per_row(rms, layer), _per_row(zeros, layer))


def _effective(weight: Array, layer: Layer, scales: Mapping[str, FloatArray]) -> Array:
    """The weight times the scale of a BatchNormalization right behind the layer, per output channel."""
    scale = scales.get(layer.node.outputs[0])
    if scale is None or layer.weight is None or len(scale) != weight.shape[layer.weight.out_axis]:
        return weight
    shape = [1] * weight.ndim
    shape[layer.weight.out_axis] = -1
    scaled: Array = weight * scale.astype(weight.dtype).reshape(shape)
    return scaled


def _rows(weight: Array, axis: int) -> Array:
    return np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)


def _activation(layer: Layer, moments: Mapping[Site, Moments]) -> tuple[FloatArray | None, FloatArray | None]:
    """RMS and share of zeros per channel of the data input."""
    own = moments.get((layer.data_name, layer.data_axis))
    if own is None:
        return None, None
    count = max(own.count, 1)
    return np.sqrt(own.squares / count), own.zeros / count


def _per_row(values: FloatArray | None, layer: Layer) -> FloatArray | None:
    """Channel values for each row of the weight; if the weight has fewer rows than the data has channels (grouped
    convolution), the mean over the channels of the same unit."""
    if values is None or len(values) == len(layer.reads):
        return values
    own = layer.source >= 0
    size = int(max(layer.source.max(initial=0), layer.reads.max(initial=0))) + 1
    total = np.bincount(layer.source[own], values[own], minlength=size)
    count = np.bincount(layer.source[own], minlength=size)
    mean = total / np.maximum(count, 1)
    return np.where(layer.reads >= 0, mean[np.maximum(layer.reads, 0)], 0.0)
