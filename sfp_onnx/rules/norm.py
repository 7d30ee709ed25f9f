"""Normalisations."""

from __future__ import annotations

import numpy as np

from ..labels import Labels, vector
from ..records import After, Edit, SetAttribute
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
        ctx.facts.affines.append(AffineFact(ctx.node, gamma.astype(np.float64), scale, channels))
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


@rule(
    "LayerNormalization",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
    does="passes the other axes; the normalised axes are pinned",
)
def layer_normalization(ctx: Context) -> list[Labels]:
    """Mean and variance over the axes from ``axis`` on."""
    rank = ctx.rank(0)
    axes = range(ctx.attribute("axis", -1) % rank, rank)
    labels = ctx.fix_input(0, axes, f"{ctx.node.op} normalises over this axis")
    return [labels] + [()] * (len(ctx.node.outputs) - 1)


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
