"""Normalisations."""

from __future__ import annotations

import numpy as np

from ..labels import Labels, vector
from ..records import After, Edit, InsertAfter, InsertBefore, SetAttribute, SetInput
from .context import AffineFact, Context
from .registry import rule


@rule("BatchNormalization", does="passes channels; its four vectors shrink along")
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


@rule("InstanceNormalization", does="passes channels; normalised axes are pinned")
def instance_normalization(ctx: Context) -> list[Labels]:
    """Each channel over its own positions."""
    ctx.fix_input(0, range(2, ctx.rank(0)), "InstanceNormalization normalises over this axis")
    channels = ctx.axis(0, 1)
    for position in (1, 2):
        ctx.match(position, 0, channels)
    return [() if channels is None else (vector(channels, 1, ctx.rank(0)),)]


@rule("GroupNormalization", does="whole normalisation groups leave")
def group_normalization(ctx: Context) -> list[Labels]:
    """Scale and bias per group (opset 18) or per channel (opset 21)."""
    groups, rank = ctx.attribute("num_groups"), ctx.rank(0)
    ctx.fix_input(0, range(2, rank), "GroupNormalization normalises over this axis")
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


@rule("LayerNormalization", does="passes the other axes; the normalised axes are pinned (freed by --cut-layernorm)")
def layer_normalization(ctx: Context) -> list[Labels]:
    """Mean and variance over the axes from ``axis`` on.

    Over a cut axis they stay exact if the removed channels still count as zeros: with ``cut_layernorm`` the input is padded
    with them to its old width, normalised, and sliced.
    """
    rank = ctx.rank(0)
    axis = ctx.attribute("axis", -1) % rank
    scale, bias = ctx.value(1), ctx.value(2)
    if not ctx.cut_layernorm or axis != rank - 1 or scale is None or (ctx.has(2) and bias is None):
        labels = ctx.fix_input(0, range(axis, rank), "LayerNormalization normalises over this axis")
        return [labels] + [()] * (len(ctx.node.outputs) - 1)

    def edits(after: After) -> list[Edit]:
        keep = after.input_keep(0, axis)
        if keep.all():
            return []
        width, order = int(keep.sum()), np.argsort(~keep, kind="stable")
        pads = np.zeros(2 * rank, np.int64)
        pads[-1] = len(keep) - width
        vectors: list[Edit] = [SetInput(at, value[order]) for at, value in ((1, scale), (2, bias)) if value is not None]
        bounds = tuple(np.asarray([value], np.int64) for value in (0, width, axis))
        return [*vectors, InsertBefore(0, "Pad", (pads,)), InsertAfter("Slice", bounds)]

    ctx.follow(edits)
    return [ctx.labels(0)] + [()] * (len(ctx.node.outputs) - 1)


@rule("RMSNormalization", "SimplifiedLayerNormalization", does="passes channels; the mean square keeps its original divisor")
def rms_normalization(ctx: Context) -> list[Labels]:
    """y = scale x / sqrt(mean(x^2) + eps). With k of C channels left and s = k / C,
    mean_C(x^2) + eps = s (mean_k(x^2) + eps / s), so scale and eps are divided by sqrt(s) and s."""
    rank = ctx.rank(0)
    axis = ctx.attribute("axis", -1) % rank
    scale = ctx.value(1)
    if axis != rank - 1 or scale is None or len(ctx.node.outputs) > 1:
        return [ctx.fix_input(0, range(axis, rank), f"{ctx.node.op} normalises over this axis")] + [()] * (len(ctx.node.outputs) - 1)

    def edits(after: After) -> list[Edit]:
        keep = after.input_keep(0, axis)
        share = float(keep.mean())
        epsilon = float(ctx.attribute("epsilon", 1e-5))
        return [SetInput(1, (scale[keep] / np.sqrt(share)).astype(scale.dtype)), SetAttribute("epsilon", epsilon / share)]

    ctx.follow(edits)
    return [ctx.labels(0)]


@rule("MeanVarianceNormalization", does="passes the other axes; the normalised axes are pinned")
def mean_variance_normalization(ctx: Context) -> list[Labels]:
    """Default axes: batch and spatial."""
    axes = [axis % ctx.rank(0) for axis in ctx.attribute("axes", [0, 2, 3])]
    return [ctx.fix_input(0, axes, "MeanVarianceNormalization normalises over this axis")]


@rule("LpNormalization", does="passes labels; a removed channel adds nothing to the norm")
def lp_normalization(ctx: Context) -> list[Labels]:
    """x / ||x||: zeros do not change the norm."""
    return [ctx.labels(0)]


@rule("LRN", does="passes the other axes; neighbouring channels are read, so the channel axis is pinned")
def local_response_normalization(ctx: Context) -> list[Labels]:
    """Sums over a window of neighbouring channels."""
    return [ctx.fix_input(0, (1,), "LRN reads neighbouring channels")]
