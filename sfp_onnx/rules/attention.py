"""Fused attention operators: heads leave whole, key/value heads with all the query heads that share them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from ..core.types import After, Edit, IntArray, SetAttribute
from .context import Context
from .labels import Labels, Reads, Writes, vector
from .registry import rule


def _heads(ctx: Context, position: int, heads: int) -> tuple[IntArray | None, IntArray | None]:
    """Labels of an operand's head axis, one per head, and of its channels (batch x length x channels, or batch x heads x
    length x dimension); the other axes keep their size."""
    rank = ctx.rank(position)
    axis = 1 if rank == 4 else 2
    ctx.fix_input(position, [other for other in range(rank) if other != axis], "attention keeps this axis")
    channels = ctx.axis(position, axis)
    if channels is None:
        return None, None
    grid = channels.reshape(heads, -1)
    ctx.tie(grid, grid[:, :1])
    return grid[:, 0], channels


def _masked(ctx: Context, plain: Sequence[int], biases: Sequence[int]) -> bool:
    """Whether all further inputs leave heads alone: those at ``plain`` do, and ``biases`` of the scores where all heads have the same."""
    known = {*plain, *(at for at in biases if ctx.has(at) and (ctx.rank(at) < 3 or ctx.shape(at)[-3] == 1))}
    others = [at for at in range(3, len(ctx.node.inputs)) if ctx.has(at)]
    for at in others:
        ctx.pin_input(at, "it says what attention may look at")
    return known.issuperset(others)


def _share(ctx: Context, query: IntArray | None, others: list[IntArray | None]) -> None:
    """Query heads i*g .. i*g+g-1 read key/value head i; they leave together, or not at all."""
    present = [labels for labels in (query, *others) if labels is not None]
    if len(present) < 1 + len(others) or query is None:
        for labels in present:
            ctx.pin(labels, "an operand of this attention cannot shrink")
        return
    for shared in present[1:]:
        ctx.tie(query.reshape(len(shared), -1), shared[:, None])


def _attend(ctx: Context, query_heads: int, shared_heads: int) -> tuple[IntArray | None, IntArray | None]:
    """Tie the heads of query, key and value (inputs 0 to 2)."""
    query, channels = _heads(ctx, 0, query_heads)
    others = [_heads(ctx, position, shared_heads) for position in (1, 2)]
    _share(ctx, query, [labels for labels, _ in others])
    length = ctx.shape(1)[-2]
    scores = float(prod(ctx.shape(0)) * length)
    for position in (1, 2):
        ctx.layer(scores, [query], Reads(position, 1 if ctx.rank(position) == 4 else 2, 0, None), Writes(position, 0, None))
    return query, channels


@rule("Attention", does="heads leave whole (query heads that share a key/value head with it)")
def attention(ctx: Context) -> list[Labels]:
    """ONNX Attention: 4-d operands carry heads on axis 1, 3-d ones in the attributes q_num_heads and kv_num_heads."""
    flat = ctx.rank(0) == 3
    if not _masked(ctx, (6,), (3,)) or len([name for name in ctx.node.outputs if name]) > 1:
        for position in range(len(ctx.node.inputs)):
            ctx.pin_input(position, "Attention with a cache, a mask per head, or further outputs")
        return [() for _ in ctx.node.outputs]
    query_heads = ctx.attribute("q_num_heads") if flat else ctx.shape(0)[1]
    shared_heads = ctx.attribute("kv_num_heads") if flat else ctx.shape(1)[1]
    query, _ = _attend(ctx, query_heads, shared_heads)
    if flat:
        sizes = (ctx.shape(0)[2] // query_heads, ctx.shape(1)[2] // shared_heads)

        def edits(after: After) -> list[Edit]:
            names = ("q_num_heads", "kv_num_heads")
            return [SetAttribute(name, after.input_shape(at)[2] // size) for at, (name, size) in enumerate(zip(names, sizes, strict=True))]

        ctx.follow(edits)
    if query is None:
        return [()]
    width = ctx.out_shape()[2] // query_heads if flat else 1
    return [(vector(np.repeat(query, width), 2 if flat else 1, ctx.rank(0)),)]


@rule("com.microsoft.MultiHeadAttention", does="heads leave whole")
def multi_head_attention(ctx: Context) -> list[Labels]:
    """Separate query, key and value (3-d); bias = concatenation of their biases; a mask of keys, and one of scores."""
    heads = ctx.attribute("num_heads")
    separate = ctx.has(1) and ctx.has(2) and all(ctx.rank(position) == 3 for position in (0, 1, 2))
    if not separate or not _masked(ctx, (3, 4), (5,)) or len([name for name in ctx.node.outputs if name]) > 1:
        for position in range(len(ctx.node.inputs)):
            ctx.pin_input(position, "MultiHeadAttention with packed operands, a mask per head, or a cache")
        return [() for _ in ctx.node.outputs]
    query, _ = _attend(ctx, heads, heads)
    size = ctx.shape(0)[2] // heads

    def edits(after: After) -> list[Edit]:
        return [SetAttribute("num_heads", after.input_shape(0)[2] // size)]

    ctx.follow(edits)
    if query is None:
        ctx.match(3, 0, None)
        return [()]
    widths = [ctx.shape(position)[2] // heads for position in (0, 1, 2)]
    ctx.match(3, 0, np.concatenate([np.repeat(query, width) for width in widths]))
    return [(vector(np.repeat(query, widths[2]), 2, 3),)]


@rule("com.microsoft.Attention", does="heads leave whole; its packed projection shrinks along")
def packed_attention(ctx: Context) -> list[Labels]:
    """Input B x S x I, weights I x (Q + K + V), bias of the same width, a mask of keys, and (input 5) one of scores."""
    heads = ctx.attribute("num_heads")
    if not _masked(ctx, (3,), (5,)) or not ctx.is_constant(1) or not ctx.has(2) or len([name for name in ctx.node.outputs if name]) > 1:
        ctx.pin_input(0, "com.microsoft.Attention with masks per head, a cache, or computed weights")
        return [() for _ in ctx.node.outputs]
    ctx.fix_input(0, (0, 1), "attention keeps this axis")
    features = ctx.axis(0, 2)
    ctx.match(1, 0, features)
    hidden = ctx.attribute("qkv_hidden_sizes") or [ctx.shape(1)[1] // 3] * 3
    query = ctx.mint(heads)
    written = np.concatenate([np.repeat(query, size // heads) for size in hidden])
    ctx.match(1, 1, written)
    ctx.match(2, 0, written)

    def edits(after: After) -> list[Edit]:
        kept = after.input_shape(1)[1] * heads // sum(hidden)
        sizes = [size * kept // heads for size in hidden]
        packed = [SetAttribute("qkv_hidden_sizes", sizes)] if ctx.attribute("qkv_hidden_sizes") else []
        return [SetAttribute("num_heads", kept), *packed]

    ctx.follow(edits)
    tokens = prod(ctx.shape(0)[:2])
    ctx.layer(float(tokens * prod(ctx.shape(1))), [written, features], Reads(0, 2, 0, features), Writes(1, 1, written))
    ctx.layer(float(2 * tokens * ctx.shape(0)[1] * hidden[2]), [query], Reads(0, 2, 0, None), Writes(1, 1, None))
    return [(vector(np.repeat(query, hidden[2] // heads), 2, 3),)]


@rule("RotaryEmbedding", "com.microsoft.RotaryEmbedding", does="heads leave whole")
def rotary_embedding(ctx: Context) -> list[Labels]:
    """B x heads x S x D, or B x S x (heads D); the other inputs are tables of cosines and sines, and positions."""
    for position in range(1, len(ctx.node.inputs)):
        ctx.pin_input(position, "it says how far RotaryEmbedding turns")
    flat, heads = ctx.rank(0) == 3, ctx.attribute("num_heads", 0)
    tables = 2 if ctx.node.domain else 1
    size = 1 if not flat else ctx.shape(0)[2] // heads if heads else 2 * ctx.shape(tables)[-1]
    along = 2 if flat else 1
    labels = ctx.fix_input(0, [axis for axis in range(ctx.rank(0)) if axis != along], "RotaryEmbedding turns along this axis")
    channels = ctx.along(labels, along)
    if flat and channels is not None:
        ctx.tie(channels.reshape(-1, size), channels.reshape(-1, size)[:, :1])

    def edits(after: After) -> list[Edit]:
        return [SetAttribute("num_heads", after.input_shape(0)[along] // size)] if heads else []

    ctx.follow(edits)
    return [labels]


# ---- recurrent operators ---------------------------------------------------------------------------------------------

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
