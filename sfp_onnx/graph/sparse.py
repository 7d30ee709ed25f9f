"""Sparse initializers: read as dense ones, written where that is smaller."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
import onnx.numpy_helper

from ..errors import ModelError
from ..records import Array

INDEX_BYTES = 8  # onnx.checker takes 64-bit indices only
OVERHEAD_BYTES = 48  # names and headers of the two tensors inside
FIRST_IR_VERSION = 6
STORED = (np.float16, np.float32, np.float64)


def densify(graph: onnx.GraphProto, name: str) -> None:
    """Turn all sparse initializers into dense ones.

    Raises:
        ModelError: indices that do not fit the shape.
    """
    for sparse in graph.sparse_initializer:
        graph.initializer.append(onnx.numpy_helper.from_array(to_dense(sparse, name), sparse.values.name))
    del graph.sparse_initializer[:]


def to_dense(sparse: onnx.SparseTensorProto, name: str) -> Array:
    """The value of a sparse tensor (coordinates, or positions in row-major order)."""
    shape = tuple(sparse.dims)
    try:
        values, indices = onnx.numpy_helper.to_array(sparse.values), onnx.numpy_helper.to_array(sparse.indices).astype(np.int64)
        if indices.ndim == 2:
            indices = np.ravel_multi_index(tuple(indices.T), shape)
        if indices.shape != values.shape or indices.min(initial=0) < 0:
            raise ValueError(f"{values.shape} values at {indices.shape} indices from {indices.min(initial=0)} on")
        dense = np.zeros(int(np.prod(shape)), values.dtype)
        dense[indices] = values
    except (ValueError, IndexError, TypeError) as error:
        raise ModelError(f"{name}: sparse initializer '{sparse.values.name}' of shape {list(shape)} is damaged: {error}") from error
    return dense.reshape(shape)


def sparse_bytes(array: Array) -> int:
    """Bytes of an array as a sparse initializer."""
    return int(np.count_nonzero(array)) * (array.dtype.itemsize + INDEX_BYTES) + OVERHEAD_BYTES


def sparsify(proto: onnx.ModelProto, only: Iterable[str]) -> None:
    """Make initializers sparse where that is smaller: floating ones, named in ``only``, that are not listed as inputs."""
    graph = proto.graph
    inputs, wanted = {item.name for item in graph.input}, set(only)
    kept = []
    for tensor in graph.initializer:
        array = onnx.numpy_helper.to_array(tensor) if tensor.name in wanted and tensor.name not in inputs else None
        if array is None or array.dtype not in STORED or sparse_bytes(array) >= array.nbytes or not array.any():
            kept.append(onnx.TensorProto.FromString(tensor.SerializeToString()))
            continue
        flat = array.reshape(-1)
        indices = np.flatnonzero(flat).astype(np.int64)
        sparse = graph.sparse_initializer.add(dims=array.shape)
        sparse.values.CopyFrom(onnx.numpy_helper.from_array(flat[indices], tensor.name))
        sparse.indices.CopyFrom(onnx.numpy_helper.from_array(indices))
    if len(kept) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(kept)
        proto.ir_version = max(proto.ir_version, FIRST_IR_VERSION)
