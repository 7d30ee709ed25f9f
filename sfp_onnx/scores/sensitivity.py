"""How much of an error at the layers that read a group reaches the model's outputs: each group is cut alone, and the model run.

Backward elimination tells what a cut does to the layers that read it, their weights re-fitted. What then reaches the outputs may be ten
times as much for one group as for another, so errors of groups can be compared only when each is multiplied by

    factor = error at the outputs / error at the readers,

both of the same cuts, the first measured on samples that no fit saw.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np

from ..core.types import Array, Coupling, FloatArray, Layer, Tokens
from ..coupling.analysis import Analysis
from ..data.dataset import Dataset
from ..graph import Model, Prepared, edit, initializers, outputs
from ..repair import steps, walk
from ..runtime import open_model

LOOKS, ONE_LOOK = (0.75, 0.5, 0.25), (0.5,)  # shares of a group's units that the cuts leave
PASSES = 4  # what all cuts may cost together, in runs of the model over all samples ...
FEWEST, MOST = 16, 128  # ... with so many samples each
HELD_OUT = 1 / 4  # of the samples at most; if that is less than `FEWEST`, all serve for both
MEMORY = 1 / 4  # for the weights of all cuts
LEAST = 1e-6  # probability; below, a logarithm tells nothing
STREAM = 2.0  # what the repair leaves of errors of a residual stream, relative to others, which later branches that add to it correct
SPAN = 1e3  # factors this far from the median are noise


@dataclass(frozen=True)
class Change:
    """What becomes of a layer when a group that it reads is cut: change of weight (blocks, inputs, outputs) and bias (blocks, outputs), in
    units of its target, which is ``scale`` times its output."""

    layer: Layer
    weight: Array
    bias: FloatArray
    scale: Array


@dataclass(frozen=True)
class Cut:
    """A group that is cut alone: ``kept`` units are left, its readers change, and have together the ``error``."""

    kept: int
    error: float
    changes: Sequence[Change]


@dataclass(frozen=True)
class Looks:
    """At which ``shares`` of units left every group is looked at, and the samples to fit on and to look with."""

    shares: Sequence[float]
    fitted: Dataset
    held: Dataset

    @property
    def samples(self) -> int:
        """All that were given."""
        return self.fitted.samples + (self.held.samples if self.held.samples < self.fitted.samples else 0)

    def wanted(self, times: float) -> int:
        """How many to give, in hundreds, so that so many times as many are fitted on: some are held out again."""
        fitted = self.fitted.samples * times
        return int(np.ceil(min(fitted / (1 - HELD_OUT), fitted + MOST) / 100)) * 100


def looks(analysis: Analysis, data: Dataset, seed: int, memory: int) -> Looks:
    """As many cuts and samples as the limits above allow; the same whether more groups could shrink if something were expanded."""
    groups, held = len(analysis.coupling.groups) - len(analysis.expanding), initializers(analysis.prepared.model)
    size = 4 * sum(int(np.prod(held[name].shape)) for name in held)
    few = groups * len(LOOKS) * FEWEST > PASSES * data.samples or size * len(LOOKS) > MEMORY * memory
    shares = ONE_LOOK if few else LOOKS
    count = int(np.clip(PASSES * data.samples // max(groups * len(shares), 1), FEWEST, MOST))
    count = min(count, int(HELD_OUT * data.samples))
    return Looks(shares, *((data, data) if count < FEWEST else data.split(count, [seed, data.samples, groups])))


def reaching(
    prepared: Prepared, coupling: Coupling, cuts: Mapping[str, Sequence[Cut]], feeds: Sequence[Mapping[str, Array]], memory: int,
    advance: Callable[[int], None] = lambda steps: None,
) -> dict[str, list[float]]:  # fmt: skip
    """The squared error of each cut at the floating outputs, relative to their variance over samples; the mean of all outputs (NaN: none
    tells anything). Groups are cut in the order of what reads them first, and only what lies behind that runs again.

    Args:
        memory: bytes of activations that are held; the rest goes to a file.

    Raises:
        ModelError: onnxruntime cannot run the model.
    """
    layers = list({id(change.layer): change.layer for some in cuts.values() for cut in some for change in cut.changes}.values())
    scene = steps.Scene(prepared.model, coupling, prepared.nodes, prepared.trace.shapes)
    scene = steps.give_biases(_own_weights(scene, layers), layers)
    planned = {id(layer): steps.plan_steps(scene, [[layer]], {})[0] for layer in layers}
    original = answers(scene.model, feeds, prepared.tokens)
    errors: dict[str, list[float]] = {name: [] for name in cuts}
    with closing(walk.Store(memory // 2)) as store:
        walked = walk.Walk(scene.model, store)
        for batch in feeds:
            walked.feed(batch)
        for first, name in sorted((min(_places(scene, some), default=0), name) for name, some in cuts.items()):
            walked.overrides.clear()
            walked.until(first, original)
            for cut in cuts[name]:
                behind = _write(walked, planned, cut)
                targets = [output for output in original if output in behind]
                changed = _floating(targets, walked.run(targets), feeds, prepared.tokens)
                shares = [share for output, old in original.items() if (share := lost(changed.get(output, old), old)) is not None]
                errors[name].append(float(np.mean(shares)) if shares else np.nan)
                advance(1)
    return errors


def _places(scene: steps.Scene, cuts: Sequence[Cut]) -> list[int]:
    """Where the nodes are that cuts change."""
    return [scene.node(change.layer).index for cut in cuts for change in cut.changes]


def _write(walked: walk.Walk, planned: Mapping[int, walk.Task], cut: Cut) -> set[str]:
    """Change the layers of a cut, and no others; returns the tensors that depend on them."""
    walked.overrides.clear()
    made = []
    for change in cut.changes:
        step = planned[id(change.layer)]
        assert isinstance(step, tuple)
        coding = walk.Coding(walked, step, step[0].weight.value(walked.constant), change.scale)
        coding.write((change.weight.astype(np.float64), change.bias))
        made.append(step[0].output)
    return {*made, *(name for node in walked.index.reached(made) for name in node.outputs)}


def lost(new: FloatArray, old: FloatArray) -> float | None:
    """Error of an output relative to its variance (if it never varies, to its size); None where there is none, or where another number of
    values came out."""
    with np.errstate(invalid="ignore"):  # infinite values have no variance
        scale = np.square(old - old.mean(0)).sum() or np.square(old).sum() if new.shape == old.shape and len(old) else 0.0
        share = float(np.square(new - old).sum() / scale) if scale > 0 else np.nan
    return share if np.isfinite(share) else None


def _own_weights(scene: steps.Scene, layers: Sequence[Layer]) -> steps.Scene:
    """The model in which each of these layers has a weight of its own, of numbers that are not rounded: a cut may change one of those that
    share it, and further than integers reach (those of a product of integers stay integers)."""
    editor = edit.Editor(scene.model)
    for layer in layers:
        node, held = scene.node(layer), scene.weight(layer)
        assert layer.weight is not None and held is not None
        name = node.inputs[layer.weight.position]
        shared, kept = len(scene.index.readers(name)) > 1, scene.around(layer) is not None
        if shared or (held.scale and not kept):
            value = scene.values[name] if kept else held.value(lambda constant: scene.values[constant])
            editor.set_input(node.index, layer.weight.position, editor.constant(name, value))
    return replace(scene, model=editor.finish())


def answers(model: Model, feeds: Sequence[Mapping[str, Array]], tokens: Tokens | None = None) -> dict[str, FloatArray]:
    """All floating outputs of all batches, a row per sample; of outputs for every token, one per token that is not switched off."""
    names, session = [port.name for port in outputs(model)], open_model(model)
    return _floating(names, (session.run(batch, names) for batch in feeds), feeds, tokens)


def _floating(
    names: Sequence[str], batches: Iterable[Sequence[Array]], feeds: Sequence[Mapping[str, Array]], tokens: Tokens | None
) -> dict[str, FloatArray]:
    """Floating ones of these tensors, as `answers`."""
    if tokens is not None:
        pairs = zip(feeds, batches, strict=True)
        batches = [[tokens.there(*named, tokens.on(fed)) for named in zip(names, arrays, strict=True)] for fed, arrays in pairs]
    every = zip(names, zip(*batches, strict=True), strict=bool(names))
    return {name: _rows(arrays) for name, arrays in every if getattr(arrays[0], "dtype", np.dtype(bool)).kind == "f"}


def _rows(arrays: Sequence[Array]) -> FloatArray:
    """An output of all batches; probabilities as their logarithms less the mean, since they hardly move where the network is sure."""
    if len({array.shape[1:] for array in arrays}) > 1 or not arrays[0].ndim:
        arrays = [array.reshape(-1, 1) for array in arrays]
    rows = np.concatenate(arrays).astype(np.float64)
    if rows.ndim > 1 and (rows >= 0).all() and np.allclose(rows.sum(1), 1, atol=1e-3):
        rows = np.log(np.maximum(rows, LEAST))
        rows -= rows.mean(1, keepdims=True)
    return rows


def middle_of(found: Mapping[str, float], aside: Collection[str] = ()) -> float:
    """The median of what `ratios` gives, of groups that are not put ``aside`` if there are any; 0 where nothing reaches an output."""
    values = [value for name, value in found.items() if name not in aside] or list(found.values())
    middle = float(np.median(values)) if values else 0.0
    return middle if middle > 1e-20 else 0.0


def ratios(cuts: Mapping[str, Sequence[Cut]], reached: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Error at the outputs over that at the readers of each group: the geometric mean over its cuts; not of groups of which nothing is
    known, such as those in a branch that no sample takes."""
    return {
        name: float(np.exp(np.mean(np.log(np.maximum(reached[name], 1e-30)) - np.log([cut.error for cut in some]))))
        for name, some in cuts.items()
        if np.isfinite(reached[name]).all() and max(reached[name]) > 0 and all(cut.error > 0 for cut in some)
    }


def factors(found: Mapping[str, float], middle: float) -> dict[str, float]:
    """`ratios` relative to their median; none where nothing reaches an output."""
    return {name: float(np.clip(value / middle, 1 / SPAN, SPAN)) for name, value in found.items()} if middle else {}


def streams(prepared: Prepared, coupling: Coupling) -> set[str]:
    """Groups that residual branches are added to."""
    sums = {index for index, known in coupling.additive.items() if len(known.positions) > 1}
    ends = {name for branch in coupling.branches.values() for name in branch.ends}
    inside = np.zeros(coupling.units + 1, bool)  # the last place stands for -1
    for name in ends:
        if any(node.index in sums for node, _ in prepared.index.readers(name)):
            for carried in coupling.tensors.get(name, ()):
                inside[carried.units] = True
    return {group.name for group in coupling.groups if inside[group.units].any()}
