"""A part of a model as a model of its own: the nodes between some tensors and others; and models that exist only to be timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from ..core.types import Array, Node, Port
from . import GraphIndex, Model, Prepared, make_initializer, nodes, outside, replace_items, set_value


def segment(model: Model, inputs: Sequence[Port], outputs: Mapping[str, object], index: GraphIndex | None = None) -> Model:
    """The part of a model that computes ``outputs`` from ``inputs``.

    Args:
        inputs: tensors to be fed. Inputs of the model itself that are still needed are added, as the model declares them.
        outputs: dtype of each tensor that is wanted (None: onnxruntime infers it).
        index: that of the model, if it is at hand.
    """
    fed = {port.name for port in inputs}
    wanted = (index or GraphIndex(nodes(model))).needed(outputs, fed)
    read = {name for node in wanted for name in node.reads} | set(outputs)
    proto = ModelProto(ir_version=model.proto.ir_version)
    proto.opset_import.extend(model.proto.opset_import)
    graph = proto.graph
    graph.name = model.proto.graph.name or "segment"
    graph.node.extend(model.proto.graph.node[node.index] for node in wanted)
    graph.initializer.extend(tensor for tensor in model.proto.graph.initializer if tensor.name in read and tensor.name not in fed)
    graph.sparse_initializer.extend(tensor for tensor in model.proto.graph.sparse_initializer if tensor.values.name in read)
    held = {tensor.name for tensor in graph.initializer}
    graph.input.extend(_declared(port) for port in inputs if port.name in read)
    graph.input.extend(item for item in model.proto.graph.input if item.name in read - fed - held)
    if proto.ir_version < 4:  # initializers must be inputs too
        graph.input.extend(helper.make_tensor_value_info(item.name, item.data_type, item.dims) for item in graph.initializer)
    graph.output.extend(_declared(Port(name, dtype, None)) for name, dtype in outputs.items())
    weights = {name: array for name, array in model.weights.items() if name in held}
    return replace(model, proto=proto, weights=weights, edited=True)


def body(model: Model, node: Node, attribute: str, types: Mapping[str, Any]) -> tuple[Model, list[str]]:
    """The graph in an attribute of a node as a model, with the constants of the model that it reads, and the names of its own inputs.
    What else it reads from outside is an input too, of the ``types`` of the model's tensors."""
    inner = next(item.g for item in model.proto.graph.node[node.index].attribute if item.name == attribute)
    proto = ModelProto(ir_version=model.proto.ir_version, graph=inner)
    proto.opset_import.extend(model.proto.opset_import)
    graph, own = proto.graph, [item.name for item in inner.input]
    graph.name = graph.name or attribute
    read = dict.fromkeys(outside(inner))
    graph.initializer.extend(tensor for tensor in model.proto.graph.initializer if tensor.name in read)
    held = {tensor.name for tensor in graph.initializer}
    inputs = [Port(item.name, helper.tensor_dtype_to_np_dtype(item.type.tensor_type.elem_type), None) for item in inner.input]
    inputs += [Port(name, types.get(name), None) for name in read if name not in held]
    replace_items(graph.input, map(_declared, inputs))
    for item in graph.output:
        item.type.tensor_type.ClearField("shape")
    weights = {name: array for name, array in model.weights.items() if name in held}
    return replace(model, proto=proto, weights=weights, edited=True), own


def _declared(port: Port) -> ValueInfoProto:
    if port.dtype is None:
        return helper.make_empty_tensor_value_info(port.name)
    return helper.make_tensor_value_info(port.name, helper.np_dtype_to_tensor_dtype(port.dtype), port.shape)


def with_constants(model: Model, values: Mapping[str, Array]) -> Model:
    """The model with other values for some of its initializers (of the same shape and type; names it does not have are ignored)."""
    if not any(tensor.name in values for tensor in model.proto.graph.initializer):
        return model
    proto = model.copied()
    for tensor in proto.graph.initializer:
        if tensor.name in values and tensor.name not in model.weights:
            set_value(tensor, values[tensor.name])
    weights = {name: values.get(name, array) for name, array in model.weights.items()}
    return replace(model, proto=proto, weights=weights, edited=True)


# ---- the part of a graph that computes sizes -------------------------------------------------------------------------


def shape_program(prepared: Prepared, wanted: Sequence[str], sizes: Mapping[str, Array]) -> tuple[Model, dict[str, Array]]:
    """A model that computes ``wanted`` from the results of all shape queries, and those of these results that it reads."""
    ports = [Port(name, np.dtype(np.int64), array.shape) for name, array in sizes.items()]
    program = segment(prepared.model, ports, dict.fromkeys(wanted), prepared.index)
    read = {item.name for item in program.proto.graph.input}
    return program, {name: array for name, array in sizes.items() if name in read}


# ---- models that exist to be timed -----------------------------------------------------------------------------------

OPSET, IR = 13, 7


def conv_chain(width: int, layers: int = 4, side: int = 14) -> Model:
    """``layers`` 3x3 convolutions, width -> width, on a 1 x width x side x side input ``x``, and a global mean as output ``y``."""
    random = np.random.default_rng(0)
    nodes, tensors = [], []
    weights: dict[str, Array] = {}
    for index in range(layers):
        kernel = (random.standard_normal((width, width, 3, 3)) / (3 * np.sqrt(width))).astype(np.float32)
        tensors.append(make_initializer(f"w{index}", kernel, weights))
        nodes.append(helper.make_node("Conv", [f"t{index}" if index else "x", f"w{index}"], [f"t{index + 1}"], pads=[1] * 4))
    nodes.append(helper.make_node("GlobalAveragePool", [f"t{layers}"], ["y"]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, width, side, side])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, width, 1, 1])
    graph = helper.make_graph(nodes, "probe", [x], [y], tensors)
    return Model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR), weights, "")


def integer_product(depth: int = 64) -> Model:
    """The product of unsigned ``x`` (1, depth) and of the largest signed 8-bit weights (depth, 1), as output ``y`` (1, 1)."""
    weights: dict[str, Array] = {}
    tensor = make_initializer("w", np.full((depth, 1), 127, np.int8), weights)
    ports = [helper.make_tensor_value_info(name, kind, [1, size])
             for name, kind, size in (("x", TensorProto.UINT8, depth), ("y", TensorProto.INT32, 1))]  # fmt: skip
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "probe", ports[:1], ports[1:], [tensor])
    return Model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR), weights, "")


def named_by_output(model: Model) -> Model:
    """The same model with every node named after its first output: names by which onnxruntime's records can be read."""
    proto = model.copied()
    for node in proto.graph.node:
        node.name = next(iter(filter(None, node.output)), node.name)
    return replace(model, proto=proto)
