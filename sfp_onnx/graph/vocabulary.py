"""Tables that are looked up by numbers from outside (embeddings of words): only some rows are kept, and a map from old numbers to new ones
stands in front, so that inputs stay what they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import NamedTuple

import numpy as np

from ..core.types import Array, IntArray, Node
from . import Constants, GraphIndex, Model, initializers, inputs, nodes, outputs
from .edit import Editor

# What may stand between an input and a lookup: the same numbers, or some of them.
AS_THEY_ARE = ("Cast", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Expand")
WHOLE_NUMBERS = (6, 7)  # types that a Cast may make of them: int32 and int64 hold every number of a row
PLACE_BYTES = 4  # of an entry of the map


class Table(NamedTuple):
    """An initializer (rows, ...) whose rows are looked up, only by these nodes, by what inputs of the model hold (``numbers``)."""

    name: str
    shape: tuple[int, ...]
    itemsize: int
    numbers: tuple[str, ...]
    lookups: tuple[Node, ...]

    def saved(self, kept: int) -> int:
        """Bytes that are saved if so many rows are left; negative: the map takes more."""
        return (self.shape[0] - kept) * int(np.prod(self.shape[1:])) * self.itemsize - PLACE_BYTES * self.shape[0]

    def asked(self, rows: Mapping[str, IntArray]) -> bool:
        """Whether the numbers of all its inputs are told."""
        return rows.keys() >= set(self.numbers)

    def shrinks(self, rows: Mapping[str, IntArray]) -> bool:
        """Whether it becomes smaller if of the numbers of each input only these are kept, besides one for all others."""
        return self.asked(rows) and self.saved(1 + len(self.kept(rows))) > 0

    def kept(self, rows: Mapping[str, IntArray]) -> IntArray:
        """The rows, in order, that are looked up by these numbers of its inputs; those below 0 count from the end."""
        asked = np.unique(np.concatenate([rows[name] for name in self.numbers]))
        return np.unique(np.where(asked < 0, asked + self.shape[0], asked)[asked < self.shape[0]])


def tables(model: Model) -> list[Table]:
    """All such tables of a model."""
    index, ports, found = GraphIndex(nodes(model)), {port.name for port in inputs(model)}, []
    scalars = {name for name, held in initializers(model).items() if np.prod(held.shape) == 1}
    given = ports | {port.name for port in outputs(model)}  # whoever runs the model may set or read these
    for name, held in initializers(model).items():
        lookups = _lookups(index, name, given, scalars) if len(held.shape) > 1 else []
        numbers = {_source(index, node.inputs[1]) for node in lookups or ()}
        if lookups and numbers <= ports:
            found.append(Table(name, held.shape, held.dtype.itemsize, tuple(sorted(numbers)), tuple(lookups)))
    return found


def _lookups(index: GraphIndex, value: str, given: Set[str], scalars: Set[str]) -> list[Node] | None:
    """The nodes that look up rows of a table, or of what a Cast or one scale makes of it; None: something else reads it."""
    if value in given:
        return None
    found = list[Node]()
    for node, position in index.readers(value):
        if node.operator == "Gather" and position == 0 and node.attributes.get("axis", 0) == 0:
            found.append(node)
            continue
        alike = node.operator == "Cast" or (node.operator == "DequantizeLinear" and node.inputs[1] in scalars)
        behind = _lookups(index, node.outputs[0], given, scalars) if alike and position == 0 else None
        if behind is None:
            return None
        found += behind
    return found


def _source(index: GraphIndex, name: str) -> str:
    """The tensor that numbers come from."""
    maker = index.maker(name)
    while maker is not None and maker.operator in AS_THEY_ARE and maker.attributes.get("to", WHOLE_NUMBERS[0]) in WHOLE_NUMBERS:
        name = maker.inputs[0]
        maker = index.maker(name)
    return name


def shrinking(model: Model, rows: Mapping[str, IntArray]) -> list[Table]:
    """The tables that become smaller with these numbers."""
    return [table for table in tables(model) if table.shrinks(rows)]


def with_rows(model: Model, rows: Mapping[str, IntArray], unknown: int | None = None) -> Model:
    """The model whose tables have the rows of these numbers (by input, in order), and one for all others: that of the number ``unknown``,
    or the mean of those that leave."""
    found = shrinking(model, rows)
    if not found:
        return model
    editor, held = Editor(model), Constants(model)
    for table in found:
        places, small = _shrunk(held[table.name], table.kept(rows), unknown)
        editor.set_constant(table.name, small)
        places_name = editor.constant(f"{table.name}_places", places)
        for node in table.lookups:
            new = editor.insert_before(node.index, "Gather", [places_name, editor.input(node.index, 1)], {"axis": 0})
            editor.set_input(node.index, 1, new)
    return editor.finish()


def _shrunk(value: Array, kept: IntArray, unknown: int | None) -> tuple[Array, Array]:
    """New places of all rows of a table, and the rows that are left."""
    if unknown is not None and unknown < len(value):
        kept = np.union1d(kept, [unknown])
        other, rows = int(np.searchsorted(kept, unknown)), [value[kept]]
    else:
        left = np.delete(value, kept, 0).mean(0, dtype=np.float64)
        left = np.rint(left) if value.dtype.kind in "iu" else left
        other, rows = len(kept), [value[kept], left[None].astype(value.dtype)]
    places = np.full(len(value), other, np.int32)
    places[kept] = np.arange(len(kept))
    return places, np.ascontiguousarray(np.concatenate(rows))


def numbers_in(batches: Iterable[Array]) -> IntArray:
    """The numbers that these arrays hold, in order."""
    return np.unique(np.concatenate([np.unique(array.astype(np.int64)) for array in batches]))
