"""Which part of a graph depends on a group, and what leads into it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ... import graph
from ...core.types import Array, Coupling, Group, IntArray, Node
from ...graph.edit import Editor, insert_mask
from ...graph.model import Prepared, initializers
from ...rules.elementwise import channelwise


@dataclass(frozen=True)
class Part:
    """What is masked for a group, and what leads into the part of the graph behind it.

    ``masked`` are (tensor, axis, units); ``feeds`` the tensors to be fed; ``outputs`` those outputs of the model that change;
    ``nodes`` the nodes that are run.
    """

    masked: tuple[tuple[str, int, IntArray], ...]
    feeds: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[int, ...]


def parts(prepared: Prepared, coupling: Coupling, groups: Sequence[Group], whole: bool = False) -> list[Part]:
    """The part of the graph that a pull of each group runs; ``whole``: from the model's inputs."""
    looked = _Graph(prepared)
    inputs = tuple(port.name for port in graph.inputs(prepared.model))
    moving = {name for index in looked.behind(inputs) for name in prepared.nodes[index].outputs}  # not weights that are computed
    found = []
    for group in groups:
        own = np.zeros(coupling.units, bool)
        own[group.units] = True
        carriers = {**coupling.tensors, **coupling.masked_inputs}
        sites = [
            (name, item.axis, np.where((item.units >= 0) & own[np.maximum(item.units, 0)], item.units, -1))
            for name, channels in carriers.items()
            for item in channels
            if own[item.units[item.units >= 0]].any()
        ]
        sites = [site for site in sites if site[0] in coupling.masked_inputs or (site[0] in moving and looked.reads_across(site[0]))]
        names = {name for name, _, _ in sites}
        behind = looked.behind(names)
        changed = {name for index in behind for name in prepared.nodes[index].outputs}
        outputs = tuple(port.name for port in graph.outputs(prepared.model) if port.name in changed)
        feeds, nodes = (inputs, tuple(range(len(prepared.nodes)))) if whole else looked.entry(behind, changed)
        found.append(Part(tuple(sites), feeds, outputs, nodes))
    return found


class _Graph:
    """Who makes and who reads the tensors of a model."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.made_by = {name: node for node in prepared.nodes for name in node.outputs if name}
        self.readers: dict[str, list[Node]] = {}
        self.captured = {name for node in prepared.nodes for name in node.captures}
        for node in prepared.nodes:
            for name in {*node.inputs, *node.captures} - {""}:
                self.readers.setdefault(name, []).append(node)
        self.constants = set(initializers(prepared.model))

    def reads_across(self, name: str) -> bool:
        """Whether a node reads the tensor that mixes channels: a mask behind that node would come too late."""
        return name in self.captured or any(not channelwise(node) for node in self.readers.get(name, ()))

    def behind(self, names: Iterable[str]) -> list[int]:
        """Indices of the nodes that depend on any of the tensors."""
        reached, found = set(names), []
        for node in self.prepared.nodes:
            if reached & {*node.inputs, *node.captures}:
                reached.update(name for name in node.outputs if name)
                found.append(node.index)
        return found

    def entry(self, behind: Sequence[int], changed: set[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Tensors that lead into a set of nodes, and the nodes to run. What depends on the shapes of the inputs, but not on their
        values, is computed again, for the number of rows may be another."""
        feeds: dict[str, None] = {}
        run = set(behind)
        waiting = [name for index in behind for name in self._read(index) if name not in changed]
        while waiting:
            name = waiting.pop()
            again = name in self.prepared.trace.values and self.prepared.trace.dynamic_values[name].any()
            if again and name in self.made_by:
                index = self.made_by[name].index
                if index not in run:
                    run.add(index)
                    waiting += [item for item in self._read(index) if item not in changed]
            elif name not in self.constants:
                feeds[name] = None
        return tuple(sorted(feeds)), tuple(sorted(run))

    def _read(self, index: int) -> list[str]:
        node = self.prepared.nodes[index]
        return [name for name in (*node.inputs, *node.captures) if name]


def share(part: Part, coupling: Coupling) -> float:
    """Share of the model's multiply-accumulates that a pull of this part runs."""
    total = sum(layer.macs for layer in coupling.layers)
    own = set(part.nodes)
    return sum(layer.macs for layer in coupling.layers if layer.node.index in own) / total if total else 1.0


# ---- masks as inputs of a graph --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Mask:
    """A mask input: index i of ``axis`` belongs to unit ``units[i]``. ``rank`` is that of the tensor; ``rows``: axis 0 is the batch."""

    name: str
    units: IntArray
    axis: int
    rank: int
    dtype: np.dtype[Any]
    rows: bool

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


def put(editor: Editor, tensor: str, dtype: np.dtype[Any], zero: Array | str | None, mask: Mask) -> Mask:
    """Insert a mask input behind a tensor; returns the mask with its name and type."""
    made: list[tuple[str, np.dtype[Any]]] = []

    def operand(wanted: Any) -> Any:
        variable = editor.variable(f"{tensor}/mask")
        made.append((variable.name, np.dtype(wanted)))
        return variable

    insert_mask(editor, tensor, dtype, operand, zero)
    return replace(mask, name=made[0][0], dtype=made[0][1])


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
