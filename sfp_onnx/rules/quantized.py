"""Quantised models: scales and zero points shrink with the channels that they belong to."""

from __future__ import annotations

from ..labels import Labels
from .context import Context
from .registry import rule


@rule("QuantizeLinear", "DequantizeLinear", does="passes labels; scales and zero points per channel shrink along")
def quantize_linear(ctx: Context) -> list[Labels]:
    """Per tensor (scalar scale) or per channel (a vector along ``axis``); blocked scales keep their axis."""
    labels = ctx.labels(0)
    if ctx.rank(1) == 1 and ctx.shape(1)[0] > 1:
        axis = ctx.attribute("axis", 1) % ctx.rank(0)
        channels = ctx.axis(0, axis)
        for position in (1, 2):
            ctx.match(position, 0, channels)
    elif ctx.rank(1) > 1:
        labels = ctx.fix_input(0, [ctx.attribute("axis", 1) % ctx.rank(0)], "it is quantised in blocks along this axis")
    return [labels]


@rule("DynamicQuantizeLinear", does="passes labels (its range always includes zero, so a removed channel does not change it)")
def dynamic_quantize_linear(ctx: Context) -> list[Labels]:
    """Values, scale, zero point."""
    return [ctx.labels(0), (), ()]
