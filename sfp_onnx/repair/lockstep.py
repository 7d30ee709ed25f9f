"""Original and changed network in lockstep, layer by layer: re-fit each layer's weights on the inputs that it now gets.

For a layer with rows P of its (already changed) input and a target behind it that is affine in its output u, t = s u + rest, the
error is e = t_original - rest - s (P W + b), and the change D of the weights solves min |e - s P D|^2 with a ridge. Where the
target is the sum behind a residual connection, the layer so corrects the error that the stream already carries.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType

import numpy as np

from ..core.options import RepairOptions
from ..core.system import resident
from ..core.types import Array, BoolArray, Coupling, Factor, FloatArray, IntArray, Layer
from ..coupling.cost import kept_masks
from ..graph import Model, Prepared, extract
from ..runtime import Session
from .linear import Gathered, Joint, Sums, together
from .ridge import CG_STEPS, Limit, as_varied, best_ridge, best_steps, lowered, mean_shift, solve, unlimited
from .steps import Scene, candidates, ends, give_biases, given_before, plan_steps, tainted
from .walk import Aim, Coding, End, Step, Store, Walk, inverse_of, per_block

MASKED_RIDGE = 1e-2  # masked problems are solved step by step, and held-out data choose the number of steps, which says as much as a ridge
GRAM_COPIES, GRAM_BYTES = 5, 2 * 10**9  # at most 7071 inputs
BATCH_BYTES = 2**29  # of one batch at work in both models: what all its activations may take (`coupling.analysis.batch_size`)
ROW_BYTES = 2**27  # of the rows that one batch is turned into
HELD_OUT = 8  # every eighth batch judges the fits


@dataclass(frozen=True)
class LayerFit:
    """What the repair did to one layer: ``kind`` is "weights", "bias", "unchanged" (nothing helped) or "kept" (it cannot be re-fitted);
    errors are those of its target on held-out rows, relative to the target's variance."""

    layer: str
    kind: str
    ridge: float
    rows: int
    error_before: float
    error_after: float


@dataclass(frozen=True)
class Setting:
    """What stays the same for all steps. ``batches``: of all the data, if the walks have only some of them."""

    options: RepairOptions
    coupling: Coupling
    removed: BoolArray
    before: Walk
    after: Walk
    batches: int = 0
    mixes: Mapping[str, FloatArray] = field(default_factory=dict)


def repair(
    prepared: Prepared, coupling: Coupling, removed: BoolArray, changed: Model, batches: Iterable[Mapping[str, Array]],
    options: RepairOptions, masks: Mapping[str, BoolArray], advance: Callable[[int], None] = lambda steps: None,
    factors: Mapping[str, Factor] = MappingProxyType({}), mixes: Mapping[str, FloatArray] = MappingProxyType({}), every: bool = False,
) -> tuple[Model, list[LayerFit]]:  # fmt: skip
    """Re-fit the weights and biases of the changed model, in topological order.

    Args:
        prepared: the original, as analysed.
        removed: units that ``changed`` lacks (none, if only weights were zeroed).
        batches: inputs; they are read once and remembered (in memory up to ``options.memory``, then in a temporary file).
        masks: by initializer of ``changed``: which weights may be other than zero.
        every: re-fit all layers, also those that read nothing that changed, since their weights did.
        advance: called with 1 whenever a layer, or those that share a weight, are done.
        factors: by initializer of ``changed``: which weights are of lower rank, and keep it.
        mixes: of layers whose channels are mixed from those of the original: by what (channels of the original, channels).

    Returns:
        The repaired model (same shapes and names; biases where there were none), and what was done to each layer.

    Raises:
        ModelError: the model cannot be run in segments.
    """
    scene, tasks, kept = prepared_for(prepared, coupling, removed, changed, {*masks, *factors}, every)
    fits = [LayerFit(name, "kept", 0.0, 0, 0.0, 0.0) for name in kept]
    planned = plan_steps(scene, tasks, masks, ends(scene, removed), factors)
    if not planned:
        return changed, fits
    budget = budget_of(options.memory, [step for task in planned if isinstance(task, tuple) for step in task])
    with closing(Store(budget // 2)) as first, closing(Store(budget // 2)) as second:
        before, after = Walk(prepared.model, first, prepared.tokens), Walk(scene.model, second)
        for feeds in batches:
            before.feed(feeds)
            after.feed(feeds)
        setting = Setting(options, coupling, removed, before, after, mixes=mixes)
        for number, task in enumerate(planned):
            fits += [refit_end(setting, task)] if isinstance(task, End) else _refit(setting, task, number)
            advance(1)
    return extract.with_constants(scene.model, after.overrides), fits


def prepared_for(
    prepared: Prepared, coupling: Coupling, removed: BoolArray, changed: Model, weights: Collection[str] = (), every: bool = False
) -> tuple[Scene, list[list[Layer]], list[str]]:
    """The changed model with a bias for every layer that will be re-fitted, these layers (those that share a weight together), and the
    names of those that cannot be. ``weights``: initializers that were changed beside the cut."""
    scene = Scene(changed, coupling, prepared.nodes, prepared.trace.shapes, given_before(changed, prepared.nodes))
    affected = {layer.node.outputs[0] for layer in coupling.layers} if every else tainted(prepared.nodes, coupling, removed, weights)
    tasks, kept = candidates(scene, affected, weights)
    return give_biases(scene, [layer for layers in tasks for layer in layers]), tasks, kept


# ---- one layer -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chain:
    """How the target depends on the output: a session that computes it from a given output (None: it is the output) and the tensors
    that it also reads (``inputs``: both), and its scale per channel."""

    session: Session | None = None
    inputs: Sequence[str] = ()
    scale: Array = field(default_factory=lambda: np.ones(1))


@dataclass
class Use:
    """What is gathered of one layer: sums to fit on and to judge by, over its ``inputs`` (0: only the bias is fitted), and the squared
    distances of the target from its means (blocks, outputs)."""

    step: Step
    chain: Chain = field(default_factory=Chain)
    energy: FloatArray = field(default_factory=lambda: np.zeros(1))
    inputs: int = 0
    sums: tuple[Gathered, ...] = ()

    def add(
        self, setting: Setting, weight: Array, values: Mapping[str, Array], wanted: Array, seed: tuple[int, ...], scaled: bool
    ) -> None:  # fmt: skip
        """One more batch: ``values`` of what the layer and the nodes behind it read, and what the original has for its target
        (``wanted``). ``scaled``: errors in units of the target, not of the output."""
        step, walk, batch, form, data = self.step, setting.after, seed[1], self.step.linear.form, values[self.step.data]
        wanted = _kept(setting, step, wanted)
        if batch == 0 and step.target != step.output:
            self.chain = measure_chain(walk, step, wanted, values, setting.before)
        blocks = form.blocks(data.shape, weight.shape, wanted.shape)
        matrix = form.matrix(weight, blocks).astype(np.float32)
        chosen = positions(setting, step, seed, wanted.shape, matrix.shape[1])
        on = switched_on(setting.before, step, batch, wanted.shape, chosen)
        there = slice(None) if on is None else on.reshape(-1)
        rows = form.rows(data, wanted.shape, chosen, blocks)[:, there]
        answers = form.answers(wanted, chosen, blocks)[:, there].astype(np.float32)
        present = rows @ matrix  # rest + s (P W + b), where the target stands now
        if step.bias is not None and step.inside:
            vector = step.bias.value(walk.constant).astype(np.float32).reshape(-1) * np.float32(step.linear.bias_scale)
            present += vector.reshape(blocks, 1, -1)
        if self.chain.session is not None:
            rest = form.answers(target_at(step, self.chain, np.zeros_like(wanted), values), chosen, blocks)[:, there]
            present = rest.astype(np.float32) + present * per_block(self.chain.scale, present).astype(np.float32)
        errors = answers - present
        if not scaled:
            errors = errors * inverse_of(per_block(self.chain.scale, errors)).astype(np.float32)
        if not self.sums:
            few = chosen.size * walk.batches if scaled and step.mask is None else np.inf  # others need products of inputs
            self.inputs = matrix.shape[1] if setting.options.kind == "lstsq" and solvable(matrix.shape[1], few) else 0
            self.sums = tuple(Gathered(blocks, self.inputs, errors.shape[2]) for _ in range(2))
        self.energy = self.energy + _gather(walk, batch, self.sums, rows[:, :, : self.inputs], errors, answers)


def _gather(walk: Walk, batch: int, sums: Sequence[Gathered], rows: Array, errors: Array, answers: Array) -> FloatArray:
    """Add rows of a batch to the sums to fit on or to those to judge by: whole batches, or every eighth row of a single one. Returns how
    far the ``answers`` are from their means."""
    if not rows.shape[1]:
        return np.zeros(1)  # all tokens of the batch are off
    every = np.arange(rows.shape[1])
    held = every % HELD_OUT == HELD_OUT - 1
    places: Sequence[slice | IntArray | None] = every[~held], every[held]
    if walk.batches > 1:
        judged = batch % HELD_OUT == HELD_OUT - 1 or (walk.batches < HELD_OUT and batch == walk.batches - 1)
        places = (None, slice(None)) if judged else (slice(None), None)
    for gathered, place in zip(sums, places, strict=True):
        if place is not None:
            gathered.add(rows[:, place], errors[:, place])
    return np.asarray(np.square(answers - answers.mean(1, keepdims=True)).sum(1, dtype=np.float64))


def _refit(setting: Setting, steps: Sequence[Step], number: int) -> list[LayerFit]:
    """One layer, or those that share a weight: gather sums over all batches, solve, keep what held-out data confirm."""
    walk = setting.after
    weight = steps[0].weight.value(walk.constant)
    reference = setting.before.advance([step.reference for step in steps])
    segment = walk.advance([name for step in steps for name in (step.data, *operands(walk, step))])
    uses = [Use(step) for step in steps]
    for batch in range(walk.batches):
        originals, values = reference(batch), segment(batch)
        for place, use in enumerate(uses):
            wanted = originals[use.step.reference]
            use.add(setting, weight, values, wanted, (number, batch, *([place] if place else [])), len(uses) == 1)
    setting.before.finish()
    walk.finish()
    return _accept(setting, uses, weight)


def refit_end(setting: Setting, end: End) -> LayerFit:
    """The constant of a vanished branch: what the original sum has on average more than the rest of it in the changed model."""
    walk = setting.after
    value = walk.constant(end.output)
    reference, segment = setting.before.advance([end.reference]), walk.advance(operands(walk, end))
    chain, sums, energy = Chain(), [Gathered(1, 0, value.size) for _ in range(2)], 0.0
    for batch in range(walk.batches):
        wanted = _kept(setting, end, reference(batch)[end.reference])
        values = segment(batch)
        chain = chain if batch else measure_chain(walk, end, value, values, setting.before)
        errors = wanted.astype(np.float32) - target_at(end, chain, value, values)
        lead = wanted.shape if value.size == 1 else without(wanted.shape, end.axis)
        on = setting.before.rows(end.reference, lead, batch)
        there = slice(None) if on is None else on.reshape(-1)
        rows, answers = (_vectors(tensor, end.axis, value.size)[:, there] for tensor in (errors, wanted))
        energy += float(_gather(walk, batch, sums, rows[:, :, :0], rows, answers).sum())
    setting.before.finish()
    walk.finish()
    fit, held = (gathered.sums() for gathered in sums)
    before, after = held.error(np.zeros(fit.shape), np.zeros((1, value.size))), held.error(*mean_shift(fit))
    better = bool(held.count) and after < before
    if better:
        shift = mean_shift(together(fit, held))[1] * inverse_of(chain.scale if value.size > 1 else chain.scale.mean(keepdims=True))
        walk.overrides[end.output] = (value + shift.reshape(value.shape)).astype(value.dtype)
    share = fit.count / held.count / energy if held.count and energy else 0.0
    return LayerFit(end.layer, "bias" if better else "unchanged", 0.0, int(fit.count), before * share, min(before, after) * share)


def without(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    """Sizes of all other axes."""
    return tuple(size for other, size in enumerate(shape) if other != axis % len(shape))


def switched_on(walk: Walk, step: Step, batch: int, output: Sequence[int], chosen: IntArray) -> BoolArray | None:
    """Which of the ``chosen`` positions (samples, per sample) of what a layer makes no mask switches off (None: all)."""
    on = walk.rows(step.reference, without(output, step.linear.form.out_axis), batch)
    return None if on is None else np.take_along_axis(on.reshape(len(chosen), -1), chosen, 1)


def _vectors(array: Array, axis: int, size: int) -> Array:
    """Values (1, positions, channels along ``axis``) of a tensor; one channel if ``size`` is 1."""
    moved: Array = np.moveaxis(array, axis, -1) if size > 1 else array[..., None]
    return moved.reshape(1, -1, size)


def solvable(inputs: int, rows: float) -> bool:
    """Whether the matrices of a layer with so many inputs and rows (sums to fit and to judge, and copies to solve) take reasonable memory;
    if they do not, only its bias is fitted."""
    return GRAM_COPIES * 8 * min(inputs, rows) * inputs <= GRAM_BYTES


def budget_of(memory: int, steps: Iterable[Step]) -> int:
    """Bytes that are left to remember activations in when what is held already, the matrices of the widest layer and those of one batch
    have their share."""
    inputs = [len(step.linear.form.inputs_of(step.weight.shape, 1)) for step in steps]
    largest = max((count for count in inputs if solvable(count, np.inf)), default=0)
    taken = resident() + BATCH_BYTES + (GRAM_COPIES + 1) * 8 * largest**2  # one for rows on their way into the sums
    return max(memory - taken, memory // 4)


def operands(walk: Walk, step: Aim) -> list[str]:
    """What the nodes between output and target read beside it."""
    if step.target == step.output:
        return []
    behind = {node.index for node in walk.index.reached([step.output])}
    chain = [node for node in walk.index.needed([step.target], {step.output}) if node.index in behind]
    inside = {step.output, *(name for node in chain for name in node.outputs)}
    return sorted({name for node in chain for name in node.inputs if walk.is_tensor(name)} - inside)


def _kept(setting: Setting, step: Aim, array: Array) -> Array:
    """A tensor of the original without the channels that were removed, in the coordinates that its layer makes."""
    if step.layer in setting.mixes and isinstance(step, Step):
        axis = step.linear.form.out_axis
        mixed = np.moveaxis(array, axis, -1) @ setting.mixes[step.layer].astype(array.dtype)
        return np.ascontiguousarray(np.moveaxis(mixed, -1, axis))
    for axis, mask in kept_masks(setting.coupling.tensors.get(step.reference, ()), setting.removed).items():
        if not mask.all() and array.shape[axis] == len(mask):
            array = np.compress(mask, array, axis)
    return array


def measure_chain(walk: Walk, step: Step | End, like: Array, values: Mapping[str, Array], before: Walk) -> Chain:
    """The scale is what the target gains in the first batch when the output (of the shape of ``like``) goes from zeros to ones; ``values``
    of the other operands. ``before``: the original, which knows what tokens are off.

    Raises:
        ModelError: onnxruntime cannot run that part alone.
    """
    session, inputs = walk.side([step.output, *operands(walk, step)], [step.target])
    chain = Chain(session, inputs)
    gained = target_at(step, chain, np.ones_like(like), values) - target_at(step, chain, np.zeros_like(like), values)
    axis = step.axis if isinstance(step, End) else step.linear.form.out_axis
    per_channel, on = np.moveaxis(gained, axis, -1), before.rows(step.reference, without(gained.shape, axis), 0)
    per_channel = per_channel.reshape(-1, gained.shape[axis]) if on is None or not on.any() else per_channel[on]
    return Chain(session, inputs, per_channel.mean(0, dtype=np.float64))


def target_at(step: Aim, chain: Chain, output: Array, values: Mapping[str, Array]) -> Array:
    assert chain.session is not None
    given = {**values, step.output: output}
    return np.asarray(chain.session.run({name: given[name] for name in chain.inputs}, [step.target])[0])


def positions(setting: Setting, step: Step, seed: tuple[int, ...], output: Sequence[int], inputs: int) -> IntArray:
    """Positions of the output to look at, (samples, per sample): enough rows for the number of inputs, one drawn at random from
    each of as many equal stretches."""
    samples, size = step.linear.form.positions(output)
    rows = setting.options.rows_per_input * inputs / max(1, (setting.batches or setting.after.batches) * samples)
    most = max(1, ROW_BYTES // (4 * inputs * samples))
    count = min(size, most, max(setting.options.least_positions, int(np.ceil(rows))))
    if count == size:
        return np.broadcast_to(np.arange(size), (samples, size))
    draws = np.random.default_rng([setting.options.seed, *seed]).random((samples, count))
    return ((np.arange(count) + draws) * (size / count)).astype(np.int64)


def _accept(setting: Setting, uses: Sequence[Use], weight: Array) -> list[LayerFit]:
    """Take the change that leaves the least error on held-out rows, fitted again on all rows; none if nothing helps."""
    steps, scale = [use.step for use in uses], uses[0].chain.scale if len(uses) == 1 else np.ones(1)
    fit, held = (_sums(uses, part) for part in range(2))
    blocks, inputs, _ = fit.shape
    rows, energy = fit.count + held.count, sum(float(use.energy.sum()) for use in uses)
    share = rows / held.count / energy if held.count and energy else 0.0
    shifted = mean_shift(fit)
    before = best = held.error(shifted[0], np.zeros_like(shifted[1]))
    kind, ridge, coding = "unchanged", 0.0, Coding(setting.after, steps, weight, scale)
    count, limit = CG_STEPS, _limit(coding)
    mask = steps[0].mask
    mask = None if mask is None or mask.all() else steps[0].linear.form.matrix(mask, blocks)
    if held.count and any(step.bias is not None for step in steps) and (error := held.error(*shifted)) < best:
        best, kind = error, "bias"
    if held.count and inputs:
        if mask is None:
            ridge, error = best_ridge(fit, held, setting.options.ridges, limit)
        else:
            ridge = MASKED_RIDGE
            count, error = best_steps(fit, held, ridge, mask)
        if steps[0].weight.scale:
            coding, error = coding.chosen(fit, held, solve(fit, ridge, mask, count)[0])
        if error < best:
            best, kind = error, "weights"
    if kind != "unchanged":
        both = together(fit, held)
        change = limit(both, ridge, solve(both, ridge, mask, count)) if kind == "weights" else mean_shift(both)
        if kind == "weights" and _is_free(setting, uses):
            present = coding.matrix(weight, change[0])
            change = as_varied(both, present * per_block(scale, present), change, uses[0].energy / max(rows, 1.0))
        coding.write(coding.rounded(both, change[0]) if steps[0].weight.scale and kind == "weights" else change)
    return [LayerFit(step.layer, kind, ridge, int(rows), before * share, best * share) for step in steps]


def _is_free(setting: Setting, uses: Sequence[Use]) -> bool:
    """Whether what a layer makes goes on as it is, in no sum and not out of the model, and every number of its weight may be anything."""
    step, walk = uses[0].step, setting.after
    plain = len(uses) == 1 and step.mask is None and step.factor is None and not step.weight.scale
    return plain and not operands(walk, step) and bool(walk.index.readers(step.target))


def _limit(coding: Coding) -> Limit:
    """What binds the weight of the steps."""
    step = coding.steps[0]
    if step.factor is None:
        return unlimited
    weight, factor, taps = coding.target, step.factor, prod(step.linear.form.kernel)
    return lambda sums, ridge, change: lowered(sums, ridge, weight, change, factor, taps, step.alone)


def _sums(uses: Sequence[Use], part: int) -> Sums:
    gathered = [(use.step.bias, use.sums[part].sums()) for use in uses]
    parts = [sums if bias is not None else sums.without_means() for bias, sums in gathered]
    return parts[0] if len(parts) == 1 else Joint(tuple(sums.summed() for sums in parts))
