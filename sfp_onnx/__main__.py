"""``python -m sfp_onnx``."""

from .cli import run

run()
