"""Scores that read class profiles: single filter performance as importance of a channel.

They need labels (or take the model's own answers) and a classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from ...core.errors import SfpError
from ...core.options import ScoreOptions
from ...core.types import FloatArray, GroupView, LayerProfile, Profiles
from ...coupling.analysis import Analysis, Progress, batch_size, silent
from ...data.dataset import Dataset
from ...planning.search import Candidates
from ...report import Section, heat_map, short_names
from ...report.page import PLUGIN_SECTIONS
from ...scores.registry import score
from ...scores.weights import per_unit, relative
from . import profiles
from .profiles import ProfileOptions, classes_of

SOURCE = "Tzach et al., Phys. Rev. E 111, 065307 (2025)"


def _of_matrices(view: GroupView, measure: Callable[[LayerProfile, int], float]) -> FloatArray:
    """`_over_profiles` of a measure of each filter's matrix, relative to the mean of the layer."""
    every = [np.array([measure(profile, index) for index in range(len(profile.units))]) for _, profile in view.profiles]
    return _over_profiles(view, [relative(own) for own in every])


def _over_profiles(view: GroupView, values: list[FloatArray]) -> FloatArray:
    """Mean over the profiled tensors of the per-unit mean of filter values."""
    total = np.zeros(view.width)
    for (unit, _), own in zip(view.profiles, values, strict=True):
        total += per_unit(unit, own, view.width)
    return total / max(1, len(view.profiles))


@score("sfp", "largest class-mean field of the probe: how much the channel alone says for any label", SOURCE, ("profile",))
def sfp(view: GroupView, options: ScoreOptions) -> FloatArray:
    """max over l, k of M_f[l, k], not normalised, relative to the mean of each layer.

    Chosen over the margin form, mean over l of (M[l, l] - mean_k M[l, k]), on held-out calibration images, top-1 after 20 / 40 % of the
    block-internal channels: ResNet-20 77.6 / 36.0 % (margin 80.7 / 22.5 %), ResNet-56 95.6 / 74.1 % (97.1 / 57.9 %), VGG-11 at
    10 / 20 % 65.7 / 27.1 % (78.3 / 34.5 %). The margin is better while little leaves, and falls behind by 13 to 16 points at 40 %.
    """
    return _of_matrices(view, lambda profile, index: max(0.0, float(profile.matrix(index).max())))


@score("sfp-rms", "root mean square class-mean field of the probe: for and against all labels alike", "after " + SOURCE, ("profile",))
def sfp_rms(view: GroupView, options: ScoreOptions) -> FloatArray:
    """sqrt(mean over l, k of M_f[l, k]^2), relative to the mean of each layer: signed and not normalised, so that a filter that speaks
    against labels counts as much as one that speaks for them. Not in the paper.

    Set up as in `sfp`: ResNet-20 82.1 / 38.1 %, ResNet-56 97.1 / 74.8 %, VGG-11 76.3 / 32.6 %.
    """
    return _of_matrices(view, lambda profile, index: float(np.sqrt((profile.matrix(index) ** 2).mean())))


@score("sfp-clusters", "field inside the channel's clusters of labels", SOURCE, ("profile",))
def sfp_clusters(view: GroupView, options: ScoreOptions) -> FloatArray:
    """sum over clusters c of sum over l, k in c of M_f[l, k], relative to the mean of each layer; 0 without clusters.

    Clusters as thresholded, fields as they are: counts alone (signal to noise, area minus noise) forget how strong a filter is.
    """
    return _of_matrices(view, _inside)


def _inside(profile: LayerProfile, index: int) -> float:
    field = profile.matrix(index)
    return float(sum(field[np.ix_(own, own)].sum() for own in profile.clusters[index]))


@score("probe-drop", "factor by which the probe's probability of the true label falls without the channel", SOURCE, ("profile", "loss"))
def probe_drop(view: GroupView, options: ScoreOptions) -> FloatArray:
    """exp(mean over samples of (cross-entropy of the probe without the channel's features - with them)).

    The loss, not the accuracy: that hardly moves for a single channel.
    """
    return _over_profiles(view, [own.loss_ratio for _, own in view.profiles if own.loss_ratio is not None])


# ---- A few filters that show what class profiles say -----------------------------------------------------------------

PLACES = (1 / 3, 2 / 3, 1.0)
SAMPLES = 1024
T = TypeVar("T")


@dataclass(frozen=True)
class FilterExample:
    """One filter: its matrix (L, L), the field of each output of the probe on samples of each label, and the clusters in it."""

    layer: str
    filter: int
    accuracy: float
    matrix: FloatArray
    clusters: tuple[tuple[int, ...], ...]


def examples_of(known: Profiles | None) -> tuple[FilterExample, ...]:
    """The filter with the most ones inside its clusters and the fewest outside, from layers early, in the middle and last."""
    return _shown(_three([layer for layer in known.layers if len(layer.units)] if known else []))


def _shown(layers: Iterable[LayerProfile]) -> tuple[FilterExample, ...]:
    found = []
    for layer in layers:
        best = int(np.argmax(layer.signal - layer.noise))
        found.append(FilterExample(layer.layer, best, layer.accuracy, layer.matrix(best), layer.clusters[best]))
    return tuple(found)


def _three(items: Sequence[T]) -> list[T]:
    """Those at a third, at two thirds, and the last."""
    return [items[index] for index in sorted({min(int(len(items) * place), len(items) - 1) for place in PLACES})] if items else []


def few_examples(analysis: Analysis, data: Dataset | None, seed: int = 0, progress: Progress = silent) -> tuple[FilterExample, ...]:
    """The same from profiles of these three layers alone, on at most `SAMPLES` samples; none where there is no classifier or no data."""
    if data is None:
        return ()
    if data.samples > SAMPLES:
        data = data.part(np.sort(np.random.default_rng(seed).choice(data.samples, SAMPLES, replace=False)))
    options = ProfileOptions(seed=seed)
    try:
        output = classes_of(analysis.prepared, analysis.samples, "")
        taps, _ = profiles.taps(analysis.prepared, analysis.coupling, analysis.samples, options.pool)
        batches = replace(data, batch=batch_size(analysis, data)).batches()
        found = profiles.profile(analysis.prepared, _three(taps), output, (batches, data.samples, data.labels), options, "", progress)
    except SfpError:
        return ()  # a report can do without
    return _shown(layer for layer in found.layers if len(layer.units))


def _section(scored: Candidates, data: Dataset | None, progress: Progress) -> list[Section]:
    """What single filters recognise, for the report."""
    examples = scored.examples or few_examples(scored.analysis, data, progress=progress)
    if not examples:
        return []
    charts = []
    for example in examples:
        told = f"{len(example.clusters)} clusters" if len(example.clusters) != 1 else "one cluster"
        title = f"{short_names([example.layer])[0]}, filter {example.filter}: {told}; probe accuracy of the layer {example.accuracy:.1%}"
        charts.append(heat_map(title, example.matrix, example.clusters))
    words = (
        "Single filter performance (Tzach et al., Phys. Rev. E 111, 065307): how strongly one filter speaks for each output (columns) on "
        "samples of each label (rows). Red: for it, blue: against it. Framed: clusters of labels that the filter recognises together.",
    )
    return [Section("What single filters recognise", words, tuple(charts))]


PLUGIN_SECTIONS.append(_section)
