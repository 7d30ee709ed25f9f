"""Scores that read class profiles: single filter performance as importance of a channel; what the profiles tell besides, and a few
filters for the report.

They need labels (or take the model's own answers) and a classifier. To register them costs nothing: what they need is imported when
they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ...core.errors import SfpError
from ...core.types import Array, FloatArray
from ...report import PLUGIN_SECTIONS, Section, heat_map, short_names
from ...scores.scoring import Scored, Setting, prepared
from ...scores.weights import per_unit, relative
from .probe import ProfileOptions

if TYPE_CHECKING:
    from ...coupling.analysis import Analysis, Progress
    from ...data.dataset import Dataset
    from ...planning.search import Candidates
    from .profiles import LayerProfile, Profiles

SOURCE = "Tzach et al., Phys. Rev. E 111, 065307 (2025)"
MATRIX_BYTES = 2**30
COLUMNS = {"probe_accuracy": ".1%", "cluster_size": ".2f", "clusters_per_filter": ".2f", "noise": ".1f", "snr": ".2f", "no_cluster": ".1%"}
Measure = Callable[["LayerProfile"], FloatArray]
"""One value per filter of a layer, (F,)."""


# ---- scores ----------------------------------------------------------------------------------------------------------


def _score(name: str, summary: str, source: str) -> Callable[[Measure], Measure]:
    """Register a measure of filters as a score: the mean over the profiled tensors of a group of the per-unit mean of filter values."""

    def register(measure: Measure) -> Measure:
        @prepared(name, summary, source, ProfileOptions)
        def prepare(analysis: Analysis, data: Dataset | None, setting: Setting) -> Scored:
            from ...scores.statistics import by_group
            from .profiles import class_profiles

            assert data is not None
            options = replace(setting.options, loss="probe-drop" in setting.names, seed=setting.seed)
            profiles = setting.once("class profiles", lambda: class_profiles(analysis, data, options, setting.progress))
            coupling, details = analysis.coupling, ProfileDetails(profiles)
            values = np.zeros(coupling.units)
            parts = [per_unit(layer.units, measure(layer), coupling.units) for layer in profiles.layers]
            for group, numbers in zip(coupling.groups, by_group(coupling, (layer.units for layer in profiles.layers)), strict=True):
                values[group.units] = sum((parts[at][group.units] for at in numbers), np.zeros(group.width)) / max(1, len(numbers))
            return Scored(name, values, notes=details.notes, arrays=details.arrays, details=details)

        return measure

    return register


def _each(layer: LayerProfile, value: Callable[[int], float]) -> FloatArray:
    """A value of every filter, relative to the mean of the layer."""
    return relative(np.array([value(index) for index in range(len(layer.units))]))


@_score("sfp", "largest class-mean field of the probe: how much the channel alone says for any label", SOURCE)
def sfp(layer: LayerProfile) -> FloatArray:
    """max over l, k of M_f[l, k], not normalised, relative to the mean of each layer.

    Chosen over the margin form, mean over l of (M[l, l] - mean_k M[l, k]), on held-out calibration images, top-1 after 20 / 40 % of the
    block-internal channels: ResNet-20 77.6 / 36.0 % (margin 80.7 / 22.5 %), ResNet-56 95.6 / 74.1 % (97.1 / 57.9 %), VGG-11 at
    10 / 20 % 65.7 / 27.1 % (78.3 / 34.5 %). The margin is better while little leaves, and falls behind by 13 to 16 points at 40 %.
    """
    return _each(layer, lambda index: max(0.0, float(layer.matrix(index).max())))


@_score("sfp-rms", "root mean square class-mean field of the probe: for and against all labels alike", "after " + SOURCE)
def sfp_rms(layer: LayerProfile) -> FloatArray:
    """sqrt(mean over l, k of M_f[l, k]^2), relative to the mean of each layer: signed and not normalised, so that a filter that speaks
    against labels counts as much as one that speaks for them. Not in the paper.

    Set up as in `sfp`: ResNet-20 82.1 / 38.1 %, ResNet-56 97.1 / 74.8 %, VGG-11 76.3 / 32.6 %.
    """
    return _each(layer, lambda index: float(np.sqrt((layer.matrix(index) ** 2).mean())))


@_score("sfp-clusters", "field inside the channel's clusters of labels", SOURCE)
def sfp_clusters(layer: LayerProfile) -> FloatArray:
    """sum over clusters c of sum over l, k in c of M_f[l, k], relative to the mean of each layer; 0 without clusters.

    Clusters as thresholded, fields as they are: counts alone (signal to noise, area minus noise) forget how strong a filter is.
    """

    def inside(index: int) -> float:
        field = layer.matrix(index)
        return float(sum(field[np.ix_(cluster, cluster)].sum() for cluster in layer.clusters[index]))

    return _each(layer, inside)


@_score("probe-drop", "factor by which the probe's probability of the true label falls without the channel", SOURCE)
def probe_drop(layer: LayerProfile) -> FloatArray:
    """exp(mean over samples of (cross-entropy of the probe without the channel's features - with them)).

    The loss, not the accuracy: that hardly moves for a single channel.
    """
    assert layer.loss_ratio is not None
    return layer.loss_ratio


# ---- what class profiles tell besides --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProfileDetails:
    """Class profiles for people, programs and files."""

    profiles: Profiles

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the labels."""
        known, notes = self.profiles, []
        if known.labels == "argmax":
            notes.append("no labels given: the model's own answers (argmax) stand for them")
        if known.missing:
            shown = ", ".join(map(str, known.missing[:10])) + (", ..." if len(known.missing) > 10 else "")
            notes.append(f"{len(known.missing)} of {known.classes} labels have no sample and no part in the profiles: {shown}")
        if known.trained + known.held_out < known.samples:
            notes.append(f"probes use {known.trained + known.held_out} of {known.samples} samples (room for features)")
        return (*notes, *(f"tensor '{name}' has no class profile: {reason}" for name, reason in known.skipped))

    def data(self) -> dict[str, Any]:
        """What `score --json` shows. JSON has no infinity: a signal-to-noise ratio without noise is null."""
        known, layers = self.profiles, []
        for layer in known.layers:
            figures = {key: value if np.isfinite(value) else None for key, value in layer.statistics.items()}
            layers.append({"layer": layer.layer, "tensor": layer.tensor, "filters": len(layer.units), **figures})
        shown = {key: getattr(known, key) for key in ("classes", "labels", "missing", "samples", "trained", "held_out")}
        skipped = [{"tensor": tensor, "reason": reason} for tensor, reason in known.skipped]
        return {"profiles": {**shown, "layers": layers, "skipped": skipped}}

    def text(self) -> str:
        """A table of the layers."""
        from ...report.text import table

        known, figures = self.profiles, [layer.statistics for layer in self.profiles.layers]
        rows = [[format(values[key], style) for key, style in COLUMNS.items()] for values in figures]
        rows = [[layer.layer, str(len(layer.units)), *row] for layer, row in zip(known.layers, rows, strict=True)]
        header = ["layer", "filters", "probe acc.", "cluster size", "clusters/filter", "noise", "SNR", "no cluster"]
        where = f"{known.held_out} held-out samples" if known.held_out else "the training samples (too few to hold out)"
        last = f"{known.samples} samples, {known.classes} labels ({known.labels}); probe accuracy on {where}"
        return "\n".join([table(header, rows), "", last])

    def brief(self) -> Examples:
        """A filter of a layer early, in the middle and last: the profiles themselves may take gigabytes."""
        return Examples(map(FilterExample.best, _three([layer for layer in self.profiles.layers if len(layer.units)])))

    def arrays(self) -> Iterable[tuple[str, Array]]:
        """What `score --save` writes: ``layer_names``, ``tensors``, ``probe_accuracy``, and per layer i ``i/units``, ``i/matrices``
        (F, L, L), ``i/label_sets`` (F, L), ``i/noise``, ``i/means`` and ``i/weights`` (F, P, L); cluster c of all has the filter
        ``i/cluster_filter[c]`` and the labels ``i/cluster_labels[i/cluster_offsets[c]:i/cluster_offsets[c + 1]]``. Matrices are left out
        where those of all layers would take more than 1 GiB (they are the products of means and weights)."""
        layers = self.profiles.layers
        yield "layer_names", np.array([layer.layer for layer in layers], np.str_)
        yield "tensors", np.array([layer.tensor for layer in layers], np.str_)
        yield "probe_accuracy", np.array([layer.accuracy for layer in layers])
        yield "missing_labels", np.array(self.profiles.missing, np.int64)
        whole = sum(len(layer.units) for layer in layers) * self.profiles.classes**2 * 4 <= MATRIX_BYTES
        for index, layer in enumerate(layers):
            yield from ((f"{index}/{name}", array) for name, array in _layer_arrays(layer, whole))


def _layer_arrays(layer: LayerProfile, whole: bool) -> Iterable[tuple[str, Array]]:
    clusters = [(index, cluster) for index, every in enumerate(layer.clusters) for cluster in every]
    names = ("units", "filters", *(["matrices"] if whole else []), "means", "weights", "label_sets", "noise")
    yield from ((name, getattr(layer, name)) for name in names)
    yield "cluster_filter", np.array([index for index, _ in clusters], np.int64)
    yield "cluster_offsets", np.cumsum([0, *(len(cluster) for _, cluster in clusters)])
    yield "cluster_labels", np.array([label for _, cluster in clusters for label in cluster], np.int64)


# ---- a few filters in the report -------------------------------------------------------------------------------------

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

    @classmethod
    def best(cls, layer: LayerProfile) -> FilterExample:
        """The filter of a layer with the most ones inside its clusters and the fewest outside."""
        best = int(np.argmax(layer.signal - layer.noise))
        return cls(layer.layer, best, layer.accuracy, layer.matrix(best), layer.clusters[best])


class Examples(tuple[FilterExample, ...]):
    """A few filters that show what class profiles say."""


def _three(items: Sequence[T]) -> list[T]:
    """Those at a third, at two thirds, and the last."""
    return [items[index] for index in sorted({min(int(len(items) * place), len(items) - 1) for place in PLACES})] if items else []


def few_examples(analysis: Analysis, data: Dataset | None, progress: Progress | None = None) -> Examples:
    """The same from profiles of a layer early, one in the middle and the last alone, on at most `SAMPLES` samples; none where there is no
    classifier or no data."""
    from ...coupling.analysis import silent
    from .profiles import class_profiles

    if data is None:
        return Examples()
    if data.samples > SAMPLES:
        data = data.part(np.sort(np.random.default_rng(0).choice(data.samples, SAMPLES, replace=False)))
    try:
        layers = class_profiles(analysis, data, ProfileOptions(), progress or silent, _three).layers
    except SfpError:
        return Examples()  # a report can do without
    return Examples(FilterExample.best(layer) for layer in layers if len(layer.units))


def _section(scored: Candidates, data: Dataset | None, progress: Progress) -> list[Section]:
    """What single filters recognise, for the report."""
    charts, names = [], () if data is None else data.class_names
    for example in scored.details if isinstance(scored.details, Examples) else few_examples(scored.analysis, data, progress):
        told = f"{len(example.clusters)} clusters" if len(example.clusters) != 1 else "one cluster"
        title = f"{short_names([example.layer])[0]}, filter {example.filter}: {told}; probe accuracy of the layer {example.accuracy:.1%}"
        charts.append(heat_map(title, example.matrix, example.clusters, names))
    words = ("Single filter performance (Tzach et al., Phys. Rev. E 111, 065307): how strongly one filter speaks for each output (columns) "
             "on samples of each label (rows). Red: for it, blue: against it. Framed: clusters of labels that the filter recognises "
             "together.")  # fmt: skip
    return [Section("What single filters recognise", (words,), tuple(charts))] if charts else []


PLUGIN_SECTIONS.append(_section)
