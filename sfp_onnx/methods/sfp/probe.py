"""Single filter performance on plain arrays: probes, fields, clusters of labels. Knows nothing of models.

Source: Tzach et al., Phys. Rev. E 111, 065307 (2025), arXiv:2501.12880; the measure: Meir et al., Sci. Rep. 14, 5881 (2024).
Where this differs: the probe starts from zero weights, not random ones (the loss is convex; random weights along directions in which
the data hardly vary would stay in the fields as noise), and the fields are averaged over calibration data, not test data.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...core.errors import OutputError
from ...core.options import CHANNELS, Checked, option
from ...core.system import no_room
from ...core.types import Array, BoolArray, FloatArray, IntArray

THRESHOLD = 0.3
BATCH, EPOCHS, RATE, DECAY_PER_EPOCH, MOMENTUM, WEIGHT_DECAY = 100, 12, 0.01, 0.975, 0.975, 1e-3
HELD_OUT = 5  # one sample in so many measures the probes and does not train them
BLOCK_BYTES = 64 * 2**20
Clusters = tuple[tuple[int, ...], ...]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Samples:
    """Features and labels to train on or to measure with: ``rows`` of ``features`` (N, D; may be a memory map) and ``labels`` (N,)."""

    features: Array
    labels: IntArray
    rows: IntArray

    def blocks(self, size: int = 0) -> Iterator[tuple[Array, IntArray]]:
        """Features and labels, ``size`` samples at a time (default: what fits `BLOCK_BYTES`)."""
        size = size or max(1, BLOCK_BYTES // (4 * max(1, self.features.shape[1])))
        for start in range(0, len(self.rows), size):
            rows = self.rows[start : start + size]
            yield self.features[rows], self.labels[rows]


@dataclass(frozen=True)
class Store:
    """Features (rows, width) of ``samples`` of every tap, one after the other in an unnamed temporary file that the system removes when
    it is closed or the process ends. Written like a file, where a full disk is an error; a memory map would crash."""

    file: IO[bytes]
    samples: IntArray
    widths: tuple[int, ...]

    def _start(self, index: int) -> int:
        return 4 * len(self.samples) * sum(self.widths[:index])

    def put(self, index: int, first: int, features: Array) -> None:
        """Write features of tap ``index`` from row ``first`` on.

        Raises:
            OutputError: no room.
        """
        try:
            self.file.seek(self._start(index) + 4 * first * self.widths[index])
            left = memoryview(np.ascontiguousarray(features, np.float32).data).cast("B")
            while left:
                left = left[self.file.write(left) :]
        except OSError as error:
            need = f"{self._start(len(self.widths)) / 2**20:.0f} MiB of features ({error.strerror or error})"
            way = "Set TMPDIR, give fewer samples, or pool to fewer pixels (--score sfp,pool=2; dilute: --pool 2)"
            raise OutputError(f"{tempfile.gettempdir()}: no room for {need}. {way}.") from error

    def get(self, index: int) -> Array:
        """The features of tap ``index``, (rows, width), as a memory map."""
        return np.memmap(self.file, np.float32, "r", self._start(index), (len(self.samples), self.widths[index]))


@contextmanager
def room(samples: IntArray, widths: Sequence[int]) -> Iterator[Store]:
    """A store for features of these widths of some samples."""
    try:
        file = tempfile.TemporaryFile(prefix="sfp_onnx-", buffering=0)  # noqa: SIM115 - the errors of making it are told apart
    except OSError as error:
        raise no_room("features", error) from error
    with file:
        yield Store(file, samples, tuple(widths))


def held_out_rows(keys: IntArray, enough: int) -> tuple[IntArray, IntArray]:
    """Rows to train on and rows held out, in the order of their hashes; nothing is held out of fewer than ``enough``."""
    order = np.argsort(keys, kind="stable")
    out = keys[order] % HELD_OUT == 0
    if len(keys) < enough or not out.any() or out.all():
        return order, np.zeros(0, np.int64)
    return order[~out], order[out]


# ---- probes ----------------------------------------------------------------------------------------------------------


def softmax_sgd(data: Samples, classes: int, seed: int = 0) -> Floats:
    """Weights (D, L) of a linear layer without bias, trained by stochastic gradient descent on the cross-entropy.

    With p = softmax(x W) of a batch of B samples and y the one-hot labels, in every step:

        g = x^T (p - y) / B + 1e-3 W,   v <- 0.975 v + g,   W <- W - 0.01 x 0.975^epoch v

    Batches of 100, 12 epochs, order of the samples by ``seed``. The features are used as they are: where activations are orders of
    magnitude larger than 1 the steps are too long; `ridge` does not depend on the scale.
    """
    random = np.random.default_rng(seed)
    weights = np.zeros((data.features.shape[1], classes), np.float32)
    velocity = np.zeros_like(weights)
    for epoch in range(EPOCHS):
        rate = np.float32(RATE * DECAY_PER_EPOCH**epoch)
        shuffled = Samples(data.features, data.labels, random.permutation(data.rows))
        for x, y in shuffled.blocks(BATCH):
            logits = x @ weights
            powers = np.exp(logits - logits.max(1, keepdims=True))
            slope = powers / powers.sum(1, keepdims=True)
            slope[np.arange(len(y)), y] -= 1
            velocity = np.float32(MOMENTUM) * velocity + x.T @ (slope / np.float32(len(y))) + np.float32(WEIGHT_DECAY) * weights
            weights -= rate * velocity
    return weights


def ridge(data: Samples, classes: int, strength: float = 1.0) -> Floats:
    """Weights (D, L) in closed form: W = (X^T X + lambda I)^-1 X^T Y, lambda = ``strength`` x mean diagonal of X^T X.

    Y is one-hot minus 1/L, so that the fields of all labels add up to zero, as those of the softmax probe do. Sums in float64. With
    fewer samples than features the equal dual form W = X^T (X X^T + lambda I)^-1 Y takes the smaller matrix.
    """
    count, width = len(data.rows), data.features.shape[1]
    targets = np.eye(classes) - 1 / classes
    if count < width:
        x = data.features[data.rows].astype(np.float64)
        gram, moment = x @ x.T, targets[data.labels[data.rows]]
    else:
        gram, moment = np.zeros((width, width)), np.zeros((width, classes))
        for block, labels in data.blocks():
            x = block.astype(np.float64)
            gram += x.T @ x
            moment += x.T @ targets[labels]
    gram[np.diag_indices(len(gram))] += strength * (float(np.trace(gram) / width) or 1.0)  # features that are all zero get zero weights
    solved = np.linalg.solve(gram, moment)
    return np.asarray(x.T @ solved if count < width else solved, np.float32)


PROBES: dict[str, Callable[[Samples, int, int], Floats]] = {"sgd": softmax_sgd, "ridge": lambda data, classes, seed: ridge(data, classes)}


@dataclass(frozen=True)
class ProfileOptions(Checked):
    """How to profile: the probe ("sgd" or "ridge"), maps pooled to at most ``pool`` x ``pool``, ``loss``: whether to measure what
    the probe loses without each filter, ``seed`` of the order of training."""

    probe: str = option("sgd", "How class profiles are learned.", CHANNELS, choices=tuple(PROBES))
    pool: int = option(4, "Side to which class profiles pool maps.", CHANNELS, low=1)
    loss: bool = False
    seed: int = 0


def accuracy(data: Samples, weights: Floats) -> float:
    """Share of samples whose largest output is their label."""
    right = sum(int(((x @ weights).argmax(1) == y).sum()) for x, y in data.blocks())
    return right / max(1, len(data.rows))


def loss_ratios(data: Samples, weights: Floats, filters: IntArray) -> FloatArray:
    """exp(mean over samples of (cross-entropy without filter f - cross-entropy)), (F,): over 1 if the probe needs the filter."""
    columns_of = [np.flatnonzero(filters == index) for index in range(int(filters.max(initial=-1)) + 1)]
    total = np.zeros(len(columns_of))
    for x, y in data.blocks(max(1, min(BATCH, len(data.rows)))):
        logits = (x @ weights).astype(np.float64)
        base = _cross_entropy(logits, y)
        for index, columns in enumerate(columns_of):
            total[index] += float((_cross_entropy(logits - x[:, columns] @ weights[columns], y) - base).sum())
    return np.exp(total / max(1, len(data.rows)))


def _cross_entropy(logits: FloatArray, labels: IntArray) -> FloatArray:
    top = logits.max(1)
    return np.asarray(np.log(np.exp(logits - top[:, None]).sum(1)) + top - logits[np.arange(len(labels)), labels])


# ---- fields and clusters ---------------------------------------------------------------------------------------------


def by_filter(columns: Array, filters: IntArray) -> Floats:
    """(D, L) values per feature as (F, P, L) values per filter and position; filters with fewer positions are padded with zeros."""
    order = np.argsort(filters, kind="stable")
    counts = np.bincount(filters)
    position = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    values = np.zeros((len(counts), int(counts.max(initial=0)), columns.shape[1]), np.float32)
    values[filters[order], position] = columns[order]
    return values


def fields(means: Array, weights: Array) -> FloatArray:
    """M_f[l, k] = sum_pos W[f, pos, k] mean over samples x of label l of a_f,pos(x), in float64: (F, L, L) from means and weights (F, P, L)
    of all filters, or (L, L) from those of one."""
    return np.asarray(means.astype(np.float64).swapaxes(-1, -2) @ weights.astype(np.float64))


def thresholded(field: FloatArray, threshold: float = THRESHOLD) -> BoolArray:
    """M_f / max M_f >= threshold (without the division where the maximum is not positive)."""
    top = field.max()
    return np.asarray((field / top if top > 0 else field) >= threshold)


def clusters(binary: BoolArray) -> Clusters:
    """Labels with a one on the diagonal, grouped greedily in index order so that each group's sub-matrix is all ones.

    A label joins the first cluster with all of whose labels it has ones both ways, or opens a new one.
    """
    both = binary & binary.T
    left = np.flatnonzero(np.diagonal(binary))
    grouped = []
    while len(left):
        members, fitting = list[int](), left
        while len(fitting):
            members.append(int(fitting[0]))
            fitting = fitting[1:][both[fitting[0], fitting[1:]]]
        grouped.append(tuple(members))
        left = np.setdiff1d(left, members, assume_unique=True)
    return tuple(grouped)


class LabelSets(NamedTuple):
    """Clusters of each filter, their union (F, L), and the ones outside of them (F,)."""

    clusters: tuple[Clusters, ...]
    label_sets: BoolArray
    noise: IntArray


def label_sets(means: Array, weights: Array, threshold: float = THRESHOLD) -> LabelSets:
    """Clusters of all filters, from class means and probe weights (F, P, L); one matrix at a time."""
    every, sets, noise = [], np.zeros((means.shape[0], means.shape[2]), bool), np.zeros(means.shape[0], np.int64)
    for index in range(len(means)):
        binary = thresholded(fields(means[index], weights[index]), threshold)
        grouped = clusters(binary)
        every.append(grouped)
        sets[index, [label for cluster in grouped for label in cluster]] = True
        noise[index] = int(binary.sum()) - sum(len(cluster) ** 2 for cluster in grouped)
    return LabelSets(tuple(every), sets, noise)
