"""Looking at models: nodes, ports, constants, types."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import onnx
import onnx.helper
import onnx.numpy_helper
import onnx.shape_inference

from ..errors import ModelError
from ..records import Array, Node, Port
from .model import ONNX_DOMAINS, Model


def initializers(model: Model) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of every initializer."""
    found = {}
    for tensor in model.proto.graph.initializer:
        found[tensor.name] = (tuple(tensor.dims), onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    return found


class Constants(Mapping[str, Array]):
    """Values of initializers by name (read-only): small ones decoded once, large ones as they are held."""

    def __init__(self, model: Model) -> None:
        self.weights = model.weights
        tensors = (tensor for tensor in model.proto.graph.initializer if tensor.name not in model.weights)
        self.small = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in tensors}

    def __getitem__(self, name: str) -> Array:
        return self.small[name] if name in self.small else self.weights[name]

    def __iter__(self) -> Iterator[str]:
        yield from self.small
        yield from self.weights

    def __len__(self) -> int:
        return len(self.small) + len(self.weights)


def nodes(model: Model) -> list[Node]:
    """The nodes in their (topological) order."""
    found = []
    taken = {node.name for node in model.proto.graph.node}
    for index, node in enumerate(model.proto.graph.node):
        domain = "" if node.domain in ONNX_DOMAINS else node.domain
        attributes = {attribute.name: _attribute(attribute, node, model.name) for attribute in node.attribute}
        captures = tuple(dict.fromkeys(name for attribute in node.attribute for name in _captured(attribute)))
        name = node.name or f"{node.op_type}_{index}"
        while not node.name and name in taken:
            name += "_"
        found.append(Node(index, name, node.op_type, domain, tuple(node.input), tuple(node.output), attributes, captures))
    return found


def _attribute(attribute: onnx.AttributeProto, node: onnx.NodeProto, name: str) -> Any:
    try:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, onnx.TensorProto):
            return onnx.numpy_helper.to_array(value)
    except (ValueError, TypeError) as error:
        where = f"attribute '{attribute.name}' of node '{node.name}' ({node.op_type})"
        raise ModelError(f"{name}: {where} is damaged: {error} Export the model again.") from error
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value


def _captured(attribute: onnx.AttributeProto) -> Iterator[str]:
    """Names that the sub-graphs of an attribute read from outside."""
    for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
        own = {item.name for item in [*graph.input, *graph.initializer]}
        for node in graph.node:
            yield from (name for name in node.input if name and name not in own)
            for inner in node.attribute:
                yield from (name for name in _captured(inner) if name not in own)
            own.update(node.output)
        yield from (item.name for item in graph.output if item.name not in own)


def inputs(model: Model) -> list[Port]:
    """Inputs that the user feeds (initializers that are listed as inputs too are constants here)."""
    held = {tensor.name for tensor in model.proto.graph.initializer}
    return [_port(item) for item in model.proto.graph.input if item.name not in held]


def outputs(model: Model) -> list[Port]:
    """Outputs in their order."""
    return [_port(item) for item in model.proto.graph.output]


def _port(item: onnx.ValueInfoProto) -> Port:
    tensor = item.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type) if tensor.elem_type else None
    if not tensor.HasField("shape"):
        return Port(item.name, dtype, None)
    shape: list[int | str | None] = []
    for dim in tensor.shape.dim:
        fixed = dim.HasField("dim_value") and dim.dim_value >= 0  # some exporters write -1 for "any"
        shape.append(dim.dim_value if fixed else dim.dim_param or None)
    return Port(item.name, dtype, tuple(shape))


def tensor_types(model: Model) -> dict[str, Any]:
    """Dtype of every tensor that onnx's type inference knows; None for sequences, maps and optionals."""
    try:
        inferred = onnx.shape_inference.infer_shapes(model.proto)
    except Exception:  # inference is advice; onnxruntime has the last word on whether the model is valid
        inferred = model.proto
    found: dict[str, Any] = {name: dtype for name, (_, dtype) in initializers(model).items()}
    for item in [*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output]:
        if item.type.HasField("tensor_type"):
            if item.type.tensor_type.elem_type:
                found[item.name] = onnx.helper.tensor_dtype_to_np_dtype(item.type.tensor_type.elem_type)
        elif item.type.WhichOneof("value"):
            found[item.name] = None
    return found


def serialized(model: Model) -> bytes:
    """The protobuf with stubs, as onnxruntime takes it together with ``weights``."""
    data: bytes = model.proto.SerializeToString(deterministic=True)
    return data
