"""Recurrent operators: hidden units leave with their gates, their recurrence and their initial states."""

from __future__ import annotations

import numpy as np

from ..labels import Labels, vector
from ..records import After, Edit, SetAttribute
from .context import Context, Reads, Writes
from .registry import rule

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


@rule("LSTM", "GRU", "RNN", does="reads input features, makes hidden units (gates, recurrence and states shrink along)")
def recurrent(ctx: Context) -> list[Labels]:
    """W: D x gH x I, R: D x gH x H, B: D x 2gH, states: D x N x H, Y: T x D x N x H. Both directions keep equal widths.

    A removed unit is also gone from the recurrence, so R's input axis is part of the masked reference.
    """
    gates = GATES[ctx.node.op]
    if ctx.attribute("layout", 0):
        ctx.pin_input(0, f"{ctx.node.op} with batch-first layout")
        return [() for _ in ctx.node.outputs]
    ctx.fix_input(0, (0, 1), "it is the sequence or batch axis of a recurrent operator")
    features = ctx.axis(0, 2)
    ctx.match(1, 2, features)
    size = ctx.attribute("hidden_size", ctx.shape(2)[2])
    hidden = ctx.mint(size)
    ctx.match(1, 1, np.tile(hidden, gates))
    ctx.match(2, 1, np.tile(hidden, gates))
    ctx.match(2, 2, hidden)
    ctx.mask_input(2)
    ctx.match(3, 1, np.tile(hidden, 2 * gates))
    for position in (5, 6):
        ctx.fix_input(position, (0, 1), "it is the direction or batch axis of a recurrent state")
        ctx.match(position, 2, hidden)
    ctx.match(7, 1, np.tile(hidden, 3))

    def edits(after: After) -> list[Edit]:
        return [SetAttribute("hidden_size", after.input_shape(2)[2])]

    ctx.follow(edits)
    steps = ctx.shape(0)[0] * ctx.shape(0)[1] * ctx.shape(1)[0]
    macs = float(steps * gates * size * ctx.shape(0)[2])
    ctx.layer(macs, [hidden, features], Reads(0, 2, 2, features), Writes(1, 1, np.tile(hidden, gates)))
    ctx.layer(float(steps * gates * size * size), [hidden, hidden], Reads(0, 2, 2, None), Writes(2, 1, None))
    outputs: list[Labels] = [(vector(hidden, 3, 4),), (vector(hidden, 2, 3),), (vector(hidden, 2, 3),)]
    return outputs[: len(ctx.node.outputs)]
