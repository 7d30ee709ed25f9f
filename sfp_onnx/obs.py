"""Backward elimination with the group optimal brain surgeon: which inputs can a least-squares fit do without?

For a layer with outputs X' a, inputs a of covariance C and H = C + ridge, removing the rows g of the weights X and re-solving the
others costs

    tr(X_g' (H^-1_gg)^-1 X_g),     X <- X - H^-1_.g (H^-1_gg)^-1 X_g,     H^-1 <- H^-1 - H^-1_.g (H^-1_gg)^-1 H^-1_g.

(Hassibi & Stork, NIPS 1992; for groups of rows: Frantar & Alistarh, NeurIPS 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .cholesky import factor, forward
from .records import FloatArray, IntArray

PASSES = 64  # at most so many updates of a group; wide groups lose several units in one
SHRINK = 0.5  # share of rows left at which the matrices are copied without those that are gone


@dataclass
class Reader:
    """One layer that reads a group: ``inverse`` H^-1 (k, k), weights ``x`` (k, o) and the position in the group of each row, ``unit`` (-1:
    none; -2: gone), all of which are changed, and what its error is divided by.

    What a removal subtracts from H^-1 is V V' with V = H^-1_.g L'^-1, where H^-1_gg = L L'. The V are collected, and H^-1 is only computed
    where it is needed: the columns of the rows that leave, and the blocks of single units.
    """

    inverse: FloatArray
    x: FloatArray
    unit: IntArray
    scale: float
    _subtracted: FloatArray = field(init=False)
    _width: int = field(init=False, default=0)
    _classes: list[tuple[IntArray, IntArray, FloatArray]] = field(init=False)

    def __post_init__(self) -> None:
        self._start()

    def _start(self) -> None:
        """Forget V, and look up the rows and blocks of units, by their number of rows: (units, rows (u, r), blocks (u, r, r))."""
        self._subtracted, self._width = np.zeros((len(self.unit), 0)), 0
        order = np.argsort(self.unit, kind="stable")
        units, first, counts = np.unique(self.unit[order], return_index=True, return_counts=True)
        self._classes = []
        for size in np.unique(counts[units >= 0]):
            same = np.flatnonzero((counts == size) & (units >= 0))
            rows = order[first[same, None] + np.arange(size)]
            self._classes.append((units[same], rows, self.inverse[rows[:, :, None], rows[:, None, :]]))

    def rows(self, units: IntArray) -> IntArray:
        """Rows of some units."""
        return np.flatnonzero(np.isin(self.unit, units))

    def costs(self, units: IntArray) -> FloatArray:
        """What removing each of these (sorted) units alone would add to the error."""
        found = np.zeros(len(units))
        for own, rows, blocks in self._classes:
            asked = np.isin(own, units)
            x = self.x[rows[asked]]
            found[np.searchsorted(units, own[asked])] = np.einsum("uro,uro->u", x, np.linalg.solve(blocks[asked], x))
        return found / self.scale

    def remove(self, units: IntArray) -> float:
        """Remove units together and re-solve the rest; returns the error that this adds."""
        rows = self.rows(units)
        if not len(rows):
            return 0.0
        seen = self._subtracted[:, : self._width]
        columns = self.inverse[:, rows] - seen @ seen[rows].T
        lower = factor(columns[rows], 0.0)
        taken, explained = forward(lower, columns.T).T, forward(lower, self.x[rows])
        self.x -= taken @ explained
        self.unit[rows] = -2
        kept = np.flatnonzero(self.unit != -2)
        self._collect(taken)
        if len(kept) <= SHRINK * len(self.unit):
            seen = self._subtracted[kept, : self._width]
            self.inverse, self.x, self.unit = self.inverse[np.ix_(kept, kept)], self.x[kept], self.unit[kept]
            self.inverse -= seen @ seen.T
            self._start()
        return float(np.square(explained).sum()) / self.scale

    def _collect(self, taken: FloatArray) -> None:
        """Remember what a removal subtracts."""
        width = self._width + taken.shape[1]
        if width > self._subtracted.shape[1]:
            wider = np.empty((len(self.unit), max(width, 2 * self._subtracted.shape[1])))
            wider[:, : self._width] = self._subtracted[:, : self._width]
            self._subtracted = wider
        self._subtracted[:, self._width : width] = taken
        self._width = width
        for _, rows, blocks in self._classes:
            own = taken[rows]
            blocks -= own @ own.transpose(0, 2, 1)


def eliminate(readers: Sequence[Reader], width: int) -> tuple[IntArray, FloatArray]:
    """Remove all units of a group, always the one that adds least to the summed error of its readers.

    Returns:
        The units (positions in the group) in the order in which they leave, and the error that each one adds (not falling).
    """
    left = np.arange(width)
    together = max(1, -(-width // PASSES))
    order: list[int] = []
    added: list[float] = []
    while len(left):
        costs = sum((own.costs(left) for own in readers), np.zeros(len(left)))
        leaving = left[np.argsort(costs, kind="stable")[:together]]
        cost = sum(own.remove(leaving) for own in readers)
        order += leaving.tolist()
        added += [cost / len(leaving)] * len(leaving)
        left = np.setdiff1d(left, leaving)
    return np.asarray(order, np.int64), np.maximum.accumulate(np.asarray(added))
