"""How far a model's answers are from the right ones, or from those of the original: a registry of measures, and their running rows.

A measure turns a batch into rows of numbers, and rows into a figure of the original and one of the model. Rows are kept for each of a
few parts of the samples, so that they can be merged, and so that a figure without one part after the other tells how sure it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np

from ..core.errors import DataError
from ..core.types import Array, BoolArray, FloatArray, IntArray, Tokens
from . import boxes
from .meaning import IGNORED, Kind, Meaning, log_probabilities

PARTS = 20  # of the samples, left out in turn
MOST_CHANNELS = 1 << 14
AT_ONCE = 1 << 22  # values that are turned into float64
MOST_COMPARED = 256  # samples whose similarities are ranked
DEAD = 1e-8, 1e-6  # of the largest variance and of the own mean square: channels that vary less are taken to vary so much


@dataclass(frozen=True)
class Pair:
    """A batch of values of one meaning from the original (``old``) and a model (``new``), without padding, with its labels if they fit;
    ``first`` is the number of its first sample of ``count``. ``owners``: rows are tokens, each of which belongs to this one of the
    samples, and ``count`` is that of the rows."""

    meaning: Meaning
    old: Sequence[Array]
    new: Sequence[Array]
    labels: Array | None
    first: int
    count: int
    owners: IntArray | None = None

    def switched_on(self, tokens: Tokens, on: BoolArray) -> Pair:
        """With a row for every token that is ``on``, where there are values for each; the same where classes are along the tokens."""
        name, arrays = self.meaning.outputs[0], [*self.old, *self.new]
        shape = (self.count, on.shape[1]) if name in tokens.laid else (on.size,)
        along = name in tokens.laid and self.meaning.axis == 1
        if name not in tokens or along or len(arrays) > 2 or any(array.shape[: len(shape)] != shape for array in arrays):
            return self
        on = on & (np.arange(len(on)) < self.count)[:, None]  # behind the samples there is padding
        place, owners = (on[: self.count] if name in tokens.laid else on).reshape(shape), np.nonzero(on)[0]

        def rows(array: Array) -> Array:
            found = array[place]
            return found[:, None] if found.ndim == 1 or (name in tokens.laid and self.meaning.axis is not None) else found

        labels = self.labels
        if labels is not None and labels.shape[: len(shape)] == shape:
            labels = labels[place].reshape(len(owners), 1, *labels.shape[len(shape) :])
        return replace(self, old=[rows(self.old[0])], new=[rows(self.new[0])], labels=labels, count=len(owners), owners=owners)

    @property
    def samples(self) -> int:
        """How many samples it holds."""
        return self.count if self.owners is None else len(np.unique(self.owners))

    def numbers(self, rows: int) -> IntArray:
        """The number of the sample of each of so many rows."""
        return self.first + (np.arange(rows) if self.owners is None or rows != self.count else self.owners)

    @property
    def alike(self) -> bool:
        """Whether both gave the same number of values."""
        return all(one.shape == other.shape for one, other in zip(self.old, self.new, strict=True))

    @property
    def each(self) -> bool:
        """Whether there is a row for every sample."""
        return all(array.ndim and len(array) == self.count for array in (*self.old, *self.new))

    @property
    def floating(self) -> bool:
        """Whether the values are floating numbers, as many from both."""
        return self.alike and self.old[0].dtype.kind == self.new[0].dtype.kind == "f"

    def rows(self, *columns: Any) -> FloatArray:
        """Columns of one value per sample, or of one for the whole batch, behind the number of the sample."""
        table = np.stack([np.asarray(column, np.float64).reshape(-1) for column in columns], 1)
        return np.concatenate([self.numbers(len(table))[:, None], table], 1)

    def answers(self) -> tuple[Array, Array]:
        """Class numbers of the original and of the model, (samples, places)."""
        old, new = (self.meaning.answers(part[0]) for part in (self.old, self.new))
        return old.reshape(len(old), -1), new.reshape(len(new), -1)


Rows = Callable[[Pair], "FloatArray | None"]
Value = Callable[[FloatArray], "tuple[float, float]"]


@dataclass(frozen=True)
class Measure:
    """A measure of outputs of some ``kinds``: ``rows`` of a batch (None: it cannot be taken), their first column the number of the
    sample, and the ``value`` of such rows without that column. ``larger`` is better; ``labelled``: it needs labels; ``summed``: rows may
    be added; ``share``: a row is (right before, right after) of one sample; ``limit``: rows beyond are not kept."""

    name: str
    does: str
    kinds: frozenset[Kind]
    rows: Rows
    value: Value
    larger: bool = True
    labelled: bool = False
    summed: bool = False
    share: bool = False
    limit: int | None = None

    def loss(self, rows: FloatArray) -> FloatArray:
        """How bad original and model are: smaller is better."""
        values = np.asarray(self.value(rows))
        return 1 - values if self.larger else values

    def told(self, value: float) -> str:
        """A value for people."""
        return f"{value:.4f}"


MEASURES: dict[str, Measure] = {}


def measure(name: str, *kinds: Kind, value: Value, does: str, **facts: Any) -> Callable[[Rows], Rows]:
    """Register a measure of outputs of some kinds by what makes its rows; see `Measure`."""

    def register(rows: Rows) -> Rows:
        if name in MEASURES:
            raise ValueError(f"measure {name} is there already")
        MEASURES[name] = Measure(name, does, frozenset(kinds), rows, value, **facts)
        return rows

    return register


def _means(rows: FloatArray) -> tuple[float, float]:
    return float(rows[:, 0].mean()), float(rows[:, 1].mean())


def _ratio(rows: FloatArray) -> tuple[float, float]:
    """(whole, what the original has of it, what the model has of it), summed."""
    whole, old, new = rows.sum(0)[:3]
    return float(old / whole) if whole else 1.0, float(new / whole) if whole else 1.0


# ---- class scores and class maps -------------------------------------------------------------------------------------


@measure("top-1", Kind.CLASSES, value=_means, labelled=True, share=True, does="share of samples whose best class is their label")
def _top1(pair: Pair) -> FloatArray | None:
    old, new = pair.answers()
    labels = np.asarray(pair.labels).reshape(-1, 1)
    return pair.rows(old == labels, new == labels, labels, old)


def chance(labels: Array, answers: Array) -> tuple[float, float]:
    """How often answers as frequent as these, drawn without looking, are right, sum over classes of p(answer) p(label); and what a model
    that is better than that exceeds by: two standard errors."""
    held = [np.asarray(part).astype(np.int64) for part in (labels, answers)]
    size = int(max(part.max(initial=0) for part in held)) + 1
    shares = [np.bincount(part, minlength=size) / len(part) for part in held]
    blind = float((shares[0] * shares[1]).sum())
    return blind, blind + 2 * sqrt(max(blind * (1 - blind), 1e-6) / len(held[0]))


@measure("top-5", Kind.CLASSES, value=_means, labelled=True, share=True, does="share of samples whose label is among the five best")
def _top5(pair: Pair) -> FloatArray | None:
    if pair.meaning.classes <= 5:
        return None
    labels = np.asarray(pair.labels).reshape(-1, 1)
    scores = [pair.meaning.scores(part[0]) for part in (pair.old, pair.new)]
    return pair.rows(*((np.argpartition(-part, 4, 1)[:, :5] == labels).any(1) for part in scores))


@measure("agreement", Kind.CLASSES, value=_means, share=True, does="share of samples with the same best class as from the original")
def _agreement(pair: Pair) -> FloatArray | None:
    old, new = pair.answers()
    return pair.rows(np.ones(len(old)), (old == new).all(1), old[:, 0])


@measure("KL divergence", Kind.CLASSES, value=_means, larger=False, does="of the class shares from those of the original, in nats")
def _kl(pair: Pair) -> FloatArray | None:
    if pair.meaning.axis is None:
        return None
    p, q = (log_probabilities(pair.meaning.scores(part[0])) for part in (pair.old, pair.new))
    return pair.rows(np.zeros(len(p)), (np.exp(p) * (p - q)).sum(1))


@measure("pixel agreement", Kind.MAP, value=_ratio, summed=True, does="share of places with the same class as from the original")
def _pixels(pair: Pair) -> FloatArray | None:
    if not pair.alike:
        return None
    old, new = pair.answers()
    whole = np.full(len(old), old.shape[1])
    return pair.rows(whole, whole, (old == new).sum(1))


def _truth(pair: Pair) -> tuple[Array, Array, Array, BoolArray]:
    """Labels of a map, class numbers of both models, (samples, places) each, and which labels count: others (255, below 0) mark nothing."""
    old, new = pair.answers()
    labels = old if pair.labels is None else pair.labels.reshape(len(old), -1)
    known = pair.meaning.classes or (2 if pair.meaning.threshold is not None else 255)
    return labels, old, new, (labels >= 0) & (labels < known)


@measure("pixel accuracy", Kind.MAP, value=_ratio, labelled=True, summed=True, does="share of places whose best class is their label")
def _right_pixels(pair: Pair) -> FloatArray | None:
    labels, old, new, known = _truth(pair)
    return pair.rows(known.sum(1), ((old == labels) & known).sum(1), ((new == labels) & known).sum(1))


def _mean_iou(rows: FloatArray) -> tuple[float, float]:
    """Rows of (class, what both have of it and what either has of it for the original, the same for the model)."""
    _, places = np.unique(rows[:, 0], return_inverse=True)
    sums = [np.bincount(places.reshape(-1), rows[:, column]) for column in range(1, 5)]
    shares = [sums[place][sums[place + 1] > 0] / sums[place + 1][sums[place + 1] > 0] for place in (0, 2)]
    old, new = (float(own.mean()) if len(own) else 1.0 for own in shares)  # nothing is marked, and nothing should be
    return old, new


def _iou(pair: Pair) -> FloatArray | None:
    """For every sample and each class in it: how much of it both and either of labels and answers have (without labels, of the
    original's answers)."""
    if not pair.alike:
        return None
    labels, *both, known = _truth(pair)
    parts, numbers = [], pair.numbers(len(labels))
    for row in range(len(labels)):
        truth = labels[row][known[row]].astype(np.int64)
        answers = [part[row][known[row]].astype(np.int64) for part in both]
        size = int(max(truth.max(initial=0), *(part.max(initial=0) for part in answers))) + 1
        counts, figures = [np.bincount(part, minlength=size) for part in (truth, *answers)], []
        for answer, own in zip(answers, counts[1:], strict=True):
            common = np.bincount(truth[answer == truth], minlength=size)
            figures += [common, counts[0] + own - common]
        present = np.flatnonzero(sum(counts))
        parts.append(np.stack([np.full(len(present), numbers[row]), present, *(figure[present] for figure in figures)], 1))
    return np.concatenate(parts).astype(np.float64)


measure("mean IoU", Kind.MAP, value=_mean_iou, labelled=True, does="intersection over union with the labels, mean over the classes")(_iou)
measure("mean IoU to the original", Kind.MAP, value=_mean_iou, does="the same with the original's class map for labels")(
    lambda pair: _iou(replace(pair, labels=None))
)


# ---- multi-label scores -----------------------------------------------------------------------------------------------


def _decided(pair: Pair) -> tuple[BoolArray, BoolArray, BoolArray, BoolArray]:
    """What holds by the labels (without labels, by the original), by the original and by the model, and which labels count (not 255, not
    below 0): (samples, classes, places) each."""
    labels = pair.meaning.answers(pair.old[0]) if pair.labels is None else pair.labels.reshape(pair.old[0].shape)
    every = (labels > 0.5, *(pair.meaning.answers(part[0]) for part in (pair.old, pair.new)), (labels >= 0) & (labels != IGNORED))
    moved = (np.moveaxis(part, pair.meaning.axis or 1, 1) for part in every)
    truth, old, new, known = (part.reshape(*part.shape[:2], -1) for part in moved)
    return truth, old, new, known


def _shared(pair: Pair) -> FloatArray | None:
    """For every sample and each class that holds in it: how much of it both and either of labels and decisions have."""
    if not pair.alike:
        return None
    truth, old, new, known = _decided(pair)
    figures = [sums for own in (old, new) for sums in ((truth & own & known).sum(2), ((truth | own) & known).sum(2))]
    row, label = np.nonzero(figures[1] + figures[3])
    row, label = (row, label) if len(row) else (np.zeros(1, np.int64),) * 2
    return np.stack([pair.numbers(len(truth))[row], label, *(figure[row, label] for figure in figures)], 1).astype(np.float64)


@measure("equal decisions", Kind.MARKS, value=_ratio, summed=True,
         does="share of classes (at every place) that hold for the model as for the original")  # fmt: skip
def _equal_decisions(pair: Pair) -> FloatArray | None:
    if not pair.alike:
        return None
    _, old, new, _ = _decided(pair)
    whole = np.full(len(old), old[0].size)
    return pair.rows(whole, whole, (old == new).sum((1, 2)))


@measure("right decisions", Kind.MARKS, value=_ratio, labelled=True, summed=True,
         does="share of classes (at every place) that hold as the labels say")  # fmt: skip
def _right_decisions(pair: Pair) -> FloatArray | None:
    if not pair.alike:
        return None
    truth, old, new, known = _decided(pair)
    return pair.rows(known.sum((1, 2)), *(((own == truth) & known).sum((1, 2)) for own in (old, new)))


measure("class IoU", Kind.MARKS, value=_mean_iou, labelled=True,
        does="intersection over union of where a class holds with the labels, mean over the classes")(_shared)  # fmt: skip
measure("class IoU to the original", Kind.MARKS, value=_mean_iou, does="the same with the original's decisions for labels")(
    lambda pair: _shared(replace(pair, labels=None))
)


# ---- embeddings ------------------------------------------------------------------------------------------------------


def _unit(array: Array) -> FloatArray:
    rows = array.astype(np.float64)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12))


@measure("cosine", Kind.EMBEDDING, value=_means, does="cosine of the angle to the original's embedding, mean over the samples")
def _cosine(pair: Pair) -> FloatArray | None:
    if not pair.alike or not pair.each:
        return None
    old, new = (_unit(part[0]) for part in (pair.old, pair.new))
    cosines = (old * new).sum(-1).reshape(len(old), -1).mean(1)
    return pair.rows(np.ones(len(cosines)), cosines)


def _rank_correlation(rows: FloatArray) -> tuple[float, float]:
    """Spearman's correlation between a sample's similarities to all others before and after, mean over the samples."""
    width = rows.shape[1] // 2
    if len(rows) < 3:
        return float("nan"), float("nan")
    similar = [(unit := _unit(part)) @ unit.T for part in (rows[:, :width], rows[:, width:])]
    others = ~np.eye(len(rows), dtype=bool)
    ranks = [np.argsort(np.argsort(part[others].reshape(len(rows), -1), 1, kind="stable"), 1, kind="stable") for part in similar]
    centred = [part - part.mean(1, keepdims=True) for part in ranks]
    return 1.0, float(((centred[0] * centred[1]).sum(1) / np.maximum((centred[0] ** 2).sum(1), 1e-12)).mean())


@measure("rank correlation", Kind.EMBEDDING, value=_rank_correlation, limit=MOST_COMPARED,
         does="Spearman's, of a sample's cosine similarities to the others with those from the original")  # fmt: skip
def _similarities(pair: Pair) -> FloatArray | None:
    if not pair.alike or not pair.each:
        return None
    width = pair.old[0].shape[-1]  # of several rows per sample their mean
    flat = [part[0].reshape(len(part[0]), -1, width).astype(np.float64).mean(1) for part in (pair.old, pair.new)]
    numbers = pair.numbers(len(flat[0]))
    if pair.owners is not None:
        places = np.flatnonzero(np.diff(numbers, prepend=-1))  # tokens of a sample stand together
        flat = [np.add.reduceat(part, places) / np.diff([*places, len(part)])[:, None] for part in flat]
        numbers = numbers[places]
    return np.concatenate([numbers[:, None], *flat], 1)


# ---- numbers ---------------------------------------------------------------------------------------------------------


def _channelled(array: Array, axis: int | None) -> FloatArray:
    """Values as (rows, positions, channels) in float64: channels are this ``axis``, else the shorter of the second and the last one."""
    array = array.astype(np.float64)
    if array.ndim < 2:
        return array.reshape(-1, 1, 1)
    if axis is None:
        axis = 1 if array.ndim == 2 or array.shape[1] <= array.shape[-1] else array.ndim - 1
    channels = array.shape[axis]
    flat = np.moveaxis(array, axis, -1).reshape(len(array), -1, channels)
    return flat if channels <= MOST_CHANNELS else flat.reshape(len(array), -1, 1)


def _moments(pair: Pair, truth: Array) -> FloatArray:
    """Per sample, or for the whole batch: squared errors of both, sum of squares and sum of the truth, and count, for each channel."""
    tables = []
    arrays = [np.atleast_1d(array) for array in (pair.old[0], pair.new[0], truth)]
    axis = pair.meaning.channels if arrays[0].ndim == len(pair.meaning.shape) else None
    step = max(1, AT_ONCE // max(1, arrays[0][:1].size))
    for start in range(0, len(arrays[0]), step):
        old, new, right = (_channelled(array[start : start + step], axis) for array in arrays)
        known = np.isfinite(right)  # of an infinite truth there is no distance
        if not known.all():
            old, new, right = (np.where(known, part, 0.0) for part in (old, new, right))
        sums = [((old - right) ** 2).sum(1), ((new - right) ** 2).sum(1), (right**2).sum(1), right.sum(1)]
        tables.append(np.concatenate([*sums, known.sum(1)], 1))
    table = np.concatenate(tables)
    return np.concatenate([pair.numbers(len(table))[:, None], table], 1)


def channel_errors(rows: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Root mean square error of every channel by the spread of its truth, of the original and of the model; channels that hardly vary
    are held against a small part of what the others do, or of their own size."""
    old, new, squares, total, count = rows.sum(0).reshape(5, -1)
    count = np.maximum(count, 1)
    spread = np.maximum(squares - total**2 / count, 0) / count
    spread = np.maximum(spread, np.maximum(DEAD[0] * spread.max(initial=0), DEAD[1] * squares / count))
    spread = np.where(spread > 0, spread, 1.0)
    return np.sqrt(old / count / spread), np.sqrt(new / count / spread)


def _relative(rows: FloatArray) -> tuple[float, float]:
    old, new = channel_errors(rows)
    return float(np.sqrt((old**2).mean())), float(np.sqrt((new**2).mean()))


@measure("centred error", Kind.CLASSES, Kind.MAP, Kind.MARKS, Kind.EMBEDDING, Kind.NUMBERS, Kind.UNKNOWN, value=_relative,
         larger=False, summed=True,
         does="root mean square difference to the original, by the spread of each channel over the samples")  # fmt: skip
def _error(pair: Pair) -> FloatArray | None:
    if not pair.floating or not pair.old[0].size:
        return None
    return _moments(pair, pair.old[0])


@measure("error to labels", Kind.NUMBERS, value=_relative, larger=False, labelled=True, summed=True,
         does="root mean square difference to the labels, by the spread of each channel of them")  # fmt: skip
def _label_error(pair: Pair) -> FloatArray | None:
    if not pair.floating:
        return None
    return _moments(pair, np.asarray(pair.labels).reshape(pair.old[0].shape))


# ---- boxes -----------------------------------------------------------------------------------------------------------


@measure("matched boxes", Kind.BOXES, value=_ratio, summed=True,
         does="share of boxes of both models that have a partner: the same class, intersection over union of at least 0.5")  # fmt: skip
def _matched_boxes(pair: Pair) -> FloatArray | None:
    both = boxes.read_pair(pair.old, pair.new, boxes.SHOWN)
    whole = np.array([len(old.scores) + len(new.scores) for old, new in both])
    return pair.rows(whole, whole, [2 * boxes.matched(new, old).sum() for old, new in both])


OF_LABELS = 2.0


@measure("mAP", Kind.BOXES, value=lambda rows: _mean_precision(rows), labelled=True,
         does="average precision at an intersection over union of 0.5 with the labels, mean over the classes")  # fmt: skip
def _precisions(pair: Pair) -> FloatArray | None:
    """Rows of (of the original 0, of the model 1, of the labels 2; class; score; whether it is right)."""
    parts, both = [], boxes.read_pair(pair.old, pair.new, boxes.FAINT)
    if len(both) != len(np.asarray(pair.labels)):  # boxes of a batch that are listed together belong to no sample
        return None
    for row, found in enumerate(both):
        truth = boxes.labelled(np.asarray(pair.labels)[row])
        for whose, own in zip((0.0, 1.0, OF_LABELS), (*found, truth), strict=True):
            hits = boxes.matched(own, truth)
            parts.append(np.stack([np.full(len(hits), pair.first + row), np.full(len(hits), whose), own.classes, own.scores, hits], 1))
    return np.concatenate(parts)


def _mean_precision(rows: FloatArray) -> tuple[float, float]:
    truth = rows[rows[:, 0] == OF_LABELS]
    values = []
    for whose in (0.0, 1.0):
        own = rows[rows[:, 0] == whose]
        classes = [(own[own[:, 1] == label], int((truth[:, 1] == label).sum())) for label in np.unique(truth[:, 1])]
        values.append(float(np.mean([boxes.average_precision(part[:, 2], part[:, 3], count) for part, count in classes] or [1.0])))
    return values[0], values[1]


# ---- what has no scale -----------------------------------------------------------------------------------------------


@measure("equal integers", Kind.INTEGERS, value=_ratio, summed=True, does="share of integers that are those of the original")
def _equal(pair: Pair) -> FloatArray | None:
    old, new = pair.old[0], pair.new[0]
    if not pair.alike:  # how many there are may differ: what has no partner is not equal
        size = max(old.size, new.size)
        common = min(len(old.reshape(-1)), len(new.reshape(-1)))
        return pair.rows(size, size, (old.reshape(-1)[:common] == new.reshape(-1)[:common]).sum())
    same = (old == new).reshape(len(old) if pair.each else 1, -1)
    whole = np.full(len(same), same.shape[1])
    return pair.rows(whole, whole, same.sum(1))


@measure("equal values", Kind.OTHER, value=_means, share=True, does="share of samples with the same text, sequence or map")
def _same(pair: Pair) -> FloatArray | None:
    old, new = (np.atleast_1d(part[0]) for part in (pair.old, pair.new))
    if not pair.alike:
        return pair.rows(1, 0)
    same = [bool(np.all(np.asarray(one) == np.asarray(other))) for one, other in zip(old, new, strict=True)]
    return pair.rows(np.ones(len(same)), same) if pair.each else pair.rows(1, all(same))


# ---- running rows ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drop:
    """A figure before and after, how much worse it became, and how much at most with a confidence, on so many ``samples``."""

    before: float
    after: float
    drop: float
    bound: float
    samples: int = 0


@dataclass
class Tally:
    """Running rows of one measure, for each of `PARTS` parts of the samples (those whose numbers leave the same remainder)."""

    measure: Measure
    parts: list[FloatArray] = field(default_factory=list)
    samples: int = 0
    skipped: int = 0  # samples of which the models gave other numbers of values

    def update(self, pair: Pair) -> None:
        """Add a batch."""
        rows = self.measure.rows(pair)
        if rows is not None and self.parts and self.parts[0].shape[1] != rows.shape[1] - 1:
            far = f"output {pair.meaning.name} has an axis of channels that is longer in some samples than in others"
            raise DataError(f"{self.measure.name}: {far}. Give samples of one shape, --metric, or declare its shape in the model")
        self.samples += pair.samples
        if rows is None:
            self.skipped += 0 if pair.alike else pair.samples
        elif self.measure.limit is None or pair.first < self.measure.limit:
            self._add(rows)

    def _add(self, rows: FloatArray) -> None:
        self.parts = self.parts or [np.zeros((0, rows.shape[1] - 1))] * PARTS
        part = rows[:, 0].astype(np.int64) % PARTS
        for number in np.unique(part):
            joined = np.concatenate([self.parts[number], rows[part == number, 1:]])
            self.parts[number] = joined.sum(0, keepdims=True) if self.measure.summed else joined

    def merge(self, other: Tally) -> None:
        """Add what another one saw."""
        self.samples, self.skipped = self.samples + other.samples, self.skipped + other.skipped
        for number, rows in enumerate(other.parts):
            self._add(np.concatenate([np.full((len(rows), 1), number), rows], 1))

    @property
    def rows(self) -> FloatArray:
        """All rows."""
        return np.concatenate(self.parts)

    @property
    def value(self) -> tuple[float, float] | None:
        """Of the original and of the model; None where it could not be taken."""
        if not self.parts or not len(self.rows):
            return None
        values = self.measure.value(self.rows)
        return None if np.isnan(values).all() else values

    def drop(self, confidence: float) -> Drop:
        """How much worse the model is than the original."""
        rows, sign = self.rows, 1 if self.measure.larger else -1
        before, after = self.measure.value(rows)
        if self.measure.share:
            drop, bound = matched(rows[:, 0] > 0, rows[:, 1] > 0, confidence)
        else:
            drop = sign * (before - after)
            parts = self._filled()
            error = spread([self._without(part) for part in parts], lambda own: _difference(self.measure, own))
            bound = drop + max(0.0, quantile(confidence, len(parts))) * error
        return Drop(before, after, drop, bound, self.samples)

    def _filled(self) -> list[int]:
        return [number for number, rows in enumerate(self.parts) if len(rows)]

    def _without(self, part: int) -> FloatArray:
        """All rows but those of a part."""
        return np.concatenate([rows for number, rows in enumerate(self.parts) if number != part])


def _difference(measure: Measure, rows: FloatArray) -> float:
    old, new = measure.loss(rows)
    return float(new - old)


def spread(samples: Sequence[Any], value: Callable[[Any], float]) -> float:
    """Standard error of a figure from its values without one part of the samples after the other.

        variance = (k - 1) / k sum over parts i of (value without i - their mean)^2
    """
    without = np.asarray([value(own) for own in samples]) if len(samples) > 1 else np.zeros(1)
    return sqrt((len(without) - 1) / len(without) * float(((without - without.mean()) ** 2).sum()))


def quantile(confidence: float, parts: int) -> float:
    """Of Student's distribution for an error that was estimated from so many parts: z + (z^3 + z) / (4 (parts - 1)), the first term of its
    expansion (Abramowitz, Stegun: Handbook of Mathematical Functions, 26.7.5)."""
    z = NormalDist().inv_cdf(confidence)
    return z + (z**3 + z) / (4 * max(parts - 1, 1))


def worsened(first: Tally, second: Tally, confidence: float = 0.95) -> float:
    """By how much a second model is at least farther from the original than a first, by one measure on the same samples, with a confidence
    (above 0: it is clearly farther)."""
    pairs = [(first._without(part), second._without(part)) for part in first._filled()]

    def farther(rows: tuple[FloatArray, FloatArray]) -> float:
        return float(second.measure.loss(rows[1])[1] - first.measure.loss(rows[0])[1])

    return farther((first.rows, second.rows)) - quantile(confidence, len(pairs)) * spread(pairs, farther)


def matched(before: BoolArray, after: BoolArray, confidence: float) -> tuple[float, float]:
    """The drop of a share of right answers to the same samples, and what it is at most with a confidence.

    With b samples that were right before only, c after only, and z the normal quantile of the confidence,

        bound = (b - c) / (n + 2) + z sqrt(b + c + 1 - (b - c)^2 / (n + 2)) / (n + 2)

    Agresti, Min: Simple improved confidence intervals for comparing matched proportions, Statistics in Medicine 24, 2005. It is above zero
    even if no answer changed: few samples prove little.
    """
    return bounded(len(before), int((before & ~after).sum()), int((~before & after).sum()), confidence)


def bounded(count: float, lost: float, won: float, confidence: float) -> tuple[float, float]:
    """As `matched`, from how many samples there are, and how many were right before only and after only."""
    drop, size = lost - won, count + 2
    error = sqrt(lost + won + 1 - drop**2 / size) / size
    return drop / count, max(drop / size + NormalDist().inv_cdf(confidence) * error, drop / count)


def needed(limit: float, confidence: float) -> int:
    """The fewest samples on which `matched` can show that a drop is at most ``limit``: none changes its answer."""
    return max(1, ceil(NormalDist().inv_cdf(confidence) / limit - 2)) if limit > 0 else 0
