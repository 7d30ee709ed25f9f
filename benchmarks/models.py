"""Models that the benchmarks build themselves."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Builder:
    """Appends layers with seeded random weights to a graph."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def weight(self, name: str, values: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def node(self, op: str, inputs: list[str], **attributes: object) -> str:
        output = f"{op}_{len(self.nodes)}_out"
        self.nodes.append(helper.make_node(op, inputs, [output], f"{op}_{len(self.nodes)}", **attributes))
        return output

    def conv(self, x: str, ins: int, outs: int, kernel: int, stride: int = 1) -> str:
        """Convolution and BatchNormalization."""
        name = f"conv{len(self.nodes)}"
        scale = np.sqrt(2 / (ins * kernel * kernel))
        w = self.weight(f"{name}.weight", self.random.standard_normal((outs, ins, kernel, kernel)) * scale)
        y = self.node("Conv", [x, w], kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[kernel // 2] * 4)
        vectors = (("gamma", self.random.uniform(0.5, 1.5, outs)), ("beta", self.random.normal(0, 0.1, outs)))
        vectors += (("mean", self.random.normal(0, 0.1, outs)), ("var", self.random.uniform(0.5, 1.5, outs)))
        return self.node("BatchNormalization", [y, *(self.weight(f"{name}.{key}", value) for key, value in vectors)])


def resnet50(classes: int = 1000, side: int | str = 224) -> onnx.ModelProto:
    """ResNet-50 (25.6 M parameters) with random weights, dynamic batch, 3 x side x side (a name makes it dynamic)."""
    b = Builder()
    x = b.node("Relu", [b.conv("input", 3, 64, 7, 2)])
    x = b.node("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    width = 64
    for stage, (depth, inner) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
        for block in range(depth):
            stride = 2 if block == 0 and stage else 1
            y = b.node("Relu", [b.conv(x, width, inner, 1)])
            y = b.node("Relu", [b.conv(y, inner, inner, 3, stride)])
            y = b.conv(y, inner, inner * 4, 1)
            if block == 0:
                x = b.conv(x, width, inner * 4, 1, stride)
            width = inner * 4
            x = b.node("Relu", [b.node("Add", [y, x])])
    x = b.node("Flatten", [b.node("GlobalAveragePool", [x])])
    w = b.weight("fc.weight", b.random.standard_normal((classes, width)) * 0.02)
    b.nodes.append(helper.make_node("Gemm", [x, w, b.weight("fc.bias", np.zeros(classes))], ["logits"], "fc", transB=1))
    graph = helper.make_graph(
        b.nodes,
        "resnet50",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, side, side])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])],
        b.weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
