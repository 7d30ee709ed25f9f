"""Operators that run graphs of their own: what these are fed, and how often they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..core.types import Array, Node, Trace

ENDLESS = 1 << 31  # steps: until something says that it is over
Fed = Array | tuple[int, ...] | None
"""A value, or the shape of one; None: unknown."""


@dataclass(frozen=True)
class Body:
    """The graph in an ``attribute``, what its inputs are ``fed`` in their order, and how many ``times`` it runs."""

    attribute: str
    fed: Sequence[Fed]
    times: int


def _branches(node: Node, trace: Trace) -> list[Body]:
    return [Body(name, (), 1) for name in ("then_branch", "else_branch")]


def _loop(node: Node, trace: Trace) -> list[Body]:
    """Inputs: most steps, whether to begin, states; outputs: states, and what every step gives, one behind the other."""
    states = node.inputs[2:]
    stacked = [trace.shapes[name][0] for name in node.outputs[len(states) :] if trace.shapes.get(name)]
    most = trace.values.get(node.inputs[0])
    asked = 0 if most is None else int(most.reshape(-1)[0])
    fed: list[Fed] = [np.asarray(0, np.int64), np.asarray(True), *map(trace.shapes.get, states)]
    return [Body("body", fed, next(filter(None, stacked), asked if 0 < asked < ENDLESS else 1))]


def _scan(node: Node, trace: Trace) -> list[Body]:
    """Inputs: states, and sequences that are read step by step."""
    count = node.attributes["num_scan_inputs"]
    states, read = node.inputs[:-count], node.inputs[-count:]
    shapes, axes = [trace.shapes.get(name) for name in read], node.attributes.get("scan_input_axes") or [0] * count
    steps = [None if shape is None else tuple(np.delete(shape, axis).tolist()) for shape, axis in zip(shapes, axes, strict=True)]
    return [Body("body", [*map(trace.shapes.get, states), *steps], int(shapes[0][axes[0]]) if shapes[0] else 1)]


BODIES: dict[str, Callable[[Node, Trace], list[Body]]] = {"If": _branches, "Loop": _loop, "Scan": _scan}


def bodies(node: Node, trace: Trace) -> list[Body]:
    """The graphs that a node runs; of several one runs. A loop whose number of steps nothing tells counts once."""
    return BODIES[node.operator](node, trace) if node.operator in BODIES else []
