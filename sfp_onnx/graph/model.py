"""The loaded model: a protobuf with stubs, and the large weights beside it.

So every copy and every edit of the graph is cheap, whatever the size of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.checker
import onnx.helper
import onnx.numpy_helper

from ..errors import ModelError
from ..records import Array, Node, Trace

# Tensors up to this size stay in the protobuf: shape constants must be visible to onnxruntime's and onnx's inference.
INLINE_BYTES = 1024
STUB_LOCATION = "weights-held-in-memory"
ONNX_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class Model:
    """A loaded model. ``proto`` has no local functions and no Constant nodes; ``weights`` holds tensors over 1 KiB by name;
    ``source`` is the file, ``files`` those with its external data, ``sha256`` the hash of all of them;
    ``edited`` says that the model is no longer what these files hold; ``complaint`` is what onnx.checker said of the original,
    if it does not know or no longer allows an operator (onnxruntime may run it all the same)."""

    proto: onnx.ModelProto
    weights: Mapping[str, Array]
    sha256: str
    source: Path | None = None
    files: tuple[Path, ...] = ()
    edited: bool = False
    complaint: str = ""

    @property
    def opset(self) -> int:
        """Version of ONNX's own operator set."""
        return next((item.version for item in self.proto.opset_import if item.domain in ONNX_DOMAINS), 1)

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files that the model was read from."""
        return (self.source, *self.files) if self.source else ()

    @property
    def name(self) -> str:
        """What messages call the model."""
        return str(self.source) if self.source else "the model"


@dataclass(frozen=True)
class Prepared:
    """A model with constants folded, its nodes, the trace, the sample inputs it was traced on, other inputs with which the
    dynamic dimensions differ (None: there are none, or no other sizes run), and the inferred types (see `tensor_types`)."""

    model: Model
    nodes: tuple[Node, ...]
    trace: Trace
    feeds: Mapping[str, Array]
    variant: Mapping[str, Array] | None = None
    types: Mapping[str, Any] = field(default_factory=dict)


def annotate(tensor: onnx.TensorProto, like: onnx.TensorProto) -> None:
    """Give a tensor the doc string and metadata of another."""
    if like.doc_string:
        tensor.doc_string = like.doc_string
    del tensor.metadata_props[:]
    tensor.metadata_props.extend(like.metadata_props)


def make_stub(name: str, array: Array, like: onnx.TensorProto | None = None) -> onnx.TensorProto:
    stub = onnx.TensorProto()
    if like is not None:
        annotate(stub, like)
    stub.name = name
    stub.data_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    stub.dims.extend(array.shape)
    stub.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", STUB_LOCATION), ("offset", "0"), ("length", str(array.nbytes))):
        stub.external_data.add(key=key, value=value)
    return stub


def make_initializer(name: str, array: Array, weights: dict[str, Array]) -> onnx.TensorProto:
    """A TensorProto for ``array``: inline if small, else a stub with the array in ``weights``."""
    if array.nbytes <= INLINE_BYTES:
        return onnx.numpy_helper.from_array(np.asarray(array, order="C"), name)
    weights[name] = array
    return make_stub(name, array)


def check(model: Model) -> None:
    """Run onnx.checker on a pruned graph, if the original passed.

    Raises:
        ModelError: with the checker's words.
    """
    found = "" if model.complaint else complaint(model)
    if found:
        raise ModelError(f"{model.name}: internal error: onnx.checker rejects the pruned model: {found}. Please report it.")


def complaint(model: Model) -> str:
    """What onnx.checker has against the graph (weights stand in as inputs); empty if it passes."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    inputs = {item.name for item in proto.graph.input}
    inline = [tensor for tensor in proto.graph.initializer if tensor.name not in model.weights]
    for name, array in model.weights.items():
        if name not in inputs:
            dtype = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            proto.graph.input.append(onnx.helper.make_tensor_value_info(name, dtype, array.shape))
    initializers = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in inline]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(initializers)
    try:
        onnx.checker.check_model(proto)
    except (onnx.checker.ValidationError, ValueError) as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return ""
