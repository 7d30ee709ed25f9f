"""The one place that knows the order of the stages: load, prepare, couple, calibrate, score, plan, cut, verify, save."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from . import cost, graph
from . import plan as planning
from .calibrate import calibrate, sites
from .coupling import couple
from .cut import cut
from .data import Dataset, check_classes, open_data
from .errors import DataError, OptionError, PlanError, TargetError
from .evaluate import measure, summarize, time_models
from .graph import Model, Prepared
from .records import (
    Array,
    BoolArray,
    Coupling,
    Cut,
    Evaluation,
    FloatArray,
    Moments,
    Plan,
    PlanOptions,
    ScoreOptions,
    Size,
    Verification,
)
from .scores import SCORES
from .trace import prepare, random_feeds
from .units import cuts, keep_mask
from .verify import compare, maskable, runs_at
from .views import views

ModelSource = str | Path | onnx.ModelProto | Model
DataSource = str | Path | Mapping[str, Array] | Array | Dataset
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""``with progress(title, total) as advance: advance(steps)``."""

ACTIVATION_BYTES = 512 * 2**20
SLOW_WIDTHS = 4  # onnxruntime uses its blocked convolutions only for multiples of 4 channels
PACKAGES = ("sfp_onnx", "onnx", "onnxruntime", "onnx-graphsurgeon", "numpy", "click")


def silent(title: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Progress that shows nothing."""
    return nullcontext(lambda steps: None)


@dataclass(frozen=True)
class Analysis:
    """A model with its channel labels resolved: what can be pruned and what not."""

    model: Model
    prepared: Prepared
    coupling: Coupling
    parameters: tuple[cost.Parameter, ...]
    samples: int
    cut_layernorm: bool = False

    def size(self, removed: BoolArray | None = None) -> Size:
        """MACs for one sample and parameters after a removal (default: none)."""
        none = np.zeros(self.coupling.units, bool)
        return cost.size(self.coupling, self.parameters, none if removed is None else removed, self.samples)


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

    def save(self, path: str | Path, external: bool | None = None) -> Path:
        """Write the model atomically; ``external`` keeps weights in ``<path>.data`` (default: only over 2 GB)."""
        return graph.save(self.model, path, external)

    def to_proto(self) -> onnx.ModelProto:
        """The model as a self-contained ModelProto."""
        return graph.to_proto(self.model)


def load(source: ModelSource) -> Model:
    """Load a model (file, ModelProto, or an already loaded one).

    Raises:
        ModelError: not a readable, valid ONNX model.
    """
    return source if isinstance(source, Model) else graph.load(source)


def data_for(model: Model, source: DataSource | None, **options: Any) -> Dataset | None:
    """Open data for a model; see `sfp_onnx.data.open_data` for the options."""
    if source is None or isinstance(source, Dataset):
        return source
    return open_data(source, graph.inputs(model), **options)


def inspect(
    source: ModelSource,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    data: Dataset | None = None,
    cut_layernorm: bool = False,
) -> Analysis:
    """Find out what can be pruned, and why the rest cannot.

    Args:
        input_shapes: concrete shapes by input name, where dynamic dimensions cannot be guessed.
        data: real inputs to trace on (default: random ones).
        cut_layernorm: let axes that LayerNormalization normalises over shrink; it is rewritten exactly, at some cost in time.

    Raises:
        ModelError, DataError: the model cannot be loaded or run.
    """
    model = load(source)
    real = None
    if data is not None and not input_shapes:
        real = next(({name: array[:count] for name, array in feeds.items()} for feeds, count in data.batches()), None)
        real = None if data.fixed else real
    prepared = prepare(model, input_shapes, real)
    coupling = couple(prepared, cut_layernorm)
    uses: dict[str, list[tuple[int, int]]] = {}
    for node in prepared.nodes:
        for position, name in enumerate(node.inputs):
            uses.setdefault(name, []).append((node.index, position))
    floating = {name: shape for name, (shape, dtype) in graph.initializers(prepared.model).items() if np.dtype(dtype).kind not in "iubOSU"}
    parameters = cost.parameters(floating, uses, coupling)
    first = next(iter(prepared.feeds.values()), None)
    samples = int(first.shape[0]) if first is not None and first.ndim > 1 else 1
    analysis = Analysis(model, prepared, coupling, tuple(parameters), max(1, samples), cut_layernorm)
    _check_labels(analysis, data)
    return analysis


def _check_labels(analysis: Analysis, data: Dataset | None) -> None:
    """Check that labels are classes of the model, if its first output is one row of scores per sample.

    Raises:
        DataError: a label is out of range.
    """
    name = graph.outputs(analysis.model)[0].name
    shape = analysis.prepared.trace.shapes.get(name, ())
    if data is not None and len(shape) == 2 and shape[0] == analysis.samples and shape[1] > 1:
        check_classes(data, shape[1])


# ---- scoring and planning --------------------------------------------------------------------------------------------


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
    groups = planning.eligible(coupling, options, weights_of)
    name = score_name or default_score(data)
    score_options = score_options or ScoreOptions()
    scores = score(analysis, name, data, score_options, progress)
    removed = planning.choose(coupling, groups, scores, options, analysis.size)
    recorded: dict[str, Any] = {**asdict(options), "targets": list(options.targets), "score": name, **asdict(score_options)}
    recorded["cut_layernorm"] = analysis.cut_layernorm
    recorded["sample_shapes"] = {key: list(array.shape) for key, array in analysis.prepared.feeds.items()}
    if data is not None:
        recorded["data"] = describe(data)
    return planning.make_plan(coupling, removed, analysis.model.sha256, analysis.parameters, analysis.samples, recorded)


def reasons(coupling: Coupling) -> str:
    """Why channels are pinned, in one line."""
    if not coupling.pinned:
        return "The model has no layer that mixes channels (Conv, ConvTranspose, Gemm, MatMul with a constant weight)."
    counts: dict[str, int] = {}
    for pin in coupling.pinned:
        counts[pin.reason] = counts.get(pin.reason, 0) + pin.channels
    return "Pinned: " + "; ".join(f"{reason} ({count})" for reason, count in sorted(counts.items(), key=lambda item: -item[1])) + "."


def describe(data: Dataset) -> dict[str, Any]:
    """Which data were used, for plans and manifests."""
    labels = "given" if data.labels is not None else "none"
    return {"name": data.name, "sha256": data.sha256, "samples": data.samples, "labels": labels, **asdict(data.preprocessing)}


# ---- cutting ---------------------------------------------------------------------------------------------------------


def apply(
    source: ModelSource | Analysis, plan: Plan, data: Dataset | None = None, verify: bool = True, progress: Progress = silent
) -> Pruned:
    """Cut a model as planned, and prove it.

    Raises:
        PlanError: the plan does not fit the model.
        VerificationError: the pruned model differs from the masked original.
    """
    if isinstance(source, Analysis):
        analysis = source
    else:
        model = load(source)
        analysis = inspect(model, planning.sample_shapes(plan), cut_layernorm=bool(plan.options.get("cut_layernorm")))
    removed = planning.removal_of(plan, analysis.coupling, analysis.model.sha256)
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
    final = planning.make_plan(
        analysis.coupling, removed, analysis.model.sha256, analysis.parameters, analysis.samples, plan.options
    )
    trace, zero_points = analysis.prepared.trace, analysis.coupling.zero_points
    listed = tuple(maskable(analysis.prepared.types, cuts(analysis.coupling, trace, removed), zero_points))
    return Pruned(pruned, analysis.model, final, listed, verification, notes, describe(data) if data else {})


def _notes(coupling: Coupling, removed: BoolArray) -> tuple[str, ...]:
    """What the user should know about a removal."""
    if not removed.any():
        return ("the plan removes nothing; the model is written unchanged",)
    widths = [keep_mask(layer.writes, removed) for layer in coupling.layers if (layer.writes >= 0).any()]
    odd = sum(int(kept.sum()) % SLOW_WIDTHS != 0 for kept in widths if not kept.all())
    if not odd:
        return ()
    return (
        f"{odd} of {len(widths)} prunable layers end with a width that is no multiple of {SLOW_WIDTHS}; onnxruntime may run them slower "
        "than the original. --align 8 (or 16) keeps widths on the block.",
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
    return compare(analysis.model, pruned, types, maskable(types, every, zero_points), inputs)


def prune(
    source: ModelSource | Analysis,
    options: PlanOptions,
    score_name: str | None = None,
    data: Dataset | None = None,
    score_options: ScoreOptions | None = None,
    verify: bool = True,
    progress: Progress = silent,
) -> Pruned:
    """Plan and apply in one. For other shapes or options of the analysis, `inspect` first and pass its result to both.

    Raises:
        the errors of `inspect`, `plan` and `apply`.
    """
    analysis = source if isinstance(source, Analysis) else inspect(source, data=data)
    made = plan(analysis, options, score_name, data, score_options, progress)
    return apply(analysis, made, data, verify, progress)


# ---- evaluating ------------------------------------------------------------------------------------------------------


def evaluate(
    models: Iterable[ModelSource], data: Dataset, latency: bool = True, threads: int = 0, progress: Progress = silent
) -> list[Evaluation]:
    """Measure models on the same data; the first is the reference.

    Raises:
        ModelError, DataError: a model or the data cannot be used, labels out of range.
    """
    loaded = [load(model) for model in models]
    analyses = [inspect(model, data=data) for model in loaded]
    with progress("evaluating", data.samples) as advance:
        answers, classifier, feeds = measure(loaded, data.batches(), data.labels, threads, advance)
    times = time_models(loaded, feeds, threads) if latency else None
    found = []
    for index, (model, analysis, own) in enumerate(zip(loaded, analyses, answers, strict=True)):
        size = replace(analysis.size(), bytes=graph.file_bytes(model))
        timing = None if times is None else (times[index], times[0])
        found.append(summarize(model.name, own, size, timing, (classifier, data.labels is not None)))
    return found


# ---- manifest --------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions of this package and what it runs on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def manifest(result: Pruned, output: Path | None = None) -> dict[str, Any]:
    """Everything needed to check or repeat a run, as plain data for JSON."""
    digest = graph.load(output).sha256 if output is not None else None
    check = result.verification
    return {
        "format": "sfp_onnx manifest",
        "version": 1,
        "versions": versions(),
        "model": {"path": str(result.original.source), "sha256": result.original.sha256, "bytes": graph.file_bytes(result.original)},
        "output": {"path": str(output) if output else None, "sha256": digest, "bytes": graph.full_size(result.model)},
        "options": dict(result.plan.options),
        "data": dict(result.data) or None,
        "before": asdict(result.plan.before),
        "after": asdict(result.plan.after),
        "verification": None if check is None else asdict(check),
        "notes": list(result.notes),
        "plan": planning.to_json(result.plan),
        "cuts": [asdict(item) for item in result.cuts],
    }


def read_plan(path: str | Path) -> Plan:
    """Read a plan from a JSON file.

    Raises:
        PlanError: no such file, not JSON, or not a plan.
    """
    try:
        return planning.from_json(json.loads(Path(path).read_text()))
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"{path}: cannot read the plan: {error}") from error
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error


def write_json(path: str | Path, data: Mapping[str, Any], inputs: Iterable[Path] = ()) -> None:
    """Write JSON atomically.

    Raises:
        OutputError: the path cannot be written.
    """
    graph.write_text(path, json.dumps(data, indent=1) + "\n", inputs)
