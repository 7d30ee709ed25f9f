"""A plan applied: cut, proven, repaired, counted, written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import graph, planning
from ..core.errors import DataError, TargetError, VerificationError
from ..core.options import DataOptions, InspectOptions, MeasureOptions, OutputOptions, RepairOptions
from ..core.system import command_line, log
from ..core.types import Array, BoolArray, Coupling, Plan
from ..coupling.analysis import Analysis, DataSource, Progress, counted, describe, silent
from ..coupling.cost import cuts, kept_masks
from ..coupling.trace import random_feeds
from ..cut import cut, factor
from ..cut.verify import Verification, compare, maskable, runs_at
from ..data import Preprocessing
from ..data.checks import training_mode
from ..data.dataset import Dataset
from ..graph.edit import without_projections
from ..graph.load import ModelSource, nested
from ..graph.save import saved_bytes, together, write_text
from ..planning import figures, max_drop, rounds
from ..planning.precision import of_plan
from ..repair import finished, repaired, rounded
from ..report import Page, render
from ..report.manifest import Pruned, manifest, write_json
from ..report.verdict import card
from .opened import AS_PLANNED, Inputs, Sources, settled, size_of, tell

SLOW_WIDTHS, SLOW_FROM = 4, 12  # onnxruntime uses its blocked convolutions only for multiples of 4 channels; fewer it reads one by one


def apply(
    source: ModelSource | Analysis, plan: Plan, data: DataSource | None = None, verify: bool = True, progress: Progress = silent,
    repair: RepairOptions | None = AS_PLANNED, *, data_options: DataOptions = DataOptions(), output: OutputOptions = OutputOptions(),
    paths: Sequence[Path] = (), measure_options: MeasureOptions = MeasureOptions(),
) -> Pruned:  # fmt: skip
    """Cut a model as planned, prove it, and repair it as the plan says (or as ``repair`` says). Data are read as those of the plan were,
    unless ``data_options`` say otherwise.

    Args:
        paths: files that the output must not replace, besides model and data (the plan's own).

    Raises:
        PlanError: the plan does not fit the model.
        VerificationError: the pruned model differs from the masked original, or the repair made it worse.
        DataError: the plan was made for a repair, or a repair is asked for, and there are no data.
    """
    data_options = data_options if data is None else _as_read(plan, data_options)
    layernorm, outputs = (bool(plan.options.get(name)) for name in ("cut_layernorm", "expand_outputs"))
    made_on = InspectOptions(planning.sample_shapes(plan), expand="none", cut_layernorm=layernorm, expand_outputs=outputs)
    inputs = Sources(data, None, None, data_options, made_on, paths, measure_options).open(source, [output.path, output.manifest])
    mend = as_planned(plan, repair, inputs.data)
    tell(inputs.reading, mend is not None)
    result = counted_on(applied_to(inputs, plan, verify, mend, progress), inputs, output, False)
    return written_out(result, inputs, output)


def _as_read(plan: Plan, options: DataOptions) -> DataOptions:
    """How the data are read: as the options say, else as those of the plan were."""
    known = plan.options.get("data")
    if not known or options.given:
        return options
    recorded = {name: known[name] for name in vars(Preprocessing()) if name in known}
    steps: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in recorded.items()}
    samples = plan.options.get("samples") if _judged_on_a_part(plan) else known["samples"]
    return replace(options, steps=Preprocessing(**steps), samples=samples, seed=plan.options.get("seed", 0))


def _judged_on_a_part(plan: Plan) -> bool:
    """Whether ``max_drop`` was judged on a part of the data, which was neither scored nor repaired with."""
    return plan.options.get("max_drop") is not None and "eval_data" not in plan.options


def as_planned(plan: Plan, repair: RepairOptions | None, data: Dataset | None) -> RepairOptions | None:
    """The repair that is asked for, else that of the plan, else the default.

    Raises:
        DataError: the plan was made for a repair, and there are no data.
    """
    recorded = plan.options.get("repair")
    if repair is None or repair.fit != "default" or "repair" not in plan.options:
        return settled(repair, data)
    if recorded is None:
        return None
    known = plan.options.get("data") or {}
    if data is None:
        raise DataError(
            f"the plan was made for a repair ({recorded['fit']}) on {known.get('name')}: give --data {known.get('name')} (it is "
            "read as the plan says), or say --repair none (then what is left is not re-fitted, and the accuracy will be lower)"
        )
    if data.sha256 != known.get("sha256"):
        log.warning(f"the plan was made with other data ({known.get('name')}) than {data.name}; the repair uses the latter")
    finetune = repair.finetune or recorded.get("finetune", 0)
    return replace(repair, fit=recorded["fit"], seed=recorded["seed"], finetune=finetune)


def applied_to(
    inputs: Inputs, plan: Plan, verify: bool, repair: RepairOptions | None, progress: Progress, weights: Mapping[str, Array] | None = None
) -> Pruned:  # fmt: skip
    """Cut, proven, and repaired from the weights of the original or from others of the same names."""
    analysis, data = inputs.analysis, inputs.data
    if data is not None and _judged_on_a_part(plan):
        data = max_drop.held_out(data, plan.options.get("seed", 0))[0]  # the model that was judged is the one that is made
    removed = planning.removal_of(plan, analysis.coupling, analysis.model.sha256)
    wholes, changed = planning.layers_of(plan.factors, analysis, removed), bool(removed.any() or plan.factors)
    low = cut(analysis.prepared, analysis.coupling, removed) if changed else analysis.model
    low = without_projections(low, analysis.projected) if analysis.projected and changed else low
    low = factor.lowered(low, wholes, plan.factors)
    pruned = factor.split(low, wholes, plan.factors)
    graph.check(pruned)
    verification = None
    if verify:
        with progress("verifying", 1) as advance:
            same = factor.original(analysis.prepared.model, wholes, removed, low) if wholes else None
            verification = _verify(analysis, pruned, removed, data, same)
            advance(1)
    less = any(item.stored != "float32" for item in plan.precisions)
    notes = (*(verification.notes if verification else ()), *_notes(analysis.coupling, removed, changed or less))
    if analysis.model.complaint:
        notes += (f"onnx.checker rejects the original ({analysis.model.complaint}), so the result was not checked with it",)
    final = planning.make_plan(analysis, removed, plan.options, plan.factors)
    final = replace(final, notes=plan.notes, figures=plan.figures, precisions=plan.precisions)
    stores = of_plan(plan.precisions, analysis.coupling)
    known = plan.options.get("measures") or {}
    how = inputs.told if inputs.measures != MeasureOptions() or not known else MeasureOptions(**known)
    listed = maskable(analysis.prepared.types, cuts(analysis.coupling, analysis.prepared.trace, removed), analysis.coupling.zero_points)
    mended = None
    if repair is not None and changed:
        if data is None:
            raise DataError("the repair needs calibration data: give data, or no repair (--repair none)")
        better = plan.options.get("max_drop") is not None  # the model that was judged is the one that is made
        start = low if weights is None else rounds.carried(low, weights)
        done = repaired(analysis, start, removed, data, repair, progress, how, better, factor.by_weight(wholes, plan.factors))
        done = replace(done, model=factor.split(done.model, wholes, plan.factors))
        mended = finished(analysis, done, listed, data, repair)
        notes = (*mended.notes, *notes)
    model = mended.model if mended else pruned
    if less:
        model, words = rounded(analysis, model, removed, stores, data, repair, progress, how, plan.factors)
        notes = (*words, *notes)
    if verify and analysis.prepared.nest:
        compare(nested(model, analysis.prepared.nest), model, {}, [], {"sample": analysis.prepared.feeds})
    if analysis.prepared.nest:
        model, outer = nested(model, analysis.prepared.nest), graph.GraphIndex(graph.nodes(analysis.model)).makers
        listed = [item for item in listed if item.tensor in outer]  # what lies in a branch has no name there
    return Pruned(model, analysis.model, final, tuple(listed), verification, notes, describe(data) if data else {}, mended)


def counted_on(result: Pruned, inputs: Inputs, output: OutputOptions, strict: bool = True) -> Pruned:
    """The result with the figures of the file that is written, counted on it.

    Raises:
        TargetError: they are above what was asked for, and the run is ``strict``.
    """
    analysis, plan = inputs.analysis, result.plan
    size = counted(result.model, analysis.prepared.feeds, analysis.samples)
    size = replace(size, bytes=saved_bytes(result.model, output.path, output.external))
    now: dict[str, float] = {"macs": size.macs, "params": size.params, "size": size.bytes or 0}
    if "memory" in plan.figures:
        now["memory"] = figures.peak(result.model, analysis, plan.options.get("batch", 1))
    held = {name: {**figure, "actual": now.get(name, figure["actual"])} for name, figure in plan.figures.items()}
    for name in now.keys() & held.keys():
        limit = held[name]["bound"]
        if now[name] > limit * (1 + 1e-9) and strict:
            shown = f"{planning.show(name, now[name])}, at most {planning.show(name, limit)} asked"
            raise TargetError(f"target {name}: the finished model has {shown}. Nothing was written. Ask for a little less.")
    return replace(result, plan=replace(plan, before=size_of(analysis), after=size, figures=held))


def _notes(coupling: Coupling, removed: BoolArray, changed: bool) -> tuple[str, ...]:
    """What the user should know about a removal, whether or not the plan ``changed`` anything."""
    if not changed:
        return ("the plan removes nothing; the model is written unchanged",)
    masks = [kept_masks(layer.made, removed)[0] for layer in coupling.layers if layer.free]
    odd = sum(int(kept.sum()) % SLOW_WIDTHS != 0 and int(kept.sum()) > SLOW_FROM for kept in masks if not kept.all())
    if not odd:
        return ()
    return (
        f"{odd} of {len(masks)} prunable layers end with a width over {SLOW_FROM} that is no multiple of {SLOW_WIDTHS}; onnxruntime may "
        "run them slower than the original. --align 4 (or 8, 16) avoids such widths.",
    )


def _verify(
    analysis: Analysis, pruned: graph.Model, removed: BoolArray, data: Dataset | None, low: graph.Model | None = None
) -> Verification:
    """That a cut model answers as the original does, masked; ``low``: the original with weights of lower rank, as prepared."""
    ports, feeds = graph.inputs(analysis.model), analysis.prepared.feeds
    inputs: dict[str, Mapping[str, Array]] = {"random": random_feeds(ports, feeds, seed=1)}
    if data is not None:
        batch = next(data.part(np.arange(min(analysis.samples, data.samples))).batches())[0]
        if {name: array.shape for name, array in batch.items()} == {name: array.shape for name, array in feeds.items()}:
            inputs["calibration"] = batch
    trace, zero_points = analysis.prepared.trace, analysis.coupling.zero_points
    every, fixed = (cuts(analysis.coupling, trace, removed, dynamic) for dynamic in (True, False))
    variant = analysis.prepared.variant
    if variant is not None:
        maskable_there = len(every) == len(fixed)  # masks of axes merged with a dynamic one fit the traced sizes only
        runs_at(analysis.model, pruned, variant, shapes=not maskable_there)
        if maskable_there:
            inputs["other sizes"] = variant
    types, base = analysis.prepared.types, analysis.prepared.base or analysis.model
    try:
        if base is not analysis.model:
            compare(analysis.model, base, types, [], inputs)
        if low is not None:  # weights may be folded from others in the original
            compare(base, analysis.prepared.model, types, [], inputs)
        return compare(low or base, pruned, types, maskable(types, every, zero_points), inputs)
    except VerificationError as error:
        training = training_mode(analysis.model)
        if not training:
            raise
        raise VerificationError(f"{training[0]} So nothing can be verified, and nothing was written.") from error


def written_out(result: Pruned, inputs: Inputs, output: OutputOptions, page: Page | None = None) -> Pruned:
    """Write what was asked for, all together or nothing; the result with its manifest."""
    result = replace(result, manifest=manifest(result, output.path, output.external))
    with together():  # of two runs to the same names, one wins as a whole
        if output.path is not None:
            result.save(output.path, output.external)
        read = [*inputs.paths, *([Path(output.path)] if output.path is not None else [])]
        if output.manifest is not None:
            write_json(output.manifest, result.manifest, read)
        if result.packaged is not None and result.packaged.ort is not None:
            result.packaged.ort.save(Path(output.save_ort), read)
        if page is not None:
            write_text(Path(output.report), render(page), read)
        if output.card is not None:
            write_text(Path(output.card), card(result, command_line.get()), read)
    return result
