"""Writing models and text files, atomically."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper

from ..errors import ModelError, OutputError
from .model import Model
from .view import serialized

PROTOBUF_LIMIT = 2**31 - 2**20


def full_size(model: Model) -> int:
    """Bytes of the saved file, to within a few bytes per tensor."""
    return len(serialized(model)) + sum(array.nbytes for array in model.weights.values())


def to_proto(model: Model) -> onnx.ModelProto:
    """A self-contained ModelProto.

    Raises:
        ModelError: over protobuf's 2 GB limit (save it with external data instead).
    """
    if full_size(model) > PROTOBUF_LIMIT:
        raise ModelError(f"{model.name}: over 2 GB does not fit one protobuf; save it with external data")
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for tensor in proto.graph.initializer:
        if tensor.name in model.weights:
            doc = tensor.doc_string
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(model.weights[tensor.name]), tensor.name))
            if doc:
                tensor.doc_string = doc
    return proto


def save(model: Model, path: str | Path, external: bool | None = None) -> Path:
    """Write the model atomically: it appears whole under its name, or not at all.

    ``external``: keep weights in ``<name>.data`` (default: only over 2 GB).

    Raises:
        OutputError: missing folder, no permission, path equal to the input.
    """
    path = Path(path)
    check_output(path, model.source)
    external = full_size(model) > PROTOBUF_LIMIT if external is None else external
    try:
        if external:
            proto = onnx.ModelProto()
            proto.CopyFrom(model.proto)
            data = path.with_name(path.name + ".data")
            check_output(data, None)
            with atomic(data) as stream:
                _write_external(model, proto, data.name, stream)
        else:
            proto = to_proto(model)
        with atomic(path) as stream:
            stream.write(proto.SerializeToString(deterministic=True))
    except OSError as error:
        raise OutputError(f"{path}: cannot write: {error.strerror or error}") from error
    return path


def _write_external(model: Model, proto: onnx.ModelProto, name: str, stream: Any) -> None:
    for tensor in proto.graph.initializer:
        if tensor.name not in model.weights:
            continue
        stream.seek(-stream.tell() % 4096, os.SEEK_CUR)
        offset, array = stream.tell(), np.ascontiguousarray(model.weights[tensor.name])
        stream.write(array.data.cast("B") if array.dtype.isbuiltin == 1 else array.tobytes())
        del tensor.external_data[:]
        for key, value in (("location", name), ("offset", str(offset)), ("length", str(array.nbytes))):
            tensor.external_data.add(key=key, value=value)


def check_output(path: Path, source: Path | None) -> None:
    """Refuse an output path that cannot or must not be written."""
    if source is not None and path.resolve() == source.resolve():
        raise OutputError(f"{path}: the output is the input file, which is never touched. Choose another name.")
    if path.is_dir():
        raise OutputError(f"{path}: the output is a folder. Expected a file name.")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder '{path.parent}' does not exist. Make it first.")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise OutputError(f"{path}: no permission to write there.")


class atomic:
    """Write to a temporary file in the same folder, then rename: ``with atomic(path) as stream``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Any:
        handle, self.temporary = tempfile.mkstemp(prefix=f".{self.path.name}.", suffix=".tmp", dir=self.path.parent)
        self.stream = os.fdopen(handle, "wb")
        return self.stream

    def __exit__(self, kind: object, *rest: object) -> None:
        try:
            if kind is None:
                self.stream.flush()
                os.fsync(self.stream.fileno())
            self.stream.close()
            if kind is None:
                umask = os.umask(0)
                os.umask(umask)
                os.chmod(self.temporary, 0o666 & ~umask)
                os.replace(self.temporary, self.path)
        finally:
            if os.path.exists(self.temporary):
                os.unlink(self.temporary)


def write_text(path: str | Path, text: str, source: Path | None = None) -> None:
    """Write a text file atomically.

    Raises:
        OutputError: as `save`.
    """
    path = Path(path)
    check_output(path, source)
    try:
        with atomic(path) as stream:
            stream.write(text.encode())
    except OSError as error:
        raise OutputError(f"{path}: cannot write: {error.strerror or error}") from error
