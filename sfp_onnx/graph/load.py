"""Reading models: files, external data, local functions, Constant nodes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.inliner
import onnx.numpy_helper
from google.protobuf.message import DecodeError

from ..errors import DataError, ModelError
from ..records import Array
from .model import INLINE_BYTES, ONNX_DOMAINS, Model, check, make_stub


def load(source: str | Path | onnx.ModelProto) -> Model:
    """Read a model from a file or a ModelProto (which is copied, not touched).

    External data are memory-mapped, never read as a whole. Local functions are inlined, Constant nodes become initializers.

    Raises:
        ModelError: not an ONNX file, truncated, invalid, or external data missing.
    """
    if isinstance(source, onnx.ModelProto):
        proto, path, digest = onnx.ModelProto(), None, hashlib.sha256()
        proto.CopyFrom(source)
        digest.update(proto.SerializeToString(deterministic=True))
    else:
        path = Path(source)
        proto, digest = _parse(path)
    name = str(path) if path else "the model"
    files = _external_files(proto, path, name)
    for file in files:
        _hash_file(file, digest)
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    weights: dict[str, Array] = {}
    _constants_to_initializers(proto.graph)
    for tensor in proto.graph.initializer:
        _detach(tensor, weights, path, name)
    model = Model(proto, weights, digest.hexdigest(), path, bool(files))
    check(model)
    return model


def _parse(path: Path) -> tuple[onnx.ModelProto, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot read the model: {error.strerror or error}") from error
    digest = hashlib.sha256(data)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise ModelError(f"{path}: not an ONNX file, or a truncated one ({len(data)} bytes do not parse). Export it again.") from error
    if not proto.ir_version or not proto.graph.output:
        raise ModelError(f"{path}: not an ONNX file: it parses, but holds no graph with outputs. Expected an exported .onnx model.")
    return proto, digest


def _hash_file(path: Path, digest: Any) -> None:
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)


def _external_files(proto: onnx.ModelProto, path: Path | None, name: str) -> list[Path]:
    """Files with external data, checked to exist inside the model's folder."""
    files: dict[Path, None] = {}
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            files[_external_path(tensor, path, name)] = None
    return list(files)


def _external_path(tensor: onnx.TensorProto, path: Path | None, name: str) -> Path:
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    if path is None:
        raise ModelError(f"tensor '{tensor.name}' keeps its data in the file '{location}', but a ModelProto has no folder: pass the path")
    folder = path.resolve().parent
    file = (folder / location).resolve()
    if not file.is_relative_to(folder):
        raise ModelError(f"{name}: tensor '{tensor.name}' points to external data outside the model's folder: '{location}'. Refused.")
    if not file.is_file():
        raise ModelError(f"{name}: external data file '{location}' of tensor '{tensor.name}' is missing. Put it next to the model.")
    return file


def _detach(tensor: onnx.TensorProto, weights: dict[str, Array], path: Path | None, name: str) -> None:
    """Move a large or external tensor out of the protobuf; a stub with its type and shape stays."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        array = _map_external(tensor, path, name)
    elif not _plain(tensor) or _bytes(tensor) <= INLINE_BYTES:
        return
    else:
        try:
            array = onnx.numpy_helper.to_array(tensor)
        except (ValueError, TypeError) as error:
            raise ModelError(f"{name}: initializer '{tensor.name}' is damaged: its data do not fill shape {list(tensor.dims)}") from error
    weights[tensor.name] = array
    tensor.CopyFrom(make_stub(tensor.name, array, tensor))


def _plain(tensor: onnx.TensorProto) -> bool:
    """Whether numpy itself knows the type, so that onnxruntime takes the array as it is (not bfloat16, int4, strings)."""
    if tensor.data_type == onnx.TensorProto.STRING:
        return False
    return onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).isbuiltin == 1


def _bytes(tensor: onnx.TensorProto) -> int:
    return int(np.prod(tensor.dims, dtype=np.float64)) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _map_external(tensor: onnx.TensorProto, path: Path | None, name: str) -> Array:
    file = _external_path(tensor, path, name)
    entries = {entry.key: entry.value for entry in tensor.external_data}
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    shape, offset = tuple(tensor.dims), int(entries.get("offset", 0))
    if _bytes(tensor) + offset > file.stat().st_size or offset < 0:
        raise ModelError(
            f"{name}: external data file '{file.name}' is truncated: tensor '{tensor.name}' needs {_bytes(tensor)} bytes at {offset}, "
            f"the file has {file.stat().st_size}"
        )
    if not _bytes(tensor):
        return np.zeros(shape, dtype)
    return np.memmap(file, dtype=dtype, mode="r", offset=offset, shape=shape)


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    """Turn Constant nodes of the main graph into initializers."""
    kept = []
    for node in graph.node:
        tensor = _constant_tensor(node) if node.op_type == "Constant" and node.domain in ONNX_DOMAINS else None
        if tensor is None:
            kept.append(node)
        else:
            graph.initializer.append(tensor)
    if len(kept) != len(graph.node):
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
        del graph.node[:]
        graph.node.extend(nodes)


def _constant_tensor(node: onnx.NodeProto) -> onnx.TensorProto | None:
    attribute = node.attribute[0]
    tensor = onnx.TensorProto()
    if attribute.name == "value":
        tensor.CopyFrom(attribute.t)
    elif attribute.name in ("value_float", "value_floats"):
        tensor = onnx.numpy_helper.from_array(np.asarray(onnx.helper.get_attribute_value(attribute), np.float32))
    elif attribute.name in ("value_int", "value_ints"):
        tensor = onnx.numpy_helper.from_array(np.asarray(onnx.helper.get_attribute_value(attribute), np.int64))
    else:
        return None
    tensor.name = node.output[0]
    return tensor


def load_tensor(path: Path) -> tuple[str, Array]:
    """Name and value of a serialized TensorProto (``input_0.pb``).

    Raises:
        DataError: not a tensor.
    """
    tensor = onnx.TensorProto()
    try:
        tensor.ParseFromString(path.read_bytes())
        return tensor.name, onnx.numpy_helper.to_array(tensor)
    except (DecodeError, ValueError, TypeError, OSError) as error:
        raise DataError(f"{path}: not a serialized ONNX tensor: {error}") from error
