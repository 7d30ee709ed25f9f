"""Class profiles of all layers from one streaming pass: features pooled inside the graph, class sums in float64, features on disk.

What stays in memory does not depend on the number of samples, but for a label and a hash per sample. The features of the samples that
train the probes go to an unnamed temporary file of at most `FEATURE_BYTES`, which disappears with the process, however that ends.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from math import ceil, prod
from typing import IO
from zlib import crc32

import numpy as np

from ...core.errors import DataError, ModelError, OptionError, OutputError
from ...core.types import Array, BoolArray, Coupling, FloatArray, IntArray, LayerProfile, Profiles
from ...graph import Model, Prepared, outputs
from ...graph.edit import Editor
from ...runtime import Batches, observe
from . import probe
from .probe import PROBES, Samples, by_filter, label_sets, loss_ratios

FEATURE_BYTES = 4 * 2**30
HELD_OUT = 5  # one sample in so many measures the probes and does not train them
FEW = 10  # with fewer samples per label than this none is held out
LOSS_SAMPLES = 1000
FLOATS, FIRST_MAX_RANK = "f", 5
Advance = Callable[[int], None]


@dataclass(frozen=True)
class ProfileOptions:
    """How to profile: the probe ("sgd" or "ridge"), maps pooled to at most ``pool`` x ``pool``, ``loss``: whether to measure what
    the probe loses without each filter, ``seed`` of the order of training."""

    probe: str = "sgd"
    pool: int = 4
    loss: bool = False
    seed: int = 0

    def check(self) -> None:
        """Check the values.

        Raises:
            OptionError: unknown probe, or a pool under 1.
        """
        if self.probe not in PROBES:
            raise OptionError(f"unknown probe '{self.probe}'. Known: {', '.join(PROBES)}")
        if self.pool < 1:
            raise OptionError(f"--pool {self.pool}: expected at least 1")


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


# ---- what is profiled ------------------------------------------------------------------------------------------------


def taps(prepared: Prepared, coupling: Coupling, samples: int, pool: int) -> tuple[list[Tap], list[tuple[str, str]]]:
    """The tensors that mixing layers read and that one mixing layer at least came before; and those that have no profile, why.

    ``samples`` is the number of rows of the traced inputs. In a tensor of rank 2 (a flattened map) the columns that hold one unit
    are one filter; elsewhere every channel is one.
    """
    made_by = _makers(prepared, coupling)
    types = prepared.types
    found: dict[tuple[str, int], Tap] = {}
    skipped: dict[str, str] = {}
    for layer in coupling.layers:
        name, axis = layer.data_name, layer.data_axis
        shape = prepared.trace.shapes[name]
        if name not in made_by or (name, axis) in found:
            continue
        reason = _unfit(shape, axis, samples, np.dtype(types.get(name) or np.float32).kind)
        if reason:
            skipped[name] = reason
            continue
        units = layer.source if len(layer.source) == shape[axis] else np.full(shape[axis], -1, np.int64)
        filters = _merged(units) if len(shape) == 2 else np.arange(len(units))
        sizes = tuple(size for other, size in enumerate(shape) if other not in (0, axis))
        kernel = tuple(ceil(size / pool) for size in sizes)
        positions = prod(ceil(size / step) for size, step in zip(sizes, kernel, strict=True))
        found[name, axis] = Tap(made_by[name], name, axis, _first_of(units, filters), filters, sizes, kernel, positions)
    return list(found.values()), list(skipped.items())


def _unfit(shape: Sequence[int], axis: int, samples: int, kind: str) -> str:
    """Why a tensor cannot be profiled; empty if it can."""
    if axis == 0 or shape[0] != samples:
        return f"its first axis of size {shape[0]} is not the batch of {samples}"
    if kind != FLOATS:
        return "it does not hold floating-point values"
    return f"it has {len(shape)} axes" if len(shape) > FIRST_MAX_RANK else ""


def _makers(prepared: Prepared, coupling: Coupling) -> dict[str, str]:
    """The last mixing layer before each tensor."""
    mixing = {layer.node.index for layer in coupling.layers}
    last: dict[str, int] = {}
    for node in prepared.nodes:
        before = [last[name] for name in node.reads if name in last]
        own = node.index if node.index in mixing else max(before, default=-1)
        if own >= 0:
            last.update((name, own) for name in node.outputs if name)
    return {name: prepared.nodes[index].name for name, index in last.items()}


def _merged(units: IntArray) -> IntArray:
    """Filters of the columns of a flattened map: one per unit, one per column without unit, in the order of their first column."""
    keys = np.where(units >= 0, units, -1 - np.arange(len(units)))
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    merged: IntArray = rank[inverse].astype(np.int64)
    return merged


def _first_of(units: IntArray, filters: IntArray) -> IntArray:
    _, first = np.unique(filters, return_index=True)
    own: IntArray = units[first]
    return own


def classes_of(prepared: Prepared, samples: int, free: str) -> tuple[str, int]:
    """Name of the output with the class scores, and the number of classes.

    Args:
        free: names of scores without labels, for the message.

    Raises:
        ModelError: the model is no classifier.
    """
    output = outputs(prepared.model)[0].name
    shape = prepared.trace.shapes.get(output, ())
    kind = np.dtype(prepared.types.get(output) or np.float32).kind
    if len(shape) == 2 and shape[0] == samples and shape[1] > 1 and kind == FLOATS:
        return output, int(shape[1])
    raise ModelError(
        f"{prepared.model.name}: class profiles need a classifier, whose first output is (samples, at least 2 class scores); output "
        f"'{output}' has shape {list(shape)} for {samples} samples. Scores that need no labels: {free}."
    )


# ---- the pass --------------------------------------------------------------------------------------------------------


@dataclass
class Sums:
    """Running sums of the pass: per tap (L, D) class sums; labels and hashes of all samples."""

    sums: list[FloatArray]
    labels: list[IntArray] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)


def profile(
    prepared: Prepared,
    chosen: Sequence[Tap],
    output: tuple[str, int],
    data: tuple[Batches, int, IntArray | None],
    options: ProfileOptions,
    free: str = "",
    progress: Callable[[str, int], AbstractContextManager[Advance]] = lambda title, total: nullcontext(lambda steps: None),
) -> Profiles:
    """Profile all taps in one pass over the data, then train one probe per tap.

    Args:
        output: the class scores and their number, from `classes_of`.
        data: batches of (inputs, number of real samples), how many samples there are, and their labels (None: the model's argmax).
        free: names of scores without labels, for messages.

    Raises:
        DataError: fewer samples than labels, one label only, or activations that are not finite.
        ModelError: onnxruntime cannot run the model on the data.
        OutputError: no room for the features in the folder of temporary files.
        OptionError: bad options.
    """
    options.check()
    batches, samples, given = data
    classes = output[1]
    if samples < classes:
        raise DataError(f"{samples} samples for {classes} labels: class profiles need at least one per label, and some 50 to be "
                        f"good. Give more data, or use a score that needs no labels: {free}.")  # fmt: skip
    if given is not None:
        _check_present(given, classes, free)
    widths = [tap.width for tap in chosen]
    stored = np.arange(samples)
    fitting = FEATURE_BYTES // max(1, 4 * sum(widths))
    if fitting < samples:
        stored = np.sort(np.random.default_rng(options.seed).choice(samples, max(1, fitting), replace=False))
    with room(len(stored), widths) as store:
        with progress("profiling", samples) as advance:
            sums = collect(prepared.model, chosen, (output[0], classes), (batches, given), (stored, store), advance)
        labels = np.concatenate(sums.labels)
        _check_present(labels, classes, free)
        counts = np.bincount(labels, minlength=classes)
        train, test = _split(np.array(sums.keys, np.int64)[stored], FEW * classes)
        layers = []
        with progress("training probes", len(chosen)) as advance:
            for index, (tap, own) in enumerate(zip(chosen, sums.sums, strict=True)):
                means = (own / np.maximum(counts, 1)[:, None]).T
                layers.append(_layer(tap, means, counts > 0, (store.get(index), labels[stored], train, test), options))
                advance(1)
    missing = tuple(int(label) for label in np.flatnonzero(counts == 0))
    source = "given" if given is not None else "argmax"
    return Profiles(tuple(layers), classes, source, missing, samples, len(train), len(test))


def _check_present(labels: IntArray, classes: int, free: str) -> None:
    present = np.unique(labels)
    if len(present) and (present[0] < 0 or present[-1] >= classes):
        raise DataError(f"labels run from {present[0]} to {present[-1]}, but the model has classes 0 to {classes - 1}.")
    if len(present) < 2:
        raise DataError(
            f"all samples have the label {present[0] if len(present) else '(none)'}; class profiles compare at least 2 labels of "
            f"{classes}. Give data of more labels, or use a score that needs no labels: {free}."
        )


@dataclass(frozen=True)
class Store:
    """Features (rows, width) of every tap, one after the other in an unnamed temporary file that the system removes when it is
    closed or the process ends. Written like a file, where a full disk is an error; a memory map would crash."""

    file: IO[bytes]
    rows: int
    widths: tuple[int, ...]

    def _start(self, index: int) -> int:
        return 4 * self.rows * sum(self.widths[:index])

    def put(self, index: int, first: int, features: Array) -> None:
        """Write features of tap ``index`` from row ``first`` on.

        Raises:
            OutputError: no room.
        """
        try:
            self.file.seek(self._start(index) + 4 * first * self.widths[index])
            left = memoryview(np.ascontiguousarray(features, np.float32).data).cast("B")
            while left:
                left = left[self.file.write(left) :]
        except OSError as error:
            need = f"{self._start(len(self.widths)) / 2**20:.0f} MiB of features ({error.strerror or error})"
            raise OutputError(f"{tempfile.gettempdir()}: no room for {need}. Set TMPDIR, or lower --samples or --pool.") from error

    def get(self, index: int) -> Array:
        """The features of tap ``index``, (rows, width), as a memory map."""
        return np.memmap(self.file, np.float32, "r", self._start(index), (self.rows, self.widths[index]))


@contextmanager
def room(rows: int, widths: Sequence[int]) -> Iterator[Store]:
    """A store for ``rows`` samples of features of these widths."""
    with tempfile.TemporaryFile(prefix="sfp_onnx-", buffering=0) as file:
        yield Store(file, rows, tuple(widths))


def collect(
    model: Model, chosen: Sequence[Tap], output: tuple[str, int], data: tuple[Batches, IntArray | None],
    kept: tuple[IntArray, Store], advance: Advance,
) -> Sums:  # fmt: skip
    """Run the data once through the tapped model. ``kept`` are the samples whose features are stored, and where."""
    batches, given = data
    stored, store = kept
    editor = Editor(model)
    names = [_tap(editor, tap) for tap in chosen]
    tapped = editor.finish()
    total = Sums([np.zeros((output[1], tap.width)) for tap in chosen])
    for batch in observe(tapped, batches, names if given is not None else [*names, output[0]]):
        start, count = batch.first, batch.count
        own = batch.own(given)
        labels = batch.samples(output[0]).argmax(1).astype(np.int64) if own is None else own
        low, high = np.searchsorted(stored, (start, start + count))
        for index, (tap, name, sums) in enumerate(zip(chosen, names, total.sums, strict=True)):
            rows = _rows(tap, batch.values[name], batch.rows)[:count]
            with np.errstate(invalid="ignore", over="ignore"):
                for label, row in zip(labels, rows, strict=True):
                    sums[label] += row  # float32 into float64, without the copies that a product with one-hot labels makes
            if low < high:
                store.put(index, int(low), rows[stored[low:high] - start] if high - low < count else rows)
        total.labels.append(labels)
        total.keys += [_key(batch.feeds, row) for row in range(count)]
        advance(count)
    for tap, sums in zip(chosen, total.sums, strict=True):
        if not np.isfinite(sums).all():
            raise DataError(f"tensor '{tap.tensor}' is not finite on the data. Check --scale, --mean and --std, or the model.")
    return total


def _rows(tap: Tap, result: Array, batch: int) -> Array:
    if result.size != batch * tap.width or len(result) != batch:
        raise DataError(
            f"tensor '{tap.tensor}' gives shape {list(result.shape)} after pooling for {batch} samples, expected {tap.width} features each "
            "as traced. Let the model be traced on the data (no --input-shape)."
        )
    return result.reshape(batch, -1)


def _key(feeds: Mapping[str, Array], row: int) -> int:
    """A hash of one sample. What is held out and the order of training hang on it, not on the order in the file; equal samples
    are never on both sides."""
    key = 0
    for array in feeds.values():
        key = crc32(np.ascontiguousarray(array[row]).tobytes(), key)
    return key


def _split(keys: IntArray, enough: int) -> tuple[IntArray, IntArray]:
    """Rows to train on and rows held out, in the order of their hashes; nothing is held out of fewer than ``enough``."""
    order = np.argsort(keys, kind="stable")
    out = keys[order] % HELD_OUT == 0
    if len(keys) < enough or not out.any() or out.all():
        return order, np.zeros(0, np.int64)
    return order[~out], order[out]


def _tap(editor: Editor, tap: Tap) -> str:
    """Append (N, channels, positions ...) in float32, pooled; the means of partial windows at the end run over what is there."""
    tensor = editor.append("Cast", [editor.tensor(tap.tensor)], {"to": 1}, name=f"{tap.tensor}/float")
    if tap.sizes and tap.axis != 1:
        others = [axis for axis in range(1, len(tap.sizes) + 2) if axis != tap.axis]
        tensor = editor.append("Transpose", [tensor], {"perm": [0, tap.axis, *others]}, name=f"{tap.tensor}/channels_first")
    if any(step > 1 for step in tap.kernel):
        ends = [ceil(size / step) * step - size for size, step in zip(tap.sizes, tap.kernel, strict=True)]
        attributes = {"kernel_shape": list(tap.kernel), "strides": list(tap.kernel), "pads": [0] * len(ends) + ends}
        tensor = editor.append("AveragePool", [tensor], attributes, name=f"{tap.tensor}/pooled")
    return editor.add_output(tensor)


def _layer(
    tap: Tap, means: FloatArray, present: BoolArray, stored: tuple[Array, IntArray, IntArray, IntArray], options: ProfileOptions
) -> LayerProfile:
    """Train the probe of one layer and read its clusters. ``stored`` are features, labels, and rows to train on and held out."""
    features, labels, train, test = stored
    weights = PROBES[options.probe](Samples(features, labels, train), len(present), options.seed)
    measured = Samples(features, labels, test if len(test) else train)
    ratios = None
    if options.loss:
        ratios = loss_ratios(Samples(features, labels, measured.rows[:LOSS_SAMPLES]), weights, tap.columns)
    accuracy = probe.accuracy(measured, weights)
    own_means = by_filter(means, tap.columns)
    own_weights = by_filter(weights * present, tap.columns)
    found = label_sets(own_means, own_weights)
    return LayerProfile(
        tap.layer, tap.tensor, tap.axis, tap.filters, tap.units, own_means, own_weights,
        found.clusters, found.label_sets, found.noise, accuracy, ratios,
    )  # fmt: skip
