"""Queries and keys of an attention in other coordinates, so that few dimensions of every head hold what the products of both need.

A product q k' of a head is the same for queries q A and keys k B with A B' = I. With second moments G = E q q', H = E k k' of one head, and
the singular values S of G^1/2 H^1/2 = U S V', the coordinates

    A = H^1/2 V S^-1/2,     B = G^1/2 U S^-1/2        (A B' = I)

give q A and k B the same moments S, and the products of the first r of them are those of rank r with the least squared error, for queries
and keys that do not know of each other (Eckart & Young, Psychometrika 1, 1936).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..core.types import Array, BoolArray, Coupling, FloatArray, Group, IntArray, Layer, Port, Tokens
from ..coupling.cost import kept_masks
from ..graph import Constants, Model, Prepared, extract, inputs
from ..runtime import Feeds, open_model
from .steps import Scene, plan_steps
from .walk import Step

SAME = 1e-3  # relative difference of products in other coordinates, by rounding
LEAST = 1e-6  # of the largest singular value; what is below has no direction
FLOOR = 1e-4  # of the mean second moment, added: few samples do not show what no query and no key can be


@dataclass(frozen=True)
class Side:
    """The queries or the keys of a product: the layer that makes them, and which of its output channels is each (head, dimension)."""

    layer: Layer
    step: Step
    places: IntArray


@dataclass(frozen=True)
class Pair:
    """Queries and keys whose ``group`` of dimensions may leave; ``free``: any coordinates of a head will do."""

    group: Group
    sides: tuple[Side, Side]
    free: bool = False

    def moments(self, targets: Mapping[str, Array], tokens: Tokens | None = None, on: BoolArray | None = None) -> FloatArray:
        """Sums of q q' and k k' (2, heads, dimensions, dimensions) over all positions of a batch; of ``tokens`` those that are ``on``."""
        parts = []
        for side in self.sides:
            rows = np.moveaxis(targets[side.step.target], side.step.linear.form.out_axis, -1)
            there = None if tokens is None else tokens.rows(side.step.target, rows.shape[:-1], on)
            rows = rows.reshape(-1, rows.shape[-1]) if there is None else rows[there]
            rows = rows[:, side.places].astype(np.float64).transpose(1, 2, 0)
            parts.append(rows @ rows.transpose(0, 2, 1))
        return np.stack(parts)

    def mixing(self, layer: Layer, turns: FloatArray, width: int, kept: BoolArray) -> FloatArray:
        """What gives the kept of ``width`` output channels of a layer from all of them: (width, kept), with the coordinates ``turns``
        (2, heads, dimensions, r) of each side, and other channels as they are."""
        whole, column = np.eye(width), np.cumsum(kept) - 1
        mixed = whole[:, kept]
        for side, turn in zip(self.sides, turns, strict=True):
            for places, block in zip(side.places if side.layer is layer else (), turn, strict=False):
                stay = places[kept[places]]
                mixed[:, column[stay]] = 0
                mixed[np.ix_(places, column[stay])] = block[:, : len(stay)]
        return mixed


def pairs(prepared: Prepared, coupling: Coupling) -> list[Pair]:
    """Every product of queries and keys that constant weights make. Whether a head's coordinates are free is tried: the product must stay
    what it is in others (it does not behind a rotary embedding or a normalisation)."""
    scene = Scene(prepared.model, coupling, prepared.nodes, prepared.trace.shapes)
    values = Constants(prepared.model)
    found = [pair for group in coupling.groups if group.dimensions and (pair := _pair(scene, group)) is not None]
    return [Pair(pair.group, pair.sides, _is_free(prepared, coupling, pair, values)) for pair in found]


def _pair(scene: Scene, group: Group) -> Pair | None:
    """Queries and keys in the order in which their layers run; one layer may make both. Its channels of one dimension are those of all
    heads, in their order."""
    sides = []
    makers = [layer for layer in scene.coupling.layers if np.isin(layer.columns, group.units).any()]
    for layer in makers:
        weight = scene.weight(layer)
        if weight is None or weight.scale or weight.cast or len(scene.index.readers(weight.name)) > 1:
            return None
        order = [np.flatnonzero(layer.columns == unit) for unit in group.units]
        if len({len(places) for places in order}) != 1 or layer.groups() > 1:
            return None
        task = plan_steps(scene, [[layer]], {})[0]
        assert isinstance(task, tuple)
        both = len(makers) == 1 and len(order[0]) % 2 == 0
        sides += [Side(layer, task[0], part) for part in np.split(np.stack(order).T, 2 if both else 1)]
    if len(sides) != 2:
        return None
    return Pair(group, (sides[0], sides[1]))


def _is_free(prepared: Prepared, coupling: Coupling, pair: Pair, values: Mapping[str, Array]) -> bool:
    """Whether the product of random queries and keys is the same in random coordinates of every head."""
    query, key = (side.places.shape for side in pair.sides)
    if query != key or set(pair.group.units.tolist()) != {unit for side in pair.sides for unit in side.layer.columns.tolist()} - {-1}:
        return False
    heads, size = query
    generator = np.random.default_rng(0)
    turns = generator.standard_normal((heads, size, size)) / np.sqrt(size) + 2 * np.eye(size)
    both = np.stack([turns, np.linalg.inv(turns).transpose(0, 2, 1)])
    changed = _mixed(prepared.model, values, pair, both, coupling, np.zeros(coupling.units, bool))[0]
    name = next(node.outputs[0] for node in prepared.nodes if node.name == pair.group.consumers[0])
    read = sorted({side.step.data for side in pair.sides})
    ports = [Port(data, np.dtype(prepared.types.get(data) or np.float32), None) for data in read]
    part = extract.segment(prepared.model, ports, {name: prepared.types.get(name)}, prepared.index)
    random = {port.name: generator.standard_normal(prepared.trace.shapes[port.name]).astype(port.dtype) for port in ports}
    feeds = _fed(part, {**prepared.feeds, **random})
    old, new = (open_model(model).run(feeds, [name])[0].astype(np.float64) for model in (part, extract.with_constants(part, changed)))
    return bool(np.abs(new - old).max() <= SAME * np.abs(old).max())


def _fed(part: Model, feeds: Feeds) -> Feeds:
    """Those inputs that a part of a model has."""
    named = {port.name for port in inputs(part)}
    return {name: array for name, array in feeds.items() if name in named}


def moments(model: Model, found: Sequence[Pair], batches: Iterable[Feeds], tokens: Tokens | None = None) -> dict[str, FloatArray]:
    """Second moments of the queries and keys of every pair, from one pass over the batches, without tokens that are switched off."""
    names = sorted({side.step.target for pair in found for side in pair.sides})
    part = extract.segment(model, inputs(model), dict.fromkeys(names, np.dtype(np.float32)))
    session, sums = open_model(part), dict[str, FloatArray]()
    for feeds in batches:
        targets = dict(zip(names, session.run(_fed(part, feeds), names), strict=True))
        on = None if tokens is None else tokens.on(feeds)
        for pair in found:
            sums[pair.group.name] = sums.get(pair.group.name, 0.0) + pair.moments(targets, tokens, on)
    return sums


def coordinates(moment: FloatArray) -> tuple[FloatArray, FloatArray]:
    """A and B (2, heads, dimensions, dimensions), and the singular values (heads, dimensions) of the products, falling."""
    size = moment.shape[-1]
    moment = moment + FLOOR * np.trace(moment, axis1=-2, axis2=-1)[..., None, None] / size * np.eye(size)
    level, basis = np.linalg.eigh(moment)
    roots = (basis * np.sqrt(np.maximum(level, 0))[..., None, :]) @ basis.swapaxes(-1, -2)
    left, values, right = np.linalg.svd(roots[0] @ roots[1])
    usable = values > LEAST * np.maximum(values.max(-1, keepdims=True), np.finfo(np.float32).tiny)
    inverse = np.where(usable, 1 / np.sqrt(np.where(usable, values, 1)), 0.0)[:, None, :]
    return np.stack([roots[1] @ right.swapaxes(-1, -2) * inverse, roots[0] @ left * inverse]), values


def _mixed(
    model: Model, values: Mapping[str, Array], pair: Pair, turns: FloatArray, coupling: Coupling, removed: BoolArray
) -> tuple[dict[str, Array], dict[str, FloatArray]]:  # fmt: skip
    """Weights and biases of queries and keys with what is removed and in other coordinates, by name; and by layer what mixes its kept
    output channels from all."""
    constants, mixes = dict[str, Array](), dict[str, FloatArray]()
    for layer in {id(side.layer): side.layer for side in pair.sides}.values():
        step = next(side.step for side in pair.sides if side.layer is layer)
        assert layer.weight is not None
        form, weight = step.linear.form, step.weight.value(lambda name: values[name])
        kept = kept_masks(layer.made, removed)[0]
        mixed = pair.mixing(layer, turns, len(kept), kept)
        masks = kept_masks(coupling.constants.get((layer.node.index, layer.weight.position), ()), removed)
        if layer.weight.in_axis in masks:
            weight = np.compress(masks[layer.weight.in_axis], weight, layer.weight.in_axis)
        shape = [int(kept.sum()) if axis == layer.weight.out_axis else size for axis, size in enumerate(weight.shape)]
        constants[step.weight.name] = form.weight(form.matrix(weight, 1).astype(np.float64) @ mixed, shape).astype(weight.dtype)
        if step.bias is not None:
            bias = step.bias.value(lambda name: values[name])
            constants[step.bias.name] = (bias.reshape(-1).astype(np.float64) @ mixed).astype(bias.dtype)
        mixes[step.layer] = mixed
    return constants, mixes


def turned(
    prepared: Prepared, coupling: Coupling, removed: BoolArray, changed: Model, batches: Iterable[Feeds], bound: Collection[str]
) -> tuple[Model, dict[str, FloatArray]]:  # fmt: skip
    """The changed model with the queries and keys that lost dimensions in the coordinates that lose least; and, by layer, what mixes the
    channels that it makes from those of the original (channels of the original, channels). Weights that are ``bound`` to a lower rank
    stay as they are."""
    found = [pair for pair in pairs(prepared, coupling) if pair.free and removed[pair.group.units].any()]
    scene = Scene(changed, coupling, prepared.nodes, prepared.trace.shapes)
    there = scene.index.makers  # a branch may have vanished with its heads
    found = [pair for pair in found if all(side.layer.node.outputs[0] in there for side in pair.sides)]
    found = [pair for pair in found if not any(side.step.weight.name in bound for side in pair.sides)]
    if not found:
        return changed, {}
    values, mixes, constants = Constants(prepared.model), dict[str, FloatArray](), dict[str, Array]()
    for name, moment in moments(prepared.model, found, batches, prepared.tokens).items():
        pair = next(pair for pair in found if pair.group.name == name)
        fresh, mixed = _mixed(prepared.model, values, pair, coordinates(moment)[0], coupling, removed)
        for side in pair.sides:
            task = plan_steps(scene, [[side.layer]], {})[0]
            assert isinstance(task, tuple)
            for old, new in ((side.step.weight, task[0].weight), (side.step.bias, task[0].bias)):
                if old is not None and new is not None:
                    constants[new.name] = fresh[old.name].reshape(new.shape)
        mixes |= mixed
    return extract.with_constants(changed, constants), mixes
