"""Decide which units leave."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from .. import plan as plans
from ..bandits import PREFIX
from ..data import Dataset
from ..errors import OptionError, TargetError
from ..metrics import parse_drop
from ..records import Plan, PlanOptions, RepairOptions, ScoreOptions
from .analysis import Analysis, ModelSource, Progress, describe, inspect, reasons, silent
from .deciding import Candidates, plan_for
from .dropping import plan_with_drop
from .examples import examples_of
from .judging import Judge, held_out
from .scoring import Scored, scored
from .searching import search


def default_score(data: Dataset | None, repair: RepairOptions | None = None) -> str:
    """The score that is used if none is named: `obs` knows the least-squares repair that follows."""
    if data is None:
        return "magnitude"
    return "obs" if repair is not None and repair.fit == "lstsq" else "contribution"


def plan(
    source: ModelSource | Analysis,
    options: PlanOptions,
    score_name: str | None = None,
    data: Dataset | None = None,
    score_options: ScoreOptions | None = None,
    progress: Progress = silent,
    repair: RepairOptions | None = None,
    eval_data: Dataset | None = None,
) -> Plan:
    """Decide which units leave. With ``max_drop``, models are built to be judged, and repaired with ``repair``.

    Args:
        eval_data: data to judge on for ``max_drop`` (default: a third of ``data``, which is then not scored with).

    Raises:
        TargetError: nothing can be pruned, or a target cannot be met.
        OptionError, ModelError, DataError: bad options or input.
    """
    return planned(source, options, score_name, data, score_options, progress, repair, eval_data)[1]


def planned(
    source: ModelSource | Analysis,
    options: PlanOptions,
    score_name: str | None = None,
    data: Dataset | None = None,
    score_options: ScoreOptions | None = None,
    progress: Progress = silent,
    repair: RepairOptions | None = None,
    eval_data: Dataset | None = None,
) -> tuple[Candidates, Plan]:
    """As `plan`, with the scores that the plan was made from."""
    analysis = source if isinstance(source, Analysis) else inspect(source, data=data)
    if options.max_drop is None:
        found = candidates(analysis, options, score_name, data, score_options, progress, repair)
        return found, plan_for(found, options, progress)
    if options.ratio is not None:
        raise OptionError("give either --ratio or --max-drop")
    seed = (score_options or ScoreOptions()).seed
    seen, own = (data, eval_data) if eval_data is not None else held_out(data, seed)
    limit, apart = parse_drop(options.max_drop), eval_data is not None
    judge = Judge(analysis.model, own, limit, options.confidence, options.metric, apart, seed)
    ready = candidates(analysis, options, score_name, seen, score_options, progress, repair)
    if apart:
        ready = replace(ready, recorded={**ready.recorded, "eval_data": describe(own)})
    return ready, plan_with_drop(ready, options, judge, progress=progress)


def candidates(
    analysis: Analysis, options: PlanOptions, score_name: str | None = None, data: Dataset | None = None,
    score_options: ScoreOptions | None = None, progress: Progress = silent, repair: RepairOptions | None = None,
) -> Candidates:  # fmt: skip
    """Everything that plans need of a model and its data, once for any number of plans, which ``repair`` follows.

    Raises:
        TargetError: nothing can be pruned. OptionError, DataError: bad options or data.
    """
    coupling = analysis.coupling
    if not coupling.groups:
        raise TargetError(f"{analysis.model.name}: nothing can be pruned. {reasons(coupling)}")
    weights_of = {layer.node.name: layer.node.inputs[layer.weight.position] for layer in coupling.layers if layer.weight}
    groups = plans.eligible(coupling, options, weights_of)
    name = score_name or default_score(data, repair)
    score_options = score_options or ScoreOptions()
    if name.startswith(PREFIX):
        searched = search(analysis, name, data, score_options, (options, groups), progress)
        found = Scored(name, searched.scores, said=searched.notes, traces=searched.traces)
    else:
        found = scored(analysis, name, data, score_options, progress)
    recorded: dict[str, Any] = {"score": name, **asdict(score_options), "cut_layernorm": analysis.cut_layernorm}
    del recorded["memory"]
    if recorded["bandit"] is None:
        del recorded["bandit"]
    recorded["sample_shapes"] = {key: list(array.shape) for key, array in analysis.prepared.feeds.items()}
    if data is not None:
        recorded["data"] = describe(data)
    shown = examples_of(found.profiles)
    return Candidates(analysis, tuple(groups), found.values, recorded, found.errors, found.notes, data, repair, shown, found.traces)
