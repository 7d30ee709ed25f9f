"""Ridge regression from streamed sums: re-fitting a weight matrix so that P W comes nearer to what is wanted.

With rows p (inputs of a layer) and errors e = wanted - (p W + b) of the present weight, the change (D, d) minimises

    sum |e - p D - d|^2 + ridge * mean(diag C) * |D|^2,        C = sum (p - mean p)(p - mean p)'

so the ridge pulls towards the present weight and the bias is free: D = (C + r I)^-1 sum (p - mean p) e', d = mean e - mean p D.

Where there are fewer rows than inputs, the rows themselves are kept (`Samples`) instead of their products (`Normal`), and the same change
comes from the dual problem: with the centred rows Q and errors F, D = Q' (Q Q' + r I)^-1 F.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..core.types import OUTPUTS, Array, BoolArray, Factor, FloatArray
from .linear import Joint, Normal, Samples, Sums, best_bias, positive_inverse, positive_solve, positive_solves

CG_STEPS = 60
CG_TOLERANCE = 1e-3  # of the residual; held-out data judge the result anyway
SETTLED = 16  # samples whose mean is near enough to that of all
LOOKS = (5, 10, 15, 20, 30, 45)  # steps after which held-out data are asked whether more would help
MOST_GAIN = 2.0  # of what a fit lacks in spread; where it tells less, nothing is known
WIDE = 1024  # from so many inputs on the steps are in single precision: half the time, and the tolerance is far above its rounding
FAINT = 1e-2
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
        solved = positive_solves(matrix, right, strength)
        change = solved if rows is None else np.stack([inputs.T @ dual for inputs, dual in zip(rows, solved, strict=True)])
        yield change, best_bias(sums, change)


def as_varied(sums: Sums, weight: FloatArray, change: tuple[FloatArray, FloatArray], variance: FloatArray) -> tuple[FloatArray, FloatArray]:
    """A change after which each output varies as much as its target does.

    A fit varies less than its target, by what it cannot tell: var(P W) = v - m with the variance v of the target and the mean square m of
    what is left. Layers that read it were made for the full variance, and behind each nonlinearity more is lost, so W + D is multiplied by
    the square root of v / (v - m).

    Args:
        weight: W (g, k, o), and ``variance`` v (g, o) of the target, both in units of it.
    """
    missed = np.maximum(sums.left(*change), 0) / max(sums.count, 1.0)
    variance = np.maximum(variance, TINY)
    gain = (variance / np.maximum(variance - missed, variance / MOST_GAIN**2)) ** 0.5
    varied = change[0] + (gain[:, None] - 1) * (weight + change[0])
    return varied, best_bias(sums, varied)


def _diagonal(matrix: FloatArray) -> FloatArray:
    return np.asarray(np.maximum(np.einsum("gkk->gk", matrix), 0.0))


def _strength(sums: Sums, ridge: float, diagonal: FloatArray) -> FloatArray:
    """Of a relative ridge, (g,), from the diagonal of C or Q Q': at least the rounding of what is summed."""
    return np.asarray(np.maximum(ridge * (diagonal.sum(1) / max(sums.shape[1], 1)), sums.rounding()))


@dataclass
class Scatter:
    """What few samples leave unknown of the covariance C (k, k) of rows: the share s with which (1 - s) C + s m I, with m the mean
    variance, is nearest to what more samples would give,

        s = sum |G_i - G|^2 / (n (n - 1)) / |C - m I|^2,

    where G_i is the mean of (p - c)(p - c)' over the rows p of sample i, and G that of all n samples (Ledoit & Wolf, J. Multivariate
    Analysis 88, 2004; rows of one sample resemble each other, so that samples count). ``squares``: sum |G_i|^2 of each block;
    ``shares``: s of the blocks so far. c is the mean of the first samples, and what comes before it is known is ``waiting``. Where of
    all ``places`` only some ``rows`` count, G_i is the sum over those of a sample by their mean number.
    """

    count: int = 0
    squares: FloatArray = field(default_factory=lambda: np.zeros(1))
    centre: Array | None = None
    shares: list[float] = field(default_factory=list)
    waiting: list[tuple[Array, BoolArray | None]] = field(default_factory=list)
    places: int = 0
    rows: int = 0

    def add(self, rows: Array, samples: int, on: BoolArray | None = None) -> None:
        """Rows (g, n, k), as many of each sample and those of one behind those of the other, of which those count that are ``on``
        (samples, per sample)."""
        self.waiting.append((rows.reshape(len(rows), samples, -1, rows.shape[2]), on))
        self.count, self.places = self.count + samples, self.places + rows.shape[1]
        self.rows += rows.shape[1] if on is None else int(on.sum())
        if self.centre is not None or self.count >= SETTLED:
            self.settled()

    def settled(self) -> Array:
        """c (g, k), after what waits for it was added."""
        if self.centre is None:
            pieces = [parts.reshape(len(parts), -1, parts.shape[3]) if on is None else parts[:, on] for parts, on in self.waiting]
            rows = np.concatenate(pieces, 1)
            self.centre = rows.mean(1) if rows.shape[1] else np.zeros((len(rows), rows.shape[2]), rows.dtype)  # all tokens so far are off
        for parts, on in self.waiting:
            parts = parts - self.centre[:, None, None]
            if on is not None:
                parts *= on[:, :, None]
            per, turned = parts.shape[2], parts.swapaxes(2, 3)
            products = parts @ turned if per < parts.shape[3] else turned @ parts
            self.squares = self.squares + np.square(products).sum((1, 2, 3), dtype=np.float64) / per**2
        self.waiting.clear()
        return self.centre

    def share(self, block: int, square: FloatArray, variance: float, shift: float) -> float:
        """s of a block, from C, or from Q Q' where C = Q' Q; ``shift``: what |G|^2 has more than |C|^2, since c is not quite the mean."""
        if self.count < 2:
            return 0.0
        size, own = self.settled().shape[1], float(np.vdot(square, square))
        squares = self.squares[block] * (self.places / max(self.rows, 1)) ** 2
        noise = (squares / self.count - own - shift) / (self.count - 1)
        return float(np.clip(noise / max(own - size * variance**2, TINY), 0.0, 1.0))


def ridge_inverse(sums: Normal | Samples, ridge: float, scatter: Scatter | None = None) -> Iterator[FloatArray]:
    """((1 - s) C / n + max(s, ridge) m I)^-1 (k, k) of each block, with m the mean variance of the n rows and s as ``scatter`` has it
    (default: 0). The sums are used up."""
    count, means = max(sums.count, 1.0), sums.means[0]
    matrices = sums.centred(spend=True)[0] if isinstance(sums, Normal) else sums.centred()[0]
    for block, matrix in enumerate(matrices):
        matrix /= count if isinstance(sums, Normal) else np.sqrt(count)
        rows = None if isinstance(sums, Normal) else matrix
        square = matrix if rows is None else rows @ rows.T
        variance, share = float(np.trace(square)) / matrix.shape[1], 0.0
        if scatter is not None:
            away = means[block] - scatter.settled()[block]
            seen = away @ square @ away if rows is None else np.square(rows @ away).sum()
            share = scatter.share(block, square, variance, float(2 * seen + (away @ away) ** 2))
            scatter.shares.append(share)
        square *= 1 - share
        strength = max(max(share, ridge) * variance, TINY)
        if rows is None:
            yield positive_inverse(square, strength)
            continue
        rows *= np.sqrt(1 - share)
        inverse = rows.T @ positive_solve(square, -rows, strength)
        inverse[np.diag_indices(len(inverse))] += 1
        inverse /= strength
        yield inverse


Change = tuple[FloatArray, FloatArray]
Limit = Callable[[Sums, float, Change], Change]
"""What becomes of a change (D, d) that these sums ask for, with this ridge, where the weight is bound to something."""


def unlimited(sums: Sums, ridge: float, change: Change) -> Change:
    """Nothing binds it."""
    return change


def best_ridge(fit: Sums, held: Sums, ridges: Sequence[float], limit: Limit = unlimited) -> tuple[float, float]:
    """The ridge whose solution on ``fit`` leaves the least error on ``held``, and that error."""
    solved = zip(ridges, solutions(fit, ridges), strict=True)
    errors = [held.error(*limit(fit, ridge, change)) for ridge, change in solved]
    best = int(np.argmin(errors))
    return ridges[best], errors[best]


# ---- weights of lower rank -------------------------------------------------------------------------------------------


def evened(variances: FloatArray) -> FloatArray:
    """Factors on outputs with which all vary alike, sqrt(mean v / v), and no variance v counts as less than a share `FAINT` of their mean.

    A lower rank gives up what varies least. Where outputs vary more than others that may be whole channels, on which a depthwise layer
    behind them leans as much as on any.
    """
    mean = max(float(variances.mean()), TINY)
    return np.asarray((mean / np.maximum(variances, FAINT * mean)) ** 0.5)


def lowered(
    sums: Sums, ridge: float, weight: FloatArray, change: Change, factor: Factor, taps: int, alone: bool = False
) -> Change:  # fmt: skip
    """The change of a weight W (1, k, o) to one of lower rank that makes nearly of the rows what W + D makes (reduced-rank regression,
    Izenman, J. Multivariate Analysis 5, 1975): with M = C + r I, W + D = X, the factors E of `evened` outputs (where each is read
    ``alone``, else 1), and the first eigenvectors V of E X' M X E, X E V V' E^-1.

    To narrow inputs, X E is seen as (channels, taps x outputs), and the taps as independent: with K the sum of the blocks of M of each tap,
    and the first eigenvectors U of K^1/2 X E^2 X' K^1/2, every tap reads A = K^-1/2 U; then what is made of these channels is fitted again.
    """
    assert not isinstance(sums, Joint)
    aim, inner = (weight + change[0])[0], _Inner.of(sums, ridge)
    made = inner(aim, aim)
    even = evened(np.diag(made)) if alone else np.ones(len(made))
    if factor.narrow == OUTPUTS:
        _, vectors = np.linalg.eigh(even[:, None] * made * even)
        low = (aim * even) @ vectors[:, -factor.rank :] @ vectors[:, -factor.rank :].T / even
    else:
        matrix = (aim * even).reshape(taps, -1, aim.shape[1])
        values, turned = np.linalg.eigh(inner.channels(taps))
        root = np.sqrt(np.maximum(values, TINY))
        seen = root[:, None] * (turned.T @ matrix)
        vectors = np.linalg.eigh((seen @ seen.transpose(0, 2, 1)).sum(0))[1][:, -factor.rank :]
        every = np.kron(np.eye(taps), turned @ (vectors / root[:, None]))
        low = every @ positive_solve(inner(every, every), inner(every, aim), TINY)
    found = np.asarray(low[None] - weight)
    return found, best_bias(sums, found)


@dataclass(frozen=True)
class _Inner:
    """A' M B for M = C + r I, from C, or from the rows Q of C = Q' Q."""

    matrix: FloatArray
    strength: float
    is_rows: bool

    @classmethod
    def of(cls, sums: Normal | Samples, ridge: float) -> _Inner:
        matrix = sums.centred()[0]
        is_rows = isinstance(sums, Samples)
        diagonal = np.square(matrix).sum(1) if is_rows else _diagonal(matrix)
        return cls(matrix[0], float(_strength(sums, ridge, diagonal)[0]), is_rows)

    def __call__(self, left: FloatArray, right: FloatArray) -> FloatArray:
        product = (self.matrix @ left).T @ (self.matrix @ right) if self.is_rows else left.T @ (self.matrix @ right)
        return np.asarray(product + self.strength * (left.T @ right))

    def channels(self, taps: int) -> FloatArray:
        """The sum of the blocks of M of each tap."""
        size = self.matrix.shape[1] // taps
        parts = [slice(size * tap, size * (tap + 1)) for tap in range(taps)]
        blocks = [self.matrix[:, part].T @ self.matrix[:, part] if self.is_rows else self.matrix[part, part] for part in parts]
        return np.asarray(sum(blocks[1:], blocks[0]) + taps * self.strength * np.eye(size))


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
