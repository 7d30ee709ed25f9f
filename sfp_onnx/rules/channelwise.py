"""Normalisations, poolings, reductions, and operators that work element by element: none of them mixes channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np

from ..core.types import After, Array, Edit, InsertAfter, Node, SetAttribute, SetInput
from .context import Context
from .labels import AffineFact, Labels, Operand, align, keep_varying, vector
from .registry import Trait, in_training, rule, state

NORM_STATE = 14  # from this operator set on BatchNormalization says training_mode; before, outputs of its statistics meant it


@rule("BatchNormalization", does="passes channels; its four vectors shrink along", traits=Trait.ALONE | Trait.SPREADS)
def batch_normalization(ctx: Context) -> list[Labels]:
    """y = gamma (x - mean) / sqrt(var + eps) + beta, per channel."""
    channels = ctx.axis(0, 1)
    for position in range(1, 5):
        ctx.match(position, 0, channels)
    gamma, variance = ctx.value(1), ctx.value(4)
    if channels is not None and gamma is not None and variance is not None:
        scale = gamma.astype(np.float64) / np.sqrt(variance.astype(np.float64) + ctx.attribute("epsilon", 1e-5))
        ctx.facts.affines.append(AffineFact(ctx.node, gamma.astype(np.float64), scale, channels, (3, 4)))
    ctx.additive(0, varies=[1])
    return [ctx.labels(0)] + [()] * (len(ctx.node.outputs) - 1)


@in_training("BatchNormalization")
def _takes_statistics(node: Node, opset: int, constants: Mapping[str, Array]) -> bool:
    """Of the batch: ``training_mode`` says so, in older operator sets outputs for the statistics, or that it is not a test."""
    asked = opset < NORM_STATE and len([*filter(None, node.outputs)]) > 1
    return bool(node.attributes.get("training_mode", 0)) or asked or (opset < 7 and not node.attributes.get("is_test", 0))


@rule("InstanceNormalization", does="passes channels; normalised axes are pinned")
def instance_normalization(ctx: Context) -> list[Labels]:
    """Each channel over its own positions."""
    spatial = range(2, ctx.rank(0))
    passed = ctx.whole([0], spatial, "InstanceNormalization normalises over this axis", ordered=False)
    channels = ctx.along(passed, 1)
    for position in (1, 2):
        ctx.match(position, 0, channels)
    return [passed]


@rule("GroupNormalization", does="whole normalisation groups leave; one that is all channels needs them (freed by --expand)")
def group_normalization(ctx: Context) -> list[Labels]:
    """Scale and bias per group (opset 18) or per channel (opset 21)."""
    groups, rank = ctx.attribute("num_groups"), ctx.rank(0)
    ctx.fix_input(0, range(2, rank), "GroupNormalization normalises over this axis")
    if groups == 1 and ctx.expand:
        return [ctx.whole([0], [1], "GroupNormalization normalises over this axis", ordered=True)]
    channels = ctx.axis(0, 1)
    per_channel = ctx.shape(1)[0] == ctx.shape(0)[1]
    members = None if channels is None else channels.reshape(groups, -1)
    if members is not None:
        ctx.tie(members, members[:, :1])
    for position in (1, 2):
        ctx.match(position, 0, channels if per_channel or members is None else members[:, 0])
    size = ctx.shape(0)[1] // groups

    def edits(after: After) -> list[Edit]:
        return [SetAttribute("num_groups", after.input_shape(0)[1] // size)]

    ctx.follow(edits)
    return [() if channels is None else (vector(channels, 1, rank),)]


REWRITABLE = "LayerNormalization normalises over this axis"
SKIP_EPSILON = 1e-12  # what onnxruntime's own operators take if nothing is given


@rule("LayerNormalization", does="passes the other axes; the normalised axes are pinned (freed by --expand)")
def layer_normalization(ctx: Context) -> list[Labels]:
    """Mean and variance over the axes from ``axis`` on."""
    rank = ctx.rank(0)
    axis = ctx.attribute("axis", -1) % rank
    if ctx.is_weight(0):  # a table that is normalised as a whole; who reads it gathers what it needs
        ctx.fix_input(0, range(rank), "it is normalised as a whole")
        return [()] * len(ctx.node.outputs)
    labels = _normalised(ctx, ctx.labels(0), axis, (0,), (1, 2))
    return [labels] + [()] * (len(ctx.node.outputs) - 1)


def _normalised(ctx: Context, labels: Labels, axis: int, data: Sequence[int], vectors: Sequence[int]) -> Labels:
    """Normalise over the axes from ``axis`` on: the sum of the inputs ``data``, with ``vectors`` per channel, the scale first."""
    return ctx.whole(data, range(axis, ctx.rank(0)), REWRITABLE, labels, ordered=False, vectors=vectors)


def _skipped(ctx: Context, whole: bool = False) -> Labels:
    """Labels of the sum of inputs 0 and 1; a removed channel of a constant adds nothing. ``whole``: of an input without channels all is
    added where channels are put back."""
    rank, operands = ctx.rank(0), {}
    for at in (0, 1):
        if not ctx.is_constant(at):
            missing = rank - ctx.rank(at)
            labels, places = tuple(align(array, rank) for array in ctx.labels(at)), [-1] * missing + list(range(ctx.rank(at)))
            operands[at] = Operand(labels, (1,) * missing + ctx.shape(at), at, places)
    met = [operand for operand in operands.values() if operand.labels or not (whole and ctx.expand)]
    merged = ctx.merge(met or list(operands.values()))
    if 1 not in operands:
        ctx.adopt(1, merged)
        ctx.mask_input(1)
    return merged


@rule("com.microsoft.SkipLayerNormalization", does="as LayerNormalization, of a sum")
def skip_layer_normalization(ctx: Context) -> list[Labels]:
    """x, skip, scale, and if given bias and what is added in front; output 3 is the sum."""
    last, merged, summed = ctx.rank(0) - 1, _skipped(ctx, True), len(ctx.node.outputs) > 3
    vectors, beside = (2, 3, 4), ((3,) if summed else ())
    labels = ctx.whole((0, 1), [last], REWRITABLE, merged, ordered=False, vectors=vectors, beside=beside)
    return [labels, (), (), labels][: len(ctx.node.outputs)]


@rule("com.microsoft.EmbedLayerNormalization", does="looks up and normalises; channels leave behind it (freed by --expand)")
def embed_layer_normalization(ctx: Context) -> list[Labels]:
    """Tokens, segments, their tables and those of positions, scale, shift, mask: normalised embeddings, what the mask says, and the sum."""
    outputs: list[Labels] = [()] * len(ctx.node.outputs)
    if not ctx.expand or any(ctx.node.outputs[2:]):
        return outputs

    def edits(after: After) -> list[Edit]:
        keep = after.output_keep(0, 2)
        return [] if keep.all() else [InsertAfter("Gather", (np.flatnonzero(keep),), {"axis": 2})]

    ctx.follow(edits)
    return [(vector(ctx.mint(ctx.out_shape()[2]), 2, 3),), *outputs[1:]]


@rule("RMSNormalization", "SimplifiedLayerNormalization", does="passes channels; the mean square keeps its original divisor")
def rms_normalization(ctx: Context) -> list[Labels]:
    """Over the axes from ``axis`` on."""
    axis = ctx.attribute("axis", -1) % ctx.rank(0)
    labels = _root_mean_square(ctx, ctx.labels(0), axis, 1, len(ctx.node.outputs) == 1)
    return [labels] + [()] * (len(ctx.node.outputs) - 1)


@rule("com.microsoft.SkipSimplifiedLayerNormalization", does="as RMSNormalization, of a sum")
def skip_rms_normalization(ctx: Context) -> list[Labels]:
    """x, skip, scale, and if given what is added in front; output 3 is the sum."""
    axis, merged = ctx.rank(0) - 1, _skipped(ctx)
    if ctx.has(3):
        ctx.match(3, 0, ctx.along(merged, axis))
        ctx.mask_input(3)
    labels = _root_mean_square(ctx, merged, axis, 2, not any(ctx.node.outputs[1:3]))
    return [labels, (), (), labels][: len(ctx.node.outputs)]


def _root_mean_square(ctx: Context, labels: Labels, axis: int, position: int, alone: bool) -> Labels:
    """y = scale x / sqrt(mean(x^2) + eps), with the scale at an input; ``alone``: nobody reads the statistics. With k of C channels left
    and s = k / C, mean_C(x^2) + eps = s (mean_k(x^2) + eps / s), so scale and eps are divided by sqrt(s) and s."""
    rank, scale = ctx.rank(0), ctx.value(position)
    if axis != rank - 1 or scale is None or not alone:
        return ctx.fix_axes(labels, range(axis, rank), f"{ctx.node.op} normalises over this axis")
    epsilon = float(ctx.attribute("epsilon", SKIP_EPSILON if position == 2 else 1e-5))

    def edits(after: After) -> list[Edit]:
        keep = after.input_keep(0, axis)
        share = float(keep.mean())
        return [SetInput(position, (scale[keep] / np.sqrt(share)).astype(scale.dtype)), SetAttribute("epsilon", epsilon / share)]

    ctx.follow(edits)
    return labels


@rule("MeanVarianceNormalization", does="passes the other axes; the normalised axes are pinned")
def mean_variance_normalization(ctx: Context) -> list[Labels]:
    """Default axes: batch and spatial."""
    axes = [axis % ctx.rank(0) for axis in ctx.attribute("axes", [0, 2, 3])]
    return [ctx.whole([0], axes, "MeanVarianceNormalization normalises over this axis", ordered=False)]


@rule("LpNormalization", does="passes labels; a removed channel adds nothing to the norm")
def lp_normalization(ctx: Context) -> list[Labels]:
    """x / ||x||: zeros do not change the norm."""
    return [ctx.labels(0)]


@rule("LRN", does="passes the other axes; neighbouring channels are read, so the channel axis is pinned")
def local_response_normalization(ctx: Context) -> list[Labels]:
    """Sums over a window of neighbouring channels."""
    return [ctx.whole([0], (1,), "LRN reads neighbouring channels")]


# ---- pooling ---------------------------------------------------------------------------------------------------------

POOLING = "AveragePool MaxPool LpPool GlobalAveragePool GlobalMaxPool GlobalLpPool".split()
SUMS = "ReduceSum ReduceL1 ReduceL2 ReduceSumSquare".split()
COMPARED = "ReduceProd ReduceLogSum ReduceLogSumExp ArgMax ArgMin".split()
FIRST_AXIS = 20  # opset from which DFT takes its axis as an input
FIRST_BROADCAST = 8  # opset from which Max and Min broadcast


@rule(*POOLING, does="passes channels (spatial axes keep their size)", traits=Trait.ALONE)
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
    ctx.whole([0], axes, f"{ctx.node.op} compares all channels of this axis", passes=False)
    return [_reduced(ctx, ctx.labels(0), axes)]


@rule("TopK", does="keeps the ranked axis")
def top_k(ctx: Context) -> list[Labels]:
    """Values and indices."""
    axis = ctx.attribute("axis", -1) % ctx.rank(0)
    passed = ctx.whole([0], (axis,), "TopK compares all channels of this axis", passes=False)
    return [passed, passed][: len(ctx.node.outputs)]


@rule("DFT", does="passes the other axes; the axis that is transformed keeps its size (freed by --expand)")
def fourier(ctx: Context) -> list[Labels]:
    """Real and imaginary part lie along the last axis. The axis is an attribute, or (from opset 20) input 2."""
    rank, given = ctx.rank(0), ctx.value(2)
    axis = int(given.reshape(-1)[0]) if given is not None else ctx.attribute("axis", 1 if ctx.opset < FIRST_AXIS else -2)
    if ctx.has(2) and given is None:
        ctx.pin_input(0, "its axis depends on the input data")
        return [()]
    return [ctx.settle(0, [axis % rank, rank - 1], "DFT transforms this axis")]


@rule("CumSum", does="passes labels; a removed channel adds nothing to the running sum")
def cumulative_sum(ctx: Context) -> list[Labels]:
    """Zero channels do not change the running sums of the others."""
    return [ctx.labels(0)]


@rule("Shape", "Size", does="reads sizes, not channels", traits=Trait.ALONE | Trait.SIZES)
def shape(ctx: Context) -> list[Labels]:
    """Sizes adapt by themselves."""
    return [()]


def size_of(node: Node, shape: Sequence[int]) -> Array:
    """What a node that reads sizes gives for an input of this shape."""
    if node.op == "Size":
        return np.asarray(prod(shape), np.int64)
    return np.asarray(list(shape)[slice(node.attributes.get("start", 0), node.attributes.get("end"))], np.int64)


@rule("Softmax", "LogSoftmax", "Hardmax", does="passes the other axes; the normalised axis is pinned")
def softmax(ctx: Context) -> list[Labels]:
    """Before opset 13 all axes from ``axis`` on are normalised together."""
    old = ctx.opset < 13
    axis = ctx.attribute("axis", 1 if old else -1) % ctx.rank(0)
    axes = range(axis, ctx.rank(0)) if old else (axis,)
    return [ctx.whole([0], axes, f"{ctx.node.op} normalises over this axis", ordered=ctx.node.op == "Hardmax")]


# ---- operators that work element by element, with broadcasting -------------------------------------------------------

UNARY = (
    "Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast Ceil Celu Cos Cosh Dropout Elu Erf Exp Floor Gelu HardSigmoid "
    "HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh "
    "Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu"
).split()

NARY = (
    "Add And BitShift BitwiseAnd BitwiseOr BitwiseXor CastLike Clip Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean "
    "Min Mod Mul Or PRelu Pow Sub Sum Where Xor"
).split()

MICROSOFT = ["com.microsoft.Gelu", "com.microsoft.FastGelu", "com.microsoft.QuickGelu", "com.microsoft.BiasGelu"]


@rule(*UNARY, *NARY, *MICROSOFT, does="ties its operands element by element (broadcasting)", traits=Trait.ALONE | Trait.SPREADS)
def elementwise(ctx: Context) -> list[Labels]:
    """All operands meet; constants take the labels of what they meet."""
    rank = len(ctx.out_shape())
    present = [position for position in range(len(ctx.node.inputs)) if ctx.has(position)]
    free = [position for position in present if ctx.is_constant(position)]
    alone = len(free) == 1 and all(_is_number(ctx, position) for position in present if position not in free)
    operands = []
    for position in present:
        if position in free and len(free) < len(present) and not alone:
            continue
        labels = tuple(align(array, rank) for array in ctx.labels(position))
        missing = rank - ctx.rank(position)
        operands.append(Operand(labels, (1,) * missing + ctx.shape(position), position, [-1] * missing + list(range(ctx.rank(position)))))
    merged = ctx.merge(operands)
    for position in () if alone else free:
        ctx.adopt(position, merged)
        missing = rank - ctx.rank(position)
        for axis in range(ctx.rank(position) if len(free) < len(present) else 0):
            if not any(array.shape[missing + axis] > 1 for array in merged):
                ctx.keep_shared(position, axis)
    shift = free[0] if ctx.node.op == "Add" and len(free) == 1 else None
    factor = ctx.shape(free[0]) if free and ctx.node.op in ("Mul", "Div") else ()
    varies = [rank - len(factor) + axis for axis, size in enumerate(factor) if size > 1]
    ctx.additive(*_additive(ctx.node.op, present, free), shift=shift, varies=varies)
    return [merged for _ in ctx.node.outputs]


def _is_number(ctx: Context, position: int) -> bool:
    """Whether an input holds one value, whatever is fed: what a constant vector makes of it has the channels of the vector."""
    return prod(ctx.shape(position)) == 1 and not any(ctx.dynamic_axis(position, axis) for axis in range(ctx.rank(position)))


@in_training("Dropout")
def _drops(node: Node, opset: int, constants: Mapping[str, Array]) -> bool:
    """Random zeros: a flag says so, or before opset 7 that it is not a test."""
    flag = node.inputs[2] if len(node.inputs) > 2 else ""
    active = bool(constants[flag].any()) if flag in constants else bool(flag)
    return active or (opset < 7 and not node.attributes.get("is_test", 0))


state(Trait.UNSTEADY, "Dropout")


def _additive(op: str, present: Sequence[int], constant: Sequence[int]) -> list[int]:
    """Inputs in which the operator is affine, whatever the others are."""
    if op in ("Add", "Sub", "Sum", "Identity", "Dropout", "Neg"):
        return [position for position in present if op != "Dropout" or position == 0]
    scaled = [position for position in present if position not in constant]
    return scaled if (op == "Mul" and len(scaled) == 1) or (op == "Div" and scaled == [0]) else []


# ---- tensors made from a shape ---------------------------------------------------------------------------------------


state(Trait.UNSTEADY | Trait.STEPS, *"RandomNormal RandomUniform RandomNormalLike RandomUniformLike Multinomial Bernoulli".split())

state(Trait.STEPS, *"Round Floor Ceil Sign Hardmax Mod TopK Shrink ThresholdedRelu".split())

state(Trait.UNSTEADY, *"If Loop Scan Optional SequenceEmpty".split())

state(Trait.CHOOSES, "If")


@rule("ConstantOfShape", does="makes labels for its fixed axes; the shape follows")
def constant_of_shape(ctx: Context) -> list[Labels]:
    """Initial states of recurrent nets, zero padding, masks."""
    target = ctx.value(0)
    if target is None:
        return [()]
    fixed = ~ctx.dynamic(0)
    axes = [axis for axis, size in enumerate(target) if size > 1 and fixed[axis]]

    def edits(after: After) -> list[Edit]:
        return [SetInput(0, np.asarray(after.output_shape(0), np.int64))]

    ctx.follow(edits)
    return [tuple(vector(ctx.mint(int(target[axis])), axis, len(target)) for axis in axes)]


@rule("Range", does="makes no labels (numbers that depend on dynamic sizes)")
def numbers(ctx: Context) -> list[Labels]:
    """Start, limit, delta. A range of fixed size is a constant by now, and takes the labels of what it meets."""
    for position in range(3):
        ctx.pin_input(position, "the length of a range is computed from it")
    return [()]
