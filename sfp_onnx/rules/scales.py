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


class Around(NamedTuple):
    """The floats around a product of integers: ``output`` is ``data``, as near as it was quantised, times a weight
    (values - zero point) * scale. The scale has one value, or one per output channel."""

    data: str
    output: str
    scale: str
    zero_point: str


def around(node: Node, index: GraphIndex, held: Mapping[str, Initializer]) -> Around | None:
    """The floats around an operator that multiplies integers of data that are quantised at run time; None if they are not there."""
    given = [*node.inputs, "", "", "", ""]
    found = None
    if node.operator == "com.microsoft.DynamicQuantizeMatMul":
        found = Around(given[0], node.outputs[0], given[2], given[3])
    elif node.operator == "com.microsoft.MatMulIntegerToFloat":
        source = index.maker(given[0])
        if source is not None and source.operator == "DynamicQuantizeLinear" and given[2] == source.outputs[1]:
            found = Around(source.inputs[0], node.outputs[0], given[3], given[5])
    elif node.operator in ("MatMulInteger", "ConvInteger"):
        found = _rescaled(node, index, held)
    if found is None or found.scale not in held or (found.zero_point and found.zero_point not in held):
        return None
    return found


def _rescaled(node: Node, index: GraphIndex, held: Mapping[str, Initializer]) -> Around | None:
    """DynamicQuantizeLinear, the product, Cast, and Mul by both scales."""
    source, zero_points = index.maker(node.inputs[0]), [*node.inputs[2:], "", ""][:2]
    if source is None or source.operator != "DynamicQuantizeLinear" or zero_points[0] != source.outputs[2]:
        return None
    wanted, last, scale = {source.outputs[1]}, _only(index, node.outputs[0], "Cast"), ""
    while last is not None and (factor := _only(index, last.outputs[0], "Mul")) is not None:
        other = next((name for name in factor.inputs if name != last.outputs[0]), "")
        maker = index.maker(other)
        parts = set(maker.inputs) if maker is not None and maker.operator == "Mul" else {other}
        if not parts <= {*wanted, *held} or len(parts & set(held)) > (not scale):
            break
        scale, wanted, last = next(iter(parts & set(held)), scale), wanted - parts, factor
        if scale and not wanted:
            return Around(source.inputs[0], last.outputs[0], scale, zero_points[1])
    return None


def _only(index: GraphIndex, name: str, operator: str) -> Node | None:
    """The node that reads a tensor, if there is one, of this operator."""
    readers = index.readers(name)
    return readers[0][0] if len(readers) == 1 and readers[0][0].operator == operator else None
