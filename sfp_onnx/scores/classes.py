"""Scores that read class profiles: single filter performance as importance of a channel.

They need labels (or take the model's own answers) and a classifier.
"""

from __future__ import annotations

import numpy as np

from ..records import FloatArray, GroupView, LayerProfile, ScoreOptions
from .registry import score
from .weights import per_unit, relative

SOURCE = "Tzach et al., Phys. Rev. E 111, 065307 (2025)"


def _over_profiles(view: GroupView, values: list[FloatArray]) -> FloatArray:
    """Mean over the profiled tensors of the per-unit mean of filter values."""
    total = np.zeros(view.width)
    for (unit, _), own in zip(view.profiles, values, strict=True):
        total += per_unit(unit, own, view.width)
    return total / max(1, len(view.profiles))


@score("sfp", "largest class-mean field of the probe: how much the channel alone says for any label", SOURCE, ("profile",))
def sfp(view: GroupView, options: ScoreOptions) -> FloatArray:
    """max over l, k of M_f[l, k], not normalised, relative to the mean of each layer."""
    return _over_profiles(view, [relative(np.array([_largest(own, f) for f in range(len(own.units))])) for _, own in view.profiles])


def _largest(profile: LayerProfile, index: int) -> float:
    return max(0.0, float(profile.matrix(index).max()))


@score("sfp-clusters", "field inside the channel's clusters of labels", SOURCE, ("profile",))
def sfp_clusters(view: GroupView, options: ScoreOptions) -> FloatArray:
    """sum over clusters c of sum over l, k in c of M_f[l, k], relative to the mean of each layer; 0 without clusters.

    Clusters as thresholded, fields as they are: counts alone (signal to noise, area minus noise) forget how strong a filter is.
    """
    return _over_profiles(view, [relative(np.array([_inside(own, f) for f in range(len(own.units))])) for _, own in view.profiles])


def _inside(profile: LayerProfile, index: int) -> float:
    field = profile.matrix(index)
    return float(sum(field[np.ix_(own, own)].sum() for own in profile.clusters[index]))


@score("probe-drop", "factor by which the probe's probability of the true label falls without the channel", SOURCE, ("profile", "loss"))
def probe_drop(view: GroupView, options: ScoreOptions) -> FloatArray:
    """exp(mean over samples of (cross-entropy of the probe without the channel's features - with them)).

    The loss, not the accuracy: that hardly moves for a single channel.
    """
    return _over_profiles(view, [own.loss_ratio for _, own in view.profiles if own.loss_ratio is not None])
