"""What a dilution method may look at, and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..records import Array, BoolArray, FloatArray, IntArray


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
