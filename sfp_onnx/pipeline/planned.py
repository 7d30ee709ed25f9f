"""Which channels leave: a plan, as the model stands or expanded where that is needed."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

from .. import planning
from ..core.errors import OptionError, TargetError
from ..core.options import DataOptions, InspectOptions, MeasureOptions, OutputOptions, PlanOptions, RepairOptions, ScoreOptions
from ..core.system import log
from ..core.types import Plan
from ..coupling.analysis import Analysis, DataSource, Progress, describe, silent
from ..coupling.cost import params_of
from ..graph.load import ModelSource
from ..planning import figures, library, max_drop, search
from ..planning.precision import codes_of
from ..report.manifest import write_json
from ..runtime import threaded
from ..scores import parts
from .opened import AS_PLANNED, Inputs, as_it_stands, checked_options, measured_by, size_of, sources_of, tell
from .scored import Calibration, Scoring, candidates, judge_of, shared_out, with_tables


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
    checked_options(options)
    scoring, measures = Scoring(score_name, score_options, repair), measured_by(options, measure_options)
    if measures.metric is not None and options.max_drop is None:
        raise OptionError("--metric needs --max-drop")
    with ExitStack() as files:
        held: list[parts.Source] = [files.enter_context(closing(parts.Arrays(path, *parts.WRITTEN))) for path in statistics]
        if held and data is None:
            inspect_options = library.traced_as(held[0].facts["recorded"], inspect_options)
        if held:
            inspect_options = as_it_stands(inspect_options)
        sources = sources_of(options, data, eval_data, None, data_options, inspect_options, measures, *statistics)
        inputs = sources.open(source, [output, options.save_library])
        tell(inputs.reading, options.max_drop is not None)
        if executor is not None:
            whole = inputs.weighing(options, score_name, repair)
            inputs, sources = inputs if whole else replace(inputs, auto=False), sources.traced_as(whole or inputs)
            held = shared_out(Calibration(source, sources, scoring, options), whole or inputs, executor, progress)
        planned = planned_for(inputs, options, replace(scoring, parts=tuple(held)), progress)
    made = _built(*planned)
    if output is not None:
        write_json(output, planning.to_json(made), inputs.paths)
    return made


def _built(inputs: Inputs, ready: search.Candidates, plan: Plan) -> Plan:
    """A plan with the size of the file that it will give, with the biases that a repair adds."""
    analysis, form = inputs.analysis, ready.form
    if analysis is not ready.analysis:  # nothing is expanded
        with_data = ready.recorded.get("data") is not None
        form = search.form_for(analysis, ready.repair, OutputOptions(), with_data, form.storable)
    removed = planning.removal_of(plan, analysis.coupling, plan.model_sha256)
    ruler = figures.ruler_for(analysis, PlanOptions(), form=form)
    built = ruler.at(codes_of(form.storable, plan.precisions)).built(removed, plan.factors)
    after = replace(analysis.size(removed, plan.factors), params=params_of(built), bytes=form.bytes(built))
    return replace(plan, before=size_of(analysis), after=after)



def planned_for(
    inputs: Inputs, options: PlanOptions, scoring: Scoring, progress: Progress, output: OutputOptions = OutputOptions(),
    weighed: bool = True,
) -> tuple[Inputs, search.Candidates, Plan]:  # fmt: skip
    """The plan for what is written as ``output`` says, with the scores that it was made from. Where errors are known in one unit, and an
    expansion frees a real share of the model, the plan weighs that (if it may be ``weighed``); else the model is expanded if the target
    cannot be met as it stands. Where nothing is expanded in the end, the plan is one for the model as it stands."""
    whole = inputs.weighing(options, scoring.name, scoring.repair) if weighed else None
    if whole is not None:
        return _weighed(inputs, whole, options, scoring, progress, output)
    if inputs.expanding:  # as a library is
        return _weighed(inputs.standing(), inputs, options, scoring, progress, output)
    try:
        return inputs, *_planned_on(inputs, options, scoring, progress, output)
    except TargetError as failure:
        whole = inputs.wider()
        if whole is None and str(failure).endswith(inputs.advice):
            raise
        if whole is None:
            raise TargetError(f"{failure}{inputs.advice}") from failure
        log.info(f"Note: as it stands, {failure}")
        return whole, *_planned_on(whole, options, scoring, progress, output)


def _weighed(
    inputs: Inputs, whole: Inputs, options: PlanOptions, scoring: Scoring, progress: Progress, output: OutputOptions
) -> tuple[Inputs, search.Candidates, Plan]:
    """The plan for the ``whole`` of what may be expanded; where nothing is, as one for the model as it stands."""
    ready, made = _planned_on(whole, options, scoring, progress, output)
    plain = planning.standing(made, inputs.analysis.coupling)
    return (whole, ready, made) if plain is None else (inputs, ready, plain)


def _planned_on(
    inputs: Inputs, options: PlanOptions, scoring: Scoring, progress: Progress, output: OutputOptions
) -> tuple[search.Candidates, Plan]:
    """The plan for a model as it was inspected."""
    options = with_tables(options)
    if options.max_drop is None:
        if inputs.eval_data is not None:
            raise OptionError("--max-drop-data needs --max-drop")
        ready = candidates(inputs, options, scoring, progress, output)
        made = search.plan_for(ready, options, progress)
    else:
        judge, scored_with = judge_of(inputs, options, scoring)
        ready = candidates(replace(inputs, data=scored_with), options, scoring, progress, output)
        if judge.apart:
            ready = replace(ready, recorded={**ready.recorded, "eval_data": describe(judge.data)})
        elif inputs.data is not None:
            ready = replace(ready, recorded={**ready.recorded, "samples": inputs.data.samples})
        made = max_drop.plan_with_drop(ready, options, judge, progress=progress)
    for note in made.notes:
        (log.debug if note.startswith("allocation:") else log.info)(f"Note: {note}")
    return ready, made
