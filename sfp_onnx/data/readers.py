"""Arrays on disk or in memory, read a batch at a time: arrays inside .npz files row by row, .npy files memory-mapped."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from .. import graph
from ..errors import DataError
from ..records import Array, IntArray, Port
from .preprocessing import Preprocessing

DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError)  # RuntimeError: encrypted
MOST_DEFLATED = 1100  # deflate packs at most 1032 bytes into one


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
class Memory:
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
    try:
        return np.lib.format.read_array_header_1_0(stream) if first else np.lib.format.read_array_header_2_0(stream)
    except DAMAGED:
        raise
    except Exception as error:  # numpy reads the header as Python, and raises what that does
        raise ValueError(f"the header of an array is damaged: {error}") from error


@dataclass(frozen=True)
class Opened:
    """A source that was opened. ``labels`` are its own; ``steps`` replace those that were asked for; ``axis`` holds the channels of the
    rows as the model takes them."""

    readers: Mapping[str, Reader]
    name: str
    sha256: str
    labels: Array | None = None
    notes: tuple[str, ...] = ()
    steps: Preprocessing | None = None
    axis: int = 1


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
            if fortran and len(shape) > 1:
                with np.load(path) as arrays:
                    readers[member.removesuffix(".npy")] = Memory(arrays[member.removesuffix(".npy")])
            else:
                readers[member.removesuffix(".npy")] = _Zipped(path, member, shape, dtype)
    return readers


def _check_size(info: zipfile.ZipInfo, start: int, shape: tuple[int, ...], dtype: Any, path: Path) -> None:
    """Refuse an array whose header promises other data than the archive holds, before room is made for it."""
    name, wanted, found = info.filename.removesuffix(".npy"), prod(shape) * dtype.itemsize, info.file_size - start
    if any(size < 0 for size in shape) or wanted != found:
        raise DataError(f"{path}: array '{name}' is truncated or damaged: shape {list(shape)} needs {wanted} bytes, it has {found}")
    if info.file_size > MOST_DEFLATED * max(info.compress_size, 1):
        raise DataError(f"{path}: array '{name}' is damaged: {info.compress_size} bytes cannot unpack to {info.file_size}")


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
        return {name: Memory(np.concatenate(arrays)) for name, arrays in columns.items()}
    except ValueError as error:
        raise DataError(f"{path}: the tensors of the data sets do not join along the first axis: {error}") from error


def _number(path: Path) -> int:
    return int("0" + "".join(filter(str.isdigit, path.stem)))


def open_source(source: str | Path | Mapping[str, Array] | Array, ports: Sequence[Port]) -> tuple[dict[str, Reader], str, str]:
    """Readers by name, a name for messages, and the SHA-256 of the data."""
    if isinstance(source, np.ndarray):
        source = {"data": source}
    if isinstance(source, Mapping):
        digest = hashlib.sha256()
        for name, array in sorted(source.items()):
            digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
        return {name: Memory(np.asarray(array)) for name, array in source.items()}, "the data", digest.hexdigest()
    path = Path(source)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder. Expected calibration data as .npz, .npy or test_data_set_* folders.")
    try:
        if path.is_dir():
            return _open_folder(path, ports), str(path), digest_of(sorted(path.rglob("input_*.pb")))
        if path.suffix == ".npy":
            return {"data": Memory(np.load(path, mmap_mode="r"))}, str(path), digest_of([path])
        return _open_npz(path), str(path), digest_of([path])
    except DAMAGED as error:
        raise DataError(f"{path}: not a readable .npz or .npy file: {error}") from error


def digest_of(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
