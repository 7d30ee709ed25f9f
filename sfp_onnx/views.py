"""What scores may look at: weights, BatchNormalization scales and activation statistics, sorted by group.

Weights are seen as onnxruntime will run them: a BatchNormalization right behind a layer scales the layer's rows, so that a
file with BatchNormalization nodes and one with folded ones give the same scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np

from . import graph, runtime
from .graph import Model
from .records import Array, Coupling, FloatArray, GroupView, IntArray, Layer, LayerProfile, Moments, WeightSlices

Site = tuple[str, int]
T = TypeVar("T")


def views(
    model: Model,
    coupling: Coupling,
    moments: Mapping[Site, Moments],
    profiles: Sequence[LayerProfile] = (),
    eliminated: Mapping[str, FloatArray] | None = None,
) -> Iterator[GroupView]:
    """One view per group, in order; ``eliminated`` is the error that each unit adds, by group.
    Only the weights of one group are in memory at a time."""
    factors, read = scales(model, coupling), _reader(model)
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


def _reader(model: Model) -> Callable[[str], Array]:
    """Values of weights by name; those that the graph computes from constants (dequantised ones) are computed when asked for."""
    constants = graph.Constants(model)

    def read(name: str) -> Array:
        if name in constants:
            return constants[name]
        program = graph.constant_program(model, name)
        session = runtime.open_session(graph.serialized(program), program.weights, model.name, optimize=runtime.Optimize.NONE)
        value: Array = session.run({}, [name])[0]
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


def scales(model: Model, coupling: Coupling) -> dict[str, FloatArray]:
    """Scale of a BatchNormalization that is the only reader of a tensor."""
    readers: dict[str, int] = {}
    for node in graph.nodes(model):
        for name in (*node.inputs, *node.captures):
            readers[name] = readers.get(name, 0) + 1
    return {affine.tensor: np.abs(affine.scale) for affine in coupling.affines if readers.get(affine.tensor) == 1}


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


