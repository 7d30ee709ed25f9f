"""Arrays on disk or in memory, read a batch at a time: arrays inside .npz files row by row, .npy files memory-mapped;
and batches from any Python function."""

from __future__ import annotations

import hashlib
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..core.errors import DataError
from ..core.system import user_function
from ..core.types import Array, IntArray, Port
from ..graph.load import hash_files, load_tensor
from . import Memory, Opened, Reader

DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError)  # RuntimeError: encrypted
MOST_DEFLATED = 1100  # deflate packs at most 1032 bytes into one


@dataclass(frozen=True)
class _Zipped:
    """An array inside an .npz file, read front to back."""

    path: Path
    member: str
    shape: tuple[int, ...]
    dtype: Any

    def rows(self, indices: IntArray, size: int) -> Iterator[Array]:
        yield from _picked(self._blocks(size), indices, self.shape[0], size)

    def _blocks(self, size: int) -> Iterator[Array]:
        """All rows, ``size`` at a time."""
        name, width = self.member.removesuffix(".npy"), prod(self.shape[1:]) * self.dtype.itemsize
        with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as stream:
            _header(stream)
            for start in range(0, self.shape[0], size):
                count = min(size, self.shape[0] - start)
                try:
                    block = stream.read(count * width)
                except DAMAGED as error:
                    raise DataError(f"{self.path}: array '{name}' is damaged: {error}") from error
                if len(block) != count * width:
                    raise DataError(f"{self.path}: array '{name}' is truncated")
                yield np.frombuffer(block, self.dtype).reshape((count, *self.shape[1:]))


def _picked(pieces: Iterable[Array], indices: IntArray, total: int, size: int) -> Iterator[Array]:
    """The rows ``indices`` of pieces with ``total`` rows in all, ``size`` at a time."""
    wanted = np.zeros(total, bool)
    wanted[indices] = True
    held: list[Array] = []
    start = 0
    for piece in pieces:
        held.append(piece[wanted[start : start + len(piece)]])
        start += len(piece)
        while sum(map(len, held)) >= size:
            joined = np.concatenate(held)
            yield joined[:size]
            held = [joined[size:]]
    if any(map(len, held)):
        yield np.concatenate(held)


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, Any]:
    first = np.lib.format.read_magic(stream) == (1, 0)
    try:
        return np.lib.format.read_array_header_1_0(stream) if first else np.lib.format.read_array_header_2_0(stream)
    except DAMAGED:
        raise
    except Exception as error:  # numpy reads the header as Python, and raises what that does
        raise ValueError(f"the header of an array is damaged: {error}") from error


# ---- opening ---------------------------------------------------------------------------------------------------------


def _open_npz(path: Path) -> dict[str, Reader]:
    readers: dict[str, Reader] = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            with archive.open(member) as stream:
                shape, fortran, dtype = _header(stream)
                start = stream.tell()
            if dtype.hasobject:
                raise DataError(f"{path}: array '{member}' holds Python objects, which are not read. Save plain arrays.")
            _check_size(archive.getinfo(member), start, shape, dtype, path)
            name = member.removesuffix(".npy")
            readers[name] = _Zipped(path, member, shape, dtype)
            if fortran and len(shape) > 1:
                with np.load(path) as arrays:
                    readers[name] = Memory(arrays[name])
    return readers


def _check_size(info: zipfile.ZipInfo, start: int, shape: tuple[int, ...], dtype: Any, path: Path) -> None:
    """Refuse an array whose header promises other data than the archive holds, before room is made for it."""
    name, wanted, held = info.filename.removesuffix(".npy"), prod(shape) * dtype.itemsize, info.file_size - start
    if any(size < 0 for size in shape) or wanted != held:
        raise DataError(f"{path}: array '{name}' is truncated or damaged: shape {list(shape)} needs {wanted} bytes, it has {held}")
    if info.file_size > MOST_DEFLATED * max(info.compress_size, 1):
        raise DataError(f"{path}: array '{name}' is damaged: {info.compress_size} bytes cannot unpack to {info.file_size}")


def _open_folder(path: Path, ports: Sequence[Port]) -> dict[str, Reader]:
    """``test_data_set_*`` folders of ``input_*.pb`` tensors: their samples one after the other."""
    folders = [path] if any(path.glob("input_*.pb")) else sorted(path.glob("test_data_set_*"), key=_number)
    columns: dict[str, list[Array]] = {}
    known = [port.name for port in ports]
    for folder in folders:
        for position, file in enumerate(sorted(folder.glob("input_*.pb"), key=_number)):
            name, array = load_tensor(file)
            name = name if name in known else known[position] if position < len(known) else name
            columns.setdefault(name, []).append(array)
    if not columns:
        raise DataError(f"{path}: no test_data_set_*/input_*.pb files in this folder. Expected .npz, .npy, or such a folder.")
    try:
        return {name: Memory(np.concatenate(arrays)) for name, arrays in columns.items()}
    except ValueError as error:
        raise DataError(f"{path}: the tensors of the data sets do not join along the first axis: {error}") from error


def _number(path: Path) -> int:
    return int("0" + "".join(filter(str.isdigit, path.stem)))


def open_source(source: Any, ports: Sequence[Port]) -> Opened:
    """Arrays by name, one array, or the path of such data.

    Raises:
        DataError: they cannot be read, or are not those that the model takes.
    """
    arrays, digest = {"data": source} if isinstance(source, np.ndarray) else source, hashlib.sha256()
    if isinstance(arrays, Mapping):
        for name, array in sorted(arrays.items()):
            digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
        return _assigned({name: Memory(np.asarray(array)) for name, array in arrays.items()}, ports, "the data", digest.hexdigest())
    if not isinstance(source, (str, Path)):
        raise DataError(f"data {repr(source)[:80]}: expected a path, arrays by name, an array, or a function that yields batches")
    path = Path(source)
    if not path.exists():
        raise DataError(f"{path}: no such file. Expected a folder of images, .npz, .npy, test_data_set_* folders, or module:function.")
    try:
        if path.is_dir():
            readers, files = _open_folder(path, ports), sorted(path.rglob("input_*.pb"))
        else:
            readers, files = {"data": Memory(np.load(path, mmap_mode="r"))} if path.suffix == ".npy" else _open_npz(path), [path]
        hash_files(files, digest)
    except DAMAGED as error:
        raise DataError(f"{path}: not a readable .npz or .npy file: {error}") from error
    return _assigned(readers, ports, str(path), digest.hexdigest())


def _assigned(readers: Mapping[str, Reader], ports: Sequence[Port], name: str, digest: str) -> Opened:
    """Which array feeds which input; the labels apart."""
    wanted = [port.name for port in ports]
    label_name = next((key for key in LABEL_NAMES if key in readers and key not in wanted), None)
    labels = None
    if label_name:
        count = next(iter(readers[label_name].shape), 0)
        labels = next(readers[label_name].rows(np.arange(count), count), None) if count else np.zeros(0, np.int64)
    others = {key: reader for key, reader in readers.items() if key != label_name}
    if all(key in others for key in wanted):
        return Opened({key: others[key] for key in wanted}, name, digest, labels)
    if len(wanted) == 1 and len(others) == 1:
        return Opened({wanted[0]: next(iter(others.values()))}, name, digest, labels)
    advice = "Name the arrays like the inputs (labels: 'labels' or 'y')."
    raise DataError(f"{name}: the model's inputs are {wanted}, the data hold {sorted(readers)}. {advice}")


# ---- labels ----------------------------------------------------------------------------------------------------------

LABEL_NAMES = ("labels", "label", "y", "targets")


def load_labels(source: str | Path | Array) -> Array:
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
        raise DataError(f"{path}: cannot read labels (.npy or .npz expected): {getattr(error, 'strerror', None) or error}") from error


def check_labels(labels: Array, count: int, name: str) -> Array:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if not labels.ndim or labels.dtype.kind not in "iufb":
        hint = "Number the classes as the model's outputs, from 0 on."
        raise DataError(f"{name}: labels must be numbers for each sample, found {labels.dtype} of shape {list(labels.shape)}. {hint}")
    if len(labels) != count:
        raise DataError(f"{name}: {len(labels)} labels for {count} samples. Give one for each, in the order of the samples.")
    return labels.astype(np.float64 if labels.dtype.kind == "f" else np.int64)


# ---- batches from any python function --------------------------------------------------------------------------------

NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_call(source: object) -> bool:
    """Whether a source is ``module:function`` and no path that exists, or a function itself."""
    named = isinstance(source, (str, Path)) and NAME.fullmatch(str(source)) and not Path(source).exists()
    return callable(source) or bool(named)


def _batches(function: Callable[[], Any], name: str, ports: Sequence[Port]) -> Iterator[tuple[dict[str, Array], Array | None]]:
    """Arrays by input name, and labels, of every batch.

    Raises:
        DataError: the function fails, or yields something else.
    """
    wanted = [port.name for port in ports]
    try:
        for number, item in enumerate(function()):
            arrays, labels = _parts(item, wanted)
            if arrays is None or len({len(array) for array in [*arrays.values(), *([] if labels is None else [labels])]}) != 1:
                expected = "an array, (array, labels), or a dict by input name (and 'labels'), all with the same number of rows"
                raise DataError(f"{name}: batch {number} is no batch for the inputs {wanted}: expected {expected}")
            yield arrays, labels
    except DataError:
        raise
    except Exception as error:  # whatever the user's function raises
        raise DataError(f"{name} failed: {type(error).__name__}: {error}") from error


def _parts(item: Any, wanted: Sequence[str]) -> tuple[dict[str, Array] | None, Array | None]:
    labels: Any = None
    if isinstance(item, (tuple, list)) and len(item) == 2:
        item, labels = item
    if isinstance(item, Mapping):
        key = next((key for key in LABEL_NAMES if key in item and key not in wanted), None)
        labels = item[key] if key else labels
        arrays = {name: np.asarray(item[name]) for name in wanted if name in item}
    else:
        arrays = {wanted[0]: np.asarray(item)}
    if len(arrays) != len(wanted) or any(array.ndim < 1 or array.dtype.hasobject for array in arrays.values()):
        return None, None
    return arrays, None if labels is None else np.asarray(labels)


@dataclass(frozen=True)
class Called:
    """One input's rows, from a fresh call of the function for every pass."""

    function: Callable[[], Any]
    name: str
    ports: tuple[Port, ...]
    port: str
    shape: tuple[int, ...]
    dtype: Any

    def rows(self, indices: IntArray, size: int) -> Iterator[Array]:
        """The rows ``indices`` (ascending), ``size`` at a time.

        Raises:
            DataError: fewer rows than in the first pass.
        """
        yield from _picked(self._arrays(), indices, self.shape[0], size)

    def _arrays(self) -> Iterator[Array]:
        """The rows of every batch."""
        start = 0
        for arrays, _ in _batches(self.function, self.name, self.ports):
            array = arrays[self.port]
            if array.shape[1:] != self.shape[1:] or start + len(array) > self.shape[0]:
                break
            yield array
            start += len(array)
        if start != self.shape[0]:
            raise DataError(f"{self.name} gave other rows than in its first pass. It must give the same data whenever it is called.")


def open_call(source: Any, ports: Sequence[Port]) -> Opened:
    """Run through the function once: rows are counted, hashed and checked, labels collected.

    Raises:
        OptionError: it cannot be imported. DataError: it yields no batches for the model.
    """
    name = str(source) if not callable(source) else getattr(source, "__name__", "the function")
    function: Callable[[], Any] = source if callable(source) else user_function(name, f"--data {name}")
    digest, labels, count = hashlib.sha256(), [], 0
    first: dict[str, Array] = {}
    for arrays, given in _batches(function, name, ports):
        first = first or {key: array[:1] for key, array in arrays.items()}
        for key, array in sorted(arrays.items()):
            if array.shape[1:] != first[key].shape[1:]:
                raise DataError(f"{name}: rows of '{key}' have shape {list(array.shape[1:])} and {list(first[key].shape[1:])}")
            digest.update(key.encode() + np.ascontiguousarray(array).tobytes())
        count += len(next(iter(arrays.values())))
        labels.append(given)
    if not first:
        raise DataError(f"{name}: it yields no batches.")
    if any(given is None for given in labels) and not all(given is None for given in labels):
        raise DataError(f"{name}: some batches have labels, some have none.")
    joined = None if labels[0] is None else np.concatenate([given for given in labels if given is not None])
    rows = {port.name: first[port.name] for port in ports}
    readers = {key: Called(function, name, tuple(ports), key, (count, *row.shape[1:]), row.dtype) for key, row in rows.items()}
    return Opened(readers, name, digest.hexdigest(), joined)
