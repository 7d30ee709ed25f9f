"""Quantised models: scales and zero points shrink with the channels that they belong to.

A removed channel of a quantised tensor stands at the zero point, which means zero; rules name it, so that the masked reference
can be built.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import prod

import numpy as np

from ..core.types import After, Edit, Node, SetAttribute
from .context import Context
from .labels import Labels, Operand, Reads, Writes, align, vector
from .mixing import Scales, Term, convolution, matrix_product, product, window
from .registry import Trait, rule

ROUNDED_BETWEEN, PASSED = ("Conv", "ConvTranspose", "Gemm"), ("Relu", "Clip")


def between_integers(nodes: Sequence[Node], floats: Collection[str]) -> list[Node]:
    """Layers with weights among ``floats`` (names of initializers) that onnxruntime makes integers as it loads a model, with one scale for
    the whole weight: what they read was rounded, and what they make is rounded next (WeightBiasQuantization of its optimizers)."""
    makers = {name: node for node in nodes for name in node.outputs}
    readers = dict[str, list[Node]]()
    for node in nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)

    def rounded(node: Node) -> bool:
        following = readers.get(node.outputs[0], [])
        if len(following) != 1:
            return False
        return following[0].op == "QuantizeLinear" or (following[0].op in PASSED and rounded(following[0]))

    asked = [node for node in nodes if node.op in ROUNDED_BETWEEN and node.inputs[1] in floats and node.inputs[0] in makers]
    return [node for node in asked if makers[node.inputs[0]].op == "DequantizeLinear" and rounded(node)]


def _per_channel(ctx: Context, labels: Labels, axis: int, vectors: Sequence[int]) -> None:
    """Scales and zero points with one value per index of an axis of the output shrink along."""
    size = ctx.out_shape()[axis]
    for position in vectors:
        if ctx.has(position) and size > 1 and ctx.shape(position) == (size,):
            ctx.match(position, 0, ctx.along(labels, axis % len(ctx.out_shape())))


@rule("QuantizeLinear", "DequantizeLinear", does="passes labels; scales and zero points per channel shrink along", traits=Trait.ROUNDS)
def quantize_linear(ctx: Context) -> list[Labels]:
    """Per tensor (scalar scale) or per channel (a vector along ``axis``); blocked scales keep their axis."""
    labels = ctx.labels(0)
    if ctx.rank(1) == 1 and ctx.shape(1)[0] > 1:
        channels = ctx.axis(0, ctx.attribute("axis", 1) % ctx.rank(0))
        for position in (1, 2):
            ctx.match(position, 0, channels)
    elif ctx.rank(1) > 1:
        labels = ctx.fix_input(0, [ctx.attribute("axis", 1) % ctx.rank(0)], "it is quantised in blocks along this axis")
    ctx.zero_point(ctx.node.inputs[2] if ctx.node.op == "QuantizeLinear" and ctx.has(2) else "")
    return [labels]


@rule(
    "DynamicQuantizeLinear",
    does="passes labels (its range always includes zero, so a removed channel does not change it)",
    traits=Trait.ROUNDS,
)
def dynamic_quantize_linear(ctx: Context) -> list[Labels]:
    """Values, scale, zero point."""
    ctx.zero_point(ctx.node.outputs[2])
    return [ctx.labels(0), (), ()]


@rule("ConvInteger", does="as Conv, on integers")
def conv_integer(ctx: Context) -> list[Labels]:
    """x, w, zero points of both; the result is int32, where a removed channel is 0."""
    ctx.zero_point("")
    return convolution(ctx, 1, [3], window(ctx, False, None))


@rule("QLinearConv", does="as Conv, on integers")
def qlinear_conv(ctx: Context) -> list[Labels]:
    """x, w and y, each with scale and zero point, and the bias."""
    ctx.zero_point(ctx.node.inputs[7])
    return convolution(ctx, 3, [4, 5, 8])


@rule("MatMulInteger", does="as MatMul, on integers")
def matmul_integer(ctx: Context) -> list[Labels]:
    """a, b, zero points of both; the result is int32, where a removed column is 0."""
    ctx.zero_point("")
    output = matrix_product(ctx, 0, 1, Scales())
    _per_channel(ctx, output, -1, [3])
    return [output]


@rule("com.microsoft.DynamicQuantizeMatMul", does="as MatMul, on integers", traits=Trait.ROUNDS)
def dynamic_quantize_matmul(ctx: Context) -> list[Labels]:
    """a (float), b with scale and zero point, bias; the result is float."""
    return _to_float(ctx, 4, [2, 3])


@rule("com.microsoft.MatMulIntegerToFloat", does="as MatMul, on integers", traits=Trait.ROUNDS)
def matmul_integer_to_float(ctx: Context) -> list[Labels]:
    """a, b, their scales, their zero points, bias; the result is float."""
    return _to_float(ctx, 6, [3, 5])


def _to_float(ctx: Context, bias: int, vectors: Sequence[int]) -> list[Labels]:
    output = matrix_product(ctx, 0, 1, Scales(position=bias))
    _per_channel(ctx, output, -1, [*vectors, bias])
    return [output]


@rule("QLinearMatMul", does="as MatMul, on integers")
def qlinear_matmul(ctx: Context) -> list[Labels]:
    """a, b and y, each with scale and zero point."""
    ctx.zero_point(ctx.node.inputs[7])
    output = matrix_product(ctx, 0, 3)
    _per_channel(ctx, output, -1, [4, 5])
    return [output]


@rule("com.microsoft.QGemm", does="as Gemm, on integers")
def qgemm(ctx: Context) -> list[Labels]:
    """a, b with scale and zero point, c, and y's scale and zero point (without them the result is float)."""
    first = (1, 0) if ctx.attribute("transA", 0) else (0, 1)
    second = (2, 1) if ctx.attribute("transB", 0) else (1, 2)
    output = product(ctx, [Term(0, first), Term(3, second)], (0, 2), 3)
    ctx.adopt(6, output)
    _per_channel(ctx, output, 1, [4, 5])
    ctx.zero_point(ctx.node.inputs[8] if ctx.has(8) else "")
    return [output]


@rule("com.microsoft.QLinearAdd", "com.microsoft.QLinearMul", does="ties its operands element by element, on integers")
def qlinear_binary(ctx: Context) -> list[Labels]:
    """a, b and c, each with scale and zero point."""
    rank = len(ctx.out_shape())
    ctx.zero_point(ctx.node.inputs[7])
    data = [position for position in (0, 3) if not ctx.is_constant(position)]
    shapes = {position: (1,) * (rank - ctx.rank(position)) + ctx.shape(position) for position in data}
    merged = ctx.merge([Operand(tuple(align(array, rank) for array in ctx.labels(position)), shapes[position]) for position in data])
    for position in (0, 3):
        ctx.adopt(position, merged)
    return [merged]


@rule("com.microsoft.QLinearSigmoid", "com.microsoft.QLinearLeakyRelu", does="passes labels, on integers")
def qlinear_unary(ctx: Context) -> list[Labels]:
    """x and y, each with scale and zero point."""
    ctx.zero_point(ctx.node.inputs[4])
    return [ctx.labels(0)]


@rule(
    "com.microsoft.QLinearGlobalAveragePool",
    "com.microsoft.QLinearAveragePool",
    does="passes channels, on integers (spatial axes keep their size)",
)
def qlinear_pool(ctx: Context) -> list[Labels]:
    """x and y, each with scale and zero point; channels first."""
    ctx.zero_point(ctx.node.inputs[4])
    last = ctx.attribute("channels_last", 0)
    spatial = range(1, ctx.rank(0) - 1) if last else range(2, ctx.rank(0))
    return [ctx.settle(0, list(spatial), "it is pooled along this axis")]


@rule("com.microsoft.MatMulNBits", does="makes output features; input features are packed in blocks, and stay")
def matmul_packed(ctx: Context) -> list[Labels]:
    """x, weight N x blocks x bytes, scales, zero points, order, bias: of these all but the order hold the same number of entries for
    every output feature."""
    count, last = ctx.attribute("N"), ctx.rank(0) - 1
    stay = "MatMulNBits packs this axis in blocks: prune the float model, and quantise what comes of it"
    passed = ctx.settle(0, [last], stay)
    if not ctx.is_constant(1):
        return [passed]
    written = ctx.axis(1, 0)
    for position in (2, 3, 5):
        if ctx.has(position) and written is not None:
            ctx.match(position, 0, np.repeat(written, ctx.shape(position)[0] // count))

    def edits(after: After) -> list[Edit]:
        return [SetAttribute("N", after.input_shape(1)[0])]

    ctx.follow(edits)
    ctx.layer(float(prod(ctx.shape(0)) * count), [written], Reads(0, last, 1, None), Writes(1, 0, written))
    return [passed if written is None else (*passed, vector(written, last, last + 1))]
