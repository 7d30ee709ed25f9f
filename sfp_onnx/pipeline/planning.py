"""Decide which units leave."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from .. import plan as plans
from ..data import Dataset
from ..errors import TargetError
from ..records import Plan, PlanOptions, ScoreOptions
from .analysis import Analysis, ModelSource, Progress, describe, inspect, reasons, silent
from .scoring import scored


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
    found = scored(analysis, name, data, score_options, progress)
    removed = plans.choose(coupling, groups, found.values, options, analysis.size)
    recorded: dict[str, Any] = {**asdict(options), "targets": list(options.targets), "score": name, **asdict(score_options)}
    recorded["cut_layernorm"] = analysis.cut_layernorm
    recorded["sample_shapes"] = {key: list(array.shape) for key, array in analysis.prepared.feeds.items()}
    if data is not None:
        recorded["data"] = describe(data)
    made = plans.make_plan(coupling, removed, analysis.model.sha256, analysis.parameters, analysis.samples, recorded)
    return replace(made, notes=found.notes)
