"""Ridge regression from streamed sums: re-fitting a weight matrix so that P W comes nearer to what is wanted.

With rows p (inputs of a layer) and errors e = wanted - (p W + b) of the present weight, the change (D, d) minimises

    sum |e - p D - d|^2 + ridge * mean(diag C) * |D|^2,        C = sum (p - mean p)(p - mean p)'

so the ridge pulls towards the present weight and the bias is free: D = (C + r I)^-1 sum (p - mean p) e', d = mean e - mean p D.

Where there are fewer rows than inputs, the rows themselves are kept (`Samples`) instead of their products (`Normal`), and the same change
comes from the dual problem: with the centred rows Q and errors F, D = Q' (Q Q' + r I)^-1 F.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from .cholesky import positive_inverse, positive_solve
from .normal import Joint, Normal, Samples, Sums
from .records import BoolArray, FloatArray

CG_STEPS = 60
CG_TOLERANCE = 1e-3  # of the residual; held-out data judge the result anyway
TINY = float(np.finfo(np.float64).tiny)


def mean_shift(sums: Sums) -> tuple[FloatArray, FloatArray]:
    """The best change of the bias alone."""
    return np.zeros(sums.shape), sums.means[1]


def solve(sums: Sums, ridge: float, mask: BoolArray | None = None) -> tuple[FloatArray, FloatArray]:
    """The change (D, d) of weight and bias.

    Args:
        ridge: relative to the mean of the diagonal of C.
        mask: (g, k, o) weights that may change; the others have D = 0.
    """
    return next(solutions(sums, [ridge], mask))


def solutions(sums: Sums, ridges: Sequence[float], mask: BoolArray | None = None) -> Iterator[tuple[FloatArray, FloatArray]]:
    """As `solve`, for several ridges."""
    if mask is not None and mask.all():
        mask = None
    if mask is not None and isinstance(sums, Samples):
        sums = sums.summed()
    rows, errors = sums.means
    strength_of, change_of = _dual(sums) if isinstance(sums, Samples) else _primal(sums, mask)
    for ridge in ridges:
        change = change_of(np.maximum(strength_of(ridge), sums.rounding()))
        yield change, errors - (rows[..., None, :] @ change)[..., 0, :]


Strength = Callable[[float], FloatArray]
Change = Callable[[FloatArray], FloatArray]


def _primal(sums: Normal | Joint, mask: BoolArray | None) -> tuple[Strength, Change]:
    """Strength (g,) of a relative ridge, and the change for a strength, from C and its right-hand side."""
    covariance, cross = sums.centred()
    diagonal = np.maximum(np.einsum("gkk->gk", covariance), 0.0)
    size = np.arange(diagonal.shape[1])

    def change(strength: FloatArray) -> FloatArray:
        covariance[:, size, size] = diagonal
        if mask is None:
            solved = [positive_solve(*own) for own in zip(covariance, cross, strength.tolist(), strict=True)]
            return np.stack(solved) if solved else np.zeros(cross.shape)
        loaded = diagonal + strength[:, None]
        covariance[:, size, size] = loaded
        return _conjugate_gradients(covariance, cross, mask.astype(np.float64), loaded)

    return lambda ridge: ridge * diagonal.mean(1), change


def _dual(sums: Samples) -> tuple[Strength, Change]:
    """As `_primal`, from Q Q' and F."""
    rows, errors = sums.centred()
    products = rows @ rows.transpose(0, 2, 1)
    diagonal = np.einsum("gnn->gn", products).copy()
    size = np.arange(diagonal.shape[1])

    def change(strength: FloatArray) -> FloatArray:
        products[:, size, size] = diagonal
        solved = [own.T @ positive_solve(*rest) for own, *rest in zip(rows, products, errors, strength.tolist(), strict=True)]
        return np.stack(solved)

    return lambda ridge: ridge * diagonal.sum(1) / max(sums.shape[1], 1), change


def ridge_inverse(sums: Normal | Samples, ridge: float) -> Iterator[FloatArray]:
    """(C / n + r I)^-1 (k, k) of each block, with r = ridge times the mean variance of the n rows. The sums are used up."""
    count = max(sums.count, 1.0)
    if isinstance(sums, Normal):
        covariance = sums.turned()
        covariance /= count
        for block in covariance:
            yield positive_inverse(block, ridge * float(np.trace(block)) / len(block))
        return
    for rows in sums.centred()[0]:
        rows = rows / np.sqrt(count)
        strength = max(ridge * float(np.square(rows).sum()) / rows.shape[1], float(np.finfo(np.float32).tiny))
        found = rows.T @ positive_solve(rows @ rows.T, -rows, strength)
        found[np.diag_indices(len(found))] += 1
        found /= strength
        yield found


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


def best_ridge(fit: Sums, held: Sums, ridges: Sequence[float], mask: BoolArray | None = None) -> tuple[float, float]:
    """The ridge whose solution on ``fit`` leaves the least error on ``held``, and that error."""
    errors = [held.error(*found) for found in solutions(fit, ridges, mask)]
    best = int(np.argmin(errors))
    return ridges[best], errors[best]
