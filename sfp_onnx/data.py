"""Calibration and test data: found, checked against the model, preprocessed, and streamed in batches.

Nothing is held but one batch: arrays inside .npz files are read row by row, .npy files are memory-mapped.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from . import graph
from .errors import DataError, OptionError
from .records import Array, IntArray, Port

LABEL_NAMES = ("labels", "label", "y", "targets")
BATCH = 64
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError)  # RuntimeError: encrypted


@dataclass(frozen=True)
class Preprocessing:
    """From raw values to the model's input: layout, then ``(x / scale - mean) / std`` per channel.

    ``scale`` is the value range of the raw data (255 for 8-bit images); ``layout`` is that of the data ("nhwc" is moved to NCHW).
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float | None = None
    layout: str = "nchw"

    @property
    def given(self) -> bool:
        """Whether values are changed at all."""
        return self.mean is not None or self.std is not None or self.scale is not None


    def check(self) -> None:
        """Check the numbers themselves.

        Raises:
            OptionError: not finite, or division by zero.
        """
        scale = () if self.scale is None else (self.scale,)
        for name, values, low in (("mean", self.mean or (), -math.inf), ("std", self.std or (), 0), ("scale", scale, 0)):
            if not all(low < value < math.inf for value in values):
                raise OptionError(f"--{name} {','.join(map(str, values))}: expected {'positive' if low == 0 else 'finite'} numbers")


class Reader(Protocol):
    """Rows of one array on disk or in memory."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole array."""

    @property
    def dtype(self) -> Any:
        """Its numpy type."""

    def rows(self, indices: IntArray, size: int) -> Iterator[Array]:
        """The rows ``indices`` (ascending), ``size`` at a time."""


@dataclass(frozen=True)
class _Memory:
    """An array in memory or memory-mapped."""

    array: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def rows(self, indices: IntArray, size: int) -> Iterator[Array]:
        for start in range(0, len(indices), size):
            yield np.asarray(self.array[indices[start : start + size]])


@dataclass(frozen=True)
class _Zipped:
    """An array inside an .npz file, read front to back."""

    path: Path
    member: str
    shape: tuple[int, ...]
    dtype: Any

    def rows(self, indices: IntArray, size: int) -> Iterator[Array]:
        width = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        wanted = np.zeros(self.shape[0], bool)
        wanted[indices] = True
        held: list[Array] = []
        with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as stream:
            _header(stream)
            for start in range(0, self.shape[0], size):
                count = min(size, self.shape[0] - start)
                block = _exactly(stream, count * width, self.path, self.member)
                rows = np.frombuffer(block, self.dtype).reshape((count, *self.shape[1:]))[wanted[start : start + count]]
                held.append(rows)
                while sum(map(len, held)) >= size:
                    joined = np.concatenate(held)
                    yield joined[:size]
                    held = [joined[size:]]
        rest = np.concatenate(held) if held else np.zeros((0, *self.shape[1:]), self.dtype)
        if len(rest):
            yield rest


def _exactly(stream: IO[bytes], count: int, path: Path, member: str) -> bytes:
    try:
        data = stream.read(count)
    except DAMAGED as error:
        raise DataError(f"{path}: array '{member.removesuffix('.npy')}' is damaged: {error}") from error
    if len(data) != count:
        raise DataError(f"{path}: array '{member.removesuffix('.npy')}' is truncated")
    return data


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, Any]:
    first = np.lib.format.read_magic(stream) == (1, 0)
    return np.lib.format.read_array_header_1_0(stream) if first else np.lib.format.read_array_header_2_0(stream)


# ---- opening ---------------------------------------------------------------------------------------------------------


def _open_npz(path: Path) -> dict[str, Reader]:
    readers: dict[str, Reader] = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            with archive.open(member) as stream:
                shape, fortran, dtype = _header(stream)
            if dtype.hasobject:
                raise DataError(f"{path}: array '{member}' holds Python objects, which are not read. Save plain arrays.")
            if fortran and len(shape) > 1:
                with np.load(path) as arrays:
                    readers[member.removesuffix(".npy")] = _Memory(arrays[member.removesuffix(".npy")])
            else:
                readers[member.removesuffix(".npy")] = _Zipped(path, member, shape, dtype)
    return readers


def _open_folder(path: Path, ports: Sequence[Port]) -> dict[str, Reader]:
    """``test_data_set_*`` folders of ``input_*.pb`` tensors: their samples one after the other."""
    folders = [path] if any(path.glob("input_*.pb")) else sorted(path.glob("test_data_set_*"), key=_number)
    columns: dict[str, list[Array]] = {}
    for folder in folders:
        for position, file in enumerate(sorted(folder.glob("input_*.pb"), key=_number)):
            name, array = graph.load_tensor(file)
            known = [port.name for port in ports]
            name = name if name in known else known[position] if position < len(known) else name
            columns.setdefault(name, []).append(array)
    if not columns:
        raise DataError(f"{path}: no test_data_set_*/input_*.pb files in this folder. Expected .npz, .npy, or such a folder.")
    try:
        return {name: _Memory(np.concatenate(arrays)) for name, arrays in columns.items()}
    except ValueError as error:
        raise DataError(f"{path}: the tensors of the data sets do not join along the first axis: {error}") from error


def _number(path: Path) -> int:
    return int("0" + "".join(filter(str.isdigit, path.stem)))


def _open(source: str | Path | Mapping[str, Array] | Array, ports: Sequence[Port]) -> tuple[dict[str, Reader], str, str]:
    """Readers by name, a name for messages, and the SHA-256 of the data."""
    if isinstance(source, np.ndarray):
        source = {"data": source}
    if isinstance(source, Mapping):
        digest = hashlib.sha256()
        for name, array in sorted(source.items()):
            digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
        return {name: _Memory(np.asarray(array)) for name, array in source.items()}, "the data", digest.hexdigest()
    path = Path(source)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder. Expected calibration data as .npz, .npy or test_data_set_* folders.")
    try:
        if path.is_dir():
            return _open_folder(path, ports), str(path), _digest(sorted(path.rglob("input_*.pb")))
        if path.suffix == ".npy":
            return {"data": _Memory(np.load(path, mmap_mode="r"))}, str(path), _digest([path])
        return _open_npz(path), str(path), _digest([path])
    except DAMAGED as error:
        raise DataError(f"{path}: not a readable .npz or .npy file: {error}") from error


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# ---- data sets -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dataset:
    """Samples that fit a model. ``labels`` belong to the chosen samples, in their order."""

    name: str
    sha256: str
    ports: tuple[Port, ...]
    readers: Mapping[str, Reader]
    indices: IntArray
    labels: IntArray | None
    preprocessing: Preprocessing
    batch: int
    fixed: bool

    @property
    def samples(self) -> int:
        """How many samples are used."""
        return len(self.indices)

    def part(self, positions: IntArray) -> Dataset:
        """Some of the samples, by their positions."""
        labels = None if self.labels is None else self.labels[positions]
        return replace(self, indices=self.indices[positions], labels=labels)

    def batches(self) -> Iterator[tuple[dict[str, Array], int]]:
        """Inputs for one run, and how many of its rows are samples (a model with a fixed batch gets the last one padded).

        Raises:
            DataError: NaN or infinity; the array and the sample are named.
        """
        streams = [self.readers[port.name].rows(self.indices, self.batch) for port in self.ports]
        start = 0
        for arrays in zip(*streams, strict=True):
            count = len(arrays[0])
            feeds = {}
            for port, array in zip(self.ports, arrays, strict=True):
                array = self._prepared(port, array, start)
                if self.fixed and count < self.batch:
                    array = np.concatenate([array, np.repeat(array[-1:], self.batch - count, axis=0)])
                feeds[port.name] = array
            yield feeds, count
            start += count

    def _prepared(self, port: Port, array: Array, start: int) -> Array:
        steps = self.preprocessing
        if array.ndim >= 3 and steps.layout == "nhwc":
            array = np.moveaxis(array, -1, 1)
        dtype = np.dtype(port.dtype)
        if dtype.kind == "f":
            with np.errstate(over="ignore"):
                values = array.astype(np.float32 if dtype.itemsize < 8 else np.float64)
            shape = [1, -1, *[1] * (array.ndim - 2)] if array.ndim > 1 else [1]
            if steps.scale is not None:
                values = values / values.dtype.type(steps.scale)
            if steps.mean is not None:
                values = values - np.asarray(steps.mean, values.dtype).reshape(shape)
            if steps.std is not None:
                values = values / np.asarray(steps.std, values.dtype).reshape(shape)
            with np.errstate(over="ignore"):
                array = values.astype(dtype, copy=False)
            bad = ~np.isfinite(array.reshape(len(array), -1)).all(1)
            if bad.any():
                row = int(self.indices[start + int(np.argmax(bad))])
                raise DataError(f"{self.name}: sample {row} of '{port.name}' holds NaN, infinity or what {dtype} cannot hold. Repair it.")
        return np.ascontiguousarray(array.astype(dtype, copy=False))


def open_data(
    source: str | Path | Mapping[str, Array] | Array,
    ports: Sequence[Port],
    preprocessing: Preprocessing | None = None,
    labels: str | Path | Array | None = None,
    samples: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Open data for a model with inputs ``ports``; ``samples`` of them, drawn with ``seed`` (default: all).

    Raises:
        DataError: wrong names, shapes, types, labels, or no samples.
    """
    preprocessing = preprocessing or Preprocessing()
    preprocessing.check()
    readers, name, digest = _open(source, ports)
    readers, own_labels = _assign(readers, ports, name)
    count = _count(readers, name)
    for port in ports:
        _check_port(port, readers[port.name], preprocessing, name)
    loaded = _load_labels(labels) if labels is not None else own_labels
    if loaded is not None:
        loaded = _check_labels(loaded, count, name if labels is None else str(labels) if not isinstance(labels, np.ndarray) else "labels")
    if samples is not None and samples < 1:
        raise DataError(f"--samples {samples}: expected at least 1")
    indices = np.arange(count)
    if samples is not None and samples < count:
        indices = np.sort(np.random.default_rng(seed).choice(count, samples, replace=False))
    fixed = [port.shape[0] for port in ports if port.shape and isinstance(port.shape[0], int)]
    return Dataset(
        name, digest, tuple(ports), readers, indices, None if loaded is None else loaded[indices], preprocessing,
        fixed[0] if fixed else BATCH, bool(fixed),
    )  # fmt: skip


def _assign(readers: dict[str, Reader], ports: Sequence[Port], name: str) -> tuple[dict[str, Reader], Array | None]:
    """Which array feeds which input; the labels apart."""
    wanted = [port.name for port in ports]
    label_name = next((key for key in LABEL_NAMES if key in readers and key not in wanted), None)
    labels = None
    if label_name:
        count = next(iter(readers[label_name].shape), 0)
        labels = next(readers[label_name].rows(np.arange(count), count), None) if count else np.zeros(0, np.int64)
    others = {key: reader for key, reader in readers.items() if key != label_name}
    if all(key in others for key in wanted):
        return {key: others[key] for key in wanted}, labels
    if len(wanted) == 1 and len(others) == 1:
        return {wanted[0]: next(iter(others.values()))}, labels
    raise DataError(
        f"{name}: the model's inputs are {wanted}, the data hold {sorted(readers)}. Name the arrays like the inputs "
        f"(labels: 'labels' or 'y')."
    )


def _count(readers: Mapping[str, Reader], name: str) -> int:
    counts = {key: reader.shape[0] if reader.shape else 0 for key, reader in readers.items()}
    if len(set(counts.values())) > 1:
        raise DataError(f"{name}: the arrays have different numbers of samples: {counts}")
    count = next(iter(counts.values()))
    if not count:
        raise DataError(f"{name}: there are no samples in it.")
    return count


def _check_port(port: Port, reader: Reader, steps: Preprocessing, name: str) -> None:
    found = tuple(reader.shape)
    first = (found[0], found[-1], *found[1:-1]) if len(found) >= 3 else found
    moved = first if steps.layout == "nhwc" else found
    if port.shape is not None and not _fits(port.shape, moved):
        hint = " The data look like channels-last: pass --layout nhwc." if moved != first and _fits(port.shape, first) else ""
        expected = ["N" if axis == 0 else dim if dim is not None else "?" for axis, dim in enumerate(port.shape)]
        raise DataError(f"{name}: input '{port.name}' expects shape {expected}, the data have {list(moved)}.{hint}")
    kind, wanted = np.dtype(reader.dtype).kind, np.dtype(port.dtype).kind
    if kind not in "fiub" or (wanted in "iub" and kind == "f"):
        raise DataError(f"{name}: input '{port.name}' expects {np.dtype(port.dtype)}, the data are {np.dtype(reader.dtype)}.")
    if wanted == "f" and kind in "iub" and not steps.given:
        raise DataError(
            f"{name}: input '{port.name}' expects {np.dtype(port.dtype)}, the data are raw {np.dtype(reader.dtype)} values. Say how to "
            "convert them: --scale 255 (value range), --mean and --std, or --scale 1 to feed them as they are."
        )
    for label, values in (("mean", steps.mean), ("std", steps.std)):
        if values is not None and len(values) not in (1, moved[1] if len(moved) > 1 else 1):
            raise DataError(f"--{label} has {len(values)} values, input '{port.name}' has {moved[1]} channels.")


def _fits(expected: Sequence[int | str | None], found: Sequence[int]) -> bool:
    sizes = zip(expected[1:], found[1:], strict=False)
    return len(expected) == len(found) and all(not isinstance(dim, int) or dim == size for dim, size in sizes)


def _load_labels(source: str | Path | Array) -> Array:
    if isinstance(source, np.ndarray):
        return source
    path = Path(source)
    try:
        loaded = np.load(path)
        if isinstance(loaded, np.ndarray):
            return loaded
        names = [key for key in LABEL_NAMES if key in loaded.files] or loaded.files
        if len(names) != 1:
            raise DataError(f"{path}: which of the arrays {loaded.files} holds the labels? Name it 'labels'.")
        return np.asarray(loaded[names[0]])
    except DAMAGED as error:
        raise DataError(f"{path}: cannot read labels (.npy or .npz expected): {error}") from error


def _check_labels(labels: Array, count: int, name: str) -> IntArray:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"{name}: labels must be one integer per sample, found {labels.dtype} of shape {list(labels.shape)}.")
    if len(labels) != count:
        raise DataError(f"{name}: {len(labels)} labels for {count} samples.")
    return labels.astype(np.int64)


def check_classes(data: Dataset, classes: int) -> None:
    """Labels must be class indices of the model's output.

    Raises:
        DataError: a label is negative or not below the number of classes.
    """
    if data.labels is not None and len(data.labels) and not (data.labels.min() >= 0 and data.labels.max() < classes):
        low, high = int(data.labels.min()), int(data.labels.max())
        hint = " They look as if they started at 1." if low == 1 and high == classes else ""
        raise DataError(f"{data.name}: labels run from {low} to {high}, but the model has classes 0 to {classes - 1}.{hint}")
