"""Run a model over many batches in segments: every node runs once, and what later nodes need is remembered between segments.

And what is re-fitted on the way: the constants that layers read, the steps that change them, and how a change gets into them.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import IO, Any, NamedTuple

import numpy as np

from ..core.errors import ModelError
from ..core.system import no_room
from ..core.types import Array, BoolArray, Factor, FloatArray, Linear, Port, Tokens
from ..graph import Constants, GraphIndex, Model, extract, inputs, nodes
from ..runtime import Session, open_model, tensor_types
from .linear import Sums, best_bias

REPEATS = 3  # segments in a row that are run again rather than remembered ...
GROWS, LARGE = 2, 2**29  # ... where what they make is so many times what they are made from, and more bytes than this (whatever the memory)


class Walk:
    """A model in the middle of a run over ``batches`` batches. ``overrides`` are constants that were changed on the way;
    they must not feed nodes that have run. ``tokens``: rows that an input may switch off."""

    def __init__(self, model: Model, store: Store, tokens: Tokens | None = None) -> None:
        self.model, self.store, self.batches = model, store, 0
        self._tokens, self._on = tokens, list[BoolArray]()
        self._repeated = 0  # segments in a row that the next one runs again
        self.index = GraphIndex(nodes(model))
        self.overrides: dict[str, Array] = {}
        self._types, self._values = tensor_types(model), Constants(model)
        self._constants, self._done = set(self._values), set[int]()
        self._live = {port.name for port in inputs(model)}
        self._varying = {*self._live, *(name for node in self.index.reached(self._live) for name in node.outputs)}
        self._before: tuple[set[int], set[str]] | None = None  # what was done and live, as long as a segment may have to be run again

    def feed(self, feeds: Mapping[str, Array]) -> None:
        """Remember the model's inputs of one more batch."""
        for name, array in feeds.items():
            if name in self._live:
                self.store.put((name, self.batches), array)
        if self._tokens is not None:
            self._on.append(self._tokens.on(feeds))
        self.batches += 1

    def rows(self, name: str, lead: Sequence[int], batch: int) -> BoolArray | None:
        """Which rows of a tensor are there (`Tokens.rows`)."""
        return None if self._tokens is None else self._tokens.rows(name, lead, self._on[batch])

    def constant(self, name: str) -> Array:
        """The present value of an initializer."""
        return self.overrides[name] if name in self.overrides else self._values[name]

    def is_tensor(self, name: str) -> bool:
        """Whether a name is an activation or input of the model."""
        return bool(name) and name not in self._constants

    def _is_done(self, name: str) -> bool:
        """Whether everything that reads a tensor has run."""
        return all(node.index in self._done for node, _ in self.index.readers(name))

    def advance(self, names: Collection[str]) -> Segment:
        """Run on until ``names`` are known. Run the segment once on every batch, then `finish` it.

        What it makes and later nodes read is remembered, and what no later node reads forgotten, a batch at a time; but where the former
        is large, and much more than it was made from, the next segment makes it again, which takes less time than to write and read it.
        """
        fresh = [node for node in self.index.needed(names, self._live) if node.index not in self._done]
        made_now = {name for node in fresh for name in node.outputs if name}
        inputs = sorted({name for node in fresh for name in node.reads} - self._constants - made_now)
        known = sorted(name for name in names if name not in made_now)
        self._before = self._done, self._live
        self._done = self._done | {node.index for node in fresh}
        lasting = {name for name in made_now if not self._is_done(name)}
        outputs = sorted(lasting | (made_now & set(names)))
        self._live = self._live | lasting
        ended = [name for name in self._live if self._is_done(name)]
        session = self.session(inputs, outputs)

        def run(batch: int) -> dict[str, Array]:
            fed = {name: self.store.get((name, batch)) for name in {*known, *inputs}}
            found = session.run({name: fed[name] for name in inputs}, outputs) if session else ()
            made = {name: np.asarray(array) for name, array in zip(outputs, found, strict=True)}
            if batch == 0:
                self._decide({name: made[name] for name in lasting}, ended)
            if self._before is None:
                for name in ended:  # first, so that what is made can have its place
                    self.store.drop((name, batch))
                for name in sorted(lasting):
                    self.store.put((name, batch), made[name])
            return {**{name: fed[name] for name in known}, **made}

        return run

    def _decide(self, lasting: Mapping[str, Array], ended: Sequence[str]) -> None:
        """Whether what later nodes read is remembered (then there is no way back to ``_before``), by its size in the first batch."""
        new, old = (sum(array.nbytes for array in arrays) for arrays in (lasting.values(), (self.store.get((name, 0)) for name in ended)))
        again = new > GROWS * old and self.batches * new > LARGE and self._repeated < REPEATS
        self._repeated = self._repeated + 1 if again else 0
        if not again:
            self._before = None

    def finish(self) -> None:
        """Go on, or back if the next segment makes it again; call it when a segment has run on every batch."""
        if self._before is not None and self.batches:
            self._done, self._live = self._before
        self._before = None
        for name in sorted(self._live):
            if self._is_done(name):
                self._live.discard(name)
                for batch in range(self.batches):
                    self.store.drop((name, batch))

    def until(self, position: int, targets: Iterable[str]) -> None:
        """Run on, on every batch, until what nodes from this position on read in order to make ``targets`` is known; not where that is no
        tensor. What does not depend on the model's inputs stays to be computed, since ``overrides`` may change it."""
        ahead = [node for node in self.index.needed(targets, self._live) if node.index >= position]
        made = {name for node in ahead for name in node.outputs}
        names = ({name for node in ahead for name in node.reads} & self._varying) - made - self._live
        if names and all(self._types.get(name) is not None for name in names):
            segment = self.advance(names)
            for batch in range(self.batches):
                segment(batch)
            self.finish()

    def run(self, targets: Collection[str]) -> Iterator[list[Array]]:
        """``targets`` of every batch, from what is known; nothing is remembered."""
        session, inputs = self.side((), targets)
        for batch in range(self.batches):
            yield session.run({name: self.store.get((name, batch)) for name in inputs}, list(targets)) if session else []

    def reads(self, given: Collection[str], targets: Collection[str]) -> list[str]:
        """What has to be known to compute ``targets`` from live tensors and ``given`` ones (also constants)."""
        nodes = self.index.needed(targets, {*given, *self._live})
        reads = {name for node in nodes for name in node.reads if name in given or name not in self._constants}
        return sorted(reads - {name for node in nodes for name in node.outputs})

    def side(self, given: Collection[str], targets: Collection[str]) -> tuple[Session | None, list[str]]:
        """A session that computes ``targets``, and what it reads, as `reads` has it."""
        inputs = self.reads(given, targets)
        return self.session(inputs, list(targets)), inputs

    def session(self, inputs: Sequence[str], outputs: Sequence[str]) -> Session | None:
        """A session that computes tensors from others; None if there are none."""
        if not outputs:
            return None
        unknown = [name for name in (*inputs, *outputs) if self._types.get(name) is None]
        if unknown:
            raise ModelError(f"{self.model.name}: the type of tensor '{unknown[0]}' is unknown, so the model cannot be run in segments")
        ports = [Port(name, self._types[name], None) for name in inputs]
        part = extract.segment(self.model, ports, {name: self._types[name] for name in outputs}, self.index)
        return open_model(extract.with_constants(part, self.overrides))


Segment = Callable[[int], dict[str, Array]]
"""Runs the nodes of a segment on a batch: the tensors that it makes (remembered as long as a later node reads them), and those that were
asked for and known already."""


# ---- arrays that a run must remember between segments ----------------------------------------------------------------


@dataclass
class Store:
    """Arrays by key: in memory up to ``budget`` bytes, then in a file (``_places``: offset, shape and dtype of each). The file has no name
    in the file system (where the system allows it), so that nothing is left behind, however the program ends; space of dropped arrays is
    used again."""

    budget: int
    used: int = 0
    spilled: int = 0
    _memory: dict[Hashable, Array] = field(default_factory=dict)
    _places: dict[Hashable, tuple[int, tuple[int, ...], np.dtype[Any]]] = field(default_factory=dict)
    _free: dict[int, list[int]] = field(default_factory=dict)
    _file: IO[bytes] | None = None

    def put(self, key: Hashable, array: Array) -> None:
        """Remember an array.

        Raises:
            OutputError: no room for the file.
        """
        if self.used + array.nbytes <= self.budget or array.dtype.hasobject:  # texts are no bytes for a file
            self.used += array.nbytes
            self._memory[key] = array
            return
        free = self._free.get(array.nbytes)
        offset = free.pop() if free else self.spilled
        self.spilled = max(self.spilled, offset + array.nbytes)
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="sfp_onnx", buffering=0)  # noqa: SIM115 - lives as long as the store
            self._file.seek(offset)
            left = memoryview(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise no_room(f"{self.spilled / 2**20:.0f} MiB of activations beyond --memory", error) from error
        self._places[key] = offset, array.shape, array.dtype

    def get(self, key: Hashable) -> Array:
        """An array that was put."""
        if key in self._memory:
            return self._memory[key]
        offset, shape, dtype = self._places[key]
        array = np.empty(shape, dtype)
        assert self._file is not None
        self._file.seek(offset)
        left = memoryview(array.data.cast("B") if array.size else b"")
        while left:
            left = left[self._file.readinto(left) :]  # type: ignore[attr-defined]
        return array

    def drop(self, key: Hashable) -> None:
        """Forget an array."""
        if key in self._memory:
            self.used -= self._memory.pop(key).nbytes
        elif key in self._places:
            offset, shape, dtype = self._places.pop(key)
            self._free.setdefault(int(np.prod(shape)) * dtype.itemsize, []).append(offset)

    def close(self) -> None:
        """Forget everything and remove the file."""
        self._memory.clear()
        if self._file is not None:
            self._file.close()


# ---- constants that layers read --------------------------------------------------------------------------------------

class Limits(NamedTuple):
    """Least and largest number, and whether there are whole numbers only."""

    least: float
    most: float
    whole: bool


@cache
def limits(dtype: Any) -> Limits:
    """Least and largest number of a type in which weights are stored, be it one that numpy does not know (int4, float8), and whether it
    holds whole numbers."""
    known = re.fullmatch(r"(u?)int(\d+)", np.dtype(dtype).name)
    if known:
        bits = int(known[2]) - (not known[1])
        return Limits(0 if known[1] else -(2**bits), 2**bits - 1, True)
    width = 8 * np.dtype(dtype).itemsize
    every = np.arange(2**width).astype(f"uint{width}").view(dtype).astype(np.float32) if width <= 16 else np.zeros(0)
    most = float(every[np.isfinite(every)].max()) if len(every) else float(np.finfo(dtype).max)
    return Limits(-most, most, False)


def _used(integers: Array) -> Limits:
    """The limits of the numbers that stand for a weight: those of the type, or of seven bits where it needs no more (quantised with
    ``reduce_range``, so that products of pairs do not saturate)."""
    least, most, whole = limits(integers.dtype)
    if not whole or integers.dtype.itemsize > 1 or not integers.size:
        return Limits(least, most, whole)
    low, high = least // 2, -(least // 2) if least else most // 2
    return Limits(low, high, True) if integers.min() >= low and integers.max() <= high else Limits(least, most, True)


def _rounded(value: Array, dtype: Any, within: Limits | None = None) -> Array:
    """The nearest numbers of a type."""
    least, most, whole = within or limits(dtype)
    return np.asarray(np.clip(np.rint(value) if whole else value, least, most).astype(dtype))


Get = Callable[[str], Array]
"""The present value of an initializer."""


@dataclass(frozen=True)
class Held:
    """The initializer ``name``; or, with a ``scale``, (name - zero_point) * scale, where scale and zero point are initializers of
    one value or of one per index of ``axis``. ``alone``: nothing else reads the scale, so that it may change. ``cast``: it is read as
    float32, whatever it is stored as."""

    name: str
    shape: tuple[int, ...]
    scale: str = ""
    zero_point: str = ""
    axis: int = 0
    alone: bool = False
    cast: bool = False

    def value(self, get: Get) -> Array:
        """The constant as the layer sees it."""
        if not self.scale:
            return get(self.name).astype(np.float32) if self.cast else get(self.name)
        scale = get(self.scale)
        return np.asarray((get(self.name).astype(scale.dtype) - self._zero(get).astype(scale.dtype)) * self._along(scale))

    def _along(self, vector: Array) -> Array:
        sizes = [-1 if axis == self.axis % len(self.shape) else 1 for axis in range(len(self.shape))]
        return vector.reshape(sizes if vector.size > 1 else ())

    def _zero(self, get: Get) -> Array:
        return self._along(get(self.zero_point)).astype(np.float64) if self.zero_point else np.zeros(())

    def nearest(self, get: Get, value: Array, ratio: Array | None = None) -> tuple[dict[str, Array], Array]:
        """Initializers that come nearest to a value, and the value that they then stand for. ``ratio``: factor on the scale (its shape)."""
        if not self.scale:
            stored = np.asarray(_rounded(value, get(self.name).dtype), order="C")
            return {self.name: stored}, stored.astype(np.float32) if self.cast else stored
        scale, integers = get(self.scale), get(self.name)
        changed = {} if ratio is None else {self.scale: (scale * ratio).astype(scale.dtype)}
        steps = self._along(changed.get(self.scale, scale)).astype(np.float64)
        steps = np.where(steps == 0, 1.0, steps)
        changed[self.name] = _rounded(value / steps + self._zero(get), integers.dtype, _used(integers))
        coded: Array = (changed[self.name].astype(np.float64) - self._zero(get)) * steps
        return changed, coded

    def fitting(self, get: Get, value: Array) -> Array:
        """The factor on the scale with which a value just fits into the integers."""
        scale, (least, most, _) = get(self.scale), _used(get(self.name))
        zero = self._zero(get)
        steps = np.maximum(value / np.maximum(most - zero, 1), value / np.minimum(least - zero, -1))
        axes = tuple(axis for axis in range(value.ndim) if scale.size == 1 or axis != self.axis % value.ndim)
        largest = steps.max(axes).reshape(scale.shape)
        return np.asarray(np.where((largest > 0) & (scale > 0), largest / np.where(scale > 0, scale, 1), 1.0))


# ---- what is re-fitted -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aim:
    """What something in the changed model aims at: ``output`` is what it makes, ``target`` the tensor behind it that is compared with
    ``reference`` of the original (the same, or the sum that the output goes into)."""

    layer: str
    output: str
    target: str
    reference: str


@dataclass(frozen=True)
class Step(Aim):
    """One layer of the changed model.

    ``bias`` is the constant that is its bias, which is added inside the layer if ``inside``, else by the node behind it. ``mask`` (the
    weight's shape) tells which weights may be other than zero; None: all. ``factor``: the weight has a lower rank, and keeps it. ``alone``:
    a layer that does not mix channels reads what it makes, so that no channel stands in for another.
    """

    linear: Linear
    data: str
    weight: Held
    bias: Held | None
    inside: bool
    mask: BoolArray | None = None
    factor: Factor | None = None
    alone: bool = False


@dataclass(frozen=True)
class End(Aim):
    """The constant ``output`` that stands for a vanished branch, with one value per index of ``axis``."""

    axis: int


Task = tuple[Step, ...] | End
"""What is fitted at once: layers that share a weight (mostly one), or an end."""


# ---- a change of weight and bias, put into the model's constants -----------------------------------------------------

WeightChange = tuple[FloatArray, FloatArray]
"""Of the weight (blocks, inputs, outputs) and of the bias (blocks, outputs; of several layers (layers, blocks, outputs))."""


def per_block(scale: Array, matrix: Array) -> Array:
    """A value per output channel as (blocks, 1, outputs of a block)."""
    return np.broadcast_to(scale, (len(matrix) * matrix.shape[-1],)).reshape(len(matrix), 1, -1)


def inverse_of(factor: Array) -> Array:
    """1 / factor, and 0 where a factor is (nearly) 0."""
    usable = np.abs(factor) > np.finfo(np.float32).tiny
    return np.asarray(np.where(usable, 1 / np.where(usable, factor, 1), 0.0))


@dataclass(frozen=True)
class Coding:
    """How changes, in units of the target, which is ``scale`` times the output, get into the ``weight`` that the layers share and into the
    bias of each. A weight of integers is rounded with the scales that it has, or (``stretch``) with those that it just fits into; then the
    scales of biases change by the same factors, since onnxruntime multiplies without looking at them."""

    walk: Walk
    steps: Sequence[Step]
    weight: Array
    scale: Array
    stretch: bool = False

    def matrix(self, weight: Array, change: FloatArray) -> Array:
        """A weight as a change of it is written: (blocks, inputs, outputs)."""
        return self.steps[0].linear.form.matrix(weight, len(change)).astype(np.float64)

    @property
    def target(self) -> FloatArray:
        """The weight (1, inputs, outputs) of a layer of one block, in units of the target."""
        matrix = self.steps[0].linear.form.matrix(self.weight, 1).astype(np.float64)
        return np.asarray(matrix * per_block(self.scale, matrix))

    def _coded(self, change: FloatArray) -> tuple[dict[str, Array], Array, Array | None]:
        """Initializers that come nearest to the changed weight, the value that they stand for, and the factor on their scale."""
        matrix = self.matrix(self.weight, change) + change * inverse_of(per_block(self.scale, change))
        wanted = self.steps[0].linear.form.weight(matrix, self.weight.shape)
        held = self.steps[0].weight
        ratio = held.fitting(self.walk.constant, wanted) if self.stretch else None
        return *held.nearest(self.walk.constant, wanted, ratio), ratio

    def rounded(self, sums: Sums, change: FloatArray) -> WeightChange:
        """What becomes of a change of the weight, and the best bias for that."""
        value = self.matrix(self._coded(change)[1], change) - self.matrix(self.weight, change)
        rounded = value * per_block(self.scale, change)
        return rounded, best_bias(sums, rounded)

    def chosen(self, fit: Sums, held: Sums, change: FloatArray) -> tuple[Coding, float]:
        """The way of rounding that leaves the least error on held-out rows, and that error. Other scales than now are possible where their
        initializers serve nothing else, and biases can follow."""
        biases = [step.bias for step in self.steps if step.bias is not None and step.bias.scale]
        free = self.steps[0].weight.alone and all(bias.alone and bias.shape == (max(bias.shape),) for bias in biases)
        ways = [replace(self, stretch=stretch) for stretch in ((False, True) if free else (False,))]
        error, best = min(((held.error(*way.rounded(fit, change)), way) for way in ways), key=lambda result: result[0])
        return best, error

    def write(self, change: WeightChange) -> None:
        """Put a change into the constants of the model."""
        fresh: dict[str, Array] = {}
        ratio = None
        if change[0].any():
            fresh, _, ratio = self._coded(change[0])
        inverse = inverse_of(per_block(self.scale, change[0]))[:, 0]
        for step, raw in zip(self.steps, change[1].reshape(len(self.steps), *inverse.shape), strict=True):
            if step.bias is not None:
                old = step.bias.value(self.walk.constant)
                shift = (raw * inverse).reshape(-1) / (step.linear.bias_scale if step.inside else 1.0)
                value = old.astype(np.float64) + shift.reshape(old.shape)
                fresh |= step.bias.nearest(self.walk.constant, value, ratio if step.bias.scale else None)[0]
        self.walk.overrides.update(fresh)
