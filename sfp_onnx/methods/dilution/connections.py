"""From a model to views of its layers, from scores to masks, and from masks to a diluted model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...core.errors import OptionError
from ...core.types import Array, BoolArray, Coupling, FloatArray, IntArray, Layer
from ...coupling.cost import emptied, uneven
from ...graph import Constants, Initializer, Model, Prepared, edit, extract, initializers, outputs
from ...runtime import observe, unpadded
from . import KERNEL, Ends, KernelView, Method, MethodOptions, Site, keep_by_rank, l1, spread, tile_sums


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
    def site(self) -> Site:
        """The tensor that the layer reads, and the axis of its channels."""
        return Site(self.layer.data_name, self.data_axis)

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
    held, final = initializers(prepared.model), {port.name for port in outputs(prepared.model)}
    chosen, skipped = list[Target](), list[SkippedLayer]()
    for layer in coupling.layers:
        weight = layer.node.inputs[layer.weight.position] if layer.weight else ""
        if not (wanted.search(layer.node.name) or (weight and wanted.search(weight))):
            continue
        shared = weight in final or len(prepared.index.readers(weight)) > 1
        if reason := _refusal(layer, weight, held, shared):
            skipped.append(SkippedLayer(layer.node.name, reason))
        else:
            chosen.append(_target(prepared, layer, weight, held[weight][0]))
    if not chosen and not skipped:
        names = ", ".join(layer.node.name for layer in coupling.layers[:5])
        raise OptionError(f"--layers '{pattern}' matches no layer with weights. Layers are, for example: {names or 'none'}")
    return chosen, skipped


def _refusal(layer: Layer, weight: str, held: Mapping[str, Initializer], shared: bool) -> str:
    if layer.weight is None or weight not in held:
        return "it has no constant weight"
    shape, dtype = held[weight]
    if np.dtype(dtype).kind != "f":
        return f"its weight is {np.dtype(dtype).name}, not floating point"
    if len(shape) < 2 or (len(shape) > 2 and (layer.weight.out_axis > 1 or layer.weight.in_axis > 1)):
        return f"its weight of shape {list(shape)} is neither a matrix nor that of a convolution"
    if shared:
        return f"its weight '{weight}' is read elsewhere, too"
    return ""


def _target(prepared: Prepared, layer: Layer, weight: str, shape: tuple[int, ...]) -> Target:
    assert layer.weight is not None
    out_axis = layer.weight.out_axis if layer.weight.out_axis < 2 else 0
    axes = (out_axis, 1 - out_axis)
    outputs, inputs = shape[axes[0]], shape[axes[1]]
    groups = layer.groups()
    data, data_axis = prepared.trace.shapes[layer.data_name], layer.data_axis
    if len(shape) == 2 and not len(layer.source):
        data_axis = max((at for at, size in enumerate(data) if size == inputs), default=len(data) - 1)
    rows, columns = np.arange(outputs)[:, None], np.arange(inputs)[None, :]
    if out_axis == 0:  # filters of all groups, channels of one
        channel, filters = rows // max(1, outputs // groups) * inputs + columns, rows + 0 * columns
    else:  # transposed: channels of all groups, filters of one
        channel, filters = columns + 0 * rows, columns // max(1, inputs // groups) * outputs + rows
    return Target(layer, weight, axes, data_axis, channel, filters)


# ---- views -----------------------------------------------------------------------------------------------------------


def as_weight(kernels: Array, axes: tuple[int, int], shape: Sequence[int]) -> Array:
    """(O, I, K) in the layout of a weight of that shape."""
    rest = [size for axis, size in enumerate(shape) if axis not in axes]
    return np.ascontiguousarray(np.moveaxis(kernels.reshape(*kernels.shape[:2], *rest), (0, 1), axes))


def layer_views(
    model: Model, layers: Sequence[Target], scales: Mapping[str, FloatArray], rms: Mapping[Site, FloatArray],
    ends: Mapping[str, Ends | str], losses: Mapping[str, FloatArray],
) -> Iterator[KernelView]:  # fmt: skip
    """One view per target. ``scales`` are those of BatchNormalizations by the tensor they scale, ``rms`` the root mean square per channel
    of each site, ``ends`` and ``losses`` as in `ends.Measured`."""
    constants = Constants(model)
    for target in layers:
        moved = np.moveaxis(constants[target.weight], target.axes, (0, 1))
        values = moved.reshape(*moved.shape[:2], -1).astype(np.float32)
        scale = scales.get(target.layer.node.outputs[0])
        if scale is not None and len(scale) == len(values) and target.axes[0] == 0:
            values = values * np.abs(scale).astype(np.float32)[:, None, None]
        read, known, worth = rms.get(target.site), ends.get(target.name), losses.get(target.name)
        read = read if read is not None and len(read) > int(target.channel.max()) else None
        worth = worth if worth is not None and worth.shape == target.channel.shape else None
        yield KernelView(target.name, values, target.channel, target.filter, read, known if isinstance(known, Ends) else None, worth)


# ---- masks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """The mask (O, I, K) of one layer and what it removes."""

    mask: BoolArray
    figures: DilutedLayer


def choose(
    views: Callable[[], Iterator[KernelView]], weights: Mapping[str, str], method: Method, options: MethodOptions, rate: float, scope: str
) -> list[Chosen]:
    """Masks of all layers. ``views`` is called twice, so that only scores are held for all layers; ``weights`` names the weight of
    each layer; ``rate`` and ``scope`` (see `keep_by_rank`) do not matter to methods that set the rate."""
    tile = method.tile(options)
    scores = [method.function(view, options) for view in views()]
    keeps: Sequence[Array] = scores if method.fixed else keep_by_rank(scores, rate, scope)
    chosen = []
    for view, keep in zip(views(), keeps, strict=True):
        mask = spread(keep, tile, view.values.shape)
        unit = "kernels" if tile.whole and view.values.shape[2] > 1 else "blocks" if tile.rows * tile.columns > 1 else "weights"
        chosen.append(Chosen(mask, _figures(view, weights[view.layer], mask, keep, unit)))
    return chosen


def _figures(view: KernelView, weight: str, mask: BoolArray, keep: Array, unit: str) -> DilutedLayer:
    """What a mask removes (``keep``: per tile, called ``unit``), and what kernel L1 would lose at the same number of weights."""
    cost = np.abs(view.values.astype(np.float64)) * view.read_rms[:, :, None]
    total = float(cost.sum()) or 1.0
    gone = int((~mask).sum())
    order = np.argsort(l1(view, MethodOptions()).reshape(-1), kind="stable")[: round(gone / mask.shape[2])]
    lost, lost_l1 = float(cost[~mask].sum()) / total, float(tile_sums(cost, KERNEL).reshape(-1)[order].sum()) / total
    return DilutedLayer(view.layer, weight, unit, keep.size, int((~keep).sum()), mask.size, gone, lost, lost_l1)


def zeroed(model: Model, masks: Mapping[str, BoolArray]) -> Model:
    """The model with weights set to zero where their mask (of the weight's shape, by name of the initializer) is False."""
    constants = Constants(model)
    values = {name: np.where(mask, constants[name], np.zeros((), constants[name].dtype)) for name, mask in masks.items()}
    return extract.with_constants(model, values)


# ---- channels that a dilution left without input or output connections -----------------------------------------------

FLAT = 1e-6
"""A channel counts as constant if it varies by less than this, relative to its largest value."""


def _through(layer: Layer) -> bool:
    """A depthwise layer passes units on."""
    return layer.weight is not None and layer.weight.in_axis == layer.weight.out_axis


def connections(model: Model, coupling: Coupling) -> BoolArray:
    """Which units still have connections, (4, units): whether any kernel reads the unit, any kernel makes it, and whether all its readers
    and all its makers are plain weighted layers (others, such as grouped convolutions and products of activations, are not judged)."""
    flags = np.zeros((6, coupling.units + 1), bool)  # the last place stands for -1
    read, written, readers, makers, odd_in, odd_out = flags
    constants = Constants(model)
    for layer in coupling.layers:
        if layer.weight is None or layer.node.inputs[layer.weight.position] not in constants:
            for units in (layer.source, layer.reads, layer.writes):
                odd_in[units] = odd_out[units] = True
            continue
        if _through(layer):
            continue
        weight = np.asarray(constants[layer.node.inputs[layer.weight.position]]) != 0
        for units, axis, used, judged in (
            (layer.reads, layer.weight.in_axis, read, readers), (layer.writes, layer.weight.out_axis, written, makers),
        ):  # fmt: skip
            if len(units):
                used[units[weight.any(tuple(other for other in range(weight.ndim) if other != axis))]] = True
                judged[units] = True
        odd_in[np.setdiff1d(layer.source, layer.reads)] = True
        if len(layer.reads) != len(layer.source):
            odd_in[layer.reads] = True
    read, written, readers, makers, odd_in, odd_out = flags[:, :-1]
    return np.asarray([read, written, readers & ~odd_in, makers & ~odd_out], bool)


def unread(model: Model, coupling: Coupling) -> BoolArray:
    """Units that can be cut because nobody reads them; no tensor is left empty."""
    read, _, plain_readers, _ = connections(model, coupling)
    dead: BoolArray = plain_readers & ~read
    for group in uneven(coupling, dead):
        dead[group.units] = False
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
    read, made, plain_readers, plain_makers = connections(model, coupling)
    constant = plain_makers & ~made & plain_readers & read
    plain = [layer for layer in coupling.layers if layer.weight is not None and not _through(layer)]
    readers = [layer for layer in plain if constant[layer.reads[layer.reads >= 0]].any()]
    if not readers:
        return Folded(model, 0, 0, 0)
    flat = _flat_sites(model, {Site(layer.data_name, layer.data_axis) for layer in readers}, feeds)
    able, nonzero = constant.copy(), np.zeros(coupling.units, bool)
    for layer in readers:
        level, steady = flat[Site(layer.data_name, layer.data_axis)]
        present = layer.source >= 0
        able[layer.source[present & ~steady]] = False
        nonzero[layer.source[present & steady & (level != 0)]] = True
        if not _foldable(layer, prepared):
            able[layer.source[present & (level != 0)]] = False
    if able.any():
        model = _without(model, readers, able, {site: level for site, (level, _) in flat.items()})
    return Folded(model, int((able & ~nonzero).sum()), int((able & nonzero).sum()), int((constant & ~able).sum()))


def _flat_sites(model: Model, sites: set[Site], feeds: Sequence[Mapping[str, Array]]) -> dict[Site, tuple[Array, BoolArray]]:
    """`_flat` of each site, from runs of the model."""
    editor = edit.Editor(model)
    names = {site: editor.add_output(editor.tensor(site.tensor)) for site in sorted(sites)}
    observed = list(observe(editor.finish(), unpadded(feeds), list(dict.fromkeys(names.values()))))
    return {site: _flat([batch.values[name] for batch in observed], site.axis) for site, name in names.items()}


def _flat(arrays: Sequence[Array], axis: int) -> tuple[Array, BoolArray]:
    """Value of each channel, and whether it is the same everywhere in all arrays."""
    rows = np.concatenate([np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1) for array in arrays], axis=1).astype(np.float64)
    low, high = rows.min(1), rows.max(1)
    return rows[:, 0], high - low <= FLAT * np.maximum(np.abs(low), np.abs(high))


def _foldable(layer: Layer, prepared: Prepared) -> bool:
    """Whether a constant input adds the same to every output position, and there is a bias of its own to take it."""
    held = initializers(prepared.model)
    bias, linear = _bias(layer), layer.linear
    if layer.weight is None or linear is None or bias not in held or len(prepared.index.readers(bias)) != 1:
        return False
    if linear.form.padded or linear.form.scale != 1.0 or linear.bias_scale != 1.0 or layer.groups() != 1:
        return False
    shape = held[layer.node.inputs[layer.weight.position]][0]
    return held[bias][0] == (shape[layer.weight.out_axis],) and (len(shape) == 2 or layer.weight.out_axis == 0)


def _bias(layer: Layer) -> str:
    """The tensor that is a layer's bias; empty if it has none."""
    place = layer.linear.bias if layer.linear else None
    return layer.node.inputs[place] if place is not None and place < len(layer.node.inputs) else ""


def _without(model: Model, readers: Sequence[Layer], gone: BoolArray, levels: Mapping[Site, Array]) -> Model:
    constants, changed = Constants(model), dict[str, Array]()
    for layer in readers:
        assert layer.weight is not None
        name, in_axis = layer.node.inputs[layer.weight.position], layer.weight.in_axis
        columns = np.flatnonzero((layer.reads >= 0) & gone[np.maximum(layer.reads, 0)])
        weight = np.moveaxis(constants[name].copy(), in_axis, 0)
        level = levels[Site(layer.data_name, layer.data_axis)][columns]
        if level.any():
            out_axis = layer.weight.out_axis if layer.weight.out_axis > in_axis else layer.weight.out_axis + 1
            slices = np.moveaxis(weight[columns].astype(np.float64), out_axis, 1)
            added, bias = np.einsum("cok,c->o", slices.reshape(*slices.shape[:2], -1), level), constants[_bias(layer)]
            changed[_bias(layer)] = (bias + added).astype(bias.dtype)
        weight[columns] = 0
        changed[name] = np.ascontiguousarray(np.moveaxis(weight, 0, in_axis))
    return extract.with_constants(model, changed)


@dataclass(frozen=True)
class DilutedLayer:
    """What was removed from one layer. ``lost`` is the share of sum |w| x rms that the mask removes, an estimate of the relative
    output error (L1); ``lost_l1`` is the same for the kernels (weights) of smallest L1 norm, as many of them."""

    layer: str
    weight: str
    unit: str
    total: int
    removed: int
    weights: int
    weights_removed: int
    lost: float
    lost_l1: float
    note: str = ""


@dataclass(frozen=True)
class SkippedLayer:
    """A layer that was left as it is, and why."""

    layer: str
    reason: str


def removed_share(layers: Sequence[DilutedLayer]) -> float:
    """Removed weights over all weights of the diluted layers."""
    total = sum(layer.weights for layer in layers)
    return sum(layer.weights_removed for layer in layers) / total if total else 0.0
