"""The only door to onnx and onnx-graphsurgeon: load, look at, edit and save models."""

from .extract import conv_chain as conv_chain
from .extract import named_by_output as named_by_output
from .extract import segment as segment
from .extract import with_constants as with_constants
from .load import load as load
from .model import Constants as Constants
from .model import Model as Model
from .model import check as check
from .model import initializers as initializers
from .model import inputs as inputs
from .model import nodes as nodes
from .model import outputs as outputs
from .model import serialized as serialized
from .model import tensor_types as tensor_types
from .save import atomic as atomic
from .save import file_bytes as file_bytes
from .save import fingerprint as fingerprint
from .save import save as save
from .save import to_proto as to_proto
from .save import together as together
from .save import write_text as write_text
