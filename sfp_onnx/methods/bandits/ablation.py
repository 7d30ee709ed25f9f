"""Ablations, fast: what the outputs become when one set of coupled channels (a unit) is masked, for many units and few images.

The masks are inputs of the graph, one row per sample, so that one run serves many units. Only what lies behind the masked group is run:
the tensors that lead into that part are computed once for a block of images and kept. All sessions are opened before the first ablation.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ... import graph
from ...core.errors import ModelError
from ...core.types import Array, Coupling, Group, IntArray, Node, Port
from ...data.layout import traced_samples
from ...graph import edit, extract
from ...rules.registry import Trait, has
from ...runtime import Optimize, Session, open_model

ROWS = 1024  # rows in one run at most: small models gain by sharing a run (an MLP 4 times the ablations),
CACHED = 4 * 2**20  # but no more than what leads into them in so many bytes: beyond the processor's cache, sharing costs
FEW_ROWS = 32  # so many rows share a run in any case, if the memory allows
TILED = 0.25  # share of the memory
COPIES = 2  # units in the trial run that tells whether a section may be tiled


# ---- which part of a graph depends on a group ------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """What is masked for a group, and what leads into the part of the graph behind it.

    ``masked`` are (tensor, axis, units); ``feeds`` the tensors to be fed; ``outputs`` those outputs of the model that change.
    """

    masked: tuple[tuple[str, int, IntArray], ...]
    feeds: tuple[str, ...]
    outputs: tuple[str, ...]


def parts(prepared: graph.Prepared, coupling: Coupling, groups: Sequence[Group]) -> list[Part]:
    """The part of the graph that an ablation of each group runs."""
    index, constants = prepared.index, set(graph.initializers(prepared.model))
    inputs = [port.name for port in graph.inputs(prepared.model)]
    moving = {name for node in index.reached(inputs) for name in node.outputs}  # not weights that are computed
    masked = {name: channels for name, channels in coupling.tensors.items() if name in moving and _reads_across(index, name)}
    carriers = [(name, item) for name, channels in {**masked, **coupling.masked_inputs}.items() for item in channels]
    listed = []
    for group in groups:
        inside = np.zeros(coupling.units + 1, bool)  # the last place stands for -1
        inside[group.units] = True
        sites = [(name, item.axis, np.where(inside[item.units], item.units, -1)) for name, item in carriers if inside[item.units].any()]
        behind = index.reached({name for name, _, _ in sites})
        changed = {name for node in behind for name in node.outputs}
        outputs = tuple(port.name for port in graph.outputs(prepared.model) if port.name in changed)
        listed.append(Part(tuple(sites), _entry(prepared, constants, behind, changed), outputs))
    return listed


def _reads_across(index: graph.GraphIndex, name: str) -> bool:
    """Whether a node reads the tensor that mixes channels: a mask behind that node would come too late."""
    return any(position == graph.CAPTURED or not has(node, Trait.ALONE) for node, position in index.readers(name))


def _entry(prepared: graph.Prepared, constants: Collection[str], behind: Sequence[Node], changed: Collection[str]) -> tuple[str, ...]:
    """Tensors that lead into a set of nodes. What depends on the shapes of the inputs, but not on their
    values, is computed again, for the number of rows may be another."""
    feeds, run = set[str](), {node.index for node in behind}
    waiting = [name for node in behind for name in node.reads if name not in changed]
    while waiting:
        name = waiting.pop()
        maker = prepared.index.maker(name)
        if maker is not None and name in prepared.trace.values and prepared.trace.dynamic_values[name].any():
            if maker.index not in run:
                run.add(maker.index)
                waiting += [item for item in maker.reads if item not in changed]
        elif name not in constants:
            feeds.add(name)
    return tuple(sorted(feeds))


# ---- masks as inputs of a graph --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mask:
    """A mask input: index i of the masked axis belongs to unit ``units[i]``. ``spread`` is the shape of one row, 1 but along that axis;
    ``rows``: axis 0 is the batch."""

    name: str
    units: IntArray
    spread: tuple[int, ...]
    dtype: np.dtype[Any]
    rows: bool

    def values(self, masked: Sequence[int], rows: int, total: int) -> Array:
        """0 where a unit is masked: ``rows`` rows for each of ``masked``, then ones up to ``total`` rows (one row if there are no rows)."""
        if not self.rows:
            return np.asarray(self.units != masked[0], self.dtype).reshape(self.spread)
        masks = np.ones((total, len(self.units)), self.dtype)
        for place, unit in enumerate(masked):
            masks[place * rows : (place + 1) * rows, self.units == unit] = 0
        return masks.reshape([total, *self.spread[1:]])


def put(editor: edit.Editor, tensor: str, dtype: np.dtype[Any], zero: Array | str | None) -> str:
    """Insert a mask input behind a tensor; returns its name. It is of the tensor's type, or bool where there is a ``zero`` point."""
    variable = editor.variable(f"{tensor}/mask")
    edit.insert_mask(editor, tensor, dtype, lambda wanted: variable, zero)
    return str(variable.name)


# ---- the engine ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Images that one ablation looks at. ``feeds`` hold ``padding`` rows to a fixed batch behind the ``count`` samples."""

    feeds: Mapping[str, Array]
    count: int
    labels: IntArray | None = None
    padding: int = 0

    @property
    def rows(self) -> int:
        """Rows of the feeds."""
        return self.count + self.padding


@dataclass(frozen=True)
class Running:
    """``memory`` bounds the kept activations (bytes); ``whole`` runs the whole model at every ablation (for comparison). With ``optimize``
    ALL, onnxruntime adds up a residual in another order in a part of a graph than in the whole (its blocked layout): they agree to
    rounding; with BASIC bit for bit, at two thirds of the speed."""

    memory: float = 2**30
    whole: bool = False
    optimize: Optimize = Optimize.ALL


@dataclass
class _Section:
    """An open session for one group. ``tiled``: one run serves several units."""

    part: Part
    session: Session
    masks: tuple[Mask, ...]
    tiled: bool


class _Cache:
    """Tensors by (name, block), the least recently used thrown out beyond ``limit`` bytes."""

    def __init__(self, limit: float) -> None:
        self.limit, self.bytes = limit, 0
        self.held: dict[tuple[str, int], Array] = {}  # the least recently used first

    def get(self, name: str, block: int) -> Array | None:
        if (name, block) in self.held:
            self.held[name, block] = self.held.pop((name, block))
        return self.held.get((name, block))

    def put(self, name: str, block: int, array: Array) -> None:
        """Keep a tensor that is not there yet."""
        self.bytes += array.nbytes
        self.held[name, block] = array
        while self.bytes > self.limit and len(self.held) > 1:
            self.bytes -= self.held.pop(next(iter(self.held))).nbytes


class Ablations:
    """Masks units of some groups, one at a time, on blocks of images. Units are given by their places 0, 1, ... in ``units``.

    Attributes:
        units: all units of the groups, group by group.
        owner: the group of each of them (position in ``groups``).
        references: the model's outputs per block, one row per image (the whole output as one row where axis 0 is not the batch).
        forwards: runs of the whole model so far, to fill the cache.
    """

    def __init__(
        self, prepared: graph.Prepared, coupling: Coupling, groups: Sequence[Group], blocks: Sequence[Block], how: Running | None = None
    ) -> None:
        """Open all sessions.

        Raises:
            ModelError: onnxruntime cannot run the model on the images.
        """
        self.prepared, self.trace, self.blocks, self.coupling = prepared, prepared.trace, blocks, coupling
        self.how = how or Running()
        self.units: IntArray = np.concatenate([group.units for group in groups])
        self.owner: IntArray = np.repeat(np.arange(len(groups)), [group.width for group in groups])
        self.names = [port.name for port in graph.outputs(prepared.model)]
        self.samples = traced_samples(graph.inputs(prepared.model), {name: array.shape for name, array in prepared.feeds.items()})
        inputs = tuple(port.name for port in graph.inputs(prepared.model))
        # sequences and the like cannot be kept: such a group runs the whole model
        odd, each = {name for name, dtype in prepared.types.items() if dtype is None}, parts(prepared, coupling, groups)
        run = [replace(part, feeds=inputs) if self.how.whole or odd & set(part.feeds) else part for part in each]
        self.kept = sorted({name for part in run for name in part.feeds}.difference(inputs))
        self.cache, self.forwards = _Cache(self.how.memory), 0
        self.fixed = not any(0 in prepared.trace.dynamic_axes.get(name, ()) for name in prepared.feeds)  # the number of rows
        self.references: list[list[Array]] = []
        self._look()
        self._tiles: tuple[tuple[int, ...], dict[str, Array]] = ((), {})
        self.sections = [self._section(part) for part in run]

    # ---- before the first ablation -----------------------------------------------------------------------------------

    def _look(self) -> None:
        """Run every block once through the unmasked model; keep the inner tensors if those of all blocks fit."""
        editor = edit.Editor(self.prepared.model)
        for name in self.kept:
            editor.add_output(editor.tensor(name))
        self.prefix = open_model(editor.finish(), self.how.optimize)
        for index, block in enumerate(self.blocks):
            results = self.prefix.run(block.feeds, [*self.names, *self.kept])
            self.forwards += 1
            raw, inner = results[: len(self.names)], results[len(self.names) :]
            self.references.append([self._row(name, array, block) for name, array in zip(self.names, raw, strict=True)])
            if index == 0:
                self.raw = dict(zip(self.names, raw, strict=True))
                tensors = {**block.feeds, **dict(zip(self.kept, inner, strict=True))}
                self.sizes = {name: (array.dtype, array.shape) for name, array in tensors.items()}
                fit = sum(array.nbytes for array in inner) * len(self.blocks) <= self.how.memory
            if fit:
                for name, array in zip(self.kept, inner, strict=True):
                    self.cache.put(name, index, array)

    def _is_batch(self, name: str) -> bool:
        """Whether axis 0 of a tensor is the batch."""
        shape = self.trace.shapes.get(name, ())
        return bool(shape) and shape[0] == self.samples and (self.fixed or 0 in self.trace.dynamic_axes.get(name, ()))

    def _is_fixed(self, name: str) -> bool:
        """Whether a tensor is the same for all images and any number of them."""
        return name in self.trace.values and not self.trace.dynamic_values[name].any()

    def _section(self, part: Part) -> _Section:
        by_rows = all(self._is_batch(name) or self._is_fixed(name) for name in (*part.feeds, *part.outputs))
        by_rows &= all(self._is_batch(name) for name, _, _ in part.masked) and all(axis for _, axis, _ in part.masked)
        section = self._opened(part, by_rows)
        return section if not by_rows or self._agrees(section) else self._opened(part, False)

    def _opened(self, part: Part, by_rows: bool) -> _Section:
        if not part.outputs:
            return _Section(part, self.prefix, (), False)  # the group reaches no output
        editor, masks = edit.Editor(self.prepared.model), []
        points, constants = self.coupling.zero_points, graph.Constants(self.prepared.model)
        for tensor, axis, units in part.masked:
            dtype = np.dtype(self.prepared.types.get(tensor) or np.float32)
            point = points.get(tensor) if dtype.name in edit.QUANTIZED else None
            if dtype.name in edit.QUANTIZED and point is None:
                continue  # nothing there stands for zero; the tensors around it are masked
            spread = tuple(len(units) if other == axis else 1 for other in range(len(self.prepared.trace.shapes[tensor])))
            name = put(editor, tensor, dtype, edit.zero_of(constants, point, spread))
            masks.append(Mask(name, units, spread, dtype if point is None else np.dtype(bool), by_rows))
        ports = [Port(mask.name, mask.dtype, ("batch", *mask.spread[1:]) if by_rows else mask.spread) for mask in masks]
        ports = [*map(self._port, part.feeds), *ports]
        model = extract.segment(editor.finish(), ports, {name: np.dtype(self.raw[name].dtype) for name in part.outputs})
        used = {port.name for port in graph.inputs(model)}
        needed = replace(part, feeds=tuple(name for name in part.feeds if name in used))
        return _Section(needed, open_model(model, self.how.optimize), tuple(mask for mask in masks if mask.name in used), by_rows)

    def _port(self, name: str) -> Port:
        """A tensor that is fed; the batch is a name, other sizes are those of the images."""
        dtype, shape = self.sizes[name]
        open_axes = self.prepared.trace.dynamic_axes.get(name, ())
        sizes = [(f"{name}:{axis}" if axis else "batch") if axis in open_axes else size for axis, size in enumerate(shape)]
        return Port(name, dtype, tuple(sizes))

    def _agrees(self, section: _Section) -> bool:
        """Whether copies of a block side by side give the outputs of the block (a model may mix the rows of a batch)."""
        block = self.blocks[0]
        copies = max(1, block.rows // block.count) if self.fixed else COPIES
        try:
            results = self._run(section, [-2] * copies, 0)
        except (ModelError, ValueError):
            return False
        tiles = [np.concatenate([self.raw[name][: block.count]] * copies) for name in section.part.outputs]
        pairs = zip(results, tiles, strict=True)
        return all(one.size == other.size and np.allclose(one.ravel(), other.ravel(), 1e-3, 1e-4, equal_nan=True) for one, other in pairs)

    # ---- the ablations -----------------------------------------------------------------------------------------------

    def width(self, place: int) -> int:
        """How many units of the group of this one a run serves."""
        block, section = self.blocks[0], self.sections[int(self.owner[place])]
        if not section.tiled:
            return 1
        if self.fixed:
            return max(1, block.rows // block.count)
        sizes = (self.sizes[name] for name in section.part.feeds)
        row: int = max(1, sum(dtype.itemsize * int(np.prod(shape[1:])) for dtype, shape in sizes))
        return max(1, min(ROWS, max(FEW_ROWS, CACHED // row), int(self.how.memory * TILED / row)) // block.count)

    def runs(self, places: IntArray) -> list[IntArray]:
        """Places (ascending) split into runs."""
        split: list[IntArray] = []
        for same in np.split(places, np.flatnonzero(np.diff(self.owner[places])) + 1):
            step = self.width(same[0])
            split += [same[start : start + step] for start in range(0, len(same), step)]
        return split

    def outputs(self, places: IntArray, block: int) -> list[list[Array]]:
        """The outputs with each of these units masked (all of one group, at most `width`), rows as in ``references``."""
        section, images = self.sections[int(self.owner[places[0]])], self.blocks[block]
        given = zip(section.part.outputs, self._run(section, self.units[places].tolist(), block), strict=True)
        results = {name: array if section.tiled else self._row(name, array, images) for name, array in given}
        known = dict(zip(self.names, self.references[block], strict=True))
        spans = [slice(place * images.count, (place + 1) * images.count) for place in range(len(places))]
        return [[results[name][span] if name in results else known[name] for name in self.names] for span in spans]

    def _run(self, section: _Section, units: Sequence[int], block: int) -> list[Array]:
        images = self.blocks[block]
        total = images.rows if self.fixed or not section.tiled else len(units) * images.count
        masks = {mask.name: mask.values(units, images.count, total) for mask in section.masks}
        return section.session.run({**self._inputs(section, len(units), block), **masks}, section.part.outputs)

    def _inputs(self, section: _Section, copies: int, block: int) -> Mapping[str, Array]:
        """What leads into a section, side by side for every unit of a run; the last one is kept for the next run."""
        key = (id(section), copies, block)
        if self._tiles[0] != key:
            feeds, images = self._activations(section.part.feeds, block), self.blocks[block]
            if section.tiled and (copies > 1 or images.count < images.rows):
                feeds = {name: array if self._is_fixed(name) else self._tiled(array, copies, images) for name, array in feeds.items()}
            self._tiles = (key, feeds)
        return self._tiles[1]

    def _tiled(self, array: Array, copies: int, block: Block) -> Array:
        tiled = np.concatenate([array[: block.count]] * copies)
        missing = block.rows - len(tiled) if self.fixed else 0
        return np.concatenate([tiled, np.repeat(tiled[-1:], missing, axis=0)]) if missing > 0 else tiled

    def _activations(self, names: Sequence[str], block: int) -> dict[str, Array]:
        feeds = self.blocks[block].feeds
        known = {name: feeds[name] if name in feeds else self.cache.get(name, block) for name in names}
        held = {name: array for name, array in known.items() if array is not None}
        if missing := [name for name in names if name not in held]:
            self.forwards += 1
            for name, array in zip(missing, self.prefix.run(feeds, missing), strict=True):
                held[name] = array
                self.cache.put(name, block, array)
        return held

    def _row(self, name: str, array: Array, block: Block) -> Array:
        """One row per image; the whole as one row per image where axis 0 is not the batch."""
        if self._is_batch(name) and len(array) == block.rows:
            return array[: block.count]
        return np.repeat(array.reshape(1, -1), block.count, axis=0)
