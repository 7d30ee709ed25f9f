"""Run the rules over the graph in topological order and collect their facts."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import MutableMapping
from dataclasses import replace
from typing import cast

from .. import graph
from ..errors import ModelError
from ..graph import Prepared
from ..labels import Labels
from ..records import Array, Node, Trace
from ..rules import RULES, Context, Facts


def state(prepared: Prepared, cut_layernorm: bool) -> Facts:
    """Facts of every node, and labels of every tensor."""
    constants = graph.Constants(prepared.model)
    maps = [dict(prepared.trace.values), constants]
    trace = replace(prepared.trace, values=ChainMap(*cast("list[MutableMapping[str, Array]]", maps)))
    facts, names, shared = Facts(), frozenset(constants), _shared(prepared)
    computed = frozenset(graph.from_constants(prepared.nodes, names) - names)
    for node in prepared.nodes:
        ctx = Context(node, prepared.model.opset, trace, facts, names, shared, computed, cut_layernorm)
        if all(_is_index(prepared.trace, name) for name in node.outputs if name):
            for position in range(len(node.inputs)) if not graph.asks_shape(node) else ():
                ctx.pin_input(position, f"{node.operator} computes sizes or indices from it")
            continue
        for labels, name in zip(_apply(ctx), node.outputs, strict=False):
            if name:
                facts.tensors[name] = _checked(labels, trace.shapes.get(name), node)
        _pass_zero_point(facts, node)
        for name in node.captures:
            for array in facts.tensors.get(name, ()):
                ctx.pin(array, f"a sub-graph of {node.operator} reads it")
    _pin_outputs(prepared, facts, trace)
    return facts


def _pass_zero_point(facts: Facts, node: Node) -> None:
    """Nodes that move integers without rescaling them keep the zero point of their first input."""
    source = facts.zero_points.get(node.inputs[0]) if node.inputs else None
    if source is not None:
        for name in node.outputs:
            facts.zero_points.setdefault(name, source)


def _shared(prepared: Prepared) -> frozenset[str]:
    """Weights (more than one axis over size 1) that several nodes read: their uses are kept equal."""
    uses: dict[str, int] = {}
    for node in prepared.nodes:
        for name in node.inputs:
            uses[name] = uses.get(name, 0) + 1
    shapes = graph.initializers(prepared.model)
    return frozenset(name for name, (shape, _) in shapes.items() if uses.get(name, 0) > 1 and sum(size > 1 for size in shape) > 1)


def _is_index(trace: Trace, name: str) -> bool:
    """Integers that do not depend on data: shapes and indices, which carry no channels."""
    value = trace.values.get(name)
    return value is not None and value.dtype.kind in "iub"


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
    for array in labels:
        sizes = () if shape is None else shape
        if array.ndim != len(sizes) or any(own not in (1, size) for own, size in zip(array.shape, sizes, strict=True)):
            raise ModelError(
                f"internal error: the rule for {node.operator} gave labels of shape {array.shape} to a tensor of shape {shape} at "
                f"'{node.name}'. Please report it."
            )
    return labels


def _pin_outputs(prepared: Prepared, facts: Facts, trace: Trace) -> None:
    for port in graph.outputs(prepared.model):
        node = Node(len(prepared.nodes), port.name, "output", "", (port.name,), (), {})
        ctx = Context(node, prepared.model.opset, trace, facts, frozenset())
        for array in facts.tensors.get(port.name, ()):
            ctx.pin(array, "graph output")
