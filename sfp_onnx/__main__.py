"""``python -m sfp_onnx``."""

from .cli import main

main()
