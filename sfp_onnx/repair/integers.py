"""Layers that compute with integers: onnxruntime's quantiser on some layers, with ranges of activations that are chosen on other samples.

Written as QuantizeLinear/DequantizeLinear around the nodes, as onnxruntime and others read it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from ..core.types import FloatArray
from ..coupling.analysis import Analysis, feeds_of
from ..data.dataset import Dataset
from ..export import Feeding, quantized
from ..graph import GraphIndex, Initializer, Model, extract, initializers, nodes, with_node_names
from ..runtime import observe, tensor_types, unpadded

RANGES = ("MinMax", "percentile", "MSE")
PERCENT = 99.99
DRAWN = 2**14  # values of a tensor that percentiles and errors are taken from
SHARES = np.linspace(1.0, 0.4, 25)  # of the whole range
LEVELS = 255


def on_integers(
    analysis: Analysis, model: Model, outputs: Collection[str], batches: Feeding, ranges: Mapping[str, tuple[float, float]] | None = None
) -> Model:  # fmt: skip
    """The model in which the layers of these (first) outputs are quantised, and between them what only they feed.

    Args:
        ranges: least and largest value of activations (default: those in the batches).

    Raises:
        ModelError: onnxruntime's quantiser cannot do it.
    """
    named = with_node_names(model)
    every, held = nodes(named), initializers(named)
    layers = {layer.node.outputs[0] for layer in analysis.coupling.layers}
    floating = {output for output in layers if output not in outputs}
    index = GraphIndex(every)
    left = []
    for node in every:
        own = node.outputs[0]
        behind = {own} & layers or {name for other in index.needed([own], layers) for name in other.reads if name in layers}
        if not behind or behind & floating or _unpacks(node.inputs, held):
            left.append(node.name)
    known = tensor_types(named) if ranges else {}
    given = ((name, *both) for name, both in (ranges or {}).items() if name in known)
    overrides = {name: [{"rmin": np.float32(low), "rmax": np.float32(high)}] for name, low, high in given}
    facts: dict[str, Any] = {"nodes_to_exclude": left} if left else {}
    if overrides:
        facts["extra_options"] = {"TensorQuantOverrides": overrides}
    return quantized(named, batches, facts)


def _unpacks(inputs: Sequence[str], held: Mapping[str, Initializer]) -> bool:
    """Whether a node reads constants alone."""
    return all(name in held for name in inputs if name)


# ---- ranges of activations -------------------------------------------------------------------------------------------


def ranges_of(analysis: Analysis, model: Model, data: Dataset, seed: int) -> dict[str, dict[str, tuple[float, float]]]:
    """By way of choosing (`RANGES`) the range of every floating activation of a model, on all of the data."""
    types = tensor_types(model)
    names = [name for node in nodes(model) for name in node.outputs if name and types.get(name) == np.float32]
    least: dict[str, float] = {}
    most: dict[str, float] = {}
    drawn: dict[str, list[FloatArray]] = {name: [] for name in names}
    random, batches = np.random.default_rng(seed), list(feeds_of(analysis, data))
    for batch in observe(extract.segment(model, [], dict.fromkeys(names, np.dtype(np.float32))), unpadded(batches)):
        for name, array in batch.values.items():
            if array.size:
                least[name], most[name] = min(least.get(name, 0.0), float(array.min())), max(most.get(name, 0.0), float(array.max()))
                drawn[name].append(random.choice(array.reshape(-1), DRAWN // len(batches) + 1).astype(np.float64))
    whole = {name: (least[name], most[name]) for name in least}
    values = {name: np.concatenate(drawn[name]) for name in whole}
    percentile = {name: _percentile(array, whole[name]) for name, array in values.items()}
    return {"MinMax": whole, "percentile": percentile, "MSE": {name: nearest(array, whole[name]) for name, array in values.items()}}


def _percentile(values: FloatArray, whole: tuple[float, float]) -> tuple[float, float]:
    low, high = np.percentile(values, [100 - PERCENT, PERCENT])
    return max(min(float(low), 0.0), whole[0]), min(max(float(high), 0.0), whole[1])


def nearest(values: FloatArray, whole: tuple[float, float]) -> tuple[float, float]:
    """The range, a share of the whole one, whose 256 levels are nearest to the values (least squares)."""

    def error(share: float) -> float:
        low, high = whole[0] * share, whole[1] * share
        step = max((high - low) / LEVELS, 1e-12)
        return float(np.square(np.rint(np.clip(values, low, high) / step) * step - values).sum())

    best = min(SHARES.tolist(), key=error)
    return whole[0] * best, whole[1] * best
