"""``python -m sfp_onnx``."""

from __future__ import annotations

from .cli import program

program()
