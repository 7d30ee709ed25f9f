"""A part of a model as a model of its own: the nodes between some tensors and others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ..core.types import Array, Node, Port
from . import GraphIndex, Model, Prepared, annotate, make_initializer, nodes


def segment(model: Model, inputs: Sequence[Port], outputs: Mapping[str, Any], index: GraphIndex | None = None) -> Model:
    """The part of a model that computes ``outputs`` from ``inputs``.

    Args:
        inputs: tensors to be fed. Inputs of the model itself that are still needed are added, as the model declares them.
        outputs: dtype of each tensor that is wanted.
        index: that of the model, if it is at hand.
    """
    fed = {port.name for port in inputs}
    wanted = (index or GraphIndex(nodes(model))).needed(outputs, fed)
    read = {name for node in wanted for name in node.reads} | set(outputs)
    proto = onnx.ModelProto(ir_version=model.proto.ir_version)
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


def _declared(port: Port) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(port.name, helper.np_dtype_to_tensor_dtype(port.dtype), port.shape)


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
            fresh = numpy_helper.from_array(np.asarray(array, order="C"), name)
            annotate(fresh, tensor)
            tensor.CopyFrom(fresh)
    return replace(model, proto=proto, weights=weights, edited=True)


# ---- the part of a graph that computes sizes -------------------------------------------------------------------------


def shape_program(prepared: Prepared, wanted: Sequence[str], sizes: Mapping[str, Array]) -> tuple[Model, dict[str, Array]]:
    """A model that computes ``wanted`` from the results of all shape queries, and those of these results that it reads."""
    nodes = prepared.index.needed(wanted, sizes)
    read = {*wanted, *(name for node in nodes for name in node.reads)}
    feeds = {name: array for name, array in sizes.items() if name in read}
    return _part(prepared.model, nodes, feeds, wanted), feeds


def constant_program(prepared: Prepared, wanted: str) -> Model:
    """A model without inputs that computes a tensor which is a function of constants alone."""
    return _part(prepared.model, prepared.index.needed([wanted]), {}, [wanted])


def _part(model: Model, nodes: Sequence[Node], feeds: Mapping[str, Array], wanted: Sequence[str]) -> Model:
    source, needed = model.proto, {*wanted, *(name for node in nodes for name in node.reads)}
    proto = onnx.ModelProto()
    proto.CopyFrom(source)
    for field in ("node", "input", "output", "initializer", "value_info", "sparse_initializer", "quantization_annotation"):
        proto.graph.ClearField(field)
    proto.graph.node.extend(source.graph.node[node.index] for node in nodes)
    proto.graph.initializer.extend(tensor for tensor in source.graph.initializer if tensor.name in needed)
    for name, array in feeds.items():
        proto.graph.input.append(helper.make_tensor_value_info(name, onnx.TensorProto.INT64, array.shape))
    proto.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in wanted)
    return replace(model, proto=proto, weights={name: array for name, array in model.weights.items() if name in needed})


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
        source, target = "x" if index == 0 else f"t{index}", f"t{index + 1}"
        nodes.append(helper.make_node("Conv", [source, f"w{index}"], [target], pads=[1] * 4))
    nodes.append(helper.make_node("GlobalAveragePool", [f"t{layers}"], ["y"]))
    ports = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("x", [1, width, side, side]), ("y", [1, width, 1, 1]))
    ]
    proto = helper.make_model(
        helper.make_graph(nodes, "probe", ports[:1], ports[1:], tensors), opset_imports=[helper.make_opsetid("", OPSET)]
    )
    proto.ir_version = IR
    return Model(proto, weights, "")


def named_by_output(model: Model) -> Model:
    """The same model with every node named after its first output: names by which onnxruntime's records can be read."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for node in proto.graph.node:
        node.name = next(iter(filter(None, node.output)), node.name)
    return replace(model, proto=proto)
