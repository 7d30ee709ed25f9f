"""Operators that read all channels of an axis and make new ones."""

from __future__ import annotations

from math import prod

import numpy as np

from ..labels import Labels, align, keep_varying, varying, vector
from ..records import After, Edit, IntArray, SetAttribute
from .context import Context, TiePair
from .registry import rule

SLIDES = "a convolution slides along this axis"
STIFF = "it is contracted with an axis that cannot shrink"


def _columns(matrix: IntArray) -> TiePair:
    """Ties that make every column leave as one."""
    return matrix, np.broadcast_to(matrix[:1], matrix.shape)


def _rows(matrix: IntArray) -> TiePair:
    """Ties that make every row leave as one."""
    return matrix, np.broadcast_to(matrix[:, :1], matrix.shape)


def _grouped(ctx: Context, data: IntArray | None, written: IntArray | None, inner: tuple[int, IntArray | None]) -> None:
    """Constraints of a convolution with g groups: whole groups leave, or one channel of every group.

    ``data`` are the g * i input channels, ``written`` the g * o output channels; ``inner`` are the labels of the weight's axis
    that all groups share, and the side it belongs to (0: the i inputs, 1: the o outputs of a group).
    """
    groups = ctx.attribute("group", 1)
    sides = [None if labels is None else labels.reshape(groups, -1) for labels in (data, written)]
    each = [_columns(matrix) for matrix in sides if matrix is not None]
    shared, labels = sides[inner[0]], inner[1]
    if shared is not None and labels is not None:
        each.append((shared[0], labels))
    left, right = sides
    if left is None or right is None:
        ctx.choose(each)
    else:
        ctx.choose([_rows(left), _rows(right), (left[:, 0], right[:, 0])], each)


def _convolved(ctx: Context) -> tuple[int, IntArray | None]:
    """Rank and input channels of a convolution; every other axis keeps its size."""
    rank = ctx.rank(0)
    ctx.fix_input(0, [axis for axis in range(rank) if axis != 1], SLIDES)
    ctx.fix_input(1, range(2, rank), SLIDES)
    return rank, ctx.axis(0, 1)


@rule("Conv", does="reads input channels, makes output channels (1-d to 3-d, grouped, depthwise)")
def conv(ctx: Context) -> list[Labels]:
    """Weight: O x I/g x kernel."""
    rank, data = _convolved(ctx)
    written = ctx.axis(1, 0)
    if ctx.attribute("group", 1) == 1:
        ctx.match(1, 1, data)
        reads = (1, 1, data)
    else:
        inner = ctx.axis(1, 1)
        _grouped(ctx, data, written, (0, inner))
        reads = (1, 1, inner) if inner is not None else (0, 1, written)

        def edits(after: After) -> list[Edit]:
            return [SetAttribute("group", after.input_shape(0)[1] // after.input_shape(1)[1])]

        ctx.follow(edits)
    ctx.match(2, 0, written)
    macs = prod(ctx.out_shape()) * prod(ctx.shape(1)[1:])
    ctx.layer(macs, [written, reads[2] if reads[0] == 1 else None], reads, (0, written))
    return [() if written is None else (vector(written, 1, rank),)]


@rule("ConvTranspose", does="reads input channels, makes output channels (grouped too)")
def conv_transpose(ctx: Context) -> list[Labels]:
    """Weight: I x O/g x kernel."""
    rank, data = _convolved(ctx)
    ctx.match(1, 0, data)
    inner = written = ctx.axis(1, 1)
    if ctx.attribute("group", 1) > 1:
        written = ctx.mint(ctx.out_shape()[1])
        _grouped(ctx, data, written, (1, inner))

        def edits(after: After) -> list[Edit]:
            return [SetAttribute("group", after.output_shape(0)[1] // after.input_shape(1)[1])]

        ctx.follow(edits)
    ctx.match(2, 0, written)
    macs = prod(ctx.shape(0)) * prod(ctx.shape(1)[1:])
    ctx.layer(macs, [data, inner], (0, 1, data), (1, inner) if inner is not None else (0, data))
    return [() if written is None else (vector(written, 1, rank),)]


@rule("Gemm", does="reads input features, makes output features")
def gemm(ctx: Context) -> list[Labels]:
    """Y = alpha A' B' + beta C."""
    k_a, m = (0, 1) if ctx.attribute("transA", 0) else (1, 0)
    k_b, n = (1, 0) if ctx.attribute("transB", 0) else (0, 1)
    read = _contract(ctx, k_a, k_b)
    rows, columns = ctx.axis(0, m), ctx.axis(1, n)
    output = tuple(vector(labels, axis, 2) for axis, labels in ((0, rows), (1, columns)) if labels is not None)
    if ctx.has(2) and not ctx.is_constant(2):
        added = tuple(align(array, 2) for array in ctx.labels(2))
        output = ctx.merge([(output, ctx.out_shape()), (added, (1,) * (2 - ctx.rank(2)) + ctx.shape(2))])
    ctx.adopt(2, output)
    macs = prod(ctx.out_shape()) * ctx.shape(0)[k_a]
    ctx.layer(macs, [rows, columns, read], (k_b, k_a, read), (n, columns))
    return [output]


@rule("MatMul", does="reads the contracted axis, makes the others; heads of an attention leave whole")
def matmul(ctx: Context) -> list[Labels]:
    """Numpy's matmul: ties the contracted axes, then meets like an element-wise product over batch x M x N."""
    rank_a, rank_b = ctx.rank(0), ctx.rank(1)
    k_a, k_b = rank_a - 1, max(0, rank_b - 2)
    read = _contract(ctx, k_a, k_b)
    rank = max(rank_a, rank_b, 2)
    left = _without(ctx, 0, k_a, rank)
    right = _without(ctx, 1, k_b, rank)
    merged = ctx.merge([left, right])
    vectors = tuple(axis for axis, one in ((rank - 2, rank_a == 1), (rank - 1, rank_b == 1)) if one)
    output = keep_varying([np.squeeze(array, vectors) for array in merged])
    written = ctx.axis(1, rank_b - 1) if rank_b > 1 and ctx.is_constant(1) else None
    macs = prod(ctx.out_shape()) * ctx.shape(0)[-1]
    ctx.layer(macs, [*merged, read], (k_b, k_a, read), (rank_b - 1, written))
    return [output]


def _contract(ctx: Context, left: int, right: int) -> IntArray | None:
    """Tie axis ``left`` of input 0 with axis ``right`` of input 1; returns the labels of the contraction.

    Labels that also vary along another axis (heads x dimension) leave along that axis, whole.
    """
    for position, axis in ((0, left), (1, right)):
        if not ctx.is_constant(position):
            for array in ctx.labels(position):
                if len(varying(array)) > 1:
                    ctx.fix(array, axis, STIFF)
    first, second = (1, 0) if ctx.is_constant(0) else (0, 1)
    axes = (left, right)
    labels = _alone(ctx, first, axes[first])
    ctx.match(second, axes[second], labels, STIFF)
    return labels


def _alone(ctx: Context, position: int, axis: int) -> IntArray | None:
    """Labels that vary along ``axis`` and nothing else; fresh ones for a constant."""
    if ctx.is_constant(position):
        return ctx.axis(position, axis)
    return ctx.along([array for array in ctx.labels(position) if varying(array) == (axis,)], axis)


def _without(ctx: Context, position: int, contracted: int, rank: int) -> tuple[Labels, tuple[int, ...]]:
    """Labels and shape of a MatMul operand with the contracted axis reduced to size 1, in a common rank."""
    shape = list(ctx.shape(position))
    shape[contracted] = 1
    if ctx.is_constant(position):
        for axis in range(len(shape)):
            if axis != contracted:
                ctx.axis(position, axis)
        arrays: Labels = ctx.facts.constants.get(ctx.key(position), ())
    else:
        arrays = ctx.labels(position)
    labels = keep_varying([align(array.take([0], contracted), rank) for array in arrays])
    return labels, (1,) * (rank - len(shape)) + tuple(shape)
