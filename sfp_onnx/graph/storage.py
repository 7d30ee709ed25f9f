"""Weights stored in half precision."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from ..core.errors import ModelError
from ..core.types import Array
from .model import Model, make_initializer

LARGEST = float(np.finfo(np.float16).max)


def half_weights(model: Model) -> tuple[Model, Model, tuple[str, ...]]:
    """The model with its large float32 weights stored as float16 behind a Cast, which onnxruntime folds when it loads the model; the
    same model with the rounded weights in float32; and the names of weights that float16 cannot hold and that were left as they are.

    Inputs, outputs, activations and what the kernels compute in stay float32.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    fixed = {item.name for item in [*proto.graph.input, *proto.graph.output]}
    taken = fixed | {tensor.name for tensor in proto.graph.initializer} | {name for node in proto.graph.node for name in node.output}
    stored: dict[str, Array] = dict(model.weights)
    rounded: dict[str, Array] = dict(model.weights)
    casts, left = [], []
    for tensor in proto.graph.initializer:
        name = tensor.name
        if name not in model.weights or model.weights[name].dtype != np.float32 or name in fixed:
            continue
        if not np.abs(model.weights[name]).max() <= LARGEST:
            left.append(name)
            continue
        small = model.weights[name].astype(np.float16)
        own = f"{name}/half"
        while own in taken:
            own += "_"
        taken.add(own)
        del stored[name]
        rounded[name] = small.astype(np.float32)
        tensor.CopyFrom(make_initializer(own, small, stored))
        casts.append(onnx.helper.make_node("Cast", [own], [name], f"{own}/to_float", to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *proto.graph.node]
    fresh = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(fresh)
    return replace(model, proto=proto, weights=stored, edited=True), replace(model, weights=rounded, edited=True), tuple(left)


# ---- sparse initializers ---------------------------------------------------------------------------------------------

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
