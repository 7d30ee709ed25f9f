"""A second set of units on axes that convolutions in groups share: channels of every group, of which each loses as many as the others.

Whole groups are units like all others. This looks at the same facts without that choice, and takes the channels that are then free as units
of their own. They stand in blocks, which are the finest parts that every group of every such convolution, and every tensor, is made of:
where all blocks lose as many, so do all groups, whichever channels leave.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..core.types import BoolArray, IntArray, Node
from ..rules.labels import FIXED, Blocked, Choice, Facts, Labels, components
from .contracted import rectangular


@dataclass(frozen=True)
class Insides:
    """What is free inside of groups: ``unit_of`` each label (-1: none; numbered from 0), the ``widths``, ``blocks`` and ``nodes`` of the
    sets of units (the first convolution of each), and what was ``stated`` of the convolutions that lose some."""

    unit_of: IntArray
    widths: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()
    nodes: tuple[Node, ...] = ()
    stated: tuple[Blocked, ...] = ()

    def settled(self, choices: Iterable[Choice]) -> list[Choice]:
        """The choices that are left: of these convolutions only whole groups leave, or nothing, beside what leaves inside."""
        sides = {item.node.index: item.sides for item in self.stated}
        left = []
        for choice in choices:
            if choice.node.index in sides:
                held = tuple((side, np.full_like(side, FIXED)) for side in sides[choice.node.index] if side is not None)
                choice = replace(choice, options=(choice.options[0] if len(choice.options) > 1 else held,))
            left.append(choice)
        return left


def insides(facts: Facts, constants: Mapping[tuple[int, int], Labels], left: IntArray, right: IntArray) -> Insides:
    """Units inside of the groups of ``facts.blocked``; ``left`` and ``right`` are all ties."""
    asked = [item for item in facts.blocked if any(side is not None and side.shape[1] > 1 for side in item.sides)]
    deep = [item for item in facts.blocked if all(side is None or side.shape[1] == 1 for side in item.sides)]
    if not asked:
        return Insides(np.full(facts.labels, -1, np.int64))
    pairs = [(item.sides[0][:, 0], item.sides[1][:, 0]) for item in deep if item.sides[0] is not None and item.sides[1] is not None]
    sides = ([left, *(pair[0] for pair in pairs)], [right, *(pair[1] for pair in pairs)])
    parent = components(facts.labels, *map(np.concatenate, sides))
    arrays = list({id(array): array for some in (facts.tensors, constants) for value in some.values() for array in value}.values())
    pinned, settled = _pinned(facts, parent), {item.node.index for item in deep}
    while True:
        wanted = ~pinned & _wanted(facts, parent, asked, settled)
        rectangular(wanted, [classes for array in arrays if wanted[classes := parent[array]].any()])
        parts = _Parts.of(parent, wanted, asked, arrays)
        left_out = {item.node.index for item in asked} - {item.node.index for item, matrix in parts.rows if wanted[matrix].any()}
        for item, matrix in parts.rows:
            if (wanted == pinned)[matrix].any() or parts.uneven(wanted[matrix], matrix):
                left_out.add(item.node.index)
        if not left_out:
            return parts.numbered(parent, asked)
        asked = [item for item in asked if item.node.index not in left_out]


def _pinned(facts: Facts, parent: IntArray) -> BoolArray:
    """Classes that cannot leave at all, or that products of activations may take."""
    held = np.zeros(facts.labels, bool)
    held[parent[FIXED]] = True
    for pin in facts.pins:
        held[parent[pin.labels]] = True
    for item in facts.contracted:
        held[parent[item.rows]] = held[parent[item.matrix]] = True
    return held


def _wanted(facts: Facts, parent: IntArray, asked: Sequence[Blocked], settled: Collection[int]) -> BoolArray:
    """Classes inside of groups that no other choice holds; ``settled`` are nodes whose groups are single channels."""
    wanted, held = np.zeros(facts.labels, bool), np.zeros(facts.labels, bool)
    own = {item.node.index for item in asked} | set(settled)
    for choice in facts.choices:
        if choice.node.index not in own:
            for side in (side for option in choice.options for pair in option for side in pair):
                held[parent[side]] = True
    for side in (side for item in asked for side in item.sides if side is not None):
        (wanted if side.shape[1] > 1 else held)[parent[side]] = True
    return np.asarray(wanted & ~held)


@dataclass(frozen=True)
class _Parts:
    """The classes that may leave (``roots``), the block of each class (``block_of``, -1: none), the ``sizes`` of the blocks and the set of
    each (``sets``): those that one convolution reads or makes. ``rows`` are the sides of the convolutions, as classes."""

    rows: Sequence[tuple[Blocked, IntArray]]
    roots: IntArray
    block_of: IntArray
    sizes: IntArray
    sets: IntArray

    @classmethod
    def of(cls, parent: IntArray, wanted: BoolArray, asked: Sequence[Blocked], arrays: Sequence[IntArray]) -> _Parts:
        """Classes are in one block if they are in the same groups, as often, and on the same tensors."""
        generator, marks = np.random.default_rng(0), np.zeros(len(parent), np.uint64)
        rows = [(item, parent[side]) for item in asked for side in item.sides if side is not None and side.shape[1] > 1]
        for classes in (*(row for _, matrix in rows for row in matrix), *(np.unique(parent[array]) for array in arrays)):
            if wanted[classes].any():
                np.add.at(marks, classes, generator.integers(1, 2**63, dtype=np.uint64))
        roots, block_of = np.flatnonzero(wanted), np.full(len(parent), -1, np.int64)
        _, first, block = np.unique(marks[roots], return_index=True, return_inverse=True)
        block_of[roots] = np.argsort(np.argsort(first))[block]  # in the order of their first channel
        joined = [np.unique(block_of[matrix[wanted[matrix]]]) for _, matrix in rows]
        none = [np.zeros(0, np.int64)]
        ends = (np.concatenate([*none, *(np.full_like(own, own[0]) for own in joined if len(own))]), np.concatenate([*none, *joined]))
        return cls(rows, roots, block_of, np.bincount(block_of[roots], minlength=len(first)), components(len(first), *ends))

    def uneven(self, wanted: BoolArray, matrix: IntArray) -> bool:
        """Whether groups of a side do not lose as many channels each, where the blocks do, or some block may lose none."""
        sizes = self.sizes[np.isin(self.sets, self.sets[self.block_of[matrix[wanted]]])]
        return len(set(wanted.sum(1).tolist())) > 1 or len(set(sizes.tolist())) > 1 or bool((sizes < 2).any())

    def numbered(self, parent: IntArray, asked: Sequence[Blocked]) -> Insides:
        """Units block by block, set by set, in the order of the convolutions."""
        unit_of, widths, blocks, nodes = np.full(len(parent), -1, np.int64), list[int](), list[int](), list[Node]()
        owners = {int(self.sets[at]): item.node for item, matrix in self.rows[::-1] for at in np.unique(self.block_of[matrix]) if at >= 0}
        for number, node in sorted(owners.items(), key=lambda pair: (pair[1].index, pair[0])):
            own = self.roots[self.sets[self.block_of[self.roots]] == number]
            own = own[np.argsort(self.block_of[own], kind="stable")]
            unit_of[own] = sum(widths) + np.arange(len(own))
            widths.append(len(own))
            blocks.append(int((self.sets == number).sum()))
            nodes.append(node)
        return Insides(unit_of[parent], tuple(widths), tuple(blocks), tuple(nodes), tuple(asked))
