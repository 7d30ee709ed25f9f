"""Which operators treat every channel on its own: what they give for one channel depends on that channel of their inputs alone.

Behind such operators a mask does the work of a mask in front of them, so that one mask at the end of a chain of them is enough.
"""

from __future__ import annotations

from ..records import Node
from . import elementwise, movement, norm, reduce
from .registry import RULES

ALONE = (
    elementwise.elementwise, norm.batch_normalization, reduce.pooling, movement.reshaping, movement.flattening, movement.transpose,
    movement.expand, movement.tile, movement.concat, movement.split, movement.slicing, movement.pad, movement.depth_to_space,
    movement.space_to_depth, reduce.shape,
)  # fmt: skip
_OPERATORS = frozenset(operator for operator, function in RULES.items() if function in ALONE)


def channelwise(node: Node) -> bool:
    """Whether a node treats every channel on its own."""
    return node.operator in _OPERATORS
