"""Data that fit a model: checked against it, preprocessed, and streamed in batches. Nothing is held but one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import DataError, ModelError, OptionError
from ..core.options import expect
from ..core.types import Array, IntArray, Port, Shown
from ..graph import Model
from ..runtime import Batch, open_model
from . import Opened, Preprocessing, Reader
from .classes import read_classes
from .images import Labelling, is_images, open_images
from .layout import may_be_single
from .readers import check_labels, is_call, load_labels, open_call, open_source

BATCH = 64
Source = str | Path | Mapping[str, Any] | Array | Callable[[], Any] | Sequence[Any]
"""A path, arrays, a list of runs, or a function that yields batches (also by its name, ``module:function``)."""


@dataclass(frozen=True, repr=False)
class Dataset(Shown):
    """Samples that fit a model. ``labels`` belong to the chosen samples, in their order: integers or floating numbers, one each or more
    (a class map, boxes); ``axis`` is that of the channels as the model takes them; ``notes`` tell the user how the data were read.
    ``axes``: the sample axis of each input where that is not the first (None: it has none); ``groups``: samples that may run together have
    the same number, consecutively (None: all may); ``class_names``: by label (empty: unknown)."""

    name: str
    sha256: str
    ports: tuple[Port, ...]
    readers: Mapping[str, Reader]
    indices: IntArray
    labels: Array | None
    preprocessing: Preprocessing
    batch: int
    fixed: bool
    axis: int = 1
    notes: tuple[str, ...] = ()
    axes: Mapping[str, int | None] = field(default_factory=dict)
    groups: IntArray | None = None
    class_names: tuple[str, ...] = ()

    def summary(self) -> str:
        """Its name, and how many samples there are, with labels or without."""
        return f"{self.name}, {self.samples} samples with{'out' if self.labels is None else ''} labels"

    @property
    def samples(self) -> int:
        """How many samples are used."""
        return len(self.indices)

    @property
    def classes(self) -> IntArray | None:
        """The labels, if they are one class number per sample."""
        one_each = self.labels is not None and self.labels.ndim == 1 and self.labels.dtype.kind == "i"
        return self.labels if one_each else None

    def part(self, positions: IntArray) -> Dataset:
        """Some of the samples, by their positions."""
        labels = None if self.labels is None else self.labels[positions]
        return replace(self, indices=self.indices[positions], labels=labels)

    def split(self, count: int, seed: int | Sequence[int]) -> tuple[Dataset, Dataset]:
        """All samples but ``count``, and those ``count``, drawn with the seed; both in their order."""
        order = np.random.default_rng(seed).permutation(self.samples)
        return self.part(np.sort(order[count:])), self.part(np.sort(order[:count]))

    @property
    def plain(self) -> bool:
        """Whether samples are equal rows: all may run together, and every input has them on its first axis."""
        return self.groups is None and not any(self.axes.values()) and None not in self.axes.values()

    def batches(self) -> Iterator[Batch]:
        """Inputs for one run, and how many of its rows are samples (a model with a fixed batch gets the last one padded).

        Raises:
            DataError: NaN or infinity; the array and the sample are named.
        """
        chunks = self._chunks()
        streams = [self.readers[port.name].rows(chunks) for port in self.ports]
        start = 0
        for arrays in zip(*streams, strict=True):
            count = len(arrays[0])
            padding = self.batch - count if self.fixed else 0
            feeds = {port.name: self._fed(port, array, start, padding) for port, array in zip(self.ports, arrays, strict=True)}
            yield Batch.padded(feeds, count, padding)
            start += count

    @property
    def runs(self) -> int:
        """How many batches there are."""
        return len(self._chunks())

    @property
    def sizes(self) -> list[int]:
        """Rows of every batch, with padding."""
        return [self.batch if self.fixed else len(chunk) for chunk in self._chunks()]

    def stretch(self, first: int, last: int) -> Dataset:
        """The samples of some batches, which are the same batches again."""
        ends = np.cumsum([0, *map(len, self._chunks())])
        return self.part(np.arange(ends[first], ends[last]))

    def _chunks(self) -> list[IntArray]:
        """Samples that run together."""
        edges = np.zeros(0, np.int64) if self.groups is None else np.flatnonzero(np.diff(self.groups[self.indices])) + 1
        return [part[start : start + self.batch] for part in np.split(self.indices, edges) for start in range(0, len(part), self.batch)]

    def _fed(self, port: Port, rows: Array, start: int, padding: int) -> Array:
        """One input as the model takes it."""
        axis = self.axes.get(port.name, 0)
        if axis is None:
            return self._prepared(port, rows[0], start) if rows.ndim > 2 else np.asarray(rows[0].astype(port.dtype, copy=False))
        array = self._prepared(port, rows, start)
        if padding:
            array = np.concatenate([array, np.repeat(array[-1:], padding, axis=0)])
        return np.ascontiguousarray(np.moveaxis(array, 0, axis))

    def _prepared(self, port: Port, array: Array, start: int) -> Array:
        steps = self.preprocessing
        if array.ndim >= 3 and steps.layout == "nhwc":
            array = np.moveaxis(array, -1, 1)
        dtype = np.dtype(port.dtype)
        if dtype.kind == "O":  # texts stay numpy's own, which have bytes to store and to compare
            return array
        if dtype.kind == "f":
            with np.errstate(over="ignore"):
                values = array.astype(np.float32 if dtype.itemsize < 8 else np.float64, order="C")  # a copy: changed in place
            shape = [1] * array.ndim
            shape[self.axis if array.ndim > 1 else 0] = -1
            if steps.scale is not None:
                values /= values.dtype.type(steps.scale)
            if steps.mean is not None:
                values -= np.asarray(steps.mean, values.dtype).reshape(shape)
            if steps.std is not None:
                values /= np.asarray(steps.std, values.dtype).reshape(shape)
            with np.errstate(over="ignore"):
                array = values.astype(dtype, copy=False)
            bad = ~np.isfinite(array.reshape(len(array), -1)).all(1)
            if bad.any():
                row = int(self.indices[start + int(np.argmax(bad))])
                raise DataError(f"{self.name}: sample {row} of '{port.name}' holds NaN, infinity or what {dtype} cannot hold. Repair it.")
        return np.ascontiguousarray(array.astype(dtype, copy=False))


def open_data(
    source: Source, ports: Sequence[Port], preprocessing: Preprocessing | None = None, labels: str | Path | Array | None = None,
    samples: int | None = None, seed: int = 0, classes: str | Path | Array | None = None, outputs: int | None = None,
) -> Dataset:  # fmt: skip
    """Open data for a model with inputs ``ports``; ``samples`` of them, drawn with ``seed`` (default: all). ``classes``: names in the order
    of the model's outputs, one a line of a file; ``outputs``: how many there are (for folders of images by class).

    ``source``: .npz, .npy, ``test_data_set_*`` folders, arrays, a folder of images, or a function that yields batches: an array,
    (array, labels), or a dict by input name (and ``labels``), the same at every call.

    Raises:
        DataError: wrong names, shapes, types, labels, or no samples.
    """
    preprocessing = preprocessing or Preprocessing()
    expect(Preprocessing, preprocessing=preprocessing)
    preprocessing.check()
    if samples is not None and samples < 1:
        raise DataError(f"--samples {samples}: expected at least 1")
    named = None if classes is None else read_classes(classes)
    if is_images(source):
        opened = open_images(Path(str(source)), ports, preprocessing, Labelling(labels, named, outputs), samples, seed)
        labels, samples, preprocessing = None, None, opened.steps or preprocessing
    else:
        opened = open_call(source, ports) if is_call(source) else open_source(source, ports)
        _check_no_images(preprocessing, opened.name)
    readers, name = opened.readers, opened.name
    count = next(iter(readers.values())).shape[0]
    if not count:
        raise DataError(f"{name}: there are no samples in it.")
    for port in ports:
        _check_port(port, readers[port.name], preprocessing, opened)
    loaded = load_labels(labels) if labels is not None else opened.labels
    if loaded is not None:
        loaded = check_labels(loaded, count, name if labels is None else "labels" if isinstance(labels, np.ndarray) else str(labels))
    indices = np.arange(count)
    if samples is not None and samples < count:
        indices = np.sort(np.random.default_rng(seed).choice(count, samples, replace=False))
    placed = [(port.shape, opened.axes.get(port.name, 0)) for port in ports if port.shape]
    fixed = [size for shape, axis in placed for size in ([] if axis is None else [shape[axis]]) if isinstance(size, int)]
    return Dataset(
        name, opened.sha256, tuple(ports), readers, indices, None if loaded is None else loaded[indices], preprocessing,
        fixed[0] if fixed else BATCH, bool(fixed), opened.axis, opened.notes, opened.axes, opened.groups, opened.class_names or named or (),
    )  # fmt: skip


def _check_no_images(steps: Preprocessing, name: str) -> None:
    """Pixels of arrays are what they are: steps for image files would silently do nothing."""
    given = [f"--{what}" for what, value in (("resize", steps.resize), ("center-crop", steps.center_crop)) if value is not None]
    given += ["--color"] if steps.color != "rgb" else []
    if given:
        raise OptionError(f"{name}: {', '.join(given)} are for a folder of images; arrays are fed as they are. Leave them away.")


def _check_port(port: Port, reader: Reader, steps: Preprocessing, opened: Opened) -> None:
    name, channels, axis = opened.name, opened.axis, opened.axes.get(port.name, 0)
    shape = tuple(reader.shape[1:])
    if axis is not None:
        shape = (*shape[:axis], reader.shape[0], *shape[axis:])
    first = (shape[0], shape[-1], *shape[1:-1]) if len(shape) >= 3 else shape
    moved = first if steps.layout == "nhwc" else shape
    if port.shape is not None and not _fits(port.shape, moved, axis):
        hint = " The data look like channels-last: pass --layout nhwc." if moved != first and _fits(port.shape, first, axis) else ""
        if not hint and len(moved) == len(port.shape) == 4 and moved[1] == port.shape[1]:
            hint = " The images have another size: resize them (a folder of image files is resized by itself)."
        expected = ["N" if number == axis else dim if dim is not None else "?" for number, dim in enumerate(port.shape)]
        found = ["?" if size is None else size for size in moved]
        raise DataError(f"{name}: input '{port.name}' expects shape {expected}, the data have {found}.{hint}")
    dtype, wanted = np.dtype(reader.dtype), np.dtype(port.dtype)
    if (wanted.kind == "O") != (dtype.kind == "U") or dtype.kind not in "fiubU" or (wanted.kind in "iub" and dtype.kind == "f"):
        raise DataError(f"{name}: input '{port.name}' expects {'text' if wanted.kind == 'O' else wanted}, the data are {dtype}.")
    if axis is None and len(shape) < 2:
        return  # scalars and the like are fed as they are
    if wanted.kind == "f" and dtype.kind in "iub" and not steps.given:
        ways = "--scale 255 (value range), --mean and --std (or --preset imagenet), or --scale 1 to feed them as they are"
        raise DataError(f"{name}: input '{port.name}' expects {wanted}, the data are raw {dtype} values. Say how to convert them: {ways}.")
    for label, values in (("mean", steps.mean), ("std", steps.std)):
        if values is not None and len(values) not in (1, moved[channels] if len(moved) > 1 else 1):
            raise DataError(f"--{label} has {len(values)} values, input '{port.name}' has {moved[channels]} channels.")


def _fits(expected: Sequence[int | str | None], shape: Sequence[int], axis: int | None) -> bool:
    sizes = enumerate(zip(expected, shape, strict=False))
    return len(expected) == len(shape) and all(number == axis or not isinstance(dim, int) or dim == size for number, (dim, size) in sizes)


def one_by_one(model: Model, data: Dataset) -> Dataset:
    """The same data, in runs of one sample each if the model takes two at once in no way: an input without an axis for samples holds the
    state of a single one."""
    single = may_be_single(data.ports, data.axes)
    pairs = np.arange(1, data.samples) if data.groups is None else 1 + np.flatnonzero(np.diff(data.groups[data.indices]) == 0)
    if not single or not len(pairs):
        return data
    two, alone = data.part(pairs[0] + np.arange(-1, 1)), replace(data, batch=1, fixed=True)
    try:
        session = open_model(model)
        session.run(next(alone.batches())[0])
    except ModelError:
        return data  # who really needs to run the model says it better
    try:
        session.run(next(two.batches())[0])
    except ModelError:
        named = " and ".join(f"'{port.name}' {list(port.shape or ())}" for port in single)
        note = f"{named} belong{'s' * (len(single) == 1)} to one sample, and the model takes no two: samples run one by one"
        return replace(alone, notes=(*data.notes, note))
    return data
