"""Backward elimination with the group optimal brain surgeon: which inputs can a least-squares fit do without?

For a layer with outputs X' a, inputs a of covariance C and H = C + ridge, removing the rows g of the weights X and re-solving the
others costs

    tr(X_g' (H^-1_gg)^-1 X_g),     X <- X - H^-1_.g (H^-1_gg)^-1 X_g,     H^-1 <- H^-1 - H^-1_.g (H^-1_gg)^-1 H^-1_g.

(Hassibi & Stork, NIPS 1992; for groups of rows: Frantar & Alistarh, NeurIPS 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .cholesky import positive_inverse
from .records import FloatArray, IntArray

PASSES = 64  # at most so many updates of a group; wide groups lose several units in one
SHRINK = 0.75  # rows that are left when the matrices are copied without those that are gone
STRIP = 512  # rows that are updated at a time, for the sake of memory


@dataclass
class Reader:
    """One layer that reads a group: ``inverse`` H^-1 (k, k) and weights ``x`` (k, o), which are changed in place, the position in the
    group of each row (-1: not of the group; -2: gone), and what its error is divided by."""

    inverse: FloatArray
    x: FloatArray
    unit: IntArray
    scale: float

    def rows(self, units: IntArray) -> IntArray:
        """Rows of some units."""
        return np.flatnonzero(np.isin(self.unit, units))

    def costs(self, units: IntArray) -> FloatArray:
        """What removing each of these units alone would add to the error."""
        order = np.argsort(self.unit, kind="stable")
        sorted_units = self.unit[order]
        first, last = np.searchsorted(sorted_units, units), np.searchsorted(sorted_units, units, side="right")
        found = np.zeros(len(units))
        for size in np.unique(last - first):
            same = np.flatnonzero(last - first == size)
            if size:
                rows = order[first[same, None] + np.arange(size)]
                blocks = self.inverse[rows[:, :, None], rows[:, None, :]]
                x = self.x[rows]
                found[same] = np.einsum("uro,uro->u", x, np.linalg.solve(blocks, x))
        return found / self.scale

    def remove(self, units: IntArray) -> float:
        """Remove units together and re-solve the rest; returns the error that this adds."""
        rows = self.rows(units)
        if not len(rows):
            return 0.0
        block, columns = self.inverse[np.ix_(rows, rows)], self.inverse[:, rows]
        joined = np.linalg.solve(block, np.concatenate([self.x[rows], columns.T], 1))
        width = self.x.shape[1]
        added = float((self.x[rows] * joined[:, :width]).sum())
        self.unit[rows] = -2
        kept = np.flatnonzero(self.unit != -2)
        if len(kept) <= SHRINK * len(self.unit):
            self.inverse, self.x, self.unit, columns = self.inverse[np.ix_(kept, kept)], self.x[kept], self.unit[kept], columns[kept]
            joined = joined[:, np.concatenate([np.arange(width), width + kept])]
        for start in range(0, len(self.unit), STRIP):
            strip = slice(start, start + STRIP)
            self.inverse[strip] -= columns[strip] @ joined[:, width:]
            self.x[strip] -= columns[strip] @ joined[:, :width]
        return added / self.scale


def reader(covariance: FloatArray, weights: FloatArray, unit: IntArray, scale: float, ridge: float) -> Reader:
    """A reader from the covariance (k, k) of its inputs and its weights (k, o)."""
    strength = ridge * float(np.diag(covariance).mean())
    return Reader(positive_inverse(covariance.copy(), strength), weights.astype(np.float64), unit.copy(), scale)


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
