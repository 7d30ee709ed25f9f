"""Which part of a graph depends on a group, and what leads into it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ... import graph
from ...core.types import Array, Coupling, Group, IntArray, Node
from ...graph import CAPTURED, GraphIndex, Prepared, initializers
from ...graph.edit import Editor, insert_mask
from ...rules.registry import Trait, has


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
    index, constants = prepared.index, set(initializers(prepared.model))
    inputs = tuple(port.name for port in graph.inputs(prepared.model))
    moving = {name for node in index.reached(inputs) for name in node.outputs}  # not weights that are computed
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
        sites = [site for site in sites if site[0] in coupling.masked_inputs or (site[0] in moving and _reads_across(index, site[0]))]
        names = {name for name, _, _ in sites}
        behind = index.reached(names)
        changed = {name for node in behind for name in node.outputs}
        outputs = tuple(port.name for port in graph.outputs(prepared.model) if port.name in changed)
        feeds, nodes = (inputs, tuple(range(len(prepared.nodes)))) if whole else _entry(prepared, constants, behind, changed)
        found.append(Part(tuple(sites), feeds, outputs, nodes))
    return found


def _reads_across(index: GraphIndex, name: str) -> bool:
    """Whether a node reads the tensor that mixes channels: a mask behind that node would come too late."""
    return any(position == CAPTURED or not has(node, Trait.ALONE) for node, position in index.readers(name))


def _entry(
    prepared: Prepared, constants: Collection[str], behind: Sequence[Node], changed: Collection[str]
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Tensors that lead into a set of nodes, and the nodes to run. What depends on the shapes of the inputs, but not on their
    values, is computed again, for the number of rows may be another."""
    feeds: dict[str, None] = {}
    run = {node.index for node in behind}
    waiting = [name for node in behind for name in node.reads if name not in changed]
    while waiting:
        name = waiting.pop()
        again = name in prepared.trace.values and prepared.trace.dynamic_values[name].any()
        maker = prepared.index.maker(name)
        if again and maker is not None:
            if maker.index not in run:
                run.add(maker.index)
                waiting += [item for item in maker.reads if item not in changed]
        elif name not in constants:
            feeds[name] = None
    return tuple(sorted(feeds)), tuple(sorted(run))


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
