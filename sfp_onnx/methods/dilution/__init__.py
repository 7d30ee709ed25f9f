"""Dilution methods, plain functions from the view of one layer to scores or to a mask; their registry; and masks over connections.

The weight of a layer is seen as (O, I, K): filters, input channels (of their group), and the positions of the 2-D kernel
(K = 1 for matrices). A mask of that shape is True where a weight may be non-zero.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ...core.errors import OptionError
from ...core.types import Array, BoolArray, FloatArray, IntArray


@dataclass(frozen=True)
class Tile:
    """What is kept or removed as one: ``rows`` filters x ``columns`` input channels, at all positions of the kernel (``whole``) or one."""

    rows: int = 1
    columns: int = 1
    whole: bool = False


KERNEL, WEIGHT = Tile(whole=True), Tile()


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
    return np.broadcast_to(keep.repeat(tile.rows, 0).repeat(tile.columns, 1)[: shape[0], : shape[1]], shape)


def drop_smallest(scores: FloatArray, rate: float) -> BoolArray:
    """True for all but the share ``rate`` of smallest scores of each row, to the nearest number; of equal scores the later are dropped
    last."""
    keep = np.ones(scores.shape, bool)
    np.put_along_axis(keep, np.argsort(scores, kind="stable")[:, : round(rate * scores.shape[1])], False, 1)
    return keep


def keep_by_rank(scores: Sequence[FloatArray], rate: float, scope: str) -> list[BoolArray]:
    """Drop the share ``rate`` of the lowest scores.

    ``scope``: "layer" (the same share of every array), "global" (one ranking over all arrays), "filter" (the same share of
    every row of every array, as Wanda does).
    """
    if scope == "global":
        keep = drop_smallest(np.concatenate([values.reshape(1, -1) for values in scores], 1), rate)[0]
        ends = np.cumsum([values.size for values in scores])[:-1]
        return [part.reshape(values.shape) for part, values in zip(np.split(keep, ends), scores, strict=True)]
    return [drop_smallest(values.reshape(len(values) if scope == "filter" else 1, -1), rate).reshape(values.shape) for values in scores]


def intersect(writes: BoolArray, reads: BoolArray) -> BoolArray:
    """(O, I): whether the label sets (O, L) and (I, L) of the two ends of a connection have a label in common."""
    return np.asarray(writes.astype(np.float32) @ reads.astype(np.float32).T > 0)


def even_labels(sizes: IntArray, labels: int, generator: np.random.Generator) -> BoolArray:
    """Random label sets (F, L) of given sizes. Labels are spread evenly: each set takes the labels that were taken least so far."""
    sets, taken = np.zeros((len(sizes), labels), bool), np.zeros(labels, np.int64)
    for index in generator.permutation(len(sizes)):
        order = generator.permutation(labels)
        chosen = order[np.argsort(taken[order], kind="stable")[: sizes[index]]]
        sets[index, chosen] = True
        taken[chosen] += 1
    return sets


# ---- what a dilution method may look at ------------------------------------------------------------------------------


class Site(NamedTuple):
    """A tensor, and the axis of its channels."""

    tensor: str
    axis: int


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


# ---- the registry of methods -----------------------------------------------------------------------------------------

MethodFunction = Callable[[KernelView, MethodOptions], Array]
TileFunction = Callable[[MethodOptions], Tile]


@dataclass(frozen=True)
class Method:
    """A way to choose connections.

    ``function`` gives scores per tile (larger = keep; shape as `tile_sums`), or, if the rate is ``fixed`` by the method, a mask per
    tile. ``needs`` is a subset of "activations", "losses", "profiles"; ``pattern`` shows the numbers that the name takes (``nm:N:M``);
    ``gated``: the layer is skipped where its labels carry too little signal; ``nodal``: convolutions are, and the layer of class scores.
    """

    name: str
    function: MethodFunction
    tile: TileFunction
    summary: str
    source: str
    needs: frozenset[str]
    fixed: bool
    pattern: str
    gated: bool
    nodal: bool


METHODS: dict[str, Method] = {}


def method(
    name: str, summary: str, source: str, *, tile: TileFunction = lambda options: KERNEL, needs: tuple[str, ...] = (), kind: str = "",
    pattern: str = "",
) -> Callable[[MethodFunction], MethodFunction]:  # fmt: skip
    """Register a method; ``kind`` may hold the words "fixed" (the method sets the rate), "gated" and "nodal"."""

    def register(function: MethodFunction) -> MethodFunction:
        words = ("gated" in kind, "nodal" in kind)
        METHODS[name] = Method(name, function, tile, summary, source, frozenset(needs), "fixed" in kind, pattern, *words)
        return function

    return register


def find_method(text: str, seed: int = 0) -> tuple[Method, MethodOptions]:
    """Read ``l1``, ``nm:2:4``, ``block:1x4``.

    Raises:
        OptionError: no such method, or its numbers are missing or out of range.
    """
    name, *rest = re.split("[:x]", text.strip()) if ":" in text else [text.strip()]
    if name not in METHODS:
        raise OptionError(f"unknown dilution method '{text}'. Known: {', '.join(item.pattern or key for key, item in METHODS.items())}")
    chosen = METHODS[name]
    if len(rest) != len(re.findall("[A-Z]", chosen.pattern)) or not all(item.isdigit() and int(item) > 0 for item in rest):
        raise OptionError(f"method '{text}': expected {chosen.pattern or chosen.name}" + (" with whole numbers" if chosen.pattern else ""))
    numbers = tuple(int(item) for item in rest)
    if name == "nm" and numbers[0] >= numbers[1]:
        raise OptionError(f"method '{text}': expected nm:N:M with N smaller than M (N of M weights stay)")
    return chosen, MethodOptions(numbers, seed)


@method("l1", "kernels of the smallest L1 norm", "Li et al., ICLR 2017, for kernels")
def l1(view: KernelView, options: MethodOptions) -> Array:
    """s[o, i] = sum_k |W[o, i, k]|."""
    return tile_sums(np.abs(view.values), KERNEL)


@method("wanda", "kernels of the smallest weight norm times activation RMS", "Sun et al., ICLR 2024", needs=("activations",))
def wanda(view: KernelView, options: MethodOptions) -> Array:
    """s[o, i] = ||W[o, i]||_2 rms_i. (The paper ranks the weights of one output; here that is --scope filter.)"""
    return np.asarray(np.sqrt(tile_sums(view.values.astype(np.float64) ** 2, KERNEL)) * view.read_rms[:, :, None])


@method("obs", "kernels that are missed least once the others are re-fitted", "after Hassibi and Stork, NeurIPS 1992",
        needs=("activations", "losses"))  # fmt: skip
def obs(view: KernelView, options: MethodOptions) -> Array:
    """s[o, i] = sqrt(q[o, i] sum_k |W[o, i, k]|), q[o, i] the error without the kernel after a re-fit of the others of its filter.

    The others leave, too, and cannot stand in for it then; the norm tempers q for that (benchmarks/dilution.md). Layers whose q was
    not measured take `wanda`.
    """
    if view.losses is None:
        return wanda(view, options)
    return np.asarray(np.sqrt(view.losses[:, :, None] * l1(view, options)))


@method("magnitude", "single weights of the smallest magnitude", "Han et al., NeurIPS 2015", tile=lambda options: WEIGHT)
def magnitude(view: KernelView, options: MethodOptions) -> Array:
    """s[o, i, k] = |W[o, i, k]|."""
    return np.abs(view.values.astype(np.float64))


@method("nm", "N of every M consecutive input channels stay", "Mishra et al., arXiv:2104.08378 (2021)",
        tile=lambda options: WEIGHT, kind="fixed", pattern="nm:N:M")  # fmt: skip
def semi_structured(view: KernelView, options: MethodOptions) -> Array:
    """The N largest |W[o, i, k]| of i = cM .. cM + M - 1, also of a rest of fewer than M channels."""
    (outputs, inputs, positions), (n, m) = view.values.shape, options.numbers
    padded = np.full((outputs, -(-inputs // m) * m, positions), -1.0)
    padded[:, :inputs] = np.abs(view.values)
    ranked = np.argsort(-padded.reshape(outputs, -1, m, positions), axis=2, kind="stable")
    keep = np.zeros(ranked.shape, bool)
    np.put_along_axis(keep, ranked[:, :, :n], True, axis=2)
    return np.ascontiguousarray(keep.reshape(padded.shape)[:, :inputs])


@method("block", "blocks of A filters x B input channels of the smallest L1 norm", "Narang et al., arXiv:1711.02782 (2017)",
        tile=lambda options: Tile(options.numbers[0], options.numbers[1]), pattern="block:AxB")  # fmt: skip
def block(view: KernelView, options: MethodOptions) -> Array:
    """Sum of |W| over the block, at each kernel position; smaller blocks at the border count their mean as a whole block's."""
    tile = Tile(options.numbers[0], options.numbers[1])
    return np.asarray(tile_sums(np.abs(view.values), tile) / tile_sums(np.ones(view.values.shape), tile))


@method("random", "random kernels (a control)", "-")
def random(view: KernelView, options: MethodOptions) -> Array:
    """Uniform numbers from the seed and the layer's name."""
    return named_generator(options.seed, view.layer).random((*view.channel.shape, 1))


def named_generator(seed: int, name: str) -> np.random.Generator:
    """The same numbers for a seed and a name, whatever else is drawn."""
    return np.random.default_rng([seed, *name.encode()])


# ---- methods that compare what the two ends of a connection stand for ------------------------------------------------


SOURCE = "Tzach et al., Phys. Rev. E 111, 065307 (2025)"


def _pairs(values: Array, view: KernelView) -> Array:
    """From (filters, channels) to (O, I, 1): the value of each kernel's own pair."""
    return np.asarray(values[view.filter, view.channel][:, :, None])


@method("afcc", "kernels between filters without a common label", SOURCE, needs=("profiles",), kind="fixed gated")
def afcc(view: KernelView, options: MethodOptions) -> Array:
    """keep[o, i] = labels of o and labels of i intersect (for a classifier: label o is in a cluster of i)."""
    assert view.ends is not None
    return _pairs(intersect(view.ends.writes.labels, view.ends.reads.labels), view)


@method("andc", "weights between nodes without a common label on the diagonals of their matrices",
        "as the abstract of Koresh et al., Physica A 666 (2025) defines it", needs=("profiles",), kind="fixed nodal")  # fmt: skip
def andc(view: KernelView, options: MethodOptions) -> Array:
    """keep[o, i] = diagonals of o and i intersect: labels for which a node alone speaks on their own samples, at 0.3 of the most that it
    says. Nodes are those of feed-forward and attention parts; queries and keys stand for their head. The labels are those of `afcc`,
    whose clusters part the same diagonal; what differs is where it is applied."""
    return afcc(view, options)


@method("random-afcc", "AFCC with random label sets of the same sizes (its control)", SOURCE, needs=("profiles",), kind="fixed gated")
def random_afcc(view: KernelView, options: MethodOptions) -> Array:
    """AFCC on sets drawn per tensor, so that all layers that meet there see the same ones; class scores keep their labels."""
    assert view.ends is not None
    return _pairs(intersect(_shuffled(view.ends.writes, options.seed), _shuffled(view.ends.reads, options.seed)), view)


def _shuffled(profile: Profile, seed: int) -> BoolArray:
    if not np.isfinite(profile.snr):
        return profile.labels
    return even_labels(profile.labels.sum(1), profile.labels.shape[1], named_generator(seed, profile.name))


@method("soft-afcc", "as obs, and of related filters kernels that inhibit the like-minded or excite the opposed",
        "ours, after Tzach et al. (2025)", needs=("activations", "losses", "profiles"))  # fmt: skip
def soft_afcc(view: KernelView, options: MethodOptions) -> Array:
    """s[o, i] = obs[o, i] (1 + sign(sum_k W[o, i, k]) rho[o, i] / 8), rho: `correlation` of the profiles' evidence.

    Chosen with the re-fit on held-out training images: larger shares of rho, or its size without the sign, help masks that are not
    re-fitted and harm those that are (benchmarks/dilution.md).
    """
    assert view.ends is not None
    rho = _pairs(correlation(view.ends.writes.evidence, view.ends.reads.evidence), view)
    agreement = np.sign(tile_sums(view.values, KERNEL)) * rho
    return np.asarray(obs(view, options) * (1 + agreement / 8))


def correlation(writes: FloatArray, reads: FloatArray) -> FloatArray:
    """Correlation over labels of each pair of profiles (O, L) and (I, L): (O, I); 0 for constant profiles."""
    centred = [profiles - profiles.mean(1, keepdims=True) for profiles in (writes, reads)]
    norms = [np.linalg.norm(rows, axis=1, keepdims=True) for rows in centred]
    first, second = (rows / np.where(norm > 0, norm, 1) for rows, norm in zip(centred, norms, strict=True))
    return np.asarray(first @ second.T)
