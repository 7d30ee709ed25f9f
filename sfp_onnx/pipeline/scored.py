"""Everything that plans need of a model and its data: scores and errors, measured at once or in parts, or from a library."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..core import options as records
from ..core.errors import ModelError, OptionError, TargetError
from ..core.options import DataOptions, InspectOptions, MeasureOptions, OutputOptions, PlanOptions, RepairOptions, ScoreOptions
from ..core.system import log, quiet
from ..core.types import FloatArray, traced_text
from ..core.workers import each
from ..coupling.analysis import Analysis, DataSource, Progress, describe, feeds_of, reasons, silent
from ..data.dataset import Dataset
from ..evaluation import parse_drop, unknown_meaning
from ..export.integers import Integers, histograms, ranges_of
from ..graph.arrays import write_arrays
from ..graph.load import ModelSource
from ..latency import to_json as profile_to_json
from ..latency.measure import latency_ratio
from ..latency.profiling import measure_device_profile, read_device_profile
from ..planning import library, max_drop, parse_target, search, widths
from ..planning.precision import INTEGER, Storable, storables, without
from ..rules.foreign import sentences
from ..runtime import PROVIDERS, Setup, full_provider, threaded, using_threads
from ..scores import parts
from ..scores.rounding import SAMPLES, with_errors
from ..scores.scoring import Scored, default_score, meaning, parse, save_scores, scored
from .opened import AS_PLANNED, Inputs, Sources, as_it_stands, measured_by, settled


@dataclass(frozen=True)
class Scoring(records.Checked):
    """How channels are scored for a plan, and the repair that will follow; None: the defaults. ``parts`` of the data that were measured
    before (`parts.Source`), in place of the data."""

    name: str | None = None
    options: ScoreOptions | None = None
    repair: RepairOptions | None = AS_PLANNED
    parts: tuple[Any, ...] = ()


def judge_of(inputs: Inputs, options: PlanOptions, scoring: Scoring) -> tuple[max_drop.Judge, Dataset | None]:
    """What ``max_drop`` is judged by, and the data that are scored and repaired with."""
    seed, apart = (scoring.options or ScoreOptions()).seed, inputs.eval_data is not None
    scored_with, judged = (inputs.data, inputs.eval_data) if apart else max_drop.held_out(inputs.data, seed)
    assert judged is not None and options.max_drop is not None
    reading = inputs.read(judged)
    unknown_meaning(reading, "--max-drop")
    limit = parse_drop(options.max_drop)
    return max_drop.Judge(inputs.analysis.model, judged, limit, options.confidence, reading, apart, seed), scored_with


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
        raise TargetError(f"{analysis.model.name}: nothing can be pruned. {reasons(coupling)}{inputs.advice}")
    for text in sentences(coupling.unruled):
        log.info(f"Note: {text}")
    weights_of = {layer.node.name: layer.node.inputs[layer.weight.position] for layer in coupling.layers if layer.weight}
    groups = tuple(widths.eligible(coupling, options, weights_of))
    repair = settled(scoring.repair, data)
    recorded, details, told, reach = facts_of(inputs, scoring, repair), None, inputs.told, 0.0
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
        plain = [group for group in groups if not group.dimensions and not group.inside]  # searches judge one kind of units
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
    stored = options.precision != "float32"
    storable, integers, words = _storable(inputs, options, scoring, progress, further) if stored else ((), None, ())
    notes += words
    form = search.form_for(analysis, repair, output, known.recorded.get("data") is not None, storable, integers)
    return search.Candidates(
        analysis, groups, known.scores, known.recorded, known.errors, notes, data, repair, details, told, form,
        known.spectra if repair is not None and repair.kind == "lstsq" else {}, reach, inputs.expanding,
    )


def _timed(options: PlanOptions, further: Sequence[str]) -> bool:
    """Whether time is a target."""
    return any(parse_target(text).figure.timed for text in (*options.targets, *further))


def _storable(
    inputs: Inputs, options: PlanOptions, scoring: Scoring, progress: Progress, further: Sequence[str]
) -> tuple[tuple[Storable, ...], Integers | None, tuple[str, ...]]:
    """The weights that may be stored in fewer bits, with what their rounding does; where time counts that is measured on this processor,
    what makes layers integers, if that saves any; and words on it."""
    analysis, seed = inputs.analysis, (scoring.options or ScoreOptions()).seed
    weights, integers, words = storables(analysis.prepared, analysis.coupling), None, tuple[str, ...]()
    if options.precision == "auto" and _timed(options, further):
        integers, words = _integers(inputs, options) if weights else (None, (NO_KERNELS,))
        weights = weights if integers else without(weights, range(len(weights)))
    weights = with_errors(analysis, weights, inputs.data, seed, progress, integers)
    if integers is None or any(np.isfinite(item.errors[INTEGER]) for item in weights):
        return weights, integers, words
    return weights, None, (NO_KERNELS,)


NO_KERNELS = "8-bit integers are weighed as storage alone: kernels that save time need --data, this processor, and layers they take"


def _integers(inputs: Inputs, options: PlanOptions) -> tuple[Integers | None, tuple[str, ...]]:
    """What makes layers integers, if the model with all of them is faster here; and words on it."""
    analysis, data, setup = inputs.analysis, inputs.data, Setup.of(options)
    here = options.device_profile is None and setup.board is None and full_provider(setup.provider) in PROVIDERS
    if not here or data is None or analysis.prepared.nest:  # the quantiser does not look into branches
        return None, (NO_KERNELS,)
    model, layers = analysis.prepared.model, frozenset(layer.node.outputs[0] for layer in analysis.coupling.layers)
    some = data.part(np.arange(min(data.samples, SAMPLES)))
    try:
        integers = Integers(layers, ranges_of(histograms(model, lambda: feeds_of(analysis, some))))
        share = latency_ratio(analysis, integers(model, layers), setup, options.batch)
    except ModelError:
        return None, (NO_KERNELS,)
    words = f"with all layers in 8-bit integers, the original takes {share:.0%} of its time here"
    return (integers, (words,)) if share < 1 else (None, (f"{words}: none is computed so",))


def _of_parts(analysis: Analysis, scoring: Scoring, asked: Mapping[str, Any], progress: Progress) -> library.Library:
    """What the parts of the data tell, all together."""
    facts = scoring.parts[0].facts
    library.compare("--statistics: the parts were made", facts, analysis.model, asked)
    scores = scored(analysis, facts["text"], None, scoring.options, progress, shared=parts.shared_by(analysis, scoring.parts))
    return library.Library(facts["recorded"], scores.values, scores.errors, scores.notes, spectra=scores.spectra)


def facts_of(inputs: Inputs, scoring: Scoring, repair: RepairOptions | None) -> dict[str, Any]:
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


def with_tables(options: PlanOptions, targets: Sequence[str] = ()) -> PlanOptions:
    """Latency as the library knows it, where time is a target and nothing else says it."""
    if not _timed(options, targets) or options.library is None or options.device_profile is not None:
        return options
    if library.read_library(options.library).profile is None:
        return options
    return replace(options, device_profile=str(options.library))


def _keep(known: library.Library, inputs: Inputs, options: PlanOptions, progress: Progress, further: Sequence[str]) -> None:
    """Write what was measured for further plans."""
    profile, sha256 = known.profile, inputs.analysis.model.sha256
    if _timed(options, further):
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


# ---- in parts: each by itself, by workers of one run or by runs of their own -------------------------------------------


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
    sources = Sources(data, eval_data, None, data_options, as_it_stands(inspect_options), (), measured_by(options, measure_options))
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
        data = judge_of(inputs, work.options, scoring)[1]
    inputs, repair = replace(inputs, data=data), settled(scoring.repair, data)
    name = parse(scoring.name or default_score(data, repair)).text
    recorded = json.loads(json.dumps({"score": name, **facts_of(inputs, scoring, repair)}))
    assert data is not None
    return parts.collected(inputs.analysis, name, data, part, scoring.options or ScoreOptions(), recorded, progress)


def _share(work: Calibration, part: str) -> parts.Held:
    """A part, measured by a worker. With one thread, so that no number of workers changes a bit."""
    with quiet(), using_threads(work.options.threads or 1):
        made = _part(work, work.sources.open(work.source), part)
        return parts.Held(made.facts, dict(made.arrays))


PARTS = 8


def shared_out(work: Calibration, inputs: Inputs, executor: Executor | int, progress: Progress) -> list[parts.Source]:
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
