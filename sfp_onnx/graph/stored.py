"""Weights that are stored in fewer bits than they are computed with: a Cast, and for integers a Mul by one scale per output channel.

onnxruntime and others fold both when they load the model, so that arithmetic and speed are those of float32. (A DequantizeLinear of a
weight alone stays in the graph, and keeps onnxruntime's blocked convolutions from being used.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from onnx import TensorProto

from ..core.types import Array, FloatArray
from . import Constants, GraphIndex, Model, initializers, nodes
from .edit import Editor

MOST = 127  # int8 is used symmetrically
STORED = {"float32": 4, "float16": 2, "int8-weights": 1, "int8": 0}
"""Codes by the name of what a weight is stored as: bytes of an element that is computed with as float32. 0: 8-bit integers that are
multiplied as such, with activations that are rounded, too (see `export.integers`, which writes them)."""
AS_IS, KERNELS = "float32", "int8"


class Store(NamedTuple):
    """How a weight is stored that a node (by its first output) reads at an input position: as what, and along which axis integers have a
    scale each."""

    layer: str
    position: int
    kind: str
    axis: int


def coded(weight: Array, axis: int) -> tuple[Array, Array]:
    """The nearest integers (int8) of a weight and their scales (float32, as many as the axis is long, shaped to be multiplied)."""
    largest = np.abs(weight).max(tuple(at for at in range(weight.ndim) if at != axis % weight.ndim), keepdims=True, initial=0)
    scale = (np.where(largest > 0, largest, MOST) / MOST).astype(np.float32)
    return np.clip(np.rint(weight / scale), -MOST, MOST).astype(np.int8), scale


def rounded(weight: Array, kind: str, axis: int) -> FloatArray:
    """What is left of a weight that is stored so."""
    if kind in ("int8-weights", KERNELS):
        whole, scale = coded(weight, axis)
        return np.asarray(whole.astype(np.float32) * scale, np.float64)
    return np.asarray(weight.astype(np.float16 if kind == "float16" else np.float32), np.float64)


def holds(weight: Array, kind: str) -> bool:
    """Whether a weight can be stored so at all."""
    most = float(np.abs(weight).max(initial=0))
    return np.isfinite(most) and (kind != "float16" or most <= float(np.finfo(np.float16).max))


def replaceable(model: Model) -> dict[str, tuple[int, ...]]:
    """Float32 initializers that are no inputs or outputs of the model, and their shapes."""
    fixed = {item.name for item in [*model.proto.graph.input, *model.proto.graph.output]}
    return {name: held.shape for name, held in initializers(model).items() if held.dtype == np.float32 and name not in fixed}


def stored(model: Model, weights: Iterable[Store]) -> Model:
    """The model with weights stored in fewer bits, each weight once. What is not `replaceable` stays as it is; so does, here, what becomes
    `KERNELS`."""
    weights = [store for store in weights if store.kind not in (KERNELS, AS_IS)]
    if not weights:
        return model
    editor, index, held = Editor(model), GraphIndex(nodes(model)), Constants(model)
    done, free = set[str](), replaceable(model)
    for layer, position, kind, axis in weights:
        node = index.maker(layer)
        name = node.inputs[position] if node is not None and position < len(node.inputs) else ""
        if name in done or name not in free or not holds(held[name], kind):
            continue
        done.add(name)
        parts = [held[name].astype(np.float16)] if kind == "float16" else coded(held[name], axis)
        first, *scales = (editor.constant(f"{letter}{len(done)}", array) for letter, array in zip("qs", parts, strict=False))
        value = editor.put_first("Cast", [first], {"to": TensorProto.FLOAT}, f"f{len(done)}")
        for scale in scales:
            value = editor.put_first("Mul", [value, scale], {}, f"w{len(done)}")
        for reader, at in index.operands(name):
            editor.set_input(reader.index, at, value)
    return editor.finish() if done else model
