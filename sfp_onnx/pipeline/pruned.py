"""The whole story, once or in rounds: plan, apply, other forms, what held-out data say, and everything that is written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from .. import planning
from ..core import options as records
from ..core.errors import OptionError, TargetError
from ..core.options import DataOptions, InspectOptions, MeasureOptions, OutputOptions, PlanOptions, RepairOptions, ScoreOptions
from ..core.system import log
from ..coupling.analysis import Analysis, DataSource, Progress, describe, inspect, silent
from ..cut import cut
from ..data.dataset import Dataset
from ..evaluation import evaluate as measure
from ..export import package, refuse, rows_kept, written_by
from ..graph import Model
from ..graph.load import ModelSource
from ..graph.save import fingerprint
from ..latency.timing import Latency
from ..planning import figures, rounds, search
from ..report import Page, page as pages, require
from ..report.manifest import Lock, Pruned, command_of
from ..report.text import plan_text
from ..runtime import threaded
from .applied import applied_to, as_planned, counted_on, written_out
from .opened import AS_PLANNED, Inputs, checked_options, measured_by, sources_of, tell
from .planned import planned_for
from .scored import Scoring, candidates, judge_of


def _packaged(result: Pruned, inputs: Inputs, options: PlanOptions, scoring: Scoring, output: OutputOptions) -> Pruned:
    """The result in its other forms, the last of which must hold what is asked of it.

    Raises:
        as `package`; TargetError: it loses more than ``max_drop``.
    """
    made = package(inputs.analysis, result.model, output, inputs.data, inputs.test_data, inputs.told, Latency.of(vars(options)))
    notes = (*result.notes, *made.notes)
    if options.max_drop is not None and made.model is not result.model:
        judge = judge_of(inputs, options, scoring)[0]
        drop = judge.drop(made.model)
        notes += tuple(f"as packaged: {note}" for note in judge.notes(drop)[:1])
        if not judge.holds(drop):
            advice = "Nothing was written. Package less, or loosen it."
            raise TargetError(f"--max-drop cannot be held by the packaged model: {notes[-1]}. {advice}")
    return replace(result, model=made.model, notes=notes, packaged=made)


@threaded
def prune(
    source: ModelSource | Analysis, options: PlanOptions, score_name: str | None = None, data: DataSource | None = None,
    score_options: ScoreOptions | None = None, verify: bool = True, progress: Progress = silent,
    repair: RepairOptions | None = AS_PLANNED, eval_data: DataSource | None = None, *, test_data: DataSource | None = None,
    data_options: DataOptions = DataOptions(), inspect_options: InspectOptions = InspectOptions(),
    output: OutputOptions = OutputOptions(), measure_options: MeasureOptions = MeasureOptions(), steps: int = 1,
    resume: Path | None = None,
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
        resume: a file that holds where a run in rounds stands; it is gone on from if it is there.

    Raises:
        TargetError: nothing can be pruned, a target cannot be met, or the run of ``output.locked`` does not come out.
        VerificationError: the result is not what was planned, or the repair made it worse.
        OptionError, ModelError, DataError, OutputError: bad options, input or output.
    """
    checked_options(options)
    records.expect(OutputOptions, output=output)
    if steps > 1 and (not options.targets or options.max_drop is not None or output.locked is not None or data is None):
        raise OptionError("--rounds needs --data and --target, and goes neither with --max-drop nor with --locked")
    if resume is not None and steps < 2:
        raise OptionError("--resume goes with --rounds: it is written after every round")
    if steps > 1:
        rounds.check(options.targets)
    scoring = Scoring(score_name, score_options, repair)
    lock = None if output.locked is None else Lock(Path(output.locked))
    if output.report is not None:
        require()
    measures = measured_by(options, measure_options)
    if measures.metric is not None and options.max_drop is None and test_data is None:
        raise OptionError("--metric needs --max-drop or --test-data")
    if output.energy and test_data is None:
        raise OptionError("--energy is measured with the models that --test-data measures: give --test-data, or use `sfp-onnx evaluate`")
    sources = sources_of(options, data, eval_data, test_data, data_options, inspect_options, measures, output.locked)
    files = [output.path, output.manifest, output.report, output.card, options.save_library, resume]
    inputs = sources.open(source, [*files, *written_by(output)])
    tell(inputs.reading)
    refuse(inputs.analysis, output)
    output = rows_kept(inputs.analysis, output, inputs.data)
    if options.precision != "float32" and (output.fp16 or output.quantize or steps > 1):
        other = f"--{'rounds' if steps > 1 else 'fp16' if output.fp16 else 'quantize'}"
        raise OptionError(f"--precision {options.precision} and {other} do not go together: give one of them")
    more = {"rounds": steps} if steps > 1 else {}
    given = (options, score_options, repair, data_options, inspect_options, replace(output, rows=None), measures)
    used = command_of(*given, score=score_name, verify=verify, **more)
    file = None if resume is None or inputs.data is None else _kept(resume, inputs.analysis.model, inputs.data, used)
    ready, made = None, None if lock is None else lock.plan(inputs.analysis.model, inputs.data, used)
    if made is not None and (made.options.get("cut_layernorm") or made.options.get("expand_outputs")):
        inputs = inputs.wider() or inputs
    if made is None:
        first = replace(options, moves=(records.CUT,)) if steps > 1 else options  # layers stay one over rounds
        inputs, ready, made = planned_for(inputs, first, scoring, progress, output, steps < 2)
    log.debug(plan_text(made))
    make = partial(applied_to, inputs, verify=verify, repair=as_planned(made, repair, inputs.data), progress=progress)
    result = make(made) if steps < 2 or ready is None else _in_rounds(_rounds(inputs, options, scoring, ready, steps, make, progress, file))
    if output.packaged:
        result = _packaged(result, inputs, options, scoring, output)
    if lock is not None:
        lock.check(result, output)
    result = counted_on(result, inputs, output)
    result = replace(_measured(result, inputs, output, progress), command=used)
    page = None if output.report is None else _page(result, ready, inputs, options, progress)
    return written_out(result, inputs, output, page)


def _kept(path: Path, model: Model, data: Dataset, used: object) -> rounds.File:
    """Where a run in rounds is kept, for this model, these data and options."""
    return rounds.File(path, hashlib.sha256(repr((model.sha256, describe(data), used)).encode()).hexdigest())


def _in_rounds(done: Iterator[Pruned]) -> Pruned:
    """The result of the last round; Ctrl-C ends them with that of the last that was made (in a training: with what is best so far)."""
    result: Pruned | None = None
    try:
        for result in done:
            if result.repaired is not None and any(item.get("stopped") for item in result.repaired.finished.values()):
                break
    except KeyboardInterrupt:
        if result is None:
            raise
    assert result is not None
    number, count, asked = (result.plan.options[name] for name in ("round", "rounds", "targets"))
    if number == count:
        return result
    log.warning(words := f"stopped: this is the result of round {number} of {count}, larger than asked for ({', '.join(asked)})")
    return replace(result, notes=(words, *result.notes))


def _rounds(
    inputs: Inputs, options: PlanOptions, scoring: Scoring, ready: search.Candidates, count: int, make: Callable[..., Pruned],
    progress: Progress, file: rounds.File | None,
) -> Iterator[Pruned]:  # fmt: skip
    """Rank the present network, cut, repair towards the original (and fine-tune), and again; the result of each. Every round is a cut of
    the original, proven as any; its weights are those of the round before. Layers stay one.

    Args:
        ready: what the first round plans with. make: cuts the original by a plan, and repairs it from other weights, if there are any.
        file: where it is kept what the rounds gave so far.

    Raises:
        OptionError: targets that are timed, or outputs that are expanded. TargetError: a target cannot be held.
    """
    analysis = present = inputs.analysis
    if analysis.projected or analysis.expanded:
        raise OptionError("--rounds does not go with an expanded model: give --expand none")
    shapes = {name: list(array.shape) for name, array in analysis.prepared.feeds.items()}
    ruler = figures.ruler_for(analysis, options, progress, ready.form)
    removed, weights, number = np.zeros(analysis.coupling.units, bool), None, 1

    def aim(number: int) -> PlanOptions:
        return replace(options, targets=rounds.targets_of(options.targets, ruler.before, number / count), moves=(records.CUT,))

    def following(model: Model, number: int) -> tuple[Analysis, search.Candidates]:
        present = inspect(model, shapes, inputs.data)
        return present, candidates(replace(inputs, analysis=present), aim(number), scoring, progress)

    if file is not None and (stands := file.read(analysis.model.libraries)) is not None:
        log.info(f"Note: round {stands.number} of {count} was done before")
        removed, number = stands.removed, stands.number + 1
        present, ready = following(stands.model, number)
    while True:
        made = search.plan_for(ready, aim(number), progress)
        more = planning.removal_of(made, present.coupling, made.model_sha256)
        if number > 1:
            weights = rounds.weights_of(cut(present.prepared, present.coupling, more))
        removed = rounds.composed(analysis, removed, present, more)
        held = {name: {**figure, "before": ruler.before[name]} for name, figure in made.figures.items()}
        told = {**made.options, "targets": list(options.targets), "round": number, "rounds": count}
        whole = replace(planning.make_plan(analysis, removed, told), notes=made.notes, figures=held)
        result = make(whole, weights=weights)
        log.info(f"Note: round {number} of {count} ({', '.join(aim(number).targets)}): {'; '.join(result.notes[:2])}")
        yield result
        if number == count:
            return
        if file is not None:
            file.write(rounds.Standing(number, removed, result.model))
        number += 1
        present, ready = following(result.model, number)


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
    how = Latency.of(result.plan.options)
    energy = how if output.energy else None
    first, last = measure([result.original, result.model], data, how, progress, inputs.read(data), energy=energy)
    if output.path is not None:
        size = replace(last.size, bytes=fingerprint(result.model, output.path, output.external)[1])
        last = replace(last, model=str(output.path), size=size)
    return replace(result, evaluation=(first, last), test_data=describe(data))
