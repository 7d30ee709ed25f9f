"""Cut a model as planned, prove it, and list what was done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from .. import graph
from .. import plan as plans
from ..cut import cut
from ..data import Dataset
from ..errors import DataError, VerificationError
from ..graph import Model
from ..records import Array, BoolArray, Coupling, Cut, Plan, PlanOptions, RepairOptions, ScoreOptions, Verification
from ..trace import random_feeds
from ..units import cuts, keep_mask, vanishing
from ..verify import compare, maskable, runs_at
from .analysis import Analysis, ModelSource, Progress, describe, inspect, load, silent
from .judging import held_out
from .noticing import training_mode
from .planning import plan as make_plan
from .repairing import Repaired, repaired

SLOW_WIDTHS, SLOW_FROM = 4, 12  # onnxruntime uses its blocked convolutions only for multiples of 4 channels; fewer it reads one by one


@dataclass(frozen=True)
class Pruned:
    """The result of `apply` and `prune`."""

    model: Model
    original: Model
    plan: Plan
    cuts: tuple[Cut, ...]
    verification: Verification | None
    notes: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    repaired: Repaired | None = None

    def save(self, path: str | Path, external: bool | None = None) -> Path:
        """Write the model atomically; ``external`` keeps weights in ``<path>.data`` (default: only over 2 GB)."""
        return graph.save(self.model, path, external)

    def to_proto(self) -> onnx.ModelProto:
        """The model as a self-contained ModelProto."""
        return graph.to_proto(self.model)


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
        analysis = inspect(model, plans.sample_shapes(plan), cut_layernorm=bool(plan.options.get("cut_layernorm")))
    removed = plans.removal_of(plan, analysis.coupling, analysis.model.sha256)
    pruned = cut(analysis.prepared, analysis.coupling, removed) if removed.any() else analysis.model
    graph.check(pruned)
    verification = None
    if verify:
        with progress("verifying", 1) as advance:
            verification = _verify(analysis, pruned, removed, data)
            advance(1)
    notes = _notes(analysis.coupling, removed)
    if analysis.model.complaint:
        notes += (f"onnx.checker rejects the original ({analysis.model.complaint}), so the result was not checked with it",)
    final = plans.make_plan(analysis.coupling, removed, analysis.model.sha256, analysis.parameters, analysis.samples, plan.options)
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
    held = graph.initializers(model).values()
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
    made = make_plan(analysis, options, score_name, data, score_options, progress, repair, eval_data)
    if options.max_drop is not None and eval_data is None:
        data = held_out(data, (score_options or ScoreOptions()).seed)[0]  # the model that was judged is the one that is made
    return apply(analysis, made, data, verify, progress, repair)
