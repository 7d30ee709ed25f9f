"""The only door to onnx and onnx-graphsurgeon: load, look at, edit and save models."""

from .edit import Editor
from .load import load, load_tensor
from .mask import QUANTIZED, insert_mask
from .model import Model, Prepared, check, make_initializer
from .program import asks_shape, shape_program
from .save import atomic, check_output, file_bytes, full_size, save, to_proto, write_text
from .segment import between, segment
from .view import constant, initializers, inputs, nodes, outputs, serialized, small_constants, tensor_types

__all__ = [
    "QUANTIZED",
    "Editor",
    "Model",
    "Prepared",
    "asks_shape",
    "atomic",
    "between",
    "check",
    "check_output",
    "constant",
    "file_bytes",
    "full_size",
    "initializers",
    "inputs",
    "insert_mask",
    "load",
    "load_tensor",
    "make_initializer",
    "nodes",
    "outputs",
    "save",
    "segment",
    "serialized",
    "shape_program",
    "small_constants",
    "tensor_types",
    "to_proto",
    "write_text",
]
