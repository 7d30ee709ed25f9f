"""Selection that knows the repair: what is lost when units leave and the layers that read them are re-fitted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ..graph import Prepared
from ..leastsquares import Normal
from ..obs import Reader, eliminate, reader
from ..records import Array, Coupling, FloatArray, IntArray, Layer, RepairOptions
from .lockstep import Chain, Setting, measure_chain, operands, positions, solvable, target_at
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
    """What one block of a layer reads: covariance (k, k), weights (k, o) in units of the target, the channel of the block and the unit of
    each row."""

    covariance: Array
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
    inputs: list[Inputs] = []
    for _, _, own in observed(prepared, coupling, lambda layer: bool((layer.source >= 0).any()), batches, options, progress):
        inputs += own
    return _eliminate(coupling, inputs)


def observed(
    prepared: Prepared,
    coupling: Coupling,
    wanted: Callable[[Layer], bool],
    batches: Iterable[Mapping[str, Array]],
    options: RepairOptions,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[Layer, Step, list[Inputs]]]:
    """What the layers that could be re-fitted, and are ``wanted``, read in the original network: one entry per block of a layer, none
    where a layer is too wide or has too many blocks.

    Raises:
        ModelError: the model cannot be run in segments.
    """
    scene = Scene(prepared.model, coupling, prepared.nodes, prepared.trace.shapes)
    layers = [layer for layer in coupling.layers if _has_weight(scene, layer) and wanted(layer)]
    steps = plan_steps(scene, layers, {})
    store = Store(options.memory)
    try:
        walk = Walk(prepared.model, store)
        for feeds in batches:
            walk.feed(feeds)
        none = np.zeros(coupling.units, bool)
        setting = Setting(options, coupling, none, walk, walk, walk.batches)
        for number, (step, layer) in enumerate(zip(steps, layers, strict=True)):
            yield layer, step, _observe(setting, step, layer, number)
            progress(number + 1, len(steps))
    finally:
        store.close()


def _has_weight(scene: Scene, layer: Layer) -> bool:
    return layer.linear is not None and layer.weight is not None and layer.node.inputs[layer.weight.position] in scene.constants


def _observe(setting: Setting, step: Step, layer: Layer, number: int) -> list[Inputs]:
    """Covariance of a layer's inputs and variance of its target."""
    walk, form = setting.after, step.linear.form
    weight = walk.constant(step.weight)
    segment = walk.advance([step.data, step.output, *operands(walk, step)])
    sums: Normal | None = None
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
        if not solvable(matrix.shape[1]):
            continue
        chosen = positions(setting, step, (number, batch), target.shape, matrix.shape[1])
        rows = form.rows(data, target.shape, chosen, blocks)
        answers = form.answers(target, chosen, blocks).astype(np.float64)
        total = total + answers.sum(1)
        squares = squares + np.square(answers).sum(1)
        if sums is None:
            sums = Normal.empty(blocks, rows.shape[2], 0)
        sums.update(rows, np.zeros((blocks, rows.shape[1], 0), np.float32))
    walk.finish()
    if sums is None or not sums.count:
        return []
    variance = float(np.maximum(squares / sums.count - (total / sums.count) ** 2, 0).sum())
    return _inputs(step, layer, sums, (weight, chain.scale, blocks), max(variance, np.finfo(np.float32).tiny))


def _inputs(step: Step, layer: Layer, sums: Normal, parts: tuple[Array, Array, int], variance: float) -> list[Inputs]:
    weight, scale, blocks = parts
    form = step.linear.form
    matrix = form.matrix(weight, blocks).astype(np.float64)
    covariance = sums.centred()[0] / sums.count
    factor = np.broadcast_to(scale, (blocks * matrix.shape[2],)).reshape(blocks, 1, -1)
    channel = form.inputs_of(weight.shape, blocks)
    source = layer.source if len(layer.source) else np.full(blocks * (int(channel.max()) + 1), -1)
    per_block = len(source) // blocks
    found = []
    for block in range(blocks):
        units = source[block * per_block + channel]
        found.append(Inputs(covariance[block].astype(np.float32), (matrix * factor)[block].astype(np.float32), channel, units, variance))
    return found


def _eliminate(coupling: Coupling, inputs: list[Inputs]) -> Elimination:
    scores = np.zeros(coupling.units)
    errors: dict[str, FloatArray] = {}
    blind: list[str] = []
    place = np.full(coupling.units + 1, -1, np.int64)
    for group in coupling.groups:
        place[:] = -1
        place[group.units] = np.arange(group.width)
        readers: list[Reader] = []
        for own in inputs:
            unit = place[own.units]  # -1 reads the last entry, which stays -1
            if (unit >= 0).any():
                readers.append(reader(own.covariance.astype(np.float64), own.weights, unit, own.variance, RIDGE))
        if not readers:
            blind.append(group.name)
            continue
        order, added = eliminate(readers, group.width)
        scores[group.units[order]] = added
        errors[group.name] = np.concatenate([[0.0], np.cumsum(added)])[::-1].copy()
    return Elimination(scores, errors, tuple(blind))
