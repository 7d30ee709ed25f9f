"""What stages find out: sizes, plans, cuts, statistics, fits, measurements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import BoolArray, FloatArray, IntArray


@dataclass(frozen=True)
class Size:
    """Size of a model. ``macs`` are multiply-accumulates for one sample; ``bytes`` is the size of the saved model."""

    macs: float
    params: int
    bytes: int | None = None


@dataclass(frozen=True)
class GroupPlan:
    """What leaves one group: ``remove`` are positions 0 .. width - 1 in the group."""

    group: str
    producers: tuple[str, ...]
    width: int
    remove: tuple[int, ...]
    macs_before: float
    macs_after: float


@dataclass(frozen=True)
class Plan:
    """Which units leave, decided before anything is cut. ``figures`` gives, for each target's figure, ``before``, ``bound``, ``predicted``
    and ``actual`` (macs, params: counts; size, memory: bytes; latency: seconds)."""

    model_sha256: str
    groups: tuple[GroupPlan, ...]
    options: Mapping[str, Any]
    before: Size
    after: Size
    notes: tuple[str, ...] = ()
    figures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Cut:
    """One axis of an activation tensor of the original graph that lost channels (or of a recurrence weight, whose input axis
    is where the removed hidden units are read again). In a quantised tensor a removed channel stands at the value of the tensor
    ``zero_point``, otherwise at 0."""

    tensor: str
    axis: int
    size: int
    rank: int
    removed: tuple[int, ...]
    zero_point: str | None = None


@dataclass(frozen=True)
class Verification:
    """Largest relative difference between the pruned model and the masked original, per kind of input."""

    errors: Mapping[str, float]
    tolerance: float


@dataclass(frozen=True)
class Moments:
    """Per-channel sums of one tensor over all samples and positions (float64), mergeable by addition.

    ``squares`` and ``zeros`` are (channels,); ``count`` is the number of positions that each sum runs over.
    """

    squares: FloatArray
    zeros: FloatArray
    count: float


@dataclass(frozen=True)
class LayerProfile:
    """What the filters of one layer say about the labels: single filter performance (Tzach et al., Phys. Rev. E 111, 065307).

    F filters, P pooled positions, L labels. The filters are the channels of ``tensor`` along ``axis``, which mixing layers read and
    ``layer`` made (the last mixing layer before it); columns of a flattened map that hold one unit are one filter.

    filters: (C,) the filter of each index of ``axis``. units: (F,) the unit of each filter, -1 if it cannot be removed.
    means: (F, P, L) mean of the feature over the samples of each label (0 for labels without samples).
    weights: (F, P, L) weights of the probe (0 for labels without samples).
    clusters: per filter its clusters, each the labels in it. label_sets: (F, L) whether the label is in a cluster of the filter.
    noise: (F,) ones of the thresholded matrix outside the clusters. accuracy: that of the probe.
    loss_ratio: (F,) factor by which the probe's probability of the true label falls without the filter; None if not asked for.
    """

    layer: str
    tensor: str
    axis: int
    filters: IntArray
    units: IntArray
    means: NDArray[np.float32]
    weights: NDArray[np.float32]
    clusters: tuple[tuple[tuple[int, ...], ...], ...]
    label_sets: BoolArray
    noise: IntArray
    accuracy: float
    loss_ratio: FloatArray | None = None

    def matrix(self, index: int) -> FloatArray:
        """M_f[l, k] = sum_pos mean_l[f, pos] W[f, pos, k], (L, L) in float64: the field of output k on samples of label l."""
        field: FloatArray = self.means[index].astype(np.float64).T @ self.weights[index].astype(np.float64)
        return field

    @property
    def matrices(self) -> NDArray[np.float32]:
        """(F, L, L): `matrix` of every filter."""
        shape = (len(self.units), self.label_sets.shape[1], self.label_sets.shape[1])
        return np.stack([self.matrix(index) for index in range(shape[0])]).astype(np.float32).reshape(shape)

    @property
    def signal(self) -> IntArray:
        """(F,): ones inside the clusters."""
        return np.array([sum(len(own) ** 2 for own in clusters) for clusters in self.clusters], np.int64)

    @property
    def statistics(self) -> dict[str, float]:
        """Means over the filters (of size and noise: over clusters, and over filters that have one). ``snr`` is the number of ones
        inside the clusters by the number outside, of all filters together; infinite without noise, 0 without clusters."""
        sizes = [len(own) for clusters in self.clusters for own in clusters]
        counts = np.array([len(clusters) for clusters in self.clusters])
        inside, outside = int(self.signal.sum()), int(self.noise.sum())
        return {
            "probe_accuracy": self.accuracy,
            "cluster_size": float(np.mean(sizes)) if sizes else 0.0,
            "clusters_per_filter": float(counts.mean()),
            "labels_per_filter": float(self.label_sets.sum(1).mean()),
            "one_cluster": float((counts == 1).mean()),
            "noise": float(self.noise[counts > 0].mean()) if sizes else 0.0,
            "snr": inside / outside if outside else float("inf") if inside else 0.0,
            "no_cluster": float((counts == 0).mean()),
        }


@dataclass(frozen=True)
class Profiles:
    """Class profiles of all layers of a classifier with ``classes`` labels, from ``samples`` samples.

    ``labels`` says whose labels were used: "given" or the model's own "argmax"; ``missing`` are labels without any sample.
    The probes saw ``trained`` samples, and their accuracy is that on ``held_out`` others (0: on the trained ones).
    ``skipped`` are (tensor, reason) of what mixing layers read and has no profile.
    """

    layers: tuple[LayerProfile, ...]
    classes: int
    labels: str
    missing: tuple[int, ...]
    samples: int
    trained: int
    held_out: int
    skipped: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class WeightSlices:
    """The weight of one layer, seen along the axis that makes or reads the units of a group.

    ``values`` is (k, m), one row per channel of that axis of the layer; ``unit`` (k,) is the position in the group or -1;
    ``role`` is "out" (rows make channels), "in" (rows read them) or "through" (depthwise: both). ``rms`` and ``zeros`` (k,)
    are root mean square and share of zeros of the activation that each row reads, where it was calibrated.
    """

    layer: str
    role: str
    unit: IntArray
    values: NDArray[np.floating[Any]]
    rms: FloatArray | None = None
    zeros: FloatArray | None = None


@dataclass(frozen=True)
class GroupView:
    """All that a score may look at for one group of ``width`` units. ``gammas`` are (unit, |gamma|) of every
    BatchNormalization on the group; ``index`` is the position of the group in the model. ``profiles`` are (position in the group of
    each filter or -1, class profiles) of every tensor with the group's units that was profiled. ``elimination`` is what each unit adds
    to the error in a backward elimination, None where no layer that could be re-fitted reads the group."""

    name: str
    index: int
    width: int
    weights: tuple[WeightSlices, ...]
    gammas: tuple[tuple[IntArray, FloatArray], ...]
    profiles: tuple[tuple[IntArray, LayerProfile], ...] = ()
    elimination: FloatArray | None = None


@dataclass(frozen=True)
class LayerFit:
    """What the repair did to one layer: ``kind`` is "weights", "bias", "unchanged" (nothing helped) or "kept" (it cannot be re-fitted);
    errors are those of its target on held-out rows, relative to the target's variance."""

    layer: str
    kind: str
    ridge: float
    rows: int
    error_before: float
    error_after: float


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model on data; None where it does not apply. ``latency_ratio`` is to the first model, from
    the minima of interleaved runs."""

    model: str
    samples: int
    top1: float | None
    agreement: float | None
    kl: float | None
    relative_error: float | None
    size: Size
    latency_min_ms: float | None = None
    latency_median_ms: float | None = None
    latency_ratio: float | None = None
