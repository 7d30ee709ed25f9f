"""Operators that no rule describes: what to do about models that hold them, and what those of them that run graphs feed these."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..core.types import Array, Node, Trace
from ..graph import Model, holds_weights, initializers, nodes, too_old
from .registry import RULES, Trait, has, state

HINTS = {
    r"If": "its branches do not both run on all inputs, give other shapes or hold loops: they are not pruned",
    r"Loop|Scan": "the insides of sub-graphs are not pruned",
    r"com\.microsoft\.(\w*NBits|MatMulBnb4|GatherBlockQuantized|QMoE)":
        "their weights are packed: use the float model, and quantise what comes of it",
    r"com\.microsoft\.nchwc\..*":
        "saved at optimisation level 'all', in the layout of one processor: give the original, or a file saved at 'extended' or below",
    r"com\.microsoft\..*":
        "onnxruntime writes such nodes when it saves a model after optimisation: use the file from before",
    r"(qonnx|onnx\.brevitas|finn)\..*":
        "QONNX files run in no onnxruntime: export QCDQ (brevitas: export_onnx_qcdq), or convert with qonnx (QonnxToQCDQ)",
    r"(?i)(.*\.)?(.*_trt|trt.*|tensorrt.*|mmdeploy\..*)":
        "TensorRT's plug-ins run in no onnxruntime: export without them (up to what they read), prune that, and add them afterwards",
}  # fmt: skip
"""What to do, by a pattern of operators; the first that fits."""
WHOLE = ("int32", "int64", "bool", "object")
SHOWN = 3  # names in a sentence


def unruled(listed: Sequence[Node], model: Model) -> dict[str, tuple[str, ...]]:
    """Names of the nodes that hold weights (constants of several numbers, also in sub-graphs) and have no rule, by operator."""
    weights = {name for name, (shape, dtype) in initializers(model).items() if max(shape, default=1) > 1 and str(dtype) not in WHOLE}
    found: dict[str, list[str]] = {}
    for node in listed:
        if not has(node, Trait.UNSTEADY) and weights.issuperset(filter(None, node.inputs)) and node.inputs:
            weights.update(filter(None, node.outputs))  # dequantised, say
        holds = not weights.isdisjoint(node.reads) or any(map(holds_weights, node.attributes.values()))
        if node.operator not in RULES and holds:
            found.setdefault(node.operator, []).append(node.name)
    return {operator: tuple(names) for operator, names in found.items()}


def sentences(found: Mapping[str, Sequence[str]]) -> list[str]:
    """What to say of nodes with weights and without a rule, by operator."""
    said = []
    for operator, names in found.items():
        words = f"{len(names)} nodes of {operator} hold weights and have" if names[1:] else f"1 node of {operator} holds weights and has"
        shown = ", ".join(names[:SHOWN]) + (", ..." if names[SHOWN:] else "")
        said.append(". ".join([f"{words} no rule ({shown}): nothing leaves there", *map(_begun, hints_for([operator]))]))
    return said


def hints_for(operators: Iterable[str]) -> list[str]:
    """What to do about operators, each hint once."""
    fitting = ((hint for pattern, hint in HINTS.items() if re.fullmatch(pattern, operator)) for operator in sorted(operators))
    return list(dict.fromkeys(filter(None, (next(hints, None) for hints in fitting))))


def _begun(text: str) -> str:
    return text[0].upper() + text[1:]


def advice(model: Model, said: str) -> str:
    """What to do about a model that onnxruntime does not run, as it said; empty if nothing is known."""
    found = hints_for({node.operator for node in nodes(model) if node.domain != "com.microsoft"})
    if not found and "not a registered function/op" in said:
        found.append("operators that are not onnxruntime's own need their library: --custom-ops LIB")
    return too_old(model) + "".join(f" {_begun(hint)}." for hint in found)


# ---- operators that run graphs of their own ----------------------------------------------------------------------------

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
state(Trait.RUNS, *BODIES)


def bodies(node: Node, trace: Trace) -> list[Body]:
    """The graphs that a node runs; of several one runs. A loop whose number of steps nothing tells counts once."""
    return BODIES[node.operator](node, trace) if node.operator in BODIES else []
