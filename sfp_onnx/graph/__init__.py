"""The only door to onnx and onnx-graphsurgeon: load, look at, edit and save models."""

from .extract import conv_chain as conv_chain, named_by_output as named_by_output, segment as segment, with_constants as with_constants
from .load import load as load
from .model import (
    Constants as Constants,
    Model as Model,
    check as check,
    initializers as initializers,
    inputs as inputs,
    nodes as nodes,
    outputs as outputs,
    serialized as serialized,
    tensor_types as tensor_types,
)
from .save import (
    atomic as atomic,
    file_bytes as file_bytes,
    fingerprint as fingerprint,
    save as save,
    to_proto as to_proto,
    together as together,
    write_text as write_text,
)
