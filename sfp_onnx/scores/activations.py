"""Scores that need calibration data, but no labels."""

from __future__ import annotations

import numpy as np

from ..records import FloatArray, GroupView, ScoreOptions
from .registry import score
from .weights import per_unit, relative


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
