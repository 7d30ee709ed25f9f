"""Tensors made from a shape: their fixed axes may shrink with what they meet."""

from __future__ import annotations

import numpy as np

from ..labels import Labels, vector
from ..records import After, Edit, SetInput
from .context import Context
from .registry import rule


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
