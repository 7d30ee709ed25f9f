"""Weights stored in half precision."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx.helper

from ..records import Array
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
