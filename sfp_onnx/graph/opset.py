"""Raising the opset of a model, where the form that it is written in needs a newer one."""

from __future__ import annotations

from dataclasses import replace

from onnx import ModelProto, version_converter

from ..core.errors import ModelError
from . import ONNX_DOMAINS, Model, replace_items
from .load import load
from .save import to_proto

IR_VERSION = 8  # initializers need not be inputs of the graph


def raised(model: Model, opset: int) -> Model:
    """The model in this opset, or as it is if it has a newer one.

    Raises:
        ModelError: onnx's converter cannot do it, with its words.
    """
    if model.opset >= opset:
        return model
    proto = to_proto(model)
    held = {tensor.name for tensor in proto.graph.initializer}
    replace_items(proto.graph.input, [item for item in proto.graph.input if item.name not in held])
    proto.ir_version = max(proto.ir_version, IR_VERSION)
    try:
        converted = version_converter.convert_version(proto, opset)
        result = ModelProto()
        result.CopyFrom(proto)  # the converter loses what stands beside the graph
        result.graph.CopyFrom(converted.graph)
        for item in result.opset_import:
            item.version = opset if item.domain in ONNX_DOMAINS else item.version
        fresh = load(result)
    except Exception as error:  # the converter raises whatever its C++ does
        words = " ".join(str(error).split())[:200]
        raise ModelError(f"{model.name}: onnx cannot raise opset {model.opset} to {opset}: {words}") from error
    return replace(fresh, sha256=model.sha256, source=model.source, files=model.files, edited=True, complaint=model.complaint)
