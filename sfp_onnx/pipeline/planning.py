"""Score units and decide which leave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from math import prod
from typing import Any

import numpy as np

from .. import plan as plans
from ..bandits import BANDIT_SCORES, PREFIX
from ..calibrate import calibrate, sites
from ..data import Dataset
from ..errors import DataError, OptionError, TargetError
from ..records import FloatArray, Moments, Plan, PlanOptions, ScoreOptions
from ..scores import SCORES
from ..views import views
from .analysis import Analysis, ModelSource, Progress, describe, inspect, reasons, silent
from .searching import search

ACTIVATION_BYTES = 512 * 2**20
SHARE_UNSAID = 0.5  # of every group, that bandit scores are searched for where there is no plan


def score(
    analysis: Analysis, name: str, data: Dataset | None = None, options: ScoreOptions | None = None, progress: Progress = silent
) -> FloatArray:
    """Importance per unit of the model (larger = keep).

    Raises:
        OptionError: unknown score.
        DataError: the score needs data and there are none.
    """
    if name.startswith(PREFIX):
        whole = (PlanOptions(ratio=SHARE_UNSAID), analysis.coupling.groups)
        return search(analysis, name, data, options or ScoreOptions(), whole, progress).scores
    if name not in SCORES:
        raise OptionError(f"unknown score '{name}'. Known: {', '.join([*sorted(SCORES), *BANDIT_SCORES])}")
    chosen = SCORES[name]
    moments: Mapping[tuple[str, int], Moments] = {}
    if chosen.needs:
        if data is None:
            free = ", ".join(sorted(own.name for own in SCORES.values() if not own.needs))
            raise DataError(f"score '{name}' needs calibration data: give --data, or use a score that needs none: {free}")
        ranks = {name: len(shape) for name, shape in analysis.prepared.trace.shapes.items()}
        with progress("calibrating", data.samples) as advance:
            model, wanted = analysis.prepared.model, sites(analysis.coupling)
            batches = replace(data, batch=_batch(analysis, data)).batches()
            moments = calibrate(model, ranks, wanted, chosen.needs, batches, advance).moments
    values = np.zeros(analysis.coupling.units)
    for group, view in zip(analysis.coupling.groups, views(analysis.prepared.model, analysis.coupling, moments), strict=True):
        values[group.units] = chosen.function(view, options or ScoreOptions())
    return values


def _batch(analysis: Analysis, data: Dataset) -> int:
    """The data's batch size, less if all activations of one batch would take more than `ACTIVATION_BYTES`."""
    if data.fixed:
        return data.batch
    total = sum(prod(shape) for shape in analysis.prepared.trace.shapes.values()) * 4 / analysis.samples
    return max(1, min(data.batch, int(ACTIVATION_BYTES / max(total, 1))))


def default_score(data: Dataset | None) -> str:
    """The score that is used if none is named."""
    return "magnitude" if data is None else "contribution"


def plan(
    source: ModelSource | Analysis,
    options: PlanOptions,
    score_name: str | None = None,
    data: Dataset | None = None,
    score_options: ScoreOptions | None = None,
    progress: Progress = silent,
) -> Plan:
    """Decide which units leave.

    Raises:
        TargetError: nothing can be pruned, or a target cannot be met.
        OptionError, ModelError, DataError: bad options or input.
    """
    analysis = source if isinstance(source, Analysis) else inspect(source, data=data)
    coupling = analysis.coupling
    if not coupling.groups:
        raise TargetError(f"{analysis.model.name}: nothing can be pruned. {reasons(coupling)}")
    weights_of = {layer.node.name: layer.node.inputs[layer.weight.position] for layer in coupling.layers if layer.weight}
    groups = plans.eligible(coupling, options, weights_of)
    name = score_name or default_score(data)
    score_options = score_options or ScoreOptions()
    notes: tuple[str, ...] = ()
    if name.startswith(PREFIX):
        found = search(analysis, name, data, score_options, (options, groups), progress)
        scores, notes = found.scores, found.notes
    else:
        scores = score(analysis, name, data, score_options, progress)
    removed = plans.choose(coupling, groups, scores, options, analysis.size)
    recorded: dict[str, Any] = {**asdict(options), "targets": list(options.targets), "score": name, **asdict(score_options)}
    if recorded["bandit"] is None:
        del recorded["bandit"]
    recorded["cut_layernorm"] = analysis.cut_layernorm
    recorded["sample_shapes"] = {key: list(array.shape) for key, array in analysis.prepared.feeds.items()}
    if data is not None:
        recorded["data"] = describe(data)
    made = plans.make_plan(coupling, removed, analysis.model.sha256, analysis.parameters, analysis.samples, recorded)
    return replace(made, notes=notes)
