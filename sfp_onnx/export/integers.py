"""Models that are computed in 8-bit integers, or layers of them: which nodes become so, and in what ranges activations are rounded.

A layer takes along what follows it up to the next layers (`planning.precision.leaders`): activation functions, additions, pooling. All is
written by onnxruntime's own quantiser (QuantizeLinear/DequantizeLinear), which is told the nodes and the ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from .. import evaluation
from ..core import system
from ..core.errors import ModelError, OptionError
from ..core.options import MeasureOptions
from ..core.types import Array, FloatArray, Node
from ..coupling.analysis import Analysis, feeds_of
from ..data.dataset import Dataset
from ..graph import Initializer, Model, extract, initializers, inputs, nodes, with_node_names
from ..graph.load import load, raised
from ..graph.save import save
from ..planning.precision import leaders
from ..rules.quantized import between_integers
from ..runtime import open_model, quantize, saturates

Feeding = Callable[[], Iterable[Mapping[str, Array]]]
"""Gives batches of inputs, from the first one on each time."""
# Opsets: of scales per channel, of float16 beside integers, of QuantizeLinear at all, and of its dynamic form.
CHANNELS_OPSET, HALF_OPSET, FIRST_OPSET, DYNAMIC_OPSET = 13, 19, 10, 11
# The quantiser replaces some activations by the ends of ranges, and does not see that a sub-graph reads what they make.
KEEPING = {"QDQKeepRemovableActivations": True}
CALIBRATED = 512  # samples that ranges are taken from
BINS, LEVELS = 2048, 255
OUTSIDE = 1e-4  # share of the values that percentiles leave outside, of both ends together
SHRINKS = np.linspace(1, 0.3, 29)  # of an end of the whole range, that squared errors are compared at
BOOL = np.dtype(bool)
JUDGED, FEWEST_CHECKED, MOST_CHECKED = 1 / 8, 8, 256  # of the samples, to judge roundings on; samples to judge on
MOST_VALUES = 2**17  # of a tensor and a batch, that a histogram is made of

Ranges = Mapping[str, FloatArray]
"""Least and largest value (2,) of each tensor."""


@dataclass(frozen=True)
class Integers:
    """Makes layers of a model integers. ``layers``: the first outputs of all that mix channels, in the original; ``ranges`` are those of
    what nodes read and make (what is made by layers that the original lacks: from -1 to 1, by which no size and no time changes)."""

    layers: frozenset[str]
    ranges: Ranges

    def __call__(self, model: Model, chosen: Collection[str], others: Collection[str] = ()) -> Model:
        """The model with these layers (by their first outputs), and what follows them, on integers; those `between` them, too. ``others``:
        layers that the original lacks, and any else.

        Raises:
            ModelError: onnxruntime's quantiser fails on all of them.
        """
        return self._made(model, chosen, others)[0]

    def between(self, model: Model, chosen: Collection[str], others: Collection[str] = ()) -> set[str]:
        """What becomes integers beside the chosen layers: onnxruntime would round it as it loads the model, with one scale for each whole
        weight, and answer otherwise than the file says."""
        return self._made(model, chosen, others)[1] - set(chosen)

    def _made(self, model: Model, chosen: Collection[str], others: Collection[str]) -> tuple[Model, set[str]]:
        named, every = with_node_names(model), set(chosen)
        lead = leaders(nodes(named), self.layers.union(others))
        ranges = {**dict.fromkeys(others, np.asarray([-1.0, 1.0])), **self.ranges}
        while True:
            listed = [node.name for node in nodes(named) if node.outputs and lead.get(node.outputs[0]) in every]
            made = quantized(named, list, ranges=ranges, nodes_to_quantize=listed) if listed else model
            floats = {name for name, held in initializers(made).items() if held.dtype == np.float32}
            more = {lead.get(node.outputs[0], "") for node in between_integers(nodes(made), floats)} - every
            if not more:
                return made, every
            every |= more


def bits() -> str:
    """Of how many bits the weights are, and why."""
    if saturates():
        return "weights of 7 bits, since products of 8 saturate on this processor (it has no VNNI or an equivalent)"
    return "weights of 8 bits; on processors without VNNI or an equivalent their products saturate: quantise there, which takes 7"


def taken(model: Model, original: Model, layers: Collection[str]) -> bool:
    """Whether the weights of a layer (its first output in ``layers``) are integers in a model that was made of the original."""
    known, held = initializers(original), initializers(model)
    read = {name for node in nodes(original) if set(node.outputs) & set(layers) for name in node.inputs}
    weights = {name for name in read & known.keys() if len(known[name].shape) > 1}
    return bool(weights) and not weights & held.keys()


# ---- onnxruntime's quantiser ------------------------------------------------------------------------------------------


def quantized(model: Model, batches: Feeding | None, **known: Any) -> Model:
    """The model on 8-bit integers: static (QuantizeLinear/DequantizeLinear, ranges from the batches that ``batches()`` gives) or, without
    data, dynamic. The opset is raised where scales per channel need it (else there is one per tensor); nodes on which the quantiser fails
    stay floating. ``known``: what else `runtime.quantize` takes; nodes are named as `with_node_names` does.

    Raises:
        OptionError: it is quantised already, or its type cannot be. ModelError: onnxruntime cannot quantise it.
    """
    half = any(held.dtype == np.float16 and len(held.shape) > 1 for held in initializers(model).values())
    if half and batches is None:
        raise OptionError("--quantize int8: float16 weights are quantised with --data only. Give data, or the float32 export.")
    facts = dict(known)
    try:
        ready = raised(model, HALF_OPSET if half else CHANNELS_OPSET)
    except ModelError as error:
        if half or model.opset < (FIRST_OPSET if batches else DYNAMIC_OPSET):
            raise ModelError(f"{error}. --quantize int8 needs it: export the model with opset {CHANNELS_OPSET} or later.") from error
        ready, facts = model, {**known, "per_channel": False}
    named = with_node_names(ready)
    try:
        return _quantized(model, named if known else ready, batches, facts)
    except ModelError:
        among = known.get("nodes_to_quantize")
        weighed = [node.name for node in nodes(named) if any(len(held.shape) > 1 for held in _weights_of(node, named))]
        weighed = [name for name in weighed if among is None or name in among]
        left = [name for name in weighed if not _quantizes(model, named, batches, {**facts, "nodes_to_quantize": [name]})]
        if not left or len(left) == len(weighed):
            raise
        return _quantized(model, named, batches, {**facts, "nodes_to_exclude": left})


def _weights_of(node: Node, model: Model) -> list[Initializer]:
    held = initializers(model)
    return [held[name] for name in node.inputs if name in held]


def _quantizes(model: Model, ready: Model, batches: Feeding | None, facts: Mapping[str, Any]) -> bool:
    """Whether the quantiser can do it, as far as one batch tells."""
    try:
        _quantized(model, ready, None if batches is None else lambda: islice(batches(), 1), facts)
    except ModelError:
        return False
    return True


def _quantized(model: Model, ready: Model, batches: Feeding | None, facts: Mapping[str, Any]) -> Model:
    with system.temporary("another form of the model") as folder:
        source, target = folder / "float.onnx", folder / "int8.onnx"
        save(replace(ready, source=None, files=()), source)
        held = {"extra_options": KEEPING} if any(node.captures for node in nodes(ready)) else {}
        quantize(source, target, None if batches is None else batches(), model.name, **facts, **held)
        try:
            converted = load(target)
        except ModelError as error:
            raise ModelError(str(error).replace(str(target), f"{model.name}, as onnxruntime quantised it")) from error
        weights = {name: array.copy() for name, array in converted.weights.items()}  # the files go
    converted = replace(converted, weights=weights, source=model.source, files=model.files, edited=True, libraries=model.libraries)
    open_model(converted)  # the quantiser writes models that onnxruntime cannot run, too
    return converted


# ---- ranges ----------------------------------------------------------------------------------------------------------


@dataclass
class Histogram:
    """Values of a tensor in `BINS` equal bins from the least to the largest."""

    least: float
    most: float
    counts: FloatArray

    @property
    def centers(self) -> FloatArray:
        """Middle of each bin."""
        return np.asarray(self.least + (np.arange(BINS) + 0.5) * (self.most - self.least) / BINS)


def histograms(model: Model, feeds: Callable[[], Iterable[Mapping[str, Array]]]) -> dict[str, Histogram]:
    """What every floating tensor of a model holds, from two passes over batches: the first for its ends.

    Raises:
        ModelError: onnxruntime cannot run it.
    """
    names = [name for node in nodes(model) for name in node.outputs if name]
    session = open_model(extract.segment(model, inputs(model), dict.fromkeys(names)))

    def batches() -> Iterable[tuple[str, Array]]:
        for batch in feeds():
            values = {**batch, **dict(zip(names, session.run(batch, names), strict=True))}
            yield from ((name, array) for name, array in values.items() if getattr(array, "dtype", BOOL).kind == "f" and array.size)

    found = dict[str, Histogram]()
    for name, array in batches():
        least, most = float(array.min()), float(array.max())
        known = found.setdefault(name, Histogram(least, most, np.zeros(BINS)))
        known.least, known.most = min(known.least, least), max(known.most, most)
    for name, array in batches():
        known, values = found[name], array.reshape(-1)
        if known.most > known.least:
            step = -(-values.size // MOST_VALUES) | 1  # odd, so that it meets all channels
            known.counts += np.histogram(values[::step], BINS, (known.least, known.most))[0] * step
    return found


def least_to_most(held: Histogram) -> FloatArray:
    """All values."""
    return np.asarray([held.least, held.most])


def percentile(held: Histogram) -> FloatArray:
    """All but the `OUTSIDE` share that lies farthest out."""
    sums, total = np.cumsum(held.counts), held.counts.sum()
    if not total:
        return least_to_most(held)
    low, high = np.searchsorted(sums, [OUTSIDE / 2 * total, (1 - OUTSIDE / 2) * total])
    width = (held.most - held.least) / BINS
    return np.asarray([held.least + low * width, held.least + min(high + 1, BINS) * width])


def least_squares(held: Histogram) -> FloatArray:
    """The range, each end a share of what it could be, in which rounding to `LEVELS` steps changes the values least."""
    ends, values = np.asarray([min(held.least, 0), max(held.most, 0)]), held.centers
    for end in (1, 0):
        tried = np.tile(ends, (len(SHRINKS), 1))
        tried[:, end] *= SHRINKS
        scale = np.maximum((tried[:, 1] - tried[:, 0]) / LEVELS, np.finfo(np.float32).tiny)[:, None]
        rounded = np.clip(np.rint(values / scale) * scale, tried[:, :1], tried[:, 1:])
        ends = tried[np.argmin((np.square(rounded - values) * held.counts).sum(1))]
    return np.asarray(ends)


KINDS: Mapping[str, Callable[[Histogram], FloatArray]] = {
    "from least to largest": least_to_most, f"{1 - OUTSIDE:.2%} of the values": percentile, "least squared error": least_squares,
}  # fmt: skip


def ranges_of(found: Mapping[str, Histogram], kind: str = next(iter(KINDS))) -> Ranges:
    """The ranges of one kind."""
    return {name: KINDS[kind](held) for name, held in found.items()}


def nearest(
    analysis: Analysis, model: Model, make: Callable[[Ranges], Model], data: Dataset, seed: int = 0, how: MeasureOptions = MeasureOptions()
) -> tuple[Model, str]:
    """What is made of a finished model and the ranges of its activations, of the kind that is nearest to the original on held-out samples;
    and words on it.

    Raises:
        ModelError: onnxruntime cannot run all of its nodes, or not quantise it.
    """
    fit_on, judge = part_of(data, seed)
    ranged = fit_on.part(np.arange(min(fit_on.samples, CALIBRATED)))
    found = histograms(model, lambda: feeds_of(analysis, ranged))
    models = {kind: make(ranges_of(found, kind)) for kind in KINDS}
    left = dict(zip(models, drifts(compared(analysis, [*models.values()], judge, how)), strict=True))
    best = min(left, key=lambda kind: left[kind])
    shown = ", ".join(f"{error:.4g} {kind}" for kind, error in left.items())
    words = f"relative error of the outputs on {judge.samples} samples by the ranges of activations (from {ranged.samples} others)"
    return models[best], f"{words}: {shown}; taken: {best}; {bits()}"


def part_of(data: Dataset, seed: int) -> tuple[Dataset, Dataset]:
    """Data to fit on, and to judge roundings on."""
    count = min(int(data.samples * JUDGED), MOST_CHECKED)
    return data.split(count, [seed, data.samples]) if count >= FEWEST_CHECKED else (data, data)


def compared(analysis: Analysis, models: Sequence[Model], data: Dataset, how: MeasureOptions) -> list[evaluation.Comparison]:
    """Models with the original, on the same samples."""
    reading = evaluation.reading_of(analysis.model, data, how, tokens=analysis.prepared.tokens)
    return evaluation.measure([analysis.model, *models], data.batches(), data.labels, reading)[0][1:]


def drifts(found: Sequence[evaluation.Comparison]) -> list[float]:
    """How far the outputs of models are from the original's, as numbers (KL divergence tells nothing of samples of which a network is
    sure); where they are no numbers, by what they mean."""
    errors = [own.relative_error for own in found]
    return [float(error) for error in errors if error is not None] if None not in errors else [*evaluation.distances(found).values]
