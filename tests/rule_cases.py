"""Minimal models around every operator that has a rule: a convolution in front, the operator, a mixing layer behind.

A case is a function ``(builder, y, operator) -> name of the tensor to read``; ``y`` is the output of the convolution, N x 8 x 8 x 8. The
harness runs it on every opset generation of the operator (where onnx.defs lists a change of the schema).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx
import onnx.defs
import onnx.helper as oh
from building import FLOAT, NEWEST, Builder, feeds_for, run

CHANNELS, SIDE = 8, 8
OLDEST = 7
INT32, INT64, BOOL, UINT8, DOUBLE = (getattr(onnx.TensorProto, name) for name in ("INT32", "INT64", "BOOL", "UINT8", "DOUBLE"))
Build = Callable[[Builder, str, str], str]


@cache
def generations() -> dict[str, list[int]]:
    """Opsets at which each operator's schema changed."""
    found: dict[str, set[int]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            found.setdefault(schema.name, set()).add(schema.since_version)
    return {name: sorted(versions) for name, versions in found.items()}


@dataclass(frozen=True)
class Case:
    """``pinned``: part of the sentence why the first convolution cannot shrink ("" if it can). ``select``: the operator is infinite
    on a masked zero, so the reference selects instead of multiplying. ``since``/``until``: opsets that have the form."""

    operator: str
    build: Build
    pinned: str = ""
    select: bool = False
    since: int = OLDEST
    until: int = NEWEST

    def opsets(self) -> list[int]:
        """The lowest opset of every generation of the operator within the range of the case."""
        changes = generations().get(self.operator)
        if changes is None:
            return [max(self.since, 17)]
        ends = [*(change - 1 for change in changes[1:]), NEWEST]
        spans = [(max(a, self.since), min(b, self.until)) for a, b in zip(changes, ends, strict=True)]
        return [a for a, b in spans if a <= b]


CASES: dict[str, list[Case]] = {}


def case(operators: str, pinned: str = "", select: bool = False, since: int = OLDEST, until: int = NEWEST) -> Callable[[Build], Build]:
    def register(build: Build) -> Build:
        for operator in operators.split():
            CASES.setdefault(operator, []).append(Case(operator, build, pinned, select, since, until))
        return build

    return register


def model_of(own: Case, opset: int) -> onnx.ModelProto:
    """conv -> operator -> conv or gemm over whatever shape comes out."""
    b = Builder(opset, seed=1)
    x = b.input(["N", 3, SIDE, SIDE])
    tail(b, own.build(b, b.conv(x, 3, CHANNELS, name="first"), own.operator))
    return b.model("out")


def tail(b: Builder, name: str) -> None:
    """A layer named ``last`` with output ``out`` that reads axis 1 of a tensor (all of a tensor of rank 1 or 2)."""
    kind = next(item.type.tensor_type.elem_type for item in b.model(name).graph.output)
    if kind != FLOAT:
        name = b.op("Cast", name, to=FLOAT)
    probe = b.model(name)
    shape = np.shape(run(probe, feeds_for(probe))[0])
    if len(shape) < 3:
        if len(shape) != 2:
            name, shape = b.op("Reshape", name, b.const([-1, 1], np.int64)), (0, 1)
        b.op("Gemm", name, b.weight(shape[1], 5), b.weight(5), name="last", outputs=["out"])
    else:
        weight = b.weight(5, shape[1], *[1] * (len(shape) - 2))
        b.op("Conv", name, weight, name="last", outputs=["out"])


def branch(b: Builder, channels: int = CHANNELS, name: str = "second") -> str:
    """Another tensor like ``y``."""
    return b.conv("x", 3, channels, name=name)


def tokens(b: Builder, y: str) -> str:
    """N x 64 x C."""
    return b.op("Transpose", b.op("Reshape", y, b.const([0, CHANNELS, -1], np.int64)), perm=[0, 2, 1])


def swap(b: Builder, t: str) -> str:
    """Channels of tokens to axis 1 again."""
    return b.op("Transpose", t, perm=[0, 2, 1])


# ---- one operand -----------------------------------------------------------------------------------------------------


@case(
    "Abs Asinh Atan Ceil Celu Cos Cosh Dropout Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Mish Neg Relu "
    "Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Swish Tan Tanh ThresholdedRelu Clip Sum Mean Max Min"
)
def unary(b: Builder, y: str, op: str) -> str:
    return b.op(op, y)


@case("Acos Asin Atanh")
def inside_one(b: Builder, y: str, op: str) -> str:
    return b.op(op, b.op("Mul", b.op("Tanh", y), b.const(0.9)))


@case("Sqrt")
def not_negative(b: Builder, y: str, op: str) -> str:
    return b.op(op, b.op("Relu", y))


@case("Acosh Log Reciprocal", select=True, since=9)
def over_one(b: Builder, y: str, op: str) -> str:
    return b.op(op, b.op("Add", b.op("Abs", y), b.const(1.0)))


@case("Cast")
def cast(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, to=INT32)


@case("Not")
def logical_not(b: Builder, y: str, op: str) -> str:
    return b.op(op, b.op("Greater", y, b.const(np.zeros((CHANNELS, 1, 1), np.float32))))


@case("BitwiseNot")
def bitwise_not(b: Builder, y: str, op: str) -> str:
    return b.op(op, b.op("Cast", b.op("Mul", y, b.const(9.0)), to=INT32))


# ---- several operands ------------------------------------------------------------------------------------------------


def attributes_of(op: str) -> dict[str, int | str]:
    return {"Mod": {"fmod": 1}, "BitShift": {"direction": "RIGHT"}}.get(op, {})


# The old forms of Sum, Mean, Max and Min do not broadcast, and the old Equal compares no floats.
FLOATS = "Add Sub Mul Div Pow Mod PRelu Greater GreaterOrEqual Less LessOrEqual"


def prepared(b: Builder, y: str, op: str) -> str:
    """A first operand on which the operator is defined."""
    return b.op("Abs", y) if op == "Pow" else y


@case(FLOATS)
@case("Max Min Mean Sum", since=8)
@case("Equal", since=11)
def with_channel_constant(b: Builder, y: str, op: str) -> str:
    return b.op(op, prepared(b, y, op), b.uniform(CHANNELS, 1, 1), **attributes_of(op))


@case(FLOATS)
@case("Max Min Mean Sum", since=8)
@case("Equal", since=11)
def with_scalar(b: Builder, y: str, op: str) -> str:
    return b.op(op, prepared(b, y, op), b.const(np.float32(0.7)), **attributes_of(op))


@case(FLOATS)
@case("Max Min Mean Sum", since=8)
@case("Equal", since=11)
def with_spatial_constant(b: Builder, y: str, op: str) -> str:
    return b.op(op, prepared(b, y, op), b.uniform(1, 1, SIDE, SIDE) if op != "PRelu" else b.uniform(1, SIDE, SIDE), **attributes_of(op))


@case("Add Sub Mul Max Min Mean Sum Greater Less")
def with_branch(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, branch(b))


@case("Div Pow Mod", select=True, since=10)
def by_branch(b: Builder, y: str, op: str) -> str:
    return b.op(op, prepared(b, y, op), b.op("Exp", branch(b)), **attributes_of(op))


@case("Add Mul Sub")
@case("Max", since=8)
def with_gate(b: Builder, y: str, op: str) -> str:
    return b.op(op, b.op("Sigmoid", b.op("GlobalAveragePool", y)), branch(b))


@case("Add Mul")
def with_input(b: Builder, y: str, op: str) -> str:
    """The other operand is an input of the graph, which keeps its channels: those that are kept are gathered."""
    return b.op(op, y, b.input(["N", CHANNELS, SIDE, SIDE], "other"))


@case("Add Mul")
def with_broadcast_input(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, b.input(["N", 1, SIDE, SIDE], "other"))


@case("Sum Mean Max Min", since=8)
def of_three(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, b.uniform(1, CHANNELS, 1, 1), branch(b))


@case("And Or Xor")
def logical(b: Builder, y: str, op: str) -> str:
    zero = b.const(np.zeros((CHANNELS, 1, 1), np.float32))
    return b.op(op, b.op("Greater", y, zero), b.op("Greater", branch(b), zero))


@case("BitwiseAnd BitwiseOr BitwiseXor")
def bitwise(b: Builder, y: str, op: str) -> str:
    left, right = (b.op("Cast", b.op("Mul", item, b.const(9.0)), to=INT32) for item in (y, branch(b)))
    return b.op(op, left, right)


@case("BitShift", select=True)
def shift(b: Builder, y: str, op: str) -> str:
    left = b.op("Cast", b.op("Abs", b.op("Mul", y, b.const(50.0))), to=UINT8)
    return b.op(op, left, b.const(np.arange(CHANNELS).reshape(-1, 1, 1) % 3, np.uint8), direction="RIGHT")


@case("CastLike")
def cast_like(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, b.const(np.zeros(1), np.int32))


@case("Clip")
def clip(b: Builder, y: str, op: str) -> str:
    return b.clip(y, -0.5, 0.5)


@case("Where")
def where(b: Builder, y: str, op: str) -> str:
    other = branch(b)
    return b.op(op, b.op("Greater", y, other), y, b.uniform(CHANNELS, 1, 1))


@case("Where")
def where_mask(b: Builder, y: str, op: str) -> str:
    return b.op(op, b.const(np.arange(SIDE) % 2 == 0), y, b.const(np.float32(-1)))


@case("com.microsoft.Gelu com.microsoft.QuickGelu com.microsoft.FastGelu")
def microsoft_unary(b: Builder, y: str, op: str) -> str:
    return b.op(op.rpartition(".")[2], y, domain="com.microsoft")


@case("com.microsoft.BiasGelu com.microsoft.FastGelu")
def microsoft_bias(b: Builder, y: str, op: str) -> str:
    return swap(b, b.op(op.rpartition(".")[2], tokens(b, y), b.weight(CHANNELS), domain="com.microsoft"))


# ---- mixing ----------------------------------------------------------------------------------------------------------


@case("Conv")
def conv(b: Builder, y: str, op: str) -> str:
    return b.conv(y, CHANNELS, 6, strides=[2, 2], dilations=[1, 1])


@case("Conv")
def conv_grouped(b: Builder, y: str, op: str) -> str:
    return b.conv(y, CHANNELS, 12, group=4)


@case("Conv")
def conv_two_groups(b: Builder, y: str, op: str) -> str:
    return b.conv(y, CHANNELS, 12, group=2, bias=False)


@case("Conv")
def conv_depthwise(b: Builder, y: str, op: str) -> str:
    return b.conv(y, CHANNELS, CHANNELS, group=CHANNELS)


@case("Conv")
def conv_multiplier(b: Builder, y: str, op: str) -> str:
    return b.conv(y, CHANNELS, 2 * CHANNELS, group=CHANNELS)


@case("Conv")
def conv_one_dimension(b: Builder, y: str, op: str) -> str:
    return b.conv(b.op("Reshape", y, b.const([0, CHANNELS, -1], np.int64)), CHANNELS, 6, rank=1)


@case("Conv")
def conv_three_dimensions(b: Builder, y: str, op: str) -> str:
    return b.conv(b.op("Reshape", y, b.const([0, CHANNELS, 2, 4, 8], np.int64)), CHANNELS, 6, rank=3)


@case("Conv", pinned="")
def conv_with_computed_weight(b: Builder, y: str, op: str) -> str:
    """Weights that are a function of constants only are constants."""
    return b.op("Conv", y, b.op("Mul", b.weight(6, CHANNELS, 1, 1), b.const(2.0)))


@case("Conv ConvTranspose", pinned="is computed at run time")
def conv_with_weight_from_data(b: Builder, y: str, op: str) -> str:
    """A dynamic convolution."""
    mean = b.op("Flatten", b.op("GlobalAveragePool", b.reduce("ReduceMean", y, [0], keepdims=1)))
    kernel = b.op("Reshape", b.gemm(mean, CHANNELS, 6 * CHANNELS), b.const([6, CHANNELS, 1, 1], np.int64))
    turned = b.op("Transpose", kernel, perm=[1, 0, 2, 3]) if op == "ConvTranspose" else kernel
    return b.op("Concat", b.op(op, y, turned), branch(b), axis=1)


@case("ConvTranspose")
def conv_transpose(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, b.weight(CHANNELS, 6, 2, 2), b.weight(6), strides=[2, 2])


@case("ConvTranspose")
def conv_transpose_grouped(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, b.weight(CHANNELS, 3, 2, 2), b.weight(6), group=2)


@case("ConvTranspose")
def conv_transpose_depthwise(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, b.weight(CHANNELS, 1, 2, 2), group=CHANNELS)


@case("ConvTranspose")
def conv_transpose_one_dimension(b: Builder, y: str, op: str) -> str:
    return b.op(op, b.op("Reshape", y, b.const([0, CHANNELS, -1], np.int64)), b.weight(CHANNELS, 6, 3))


def pooled(b: Builder, y: str) -> str:
    return b.op("Flatten", b.op("GlobalAveragePool", y))


@case("Gemm")
def gemm(b: Builder, y: str, op: str) -> str:
    return b.gemm(pooled(b, y), CHANNELS, 6)


@case("Gemm")
def gemm_flattened(b: Builder, y: str, op: str) -> str:
    return b.op(op, b.op("Flatten", y), b.weight(6, CHANNELS * SIDE * SIDE), b.weight(1, 6), transB=1, alpha=0.5, beta=2.0)


@case("Gemm")
def gemm_scalar_bias(b: Builder, y: str, op: str) -> str:
    return b.op(op, pooled(b, y), b.weight(CHANNELS, 6), b.const(np.float32([0.5])))


@case("Gemm")
def gemm_transposed(b: Builder, y: str, op: str) -> str:
    turned = b.op("Transpose", pooled(b, y))
    return b.op(op, turned, b.weight(CHANNELS, 6), b.weight(6), transA=1)


@case("Gemm")
def gemm_added(b: Builder, y: str, op: str) -> str:
    """The third operand is an activation: its channels are tied to the outputs."""
    return b.op(op, pooled(b, y), b.weight(CHANNELS, 6), pooled(b, branch(b, 6)))


@case("MatMul")
def matmul(b: Builder, y: str, op: str) -> str:
    return swap(b, b.op("Add", b.op(op, tokens(b, y), b.weight(CHANNELS, 6)), b.weight(6)))


@case("MatMul")
def matmul_left(b: Builder, y: str, op: str) -> str:
    return b.op(op, b.weight(6, CHANNELS), b.op("Reshape", y, b.const([0, CHANNELS, -1], np.int64)))


@case("MatMul")
def matmul_two_activations(b: Builder, y: str, op: str) -> str:
    """Contraction over the channels of both."""
    return b.op(op, tokens(b, y), b.op("Reshape", branch(b), b.const([0, CHANNELS, -1], np.int64)))


@case("MatMul")
def matmul_other_axis(b: Builder, y: str, op: str) -> str:
    """Contraction over positions: channels of both operands stay apart."""
    return b.op(op, b.op("Reshape", y, b.const([0, CHANNELS, -1], np.int64)), tokens(b, branch(b)))


@case("MatMul")
def matmul_vector(b: Builder, y: str, op: str) -> str:
    return b.op(op, b.op("Relu", tokens(b, y)), b.weight(CHANNELS))


@case("MatMul")
def matmul_batched_weight(b: Builder, y: str, op: str) -> str:
    """One matrix per channel: C x 8 x 6."""
    return b.op(op, y, b.weight(CHANNELS, SIDE, 6))


@case("Einsum", since=12)
def einsum_linear(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, b.weight(6, CHANNELS), equation="nchw,oc->nohw")


@case("Einsum", since=12)
def einsum_attention(b: Builder, y: str, op: str) -> str:
    """Scores of all pairs of positions, contracted over channels of both."""
    other = b.op("Reshape", branch(b), b.const([0, CHANNELS, -1], np.int64))
    return b.op(op, b.op("Reshape", y, b.const([0, CHANNELS, -1], np.int64)), other, equation="bci,bcj->bij")


@case("Einsum", since=12)
def einsum_outer(b: Builder, y: str, op: str) -> str:
    """Nothing contracted but the positions: the channels of both operands stay apart."""
    return b.op(op, y, branch(b, 4), equation="nchw,ndhw->ncd")


# ---- movement --------------------------------------------------------------------------------------------------------


@case("Reshape")
def reshape_flat(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, b.const([-1, CHANNELS * SIDE * SIDE], np.int64))


@case("Reshape")
def reshape_split(b: Builder, y: str, op: str) -> str:
    wide = b.op(op, y, b.const([0, 2, CHANNELS // 2, SIDE, SIDE], np.int64))
    return b.op(op, b.op("Transpose", wide, perm=[0, 2, 1, 3, 4]), b.const([-1, CHANNELS, SIDE, SIDE], np.int64))


@case("Reshape")
def reshape_computed(b: Builder, y: str, op: str) -> str:
    """[batch from Shape, channels as a constant, -1]."""
    size = b.op("Gather", b.op("Shape", y), b.const([0], np.int64), axis=0)
    return b.op(op, y, b.op("Concat", size, b.const([CHANNELS, -1], np.int64), axis=0))


@case("Reshape", since=14)
def reshape_allow_zero(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, b.const([-1, CHANNELS, SIDE * SIDE], np.int64), allowzero=1)


@case("Flatten")
def flatten(b: Builder, y: str, op: str) -> str:
    return b.op(op, y)


@case("Flatten")
def flatten_two(b: Builder, y: str, op: str) -> str:
    """Channels are merged with the batch, and come out again."""
    rows = b.op("MatMul", b.op(op, y, axis=2), b.weight(SIDE * SIDE, 3))
    return b.op("Reshape", rows, b.const([-1, CHANNELS, 3], np.int64))


@case("Flatten", since=11)
def flatten_negative(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, axis=-3)


@case("Squeeze")
def squeeze(b: Builder, y: str, op: str) -> str:
    return b.axes_op(op, b.op("GlobalAveragePool", y), [2, 3])


@case("Squeeze")
def squeeze_last(b: Builder, y: str, op: str) -> str:
    return b.axes_op(op, b.op("GlobalAveragePool", y), [3] if b.opset < 11 else [-1])


@case("Unsqueeze")
def unsqueeze(b: Builder, y: str, op: str) -> str:
    return b.axes_op(op, y, [2])


@case("Unsqueeze")
def unsqueeze_front(b: Builder, y: str, op: str) -> str:
    return b.axes_op("Squeeze", b.op("Mul", b.axes_op(op, y, [0, 3]), b.uniform(CHANNELS, 1, 1, 1)), [0, 3])


@case("Transpose")
def transpose(b: Builder, y: str, op: str) -> str:
    last = b.op(op, y, perm=[0, 2, 3, 1])
    return b.op(op, b.op("Mul", last, b.uniform(CHANNELS)), perm=[0, 3, 1, 2])


@case("Transpose")
def transpose_default(b: Builder, y: str, op: str) -> str:
    return b.op(op, b.op("Relu", b.op(op, y)))


@case("Expand", since=8)
def expand(b: Builder, y: str, op: str) -> str:
    return b.op(op, b.op("GlobalAveragePool", y), b.const([1, CHANNELS, 4, 4], np.int64))


@case("Expand", since=8)
def expand_rank(b: Builder, y: str, op: str) -> str:
    return b.op("Mul", b.op(op, b.op("GlobalAveragePool", y), b.op("Shape", y)), y)


@case("Expand", since=8)
def expand_short(b: Builder, y: str, op: str) -> str:
    return b.op(op, b.op("GlobalAveragePool", y), b.const([4, 4], np.int64))


@case("Expand", since=8)
def expand_over_channels(b: Builder, y: str, op: str) -> str:
    """One map repeated over the channels of another (the repeated channels can leave too)."""
    mean = b.reduce("ReduceMean", y, [1], keepdims=1)
    return b.op("Mul", y, b.op(op, mean, b.const([1, CHANNELS, 1, 1], np.int64)))


@case("Tile")
def tile(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, b.const([1, 1, 2, 1], np.int64))


@case("Tile")
def tile_channels(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, b.const([1, 2, 1, 1], np.int64))


@case("Concat")
def concat(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, branch(b, 4), y, axis=1)


@case("Concat", since=11)
def concat_negative(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, branch(b, 4), axis=-3)


@case("Concat")
def concat_space(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, branch(b), axis=2)


@case("Concat")
def concat_input(b: Builder, y: str, op: str) -> str:
    return b.op(op, "x", y, axis=1)


@case("Concat")
def concat_constant(b: Builder, y: str, op: str) -> str:
    """Constant channels (coordinates) beside real ones; the batch is 1."""
    one = b.reduce("ReduceMean", y, [0], keepdims=1)
    return b.op(op, one, b.weight(1, 2, SIDE, SIDE), axis=1)


@case("Concat")
def concat_constant_space(b: Builder, y: str, op: str) -> str:
    """A constant (class token) with the same channels, along another axis."""
    one = tokens(b, b.reduce("ReduceMean", y, [0], keepdims=1))
    return swap(b, b.op(op, b.weight(1, 1, CHANNELS), one, axis=1))


@case("Split")
def split(b: Builder, y: str, op: str) -> str:
    left, right = b.split(y, [3, 5])
    return b.op("Concat", right, left, axis=1)


@case("Split", until=17)
def split_implied(b: Builder, y: str, op: str) -> str:
    left, right = b.op(op, y, outputs=2, axis=1)
    return b.op("Concat", b.op("Relu", left), right, left, axis=1)


@case("Split", since=18)
def split_count(b: Builder, y: str, op: str) -> str:
    parts = b.op(op, y, outputs=3, axis=1, num_outputs=3)
    return b.op("Concat", *parts[::-1], axis=1)


@case("Split")
def split_tied(b: Builder, y: str, op: str) -> str:
    return b.op("Mul", *b.split(y, [4, 4]))


@case("Split")
def split_one(b: Builder, y: str, op: str) -> str:
    """A part of one channel cannot lose it."""
    left, right = b.split(y, [1, 7])
    return b.op("Concat", right, left, axis=1)


@case("Split")
def split_space(b: Builder, y: str, op: str) -> str:
    return b.op("Add", *b.split(y, [4, 4], axis=2))


@case("Slice")
def slice_channels(b: Builder, y: str, op: str) -> str:
    return b.slice(y, [1], [6], [1])


@case("Slice")
def slice_negative(b: Builder, y: str, op: str) -> str:
    return b.slice(y, [-5, 0], [2**31 - 1, -1], [1, 2])


@case("Slice")
def slice_one(b: Builder, y: str, op: str) -> str:
    return b.op("Mul", b.slice(y, [2], [3], [1]), b.slice(y, [4], [8], [1]))


@case("Slice")
def slice_halves(b: Builder, y: str, op: str) -> str:
    return b.op("Mul", b.slice(y, [0], [4], [1]), b.slice(y, [4], [9999], [1]))


@case("Slice", since=10)
def slice_steps(b: Builder, y: str, op: str) -> str:
    return b.slice(y, [0, 7], [SIDE, -100], [2, 3], [2, -1])


@case("Slice", since=10, pinned="step")
def slice_channel_steps(b: Builder, y: str, op: str) -> str:
    return b.slice(y, [0], [SIDE], [1], [2])


@case("Slice", since=10)
def slice_default_axes(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, b.const([0, 2], np.int64), b.const([1, 7], np.int64))


@case("Gather")
def gather(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, b.const([5, 0, 7, 2, 2, 1], np.int64), axis=1)


@case("Gather", since=11)
def gather_negative(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, b.const([-1, 3, -4, 0], np.int32), axis=-3)


@case("Gather")
def gather_space(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, b.const([3, 1], np.int64), axis=2)


@case("Gather")
def gather_position(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, b.const(3, np.int64), axis=2)


@case("Gather")
def gather_computed_position(b: Builder, y: str, op: str) -> str:
    """A scalar index that is computed from constants stays a scalar."""
    index = b.op("Cast", b.op("Add", b.const(np.float32(1)), b.const(np.float32(2))), to=INT64)
    return b.op(op, y, index, axis=2)


@case("Gather", pinned="by number")
def gather_one_channel(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, b.const(3, np.int64), axis=1)


@case("Gather", pinned="several axes")
def gather_grid(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, b.const([[0, 1], [2, 3]], np.int64), axis=1)


@case("Gather")
def gather_embedding(b: Builder, y: str, op: str) -> str:
    """Rows of a constant table by data: the table's columns are channels."""
    index = b.input(["N", 4], "index", INT64)
    rows = b.op(op, b.weight(10, CHANNELS), index, axis=0)
    return b.op("MatMul", rows, b.op("Reshape", y, b.const([0, CHANNELS, -1], np.int64)))


def positions(b: Builder, y: str, low: int, high: int) -> str:
    """Some index between two bounds for every pixel of a tensor, computed from the data."""
    share = b.op("Sigmoid", y)
    return b.op("Cast", b.op("Add", b.op("Mul", share, b.const(high - low - 0.01)), b.const(np.float32(low))), to=INT64)


@case("GatherElements")
def gather_elements(b: Builder, y: str, op: str) -> str:
    """The indices are made from the data, with the same channels, and with one channel for all."""
    own = b.op(op, y, positions(b, y, 0, SIDE), axis=2)
    mean = b.reduce("ReduceMean", y, [3], keepdims=1)
    return b.op("Add", own, b.op(op, branch(b), positions(b, mean, -3, SIDE), axis=-1))


@case("GatherElements")
def gather_elements_constant(b: Builder, y: str, op: str) -> str:
    one = b.reduce("ReduceMean", y, [0], keepdims=1)
    return b.op(op, one, b.const(b.random.integers(-SIDE, SIDE, (1, CHANNELS, 3, SIDE)), np.int64), axis=2)


@case("GatherElements", pinned="depend on the input data")
def gather_elements_channels(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, positions(b, branch(b), 0, CHANNELS), axis=1)


@case("GatherElements", pinned="by index along this axis")
def gather_elements_fewer_channels(b: Builder, y: str, op: str) -> str:
    one = b.reduce("ReduceMean", y, [0], keepdims=1)
    return b.op(op, one, b.const(b.random.integers(0, SIDE, (1, 5, 3, SIDE)), np.int64), axis=2)


@case("GatherElements")
def gather_elements_table(b: Builder, y: str, op: str) -> str:
    """The data are constant, the indices carry the channels."""
    mean = b.reduce("ReduceMean", y, [0], keepdims=1)
    return b.op(op, b.weight(1, CHANNELS, 5, SIDE), positions(b, mean, 0, 5), axis=2)


@case("ScatterElements")
@case("Scatter", since=9, until=10)
def scatter_elements(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, positions(b, branch(b), 0, SIDE), branch(b, name="third"), axis=2)


@case("ScatterElements")
@case("Scatter", since=9, until=10)
def scatter_elements_constant(b: Builder, y: str, op: str) -> str:
    one = b.reduce("ReduceMean", y, [0], keepdims=1)
    index = b.const(np.tile(np.array([5, 2, 7]), (1, CHANNELS, SIDE, 1)), np.int64)
    return b.op(op, one, index, b.weight(1, CHANNELS, SIDE, 3), axis=3)


@case("ScatterElements", since=16)
def scatter_elements_added(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, positions(b, branch(b), 0, SIDE), branch(b, name="third"), axis=3, reduction="add")


@case("ScatterElements", since=18)
def scatter_elements_greatest(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, positions(b, branch(b), 0, SIDE), branch(b, name="third"), axis=3, reduction="max")


@case("ScatterElements", pinned="depend on the input data")
@case("Scatter", since=9, until=10, pinned="depend on the input data")
def scatter_elements_channels(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, positions(b, branch(b), 0, CHANNELS), branch(b, name="third"), axis=1)


def channels_first(b: Builder, y: str) -> str:
    """C x N x H x W (and back)."""
    return b.op("Transpose", y, perm=[1, 0, 2, 3])


@case("GatherND", since=11)
def gather_nd_channels(b: Builder, y: str, op: str) -> str:
    return channels_first(b, b.op(op, channels_first(b, y), b.const([[5], [-8], [7], [2], [2], [1]], np.int64)))


@case("GatherND", since=11)
def gather_nd_pairs(b: Builder, y: str, op: str) -> str:
    """Some pairs of a channel and a row."""
    turned = b.op("Transpose", y, perm=[1, 2, 0, 3])
    pairs = b.const([[0, 3], [1, -1], [-2, 0], [0, 1], [3, 3]], np.int64)
    return b.op("Transpose", b.op(op, turned, pairs), perm=[1, 0, 2])


@case("GatherND", since=11)
def gather_nd_grid(b: Builder, y: str, op: str) -> str:
    """A table of tuples: its rows carry the channels."""
    index = np.stack(np.meshgrid([4, 1, 6, 3], [0, 2, 4], indexing="ij"), -1)
    made = b.op(op, b.op("Transpose", y, perm=[1, 2, 0, 3]), b.const(index, np.int64))
    return b.op("Transpose", made, perm=[2, 0, 1, 3])


@case("GatherND", since=11)
def gather_nd_one(b: Builder, y: str, op: str) -> str:
    """Channel 3 must stay, the others need not."""
    made = channels_first(b, b.op(op, channels_first(b, y), b.const([[3], [3]], np.int64)))
    return b.op("Concat", made, y, axis=1)


@case("GatherND", since=11)
def gather_nd_space(b: Builder, y: str, op: str) -> str:
    turned = b.op("Transpose", y, perm=[2, 3, 0, 1])
    return b.op("Transpose", b.op(op, turned, b.const([[0, 3], [1, 7], [-2, 0]], np.int64)), perm=[1, 2, 0])


@case("GatherND", since=11)
def gather_nd_computed(b: Builder, y: str, op: str) -> str:
    """Rows by data: the channels are beside."""
    row = positions(b, b.reduce("ReduceMean", branch(b, 3), [0, 2, 3], keepdims=0), 0, SIDE)
    turned = b.op("Transpose", y, perm=[2, 1, 0, 3])
    return b.op("Transpose", b.op(op, turned, b.axes_op("Unsqueeze", row, [1])), perm=[2, 1, 0, 3])


@case("GatherND", since=12)
def gather_nd_batches(b: Builder, y: str, op: str) -> str:
    """One row of every sample and channel; data and indices share two axes."""
    row = positions(b, b.reduce("ReduceMean", branch(b), [2, 3], keepdims=0), 0, SIDE)
    return b.op(op, y, b.axes_op("Unsqueeze", row, [2, 3]), batch_dims=2)


@case("GatherND", since=11, pinned="depend on the input data")
def gather_nd_computed_channels(b: Builder, y: str, op: str) -> str:
    row = positions(b, b.reduce("ReduceMean", branch(b, 3), [0, 2, 3], keepdims=0), 0, CHANNELS)
    return channels_first(b, b.op(op, channels_first(b, y), b.axes_op("Unsqueeze", row, [1])))


@case("GatherND", since=12, pinned="cannot shrink")
def gather_nd_constant_batches(b: Builder, y: str, op: str) -> str:
    """A constant row of every channel: the channels count as batches."""
    one = b.reduce("ReduceMean", y, [0], keepdims=0)
    rows = b.op(op, one, b.const(b.random.integers(0, SIDE, (CHANNELS, 2, 1)), np.int64), batch_dims=1)
    return b.axes_op("Unsqueeze", rows, [0])


@case("GatherND", since=12, pinned="by index along this axis")
def gather_nd_channels_of_batches(b: Builder, y: str, op: str) -> str:
    one = b.reduce("ReduceMean", y, [0], keepdims=1)
    return b.op(op, one, b.const([[[3], [1], [2]]], np.int64), batch_dims=1)


@case("ScatterND", since=11)
def scatter_nd_slice(b: Builder, y: str, op: str) -> str:
    """x[:, 2:5] = z, with the channels in front."""
    index = b.const([[2], [3], [-4]], np.int64)
    return channels_first(b, b.op(op, channels_first(b, y), index, channels_first(b, branch(b, 3))))


@case("ScatterND", since=11)
def scatter_nd_grid(b: Builder, y: str, op: str) -> str:
    """x[:, 2:5] = z as tuples of sample and channel; the batch is 1."""
    one, three = (b.reduce("ReduceMean", item, [0], keepdims=1) for item in (y, branch(b, 3)))
    index = np.stack(np.meshgrid([0], [2, 3, 4], indexing="ij"), -1)
    return b.op(op, one, b.const(index, np.int64), three)


@case("ScatterND", since=11)
def scatter_nd_constant(b: Builder, y: str, op: str) -> str:
    """Some channels are set to constants, and all are written into a buffer of zeros."""
    one = channels_first(b, b.reduce("ReduceMean", y, [0], keepdims=1))
    filled = b.op(op, one, b.const([[1], [6]], np.int64), b.weight(2, 1, SIDE, SIDE))
    buffer = b.const(np.zeros((12, 1, SIDE, SIDE), np.float32))
    return channels_first(b, b.op(op, buffer, b.const(np.arange(2, 10).reshape(-1, 1), np.int64), filled))


@case("ScatterND", since=11, pinned="cannot shrink")
def scatter_nd_input(b: Builder, y: str, op: str) -> str:
    """Into an input of the graph."""
    other = channels_first(b, b.input(["N", 12, SIDE, SIDE], "other"))
    made = b.op(op, other, b.const(np.arange(2, 10).reshape(-1, 1), np.int64), channels_first(b, y))
    return channels_first(b, made)


@case("ScatterND", since=11)
def scatter_nd_some_from_input(b: Builder, y: str, op: str) -> str:
    """Only the rows that an input overwrites must stay."""
    other = channels_first(b, b.input(["N", 2, SIDE, SIDE], "other"))
    return channels_first(b, b.op(op, channels_first(b, y), b.const([[1], [6]], np.int64), other))


@case("ScatterND", since=11)
def scatter_nd_one(b: Builder, y: str, op: str) -> str:
    return channels_first(b, b.op(op, channels_first(b, y), b.const([[2]], np.int64), channels_first(b, branch(b, 1))))


@case("ScatterND", since=16)
def scatter_nd_added(b: Builder, y: str, op: str) -> str:
    """The same row twice."""
    index = b.const([[2], [3], [2]], np.int64)
    return channels_first(b, b.op(op, channels_first(b, y), index, channels_first(b, branch(b, 3)), reduction="add"))


@case("ScatterND", since=18)
def scatter_nd_greatest(b: Builder, y: str, op: str) -> str:
    index = b.const([[2], [3], [5]], np.int64)
    return channels_first(b, b.op(op, channels_first(b, y), index, channels_first(b, branch(b, 3)), reduction="max"))


@case("ScatterND", since=11, pinned="by index along this axis")
def scatter_nd_scattered(b: Builder, y: str, op: str) -> str:
    """Tuples that are no grid."""
    turned = b.op("Transpose", y, perm=[1, 2, 0, 3])
    written = b.op("Transpose", branch(b, 3), perm=[1, 2, 0, 3])
    rows = b.axes_op("Squeeze", b.slice(written, [0], [1], [1]), [1])
    made = b.op(op, turned, b.const([[0, 3], [1, -1], [4, 0]], np.int64), rows)
    return b.op("Transpose", made, perm=[2, 0, 1, 3])


@case("ScatterND", since=11, pinned="by index along this axis")
def scatter_nd_no_grid(b: Builder, y: str, op: str) -> str:
    """As many axes as a grid has, but it is none."""
    index = b.const([[[0, 3], [1, -1]], [[4, 0], [0, 0]]], np.int64)
    turned, written = (b.op("Transpose", item, perm=[1, 2, 0, 3]) for item in (y, branch(b, 2)))
    made = b.op(op, turned, index, b.slice(written, [0], [2], [1]))
    return b.op("Transpose", made, perm=[2, 0, 1, 3])


@case("ScatterND", since=11, pinned="by index along this axis")
def scatter_nd_samples(b: Builder, y: str, op: str) -> str:
    """x[:, 2:5] = z as tuples of sample and channel; how many samples there are is dynamic."""
    size = b.op("Gather", b.op("Shape", y), b.const(0, np.int64), axis=0)
    samples = b.op("Reshape", b.op("Range", b.const(0, np.int64), size, b.const(1, np.int64)), b.const([-1, 1, 1], np.int64))
    channels = b.const([[[2], [3], [4]]], np.int64)
    zeros = [b.op("Mul", samples, b.const([[[0]]], np.int64)), b.op("Mul", channels, b.const([[[0]]], np.int64))]
    tuples = b.op("Concat", b.op("Add", samples, zeros[1]), b.op("Add", zeros[0], channels), axis=2)
    return b.op(op, y, tuples, branch(b, 3))


@case("ScatterND", since=11)
def scatter_nd_computed(b: Builder, y: str, op: str) -> str:
    """Rows by data: the channels are beside."""
    row = positions(b, b.reduce("ReduceMean", branch(b, 3), [0, 2, 3], keepdims=0), 0, SIDE)
    turned, written = (b.op("Transpose", item, perm=[2, 1, 0, 3]) for item in (y, b.slice(branch(b, name="third"), [0], [3], [2])))
    return b.op("Transpose", b.op(op, turned, b.axes_op("Unsqueeze", row, [1]), written), perm=[2, 1, 0, 3])


@case("Range", since=11)
def positions_of_samples(b: Builder, y: str, op: str) -> str:
    """Numbers of the samples (their count is dynamic), and of the columns and channels (fixed)."""
    for axis, shape in ((0, [-1, 1, 1, 1]), (3, [-1]), (1, [-1, 1, 1])):
        size = b.op("Gather", b.op("Shape", y), b.const(axis, np.int64), axis=0)
        numbers = b.op("Cast", b.op(op, b.const(0, np.int64), size, b.const(1, np.int64)), to=FLOAT)
        y = b.op("Add", y, b.op("Reshape", numbers, b.const(shape, np.int64)))
    return y


@case("Range", since=11)
def positions_as_floats(b: Builder, y: str, op: str) -> str:
    size = b.op("Cast", b.op("Size", y), to=FLOAT)
    step = b.op("Div", size, b.const(4.0))
    numbers = b.op(op, b.const(0.0), size, step)
    return b.op("Mul", y, b.reduce("ReduceMean", b.op("Relu", numbers), [0], keepdims=0))


def transformed(b: Builder, y: str, op: str, axis: int) -> str:
    """Real and imaginary part, summed up."""
    y = b.axes_op("Unsqueeze", y, [4])
    y = b.op(op, y, axis=axis) if b.opset < 20 else b.op(op, y, "", b.const(axis, np.int64))
    return b.reduce("ReduceSum", y, [4], keepdims=0)


@case("DFT", since=17)
def dft(b: Builder, y: str, op: str) -> str:
    return transformed(b, y, op, 2)


@case("DFT", since=17, pinned="DFT transforms this axis")
def dft_channels(b: Builder, y: str, op: str) -> str:
    return transformed(b, y, op, 1)


@case("Pad")
def pad_channels(b: Builder, y: str, op: str) -> str:
    return b.pad(y, [0, 2, 0, 0, 0, 3, 0, 0])


@case("Pad")
def pad_value(b: Builder, y: str, op: str) -> str:
    return b.pad(y, [0, 1, 1, 0, 0, 0, 1, 0], value=0.5)


@case("Pad")
def pad_space(b: Builder, y: str, op: str) -> str:
    return b.pad(y, [0, 0, 1, 1, 0, 0, 2, 2], mode="reflect")


@case("Pad")
def pad_crop_space(b: Builder, y: str, op: str) -> str:
    return b.pad(y, [0, 0, -1, 1, 0, 0, -2, 0], mode="edge")


@case("Pad", pinned="padded with its own values")
def pad_reflect_channels(b: Builder, y: str, op: str) -> str:
    return b.pad(y, [0, 1, 0, 0, 0, 1, 0, 0], mode="reflect")


@case("Pad", pinned="cropped")
def pad_crop_channels(b: Builder, y: str, op: str) -> str:
    return b.pad(y, [0, -1, 0, 0, 0, -1, 0, 0])


@case("Pad", since=18)
def pad_axes(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, b.const([2, 1], np.int64), b.const(0.0, np.float32), b.const([-3], np.int64))


@case("DepthToSpace")
def depth_to_space(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, blocksize=2)


@case("DepthToSpace", since=11)
def depth_to_space_rows(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, blocksize=2, mode="CRD")


@case("SpaceToDepth")
def space_to_depth(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, blocksize=2)


@case("Upsample Resize", until=10)
def upsample(b: Builder, y: str, op: str) -> str:
    return b.resize(y, scales=[1, 1, 2, 2])


@case("Resize", since=11)
def resize_scales(b: Builder, y: str, op: str) -> str:
    return b.resize(y, scales=[1, 1, 2, 0.5], mode="linear")


@case("Resize", since=11)
def resize_sizes(b: Builder, y: str, op: str) -> str:
    """As exporters write it: batch and channels from Shape, or channels as a constant."""
    size = b.slice(b.op("Shape", y), [0], [1], [0])
    sizes = b.op("Concat", size, b.const([CHANNELS, 12, 12], np.int64), axis=0)
    empty = b.const([], np.float32) if b.opset < 13 else None
    return b.op(op, y, empty, empty, sizes, mode="nearest")


@case("Resize", since=11)
def resize_like(b: Builder, y: str, op: str) -> str:
    whole = b.op("Shape", y)
    sizes = b.op("Concat", b.slice(whole, [0], [2], [0]), b.op("Mul", b.slice(whole, [2], [4], [0]), b.const([2], np.int64)), axis=0)
    empty = b.const([], np.float32) if b.opset < 13 else None
    return b.op(op, y, empty, empty, sizes, mode="nearest")


@case("Resize", since=18)
def resize_axes(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, None, None, b.const([12, 16], np.int64), axes=[-2, -1], mode="nearest")


@case("Resize", since=18)
def resize_policy(b: Builder, y: str, op: str) -> str:
    sizes = b.const([16, 12], np.int64)
    return b.op(op, y, None, None, sizes, axes=[2, 3], keep_aspect_ratio_policy="not_larger", mode="nearest")


# ---- normalisation ---------------------------------------------------------------------------------------------------


@case("BatchNormalization")
def batch_norm(b: Builder, y: str, op: str) -> str:
    return b.batch_norm(y, CHANNELS)


@case("BatchNormalization")
def batch_norm_features(b: Builder, y: str, op: str) -> str:
    return b.batch_norm(pooled(b, y), CHANNELS)


@case("InstanceNormalization")
def instance_norm(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, b.uniform(CHANNELS), b.weight(CHANNELS))


@case("InstanceNormalization")
def instance_norm_of_groups(b: Builder, y: str, op: str) -> str:
    inner = b.op("Reshape", y, b.const([0, 2, -1], np.int64))
    inner = b.op(op, inner, b.const(np.ones(2, np.float32)), b.const(np.zeros(2, np.float32)))
    return b.op("Mul", b.op("Reshape", inner, b.op("Shape", y)), b.uniform(CHANNELS, 1, 1))


@case("GroupNormalization", until=20)
def group_norm_old(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, b.uniform(4), b.weight(4), num_groups=4)


@case("GroupNormalization", since=21)
def group_norm(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, b.uniform(CHANNELS), b.weight(CHANNELS), num_groups=4)


@case("GroupNormalization", since=21)
def group_norm_each(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, b.uniform(CHANNELS), b.weight(CHANNELS), num_groups=CHANNELS)


@case("GroupNormalization", since=21, pinned="only leave together")
def group_norm_one(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, b.uniform(CHANNELS), b.weight(CHANNELS), num_groups=1)


@case("LayerNormalization", pinned="LayerNormalization normalises")
def layer_norm(b: Builder, y: str, op: str) -> str:
    return swap(b, b.op(op, tokens(b, y), b.uniform(CHANNELS), b.weight(CHANNELS)))


@case("RMSNormalization")
def rms_norm(b: Builder, y: str, op: str) -> str:
    return swap(b, b.op(op, tokens(b, y), b.uniform(CHANNELS)))


@case("SimplifiedLayerNormalization")
def simplified_layer_norm(b: Builder, y: str, op: str) -> str:
    return swap(b, b.op(op, tokens(b, y), b.uniform(CHANNELS), axis=-1))


@case("LayerNormalization RMSNormalization SimplifiedLayerNormalization")
def layer_norm_space(b: Builder, y: str, op: str) -> str:
    """Over positions: channels are free."""
    return b.op(op, y, b.uniform(SIDE), axis=3)


@case("MeanVarianceNormalization", select=True)
def mean_variance(b: Builder, y: str, op: str) -> str:
    return b.op(op, y)


@case("MeanVarianceNormalization", pinned="normalises")
def mean_variance_channels(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, axes=[1])


@case("LpNormalization")
def lp_norm(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, axis=1, p=2)


@case("LpNormalization")
def lp_norm_space(b: Builder, y: str, op: str) -> str:
    return b.op(op, b.op("Add", y, b.const(3.0)), axis=2, p=1)


@case("LRN", pinned="neighbouring")
def lrn(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, size=3)


# ---- pooling and reductions ------------------------------------------------------------------------------------------


@case("AveragePool MaxPool LpPool")
def pool(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, kernel_shape=[2, 2], strides=[2, 2], pads=[1, 0, 1, 0])


@case("MaxPool", since=8, pinned="indices count")
def pool_indices(b: Builder, y: str, op: str) -> str:
    values, indices = b.op(op, y, outputs=2, kernel_shape=[2, 2])
    return b.op("Add", values, b.op("Mul", b.op("Cast", indices, to=FLOAT), b.const(1e-2)))


@case("GlobalAveragePool GlobalMaxPool")
@case("GlobalLpPool", until=21)  # onnxruntime has no kernel for the newest form
def global_pool(b: Builder, y: str, op: str) -> str:
    return b.op(op, y)


REDUCTIONS = "ReduceSum ReduceL1 ReduceL2 ReduceSumSquare ReduceMean ReduceMax ReduceMin ReduceProd"


@case(REDUCTIONS)
def reduce_space(b: Builder, y: str, op: str) -> str:
    return b.reduce(op, y, [2, 3] if b.opset < 11 else [-2, -1], keepdims=0)


@case("ReduceLogSumExp")
def reduce_exp_space(b: Builder, y: str, op: str) -> str:
    return b.reduce(op, y, [2, 3])


@case("ReduceLogSum", select=True, since=9)
def reduce_log_space(b: Builder, y: str, op: str) -> str:
    return b.reduce(op, b.op("Exp", y), [2, 3])


def positive(b: Builder, y: str) -> str:
    return b.op("Abs", y)


@case("ReduceSum ReduceL1 ReduceL2 ReduceSumSquare ReduceMean")
def reduce_channels(b: Builder, y: str, op: str) -> str:
    return b.op("Mul", branch(b), b.reduce(op, y, [1], keepdims=1))


@case("ReduceSum ReduceL1 ReduceL2 ReduceSumSquare ReduceMean")
def reduce_all_but_first(b: Builder, y: str, op: str) -> str:
    return b.reduce(op, y, [1, 2], keepdims=0)


@case("ReduceSum ReduceL1 ReduceL2 ReduceSumSquare ReduceMean")
def reduce_everything(b: Builder, y: str, op: str) -> str:
    return b.op("Mul", branch(b, 3, "third"), b.op(op, y, keepdims=1))


@case("ReduceSum ReduceMean")
def reduce_nothing(b: Builder, y: str, op: str) -> str:
    if b.opset < (13 if op == "ReduceSum" else 18):
        return b.reduce(op, y, [2])
    return b.op(op, y, b.const([], np.int64), noop_with_empty_axes=1)


@case("ReduceMax ReduceMin", since=8)
@case("ReduceProd ReduceLogSumExp", pinned="compares all channels")
def extreme_channels(b: Builder, y: str, op: str) -> str:
    return b.op("Mul", branch(b), b.reduce(op, y, [1], keepdims=1))


@case("ReduceLogSum", pinned="compares all channels")
def log_sum_channels(b: Builder, y: str, op: str) -> str:
    return b.op("Mul", branch(b), b.reduce(op, b.op("Exp", y), [1], keepdims=1))


@case("ArgMax ArgMin")
def arg_space(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, axis=2, keepdims=0)


@case("ArgMax ArgMin", pinned="compares all channels")
def arg_channels(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, axis=1, keepdims=1)


def top(b: Builder, y: str, axis: int) -> list[str]:
    if b.opset < 10:
        return b.op("TopK", y, outputs=2, k=3, axis=axis)
    return b.op("TopK", y, b.const([3], np.int64), outputs=2, axis=axis)


@case("TopK")
def top_space(b: Builder, y: str, op: str) -> str:
    return b.op("Concat", top(b, y, 3)[0], b.op("Cast", top(b, y, 3)[1], to=FLOAT), axis=2)


@case("TopK", pinned="TopK compares")
def top_channels(b: Builder, y: str, op: str) -> str:
    return top(b, y, 1)[0]


@case("CumSum")
def cumulative_space(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, b.const(2, np.int64), exclusive=1)


@case("CumSum")
def cumulative_channels(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, b.const(1, np.int64), reverse=1)


@case("Shape Size")
def sizes(b: Builder, y: str, op: str) -> str:
    """The size as a number: it must stay what it was."""
    size = b.op(op, b.op("Relu", y))
    size = b.op("Gather", size, b.const(1, np.int64)) if op == "Shape" else size
    return b.op("Div", y, b.op("Cast", size, to=FLOAT))


@case("Softmax LogSoftmax Hardmax", since=13)
def softmax_space(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, axis=2)


@case("Softmax LogSoftmax Hardmax", until=12)
def softmax_space_old(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, axis=3)


@case("Softmax LogSoftmax Hardmax", pinned="normalises over this axis")
def softmax_channels(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, axis=1)


@case("Softmax LogSoftmax Hardmax", until=12, pinned="normalises over this axis")
def softmax_default_old(b: Builder, y: str, op: str) -> str:
    return b.op(op, pooled(b, y))


@case("Softmax LogSoftmax Hardmax", since=13)
def softmax_default(b: Builder, y: str, op: str) -> str:
    return b.op(op, y)


# ---- fused attention -------------------------------------------------------------------------------------------------


def threefold(b: Builder, y: str, width: int = CHANNELS) -> list[str]:
    """Query, key and value as N x 64 x C; keys and values of another width where heads are shared."""
    others = []
    for name in ("second", "third"):
        flat = b.op("Reshape", branch(b, width, name), b.const([0, width, -1], np.int64))
        others.append(b.op("Transpose", flat, perm=[0, 2, 1]))
    return [tokens(b, y), *others]


@case("Attention", since=23)
def attention(b: Builder, y: str, op: str) -> str:
    return swap(b, b.op(op, *threefold(b, y), q_num_heads=4, kv_num_heads=4))


@case("Attention", since=23)
def attention_shared_heads(b: Builder, y: str, op: str) -> str:
    return swap(b, b.op(op, *threefold(b, y, 4), q_num_heads=4, kv_num_heads=2))


@case("Attention", since=23)
def attention_four_axes(b: Builder, y: str, op: str) -> str:
    """Heads on an axis of their own: N x H x S x D."""
    return b.op(op, y, branch(b), branch(b, name="third"))


@case("com.microsoft.MultiHeadAttention")
def multi_head(b: Builder, y: str, op: str) -> str:
    operands = [*threefold(b, y), b.weight(3 * CHANNELS, fan_in=4)]
    return swap(b, b.op("MultiHeadAttention", *operands, domain="com.microsoft", num_heads=4))


@case("com.microsoft.MultiHeadAttention")
def multi_head_masked(b: Builder, y: str, op: str) -> str:
    """Keys that some samples lack, and a bias of the scores that all heads share."""
    mask = b.const(np.arange(SIDE * SIDE)[None] % 5 > 0, np.int32)
    batch = b.op("Slice", b.op("Shape", y), b.const([0], np.int64), b.const([1], np.int64))
    keys = b.op("Tile", mask, b.op("Concat", batch, b.const([1], np.int64), axis=0))
    operands = [*threefold(b, y), b.weight(3 * CHANNELS, fan_in=4), keys, b.weight(1, 1, SIDE * SIDE, SIDE * SIDE)]
    return swap(b, b.op("MultiHeadAttention", *operands, domain="com.microsoft", num_heads=4))


@case("com.microsoft.MultiHeadAttention", pinned="a mask per head")
def multi_head_biases(b: Builder, y: str, op: str) -> str:
    operands = [*threefold(b, y), b.weight(3 * CHANNELS, fan_in=4), None, b.weight(1, 4, SIDE * SIDE, SIDE * SIDE)]
    return swap(b, b.op("MultiHeadAttention", *operands, domain="com.microsoft", num_heads=4))


@case("com.microsoft.Attention")
def packed_biased(b: Builder, y: str, op: str) -> str:
    vector = [b.weight(CHANNELS, 36, fan_in=CHANNELS), b.weight(36, fan_in=4)]
    operands = [tokens(b, y), *vector, None, None, b.weight(1, 1, SIDE * SIDE, SIDE * SIDE)]
    return swap(b, b.op("Attention", *operands, domain="com.microsoft", num_heads=3))


@case("com.microsoft.Attention")
def packed(b: Builder, y: str, op: str) -> str:
    operands = [tokens(b, y), b.weight(CHANNELS, 36, fan_in=CHANNELS), b.weight(36, fan_in=4)]
    return swap(b, b.op("Attention", *operands, domain="com.microsoft", num_heads=3))


@case("com.microsoft.Attention")
def packed_sizes(b: Builder, y: str, op: str) -> str:
    operands = [tokens(b, y), b.weight(CHANNELS, 30, fan_in=CHANNELS), b.weight(30, fan_in=4)]
    return swap(b, b.op("Attention", *operands, domain="com.microsoft", num_heads=3, qkv_hidden_sizes=[12, 12, 6]))


# ---- recurrent -------------------------------------------------------------------------------------------------------


def sequence(b: Builder, y: str) -> str:
    """T x N x C."""
    return b.op("Transpose", b.reduce("ReduceMean", y, [3], keepdims=0), perm=[2, 0, 1])


GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


def recurrent(
    b: Builder, op: str, x: str, c_in: int, hidden: int, directions: int = 1, outputs: int = 1, **attributes: object
) -> list[str]:
    """Y as T x N x (D H), and the other outputs."""
    gates = GATES[op] * hidden
    weight, again = b.weight(directions, gates, c_in, fan_in=c_in), b.weight(directions, gates, hidden, fan_in=hidden)
    operands = [weight, again, b.weight(directions, 2 * gates, fan_in=4), *attributes.pop("more", [])]  # type: ignore[misc]
    direction = attributes.pop("direction", "bidirectional" if directions == 2 else "forward")
    made = b.op(op, x, *operands, outputs=outputs, hidden_size=hidden, direction=direction, **attributes)
    first, *rest = [made] if outputs == 1 else made
    turned = b.op("Transpose", first, perm=[0, 2, 1, 3])
    return [b.op("Reshape", turned, b.const([0, 0, directions * hidden], np.int64)), *rest]


@case("LSTM GRU RNN")
def recurrent_two_layers(b: Builder, y: str, op: str) -> str:
    first = recurrent(b, op, sequence(b, y), CHANNELS, 6)[0]
    return b.op("Transpose", recurrent(b, op, first, 6, 5)[0], perm=[1, 2, 0])


@case("LSTM GRU RNN")
def recurrent_bidirectional(b: Builder, y: str, op: str) -> str:
    return b.op("Transpose", recurrent(b, op, sequence(b, y), CHANNELS, 6, 2)[0], perm=[1, 2, 0])


@case("LSTM GRU RNN")
def recurrent_last_state(b: Builder, y: str, op: str) -> str:
    states = recurrent(b, op, sequence(b, y), CHANNELS, 6, 2, outputs=3 if op == "LSTM" else 2, direction="bidirectional")[1:]
    joined = states[0] if len(states) == 1 else b.op("Add", *states)
    return b.op("Transpose", joined, perm=[1, 2, 0])


@case("LSTM GRU RNN", since=9)
def recurrent_zero_state(b: Builder, y: str, op: str) -> str:
    """Initial states as exporters write them: zeros of a computed shape."""
    x = sequence(b, y)
    size = b.slice(b.op("Shape", x), [1], [2], [0])
    zero = b.op("ConstantOfShape", b.op("Concat", b.const([1], np.int64), size, b.const([6], np.int64), axis=0))
    more = [None, zero, zero] if op == "LSTM" else [None, zero]
    return b.op("Transpose", recurrent(b, op, x, CHANNELS, 6, more=more, direction="reverse")[0], perm=[1, 2, 0])


@case("LSTM")
def lstm_peepholes(b: Builder, y: str, op: str) -> str:
    more = [None, None, None, b.weight(1, 18, fan_in=4)]
    return b.op("Transpose", recurrent(b, op, sequence(b, y), CHANNELS, 6, more=more)[0], perm=[1, 2, 0])


@case("GRU")
def gru_linear(b: Builder, y: str, op: str) -> str:
    return b.op("Transpose", recurrent(b, op, sequence(b, y), CHANNELS, 6, linear_before_reset=1)[0], perm=[1, 2, 0])


@case("ConstantOfShape", since=9)
def constant_of_shape(b: Builder, y: str, op: str) -> str:
    """Zero channels of a computed shape beside real ones (an old way to pad)."""
    size = b.op("Shape", y)
    target = b.op("Concat", b.slice(size, [0], [1], [0]), b.const([4], np.int64), b.slice(size, [2], [4], [0]), axis=0)
    return b.op("Concat", y, b.op(op, target), axis=1)


@case("ConstantOfShape", since=9)
def constant_of_shape_added(b: Builder, y: str, op: str) -> str:
    ones = b.op(op, b.op("Shape", y), value=oh.make_tensor("value", FLOAT, [1], [0.5]))
    return b.op("Add", y, ones)


# ---- quantised -------------------------------------------------------------------------------------------------------


@case("QuantizeLinear DequantizeLinear", select=True)
def quantized_activation(b: Builder, y: str, op: str) -> str:
    pair = [b.const(np.float32(0.05)), b.const(120, np.uint8)]
    return b.op("DequantizeLinear", b.op("QuantizeLinear", y, *pair), *pair)


@case("QuantizeLinear DequantizeLinear", select=True, since=13)
def quantized_activation_per_channel(b: Builder, y: str, op: str) -> str:
    pair = [b.uniform(CHANNELS, low=0.02, high=0.06), b.const(np.arange(CHANNELS), np.int8)]
    return b.op("DequantizeLinear", b.op("QuantizeLinear", y, *pair, axis=1), *pair, axis=1)


@case("QuantizeLinear DequantizeLinear", select=True, since=13)
def quantized_activation_of_other_size(b: Builder, y: str, op: str) -> str:
    """No spatial axis has as many indices as there are channels, and onnx infers no types behind."""
    made = b.conv(y, CHANNELS, 6)
    pair = [b.uniform(6, low=0.02, high=0.06), b.const(np.arange(6) * 9, np.int8)]
    made = b.op("DequantizeLinear", b.op("QuantizeLinear", made, *pair, axis=1), *pair, axis=1)
    return b.op("QuickGelu", b.conv(b.op("QuickGelu", made, domain="com.microsoft"), 6, 4, 1), domain="com.microsoft")


@case("DequantizeLinear", since=10)
def quantized_weight_grouped(b: Builder, y: str, op: str) -> str:
    """Two groups of four inputs and three outputs."""
    weight = b.const(b.random.integers(-127, 127, (6, CHANNELS // 2, 3, 3)), np.int8)
    return b.op("Conv", y, b.op(op, weight, b.const(np.float32(0.002))), group=2, pads=[1] * 4)


@case("DequantizeLinear", since=10)
def quantized_weight_of_whole_groups(b: Builder, y: str, op: str) -> str:
    """Four groups of two: they leave whole, and the axis that all share keeps its size."""
    weight = b.const(b.random.integers(-127, 127, (8, CHANNELS // 4, 3, 3)), np.int8)
    return b.op("Conv", y, b.op(op, weight, b.const(np.float32(0.004))), group=4, pads=[1] * 4)


@case("DequantizeLinear", since=10)
def quantized_weight_transposed(b: Builder, y: str, op: str) -> str:
    weight = b.const(b.random.integers(-127, 127, (CHANNELS, 3, 3, 3)), np.int8)
    return b.op("ConvTranspose", y, b.op(op, weight, b.const(np.float32(0.002))), group=2, pads=[1] * 4)


@case("DequantizeLinear", since=13)
def quantized_weight(b: Builder, y: str, op: str) -> str:
    """A weight with a scale per output channel."""
    weight = b.const(b.random.integers(-127, 127, (6, CHANNELS, 3, 3)), np.int8)
    return b.op("Conv", y, b.op(op, weight, b.uniform(6, low=0.001, high=0.002), b.const(np.zeros(6), np.int8), axis=0), pads=[1] * 4)


@case("DequantizeLinear")
def quantized_weight_per_tensor(b: Builder, y: str, op: str) -> str:
    weight = b.const(b.random.integers(-127, 127, (CHANNELS, 6)), np.int8)
    return b.op("MatMul", pooled(b, y), b.op(op, weight, b.const(np.float32(0.01)), b.const(0, np.int8)))


@case("DequantizeLinear", since=13)
def quantized_bias(b: Builder, y: str, op: str) -> str:
    bias = b.op(op, b.const(b.random.integers(-900, 900, 6), np.int32), b.uniform(6, low=0.001, high=0.002), axis=0)
    return b.op("Conv", y, b.weight(6, CHANNELS, 1, 1), bias)


@case("DynamicQuantizeLinear", select=True, since=11)
def dynamically_quantized(b: Builder, y: str, op: str) -> str:
    return b.op("DequantizeLinear", *b.op(op, y, outputs=3))


def integers(b: Builder, y: str, zero: int) -> str:
    return b.op("QuantizeLinear", y, b.const(np.float32(0.05)), b.const(zero, np.uint8))


@case("ConvInteger", select=True, since=10)
def conv_integer(b: Builder, y: str, op: str) -> str:
    weight = b.const(b.random.integers(-127, 127, (6, CHANNELS, 3, 3)), np.int8)
    made = b.op(op, integers(b, b.op("Relu", y), 0), weight, pads=[1] * 4)
    return b.op("Mul", b.op("Cast", made, to=FLOAT), b.const(1e-3))


@case("ConvInteger", select=True, since=10)
def conv_integer_zero_points(b: Builder, y: str, op: str) -> str:
    weight = b.const(b.random.integers(-127, 127, (6, CHANNELS, 1, 1)), np.int8)
    made = b.op(op, integers(b, y, 120), weight, b.const(120, np.uint8), b.const(3, np.int8))
    return b.op("Mul", b.op("Cast", made, to=FLOAT), b.const(1e-3))


@case("MatMulInteger", select=True, since=10)
def matmul_integer(b: Builder, y: str, op: str) -> str:
    weight = b.const(b.random.integers(-127, 127, (CHANNELS, 6)), np.int8)
    made = b.op(op, integers(b, b.op("Relu", pooled(b, y)), 0), weight)
    return b.op("Mul", b.op("Cast", made, to=FLOAT), b.const(1e-3))


@case("MatMulInteger", select=True, since=10)
def matmul_integer_zero_points(b: Builder, y: str, op: str) -> str:
    weight = b.const(b.random.integers(-127, 127, (CHANNELS, 6)), np.int8)
    made = b.op(op, integers(b, pooled(b, y), 120), weight, b.const(120, np.uint8), b.const(np.arange(6), np.int8))
    return b.op("Mul", b.op("Cast", made, to=FLOAT), b.const(1e-3))


@case("com.microsoft.DynamicQuantizeMatMul", select=True)
def dynamic_quantize_matmul(b: Builder, y: str, op: str) -> str:
    weight, scale = b.const(b.random.integers(-127, 127, (CHANNELS, 6)), np.int8), b.const(np.full(6, 0.01, np.float32))
    given = [b.op("Relu", pooled(b, y)), weight, scale, b.const(np.arange(6), np.int8), b.weight(6)]
    return b.op("DynamicQuantizeMatMul", *given, domain="com.microsoft")


@case("com.microsoft.MatMulIntegerToFloat", select=True)
def matmul_integer_to_float(b: Builder, y: str, op: str) -> str:
    weight, scales = b.const(b.random.integers(-127, 127, (CHANNELS, 6)), np.int8), [b.const(0.05), b.const(np.full(6, 0.01, np.float32))]
    given = [integers(b, pooled(b, y), 120), weight, *scales, b.const(120, np.uint8), b.const(np.arange(6), np.int8), b.weight(6)]
    return b.op("MatMulIntegerToFloat", *given, domain="com.microsoft")


# ---- integers throughout ---------------------------------------------------------------------------------------------


def scaled(b: Builder, scale: float = 0.05, zero: int = 120) -> list[str]:
    return [b.const(np.float32(scale)), b.const(zero, np.uint8)]


def back(b: Builder, x: str, scale: float = 0.05, zero: int = 120) -> str:
    return b.op("DequantizeLinear", x, *scaled(b, scale, zero))


def qlinear_conv(b: Builder, x: str, c_in: int, c_out: int, name: str = "", **attributes: int) -> str:
    """Weight with a scale per output channel, int32 bias."""
    # 7 bits: on processors without VNNI onnxruntime saturates pairs of products (below, too)
    weight = b.const(b.random.integers(-63, 63, (c_out, c_in // attributes.get("group", 1), 3, 3)), np.int8)
    scales, zeros = b.uniform(c_out, low=0.002, high=0.004), b.const(np.zeros(c_out), np.int8)
    bias = b.const(b.random.integers(-900, 900, c_out), np.int32)
    return b.op("QLinearConv", x, *scaled(b), weight, scales, zeros, *scaled(b), bias, pads=[1] * 4, name=name, **attributes)


@case("QLinearConv", select=True, since=10)
def qlinear(b: Builder, y: str, op: str) -> str:
    return back(b, qlinear_conv(b, integers(b, y, 120), CHANNELS, 6))


@case("QLinearConv", select=True, since=10)
def qlinear_two(b: Builder, y: str, op: str) -> str:
    """The channels between the two are integers only."""
    return back(b, qlinear_conv(b, qlinear_conv(b, integers(b, y, 120), CHANNELS, 6, "middle"), 6, 5))


@case("QLinearConv", select=True, since=10)
def qlinear_depthwise(b: Builder, y: str, op: str) -> str:
    return back(b, qlinear_conv(b, integers(b, y, 120), CHANNELS, CHANNELS, group=CHANNELS))


@case("QLinearMatMul", select=True, since=10)
def qlinear_matmul(b: Builder, y: str, op: str) -> str:
    weight = b.const(b.random.integers(-63, 63, (CHANNELS, 6)), np.int8)
    scales, zeros = b.uniform(6, low=0.002, high=0.004), b.const(np.zeros(6), np.int8)
    return swap(b, back(b, b.op(op, integers(b, tokens(b, y), 120), *scaled(b), weight, scales, zeros, *scaled(b))))


@case("com.microsoft.QGemm", select=True)
def qgemm(b: Builder, y: str, op: str) -> str:
    weight = b.const(b.random.integers(-127, 127, (6, CHANNELS)), np.int8)
    scales, zeros = b.uniform(6, low=0.002, high=0.004), b.const(np.zeros(6), np.int8)
    bias = b.const(b.random.integers(-900, 900, 6), np.int32)
    operands = [integers(b, pooled(b, y), 120), *scaled(b), weight, scales, zeros, bias, *scaled(b)]
    return back(b, b.op("QGemm", *operands, domain="com.microsoft", transB=1))


@case("com.microsoft.QLinearAdd com.microsoft.QLinearMul", select=True)
def qlinear_pair(b: Builder, y: str, op: str) -> str:
    left, right = integers(b, y, 120), b.op("QuantizeLinear", branch(b), *scaled(b, 0.03, 100))
    return back(b, b.op(op.rpartition(".")[2], left, *scaled(b), right, *scaled(b, 0.03, 100), *scaled(b), domain="com.microsoft"))


@case("com.microsoft.QLinearSigmoid com.microsoft.QLinearLeakyRelu", select=True)
def qlinear_unary(b: Builder, y: str, op: str) -> str:
    made = b.op(op.rpartition(".")[2], integers(b, y, 120), *scaled(b), *scaled(b, 0.01, 20), domain="com.microsoft")
    return back(b, made, 0.01, 20)


@case("com.microsoft.QLinearAveragePool com.microsoft.QLinearGlobalAveragePool", select=True)
def qlinear_pool(b: Builder, y: str, op: str) -> str:
    own = {"kernel_shape": [2, 2], "strides": [2, 2]} if op.endswith("QLinearAveragePool") else {}
    made = b.op(op.rpartition(".")[2], integers(b, y, 120), *scaled(b), *scaled(b, 0.02, 110), domain="com.microsoft", **own)
    return back(b, made, 0.02, 110)


# ---- sampling, and what onnxruntime fuses ----------------------------------------------------------------------------

MICROSOFT = "com.microsoft"


@case("Col2Im", since=18)
def blocks_to_image(b: Builder, y: str, op: str) -> str:
    columns = b.op("Reshape", b.conv(y, CHANNELS, 24, 1, name="columns"), b.const([0, 0, -1], np.int64))
    return b.op(op, columns, b.const([16, 16], np.int64), b.const([2, 2], np.int64), strides=[2, 2])


@case("Col2Im", since=18, pinned="channels")
def blocks_of_positions(b: Builder, y: str, op: str) -> str:
    """Channels are the places of the blocks."""
    tall = b.op("Reshape", b.op("Transpose", y, perm=[0, 2, 3, 1]), b.const([0, SIDE * SIDE, CHANNELS], np.int64))
    return b.op(op, tall, b.const([4, 8], np.int64), b.const([2, 2], np.int64), strides=[2, 2])


@case("GridSample", since=16)
def sampled(b: Builder, y: str, op: str) -> str:
    grid = b.op("Transpose", b.op("Tanh", b.conv("x", 3, 2, name="places")), perm=[0, 2, 3, 1])
    return b.op(op, b.op("Relu", y), grid)


@case("GridSample", since=16, pinned="says where")
def sampled_at(b: Builder, y: str, op: str) -> str:
    grid = b.op("Reshape", b.op("Tanh", y), b.const([0, 16, 16, 2], np.int64))
    return b.op(op, branch(b), grid)


def boxes(b: Builder, scale: float = 1.0) -> list[str]:
    corners = [[0, 0, 6, 6], [1, 2, 7, 7], [0.5, 1.5, 4, 6]]
    return [b.const(np.asarray(corners, np.float32) * scale), b.const([0, 1, 0], np.int64)]


@case("RoiAlign", since=10, until=21)  # onnxruntime has no kernel for the newest form
def roi_align(b: Builder, y: str, op: str) -> str:
    return b.op(op, y, *boxes(b), output_height=4, output_width=3, sampling_ratio=2)


@case("ReverseSequence", since=10)
def reversed_sequence(b: Builder, y: str, op: str) -> str:
    turned = b.op("Transpose", tokens(b, y), perm=[1, 0, 2])
    lengths = b.op("Expand", b.const([9], np.int64), b.slice(b.op("Shape", "x"), [0], [1], [0]))
    return b.op("Transpose", b.op(op, turned, lengths, time_axis=0, batch_axis=1), perm=[1, 2, 0])


@case("ReverseSequence", since=10, pinned="sequence or batch axis")
def reversed_channels(b: Builder, y: str, op: str) -> str:
    lengths = b.op("Expand", b.const([5], np.int64), b.slice(b.op("Shape", "x"), [0], [1], [0]))
    return b.op(op, y, lengths, time_axis=1, batch_axis=0)


@case("DeformConv", since=19)
def deformed(b: Builder, y: str, op: str) -> str:
    operands = [b.weight(6, CHANNELS, 3, 3), b.conv("x", 3, 18, name="offsets"), b.weight(6)]
    return b.op(op, y, *operands, b.op("Sigmoid", b.conv("x", 3, 9, name="mask")), kernel_shape=[3, 3], pads=[1] * 4)


@case("DeformConv", since=19)
def deformed_in_groups(b: Builder, y: str, op: str) -> str:
    operands = [b.weight(6, CHANNELS // 2, 3, 3), b.conv("x", 3, 36, name="offsets")]
    return b.op(op, y, *operands, kernel_shape=[3, 3], pads=[1] * 4, group=2, offset_group=2)


@case("DeformConv", since=19, pinned="says where the taps")
def deformed_by(b: Builder, y: str, op: str) -> str:
    return b.op(op, "x", b.weight(6, 3, 2, 2), y, kernel_shape=[2, 2], pads=[0, 0, 1, 1])


@case("com.microsoft.FusedConv")
def fused_conv(b: Builder, y: str, op: str) -> str:
    made = b.op("FusedConv", y, b.weight(6, CHANNELS, 3, 3), b.weight(6), domain=MICROSOFT, activation="Relu", pads=[1] * 4)
    return b.op("FusedConv", made, b.weight(6, 1, 3, 3), domain=MICROSOFT, activation="Sigmoid", pads=[1] * 4, group=6)


@case("com.microsoft.FusedConv")
def fused_sum(b: Builder, y: str, op: str) -> str:
    operands = [b.weight(CHANNELS, CHANNELS, 3, 3), b.weight(CHANNELS), y]
    return b.op("FusedConv", branch(b), *operands, domain=MICROSOFT, activation="Relu", pads=[1] * 4)


@case("com.microsoft.FusedGemm")
def fused_gemm(b: Builder, y: str, op: str) -> str:
    operands = [b.weight(6, CHANNELS), b.weight(6)]
    return b.op("FusedGemm", pooled(b, y), *operands, domain=MICROSOFT, activation="LeakyRelu", activation_alpha=0.1, transB=1)


@case("com.microsoft.FusedMatMul")
def fused_matmul(b: Builder, y: str, op: str) -> str:
    return swap(b, b.op("FusedMatMul", tokens(b, y), b.weight(6, CHANNELS), domain=MICROSOFT, alpha=0.5, transB=1))


@case("com.microsoft.FusedMatMul")
def fused_matmul_of_two(b: Builder, y: str, op: str) -> str:
    """N x C x 64 by N x 64 x C, both transposed."""
    return b.op("FusedMatMul", tokens(b, y), b.op("Relu", tokens(b, branch(b))), domain=MICROSOFT, transA=1, alpha=0.1)


@case("com.microsoft.FusedMatMul")
def fused_matmul_over_batches(b: Builder, y: str, op: str) -> str:
    """Rows in front of the batch: N x 8 x 8 x C, of which the second and third axis count batches."""
    moved = b.op("Transpose", y, perm=[0, 2, 3, 1])
    made = b.op("FusedMatMul", moved, b.weight(SIDE, SIDE, CHANNELS, 6), domain=MICROSOFT, transBatchA=1)
    return b.op("Transpose", made, perm=[2, 3, 0, 1])


def normalised(b: Builder, y: str, *vectors: str, outputs: int | list[str] = 1, kind: str = "SkipLayerNormalization") -> list[str] | str:
    """Of the sum of two, with vectors per channel."""
    operands = [tokens(b, y), tokens(b, branch(b)), *vectors]
    return b.op(kind, *operands, domain=MICROSOFT, epsilon=1e-3, outputs=outputs)


@case("com.microsoft.SkipLayerNormalization", pinned="LayerNormalization normalises")
def skip_normalised(b: Builder, y: str, op: str) -> str:
    return swap(b, normalised(b, y, b.uniform(CHANNELS), b.weight(CHANNELS), b.weight(CHANNELS)))


@case("com.microsoft.SkipLayerNormalization", pinned="LayerNormalization normalises")
def skip_normalised_and_summed(b: Builder, y: str, op: str) -> str:
    made = normalised(b, y, b.uniform(CHANNELS), b.weight(CHANNELS), outputs=["normal", "", "", "summed"])
    return swap(b, b.op("Add", made[0], made[3]))


@case("com.microsoft.SkipLayerNormalization", pinned="LayerNormalization normalises")
def skip_a_table(b: Builder, y: str, op: str) -> str:
    """Of what no layer makes."""
    given = b.input([SIDE * SIDE, CHANNELS], name="positions")
    made = b.op("SkipLayerNormalization", tokens(b, y), given, b.uniform(CHANNELS), b.weight(CHANNELS), domain=MICROSOFT, epsilon=1e-3)
    return swap(b, made)


@case("com.microsoft.EmbedLayerNormalization")
def embedded(b: Builder, y: str, op: str) -> str:
    """Added to what a layer makes of them."""
    ids = b.input(["N", SIDE * SIDE], "ids", INT32)
    tables = [b.weight(10, CHANNELS), b.weight(SIDE * SIDE, CHANNELS)]
    given = [ids, None, *tables, None, b.uniform(CHANNELS), b.weight(CHANNELS)]
    made = b.op("EmbedLayerNormalization", *given, domain=MICROSOFT, epsilon=1e-3, outputs=["embedded", "indices"])[0]
    return swap(b, b.op("Add", tokens(b, y), made))


@case("com.microsoft.SkipSimplifiedLayerNormalization")
def skip_rms(b: Builder, y: str, op: str) -> str:
    return swap(b, normalised(b, y, b.uniform(CHANNELS), kind="SkipSimplifiedLayerNormalization"))


@case("com.microsoft.SkipSimplifiedLayerNormalization")
def skip_rms_and_sum(b: Builder, y: str, op: str) -> str:
    outputs = ["normal", "", "", "summed"]
    made = normalised(b, y, b.uniform(CHANNELS), b.weight(CHANNELS), outputs=outputs, kind="SkipSimplifiedLayerNormalization")
    return swap(b, b.op("Add", made[0], made[3]))


def turns(b: Builder, size: int) -> list[str]:
    """Cosines and sines for 64 positions and pairs of a head of this size."""
    angles = np.arange(64)[:, None] / 10.0 ** np.arange(size // 2)
    return [b.const(np.cos(angles)), b.const(np.sin(angles))]


def places(b: Builder) -> str:
    """N x 64: the number of each position."""
    rows = b.op("Concat", b.slice(b.op("Shape", "x"), [0], [1], [0]), b.const([64], np.int64), axis=0)
    return b.op("Expand", b.const(np.arange(64)[None], np.int64), rows)


@case("RotaryEmbedding", since=23)
def rotated(b: Builder, y: str, op: str) -> str:
    return swap(b, b.op(op, tokens(b, y), *turns(b, 2), places(b), num_heads=4))


@case("RotaryEmbedding", since=23)
def rotated_heads(b: Builder, y: str, op: str) -> str:
    """N x C x 16 x 4: channels are heads; half of each is turned."""
    heads = b.op("Reshape", y, b.const([0, 0, 16, 4], np.int64))
    ids = b.slice(places(b), [0], [16], [1])
    return b.op(op, heads, *turns(b, 2), ids, rotary_embedding_dim=2, interleaved=1)


@case("com.microsoft.RotaryEmbedding")
def rotated_by_onnxruntime(b: Builder, y: str, op: str) -> str:
    return swap(b, b.op("RotaryEmbedding", tokens(b, y), places(b), *turns(b, 4), domain=MICROSOFT))


def four_bits(b: Builder, x: str, columns: int, rows: int, flat: bool) -> str:
    """A product with a weight of 4 bits in blocks of 16: scales and zero points per row."""
    blocks = columns // 16
    scales = b.uniform(*[rows * blocks] if flat else [rows, blocks], low=0.01, high=0.02)
    bytes_ = -(-blocks // 2)
    zeros = b.const(b.random.integers(0, 255, [rows * bytes_] if flat else [rows, bytes_]), np.uint8)
    weight = b.const(b.random.integers(0, 255, (rows, blocks, 8)), np.uint8)
    sizes = {"K": columns, "N": rows, "bits": 4, "block_size": 16}
    return b.op("MatMulNBits", x, weight, scales, zeros, domain=MICROSOFT, **sizes)


@case("com.microsoft.MatMulNBits", pinned="packs this axis in blocks")
def packed_rows(b: Builder, y: str, op: str) -> str:
    return four_bits(b, b.op("Flatten", y), CHANNELS * SIDE * SIDE, 6, flat=True)


@case("com.microsoft.MatMulNBits")
def packed_beside(b: Builder, y: str, op: str) -> str:
    """Rows meet the channels of a layer that is not packed."""
    return b.op("Add", pooled(b, y), four_bits(b, b.op("Flatten", branch(b, 4)), 4 * SIDE * SIDE, CHANNELS, flat=False))


def schema_model(schema: onnx.defs.OpSchema, opset: int) -> onnx.ModelProto:
    """An attempt at a model around any operator: every input is the same activation, attributes are guessed by type."""
    b = Builder(opset, seed=1)
    y = b.conv(b.input(["N", 3, SIDE, SIDE]), 3, CHANNELS, name="first")
    count = max(1, schema.min_input)
    guesses = {"INT": 1, "FLOAT": 1.0, "STRING": "a", "INTS": [1], "FLOATS": [1.0], "STRINGS": ["a"]}
    attributes = {}
    for name, attribute in schema.attributes.items():
        if attribute.required and attribute.type.name in guesses:
            attributes[name] = guesses[attribute.type.name]
        elif attribute.required and attribute.type.name == "GRAPH":
            inner = oh.make_node("Relu", [y], [f"{name}.inner"])
            attributes[name] = oh.make_graph([inner], name, [], [oh.make_tensor_value_info(f"{name}.inner", FLOAT, None)])
    made = b.op(schema.name, *[y] * count, outputs=max(1, schema.min_output), name="unknown", **attributes)
    first = made if isinstance(made, str) else made[0]
    second = b.conv(b.op("Relu", b.conv(y, CHANNELS, 4, name="beside")), 4, 5, name="last")
    return b.model(second, first, infer=False)
