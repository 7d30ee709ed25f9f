"""Where the time of a model goes, layer by layer, in the original and in what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .. import graph, latency
from ..errors import SfpError
from ..graph import Model
from ..latency import Timing, Variant
from ..records import FloatArray
from ..runtime import Setup
from .analysis import Analysis, Progress, silent
from .profiling import timing_feeds

SECONDS = 2.0  # of running, about
NOTHING = np.zeros((0, 0))


@dataclass(frozen=True)
class LayerTimes:
    """Milliseconds of every mixing layer in network order, and of all other kernels together (last), before and after.

    From onnxruntime's own records of its kernels, less the cost of recording, so that each column adds up to a whole run. What
    onnxruntime fuses into a layer counts with it. ``batch`` is the number of samples in a run.
    """

    names: tuple[str, ...]
    before: FloatArray
    after: FloatArray
    batch: int


def layer_times(
    analysis: Analysis, model: Model, setup: Setup | None = None, batch: int = 1, progress: Progress = silent
) -> LayerTimes | None:
    """Time both models' kernels, interleaved; None if the second has other tensors than the first, or one does not run so."""
    nodes = analysis.prepared.nodes
    made = {name for node in graph.nodes(model) for name in node.outputs}
    layers = [layer.node for layer in analysis.coupling.layers]
    if not layers or not made & {layer.outputs[0] for layer in layers}:
        return None
    models = [analysis.prepared.model, model]
    try:
        with progress("timing layers", 1) as advance:
            feeds = timing_feeds(analysis, batch)
            found = latency.time_variants([Variant(own, NOTHING) for own in models], nodes, feeds, setup or Setup(), SECONDS)
            advance(1)
    except SfpError:
        return None  # a report can do without
    indices = [layer.index for layer in layers]
    mixing = np.isin(np.arange(len(nodes)), indices)
    before, after = (_column(own, latency.classes(nodes, [own], mixing), indices) for own in found)
    samples = next((array.shape[0] for array in feeds.values() if array.ndim), 1)
    return LayerTimes((*(layer.name for layer in layers), "all else"), before, after, samples)


def _column(timing: Timing, classes: Sequence[int], layers: Sequence[int]) -> FloatArray:
    """Milliseconds per layer and of the rest. overhead = (sum of all records - a run without recording) / number of kernels.

    ``classes`` are those of nodes that share a kernel; several layers in one of them share its time.
    """
    overhead = (timing.nodes.sum() - timing.whole) / max(timing.kernels.sum(), 1.0)
    net = np.maximum(timing.nodes - overhead * timing.kernels, 0.0)
    sums = np.bincount(classes, net, minlength=len(net))
    owners = np.asarray(classes)[list(layers)]
    own = np.where(timing.there[list(layers)], sums[owners], 0.0) / np.bincount(owners, minlength=len(net))[owners]
    column: FloatArray = 1e3 * np.append(own, max(net.sum() - own.sum(), 0.0))
    return column
