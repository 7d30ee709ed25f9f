"""Damage that would make others stumble later: tensors whose data do not fill their shape, types that do not exist."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import onnx
import onnx.helper

from ..errors import ModelError

# Fields that hold the values of a tensor if it has no raw_data, and how many of their items one element takes.
FIELDS: dict[int, tuple[str, int]] = {
    onnx.TensorProto.FLOAT: ("float_data", 1), onnx.TensorProto.COMPLEX64: ("float_data", 2), onnx.TensorProto.DOUBLE: ("double_data", 1),
    onnx.TensorProto.COMPLEX128: ("double_data", 2), onnx.TensorProto.INT64: ("int64_data", 1), onnx.TensorProto.UINT32: ("uint64_data", 1),
    onnx.TensorProto.UINT64: ("uint64_data", 1), onnx.TensorProto.STRING: ("string_data", 1),
}  # fmt: skip
PACKED: dict[int, int] = {
    getattr(onnx.TensorProto, name): bits
    for name, bits in {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}.items()
    if hasattr(onnx.TensorProto, name)
}


def check_sound(proto: onnx.ModelProto, name: str) -> None:
    """Look at every tensor and every declared type, before anything is made of them.

    Raises:
        ModelError: the tensor or value that is damaged, and how.
    """
    for graph in _graphs(proto.graph):
        for item in (*graph.input, *graph.output, *graph.value_info):
            kind = item.type.tensor_type.elem_type if item.type.HasField("tensor_type") else 0
            if kind and not _known(kind):
                raise ModelError(f"{name}: tensor '{item.name}' has the unknown element type {kind}. The file is damaged: export it again.")
        for node in graph.node:
            for attribute in node.attribute:
                if not all(_is_text(own) for own in (attribute.s, *attribute.strings)):
                    raise ModelError(f"{name}: node '{node.name}': attribute '{attribute.name}' is no UTF-8 text. Export the model again.")
        for tensor in _tensors(graph):
            found = _complaint(tensor)
            if found:
                raise ModelError(f"{name}: tensor '{tensor.name}' is damaged: {found}. Export the model again.")


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _graphs(inner)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from ([attribute.t] if attribute.HasField("t") else [])
            yield from attribute.tensors


def _known(kind: int) -> bool:
    try:
        onnx.helper.tensor_dtype_to_np_dtype(kind)
    except (KeyError, ValueError, TypeError):
        return False
    return True


def _is_text(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _complaint(tensor: onnx.TensorProto) -> str:
    if not tensor.data_type or not _known(tensor.data_type):
        return f"its element type {tensor.data_type} is unknown"
    if any(size < 0 for size in tensor.dims):
        return f"its shape {list(tensor.dims)} has a negative size"
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return ""  # compared with the file when it is mapped
    count = prod(tensor.dims)
    if tensor.HasField("raw_data"):
        bits = PACKED.get(tensor.data_type) or 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        wanted, found, what = (count * bits + 7) // 8, len(tensor.raw_data), "bytes"
        if tensor.data_type == onnx.TensorProto.STRING:
            return "strings cannot stand in raw_data"
    else:
        field, each = FIELDS.get(tensor.data_type, ("int32_data", 1))
        wanted, found, what = count * each, len(getattr(tensor, field)), f"numbers in {field}"
        if tensor.data_type in PACKED:
            wanted = (count * PACKED[tensor.data_type] + 7) // 8
    return "" if wanted == found else f"shape {list(tensor.dims)} needs {wanted} {what}, it has {found}"
