"""The part of a graph that computes sizes, cut out so that it can be run alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod

import numpy as np
import onnx
import onnx.helper

from ..records import Array, Node
from .model import Model, Prepared

# What gives another result every time, or is no tensor.
UNSTEADY = frozenset(
    "RandomNormal RandomUniform RandomNormalLike RandomUniformLike Multinomial Bernoulli Dropout If Loop Scan Optional "
    "SequenceEmpty".split()
)


def asks_shape(node: Node) -> bool:
    """Whether an operator reads only the shape of its input, so that its result is known without data."""
    return node.op in ("Shape", "Size") and not node.domain


def from_constants(nodes: Iterable[Node], constants: Iterable[str]) -> set[str]:
    """Tensors that are a function of constants alone, such as dequantised weights."""
    known = set(constants)
    for node in nodes:
        if node.op not in UNSTEADY and not node.captures and all(name in known for name in node.inputs if name):
            known.update(name for name in node.outputs if name)
    return known


def shape_program(prepared: Prepared, wanted: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> tuple[Model, dict[str, Array]]:
    """A model that computes ``wanted`` from the results of all shape queries, and those results for ``shapes``."""
    needed, nodes, feeds = set(wanted), [], dict[str, Array]()
    for node, view in zip(reversed(prepared.model.proto.graph.node), reversed(prepared.nodes), strict=True):
        if not needed & set(node.output):
            continue
        if asks_shape(view):
            feeds[node.output[0]] = _answer(view.op, view.attributes, shapes[node.input[0]])
        else:
            nodes.append(node)
            needed.update(node.input)
    return _part(prepared.model, nodes[::-1], needed, feeds, wanted), feeds


def constant_program(model: Model, wanted: str) -> Model:
    """A model without inputs that computes a tensor which is a function of constants alone."""
    needed, nodes = {wanted}, []
    for node in reversed(model.proto.graph.node):
        if needed & set(node.output):
            nodes.append(node)
            needed.update(node.input)
    return _part(model, nodes[::-1], needed, {}, [wanted])


def _part(model: Model, nodes: Sequence[onnx.NodeProto], needed: set[str], feeds: Mapping[str, Array], wanted: Sequence[str]) -> Model:
    source = model.proto
    proto = onnx.ModelProto()
    proto.CopyFrom(source)
    for field in ("node", "input", "output", "initializer", "value_info", "sparse_initializer", "quantization_annotation"):
        proto.graph.ClearField(field)
    proto.graph.node.extend(nodes)
    proto.graph.initializer.extend(tensor for tensor in source.graph.initializer if tensor.name in needed)
    for name, array in feeds.items():
        proto.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, array.shape))
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in wanted)
    return replace(model, proto=proto, weights={name: array for name, array in model.weights.items() if name in needed})


def _answer(op: str, attributes: Mapping[str, int], shape: Sequence[int]) -> Array:
    if op == "Size":
        return np.asarray(prod(shape), np.int64)
    return np.asarray(list(shape)[slice(attributes.get("start", 0), attributes.get("end"))], np.int64)
