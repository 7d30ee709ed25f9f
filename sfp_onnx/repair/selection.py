"""Selection that knows the repair: what is lost when units leave and the layers that read them are re-fitted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from ..graph import Prepared
from ..leastsquares import ridge_inverse
from ..normal import Gathered
from ..obs import Reader, eliminate
from ..records import Array, Coupling, FloatArray, IntArray, Layer, RepairOptions
from .lockstep import Chain, Setting, budget_of, measure_chain, operands, positions, solvable, target_at
from .steps import Scene, Step, plan_steps
from .store import Store
from .walk import Walk

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

    key: tuple[str, int]
    weights: Array
    channels: IntArray
    units: IntArray
    variance: float


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
        for layer, _, found in look.observed(store, batches, progress):
            ledger.add(layer, found)
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
    def at(
        cls, prepared: Prepared, coupling: Coupling, wanted: Callable[[Layer], bool], options: RepairOptions, ridge: float
    ) -> Look:
        """The layers that are ``wanted`` and could be re-fitted."""
        scene = Scene(prepared.model, coupling, prepared.nodes, prepared.trace.shapes)
        layers = [layer for layer in coupling.layers if _has_weight(scene, layer) and wanted(layer)]
        steps = [own[0] for own in plan_steps(scene, [[layer] for layer in layers], {}) if isinstance(own, tuple)]
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
            yield layer, step, _observe(setting, step, layer, (number, self.ridge))
            progress(number + 1, len(self.steps))


def _has_weight(scene: Scene, layer: Layer) -> bool:
    if layer.linear is None or layer.weight is None:
        return False
    return scene.held(layer.node.inputs[layer.weight.position]) is not None


def _observe(setting: Setting, step: Step, layer: Layer, place: tuple[int, float]) -> Iterable[tuple[Inputs, FloatArray]]:
    """What is to be known of a layer's inputs (nothing, where its matrices would be too large), and variance of its target."""
    walk, form, (number, ridge) = setting.after, step.linear.form, place
    weight = step.weight.value(walk.constant)
    segment = walk.advance([step.data, step.output, *operands(walk, step)])
    gathered: Gathered | None = None
    chain = Chain(None, (), np.ones(1))
    total = squares = np.zeros(1)
    blocks = 1
    for batch in range(setting.batches):
        found = segment.run(batch)
        data, target = found[step.data], found[step.output]
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
    return _inputs(step, layer, ridge_inverse(sums, ridge), (weight, chain.scale, blocks), variance)


def _inputs(
    step: Step, layer: Layer, inverses: Iterable[FloatArray], parts: tuple[Array, Array, int], variance: float
) -> Iterator[tuple[Inputs, FloatArray]]:
    """Each block's inputs, with the inverse of their covariance."""
    weight, scale, blocks = parts
    form = step.linear.form
    matrix = form.matrix(weight, blocks).astype(np.float64)
    factor = np.broadcast_to(scale, (blocks * matrix.shape[2],)).reshape(blocks, 1, -1)
    channels = form.inputs_of(weight.shape, blocks)
    source = layer.source if len(layer.source) else np.full(blocks * (int(channels.max()) + 1), -1)
    per_block = len(source) // blocks
    for block, inverse in enumerate(inverses):
        units = source[block * per_block + channels]
        key = (f"inverse of {step.layer}", block)
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

    def add(self, layer: Layer, found: Iterable[tuple[Inputs, FloatArray]]) -> None:
        """One more layer was seen; eliminates the groups of which it was the last reader."""
        for own, matrix in found:
            groups = self._groups(own.units)
            self._uses[own.key] = len(groups)
            self._store.put(own.key, matrix)
            for number in groups:
                self._waiting.setdefault(number, []).append(own)
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
        for own in self._waiting.pop(number, []):
            self._uses[own.key] -= 1
            matrix = self._store.get(own.key)
            if self._uses[own.key]:
                matrix = matrix.copy()  # the elimination changes it
            else:
                self._store.drop(own.key)
            readers.append(Reader(matrix, own.weights.astype(np.float64), place[own.units], own.variance))
        if readers:
            order, added = eliminate(readers, group.width)
            self.scores[group.units[order]] = added
            self.errors[group.name] = np.concatenate([[0.0], np.cumsum(added)])[::-1].copy()
