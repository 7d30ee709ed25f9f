"""A part of a model as a model of its own: the nodes between some tensors and others."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from ..records import Array, Node
from .model import Model, annotate
from .view import nodes

Shape = Sequence[int | str | None] | None


def between(graph: Sequence[Node], inputs: Collection[str], outputs: Sequence[str]) -> list[int]:
    """Indices of the nodes that compute ``outputs`` from ``inputs`` (and from the model's own inputs, where those lead further)."""
    made_by = {name: node for node in graph for name in node.outputs if name}
    needed: set[int] = set()
    waiting = [name for name in outputs if name not in inputs]
    while waiting:
        node = made_by.get(waiting.pop())
        if node is not None and node.index not in needed:
            needed.add(node.index)
            waiting += [name for name in (*node.inputs, *node.captures) if name and name not in inputs]
    return sorted(needed)


def segment(
    model: Model, inputs: Mapping[str, tuple[Any, Shape]], outputs: Mapping[str, Any], every: Sequence[Node] | None = None
) -> Model:
    """The part of a model that computes ``outputs`` from ``inputs``.

    Args:
        inputs: (dtype, shape) of tensors to be fed; a shape may hold names for dynamic dimensions, or be None. Inputs of the
            model itself that are still needed are added, as the model declares them.
        outputs: dtype of each tensor that is wanted.
        every: the nodes of the model, if they are at hand.
    """
    known = nodes(model) if every is None else every
    wanted = between(known, inputs, list(outputs))
    kept = [model.proto.graph.node[index] for index in wanted]
    read = {name for index in wanted for name in (*known[index].inputs, *known[index].captures)} | set(outputs)
    proto = onnx.ModelProto(ir_version=model.proto.ir_version)
    proto.opset_import.extend(model.proto.opset_import)
    graph = proto.graph
    graph.name = model.proto.graph.name or "segment"
    graph.node.extend(kept)
    graph.initializer.extend(tensor for tensor in model.proto.graph.initializer if tensor.name in read and tensor.name not in inputs)
    graph.sparse_initializer.extend(own for own in model.proto.graph.sparse_initializer if own.values.name in read)
    held = {tensor.name for tensor in graph.initializer}
    graph.input.extend(_port(name, dtype, shape) for name, (dtype, shape) in inputs.items() if name in read)
    graph.input.extend(item for item in model.proto.graph.input if item.name in read and item.name not in inputs and item.name not in held)
    if proto.ir_version < 4:  # initializers must be inputs too
        graph.input.extend(onnx.helper.make_tensor_value_info(item.name, item.data_type, item.dims) for item in graph.initializer)
    graph.output.extend(_port(name, dtype, None) for name, dtype in outputs.items())
    weights = {name: array for name, array in model.weights.items() if name in held}
    return replace(model, proto=proto, weights=weights, edited=True)


def _port(name: str, dtype: Any, shape: Shape) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(dtype), shape)


def with_constants(model: Model, values: Mapping[str, Array]) -> Model:
    """The model with other values for some of its initializers (of the same shape and type; names it does not have are ignored)."""
    present = {tensor.name: index for index, tensor in enumerate(model.proto.graph.initializer)}
    changed = {name: array for name, array in values.items() if name in present}
    if not changed:
        return model
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    weights = dict(model.weights)
    for name, array in changed.items():
        tensor = proto.graph.initializer[present[name]]
        if name in weights:
            weights[name] = array
        else:
            fresh = onnx.numpy_helper.from_array(np.asarray(array, order="C"), name)
            annotate(fresh, tensor)
            tensor.CopyFrom(fresh)
    return replace(model, proto=proto, weights=weights, edited=True)
