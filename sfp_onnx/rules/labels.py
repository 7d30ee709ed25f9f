"""Arithmetic on label arrays (pure numpy, knows nothing of ONNX), and the facts that rules state in terms of them.

A *label array* belongs to one tensor: int64, same rank as the tensor, broadcastable to its shape, of size 1 along every
axis on which the label does not vary. Label 0 (`FIXED`) means "this index can never be removed". A tensor may carry several
label arrays (a weight varies independently along its output and its input axis); an element leaves if any of its labels does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import numpy as np

from ..core.types import Additive, FloatArray, Follow, IntArray, Linear, Node

Labels = tuple[IntArray, ...]
FIXED = 0
# A merge of axes may repeat labels along large axes (pixel shuffle written as Reshape-Transpose-Reshape). Above this
# many elements the array is not written out; the caller ties the inner axis instead.
LARGE = 1 << 20


def varying(array: IntArray) -> tuple[int, ...]:
    """Axes along which the labels differ."""
    return tuple(axis for axis, size in enumerate(array.shape) if size > 1)


def compact(array: IntArray) -> IntArray:
    """The same labels with size 1 along every axis on which they are constant."""
    for axis in varying(array):
        first = array.take([0], axis)
        if (array == first).all():
            array = first
    return array


def keep_varying(arrays: Sequence[IntArray]) -> Labels:
    """Drop arrays that do not vary at all, and arrays of fixed labels."""
    return tuple(array for array in arrays if array.size > 1 and array.any())


def align(array: IntArray, rank: int) -> IntArray:
    """Prepend axes of size 1, as broadcasting does."""
    return array.reshape((1,) * (rank - array.ndim) + array.shape)


def vector(values: IntArray, axis: int, rank: int) -> IntArray:
    """A label array that varies along one axis only."""
    shape = [1] * rank
    shape[axis] = len(values)
    return values.reshape(shape)


def blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[range, range]]:
    """Split two shapes of equal size into the shortest runs of axes with equal products.

    >>> blocks((2, 6, 5), (2, 2, 3, 5))
    [(range(0, 1), range(0, 1)), (range(1, 2), range(1, 3)), (range(2, 3), range(3, 4))]
    """
    runs = []
    i = j = 0
    while i < len(old) or j < len(new):
        start = (i, j)
        left = right = 1
        if i < len(old):
            left, i = old[i], i + 1
        if j < len(new):
            right, j = new[j], j + 1
        while left != right:
            if left < right and i < len(old):
                left, i = left * old[i], i + 1
            elif j < len(new):
                right, j = right * new[j], j + 1
            else:
                break
        runs.append((range(start[0], i), range(start[1], j)))
    return runs


def reshape(array: IntArray, old: Sequence[int], new: Sequence[int]) -> IntArray:
    """Labels of ``tensor.reshape(new)`` for a tensor of shape ``old`` (row-major, as ONNX Reshape)."""
    expanded, target = list(array.shape), []
    for before, after in blocks(old, new):
        sizes = [array.shape[axis] for axis in before]
        if prod(sizes) == 1:
            target += [1] * len(after)
            continue
        for axis in before:
            expanded[axis] = old[axis]
        target += [new[axis] for axis in after]
    return compact(np.broadcast_to(array, expanded).reshape(target))


def reshaped_size(array: IntArray, old: Sequence[int], new: Sequence[int]) -> int:
    """Number of elements that `reshape` would write out before compaction."""
    size = 1
    for before, _ in blocks(old, new):
        if prod(array.shape[axis] for axis in before) > 1:
            size *= prod(old[axis] for axis in before)
    return size


def components(count: int, left: IntArray, right: IntArray, parent: IntArray | None = None) -> IntArray:
    """Smallest label of each connected component of the graph with edges left[i] -- right[i] over labels 0 .. count - 1.

    Hooking and pointer jumping (Shiloach and Vishkin, J. Algorithms 3, 57 (1982)), vectorised.
    """
    parent = np.arange(count) if parent is None else parent.copy()
    while len(left):
        a, b = parent[left], parent[right]
        differ = a != b
        if not differ.any():
            break
        left, right, a, b = left[differ], right[differ], a[differ], b[differ]
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
        while True:
            grand = parent[parent]
            if (grand == parent).all():
                break
            parent = grand
    return parent


# ---- facts that rules state in terms of labels -----------------------------------------------------------------------

TiePair = tuple[IntArray, IntArray]


@dataclass(frozen=True)
class PinFact:
    labels: IntArray
    node: str
    reason: str


@dataclass(frozen=True)
class Choice:
    """Exclusive ways to satisfy one constraint; the one that leaves the most units is taken."""

    node: Node
    options: tuple[tuple[TiePair, ...], ...]


@dataclass(frozen=True)
class Reads:
    """What a mixing layer reads: input ``data`` along ``data_axis``, through ``weight_axis`` of its weight."""

    data: int
    data_axis: int
    weight_axis: int
    labels: IntArray | None


@dataclass(frozen=True)
class Writes:
    """What a mixing layer makes: the weight is input ``weight``, its ``weight_axis`` carries the new labels."""

    weight: int
    weight_axis: int
    labels: IntArray | None


@dataclass(frozen=True)
class LayerFact:
    """A mixing layer, with label arrays where `core.types.Layer` has units."""

    node: Node
    macs: float
    extents: tuple[IntArray, ...]
    constant: bool
    reads: Reads
    writes: Writes
    linear: Linear | None = None
    grouped: str = ""


@dataclass(frozen=True)
class AffineFact:
    node: Node
    gamma: FloatArray
    scale: FloatArray
    labels: IntArray
    moments: tuple[int, int]


class Member(NamedTuple):
    """A label array, and the number of its operand among those that meet."""

    array: IntArray
    which: int


class Operand(NamedTuple):
    """What meets others element by element: its labels and its shape, aligned to a common rank; and, if a part of it may be gathered, the
    input ``position`` that it is, and which of that input's axes each common axis is (-1: none)."""

    labels: Labels
    shape: Sequence[int]
    position: int = -1
    axes: Sequence[int] = ()


@dataclass(frozen=True)
class Contracted:
    """An axis that is summed over, of activations whose labels ``matrix`` (heads, dimensions) also vary along another: heads leave whole,
    with the ``rows`` (heads,) of the output; or a dimension leaves from all heads at once."""

    node: Node
    matrix: IntArray
    rows: IntArray


@dataclass(frozen=True)
class Blocked:
    """A convolution in groups with a constant weight: the labels of its input (groups, i) and of its output channels (groups, o), of which
    every group may lose some of its own, as many as the others. The second axis of input ``weight`` holds those of side ``inner``."""

    node: Node
    sides: tuple[IntArray | None, IntArray | None]
    weight: int
    inner: int


@dataclass
class Facts:
    """Everything stated so far about one graph. ``constants`` holds the labels of constant operands by storage key; ``joins`` says where
    labels became one, in case that they fill an axis in the end; ``expanded`` says at which node, input
    and axis removed channels are put back."""

    labels: int = 1
    ties: list[TiePair] = field(default_factory=list)
    pins: list[PinFact] = field(default_factory=list)
    joins: list[PinFact] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    layers: list[LayerFact] = field(default_factory=list)
    contracted: list[Contracted] = field(default_factory=list)
    blocked: list[Blocked] = field(default_factory=list)
    affines: list[AffineFact] = field(default_factory=list)
    follows: list[Follow] = field(default_factory=list)
    tensors: dict[str, Labels] = field(default_factory=dict)
    constants: dict[tuple[int, int], Labels] = field(default_factory=dict)
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)
    masked_inputs: list[tuple[int, int]] = field(default_factory=list)
    zero_points: dict[str, str] = field(default_factory=dict)
    additive: dict[int, Additive] = field(default_factory=dict)
    expanded: set[tuple[int, int, int]] = field(default_factory=set)
