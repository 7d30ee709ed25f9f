"""Layers that are computed in 8-bit integers: which nodes become so with them, and in what ranges activations are rounded.

A layer takes along what follows it up to the next layers (`planning.precision.leaders`): activation functions, additions, pooling. All is
written by onnxruntime's own quantiser (QuantizeLinear/DequantizeLinear), which is told the nodes and the ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ..core.types import Array, FloatArray
from ..graph import Model, extract, initializers, inputs, nodes, with_node_names
from ..planning.precision import leaders
from ..runtime import open_model
from . import quantized

BINS, LEVELS = 2048, 255
OUTSIDE = 1e-4  # share of the values that percentiles leave outside, of both ends together
SHRINKS = np.linspace(1, 0.3, 29)  # of the whole range, that mean squared errors are compared at
MOST_VALUES = 2**17  # of a tensor and a batch, that a histogram is made of

Ranges = Mapping[str, FloatArray]
"""Least and largest value (2,) of each tensor."""


@dataclass(frozen=True)
class Integers:
    """Makes layers of a model integers. ``layers``: the first outputs of all that mix channels, in the original; ``ranges`` are those of
    what nodes read and make."""

    layers: frozenset[str]
    ranges: Ranges

    def __call__(self, model: Model, chosen: Collection[str]) -> Model:
        """The model with these layers (by their first outputs), and what follows them, on integers.

        Raises:
            ModelError: onnxruntime's quantiser fails on all of them.
        """
        named = with_node_names(model)
        lead = leaders(nodes(named), self.layers)
        listed = [node.name for node in nodes(named) if node.outputs and lead.get(node.outputs[0]) in chosen]
        return quantized(named, list, ranges=self.ranges, nodes_to_quantize=listed) if listed else model


def taken(model: Model, original: Model, layers: Collection[str]) -> bool:
    """Whether the weights of a layer (its first output in ``layers``) are integers in a model that was made of the original."""
    known, held = initializers(original), initializers(model)
    read = {name for node in nodes(original) if set(node.outputs) & set(layers) for name in node.inputs}
    weights = {name for name in read & known.keys() if len(known[name].shape) > 1}
    return bool(weights) and not weights & held.keys()


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
            yield from ((name, array) for name, array in values.items() if getattr(array, "dtype", None) == np.float32 and array.size)

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
    """The range, of all that are a share of the whole, in which rounding to `LEVELS` steps changes the values least."""
    low, high = np.minimum(held.least, 0) * SHRINKS, np.maximum(held.most, 0) * SHRINKS
    scale, values = np.maximum((high - low) / LEVELS, np.finfo(np.float32).tiny)[:, None], held.centers
    rounded = np.clip(np.rint(values / scale) * scale, low[:, None], high[:, None])
    best = int(np.argmin((np.square(rounded - values) * held.counts).sum(1)))
    return np.asarray([low[best], high[best]])


KINDS: Mapping[str, Callable[[Histogram], FloatArray]] = {
    "from least to largest": least_to_most, f"{1 - OUTSIDE:.2%} of the values": percentile, "least squared error": least_squares,
}  # fmt: skip


def ranges_of(found: Mapping[str, Histogram], kind: str = next(iter(KINDS))) -> Ranges:
    """The ranges of one kind."""
    return {name: KINDS[kind](held) for name, held in found.items()}
