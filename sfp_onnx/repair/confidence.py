"""How sure a repaired classifier is: one factor on its class scores, so that they come nearest to those of the original.

Least squares brings scores near on average, which says little of how far the largest stands out: after a deep cut a network that was
75 % sure may be 3 % sure, or as sure as before and wrong. With p the original's probabilities and z the scores that are left, the factor s
minimises the mean of KL(p || softmax(s z)) (temperature scaling, Guo et al., ICML 2017, with the original in place of labels). It changes
no answer, and goes into the weight and bias of the last layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np

from .. import evaluation
from ..core.options import MeasureOptions
from ..core.types import Array, FloatArray, Layer
from ..coupling.analysis import Analysis
from ..data.dataset import Dataset
from ..evaluation.meaning import Kind, Meaning, log_probabilities
from ..graph import Model, extract, outputs
from .steps import Scene, bias_place

FACTORS = np.geomspace(1 / 8, 8, 121)
FEWEST = 16  # samples; fewer tell too little
PARTS = 8  # of the samples: each is judged with the factor of the others (halves refused good factors by chance)
LAST = 3  # layers that are tried
NEAR = 1e-3  # of log probabilities, between what a factor should give and gives


def calibrated(analysis: Analysis, model: Model, judge: Dataset, how: MeasureOptions) -> tuple[Model, str]:
    """The model with its class scores times the best factor, and a word on it; as it is (and no word) where the outputs are no class
    scores, where samples that are judged with the factor of others show no gain, or where no last layer can take the factor.

    Args:
        judge: samples that had no part in the repair.

    Raises:
        ModelError: onnxruntime cannot run a model.
    """
    meaning = evaluation.reading_of(analysis.model, judge, how).judged
    if judge.samples < FEWEST or meaning.kind is not Kind.CLASSES or meaning.axis is None:
        return model, ""
    given = [evaluation.outputs(one, judge.batches()) for one in (analysis.model, model)]
    old, new = (_scores(model, meaning, arrays) for arrays in given)
    factor = _best(old, new)
    before, after = _divergence(old, new, 1.0), _divergence(old, new, factor)
    if not _crossed(old, new) < before:
        return model, ""
    wanted = log_probabilities(factor * new)
    for layer in islice(reversed(analysis.coupling.layers), LAST):
        changed = _multiplied(Scene(model, analysis.coupling, analysis.prepared.nodes, analysis.prepared.trace.shapes), layer, factor)
        if changed is None:
            continue
        arrays = evaluation.outputs(changed, judge.batches())
        beside = [(one, two) for port, one, two in zip(outputs(model), given[1], arrays, strict=True) if port.name not in meaning.outputs]
        near = np.allclose(_scores(model, meaning, arrays), wanted, rtol=NEAR, atol=NEAR)
        if near and all(_same(one, two) for one, two in beside):
            return changed, f"class scores times {factor:.3g} in {layer.node.name}, KL divergence {before:.3g} -> {after:.3g}"
    return model, ""


def _scores(model: Model, meaning: Meaning, arrays: Sequence[Array]) -> FloatArray:
    """Log probabilities (N, classes)."""
    names = [port.name for port in outputs(model)]
    return log_probabilities(meaning.scores(arrays[names.index(meaning.outputs[0])]))


def _same(one: Array | Sequence[Array], two: Array | Sequence[Array]) -> bool:
    return all(np.array_equal(first, second) for first, second in zip(one, two, strict=True))


def _divergence(old: FloatArray, new: FloatArray, factor: float) -> float:
    """Mean KL(old || softmax(factor * new)) of log probabilities."""
    return float((np.exp(old) * (old - log_probabilities(factor * new))).sum(1).mean())


def _crossed(old: FloatArray, new: FloatArray) -> float:
    """Mean divergence where each part of the samples is judged with the factor that is best for the others."""
    part = np.arange(len(old)) % PARTS
    apart = [(part == one, _best(old[part != one], new[part != one])) for one in range(PARTS)]
    return sum(_divergence(old[held], new[held], factor) * int(held.sum()) for held, factor in apart) / len(old)


def _best(old: FloatArray, new: FloatArray) -> float:
    return float(min(FACTORS, key=lambda factor: _divergence(old, new, factor)))


def _multiplied(scene: Scene, layer: Layer, factor: float) -> Model | None:
    """The model with weight and bias of a layer times a factor; None if they are no constants of its own."""
    held = scene.weight(layer) if layer.linear is not None else None
    if held is None or held.scale:
        return None
    place = bias_place(scene, layer)
    names = [held.name, *([place.name] if place is not None and place.name else [])]
    if any(name not in scene.constants or len(scene.index.readers(name)) > 1 for name in names):
        return None
    return extract.with_constants(scene.model, {name: np.asarray(scene.values[name] * factor, scene.values[name].dtype) for name in names})
