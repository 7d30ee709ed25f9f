"""Pulling arms fast: what the outputs become when one unit is masked, for many units and few images.

The masks are inputs of the graph, one row per sample, so that one run serves many arms. Only what lies behind the masked group is run:
the tensors that lead into that part are computed once for a block of images and kept. All sessions are opened before the first pull.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from ... import graph
from ...core.errors import ModelError
from ...core.types import Array, Coupling, Group, IntArray, Port
from ...graph import Constants, Prepared, serialized
from ...graph.edit import QUANTIZED, Editor, zero_of
from ...graph.extract import segment
from ...runtime import Optimize, Session, open_session
from .parts import Mask, Part, parts, put, shape_of, spread

ROWS = 1024  # rows in one run at most: small models gain by sharing a run (an MLP 4 times the pulls),
CACHED = 4 * 2**20  # but no more than what leads into them in so many bytes: beyond the processor's cache, sharing costs
FEW_ROWS = 32  # so many rows share a run in any case, if the memory allows
TILED = 0.25  # share of the memory
COPIES = 2  # arms in the trial run that tells whether a section may be tiled


@dataclass(frozen=True)
class Block:
    """Images that one pull looks at. ``feeds`` may hold more rows than ``count`` (padding to a fixed batch)."""

    feeds: Mapping[str, Array]
    count: int
    labels: IntArray | None = None

    @property
    def rows(self) -> int:
        """Rows of the feeds."""
        return len(next(iter(self.feeds.values())))


@dataclass(frozen=True)
class Running:
    """How to run: ``memory`` bounds the kept activations (bytes); ``whole`` runs the whole model at every pull (for comparison).

    With ``optimize`` ALL, onnxruntime adds up a residual in another order in a part of a graph than in the whole (its blocked layout),
    so that the two agree to rounding; with BASIC they agree bit for bit, at two thirds of the speed.
    """

    memory: float = 2**30
    whole: bool = False
    optimize: Optimize = Optimize.ALL


@dataclass
class _Section:
    """An open session for one group. ``tiled``: one run serves several arms."""

    part: Part
    session: Session
    masks: tuple[Mask, ...]
    tiled: bool


class _Cache:
    """Tensors by (name, block), the least recently used thrown out beyond ``limit`` bytes."""

    def __init__(self, limit: float) -> None:
        self.limit, self.held, self.bytes = limit, OrderedDict[tuple[str, int], Array](), 0

    def get(self, key: tuple[str, int]) -> Array | None:
        if key in self.held:
            self.held.move_to_end(key)
        return self.held.get(key)

    def put(self, key: tuple[str, int], array: Array) -> None:
        self.bytes += array.nbytes - (self.held.pop(key).nbytes if key in self.held else 0)
        self.held[key] = array
        while self.bytes > self.limit and len(self.held) > 1:
            self.bytes -= self.held.popitem(last=False)[1].nbytes


class Pulls:
    """Masks units of some groups, one at a time, on blocks of images.

    Attributes:
        arms: the unit of every arm, group by group.
        owner: the group of every arm (position in ``groups``).
        references: the model's outputs per block, one row per image (the whole output as one row where axis 0 is not the batch).
        forwards: runs of the whole model so far, to fill the cache.
    """

    def __init__(
        self, prepared: Prepared, coupling: Coupling, groups: Sequence[Group], blocks: Sequence[Block],
        how: Running | None = None,
    ) -> None:  # fmt: skip
        """Open all sessions.

        Raises:
            ModelError: onnxruntime cannot run the model on the images.
        """
        self.prepared, self.blocks, self.coupling = prepared, blocks, coupling
        self.how = how or Running()
        self.arms: IntArray = np.concatenate([group.units for group in groups])
        self.owner: IntArray = np.repeat(np.arange(len(groups)), [group.width for group in groups])
        self.names = [port.name for port in graph.outputs(prepared.model)]
        self.types = prepared.types
        self.samples = next(iter(prepared.feeds.values())).shape[0] if prepared.feeds else 1
        found = [self._cacheable(part, own) for part, own in zip(
            parts(prepared, coupling, groups, self.how.whole), parts(prepared, coupling, groups, True), strict=True)]  # fmt: skip
        inputs = {port.name for port in graph.inputs(prepared.model)}
        self.kept = sorted({name for part in found for name in part.feeds} - inputs)
        self.cache, self.forwards = _Cache(self.how.memory), 0
        self.prefix = self._open_prefix()
        self.all_fit = True
        self.raw: list[list[Array]] = []
        self._look()
        self.references = [self._rows(outputs, block) for outputs, block in zip(self.raw, blocks, strict=True)]
        self.sections = [self._section(part) for part in found]
        self._tiles: tuple[tuple[int, int, int], dict[str, Array]] | None = None

    # ---- before the first pull -----------------------------------------------------------------------------------

    def _cacheable(self, part: Part, whole: Part) -> Part:
        """Sequences and other values that are no tensors cannot be kept: such a group runs the whole model."""
        return whole if any(self.types.get(name, np.float32) is None for name in part.feeds) else part

    def _open_prefix(self) -> Session:
        editor = Editor(self.prepared.model)
        for name in self.kept:
            editor.add_output(editor.tensor(name))
        model = editor.finish()
        return open_session(serialized(model), model.weights, self.prepared.model.name, self.how.optimize)

    def _look(self) -> None:
        """Run every block once through the unmasked model; keep the inner tensors if those of all blocks fit."""
        for index, block in enumerate(self.blocks):
            results = self.prefix.run(block.feeds, [*self.names, *self.kept])
            self.forwards += 1
            self.raw.append(results[: len(self.names)])
            inner = results[len(self.names) :]
            if index == 0:
                self.sizes = {name: (array.dtype, array.shape) for name, array in zip(self.kept, inner, strict=True)}
                self.all_fit = sum(array.nbytes for array in inner) * len(self.blocks) <= self.how.memory
            if self.all_fit:
                for name, array in zip(self.kept, inner, strict=True):
                    self.cache.put((name, index), array)

    def _is_batch(self, name: str) -> bool:
        """Whether axis 0 of a tensor is the batch."""
        trace = self.prepared.trace
        shape = trace.shapes.get(name, ())
        dynamic = any(0 in trace.dynamic_axes.get(item, ()) for item in self.prepared.feeds)
        return bool(shape) and shape[0] == self.samples and (not dynamic or 0 in trace.dynamic_axes.get(name, ()))

    def _is_fixed(self, name: str) -> bool:
        """Whether a tensor is the same for all images and any number of them."""
        trace = self.prepared.trace
        return name in trace.values and not trace.dynamic_values[name].any()

    def _section(self, part: Part) -> _Section:
        dtypes = {name: np.dtype(self.types.get(name) or np.float32) for name, _, _ in part.masked}
        by_rows = all(self._is_batch(name) or self._is_fixed(name) for name in (*part.feeds, *part.outputs))
        by_rows &= all(self._is_batch(name) for name, _, _ in part.masked) and all(axis for _, axis, _ in part.masked)
        section = self._opened(part, dtypes, by_rows)
        if by_rows and not self._agrees(section):
            section = self._opened(part, dtypes, False)
        return section

    def _opened(self, part: Part, dtypes: Mapping[str, np.dtype[Any]], by_rows: bool) -> _Section:
        if not part.outputs:
            return _Section(part, self.prefix, (), False)  # the group reaches no output
        editor, masks = Editor(self.prepared.model), []
        points, constants = self.coupling.zero_points, Constants(self.prepared.model)
        for tensor, axis, units in part.masked:
            dtype = dtypes[tensor]
            point = points.get(tensor) if dtype.name in QUANTIZED else None
            if dtype.name in QUANTIZED and point is None:
                continue  # nothing there stands for zero; the tensors around it are masked
            zero = zero_of(constants, point, spread(self._rank(tensor), axis, len(units)))
            masks.append(put(editor, tensor, dtype, zero, Mask("", units, axis, self._rank(tensor), dtype, by_rows)))
        ports = [self._port(name) for name in part.feeds]
        ports += [Port(mask.name, mask.dtype, tuple(shape_of(mask))) for mask in masks]
        outputs = {name: np.dtype(self.raw[0][self.names.index(name)].dtype) for name in part.outputs}
        model = segment(editor.finish(), ports, outputs)
        used = {port.name for port in graph.inputs(model)}
        session = open_session(serialized(model), model.weights, self.prepared.model.name, self.how.optimize)
        return _Section(_needed(part, used), session, tuple(mask for mask in masks if mask.name in used), by_rows)

    def _rank(self, tensor: str) -> int:
        return len(self.prepared.trace.shapes[tensor])

    def _port(self, name: str) -> Port:
        """A tensor that is fed; the batch is a name, other sizes are those of the images."""
        dtype, shape = self.sizes.get(name) or _described(self.blocks[0].feeds[name])
        open_axes = self.prepared.trace.dynamic_axes.get(name, ())
        sizes = [(f"{name}:{axis}" if axis else "batch") if axis in open_axes else size for axis, size in enumerate(shape)]
        return Port(name, dtype, tuple(sizes))

    def _agrees(self, section: _Section) -> bool:
        """Whether copies of a block side by side give the outputs of the block (a model may mix the rows of a batch)."""
        block, fixed = self.blocks[0], self._fixed
        copies = max(1, block.rows // block.count) if fixed else COPIES
        try:
            found = self._run(section, [-2] * copies, 0)
        except (ModelError, ValueError):
            return False
        expected = [self.raw[0][self.names.index(name)][: block.count] for name in section.part.outputs]
        pairs = [(own.reshape(-1), np.tile(array, (copies, *[1] * (array.ndim - 1))).reshape(-1))
                 for own, array in zip(found, expected, strict=True)]  # fmt: skip
        return all(own.shape == other.shape and np.allclose(own, other, rtol=1e-3, atol=1e-4, equal_nan=True) for own, other in pairs)

    @property
    def _fixed(self) -> bool:
        """Whether the number of rows cannot change."""
        return not any(0 in self.prepared.trace.dynamic_axes.get(name, ()) for name in self.prepared.feeds)

    # ---- pulling -------------------------------------------------------------------------------------------------

    def width(self, arm: int, most: int = ROWS) -> int:
        """How many arms of the group of ``arm`` one run serves."""
        block = self.blocks[0]
        if not self.sections[int(self.owner[arm])].tiled:
            return 1
        if self._fixed:
            return max(1, block.rows // block.count)
        feeds = self.sections[int(self.owner[arm])].part.feeds
        described = [self.sizes.get(name) or _described(block.feeds[name]) for name in feeds]
        row: int = sum(dtype.itemsize * int(np.prod(shape[1:])) for dtype, shape in described)
        cached = max(FEW_ROWS, CACHED // max(row, 1))
        bound = int(self.how.memory * TILED / max(row, 1))
        return max(1, min(most, cached, bound) // block.count)

    def runs(self, arms: IntArray, rows: int = ROWS) -> list[IntArray]:
        """Arms (ascending) split into runs."""
        found = []
        for _, own in groupby(arms.tolist(), key=lambda arm: self.owner[arm]):
            listed = list(own)
            step = self.width(listed[0], rows)
            found += [np.array(listed[start : start + step]) for start in range(0, len(listed), step)]
        return found

    def outputs(self, arms: IntArray, block: int) -> list[list[Array]]:
        """The outputs with each of ``arms`` masked (all of one group, at most `width`), rows as in ``references``."""
        section = self.sections[int(self.owner[arms[0]])]
        own = self.blocks[block]
        results = dict(zip(section.part.outputs, self._run(section, [int(self.arms[arm]) for arm in arms], block), strict=True))
        found = []
        for place in range(len(arms)):
            masked = []
            for index, name in enumerate(self.names):
                if name not in results:
                    masked.append(self.references[block][index])
                elif section.tiled:
                    masked.append(results[name][place * own.count : (place + 1) * own.count])
                else:
                    masked.append(self._row(name, results[name], own))
            found.append(masked)
        return found

    def _run(self, section: _Section, units: Sequence[int], block: int) -> list[Array]:
        own = self.blocks[block]
        feeds = dict(self._inputs(section, len(units), block))
        total = own.rows if self._fixed or not section.tiled else len(units) * own.count
        for mask in section.masks:
            feeds[mask.name] = mask.values(units, own.count, total)
        return section.session.run(feeds, section.part.outputs)

    def _inputs(self, section: _Section, copies: int, block: int) -> Mapping[str, Array]:
        """What leads into a section, side by side for every arm of a run; the last one is kept for the next run."""
        key = (id(section), copies, block)
        tiles = getattr(self, "_tiles", None)
        if tiles is not None and tiles[0] == key:
            return dict(tiles[1])
        found = self._activations(section.part.feeds, block)
        own = self.blocks[block]
        if section.tiled and (copies > 1 or own.count < own.rows):
            found = {name: array if self._is_fixed(name) else self._tiled(array, copies, own) for name, array in found.items()}
        self._tiles = (key, found)
        return found

    def _tiled(self, array: Array, copies: int, block: Block) -> Array:
        tiled = np.concatenate([array[: block.count]] * copies)
        missing = block.rows - len(tiled) if self._fixed else 0
        return np.concatenate([tiled, np.repeat(tiled[-1:], missing, axis=0)]) if missing > 0 else tiled

    def _activations(self, names: Sequence[str], block: int) -> dict[str, Array]:
        feeds = self.blocks[block].feeds
        found = {name: feeds[name] if name in feeds else self.cache.get((name, block)) for name in names}
        missing = [name for name, array in found.items() if array is None]
        if missing:
            self.forwards += 1
            for name, array in zip(missing, self.prefix.run(feeds, missing), strict=True):
                found[name] = array
                self.cache.put((name, block), array)
        return {name: array for name, array in found.items() if array is not None}

    # ---- outputs -------------------------------------------------------------------------------------------------

    def _rows(self, outputs: Sequence[Array], block: Block) -> list[Array]:
        return [self._row(name, array, block) for name, array in zip(self.names, outputs, strict=True)]

    def _row(self, name: str, array: Array, block: Block) -> Array:
        """One row per image; the whole as one row per image where axis 0 is not the batch."""
        if self._is_batch(name) and len(array) == block.rows:
            return array[: block.count]
        return np.repeat(array.reshape(1, -1), block.count, axis=0)


def _described(array: Array) -> tuple[Any, tuple[int, ...]]:
    return array.dtype, array.shape


def _needed(part: Part, used: set[str]) -> Part:
    return Part(part.masked, tuple(name for name in part.feeds if name in used), part.outputs, part.nodes)
