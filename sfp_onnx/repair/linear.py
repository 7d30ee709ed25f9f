"""Running sums of a least-squares problem, and what stands for them where there are fewer rows than inputs.

All kinds have the same face: ``shape`` (blocks g, inputs k, outputs o), ``count`` of rows, ``means``, ``centred``, ``rounding``, ``error``
of a change, ``without_means``; see `ridge` for the symbols.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..core.types import Array, FloatArray

ROUNDING = 1e-6
STRIP = 512  # rows of a matrix that are updated at a time, for the sake of memory


@dataclass
class Normal:
    """Sums over rows, for each of g blocks: ``gram`` (g, k, k) of p p', ``cross`` (g, k, o) of p e', ``rows`` (g, k) of p,
    ``errors`` (g, o) of e, ``squares`` (g, o) of e^2, ``count`` rows. Float64; add up with `absorb`."""

    gram: FloatArray
    cross: FloatArray
    rows: FloatArray
    errors: FloatArray
    squares: FloatArray
    count: float = 0.0

    @classmethod
    def empty(cls, blocks: int, inputs: int, outputs: int) -> Normal:
        """All sums zero."""
        square, sums = np.zeros((blocks, inputs, inputs)), np.zeros((blocks, inputs, outputs))
        return cls(square, sums, np.zeros((blocks, inputs)), np.zeros((blocks, outputs)), np.zeros((blocks, outputs)))

    def update(self, rows: Array, errors: Array) -> None:
        """Add rows (g, n, k) with errors (g, n, o). Products of one call are float32, sums over calls float64."""
        if not rows.shape[1]:
            return  # adding zeros to the sums of a wide layer takes as long as a batch
        turned = rows.transpose(0, 2, 1)
        self.gram += turned @ rows  # numpy sees that it is symmetric
        self.cross += turned @ errors
        self.rows += rows.sum(1, dtype=np.float64)
        self.errors += errors.sum(1, dtype=np.float64)
        self.squares += np.square(errors).sum(1, dtype=np.float64)
        self.count += rows.shape[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Blocks, inputs, outputs."""
        return len(self.gram), self.gram.shape[2], self.errors.shape[1]

    @property
    def means(self) -> tuple[FloatArray, FloatArray]:
        """Of rows (g, k) and errors (g, o)."""
        return self.rows / max(self.count, 1.0), self.errors / max(self.count, 1.0)

    def of_channels(self, taps: int) -> FloatArray:
        """Covariance (c, c) of the channels of the first block, where its rows hold so many taps of each; summed over taps."""
        size, count = self.shape[1] // taps, max(self.count, 1.0)
        parts = [slice(size * tap, size * (tap + 1)) for tap in range(taps)]
        means = self.rows[0] / count
        return np.asarray(sum(self.gram[0, part, part] / count - np.outer(means[part], means[part]) for part in parts))

    def of_products(self, weight: FloatArray) -> FloatArray:
        """Covariance (o, o) of the products of the first block's rows with a weight (k, o)."""
        count = max(self.count, 1.0)
        mean = self.rows[0] @ weight / count
        return np.asarray(weight.T @ (self.gram[0] @ weight) / count - np.outer(mean, mean))

    def spread(self, weight: FloatArray) -> FloatArray:
        """Variance (g, o) of the products of rows with a weight (g, k, o)."""
        count = max(self.count, 1.0)
        means = (self.rows[:, None] @ weight)[:, 0] / count
        return np.asarray(np.maximum((weight * (self.gram @ weight)).sum(1) / count - means**2, 0.0))

    def absorb(self, other: Normal) -> Normal:
        """Add the sums of other rows, in place."""
        for name in ("gram", "cross", "rows", "errors", "squares"):
            np.add(getattr(self, name), getattr(other, name), out=getattr(self, name))
        self.count += other.count
        return self

    def summed(self) -> Normal:
        """The sums themselves."""
        return self

    def without_means(self) -> Normal:
        """For layers that have no bias: nothing is taken as its share, so that `ridge.solve` and `error` see the weights alone."""
        return replace(self, rows=np.zeros_like(self.rows), errors=np.zeros_like(self.errors))

    def centred(self, spend: bool = False) -> tuple[FloatArray, FloatArray]:
        """Covariance sums C (g, k, k) and (g, k, o), about the means. ``spend``: C takes the place of ``gram``, for the sake of memory,
        when the sums have served."""
        gram, (means, errors) = self.gram if spend else self.gram.copy(), self.means
        for block, rows, mean in zip(gram, self.rows, means, strict=True):
            for start in range(0, len(block), STRIP):
                block[start : start + STRIP] -= rows[start : start + STRIP, None] * mean
        return gram, self.cross - self.rows[:, :, None] * errors[:, None, :]

    def rounding(self) -> FloatArray:
        """What remains of the variance of constant inputs, (g,): products are float32, and a ridge below their rounding fits noise."""
        return _rounding(np.einsum("gkk->g", self.gram) / max(self.shape[1], 1))

    def left(self, change: FloatArray, bias: FloatArray) -> FloatArray:
        """sum (e - p D - d)^2 of each output after a change, (g, o)."""
        left = self.squares - 2 * bias * self.errors + self.count * bias**2
        if change.any():  # the product of a wide layer takes long
            left = left + (change * (self.gram @ change - 2 * self.cross)).sum(1) + 2 * (self.rows[:, None, :] @ change)[:, 0] * bias
        return np.asarray(left)

    def error(self, change: FloatArray, bias: FloatArray) -> float:
        """sum |e - p D - d|^2 after a change."""
        return float(self.left(change, bias).sum())


@dataclass(frozen=True)
class Samples:
    """Fewer rows than inputs: ``rows`` (g, n, k) and ``errors`` (g, n, o) themselves. ``centre``: there is a bias to take their means."""

    rows: Array
    errors: Array
    centre: bool = True

    @property
    def shape(self) -> tuple[int, int, int]:
        """Blocks, inputs, outputs."""
        return self.rows.shape[0], self.rows.shape[2], self.errors.shape[2]

    @property
    def count(self) -> float:
        """Rows."""
        return float(self.rows.shape[1])

    @property
    def means(self) -> tuple[FloatArray, FloatArray]:
        """Of rows (g, k) and errors (g, o)."""
        share = 1 / max(self.count, 1.0) if self.centre else 0.0
        return self.rows.sum(1, dtype=np.float64) * share, self.errors.sum(1, dtype=np.float64) * share

    def without_means(self) -> Samples:
        """For layers that have no bias, as `Normal.without_means`."""
        return replace(self, centre=False)

    def left(self, change: FloatArray, bias: FloatArray) -> FloatArray:
        """As `Normal.left`."""
        left = self.errors - self.rows @ change.astype(np.float32) - bias[:, None, :].astype(np.float32)
        return np.asarray(np.square(left).sum(1, dtype=np.float64))

    def error(self, change: FloatArray, bias: FloatArray) -> float:
        """sum |e - p D - d|^2 after a change."""
        return float(self.left(change, bias).sum())

    def centred(self) -> tuple[FloatArray, FloatArray]:
        """Rows Q (g, n, k) and errors F (g, n, o), about the means."""
        rows, errors = self.means
        return self.rows - rows[:, None, :], self.errors - errors[:, None, :]

    def of_channels(self, taps: int) -> FloatArray:
        """As `Normal.of_channels`."""
        rows = self.centred()[0][0].reshape(int(self.count), taps, -1)
        return np.asarray(sum(rows[:, tap].T @ rows[:, tap] for tap in range(taps)) / max(self.count, 1.0))

    def of_products(self, weight: FloatArray) -> FloatArray:
        """As `Normal.of_products`."""
        made = self.centred()[0][0] @ weight
        return np.asarray(made.T @ made / max(self.count, 1.0))

    def spread(self, weight: FloatArray) -> FloatArray:
        """As `Normal.spread`."""
        return np.asarray(np.square(self.centred()[0] @ weight).sum(1, dtype=np.float64) / max(self.count, 1.0))

    def rounding(self) -> FloatArray:
        """As `Normal.rounding`."""
        return _rounding(np.square(self.rows).sum((1, 2), dtype=np.float64) / max(self.shape[1], 1))

    def summed(self) -> Normal:
        """The same as sums."""
        sums = Normal.empty(*self.shape)
        sums.update(self.rows, self.errors)
        return sums if self.centre else sums.without_means()


@dataclass(frozen=True)
class Joint:
    """One weight that several layers use, each with a bias of its own: means and biases are (uses, g, ...)."""

    parts: tuple[Normal, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Blocks, inputs, outputs."""
        return self.parts[0].shape

    @property
    def count(self) -> float:
        """Rows of all uses."""
        return sum(part.count for part in self.parts)

    @property
    def means(self) -> tuple[FloatArray, FloatArray]:
        """Of rows (uses, g, k) and errors (uses, g, o)."""
        rows, errors = zip(*(part.means for part in self.parts), strict=True)
        return np.stack(rows), np.stack(errors)

    def without_means(self) -> Joint:
        """As `Normal.without_means`."""
        return Joint(tuple(part.without_means() for part in self.parts))

    def left(self, change: FloatArray, bias: FloatArray) -> FloatArray:
        """As `Normal.left`, over all uses."""
        return np.asarray(sum(part.left(change, shift) for part, shift in zip(self.parts, bias, strict=True)))

    def error(self, change: FloatArray, bias: FloatArray) -> float:
        """As `Normal.error`."""
        return float(self.left(change, bias).sum())

    def centred(self) -> tuple[FloatArray, FloatArray]:
        """As `Normal.centred`, each use about its own means."""
        covariances, crosses = zip(*(part.centred() for part in self.parts), strict=True)
        return sum(covariances[1:], covariances[0]), sum(crosses[1:], crosses[0])

    def rounding(self) -> FloatArray:
        """As `Normal.rounding`."""
        return np.asarray(np.sum([part.rounding() for part in self.parts], 0))


Sums = Normal | Samples | Joint


class Gathered:
    """Rows and errors that come in pieces. They are multiplied only when there are as many as inputs, which takes fewer passes over the
    sums; if so many never come, they stay what they are."""

    def __init__(self, blocks: int, inputs: int, outputs: int) -> None:
        self.shape = (blocks, inputs, outputs)
        self.normal: Normal | None = None
        self._waiting: list[tuple[Array, Array]] = []
        self.places = 0  # of what is waiting

    @property
    def waiting(self) -> list[Array]:
        """Rows that are not multiplied yet."""
        return [rows for rows, _ in self._waiting]

    def add(self, rows: Array, errors: Array, places: int | None = None) -> None:
        """Rows (g, n, k) with errors (g, n, o), float32. ``places``: they count as so many (default: as they are)."""
        self._waiting.append((rows, errors))
        self.places += rows.shape[1] if places is None else places
        if self.places >= self.shape[1]:
            self.normal = self.normal or Normal.empty(*self.shape)
            self.sums()

    def sums(self) -> Normal | Samples:
        """All of them."""
        blocks, inputs, outputs = self.shape
        nothing = np.zeros((blocks, 0, inputs), np.float32), np.zeros((blocks, 0, outputs), np.float32)
        pieces = zip(*(self._waiting or [nothing]), strict=True)
        rows, errors = (piece[0] if len(piece) == 1 else np.concatenate(piece, 1) for piece in pieces)
        if self.normal is None:
            return Samples(rows, errors)
        self.normal.update(rows, errors)
        self._waiting, self.places = [], 0
        return self.normal


def best_bias(sums: Sums, change: Array) -> FloatArray:
    """The best bias for a change of the weights: d = mean e - mean p D."""
    rows, errors = sums.means
    return np.asarray(errors - (rows[..., None, :] @ change)[..., 0, :])


def together(first: Sums, second: Sums) -> Sums:
    """Both. The sums of the larger one may be changed."""
    if isinstance(first, Joint) and isinstance(second, Joint):
        return Joint(tuple(part.absorb(other) for part, other in zip(first.parts, second.parts, strict=True)))
    assert not isinstance(first, Joint) and not isinstance(second, Joint)
    if isinstance(first, Samples) and isinstance(second, Samples):
        joined = replace(first, rows=np.concatenate([first.rows, second.rows], 1), errors=np.concatenate([first.errors, second.errors], 1))
        return joined if joined.count < joined.shape[1] else joined.summed()
    larger, other = (second, first) if isinstance(first, Samples) else (first, second)
    return larger.summed().absorb(other.summed())


def _rounding(size: FloatArray) -> FloatArray:
    return np.asarray(np.maximum(ROUNDING * size, np.finfo(np.float32).tiny))


# ---- positive definite systems by Cholesky factors -------------------------------------------------------------------

SMALL = 128  # below, a general solver is as fast


def factor(matrix: FloatArray, strength: float) -> FloatArray:
    """Lower L with L L' = matrix + strength I; ``matrix`` (k, k) is symmetric and changed on its diagonal.

    A matrix whose rounding errors are larger than ``strength`` takes as much more as it needs (ten times as much at a time); one that is
    not finite gives NaN.
    """
    size, diagonal = np.arange(len(matrix)), np.diag(matrix).copy()
    strength = max(strength, float(np.finfo(np.float32).tiny))
    while np.isfinite(strength):
        matrix[size, size] = diagonal + strength
        try:
            return np.asarray(np.linalg.cholesky(matrix), np.float64)
        except np.linalg.LinAlgError:
            strength *= 10
    return np.full_like(matrix, np.nan)


def forward(lower: FloatArray, right: FloatArray) -> FloatArray:
    """L^-1 B for L (k, k), B (k, n)."""
    size = len(lower)
    if size <= SMALL:
        return np.asarray(np.linalg.solve(lower, right), np.float64)
    half = size // 2
    first = forward(lower[:half, :half], right[:half])
    return np.concatenate([first, forward(lower[half:, half:], right[half:] - lower[half:, :half] @ first)])


def backward(lower: FloatArray, right: FloatArray) -> FloatArray:
    """L'^-1 B for L (k, k), B (k, n)."""
    size = len(lower)
    if size <= SMALL:
        return np.asarray(np.linalg.solve(lower.T, right), np.float64)
    half = size // 2
    last = backward(lower[half:, half:], right[half:])
    return np.concatenate([backward(lower[:half, :half], right[:half] - lower[half:, :half].T @ last), last])


def positive_solve(matrix: FloatArray, right: FloatArray, strength: float) -> FloatArray:
    """(matrix + strength I)^-1 B. The diagonal of ``matrix`` is changed."""
    lower = factor(matrix, strength)
    return backward(lower, forward(lower, right))


def positive_solves(matrices: FloatArray, right: FloatArray, strengths: FloatArray) -> FloatArray:
    """`positive_solve` of each system (g, k, k), (g, k, n), (g,); many small ones (grouped convolutions) at once."""
    size = np.arange(matrices.shape[1])
    if len(size) <= SMALL:
        diagonals = matrices[:, size, size]
        matrices[:, size, size] += np.maximum(strengths, float(np.finfo(np.float32).tiny))[:, None]
        try:
            lower = np.linalg.cholesky(matrices)
            return np.asarray(np.linalg.solve(lower.transpose(0, 2, 1), np.linalg.solve(lower, right)))
        except np.linalg.LinAlgError:  # some of them need more strength
            matrices[:, size, size] = diagonals
    return np.stack([positive_solve(*problem) for problem in zip(matrices, right, strengths.tolist(), strict=True)])


def positive_inverse(matrix: FloatArray, strength: float) -> FloatArray:
    """(matrix + strength I)^-1, symmetric. The diagonal of ``matrix`` is changed."""
    half = _lower_inverse(factor(matrix, strength))
    return np.asarray(half.T @ half)


def _lower_inverse(lower: FloatArray) -> FloatArray:
    """L^-1, itself lower triangular."""
    size = len(lower)
    if size <= SMALL:
        return np.asarray(np.tril(np.linalg.inv(lower)), np.float64)
    half = size // 2
    inverse = np.zeros_like(lower)
    inverse[:half, :half], inverse[half:, half:] = _lower_inverse(lower[:half, :half]), _lower_inverse(lower[half:, half:])
    inverse[half:, :half] = -inverse[half:, half:] @ (lower[half:, :half] @ inverse[:half, :half])
    return inverse
