"""Ridge regression from streamed sums: re-fitting a weight matrix so that P W comes nearer to what is wanted.

With rows p (inputs of a layer) and errors e = wanted - (p W + b) of the present weight, the change (D, d) minimises

    sum |e - p D - d|^2 + ridge * mean(diag C) * |D|^2,        C = sum (p - mean p)(p - mean p)'

so the ridge pulls towards the present weight and the bias is free: D = (C + r I)^-1 sum (p - mean p) e', d = mean e - mean p D.

Where there are fewer rows than inputs, the rows themselves are kept (`Samples`) instead of their products (`Normal`), and the same change
comes from the dual problem: with the centred rows Q and errors F, D = Q' (Q Q' + r I)^-1 F.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..core.types import Array, BoolArray, FloatArray
from .linear import Normal, Samples, Sums, best_bias, positive_inverse, positive_solve

CG_STEPS = 60
CG_TOLERANCE = 1e-3  # of the residual; held-out data judge the result anyway
LOOKS = (5, 10, 15, 20, 30, 45)  # steps after which held-out data are asked whether more would help
WIDE = 1024  # from so many inputs on the steps are in single precision: half the time, and the tolerance is far above its rounding
TINY = float(np.finfo(np.float32).tiny)


def mean_shift(sums: Sums) -> tuple[FloatArray, FloatArray]:
    """The best change of the bias alone."""
    return np.zeros(sums.shape), sums.means[1]


def solve(sums: Sums, ridge: float, mask: BoolArray | None = None, steps: int = CG_STEPS) -> tuple[FloatArray, FloatArray]:
    """The change (D, d) of weight and bias.

    Args:
        ridge: relative to the mean of the diagonal of C.
        mask: (g, k, o) weights that may change; the others have D = 0.
        steps: of the descent, for masked problems (by default enough to solve it); fewer regularise, too.
    """
    if mask is None or mask.all():
        return next(solutions(sums, [ridge]))
    change: Array = np.zeros(sums.shape)
    for better in _descent(sums, ridge, mask, steps):
        change = better
    change = change.astype(np.float64)
    return change, best_bias(sums, change)


def solutions(sums: Sums, ridges: Sequence[float]) -> Iterator[tuple[FloatArray, FloatArray]]:
    """As `solve` without a mask, for several ridges: from C and its right-hand side or, of rows, from Q Q' and F."""
    matrix, right = sums.centred()
    rows = matrix if isinstance(sums, Samples) else None
    if rows is not None:
        matrix = rows @ rows.transpose(0, 2, 1)
    diagonal, size = _diagonal(matrix), np.arange(matrix.shape[1])
    for ridge in ridges:
        matrix[:, size, size] = diagonal
        strength = _strength(sums, ridge, diagonal)
        solved = [positive_solve(*problem) for problem in zip(matrix, right, strength.tolist(), strict=True)]
        change = np.stack(solved if rows is None else [inputs.T @ dual for inputs, dual in zip(rows, solved, strict=True)])
        yield change, best_bias(sums, change)


def _diagonal(matrix: FloatArray) -> FloatArray:
    return np.asarray(np.maximum(np.einsum("gkk->gk", matrix), 0.0))


def _strength(sums: Sums, ridge: float, diagonal: FloatArray) -> FloatArray:
    """Of a relative ridge, (g,), from the diagonal of C or Q Q': at least the rounding of what is summed."""
    return np.asarray(np.maximum(ridge * (diagonal.sum(1) / max(sums.shape[1], 1)), sums.rounding()))


def ridge_inverse(sums: Normal | Samples, ridge: float) -> Iterator[FloatArray]:
    """(C / n + r I)^-1 (k, k) of each block, with r = ridge times the mean variance of the n rows. The sums are used up."""
    count = max(sums.count, 1.0)
    if isinstance(sums, Normal):
        covariance = sums.centred(spend=True)[0]
        covariance /= count
        for block in covariance:
            yield positive_inverse(block, ridge * float(np.trace(block)) / len(block))
        return
    for rows in sums.centred()[0]:
        rows = rows / np.sqrt(count)
        strength = max(ridge * float(np.square(rows).sum()) / rows.shape[1], TINY)
        inverse = rows.T @ positive_solve(rows @ rows.T, -rows, strength)
        inverse[np.diag_indices(len(inverse))] += 1
        inverse /= strength
        yield inverse


def best_ridge(fit: Sums, held: Sums, ridges: Sequence[float]) -> tuple[float, float]:
    """The ridge whose solution on ``fit`` leaves the least error on ``held``, and that error."""
    errors = [held.error(*solution) for solution in solutions(fit, ridges)]
    best = int(np.argmin(errors))
    return ridges[best], errors[best]


def best_steps(fit: Sums, held: Sums, ridge: float, mask: BoolArray) -> tuple[int, float]:
    """How many steps of the masked descent on ``fit`` leave the least error on ``held``, and that error. Stops where it rises."""
    best = 0, float("inf")
    number, change = 0, np.zeros(fit.shape)
    for number, change in enumerate(_descent(fit, ridge, mask), 1):
        if number in LOOKS:
            error = held.error(change, best_bias(fit, change))
            if error >= best[1]:
                return best
            best = number, error
    error = held.error(change, best_bias(fit, change))
    return (number, error) if error < best[1] else best


def _descent(sums: Sums, ridge: float, mask: BoolArray, steps: int = CG_STEPS) -> Iterator[Array]:
    """Solve each column on its own surviving rows, all columns at once: conjugate gradients with the diagonal as preconditioner (one
    Cholesky per column would cost outputs x inputs^3). Yields the change after every step, in an array that the next step reuses."""
    sums = sums.summed() if isinstance(sums, Samples) else sums
    covariance, target = sums.centred()
    diagonal = _diagonal(covariance)
    diagonal = diagonal + _strength(sums, ridge, diagonal)[:, None]
    size = np.arange(diagonal.shape[1])
    covariance[:, size, size] = diagonal
    precision = np.float32 if len(size) >= WIDE else np.float64
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
    for _ in range(steps):
        if not (old > goal).any():
            return
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
    return np.asarray(np.divide(above, below, out=np.zeros_like(above), where=below > TINY))
