"""Masks over the connections of a layer: which stay, by rank, by pattern, or by label. Pure numpy.

The weight of a layer is seen as (O, I, K): filters, input channels (of their group), and the positions of the 2-D kernel
(K = 1 for matrices). A mask of that shape is True where a weight may be non-zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .records import Array, BoolArray, FloatArray, IntArray


@dataclass(frozen=True)
class Tile:
    """What is kept or removed as one: ``rows`` filters x ``columns`` input channels, at all positions of the kernel (``whole``) or one."""

    rows: int = 1
    columns: int = 1
    whole: bool = False


KERNEL = Tile(whole=True)
WEIGHT = Tile()


def tile_sums(values: Array, tile: Tile) -> FloatArray:
    """Sum of ``values`` (O, I, K) over each tile: (ceil(O / rows), ceil(I / columns), 1 or K), in float64."""
    total = values.astype(np.float64)
    if tile.whole:
        total = total.sum(2, keepdims=True)
    for axis, step in enumerate((tile.rows, tile.columns)):
        if step > 1:
            total = np.add.reduceat(total, np.arange(0, total.shape[axis], step), axis)
    return np.asarray(total, np.float64)


def spread(keep: Array, tile: Tile, shape: Sequence[int]) -> Array:
    """Values per tile, given to each weight of it: (O, I, K)."""
    wide = keep
    for axis, step in enumerate((tile.rows, tile.columns)):
        if step > 1:
            wide = np.repeat(wide, step, axis)
    return np.broadcast_to(wide[: shape[0], : shape[1]], shape)


def drop_smallest(scores: FloatArray, count: int) -> BoolArray:
    """True for all but the ``count`` smallest of a vector; of equal scores the later are dropped last."""
    keep = np.ones(len(scores), bool)
    keep[np.argsort(scores, kind="stable")[:count]] = False
    return keep


def share(count: int, rate: float) -> int:
    """How many of ``count`` a rate removes: the nearest whole number."""
    return round(rate * count)


def keep_by_rank(scores: Sequence[FloatArray], rate: float, scope: str) -> list[BoolArray]:
    """Drop the share ``rate`` of the lowest scores.

    ``scope``: "layer" (the same share of every array), "global" (one ranking over all arrays), "filter" (the same share of
    every row of every array, as Wanda does).
    """
    if scope == "global":
        flat = np.concatenate([own.reshape(-1) for own in scores]) if scores else np.zeros(0)
        keep = drop_smallest(flat, share(len(flat), rate))
        ends = np.cumsum([own.size for own in scores])[:-1]
        return [part.reshape(own.shape) for part, own in zip(np.split(keep, ends), scores, strict=True)]
    if scope == "filter":
        found = []
        for own in scores:
            rows = own.reshape(len(own), -1)
            count = share(rows.shape[1], rate)
            found.append(np.stack([drop_smallest(row, count) for row in rows]).reshape(own.shape))
        return found
    return [drop_smallest(own.reshape(-1), share(own.size, rate)).reshape(own.shape) for own in scores]


def n_of_m(values: Array, n: int, m: int) -> BoolArray:
    """Keep the n largest |values| of every m consecutive input channels, per filter and kernel position.

    A rest of fewer than m channels keeps its n largest, too. Mishra et al., arXiv:2104.08378 (2021).
    """
    outputs, inputs, positions = values.shape
    groups = -(-inputs // m)
    padded = np.full((outputs, groups * m, positions), -1.0)
    padded[:, :inputs] = np.abs(values)
    ranked = np.argsort(-padded.reshape(outputs, groups, m, positions), axis=2, kind="stable")
    keep = np.zeros(ranked.shape, bool)
    np.put_along_axis(keep, ranked[:, :, :n], True, axis=2)
    return np.ascontiguousarray(keep.reshape(outputs, groups * m, positions)[:, :inputs])


# ---- labels ----------------------------------------------------------------------------------------------------------


def intersect(writes: BoolArray, reads: BoolArray) -> BoolArray:
    """(O, I): whether the label sets (O, L) and (I, L) of the two ends of a connection have a label in common."""
    return np.asarray(writes.astype(np.float32) @ reads.astype(np.float32).T > 0)


def even_labels(sizes: IntArray, labels: int, generator: np.random.Generator) -> BoolArray:
    """Random label sets (F, L) of given sizes. Labels are spread evenly: each set takes the labels that were taken least so far."""
    found = np.zeros((len(sizes), labels), bool)
    taken = np.zeros(labels, np.int64)
    for index in generator.permutation(len(sizes)):
        order = generator.permutation(labels)
        chosen = order[np.argsort(taken[order], kind="stable")[: sizes[index]]]
        found[index, chosen] = True
        taken[chosen] += 1
    return found
