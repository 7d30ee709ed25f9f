"""Backward elimination with the group optimal brain surgeon: which inputs can a least-squares fit do without?

For a layer with outputs X' a, inputs a of covariance C and H = C + ridge, removing the rows g of the weights X and re-solving the
others costs

    tr(X_g' (H^-1_gg)^-1 X_g),     X <- X - H^-1_.g (H^-1_gg)^-1 X_g,     H^-1 <- H^-1 - H^-1_.g (H^-1_gg)^-1 H^-1_g.

(Hassibi & Stork, NIPS 1992; for groups of rows: Frantar & Alistarh, NeurIPS 2022).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any

import numpy as np

from ..core.options import RepairOptions
from ..core.types import Array, BoolArray, Coupling, FloatArray, IntArray, Layer, Spectrum
from ..coupling.analysis import Analysis, feeds_of
from ..data.dataset import Dataset
from ..graph import Prepared
from ..repair import heads, linear, lockstep, ridge, steps, walk
from ..runtime import Session
from . import sensitivity
from .dimensions import Worth, worth
from .scoring import Setting
from .sensitivity import Change, Cut
from .shares import WHOLE, Seen, Share

PASSES = 64  # at most so many updates of a group; wide groups lose several units in one
NOTICED = 1e-3  # of error; where less was added, a look would show noise
SHRINK = 0.5  # share of rows left at which the matrices are copied without those that are gone


@dataclass
class Reader:
    """One layer that reads a group: ``inverse`` H^-1 (k, k), weights ``x`` (k, o) and the position in the group of each row, ``unit`` (-1:
    none; -2: gone), all of which are changed, and what its error is divided by.

    What a removal subtracts from H^-1 is V V' with V = H^-1_.g L'^-1, where H^-1_gg = L L'. The V are collected, and H^-1 is only computed
    where it is needed: the columns of the rows that leave, and the blocks of single units.
    """

    inverse: FloatArray
    x: FloatArray
    unit: IntArray
    scale: float

    def __post_init__(self) -> None:
        self._kept, self._most = np.arange(len(self.unit)), int(self.unit.max(initial=-1))
        self._start()

    def _start(self) -> None:
        """Forget V, and look up the rows and blocks of units, by their number of rows: (units, rows (u, r), blocks (u, r, r))."""
        self._subtracted, self._width = np.zeros((len(self.unit), 0)), 0
        order = np.argsort(self.unit, kind="stable")
        units, first, counts = np.unique(self.unit[order], return_index=True, return_counts=True)
        self._classes: list[tuple[IntArray, IntArray, FloatArray]] = []
        for size in np.unique(counts[units >= 0]):
            same = np.flatnonzero((counts == size) & (units >= 0))
            rows = order[first[same, None] + np.arange(size)]
            self._classes.append((units[same], rows, self.inverse[rows[:, :, None], rows[:, None, :]]))

    def costs(self, units: IntArray) -> FloatArray:
        """What removing each of these (sorted) units alone would add to the error."""
        costs, wanted = np.zeros(len(units)), self._flags(units)
        for same, rows, blocks in self._classes:
            asked = wanted[same]
            x = self.x[rows[asked]]
            if rows.shape[1] == 1:
                added = np.square(x[:, 0]).sum(1) / blocks[asked, 0, 0]
            else:
                added = np.einsum("uro,uro->u", x, np.linalg.solve(blocks[asked], x))
            costs[np.searchsorted(units, same[asked])] = added
        return costs / self.scale

    def _flags(self, units: IntArray) -> BoolArray:
        """Which units that this layer reads are among these, by unit; the last two places stand for -2 and -1."""
        flags = np.zeros(self._most + 3, bool)
        flags[units[units <= self._most]] = True
        return flags

    def remove(self, units: IntArray) -> float:
        """Remove units together and re-solve the rest; returns the error that this adds."""
        rows = np.flatnonzero(self._flags(units)[self.unit])
        if not len(rows):
            return 0.0
        v = self._subtracted[:, : self._width]
        columns = self.inverse[:, rows] - v @ v[rows].T
        lower = linear.factor(columns[rows], 0.0)
        taken, explained = linear.forward(lower, columns.T).T, linear.forward(lower, self.x[rows])
        self.x -= taken @ explained
        self.unit[rows] = -2
        kept = np.flatnonzero(self.unit != -2)
        self._collect(taken)
        if len(kept) <= SHRINK * len(self.unit):
            v = self._subtracted[kept, : self._width]
            self.inverse, self.x, self.unit = self.inverse[np.ix_(kept, kept)], self.x[kept], self.unit[kept]
            self._kept = self._kept[kept]
            self.inverse -= v @ v.T
            self._start()
        return float(np.square(explained).sum()) / self.scale

    def weights(self, inputs: int) -> FloatArray:
        """The weights (k, o) now, 0 for what is gone."""
        weights = np.zeros((inputs, self.x.shape[1]))
        weights[self._kept] = np.where(self.unit[:, None] == -2, 0, self.x)
        return weights

    def _collect(self, taken: FloatArray) -> None:
        """Remember what a removal subtracts."""
        width = self._width + taken.shape[1]
        if width > self._subtracted.shape[1]:
            more = max(width, 2 * self._subtracted.shape[1]) - self._width
            self._subtracted = np.pad(self._subtracted[:, : self._width], ((0, 0), (0, more)))
        self._subtracted[:, self._width : width] = taken
        self._width = width
        for _, rows, blocks in self._classes:
            of_units = taken[rows]
            blocks -= of_units @ of_units.transpose(0, 2, 1)


@dataclass(frozen=True)
class Order:
    """How the units of a group leave: their positions in ``units``, the error that each one ``added`` (not falling), and ``looks`` on the
    way: how many were kept, and the weights (k, o) of each reader."""

    units: IntArray
    added: FloatArray
    looks: Mapping[int, Sequence[FloatArray]]

    @property
    def errors(self) -> FloatArray:
        """By the number of units that are kept, 0 .. width."""
        return np.asarray(np.concatenate([[0.0], np.cumsum(self.added)])[::-1].copy())


def eliminate(readers: Sequence[Reader], width: int, shares: Sequence[float] = (), blocks: int = 1) -> Order:
    """Remove all units of a group, always the one (of ``blocks`` one each) that adds least to the summed error of its readers. A look is
    taken at each of these (falling) shares of units left, or as soon as the error is worth one."""
    left, together, inputs = np.arange(width), max(1, -(-width // (blocks * PASSES))), [len(reader.unit) for reader in readers]
    order, added, looks, ahead = list[int](), list[float](), dict[int, Sequence[FloatArray]](), list(shares)
    while len(left):
        costs = sum((reader.costs(left) for reader in readers), np.zeros(len(left)))
        least = np.argsort(costs.reshape(blocks, -1), axis=1, kind="stable")[:, :together]
        leaving = np.take_along_axis(left.reshape(blocks, -1), least, 1).T.reshape(-1)
        cost = sum(reader.remove(leaving) for reader in readers)
        order += leaving.tolist()
        added += [cost / len(leaving)] * len(leaving)
        left = np.setdiff1d(left, leaving)
        if ahead and len(left) <= width * ahead[0] and (not len(left) or sum(added) >= NOTICED):
            looks[len(left)] = [reader.weights(count) for reader, count in zip(readers, inputs, strict=True)]
            ahead = [share for share in ahead if share * width < len(left)]
    return Order(np.asarray(order, np.int64), np.maximum.accumulate(np.asarray(added)), looks)


# ---- elimination of a whole model ------------------------------------------------------------------------------------

RIDGE = 1e-3
MOST_BLOCKS = 64  # convolutions with more groups (depthwise) lose outputs with their inputs


@dataclass(frozen=True)
class Elimination:
    """Per unit what its removal adds to the error (larger = keep), and per group the error by the number of units kept (0 .. width).
    Errors are relative to the variance of what the reading layers' outputs go into. ``blind``: groups that no such layer reads. ``cuts``:
    what looks at groups showed on the way, where all that reads them could be re-fitted; ``scarce``: of layers, how much of what they
    read the samples leave unknown (`ridge.Scatter`, or fewer rows than inputs); ``spectra``: of layers, what tells the error if they
    become two; ``reach``: what of the unit of the errors reaches the outputs, as a share of their variance (0: unknown)."""

    scores: FloatArray
    errors: Mapping[str, FloatArray]
    blind: tuple[str, ...]
    cuts: Mapping[str, Sequence[Cut]] = field(default_factory=dict)
    scarce: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    spectra: Mapping[str, Spectrum] = field(default_factory=dict)
    reach: float = 0.0


@dataclass(frozen=True)
class Place:
    """A block of a layer that has so many: ``means`` (k,) of what it reads, the ``scale`` (o,) of its output in the target, how much
    of what it reads the samples leave unknown (``scarce``), and the ``rows`` per input that they are."""

    layer: Layer
    block: int
    blocks: int
    means: FloatArray
    scale: Array
    scarce: float
    rows: float
    spectrum: Spectrum | None = None


@dataclass(frozen=True)
class Inputs:
    """What one block of a layer reads: weights (k, o) in units of the target, the channel of the block and the units of each row, of each
    kind that there is, the variance of the target. ``key`` is that of H^-1 (k, k) in a store."""

    key: Hashable
    place: Place
    weights: Array
    channels: IntArray
    units: Sequence[IntArray]
    variance: float


MOST_MADE = 2048  # outputs of a layer that may become two: a matrix of so many is held of each
SCARCE = 0.1  # of what a layer reads left unknown by the samples: worth a word
ENOUGH = 2  # rows per input of a layer where there are fewer rows than inputs: then some channels only seem to be sums of others
ROWS = 32.0  # per input of a layer: half of what the repair takes, since the order of units needs less


SEEN = "seen"  # of the inputs of all layers, in what scores share: `parts.Joined`


def eliminated(analysis: Analysis, data: Any, setting: Setting) -> Elimination:
    """`elimination` of a whole model, as a score is asked for it: on most of the samples of a `Dataset` (None: on what was seen of it in
    parts); errors of groups weighed by what reaches the outputs on the others."""
    known = setting.shared.get(SEEN)
    looks = known.looks if known else sensitivity.looks(analysis, data, setting.seed, setting.memory)
    with setting.progress("eliminating", len(analysis.coupling.layers)) as advance:
        options = RepairOptions(seed=setting.seed, rows_per_input=ROWS, memory=setting.memory)
        feeds = known.layers() if known else feeds_of(analysis, looks.fitted)
        found = elimination(analysis.prepared, analysis.coupling, feeds, options, advance, looks.shares, known is not None)
        gather = known.dimensions if known else partial(_gathered, analysis, looks.fitted)
        found = _with_dimensions(analysis, found, worth(analysis, looks.shares, gather))
    with setting.progress("weighing", sum(map(len, found.cuts.values()))) as advance:
        held = known.held() if known else list(feeds_of(analysis, looks.held))
        reached = sensitivity.reaching(analysis.prepared, analysis.coupling, found.cuts, held, setting.memory, advance)
    ratios = sensitivity.ratios(found.cuts, reached)
    middle = sensitivity.middle_of(ratios, analysis.expanding)
    factors = sensitivity.factors(ratios, middle)
    found = replace(found, spectra=_weighed_spectra(analysis, found.spectra, factors))
    for name in sensitivity.streams(analysis.prepared, analysis.coupling) & factors.keys():
        factors[name] *= sensitivity.STREAM
    return replace(weighed(analysis.coupling, found, factors, looks), reach=middle)


def _gathered(analysis: Analysis, data: Dataset, found: Sequence[heads.Pair]) -> dict[str, FloatArray]:
    """Second moments of these queries and keys on the data."""
    return heads.moments(analysis.prepared.model, found, feeds_of(analysis, data), analysis.prepared.tokens)


def _with_dimensions(analysis: Analysis, found: Elimination, known: Worth) -> Elimination:
    """The same with the groups of dimensions, which no layer reads."""
    scores = found.scores.copy()
    for group in analysis.coupling.groups:
        scores[group.units] = known.added.get(group.name, scores[group.units])
    blind = tuple(name for name in found.blind if name not in known.errors)
    return replace(found, scores=scores, errors={**found.errors, **known.errors}, blind=blind, cuts={**found.cuts, **known.cuts})


def _weighed_spectra(analysis: Analysis, spectra: Mapping[str, Spectrum], factors: Mapping[str, float]) -> dict[str, Spectrum]:
    """Errors of what layers make, times the mean factor of the groups that they read: it tells what of such errors reaches the outputs.
    That of a residual stream which can only be cut with an expansion is of errors at a dozen layers at once, and says nothing of one:
    layers that read nothing else stay one, as where nothing is expanded."""
    standing, found = [group for group in analysis.coupling.groups if group.name not in analysis.expanding], {}
    every = {name for group in standing for name in group.consumers} if analysis.expanding else spectra.keys()
    for name, spectrum in spectra.items():
        if name not in every:
            continue
        known = [factors[group.name] for group in standing if name in group.consumers and group.name in factors]
        root = np.float32(np.exp(np.mean(np.log(known)) / 2) if known else 1.0)
        found[name] = replace(spectrum, made=spectrum.made * root**2, scale=spectrum.scale * root)
    return found


def weighed(coupling: Coupling, found: Elimination, factors: Mapping[str, float], looks: sensitivity.Looks) -> Elimination:
    """Scores and errors of each group times its factor (1 where that is unknown), and a word on it."""
    scores, notes = found.scores.copy(), list[str]()
    for group in coupling.groups:
        scores[group.units] *= factors.get(group.name, 1.0)
    errors = {name: row * factors.get(name, 1.0) for name, row in found.errors.items()}
    if len(factors) > 1:
        low, *_, high = sorted(factors, key=lambda name: factors[name])
        notes.append(
            f"errors of {len(factors)} groups weighed by how much of them reaches the outputs, each cut alone ({len(looks.shares)} x), on "
            f"{looks.held.samples} samples: from {factors[low]:.2g} ({low}) to {factors[high]:.2g} ({high}) times the median"
        )
    few = {name: share for name, share in found.scarce.items() if share > SCARCE}
    if few:
        most = max(few, key=lambda name: few[name])
        notes.append(
            f"{looks.samples} samples are few for what {len(few)} layer{'s read' if len(few) > 1 else ' reads'}, most for {most}: channels "
            f"that seem alike there are believed to {1 - few[most]:.0%} only. About {looks.wanted(few[most] / SCARCE)} samples would do"
        )
    return replace(found, scores=scores, errors=errors, notes=tuple(notes))


def elimination(
    prepared: Prepared, coupling: Coupling, batches: Iterable[Any], options: RepairOptions,
    advance: Callable[[int], None] = lambda steps: None, shares: Sequence[float] = (), seen: bool = False,
) -> Elimination:  # fmt: skip
    """Backward elimination of every group on the inputs of the layers that read it, in the original network. A look at every group is
    taken at each of these shares of units left. ``batches`` are inputs of the model; or, if it has ``seen`` them, a `Seen` of each layer.

    Raises:
        ModelError: the model cannot be run in segments.
    """
    look = look_of(prepared, coupling, options)
    with closing(look.store):
        ledger = _Ledger(coupling, look.store, look.layers, shares)
        for layer, _, inputs in look.known(iter(batches)) if seen else look.observed(batches, advance):
            ledger.add(layer, inputs)
    blind = tuple(group.name for group in coupling.groups if group.name not in ledger.errors)
    return Elimination(ledger.scores, ledger.errors, blind, ledger.cuts, ledger.scarce, spectra=ledger.spectra)


def look_of(prepared: Prepared, coupling: Coupling, options: RepairOptions) -> Look:
    """A pass that sees all that an elimination needs."""
    return Look(prepared, coupling, lambda layer: any((units >= 0).any() for units in layer.sources), options, RIDGE, shrinks=True)


Blocks = Iterator[tuple[Inputs, FloatArray]]
"""What each block of a layer reads, and H^-1 = (C + r I)^-1 (k, k) from the covariance C of that."""


class Look:
    """A pass over the original network, for what those layers read that are ``wanted`` and could be re-fitted. Activations of the pass are
    in ``store``, which is to be closed. ``strength``: of the ridge r, relative to the mean variance of what a layer reads; ``shrinks``: and
    C is shrunk as far as the samples are too few to know it (`ridge.Scatter`)."""

    def __init__(
        self, prepared: Prepared, coupling: Coupling, wanted: Callable[[Layer], bool], options: RepairOptions, strength: float,
        shrinks: bool = False,
    ) -> None:  # fmt: skip
        scene = steps.Scene(prepared.model, coupling, prepared.nodes, prepared.trace.shapes)
        self.layers = [layer for layer in coupling.layers if scene.weight(layer) and wanted(layer)]
        self._numbers = _numbers(coupling, self.layers)
        planned = steps.plan_steps(scene, [[layer] for layer in self.layers], {})
        self._steps, self._shapes = [task[0] for task in planned if isinstance(task, tuple)], scene.shapes
        self.store, self._ridge = walk.Store(lockstep.budget_of(options.memory, self._steps)), (strength, shrinks)
        after = walk.Walk(prepared.model, self.store, prepared.tokens)
        self._setting = lockstep.Setting(options, coupling, np.zeros(coupling.units, bool), after, after)

    def observed(self, batches: Iterable[Mapping[str, Array]], advance: Callable[[int], None]) -> Iterator[tuple[Layer, walk.Step, Blocks]]:
        """Each layer with its blocks; none where a layer is too wide or has too many. To be used up before the next layer is asked for.

        Raises:
            ModelError: the model cannot be run in segments.
        """
        return self.known(self.seen(batches, advance))

    def known(self, seen: Iterator[Seen | None]) -> Iterator[tuple[Layer, walk.Step, Blocks]]:
        """As `observed`, from what was seen of the layers."""
        for step, layer in zip(self._steps, self.layers, strict=True):
            yield layer, step, _blocks(self._setting.after, step, layer, seen, self._ridge[0])

    def seen(
        self, batches: Iterable[Mapping[str, Array]], advance: Callable[[int], None], share: Share = WHOLE
    ) -> Iterator[Seen | None]:
        """What every layer reads in these batches, which are a ``share`` of all; None where its matrices would be too large."""
        for feeds in batches:
            self._setting.after.feed(feeds)
        setting = replace(self._setting, batches=share.batches)
        for number, step in zip(self._numbers, self._steps, strict=True):
            yield _see(setting, step, number, share, self._ridge[1], self._shapes)
            advance(1)


def _numbers(coupling: Coupling, layers: Sequence[Layer]) -> list[int]:
    """Numbers of layers, by which rows are drawn: those that read nothing but what shrinks with an expansion have the last ones, so that
    the others see the rows that they would see without."""
    standing = np.ones(coupling.units + 1, bool)  # the last place stands for -1
    standing[[-1, *(unit for group in coupling.groups if group.name in coupling.expanding for unit in group.units)]] = False
    late = [not any(standing[units].any() for units in layer.sources) for layer in layers]
    return np.argsort(np.argsort(late, kind="stable")).tolist() if coupling.expanding else list(range(len(layers)))


def _see(
    setting: lockstep.Setting, step: walk.Step, number: int, share: Share, shrinks: bool, shapes: Mapping[str, tuple[int, ...]]
) -> Seen | None:
    after, form = setting.after, step.linear.form
    weight = step.weight.value(after.constant)
    summed, made = step.target != step.output, _Made(after, step, shapes)
    segment = after.advance([step.data, *([step.output, *lockstep.operands(after, step)] if summed else made.reads)])
    chain, seen, known = lockstep.Chain(), None, True
    for batch in range(after.batches):
        values, at = segment(batch), share.place(batch)
        data = values[step.data]
        output = values[step.output].shape if summed else made.shape(values)
        blocks = form.blocks(data.shape, weight.shape, output)
        matrix = form.matrix(weight, blocks)
        if blocks > MOST_BLOCKS or not lockstep.solvable(matrix.shape[1], np.inf) or not np.isfinite(data).all():
            known = known and bool(np.isfinite(data).all())  # a branch that is not taken may make no numbers of its data
            continue  # the segment must still run on every batch
        if summed and not batch:
            chain = lockstep.measure_chain(after, step, values[step.output], values, after)
        chosen = lockstep.positions(setting, step, (number, at), output, matrix.shape[1])
        rows, on = form.rows(data, output, chosen, blocks), lockstep.switched_on(after, step, batch, output, chosen)
        seen = seen or Seen.nothing(rows, chain.scale, shrinks)
        if batch < share.lead:
            seen.centre(rows, len(chosen), batch == share.lead - 1, on)
            continue
        seen.add(rows, len(chosen), at, on)
        if summed:
            target = lockstep.target_at(step, chain, values[step.output], values)
            seen.answered(form.answers(target, chosen, blocks).astype(np.float64), on)
    after.finish()
    return seen if known else None


class _Made:
    """The shape of what a layer makes, as traced; of data of other shapes it is computed, for one batch of each shape: nobody else needs
    what the layer makes before the next one."""

    def __init__(self, after: walk.Walk, step: walk.Step, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._after, self._step, self.reads = after, step, after.reads([step.data], [step.output])
        self._traced = shapes.get(step.data, ()), shapes.get(step.output, ())
        self._session: Session | None = None
        self._known: dict[tuple[int, ...], tuple[int, ...]] = {}

    def shape(self, values: Mapping[str, Array]) -> tuple[int, ...]:
        """Of what it makes of these values of what it reads."""
        shape, (data, output) = values[self._step.data].shape, self._traced
        if shape[1:] == data[1:] and data[:1] == output[:1] and shape:  # more samples
            return (shape[0], *output[1:])
        if shape not in self._known:
            self._session = self._session or self._after.session(self.reads, [self._step.output])
            assert self._session is not None
            self._known[shape] = self._session.run({name: values[name] for name in self.reads}, [self._step.output])[0].shape
        return self._known[shape]


def _blocks(after: walk.Walk, step: walk.Step, layer: Layer, every: Iterator[Seen | None], strength: float) -> Blocks:
    """What is to be known of a layer's inputs, and variance of its target, from what was seen next."""
    seen = next(every)
    if seen is None or not (sums := seen.gathered.sums()).count:
        return
    form, weight, scatter = step.linear.form, step.weight.value(after.constant), seen.scatter
    blocks = sums.shape[0]
    matrix = form.matrix(weight, blocks)
    scaled = matrix.astype(np.float64) * walk.per_block(seen.scale, matrix)
    channels, count = form.inputs_of(weight.shape, blocks), sums.count
    sources = layer.sources or (np.full(blocks * (int(channels.max()) + 1), -1),)
    means, taps = sums.means[0], prod(form.kernel)
    known = seen.scatter is not None and blocks == 1 and matrix.shape[2] <= MOST_MADE  # before the sums are used up
    read = (sums.of_channels(taps), sums.of_products(scaled[0])) if known else None
    variance = _variance(step, seen, sums, scaled) if read is None or step.target != step.output else float(np.trace(read[1]))
    for block, inverse in enumerate(ridge.ridge_inverse(sums, strength, scatter)):
        units = [source[block * (len(source) // blocks) + channels] for source in sources]
        key, held, scarce = (step.layer, "inverse", block), scaled[block].astype(np.float32), scatter.shares[block] if scatter else 0.0
        spectrum = None if read is None else _spectrum(*read, scaled[0], scarce, variance, seen.scale, step.alone)
        place = Place(layer, block, blocks, means[block], seen.scale, scarce, count / len(channels), spectrum)
        yield Inputs(key, place, held, channels, units, max(variance, ridge.TINY)), inverse


def _variance(step: walk.Step, seen: Seen, sums: linear.Normal | linear.Samples, weight: FloatArray) -> float:
    """Of the target, summed over its channels."""
    if step.target == step.output:
        return float(sums.spread(weight).sum())
    return float(np.maximum(seen.squares / sums.count - (seen.total / sums.count) ** 2, 0).sum())


def _spectrum(
    read: FloatArray, made: FloatArray, weight: FloatArray, scarce: float, variance: float, scale: Array, alone: bool
) -> Spectrum:
    """Both covariances, shrunk as far as the samples are too few to know them: C by (1 - s) C + s m I, and what is made of that. Errors of
    outputs that are read ``alone`` count alike, relative to their variance (`ridge.evened`)."""
    unit, taps = max(variance, ridge.TINY), len(weight) // len(read)
    mean = float(np.trace(read)) / len(weight)
    outputs = ((1 - scarce) * made + scarce * mean * (weight.T @ weight)) / unit
    inputs = (1 - scarce) * read + scarce * mean * taps * np.eye(len(read)) if taps > 1 else read[:0, :0]  # without a window nobody asks
    even = ridge.evened(np.diag(outputs)) if alone else np.ones(len(outputs))
    factor = np.broadcast_to(scale, (weight.shape[1],)) / np.sqrt(unit) * even
    return Spectrum(*(np.asarray(array, np.float32) for array in (even[:, None] * outputs * even, inputs, factor)))


class _Ledger:
    """What is known of layers until all readers of a group have been seen; then the group is eliminated, and what nobody waits for
    forgotten. The inverses of layers that read groups of which other readers are to come are in the store."""

    def __init__(self, coupling: Coupling, store: walk.Store, layers: Sequence[Layer], shares: Sequence[float]) -> None:
        self.scores = np.zeros(coupling.units)
        self.errors: dict[str, FloatArray] = {}
        self.cuts: dict[str, list[Cut]] = {}
        self.scarce: dict[str, float] = {}
        self.spectra: dict[str, Spectrum] = {}
        self._coupling, self._store, self._shares = coupling, store, shares
        self._group = np.full(coupling.units + 1, -1, np.int64)  # the last place stands for -1
        for number, group in enumerate(coupling.groups):
            self._group[group.units] = number
        self._expected = Counter(number for layer in layers for number in self._groups(layer.sources))
        self._readers: dict[int, list[Layer]] = {}
        for layer in coupling.layers:
            for number in self._groups(layer.sources):
                self._readers.setdefault(number, []).append(layer)
        self._waiting: dict[int, list[Inputs]] = {}
        self._uses: Counter[Hashable] = Counter()

    def _groups(self, kinds: Sequence[IntArray]) -> list[int]:
        return sorted({number for units in kinds for number in self._group[units].tolist()} - {-1})

    def add(self, layer: Layer, blocks: Blocks) -> None:
        """One more layer was seen; eliminates the groups of which it was the last reader."""
        for inputs, matrix in blocks:
            groups = self._groups(inputs.units)
            self._uses[inputs.key] = len(groups)
            if inputs.place.spectrum is not None:
                self.spectra[layer.node.name] = inputs.place.spectrum
            unknown = max(inputs.place.scarce, min(SCARCE * ENOUGH / inputs.place.rows, 1.0) if inputs.place.rows < 1 else 0.0)
            self.scarce[layer.node.name] = max(unknown, self.scarce.get(layer.node.name, 0.0))
            self._store.put(inputs.key, matrix)
            for number in groups:
                self._waiting.setdefault(number, []).append(inputs)
            del matrix
        for number in self._groups(layer.sources):
            self._expected[number] -= 1
            if not self._expected[number]:
                self._eliminate(number)

    def _eliminate(self, number: int) -> None:
        group = self._coupling.groups[number]
        place = np.full(self._coupling.units + 1, -1, np.int64)
        place[group.units] = np.arange(group.width)
        readers, seen = [], self._waiting.pop(number, [])
        for inputs in seen:
            self._uses[inputs.key] -= 1
            matrix = self._store.get(inputs.key)
            if self._uses[inputs.key]:
                matrix = matrix.copy()  # the elimination changes it
            else:
                self._store.drop(inputs.key)
            own = np.max([place[units] for units in inputs.units], axis=0)
            readers.append(Reader(matrix, inputs.weights.astype(np.float64), own, inputs.variance))
        if readers:
            order = eliminate(readers, group.width, self._shares if self._is_seen(number, seen) else (), group.blocks)
            self.scores[group.units[order.units]] = order.added
            self.errors[group.name] = order.errors
            cuts = [Cut(kept, float(order.errors[kept]), _changes(seen, weights)) for kept, weights in order.looks.items()]
            if cuts:
                self.cuts[group.name] = cuts

    def _is_seen(self, number: int, seen: Sequence[Inputs]) -> bool:
        """Whether all layers that mix units of a group with others were seen, so that their weights tell what its cut does."""
        units, known = self._coupling.groups[number].units, {id(inputs.place.layer) for inputs in seen}
        return all(id(layer) in known or np.isin(units, (*layer.writes, *layer.columns)).all() for layer in self._readers[number])


def _changes(readers: Sequence[Inputs], weights: Sequence[FloatArray]) -> list[Change]:
    """What becomes of the layers of blocks when those have other weights; biases keep the means of what they make."""
    changes: dict[int, Change] = {}
    for inputs, new in zip(readers, weights, strict=True):
        place, change = inputs.place, (new - inputs.weights).astype(np.float32)
        if id(place.layer) not in changes:
            shape = (place.blocks, *change.shape)
            changes[id(place.layer)] = Change(place.layer, np.zeros(shape, np.float32), np.zeros((shape[0], shape[2])), place.scale)
        whole = changes[id(place.layer)]
        whole.weight[place.block], whole.bias[place.block] = change, -place.means @ change
    return list(changes.values())
