"""Score units, profile layers by class, and write both to a file."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import DataError, OutputError
from ..core.options import BanditOptions, RepairOptions, ScoreOptions, byte_size, seconds
from ..core.types import Array, FloatArray, LayerProfile, Moments, Profiles
from ..coupling.analysis import Analysis, Progress, batch_size, feeds_of, pass_batches, silent
from ..data.dataset import Dataset
from ..graph.save import atomic, check_output
from ..methods.bandits import BANDIT_SCORES, PREFIX
from ..methods.bandits.pulling import STAND_IN, search
from ..methods.sfp import examples_of as examples_of, profiles
from ..methods.sfp.profiles import ProfileOptions, classes_of, taps
from .elimination import Elimination, elimination
from .registry import SCORES, combined, parts
from .statistics import calibrate, sites, views

MATRIX_BYTES = 2**30
PROFILE, MOMENTS = frozenset({"profile", "loss"}), frozenset({"squares", "zeros"})
ELIMINATION_ROWS = 32.0  # per input of a layer: half of what the repair takes, since the order of units needs less


@dataclass(frozen=True)
class Scored:
    """Importance per unit of a model (larger = keep), the class profiles that it came from, if it needed any, (`obs`) the error of
    each group by the number of units that it keeps, and (`bandit:*`) what every arm was seen to do."""

    name: str
    values: FloatArray
    profiles: Profiles | None = None
    errors: Mapping[str, FloatArray] = field(default_factory=dict)
    said: tuple[str, ...] = ()
    arms: Mapping[str, Array] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the labels of the profiles."""
        found = self.profiles
        if found is None:
            return self.said
        notes = list(self.said)
        if found.labels == "argmax":
            notes.append("no labels given: the model's own answers (argmax) stand for them")
        if found.missing:
            shown = ", ".join(map(str, found.missing[:10])) + (", ..." if len(found.missing) > 10 else "")
            notes.append(f"{len(found.missing)} of {found.classes} labels have no sample and no part in the profiles: {shown}")
        if found.trained + found.held_out < found.samples:
            notes.append(f"probes use {found.trained + found.held_out} of {found.samples} samples (room for features)")
        return (*notes, *(f"tensor '{name}' has no class profile: {reason}" for name, reason in found.skipped))


def score(
    analysis: Analysis, name: str, data: Dataset | None = None, options: ScoreOptions | None = None, progress: Progress = silent
) -> FloatArray:
    """Importance per unit of the model (larger = keep). See `scored`."""
    return scored(analysis, name, data, options, progress).values


def scored(
    analysis: Analysis,
    name: str,
    data: Dataset | None = None,
    options: ScoreOptions | None = None,
    progress: Progress = silent,
    known: Profiles | None = None,
    aim: Any = None,
) -> Scored:
    """Importance per unit of the model. Names joined by ``+`` mean the average of the scores' ranks within each group.

    Args:
        known: class profiles of this model from `profile`, so that several scores share them (with ``loss`` for `probe-drop`).

    Raises:
        OptionError: unknown score or probe.
        DataError: the score needs data and there are none, or too few; see `profile`.
        ModelError: the score needs a classifier.
    """
    if name.startswith(PREFIX):
        searched = search(analysis, name, data, options or ScoreOptions(), aim or (STAND_IN, analysis.coupling.groups), progress)
        return Scored(name, searched.scores, said=searched.notes, arms=searched.arms)
    chosen = parts(name)
    needs = frozenset[str]().union(*(own.needs for own in chosen))
    options = options or ScoreOptions()
    moments: Mapping[tuple[str, int], Moments] = {}
    found: Profiles | None = None
    eliminated: Elimination | None = None
    if needs:
        if data is None:
            free = ", ".join(sorted(own.name for own in SCORES.values() if not own.needs))
            raise DataError(f"score '{name}' needs calibration data: give --data, or use a score that needs none: {free}")
        if needs & PROFILE:
            found = known or profile(analysis, data, ProfileOptions(options.probe, options.pool, "loss" in needs, options.seed), progress)
        if "elimination" in needs:
            eliminated = _elimination(analysis, data, options, progress)
        if needs & MOMENTS:
            moments = _moments(analysis, needs & MOMENTS, data, progress)
    values = np.zeros(analysis.coupling.units)
    seen = views(analysis.prepared, analysis.coupling, moments, found.layers if found else (), _by_group(analysis, eliminated))
    for group, view in zip(analysis.coupling.groups, seen, strict=True):
        values[group.units] = combined([own.function(view, options) for own in chosen])
    notes: tuple[str, ...] = ()
    if eliminated and eliminated.blind:
        notes = (f"{len(eliminated.blind)} groups are read by no layer that could be re-fitted; `magnitude` stands for `obs` there",)
    return Scored(name, values, found, eliminated.errors if eliminated and name == "obs" else {}, notes)


SCORE_NAMES = (*sorted(SCORES), *BANDIT_SCORES)


def default_score(data: Dataset | None, repair: RepairOptions | None = None) -> str:
    """The score that is used if none is named: `obs` knows the least-squares repair that follows."""
    if data is None:
        return "magnitude"
    return "obs" if repair is not None and repair.fit == "lstsq" else "contribution"


def meaning(name: str) -> str:
    """A score's summary, behind a colon; empty for what has none."""
    known = SCORES.get(name)
    return f": {known.summary}" if known else ""


def asked(text: str | None, seed: int = 0, memory: int = 2 * 10**9) -> tuple[str | None, ScoreOptions]:
    """Read ``NAME[+NAME..][,option=value..]``."""
    plain = ScoreOptions(seed=seed, memory=memory)
    if text is None:
        return None, plain
    name, *given = text.split(",")
    values = dict(item.split("=", 1) for item in given)
    if name.startswith(PREFIX):
        readers: dict[str, tuple[str, Any]] = {
            "pulls": ("pulls", int), "budget": ("budget", seconds), "batch": ("pull_batch", int), "epsilon": ("epsilon", float),
            "temperature": ("temperature", float), "reward": ("reward", str), "memory": ("pull_memory", byte_size),
            "traces": ("traces", str),
        }  # fmt: skip
        own = {readers[key][0]: readers[key][1](value) for key, value in values.items()}
        return name, replace(plain, bandit=BanditOptions(**own))
    kinds: dict[str, Any] = {"p": int, "probe": str, "pool": int}
    return "+".join(part.name for part in parts(name)), replace(plain, **{key: kinds[key](value) for key, value in values.items()})


def _by_group(analysis: Analysis, eliminated: Elimination | None) -> dict[str, FloatArray]:
    if eliminated is None:
        return {}
    return {group.name: eliminated.scores[group.units] for group in analysis.coupling.groups if group.name in eliminated.errors}


def _elimination(analysis: Analysis, data: Dataset, options: ScoreOptions, progress: Progress) -> Elimination:
    with progress("eliminating", len(analysis.coupling.layers)) as advance:
        chosen = RepairOptions(seed=options.seed, rows_per_input=ELIMINATION_ROWS, memory=options.memory)
        return elimination(analysis.prepared, analysis.coupling, feeds_of(analysis, data), chosen, lambda done, total: advance(1))


def _moments(analysis: Analysis, needs: frozenset[str], data: Dataset, progress: Progress) -> Mapping[tuple[str, int], Moments]:
    ranks = {name: len(shape) for name, shape in analysis.prepared.trace.shapes.items()}
    with progress("calibrating", data.samples) as advance:
        model, wanted = analysis.prepared.model, sites(analysis.coupling)
        return calibrate(model, ranks, wanted, needs, replace(data, batch=batch_size(analysis, data)).batches(), advance).moments


def profile(analysis: Analysis, data: Dataset, options: ProfileOptions | None = None, progress: Progress = silent) -> Profiles:
    """Class profiles of all layers of a classifier, by the labels of the data or else the model's own answers.

    Raises:
        ModelError: the model is no classifier.
        DataError: one label only, fewer samples than labels, labels out of range, activations that are not finite.
        OptionError, OutputError: bad options, no room for temporary files.
    """
    options = options or ProfileOptions()
    options.check()
    free = ", ".join(sorted(own.name for own in SCORES.values() if not own.needs & PROFILE))
    output = classes_of(analysis.prepared, analysis.samples, free)
    chosen, skipped = taps(analysis.prepared, analysis.coupling, analysis.samples, options.pool)
    batches = pass_batches(analysis, data)
    found = profiles.profile(analysis.prepared, chosen, output, (batches, data.samples, data.labels), options, free, progress)
    return replace(found, skipped=tuple(skipped))


# ---- files -----------------------------------------------------------------------------------------------------------


def save_scores(path: Path, analysis: Analysis, found: Scored, inputs: Iterable[Path] = ()) -> None:
    """Write scores, and profiles if there are any, as .npz, atomically; equal results give equal bytes.

    ``groups`` (G,) names, ``scores`` of all groups one after the other, those of group g at ``offsets[g]:offsets[g + 1]``. Of a bandit
    search, per arm: ``arms/units``, ``arms/pulls``, ``arms/mean`` reward and ``arms/half_width`` of its 95 % interval. With profiles,
    per layer i: ``layer_names``, ``tensors``, ``probe_accuracy``, and ``i/units``, ``i/matrices`` (F, L, L),
    ``i/label_sets`` (F, L), ``i/noise``, ``i/means`` and ``i/weights`` (F, P, L); cluster c of all has the filter
    ``i/cluster_filter[c]`` and the labels ``i/cluster_labels[i/cluster_offsets[c]:i/cluster_offsets[c + 1]]``. Matrices are left out
    where those of all layers would take more than 1 GiB (they are the products of means and weights).

    Raises:
        OutputError: the path cannot be written.
    """
    check_output(path, inputs)
    try:
        with atomic(path) as (stream,), zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, array in _arrays(analysis, found):
                entry = zipfile.ZipInfo(f"{name}.npy")  # its time is fixed, unlike that of `write`
                entry.compress_type = zipfile.ZIP_DEFLATED
                with archive.open(entry, "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
    except OSError as error:
        raise OutputError(f"{path}: cannot write: {error.strerror or error}") from error


def _arrays(analysis: Analysis, found: Scored) -> Iterable[tuple[str, Array]]:
    groups = analysis.coupling.groups
    yield "groups", np.array([group.name for group in groups], np.str_)
    yield "offsets", np.cumsum([0, *(group.width for group in groups)])
    yield "scores", found.values[np.concatenate([group.units for group in groups])] if groups else np.zeros(0)
    yield from ((f"arms/{name}", array) for name, array in found.arms.items())
    if found.profiles is None:
        return
    layers = found.profiles.layers
    yield "layer_names", np.array([layer.layer for layer in layers], np.str_)
    yield "tensors", np.array([layer.tensor for layer in layers], np.str_)
    yield "probe_accuracy", np.array([layer.accuracy for layer in layers])
    yield "missing_labels", np.array(found.profiles.missing, np.int64)
    whole = sum(len(layer.units) for layer in layers) * found.profiles.classes**2 * 4 <= MATRIX_BYTES
    for index, layer in enumerate(layers):
        yield from ((f"{index}/{name}", array) for name, array in _layer_arrays(layer, whole))


def _layer_arrays(layer: LayerProfile, whole: bool) -> Iterable[tuple[str, Array]]:
    clusters = [(index, own) for index, every in enumerate(layer.clusters) for own in every]
    yield "units", layer.units
    yield "filters", layer.filters
    if whole:
        yield "matrices", layer.matrices
    yield "means", layer.means
    yield "weights", layer.weights
    yield "label_sets", layer.label_sets
    yield "noise", layer.noise
    yield "cluster_filter", np.array([index for index, _ in clusters], np.int64)
    yield "cluster_offsets", np.cumsum([0, *(len(own) for _, own in clusters)])
    yield "cluster_labels", np.array([label for _, own in clusters for label in own], np.int64)
