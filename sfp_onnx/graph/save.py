"""Writing files so that they are there whole or not at all, whatever ends the program.

Contents go to files without a name (where the system has them: Linux's O_TMPFILE), so that a killed program leaves nothing behind; they
get their names when all is written. Files that belong together get them under a lock of their folder, so that of two runs that write
to the same names at the same time one wins as a whole.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
import onnx.checker
import onnx.numpy_helper

from ..core.errors import ModelError, OptionError, OutputError
from ..core.types import Array
from .model import Model, annotate, serialized
from .storage import sparsify

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
DESCRIPTORS = Path("/proc/self/fd")


@dataclass
class _File:
    """A file that is being written; ``temporary`` is its name until then (None: it has none)."""

    path: Path
    stream: IO[bytes]
    temporary: str | None

    def settle(self) -> None:
        """Bring the contents to the disk."""
        self.stream.flush()
        os.fsync(self.stream.fileno())

    def step_up(self) -> None:
        """Take a temporary name, if there is an older file of the final one."""
        if self.temporary is None and os.path.lexists(self.path):
            hidden = tempfile.mktemp(prefix=f".{self.path.name}.", suffix=".tmp", dir=self.path.parent)
            self.temporary = hidden if self._link(hidden) else self._copy()

    def appear(self) -> None:
        """Take the final name."""
        if self.temporary is None and not self._link(self.path):
            self.temporary = self._copy()
        self.stream.close()
        if self.temporary is not None:
            os.replace(self.temporary, self.path)
            self.temporary = None

    def _link(self, name: str | Path) -> bool:
        """Give a nameless file a name that is not taken; whether that worked."""
        number = self.stream.fileno()
        with suppress(OSError):
            os.link(f"{DESCRIPTORS}/{number}", name, src_dir_fd=number, follow_symlinks=True)  # a number makes Python call linkat,
            return True  # which can follow the link to the file
        return False

    def _copy(self) -> str:
        """The contents under a temporary name, where the file system cannot name nameless files."""
        stream, name = _named(self.path)
        with stream, open(f"{DESCRIPTORS}/{self.stream.fileno()}", "rb") as source:
            shutil.copyfileobj(source, stream)
            stream.flush()
            os.fsync(stream.fileno())
        return name

    def drop(self) -> None:
        """Leave nothing behind."""
        with suppress(OSError):
            self.stream.close()
        if self.temporary is not None and os.path.exists(self.temporary):
            os.unlink(self.temporary)


def _named(path: Path) -> tuple[IO[bytes], str]:
    """A file with a temporary name, open to whom a new file would be."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)
    return os.fdopen(handle, "wb"), temporary


def _open(path: Path) -> _File:
    if hasattr(os, "O_TMPFILE") and DESCRIPTORS.is_dir():
        with suppress(OSError):  # a file system without nameless files
            return _File(path, os.fdopen(os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o666), "wb"), None)
    return _File(path, *_named(path))


# ---- several files ---------------------------------------------------------------------------------------------------


@dataclass
class _Writing:
    """Files that will appear together, in this order."""

    files: list[_File] = field(default_factory=list)


_CURRENT: ContextVar[_Writing | None] = ContextVar("sfp_onnx.writing", default=None)


@contextmanager
def together() -> Iterator[None]:
    """All files that are written inside appear at its end, or none of them if it fails (also if a later one cannot be written).

    Older files of their names (but the first) are removed just before, so that none ever stands beside files of another run: write
    first what the others belong to.

    Raises:
        OutputError: a file cannot take its name.
    """
    if _CURRENT.get() is not None:
        yield
        return
    writing = _Writing()
    token = _CURRENT.set(writing)
    try:
        yield
        _appear(writing.files)
    finally:
        _CURRENT.reset(token)
        for file in writing.files:
            file.drop()


def _appear(files: list[_File]) -> None:
    with ExitStack() as stack:
        for folder in sorted({file.path.parent.resolve() for file in files}):
            stack.enter_context(_locked(folder))
        for file in files:
            with _said(file.path):
                file.step_up()
        for file in reversed(files[1:]):
            with _said(file.path):
                file.path.unlink(missing_ok=True)
        for file in files:
            with _said(file.path):
                file.appear()


@contextmanager
def _said(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: cannot write: {error.strerror or error}") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait for other runs that name files in a folder (an advisory lock; where there is none, nothing)."""
    handle = None
    if fcntl is not None:
        with suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


@contextmanager
def atomic(*paths: Path) -> Iterator[list[IO[bytes]]]:
    """Write files that appear together: ``with atomic(path) as (stream,)``. Inside `together`, they appear at its end."""
    with together():
        writing = _CURRENT.get()
        assert writing is not None
        opened: list[_File] = []
        try:
            for path in paths:
                opened.append(_open(path))
            yield [file.stream for file in opened]
            for file in opened:
                file.settle()
        except BaseException:
            for file in opened:
                file.drop()
            raise
        writing.files += opened


# ---- writing models and text files -----------------------------------------------------------------------------------

PROTOBUF_LIMIT = 2**31 - 2**20
PAGE = 4096  # external data start at a multiple, so that they can be mapped


def full_size(model: Model) -> int:
    """Bytes of the saved file, to within a few bytes per tensor."""
    return len(serialized(model)) + sum(array.nbytes for array in model.weights.values())


def file_bytes(model: Model) -> int:
    """Bytes of the file (and its external data), or of what would be saved."""
    if model.edited or model.source is None or not model.source.exists():
        return full_size(model)
    return model.source.stat().st_size + sum(file.stat().st_size for file in model.files)


def to_proto(model: Model, sparse: bool = False) -> onnx.ModelProto:
    """A self-contained ModelProto; ``sparse``: with sparse initializers where they are smaller.

    Raises:
        ModelError: over protobuf's 2 GB limit (save it with external data instead).
    """
    if full_size(model) > PROTOBUF_LIMIT:
        raise ModelError(f"{model.name}: over 2 GB does not fit one protobuf; save it with external data")
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for tensor in proto.graph.initializer:
        if tensor.name in model.weights:
            whole = onnx.numpy_helper.from_array(np.ascontiguousarray(model.weights[tensor.name]), tensor.name)
            annotate(whole, tensor)
            tensor.CopyFrom(whole)
    if sparse:
        sparsify(proto, model.weights)
        _check_sparse(proto, model)
    return proto


def _check_sparse(proto: onnx.ModelProto, model: Model) -> None:
    if not model.complaint:
        try:
            onnx.checker.check_model(proto)
        except (onnx.checker.ValidationError, ValueError) as error:
            raise ModelError(f"{model.name}: onnx.checker rejects the sparse initializers: {error}. Store the model dense.") from error


def save(model: Model, path: str | Path, external: bool | None = None, sparse: bool = False) -> Path:
    """Write the model atomically: it appears whole under its name, or not at all.

    ``external``: keep weights in ``<name>.data`` (default: only over 2 GB). ``sparse``: sparse initializers where they are smaller.

    Raises:
        OptionError: sparse and external at once.
        OutputError: missing folder, no permission, path equal to the input.
    """
    path = Path(path)
    check_output(path, model.paths)
    files = _contents(model, path, external, sparse)
    for other in files[1:]:
        check_output(other[0], model.paths)
    try:
        with atomic(*(own for own, _ in reversed(files))) as streams:  # the data first, the model that refers to them last
            for stream, (_, pieces) in zip(reversed(streams), files, strict=True):
                for piece in pieces:
                    stream.write(piece)
    except OSError as error:
        raise OutputError(f"{path}: cannot write: {error.strerror or error}") from error
    return path


def fingerprint(model: Model, path: str | Path, external: bool | None = None, sparse: bool = False) -> tuple[str, int]:
    """SHA-256 (as `load` computes it) and bytes of what `save` writes under this name, without writing it."""
    digest, count = hashlib.sha256(), 0
    for _, pieces in _contents(model, Path(path), external, sparse):
        for piece in pieces:
            digest.update(piece)
            count += len(piece)
    return digest.hexdigest(), count


def _contents(model: Model, path: Path, external: bool | None, sparse: bool) -> list[tuple[Path, Iterable[Any]]]:
    """Files and what they hold, in pieces of bytes: the model, and its external data if it has any."""
    external = full_size(model) > PROTOBUF_LIMIT if external is None else external
    if external and sparse:
        raise OptionError("sparse initializers cannot be kept as external data (models over 2 GB need those): store the model dense")
    if not external:
        return [(path, [to_proto(model, sparse).SerializeToString(deterministic=True)])]
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    data, offset, arrays = path.with_name(path.name + ".data"), 0, []
    for tensor in proto.graph.initializer:
        if tensor.name in model.weights:
            array = model.weights[tensor.name]
            arrays.append(array)
            offset += -offset % PAGE
            del tensor.external_data[:]
            for key, value in (("location", data.name), ("offset", str(offset)), ("length", str(array.nbytes))):
                tensor.external_data.add(key=key, value=value)
            offset += array.nbytes
    return [(path, [proto.SerializeToString(deterministic=True)]), (data, _pages(arrays))]


def _pages(arrays: Iterable[Array]) -> Iterator[Any]:
    """The bytes of arrays, each from the start of a page on."""
    offset = 0
    for array in arrays:
        yield bytes(-offset % PAGE)
        offset += -offset % PAGE + array.nbytes
        held = np.ascontiguousarray(array)
        yield held.data.cast("B") if held.dtype.isbuiltin == 1 and held.size else held.tobytes()


def check_output(path: Path, inputs: Iterable[Path] = ()) -> None:
    """Refuse an output path that cannot or must not be written.

    Raises:
        OutputError: one of the ``inputs``, a folder or device, a missing folder, no permission.
    """
    try:
        if any(path.resolve() == source.resolve() for source in inputs):
            raise OutputError(f"{path}: the output is an input file (or another output), which is never touched. Choose another name.")
        if path.is_dir():
            raise OutputError(f"{path}: the output is a folder. Expected a file name.")
        if path.exists() and not path.is_file():
            raise OutputError(f"{path}: the output is no regular file, and would be replaced. Expected a file name.")
        if not path.parent.is_dir():
            raise OutputError(f"{path}: the folder '{path.parent}' does not exist. Make it first.")
        if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
            raise OutputError(f"{path}: no permission to write there.")
    except OSError as error:
        raise OutputError(f"{path}: cannot write: {error.strerror or error}") from error


def write_text(path: str | Path, text: str, inputs: Iterable[Path] = ()) -> None:
    """Write a text file atomically.

    Raises:
        OutputError: as `save`.
    """
    path = Path(path)
    check_output(path, inputs)
    try:
        with atomic(path) as (stream,):
            stream.write(text.encode())
    except OSError as error:
        raise OutputError(f"{path}: cannot write: {error.strerror or error}") from error
