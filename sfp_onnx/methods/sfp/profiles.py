"""Class profiles of all layers from one streaming pass: features pooled inside the graph, class sums in float64, features on disk.

What stays in memory does not depend on the number of samples, but for a label and a hash per sample. The features of the samples that
train the probes go to an unnamed temporary file of at most `FEATURE_BYTES`, which disappears with the process, however that ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from zlib import crc32

import numpy as np

from ...core.errors import DataError, ModelError
from ...core.types import Array, BoolArray, Coupling, FloatArray, IntArray, Shown
from ...coupling.analysis import Analysis, Progress, pass_batches, silent
from ...data.dataset import Dataset
from ...graph import Model, Prepared, edit, outputs
from ...runtime import Batches, observe
from ...scores.scoring import SCORES, OfGroups
from .probe import PROBES, Floats, ProfileOptions, Samples, Store, accuracy, by_filter, fields, held_out_rows, label_sets, loss_ratios, room

FEATURE_BYTES = 4 * 2**30
FEW = 10  # with fewer samples per label than this none is held out
LOSS_SAMPLES = 1000
FLOATS, FIRST_MAX_RANK = "f", 5
Advance = Callable[[int], None]


# ---- what is known in the end ----------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class LayerProfile(Shown):
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
    means: Floats
    weights: Floats
    clusters: tuple[tuple[tuple[int, ...], ...], ...]
    label_sets: BoolArray
    noise: IntArray
    accuracy: float
    loss_ratio: FloatArray | None = None

    def summary(self) -> str:
        """The layer, its filters, and how right the probe is."""
        return f"{self.layer}, {len(self.units)} filters, probe {self.accuracy:.1%} right"

    def matrix(self, index: int) -> FloatArray:
        """M_f[l, k] = sum_pos mean_l[f, pos] W[f, pos, k], (L, L) in float64: the field of output k on samples of label l."""
        return fields(self.means[index], self.weights[index])

    @property
    def matrices(self) -> Floats:
        """(F, L, L): `matrix` of every filter."""
        shape = (len(self.units), self.label_sets.shape[1], self.label_sets.shape[1])
        return np.stack([self.matrix(index) for index in range(shape[0])]).astype(np.float32).reshape(shape)

    def heads(self) -> LayerProfile | None:
        """Each head of an attention as one filter (its dimensions share a unit; None: no units are shared): the fields of its dimensions
        add up, as all other heads are silent (after Koresh et al., Physica A 666, 2025)."""
        every = np.array(list(dict.fromkeys(self.units.tolist())), np.int64)
        rows = [np.flatnonzero(self.units == unit) for unit in every]
        if len(every) == len(self.units) or (every < 0).any() or len({len(own) for own in rows}) > 1:
            return None
        means, weights = (array[np.stack(rows)].reshape(len(every), -1, array.shape[2]) for array in (self.means, self.weights))
        sets = label_sets(means, weights)
        return replace(self, filters=np.arange(len(every)), units=every, means=means, weights=weights, loss_ratio=None, **sets._asdict())

    @property
    def signal(self) -> IntArray:
        """(F,): ones inside the clusters."""
        return np.array([sum(len(labels) ** 2 for labels in clusters) for clusters in self.clusters], np.int64)

    @property
    def statistics(self) -> dict[str, float]:
        """Means over the filters (of size and noise: over clusters, and over filters that have one). ``snr`` is the number of ones
        inside the clusters by the number outside, of all filters together; infinite without noise, 0 without clusters."""
        sizes = [len(labels) for clusters in self.clusters for labels in clusters]
        counts = np.array([len(clusters) for clusters in self.clusters])
        inside, outside = int(self.signal.sum()), int(self.noise.sum())
        return {
            "probe_accuracy": self.accuracy, "cluster_size": float(np.mean(sizes)) if sizes else 0.0,
            "clusters_per_filter": float(counts.mean()), "labels_per_filter": float(self.label_sets.sum(1).mean()),
            "one_cluster": float((counts == 1).mean()), "noise": float(self.noise[counts > 0].mean()) if sizes else 0.0,
            "snr": inside / outside if outside else float("inf") if inside else 0.0, "no_cluster": float((counts == 0).mean()),
        }  # fmt: skip


@dataclass(frozen=True, repr=False)
class Profiles(Shown):
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

    def summary(self) -> str:
        """How many layers, from what; then a line of each."""
        head = f"{len(self.layers)} layers, {self.classes} classes, {self.samples} samples, labels {self.labels}"
        return "\n".join([head, *(layer.summary() for layer in self.layers)])


# ---- what is profiled ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tap:
    """A tensor to profile: ``layer`` made it, its channels lie along ``axis``; ``kernel`` is pooled over the other axes but the
    first, of sizes ``sizes``, and leaves ``positions`` positions. ``filters`` is the filter of each channel."""

    layer: str
    tensor: str
    axis: int
    units: IntArray
    filters: IntArray
    sizes: tuple[int, ...]
    kernel: tuple[int, ...]
    positions: int

    @property
    def width(self) -> int:
        """Number of features."""
        return len(self.filters) * self.positions

    @property
    def columns(self) -> IntArray:
        """Filter of each feature, (width,)."""
        return np.repeat(self.filters, self.positions)


def taps(analysis: Analysis, pool: int) -> tuple[list[Tap], list[tuple[str, str]]]:
    """The tensors that mixing layers read and that one mixing layer at least came before; and those that have no profile, why.

    In a tensor of rank 2 (a flattened map) the columns that hold one unit are one filter; elsewhere every channel is one.
    """
    prepared, coupling = analysis.prepared, analysis.coupling
    made_by = _makers(prepared, coupling)
    tapped, skipped = dict[tuple[str, int], Tap](), dict[str, str]()
    for layer in coupling.layers:
        name, axis = layer.data_name, layer.data_axis
        shape = prepared.trace.shapes[name]
        if name not in made_by or (name, axis) in tapped:
            continue
        if reason := _unfit(shape, axis, analysis.samples, np.dtype(prepared.types.get(name) or np.float32).kind):
            skipped[name] = reason
            continue
        units = layer.source if len(layer.source) == shape[axis] else np.full(shape[axis], -1, np.int64)
        filters = _merged(units) if len(shape) == 2 else np.arange(len(units))
        sizes = tuple(size for other, size in enumerate(shape) if other not in (0, axis))
        kernel = tuple(-(-size // pool) for size in sizes)
        positions = int(np.prod([-(-size // step) for size, step in zip(sizes, kernel, strict=True)], dtype=np.int64))
        first_of = np.unique(filters, return_index=True)[1]
        tapped[name, axis] = Tap(made_by[name], name, axis, units[first_of], filters, sizes, kernel, positions)
    return list(tapped.values()), list(skipped.items())


def _unfit(shape: Sequence[int], axis: int, samples: int, kind: str) -> str:
    """Why a tensor cannot be profiled; empty if it can."""
    if axis == 0 or shape[0] != samples:
        return f"its first axis of size {shape[0]} is not the batch of {samples}"
    if kind != FLOATS:
        return "it does not hold floating-point values"
    return f"it has {len(shape)} axes" if len(shape) > FIRST_MAX_RANK else ""


def _makers(prepared: Prepared, coupling: Coupling) -> dict[str, str]:
    """The last mixing layer before each tensor."""
    mixing, last = {layer.node.index for layer in coupling.layers}, dict[str, int]()
    for node in prepared.nodes:
        before = [last[name] for name in node.reads if name in last]
        maker = node.index if node.index in mixing else max(before, default=-1)
        if maker >= 0:
            last.update((name, maker) for name in node.outputs if name)
    return {name: prepared.nodes[index].name for name, index in last.items()}


def _merged(units: IntArray) -> IntArray:
    """Filters of the columns of a flattened map: one per unit, one per column without unit, in the order of their first column."""
    keys = np.where(units >= 0, units, -1 - np.arange(len(units)))
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return np.asarray(np.argsort(np.argsort(first))[inverse], np.int64)


@dataclass(frozen=True)
class ClassScores:
    """The output with the class scores, and the number of classes."""

    output: str
    classes: int


def classes_of(analysis: Analysis, free: str = "") -> ClassScores:
    """What the model says of classes.

    Args:
        free: names of scores without labels, for the message.

    Raises:
        ModelError: the model is no classifier.
    """
    prepared, samples = analysis.prepared, analysis.samples
    output = outputs(prepared.model)[0].name
    shape = prepared.trace.shapes.get(output, ())
    kind = np.dtype(prepared.types.get(output) or np.float32).kind
    if len(shape) == 2 and shape[0] == samples and shape[1] > 1 and kind == FLOATS:
        return ClassScores(output, int(shape[1]))
    raise ModelError(f"{prepared.model.name}: class profiles need a classifier, whose first output is (samples, at least 2 class scores); "
                     f"output '{output}' has shape {list(shape)} for {samples} samples. Scores that need no labels: {free}.")  # fmt: skip


# ---- the pass --------------------------------------------------------------------------------------------------------


@dataclass
class Sums:
    """Running sums of the pass: per tap (L, D) class sums; labels and hashes of all samples."""

    sums: list[FloatArray]
    labels: list[IntArray] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)


def class_profiles(
    analysis: Analysis, data: Dataset, options: ProfileOptions | None = None, progress: Progress = silent,
    choose: Callable[[list[Tap]], list[Tap]] = list, free: str = "",
) -> Profiles:  # fmt: skip
    """Class profiles of all layers of a classifier, by the labels of the data or else the model's own answers: one pass over the data,
    then one probe per layer.

    Args:
        choose: which of the tensors that could be profiled are (default: all).
        free: names of what needs no labels, for messages (default: scores).

    Raises:
        ModelError: the model is no classifier, or onnxruntime cannot run it on the data.
        DataError: one label only, fewer samples than labels, labels out of range, activations that are not finite.
        OptionError, OutputError: bad options, no room for temporary files.
    """
    options = options or ProfileOptions()
    free = free or ", ".join(sorted(name for name, known in SCORES.items() if isinstance(known.prepare, OfGroups)))
    scores = classes_of(analysis, free)
    tapped, skipped = taps(analysis, options.pool)
    chosen, samples, classes = choose(tapped), data.samples, scores.classes
    if samples < classes:
        raise DataError(f"{samples} samples for {classes} labels: class profiles need at least one per label, and some 50 to be "
                        f"good. Give more data, or use a score that needs no labels: {free}.")  # fmt: skip
    if data.classes is not None:
        _check_present(data.classes, classes, free)
    widths = [tap.width for tap in chosen]
    room_for = max(1, FEATURE_BYTES // max(1, 4 * sum(widths)))
    stored = np.arange(samples)
    if room_for < samples:
        stored = np.sort(np.random.default_rng(options.seed).choice(samples, room_for, replace=False))
    with room(stored, widths) as store:
        with progress("profiling", samples) as advance:
            sums = collect(analysis.prepared.model, chosen, scores, pass_batches(analysis, data), data.classes, store, advance)
        labels = np.concatenate(sums.labels)
        _check_present(labels, classes, free)
        counts = np.bincount(labels, minlength=classes)
        train, test = held_out_rows(np.array(sums.keys, np.int64)[stored], FEW * classes)
        layers = []
        with progress("training probes", len(chosen)) as advance:
            for index, (tap, total) in enumerate(zip(chosen, sums.sums, strict=True)):
                means = (total / np.maximum(counts, 1)[:, None]).T
                layers.append(_layer(tap, means, counts > 0, Samples(store.get(index), labels[stored], train), test, options))
                advance(1)
    missing, source = tuple(np.flatnonzero(counts == 0).tolist()), "argmax" if data.classes is None else "given"
    return Profiles(tuple(layers), classes, source, missing, samples, len(train), len(test), tuple(skipped))


def _check_present(labels: IntArray, classes: int, free: str) -> None:
    present = np.unique(labels)
    if len(present) and (present[0] < 0 or present[-1] >= classes):
        raise DataError(f"labels run from {present[0]} to {present[-1]}, but the model has classes 0 to {classes - 1}.")
    if len(present) < 2:
        only = present[0] if len(present) else "(none)"
        raise DataError(f"all samples have the label {only}; class profiles compare at least 2 labels of {classes}. "
                        f"Give data of more labels, or use a score that needs no labels: {free}.")  # fmt: skip


def collect(
    model: Model, chosen: Sequence[Tap], scores: ClassScores, batches: Batches, given: IntArray | None, store: Store, advance: Advance
) -> Sums:
    """Run the data once through the tapped model; ``given`` are the labels of all samples (None: the model's argmax). The features of the
    samples that have room in ``store`` go there."""
    editor = edit.Editor(model)
    names = [_tap(editor, tap) for tap in chosen]
    total = Sums([np.zeros((scores.classes, tap.width)) for tap in chosen])
    for batch in observe(editor.finish(), batches, names if given is not None else [*names, scores.output]):
        start, count, known = batch.first, batch.count, batch.own(given)
        labels = batch.samples(scores.output).argmax(1).astype(np.int64) if known is None else known
        low, high = np.searchsorted(store.samples, (start, start + count))
        for index, (tap, name, sums) in enumerate(zip(chosen, names, total.sums, strict=True)):
            rows = _rows(tap, batch.values[name], batch.rows)[:count]
            with np.errstate(invalid="ignore", over="ignore"):
                for label, row in zip(labels, rows, strict=True):
                    sums[label] += row  # float32 into float64, without the copies that a product with one-hot labels makes
            if low < high:
                store.put(index, int(low), rows[store.samples[low:high] - start] if high - low < count else rows)
        total.labels.append(labels)
        # hashes of samples: what is held out and the order of training hang on them, not on the order in the file; equal samples are
        # never on both sides
        own = [array for array in batch.feeds.values() if array.ndim and len(array) == batch.rows]
        total.keys += [crc32(b"".join(array[row].tobytes() for array in own)) for row in range(count)]
        advance(count)
    for tap, sums in zip(chosen, total.sums, strict=True):
        if not np.isfinite(sums).all():
            raise DataError(f"tensor '{tap.tensor}' is not finite on the data. Check --scale, --mean and --std, or the model.")
    return total


def _rows(tap: Tap, result: Array, batch: int) -> Array:
    if result.size != batch * tap.width or len(result) != batch:
        raise DataError(f"tensor '{tap.tensor}' pools to {list(result.shape)} for {batch} samples, expected {tap.width} "
                        "features each. Class profiles need samples of one shape, that of the trace (no --input-shape).")  # fmt: skip
    return result.reshape(batch, -1)


def _tap(editor: edit.Editor, tap: Tap) -> str:
    """Append (N, channels, positions ...) in float32, pooled; the means of partial windows at the end run over what is there."""
    tensor = editor.append("Cast", [editor.tensor(tap.tensor)], {"to": 1}, name=f"{tap.tensor}/float")
    if tap.sizes and tap.axis != 1:
        others = [axis for axis in range(1, len(tap.sizes) + 2) if axis != tap.axis]
        tensor = editor.append("Transpose", [tensor], {"perm": [0, tap.axis, *others]}, name=f"{tap.tensor}/channels_first")
    if any(step > 1 for step in tap.kernel):
        ends = [-size % step for size, step in zip(tap.sizes, tap.kernel, strict=True)]
        attributes = {"kernel_shape": list(tap.kernel), "strides": list(tap.kernel), "pads": [0] * len(ends) + ends}
        tensor = editor.append("AveragePool", [tensor], attributes, name=f"{tap.tensor}/pooled")
    return editor.add_output(tensor)


def _layer(tap: Tap, means: FloatArray, present: BoolArray, train: Samples, test: IntArray, options: ProfileOptions) -> LayerProfile:
    """Train the probe of one layer and read its clusters; rows ``test`` of the features measure it (none: those it is trained on)."""
    weights = PROBES[options.probe](train, len(present), options.seed)
    measured = replace(train, rows=test) if len(test) else train
    some = replace(measured, rows=measured.rows[:LOSS_SAMPLES])
    ratios = loss_ratios(some, weights, tap.columns) if options.loss else None
    made, read, right = by_filter(means, tap.columns), by_filter(weights * present, tap.columns), accuracy(measured, weights)
    return LayerProfile(tap.layer, tap.tensor, tap.axis, tap.filters, tap.units, made, read, *label_sets(made, read), right, ratios)
