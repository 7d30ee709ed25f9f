"""Which inputs of integer operators are scales and zero points, and which are what these belong to."""

from __future__ import annotations

from collections.abc import Iterable

from ..core.types import Node

TRIPLES = (1, 2, 4, 5, 6, 7)
SCALES = {  # input positions of scales and zero points of the operators that read quantised tensors
    "QuantizeLinear": (1, 2), "DequantizeLinear": (1, 2), "ConvInteger": (2, 3), "MatMulInteger": (2, 3), "QLinearConv": TRIPLES,
    "QLinearMatMul": TRIPLES, "com.microsoft.QuantizeLinear": (1, 2), "com.microsoft.DequantizeLinear": (1, 2),
    "com.microsoft.QLinearAdd": TRIPLES, "com.microsoft.QLinearMul": TRIPLES, "com.microsoft.QGemm": (1, 2, 4, 5, 7, 8),
    "com.microsoft.DynamicQuantizeMatMul": (2, 3), "com.microsoft.MatMulIntegerToFloat": (2, 3, 4, 5),
    "com.microsoft.DynamicQuantizeLSTM": (8, 9, 10, 11), "com.microsoft.QLinearSigmoid": (1, 2, 3, 4),
    "com.microsoft.QLinearLeakyRelu": (1, 2, 3, 4), "com.microsoft.QLinearGlobalAveragePool": (1, 2, 3, 4),
    "com.microsoft.QLinearAveragePool": (1, 2, 3, 4),
}  # fmt: skip


def on_integers(node: Node) -> bool:
    """Whether a node works on quantised tensors."""
    return node.operator in SCALES


def quantised_operands(nodes: Iterable[Node]) -> tuple[set[str], set[str]]:
    """Tensors that are read as quantised values, and those that are read as scales or zero points. The scale of a tensor that is quantised
    at run time is multiplied with that of the weight, so what meets it in a product is a scale, too."""
    values, scales, dynamic = set[str](), set[str](), set[str]()
    for node in nodes:
        places = SCALES.get(node.operator)
        if places is not None:
            scales.update(name for at, name in enumerate(node.inputs) if at in places)
            values.update(name for at, name in enumerate(node.inputs) if at not in places)
        elif node.operator == "DynamicQuantizeLinear":
            dynamic.add(node.outputs[1])
        elif node.operator == "Mul" and dynamic & set(node.inputs):
            scales.update(node.inputs)
    return values - {""}, scales - {""}
