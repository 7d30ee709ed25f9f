"""The only door to onnx and onnx-graphsurgeon: load, look at, edit and save models."""

from .atomic import atomic, together
from .edit import Editor
from .half import half_weights
from .load import load, load_tensor
from .mask import QUANTIZED, insert_mask, insert_shift, zero_of
from .model import Model, Prepared, check, make_initializer
from .probe import conv_chain, named_by_output
from .program import UNSTEADY, asks_shape, constant_program, from_constants, shape_program
from .save import PROTOBUF_LIMIT, check_output, file_bytes, fingerprint, full_size, save, to_proto, write_text
from .segment import between, segment, with_constants
from .training import training_nodes
from .view import Constants, initializers, inputs, nodes, outputs, serialized, tensor_types

__all__ = [
    "PROTOBUF_LIMIT",
    "QUANTIZED",
    "Constants",
    "Editor",
    "Model",
    "Prepared",
    "UNSTEADY",
    "asks_shape",
    "atomic",
    "between",
    "check",
    "check_output",
    "constant_program",
    "conv_chain",
    "file_bytes",
    "fingerprint",
    "from_constants",
    "full_size",
    "half_weights",
    "initializers",
    "inputs",
    "insert_mask",
    "insert_shift",
    "load",
    "load_tensor",
    "make_initializer",
    "named_by_output",
    "nodes",
    "outputs",
    "save",
    "segment",
    "serialized",
    "shape_program",
    "tensor_types",
    "to_proto",
    "together",
    "training_nodes",
    "with_constants",
    "write_text",
    "zero_of",
]
