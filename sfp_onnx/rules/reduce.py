"""Pooling, reductions over axes, and shape queries."""

from __future__ import annotations

from math import prod

import numpy as np

from ..labels import Labels, keep_varying
from ..records import After, Edit, InsertAfter
from .context import Context
from .registry import rule

POOLING = "AveragePool MaxPool LpPool GlobalAveragePool GlobalMaxPool GlobalLpPool".split()
SUMS = "ReduceSum ReduceL1 ReduceL2 ReduceSumSquare".split()
COMPARED = "ReduceProd ReduceLogSum ReduceLogSumExp ArgMax ArgMin".split()
FIRST_BROADCAST = 8  # opset from which Max and Min broadcast


@rule(*POOLING, does="passes channels (spatial axes keep their size)")
def pooling(ctx: Context) -> list[Labels]:
    """Every channel on its own. Indices of MaxPool count over all channels and keep them."""
    stiff = list(range(2, ctx.rank(0)))
    if len(ctx.node.outputs) > 1 and ctx.node.outputs[1]:
        stiff.append(1)
    labels = ctx.settle(0, stiff, "it is pooled along this axis, or pooling indices count over it")
    return [labels, ()][: len(ctx.node.outputs)]


def _axes(ctx: Context) -> list[int] | None:
    """Reduced axes (attribute or input); None if they depend on the data."""
    rank = ctx.rank(0)
    axes = ctx.attribute("axes")
    if axes is None and ctx.has(1):
        value = ctx.value(1)
        if value is None:
            return None
        axes = value.reshape(-1).tolist()
    if not axes:
        return [] if ctx.attribute("noop_with_empty_axes", 0) else list(range(rank))
    return [int(axis) % rank for axis in axes]


def _reduced(ctx: Context, labels: Labels, axes: list[int]) -> Labels:
    """Labels after the axes are gone; what varies along a reduced axis *and* others leaves along the others."""
    passed = []
    for array in labels:
        for axis in axes:
            if array.shape[axis] > 1:
                array = array.take([0], axis) if array.size == array.shape[axis] else ctx.fix(array, axis, "it is reduced")
        passed.append(array if ctx.attribute("keepdims", 1) else np.squeeze(array, tuple(axes)))
    return keep_varying(passed)


@rule(*SUMS, does="passes the other axes; a removed channel adds nothing to the sum")
def reduce_sum(ctx: Context) -> list[Labels]:
    """Zero channels do not change the sum, so a reduced axis may shrink."""
    axes = _axes(ctx)
    if axes is None:
        ctx.pin_input(0, "its axes depend on the input data")
        return [()]
    return [_reduced(ctx, ctx.labels(0), axes)]


@rule("ReduceMean", does="passes the other axes; over a cut axis it keeps its original divisor")
def reduce_mean(ctx: Context) -> list[Labels]:
    """mean over C of the masked tensor = mean over the kept channels * kept / C."""
    axes = _axes(ctx)
    if axes is None:
        ctx.pin_input(0, "its axes depend on the input data")
        return [()]

    def edits(after: After) -> list[Edit]:
        share = prod(float(after.input_keep(0, axis).mean()) for axis in axes)
        return [] if share == 1 else [InsertAfter("Mul", (np.asarray(share),))]

    ctx.follow(edits)
    return [_reduced(ctx, ctx.labels(0), axes)]


@rule("ReduceMax", "ReduceMin", does="passes the other axes; over a cut axis the removed zeros still take part")
def reduce_extreme(ctx: Context) -> list[Labels]:
    """max over the masked tensor = max(max over the kept channels, 0), and the same for the minimum."""
    axes = _axes(ctx)
    if axes is None or ctx.opset < FIRST_BROADCAST:
        return reduce_compared(ctx)

    def edits(after: After) -> list[Edit]:
        if all(after.input_keep(0, axis).all() for axis in axes):
            return []
        return [InsertAfter(ctx.node.op.removeprefix("Reduce"), (np.asarray(0.0),))]

    ctx.follow(edits)
    return [_reduced(ctx, ctx.labels(0), axes)]


@rule(*COMPARED, does="passes the other axes; the reduced axis keeps its size")
def reduce_compared(ctx: Context) -> list[Labels]:
    """A zero in place of a removed channel would take part in the result."""
    axes = [ctx.attribute("axis", 0) % ctx.rank(0)] if ctx.node.op.startswith("Arg") else _axes(ctx)
    if axes is None:
        ctx.pin_input(0, "its axes depend on the input data")
        return [()]
    ctx.settle(0, axes, f"{ctx.node.op} compares all channels of this axis")
    return [_reduced(ctx, ctx.labels(0), axes)]


@rule("TopK", does="keeps the ranked axis")
def top_k(ctx: Context) -> list[Labels]:
    """Values and indices."""
    axis = ctx.attribute("axis", -1) % ctx.rank(0)
    labels = ctx.fix_input(0, (axis,), "TopK compares all channels of this axis")
    passed = keep_varying([array for array in labels if array.shape[axis] == 1])
    return [passed, passed][: len(ctx.node.outputs)]


@rule("CumSum", does="passes labels; a removed channel adds nothing to the running sum")
def cumulative_sum(ctx: Context) -> list[Labels]:
    """Zero channels do not change the running sums of the others."""
    return [ctx.labels(0)]


@rule("Shape", "Size", does="reads sizes, not channels")
def shape(ctx: Context) -> list[Labels]:
    """Sizes adapt by themselves."""
    return [()]


@rule("Softmax", "LogSoftmax", "Hardmax", does="passes the other axes; the normalised axis is pinned")
def softmax(ctx: Context) -> list[Labels]:
    """Before opset 13 all axes from ``axis`` on are normalised together."""
    old = ctx.opset < 13
    axis = ctx.attribute("axis", 1 if old else -1) % ctx.rank(0)
    axes = range(axis, ctx.rank(0)) if old else (axis,)
    return [ctx.fix_input(0, axes, f"{ctx.node.op} normalises over this axis")]

