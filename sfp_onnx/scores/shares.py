"""What the inputs of a layer are, summed over samples: over all of them, or over a share, which adds up with the other shares.

Products of rows are float32, a stretch of batches at a time, and sums over stretches float64. So that shares add up to what one pass gives,
stretches begin at the same batches wherever a share begins; rows of stretches that lie in two shares are kept until both are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..core.types import Array, BoolArray, FloatArray
from ..graph.arrays import Named
from ..repair import linear, ridge


@dataclass(frozen=True)
class Share:
    """Which batches a pass is given: ``lead`` of the first ones, which only set what all shares must have in common, then its own from
    ``first`` on, out of ``batches`` (0: it is given all)."""

    first: int = 0
    batches: int = 0
    lead: int = 0

    def place(self, batch: int) -> int:
        """The number among all batches of the one that is given ``batch``-th."""
        return batch if batch < self.lead else self.first + batch - self.lead


WHOLE = Share()


@dataclass
class Seen:
    """What a layer of g blocks read: its rows (k inputs), ``gathered``; rows before the first whole stretch (``head``) of so many batches
    (``length``), for which so many ``places`` were looked at; of its target, where that is not what it makes, sums and squares (g, o)
    (``total``, ``squares``); the ``scale`` (o,) of its output in the target, and the ``scatter`` of the rows."""

    gathered: linear.Gathered
    scale: Array
    length: int
    scatter: ridge.Scatter | None
    total: FloatArray = field(default_factory=lambda: np.zeros(1))
    squares: FloatArray = field(default_factory=lambda: np.zeros(1))
    head: list[Array] = field(default_factory=list)
    places: int = 0

    @classmethod
    def nothing(cls, rows: Array, scale: Array, shrinks: bool) -> Seen:
        """Before the first rows (g, n, k)."""
        blocks, count, inputs = rows.shape
        return cls(linear.Gathered(blocks, inputs, 0), scale, -(-inputs // max(count, 1)), ridge.Scatter() if shrinks else None)

    def centre(self, rows: Array, samples: int, last: bool, on: BoolArray | None = None) -> None:
        """Rows that tell where the scatter has its centre, and nothing else."""
        if self.scatter is not None:
            self.scatter.add(rows, samples, on)
            if last:
                self.scatter.settled()
                self.scatter = ridge.Scatter(centre=self.scatter.centre)

    def answered(self, answers: FloatArray, on: BoolArray | None = None) -> None:
        """What the target is at rows that were added, (g, n, o)."""
        answers = answers if on is None else answers[:, on.reshape(-1)]
        self.total = self.total + answers.sum(1)
        self.squares = self.squares + np.square(answers).sum(1)

    def add(self, rows: Array, samples: int, batch: int, on: BoolArray | None = None) -> None:
        """Rows (g, n, k) of a batch; ``on`` (samples, per sample): which of them count (None: all). Those that do not are no rows, but
        places in a stretch, so that stretches end with the same batches."""
        if self.scatter is not None:
            self.scatter.add(rows, samples, on)
        places = rows.shape[1]
        rows = rows if on is None else rows[:, on.reshape(-1)]
        started = self.gathered.normal is not None or bool(self.gathered.places)
        if not started and batch % self.length:
            self.head.append(rows)
            self.places += places
        else:
            self.gathered.add(rows, _errors(rows), places)

    # ---- as arrays, and back -------------------------------------------------------------------------------------------

    def arrays(self) -> Iterator[Named]:
        """All of it. Products are symmetric: one half is enough."""
        assert self.scatter is not None
        normal, waiting = self.gathered.normal, self.gathered.waiting
        for name, pieces in (("head", self.head), ("tail", waiting)):
            if pieces:
                yield Named(name, np.concatenate(pieces, 1))
        if normal is not None:
            lower = np.tril_indices(normal.shape[1])
            yield Named("gram", normal.gram[:, lower[0], lower[1]])
            yield Named("rows", normal.rows)
        count = 0.0 if normal is None else normal.count
        places = (self.places, self.gathered.places, self.scatter.places, self.scatter.rows)
        yield Named("counts", np.asarray([*self.gathered.shape[:2], self.length, count, self.scatter.count, *places]))
        yield Named("centre", self.scatter.settled())
        yield Named("scatter", self.scatter.squares)
        for name in ("total", "squares", "scale"):
            yield Named(name, getattr(self, name))


Read = Callable[[str], Array | None]
"""An array of a share by its name; None where it has none."""


def joined(shares: Sequence[Read]) -> Seen | None:
    """What all shares of a layer saw, added up in their order; None where it was not looked at."""
    whole: Seen | None = None
    for read in shares:
        counts = read("counts")
        if counts is None:
            return None
        blocks, inputs, length = map(int, counts[:3])
        if whole is None:
            scatter = ridge.Scatter(centre=_there(read, "centre"))
            whole = Seen(linear.Gathered(blocks, inputs, 0), _there(read, "scale"), length, scatter)
        assert whole.scatter is not None
        whole.scatter.count += int(counts[4])
        whole.scatter.places, whole.scatter.rows = whole.scatter.places + int(counts[7]), whole.scatter.rows + int(counts[8])
        for record, name, more in ((whole.scatter, "squares", "scatter"), (whole, "total", "total"), (whole, "squares", "squares")):
            setattr(record, name, getattr(record, name) + _there(read, more))
        if (rows := read("head")) is not None:
            whole.gathered.add(rows, _errors(rows), int(counts[5]))
        if (packed := read("gram")) is not None:
            _absorb(whole.gathered, packed, _there(read, "rows"), float(counts[3]))
        if (rows := read("tail")) is not None:
            whole.gathered.add(rows, _errors(rows), int(counts[6]))
    return whole


def _absorb(gathered: linear.Gathered, packed: Array, rows: Array, count: float) -> None:
    blocks, inputs, _ = gathered.shape
    gathered.normal = gathered.normal or linear.Normal.empty(blocks, inputs, 0)
    places = np.tril_indices(inputs)
    for gram, values in zip(gathered.normal.gram, packed, strict=True):
        gram[places] += values
        gram.T[places] = gram[places]
    gathered.normal.rows += rows
    gathered.normal.count += count


def _there(read: Read, name: str) -> Array:
    array = read(name)
    assert array is not None
    return array


def _errors(rows: Array) -> Array:
    return np.zeros((*rows.shape[:2], 0), np.float32)
