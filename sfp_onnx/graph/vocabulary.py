"""Tables that are looked up by numbers from outside (embeddings of words): only some rows are kept, and a map from old numbers to new ones
stands in front, so that inputs stay what they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..core.types import Array, IntArray, Node
from . import Constants, GraphIndex, Model, initializers, inputs, nodes
from .edit import Editor

AS_THEY_ARE = ("Cast", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze")  # what may stand between an input and a lookup
PLACE_BYTES = 4  # of an entry of the map


class Table(NamedTuple):
    """An initializer (rows, ...) whose rows are looked up, only by these nodes, by what an input of the model holds (``numbers``)."""

    name: str
    shape: tuple[int, ...]
    itemsize: int
    numbers: str
    lookups: tuple[Node, ...]

    def saved(self, kept: int) -> int:
        """Bytes that are saved if so many rows are left; negative: the map takes more."""
        return (self.shape[0] - kept) * int(np.prod(self.shape[1:])) * self.itemsize - PLACE_BYTES * self.shape[0]


def tables(model: Model) -> list[Table]:
    """All such tables of a model."""
    index, ports, found = GraphIndex(nodes(model)), {port.name for port in inputs(model)}, []
    for name, held in initializers(model).items():
        lookups = _lookups(index, name, name) if len(held.shape) > 1 and name not in ports else []
        numbers = {_source(index, node.inputs[1]) for node in lookups or ()}
        if lookups and len(numbers) == 1 and numbers <= ports:
            found.append(Table(name, held.shape, held.dtype.itemsize, numbers.pop(), tuple(lookups)))
    return found


def _lookups(index: GraphIndex, name: str, value: str) -> list[Node] | None:
    """The nodes that look up rows of a table, or of what a Cast makes of it; None: something else reads it."""
    found = list[Node]()
    for node, position in index.readers(value):
        if node.operator == "Gather" and position == 0 and node.attributes.get("axis", 0) == 0:
            found.append(node)
            continue
        behind = _lookups(index, name, node.outputs[0]) if node.operator == "Cast" and position == 0 else None
        if behind is None:
            return None
        found += behind
    return found


def _source(index: GraphIndex, name: str) -> str:
    """The tensor that numbers come from."""
    maker = index.maker(name)
    while maker is not None and maker.operator in AS_THEY_ARE:
        name = maker.inputs[0]
        maker = index.maker(name)
    return name


def shrinking(model: Model, rows: Mapping[str, IntArray]) -> list[Table]:
    """The tables that become smaller if of the numbers of each input only these are kept, besides one for all others."""
    return [table for table in tables(model) if table.numbers in rows and table.saved(1 + _count(table, rows[table.numbers])) > 0]


def _count(table: Table, kept: IntArray) -> int:
    return int((kept < table.shape[0]).sum())


def with_rows(model: Model, rows: Mapping[str, IntArray], unknown: int | None = None) -> Model:
    """The model whose tables have the rows of these numbers (by input, in order), and one for all others: that of the number ``unknown``,
    or the mean of those that leave."""
    found = shrinking(model, rows)
    if not found:
        return model
    editor, held = Editor(model), Constants(model)
    for table in found:
        value, kept = held[table.name], rows[table.numbers][: _count(table, rows[table.numbers])]
        places, small = _shrunk(value, kept, unknown)
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


def numbers_in(batches: Sequence[Array], rows: int) -> IntArray:
    """The numbers, from 0, that these arrays hold, in order; those below 0 count from the end of so many ``rows``."""
    found = [np.unique(array.astype(np.int64)) for array in batches]
    every = np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)
    return np.unique(np.where(every < 0, every + rows, every))
