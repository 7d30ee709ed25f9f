"""Activation statistics from one streaming pass: reduced inside the graph, summed in float64, mergeable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from . import graph, runtime
from .errors import DataError
from .graph import Model
from .records import Array, Coupling, FloatArray, Moments

Site = tuple[str, int]
"""A tensor and the axis whose channels are counted."""


def sites(coupling: Coupling) -> list[Site]:
    """Activations that mixing layers read and that hold units."""
    found: dict[Site, None] = {}
    for layer in coupling.layers:
        if (layer.source >= 0).any():
            found[layer.data_name, layer.data_axis] = None
    return list(found)


@dataclass
class Statistics:
    """Moments of every site, for one batch or any number of them."""

    moments: dict[Site, Moments]

    def merge(self, other: Statistics) -> None:
        """Add statistics of disjoint data; the order does not matter beyond float64 rounding."""
        for site, new in other.moments.items():
            old = self.moments.get(site)
            if old is None:
                self.moments[site] = new
            else:
                self.moments[site] = Moments(old.squares + new.squares, old.zeros + new.zeros, old.count + new.count)


def calibrate(
    model: Model,
    ranks: Mapping[str, int],
    wanted: Iterable[Site],
    needs: frozenset[str],
    batches: Iterable[tuple[Mapping[str, Array], int]],
    progress: Callable[[int], None] = lambda done: None,
) -> Statistics:
    """Run the data once through the model and collect per-channel sums.

    Args:
        ranks: rank of each tensor.
        needs: {"squares", "zeros"} or a part of it.
        batches: (inputs, number of real samples in it).
        progress: called with the number of samples after each batch.

    Raises:
        ModelError: onnxruntime cannot run the model on the data.
        DataError: an activation is not finite on the data.
    """
    editor = graph.Editor(model)
    taps = {site: _tap(editor, site, ranks[site[0]], needs) for site in wanted}
    probe = editor.finish()
    session = runtime.open_session(graph.serialized(probe), probe.weights, model.name)
    names = [name for outputs in taps.values() for name in outputs.values()]
    statistics = Statistics({})
    for feeds, samples in batches:
        results = dict(zip(names, session.run(feeds, names), strict=True))
        batch = len(next(iter(feeds.values())))
        for site, outputs in taps.items():
            statistics.merge(_moments(site, {kind: results[name] for kind, name in outputs.items()}, samples, batch))
        progress(samples)
    return statistics


def _moments(site: Site, outputs: Mapping[str, Array], samples: int, batch: int) -> Statistics:
    """Statistics of one batch, of which the first ``samples`` rows are real and the rest padding.

    Padding is told apart where the first axis is the batch, or the batch times something; other tensors count as a whole.
    """
    shape = outputs["shape"]
    channels, rows = int(shape[site[1]]), int(shape[0])
    used = rows // batch * samples if site[1] != 0 and rows % batch == 0 else rows
    positions = float(np.prod(shape)) / channels * used / rows
    sums = {kind: _sums(outputs[kind], channels, positions, used) for kind in outputs if kind != "shape"}
    if not all(np.isfinite(value).all() for value in sums.values()):
        raise DataError(f"tensor '{site[0]}' is not finite on the data. Check --scale, --mean and --std, or the model.")
    nothing = np.zeros(channels)
    return Statistics({site: Moments(sums.get("squares", nothing), sums.get("zeros", nothing), positions)})


def _sums(means: Array, channels: int, positions: float, used: int) -> FloatArray:
    """Sums per channel over ``positions`` in float64, from means within each of the first ``used`` rows."""
    rows = means.reshape(-1, channels)[:used].astype(np.float64)
    total: FloatArray = rows.sum(0) * (positions / len(rows))
    return total


def _tap(editor: graph.Editor, site: Site, rank: int, needs: frozenset[str]) -> dict[str, str]:
    """Add means over all axes but the first and the channels'; returns the output name per statistic.

    Means within a sample are float32 (in the graph), sums over samples float64 (in numpy).
    """
    name, axis = site
    tensor = editor.append("Cast", [editor.tensor(name)], {"to": 1}, name=f"{name}/float")
    axes = [other for other in range(rank) if other not in (0, axis)]
    found = {"shape": editor.add_output(editor.append("Shape", [tensor], name=f"{name}/{axis}/shape"))}
    if "squares" in needs:
        square = editor.append("Mul", [tensor, tensor], name=f"{name}/square")
        found["squares"] = editor.add_output(editor.mean(square, rank, axes, f"{name}/{axis}/squares"))
    if "zeros" in needs:
        nonzero = editor.append("Cast", [tensor], {"to": 9}, name=f"{name}/nonzero")  # Equal takes no floats before opset 11
        is_zero = editor.append("Cast", [editor.append("Not", [nonzero], name=f"{name}/zero")], {"to": 1}, name=f"{name}/is_zero")
        found["zeros"] = editor.add_output(editor.mean(is_zero, rank, axes, f"{name}/{axis}/zeros"))
    return found
