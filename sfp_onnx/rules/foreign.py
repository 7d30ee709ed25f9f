"""Operators that no rule describes, and what to do about models that hold them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from ..core.types import Node
from ..graph import Model, holds_weights, initializers, nodes, too_old
from .registry import RULES, Trait, has

HINTS = {
    r"If|Loop|Scan": "the insides of sub-graphs are not pruned",
    r"com\.microsoft\.(\w*NBits|MatMulBnb4|GatherBlockQuantized|QMoE)":
        "their weights are packed: use the float model, and quantise what comes of it",
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
