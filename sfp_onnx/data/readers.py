"""Arrays on disk or in memory, read a batch at a time: arrays inside .npz files row by row, .npy files memory-mapped;
and batches from any Python function."""

from __future__ import annotations

import hashlib
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..core.errors import DataError
from ..core.system import user_function
from ..core.types import Array, IntArray, Port
from ..graph.load import hash_files, load_tensor
from . import Memory, Opened, Reader
from .layout import Apart, batch_symbol, count_of, fitted, known, rows_of, sample_axes, texts

DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError)  # RuntimeError: encrypted
PLAIN = "Save plain arrays (samples of different length: padded, with a mask), or yield them from --data module:function."
MOST_DEFLATED = 1100  # deflate packs at most 1032 bytes into one


@dataclass(frozen=True)
class _Zipped:
    """An array inside an .npz file, read front to back."""

    path: Path
    member: str
    shape: tuple[int, ...]
    dtype: Any

    def rows(self, chunks: Iterable[IntArray]) -> Iterator[Array]:
        """The rows of each chunk of indices."""
        chunks = list(chunks)
        yield from _picked(self._blocks(max(map(len, chunks), default=1)), chunks, self.shape[0])

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


def _picked(pieces: Iterable[Array], chunks: Sequence[IntArray], total: int) -> Iterator[Array]:
    """The rows of each chunk, from pieces with ``total`` rows in all, which are used up."""
    wanted, start, rest = np.zeros(total, bool), 0, iter(pieces)
    for chunk in chunks:
        wanted[chunk] = True
    buffer = np.zeros(0)
    for chunk in chunks:
        parts: list[Array] = []
        missing = len(chunk)
        while missing:
            while not len(buffer):
                piece = next(rest)
                buffer = piece[wanted[start : start + len(piece)]]
                start += len(piece)
            parts.append(buffer[:missing])
            missing -= len(parts[-1])
            buffer = buffer[len(parts[-1]) :]
        yield np.concatenate(parts) if len(parts) > 1 else parts[0]
    for _ in rest:
        pass


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
                raise DataError(f"{path}: array '{member}' holds Python objects, which are not read. {PLAIN}")
            _check_size(archive.getinfo(member), start, shape, dtype, path)
            name = member.removesuffix(".npy")
            readers[name] = _Zipped(path, member, shape, dtype)
            if dtype.kind == "S" or (len(shape) != 1 and (fortran or not shape)):
                with np.load(path) as arrays:
                    readers[name] = Memory(texts(arrays[name]))
    return readers


def _check_size(info: zipfile.ZipInfo, start: int, shape: tuple[int, ...], dtype: Any, path: Path) -> None:
    """Refuse an array whose header promises other data than the archive holds, before room is made for it."""
    name, wanted, held = info.filename.removesuffix(".npy"), prod(shape) * dtype.itemsize, info.file_size - start
    if any(size < 0 for size in shape) or wanted != held:
        raise DataError(f"{path}: array '{name}' is truncated or damaged: shape {list(shape)} needs {wanted} bytes, it has {held}")
    if info.file_size > MOST_DEFLATED * max(info.compress_size, 1):
        raise DataError(f"{path}: array '{name}' is damaged: {info.compress_size} bytes cannot unpack to {info.file_size}")


def _folders(path: Path, ports: Sequence[Port]) -> Iterator[dict[str, Array]]:
    """The tensors of each ``test_data_set_*`` folder (or of this one): whole feeds."""
    known = [port.name for port in ports]
    for folder in [path] if any(path.glob("input_*.pb")) else sorted(path.glob("test_data_set_*"), key=_number):
        feeds = {}
        for position, file in enumerate(sorted(folder.glob("input_*.pb"), key=_number)):
            name, array = load_tensor(file)
            feeds[name if name in known else known[position] if position < len(known) else name] = array
        if feeds:
            yield feeds


def _number(path: Path) -> int:
    return int("0" + "".join(filter(str.isdigit, path.stem)))


def open_source(source: Any, ports: Sequence[Port]) -> Opened:
    """Arrays by name, one array, or the path of such data.

    Raises:
        DataError: they cannot be read, or are not those that the model takes.
    """
    arrays, digest = {"data": source} if isinstance(source, np.ndarray) else source, hashlib.sha256()
    if isinstance(arrays, Mapping):
        arrays = {name: texts(np.asarray(array)) for name, array in arrays.items()}
        for name, array in sorted(arrays.items()):
            digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
        return _assigned({name: Memory(array) for name, array in arrays.items()}, ports, "the data", digest.hexdigest())
    if not isinstance(source, (str, Path)):
        raise DataError(f"data {repr(source)[:80]}: expected a path, arrays by name, an array, or a function that yields batches")
    path = Path(source)
    if not path.exists():
        raise DataError(f"{path}: no such file. Expected a folder of images, .npz, .npy, test_data_set_* folders, or module:function.")
    if path.is_dir():
        hash_files(sorted(path.rglob("input_*.pb")), digest)
        return replace(open_call(lambda: _folders(path, ports), ports, str(path)), sha256=digest.hexdigest())
    try:
        readers = {"data": Memory(texts(np.load(path, mmap_mode="r")))} if path.suffix == ".npy" else _open_npz(path)
        hash_files([path], digest)
    except DAMAGED as error:
        advice = f". {PLAIN}" if "Python objects" in str(error) else ""
        raise DataError(f"{path}: not a readable .npz or .npy file: {error}".rstrip(".") + advice) from error
    return _assigned(readers, ports, str(path), digest.hexdigest())


def _assigned(readers: Mapping[str, Reader], ports: Sequence[Port], name: str, digest: str) -> Opened:
    """Which array feeds which input; the labels apart."""
    wanted = [port.name for port in ports]
    label_name = next((key for key in LABEL_NAMES if key in readers and key not in wanted), None)
    labels = _all(readers[label_name]) if label_name else None
    others = {key: reader for key, reader in readers.items() if key != label_name}
    if len(wanted) == 1 and len(others) == 1:
        others = {wanted[0]: next(iter(others.values()))}
    if not all(key in others for key in wanted):
        advice = "Name the arrays like the inputs (labels: 'labels' or 'y')."
        raise DataError(f"{name}: the model's inputs are {wanted}, the data hold {sorted(readers)}. {advice}")
    return _arranged({key: others[key] for key in wanted}, ports, Opened({}, name, digest, labels))


def _arranged(readers: Mapping[str, Reader], ports: Sequence[Port], opened: Opened) -> Opened:
    """Readers of one row per sample, whichever axis the samples are on; inputs without such an axis are the same for all samples, and
    arrays without a common one are a single feed."""
    held = {port.name: fitted(_all(readers[port.name]), port) for port in ports if _odd(port, readers[port.name])}
    shapes = {name: held[name].shape if name in held else reader.shape for name, reader in readers.items()}
    try:
        axes = sample_axes(ports, [shapes])
    except Apart as error:
        sizes = {name: next(iter(shape), 1) for name, shape in shapes.items()}
        if min(sizes.values()) > 1:
            raise DataError(f"{opened.name}: the arrays have different numbers of samples: {sizes} ({error})") from error
        axes = dict.fromkeys(shapes)
    each = [port.name for port in ports if axes[port.name] is None and len(shapes[port.name]) == len(port.shape or ()) + 1]
    count = count_of(axes, shapes) if known(axes) or not each else shapes[each[0]][0]
    arranged, groups = dict(readers), np.zeros(count, np.int64)
    for port in ports:
        name, axis = port.name, axes[port.name]
        if axis != 0 or name in held or shapes[name][0] != count:
            array = held[name] if name in held else _all(readers[name])
            arranged[name] = Memory(rows_of(array, axis, port, count))
        if name in each and shapes[name][0] == count:
            rows = np.asarray(_all(arranged[name])).reshape(count, -1)
            groups[1:] += np.cumsum((rows[1:] != rows[:-1]).any(1) | (port.shape not in ((), (1,))))
    return replace(opened, readers=arranged, axes=axes, groups=groups if groups.any() else None)


def _odd(port: Port, reader: Reader) -> bool:
    """Whether an array is to be looked at before it can be read row by row: texts, and what stands for a scalar."""
    return np.dtype(reader.dtype).kind in "SO" or (port.shape in ((), (1,)) and int(np.prod(reader.shape)) == 1)


def _all(reader: Reader) -> Array:
    """All rows."""
    if isinstance(reader, Memory):
        return reader.array
    return next(reader.rows([np.arange(reader.shape[0])])) if reader.shape[0] else np.zeros(reader.shape, reader.dtype)


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


# ---- runs: batches from any python function, lists, folders of tensors --------------------------------------------------

NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
COMPARED = 4096  # bytes of a value up to which runs are compared for having the same


def is_call(source: object) -> bool:
    """Whether a source is ``module:function`` and no path that exists, a function itself, or a list of runs (or of each input's values)."""
    named = isinstance(source, (str, Path)) and NAME.fullmatch(str(source)) and not Path(source).exists()
    return callable(source) or bool(named) or isinstance(source, (list, tuple)) or _lists(source)


def _lists(source: object) -> bool:
    """Whether a mapping holds lists of arrays that are no array together."""
    return isinstance(source, Mapping) and any(map(_listed, source.values()))


def _listed(value: Any) -> bool:
    held = isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.dtype.hasobject and value.ndim == 1)
    return held and len({np.shape(item) for item in value}) > 1


def _function(source: Any) -> tuple[Callable[[], Any], str]:
    """What yields the runs of a source, and its name."""
    if callable(source):
        return source, getattr(source, "__name__", "the function")
    if isinstance(source, (str, Path)):
        return user_function(str(source), f"--data {source}"), str(source)
    if isinstance(source, Mapping):
        most = max(len(value) for value in source.values() if _listed(value))
        several = {name: len(value) for name, value in source.items() if isinstance(value, (list, tuple)) or np.ndim(value)}
        if {*several.values()} - {1, most}:
            raise DataError(f"the data: different numbers of samples: {several}")
        values = {name: value if several.get(name) == most else [value] * most for name, value in source.items()}
        return lambda: ({name: value[index] for name, value in values.items()} for index in range(most)), "the data"
    return lambda: source, "the data"


@dataclass(frozen=True)
class _Run:
    """Inputs of one run, and labels of its samples."""

    arrays: dict[str, Array]
    labels: Array | None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: array.shape for name, array in self.arrays.items()}


def _runs(function: Callable[[], Any], name: str, ports: Sequence[Port]) -> Iterator[_Run]:
    """Arrays by input name, and labels, of every run.

    Raises:
        DataError: the function fails, or yields something else.
    """
    try:
        for number, item in enumerate(function()):
            run = _parts(item, ports)
            if run is None:
                expected = "an array, (array, labels), or a dict by input name (and 'labels'), all with the same number of rows"
                wanted = [port.name for port in ports]
                raise DataError(f"{name}: batch {number} is no batch for the inputs {wanted}: expected {expected}")
            yield run
    except DataError:
        raise
    except Exception as error:  # whatever the user's function raises
        raise DataError(f"{name} failed: {type(error).__name__}: {error}") from error


def _parts(item: Any, ports: Sequence[Port]) -> _Run | None:
    labels: Any = None
    if isinstance(item, (tuple, list)) and len(item) == 2:
        item, labels = item
    if isinstance(item, Mapping):
        key = next((key for key in LABEL_NAMES if key in item and key not in {port.name for port in ports}), None)
        labels = item[key] if key else labels
    else:
        item = {ports[0].name: item}
    arrays = {port.name: texts(np.asarray(item[port.name])) for port in ports if port.name in item}
    if len(arrays) != len(ports) or any(array.dtype.hasobject for array in arrays.values()):
        return None
    arrays = {port.name: fitted(arrays[port.name], port, single=True) for port in ports}
    return _Run(arrays, None if labels is None else np.atleast_1d(labels))


@dataclass(frozen=True)
class Called:
    """One input's rows, from a fresh call of the function for every pass; ``counts`` of each run."""

    function: Callable[[], Any]
    name: str
    ports: tuple[Port, ...]
    port: Port
    axis: int | None
    counts: tuple[int, ...]
    shape: tuple[Any, ...]
    dtype: Any

    def rows(self, chunks: Iterable[IntArray]) -> Iterator[Array]:
        """The rows of each chunk.

        Raises:
            DataError: other rows than in the first pass.
        """
        yield from _picked(self._arrays(), list(chunks), self.shape[0])

    def _arrays(self) -> Iterator[Array]:
        """The rows of every run."""
        done = 0
        for run in _runs(self.function, self.name, self.ports):
            count = self.counts[done] if done < len(self.counts) else -1
            array = run.arrays[self.port.name]
            sizes = zip(self.shape[1:], _row(array.shape, self.axis), strict=False)
            counted = self.axis is None or array.shape[self.axis] in (1, count)
            if count < 0 or not counted or any(dim not in (None, size) for dim, size in sizes):
                break
            done += 1
            yield rows_of(array, self.axis, self.port, count)
        if done < len(self.counts) or count < 0:
            raise DataError(f"{self.name} gave other rows than in its first pass. It must give the same data whenever it is called.")


def open_call(source: Any, ports: Sequence[Port], name: str = "") -> Opened:
    """Run through the function once: rows are counted, hashed and checked, labels collected. With a ``name``: every run stays alone.

    Raises:
        OptionError: it cannot be imported. DataError: it yields no batches for the model.
    """
    function, called = _function(source)
    digest, labels, shapes, alone = hashlib.sha256(), [], [], bool(name)
    name, values, dtypes = name or called, list[dict[str, Any]](), dict[str, Any]()
    for run in _runs(function, name, ports):
        for key, array in sorted(run.arrays.items()):
            digest.update(key.encode() + np.ascontiguousarray(array).tobytes())
            dtypes[key] = np.promote_types(dtypes.get(key, array.dtype), array.dtype)
        values.append({key: array.tobytes() if array.nbytes <= COMPARED else len(values) for key, array in run.arrays.items()})
        shapes.append(run.shapes)
        labels.append(run.labels)
    if not shapes:
        raise DataError(f"{name}: it yields no batches.")
    axes, counts = _divided(ports, shapes, name)
    if any(given is None for given in labels) and not all(given is None for given in labels):
        raise DataError(f"{name}: some batches have labels, some have none.")
    for number, (count, given) in enumerate(zip(counts, labels, strict=True)):
        if given is not None and len(given) != count:
            words = f"{len(given)} labels for {count} samples, expected the same number of rows"
            raise DataError(f"{name}: batch {number} is no batch for the inputs: {words}")
    joined = None if labels[0] is None else np.concatenate([given for given in labels if given is not None])
    readers, keys = {}, []
    for port in ports:
        axis, rows = axes[port.name], [_row(shape[port.name], axes[port.name]) for shape in shapes]
        same = [sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*rows, strict=False)]
        readers[port.name] = Called(function, name, tuple(ports), port, axis, counts, (sum(counts), *same), dtypes[port.name])
        keys.append([(row, value[port.name] if axis is None else 0) for row, value in zip(rows, values, strict=True)])
    changes = [alone or one != other for one, other in pairwise(zip(*keys, strict=True))]
    groups = np.repeat(np.cumsum([0, *changes]), counts)
    if all(axis is None for axis in axes.values()):
        groups = np.arange(len(counts))
    return Opened(readers, name, digest.hexdigest(), joined, axes=axes, groups=groups if groups.any() else None)


def _row(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    return shape if axis is None else (*shape[:axis], *shape[axis + 1 :])


def _divided(ports: Sequence[Port], shapes: Sequence[Mapping[str, Any]], name: str) -> tuple[dict[str, int | None], tuple[int, ...]]:
    """The sample axes of runs, and the samples of each; runs that cannot be divided are one sample each."""
    try:
        axes = sample_axes(ports, shapes)
    except Apart:
        symbol = batch_symbol(ports)
        for number, run in enumerate(shapes):
            placed = [(port.name, port.shape.index(symbol)) for port in ports if port.shape and symbol in port.shape]
            sizes = {key: run[key][axis] for key, axis in placed if axis < len(run[key])}
            if len({*sizes.values()} - {1}) > 1:
                words = f"expected the same number of rows, found {sizes}"
                raise DataError(f"{name}: batch {number} is no batch for the inputs: {words}") from None
        axes = dict.fromkeys(port.name for port in ports)
    return axes, tuple(count_of(axes, run) for run in shapes)
