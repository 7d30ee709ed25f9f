"""Scores that need no data."""

from __future__ import annotations

import numpy as np

from ..core.options import ScoreOptions
from ..core.types import Array, FloatArray, GroupView, IntArray
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


# ---- scores that need calibration data -------------------------------------------------------------------------------

def _over_readers(view: GroupView, rows: list[tuple[int, FloatArray]]) -> FloatArray:
    """Mean over reading layers of the per-unit root mean square of row values, relative to each layer's mean."""
    total = np.zeros(view.width)
    for index, values in rows:
        total += np.sqrt(per_unit(view.weights[index].unit, relative(values) ** 2, view.width))
    return total / max(1, len(rows))


@score("activation", "root mean square of the activation that is read", "Molchanov et al., ICLR 2017 (as a criterion)", ("squares",))
def activation(view: GroupView, options: ScoreOptions) -> FloatArray:
    """rms_c = sqrt(mean over samples and positions of a_c^2), over all layers that read the unit."""
    return _over_readers(view, [(index, own.rms) for index, own in enumerate(view.weights) if own.rms is not None])


@score(
    "apoz",
    "share of non-zeros of the activation that is read (1 - average percentage of zeros)",
    "Hu et al., arXiv:1607.03250 (2016)",
    ("zeros",),
)
def apoz(view: GroupView, options: ScoreOptions) -> FloatArray:
    """1 - APoZ_c, mean over all layers that read the unit."""
    shares = [per_unit(own.unit, 1 - own.zeros, view.width) for own in view.weights if own.zeros is not None]
    return sum(shares, np.zeros(view.width)) / max(1, len(shares))


@score(
    "contribution",
    "activation RMS times the norm of the weights that read it",
    "Sun et al., ICLR 2024 (Wanda), for channels",
    ("squares",),
)
def contribution(view: GroupView, options: ScoreOptions) -> FloatArray:
    """rms_c ||W[:, c]||_2: what the channel adds to its readers' outputs."""
    rows = []
    for index, own in enumerate(view.weights):
        if own.rms is not None:
            norms = np.linalg.norm(own.values.astype(np.float64), axis=1) if own.values.size else np.ones(len(own.unit))
            rows.append((index, own.rms * norms))
    return _over_readers(view, rows)


# ---- scores that know the repair -------------------------------------------------------------------------------------

@score(
    "obs",
    "error that the channel's leaving adds after its readers are re-fitted (backward elimination)",
    "Hassibi & Stork, NIPS 1992; Frantar & Alistarh, NeurIPS 2022",
    ("elimination",),
)
def obs(view: GroupView, options: ScoreOptions) -> FloatArray:
    """tr(X_u' (H^-1_uu)^-1 X_u) when unit u leaves, summed over readers, each relative to the variance of what its output goes into
    (see `sfp_onnx.obs`). Groups that no layer with a constant weight reads fall back to `magnitude`."""
    return view.elimination if view.elimination is not None else magnitude(view, options)
