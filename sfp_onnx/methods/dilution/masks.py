"""Masks over the connections of a layer: which stay, by rank, by pattern, or by label. Pure numpy.

The weight of a layer is seen as (O, I, K): filters, input channels (of their group), and the positions of the 2-D kernel
(K = 1 for matrices). A mask of that shape is True where a weight may be non-zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...core.types import Array, BoolArray, FloatArray, IntArray


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


# ---- what a dilution method may look at ------------------------------------------------------------------------------

@dataclass(frozen=True)
class Profile:
    """What one end of a connection stands for: F filters (or nodes) against L labels.

    ``evidence`` (F, L) is the un-normalised class profile (how much more the probe's field of filter f speaks for label l than for the
    others, on samples of l), ``activity`` (F, L) the mean activation per label, ``labels`` (F, L) the labels in the clusters of each
    filter, ``snr`` the signal-to-noise ratio of the layer (infinite where the end is the labels themselves). ``name`` is the tensor.
    """

    name: str
    evidence: FloatArray
    activity: FloatArray
    labels: BoolArray
    snr: float


def label_profile(name: str, count: int) -> Profile:
    """The profile of the class scores themselves."""
    return Profile(name, np.eye(count), np.eye(count), np.eye(count, dtype=bool), float("inf"))


@dataclass(frozen=True)
class Ends:
    """The profiles of the tensor that a layer reads (I channels) and of the one that it makes (O filters)."""

    reads: Profile
    writes: Profile

    @property
    def to_labels(self) -> bool:
        """Whether the layer makes the class scores."""
        return not np.isfinite(self.writes.snr)


@dataclass(frozen=True)
class KernelView:
    """The weight of one layer as (O, I, K), with a BatchNormalization behind it folded in.

    ``channel`` and ``filter`` (O, I) are the input channel that each kernel reads and the output channel that it makes (grouped
    layers have fewer rows or columns than channels). ``rms`` holds the root mean square of each input channel, ``ends`` the class
    profiles, ``losses`` (O, I) the error of the output without a kernel after a re-fit of the others; each is None where it was not
    measured.
    """

    layer: str
    values: Array
    channel: IntArray
    filter: IntArray
    rms: FloatArray | None = None
    ends: Ends | None = None
    losses: FloatArray | None = None

    @property
    def read_rms(self) -> FloatArray:
        """RMS of the channel that each kernel reads, (O, I); ones without data."""
        return np.ones(self.channel.shape) if self.rms is None else self.rms[self.channel]


@dataclass(frozen=True)
class MethodOptions:
    """What the user may set for methods: ``numbers`` behind the name (2, 4 of ``nm:2:4``) and the ``seed``."""

    numbers: tuple[int, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class DilutedLayer:
    """What was removed from one layer. ``lost`` is the share of sum |w| x rms that the mask removes, an estimate of the relative
    output error (L1); ``lost_l1`` is the same for the kernels (weights) of smallest L1 norm, as many of them."""

    layer: str
    weight: str
    unit: str
    total: int
    removed: int
    weights: int
    weights_removed: int
    lost: float
    lost_l1: float
    note: str = ""


@dataclass(frozen=True)
class SkippedLayer:
    """A layer that was left as it is, and why."""

    layer: str
    reason: str


def removed_share(layers: Sequence[DilutedLayer]) -> float:
    """Removed weights over all weights of the diluted layers."""
    total = sum(own.weights for own in layers)
    return sum(own.weights_removed for own in layers) / total if total else 0.0
