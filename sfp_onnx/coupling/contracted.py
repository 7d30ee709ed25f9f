"""A second set of units on axes that whole heads share: index d of the contracted axis of an attention, in all heads at once.

Labels vary along heads and dimensions of one tensor; units of one kind only keep it rectangular, and so do units of both kinds together,
since a row and a column may leave independently. Heads are found like all other units. This looks at the same facts with the columns
tied instead of the rows, and takes what is then free without touching anything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..core.types import BoolArray, IntArray, Node
from ..rules.labels import FIXED, Facts, Labels, compact, components, varying


@dataclass(frozen=True)
class Dimensions:
    """What is free along contracted axes: ``unit_of`` each label (-1: none; numbered from 0), and the ``widths`` and ``nodes`` of the
    groups, one per product (the first of several that share them)."""

    unit_of: IntArray
    widths: tuple[int, ...] = ()
    nodes: tuple[Node, ...] = ()


def dimensions(facts: Facts, constants: Mapping[tuple[int, int], Labels], left: IntArray, right: IntArray) -> Dimensions:
    """Units along the contracted axes of ``facts.contracted``; ``left`` and ``right`` are all ties but those of their rows."""
    every, none = facts.contracted, Dimensions(np.full(facts.labels, -1, np.int64))
    if not every:
        return none
    columns = [(item.matrix, np.broadcast_to(item.matrix[:1], item.matrix.shape)) for item in every]
    sides = ([left, *(pair[0].reshape(-1) for pair in columns)], [right, *(pair[1].reshape(-1) for pair in columns)])
    parent = components(facts.labels, *map(np.concatenate, sides))
    wanted = np.zeros(facts.labels, bool)
    for item in every:
        wanted[parent[item.matrix]] = True
    wanted &= ~_held(facts, parent)
    arrays = [labels for some in (facts.tensors, constants) for value in some.values() for labels in value]
    rectangular(wanted, [classes for labels in {id(array): array for array in arrays}.values() if wanted[classes := parent[labels]].any()])
    return _numbered(facts, parent, wanted)


def _held(facts: Facts, parent: IntArray) -> BoolArray:
    """Classes that a pin, a choice or a layer with weights holds, or that reach beyond the product."""
    held = np.zeros(facts.labels, bool)
    held[parent[FIXED]] = True
    for pin in facts.pins:
        held[parent[pin.labels]] = True
    for item in facts.contracted:
        held[parent[item.rows]] = True
    for choice in facts.choices:
        for option in choice.options:
            for side in (side for pair in option for side in pair):
                held[parent[side]] = True
    for layer in facts.layers:
        if layer.constant and layer.reads.labels is not None:
            held[parent[layer.reads.labels]] = True
    return held


def rectangular(wanted: BoolArray, arrays: Sequence[IntArray]) -> None:
    """Give up classes that would leave a tensor ragged or empty, until none is left that would."""
    while True:
        before = int(wanted.sum())
        for classes in arrays:
            free = compact(np.where(wanted[classes], classes, -1))
            if len(varying(free)) > 1 or free.size == 1:
                wanted[free[free >= 0]] = False
        if wanted.sum() == before:
            return


def _numbered(facts: Facts, parent: IntArray, wanted: BoolArray) -> Dimensions:
    """Units of the classes of each product, in the order of its axis; products that share a class share the group of the first."""
    unit_of, widths, nodes = np.full(facts.labels, -1, np.int64), list[int](), list[Node]()
    for item in facts.contracted:
        row = parent[item.matrix[0]]
        free = list(dict.fromkeys(row[wanted[row] & (unit_of[row] < 0)].tolist()))
        if len(free) > 1:
            unit_of[free] = sum(widths) + np.arange(len(free))
            widths.append(len(free))
            nodes.append(item.node)
    return Dimensions(unit_of[parent], tuple(widths), tuple(nodes))
