"""Put a change of a layer's weight and bias into the model's constants, which may be integers that the graph dequantises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..normal import Sums
from ..records import Array, FloatArray
from .steps import Step
from .walk import Walk

Change = tuple[FloatArray, FloatArray]
"""Of the weight (blocks, inputs, outputs) and of the bias (blocks, outputs; of several layers (layers, blocks, outputs))."""


def per_block(scale: Array, made: Array) -> Array:
    """A value per output channel as (blocks, 1, outputs of a block)."""
    return np.broadcast_to(scale, (len(made) * made.shape[-1],)).reshape(len(made), 1, -1)


def inverse_of(factor: Array) -> Array:
    """1 / factor, and 0 where a factor is (nearly) 0."""
    usable = np.abs(factor) > np.finfo(np.float32).tiny
    found: Array = np.where(usable, 1 / np.where(usable, factor, 1), 0.0)
    return found


def changed(step: Step, weight: Array, change: FloatArray, scale: Array) -> Array:
    """The weight after a change in units of the target, which is ``scale`` times the output."""
    factor = per_block(np.asarray(scale, np.float64), change)
    matrix = step.linear.form.matrix(weight, len(change)).astype(np.float64) + change * inverse_of(factor)
    return step.linear.form.weight(matrix, weight.shape)


def write(walk: Walk, steps: Sequence[Step], weight: Array, change: Change, scale: Array, stretch: bool = False) -> None:
    """Put a change, given in units of the target, into the weight of some layers and the bias of each; see `Coding` for ``stretch``."""
    fresh: dict[str, Array] = {}
    ratio = None
    if change[0].shape[1] and change[0].any():
        wanted = changed(steps[0], weight, change[0], scale)
        ratio = steps[0].weight.fitting(walk.constant, wanted) if stretch else None
        fresh = steps[0].weight.nearest(walk.constant, wanted, ratio)[0]
    inverse = inverse_of(per_block(np.asarray(scale, np.float64), change[0]))[:, 0]
    for step, own in zip(steps, change[1].reshape(len(steps), *inverse.shape), strict=True):
        if step.bias is not None:
            old = step.bias.value(walk.constant)
            shift = (own * inverse).reshape(-1) / (step.linear.bias_scale if step.inside else 1.0)
            value = old.astype(np.float64) + shift.reshape(old.shape)
            fresh |= step.bias.nearest(walk.constant, value, ratio if step.bias.scale else None)[0]
    walk.overrides.update(fresh)


@dataclass(frozen=True)
class Coding:
    """How a weight is rounded to integers: with the scales that it has, or (``stretch``) with those that it just fits into; then the
    scales of biases change by the same factors, since onnxruntime multiplies without looking at them."""

    walk: Walk
    step: Step
    weight: Array
    scale: Array
    stretch: bool = False

    def applied(self, sums: Sums, change: FloatArray) -> Change:
        """What becomes of a change of the weight, and the best bias for that."""
        wanted, get = changed(self.step, self.weight, change, self.scale), self.walk.constant
        ratio = self.step.weight.fitting(get, wanted) if self.stretch else None
        value = self.step.weight.nearest(get, wanted, ratio)[1]
        form, factor = self.step.linear.form, per_block(np.asarray(self.scale, np.float64), change)
        rounded = (form.matrix(value, len(change)) - form.matrix(self.weight, len(change)).astype(np.float64)) * factor
        rows, errors = sums.means
        return rounded, errors - (rows[..., None, :] @ rounded)[..., 0, :]

    def chosen(self, fit: Sums, held: Sums, change: FloatArray, ways: Sequence[bool]) -> tuple[Coding, float]:
        """The way of rounding that leaves the least error on held-out rows, and that error."""
        found = [(held.error(*own.applied(fit, change)), own) for own in (replace(self, stretch=way) for way in ways)]
        best = min(range(len(found)), key=lambda index: found[index][0])
        return found[best][1], found[best][0]


def ways(steps: Sequence[Step]) -> tuple[bool, ...]:
    """Whether a rounded weight may have other scales than now: their initializers serve nothing else, and biases can follow."""
    weight = steps[0].weight
    biases = [step.bias for step in steps if step.bias is not None and step.bias.scale]
    return (False, True) if weight.alone and all(bias.alone and bias.shape == (max(bias.shape),) for bias in biases) else (False,)
