"""What the rounding of each weight does to the outputs of a model: the weight is rounded alone, and the model run.

The error of 8 bits is measured; that of other precisions goes with the squared change of the weight, of which it is a small part. Where
layers may be computed in integers, so is that of each alone, with the activations that it and what follows it read and make.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..core.errors import ModelError
from ..coupling.analysis import Analysis, Progress, feeds_of
from ..data.dataset import Dataset
from ..export.integers import Integers, taken
from ..graph import Constants, Model, extract
from ..graph.stored import STORED, holds, rounded
from ..planning.precision import INTEGER, LEAST, Storable
from .sensitivity import answers, lost

SAMPLES = 32


def with_errors(
    analysis: Analysis, weights: Sequence[Storable], data: Dataset | None, seed: int, progress: Progress,
    integers: Integers | None = None,
) -> tuple[Storable, ...]:  # fmt: skip
    """The weights with the error of each precision, on some of the data (default: on the sample that the model was traced on); infinite
    where it cannot be stored so, and for `INTEGER` where nothing makes ``integers``.

    Raises:
        ModelError: onnxruntime cannot run the model.
    """
    model, held = analysis.prepared.model, Constants(analysis.prepared.model)
    feeds = [analysis.prepared.feeds]
    if data is not None:
        drawn = np.random.default_rng([seed, data.samples]).permutation(data.samples)[:SAMPLES]
        feeds = list(feeds_of(analysis, data.part(np.sort(drawn))))
    tokens = analysis.prepared.tokens
    original, found = answers(model, feeds, tokens), []

    def error(changed: Model) -> float:
        known = [part for name, new in answers(changed, feeds, tokens).items() if (part := lost(new, original[name])) is not None]
        return float(np.mean(known)) if known else 0.0

    def on_integers(item: Storable) -> float:
        chosen = {layer.node.outputs[0] for layer in item.layers}
        try:
            changed = model if integers is None or item.slower else integers(model, chosen)
            return error(changed) if taken(changed, model, chosen) else np.inf
        except ModelError:
            return np.inf

    with progress("rounding", len(weights)) as advance:
        for item in weights:
            weight, axis = held[item.weight], item.first.weight.out_axis if item.first.weight else 0
            news = {code: rounded(weight, kind, axis) for kind, code in STORED.items() if code != INTEGER and holds(weight, kind)}
            errors = dict.fromkeys(STORED.values(), np.inf)
            if LEAST in news:
                changed = extract.with_constants(model, {item.weight: news[LEAST].astype(np.float32)})
                squares = {code: float(np.square(new - weight).sum()) for code, new in news.items()}
                unit = error(changed) / squares[LEAST] if squares[LEAST] else 0.0
                errors |= {code: unit * square for code, square in squares.items()}
                errors[INTEGER] = max(on_integers(item), errors[LEAST])
            found.append(replace(item, errors={**errors, 4: 0.0}))
            advance(1)
    return tuple(found)
