"""Operator rules: what each operator does to channel labels. A new operator is a few lines in one of these modules."""

from . import attention, elementwise, generate, indexed, mixing, movement, norm, quantized, recurrent, reduce  # noqa: F401  (registration)
from .channelwise import channelwise
from .context import Context, Facts
from .registry import RULES, SUMMARY

__all__ = ["RULES", "SUMMARY", "Context", "Facts", "channelwise"]
