"""Scores that need no data."""

from __future__ import annotations

import numpy as np

from ..records import Array, FloatArray, GroupView, IntArray, ScoreOptions
from .registry import score

BLOCK = 1024


def per_unit(unit: IntArray, values: FloatArray, width: int) -> FloatArray:
    """Mean of ``values`` (one per row) over the rows of each unit; 0 for units without rows."""
    own = unit >= 0
    total = np.bincount(unit[own], values[own], minlength=width)
    count = np.bincount(unit[own], minlength=width)
    return total / np.maximum(count, 1)


def relative(values: FloatArray) -> FloatArray:
    """Divided by their mean, so that layers of different scale compare; zeros stay zeros."""
    mean = float(values.mean()) if len(values) else 0.0
    return values / mean if mean > 0 else np.zeros_like(values)


@score(
    "magnitude",
    "norm of all weights that make or read the unit, relative to the mean of each layer",
    "Li et al., ICLR 2017; Fang et al., CVPR 2023",
)
def magnitude(view: GroupView, options: ScoreOptions) -> FloatArray:
    """(mean over layers of mean over the unit's rows of (||w_row||_p / mean row norm of the layer)^p)^(1/p)."""
    total = np.zeros(view.width)
    for weights in view.weights:
        rows = np.linalg.norm(weights.values.astype(np.float64), ord=options.p, axis=1)
        total += per_unit(weights.unit, relative(rows) ** options.p, view.width)
    return (total / max(1, len(view.weights))) ** (1 / options.p)


@score("bn-scale", "absolute gamma of the BatchNormalizations on the unit (1 where there is none)", "Liu et al., ICCV 2017")
def bn_scale(view: GroupView, options: ScoreOptions) -> FloatArray:
    """mean over BatchNormalizations of |gamma| / mean |gamma|."""
    if not view.gammas:
        return np.ones(view.width)
    return sum((per_unit(unit, relative(gamma), view.width) for unit, gamma in view.gammas), np.zeros(view.width)) / len(view.gammas)


@score("fpgm", "summed distance to the other channels' weights (far from the geometric median = keep)", "He et al., CVPR 2019")
def fpgm(view: GroupView, options: ScoreOptions) -> FloatArray:
    """mean over layers of sum_j ||w_i - w_j||_2, relative to the layer's mean. With
    ||a - b||^2 = ||a||^2 + ||b||^2 - 2 a.b the distances need one matrix product.

    The paper looks at the filters that make a channel; here the weights that read it count as well.
    """
    total = np.zeros(view.width)
    for weights in view.weights:
        total += per_unit(weights.unit, relative(_distances(weights.values)), view.width)
    return total / max(1, len(view.weights))


def _distances(values: Array) -> FloatArray:
    """Summed distance of every row to all others, a block of rows at a time (a flattened layer has tens of thousands)."""
    rows = values.astype(np.float64)
    squares = (rows**2).sum(1)
    found = np.empty(len(rows))
    for start in range(0, len(rows), BLOCK):
        part = slice(start, start + BLOCK)
        found[part] = np.sqrt(np.maximum(squares[part, None] + squares[None, :] - 2 * rows[part] @ rows.T, 0)).sum(1)
    return found


@score("random", "uniform random numbers (the control)", "Mittal et al., WACV 2018")
def random(view: GroupView, options: ScoreOptions) -> FloatArray:
    """Independent of the order in which groups are visited."""
    return np.random.default_rng([options.seed, view.index]).random(view.width)
