"""Writing files so that they are there whole or not at all, whatever ends the program; models with large weights beside them, in half
precision, or sparse.

Contents go to a hidden file in the same folder, ``.NAME.<random>.tmp``, that is renamed when all is written; `core.system` removes what a
killed program leaves of them. Files that belong together are renamed under a lock of their folder, so that of two runs that write to
the same names at the same time one wins as a whole.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from ..core.errors import ModelError, OptionError, OutputError
from ..core.system import goes_at_the_end
from ..core.types import Array
from . import Model, filled, make_initializer, rejection, replace_items
from .wire import filled as with_weights

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class _File:
    """A file that is being written under a temporary name."""

    def __init__(self, path: Path) -> None:
        self.path, self.temporary = path, path.with_name(f".{path.name[:50]}.{secrets.token_hex(6)}.tmp")
        goes_at_the_end(self.temporary)
        self.stream: IO[bytes] = open(self.temporary, "xb")  # noqa: SIM115

    def settle(self) -> None:
        """Bring the contents to the disk."""
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()

    def drop(self) -> None:
        """Leave nothing behind."""
        for step in (self.stream.close, self.temporary.unlink):
            with suppress(OSError):
                step()


_CURRENT: ContextVar[list[_File] | None] = ContextVar("sfp_onnx.writing", default=None)


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
    files: list[_File] = []
    token = _CURRENT.set(files)
    try:
        yield
        _appear(files)
    finally:
        _CURRENT.reset(token)
        for file in files:
            file.drop()


def _appear(files: list[_File]) -> None:
    with ExitStack() as stack:
        for folder in sorted({file.path.parent.resolve() for file in files}):
            _lock(folder, stack)
        for file in reversed(files[1:]):
            with writing(file.path):
                file.path.unlink(missing_ok=True)
        for file in files:
            with writing(file.path):
                os.replace(file.temporary, file.path)


def _lock(folder: Path, until: ExitStack) -> None:
    """Wait for other runs that name files in a folder (an advisory lock; where there is none, nothing)."""
    if fcntl is not None:
        with suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            until.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the system while ``path`` is written.

    Raises:
        OutputError: the path, and the system's words.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: cannot write: {error.strerror or error}") from error


@contextmanager
def atomic(*paths: Path) -> Iterator[list[IO[bytes]]]:
    """Write files that appear together: ``with atomic(path) as (stream,)``. Inside `together`, they appear at its end."""
    with together(), ExitStack() as undo:
        files, opened = _CURRENT.get(), []
        assert files is not None
        for path in paths:
            opened.append(_File(path))
            undo.callback(opened[-1].drop)
        yield [file.stream for file in opened]
        for file in opened:
            file.settle()
        files += opened
        undo.pop_all()


# ---- writing models and text files -----------------------------------------------------------------------------------

PROTOBUF_LIMIT = 2**31 - 2**20
TOO_LARGE = "over 2 GB does not fit one protobuf; save it with external data"
PAGE = 4096  # external data start at a multiple, so that they can be mapped


def full_size(model: Model) -> int:
    """Bytes of the saved file with all weights in it."""
    graph = model.proto.graph
    inner = graph.ByteSize()
    for tensor in graph.initializer:
        if tensor.name in model.weights:
            plain = TensorProto()
            plain.CopyFrom(tensor)
            del plain.external_data[:]
            plain.ClearField("data_location")
            held = plain.ByteSize() + _framed(model.weights[tensor.name].nbytes)
            inner += _framed(held) - _framed(tensor.ByteSize())
    return int(model.proto.ByteSize() - _framed(graph.ByteSize()) + _framed(inner))


def _framed(length: int) -> int:
    """Bytes of a field of so many bytes in a protobuf, with its tag and its length (seven bits a byte) in front."""
    return 1 + max(1, -(-length.bit_length() // 7)) + length


def file_bytes(model: Model) -> int:
    """Bytes of the file (and its external data), or of what would be saved."""
    if model.edited or model.source is None or not model.source.exists():
        return full_size(model)
    return model.source.stat().st_size + sum(file.stat().st_size for file in model.files)


def saved_bytes(model: Model, path: str | Path | None = None, external: bool | None = None) -> int:
    """Bytes of what `save` writes, weights beside the model among them."""
    whole = full_size(model)
    return whole if not external and whole <= PROTOBUF_LIMIT else fingerprint(model, path or "model.onnx", external)[1]


def to_proto(model: Model, sparse: bool = False) -> ModelProto:
    """A self-contained ModelProto; ``sparse``: with sparse initializers where they are smaller.

    Raises:
        ModelError: over protobuf's 2 GB limit (save it with external data instead).
    """
    if full_size(model) > PROTOBUF_LIMIT:
        raise ModelError(f"{model.name}: {TOO_LARGE}")
    proto = filled(model)
    if sparse:
        proto = proto if proto is not model.proto else model.copied()
        sparsify(proto, model.weights)
        if not model.complaint and (problem := rejection(proto)):
            raise ModelError(f"{model.name}: onnx.checker rejects the sparse initializers: {problem}. Store the model dense.")
    return proto


def save(model: Model, path: str | Path, external: bool | None = None, sparse: bool = False) -> Path:
    """Write the model atomically: it appears whole under its name, or not at all.

    ``external``: keep weights in ``<name>.data`` (default: only over 2 GB). ``sparse``: sparse initializers where they are smaller.

    Raises:
        OptionError: sparse and external at once.
        OutputError: missing folder, no permission, path equal to the input.
    """
    path = Path(path)
    files = _contents(model, path, external, sparse)
    for file, _ in files:
        check_output(file, model.paths)
    with writing(path), atomic(*(file for file, _ in reversed(files))) as streams:  # the data first, the model that refers to them last
        for stream, (_, pieces) in zip(reversed(streams), files, strict=True):
            for piece in pieces:
                stream.write(piece)
    return path


def fingerprint(model: Model, path: str | Path, external: bool | None = None, sparse: bool = False) -> tuple[str, int]:
    """SHA-256 (as `load` computes it) and bytes of what `save` writes under this name, without writing it."""
    digest, count = hashlib.sha256(), 0
    for _, pieces in _contents(model, Path(path), external, sparse):
        for piece in pieces:
            digest.update(piece)
            count += len(piece)  # of bytes, or of memory seen as bytes
    return digest.hexdigest(), count


def _contents(model: Model, path: Path, external: bool | None, sparse: bool) -> list[tuple[Path, Iterable[Any]]]:
    """Files and what they hold, in pieces of bytes: the model, and its external data if it has any."""
    external = full_size(model) > PROTOBUF_LIMIT if external is None else external
    if external and sparse:
        raise OptionError("sparse initializers cannot be kept as external data (models over 2 GB need those): store the model dense")
    if not external:
        return [(path, [to_proto(model, True).SerializeToString(deterministic=True)] if sparse else _whole(model))]
    proto = model.copied()
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


def _whole(model: Model) -> list[Any]:
    """The pieces of one file; the large weights are those in memory, and not copied.

    Raises:
        ModelError: over protobuf's 2 GB limit.
    """
    if full_size(model) > PROTOBUF_LIMIT:
        raise ModelError(f"{model.name}: {TOO_LARGE}")
    proto = model.copied()
    for tensor in proto.graph.initializer:
        if tensor.name in model.weights:
            del tensor.external_data[:]
            tensor.ClearField("data_location")
            tensor.raw_data = b""
    return with_weights(proto.SerializeToString(deterministic=True), model.weights, [tensor.name for tensor in proto.graph.initializer])


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
    with writing(path):
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


def write_text(path: str | Path, text: str, inputs: Iterable[Path] = ()) -> None:
    """Write a text file atomically.

    Raises:
        OutputError: as `save`.
    """
    path = Path(path)
    check_output(path, inputs)
    with writing(path), atomic(path) as (stream,):
        stream.write(text.encode())


# ---- weights in half precision ---------------------------------------------------------------------------------------

LARGEST = float(np.finfo(np.float16).max)


def half_weights(model: Model) -> tuple[Model, Model, tuple[str, ...]]:
    """The model with its large float32 weights stored as float16 behind a Cast, which onnxruntime folds when it loads the model; the
    same model with the rounded weights in float32; and the names of weights that float16 cannot hold and that were left as they are.

    Inputs, outputs, activations and what the kernels compute in stay float32.
    """
    proto = model.copied()
    fixed = {item.name for item in [*proto.graph.input, *proto.graph.output]}
    taken = fixed | {tensor.name for tensor in proto.graph.initializer} | {name for node in proto.graph.node for name in node.output}
    stored, rounded = dict(model.weights), dict(model.weights)
    casts, left = [], []
    for tensor in proto.graph.initializer:
        name = tensor.name
        if name not in model.weights or model.weights[name].dtype != np.float32 or name in fixed:
            continue
        if not np.abs(model.weights[name]).max() <= LARGEST:
            left.append(name)
            continue
        small = model.weights[name].astype(np.float16)
        half = f"{name}/half"
        while half in taken:
            half += "_"
        taken.add(half)
        del stored[name]
        rounded[name] = small.astype(np.float32)
        tensor.CopyFrom(make_initializer(half, small, stored))
        casts.append(helper.make_node("Cast", [half], [name], f"{half}/to_float", to=TensorProto.FLOAT))
    replace_items(proto.graph.node, [*casts, *proto.graph.node])
    return replace(model, proto=proto, weights=stored, edited=True), replace(model, weights=rounded, edited=True), tuple(left)


# ---- sparse initializers ---------------------------------------------------------------------------------------------


INDEX_BYTES = 8  # onnx.checker takes 64-bit indices only

OVERHEAD_BYTES = 48  # names and headers of the two tensors inside

FIRST_IR_VERSION = 6

STORED = (np.float16, np.float32, np.float64)


def sparsify(proto: ModelProto, only: Iterable[str]) -> None:
    """Make initializers sparse where that is smaller: floating ones, named in ``only``, that are not listed as inputs."""
    graph = proto.graph
    inputs, wanted = {item.name for item in graph.input}, set(only)
    kept = []
    for tensor in graph.initializer:
        flat = numpy_helper.to_array(tensor).reshape(-1) if tensor.name in wanted and tensor.name not in inputs else np.zeros(0)
        indices = np.flatnonzero(flat).astype(np.int64)
        size = len(indices) * (flat.dtype.itemsize + INDEX_BYTES) + OVERHEAD_BYTES
        if flat.dtype not in STORED or size >= flat.nbytes or not len(indices):
            kept.append(tensor)
            continue
        sparse = graph.sparse_initializer.add(dims=tensor.dims)
        sparse.values.CopyFrom(numpy_helper.from_array(flat[indices], tensor.name))
        sparse.indices.CopyFrom(numpy_helper.from_array(indices))
    if len(kept) < len(graph.initializer):
        replace_items(graph.initializer, kept)
        proto.ir_version = max(proto.ir_version, FIRST_IR_VERSION)
