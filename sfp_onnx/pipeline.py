"""Cut a model as planned, prove it, and list what was done."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from . import graph
from .core.errors import DataError, OptionError, TargetError, VerificationError
from .core.options import PlanOptions, RepairOptions, ScoreOptions
from .core.types import Array, BoolArray, Coupling, Evaluation, Plan, Verification
from .coupling.analysis import Analysis, ModelSource, Progress, describe, inspect, load, reasons, silent
from .coupling.cost import cuts, keep_mask, vanishing
from .coupling.trace import random_feeds
from .cut import cut
from .cut.verify import compare, maskable, runs_at
from .data.checks import training_mode
from .data.dataset import Dataset
from .evaluation import evaluate, parse_drop
from .graph.model import Model, check, initializers
from .graph.save import file_bytes
from .latency.measure import latencies_of
from .methods.bandits import PREFIX
from .methods.bandits.pulling import search
from .methods.sfp import examples_of
from .planning import parse_target
from .planning.figures import ruler_for
from .planning.max_drop import Judge, held_out, plan_with_drop
from .planning.record import make_plan, removal_of, sample_shapes
from .planning.search import Candidates, plan_for
from .planning.widths import eligible
from .repair import repaired
from .report.manifest import Point, Pruned, manifest, write_json
from .runtime import Setup
from .scores.scoring import Scored, scored

SLOW_WIDTHS, SLOW_FROM = 4, 12  # onnxruntime uses its blocked convolutions only for multiples of 4 channels; fewer it reads one by one


def apply(
    source: ModelSource | Analysis,
    plan: Plan,
    data: Dataset | None = None,
    verify: bool = True,
    progress: Progress = silent,
    repair: RepairOptions | None = None,
) -> Pruned:
    """Cut a model as planned, prove it, and repair it if asked to (then ``data`` must be given).

    Raises:
        PlanError: the plan does not fit the model.
        VerificationError: the pruned model differs from the masked original, or the repair made it worse.
        DataError: a repair without data.
    """
    if isinstance(source, Analysis):
        analysis = source
    else:
        model = load(source)
        analysis = inspect(model, sample_shapes(plan), cut_layernorm=bool(plan.options.get("cut_layernorm")))
    removed = removal_of(plan, analysis.coupling, analysis.model.sha256)
    pruned = cut(analysis.prepared, analysis.coupling, removed) if removed.any() else analysis.model
    check(pruned)
    verification = None
    if verify:
        with progress("verifying", 1) as advance:
            verification = _verify(analysis, pruned, removed, data)
            advance(1)
    notes = _notes(analysis.coupling, removed)
    if analysis.model.complaint:
        notes += (f"onnx.checker rejects the original ({analysis.model.complaint}), so the result was not checked with it",)
    final = make_plan(analysis.coupling, removed, analysis.model.sha256, analysis.parameters, analysis.samples, plan.options)
    final = replace(final, notes=plan.notes, figures=plan.figures)
    if vanishing(analysis.coupling, removed):  # the constants that stand for branches are no channels of anything
        final = replace(final, after=replace(final.after, params=_weights(pruned)))
    trace, zero_points = analysis.prepared.trace, analysis.coupling.zero_points
    listed = tuple(maskable(analysis.prepared.types, cuts(analysis.coupling, trace, removed), zero_points))
    mended = None
    if repair is not None and removed.any():
        if data is None:
            raise DataError("the repair needs calibration data: give data, or no repair (--repair none)")
        mended = repaired(analysis, pruned, removed, data, repair, progress)
        notes = (*mended.notes, *notes)
    model = mended.model if mended else pruned
    return Pruned(model, analysis.model, final, listed, verification, notes, describe(data) if data else {}, mended)


def _weights(model: Model) -> int:
    """Number of floating or quantised weights."""
    held = initializers(model).values()
    return sum(prod(shape) for shape, dtype in held if np.dtype(dtype).kind not in "iubOSU")


def _notes(coupling: Coupling, removed: BoolArray) -> tuple[str, ...]:
    """What the user should know about a removal."""
    if not removed.any():
        return ("the plan removes nothing; the model is written unchanged",)
    widths = [keep_mask(layer.writes, removed) for layer in coupling.layers if (layer.writes >= 0).any()]
    odd = sum(int(kept.sum()) % SLOW_WIDTHS != 0 and int(kept.sum()) > SLOW_FROM for kept in widths if not kept.all())
    if not odd:
        return ()
    return (
        f"{odd} of {len(widths)} prunable layers end with a width over {SLOW_FROM} that is no multiple of {SLOW_WIDTHS}; onnxruntime may "
        "run them slower than the original. --align 4 (or 8, 16) avoids such widths.",
    )


def _verify(analysis: Analysis, pruned: Model, removed: BoolArray, data: Dataset | None) -> Verification:
    ports, feeds = graph.inputs(analysis.model), analysis.prepared.feeds
    inputs: dict[str, Mapping[str, Array]] = {"random": random_feeds(ports, feeds, seed=1)}
    if data is not None:
        size = analysis.samples
        batch = next(({name: array[:size] for name, array in own.items()} for own, count in data.batches() if count >= size), None)
        if batch is not None and {name: array.shape for name, array in batch.items()} == {k: v.shape for k, v in feeds.items()}:
            inputs["calibration"] = batch
    trace, zero_points = analysis.prepared.trace, analysis.coupling.zero_points
    every, fixed = (cuts(analysis.coupling, trace, removed, dynamic) for dynamic in (True, False))
    variant = analysis.prepared.variant
    if variant is not None:
        maskable_there = len(every) == len(fixed)  # masks of axes merged with a dynamic one fit the traced sizes only
        runs_at(analysis.model, pruned, variant, shapes=not maskable_there)
        if maskable_there:
            inputs["other sizes"] = variant
    types = analysis.prepared.types
    try:
        return compare(analysis.model, pruned, types, maskable(types, every, zero_points), inputs)
    except VerificationError as error:
        training = training_mode(analysis.model)
        if not training:
            raise
        raise VerificationError(f"{training[0]} So nothing can be verified, and nothing was written.") from error


def prune(
    source: ModelSource | Analysis,
    options: PlanOptions,
    score_name: str | None = None,
    data: Dataset | None = None,
    score_options: ScoreOptions | None = None,
    verify: bool = True,
    progress: Progress = silent,
    repair: RepairOptions | None = None,
    eval_data: Dataset | None = None,
) -> Pruned:
    """Plan and apply in one. For other shapes or options of the analysis, `inspect` first and pass its result to both.

    Raises:
        the errors of `inspect`, `plan` and `apply`.
    """
    analysis = source if isinstance(source, Analysis) else inspect(source, data=data)
    made = plan(analysis, options, score_name, data, score_options, progress, repair, eval_data)
    if options.max_drop is not None and eval_data is None:
        data = held_out(data, (score_options or ScoreOptions()).seed)[0]  # the model that was judged is the one that is made
    return apply(analysis, made, data, verify, progress, repair)


# ---- decide which units leave ----------------------------------------------------------------------------------------

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
    groups = eligible(coupling, options, weights_of)
    name = score_name or default_score(data, repair)
    score_options = score_options or ScoreOptions()
    if name.startswith(PREFIX):
        searched = search(analysis, name, data, score_options, (options, groups), progress)
        found = Scored(name, searched.scores, said=searched.notes)
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
    return Candidates(analysis, tuple(groups), found.values, recorded, found.errors, found.notes, data, repair, shown)


# ---- one calibration -------------------------------------------------------------------------------------------------

MOST = 100


def parse_sweep(text: str) -> list[str]:
    """Read ``macs=90%:20%:10%`` (first, last, step) into single targets.

    Raises:
        OptionError: not of that form, or a step that leads nowhere.
    """
    match = re.fullmatch(r"\s*(\w+)\s*=\s*([^:]+):([^:]+):([^:]+)", text)
    if match is None:
        raise OptionError(f"targets '{text}': expected first:last:step, such as macs=90%:20%:10% or latency=8ms:2ms:1ms")
    first, last, step = (parse_target(f"{match[1]}={part.strip()}") for part in match.groups()[1:])
    unit = re.sub(r"[0-9.\s]", "", match[2])
    if len({own.relative for own in (first, last, step)}) > 1:
        raise OptionError(f"targets '{text}': first, last and step must be all percentages or all absolute numbers")
    sign = 1 if last.value >= first.value else -1
    count = int(abs(last.value - first.value) / step.value + 1e-9) + 1
    if count > MOST:
        raise OptionError(f"targets '{text}': {count} targets; expected at most {MOST}")
    scale = first.value / float(re.sub(r"[^0-9.]", "", match[2]))
    values = [(first.value + sign * index * step.value) / scale for index in range(count)]
    return [f"{first.what}={value:.10g}{unit}" for value in values]


def sweep(
    scored: Candidates, options: PlanOptions, sweeps: Sequence[str], judge: Dataset | None, folder: Path | None = None,
    progress: Progress = silent,
) -> list[Point]:  # fmt: skip
    """Plan, cut and verify for every target of ``sweeps`` (besides the targets of the options), then measure all together.

    The first point is the original.

    Args:
        judge: data for accuracy; not those of the scores.
        folder: where each model and its manifest (.json) go (default: none is saved).

    Raises:
        OptionError: bad targets. TargetError: none of them can be reached.
    """
    wanted = [target for text in sweeps for target in parse_sweep(text)]
    analysis = scored.analysis
    everything = replace(options, targets=(*options.targets, *wanted))
    ruler = ruler_for(analysis, everything, progress)
    points, models = [], [analysis.model]
    with progress("sweeping", len(wanted)) as advance:
        for target in wanted:
            own = replace(options, targets=(*options.targets, target))
            names = tuple(dict.fromkeys(["macs", "params", *(parse_target(text).what for text in own.targets)]))
            try:
                plan = plan_for(scored, own, ruler=replace(ruler, names=names))
            except TargetError as error:
                points.append(Point(target, failure=str(error)))
            else:
                result = apply(analysis, plan, scored.data, repair=scored.repair)
                file, notes = (None, None) if folder is None else _saved(result, folder / f"{_stem(analysis)}-{_file_name(target)}.onnx")
                points.append(Point(target, size=plan.after, file=file, manifest=notes))
                models.append(result.model)
            advance(1)
    if len(models) == 1:
        raise TargetError(f"none of the {len(wanted)} targets can be reached. The first: {points[0].failure}")
    return _measured(analysis, points, models, judge, options)


def _saved(result: Pruned, path: Path) -> tuple[str, str]:
    """Write a model and its manifest; where they are."""
    file = result.save(path)
    notes = file.with_suffix(".json")
    write_json(notes, manifest(result, file), [*result.original.paths, file])
    return str(file), str(notes)


def _measured(
    analysis: Analysis, points: Sequence[Point], models: Sequence[Model], judge: Dataset | None, options: PlanOptions
) -> list[Point]:
    """The points with figures, the original first."""
    seconds = latencies_of(models, analysis, Setup(options.threads, options.provider), options.batch)
    figures: Sequence[Evaluation | None]
    figures = evaluate(models, judge, latency=False, threads=options.threads) if judge is not None else [None] * len(models)
    found = []
    number = 0
    for point in [Point("original", size=analysis.size()), *points]:
        if not point.failure:
            own = figures[number]
            if own is not None:
                point = replace(point, top1=own.top1, agreement=own.agreement, kl=own.kl, relative_error=own.relative_error)
            assert point.size is not None
            size = replace(point.size, bytes=file_bytes(models[number]))
            point = replace(point, size=size, latency_ms=seconds[number] * 1e3, latency_ratio=seconds[number] / seconds[0])
            number += 1
        found.append(point)
    return front(found)


def front(points: Sequence[Point]) -> list[Point]:
    """The points, with those marked that no other dominates."""
    def costs(point: Point) -> tuple[float, float, float]:
        assert point.size is not None and point.latency_ratio is not None
        if point.top1 is not None or point.agreement is not None:
            loss = -(point.top1 if point.top1 is not None else point.agreement or 0.0)
        else:
            loss = point.relative_error or 0.0
        return loss, float(point.size.bytes or 0), point.latency_ratio

    reached = [(point, costs(point)) for point in points if not point.failure]
    best = {
        point.target for point, own in reached
        if not any(all(a <= b for a, b in zip(other, own, strict=True)) and other != own for _, other in reached)
    }  # fmt: skip
    return [replace(point, front=not point.failure and point.target in best) for point in points]


def sweep_data(points: Sequence[Point], analysis: Analysis, scored: Candidates) -> dict[str, Any]:
    """A sweep as plain data for JSON."""
    model = {"path": str(analysis.model.source), "sha256": analysis.model.sha256}
    return {
        "format": "sfp_onnx sweep", "version": 1, "model": model, "options": dict(scored.recorded),
        "points": [asdict(point) for point in points],
    }  # fmt: skip


def _stem(analysis: Analysis) -> str:
    return analysis.model.source.stem if analysis.model.source else "model"


def _file_name(target: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", target.replace("%", "pct"))
