"""Who can only leave with whom, what cannot leave, and why. No operator names here: rules state facts, this reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from ..core.errors import ModelError
from ..core.types import Affine, AxisUnits, BoolArray, Channels, Coupling, Group, IntArray, Layer, Node, Pinned, Weight
from ..graph import Prepared, initializers, outputs
from ..rules.context import TOGETHER, Context
from ..rules.foreign import unruled
from ..rules.labels import FIXED, Choice, Facts, Labels, LayerFact, PinFact, TiePair, compact, components, varying
from ..rules.registry import RULES, Trait, has
from .blocked import Insides, insides
from .contracted import Dimensions, dimensions

NOWHERE = (-1, -1)

GRAPH_OUTPUT = "graph output"

# ---- from rules to facts, in topological order -----------------------------------------------------------------------


def state(prepared: Prepared, expand: bool) -> Facts:
    """Facts of every node, and labels of every tensor."""
    trace, facts, names = prepared.known, Facts(), frozenset(initializers(prepared.model))
    computed = frozenset(from_constants(prepared, names) - names)
    shared = _shared(prepared, computed)
    for node in prepared.nodes:
        ctx = Context(node, prepared.model.opset, prepared.known, facts, names, shared, computed, expand)
        values = (prepared.trace.values.get(name) for name in node.outputs if name)
        if all(value is not None and value.dtype.kind in "iub" for value in values):  # no channels: integers that no data change
            for position in range(len(node.inputs)) if not has(node, Trait.SIZES) else ():
                ctx.pin_input(position, f"{node.operator} computes sizes or indices from it")
            continue
        for labels, name in zip(_apply(ctx), node.outputs, strict=False):
            if name:
                facts.tensors[name] = _checked(labels, trace.shapes.get(name), node)
        point = facts.zero_points.get(node.inputs[0]) if node.inputs else None
        if point is not None:  # nodes that move integers without rescaling them keep the zero point of their first input
            for name in node.outputs:
                if np.dtype(prepared.types.get(name) or np.float32).kind in "iu":
                    facts.zero_points.setdefault(name, point)
    for node in prepared.nodes:
        ctx = Context(node, prepared.model.opset, trace, facts, frozenset())
        for name in node.captures:
            for array in (*facts.tensors.get(name, ()), *facts.constants.get(facts.shared.get(name, NOWHERE), ())):
                ctx.pin(array, f"a sub-graph of {node.operator} reads it")
    for port in outputs(prepared.model):
        node = Node(len(prepared.nodes), port.name, "output", "", (port.name,), (), {})
        ctx = Context(node, prepared.model.opset, trace, facts, frozenset())
        for array in facts.tensors.get(port.name, ()):
            ctx.pin(array, GRAPH_OUTPUT)
    return facts


def from_constants(prepared: Prepared, constants: Iterable[str]) -> set[str]:
    """Tensors that are a function of constants alone, such as dequantised weights."""
    known = set(constants)
    for node in prepared.nodes:
        if not has(node, Trait.UNSTEADY) and not node.captures and all(name in known for name in node.inputs if name):
            known.update(name for name in node.outputs if name)
    return known


def _shared(prepared: Prepared, computed: frozenset[str]) -> frozenset[str]:
    """Weights (more than one axis over size 1) that several nodes or sub-graphs read: their uses are kept equal. Not so what only meets
    data element by element (tables of positions or biases, of which exporters merge those that start out equal)."""

    def met(name: str) -> bool:
        return all(has(node, Trait.SPREADS) and computed.isdisjoint(node.outputs) for node, _ in prepared.index.readers(name))

    several = (name for name, (shape, _) in initializers(prepared.model).items() if sum(size > 1 for size in shape) > 1)
    return frozenset(name for name in several if len(prepared.index.readers(name)) > 1 and not met(name))


def _apply(ctx: Context) -> list[Labels]:
    node = ctx.node
    known = all(name in ctx.trace.shapes for name in (*node.inputs, *node.outputs) if name)
    rule = RULES.get(node.operator)
    if rule is not None and known and not node.captures:
        return rule(ctx)
    reason = f"operator {node.operator} has no rule" if rule is None else f"the shapes around {node.operator} are unknown"
    for position in range(len(node.inputs)):
        ctx.pin_input(position, reason)
    return [() for _ in node.outputs]


def _checked(labels: Labels, shape: tuple[int, ...] | None, node: Node) -> Labels:
    sizes = shape or ()
    for array in labels:
        if array.ndim != len(sizes) or any(length not in (1, size) for length, size in zip(array.shape, sizes, strict=True)):
            where = f"to a tensor of shape {shape} at '{node.name}'"
            raise ModelError(f"internal error: the rule for {node.operator} gave labels of shape {array.shape} {where}. Please report it.")
    return labels


# ---- from facts to numbered units and groups -------------------------------------------------------------------------

TIED = "it can only leave together with channels that cannot be removed"


def resolve(facts: Facts, prepared: Prepared) -> Coupling:
    """Number the units and rewrite all facts in terms of them."""
    left, right = _edges(facts.ties)
    constants = _constants(facts, prepared.nodes)
    inside = insides(facts, constants, left, right)
    rows = [(item.matrix, np.broadcast_to(item.rows[:, None], item.matrix.shape)) for item in facts.contracted]
    parent = components(facts.labels, *_edges([*facts.ties, *rows]))
    parent = _choose(facts, inside.settled(facts.choices), parent, prepared.nodes)
    read = (labels for name, labels in facts.tensors.items() if prepared.index.readers(name))
    distinct = {id(array): array for labels in read for array in labels}
    unit_of, widths = _number(facts, parent, [parent[array] for array in distinct.values()])
    units = unit_of[parent]
    second = dimensions(facts, constants, left, right)
    columns = np.where(second.unit_of < 0, -1, second.unit_of + sum(widths))
    own = np.where(inside.unit_of < 0, -1, inside.unit_of + sum(widths) + sum(second.widths))
    columns = np.where(own < 0, columns, own)
    tensors = {name: _channels(labels, units, columns) for name, labels in facts.tensors.items()}
    inner = {item.node.index: own[side] for item in inside.stated if (side := item.sides[item.inner]) is not None}
    layers = tuple(_layer(fact, (units, columns, own), inner.get(fact.node.index), tensors) for fact in facts.layers)
    carried = {key: _channels(labels, units, columns) for key, labels in constants.items()}
    for item in inside.stated:
        if (found := inner.get(item.node.index)) is not None and (found >= 0).any():
            carried[item.node.index, item.weight] = (*carried.get((item.node.index, item.weight), ()), AxisUnits(1, found))
    places = ((prepared.nodes[node].inputs[at], constants.get((node, at), ())) for node, at in facts.masked_inputs)
    return Coupling(
        units=sum((*widths, *second.widths, *inside.widths)), groups=_groups(widths, layers, tensors, second, inside), layers=layers,
        tensors={name: channels for name, channels in tensors.items() if channels},
        constants={key: channels for key, channels in carried.items() if channels},
        affines=tuple(Affine(f.node, f.node.inputs[0], f.gamma, f.scale, units[f.labels], f.moments) for f in facts.affines),
        follows=tuple(facts.follows), pinned=_reasons(facts, parent, unit_of), additive=facts.additive, expanded=frozenset(facts.expanded),
        unruled=unruled(prepared.nodes, prepared.model),
        zero_points={name: tensor for name, tensor in facts.zero_points.items() if tensor},
        masked_inputs={name: _channels(labels, units, columns) for name, labels in places},
        channels_total=sum(len(layer.writes) for layer in layers),
        channels_prunable=sum(layer.free for layer in layers),
    )  # fmt: skip


# ---- ties and choices ------------------------------------------------------------------------------------------------


def written(facts: Facts) -> BoolArray:
    """By label: whether it can only leave together with channels that a layer makes (and is no place in a table, say)."""
    parent, made = components(facts.labels, *_edges(facts.ties)), np.zeros(facts.labels, bool)
    for layer in facts.layers:
        if layer.writes.labels is not None:
            made[parent[layer.writes.labels]] = True
    made[FIXED] = False
    return made[parent]


def _edges(ties: Sequence[TiePair]) -> TiePair:
    if not ties:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return np.concatenate([left.reshape(-1) for left, _ in ties]), np.concatenate([right.reshape(-1) for _, right in ties])


def _rectangles(facts: Facts, nodes: Sequence[Node]) -> Iterator[Choice]:
    """A choice for every tensor whose labels vary along several axes: which axis they leave along."""
    known = set()
    for node in nodes:
        arrays = [array for name in node.outputs for array in facts.tensors.get(name, ())]
        arrays += [array for position in range(len(node.inputs)) for array in facts.constants.get((node.index, position), ())]
        for array in arrays:
            axes = varying(array)
            if len(axes) < 2 or (array.shape, array.tobytes()) in known:
                continue
            known.add((array.shape, array.tobytes()))
            firsts = (array[tuple(slice(None if other == axis else 1) for other in range(array.ndim))] for axis in axes)
            yield Choice(node, tuple(((array, np.broadcast_to(first, array.shape)),) for first in firsts))


def _choose(facts: Facts, stated: Sequence[Choice], parent: IntArray, nodes: Sequence[Node]) -> IntArray:
    """Resolve the choices that rules ``stated`` and those of tensors, in the order of their nodes, and against it, each by what it leaves;
    and all those that nodes state alike, by their first option or by their last; keep the outcome with most free classes.

    What a choice leaves depends on the others: constraints that are stated late may rule out what looked best early, and grouped
    convolutions behind each other gain only if all of them lose whole groups, or all of them channels of every group.
    """
    choices = sorted([*stated, *_rectangles(facts, nodes)], key=lambda choice: choice.node.index)
    alike = ([replace(own, options=own.options[part]) for own in stated] for part in (slice(1), slice(-1, None)) if len(stated) > 1)
    orders = [choices, choices[::-1], *([*first, *choices] for first in alike)]
    outcomes = (_resolve_in_order(facts, parent, order) for order in orders)
    _, best, pins = max(outcomes, key=lambda outcome: outcome[0])
    facts.pins.extend(pins)
    return best


def _resolve_in_order(facts: Facts, parent: IntArray, choices: Sequence[Choice]) -> tuple[int, IntArray, list[PinFact]]:
    """Number of free classes, class of every label, and new pins. Of equally good options the first is taken."""
    pins: list[PinFact] = []
    pinned = np.zeros(facts.labels, bool)
    for pin in facts.pins:
        pinned[pin.labels] = True
    for choice in choices:
        held = np.zeros(facts.labels, bool)
        held[parent[pinned]] = held[FIXED] = True
        edges = [_edges(option) for option in choice.options]
        roots = np.unique(parent[np.concatenate([side for pair in edges for side in pair])])
        results = []
        for option, (left, right) in zip(choice.options, edges, strict=True):
            merged = components(len(roots), *(np.searchsorted(roots, parent[side]) for side in (left, right)))
            sides = (merged[np.searchsorted(roots, parent[side.reshape(-1)])] for pair in option for side in pair if side.size > 1)
            filled = [side[0] for side in sides if (side == side[0]).all()]  # a class that fills an axis cannot leave
            results.append((len(np.setdiff1d(merged, [*merged[held[roots]], *filled])), merged))
        best = max(range(len(results)), key=lambda index: results[index][0])
        to_fixed = (edges[best][0] == FIXED) != (edges[best][1] == FIXED)
        if to_fixed.any():
            labels = np.unique(np.maximum(*edges[best])[to_fixed])
            pins.append(PinFact(labels, choice.node.name, TIED))
            pinned[labels] = True
        remap = np.arange(facts.labels)
        remap[roots] = roots[results[best][1]]
        remap[parent[FIXED]] = FIXED
        parent = remap[parent]
    held = np.zeros(facts.labels, bool)
    held[parent[pinned]] = held[FIXED] = True
    return len(np.setdiff1d(parent, parent[held[parent]])), parent, pins


# ---- units -----------------------------------------------------------------------------------------------------------


def _constants(facts: Facts, nodes: Sequence[Node]) -> dict[tuple[int, int], Labels]:
    """Labels of every constant operand, those of shared weights at each of their uses."""
    labels = dict(facts.constants)
    for node in nodes:
        for position, name in enumerate(node.inputs):
            if name in facts.shared and facts.shared[name] in facts.constants:
                labels[node.index, position] = facts.constants[facts.shared[name]]
    return labels


def _number(facts: Facts, parent: IntArray, members: list[IntArray]) -> tuple[IntArray, list[int]]:
    """Unit of every class root (-1: cannot leave), and the widths of the groups in the order of their units; ``members`` are the
    classes of all distinct label arrays.

    Classes are grouped by a hash of the set of tensor axes they occur on. Classes with a set of their own (channels that a
    chain of shuffles scatters over ever new branches) are grouped by the tensor they first occur on. A class that fills an
    axis, or is alone in its group even so, cannot leave.
    """
    held = np.zeros(facts.labels, bool)
    held[FIXED] = True
    for pin in facts.pins:
        held[parent[pin.labels]] = True
    signature, birth = np.zeros(facts.labels, np.uint64), np.zeros(facts.labels, np.uint64)
    generator = np.random.default_rng(0)
    for classes in members:
        present = np.unique(classes)
        if len(present) == 1:
            held[present] = True
        site = generator.integers(1, 2**63, dtype=np.uint64)
        signature[present] += site
        birth[present[birth[present] == 0]] = site
    unit_of = np.full(facts.labels, -1, np.int64)
    roots = np.flatnonzero((signature > 0) & ~held)
    _, group, counts = np.unique(signature[roots], return_inverse=True, return_counts=True)
    keys = np.where(counts[group] > 1, signature[roots], birth[roots])
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    widths: list[int] = []
    for index in np.argsort(first):
        units = roots[group == index]
        if len(units) > 1:
            start = sum(widths)
            unit_of[units] = np.arange(start, start + len(units))
            widths.append(len(units))
    return unit_of, widths


def _channels(labels: Labels, *kinds: IntArray) -> Channels:
    """Axes of a tensor along which units vary, those of each kind (units, by label) for themselves; an index leaves with any of them."""
    return tuple(sorted((axis for units in kinds for axis in _axes(labels, units)), key=lambda carried: carried.axis))


def _axes(labels: Labels, units: IntArray) -> Channels:
    """Axes of a tensor along which units of one kind vary. After resolution no label array varies along two axes."""
    units_by_axis: dict[int, IntArray] = {}
    for array in labels:
        carried = compact(units[array])
        for axis in varying(carried):
            values = carried.reshape(-1)
            assert len(values) == carried.shape[axis], "units vary along two axes of one tensor"
            known = units_by_axis.get(axis)
            units_by_axis[axis] = values if known is None else np.where(known < 0, values, known)
    return tuple(AxisUnits(axis, values) for axis, values in units_by_axis.items())


def _layer(fact: LayerFact, kinds: Sequence[IntArray], inner: IntArray | None, tensors: Mapping[str, Channels]) -> Layer:
    """A layer, with the units of each label of the first kind, of the second, and of those of the second that are ``own`` channels; where
    there is none of the first, these stand in its place. ``inner``: those of the axis of a weight that all groups share."""
    reads, writes, none = fact.reads, fact.writes, np.zeros(0, np.int64)
    units, columns, own = kinds
    data = [carried.units for carried in tensors.get(fact.node.inputs[reads.data], ()) if carried.axis == reads.data_axis]
    second = [axis for axis in data[1:] if np.isin(axis, own).any()]
    made = [none, none] if writes.labels is None else [units[writes.labels], columns[writes.labels]]
    if (made[0] < 0).all() and writes.labels is not None and (own[writes.labels] >= 0).any():
        made = [made[1], none]
    read = none if reads.labels is None else units[reads.labels]
    if (read < 0).all() and reads.labels is not None:
        read = own[reads.labels]
    return Layer(
        node=fact.node, macs=fact.macs, extents=(
            *(units[array].reshape(-1) for array in fact.extents),
            *(columns[array].reshape(-1) for array in fact.extents if (columns[array] >= 0).any()),
            *([] if inner is None or (inner < 0).all() else [inner.reshape(-1)]),
        ),
        columns=none if (made[1] < 0).all() else made[1],
        weight=Weight(writes.weight, writes.weight_axis, reads.weight_axis) if fact.constant else None,
        reads=read, writes=made[0], data=reads.data, data_axis=reads.data_axis, source=data[0] if data else none,
        second=second[0] if second else none, linear=fact.linear if fact.constant else None, grouped=fact.grouped,
    )  # fmt: skip


def _groups(
    widths: list[int], layers: Sequence[Layer], tensors: Mapping[str, Channels], second: Dimensions, inside: Insides
) -> tuple[Group, ...]:  # fmt: skip
    """Groups with the names of their producers and consumers; a group is called after its first producer, one of dimensions after the
    product that sums over them."""
    first, plain = len(widths), len(widths) + len(second.widths)
    blocks = [*[1] * plain, *inside.blocks]
    widths = [*widths, *second.widths, *inside.widths]
    group_of = np.repeat(np.arange(len(widths)), widths)
    names = [layer.node.name for layer in layers]
    producers = _touching(group_of, len(widths), names, [np.concatenate([layer.writes, layer.columns]) for layer in layers])
    read = [np.concatenate([layer.reads, *(layer.sources if layer.grouped else ())]) for layer in layers]
    consumers = _touching(group_of, len(widths), names, read)
    names = [name for name, channels in tensors.items() for _ in channels]
    carriers = _touching(group_of, len(widths), names, [carried.units for channels in tensors.values() for carried in channels])
    whole = _wholes(tensors.values(), group_of, plain)
    groups, taken = list[Group](), dict[str, int]()
    for index in range(len(widths)):
        base = (producers[index] or carriers[index])[0]
        if first <= index < plain:
            base = second.nodes[index - first].name
            consumers[index] = [base]
        taken[base] = taken.get(base, 0) + 1
        name = base if taken[base] == 1 else f"{base}#{taken[base]}"
        units = np.flatnonzero(group_of == index)
        within = tuple(groups[other].name for other in sorted(whole.get(index, ())))
        groups.append(Group(name, units, tuple(producers[index]), tuple(consumers[index]), first <= index < plain, blocks[index], within))
    return tuple(groups)


def _wholes(tensors: Iterable[Channels], group_of: IntArray, plain: int) -> dict[int, set[int]]:
    """For each group from number ``plain`` on, those whose units share an axis with it, index by index."""
    found: dict[int, set[int]] = {}
    for one, other in ((one, other) for channels in tensors for one, other in pairwise(channels) if one.axis == other.axis):
        both = (one.units >= 0) & (other.units >= 0)
        for pair in {*zip(group_of[one.units[both]].tolist(), group_of[other.units[both]].tolist(), strict=True)}:
            if max(pair) >= plain:
                found.setdefault(max(pair), set()).add(min(pair))
    return found


def _touching(group_of: IntArray, count: int, names: Sequence[str], carried: Sequence[IntArray]) -> list[list[str]]:
    """Names by group: of what carries units of it."""
    touching: list[list[str]] = [[] for _ in range(count)]
    for name, units in zip(names, carried, strict=True):
        for index in np.unique(group_of[units[units >= 0]]):
            touching[index].append(name)
    return touching


# ---- reasons ---------------------------------------------------------------------------------------------------------


def _reasons(facts: Facts, parent: IntArray, unit_of: IntArray) -> tuple[Pinned, ...]:
    """Why written channels cannot leave, with counts; the first stated reason of a class is given."""
    reason_of = np.full(facts.labels, -1, np.int64)
    stated = [*facts.pins, *facts.joins]
    for index in range(len(stated) - 1, -1, -1):
        reason_of[parent[stated[index].labels]] = index
    layers: dict[tuple[str, str], list[str]] = {}  # of each channel, by reason and node
    for layer in facts.layers:
        if layer.writes.labels is None:
            continue
        roots = parent[layer.writes.labels]
        for root in roots[unit_of[roots] < 0]:
            pin = stated[reason_of[root]] if reason_of[root] >= 0 else None
            key = (pin.reason, pin.node) if pin else (TOGETHER, layer.node.name)
            layers.setdefault(key, []).append(layer.node.name)
    return tuple(Pinned(reason, node, len(names), tuple(dict.fromkeys(names))) for (reason, node), names in layers.items())
