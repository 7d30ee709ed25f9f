"""Inputs that say which places an attention may look at: what reaches the operand of a Softmax through nothing but element-wise
operators and moves, as a sum or a choice does, or is the mask of a fused attention."""

from __future__ import annotations

from ..graph import GraphIndex

EVERY = frozenset(
    "Cast CastLike Not Equal Less LessOrEqual Greater GreaterOrEqual And Or Xor Add Sub Mul Div Neg Abs Sign Where Min Max Clip Pow "
    "Identity Concat Dropout".split()
)  # what one operand says goes on, whichever it is
FIRST = frozenset("Reshape Flatten Squeeze Unsqueeze Transpose Expand Tile Slice Split Gather GatherND GatherElements Pad Trilu".split())
SHARES = frozenset(("Softmax", "LogSoftmax"))
FUSED = {"Attention": (3,), "com.microsoft.Attention": (3, 5), "com.microsoft.MultiHeadAttention": (4, 5)}  # mask, or bias of products


def masks(index: GraphIndex, name: str) -> bool:
    """Whether a tensor reaches what an attention shares out its looks by."""
    seen, waiting = {name}, [name]
    while waiting:
        for node, position in index.readers(waiting.pop()):
            if node.operator in SHARES or position in FUSED.get(node.operator, ()):
                return True
            if node.operator in EVERY or (node.operator in FIRST and position == 0):
                fresh = {output for output in node.outputs if output} - seen
                seen |= fresh
                waiting += sorted(fresh)
    return False
