"""Figures of a model as functions of how many units each group keeps, without cutting anything; and the ruler that holds all of them.

The length of an axis is a linear function of the kept units, and what a node moves or multiplies is a product of lengths.
So any figure of a model (multiply-accumulates, bytes of weights, time, peak memory) can be had for many candidates at once.
A *candidate* is a vector of kept units, one number per group; functions here take arrays (..., groups) and return (...).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from math import prod
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from ..core.options import BYTES, PlanOptions
from ..core.types import INPUTS, BoolArray, Coupling, Factor, FloatArray, IntArray, Layer, Node, Trace
from ..coupling import cost, from_constants
from ..coupling.analysis import Analysis, Progress, silent
from ..coupling.trace import observed
from ..cut import cut
from ..cut.factor import both, split
from ..graph import Model, Prepared, initializers, inputs, outputs
from ..graph.edit import without_projections
from ..graph.load import nested
from ..graph.save import file_bytes
from ..graph.stored import STORED, Store, stored
from ..runtime import Setup
from . import COUNTS, FIGURES, Gauge, Halves, figure, parse_target
from .precision import Codes, Storable, as_float, codes_for, on_integers, overhead, shares, stores

BLOCKED_RANK = 4  # only feature maps N x C x H x W are kept in blocks of channels
AXES = 4  # most unit-carrying axes that one product may have


class Kind(IntEnum):
    """What is counted of a node: elements read, elements written, multiply-accumulates, and runs (a layer that vanished has none)."""

    READ, WRITTEN, MACS, RUNS = range(4)


class Role(IntEnum):
    """How convolutions use an axis of channels: not at all (or not in blocks), as one that they make, read, or both (depthwise)."""

    NONE, MADE, READ, BOTH = range(4)


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
        return np.asarray(np.asarray(kept, float) @ self.share.T + self.fixed)

    def lengths_after(self, removed: BoolArray) -> FloatArray:
        """Lengths (axes,) after a removal, exact where the units of a group hold different shares of an axis."""
        return np.asarray([cost.keep_mask(units, removed).sum() for units in self.units], float)

    def values(self, lengths: FloatArray, block: int = 1, slow: float = 1.0) -> FloatArray:
        """Values (..., terms) at lengths (..., axes). Axes in a role count whole blocks; but fewer channels than one block are read one by
        one. Multiply-accumulates that read more, and no multiple of 4, count ``slow`` times, since onnxruntime then leaves its blocked
        layout."""
        blocked = (self.role != Role.NONE) & ((self.role != Role.READ) | (lengths > block))
        paid = np.where(blocked, np.ceil(lengths / block - 1e-9) * block, lengths) / self.full
        values: FloatArray = self.base * np.prod([paid[..., self.axes[:, at]] for at in range(AXES)], axis=0)
        runs = self.kind == Kind.RUNS
        values[..., runs] = values[..., runs] > 0  # a layer runs once, or not at all
        if slow != 1.0:
            odd = blocked & (self.role != Role.MADE) & (np.abs(lengths / 4 - np.round(lengths / 4)) > 1e-6) & (self.full > 4)
            bad = np.any([odd[..., self.axes[:, at]] for at in range(AXES)], axis=0)
            values = np.where(bad & (self.kind == Kind.MACS), values * slow, values)
        return values

    def total(self, kept: IntArray) -> FloatArray:
        """Sum of all terms (...) of candidates (..., groups)."""
        return np.asarray(self.values(self.lengths(kept)).sum(-1), float)

    def whole(self, kept: IntArray) -> FloatArray:
        """Sum of those terms (...) of which all axes have their full length."""
        full = self.lengths(kept) >= self.full - 1e-6
        return np.asarray(np.where(full[..., self.axes].all(-1), self.base, 0.0).sum(-1), float)

    def per_owner(self, lengths: FloatArray, owners: int, block: int = 1, slow: float = 1.0) -> FloatArray:
        """Sums (..., owners, kinds) at lengths (..., axes)."""
        values = self.values(lengths, block, slow)
        flat = values.reshape(-1, values.shape[-1])
        slot = self.owner * len(Kind) + self.kind
        sums = np.asarray([np.bincount(slot, row, owners * len(Kind)) for row in flat], float)
        return sums.reshape(*values.shape[:-1], owners, len(Kind))


class Axis(NamedTuple):
    """An axis of a tensor: the unit of each index, and its `Role`."""

    units: IntArray
    role: int = Role.NONE


class Product(NamedTuple):
    """A value with all channels that is proportional to the lengths of ``axes``; what it belongs to, and its `Kind`."""

    value: float
    axes: Sequence[Axis]
    owner: int
    kind: int


def terms(coupling: Coupling, products: Iterable[Product]) -> Terms:
    """Collect products of lengths."""
    every = list(products)
    axes = [Axis(np.full(1, -1, np.int64))]
    known: dict[tuple[bytes, int], int] = {}
    numbers = np.zeros((len(every), AXES), np.int64)
    for row, product in enumerate(every):
        for place, axis in enumerate([axis for axis in product.axes if (axis.units >= 0).any()][:AXES]):
            numbers[row, place] = known.setdefault((axis.units.tobytes(), axis.role), len(axes))
            axes += [axis] if numbers[row, place] == len(axes) else []
    widths = np.asarray([group.width for group in coupling.groups], np.int64)
    group_of = np.repeat(np.arange(len(widths)), widths)
    counts = np.stack([np.bincount(group_of[axis.units[axis.units >= 0]], minlength=len(widths)).astype(float) for axis in axes])
    full = np.asarray([axis.units.size for axis in axes], float)
    return Terms(
        base=np.asarray([product.value for product in every], float), axes=numbers,
        owner=np.asarray([product.owner for product in every], np.int64), kind=np.asarray([product.kind for product in every], np.int64),
        full=full, fixed=full - counts.sum(1), share=counts / np.maximum(widths, 1),
        role=np.asarray([axis.role for axis in axes], np.int64), units=tuple(axis.units for axis in axes),
    )  # fmt: skip


def _axes(name: str, coupling: Coupling, trace: Trace) -> list[Axis]:
    """The axes of an activation that carry units."""
    role = Role.MADE if len(trace.shapes[name]) == BLOCKED_RANK else Role.NONE
    return [Axis(axis.units, role if axis.axis == 1 else Role.NONE) for axis in coupling.tensors.get(name, ())]


def _extents(layer: Layer, trace: Trace) -> list[Axis]:
    """The axes that a layer's multiply-accumulates are proportional to, with their roles."""
    if len(trace.shapes.get(layer.node.outputs[0], ())) != BLOCKED_RANK:
        return [Axis(units) for units in layer.extents]
    if len(layer.extents) == 1 and np.array_equal(layer.reads, layer.writes):  # depthwise
        return [Axis(layer.extents[0], Role.BOTH)]
    making = next((at for at, units in enumerate(layer.extents) if np.array_equal(units, layer.writes)), -1)
    return [Axis(units, Role.MADE if at == making else Role.READ) for at, units in enumerate(layer.extents)]


def node_terms(coupling: Coupling, nodes: Sequence[Node], trace: Trace) -> Terms:
    """What every node reads, writes and multiplies on the traced shapes; the owner is the node's index. One that gets removed channels
    again reads all of them, and has them copied there and back."""
    products: list[Product] = []
    expanded = {(node, position) for node, position, _ in coupling.expanded}
    for node in nodes:
        for kind, names in ((Kind.READ, node.inputs), (Kind.WRITTEN, node.outputs)):
            for position, name in enumerate(names):
                constant = kind is Kind.READ and (node.index, position) in coupling.constants
                if name in trace.shapes and not constant and np.prod(trace.shapes[name]) > 0:
                    size, axes = float(np.prod(trace.shapes[name])), _axes(name, coupling, trace)
                    if kind is Kind.READ and (node.index, position) in expanded:  # two copies; in full when half of it is gone
                        products += [Product(2 * size, [], node.index, kind), Product(-2 * size, axes, node.index, kind)]
                        axes = []
                    products.append(Product(size, axes, node.index, kind))
    for layer in coupling.layers:
        extents, owner = _extents(layer, trace), layer.node.index
        products += [Product(layer.macs, extents, owner, Kind.MACS), Product(1.0, extents, owner, Kind.RUNS)]
    return terms(coupling, products)


@dataclass(frozen=True)
class Edges:
    """What nodes read of each other: ``terms`` are elements, one each, ``makers`` and ``readers`` (edges,) indices of nodes (-1: an input
    of the model)."""

    terms: Terms
    makers: IntArray
    readers: IntArray


def edges(coupling: Coupling, nodes: Sequence[Node], trace: Trace) -> Edges:
    """All activations on their way from node to node, on the traced shapes."""
    made = {name: node.index for node in nodes for name in node.outputs}
    found = [
        (made.get(name, -1), node.index, name) for node in nodes for position, name in enumerate(node.inputs)
        if name in trace.shapes and (node.index, position) not in coupling.constants
    ]  # fmt: skip
    names = [name for *_, name in found]
    products = (Product(float(prod(trace.shapes[name])), _axes(name, coupling, trace), at, Kind.READ) for at, name in enumerate(names))
    ends = np.asarray([row[:2] for row in found], np.int64).reshape(-1, 2)
    return Edges(terms(coupling, products), ends[:, 0], ends[:, 1])


def macs_terms(coupling: Coupling, samples: int) -> Terms:
    """Multiply-accumulates for one sample."""
    layers = coupling.layers
    return terms(coupling, (Product(layer.macs / samples, [Axis(units) for units in layer.extents], 0, Kind.MACS) for layer in layers))


def weight_terms(
    coupling: Coupling, parameters: Sequence[cost.Parameter], each: Callable[[cost.Parameter], float] = lambda parameter: 1.0
) -> Terms:
    """Numbers of weights, or their bytes if ``each`` is the bytes of one."""
    axes = [[Axis(axis.units) for axis in parameter.uses[0]] for parameter in parameters]
    values = [float(np.prod(parameter.shape)) * each(parameter) for parameter in parameters]
    return terms(coupling, (Product(value, carrying, 0, Kind.READ) for value, carrying in zip(values, axes, strict=True)))


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
        return np.asarray((values @ self.alive.T).max(-1))


def _lives(nodes: Sequence[Node], trace: Trace, held: Container[str], model: Model) -> dict[str, range]:
    """The steps (positions in the nodes) at which each tensor that is not ``held`` is alive."""
    lives = {port.name: range(1) for port in inputs(model) if port.name not in held}
    for step, node in enumerate(nodes):
        for name in node.outputs:
            if name in trace.shapes and name not in trace.values and name not in held:
                lives.setdefault(name, range(step, step))
        lives |= {name: range(lives[name].start, step + 1) for name in (*node.reads, *node.outputs) if name in lives}
    return lives | {port.name: range(lives[port.name].start, len(nodes)) for port in outputs(model) if port.name in lives}


def liveness(analysis: Analysis, batch: int, constants: Collection[str] = ()) -> Liveness:
    """Liveness of the activations of a model, run on ``batch`` samples node by node in the order of the file, nothing fused or computed in
    place.

    A tensor lives from the node that writes it to the last one that reads it; inputs of the model from the start, outputs to the end.
    While a node runs, its inputs and outputs are alive together. Initializers do not count, nor do ``constants`` and what only they need.
    """
    coupling, trace = analysis.coupling, analysis.prepared.trace
    sizes, alive = activations(analysis.prepared, analysis.samples, batch, constants)
    place = {name: column for column, name in enumerate(sizes)}
    groups = [group for group in coupling.groups if group.name in coupling.branches]
    products = [Product(size, _axes(name, coupling, trace), place[name], Kind.WRITTEN) for name, size in sizes.items()]
    # these give the units of branches an axis each
    products += [Product(0.0, [Axis(group.units)], len(place), Kind.WRITTEN) for group in groups]
    bytes_of = terms(coupling, products)
    tails = tuple(
        (axis, np.asarray([place[name] for name in coupling.branches[group.name].constant if name in place], np.int64))
        for group, axis in zip(groups, bytes_of.axes[len(place) :, 0].tolist(), strict=True)
    )
    return Liveness(bytes_of, np.pad(np.unique(alive, axis=0), ((0, 0), (0, len(groups)))), tails)


def activations(prepared: Prepared, samples: int, batch: int, constants: Collection[str] = ()) -> tuple[dict[str, float], FloatArray]:
    """Bytes of every activation, on ``batch`` samples, of a model traced on ``samples``, and which (steps, tensors) are alive while each
    node runs (see `liveness`)."""
    trace, nodes = prepared.trace, prepared.index.needed([port.name for port in outputs(prepared.model)], constants)
    lives = _lives(nodes, trace, {*from_constants(prepared, initializers(prepared.model)), *constants}, prepared.model)
    types = {name: np.dtype(dtype) for name, dtype in prepared.types.items() if dtype is not None}
    each = {name: dtype.itemsize for name, dtype in types.items() if dtype.kind not in "OSU"}
    shapes = {name: trace.shapes[name] for name in lives if name in trace.shapes}
    whole = {name: bool(shape) and shape[0] % samples == 0 for name, shape in shapes.items()}  # it holds something of every sample
    sizes = {name: prod(shape) * each.get(name, 4) * (batch / samples if whole[name] else 1.0) for name, shape in shapes.items()}
    alive = np.zeros((len(nodes), len(sizes)))
    for column, name in enumerate(sizes):
        alive[lives[name].start : lives[name].stop, column] = 1
    return sizes, alive


def peak(model: Model, analysis: Analysis, batch: int) -> float:
    """Bytes of activations of a model as it is that are alive together, at most, on inputs like those that an analysis was made on."""
    sizes, alive = activations(observed(model, analysis.prepared.feeds), analysis.samples, batch)
    return float((alive @ np.asarray(list(sizes.values()))).max(initial=0.0))


# ---- what is counted -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """In which form a cut model is written: ``finished`` makes the written model of it, its removal and its factors, but for the values of
    its weights (None: it is written as it is cut); ``bytes`` are those of its file, ``each`` those of one element of a weight, about;
    ``biases`` gives parameters that come on top; ``shares`` says how much is left of tables of which rows leave. Weights that are
    ``storable`` may be stored in fewer bits, each as its *code* says (`graph.stored.STORED`); ``integers`` makes layers, by their first
    outputs, integers (None: none may become so), beside which there are others, and ``between`` says which of these it makes so, too."""

    finished: Callable[[Model, BoolArray, Sequence[Factor]], Model] | None = None
    bytes: Callable[[Model], int] = file_bytes
    each: Callable[[cost.Parameter], float] = attrgetter("itemsize")
    biases: Callable[[], tuple[cost.Parameter, ...]] = tuple
    storable: tuple[Storable, ...] = ()
    shares: Mapping[str, float] = field(default_factory=dict)
    integers: Callable[[Model, Collection[str], Collection[str]], Model] | None = None
    between: Callable[[Model, Collection[str], Collection[str]], set[str]] | None = None

    def share(self, parameter: cost.Parameter) -> float:
        """How much of a weight is left, whatever channels leave."""
        return self.shares.get(parameter.name, 1.0)

    def stored(self, model: Model, kinds: Sequence[Store]) -> Model:
        """A finished model with its weights as they are to be stored."""
        model, chosen = stored(model, kinds), on_integers(kinds)
        return self.integers(model, chosen, {store.layer for store in kinds}) if self.integers and chosen else model


AS_CUT = Form()


@dataclass(frozen=True)
class Scene:
    """What figures are made from: the model, how it is run and measured, and in which form the result is written."""

    analysis: Analysis
    options: PlanOptions
    progress: Progress = silent
    form: Form = AS_CUT

    @property
    def setup(self) -> Setup:
        """How onnxruntime runs it."""
        return Setup.of(self.options)


@figure("macs", COUNTS, "macs=50%")
def macs(scene: Scene) -> Gauge:
    """Multiply-accumulates for one sample, exact."""
    analysis = scene.analysis
    terms = macs_terms(analysis.coupling, analysis.samples)
    projections = macs_terms(replace(analysis.coupling, layers=tuple(analysis.projections)), analysis.samples)

    def total(kept: IntArray) -> FloatArray:  # a projection that has all channels in front of it does nothing
        return np.asarray(terms.total(kept) - projections.whole(kept))

    return Gauge(
        lambda removed: analysis.size(removed).macs, total if analysis.projections else terms.total, before=analysis.size().macs,
        saved=lambda halves: halves.macs.sum(-1),
    )  # fmt: skip


@figure("params", COUNTS, "params=120k", shaped=False)
def params(scene: Scene) -> Gauge:
    """Number of weights; with the biases that a repair adds, which are counted on built models."""
    analysis, form, biases = scene.analysis, scene.form, scene.form.biases()
    tables = [parameter for parameter in analysis.parameters if form.share(parameter) < 1]

    def rows(removed: BoolArray) -> float:
        return sum((1 - form.share(table)) * cost.params([table], removed) for table in tables)

    return Gauge(
        predicted=lambda removed: float(analysis.size(removed).params + cost.params(biases, removed) - rows(removed)),
        cost=weight_terms(analysis.coupling, [*analysis.parameters, *biases], form.share).total,
        measured=(lambda model: float(cost.params_of(model))) if form.finished else None,
        before=float(cost.params_of(analysis.model)), saved=lambda halves: halves.weights.sum(-1),
    )  # fmt: skip


@figure("size", BYTES, "size=2MB", shown="{:,.0f} bytes".format, shaped=False)
def size(scene: Scene) -> Gauge:
    """Bytes of the file: those of the whole model - those of the weights that leave; counted on built models. What it takes to unpack
    weights is counted on models of which all are stored alike."""
    analysis, form = scene.analysis, scene.form
    weights = weight_terms(analysis.coupling, [*analysis.parameters, *form.biases()], form.each)
    held = weights if form.storable else weight_terms(analysis.coupling, analysis.parameters, form.each)  # then all biases are in the whole
    before, full = float(file_bytes(analysis.model)), held.values(held.full).sum()
    if form.finished:
        plain = form.finished(analysis.prepared.model, np.zeros(analysis.coupling.units, bool), ())
        whole = float(form.bytes(plain))
    else:
        kept, every = initializers(analysis.prepared.model), initializers(analysis.model)
        whole = before - sum(prod(dead.shape) * dead.dtype.itemsize for name, dead in every.items() if name not in kept)
    names = [parameter.name for parameter in (*analysis.parameters, *form.biases())]
    groups, storable, each = len(analysis.coupling.groups), form.storable, dict.fromkeys(STORED.values(), 0.0)
    channels = np.asarray([item.channels for item in storable], float)

    def kept_bytes(lengths: FloatArray, codes: Codes) -> FloatArray:
        values = weights.values(lengths) * (shares(storable, names, codes) if storable else 1.0)
        return np.asarray(whole - full + values.sum(-1) + overhead(channels, codes, each).sum(-1), float)

    def saved(halves: Halves) -> FloatArray:
        more = np.where(halves.rank > 0, overhead(halves.rank, halves.codes, each), 0.0)  # of the half in front
        return np.asarray((halves.weights * halves.each * np.maximum(halves.codes, 1) / 4 - more).sum(-1))

    for code in STORED.values() if storable else ():
        codes = [code if np.isfinite(item.errors[code]) else 4 for item in storable]
        more = float(form.bytes(form.stored(plain, stores(storable, codes))) - kept_bytes(weights.full, codes))
        each[code] = more / max(codes.count(code), 1)

    def at(codes: Sequence[int]) -> Gauge:
        return Gauge(
            predicted=lambda removed: float(kept_bytes(weights.lengths_after(removed), codes)),
            cost=lambda kept: kept_bytes(weights.lengths(kept[..., :groups]), kept[..., groups:]),
            measured=lambda model: float(form.bytes(model)), before=before, at=at, saved=saved,
        )  # fmt: skip

    return at(as_float(storable))


@figure("memory", BYTES, "memory=1.5MiB", shown="{:,.0f} bytes".format, solved=True)
def memory(scene: Scene) -> Gauge:
    """Bytes of the activations that are alive together, at most; counted on built models where their form adds some."""
    analysis, batch = scene.analysis, scene.options.batch
    coupling, whole = analysis.coupling, liveness(analysis, batch)

    def predicted(removed: BoolArray) -> float:
        constants = {name for branch in cost.vanishing(coupling, removed) for name in branch.constant}
        live = liveness(analysis, batch, constants) if constants else whole  # without a branch, what only it read goes, too
        return float(live.peak(live.terms.lengths_after(removed)))

    return Gauge(
        predicted, lambda kept: whole.peak(whole.terms.lengths(kept)),
        measured=(lambda model: peak(model, analysis, batch)) if scene.form.finished else None,
    )  # fmt: skip


# ---- all figures of a model ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ruler:
    """Figures of a model after a removal, in the form in which it is written. ``names`` are those that count, out of the ``gauges`` that
    there are; ``codes`` those of its storable weights."""

    analysis: Analysis
    gauges: Mapping[str, Gauge]
    names: tuple[str, ...]
    form: Form = AS_CUT
    codes: tuple[int, ...] | None = None

    def at(self, codes: tuple[int, ...]) -> Ruler:
        """The ruler for models whose storable weights have so many bytes of an element."""
        gauges = {name: gauge.at(codes) if gauge.at else gauge for name, gauge in self.gauges.items()}
        return replace(self, gauges=gauges, codes=codes)

    @cached_property
    def before(self) -> dict[str, float]:
        """Figures of the original."""
        figures = self.predicted(np.zeros(self.analysis.coupling.units, bool))
        return {name: value if (before := self.gauges[name].before) is None else before for name, value in figures.items()}

    @property
    def timed(self) -> tuple[str, ...]:
        """Names of what is timed on this machine."""
        return tuple(name for name in self.names if FIGURES[name].timed and self.gauges[name].measured)

    def predicted(self, removed: BoolArray, factors: Sequence[Factor] = ()) -> dict[str, float]:
        """Figures after a removal, and with factors, without building it."""
        figures = {name: self.gauges[name].predicted(removed) for name in self.names}
        if not factors:
            return figures
        wholes = [self.analysis.wholes[factor.layer] for factor in factors]
        masks = [whole.masks(removed) for whole in wholes]
        read = np.asarray([mask[whole.reads].sum() for whole, mask in zip(wholes, masks, strict=True)], float)
        made = np.asarray([mask[whole.makes].sum() for whole, mask in zip(wholes, masks, strict=True)], float)
        ranks, narrow = np.asarray([float(factor.rank) for factor in factors]), np.asarray([factor.narrow == INPUTS for factor in factors])
        halves = replace(self.wholes(wholes), read=read, made=made, rank=ranks, inputs=narrow)
        return {name: value - float(saved(halves)) if (saved := self.gauges[name].saved) else value for name, value in figures.items()}

    def wholes(self, wholes: Sequence[cost.Whole]) -> Halves:
        """Layers that are whole still, with all channels."""
        none, samples = np.zeros(self.analysis.coupling.units, bool), self.analysis.samples
        each = {parameter.name: float(self.form.each(parameter)) for parameter in self.analysis.parameters}
        positions = np.asarray([whole.layer.macs / samples / prod(whole.sizes(none)) for whole in wholes])
        taps, stretch = np.asarray([[whole.taps, whole.stretch] for whole in wholes], float).T
        bytes_each = np.asarray([each.get(whole.weight, 4.0) for whole in wholes])
        nodes = np.asarray([whole.layer.node.index for whole in wholes], np.int64)
        read, made = np.asarray([[whole.shape[whole.reads], whole.shape[whole.makes]] for whole in wholes], float).T
        storable = self.form.storable
        codes = codes_for(storable, [whole.weight for whole in wholes], self.codes or as_float(storable))
        return Halves(read, made, np.zeros(len(read)), np.zeros(len(read), bool), positions, taps, stretch, bytes_each, nodes, codes)

    def lengths(self, wholes: Sequence[cost.Whole]) -> Callable[[IntArray], Halves]:
        """The same at candidates (..., groups)."""
        products, all_channels = [], self.wholes(wholes)
        for whole, axis in [*((whole, whole.reads) for whole in wholes), *((whole, whole.makes) for whole in wholes)]:
            carried = [Axis(carried.units) for carried in whole.carried if carried.axis == axis]
            products.append(Product(float(whole.shape[axis]), carried, 0, Kind.READ))
        both = terms(self.analysis.coupling, products)

        def halves(kept: IntArray) -> Halves:
            values = both.values(both.lengths(kept))
            return replace(all_channels, read=values[..., : len(wholes)], made=values[..., len(wholes) :])

        return halves

    def cost(self, name: str) -> Callable[[IntArray], FloatArray]:
        """A figure of candidates (..., groups, and behind them codes of the storable weights) for the solver."""
        cost, groups = self.gauges[name].cost, len(self.analysis.coupling.groups)
        return cost if self.gauges[name].at else lambda kept: cost(kept[..., :groups])

    def actual(self, removed: BoolArray, factors: Sequence[Factor] = ()) -> dict[str, float]:
        """Figures of the built model, as far as they are measured; else as predicted."""
        figures = self.predicted(removed, factors)
        measures = {name: measure for name in self.names if (measure := self.gauges[name].measured) is not None}
        if not measures:
            return figures
        model = self.built(removed, factors)
        return figures | {name: measure(model) for name, measure in measures.items()}

    def built(self, removed: BoolArray, factors: Sequence[Factor] = ()) -> Model:
        """The model without what is removed, with its factors, in the form in which it is written."""
        analysis, changed = self.analysis, bool(removed.any() or factors)
        model = cut(analysis.prepared, analysis.coupling, removed) if changed else analysis.model
        model = without_projections(model, analysis.projected) if analysis.projected and changed else model
        model = self.form.finished(model, removed, factors) if self.form.finished else split(model, analysis.wholes, factors)
        if kinds := stores(self.form.storable, self.codes or as_float(self.form.storable)):
            model = self.form.stored(model, both(model, analysis.wholes, factors, kinds))
        return nested(model, analysis.prepared.nest)

    def again(self, removed: BoolArray) -> Ruler:
        """The ruler after everything that is timed was measured anew, around the widths after a removal."""
        anew = {name: again(removed) for name in self.names if (again := self.gauges[name].again) is not None}
        return replace(self, gauges={**self.gauges, **anew})


def ruler_for(analysis: Analysis, options: PlanOptions, progress: Progress = silent, form: Form = AS_CUT) -> Ruler:
    """The ruler for the options' targets on a model that is written in a ``form``.

    Raises:
        OptionError, ProfileError: unknown target, provider or batch size; a device profile that does not fit.
    """
    names = tuple(dict.fromkeys(["macs", *(parse_target(text).what for text in options.targets)]))
    scene = Scene(analysis, options, progress, form)
    return Ruler(analysis, {name: FIGURES[name].gauge(scene) for name in names}, names, form)
