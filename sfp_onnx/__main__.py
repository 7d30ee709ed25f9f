"""``python -m sfp_onnx``."""

from .cli import program

program()
