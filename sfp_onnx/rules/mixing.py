"""Operators that read all channels of an axis and make new ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from ..core.types import After, Edit, IntArray, Linear, SetAttribute
from .context import STIFF, Context
from .forms import Dense, Window
from .labels import Blocked, Labels, Operand, Reads, TiePair, Writes, align, keep_varying, varying, vector
from .registry import rule

SLIDES = "a convolution slides along this axis"


def _columns(matrix: IntArray) -> TiePair:
    """Ties that make every column leave as one."""
    return matrix, np.broadcast_to(matrix[:1], matrix.shape)


def _rows(matrix: IntArray) -> TiePair:
    """Ties that make every row leave as one."""
    return matrix, np.broadcast_to(matrix[:, :1], matrix.shape)


@dataclass(frozen=True)
class Inner:
    """The axis of a grouped weight that all groups share: the ``side`` it belongs to (0: the inputs, 1: the outputs of a group), its size,
    and its labels."""

    side: int
    size: int
    labels: IntArray | None


def _grouped(ctx: Context, weight: int, data: IntArray | None, written: IntArray | None, inner: Inner) -> None:
    """Constraints of a convolution with g groups: whole groups leave, or one channel of every group; where nothing else asks for more,
    both, and each group loses channels of its own (`Blocked`).

    ``data`` are the g * i input channels, ``written`` the g * o output channels, ``inner`` the axis of the weight that all groups share.
    That axis of a ``weight`` which is computed stands on a tensor of its own: where it follows no side, it must not shrink alone.
    """
    groups = ctx.attribute("group", 1)
    sides = [None if labels is None else labels.reshape(groups, -1) for labels in (data, written)]
    labels = inner.labels
    options = []
    left, right = sides
    for one, other in (sides, sides[::-1]):
        if one is not None and other is None and one.shape[1] == 1:  # depthwise, say: no channel of a group stays
            ctx.pin(one, "its grouped convolution has no channels on its other side that can leave")
    loose = [] if labels is None or ctx.is_constant(weight) else [(labels, np.zeros_like(labels))]
    if left is not None and right is not None:
        options.append([_rows(left), _rows(right), (left[:, 0], right[:, 0]), *loose])
    each = [_columns(matrix) for matrix in sides if matrix is not None]
    shared = sides[inner.side]
    if shared is not None and labels is not None:
        each.append((shared[0], labels))
    elif shared is not None and inner.size > 1:
        each.append((shared[0], np.zeros_like(shared[0])))
    elif shared is None:
        each += loose
    ctx.choose(*options, each)
    if ctx.is_constant(weight) and ctx.node.inputs[weight] not in ctx.shared_constants:
        ctx.facts.blocked.append(Blocked(ctx.node, (left, right), weight, inner.side))


def _convolved(ctx: Context, weight: int = 1) -> tuple[int, IntArray | None, Labels]:
    """Rank and input channels of a convolution, and the labels of its output that vary along an axis on which it slides."""
    rank, slides = ctx.rank(0), [axis for axis in range(ctx.rank(0)) if axis != 1]
    same = all(ctx.shape(0)[axis] == ctx.out_shape()[axis] for axis in slides)
    passed = ctx.whole([0], slides, SLIDES, passes=same)
    ctx.fix_input(weight, range(2, rank), SLIDES)
    along = tuple(array for array in passed if {*varying(array)} & {*slides})
    return rank, ctx.along([array for array in passed if array.shape[1] > 1], 1), along


def _dynamic(ctx: Context, weight: int, macs: float) -> list[Labels]:
    """A convolution whose weight is an activation: it needs all of both."""
    for position in (0, weight):
        ctx.pin_input(position, f"the weight of {ctx.node.name} is computed at run time")
    ctx.layer(macs, [], Reads(0, 1, 1, None), Writes(weight, 0, None), grouped="group")
    return [()]


def convolution(ctx: Context, weight: int, vectors: Sequence[int], linear: Linear | None = None) -> list[Labels]:
    """A convolution with its weight (O x I/g x kernel) at input ``weight``; ``vectors`` are inputs that may hold one value per
    output channel (bias, scales, zero points); ``linear`` if its weight can be re-fitted."""
    macs = float(prod(ctx.out_shape()) * prod(ctx.shape(weight)[1:]))
    if not ctx.is_weight(weight):
        return _dynamic(ctx, weight, macs)
    rank, data, along = _convolved(ctx, weight)
    linear = None if along else linear
    written = ctx.axis(weight, 0)
    reads = Reads(0, 1, 1, data)
    if ctx.attribute("group", 1) == 1:
        ctx.match(weight, 1, data)
    else:
        inner = ctx.axis(weight, 1)
        _grouped(ctx, weight, data, written, Inner(0, ctx.shape(weight)[1], inner))
        reads = Reads(0, 1, 1, inner) if inner is not None else Reads(0, 1, 0, written)

        def edits(after: After) -> list[Edit]:
            return [SetAttribute("group", after.input_shape(0)[1] // after.input_shape(weight)[1])]

        ctx.follow(edits)
    for position in vectors:
        if ctx.has(position) and ctx.shape(position) == ctx.shape(weight)[:1]:
            ctx.match(position, 0, written)
    extents = [written, reads.labels if reads.weight_axis == 1 else None]
    ctx.layer(macs, extents, reads, Writes(weight, 0, written), linear, "group")
    return [(*along, *([] if written is None else [vector(written, 1, rank)]))]


def window(ctx: Context, transposed: bool, bias: int | None = 2) -> Linear | None:
    """How the weight of a convolution acts; None where its padding follows from the output's size."""
    kernel = ctx.shape(1)[2:]
    auto_pad = ctx.attribute("auto_pad", "NOTSET")
    if transposed and (auto_pad not in ("NOTSET", "VALID") or ctx.attribute("output_shape")):
        return None
    ones = [1] * len(kernel)
    given = ctx.attribute("pads") if auto_pad == "NOTSET" else None
    pads = tuple(given or [0, 0] * len(kernel))
    same = auto_pad if auto_pad.startswith("SAME") else ""
    strides, dilations = tuple(ctx.attribute("strides", ones)), tuple(ctx.attribute("dilations", ones))
    padded = any(pads) or bool(same)
    return Linear(Window(tuple(kernel), strides, dilations, pads[: len(kernel)], same, transposed, padded), bias)


@rule("Conv", does="reads input channels, makes output channels (1-d to 3-d, grouped, depthwise)")
def conv(ctx: Context) -> list[Labels]:
    """Input 1 is the weight, 2 the bias."""
    return convolution(ctx, 1, [2], window(ctx, False))


@rule("com.microsoft.FusedConv", does="as Conv, with a sum and an activation behind it")
def fused_conv(ctx: Context) -> list[Labels]:
    """y = activation(conv + z), z (input 3) of the size of the output."""
    fused = ctx.attribute("activation") or ctx.has(3)
    output = convolution(ctx, 1, [2], None if fused else window(ctx, False))[0]
    if ctx.has(3):
        output = ctx.merge([Operand(output, ctx.out_shape()), Operand(ctx.labels(3), ctx.shape(3))])
        ctx.adopt(3, output)
    return [output]


@rule("DeformConv", does="as Conv; offsets and their mask stay")
def deform_conv(ctx: Context) -> list[Labels]:
    """x, w, offsets, bias, mask. Offsets of several groups of channels: one channel of each leaves."""
    for position in (2, 4):
        ctx.pin_input(position, "it says where the taps of DeformConv read")
    channels = ctx.axis(0, 1)
    if channels is not None:
        ctx.tie(*_columns(channels.reshape(ctx.attribute("offset_group", 1), -1)))
    return convolution(ctx, 1, [3])


@rule("ConvTranspose", does="reads input channels, makes output channels (grouped too)")
def conv_transpose(ctx: Context) -> list[Labels]:
    """Weight: I x O/g x kernel."""
    macs = float(prod(ctx.shape(0)) * prod(ctx.shape(1)[1:]))
    if not ctx.is_weight(1):
        return _dynamic(ctx, 1, macs)
    rank, data, along = _convolved(ctx)
    ctx.match(1, 0, data)
    inner = written = ctx.axis(1, 1)
    grouped = ctx.attribute("group", 1) > 1
    if grouped:
        written = ctx.mint(ctx.out_shape()[1])
        _grouped(ctx, 1, data, written, Inner(1, ctx.shape(1)[1], inner))

        def edits(after: After) -> list[Edit]:
            return [SetAttribute("group", after.output_shape(0)[1] // after.input_shape(1)[1])]

        ctx.follow(edits)
    ctx.match(2, 0, written)
    writes = Writes(1, 0, data) if grouped and inner is None else Writes(1, 1, inner)
    ctx.layer(macs, [data, inner], Reads(0, 1, 0, data), writes, None if along else window(ctx, True), "group")
    return [(*along, *([] if written is None else [vector(written, 1, rank)]))]


@dataclass(frozen=True)
class Term:
    """One operand of a product: its input position, and for each of its axes the index that runs along it."""

    position: int
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Scales:
    """y = product * (the product) + bias * (input ``position``, None: there is no bias)."""

    product: float = 1.0
    bias: float = 1.0
    position: int | None = None


def product(ctx: Context, terms: Sequence[Term], output: Sequence[int], rank: int, scales: Scales | None = None) -> Labels:
    """sum over all indices not in ``output`` of the product of the terms, in the space of ``rank`` indices. With ``scales``, a
    constant operand is a floating-point weight that can be re-fitted.

    Activations meet element by element, constants take the labels of what they meet and bring fresh ones along indices of
    their own. A summed index adds nothing where it is removed; labels that vary along a summed index *and* another
    (dimension x heads) leave along the other, whole.
    """
    shapes = {term: _spread_shape(term, ctx.shape(term.position), rank) for term in terms}
    data = [term for term in terms if not ctx.is_constant(term.position)] or list(terms[:1])
    axes = {term: [term.indices.index(index) if index in term.indices else -1 for index in range(rank)] for term in data}
    met = {term: tuple(_spread(term, array, rank) for array in ctx.labels(term.position)) for term in data}
    operands = [Operand(met[term], shapes[term], term.position, axes[term]) for term in data]
    known = any(ctx.is_weight(term.position) for term in terms)
    arrays = ctx.merge(operands, STIFF if known else f"the other operand of {ctx.node.name} is computed at run time and cannot shrink here")
    weights = [term for term in terms if term not in data]
    for term in weights:
        for axis, index in enumerate(term.indices):
            if sum(index in other.indices for other in terms) == 1 and (labels := ctx.axis(term.position, axis)) is not None:
                arrays += (vector(labels, index, rank),)
            elif not any(array.shape[index] > 1 for array in arrays):
                ctx.keep_shared(term.position, axis)
    summed = [index for index in range(rank) if index not in output]
    reads: dict[int, IntArray] = {}
    passed = []
    for array in arrays:
        for index in summed:
            if varying(array) == (index,):
                reads[index] = array.reshape(-1)
            else:
                array = ctx.fix(array, index, "it is summed over") if known else ctx.contract(array, index)
        passed.append(array)
    for term in weights:
        ctx.adopt(term.position, tuple(_gather_axes(array, term.indices) for array in passed))
    linear = _dense(ctx, terms, output, scales) if scales else None
    _state_layer(ctx, terms, arrays, reads, [max(shape[index] for shape in shapes.values()) for index in range(rank)], linear)
    return keep_varying([_gather_axes(array, output) for array in passed if not set(varying(array)) & set(summed)])


def _spread_shape(term: Term, shape: Sequence[int], rank: int) -> tuple[int, ...]:
    full = [1] * rank
    for size, index in zip(shape, term.indices, strict=True):
        full[index] = size
    return tuple(full)


def _spread(term: Term, array: IntArray, rank: int) -> IntArray:
    """Labels of an operand in the space of all indices."""
    moved: IntArray = array.transpose(np.argsort(term.indices)).reshape(_spread_shape(term, array.shape, rank))
    return moved


def _gather_axes(array: IntArray, indices: Sequence[int]) -> IntArray:
    """Labels along some of the indices, in their order (the first label along all others)."""
    others = tuple(slice(None) if index in indices else slice(0, 1) for index in range(array.ndim))
    kept = sorted(indices)
    moved: IntArray = array[others].reshape([array.shape[index] for index in kept]).transpose([kept.index(index) for index in indices])
    return moved


def _dense(ctx: Context, terms: Sequence[Term], output: Sequence[int], scales: Scales) -> Linear | None:
    """How a 2-d weight acts: one of its indices is summed with the data's, the other is the output's; the data's other indices
    keep their order."""
    weight = next((term for term in terms if ctx.is_weight(term.position)), None)
    data = next((term for term in terms if term is not weight), None)
    if weight is None or data is None or len(terms) != 2 or len(weight.indices) != 2:
        return None
    summed = [index for index in weight.indices if index in data.indices and index not in output]
    new = [index for index in weight.indices if index in output and index not in data.indices]
    others = [index for index in data.indices if index not in summed]
    if len(summed) != 1 or len(new) != 1 or others != [index for index in output if index not in new]:
        return None
    contracted = data.indices.index(summed[0])
    front = "MatMul" if contracted == len(data.indices) - 1 else ""
    form = Dense(contracted, list(output).index(new[0]), weight.indices.index(summed[0]), scales.product, front)
    return Linear(form, scales.position, scales.bias)


def _state_layer(
    ctx: Context,
    terms: Sequence[Term],
    arrays: Sequence[IntArray],
    reads: dict[int, IntArray],
    sizes: Sequence[int],
    linear: Linear | None,
) -> None:
    """The mixing layer that a product is: its weight is the first term made of constants, if there is one."""
    summed = next((index for index in reads), -1)
    weight = next((term for term in terms if ctx.is_weight(term.position)), terms[-1])
    alone = [axis for axis, index in enumerate(weight.indices) if sum(index in term.indices for term in terms) == 1]
    writes = ctx.axis(weight.position, alone[-1]) if alone and ctx.is_weight(weight.position) else None
    source = next((term for term in terms if term is not weight), weight)
    ctx.layer(
        float(prod(sizes)),
        arrays,
        Reads(source.position, _axis_of(source, summed), _axis_of(weight, summed), reads.get(summed)),
        Writes(weight.position, alone[-1] if alone else 0, writes),
        linear,
    )


def _axis_of(term: Term, index: int) -> int:
    return term.indices.index(index) if index in term.indices else 0


@rule("Gemm", "com.microsoft.FusedGemm", does="reads input features, makes output features")
def gemm(ctx: Context) -> list[Labels]:
    """Y = alpha A' B' + beta C, with indices m, k, n; fused: an activation of that, which keeps the weight from being re-fitted."""
    first = (1, 0) if ctx.attribute("transA", 0) else (0, 1)
    second = (2, 1) if ctx.attribute("transB", 0) else (1, 2)
    scales = Scales(ctx.attribute("alpha", 1.0), ctx.attribute("beta", 1.0), 2)
    output = product(ctx, [Term(0, first), Term(1, second)], (0, 2), 3, None if ctx.attribute("activation") else scales)
    if ctx.has(2) and not ctx.is_constant(2):
        added = tuple(align(array, 2) for array in ctx.labels(2))
        output = ctx.merge([Operand(output, ctx.out_shape()), Operand(added, (1,) * (2 - ctx.rank(2)) + ctx.shape(2))])
    ctx.adopt(2, output)
    return [output]


def matrix_product(ctx: Context, left: int, right: int, scales: Scales | None = None) -> Labels:
    """Numpy's matmul of two inputs: indices are the batch axes, then m, k, n; a vector has no m or n. Onnxruntime's own form may swap
    the last two axes of an operand (transA), or have the first of them in front of the batch (transBatchA)."""
    rank_a, rank_b = ctx.rank(left), ctx.rank(right)
    batch = max(rank_a, rank_b, 2) - 2
    m, k, n = batch, batch + 1, batch + 2

    def indices(rank: int, name: str, rows: int, columns: int) -> tuple[int, ...]:
        own = tuple(range(batch - max(0, rank - 2), batch))
        one, two = (columns, rows) if ctx.attribute(f"trans{name}", 0) else (rows, columns)
        return (one, *own, two) if ctx.attribute(f"transBatch{name}", 0) else (*own, one, two)

    first = indices(rank_a, "A", m, k) if rank_a > 1 else (k,)
    second = indices(rank_b, "B", k, n) if rank_b > 1 else (k,)
    kept = (*range(batch), *((m,) if rank_a > 1 else ()), *((n,) if rank_b > 1 else ()))
    return product(ctx, [Term(left, first), Term(right, second)], kept, batch + 3, scales)


@rule(
    "MatMul", "com.microsoft.FusedMatMul",
    does="reads the contracted axis, makes the others; heads leave whole, or dimensions of all heads",
)  # fmt: skip
def matmul(ctx: Context) -> list[Labels]:
    """Inputs 0 and 1; fused: transposed and scaled."""
    return [matrix_product(ctx, 0, 1, Scales(ctx.attribute("alpha", 1.0)))]


@rule("Einsum", does="as MatMul, for any equation without repeated indices or ellipsis")
def einsum(ctx: Context) -> list[Labels]:
    """``bhqd,bhkd->bhqk``: every letter is an index."""
    equation = ctx.attribute("equation").replace(" ", "")
    left, _, right = equation.partition("->")
    words = left.split(",")
    letters = sorted(set("".join(words)))
    if "->" not in equation:
        right = "".join(letter for letter in letters if left.count(letter) == 1)
    if "." in equation or any(len(set(word)) != len(word) for word in words):
        for position in range(len(words)):
            ctx.pin_input(position, f"Einsum with the equation {equation}")
        return [()]
    terms = [Term(position, tuple(letters.index(letter) for letter in word)) for position, word in enumerate(words)]
    return [product(ctx, terms, [letters.index(letter) for letter in right], len(letters), Scales())]
