"""Operators that work element by element, with broadcasting."""

from __future__ import annotations

from collections.abc import Sequence

from ..labels import Labels, align
from .context import Context
from .registry import rule

UNARY = (
    "Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast Ceil Celu Cos Cosh Dropout Elu Erf Exp Floor Gelu HardSigmoid "
    "HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh "
    "Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu"
).split()
NARY = (
    "Add And BitShift BitwiseAnd BitwiseOr BitwiseXor CastLike Clip Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean "
    "Min Mod Mul Or PRelu Pow Sub Sum Where Xor"
).split()
MICROSOFT = ["com.microsoft.Gelu", "com.microsoft.FastGelu", "com.microsoft.QuickGelu", "com.microsoft.BiasGelu"]


@rule(*UNARY, *NARY, *MICROSOFT, does="ties its operands element by element (broadcasting)")
def elementwise(ctx: Context) -> list[Labels]:
    """All operands meet; constants take the labels of what they meet."""
    rank = len(ctx.out_shape())
    present = [position for position in range(len(ctx.node.inputs)) if ctx.has(position)]
    free = [position for position in present if ctx.is_constant(position)]
    operands = []
    for position in present:
        if position in free and len(free) < len(present):
            continue
        labels = tuple(align(array, rank) for array in ctx.labels(position))
        operands.append((labels, (1,) * (rank - ctx.rank(position)) + ctx.shape(position)))
    merged = ctx.merge(operands)
    for position in free:
        ctx.adopt(position, merged)
    shift = free[0] if ctx.node.op == "Add" and len(free) == 1 else None
    factor = ctx.shape(free[0]) if free and ctx.node.op in ("Mul", "Div") else ()
    varies = [rank - len(factor) + axis for axis, size in enumerate(factor) if size > 1]
    ctx.additive(*_additive(ctx.node.op, present, free), shift=shift, varies=varies)
    return [merged for _ in ctx.node.outputs]


def _additive(op: str, present: Sequence[int], constant: Sequence[int]) -> list[int]:
    """Inputs in which the operator is affine, whatever the others are."""
    if op in ("Add", "Sub", "Sum", "Identity", "Dropout", "Neg"):
        return [position for position in present if op != "Dropout" or position == 0]
    scaled = [position for position in present if position not in constant]
    return scaled if (op == "Mul" and len(scaled) == 1) or (op == "Div" and scaled == [0]) else []
