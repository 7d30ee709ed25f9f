"""What a rule sees of one node, and the facts that it can state.

A rule is ``rule(ctx) -> list of Labels``, one entry per output of the node. It states facts of four kinds: *tie* (these
labels leave together), *layer* (this operator mixes channels with this weight), *follow* (this attribute or constant is
recomputed from the new sizes), *pin* (these labels stay, because ...). It never looks at other nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.types import Additive, After, Array, BoolArray, Edit, Follow, InsertBefore, IntArray, Linear, Node, Trace
from .expansion import FIRST_PAD, Expansion, Site, Tiling
from .labels import (
    FIXED,
    Choice,
    Contracted,
    Facts,
    Labels,
    LayerFact,
    Member,
    Operand,
    PinFact,
    Reads,
    TiePair,
    Writes,
    align,
    keep_varying,
    varying,
    vector,
)  # fmt: skip

TOGETHER = "all channels of this axis can only leave together"
STIFF = "it meets a tensor that cannot shrink along this axis"


@dataclass(frozen=True)
class Context:
    """One node, its operands and their labels; the methods state facts.

    ``shared_constants`` are weights used by several nodes whose uses must stay equal (rank 2 or more); 1-d constants are
    un-shared, since exporters merge equal vectors that have nothing to do with each other. ``computed`` are tensors that the graph
    computes from constants alone (dequantised weights). ``expand``: operators that
    need all channels may be given them again (`expansion`).
    """

    node: Node
    opset: int
    trace: Trace
    facts: Facts
    constants: frozenset[str]
    shared_constants: frozenset[str] = frozenset()
    computed: frozenset[str] = frozenset()
    expand: bool = False

    # ---- what the node looks like ------------------------------------------------------------------------------------

    def has(self, position: int) -> bool:
        """Whether an (optional) input is given."""
        return position < len(self.node.inputs) and bool(self.node.inputs[position])

    def shape(self, position: int) -> tuple[int, ...]:
        """Concrete shape of an input on the sample."""
        return self.trace.shapes[self.node.inputs[position]]

    def out_shape(self, position: int = 0) -> tuple[int, ...]:
        """Concrete shape of an output on the sample."""
        return self.trace.shapes[self.node.outputs[position]]

    def rank(self, position: int) -> int:
        return len(self.shape(position))

    def is_constant(self, position: int) -> bool:
        return self.node.inputs[position] in self.constants

    def is_weight(self, position: int) -> bool:
        """Whether an input is a constant, or computed from constants alone."""
        return self.is_constant(position) or self.node.inputs[position] in self.computed

    def value(self, position: int) -> Array | None:
        """Value of an input that does not depend on the data, as seen on the sample; None if absent or unknown."""
        return self.trace.values.get(self.node.inputs[position]) if self.has(position) else None

    def dynamic(self, position: int) -> BoolArray:
        """Which elements of a known value change with the dynamic dimensions."""
        name = self.node.inputs[position]
        return self.trace.dynamic_values.get(name, np.zeros(np.shape(self.trace.values[name]), bool))

    def dynamic_axis(self, position: int, axis: int) -> bool:
        """Whether the size of an axis changes with the inputs."""
        return axis in self.trace.dynamic_axes.get(self.node.inputs[position], ())

    def attribute(self, name: str, default: Any = None) -> Any:
        return self.node.attributes.get(name, default)

    # ---- labels of operands ------------------------------------------------------------------------------------------

    def key(self, position: int) -> tuple[int, int]:
        """Where the labels of a constant operand are kept: per use, or once for a weight with several uses."""
        key = (self.node.index, position)
        name = self.node.inputs[position]
        if name in self.shared_constants:
            return self.facts.shared.setdefault(name, key)
        return key

    def mint(self, count: int) -> IntArray:
        """``count`` fresh labels."""
        start = self.facts.labels
        self.facts.labels += count
        return np.arange(start, start + count, dtype=np.int64)

    def labels(self, position: int) -> Labels:
        """Label arrays of an input; a constant gets fresh labels along every axis."""
        if not self.has(position):
            return ()
        if not self.is_constant(position):
            return self.facts.tensors.get(self.node.inputs[position], ())
        for axis in range(self.rank(position)):
            self.axis(position, axis)
        return self.facts.constants.get(self.key(position), ())

    def adopt(self, position: int, labels: Labels) -> None:
        """Give a constant operand the labels of what it meets (aligned at the last axis, where its size is not 1)."""
        if not self.has(position) or not self.is_constant(position):
            return
        rank, shape = self.rank(position), self.shape(position)
        adopted = []
        for array in labels:
            index = tuple([0] * (array.ndim - rank))
            array = align(array, rank)[index] if array.ndim > rank else align(array, rank)
            for axis in range(rank):
                if shape[axis] == 1:
                    array = array.take([0], axis)
            adopted.append(array)
        key = self.key(position)
        known = self.facts.constants.get(key, ())
        for array in keep_varying(adopted):
            twin = next((other for other in known if other.shape == array.shape), None)
            if twin is None:
                known += (array,)
            else:
                self.tie(twin, array)
        self.facts.constants[key] = known

    def axis(self, position: int, axis: int) -> IntArray | None:
        """Labels of an input along one axis, as a vector; None if the axis cannot shrink. Labels that vary along other
        axes as well are tied there first; a constant is given fresh labels."""
        rank = self.rank(position)
        axis %= rank
        if self.is_constant(position):
            key = self.key(position)
            known = self.facts.constants.get(key, ())
            arrays = [array for array in known if axis in varying(array)]
            if not arrays:
                if self.shape(position)[axis] < 2:
                    return None
                arrays = [vector(self.mint(self.shape(position)[axis]), axis, rank)]
                self.facts.constants[key] = known + tuple(arrays)
        else:
            arrays = [array for array in self.labels(position) if axis in varying(array)]
        return self.along(arrays, axis)

    def along(self, arrays: Sequence[IntArray], axis: int) -> IntArray | None:
        """The labels that vary along ``axis`` as one vector, tied along all other axes."""
        vectors = []
        for array in arrays:
            if array.shape[axis] == 1:
                continue
            for other in varying(array):
                if other != axis:
                    array = self.fix(array, other, "its channels also vary along another axis")
            vectors.append(array.reshape(-1))
        for another in vectors[1:]:
            self.tie(vectors[0], another)
        return vectors[0] if vectors else None

    def match(self, position: int, axis: int, labels: IntArray | None) -> None:
        """State that an input carries ``labels`` along ``axis`` (None: that axis cannot shrink)."""
        if not self.has(position):
            return
        rank = self.rank(position)
        axis %= rank
        if labels is None:
            self.fix_input(position, (axis,), "it meets an axis that cannot shrink")
        elif self.shape(position)[axis] > 1:
            if self.is_constant(position):
                key = self.key(position)
                known = self.facts.constants.get(key, ())
                twin = self.along([array for array in known if axis in varying(array)], axis)
                if twin is None:
                    self.facts.constants[key] = known + (vector(labels, axis, rank),)
                else:
                    self.tie(twin, labels)
                return
            carried = self.axis(position, axis)
            if carried is None:
                self.pin(labels, "it meets an axis that cannot shrink")
            else:
                self.tie(carried, labels)

    # ---- facts -------------------------------------------------------------------------------------------------------

    def tie(self, left: IntArray, right: IntArray) -> None:
        """These labels leave together, element by element (broadcast)."""
        left, right = np.broadcast_arrays(left, right)
        if left.size > 1 and (right == right.flat[0]).all():
            self.facts.joins.append(PinFact(np.unique(left), self.node.name, TOGETHER))
        differ = left != right
        if not differ.any():
            return
        left, right = left[differ], right[differ]
        fixed = (left == FIXED) | (right == FIXED)
        if fixed.any():
            self.pin(np.maximum(left, right)[fixed], "it is tied to channels that cannot be removed")
        if not fixed.all():
            self.facts.ties.append((left[~fixed], right[~fixed]))

    def pin(self, labels: IntArray, reason: str) -> None:
        """These labels cannot be removed."""
        labels = np.unique(labels)
        labels = labels[labels != FIXED]
        if len(labels):
            self.facts.pins.append(PinFact(labels, self.node.name, reason))

    def fix(self, array: IntArray, axis: int, reason: str) -> IntArray:
        """State that ``axis`` keeps its size: labels become equal along it; those that vary along nothing else are pinned.
        Pinned labels are returned as they are, so that later meetings know the first cause."""
        if array.shape[axis] == 1:
            return array
        first = array.take([0], axis)
        if first.size == 1:
            self.pin(array, reason)
            return array
        self.tie(array, first)
        return first

    def contract(self, array: IntArray, axis: int) -> IntArray:
        """State that ``axis`` of activations is summed over: labels that vary along one other axis leave along that, whole, and are those
        of the output (`Contracted`)."""
        if array.shape[axis] == 1 or len(varying(array)) != 2:
            return self.fix(array, axis, "it is summed over")
        first = array.take([0], axis)
        matrix = np.moveaxis(array, axis, -1).reshape(first.size, -1)
        _, places, which = np.unique(matrix, axis=0, return_index=True, return_inverse=True)  # heads of every sample, say, are the same
        rows = self.mint(len(places))[np.argsort(np.argsort(places))[which.reshape(-1)]]
        self.facts.contracted.append(Contracted(self.node, matrix, rows))
        return rows.reshape(first.shape)

    def take(self, array: IntArray, indices: Sequence[int] | IntArray | range, axis: int) -> IntArray:
        """Labels of some indices of an axis. An index that is read all alone must stay: its tensor cannot become empty."""
        if array.shape[axis] == 1:
            return array
        taken = array.take(indices, axis)
        if taken.size == 1:
            self.pin(taken, "one channel of it is read alone")
        return taken

    def fix_axes(self, labels: Labels, axes: Sequence[int], reason: str) -> Labels:
        """`fix` for every label array and axis."""
        fixed = []
        for array in labels:
            for axis in axes:
                array = self.fix(array, axis % array.ndim, reason)
            fixed.append(array)
        return keep_varying(fixed)

    def settle(self, position: int, axes: Sequence[int], reason: str) -> Labels:
        """`fix_input`, without the labels that still vary along ``axes``: for operators that change these axes otherwise."""
        if self.has(position) and not self.is_constant(position):
            return self.whole([position], axes, reason, passes=False)
        fixed = self.fix_input(position, axes, reason)
        return tuple(array for array in fixed if all(array.shape[axis] == 1 for axis in axes))

    def fix_input(self, position: int, axes: Sequence[int], reason: str) -> Labels:
        """State that some axes of an input keep their size."""
        if not self.has(position):
            return ()
        if self.is_constant(position):
            if self.node.inputs[position] in self.shared_constants:
                for axis in axes:  # other uses must not shrink it either
                    self.axis(position, axis)
            known = self.facts.constants.get(self.key(position), ())
            return self.fix_axes(known, axes, reason)
        return self.fix_axes(self.labels(position), axes, reason)

    def whole(
        self, positions: Sequence[int], axes: Sequence[int], reason: str, labels: Labels | None = None, passes: bool = True,
        ordered: bool = True, vectors: Sequence[int] = (), beside: Sequence[int] = (),
    ) -> Labels:  # fmt: skip
        """State that the operator needs all of some axes of the inputs at ``positions``, which carry the same ``labels`` (default: those of
        the first). Where expansion is allowed they may shrink even so, else they keep their size.

        Args:
            passes: output 0 has these axes as they are, and is cut again.
            ordered: the operator reads more than the set of what lies along them. Else ``vectors`` are the inputs that go along with it.
            beside: further outputs that are as output 0.

        Returns:
            The labels that output 0 carries.
        """
        values = {at: value for at in vectors if (value := self.value(at)) is not None}
        ordered = ordered or len(values) < sum(map(self.has, vectors))
        sites: dict[int, Site] = {}
        passed: list[IntArray] = []
        for array in self.labels(positions[0]) if labels is None else labels:
            along = [axis for axis in varying(array) if axis in axes]
            site = self._site(positions, array, ordered) if along else None
            if site is None or site.axis in sites:
                left: Labels = self.fix_axes((array,), along, reason)
            else:
                sites[site.axis], left = site, (array,)
            passed += [other for other in left if passes or not {*along} & {*varying(other)}]
        if sites:
            rank = self.rank(positions[0])
            expansion = Expansion(positions, tuple(sites.values()), (0, *beside) if passes else (), {} if ordered else values, rank)
            self.facts.follows.append(Follow(self.node.index, expansion.edits, True))
            self.facts.expanded.update((self.node.index, at, self.rank(at) + axis - rank) for at in positions for axis in sites)
        return keep_varying(passed)

    def _site(self, positions: Sequence[int], array: IntArray, ordered: bool) -> Site | None:
        """Where channels can be put back, if that is allowed and can be done: they vary along one axis, and are no integers with a zero
        point; an axis of changing size has them side by side, or one behind the other."""
        names = [self.node.inputs[at] for at in positions]
        if not self.expand or self.opset < FIRST_PAD or len(varying(array)) != 1 or any(map(self.facts.zero_points.get, names)):
            return None
        axis, = varying(array)
        tiling, rank = Tiling.of(array.reshape(-1)), array.ndim
        site = Site(axis, tiling, any(self.dynamic_axis(at, axis) for at in positions), ordered)
        both = tiling.plain or (tiling.times > 1 and tiling.each > 1)
        behind = any(self.dynamic_axis(at, other) for at in positions for other in range(axis + 1, rank))
        fits = all(self.rank(at) >= rank - axis and self.shape(at)[axis - rank] == array.shape[axis] for at in positions)
        return site if fits and not (site.open and both) and not (site.split and behind) else None

    def keep_shared(self, position: int, axis: int) -> None:
        """An axis of a constant meets nothing that can shrink here: other uses of it must not shrink it either."""
        if self.node.inputs[position] in self.shared_constants:
            self.fix_input(position, (axis,), STIFF)

    def pin_input(self, position: int, reason: str) -> None:
        """State that all of an input is needed, and that nothing of it passes."""
        if self.has(position) and not self.is_constant(position) and self.labels(position):
            if self.expand:
                self.whole([position], range(self.rank(position)), reason, passes=False)
            else:
                for array in self.labels(position):
                    self.pin(array, reason)

    def choose(self, *options: Sequence[TiePair]) -> None:
        """One of these sets of ties must hold."""
        self.facts.choices.append(Choice(self.node, tuple(tuple(option) for option in options)))

    def layer(
        self, macs: float, extents: Sequence[IntArray | None], reads: Reads, writes: Writes, linear: Linear | None = None, grouped: str = ""
    ) -> None:
        """State a mixing layer; ``macs`` for the traced run, proportional to the sizes of the label arrays in ``extents``;
        ``linear`` if its constant weight can be re-fitted; ``grouped``: the attribute with its number of groups."""
        present = tuple(array for array in extents if array is not None)
        self.facts.layers.append(LayerFact(self.node, macs, present, self.is_weight(writes.weight), reads, writes, linear, grouped))

    def additive(self, *positions: int, shift: int | None = None, varies: Sequence[int] = ()) -> None:
        """State that output 0 is affine in each of these inputs, element by element, whatever the others are, with a factor that
        varies along the axes ``varies`` of the output; input ``shift`` is a constant that is simply added."""
        self.facts.additive[self.node.index] = Additive(positions, shift, tuple(varies))

    def zero_point(self, tensor: str) -> None:
        """State that a zero of output 0 is stored as the value of ``tensor`` (quantised integers), or as 0 (an empty name)."""
        self.facts.zero_points[self.node.outputs[0]] = tensor

    def mask_input(self, position: int) -> None:
        """State that the node itself reads a removed channel again through this constant (the recurrence of an LSTM), so that
        masking its outputs is not enough: the constant is masked too."""
        self.facts.masked_inputs.append((self.node.index, position))

    def follow(self, edits: Callable[[After], Sequence[Edit]]) -> None:
        """State that constants or attributes of this node are recomputed after the cut."""
        self.facts.follows.append(Follow(self.node.index, edits))

    # ---- meeting element by element ----------------------------------------------------------------------------------

    def merge(self, operands: Sequence[Operand], reason: str = STIFF) -> Labels:
        """Labels of a broadcasting element-wise meeting of operands of one common rank.

        Label arrays that share an axis are tied element by element. An operand that has the full size of such an axis but no
        labels there is gathered to the kept indices if it may be, else it keeps the axis from shrinking (``reason``); one of size 1 is
        broadcast and asks for nothing.
        """
        pool = [Member(array, which) for which, operand in enumerate(operands) for array in operand.labels if varying(array)]
        merged = []
        while pool:
            axes = set(varying(pool[0][0]))
            cluster: list[Member] = []
            while True:
                joined = [item for item in pool if axes & set(varying(item[0]))]
                if len(joined) == len(cluster):
                    break
                cluster = joined
                axes = {axis for array, _ in cluster for axis in varying(array)}
            members = {id(array) for array, _ in cluster}
            pool = [item for item in pool if id(item[0]) not in members]
            merged += self._meet(cluster, sorted(axes), operands, reason)
        return keep_varying(merged)

    def _meet(self, cluster: Sequence[Member], axes: list[int], operands: Sequence[Operand], reason: str) -> list[IntArray]:
        """Tie arrays that share axes; returns one of them, or none if an operand keeps all these axes."""
        arrays, present = tuple(array for array, _ in cluster), [which for _, which in cluster]
        like = {axis: operands[which] for array, which in cluster for axis in varying(array)}
        if len(present) != len(set(present)):
            for array in arrays:
                self.pin(array, "two independent channel axes of one operand meet here")
            return []
        for which, operand in enumerate(operands):
            if which not in present:
                stiff = [axis for axis in axes if operand.shape[axis] > 1 and not self._select(operand, axis, like[axis])]
                arrays = self._kept_whole(cluster, stiff, operands, reason) if stiff else arrays
        if not arrays:
            return []
        result = min(arrays, key=lambda array: array.size)
        for array in arrays:
            self.tie(result, array)
        return [result]

    def _kept_whole(
        self, cluster: Sequence[Member], stiff: Sequence[int], operands: Sequence[Operand], reason: str
    ) -> tuple[IntArray, ...]:  # fmt: skip
        """Arrays of inputs that get all channels again along axes which meet a tensor that cannot shrink: nothing of these passes."""
        left: list[IntArray] = []
        for array, which in cluster:
            position, axes = operands[which].position, operands[which].axes
            along = [axes[axis] for axis in stiff if axes and array.shape[axis] > 1]
            if not self.expand or position < 0 or varying(array) != tuple(stiff) or -1 in along or self.is_constant(position):
                left += self.fix_axes((array,), stiff, reason)
            else:
                inner = tuple(other for other in self.labels(position) if along[0] in varying(other))
                self.whole([position], along, reason, inner, passes=False)
        return tuple(left)

    def _select(self, operand: Operand, axis: int, like: Operand) -> bool:
        """Have an operand without labels gathered to the indices that another keeps along an axis, if both may be and the axis has one
        size in all runs."""
        if min(operand.position, like.position, *(one.axes[axis] if one.axes else -1 for one in (operand, like))) < 0:
            return False
        at, other = operand.axes[axis], like.axes[axis]
        if any(self.dynamic_axis(one.position, one.axes[axis]) for one in (operand, like)):
            return False

        def edits(after: After) -> list[Edit]:
            keep = after.input_keep(like.position, other)
            return [] if keep.all() else [InsertBefore(operand.position, "Gather", (np.flatnonzero(keep),), {"axis": at}, True)]

        self.follow(edits)
        return True
