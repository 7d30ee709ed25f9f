"""Models as they are, measured on data or on a machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.options import DataOptions, InspectOptions, MeasureOptions, PlanOptions
from ..core.system import log
from ..coupling.analysis import Analysis, DataSource, Progress, inspect, left_out, silent
from ..data.checks import opened, training_mode
from ..evaluation import Evaluation, Gate, GateOptions, Verdict, evaluate as measure, reading_of, unknown_meaning
from ..graph.load import ModelSource, load
from ..graph.save import check_output, write_text
from ..latency import DeviceProfile, to_json as profile_to_json
from ..latency.profiling import layer_times, measure_device_profile
from ..latency.timing import AS_DEFAULT, Latency
from ..planning import figures
from ..report import page as pages, render, require
from ..report.manifest import write_json
from ..runtime import Setup, threaded
from .opened import Sources, tell


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
