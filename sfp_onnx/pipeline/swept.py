"""Many targets from one calibration, by one process or many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

from ..core.errors import ModelError, OptionError, OutputError
from ..core.options import DataOptions, InspectOptions, MeasureOptions, OutputOptions, PlanOptions, RepairOptions, ScoreOptions
from ..core.system import log, quiet
from ..core.types import Shown
from ..core.workers import each, reason
from ..coupling.analysis import Analysis, DataSource, Progress, silent
from ..graph.load import ModelSource
from ..graph.save import write_text
from ..planning import figures, max_drop, parse_target, search
from ..report import page as pages, render, require
from ..report.manifest import Pruned, write_json
from ..report.points import Point, measured_points, parse_sweep, part_of, refuse_none, saved_point, sweep_data
from ..report.text import points_text
from ..runtime import cores, threaded, using_threads
from .applied import applied_to, counted_on
from .opened import AS_PLANNED, Inputs, Sources, sources_of, tell
from .scored import Scoring, candidates, with_tables


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
    sources = sources_of(options, data, None, test_data, data_options, inspect_options, measure_options)
    inputs = sources.open(source, [output, report, options.save_library])
    inputs = inputs.weighing(options, score_name, repair) or inputs.with_groups()
    tell(inputs.reading)
    seed = (score_options or ScoreOptions()).seed
    held = inputs.test_data is None and inputs.data is not None
    if held:
        inputs = _held_out(inputs, seed)
        log.info(f"accuracy on {inputs.test_data.samples if inputs.test_data else 0} samples held out from --data")
    options = with_tables(options, wanted)
    aim = replace(options, targets=options.targets or ("macs=100%",))
    ready = candidates(inputs, aim, Scoring(score_name, score_options, repair), progress, further=wanted)
    for note in ready.notes:
        log.info(f"Note: {note}")
    work = Work(source, sources.traced_as(inputs), seed if held else None, _sendable(ready), options)
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
        result = counted_on(applied_to(bench.inputs, made, True, bench.ready.repair, silent), bench.inputs, OutputOptions())
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
