"""What every node computes and moves, as a function of how many units each group keeps; without cutting anything.

The length of an axis is a linear function of the kept units, and what a node moves or multiplies is a product of lengths.
So any figure of a model (multiply-accumulates, bytes of weights, time, peak memory) can be had for many candidates at once.
A *candidate* is a vector of kept units, one number per group; functions here take arrays (..., groups) and return (...).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from ..core.types import BoolArray, Coupling, FloatArray, IntArray, Layer, Node, Trace
from ..coupling.cost import Parameter, keep_mask

BLOCKED_RANK = 4  # only feature maps N x C x H x W are kept in blocks of channels
AXES = 3  # most unit-carrying axes that one product may have


class Kind(IntEnum):
    """What is counted of a node: elements read, elements written, multiply-accumulates, and runs (a layer that vanished has none)."""

    READ = 0
    WRITTEN = 1
    MACS = 2
    RUNS = 3


class Role(IntEnum):
    """How convolutions use an axis of channels: not at all (or not in blocks), as one that they make, read, or both (depthwise)."""

    NONE = 0
    MADE = 1
    READ = 2
    BOTH = 3


@dataclass
class _Axes:
    """Distinct axes while terms are collected; number 0 is the constant 1."""

    group_of: IntArray
    groups: int
    known: dict[tuple[bytes, int], int] = field(default_factory=dict)
    units: list[IntArray] = field(default_factory=list)
    rows: list[FloatArray] = field(default_factory=list)
    full: list[float] = field(default_factory=list)
    roles: list[int] = field(default_factory=list)

    def number(self, units: IntArray, role: int) -> int:
        """Number of an axis; index i of it belongs to unit ``units[i]`` (-1: stays)."""
        key = (units.tobytes(), role)
        if key not in self.known:
            counts = np.bincount(self.group_of[units[units >= 0]], minlength=self.groups).astype(float)
            self.known[key] = len(self.rows) + 1
            self.units.append(units)
            self.rows.append(counts)
            self.full.append(float(len(units)))
            self.roles.append(role)
        return self.known[key]


@dataclass(frozen=True)
class Terms:
    """Products of axis lengths: term t is ``base[t] * length(a)/full(a) * ...`` over its ``axes[t]``.

    Attributes:
        base: (terms,) value with all channels.
        axes: (terms, AXES) numbers of axes; 0 means none.
        owner: (terms,) what the term belongs to (a node or a tensor).
        kind: (terms,) a `Kind`.
        full, fixed: (axes,) length with all channels, and of what cannot leave.
        share: (axes, groups) indices of the axis that one unit of a group holds, on average.
        role: (axes,) a `Role`.
        units: unit of each index of every axis (axis 0 has one that stays).
    """

    base: FloatArray
    axes: IntArray
    owner: IntArray
    kind: IntArray
    full: FloatArray
    fixed: FloatArray
    share: FloatArray
    role: IntArray
    units: tuple[IntArray, ...]

    def lengths(self, kept: IntArray) -> FloatArray:
        """Lengths (..., axes) of candidates (..., groups)."""
        found: FloatArray = np.asarray(kept, float) @ self.share.T + self.fixed
        return found

    def lengths_after(self, removed: BoolArray) -> FloatArray:
        """Lengths (axes,) after a removal, exact where the units of a group hold different shares of an axis."""
        return np.asarray([keep_mask(units, removed).sum() for units in self.units], float)

    def values(self, lengths: FloatArray, block: int = 1, slow: float = 1.0) -> FloatArray:
        """Values (..., terms) at lengths (..., axes). Axes in a role count whole blocks; but fewer channels than one block are read one by
        one. Multiply-accumulates that read more, and no multiple of 4, count ``slow`` times, since onnxruntime then leaves its blocked
        layout."""
        blocked = (self.role != Role.NONE) & ((self.role != Role.READ) | (lengths > block))
        paid = np.where(blocked, np.ceil(lengths / block - 1e-9) * block, lengths) / self.full
        found: FloatArray = self.base * np.prod([paid[..., self.axes[:, at]] for at in range(AXES)], axis=0)
        runs = self.kind == Kind.RUNS
        if runs.any():
            there = np.prod([(lengths > 0)[..., self.axes[runs, at]] for at in range(AXES)], axis=0)
            found[..., runs] = self.base[runs] * there
        if slow != 1.0:
            odd = blocked & (self.role != Role.MADE) & (np.abs(lengths / 4 - np.round(lengths / 4)) > 1e-6) & (self.full > 4)
            bad = np.any([odd[..., self.axes[:, at]] for at in range(AXES)], axis=0)
            found = np.where(bad & (self.kind == Kind.MACS), found * slow, found)
        return found

    def total(self, kept: IntArray) -> FloatArray:
        """Sum of all terms (...) of candidates (..., groups)."""
        found: FloatArray = self.values(self.lengths(kept)).sum(-1)
        return found

    def per_owner(self, lengths: FloatArray, owners: int, block: int = 1, slow: float = 1.0) -> FloatArray:
        """Sums (..., owners, kinds) at lengths (..., axes)."""
        values = self.values(lengths, block, slow)
        flat = values.reshape(-1, values.shape[-1])
        slot = self.owner * len(Kind) + self.kind
        summed: FloatArray = np.stack([np.bincount(slot, row, owners * len(Kind)) for row in flat])
        found: FloatArray = summed.reshape(*values.shape[:-1], owners, len(Kind))
        return found


Product = tuple[float, Sequence[tuple[IntArray, int]], int, int]
"""(value with all channels, axes as (units, role), owner, kind)."""


def terms(coupling: Coupling, products: Iterable[Product]) -> Terms:
    """Collect products of lengths."""
    groups = len(coupling.groups)
    group_of = np.repeat(np.arange(groups), [group.width for group in coupling.groups])
    axes = _Axes(group_of, groups)
    base, numbers, owners, kinds = [], [], [], []
    for value, units, owner, kind in products:
        own = [axes.number(array, role) for array, role in units if (array >= 0).any()][:AXES]
        base.append(value)
        numbers.append(own + [0] * (AXES - len(own)))
        owners.append(owner)
        kinds.append(kind)
    widths = np.asarray([group.width for group in coupling.groups], float)
    rows = np.stack([np.zeros(groups), *axes.rows])
    full = np.asarray([1.0, *axes.full])
    return Terms(
        base=np.asarray(base, float),
        axes=np.asarray(numbers, np.int64).reshape(-1, AXES),
        owner=np.asarray(owners, np.int64),
        kind=np.asarray(kinds, np.int64),
        full=full,
        fixed=full - rows.sum(1),
        share=rows / np.maximum(widths, 1),
        role=np.asarray([Role.NONE, *axes.roles], np.int64),
        units=(np.full(1, -1, np.int64), *axes.units),
    )


def _activation(name: str, coupling: Coupling, trace: Trace) -> tuple[float, list[tuple[IntArray, int]]]:
    shape = trace.shapes[name]
    role = Role.MADE if len(shape) == BLOCKED_RANK else Role.NONE
    return float(np.prod(shape)), [(own.units, role if own.axis == 1 else Role.NONE) for own in coupling.tensors.get(name, ())]


def _extents(layer: Layer, trace: Trace) -> list[tuple[IntArray, int]]:
    """The axes that a layer's multiply-accumulates are proportional to, with their roles."""
    if len(trace.shapes.get(layer.node.outputs[0], ())) != BLOCKED_RANK:
        return [(units, Role.NONE) for units in layer.extents]
    if len(layer.extents) == 1 and np.array_equal(layer.reads, layer.writes):  # depthwise
        return [(layer.extents[0], Role.BOTH)]
    made = next((at for at, units in enumerate(layer.extents) if np.array_equal(units, layer.writes)), -1)
    return [(units, Role.MADE if at == made else Role.READ) for at, units in enumerate(layer.extents)]


def node_terms(coupling: Coupling, nodes: Sequence[Node], trace: Trace) -> Terms:
    """What every node reads, writes and multiplies on the traced shapes; the owner is the node's index."""
    products: list[Product] = []
    for node in nodes:
        for kind, names in ((Kind.READ, node.inputs), (Kind.WRITTEN, node.outputs)):
            for position, name in enumerate(names):
                constant = kind is Kind.READ and (node.index, position) in coupling.constants
                if name in trace.shapes and not constant and np.prod(trace.shapes[name]) > 0:
                    products.append((*_activation(name, coupling, trace), node.index, kind))
    for layer in coupling.layers:
        extents = _extents(layer, trace)
        products += [(layer.macs, extents, layer.node.index, Kind.MACS), (1.0, extents, layer.node.index, Kind.RUNS)]
    return terms(coupling, products)


def macs_terms(coupling: Coupling, samples: int) -> Terms:
    """Multiply-accumulates for one sample."""
    rows = ((layer.macs / samples, [(units, Role.NONE) for units in layer.extents], 0, Kind.MACS) for layer in coupling.layers)
    return terms(coupling, rows)


def weight_terms(coupling: Coupling, parameters: Iterable[Parameter], sizes: Iterable[float] | None = None) -> Terms:
    """Numbers of weights, or their bytes if ``sizes`` gives the bytes of one element of each parameter."""
    owned = list(parameters)
    products: list[Product] = []
    for parameter, size in zip(owned, sizes or [1.0] * len(owned), strict=True):
        axes = [(own.units, int(Role.NONE)) for own in parameter.uses[0]]
        products.append((float(np.prod(parameter.shape)) * size, axes, 0, Kind.READ))
    return terms(coupling, products)


# ---- memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Liveness:
    """Which activation tensors are alive while each node runs: ``alive`` is (steps, tensors), ``terms`` their bytes, one each.
    ``tails`` are (axis, tensors): these become constants, and no activations, where that axis has no length left."""

    terms: Terms
    alive: FloatArray
    tails: tuple[tuple[int, IntArray], ...] = ()

    def peak(self, lengths: FloatArray) -> FloatArray:
        """Largest sum of bytes of tensors alive at once (...) at lengths (..., axes)."""
        if not len(self.alive):
            return np.zeros(np.shape(lengths)[:-1])
        values = self.terms.values(lengths)
        for axis, columns in self.tails:
            values[..., columns] *= (np.asarray(lengths)[..., axis, None] > 0)
        found: FloatArray = (values @ self.alive.T).max(-1)
        return found


def liveness(
    coupling: Coupling, nodes: Sequence[Node], trace: Trace, held: Iterable[str], ends: tuple[Iterable[str], Iterable[str]],
    sizes: Mapping[str, int], scale: float = 1.0,
) -> Liveness:  # fmt: skip
    """Liveness of the activations of a model, run node by node in the order of the file, nothing fused or computed in place.

    A tensor lives from the node that writes it to the last one that reads it; inputs of the model from the start, outputs to the end.
    While a node runs, its inputs and outputs are alive together.

    Args:
        held: initializers, which do not count.
        ends: inputs and outputs of the model.
        sizes: bytes of one element per tensor (default 4).
        scale: factor on all bytes (another batch size than the traced one).
    """
    inputs, outputs = (list(names) for names in ends)
    constants = set(held)
    first = {name: 0 for name in inputs if name not in constants}
    last = dict(first)
    for step, node in enumerate(nodes):
        for name in node.reads:
            if name in first:
                last[name] = step
        for name in node.outputs:
            if name in trace.shapes and name not in trace.values and name not in constants:
                first.setdefault(name, step)
                last[name] = step
    last.update({name: len(nodes) - 1 for name in outputs if name in first})
    names = [name for name in first if name in trace.shapes]
    branches = [(group.units, coupling.branches[group.name]) for group in coupling.groups if group.name in coupling.branches]
    alive = np.zeros((len(nodes), len(names) + len(branches)))
    products: list[Product] = []
    for column, name in enumerate(names):
        alive[first[name] : last[name] + 1, column] = 1
        elements, axes = _activation(name, coupling, trace)
        products.append((elements * sizes.get(name, 4) * scale, axes, column, Kind.WRITTEN))
    products += [(0.0, [(units, Role.NONE)], len(names), Kind.WRITTEN) for units, _ in branches]  # gives their units an axis
    found = terms(coupling, products)
    place = {name: column for column, name in enumerate(names)}
    tails = tuple(
        (int(found.axes[len(names) + number, 0]), np.asarray([place[name] for name in branch.constant if name in place], np.int64))
        for number, (_, branch) in enumerate(branches)
    )
    return Liveness(found, np.unique(alive, axis=0), tails)
