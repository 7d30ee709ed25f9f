"""Selection that knows the repair: what is lost when units leave and the layers that read them are re-fitted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..graph import Prepared
from ..leastsquares import ridge_inverse
from ..normal import Gathered, Normal, Samples
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
class _Inputs:
    """What one block of a layer reads: weights (k, o) in units of the target, the unit of each row, the variance of the target, and under
    ``key`` in the store H^-1 (k, k)."""

    key: tuple[str, int]
    weights: Array
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
    scene = Scene(prepared.model, coupling, prepared.nodes, prepared.trace.shapes)
    layers = [layer for layer in coupling.layers if _reads_units(scene, layer)]
    steps = [own[0] for own in plan_steps(scene, [[layer] for layer in layers], {}) if isinstance(own, tuple)]
    store = Store(budget_of(options.memory, steps))
    try:
        walk = Walk(prepared.model, store)
        for feeds in batches:
            walk.feed(feeds)
        none = np.zeros(coupling.units, bool)
        setting = Setting(options, coupling, none, walk, walk, walk.batches)
        ledger = _Ledger(coupling, store, layers)
        for number, (step, layer) in enumerate(zip(steps, layers, strict=True)):
            ledger.add(layer, _observe(setting, step, layer, number))
            progress(number + 1, len(steps))
    finally:
        store.close()
    blind = tuple(group.name for group in coupling.groups if group.name not in ledger.errors)
    return Elimination(ledger.scores, ledger.errors, blind)


def _reads_units(scene: Scene, layer: Layer) -> bool:
    if layer.linear is None or layer.weight is None or not (layer.source >= 0).any():
        return False
    return scene.held(layer.node.inputs[layer.weight.position]) is not None


def _observe(setting: Setting, step: Step, layer: Layer, number: int) -> Iterable[tuple[_Inputs, FloatArray]]:
    """What is to be known of a layer's inputs (nothing, where its matrices would be too large), and variance of its target."""
    walk, form = setting.after, step.linear.form
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
    return _inputs(step, layer, sums, (weight, chain.scale, blocks), max(variance, np.finfo(np.float32).tiny))


def _inputs(
    step: Step, layer: Layer, sums: Normal | Samples, parts: tuple[Array, Array, int], variance: float
) -> Iterator[tuple[_Inputs, FloatArray]]:
    """Each block's inputs, with the inverse of their covariance."""
    weight, scale, blocks = parts
    form = step.linear.form
    matrix = form.matrix(weight, blocks).astype(np.float64)
    factor = np.broadcast_to(scale, (blocks * matrix.shape[2],)).reshape(blocks, 1, -1)
    channel = form.inputs_of(weight.shape, blocks)
    per_block = len(layer.source) // blocks
    for block, inverse in enumerate(ridge_inverse(sums, RIDGE)):
        units = layer.source[block * per_block + channel]
        yield _Inputs((f"inverse of {step.layer}", block), (matrix * factor)[block].astype(np.float32), units, variance), inverse


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
        self._waiting: dict[int, list[_Inputs]] = {}
        self._uses: Counter[tuple[str, int]] = Counter()

    def _groups(self, units: IntArray) -> list[int]:
        return sorted(set(self._group[units].tolist()) - {-1})

    def add(self, layer: Layer, found: Iterable[tuple[_Inputs, FloatArray]]) -> None:
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
