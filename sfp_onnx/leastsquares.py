"""Ridge regression from streamed sums: re-fitting a weight matrix so that P W comes nearer to what is wanted.

With rows p (inputs of a layer) and errors e = wanted - (p W + b) of the present weight, the change (D, d) minimises

    sum |e - p D - d|^2 + ridge * mean(diag C) * |D|^2,        C = sum (p - mean p)(p - mean p)'

so the ridge pulls towards the present weight and the bias is free: D = (C + r I)^-1 sum (p - mean p) e', d = mean e - mean p D.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from .records import Array, BoolArray, FloatArray

CG_STEPS = 60
CG_TOLERANCE = 1e-3  # of the residual; held-out data judge the result anyway
LOOKS = (5, 10, 15, 20, 30, 45)  # steps after which held-out data are asked whether more would help
WIDE = 1024  # from so many inputs on the steps are in single precision: half the time, and the tolerance is far above its rounding
ROUNDING = 1e-6
TINY = float(np.finfo(np.float32).tiny)


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
        if not rows.shape[1]:
            return  # adding zeros to the sums of a wide layer takes as long as a batch
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

    def without_means(self) -> Normal:
        """For layers that have no bias: nothing is taken as its share, so that `solve` and `error` see the weights alone."""
        return replace(self, rows=np.zeros_like(self.rows), errors=np.zeros_like(self.errors))

    def centred(self) -> tuple[FloatArray, FloatArray]:
        """Covariance sums C (g, k, k) and (g, k, o), about the means."""
        share = self.rows[:, :, None] / max(self.count, 1.0)
        return self.gram - share * self.rows[:, None, :], self.cross - share * self.errors[:, None, :]

    def error(self, change: FloatArray, bias: FloatArray) -> float:
        """sum |e - p D - d|^2 after a change."""
        shifted = self.squares.sum() - 2 * (bias * self.errors).sum() + self.count * (bias**2).sum()
        if not change.any():
            return float(shifted)
        quadratic = (change * (self.gram @ change)).sum() + 2 * (self.rows[:, None, :] @ change * bias[:, None, :]).sum()
        return float(shifted - 2 * (change * self.cross).sum() + quadratic)


def mean_shift(normal: Normal) -> tuple[FloatArray, FloatArray]:
    """The best change of the bias alone."""
    return np.zeros_like(normal.cross), normal.errors / max(normal.count, 1.0)


def solve(normal: Normal, ridge: float, mask: BoolArray | None = None, steps: int | None = None) -> tuple[FloatArray, FloatArray]:
    """The change (D, d) of weight and bias.

    Args:
        ridge: relative to the mean of the diagonal of C.
        mask: (g, k, o) weights that may change; the others have D = 0.
        steps: of the descent, for masked problems (default: until it is solved); fewer regularise, too.
    """
    change: FloatArray
    if mask is None or mask.all():
        covariance, cross, _ = _ridged(normal, ridge)
        change = np.linalg.solve(covariance, cross).astype(np.float64)
    else:
        change = np.zeros_like(normal.cross)
        for found in islice(_descent(normal, ridge, mask), CG_STEPS if steps is None else steps):
            change = found
        change = change.astype(np.float64)
    return change, _bias(normal, change)


def best_steps(fit: Normal, held: Normal, ridge: float, mask: BoolArray) -> tuple[int, float]:
    """How many steps of the masked descent on ``fit`` leave the least error on ``held``, and that error. Stops where it rises."""
    best = 0, float("inf")
    number, change = 0, np.zeros_like(fit.cross)
    for number, change in enumerate(islice(_descent(fit, ridge, mask), CG_STEPS), 1):
        if number in LOOKS:
            error = held.error(change, _bias(fit, change))
            if error >= best[1]:
                return best
            best = number, error
    error = held.error(change, _bias(fit, change))
    return (number, error) if error < best[1] else best


def _bias(normal: Normal, change: Array) -> FloatArray:
    """The best bias for a change of the weights: d = mean e - mean p D."""
    count = max(normal.count, 1.0)
    bias: FloatArray = normal.errors / count - ((normal.rows / count)[:, None, :] @ change)[:, 0]
    return bias


def _ridged(normal: Normal, ridge: float) -> tuple[FloatArray, FloatArray, FloatArray]:
    """C + r I, its right-hand side, and its diagonal."""
    covariance, cross = normal.centred()
    diagonal = np.maximum(np.einsum("gkk->gk", covariance), 0.0)
    diagonal = diagonal + np.maximum(ridge * diagonal.mean(1), _rounding(normal))[:, None]
    every = np.arange(covariance.shape[1])
    covariance[:, every, every] = diagonal
    return covariance, cross, diagonal


def _rounding(normal: Normal) -> FloatArray:
    """What remains of the variance of constant inputs, (g,): products are float32, and a ridge below their rounding fits noise."""
    size = np.einsum("gkk->gk", normal.gram).mean(1)
    found: FloatArray = np.maximum(ROUNDING * size, np.finfo(np.float32).tiny)
    return found


def _descent(normal: Normal, ridge: float, mask: BoolArray) -> Iterator[Array]:
    """Solve each column on its own surviving rows, all columns at once: conjugate gradients with the diagonal as preconditioner (one
    Cholesky per column would cost outputs x inputs^3). Yields the change after every step, in an array that the next step reuses."""
    covariance, target, diagonal = _ridged(normal, ridge)
    precision = np.float32 if covariance.shape[1] >= WIDE else np.float64
    scale = diagonal.mean(1)[:, None, None]  # single precision has a short range
    covariance /= scale
    matrix, free = covariance.astype(precision), mask.astype(precision)
    del covariance
    residual = (target / scale).astype(precision) * free
    inverse = free / (diagonal[:, :, None] / scale).astype(precision)
    change = np.zeros_like(residual)
    step = residual * inverse
    old = (residual * step).sum(1)
    goal = CG_TOLERANCE**2 * old
    while (old > goal).any():
        image = (matrix @ step) * free
        length = _ratio(old, (step * image).sum(1))
        change += length[:, None] * step
        yield change
        residual -= length[:, None] * image
        scaled = residual * inverse
        new = (residual * scaled).sum(1)
        step = scaled + _ratio(new, old)[:, None] * step
        old = new


def _ratio(above: Array, below: Array) -> Array:
    """above / below; 0 where rounding left nothing below."""
    found: Array = np.divide(above, below, out=np.zeros_like(above), where=below > TINY)
    return found


def best_ridge(fit: Normal, held: Normal, ridges: Sequence[float]) -> tuple[float, float]:
    """The ridge whose solution on ``fit`` leaves the least error on ``held``, and that error."""
    errors = [held.error(*solve(fit, ridge)) for ridge in ridges]
    best = int(np.argmin(errors))
    return ridges[best], errors[best]
