"""Models that exist to be timed: a chain of convolutions, and a model whose nodes can be recognised in onnxruntime's records."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx.helper

from ..records import Array
from .model import Model, make_initializer

OPSET, IR = 13, 7


def conv_chain(width: int, layers: int = 4, side: int = 14) -> Model:
    """``layers`` 3x3 convolutions, width -> width, on a 1 x width x side x side input ``x``, and a global mean as output ``y``."""
    random = np.random.default_rng(0)
    nodes, tensors = [], []
    weights: dict[str, Array] = {}
    for index in range(layers):
        kernel = (random.standard_normal((width, width, 3, 3)) / (3 * np.sqrt(width))).astype(np.float32)
        tensors.append(make_initializer(f"w{index}", kernel, weights))
        source, made = "x" if index == 0 else f"t{index}", f"t{index + 1}"
        nodes.append(onnx.helper.make_node("Conv", [source, f"w{index}"], [made], pads=[1] * 4))
    nodes.append(onnx.helper.make_node("GlobalAveragePool", [f"t{layers}"], ["y"]))
    ports = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("x", [1, width, side, side]), ("y", [1, width, 1, 1]))
    ]
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "probe", ports[:1], ports[1:], tensors), opset_imports=[onnx.helper.make_opsetid("", OPSET)]
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
