"""Ridge regression from streamed sums: re-fitting a weight matrix so that P W comes nearer to what is wanted.

With rows p (inputs of a layer) and errors e = wanted - (p W + b) of the present weight, the change (D, d) minimises

    sum |e - p D - d|^2 + ridge * mean(diag C) * |D|^2,        C = sum (p - mean p)(p - mean p)'

so the ridge pulls towards the present weight and the bias is free: D = (C + r I)^-1 sum (p - mean p) e', d = mean e - mean p D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .records import Array, BoolArray, FloatArray

CG_STEPS = 60
CG_TOLERANCE = 1e-3  # of the residual; held-out data judge the result anyway
ROUNDING = 1e-6
TINY = float(np.finfo(np.float64).tiny)


@dataclass
class Normal:
    """Sums over rows, for each of g blocks: ``gram`` (g, k, k) of p p', ``cross`` (g, k, o) of p e', ``rows`` (g, k) of p,
    ``errors`` (g, o) of e, ``squares`` (g, o) of e^2, ``count`` rows. Float64; add up with `merge`."""

    gram: FloatArray
    cross: FloatArray
    rows: FloatArray
    errors: FloatArray
    squares: FloatArray
    count: float = 0.0

    @classmethod
    def empty(cls, blocks: int, inputs: int, outputs: int) -> Normal:
        """All sums zero."""
        return cls(
            gram=np.zeros((blocks, inputs, inputs)),
            cross=np.zeros((blocks, inputs, outputs)),
            rows=np.zeros((blocks, inputs)),
            errors=np.zeros((blocks, outputs)),
            squares=np.zeros((blocks, outputs)),
        )

    def update(self, rows: Array, errors: Array) -> None:
        """Add rows (g, n, k) with errors (g, n, o). Products of one call are float32, sums over calls float64."""
        turned = rows.transpose(0, 2, 1)
        if len(rows) == 1:
            self.gram[0] += rows[0].T @ rows[0]  # one symmetric product
        else:
            self.gram += turned @ rows
        self.cross += turned @ errors
        self.rows += rows.sum(1, dtype=np.float64)
        self.errors += errors.sum(1, dtype=np.float64)
        self.squares += np.square(errors).sum(1, dtype=np.float64)
        self.count += rows.shape[1]

    def merge(self, other: Normal) -> Normal:
        """Both sums together."""
        return Normal(
            self.gram + other.gram,
            self.cross + other.cross,
            self.rows + other.rows,
            self.errors + other.errors,
            self.squares + other.squares,
            self.count + other.count,
        )

    def centred(self) -> tuple[FloatArray, FloatArray]:
        """Covariance sums C (g, k, k) and (g, k, o), about the means."""
        share = self.rows[:, :, None] / max(self.count, 1.0)
        return self.gram - share * self.rows[:, None, :], self.cross - share * self.errors[:, None, :]

    def error(self, change: FloatArray, bias: FloatArray) -> float:
        """sum |e - p D - d|^2 after a change."""
        explained = 2 * (change * self.cross).sum() + 2 * (bias * self.errors).sum()
        quadratic = (change * (self.gram @ change)).sum() + 2 * (self.rows[:, None, :] @ change * bias[:, None, :]).sum()
        return float(self.squares.sum() - explained + quadratic + self.count * (bias**2).sum())


def mean_shift(normal: Normal) -> tuple[FloatArray, FloatArray]:
    """The best change of the bias alone."""
    return np.zeros_like(normal.cross), normal.errors / max(normal.count, 1.0)


def solve(normal: Normal, ridge: float, mask: BoolArray | None = None) -> tuple[FloatArray, FloatArray]:
    """The change (D, d) of weight and bias.

    Args:
        ridge: relative to the mean of the diagonal of C.
        mask: (g, k, o) weights that may change; the others have D = 0.
    """
    covariance, cross = normal.centred()
    size = covariance.shape[1]
    diagonal = np.maximum(np.einsum("gkk->gk", covariance), 0.0)
    strength = np.maximum(ridge * diagonal.mean(1), _rounding(normal))
    diagonal = diagonal + strength[:, None]
    covariance[:, np.arange(size), np.arange(size)] = diagonal
    if mask is None or mask.all():
        change: FloatArray = np.linalg.solve(covariance, cross).astype(np.float64)
    else:
        change = _conjugate_gradients(covariance, cross, mask.astype(np.float64), diagonal)
    mean = normal.rows / max(normal.count, 1.0)
    return change, normal.errors / max(normal.count, 1.0) - (mean[:, None, :] @ change)[:, 0]


def _rounding(normal: Normal) -> FloatArray:
    """What remains of the variance of constant inputs, (g,): products are float32, and a ridge below their rounding fits noise."""
    size = np.einsum("gkk->gk", normal.gram).mean(1)
    found: FloatArray = np.maximum(ROUNDING * size, np.finfo(np.float32).tiny)
    return found


def _conjugate_gradients(matrix: FloatArray, cross: FloatArray, mask: FloatArray, diagonal: FloatArray) -> FloatArray:
    """Solve each column on its own surviving rows, all columns at once: conjugate gradients with the diagonal as
    preconditioner (one Cholesky per column would cost outputs x inputs^3)."""
    inverse = mask / diagonal[:, :, None]
    change = np.zeros_like(cross)
    residual = cross * mask
    goal = CG_TOLERANCE**2 * (residual * inverse * residual).sum(1)
    step = residual * inverse
    old = (residual * step).sum(1)
    for _ in range(CG_STEPS):
        if (old <= goal).all():
            break
        image = (matrix @ step) * mask
        bend = (step * image).sum(1)
        length = np.where(bend > TINY, old / np.maximum(bend, TINY), 0.0)  # rounding may leave a direction flat
        change += length[:, None] * step
        residual -= length[:, None] * image
        scaled = residual * inverse
        new = (residual * scaled).sum(1)
        step = scaled + (new / np.maximum(old, TINY))[:, None] * step
        old = new
    return change


def best_ridge(fit: Normal, held: Normal, ridges: Sequence[float], mask: BoolArray | None = None) -> tuple[float, float]:
    """The ridge whose solution on ``fit`` leaves the least error on ``held``, and that error."""
    errors = [held.error(*solve(fit, ridge, mask)) for ridge in ridges]
    best = int(np.argmin(errors))
    return ridges[best], errors[best]
