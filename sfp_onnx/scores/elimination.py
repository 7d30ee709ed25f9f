"""Backward elimination with the group optimal brain surgeon: which inputs can a least-squares fit do without?

For a layer with outputs X' a, inputs a of covariance C and H = C + ridge, removing the rows g of the weights X and re-solving the
others costs

    tr(X_g' (H^-1_gg)^-1 X_g),     X <- X - H^-1_.g (H^-1_gg)^-1 X_g,     H^-1 <- H^-1 - H^-1_.g (H^-1_gg)^-1 H^-1_g.

(Hassibi & Stork, NIPS 1992; for groups of rows: Frantar & Alistarh, NeurIPS 2022).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from ..core.options import RepairOptions
from ..core.types import Array, Coupling, FloatArray, IntArray, Layer
from ..coupling.analysis import Analysis, feeds_of
from ..data.dataset import Dataset
from ..graph import Prepared
from ..repair.linear import Gathered, factor, forward
from ..repair.lockstep import Chain, Setting, budget_of, measure_chain, operands, positions, solvable, target_at
from ..repair.ridge import ridge_inverse
from ..repair.steps import Scene, plan_steps
from ..repair.walk import Key, Step, Store, Walk
from .registry import Setting as Asked

PASSES = 64  # at most so many updates of a group; wide groups lose several units in one
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
    _subtracted: FloatArray = field(init=False)
    _width: int = field(init=False, default=0)
    _classes: list[tuple[IntArray, IntArray, FloatArray]] = field(init=False)

    def __post_init__(self) -> None:
        self._start()

    def _start(self) -> None:
        """Forget V, and look up the rows and blocks of units, by their number of rows: (units, rows (u, r), blocks (u, r, r))."""
        self._subtracted, self._width = np.zeros((len(self.unit), 0)), 0
        order = np.argsort(self.unit, kind="stable")
        units, first, counts = np.unique(self.unit[order], return_index=True, return_counts=True)
        self._classes = []
        for size in np.unique(counts[units >= 0]):
            same = np.flatnonzero((counts == size) & (units >= 0))
            rows = order[first[same, None] + np.arange(size)]
            self._classes.append((units[same], rows, self.inverse[rows[:, :, None], rows[:, None, :]]))

    def rows(self, units: IntArray) -> IntArray:
        """Rows of some units."""
        return np.flatnonzero(np.isin(self.unit, units))

    def costs(self, units: IntArray) -> FloatArray:
        """What removing each of these (sorted) units alone would add to the error."""
        costs = np.zeros(len(units))
        for same, rows, blocks in self._classes:
            asked = np.isin(same, units)
            x = self.x[rows[asked]]
            costs[np.searchsorted(units, same[asked])] = np.einsum("uro,uro->u", x, np.linalg.solve(blocks[asked], x))
        return costs / self.scale

    def remove(self, units: IntArray) -> float:
        """Remove units together and re-solve the rest; returns the error that this adds."""
        rows = self.rows(units)
        if not len(rows):
            return 0.0
        v = self._subtracted[:, : self._width]
        columns = self.inverse[:, rows] - v @ v[rows].T
        lower = factor(columns[rows], 0.0)
        taken, explained = forward(lower, columns.T).T, forward(lower, self.x[rows])
        self.x -= taken @ explained
        self.unit[rows] = -2
        kept = np.flatnonzero(self.unit != -2)
        self._collect(taken)
        if len(kept) <= SHRINK * len(self.unit):
            v = self._subtracted[kept, : self._width]
            self.inverse, self.x, self.unit = self.inverse[np.ix_(kept, kept)], self.x[kept], self.unit[kept]
            self.inverse -= v @ v.T
            self._start()
        return float(np.square(explained).sum()) / self.scale

    def _collect(self, taken: FloatArray) -> None:
        """Remember what a removal subtracts."""
        width = self._width + taken.shape[1]
        if width > self._subtracted.shape[1]:
            wider = np.empty((len(self.unit), max(width, 2 * self._subtracted.shape[1])))
            wider[:, : self._width] = self._subtracted[:, : self._width]
            self._subtracted = wider
        self._subtracted[:, self._width : width] = taken
        self._width = width
        for _, rows, blocks in self._classes:
            of_units = taken[rows]
            blocks -= of_units @ of_units.transpose(0, 2, 1)


def eliminate(readers: Sequence[Reader], width: int) -> tuple[IntArray, FloatArray]:
    """Remove all units of a group, always the one that adds least to the summed error of its readers.

    Returns:
        The units (positions in the group) in the order in which they leave, and the error that each one adds (not falling).
    """
    left = np.arange(width)
    together = max(1, -(-width // PASSES))
    order: list[int] = []
    added: list[float] = []
    while len(left):
        costs = sum((reader.costs(left) for reader in readers), np.zeros(len(left)))
        leaving = left[np.argsort(costs, kind="stable")[:together]]
        cost = sum(reader.remove(leaving) for reader in readers)
        order += leaving.tolist()
        added += [cost / len(leaving)] * len(leaving)
        left = np.setdiff1d(left, leaving)
    return np.asarray(order, np.int64), np.maximum.accumulate(np.asarray(added))


# ---- selection that knows the repair ---------------------------------------------------------------------------------

RIDGE = 1e-3
MOST_BLOCKS = 64  # convolutions with more groups (depthwise) lose outputs with their inputs


@dataclass(frozen=True)
class Elimination:
    """Per unit what its removal adds to the error (larger = keep), and per group the error by the number of units kept (0 .. width).
    Errors are relative to the variance of what the reading layers' outputs go into. ``blind``: groups that no such layer reads."""

    scores: FloatArray
    errors: Mapping[str, FloatArray]
    blind: tuple[str, ...]


@dataclass(frozen=True)
class Inputs:
    """What one block of a layer reads: weights (k, o) in units of the target, the channel of the block and the unit of each row, the
    variance of the target. ``key`` is a name for H^-1 (k, k)."""

    key: Key
    weights: Array
    channels: IntArray
    units: IntArray
    variance: float


ROWS = 32.0  # per input of a layer: half of what the repair takes, since the order of units needs less


def eliminated(analysis: Analysis, data: Dataset, setting: Asked) -> Elimination:
    """`elimination` of a whole model, as a score is asked for it."""
    with setting.progress("eliminating", len(analysis.coupling.layers)) as advance:
        options = RepairOptions(seed=setting.seed, rows_per_input=ROWS, memory=setting.memory)
        feeds = feeds_of(analysis, data)
        return elimination(analysis.prepared, analysis.coupling, feeds, options, lambda done, total: advance(1))


def elimination(
    prepared: Prepared,
    coupling: Coupling,
    batches: Iterable[Mapping[str, Array]],
    options: RepairOptions,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Elimination:
    """Backward elimination of every group on the inputs of the layers that read it, in the original network.

    Raises:
        ModelError: the model cannot be run in segments.
    """
    look = Look.at(prepared, coupling, lambda layer: bool((layer.source >= 0).any()), options, RIDGE)
    with closing(look.store()) as store:
        ledger = _Ledger(coupling, store, look.layers)
        for layer, _, inputs in look.observed(store, batches, progress):
            ledger.add(layer, inputs)
    blind = tuple(group.name for group in coupling.groups if group.name not in ledger.errors)
    return Elimination(ledger.scores, ledger.errors, blind)


@dataclass(frozen=True)
class Look:
    """A pass over the original network, for what layers read: those of ``layers`` (with their ``steps``)."""

    prepared: Prepared
    coupling: Coupling
    options: RepairOptions
    ridge: float
    layers: Sequence[Layer]
    steps: Sequence[Step]

    @classmethod
    def at(cls, prepared: Prepared, coupling: Coupling, wanted: Callable[[Layer], bool], options: RepairOptions, ridge: float) -> Look:
        """The layers that are ``wanted`` and could be re-fitted."""
        scene = Scene(prepared.model, coupling, prepared.nodes, prepared.trace.shapes)
        layers = [layer for layer in coupling.layers if _has_weight(scene, layer) and wanted(layer)]
        steps = [planned[0] for planned in plan_steps(scene, [[layer] for layer in layers], {}) if isinstance(planned, tuple)]
        return cls(prepared, coupling, options, ridge, layers, steps)

    def store(self) -> Store:
        """For the activations of the pass; to be closed."""
        return Store(budget_of(self.options.memory, self.steps))

    def observed(
        self, store: Store, batches: Iterable[Mapping[str, Array]], progress: Callable[[int, int], None]
    ) -> Iterator[tuple[Layer, Step, Iterable[tuple[Inputs, FloatArray]]]]:
        """Each layer with what its blocks read, and H^-1 = (C + r I)^-1 (k, k) from the covariance C of that; nothing where a layer is too
        wide or has too many blocks. To be used up before the next layer is asked for.

        Raises:
            ModelError: the model cannot be run in segments.
        """
        walk = Walk(self.prepared.model, store)
        for feeds in batches:
            walk.feed(feeds)
        none = np.zeros(self.coupling.units, bool)
        setting = Setting(self.options, self.coupling, none, walk, walk, walk.batches)
        for number, (step, layer) in enumerate(zip(self.steps, self.layers, strict=True)):
            yield layer, step, _observe(setting, step, layer, number, self.ridge)
            progress(number + 1, len(self.steps))


def _has_weight(scene: Scene, layer: Layer) -> bool:
    if layer.linear is None or layer.weight is None:
        return False
    return scene.held(layer.node.inputs[layer.weight.position]) is not None


def _observe(setting: Setting, step: Step, layer: Layer, number: int, ridge: float) -> Iterable[tuple[Inputs, FloatArray]]:
    """What is to be known of a layer's inputs (nothing, where its matrices would be too large), and variance of its target."""
    walk, form = setting.after, step.linear.form
    weight = step.weight.value(walk.constant)
    segment = walk.advance([step.data, step.output, *operands(walk, step)])
    gathered: Gathered | None = None
    chain = Chain(None, (), np.ones(1))
    total = squares = np.zeros(1)
    blocks = 1
    for batch in range(setting.batches):
        values = segment.run(batch)
        data, target = values[step.data], values[step.output]
        blocks = form.blocks(data.shape, weight.shape, target.shape)
        if blocks > MOST_BLOCKS:
            continue  # the segment must still run on every batch
        if step.target != step.output:
            chain = chain if batch else measure_chain(walk, step, target)
            target = target_at(walk, step, chain, target, batch)
        matrix = form.matrix(weight, blocks)
        chosen = positions(setting, step, (number, batch), target.shape, matrix.shape[1])
        if not solvable(matrix.shape[1], np.inf):
            continue
        rows = form.rows(data, target.shape, chosen, blocks)
        answers = form.answers(target, chosen, blocks).astype(np.float64)
        total = total + answers.sum(1)
        squares = squares + np.square(answers).sum(1)
        gathered = gathered or Gathered(blocks, rows.shape[2], 0)
        gathered.add(rows, np.zeros((blocks, rows.shape[1], 0), np.float32))
    walk.finish()
    sums = gathered.sums() if gathered else None
    if sums is None or not sums.count:
        return []
    variance = float(np.maximum(squares / sums.count - (total / sums.count) ** 2, 0).sum())
    variance = max(variance, float(np.finfo(np.float32).tiny))
    return _inputs(step, layer, weight, chain.scale, variance, blocks, ridge_inverse(sums, ridge))


def _inputs(
    step: Step, layer: Layer, weight: Array, scale: Array, variance: float, blocks: int, inverses: Iterable[FloatArray]
) -> Iterator[tuple[Inputs, FloatArray]]:
    """Each block's inputs, with the inverse of their covariance."""
    form = step.linear.form
    matrix = form.matrix(weight, blocks).astype(np.float64)
    factor = np.broadcast_to(scale, (blocks * matrix.shape[2],)).reshape(blocks, 1, -1)
    channels = form.inputs_of(weight.shape, blocks)
    source = layer.source if len(layer.source) else np.full(blocks * (int(channels.max()) + 1), -1)
    per_block = len(source) // blocks
    for block, inverse in enumerate(inverses):
        units = source[block * per_block + channels]
        key = Key(f"inverse of {step.layer}", block)
        yield Inputs(key, (matrix * factor)[block].astype(np.float32), channels, units, variance), inverse


class _Ledger:
    """What is known of layers until all readers of a group have been seen; then the group is eliminated, and what nobody waits for
    forgotten. The inverses of layers that read groups of which other readers are to come are in the store."""

    def __init__(self, coupling: Coupling, store: Store, layers: Sequence[Layer]) -> None:
        self.scores = np.zeros(coupling.units)
        self.errors: dict[str, FloatArray] = {}
        self._coupling, self._store = coupling, store
        self._group = np.full(coupling.units + 1, -1, np.int64)  # the last place stands for -1
        for number, group in enumerate(coupling.groups):
            self._group[group.units] = number
        self._expected = Counter(number for layer in layers for number in self._groups(layer.source))
        self._waiting: dict[int, list[Inputs]] = {}
        self._uses: Counter[tuple[str, int]] = Counter()

    def _groups(self, units: IntArray) -> list[int]:
        return sorted(set(self._group[units].tolist()) - {-1})

    def add(self, layer: Layer, blocks: Iterable[tuple[Inputs, FloatArray]]) -> None:
        """One more layer was seen; eliminates the groups of which it was the last reader."""
        for inputs, matrix in blocks:
            groups = self._groups(inputs.units)
            self._uses[inputs.key] = len(groups)
            self._store.put(inputs.key, matrix)
            for number in groups:
                self._waiting.setdefault(number, []).append(inputs)
            del matrix
        for number in self._groups(layer.source):
            self._expected[number] -= 1
            if not self._expected[number]:
                self._eliminate(number)

    def _eliminate(self, number: int) -> None:
        group = self._coupling.groups[number]
        place = np.full(self._coupling.units + 1, -1, np.int64)
        place[group.units] = np.arange(group.width)
        readers = []
        for inputs in self._waiting.pop(number, []):
            self._uses[inputs.key] -= 1
            matrix = self._store.get(inputs.key)
            if self._uses[inputs.key]:
                matrix = matrix.copy()  # the elimination changes it
            else:
                self._store.drop(inputs.key)
            readers.append(Reader(matrix, inputs.weights.astype(np.float64), place[inputs.units], inputs.variance))
        if readers:
            order, added = eliminate(readers, group.width)
            self.scores[group.units[order]] = added
            self.errors[group.name] = np.concatenate([[0.0], np.cumsum(added)])[::-1].copy()
