"""The story: inspect, score, plan, apply, prune. The one place that knows the order of the stages.

`prune` is `plan` and `apply` one after the other, in Python as on the command line, with the same defaults. What a run says while it works
goes to the logger ``sfp_onnx`` (the command line prints it); what came of it is in its result.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import numpy as np

from . import graph, planning
from .core import options as records
from .core.errors import DataError, ModelError, OptionError, OutputError, TargetError, VerificationError
from .core.options import DataOptions, InspectOptions, MeasureOptions, OutputOptions, PlanOptions, RepairOptions, ScoreOptions
from .core.system import NEEDS, command_line, log, quiet
from .core.types import Array, BoolArray, Coupling, FloatArray, Plan, Shown, Size, traced_text
from .core.workers import each, reason
from .coupling.analysis import Analysis, DataSource, Progress, counted, describe, inspect, left_out, reasons, silent, wider
from .coupling.cost import cuts, kept_masks, params_of
from .coupling.trace import random_feeds
from .cut import cut, factor
from .cut.verify import Verification, compare, maskable, runs_at
from .data import Preprocessing
from .data.checks import opened, training_mode
from .data.dataset import Dataset
from .evaluation import Evaluation, Gate, GateOptions, Verdict, evaluate as measure, parse_drop, reading_of, unknown_meaning
from .evaluation.meaning import TASKS, Reading
from .export import package, refuse, written_by
from .graph.arrays import write_arrays
from .graph.edit import without_projections
from .graph.load import ModelSource, load
from .graph.save import check_output, file_bytes, fingerprint, saved_bytes, together, write_text
from .latency import DeviceProfile, to_json as profile_to_json
from .latency.profiling import layer_times, measure_device_profile, read_device_profile
from .latency.timing import AS_DEFAULT, Latency
from .planning import figures, library, max_drop, parse_target, rounds, search, widths
from .planning.precision import Storable, codes_of, of_plan, storables
from .repair import finished, repaired, rounded
from .report import Page, page as pages, render, require
from .report.manifest import Lock, Pruned, command_of, manifest, write_json
from .report.points import Point, measured_points, parse_sweep, part_of, refuse_none, saved_point, sweep_data
from .report.text import plan_text, points_text
from .report.verdict import card
from .rules.foreign import sentences
from .runtime import Setup, cores, threaded, using_threads
from .scores import parts
from .scores.rounding import with_errors
from .scores.scoring import Scored, default_score, meaning, parse, save_scores, scored

SLOW_WIDTHS, SLOW_FROM = 4, 12  # onnxruntime uses its blocked convolutions only for multiples of 4 channels; fewer it reads one by one
AS_PLANNED = RepairOptions()


# ---- what a run works on ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """A model and its data, opened. ``data`` are scored with and repaired with, ``eval_data`` (if any) are what ``max_drop`` is judged
    on, ``test_data`` what the result is measured on; ``paths`` are all files that are read. ``measures`` is what is known of the outputs,
    ``reading`` what they mean (None without data); ``auto``: what may be expanded is, if a plan needs that."""

    analysis: Analysis
    data: Dataset | None
    eval_data: Dataset | None = None
    test_data: Dataset | None = None
    paths: tuple[Path, ...] = ()
    measures: MeasureOptions = MeasureOptions()
    reading: Reading | None = None
    auto: bool = False

    def with_groups(self) -> Inputs:
        """The same, expanded if it may be and nothing can be pruned as it stands."""
        return self if self.analysis.coupling.groups else self.wider() or self

    def wider(self) -> Inputs | None:
        """The same with all that may be expanded (outputs if there are data to fit what gives them all channels); None where that is not
        asked for, or frees nothing."""
        whole = wider(self.analysis, self.data is not None) if self.auto else None
        if whole is None:
            return None
        log.info("Note: channels leave that an operator or an output needs; it gets them again (--expand none: not so)")
        return replace(self, analysis=whole, auto=False)

    def read(self, data: Dataset) -> Reading:
        """What the outputs mean, told once more by the labels of other data, if these have any."""
        return reading_of(self.analysis.model, data, self.measures, self.reading, self.analysis.prepared.tokens)

    @property
    def told(self) -> MeasureOptions:
        """What is known of the outputs, with the task that was found."""
        if self.reading is None:
            return self.measures
        judged = self.reading.judged
        task = next((task for task, kind in TASKS.items() if kind is judged.kind), None)
        return replace(self.measures, task=task, output_name=judged.outputs[0] if task else self.measures.output_name)


@dataclass(frozen=True)
class Sources:
    """Where the data of a run are, and how they and the model are read. Labels, number of samples and seed of ``data_options`` are those of
    ``data``; the preprocessing is that of all."""

    data: DataSource | None = None
    eval_data: DataSource | None = None
    test_data: DataSource | None = None
    data_options: DataOptions = DataOptions()
    inspect_options: InspectOptions = InspectOptions()
    others: Sequence[str | Path | None] = ()
    measures: MeasureOptions = MeasureOptions()

    def __post_init__(self) -> None:
        """Refuse options that are none."""
        records.expect(DataOptions, data_options=self.data_options)
        records.expect(InspectOptions, inspect_options=self.inspect_options)
        records.expect(MeasureOptions, measure_options=self.measures)

    def paths(self) -> list[Path]:
        """All files that are named."""
        named = (self.data, self.eval_data, self.test_data, self.data_options.labels, *self.others)
        return [Path(source) for source in named if isinstance(source, (str, Path))]

    def open(self, source: ModelSource | Analysis, outputs: Sequence[Path | None] = ()) -> Inputs:
        """Open the model and the data, after a check that the outputs can be written and are none of the inputs.

        Raises:
            ModelError, DataError, OptionError: they cannot be read. OutputError: an output cannot be written.
        """
        model = source.model if isinstance(source, Analysis) else load(source, self.inspect_options.custom_ops)
        paths = [*model.paths, *self.paths()]
        for number, output in enumerate(outputs):
            if output is not None:
                check_output(Path(output), [*paths, *(Path(other) for other in outputs[:number] if other is not None)])
        for text in training_mode(model):
            log.warning(text)
        given = ", ".join(f"--{name.replace('_', '-')}" for name in self.data_options.given)
        if given and self.data is None and self.test_data is None and self.eval_data is None:
            raise OptionError(f"{given}: without --data there is nothing to read so; options for data need --data")
        if self.measures != MeasureOptions() and self.data is None and self.test_data is None and self.eval_data is None:
            raise OptionError("--task, --output-name and --metric say what is measured, which needs --data")
        beside = replace(self.data_options, labels=None, samples=None)
        test, judge = (opened(model, data, beside, self.measures) for data in (self.test_data, self.eval_data))
        only_beside = self.data is None and (test is not None or judge is not None)
        data = opened(model, self.data, DataOptions(seed=self.data_options.seed) if only_beside else self.data_options, self.measures)
        traced = self.inspect_options
        analysis = source if isinstance(source, Analysis) else inspect(model, traced.input_shapes, data, **traced.expansion)
        auto = analysis is not source and traced.expand == "auto" and not analysis.expanded and not analysis.projected
        there = [item for item in (judge, data, test) if item is not None]
        first = next((item for item in there if item.labels is not None), there[0] if there else None)
        reading = None if first is None else reading_of(analysis.model, first, self.measures, None, analysis.prepared.tokens)
        for text in () if data is None else left_out(analysis, data):
            log.info(f"Note: {text}")
        return Inputs(analysis, data, judge, test, tuple(paths), self.measures, reading, auto)


def _sources(
    options: PlanOptions, data: DataSource | None, eval_data: DataSource | None, test_data: DataSource | None, data_options: DataOptions,
    inspect_options: InspectOptions, measures: MeasureOptions, *others: Any,
) -> Sources:  # fmt: skip
    """What a plan is made from; without data as those of its library were."""
    if options.library is not None and data is None:
        inspect_options = library.traced_as(library.read_library(options.library).recorded, inspect_options)
    if options.library is not None:
        inspect_options = _as_it_stands(inspect_options)
    named = [options.device_profile, options.library, *others]
    return Sources(data, eval_data, test_data, data_options, inspect_options, named, measures)


def _as_it_stands(options: InspectOptions) -> InspectOptions:
    """What was measured is of the model as it stands, or of all that may be expanded: nothing is expanded as a plan needs it."""
    return replace(options, expand="all" if options.expand == "all" else "none")


def settled(repair: RepairOptions | None, data: Dataset | None) -> RepairOptions | None:
    """The repair that follows: by default least squares where there are data; None if there is none.

    Raises:
        OptionError: a repair without data, or fine-tuning without a repair.
    """
    if repair is not None and repair.finetune and (data is None or repair.fit == "none"):
        raise OptionError("--finetune follows a repair: it needs --data, and no --repair none (`sfp-onnx finetune` does it alone)")
    for name, check in NEEDS.items():
        if getattr(repair, name, 0):
            check()
    if repair is None or repair.fit == "none" or (repair.fit == "default" and data is None):
        return None
    if data is None:
        raise OptionError(f"--repair {repair.fit} needs --data")
    return replace(repair, fit="lstsq") if repair.fit == "default" else repair


def _check(options: PlanOptions) -> None:
    """Refuse options that contradict each other or cannot be read, before any work."""
    records.expect(PlanOptions, options=options)
    if (options.ratio is None) == (not options.targets and options.max_drop is None):
        raise OptionError("give either --ratio or --target (or --max-drop), for example --ratio 0.5 or --target macs=50%")
    if options.max_drop is not None:
        parse_drop(options.max_drop)
    for text in options.targets:
        parse_target(text)


def _measures(options: PlanOptions, given: MeasureOptions) -> MeasureOptions:
    """What outputs are measured by; the metric may stand in the options of the plan."""
    return given if options.metric is None else replace(given, metric=options.metric)


# ---- plan ------------------------------------------------------------------------------------------------------------


@threaded
def plan(
    source: ModelSource | Analysis, options: PlanOptions, score_name: str | None = None, data: DataSource | None = None,
    score_options: ScoreOptions | None = None, progress: Progress = silent, repair: RepairOptions | None = AS_PLANNED,
    eval_data: DataSource | None = None, *, data_options: DataOptions = DataOptions(),
    inspect_options: InspectOptions = InspectOptions(), output: Path | None = None, measure_options: MeasureOptions = MeasureOptions(),
    statistics: Sequence[str | Path] = (), executor: Executor | int | None = None,
) -> Plan:  # fmt: skip
    """Decide which channels leave; cut nothing. The arguments are those of `prune`.

    Args:
        output: where the plan goes as JSON (default: nowhere).
        statistics: what `calibrate` wrote of all parts of the data, in place of the data.
        executor: what measures the data, in `PARTS` parts: as for `sweep`. The number of workers changes nothing.

    Raises:
        TargetError: nothing can be pruned, or a target cannot be met.
        OptionError, ModelError, DataError, OutputError: bad options, input or output.
    """
    _check(options)
    scoring, measures = Scoring(score_name, score_options, repair), _measures(options, measure_options)
    if measures.metric is not None and options.max_drop is None:
        raise OptionError("--metric needs --max-drop")
    with ExitStack() as files:
        held: list[parts.Source] = [files.enter_context(closing(parts.Arrays(path, *parts.WRITTEN))) for path in statistics]
        if held and data is None:
            inspect_options = library.traced_as(held[0].facts["recorded"], inspect_options)
        if held or executor is not None:
            inspect_options = _as_it_stands(inspect_options)
        sources = _sources(options, data, eval_data, None, data_options, inspect_options, measures, *statistics)
        inputs = sources.open(source, [output, options.save_library])
        tell(inputs.reading, options.max_drop is not None)
        if executor is not None:
            held = _shared_out(Calibration(source, sources, scoring, options), inputs, executor, progress)
        ready, made = _planned(inputs, options, replace(scoring, parts=tuple(held)), progress)[1:]
    made = _built(ready, made)
    if output is not None:
        write_json(output, planning.to_json(made), inputs.paths)
    return made


@threaded
def calibrate(
    source: ModelSource | Analysis, path: str | Path, part: str = "1/1", score_name: str | None = None, data: DataSource | None = None,
    score_options: ScoreOptions | None = None, progress: Progress = silent, repair: RepairOptions | None = AS_PLANNED,
    eval_data: DataSource | None = None, *, options: PlanOptions = PlanOptions(), data_options: DataOptions = DataOptions(),
    inspect_options: InspectOptions = InspectOptions(), measure_options: MeasureOptions = MeasureOptions(),
) -> Path:  # fmt: skip
    """Measure a part of the data, for a `plan` from the ``statistics`` of all parts. The arguments are those of `plan`; all parts must be
    given the same.

    Args:
        path: where the sums go (.npz).
        part: such as "3/16": the third of sixteen.
        options: of those of the plan, ``max_drop`` matters: what it is judged on is not measured.

    Raises:
        OptionError: no such part, or a score that cannot be measured so. ModelError, DataError, OutputError: as `plan`.
    """
    sources = Sources(data, eval_data, None, data_options, _as_it_stands(inspect_options), (), _measures(options, measure_options))
    inputs = sources.open(source, [Path(path)])
    made = _part(Calibration(source, sources, Scoring(score_name, score_options, repair), options), inputs, part, progress)
    write_arrays(Path(path), made.arrays, inputs.paths, made.facts)
    return Path(path)


@dataclass(frozen=True)
class Calibration:
    """What a worker needs to measure any part of the data."""

    source: ModelSource | Analysis
    sources: Sources
    scoring: Scoring
    options: PlanOptions


def _part(work: Calibration, inputs: Inputs, part: str, progress: Progress = silent) -> parts.Collection:
    """A part of the data, of which what ``max_drop`` is judged on is left out."""
    data, scoring = inputs.data, work.scoring
    if data is None:
        raise OptionError("to measure data in parts needs --data")
    if work.options.max_drop is not None:
        data = _judge(inputs, work.options, scoring)[1]
    inputs, repair = replace(inputs, data=data), settled(scoring.repair, data)
    name = parse(scoring.name or default_score(data, repair)).text
    recorded = json.loads(json.dumps({"score": name, **_recorded(inputs, scoring, repair)}))
    assert data is not None
    return parts.collected(inputs.analysis, name, data, part, scoring.options or ScoreOptions(), recorded, progress)


def _share(work: Calibration, part: str) -> parts.Held:
    """A part, measured by a worker. With one thread, so that no number of workers changes a bit."""
    with quiet(), using_threads(work.options.threads or 1):
        made = _part(work, work.sources.open(work.source), part)
        return parts.Held(made.facts, dict(made.arrays))


PARTS = 8


def _shared_out(work: Calibration, inputs: Inputs, executor: Executor | int, progress: Progress) -> list[parts.Source]:
    """All parts of the data, measured by workers."""
    whole = _part(work, inputs, "1/1").facts
    count = min(whole["runs"], PARTS)
    log.info(f"score: {whole['text']}, measured in {count} parts")
    wanted = [f"{number}/{count}" for number in range(1, count + 1)]
    with progress("calibrating", len(wanted)) as advance:
        found = each(partial(_share, work), wanted, executor, advance)
    for made in found:
        if isinstance(made, BaseException):
            raise made
    return found


@dataclass(frozen=True)
class Scoring(records.Checked):
    """How channels are scored for a plan, and the repair that will follow; None: the defaults. ``parts`` of the data that were measured
    before (`parts.Source`), in place of the data."""

    name: str | None = None
    options: ScoreOptions | None = None
    repair: RepairOptions | None = AS_PLANNED
    parts: tuple[Any, ...] = ()


def _built(ready: search.Candidates, plan: Plan) -> Plan:
    """A plan with the size of the file that it will give, with the biases that a repair adds."""
    analysis, form = ready.analysis, ready.form
    removed = planning.removal_of(plan, analysis.coupling, plan.model_sha256)
    ruler = figures.ruler_for(analysis, PlanOptions(), form=form)
    built = ruler.at(codes_of(form.storable, plan.precisions)).built(removed, plan.factors)
    after = replace(analysis.size(removed, plan.factors), params=params_of(built), bytes=form.bytes(built))
    return replace(plan, before=_size(analysis), after=after)


def _size(analysis: Analysis) -> Size:
    """That of the original."""
    return replace(analysis.size(), bytes=file_bytes(analysis.model))


def _planned(
    inputs: Inputs, options: PlanOptions, scoring: Scoring, progress: Progress, output: OutputOptions = OutputOptions()
) -> tuple[Inputs, search.Candidates, Plan]:
    """The plan for what is written as ``output`` says, with the scores that it was made from; on a model that is expanded if the target
    cannot be met as it stands, and that is not ruled out."""
    try:
        return inputs, *_planned_on(inputs, options, scoring, progress, output)
    except TargetError as failure:
        whole = inputs.wider()
        if whole is None:
            raise
        log.info(f"Note: as it stands, {failure}")
        return whole, *_planned_on(whole, options, scoring, progress, output)


def _planned_on(
    inputs: Inputs, options: PlanOptions, scoring: Scoring, progress: Progress, output: OutputOptions
) -> tuple[search.Candidates, Plan]:
    """The plan for a model as it was inspected."""
    options = _with_tables(options)
    if options.max_drop is None:
        if inputs.eval_data is not None:
            raise OptionError("--max-drop-data needs --max-drop")
        ready = candidates(inputs, options, scoring, progress, output)
        made = search.plan_for(ready, options, progress)
    else:
        judge, scored_with = _judge(inputs, options, scoring)
        ready = candidates(replace(inputs, data=scored_with), options, scoring, progress, output)
        if judge.apart:
            ready = replace(ready, recorded={**ready.recorded, "eval_data": describe(judge.data)})
        elif inputs.data is not None:
            ready = replace(ready, recorded={**ready.recorded, "samples": inputs.data.samples})
        made = max_drop.plan_with_drop(ready, options, judge, progress=progress)
    for note in made.notes:
        (log.debug if note.startswith("allocation:") else log.info)(f"Note: {note}")
    return ready, made


def tell(reading: Reading | None, measured: bool = True) -> None:
    """Say what the outputs are taken for, if they are measured."""
    for note in reading.notes if reading is not None and measured else ():
        log.info(note)


def _judge(inputs: Inputs, options: PlanOptions, scoring: Scoring) -> tuple[max_drop.Judge, Dataset | None]:
    """What ``max_drop`` is judged by, and the data that are scored and repaired with."""
    seed, apart = (scoring.options or ScoreOptions()).seed, inputs.eval_data is not None
    scored_with, judged = (inputs.data, inputs.eval_data) if apart else max_drop.held_out(inputs.data, seed)
    assert judged is not None and options.max_drop is not None
    reading = inputs.read(judged)
    unknown_meaning(reading, "--max-drop")
    limit = parse_drop(options.max_drop)
    return max_drop.Judge(inputs.analysis.model, judged, limit, options.confidence, reading, apart, seed), scored_with


def _packaged(result: Pruned, inputs: Inputs, options: PlanOptions, scoring: Scoring, output: OutputOptions) -> Pruned:
    """The result in its other forms, the last of which must hold what is asked of it.

    Raises:
        as `package`; TargetError: it loses more than ``max_drop``.
    """
    made = package(inputs.analysis, result.model, output, inputs.data, inputs.test_data, inputs.told, Latency.of(vars(options)))
    notes = (*result.notes, *made.notes)
    if options.max_drop is not None and made.model is not result.model:
        judge = _judge(inputs, options, scoring)[0]
        drop = judge.drop(made.model)
        notes += judge.notes(drop)[:1]
        if not judge.holds(drop):
            advice = "Nothing was written. Package less, or loosen it."
            raise TargetError(f"--max-drop cannot be held by the packaged model: {notes[-1]}. {advice}")
    return replace(result, model=made.model, notes=notes, packaged=made)


def candidates(
    inputs: Inputs, options: PlanOptions, scoring: Scoring = Scoring(), progress: Progress = silent,
    output: OutputOptions = OutputOptions(), further: Sequence[str] = (),
) -> search.Candidates:  # fmt: skip
    """Everything that plans need of a model and its data, once for any number of plans (``further`` targets than those of the options);
    ``output`` says how the result is written.

    Raises:
        TargetError: nothing can be pruned. OptionError, DataError: bad options or data.
    """
    analysis, data = inputs.analysis, inputs.data
    coupling = analysis.coupling
    if not coupling.groups:
        raise TargetError(f"{analysis.model.name}: nothing can be pruned. {reasons(coupling)}")
    for text in sentences(coupling.unruled):
        log.info(f"Note: {text}")
    weights_of = {layer.node.name: layer.node.inputs[layer.weight.position] for layer in coupling.layers if layer.weight}
    groups = tuple(widths.eligible(coupling, options, weights_of))
    repair = settled(scoring.repair, data)
    recorded, details, told, reach = _recorded(inputs, scoring, repair), None, inputs.told, 0.0
    if options.library is not None:
        if options.precision == "auto":
            raise OptionError("--precision auto weighs rounding against what cuts cost, which a library does not hold: leave --library out")
        known = library.checked(options.library, analysis.model, coupling.groups, _asked(recorded, scoring, repair, data))
        log.info(f"scores and errors are those of {options.library}: {known.recorded['score']}{meaning(known.recorded['score'])}")
    elif scoring.parts:
        known = _of_parts(analysis, scoring, _asked(recorded, scoring, repair, data), progress)
    else:
        name = default_score(data, repair) if scoring.name is None else scoring.name
        log.info(f"score: {name}{' (default)' if scoring.name is None else ''}{meaning(name)}")
        plain = [group for group in groups if not group.dimensions]  # searches cannot judge dimensions
        scores = scored(analysis, name, data, scoring.options, progress, options, plain, inputs.told)
        known = library.Library({"score": scores.name, **recorded}, scores.values, scores.errors, scores.notes, spectra=scores.spectra)
        details, reach = scores.brief, scores.reach
    if data is None and (options.library is not None or scoring.parts):
        repair, told = known.repair, known.measures
    if options.save_library is not None:
        _keep(known, inputs, options, progress, further)
    weighed = [text for text in options.targets if parse_target(text).figure.shaped]
    notes = known.notes
    if weighed and any(shape["guessed"] for shape in analysis.traced.values()):
        notes += (f"{', '.join(weighed)}: {traced_text(analysis.traced)}",)
    storable = () if options.precision == "float32" else _storable(inputs, options, scoring, progress)
    form = search.form_for(analysis, repair, output, known.recorded.get("data") is not None, storable)
    return search.Candidates(
        analysis, groups, known.scores, known.recorded, known.errors, notes, data, repair, details, told, form,
        known.spectra if repair is not None and repair.kind == "lstsq" else {}, reach,
    )


def _storable(inputs: Inputs, options: PlanOptions, scoring: Scoring, progress: Progress) -> tuple[Storable, ...]:
    """The weights that may be stored in fewer bits, with what their rounding does."""
    analysis, seed = inputs.analysis, (scoring.options or ScoreOptions()).seed
    return with_errors(analysis, storables(analysis.prepared, analysis.coupling), inputs.data, seed, progress)


def _of_parts(analysis: Analysis, scoring: Scoring, asked: Mapping[str, Any], progress: Progress) -> library.Library:
    """What the parts of the data tell, all together."""
    facts = scoring.parts[0].facts
    library.compare("--statistics: the parts were made", facts, analysis.model, asked)
    scores = scored(analysis, facts["text"], None, scoring.options, progress, shared=parts.shared_by(analysis, scoring.parts))
    return library.Library(facts["recorded"], scores.values, scores.errors, scores.notes, spectra=scores.spectra)


def _recorded(inputs: Inputs, scoring: Scoring, repair: RepairOptions | None) -> dict[str, Any]:
    """What every plan tells of what it was made from."""
    analysis, data = inputs.analysis, inputs.data
    recorded: dict[str, Any] = {"seed": (scoring.options or ScoreOptions()).seed, "cut_layernorm": analysis.expanded}
    recorded |= {"expand_outputs": True} if analysis.projected else {}
    recorded["sample_shapes"] = {key: list(array.shape) for key, array in analysis.prepared.feeds.items()}
    if analysis.traced:
        recorded["traced"] = analysis.traced
    if data is not None:
        recorded["data"] = describe(data)
        recorded["measures"] = asdict(inputs.told)
        more = {"finetune": repair.finetune} if repair is not None and repair.finetune else {}
        recorded["repair"] = None if repair is None else {"fit": repair.fit, "seed": repair.seed, **more}
    return recorded


def _asked(recorded: Mapping[str, Any], scoring: Scoring, repair: RepairOptions | None, data: Dataset | None) -> dict[str, Any]:
    """What a library must have been made for: what is asked for, as far as that is said."""
    named = scoring.name or (None if data is None else default_score(data, repair))
    asked = {**recorded, **({} if named is None else {"score": parse(named).text})}
    if data is None and (scoring.repair is None or scoring.repair.fit != "default"):
        fit = "none" if scoring.repair is None else scoring.repair.fit
        asked["repair"] = None if fit == "none" else {"fit": fit}
    return asked


def _with_tables(options: PlanOptions, targets: Sequence[str] = ()) -> PlanOptions:
    """Latency as the library knows it, where time is a target and nothing else says it."""
    timed = any(parse_target(text).figure.timed for text in (*options.targets, *targets))
    if not timed or options.library is None or options.device_profile is not None or library.read_library(options.library).profile is None:
        return options
    return replace(options, device_profile=str(options.library))


def _keep(known: library.Library, inputs: Inputs, options: PlanOptions, progress: Progress, further: Sequence[str]) -> None:
    """Write what was measured for further plans."""
    profile, sha256 = known.profile, inputs.analysis.model.sha256
    if any(parse_target(text).figure.timed for text in (*options.targets, *further)):
        setup = Setup.of(options)
        if options.device_profile is not None:
            profile = profile_to_json(read_device_profile(options.device_profile, sha256))
        else:
            budget = options.profile_budget
            profile = profile_to_json(measure_device_profile(inputs.analysis, setup, options.batch, progress, budget=budget))
    library.save_library(options.save_library, replace(known, profile=profile, model_sha256=sha256), inputs.paths)


def score(
    source: ModelSource | Analysis, name: str | None = None, data: DataSource | None = None, options: ScoreOptions | None = None,
    progress: Progress = silent, *, data_options: DataOptions = DataOptions(), inspect_options: InspectOptions = InspectOptions(),
    output: Path | None = None,
) -> FloatArray:  # fmt: skip
    """Importance of all coupled channels, one value each (larger = keep).

    Args:
        name: a score, several joined by "+" (the average of their ranks), with options behind commas ("sfp,probe=ridge"); default:
            `contribution` with data, else `magnitude`.
        output: where scores (and class profiles) go as .npz.

    Raises:
        OptionError: unknown score. DataError: the score needs data. ModelError: the score needs a classifier.
    """
    inputs = Sources(data, None, None, data_options, inspect_options).open(source, [output])
    return scored_on(inputs, name, options, progress, output).values


def scored_on(inputs: Inputs, name: str | None, options: ScoreOptions | None, progress: Progress, output: Path | None) -> Scored:
    """As `score`, of what is open, with all that a score tells."""
    result = scored(inputs.analysis, name or default_score(inputs.data), inputs.data, options, progress, measures=inputs.told)
    if output is not None:
        save_scores(output, inputs.analysis, result, inputs.paths)
    return result


# ---- apply -----------------------------------------------------------------------------------------------------------


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
    mend = _as_planned(plan, repair, inputs.data)
    tell(inputs.reading, mend is not None)
    result = _counted(_applied(inputs, plan, verify, mend, progress), inputs, output, False)
    return _written(result, inputs, output)


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


def _as_planned(plan: Plan, repair: RepairOptions | None, data: Dataset | None) -> RepairOptions | None:
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


def _applied(
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
    notes = (*(verification.notes if verification else ()), *_notes(analysis.coupling, removed, len(wholes)))
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
    if any(item.stored != "float32" for item in plan.precisions):
        again = None if plan.factors else repair  # layers that became two are rounded, and not re-fitted after it
        model, words = rounded(analysis, model, removed, stores, data, again, progress, how)
        notes = (*words, *notes)
    return Pruned(model, analysis.model, final, tuple(listed), verification, notes, describe(data) if data else {}, mended)


def _counted(result: Pruned, inputs: Inputs, output: OutputOptions, strict: bool = True) -> Pruned:
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
    return replace(result, plan=replace(plan, before=_size(analysis), after=size, figures=held))


def _notes(coupling: Coupling, removed: BoolArray, factors: int) -> tuple[str, ...]:
    """What the user should know about a removal."""
    if not removed.any() and not factors:
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


# ---- prune -----------------------------------------------------------------------------------------------------------


@threaded
def prune(
    source: ModelSource | Analysis, options: PlanOptions, score_name: str | None = None, data: DataSource | None = None,
    score_options: ScoreOptions | None = None, verify: bool = True, progress: Progress = silent,
    repair: RepairOptions | None = AS_PLANNED, eval_data: DataSource | None = None, *, test_data: DataSource | None = None,
    data_options: DataOptions = DataOptions(), inspect_options: InspectOptions = InspectOptions(),
    output: OutputOptions = OutputOptions(), measure_options: MeasureOptions = MeasureOptions(), steps: int = 1,
) -> Pruned:  # fmt: skip
    """Plan and apply in one; then make other forms, measure, and write what ``output`` asks for.

    Args:
        source: a file, a ModelProto, a loaded model, or what `inspect` found.
        score_name: a score; default: `obs` where a least-squares repair follows, else `contribution` with data, `magnitude` without.
        data: calibration data: a path, arrays, a function, or an open `Dataset`.
        repair: default: least squares where there are data; None: none.
        eval_data: data that ``max_drop`` is judged on (default: a third of ``data``, which is then neither scored nor repaired with).
        test_data: data that the original and the result are measured on.
        data_options, inspect_options: how data and model are read.
        measure_options: what the outputs mean, and what is measured by, where that cannot be told.
        steps: rounds of ranking, cutting, repairing (and fine-tuning), each of which goes the same factor of the way.

    Raises:
        TargetError: nothing can be pruned, a target cannot be met, or the run of ``output.locked`` does not come out.
        VerificationError: the result is not what was planned, or the repair made it worse.
        OptionError, ModelError, DataError, OutputError: bad options, input or output.
    """
    _check(options)
    records.expect(OutputOptions, output=output)
    if steps > 1 and (not options.targets or options.max_drop is not None or output.locked is not None or data is None):
        raise OptionError("--rounds needs --data and --target, and goes neither with --max-drop nor with --locked")
    if steps > 1:
        rounds.check(options.targets)
    scoring = Scoring(score_name, score_options, repair)
    lock = None if output.locked is None else Lock(Path(output.locked))
    if output.report is not None:
        require()
    measures = _measures(options, measure_options)
    if measures.metric is not None and options.max_drop is None and test_data is None:
        raise OptionError("--metric needs --max-drop or --test-data")
    sources = _sources(options, data, eval_data, test_data, data_options, inspect_options, measures, output.locked)
    inputs = sources.open(source, [output.path, output.manifest, output.report, output.card, options.save_library, *written_by(output)])
    tell(inputs.reading)
    refuse(inputs.analysis, output)
    if options.precision != "float32" and (output.fp16 or output.quantize or steps > 1):
        other = f"--{'rounds' if steps > 1 else 'fp16' if output.fp16 else 'quantize'}"
        raise OptionError(f"--precision {options.precision} and {other} do not go together: give one of them")
    more = {"rounds": steps} if steps > 1 else {}
    given = (options, score_options, repair, data_options, inspect_options, output, measures)
    used = command_of(*given, score=score_name, verify=verify, **more)
    ready, made = None, None if lock is None else lock.plan(inputs.analysis.model, inputs.data, used)
    if made is not None and (made.options.get("cut_layernorm") or made.options.get("expand_outputs")):
        inputs = inputs.wider() or inputs
    if made is None:
        inputs, ready, made = _planned(inputs, options, scoring, progress, output)
    log.debug(plan_text(made))
    make = partial(_applied, inputs, verify=verify, repair=_as_planned(made, repair, inputs.data), progress=progress)
    result = make(made) if steps < 2 or ready is None else _in_rounds(inputs, options, scoring, ready, steps, make, progress)
    if lock is not None:
        lock.check(result, output)
    if output.packaged:
        result = _packaged(result, inputs, options, scoring, output)
    result = _counted(result, inputs, output)
    result = replace(_measured(result, inputs, output, progress), command=used)
    page = None if output.report is None else _page(result, ready, inputs, options, progress)
    return _written(result, inputs, output, page)


def _in_rounds(
    inputs: Inputs, options: PlanOptions, scoring: Scoring, ready: search.Candidates, count: int, make: Callable[..., Pruned],
    progress: Progress,
) -> Pruned:  # fmt: skip
    """Rank the present network, cut, repair towards the original (and fine-tune), and again. Every round is a cut of the original, proven
    as any; its weights are those of the round before. Layers stay one.

    Args:
        ready: what the first round plans with. make: cuts the original by a plan, and repairs it from other weights, if there are any.

    Raises:
        OptionError: targets that are timed, or outputs that are expanded. TargetError: a target cannot be held.
    """
    analysis = present = inputs.analysis
    if analysis.projected or analysis.expanded:
        raise OptionError("--rounds does not go with an expanded model: give --expand none")
    shapes = {name: list(array.shape) for name, array in analysis.prepared.feeds.items()}
    ruler = figures.ruler_for(analysis, options, progress, ready.form)
    removed, weights, number = np.zeros(analysis.coupling.units, bool), None, 1
    while True:
        aim = replace(options, targets=rounds.targets_of(options.targets, ruler.before, number / count), moves=(records.CUT,))
        made = search.plan_for(ready, aim, progress)
        more = planning.removal_of(made, present.coupling, made.model_sha256)
        if number > 1:
            weights = rounds.weights_of(cut(present.prepared, present.coupling, more))
        removed = rounds.composed(analysis, removed, present, more)
        held = {name: {**figure, "before": ruler.before[name]} for name, figure in made.figures.items()}
        told = {**made.options, "targets": list(options.targets), "rounds": count}
        whole = replace(planning.make_plan(analysis, removed, told), notes=made.notes, figures=held)
        result = make(whole, weights=weights)
        log.info(f"Note: round {number} of {count} ({', '.join(aim.targets)}): {' '.join(result.notes[:2])}")
        if number == count:
            return result
        number += 1
        present = inspect(result.model, shapes, inputs.data)
        ready = candidates(replace(inputs, analysis=present), aim, scoring, progress)


def _page(result: Pruned, ready: search.Candidates | None, inputs: Inputs, options: PlanOptions, progress: Progress) -> Page:
    """The report of a run; without scores where the plan is that of a manifest."""
    analysis = inputs.analysis
    known = ready or search.Candidates(analysis, analysis.coupling.groups, np.zeros(analysis.coupling.units), {})
    return pages.prune_page(result, known, inputs.data, inputs.test_data, Latency.of(vars(options)), progress)


def _measured(result: Pruned, inputs: Inputs, output: OutputOptions, progress: Progress) -> Pruned:
    """The original and the result on held-out data, if there are any."""
    data = inputs.test_data
    if data is None:
        return result
    first, last = measure([result.original, result.model], data, Latency.of(result.plan.options), progress, inputs.read(data))
    if output.path is not None:
        size = replace(last.size, bytes=fingerprint(result.model, output.path, output.external)[1])
        last = replace(last, model=str(output.path), size=size)
    return replace(result, evaluation=(first, last), test_data=describe(data))


def _written(result: Pruned, inputs: Inputs, output: OutputOptions, page: Page | None = None) -> Pruned:
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


# ---- many targets, and measuring ---------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Sweep(Shown):
    """Points of a sweep, the original first, and the same as plain data for JSON."""

    points: tuple[Point, ...]
    data: Mapping[str, Any]

    def summary(self) -> str:
        """All points as a table."""
        return f"{len(self.points) - 1} targets\n{points_text(self.points)}"


@threaded
def sweep(
    source: ModelSource | Analysis, sweeps: Sequence[str], options: PlanOptions = PlanOptions(), score_name: str | None = None,
    data: DataSource | None = None, score_options: ScoreOptions | None = None, progress: Progress = silent,
    repair: RepairOptions | None = AS_PLANNED, *, test_data: DataSource | None = None, data_options: DataOptions = DataOptions(),
    inspect_options: InspectOptions = InspectOptions(), output: Path | None = None, folder: Path | None = None,
    report: Path | None = None, measure_options: MeasureOptions = MeasureOptions(), executor: Executor | int | None = None,
    part: str | None = None,
) -> Sweep:  # fmt: skip
    """Plan, cut, verify and repair for every target of ``sweeps`` ("macs=90%:20%:10%": first, last, step) from one calibration, and
    measure all together. Targets of the options hold for all of them.

    Args:
        test_data: data to judge on; default: a third of ``data``, which is then neither scored nor repaired with.
        output, folder, report: where the JSON, the models with their manifests, and the page go (default: nowhere).
        executor: what works on the points: any executor of `concurrent.futures`, or a number of processes of this machine, which share
            its cores (see `core.workers.processes`); default: this thread. With the same threads the models are the same to the byte.
            Targets that are timed are worked on in this thread all the same. Give model and data as paths that the workers can read.
        part: only the targets of a part, such as "3/16"; `report.points.joined` makes a whole sweep of the JSON of all parts.

    Raises:
        OptionError: bad targets, or model or data that cannot be sent. TargetError: none of the targets can be reached.
    """
    if options.ratio is not None or options.max_drop is not None:
        raise OptionError("a sweep takes --targets (and --target for bounds that hold for all of them), not --ratio or --max-drop")
    wanted = [target for text in ([sweeps] if isinstance(sweeps, str) else sweeps) for target in parse_sweep(text)]
    asked = {"part": part, "targets": wanted, "plan": options.told}
    wanted = wanted if part is None else part_of(wanted, part)
    if report is not None:
        require()
    if folder is not None:
        _make(Path(folder))
    sources = _sources(options, data, None, test_data, data_options, inspect_options, measure_options)
    inputs = sources.open(source, [output, report, options.save_library]).with_groups()
    tell(inputs.reading)
    seed = (score_options or ScoreOptions()).seed
    held = inputs.test_data is None and inputs.data is not None
    if held:
        inputs = _held_out(inputs, seed)
        log.info(f"accuracy on {inputs.test_data.samples if inputs.test_data else 0} samples held out from --data")
    options = _with_tables(options, wanted)
    aim = replace(options, targets=options.targets or ("macs=100%",))
    ready = candidates(inputs, aim, Scoring(score_name, score_options, repair), progress, further=wanted)
    for note in ready.notes:
        log.info(f"Note: {note}")
    work = Work(source, sources, seed if held else None, _sendable(ready), options)
    points, models = [], [inputs.analysis.model]
    for target, result in zip(wanted, _worked(work, inputs, ready, wanted, executor, progress), strict=True):
        if isinstance(result, BaseException):
            points.append(Point(target, failure=reason(result)))
        else:
            points.append(saved_point(result, target, inputs.analysis, folder))
            models.append(result.model)
    if part is None:
        refuse_none(points)
    reading = None if inputs.test_data is None else inputs.read(inputs.test_data)
    measured = measured_points(inputs.analysis, points, models, inputs.test_data, options, reading or MeasureOptions())
    swept = Sweep(tuple(measured), sweep_data(measured, inputs.analysis, ready, None if part is None else asked))
    if output is not None:
        write_json(output, swept.data, inputs.paths)
    if report is not None:
        page = pages.sweep_page(measured, ready, inputs.data, inputs.test_data, progress)
        write_text(Path(report), render(page), inputs.paths)
    return swept


def _held_out(inputs: Inputs, seed: int) -> Inputs:
    """A third of the data is for judging."""
    data, judge = max_drop.held_out(inputs.data, seed)
    return replace(inputs, data=data, test_data=judge)


def _sendable(ready: search.Candidates) -> search.Candidates:
    """Without what a worker opens itself, and the functions."""
    form = replace(figures.AS_CUT, storable=ready.form.storable)
    return replace(ready, analysis=cast(Analysis, None), data=None, form=form, details=None)


@dataclass(frozen=True)
class Work:
    """What a worker needs for any point of a sweep: what to open, the ``seed`` by which data were held out (None: they were not), scores
    without what is open, the options, how many threads, and the hash of the model that was scored."""

    source: ModelSource | Analysis
    sources: Sources
    seed: int | None
    scored: search.Candidates
    options: PlanOptions
    wanted: tuple[str, ...] = ()
    threads: int = 0
    name: str = ""
    sha256: str = ""


@dataclass(frozen=True)
class _Bench:
    """What the points of a sweep are made from."""

    inputs: Inputs
    ready: search.Candidates
    ruler: figures.Ruler


_BENCHES: dict[str, _Bench] = {}
"""By the name of the work: threads of one process share that of the sweep, another process makes its own once."""


def _worked(
    work: Work, inputs: Inputs, ready: search.Candidates, wanted: Sequence[str], executor: Executor | int | None, progress: Progress
) -> list[Pruned | BaseException]:  # fmt: skip
    """What came of every target. What is timed is worked on here, one after the other, where nothing else runs."""
    given = work.options.targets
    timed = [target for target in wanted if any(parse_target(text).figure.timed for text in (*given, target))]
    rest = tuple(target for target in wanted if target not in timed)
    ruler = figures.ruler_for(inputs.analysis, replace(work.options, targets=(*given, *wanted)), progress, ready.form)
    threads = work.options.threads or (max(cores() // executor, 1) if isinstance(executor, int) else 0)
    work = replace(work, wanted=rest, threads=threads, name=uuid4().hex, sha256=inputs.analysis.model.sha256)
    if timed and executor is not None:
        log.info("Note: targets that are timed are worked on one after the other, so that nothing disturbs the clock")
    _BENCHES[work.name] = _Bench(inputs, ready, ruler)
    found: dict[str, Pruned | BaseException] = {}
    try:
        with progress("sweeping", len(wanted)) as advance:
            for targets, how in ((rest, executor), (timed, None)):
                found |= zip(targets, each(partial(_point, work), targets, how, advance), strict=True)
    finally:
        del _BENCHES[work.name]
    whole = {key: made if isinstance(made, BaseException) else replace(made, original=inputs.analysis.model) for key, made in found.items()}
    return [whole[target] for target in wanted]


def _point(work: Work, target: str) -> Pruned:
    """One target of a sweep: planned, cut, verified and repaired; the original is left to who asked for it."""
    with using_threads(work.threads):
        bench = _BENCHES.get(work.name) or _bench(work)
        options = replace(work.options, targets=(*work.options.targets, target))
        names = tuple(dict.fromkeys(["macs", *(parse_target(text).what for text in options.targets)]))
        made = search.plan_for(bench.ready, options, ruler=replace(bench.ruler, names=names))
        result = _counted(_applied(bench.inputs, made, True, bench.ready.repair, silent), bench.inputs, OutputOptions())
        return replace(result, original=result.model)


def _bench(work: Work) -> _Bench:
    """Opened again in another process, with the scores of the first.

    Raises:
        ModelError: the model is another by now, or there.
    """
    with quiet():  # all of it was said where the sweep began
        inputs = work.sources.open(work.source)
        inputs = inputs if work.seed is None else _held_out(inputs, work.seed)
        analysis = inputs.analysis
        if analysis.model.sha256 != work.sha256:
            raise ModelError(f"{analysis.model.name}: a worker reads another model than the sweep began with; do not change it meanwhile")
        form = search.form_for(analysis, work.scored.repair, OutputOptions(), inputs.data is not None, work.scored.form.storable)
        ready = replace(work.scored, analysis=analysis, data=inputs.data, form=form)
        ruler = figures.ruler_for(analysis, replace(work.options, targets=(*work.options.targets, *work.wanted)), form=form)
    _BENCHES.clear()
    _BENCHES[work.name] = _Bench(inputs, ready, ruler)
    return _BENCHES[work.name]


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot make the folder: {error.strerror or error}") from error


@dataclass(frozen=True)
class Measured:
    """Figures of every model, and the checks that were asked for: what, whether it holds, and what was expected and found."""

    evaluations: tuple[Evaluation, ...]
    verdicts: tuple[Verdict, ...] = ()


def evaluate(
    models: Sequence[ModelSource], data: DataSource, latency: bool = True, threads: int = 0, progress: Progress = silent, *,
    data_options: DataOptions = DataOptions(), measure_options: MeasureOptions = MeasureOptions(), batch: int = 1, provider: str = "cpu",
    energy: bool = False,
) -> list[Evaluation]:  # fmt: skip
    """Measure models on the same data; the first is the reference.

    Args:
        latency: time the models, with so many ``threads`` (0: all cores), on ``batch`` samples, with a ``provider`` of onnxruntime.
        energy: tell the energy of such a run, too: measured where the counters of the processor can be read, else estimated.

    Raises:
        ModelError, DataError: a model or the data cannot be used, labels out of range. OptionError: unknown provider or batch size.
    """
    how = Latency(Setup(threads, provider), batch)
    return list(compared(
        models, data, how if latency else None, progress, data_options=data_options, measure_options=measure_options,
        energy=how if energy else None).evaluations)  # fmt: skip


@threaded
def compared(
    models: Sequence[ModelSource], data: DataSource, latency: Latency | None = AS_DEFAULT, progress: Progress = silent, *,
    data_options: DataOptions = DataOptions(), gate: GateOptions = GateOptions(), report: Path | None = None,
    measure_options: MeasureOptions = MeasureOptions(), energy: Latency | None = None,
) -> Measured:  # fmt: skip
    """As `evaluate`, with checks of the last model and a page.

    Raises:
        as `evaluate`; OptionError: the gate cannot be read. OutputError: the page cannot be written.
    """
    models = [models] if isinstance(models, (str, Path)) else models
    checks = Gate(gate, len(models))
    if report is not None:
        require()
    loaded = [load(model) for model in models]
    sources = Sources(data, data_options=data_options, measures=measure_options)
    paths = [*(path for model in loaded for path in model.paths), *sources.paths()]
    if report is not None:
        check_output(Path(report), paths)
    for text in training_mode(loaded[0]):
        log.warning(text)
    used = opened(loaded[0], data, data_options, measure_options)
    assert used is not None
    analysis = inspect(loaded[0], data=used)
    reading = reading_of(loaded[0], used, measure_options, tokens=analysis.prepared.tokens)
    tell(reading)
    for text in left_out(analysis, used):
        log.info(f"Note: {text}")
    if gate.max_drop is not None or gate.baseline is not None:
        unknown_meaning(reading, "the gate")
    results = measure(loaded, used, latency, progress, reading, analysis, energy)
    if report is not None:
        analyses = [analysis, *(inspect(model, data=used) for model in loaded[1:])]
        timed = layer_times(analysis, loaded[-1], latency.setup, latency.batch, progress) if latency and len(loaded) > 1 else None
        write_text(Path(report), render(pages.evaluate_page(analyses, results, used, timed, measure_options)), paths)
    batch = latency.batch if latency else 1
    more = {"memory": [figures.peak(model, analysis, batch) for model in (loaded[0], loaded[-1])]} if checks.asks("memory") else {}
    return Measured(tuple(results), tuple(checks.verdicts(results, used, more)))


@threaded
def device_profile(
    source: ModelSource | Analysis, options: PlanOptions = PlanOptions(), progress: Progress = silent, *,
    inspect_options: InspectOptions = InspectOptions(), fresh: bool = False, output: Path | None = None,
) -> tuple[Analysis, DeviceProfile]:  # fmt: skip
    """What the nodes of a model cost on this machine at many widths, for plans made here or elsewhere (``threads``, ``batch``,
    ``provider`` and ``profile_budget`` of the options say how it is measured).

    Args:
        fresh: measure again, whatever the cache holds.
        output: where the profile goes as JSON.

    Raises:
        OptionError: unknown provider or batch size. ModelError: onnxruntime cannot run the model so.
    """
    inputs = Sources(inspect_options=inspect_options).open(source, [output])
    setup = Setup.of(options)
    profile = measure_device_profile(inputs.analysis, setup, options.batch, progress, fresh, options.profile_budget)
    if output is not None:
        write_json(output, profile_to_json(profile), inputs.paths)
    return inputs.analysis, profile
