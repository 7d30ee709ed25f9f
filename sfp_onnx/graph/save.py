"""Writing models and text files, atomically."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.checker
import onnx.numpy_helper

from ..errors import ModelError, OptionError, OutputError
from ..records import Array
from .atomic import atomic
from .model import Model, annotate
from .sparse import sparsify
from .view import serialized

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
