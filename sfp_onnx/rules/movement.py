"""Operators that move data: labels move the same way, and sizes that stand in constants follow."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from ..core.types import After, Array, BoolArray, Edit, IntArray, SetAttribute, SetInput
from .context import Context
from .labels import LARGE, Labels, Operand, align, compact, keep_varying, reshape, reshaped_size, varying, vector
from .registry import Trait, rule


def _ints(ctx: Context, name: str, position: int) -> list[int] | None:
    """A list that older opsets keep in an attribute and newer ones in an input."""
    if ctx.attribute(name) is not None:
        return [int(item) for item in np.atleast_1d(ctx.attribute(name))]
    value = ctx.value(position)
    return None if value is None else [int(item) for item in value.reshape(-1)]


def _set(ctx: Context, name: str, position: int, value: Sequence[int] | Array) -> Edit:
    """Write such a list back to where it was."""
    if ctx.attribute(name) is not None:
        return SetAttribute(name, [int(item) for item in value])
    old = ctx.value(position)
    return SetInput(position, np.asarray(value, np.int64 if old is None else old.dtype))


def _reshaped(ctx: Context) -> list[Labels]:
    old, new = ctx.shape(0), ctx.out_shape()
    if 0 in old:
        ctx.pin_input(0, "it is empty on the sample input")
        return [()]
    arrays = []
    for array in ctx.labels(0):
        if reshaped_size(array, old, new) > LARGE and len(varying(array)) > 1:
            inner = max(varying(array), key=lambda axis: (array.shape[axis] * -1, axis))
            array = ctx.fix(array, inner, "it is interleaved with a long axis")
        arrays.append(reshape(array, old, new))
    return [keep_varying(arrays)]


@rule("Reshape", does="moves labels; the target shape follows", traits=Trait.ALONE | Trait.RESHAPES)
def reshaping(ctx: Context) -> list[Labels]:
    """A -1 stays, a 0 (copied from the input) stays, and a single dynamic element becomes -1."""
    target = ctx.value(1)
    if target is not None:
        dynamic = ctx.dynamic(1)

        def edits(after: After) -> list[Edit]:
            new = after.output_shape(0)
            inferred = bool((target == -1).any())
            sizes = [int(size) if size < 1 else new[axis] for axis, size in enumerate(target)]
            if dynamic.sum() == 1 and not inferred:
                sizes[int(np.argmax(dynamic))] = -1
            return [SetInput(1, np.asarray(sizes, np.int64))]

        ctx.follow(edits)
    elif ctx.attribute("shape") is None:
        ctx.pin_input(0, "its target shape depends on the input data")
        return [()]
    return _reshaped(ctx)


@rule("Flatten", "Squeeze", "Unsqueeze", does="moves labels", traits=Trait.ALONE)
def flattening(ctx: Context) -> list[Labels]:
    """Same elements in the same order."""
    return _reshaped(ctx)


@rule("Transpose", does="moves labels", traits=Trait.ALONE)
def transpose(ctx: Context) -> list[Labels]:
    """Default: reversed axes."""
    perm = ctx.attribute("perm") or list(range(ctx.rank(0)))[::-1]
    return [tuple(array.transpose(perm) for array in ctx.labels(0))]


@rule("Expand", does="moves labels; the target shape follows", traits=Trait.ALONE)
def expand(ctx: Context) -> list[Labels]:
    """Axes of size 1 are repeated. If nothing else of the tensor can shrink (a mask, a gate), a repeated axis of fixed size gets
    labels of its own, and shrinks with what it meets."""
    target = ctx.value(1)
    if target is None:
        ctx.pin_input(0, "its target shape depends on the input data")
        return [()]

    def edits(after: After) -> list[Edit]:
        new = after.output_shape(0)[len(ctx.out_shape()) - len(target) :]
        return [SetInput(1, np.asarray([1 if size == 1 else new[axis] for axis, size in enumerate(target)], np.int64))]

    ctx.follow(edits)
    rank = len(ctx.out_shape())
    before = (1,) * (rank - ctx.rank(0)) + ctx.shape(0)
    fixed = np.concatenate([np.zeros(rank - len(target), bool), ~ctx.dynamic(1)])
    repeated = [axis for axis, size in enumerate(ctx.out_shape()) if size > before[axis] and fixed[axis]]
    labels = tuple(align(array, rank) for array in ctx.labels(0))
    if labels or len(repeated) != 1:
        return [labels]
    return [(vector(ctx.mint(ctx.out_shape()[repeated[0]]), repeated[0], rank),)]


@rule("Tile", does="moves labels", traits=Trait.ALONE)
def tile(ctx: Context) -> list[Labels]:
    """Labels repeat where they vary."""
    repeats = ctx.value(1)
    if repeats is None:
        ctx.pin_input(0, "its repeats depend on the input data")
        return [()]
    moved = []
    for array in ctx.labels(0):
        moved.append(np.tile(array, [int(n) if array.shape[axis] > 1 else 1 for axis, n in enumerate(repeats)]))
    return [tuple(moved)]


@rule("Concat", does="joins labels; parts without labels stay", traits=Trait.ALONE)
def concat(ctx: Context) -> list[Labels]:
    """Along the joined axis labels are concatenated; along all others the parts meet element by element."""
    rank = len(ctx.out_shape())
    axis = ctx.attribute("axis", 1) % rank
    parts = [position for position in range(len(ctx.node.inputs)) if ctx.has(position)]
    labels = [ctx.labels(position) for position in parts]
    shapes = [ctx.shape(position) for position in parts]
    along = [tuple(array for array in arrays if array.shape[axis] > 1) for arrays in labels]
    across = [tuple(array for array in arrays if array.shape[axis] == 1) for arrays in labels]
    meeting = [Operand(*operand, range(rank)) for operand in zip(across, shapes, parts, strict=True)]
    if not any(along):
        return [ctx.merge(meeting)]
    joined, rest = _join(ctx, along, meeting, axis)
    return [keep_varying([joined]) + rest]


def _join(ctx: Context, along: list[Labels], across: list[Operand], axis: int) -> tuple[IntArray, Labels]:
    """One label array along the joined axis, and the arrays that only vary across it."""
    common = {other for arrays in along for array in arrays for other in varying(array)} - {axis}
    columns, rest = [], []
    for arrays, operand in zip(along, across, strict=True):
        others, shape = operand.labels, operand.shape
        together = [array for array in others if set(varying(array)) & common]
        rest.append(operand._replace(labels=tuple(array for array in others if not set(varying(array)) & common)))
        pieces = [*arrays, *together]
        if len(pieces) > 1:
            for array in pieces:
                ctx.pin(array, "two independent channel axes are concatenated")
        piece = pieces[0] if pieces else np.zeros((1,) * len(shape), np.int64)
        full = [shape[other] if other == axis or other in common else 1 for other in range(len(shape))]
        columns.append(np.broadcast_to(piece, full))
    return compact(np.concatenate(columns, axis)), ctx.merge(rest) if any(operand.labels for operand in rest) else ()


@rule("Split", does="moves labels; the part sizes follow", traits=Trait.ALONE)
def split(ctx: Context) -> list[Labels]:
    """Part sizes in an attribute, an input, or implied (equal parts, which become explicit if they are no longer equal)."""
    rank = ctx.rank(0)
    axis = ctx.attribute("axis", 0) % rank
    count = len(ctx.node.outputs)
    sizes = [ctx.out_shape(part)[axis] for part in range(count) if ctx.node.outputs[part]]
    if len(sizes) != count:
        sizes = _ints(ctx, "split", 1) or [-(-ctx.shape(0)[axis] // count)] * count
    bounds = np.cumsum([0, *sizes])
    outputs = []
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        parts = []
        for array in ctx.labels(0):
            parts.append(ctx.take(array, range(start, stop), axis))
        outputs.append(keep_varying(parts))

    def edits(after: After) -> list[Edit]:
        keep = after.input_keep(0, axis)
        new = [int(keep[start:stop].sum()) for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]
        if new == sizes:
            return []
        if ctx.opset < 13:
            return [SetAttribute("split", new)]
        return [SetInput(1, np.asarray(new, np.int64)), SetAttribute("num_outputs", None)]

    ctx.follow(edits)
    return outputs


def _slices(ctx: Context) -> list[tuple[int, int, int, int]] | None:
    """(axis, start, stop, step) of a Slice as Python's slice would clip them; None if they depend on the data."""
    starts, ends = _ints(ctx, "starts", 1), _ints(ctx, "ends", 2)
    if starts is None or ends is None:
        return None
    axes = _ints(ctx, "axes", 3) or list(range(len(starts)))
    steps = _ints(ctx, "steps", 4) or [1] * len(starts)
    slices = []
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        size = ctx.shape(0)[axis]
        slices.append((axis % ctx.rank(0), *slice(start, None if step < 0 and end < -size else end, step).indices(size)))
    return slices


@rule("Slice", does="moves labels; starts and ends follow", traits=Trait.ALONE)
def slicing(ctx: Context) -> list[Labels]:
    """Along an axis with labels only steps of 1 stay a slice after the cut; other steps keep the axis."""
    slices = _slices(ctx)
    if slices is None:
        ctx.pin_input(0, "its bounds depend on the input data")
        return [()]
    strided = [axis for axis, _, _, step in slices if step != 1]
    labels = ctx.settle(0, strided, "a slice with a step reads this axis")
    moved = []
    for array in labels:
        for axis, start, stop, step in slices:
            if step == 1:
                array = ctx.take(array, range(start, max(start, stop)), axis)
        moved.append(array)

    def edits(after: After) -> list[Edit]:
        starts, ends = _ints(ctx, "starts", 1) or [], _ints(ctx, "ends", 2) or []
        changed = False
        for index, (axis, start, stop, _) in enumerate(slices):
            keep = after.input_keep(0, axis)
            if not keep.all():
                starts[index], ends[index] = int(keep[:start].sum()), int(keep[:stop].sum())
                changed = True
        return [_set(ctx, "starts", 1, starts), _set(ctx, "ends", 2, ends)] if changed else []

    ctx.follow(edits)
    return [keep_varying(moved)]


@rule("Pad", does="moves labels; padding channels are channels too (constant), pads follow", traits=Trait.ALONE)
def pad(ctx: Context) -> list[Labels]:
    """Constant padding of an axis with labels mints labels for the padding; other modes keep the axis."""
    pads, rank = _ints(ctx, "pads", 1), ctx.rank(0)
    if pads is None:
        ctx.pin_input(0, "its padding depends on the input data")
        return [()]
    axes = [axis % rank for axis in (_ints(ctx, "axes", 3) or range(rank))]
    before = dict(zip(axes, pads[: len(axes)], strict=True))
    behind = dict(zip(axes, pads[len(axes) :], strict=True))
    padded = [axis for axis in axes if before[axis] or behind[axis]]
    stiff = padded if ctx.attribute("mode", "constant") != "constant" else [a for a in padded if min(before[a], behind[a]) < 0]
    moved = []
    for array in ctx.settle(0, stiff, "this axis is padded with its own values, or cropped"):
        for axis in padded:
            if array.shape[axis] > 1 and axis not in stiff:
                edges = [(*array.shape[:axis], size, *array.shape[axis + 1 :]) for size in (before[axis], behind[axis])]
                first, last = (ctx.mint(prod(edge)).reshape(edge) for edge in edges)
                array = np.concatenate([first, array, last], axis)
        moved.append(array)

    def edits(after: After) -> list[Edit]:
        new = list(pads)
        for index, axis in enumerate(axes):
            keep: BoolArray = after.output_keep(0, axis)
            if not keep.all():
                new[index] = int(keep[: before[axis]].sum())
                new[len(axes) + index] = int(keep[len(keep) - behind[axis] :].sum())
        return [] if new == pads else [_set(ctx, "pads", 1, new)]

    ctx.follow(edits)
    return [keep_varying(moved)]


@rule("DepthToSpace", does="moves labels; the positions of one block leave together", traits=Trait.ALONE)
def depth_to_space(ctx: Context) -> list[Labels]:
    """N x (b b C) x H x W -> N x C x bH x bW (mode CRD: C b b)."""
    block = ctx.attribute("blocksize")
    channels = ctx.axis(0, 1)
    ctx.fix_input(0, (0, 2, 3), "it is interleaved with channels")
    if channels is None:
        return [()]
    by_row = ctx.attribute("mode", "DCR") == "DCR"
    grid = channels.reshape(block * block, -1) if by_row else channels.reshape(-1, block * block).T
    ctx.tie(grid, grid[:1])
    return [keep_varying([vector(grid[0], 1, 4)])]


@rule("SpaceToDepth", does="moves labels (every block position repeats them)", traits=Trait.ALONE)
def space_to_depth(ctx: Context) -> list[Labels]:
    """N x C x bH x bW -> N x (b b C) x H x W."""
    channels = ctx.axis(0, 1)
    ctx.fix_input(0, (0, 2, 3), "it is interleaved with channels")
    return [() if channels is None else (vector(np.tile(channels, ctx.attribute("blocksize") ** 2), 1, 4),)]


@rule("Resize", "Upsample", does="moves labels; target sizes follow")
def resize(ctx: Context) -> list[Labels]:
    """Axes that change their size keep it."""
    rank = ctx.rank(0)
    changed = [axis for axis in range(rank) if ctx.shape(0)[axis] != ctx.out_shape()[axis]]
    sizes = ctx.value(3)
    if sizes is not None and sizes.size:
        axes = [axis % rank for axis in ctx.attribute("axes", range(rank))]

        def edits(after: After) -> list[Edit]:
            return [SetInput(3, np.asarray([after.output_shape(0)[axis] for axis in axes], np.int64))]

        ctx.follow(edits)
    return [ctx.settle(0, changed, "it is resized along this axis")]


@rule("Col2Im", does="moves labels; the positions of one block leave together", traits=Trait.ALONE)
def column_to_image(ctx: Context) -> list[Labels]:
    """N x (C b) x L -> N x C x image, with b positions of a block."""
    channels, block = ctx.axis(0, 1), ctx.value(2)
    ctx.fix_input(0, (0, 2), "it is interleaved with channels")
    if channels is None or block is None:
        ctx.pin_input(0, "its block depends on the input data")
        return [()]
    grid = channels.reshape(-1, int(block.prod()))
    ctx.tie(grid, grid[:, :1])
    return [keep_varying([vector(grid[:, 0], 1, len(ctx.out_shape()))])]


@rule("GridSample", "RoiAlign", does="passes channels; what says where it is read stays")
def sampling(ctx: Context) -> list[Labels]:
    """N x C x image, read between its pixels: at a grid of places, or in boxes (each with the number of its image)."""
    for position in range(1, len(ctx.node.inputs)):
        ctx.pin_input(position, f"it says where {ctx.node.op} reads")
    axes = [axis for axis in range(ctx.rank(0)) if axis != 1]
    return [ctx.settle(0, axes, f"{ctx.node.op} reads between the pixels of this axis")]


@rule("ReverseSequence", does="passes the other axes")
def reverse_sequence(ctx: Context) -> list[Labels]:
    """The first steps of every sequence in reverse order; lengths at input 1."""
    ctx.pin_input(1, "it is the length of a sequence")
    return [ctx.fix_input(0, (0, 1), "it is the sequence or batch axis of ReverseSequence")]
