"""From a model to views of its layers, from scores to masks, and from masks to a diluted model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .. import graph
from ..errors import OptionError
from ..graph import Model, Prepared
from ..masks import KERNEL, keep_by_rank, spread, tile_sums
from ..records import Array, BoolArray, Coupling, FloatArray, IntArray, Layer
from .registry import Method
from .view import DilutedLayer, KernelView, MethodOptions, SkippedLayer
from .weights import l1


@dataclass(frozen=True)
class Target:
    """A layer that can be diluted: its weight, which axes hold filters and input channels, and what each kernel connects.

    ``channel`` and ``filter`` as in `KernelView`; ``data_axis`` is the axis of the tensor that the layer reads.
    """

    layer: Layer
    weight: str
    axes: tuple[int, int]
    data_axis: int
    channel: IntArray
    filter: IntArray

    @property
    def name(self) -> str:
        """Name of the node."""
        return self.layer.node.name

    @property
    def site(self) -> tuple[str, int]:
        """The tensor that the layer reads, and the axis of its channels."""
        return self.layer.data_name, self.data_axis

    @property
    def channelwise(self) -> bool:
        """Whether every filter reads a single channel of its own (depthwise)."""
        return bool(self.channel.shape[1] == 1 and self.channel.max() > 0) or bool(self.channel.shape[0] == 1 and self.filter.max() > 0)


# ---- which layers ----------------------------------------------------------------------------------------------------


def targets(prepared: Prepared, coupling: Coupling, pattern: str | None = None) -> tuple[list[Target], list[SkippedLayer]]:
    """Layers that can be diluted and match ``pattern`` (a regular expression on names of nodes and weights), and the others that
    match, with reasons.

    Raises:
        OptionError: the expression is invalid or matches no layer.
    """
    try:
        wanted = re.compile(pattern or "")
    except re.error as error:
        raise OptionError(f"--layers '{pattern}': not a regular expression: {error}") from error
    held, uses = graph.initializers(prepared.model), _uses(prepared)
    found: list[Target] = []
    skipped: list[SkippedLayer] = []
    for layer in coupling.layers:
        weight = layer.node.inputs[layer.weight.position] if layer.weight else ""
        if not (wanted.search(layer.node.name) or (weight and wanted.search(weight))):
            continue
        reason = _refusal(layer, weight, held, uses)
        if reason:
            skipped.append(SkippedLayer(layer.node.name, reason))
        else:
            found.append(_target(prepared, layer, weight, held[weight][0]))
    if not found and not skipped:
        names = ", ".join(layer.node.name for layer in coupling.layers[:5])
        raise OptionError(f"--layers '{pattern}' matches no layer with weights. Layers are, for example: {names or 'none'}")
    return found, skipped


def _uses(prepared: Prepared) -> dict[str, int]:
    found: dict[str, int] = {port.name: 2 for port in graph.outputs(prepared.model)}
    for node in prepared.nodes:
        for name in node.inputs:
            found[name] = found.get(name, 0) + 1
        for name in node.captures:
            found[name] = found.get(name, 0) + 2
    return found


def _refusal(layer: Layer, weight: str, held: Mapping[str, tuple[tuple[int, ...], object]], uses: Mapping[str, int]) -> str:
    if layer.weight is None or weight not in held:
        return "it has no constant weight"
    shape, dtype = held[weight]
    if np.dtype(dtype).kind != "f":  # type: ignore[call-overload]
        return f"its weight is {np.dtype(dtype).name}, not floating point"  # type: ignore[call-overload]
    if len(shape) < 2 or (len(shape) > 2 and (layer.weight.out_axis > 1 or layer.weight.in_axis > 1)):
        return f"its weight of shape {list(shape)} is neither a matrix nor that of a convolution"
    if uses.get(weight, 0) > 1:
        return f"its weight '{weight}' is read elsewhere, too"
    return ""


def _target(prepared: Prepared, layer: Layer, weight: str, shape: tuple[int, ...]) -> Target:
    assert layer.weight is not None
    out_axis = layer.weight.out_axis if layer.weight.out_axis < 2 else 0
    axes = (out_axis, 1 - out_axis)
    outputs, inputs = shape[axes[0]], shape[axes[1]]
    groups = int(layer.node.attributes.get("group", 1)) if len(shape) > 2 else 1
    data = prepared.trace.shapes[layer.data_name]
    if len(shape) == 2 and (not layer.data_axis < len(data) or data[layer.data_axis] != inputs or not len(layer.source)):
        fitting = [at for at, size in enumerate(data) if size == inputs]
        data_axis = layer.data_axis if len(layer.source) else max(fitting, default=len(data) - 1)
    else:
        data_axis = layer.data_axis
    rows, columns = np.arange(outputs)[:, None], np.arange(inputs)[None, :]
    if out_axis == 0:  # filters of all groups, channels of one
        channel, made = rows // max(1, outputs // groups) * inputs + columns, rows + 0 * columns
    else:  # transposed: channels of all groups, filters of one
        channel, made = columns + 0 * rows, columns // max(1, inputs // groups) * outputs + rows
    return Target(layer, weight, axes, data_axis, channel, made)


# ---- views -----------------------------------------------------------------------------------------------------------


def as_kernels(weight: Array, axes: tuple[int, int]) -> Array:
    """The weight as (O, I, K)."""
    moved = np.moveaxis(weight, axes, (0, 1))
    return moved.reshape(*moved.shape[:2], -1)


def as_weight(kernels: Array, axes: tuple[int, int], shape: Sequence[int]) -> Array:
    """(O, I, K) in the layout of a weight of that shape."""
    rest = [size for axis, size in enumerate(shape) if axis not in axes]
    return np.ascontiguousarray(np.moveaxis(kernels.reshape(*kernels.shape[:2], *rest), (0, 1), axes))


def layer_views(
    model: Model, found: Sequence[Target], scales: Mapping[str, FloatArray], rms: Mapping[tuple[str, int], FloatArray]
) -> Iterator[KernelView]:
    """One view per target, without profiles. ``scales`` are those of BatchNormalizations by the tensor they scale, ``rms`` the root
    mean square per channel of each site."""
    constants = graph.Constants(model)
    for target in found:
        values = as_kernels(constants[target.weight], target.axes).astype(np.float32)
        scale = scales.get(target.layer.node.outputs[0])
        if scale is not None and len(scale) == len(values) and target.axes[0] == 0:
            values = values * np.abs(scale).astype(np.float32)[:, None, None]
        own = rms.get(target.site)
        fits = own is not None and len(own) > int(target.channel.max())
        yield KernelView(target.name, values, target.channel, target.filter, own if fits else None)


# ---- masks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """The mask (O, I, K) of one layer and what it removes."""

    mask: BoolArray
    figures: DilutedLayer


def choose(
    views: Callable[[], Iterator[KernelView]],
    weights: Mapping[str, str],
    chosen: tuple[Method, MethodOptions],
    rate: float,
    scope: str,
) -> list[Chosen]:
    """Masks of all layers. ``views`` is called twice, so that only scores are held for all layers; ``weights`` names the weight of
    each layer; ``rate`` and ``scope`` (see `masks.keep_by_rank`) do not matter to methods that set the rate."""
    method, options = chosen
    tile = method.tile(options)
    scores = [method.function(view, options) for view in views()]
    keeps: Sequence[Array] = scores if method.fixed else keep_by_rank(scores, rate, scope)
    found = []
    for view, keep in zip(views(), keeps, strict=True):
        mask = spread(keep, tile, view.values.shape)
        unit = "kernels" if tile.whole and view.values.shape[2] > 1 else "blocks" if tile.rows * tile.columns > 1 else "weights"
        found.append(Chosen(mask, _figures(view, weights[view.layer], mask, (unit, keep.size, int((~keep).sum())))))
    return found


def _figures(view: KernelView, weight: str, mask: BoolArray, counts: tuple[str, int, int]) -> DilutedLayer:
    """What a mask removes, and what kernel L1 would lose at the same number of weights (per layer)."""
    cost = np.abs(view.values.astype(np.float64)) * view.read_rms[:, :, None]
    total = float(cost.sum()) or 1.0
    norms = l1(view, MethodOptions()).reshape(-1)
    order = np.argsort(norms, kind="stable")[: round(int((~mask).sum()) / mask.shape[2])]
    lost_l1 = float(tile_sums(cost, KERNEL).reshape(-1)[order].sum()) / total
    unit, count, removed = counts
    lost = float(cost[~mask].sum()) / total
    return DilutedLayer(view.layer, weight, unit, count, removed, mask.size, int((~mask).sum()), lost, lost_l1)


def zeroed(model: Model, masks: Mapping[str, BoolArray]) -> Model:
    """The model with weights set to zero where their mask (of the weight's shape, by name of the initializer) is False."""
    constants = graph.Constants(model)
    values = {name: np.where(mask, constants[name], np.zeros((), constants[name].dtype)) for name, mask in masks.items()}
    return graph.with_constants(model, values)
