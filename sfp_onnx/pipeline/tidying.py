"""After the dilution: proof, removal of channels without connections, grouped convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from .. import dilute as stage
from .. import graph, runtime
from ..cut import cut
from ..data import Dataset
from ..errors import ModelError, VerificationError
from ..graph import Model
from ..records import Array, BoolArray
from ..trace import random_feeds
from ..verify import compare
from .analysis import Analysis, Progress, inspect
from .dilution import Diluted


def batches(analysis: Analysis, data: Dataset | None) -> dict[str, Mapping[str, Array]]:
    """A few inputs to check on: random ones, and calibration data."""
    feeds = analysis.prepared.feeds
    found: dict[str, Mapping[str, Array]] = {"random": random_feeds(graph.inputs(analysis.model), feeds, seed=1)}
    if data is not None:
        first = next(iter(data.batches()), None)
        if first is not None:
            found["calibration"] = first[0]
    return found


def check(model: Model, masks: Mapping[str, BoolArray], feeds: Mapping[str, Mapping[str, Array]]) -> None:
    """Masked weights are zero, outputs are finite.

    Raises:
        VerificationError: else.
    """
    constants = graph.Constants(model)
    for name, mask in masks.items():
        if np.any(constants[name][~mask]):
            raise VerificationError(f"{model.name}: internal error: a masked weight of '{name}' is not zero. Please report it.")
    session = runtime.open_session(graph.serialized(model), model.weights, model.name)
    for kind, inputs in feeds.items():
        for port, value in zip(graph.outputs(model), session.run(inputs), strict=True):
            if isinstance(value, np.ndarray) and value.dtype.kind == "f" and not np.isfinite(value).all():
                raise VerificationError(f"{model.name}: output '{port.name}' of the diluted model is not finite on {kind} input")


def finished(result: Diluted, data: Dataset | None, progress: Progress) -> Diluted:
    """Remove dead channels and regroup."""
    with progress("removing dead channels", 1) as advance:
        result = _without_dead(result, data)
        advance(1)
    if result.options.regroup:
        with progress("regrouping", 1) as advance:
            result = _regrouped(result, data)
            advance(1)
    graph.check(result.model)
    return replace(result, after=inspect(result.model, data=data).size())


def _same(before: Model, after: Model, feeds: Mapping[str, Mapping[str, Array]]) -> float:
    """Largest relative difference between two models that must be equal.

    Raises:
        VerificationError: they are not.
    """
    return max(compare(before, after, graph.tensor_types(before), [], feeds).errors.values(), default=0.0)


def _without_dead(result: Diluted, data: Dataset | None) -> Diluted:
    """Fold constant channels, then cut what nobody reads, until nothing is left to do."""
    model, notes, left, units = result.model, list(result.notes), 0, 0
    zero = folded = 0
    checks = dict(result.checks)
    while True:
        analysis = inspect(model, data=data)
        feeds = batches(analysis, data)
        known = stage.fold_constants(analysis.prepared.model, analysis.prepared, analysis.coupling, list(feeds.values()))
        dead = stage.unread(known.model, analysis.coupling)
        if not dead.any():
            left = known.left
            break
        try:
            smaller = cut(replace(analysis.prepared, model=known.model), analysis.coupling, dead)
            error = _same(model, smaller, feeds)
        except (VerificationError, ModelError):
            notes.append(f"{int(dead.sum())} channels without connections were left: the model would not stay the same without them")
            break
        model, units = smaller, units + int(dead.sum())
        zero, folded = zero + known.zero, folded + known.folded
        checks["dead channels"] = max(checks.get("dead channels", 0.0), error)
    if units:
        notes.append(f"{units} channels without connections were removed ({zero} of them constant at zero, {folded} folded into biases)")
    if left:
        notes.append(f"{left} constant channels were left: a padded convolution, or a layer without a bias of its own, reads them")
    return replace(result, model=model, cut=units, checks=checks, notes=tuple(notes))


# ---- regrouping ------------------------------------------------------------------------------------------------------

REPEATS = 30
FASTER = 0.98
"""A regrouped model is kept if the median of its interleaved time ratios is under this: less is not told from noise."""


def _regrouped(result: Diluted, data: Dataset | None) -> Diluted:
    names = [item.layer for item in result.layers]
    model, notes, checks = result.model, list(result.notes), dict(result.checks)
    connected = []
    for name in names:
        analysis = inspect(model, data=data)
        current = analysis.prepared.model
        layer = next((own for own in analysis.coupling.layers if own.node.name == name and own.weight is not None), None)
        if layer is None or layer.weight is None:
            continue
        weight = graph.Constants(current)[layer.node.inputs[layer.weight.position]]
        if not stage.can_group(layer, weight.shape):
            continue
        keep: BoolArray = (weight != 0).reshape(*weight.shape[:2], -1).any(2)
        options = stage.blocks(keep)
        if not options:
            connected.append(name)
            continue
        feeds = batches(analysis, data)
        tried = [_attempt(analysis, stage.Grouping(layer, own, stage.absorbable(layer)), feeds) for own in options[:3]]
        best = min((own for own in tried if own), key=lambda own: own[1], default=None)
        if best is None:
            notes.append(f"'{name}' is block-diagonal, but no rewriting of it was exact")
        elif best[1] >= FASTER:
            notes.append(f"'{name}' as {best[3]} groups is not faster ({best[1]:.2f} of the time, measured): left as it is")
        else:
            model = best[0]
            checks["regrouping"] = max(checks.get("regrouping", 0.0), best[2])
            notes.append(f"'{name}' became a convolution with {best[3]} groups: {best[1]:.2f} of the model's time, measured")
    if connected:
        notes.append(f"no permutation makes {', '.join(connected)} block-diagonal: their kernels connect all channels")
    return replace(result, model=model, notes=tuple(notes), checks=checks)


def _attempt(
    analysis: Analysis, grouping: stage.Grouping, feeds: Mapping[str, Mapping[str, Array]]
) -> tuple[Model, float, float, int] | None:
    """(model, share of the time, difference, groups) with the permutation absorbed where that is exact, else by Gather."""
    current = analysis.prepared.model
    left, right = grouping.absorb
    for absorb in dict.fromkeys(((left, right), (left, False), (False, right), (False, False))):
        try:
            new = stage.regrouped(current, analysis.coupling, analysis.prepared.nodes, replace(grouping, absorb=absorb))
            error = _same(current, new, feeds)
        except (VerificationError, ModelError):
            continue
        sessions = [runtime.open_session(graph.serialized(own), own.weights, own.name) for own in (current, new)]
        times = np.asarray(runtime.latencies(sessions, feeds.get("calibration", feeds["random"]), REPEATS))
        return new, float(np.median(times[1] / times[0])), error, grouping.blocks.groups
    return None
