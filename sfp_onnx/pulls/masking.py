"""Masks as inputs of a graph: which unit is masked in which row, and what stands in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .. import graph
from ..records import Array, FloatArray, IntArray


@dataclass(frozen=True)
class Mask:
    """A mask input: index i of ``axis`` belongs to unit ``units[i]``. ``rank`` is that of the tensor; ``rows``: axis 0 is the batch.
    ``shift`` is the input that is added behind the mask, ``means`` what it holds where the mask is 0 (none: nothing is added)."""

    name: str
    units: IntArray
    axis: int
    rank: int
    dtype: np.dtype[Any]
    rows: bool
    shift: str = ""
    means: FloatArray | None = None

    def values(self, arms: Sequence[int], rows: int, total: int) -> Array:
        """0 where an arm is masked: ``rows`` rows for each arm, then ones up to ``total`` rows (one row if there are no rows)."""
        shape = spread(self.rank, self.axis, len(self.units))
        if not self.rows:
            single: Array = (self.units != arms[0]).astype(self.dtype)
            return single.reshape(shape)
        masks = np.ones((total, len(self.units)), self.dtype)
        for place, arm in enumerate(arms):
            masks[place * rows : (place + 1) * rows, self.units == arm] = 0
        return masks.reshape([total, *shape[1:]])

    def feeds(self, arms: Sequence[int], rows: int, total: int) -> dict[str, Array]:
        """The mask, and what is added behind it: (1 - m) mean."""
        found = {self.name: self.values(arms, rows, total)}
        if self.means is not None:
            means = self.means.reshape(spread(self.rank, self.axis, len(self.units)))
            found[self.shift] = ((1 - found[self.name]) * means).astype(self.dtype)
        return found


def put(editor: graph.Editor, tensor: str, dtype: np.dtype[Any], zero: Array | str | None, mask: Mask) -> Mask:
    """Insert a mask input behind a tensor (and one that is added behind that); returns the mask with their names and type."""
    made: list[tuple[str, np.dtype[Any]]] = []
    shift = ""
    if mask.means is not None:
        added = editor.variable(f"{tensor}/shift")
        graph.insert_shift(editor, tensor, added)
        shift = added.name

    def operand(wanted: Any) -> Any:
        variable = editor.variable(f"{tensor}/mask")
        made.append((variable.name, np.dtype(wanted)))
        return variable

    graph.insert_mask(editor, tensor, dtype, operand, zero)
    return replace(mask, name=made[0][0], dtype=made[0][1], shift=shift)


def spread(rank: int, axis: int, size: int) -> list[int]:
    """A shape that is 1 but along one axis."""
    shape = [1] * rank
    shape[axis] = size
    return shape


def shape_of(mask: Mask) -> list[int | str]:
    """The shape of a mask input; the batch is a name."""
    shape: list[int | str] = [*spread(mask.rank, mask.axis, len(mask.units))]
    if mask.rows:
        shape[0] = "batch"
    return shape
