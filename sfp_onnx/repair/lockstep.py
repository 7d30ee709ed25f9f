"""Original and changed network in lockstep, layer by layer: re-fit each layer's weights on the inputs that it now gets.

For a layer with rows P of its (already changed) input and a target behind it that is affine in its output u, t = s u + rest, the
error is e = t_original - rest - s (P W + b), and the change D of the weights solves min |e - s P D|^2 with a ridge. Where the
target is the sum behind a residual connection, the layer so corrects the error that the stream already carries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from .. import graph, runtime
from ..graph import Model, Prepared
from ..leastsquares import Normal, best_ridge, best_steps, mean_shift, solve
from ..records import Array, BoolArray, Coupling, FloatArray, IntArray, LayerFit, RepairOptions
from ..units import keep_mask
from .steps import Scene, Step, candidates, give_biases, plan_steps, tainted
from .store import Store
from .walk import Walk

MASKED_RIDGE = 1e-2  # masked problems are solved step by step, and held-out data choose the number of steps, which says as much as a ridge
GRAM_COPIES, GRAM_BYTES = 5, 2 * 10**9  # at most 7071 inputs
ROW_BYTES = 2**27  # of the rows that one batch is turned into
HELD_OUT = 8  # every eighth batch judges the fits
Feeds = Mapping[str, Array]


@dataclass(frozen=True)
class Setting:
    """What stays the same for all steps."""

    options: RepairOptions
    coupling: Coupling
    removed: BoolArray
    before: Walk
    after: Walk
    batches: int


def repair(
    prepared: Prepared,
    coupling: Coupling,
    removed: BoolArray,
    changed: Model,
    batches: Iterable[Feeds],
    options: RepairOptions,
    masks: Mapping[str, BoolArray] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Model, list[LayerFit]]:
    """Re-fit the weights and biases of the changed model, in topological order.

    Args:
        prepared: the original, as analysed.
        removed: units that ``changed`` lacks (none, if only weights were zeroed).
        batches: inputs; they are read once and remembered (in memory up to ``options.memory``, then in a temporary file).
        masks: by initializer of ``changed``: which weights may be other than zero.

    Returns:
        The repaired model (same shapes and names; biases where there were none), and what was done to each layer.

    Raises:
        ModelError: the model cannot be run in segments.
    """
    masks = masks or {}
    scene = Scene(changed, coupling, prepared.nodes, prepared.trace.shapes)
    layers = candidates(scene, tainted(prepared.nodes, coupling, removed, masks), masks)
    if not layers:
        return changed, []
    scene = give_biases(scene, layers)
    steps = plan_steps(scene, layers, masks)
    stores = [Store(options.memory // 2), Store(options.memory // 2)]
    try:
        before, after = Walk(prepared.model, stores[0]), Walk(scene.model, stores[1])
        count = 0
        for feeds in batches:
            before.feed(feeds)
            count = after.feed(feeds)
        setting = Setting(options, coupling, removed, before, after, count)
        fits = []
        for number, step in enumerate(steps):
            fits.append(_refit(setting, step, number))
            progress(number + 1, len(steps))
    finally:
        for store in stores:
            store.close()
    return graph.with_constants(scene.model, after.overrides), fits


# ---- one layer -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chain:
    """How the target depends on the output: a session that computes it from a given output (None: it is the output), the tensors
    that it also reads, and its scale per channel."""

    session: runtime.Session | None
    inputs: Sequence[str]
    scale: Array


def _refit(setting: Setting, step: Step, number: int) -> LayerFit:
    """One step: gather sums over all batches, solve, keep what held-out data confirm."""
    walk = setting.after
    weight = walk.constant(step.weight)
    reference, segment = setting.before.advance([step.reference]), walk.advance([step.data, *operands(walk, step)])
    sums: list[Normal] = []
    chain, energy = Chain(None, (), np.ones(1)), 0.0
    for batch in range(setting.batches):
        wanted = _kept(setting, step, reference.run(batch)[step.reference])
        data = segment.run(batch)[step.data]
        if batch == 0 and step.target != step.output:
            chain = measure_chain(walk, step, wanted)
        blocks = step.linear.form.blocks(data.shape, weight.shape, wanted.shape)
        matrix = step.linear.form.matrix(weight, blocks).astype(np.float32)
        chosen = positions(setting, step, (number, batch), wanted.shape, matrix.shape[1])
        rows = step.linear.form.rows(data, wanted.shape, chosen, blocks)
        answers = step.linear.form.answers(wanted, chosen, blocks).astype(np.float32)
        energy += float(np.square(answers - answers.mean(1, keepdims=True)).sum())
        errors = answers - _present(step, walk, chain, (rows, matrix, wanted, chosen, batch))
        if setting.options.fit == "bias" or not solvable(matrix.shape[1]):
            rows = rows[:, :, :0]
        if not sums:
            sums = [Normal.empty(blocks, rows.shape[2], errors.shape[2]) for _ in range(2)]
        for own, places in zip(sums, _split(setting, batch, rows.shape[1]), strict=True):
            own.update(rows[:, places], errors[:, places])
    setting.before.finish()
    walk.finish()
    return _accept(setting, step, (sums[0], sums[1]), chain.scale, energy)


def solvable(inputs: int) -> bool:
    """Whether the Gram matrices of a layer with so many inputs (sums to fit and to judge, and copies to solve) take reasonable memory;
    if they do not, only its bias is fitted."""
    return GRAM_COPIES * 8 * inputs**2 <= GRAM_BYTES


def operands(walk: Walk, step: Step) -> list[str]:
    """What the nodes between output and target read beside it."""
    if step.target == step.output:
        return []
    inside = graph.between(walk.nodes, {step.output}, [step.target])
    behind = {step.output}
    chain = []
    for index in inside:
        node = walk.nodes[index]
        if behind & set(node.inputs):
            behind.update(node.outputs)
            chain.append(node)
    return sorted({name for node in chain for name in node.inputs if walk.is_tensor(name)} - behind)


def _kept(setting: Setting, step: Step, array: Array) -> Array:
    """A tensor of the original without the channels that were removed."""
    for own in setting.coupling.tensors.get(step.reference, ()):
        mask = keep_mask(own.units, setting.removed)
        if not mask.all() and array.shape[own.axis] == len(mask):
            array = np.compress(mask, array, own.axis)
    return array


def measure_chain(walk: Walk, step: Step, wanted: Array) -> Chain:
    """The scale is what the target gains when the output goes from zeros to ones.

    Raises:
        ModelError: onnxruntime cannot run that part alone.
    """
    session, inputs = walk.side([step.output], step.target)
    chain = Chain(session, inputs, np.ones(1))
    gained = target_at(walk, step, chain, np.ones_like(wanted), 0) - target_at(walk, step, chain, np.zeros_like(wanted), 0)
    per_channel = np.moveaxis(gained, step.linear.form.out_axis, -1).reshape(-1, gained.shape[step.linear.form.out_axis])
    return Chain(session, inputs, per_channel.mean(0, dtype=np.float64))


def target_at(walk: Walk, step: Step, chain: Chain, output: Array, batch: int) -> Array:
    assert chain.session is not None
    feeds = {name: walk.store.get((name, batch)) for name in chain.inputs}
    found: Array = chain.session.run({step.output: output, **feeds}, [step.target])[0]
    return found


def _present(step: Step, walk: Walk, chain: Chain, parts: tuple[Array, Array, Array, IntArray, int]) -> Array:
    """rest + s (P W + b) at the chosen positions: where the target stands now."""
    rows, matrix, wanted, chosen, batch = parts
    made = rows @ matrix
    if step.bias is not None and step.inside:
        vector = walk.constant(step.bias).astype(np.float32).reshape(-1) * np.float32(step.linear.bias_scale)
        made += vector.reshape(len(made), 1, -1)
    if chain.session is None:
        return made
    rest = step.linear.form.answers(target_at(walk, step, chain, np.zeros_like(wanted), batch), chosen, len(rows))
    found: Array = rest.astype(np.float32) + made * _per_block(chain.scale, made).astype(np.float32)
    return found


def _per_block(scale: Array, made: Array) -> Array:
    """A value per output channel as (blocks, 1, outputs of a block)."""
    return np.broadcast_to(scale, (len(made) * made.shape[-1],)).reshape(len(made), 1, -1)


def positions(setting: Setting, step: Step, seed: tuple[int, int], output: Sequence[int], inputs: int) -> IntArray:
    """Positions of the output to look at, (samples, per sample): enough rows for the number of inputs, one drawn at random from
    each of as many equal stretches."""
    samples, size = step.linear.form.positions(output)
    rows = setting.options.rows_per_input * inputs / max(1, setting.batches * samples)
    most = max(1, ROW_BYTES // (4 * inputs * samples))
    count = min(size, most, max(setting.options.least_positions, ceil(rows)))
    if count == size:
        return np.broadcast_to(np.arange(size), (samples, size))
    draws = np.random.default_rng([setting.options.seed, *seed]).random((samples, count))
    return ((np.arange(count) + draws) * (size / count)).astype(np.int64)


def _split(setting: Setting, batch: int, rows: int) -> tuple[IntArray, IntArray]:
    """Which rows of a batch are for fitting and which for judging: whole batches, or every eighth row of a single one."""
    every = np.arange(rows)
    if setting.batches == 1:
        return every[every % HELD_OUT != HELD_OUT - 1], every[every % HELD_OUT == HELD_OUT - 1]
    held = batch % HELD_OUT == HELD_OUT - 1 or (setting.batches < HELD_OUT and batch == setting.batches - 1)
    return (every[:0], every) if held else (every, every[:0])


def _accept(setting: Setting, step: Step, sums: tuple[Normal, Normal], scale: Array, energy: float) -> LayerFit:
    """Take the change that leaves the least error on held-out rows, fitted again on all rows; none if nothing helps."""
    fit, held = sums if step.bias is not None else (sums[0].without_means(), sums[1].without_means())
    before, kind, ridge = float(held.squares.sum()), "unchanged", 0.0
    steps: int | None = None
    best = before
    weight, mask = setting.after.constant(step.weight), None
    blocks = len(fit.gram)
    if step.mask is not None:
        mask = step.linear.form.matrix(step.mask, blocks)
    if held.count and step.bias is not None and (shifted := held.error(*mean_shift(fit))) < best:
        best, kind = shifted, "bias"
    if held.count and fit.gram.shape[1]:
        if mask is None:
            ridge, error = best_ridge(fit, held, setting.options.ridges)
        else:
            ridge = MASKED_RIDGE
            steps, error = best_steps(fit, held, ridge, mask)
        if error < best:
            best, kind = error, "weights"
    if kind != "unchanged":
        together = fit.merge(held)
        change, shift = solve(together, ridge, mask, steps) if kind == "weights" else mean_shift(together)
        _write(setting, step, weight, (change, shift), scale)
    rows = fit.count + held.count
    share = rows / held.count / energy if held.count and energy else 0.0
    return LayerFit(step.layer, kind, ridge, int(rows), before * share, best * share)


def _write(setting: Setting, step: Step, weight: Array, change: tuple[FloatArray, FloatArray], scale: Array) -> None:
    """Put a change, given in units of the target, into weight and bias."""
    form, walk = step.linear.form, setting.after
    factor = _per_block(np.asarray(scale, np.float64), change[0])
    usable = np.abs(factor) > np.finfo(np.float32).tiny
    inverse = np.where(usable, 1 / np.where(usable, factor, 1), 0.0)
    if change[0].shape[1]:
        matrix = form.matrix(weight, len(change[0])).astype(np.float64) + change[0] * inverse
        walk.overrides[step.weight] = np.ascontiguousarray(form.weight(matrix, weight.shape).astype(weight.dtype))
    if step.bias is not None:
        old = walk.constant(step.bias)
        shift = (change[1] * inverse[:, 0]).reshape(-1) / (step.linear.bias_scale if step.inside else 1.0)
        walk.overrides[step.bias] = (old.astype(np.float64) + shift.reshape(old.shape)).astype(old.dtype)
