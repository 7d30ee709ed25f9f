"""Re-fit what a cut left, and check on samples of its own that this brought the model nearer to the original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np

from .. import cut, evaluation
from ..core.errors import DataError, ModelError, OptionError, VerificationError
from ..core.options import MeasureOptions, RepairOptions
from ..core.system import FINISHERS
from ..core.types import BoolArray, Coupling, Cut, Factor, FloatArray
from ..coupling.analysis import Analysis, Progress, batch_size, feeds_of, left_out, silent
from ..cut.factor import both, by_weight, lowered, split
from ..data.dataset import Dataset
from ..export.integers import FEWEST_CHECKED, MOST_CHECKED, Integers, compared, drifts, nearest, part_of
from ..graph import Constants, GraphIndex, Model, check, edit, extract, nodes
from ..graph.stored import Store as Stored, stored
from ..planning.precision import on_integers
from ..rules.scales import on_integers as works
from . import confidence
from .heads import turned
from .lockstep import LayerFit, prepared_for, repair
from .steps import tainted
from .walk import Store, Walk

CHECKED = 1 / 16  # of the samples, to judge repairs on
HELD_OUT, MOST = 1 / 8, 512  # of the samples, and of these the most, that a training leaves out, to judge on
SHOWN = 5  # names in a sentence
NOTHING = 1e-6  # distances below this are rounding



@dataclass(frozen=True)
class Repaired:
    """A repaired model, what was done to its layers, and how far it and the unrepaired one are from the original on ``checked``
    samples (``measure``: by what, as the task asks for; a share of answers counts as what is missing to all). ``held_out``: the samples
    had no part in the repair. ``kept``: else the model is as it was cut, which is no farther from the original."""

    model: Model
    kind: str
    fits: tuple[LayerFit, ...]
    measure: str
    before: float
    after: float
    checked: int
    held_out: bool
    notes: tuple[str, ...]
    kept: bool = True
    finished: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, object]:
        """For the manifest."""
        distances = {name: value if np.isfinite(value) else None for name, value in (("before", self.before), ("after", self.after))}
        shown = {name: getattr(self, name) for name in ("kind", "measure", "checked", "held_out", "kept")}
        return {**shown, **distances, "layers": [vars(fit) for fit in self.fits], **self.finished}


def repaired(
    analysis: Analysis, pruned: Model, removed: BoolArray, data: Dataset, options: RepairOptions, progress: Progress = silent,
    how: MeasureOptions = MeasureOptions(), better: bool = False, factors: Mapping[str, Factor] = MappingProxyType({}),
) -> Repaired:  # fmt: skip
    """Repair a cut model.

    Args:
        factors: by the name of a weight: what keeps its lower rank (`cut.factor.lowered`).
        how: what the outputs mean, and so how far models are from the original.
        better: do not refuse: where the repair made it worse, keep what was cut (it is judged afterwards).

    Raises:
        OptionError: unknown kind of repair, or "bn" where the model has no BatchNormalization left to re-estimate.
        VerificationError: the repaired model is not finite, or clearly farther from the original than one that the cut changed (unless
            ``options.force``).
        ModelError: the model cannot be run in segments.
    """
    fitted, judge, apart = _split(data, options)
    judge = replace(judge, batch=batch_size(analysis, judge))
    if options.kind == "bn":
        model, fits, words = _moments(analysis, pruned, removed, fitted, options)
    else:
        model, fits, words = _weights(analysis, pruned, removed, fitted, options, progress, factors)
    if options.kind == "lstsq" and apart:
        model, scaled = confidence.calibrated(analysis, model, judge, how)
        words += f"; {scaled}" if scaled else ""
    check(model)
    found = distances(analysis, (pruned, model), judge, how)
    before, after = found.values
    place = "held-out samples" if apart else "of the calibration samples (too few to hold any out)"
    result = f"distance from the original ({found.measure}) on {judge.samples} {place}: {before:.4g} -> {after:.4g}"
    words = f"repair ({options.kind}, {fitted.samples} samples): {words}; {result}"
    notes, kept = [words, *left_out(analysis, fitted)], bool(np.isfinite(after) and after <= max(before, NOTHING))
    if not kept and (options.force or (found.clearly_worse and not better and before > NOTHING)):  # what the cut left whole needs no repair
        problem = f"the repair took the model away from the original: {words}. "
        if not options.force:
            raise VerificationError(problem + "Nothing was written. Use --repair none or bias, give more data, or --force.")
        notes.append(problem + "Kept, because of --force.")
        kept = True
    elif not kept:
        nothing = f"brought nothing that {judge.samples} samples could tell from chance"
        notes.append(f"the repair {'is farther from the original' if found.clearly_worse else nothing}: the model is kept as it was cut")
    shown = (found.measure, before, after, judge.samples, apart)
    return Repaired(model if kept else pruned, options.kind, tuple(fits), *shown, tuple(notes), kept)


def finished(analysis: Analysis, done: Repaired, cuts: Sequence[Cut], data: Dataset, options: RepairOptions) -> Repaired:
    """What the options ask for after a repair (fine-tuning), done by the plug-ins that registered it."""
    for name, finish in FINISHERS.items():
        if getattr(options, name):
            model, figures, notes = finish(analysis.model, done.model, cuts, data, options)
            done = replace(done, model=model, notes=(*notes, *done.notes), finished={**done.finished, name: figures})
    return done


def rebuilt(
    analysis: Analysis, removed: BoolArray, data: Dataset | None, options: RepairOptions | None, how: MeasureOptions = MeasureOptions(),
    factors: Sequence[Factor] = (), stores: Sequence[Stored] = (),
) -> Model:  # fmt: skip
    """The cut model, repaired if there are data and options for it and that makes it no worse (it is judged afterwards), and rounded.
    Layers that are to become two have their lower rank, and are one still."""
    changed = bool(removed.any() or factors)
    model = lowered(cut.cut(analysis.prepared, analysis.coupling, removed), analysis.wholes, factors) if changed else analysis.model
    if options is not None and data is not None and changed:
        bound = by_weight(analysis.wholes, factors)
        model = repaired(analysis, model, removed, data, options, how=how, better=True, factors=bound).model
    if not stores:
        return model
    model = split(model, analysis.wholes, factors)
    return rounded(analysis, model, removed, stores, data, options, how=how, factors=factors)[0]


def rounded(
    analysis: Analysis, model: Model, removed: BoolArray, stores: Sequence[Stored], data: Dataset | None, options: RepairOptions | None,
    progress: Progress = silent, how: MeasureOptions = MeasureOptions(), factors: Sequence[Factor] = (),
) -> tuple[Model, tuple[str, ...]]:  # fmt: skip
    """A cut and repaired model with weights that are stored as ``stores`` say, both halves of layers that became two (``factors``) as the
    whole; and words on it. With a least-squares repair, the other layers are re-fitted once more in their order, each on what the rounded
    layers in front of it give: weights are rounded again, with the scales that they have or those that they just fit into, whichever is
    nearer on rows that the fit did not see, and biases take what is left. What comes of that is kept where it is nearer to the original on
    samples that it did not see. Layers whose kernels take integers are last, and re-fitted in the same way, on rounded activations.

    Raises:
        DataError: layers become integers, and there are no data. ModelError: the model cannot be run in segments, or not quantised.
        VerificationError: the result does not run.
    """
    fitted = data is not None and options is not None and options.kind == "lstsq"
    stores, two = both(model, analysis.wholes, factors, stores), {factor.layer for factor in factors}
    coupling = replace(analysis.coupling, layers=tuple(layer for layer in analysis.coupling.layers if layer.node.name not in two))
    if fitted:
        model = prepared_for(analysis.prepared, coupling, removed, model, every=True)[0].model
    plain, integers, words = stored(model, stores), on_integers(stores), tuple[str, ...]()
    if data is not None and options is not None and fitted and plain is not model:
        plain, words = _rounded_again(analysis, coupling, plain, removed, data, options, progress, how)
    if not integers:
        return plain, words
    if data is None:
        raise DataError("the plan computes layers in 8-bit integers, with ranges of activations from calibration data: give --data")
    made, more = _on_integers(analysis, plain, stores, data, options.seed if options else 0, how)
    if options is None or not fitted:
        return made, (more, *words)
    made, again = _rounded_again(analysis, coupling, made, removed, data, options, progress, how)
    return made, (more, *again, *words)


def _rounded_again(
    analysis: Analysis, coupling: Coupling, plain: Model, removed: BoolArray, data: Dataset, options: RepairOptions, progress: Progress,
    how: MeasureOptions,
) -> tuple[Model, tuple[str, ...]]:  # fmt: skip
    """The better of a model as it was rounded and as it is re-fitted after it; ``coupling`` has the layers that may be."""
    (fit_on, judge), makers = part_of(data, options.seed), GraphIndex(nodes(plain)).makers
    layers = [(layer, makers.get(layer.node.outputs[0], layer.node)) for layer in coupling.layers]
    same = tuple(layer for layer, node in layers if works(node) == works(layer.node))  # else what makes it now unpacks integers
    coupling = replace(coupling, layers=same)
    with progress("re-fitting after rounding", len(same)) as advance:
        better, fits = repair(analysis.prepared, coupling, removed, plain, feeds_of(analysis, fit_on), options, {}, advance, every=True)
    check(better)
    found = compared(analysis, (plain, better), judge, how)
    (before, after), (near, nearer) = drifts(found), evaluation.distances(found).values  # a re-fit undoes a scale of class scores
    kept = bool(np.isfinite(after) and after <= before and nearer <= near)
    changed, left = sum(fit.kind in ("weights", "bias") for fit in fits), "" if kept else "; left as rounded"
    shown = f"relative error of the outputs {before:.4g} -> {after:.4g}, distance from the original {near:.4g} -> {nearer:.4g}{left}"
    words = f"re-fit after rounding: {changed} of {len(fits)} layers; on {judge.samples} samples {shown}"
    return better if kept else plain, (words,)


def _on_integers(
    analysis: Analysis, model: Model, stores: Sequence[Stored], data: Dataset, seed: int, how: MeasureOptions
) -> tuple[Model, str]:
    """A finished model with chosen layers on integers, their ranges of the kind that is nearest to the original on held-out samples."""
    layers, chosen = frozenset(layer.node.outputs[0] for layer in analysis.coupling.layers), on_integers(stores)
    others = {store.layer for store in stores}
    made, words = nearest(analysis, model, lambda ranges: Integers(layers, ranges)(model, chosen, others), data, seed, how)
    return made, f"{len(chosen)} layers are computed in 8-bit integers; {words}"


def held_out(samples: int) -> int:
    """How many of so many samples a training leaves out, to judge on."""
    return min(MOST, int(samples * HELD_OUT))


def _split(data: Dataset, options: RepairOptions) -> tuple[Dataset, Dataset, bool]:
    """Data to fit on, data to judge on, and whether they differ. The latter are those that a training after it judges on, too."""
    if data.samples < 4 * FEWEST_CHECKED:
        return data, data, False
    count = min(max(int(data.samples * CHECKED), FEWEST_CHECKED), MOST_CHECKED)
    count = max(count, held_out(data.samples) if options.finetune else 0)
    return *data.split(count, [options.seed, data.samples]), True


Fitted = tuple[Model, list[LayerFit], str]
"""A re-fitted model, what was done to its layers, and that in words."""


def _weights(
    analysis: Analysis, pruned: Model, removed: BoolArray, data: Dataset, options: RepairOptions, progress: Progress,
    factors: Mapping[str, Factor],
) -> Fitted:  # fmt: skip
    with progress("repairing", len(analysis.coupling.layers)) as advance:
        analysed, mixes = (analysis.prepared, analysis.coupling, removed), dict[str, FloatArray]()
        if options.kind == "lstsq":
            pruned, mixes = turned(*analysed, pruned, feeds_of(analysis, data), factors)
        model, fits = repair(*analysed, pruned, feeds_of(analysis, data), options, {}, advance, factors, mixes)
    counts = [sum(fit.kind == kind for fit in fits) for kind in ("weights", "bias", "unchanged")]
    words = f"weights of {counts[0]} layers re-fitted, the bias alone of {counts[1]}, {counts[2]} left as they were"
    kept = [fit.layer for fit in fits if fit.kind == "kept"]
    if kept:
        shown = ", ".join(kept[:SHOWN]) + (", ..." if len(kept) > SHOWN else "")
        words += f"; {len(kept)} cannot be re-fitted (recurrent, integer, or a weight that is computed or used otherwise): {shown}"
    return model, fits, words


def distances(analysis: Analysis, models: Sequence[Model], data: Dataset, how: MeasureOptions = MeasureOptions()) -> evaluation.Distances:
    """How far models are from the original, by what their outputs mean.

    Raises:
        VerificationError: a model does not run.
    """
    try:
        return evaluation.distances(compared(analysis, models, data, how))
    except ModelError as error:
        raise VerificationError(f"the repaired model does not run: {error}. Nothing was written.") from error


# ---- statistics of BatchNormalization, re-estimated ------------------------------------------------------------------


def _moments(analysis: Analysis, pruned: Model, removed: BoolArray, data: Dataset, options: RepairOptions) -> Fitted:
    """Mean and variance of every BatchNormalization behind a changed tensor, as its input in the changed network has them."""
    if not analysis.coupling.affines:
        raise OptionError("--repair bn: the model has no BatchNormalization (the export folded it). Use --repair lstsq or bias.")
    affected = tainted(analysis.prepared.nodes, analysis.coupling, removed, ())
    editor, index, values, wanted = edit.Editor(pruned), GraphIndex(nodes(pruned)), Constants(pruned), []
    for affine in analysis.coupling.affines:
        node = index.maker(affine.node.outputs[0])
        if node is not None and affine.tensor in affected:
            for position in affine.moments:
                name = node.inputs[position]
                if len(index.readers(name)) > 1:  # exporters may share equal vectors
                    editor.set_input(node.index, position, editor.constant(name, values[name]))
            wanted.append(affine)
    changed = editor.finish()
    with closing(Store(options.memory)) as store:
        walk = Walk(changed, store)
        for feeds in feeds_of(analysis, data):
            walk.feed(feeds)
        makers = walk.index.makers
        for affine in sorted(wanted, key=lambda item: makers[item.node.outputs[0]].index):
            node = makers[affine.node.outputs[0]]
            names = [node.inputs[position] for position in affine.moments]
            for name, value in zip(names, _estimated(walk, node.inputs[0]), strict=True):
                walk.overrides[name] = value.astype(walk.constant(name).dtype)
    return extract.with_constants(changed, walk.overrides), [], f"statistics of {len(wanted)} BatchNormalizations re-estimated"


def _estimated(walk: Walk, tensor: str) -> tuple[FloatArray, FloatArray]:
    """Mean and variance per channel (axis 1) over all samples and positions."""
    segment = walk.advance([tensor])
    total = squares = np.zeros(1)
    count = 0.0
    for batch in range(walk.batches):
        array = segment(batch)[tensor]
        axes = tuple(axis for axis in range(array.ndim) if axis != 1)
        total = total + array.sum(axes, dtype=np.float64)
        squares = squares + np.square(array.astype(np.float32)).sum(axes, dtype=np.float64)
        count += array.size / array.shape[1]
    walk.finish()
    mean = total / count
    return mean, np.maximum(squares / count - mean**2, 0.0)
