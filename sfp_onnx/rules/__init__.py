"""Operator rules: what each operator does to channel labels. A new operator is a few lines in one of these modules."""

from . import attention, elementwise, generate, mixing, movement, norm, quantized, recurrent, reduce  # noqa: F401  (registration)
from .context import Context, Facts
from .registry import RULES, SUMMARY

SPREADING = frozenset([*elementwise.UNARY, *elementwise.NARY, *elementwise.MICROSOFT, "BatchNormalization"])
"""Operators that treat a value per channel, of size 1 along all other axes, as if it were spread over them."""

__all__ = ["RULES", "SPREADING", "SUMMARY", "Context", "Facts"]
