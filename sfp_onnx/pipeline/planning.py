"""Score units and decide which leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from math import prod
from typing import Any

import numpy as np

from .. import plan as plans
from ..calibrate import calibrate, sites
from ..data import Dataset
from ..errors import DataError, OptionError, TargetError
from ..records import FloatArray, Group, Moments, Plan, PlanOptions, ScoreOptions
from ..scores import SCORES
from ..targets import bounds, parse_target
from ..views import views
from .analysis import Analysis, ModelSource, Progress, describe, inspect, reasons, silent
from .targeting import Reached, block_of, narrowest, ranking, reach, ruler_for, solver

ACTIVATION_BYTES = 512 * 2**20


def score(
    analysis: Analysis, name: str, data: Dataset | None = None, options: ScoreOptions | None = None, progress: Progress = silent
) -> FloatArray:
    """Importance per unit of the model (larger = keep).

    Raises:
        OptionError: unknown score.
        DataError: the score needs data and there are none.
    """
    if name not in SCORES:
        raise OptionError(f"unknown score '{name}'. Known: {', '.join(sorted(SCORES))}")
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
    scores = score(analysis, name, data, score_options, progress)
    found, used = decide(analysis, groups, scores, options, progress)
    recorded: dict[str, Any] = {**asdict(used), "targets": list(options.targets), "score": name, **asdict(score_options)}
    recorded["cut_layernorm"] = analysis.cut_layernorm
    recorded["sample_shapes"] = {key: list(array.shape) for key, array in analysis.prepared.feeds.items()}
    if data is not None:
        recorded["data"] = describe(data)
    made = plans.make_plan(coupling, found.removed, analysis.model.sha256, analysis.parameters, analysis.samples, recorded)
    return replace(made, notes=found.notes, figures=_figures(found))


def decide(
    analysis: Analysis, groups: Sequence[Group], scores: FloatArray, options: PlanOptions, progress: Progress = silent,
    errors: Mapping[str, FloatArray] | None = None,
) -> tuple[Reached, PlanOptions]:  # fmt: skip
    """Which units leave, and the options with their defaults filled in.

    Args:
        errors: error of a group by the number of units it keeps (0 .. width), for the allocation "solve"; default: from the scores.

    Raises:
        OptionError: neither or both of ratio and targets. TargetError: the targets cannot be held.
    """
    wanted = [parse_target(text) for text in options.targets]
    ruler = ruler_for(analysis, options, progress)
    asked = {target.what for target in wanted}
    allocation = options.allocation
    if allocation == "default":
        allocation = "solve" if asked & {"latency", "memory"} else "uniform"
    used = replace(options, allocation=allocation, align=block_of(options, ruler.profile))
    if options.ratio is not None or not wanted:
        used = replace(used, allocation="uniform" if allocation == "solve" else allocation)
        removed = plans.choose(analysis.coupling, groups, scores, used, ruler.predicted)
        assert removed is not None
        return Reached(removed, {}, {}), used
    choice = solver(ruler, groups, scores, used, errors) if allocation == "solve" else ranking(ruler, groups, scores, used)
    most = narrowest(analysis.coupling, groups, scores, used)
    with progress("planning", 1) as advance:
        found = reach(ruler, wanted, choice, most)
        advance(1)
    return replace(found, before=ruler.before, bounds=bounds(wanted, ruler.before)), used


def _figures(found: Reached) -> dict[str, dict[str, float]]:
    return {
        name: {"before": found.before[name], "bound": bound, "predicted": found.predicted[name], "actual": found.actual[name]}
        for name, bound in found.bounds.items()
    }
