"""Which inputs of integer operators are scales and zero points, and which are what these belong to."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from ..core.types import Node
from ..graph import GraphIndex, Initializer

FLOAT = 1  # the number of the type in attributes
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


def quantised_operands(nodes: Iterable[Node], whole: Collection[str] = ()) -> tuple[set[str], set[str]]:
    """Tensors that are read as quantised values, and those that are read as scales or zero points. The scale of a tensor that is quantised
    at run time is multiplied with that of the weight, so what meets it in a product is a scale, too; so is what meets a cast of integers
    that are constants (``whole``)."""
    values, scales, dynamic = set[str](), set[str](), set[str]()
    for node in nodes:
        places = SCALES.get(node.operator)
        if places is not None:
            scales.update(name for at, name in enumerate(node.inputs) if at in places)
            values.update(name for at, name in enumerate(node.inputs) if at not in places)
        elif node.operator == "DynamicQuantizeLinear":
            dynamic.add(node.outputs[1])
        elif node.operator == "Cast" and node.inputs[0] in whole:
            dynamic.add(node.outputs[0])
        elif node.operator == "Mul" and dynamic & set(node.inputs):
            scales.update(node.inputs)
    return values - {""}, scales - {""}


class Coded(NamedTuple):
    """A tensor that is (values - zero point) * scale, all of them constants; the scale has one value, or one per index of ``axis``.
    Without a scale it is a cast of the values."""

    values: str
    scale: str = ""
    zero_point: str = ""
    axis: int = 0


def coded(name: str, index: GraphIndex, held: Mapping[str, Initializer]) -> Coded | None:
    """How a tensor is made of constants that are stored in fewer bits; None if it is not."""
    node = index.maker(name)
    if node is None or node.operator not in ("Cast", "Mul", "DequantizeLinear"):
        return None
    if node.operator == "Mul":
        cast, scale = (*node.inputs, "")[:2]
        stored = coded(cast, index, held) if scale in held and len(index.readers(cast)) == 1 else None
        if stored is None or stored.scale or len(held[scale].shape) != len(held[stored.values].shape):
            return None
        axes = [axis for axis, size in enumerate(held[scale].shape) if size > 1]
        return Coded(stored.values, scale, "", axes[0] if axes else 0) if len(axes) < 2 else None
    if any(other and other not in held for other in node.inputs):
        return None
    values, scale, zero = [*node.inputs, "", ""][:3]
    if (node.op == "Cast" and node.attributes["to"] != FLOAT) or (scale and len(held[scale].shape) > 1):
        return None
    return Coded(values, scale, zero, node.attributes.get("axis", 1) % max(len(held[values].shape), 1))
