"""What is put around an operator that needs all channels of an axis: in front the removed ones again, as zeros; behind what stays.

Exact, since a removed channel counts as zeros; and slower, as the operator works on all channels and both ways are copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd

import numpy as np

from ..core.types import After, Array, BoolArray, Edit, InsertAfter, InsertBefore, IntArray, SetInput

FIRST_PAD = 11  # opset from which Pad and Slice take what they do as inputs


@dataclass(frozen=True)
class Step:
    """An operator with its further inputs and its attributes."""

    op: str
    constants: tuple[Array, ...]
    attributes: Mapping[str, int]


@dataclass(frozen=True)
class Tiling:
    """How channels lie along an axis: ``times`` one behind the other, all ``channels`` in their order, at ``each`` places side by side."""

    times: int
    channels: int
    each: int

    @classmethod
    def of(cls, labels: IntArray) -> Tiling:
        """That of the labels of an axis.

        >>> Tiling.of(np.asarray([1, 1, 2, 2, 1, 1, 2, 2]))
        Tiling(times=2, channels=2, each=2)
        """
        size = len(labels)
        each = gcd(size, *(np.flatnonzero(np.diff(labels)) + 1).tolist())
        runs = labels[::each]
        periods = (n for n in range(1, len(runs) + 1) if len(runs) % n == 0 and (runs.reshape(-1, n) == runs[:n]).all())
        period = next(periods)
        return cls(len(runs) // period, period, each)

    @property
    def plain(self) -> bool:
        """Whether every channel has one place."""
        return self.times == self.each == 1


@dataclass(frozen=True)
class Site:
    """An axis that an operator needs whole. ``open``: its size changes with the inputs; ``ordered``: the operator reads more than the set
    of what lies along it."""

    axis: int
    tiling: Tiling
    open: bool
    ordered: bool

    @property
    def split(self) -> bool:
        """Whether the axis is written as several while channels come and go."""
        return not self.tiling.plain and (self.open or self.ordered)

    def steps(self, mask: BoolArray, shape: Sequence[int], back: bool) -> list[Step]:
        """What turns the places in ``mask`` into all of them (``back``: the other way), in a tensor of a ``shape`` beside this axis."""
        before = self.tiling.times > 1 and self.split
        kept = mask.reshape(self.tiling.times, self.tiling.channels, self.tiling.each)[0, :, 0] if self.split else mask
        rank = len(shape) + (self.split and self.tiling.times > 1) + (self.split and self.tiling.each > 1)
        inner = (_left_out if back else _put_back)(kept, self.axis + before, rank, self.ordered)
        if not self.split:
            return inner
        old, new = (len(kept), int(kept.sum())) if back else (int(kept.sum()), len(kept))
        parts = [size for size in (self.tiling.times, 0, self.tiling.each) if size != 1]
        cut = [old if size == 0 else -1 if self.open else size for size in parts]
        whole = -1 if self.open else new * self.tiling.times * self.tiling.each
        return [self._reshape(shape, cut), *inner, self._reshape(shape, [whole])]

    def _reshape(self, shape: Sequence[int], sizes: Sequence[int]) -> Step:
        return Step("Reshape", (np.asarray([*[0] * self.axis, *sizes, *shape[self.axis + 1 :]], np.int64),), {})


def _put_back(kept: BoolArray, axis: int, rank: int, ordered: bool) -> list[Step]:
    gone, pads = int((~kept).sum()), np.zeros(2 * rank, np.int64)
    pads[rank + axis] = 1 if ordered else gone
    places = np.where(kept, np.cumsum(kept) - 1, len(kept) - gone)
    return [Step("Pad", (pads,), {}), *([Step("Gather", (places,), {"axis": axis})] if ordered else [])]


def _left_out(kept: BoolArray, axis: int, rank: int, ordered: bool) -> list[Step]:
    if ordered:
        return [Step("Gather", (np.flatnonzero(kept),), {"axis": axis})]
    return [Step("Slice", tuple(np.asarray([value], np.int64) for value in (0, int(kept.sum()), axis)), {})]


@dataclass(frozen=True)
class Expansion:
    """The axes that an operator needs whole, of all the inputs at ``positions``; ``passes``: the outputs that have the channels that stay.
    ``vectors`` are values of inputs that go along with what lies along the axes. Inputs of fewer axes are aligned at the last one."""

    positions: Sequence[int]
    sites: Sequence[Site]
    passes: Sequence[int]
    vectors: Mapping[int, Array]
    rank: int

    def edits(self, after: After) -> list[Edit]:
        """What is put around the node."""
        masks = {site: mask for site in self.sites if not (mask := self._kept(after, site)).all()}
        made: list[Edit] = []
        for at, value in self.vectors.items() if masks else ():
            for site, mask in masks.items():
                axis = value.ndim + site.axis - self.rank
                if axis >= 0 and value.shape[axis] > 1:
                    value = value.take(np.argsort(~mask, kind="stable"), axis)
            made.append(SetInput(at, value))
        for at in self.positions:
            shape = list(after.input_shape(at))
            for site, mask in masks.items():
                here = replace(site, axis=len(shape) + site.axis - self.rank)
                if shape[here.axis] == len(mask):  # it has none of the channels that leave, and stays whole
                    order = np.argsort(~mask, kind="stable")
                    made += [] if site.ordered else [InsertBefore(at, "Gather", (order,), {"axis": here.axis})]
                    continue
                made += [InsertBefore(at, step.op, step.constants, step.attributes) for step in here.steps(mask, shape, False)]
                shape[here.axis] = len(mask)
        for output in self.passes:
            made += [InsertAfter(step.op, step.constants, step.attributes, output) for step in self._behind(after, masks, output)]
        return made

    def _kept(self, after: After, site: Site) -> BoolArray:
        """Which channels stay: inputs that carry them agree, others keep all."""
        inputs = ((at, len(after.input_shape(at)) + site.axis - self.rank) for at in self.positions)
        return np.asarray(np.logical_and.reduce([after.input_keep(at, axis) for at, axis in inputs]))

    def _behind(self, after: After, masks: Mapping[Site, BoolArray], output: int) -> list[Step]:
        """What cuts an output again, the last first."""
        behind: list[Step] = []
        shape = list(after.output_shape(output))
        for site in masks:
            shape[site.axis] = len(masks[site])
        for site, mask in masks.items():
            behind += site.steps(mask, shape, True)
            shape[site.axis] = int(mask.sum())
        return behind[::-1]
