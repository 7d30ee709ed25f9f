"""What the rounding of each weight does to the outputs of a model: the weight is rounded alone, and the model run.

The error of 8 bits is measured, also with what the layer reads rounded to 8 bits (from its least to its largest value); that of other
precisions goes with the squared change of the weight, of which it is a small part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..core.types import Array
from ..coupling.analysis import Analysis, Progress, feeds_of
from ..data.dataset import Dataset
from ..graph import Constants, Model, extract, inputs
from ..graph.edit import Editor
from ..graph.stored import STORED, holds, rounded
from ..planning.precision import LEAST, Storable
from ..runtime import observe, unpadded
from .sensitivity import answers, lost

SAMPLES = 32
LEVELS = 255  # of activations


def with_errors(
    analysis: Analysis, weights: Sequence[Storable], data: Dataset | None, seed: int, progress: Progress, integers: bool = False
) -> tuple[Storable, ...]:  # fmt: skip
    """The weights with the error of each precision, on some of the data (default: on the sample that the model was traced on); infinite
    where it cannot be stored so. ``integers``: also that of integer arithmetic.

    Raises:
        ModelError: onnxruntime cannot run the model.
    """
    model, held = analysis.prepared.model, Constants(analysis.prepared.model)
    feeds = [analysis.prepared.feeds]
    if data is not None:
        drawn = np.random.default_rng([seed, data.samples]).permutation(data.samples)[:SAMPLES]
        feeds = list(feeds_of(analysis, data.part(np.sort(drawn))))
    original, found = answers(model, feeds), []
    spans = _spans(model, [layer.data_name for item in weights for layer in item.layers], feeds) if integers else {}

    def error(changed: Model) -> float:
        known = [part for new, old in zip(answers(changed, feeds), original, strict=True) if (part := lost(new, old)) is not None]
        return float(np.mean(known)) if known else 0.0

    with progress("rounding", len(weights)) as advance:
        for item in weights:
            weight, axis = held[item.weight], item.first.weight.out_axis if item.first.weight else 0
            news = {code: rounded(weight, kind, axis) for kind, code in STORED.items() if code and holds(weight, kind)}
            errors = dict.fromkeys(STORED.values(), np.inf)
            if LEAST in news:
                changed = extract.with_constants(model, {item.weight: news[LEAST].astype(np.float32)})
                squares = {code: float(np.square(new - weight).sum()) for code, new in news.items()}
                unit = error(changed) / squares[LEAST] if squares[LEAST] else 0.0
                errors |= {code: unit * square for code, square in squares.items()}
                errors[0] = error(_with_levels(changed, item, spans)) if integers else np.inf
            found.append(replace(item, errors={**errors, 4: 0.0}))
            advance(1)
    return tuple(found)


def _spans(model: Model, names: Sequence[str], feeds: Sequence[Mapping[str, Array]]) -> dict[str, tuple[float, float]]:
    """Least and largest value (and 0) of inputs and activations."""
    fed, spans = {port.name for port in inputs(model)}, dict.fromkeys(names, (0.0, 0.0))
    wanted = extract.segment(model, [], dict.fromkeys(sorted({*names} - fed), np.dtype(np.float32)))
    for batch in observe(wanted, unpadded(feeds)):
        for name, array in (*batch.values.items(), *((name, batch.feeds[name]) for name in fed & {*names})):
            low, high = spans[name]
            spans[name] = min(low, float(array.min(initial=0))), max(high, float(array.max(initial=0)))
    return spans


def _with_levels(model: Model, item: Storable, spans: Mapping[str, tuple[float, float]]) -> Model:
    """The model in which layers read their input rounded to 256 levels from its least to its largest value."""
    editor = Editor(model)
    for layer in item.layers:
        low, high = spans[layer.data_name]
        step = np.float32(max(high - low, 1e-12) / LEVELS)
        pair = [editor.constant("step", step), editor.constant("zero", np.uint8(np.clip(np.rint(-low / step), 0, LEVELS)))]
        whole = editor.insert_before(layer.node.index, "QuantizeLinear", [editor.tensor(layer.data_name), *pair])
        editor.set_input(layer.node.index, layer.data, editor.insert_before(layer.node.index, "DequantizeLinear", [whole, *pair]))
    return editor.finish()
