"""What the last operators in front of an output say of its values: that they are class scores, chosen indices, sorted, boxes."""

from __future__ import annotations

from typing import NamedTuple

from ..graph import GraphIndex, Model, nodes, outputs

MOVES = frozenset(
    "Identity Cast CastLike Reshape Flatten Squeeze Unsqueeze Transpose Slice Split Dropout Concat Gather GatherND GatherElements "
    "Expand Clip QuantizeLinear DequantizeLinear ai.onnx.ml.ZipMap ai.onnx.ml.LabelEncoder".split()
)  # they give values of their input as they are (bounded or rounded at most)
JOINS = frozenset(("Concat",))
PICKS = frozenset("Gather GatherND GatherElements".split())  # at the places that their second input names
SAYS = {  # classes: shares that sum to one; marks: a share each; chosen: an index; unit: of length one
    **dict.fromkeys(("Softmax", "LogSoftmax"), "classes"), **dict.fromkeys(("Sigmoid", "HardSigmoid"), "marks"), "ArgMax": "chosen",
    "TopK": "sorted", "NonMaxSuppression": "boxes", "LpNormalization": "unit", "com.microsoft.QLinearSoftmax": "classes",
    "com.microsoft.QLinearSigmoid": "marks", "NonZero": "listed",
}  # fmt: skip
LEARNED = frozenset(f"ai.onnx.ml.{name}Classifier" for name in ("Linear", "TreeEnsemble", "SVM"))  # class numbers, then their scores
DEEPEST = 64


class Tail(NamedTuple):
    """What is said of a tensor (a word of `SAYS`), and the operator that says it."""

    says: str
    operator: str


def tails(model: Model) -> dict[str, Tail]:
    """What is known of the outputs of a model from the operators that make them; of others nothing."""
    index = GraphIndex(nodes(model))
    found = {port.name: _tail(port.name, index) for port in outputs(model)}
    return {name: tail for name, tail in found.items() if tail is not None}


def _tail(name: str, index: GraphIndex, depth: int = 0) -> Tail | None:
    node = index.maker(name)
    if node is None or depth > DEEPEST:
        return None
    if node.operator in LEARNED:
        return Tail("chosen" if name == node.outputs[0] else "classes", node.op)
    if node.operator in SAYS:
        return Tail(SAYS[node.operator], node.op)
    if node.operator not in MOVES:
        return None
    if node.operator in PICKS:
        place = _tail(node.inputs[1], index, depth + 1)
        if place is not None and place.says in ("boxes", "sorted", "listed"):
            return place
    found = {_tail(own, index, depth + 1) for own in (node.inputs if node.operator in JOINS else node.inputs[:1])}
    return found.pop() if len(found) == 1 else None
