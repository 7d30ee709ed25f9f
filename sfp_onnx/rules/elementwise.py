"""Operators that work element by element, with broadcasting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..core.types import After, Array, Edit, Node, SetInput
from .context import Context
from .labels import Labels, align, vector
from .registry import Trait, in_training, rule, state

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


@rule(*UNARY, *NARY, *MICROSOFT, does="ties its operands element by element (broadcasting)", traits=Trait.ALONE | Trait.SPREADS)
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


@in_training("Dropout")
def _drops(node: Node, opset: int, constants: Mapping[str, Array]) -> bool:
    """Random zeros: a flag says so, or before opset 7 that it is not a test."""
    flag = node.inputs[2] if len(node.inputs) > 2 else ""
    active = bool(constants[flag].any()) if flag in constants else bool(flag)
    return active or (opset < 7 and not node.attributes.get("is_test", 0))


state(Trait.UNSTEADY, "Dropout")


def _additive(op: str, present: Sequence[int], constant: Sequence[int]) -> list[int]:
    """Inputs in which the operator is affine, whatever the others are."""
    if op in ("Add", "Sub", "Sum", "Identity", "Dropout", "Neg"):
        return [position for position in present if op != "Dropout" or position == 0]
    scaled = [position for position in present if position not in constant]
    return scaled if (op == "Mul" and len(scaled) == 1) or (op == "Div" and scaled == [0]) else []


# ---- tensors made from a shape ---------------------------------------------------------------------------------------

state(Trait.UNSTEADY, *"RandomNormal RandomUniform RandomNormalLike RandomUniformLike Multinomial Bernoulli".split())
state(Trait.UNSTEADY, *"If Loop Scan Optional SequenceEmpty".split())


@rule("ConstantOfShape", does="makes labels for its fixed axes; the shape follows")
def constant_of_shape(ctx: Context) -> list[Labels]:
    """Initial states of recurrent nets, zero padding, masks."""
    target = ctx.value(0)
    if target is None:
        return [()]
    fixed = ~ctx.dynamic(0)
    axes = [axis for axis, size in enumerate(target) if size > 1 and fixed[axis]]

    def edits(after: After) -> list[Edit]:
        return [SetInput(0, np.asarray(after.output_shape(0), np.int64))]

    ctx.follow(edits)
    return [tuple(vector(ctx.mint(int(target[axis])), axis, len(target)) for axis in axes)]


@rule("Range", does="makes no labels (numbers that depend on dynamic sizes)")
def numbers(ctx: Context) -> list[Labels]:
    """Start, limit, delta. A range of fixed size is a constant by now, and takes the labels of what it meets."""
    for position in range(3):
        ctx.pin_input(position, "the length of a range is computed from it")
    return [()]
