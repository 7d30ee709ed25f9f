"""Operator rules: what each operator does to channel labels. A new operator is a few lines in one of these modules."""

from ..records import Node
from . import attention, elementwise, generate, indexed, mixing, movement, norm, quantized, recurrent, reduce  # noqa: F401  (registration)
from .channelwise import channelwise
from .context import Context, Facts
from .registry import RULES, SUMMARY

_SPREADING = frozenset([*elementwise.UNARY, *elementwise.NARY, *elementwise.MICROSOFT, "BatchNormalization"])


def spreads(node: Node) -> bool:
    """Whether an operator treats a value per channel, of size 1 along all other axes, as if it were spread over them."""
    return node.operator in _SPREADING


__all__ = ["RULES", "SUMMARY", "Context", "Facts", "channelwise", "spreads"]
