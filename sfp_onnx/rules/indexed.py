"""Operators that read or write by index: axes that are not indexed pass labels, constant indices follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ..core.types import After, Array, BoolArray, Edit, IntArray, SetInput
from .context import Context
from .labels import Labels, Operand, compact, keep_varying, vector
from .registry import Trait, rule

UNKNOWN = "the indices along this axis depend on the input data"
INDEXED = "it is read or written by index along this axis"


def _beside(ctx: Context, axes: Sequence[int], reason: str) -> Labels:
    """Labels of input 0 along all axes but ``axes``, which keep their size; those of a constant table are channels."""
    if ctx.is_constant(0):
        for axis in set(range(ctx.rank(0))) - set(axes):
            ctx.axis(0, axis)
    return ctx.settle(0, axes, reason)


@rule("Gather", does="moves labels; constant indices follow", traits=Trait.TAKES)
def gather(ctx: Context) -> list[Labels]:
    """Indices that depend on the data (embeddings) keep their axis; the others shrink."""
    axis = ctx.attribute("axis", 0) % ctx.rank(0)
    index = ctx.value(1)
    if index is None or index.ndim == 0 or ctx.is_constant(0):
        return [_gather_whole(ctx, axis, index)]
    inner = np.where(index < 0, index + ctx.shape(0)[axis], index)
    labels = ctx.labels(0) if index.ndim == 1 else ctx.settle(0, (axis,), "it is gathered into several axes")
    moved = []
    for array in labels:
        if index.ndim == 1:
            moved.append(ctx.take(array, inner, axis))
        else:
            moved.append(array.reshape(array.shape[:axis] + (1,) * index.ndim + array.shape[axis + 1 :]))

    def edits(after: After) -> list[Edit]:
        keep = after.input_keep(0, axis)
        if keep.all():
            return []
        return [SetInput(1, (np.cumsum(keep) - 1)[inner[keep[inner]]].astype(index.dtype))]

    ctx.follow(edits)
    return [keep_varying(moved)]


def _gather_whole(ctx: Context, axis: int, index: Array | None) -> Labels:
    """Gather by data or by one scalar: the axis itself keeps its size, the others pass."""
    labels = _beside(ctx, (axis,), UNKNOWN if index is None else "one index of it is read by number")
    depth = ctx.rank(1)
    moved = []
    for array in labels:
        if array.shape[axis] == 1:
            moved.append(array.reshape(array.shape[:axis] + (1,) * depth + array.shape[axis + 1 :]))
    ctx.pin_input(1, "it is used as an index")
    return keep_varying(moved)


def _meet(ctx: Context, operands: Mapping[int, Operand]) -> Labels:
    """Operands of a common rank meet element by element; constants take the labels of the others."""
    merged = ctx.merge([operand for position, operand in operands.items() if operand[0] or not ctx.is_constant(position)])
    for position in operands:
        ctx.adopt(position, merged)
    return merged


@rule("GatherElements", "Scatter", "ScatterElements", does="ties its operands element by element; the indexed axis keeps its size")
def elements(ctx: Context) -> list[Labels]:
    """Data, indices (and updates), all of one rank; where their sizes differ, they are read from the start."""
    rank, positions = ctx.rank(0), range(len(ctx.node.inputs))
    axis = ctx.attribute("axis", 0) % rank
    stiff = [dim for dim in range(rank) if dim == axis or len({ctx.shape(position)[dim] for position in positions}) > 1]
    reason = UNKNOWN if ctx.value(1) is None else INDEXED
    operands = {}
    for position in positions:
        shape = [1 if dim in stiff else size for dim, size in enumerate(ctx.shape(position))]
        operands[position] = Operand(ctx.settle(position, stiff, reason), shape, position, range(rank))
    return [_meet(ctx, operands)]


# ---- tuples of indices -----------------------------------------------------------------------------------------------


def _tuples(ctx: Context) -> Array | None:
    """Constant tuples of indices at input 1; None if they depend on data or on dynamic sizes, or differ between batches."""
    value = ctx.value(1)
    return None if value is None or ctx.dynamic(1).any() or ctx.attribute("batch_dims", 0) else value


def _follow_tuples(ctx: Context, index: Array, keep: Callable[[After, int], BoolArray]) -> None:
    """Tuples leave with what they give or take (``keep``, per axis); the others are renumbered."""

    def edits(after: After) -> list[Edit]:
        new = index
        for axis in range(index.ndim - 1):
            new = np.compress(keep(after, axis), new, axis)
        columns = [(np.cumsum(after.input_keep(0, axis)) - 1)[new[..., axis]] for axis in range(index.shape[-1])]
        return [SetInput(1, np.stack(columns, -1).astype(np.int64))]

    ctx.follow(edits)


@rule("GatherND", does="moves labels; constant indices follow")
def gather_nd(ctx: Context) -> list[Labels]:
    """Data B x I x T, tuples of indices B x M x k, output B x M x T (each letter any number of axes, I: k of them)."""
    batch, count, depth = ctx.attribute("batch_dims", 0), ctx.rank(1) - 1, ctx.shape(1)[-1]
    indexed, index = range(batch, batch + depth), _tuples(ctx)
    if index is not None and sum(any(array.shape[axis] > 1 for axis in indexed) for array in ctx.labels(0)) == 1:
        _follow_tuples(ctx, index, lambda after, axis: after.output_keep(0, axis))
        return [keep_varying([_picked(ctx, array, index) for array in ctx.labels(0)])]

    def spread(shape: Sequence[int]) -> tuple[int, ...]:
        return (*shape[:batch], *[1] * (count - batch), *shape[batch + depth :])

    labels = _beside(ctx, indexed, UNKNOWN if ctx.value(1) is None else INDEXED)
    behind = (1,) * (ctx.rank(0) - batch - depth)
    data = tuple(array.reshape(spread(array.shape)) for array in labels)
    tuples = tuple(array.reshape(array.shape[:-1] + behind) for array in ctx.settle(1, (count,), "it is a tuple of indices"))
    return [ctx.merge([Operand(data, spread(ctx.shape(0))), Operand(tuples, ctx.shape(1)[:count] + behind)])]


def _picked(ctx: Context, array: IntArray, index: Array) -> IntArray:
    """Labels of the elements that the tuples name."""
    places = [index[..., axis] if array.shape[axis] > 1 else np.zeros_like(index[..., axis]) for axis in range(index.shape[-1])]
    picked: IntArray = compact(array[tuple(places)])
    if picked.size == 1:
        ctx.pin(picked, "one channel of it is read alone")
    return picked


@rule("ScatterND", does="ties what it writes to what it overwrites; constant grids of indices follow")
def scatter_nd(ctx: Context) -> list[Labels]:
    """Data I x T, tuples of indices M x k, updates M x T (each letter any number of axes, I: k of them).

    A constant grid of indices, such as a slice, overwrites some rows of an axis: they leave with the rows of the updates.
    """
    count, depth, rank = ctx.rank(1) - 1, ctx.shape(1)[-1], ctx.rank(0)
    index = _tuples(ctx)
    grid = None if index is None else _grid(index)
    ctx.settle(1, range(count + 1), "it is used as an index")
    rows = []
    if index is not None and grid is not None:
        rows = [vector(row, axis, rank) for axis, places in enumerate(grid) if (row := _overwritten(ctx, axis, places)) is not None]
        _follow_tuples(ctx, index, lambda after, axis: after.input_keep(2, axis))
    reason = UNKNOWN if ctx.value(1) is None else INDEXED
    before = _without(ctx.settle(0, range(depth) if grid is None else (), reason), depth)
    written = _without(ctx.settle(2, range(count) if grid is None else (), reason), count)
    ahead = (1,) * depth
    moved = tuple(array.reshape(ahead + array.shape[count:]) for array in written)
    across = _meet(ctx, {0: Operand(before, ahead + ctx.shape(0)[depth:]), 2: Operand(moved, ahead + ctx.shape(2)[count:])})
    return [keep_varying([*rows, *across])]


def _overwritten(ctx: Context, axis: int, places: IntArray) -> IntArray | None:
    """Tie some rows of the data to the rows of the updates; returns the labels of the data's axis."""
    rows = ctx.axis(0, axis)
    if rows is not None and len(places) == 1:
        ctx.pin(rows[places], "one channel of it is written alone")
    ctx.match(2, axis, None if rows is None else rows[places])
    return rows


def _without(labels: Labels, count: int) -> Labels:
    """Label arrays that do not vary along the first axes."""
    return tuple(array for array in labels if all(size == 1 for size in array.shape[:count]))


def _grid(index: Array) -> list[IntArray] | None:
    """The indices per axis if the tuples are all combinations of them (index[i, j] = places[0][i], places[1][j]), else None."""
    depth = index.shape[-1]
    if index.ndim - 1 != depth or not index.size:
        return None
    places = []
    for axis in range(depth):
        along = np.moveaxis(index[..., axis], axis, 0).reshape(index.shape[axis], -1)
        if (along != along[:, :1]).any():
            return None
        places.append(along[:, 0])
    return places
