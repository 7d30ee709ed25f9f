"""Measure models on data: by what their outputs mean, against labels and the first model, size and latency; and what the last must hold."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import graph
from ..core.errors import DataError, OptionError
from ..core.options import AMOUNT, MeasureOptions, option
from ..core.system import log, user_function
from ..core.types import Array, Shown, Size, Tokens, number
from ..coupling.analysis import Analysis, Progress, counted, inspect, silent
from ..data.dataset import Dataset
from ..graph.load import ModelSource, load
from ..graph.save import file_bytes
from ..latency.energy import energies
from ..latency.timing import AS_DEFAULT, Latency
from ..planning import FIGURES, TIMED_NOISE, bounds, parse_target, show
from ..runtime import Batches, Feeds, Observed, Session, observe, open_model, side_by_side
from .meaning import Kind, Meaning, Reading, plain, read
from .measures import MEASURES, Measure, Pair, Tally, chance, channel_errors, worsened

LOST, NOISY = 0.5, 0.2  # of answers, or of the size of plain numbers: what is another model, and what may be (see `Comparison.lost`)
TOGETHER = 8  # samples that run at once when outputs are only looked at
FARTHER = 0.05  # of a distance: what is farther by less is no worse


@dataclass(frozen=True, repr=False)
class Evaluation(Shown):
    """What was measured of one model on data; None where it does not apply. ``metric`` is the measure of the task, ``value`` what it gives;
    ``measures`` are all, by output and name; ``worst`` names the output and channel that is farthest from the original's (relative error,
    centred). ``latency_ratio`` is to the first model, from the minima of interleaved runs; ``timing`` says how they were timed.
    ``energy_mj`` are millijoules of one run; ``energy`` says how they were measured, or that they are an estimate."""

    model: str
    samples: int
    top1: float | None
    agreement: float | None
    kl: float | None
    relative_error: float | None
    size: Size
    latency_min_ms: float | None = None
    latency_median_ms: float | None = None
    latency_ratio: float | None = None
    metric: str = ""
    value: float | None = None
    measures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    worst: str = ""
    timing: str = ""
    energy_mj: float | None = None
    energy: str = ""

    def summary(self) -> str:
        """The measure of the task, size, and time."""
        worth = [] if self.value is None else [f"{self.metric} {self.value:.4g} on {self.samples} samples"]
        time = [] if self.latency_min_ms is None else [f"{self.latency_min_ms:.3f} ms ({self.timing})"]
        return ", ".join([self.model, *worth, f"{number(self.size.macs)} MACs, {number(self.size.params)} parameters", *time])


def loss_of(metric: str, value: float | None) -> float:
    """A value of a measure so that less is better; 0 if there is none."""
    larger = metric not in MEASURES or MEASURES[metric].larger
    return (value or 0.0) * (-1 if larger else 1)


# ---- a model against the original ------------------------------------------------------------------------------------

MAIN = {  # what a meaning is judged by: with labels that fit, without, and as the distance that a repair must not make larger
    Kind.CLASSES: ("top-1", "agreement", "KL divergence"), Kind.MAP: ("mean IoU", "pixel agreement", "pixel agreement"),
    Kind.EMBEDDING: ("cosine", "cosine", "cosine"), Kind.NUMBERS: ("error to labels", "centred error", "centred error"),
    Kind.BOXES: ("mAP", "matched boxes", "matched boxes"), Kind.UNKNOWN: ("centred error",) * 3,
    Kind.INTEGERS: ("equal integers",) * 3, Kind.OTHER: ("equal values",) * 3,
    Kind.MARKS: ("class IoU", "class IoU to the original", "centred error"),
}  # fmt: skip
TITLES = {"agreement": "agreement with the original"}  # what people are told instead of the name
FIXED = {Kind.CLASSES, Kind.MAP, Kind.MARKS, Kind.EMBEDDING, Kind.NUMBERS}  # of one shape
FIELDS = {"top1": "top-1", "agreement": "agreement", "kl": "KL divergence"}


class Comparison:
    """All measures of a model against the original, running over batches."""

    def __init__(self, reading: Reading, labelled: bool) -> None:
        """Begin; ``labelled``: there are labels."""
        self.reading, self.samples = reading, 0
        self.tallies = {
            (meaning.outputs, name): Tally(measure) for meaning in reading.meanings for name, measure in MEASURES.items()
            if meaning.kind in measure.kinds and (not measure.labelled or (meaning.labelled and labelled))
        }  # fmt: skip

    def update(self, new: Observed, old: Observed, labels: Array | None) -> None:
        """Add what the model and the original gave for a batch; ``labels`` are those of all samples.

        Raises:
            DataError: what has to be of one shape is not.
        """
        self.samples += new.count
        for meaning in self.reading.meanings:
            parts = [[plain(own.values[name], own.rows, own.count) for name in meaning.outputs] for own in (old, new)]
            shapes = [list(own[0].shape) for own in parts]
            if shapes[0] != shapes[1] and meaning.kind in FIXED:
                raise DataError(f"outputs {meaning.name} of shape {shapes[1]} cannot be compared with {shapes[0]} of the first model")
            truth = None if labels is None or not meaning.labelled else new.own(labels)
            pair = Pair(meaning, parts[0], parts[1], truth, new.first, new.count)
            if self.reading.tokens is not None:
                pair = pair.switched_on(self.reading.tokens, self.reading.tokens.on(new.feeds))
            for (outputs_, _), tally_ in self.tallies.items():
                if outputs_ == meaning.outputs and meaning.kind in tally_.measure.kinds:  # boxes may be one output, that is numbers, too
                    tally_.update(pair)

    def tally(self, name: str, meaning: Meaning | None = None) -> Tally | None:
        """What a measure gave for an output (default: the judged one); None if it could not be taken."""
        found = self.tallies.get(((meaning or self.reading.judged).outputs, name))
        return None if found is None or found.value is None else found

    @property
    def metric(self) -> tuple[Measure, str]:
        """The measure of the task, and why it is not the expected one, if so.

        Raises:
            OptionError: the one that was asked for cannot be taken. DataError: none can.
        """
        judged, asked = self.reading.judged, self.reading.metric
        labelled, unlabelled, _ = MAIN[judged.kind]
        own = None if asked is None or ":" in asked else self._asked(asked)
        if own is not None and not own.labelled:
            return own, ""
        blind = self._blind(own.name if own else labelled)
        found = [self.tally(name) for name in (own.name if own else labelled, unlabelled, "centred error")]
        first = next((tally_ for tally_ in found[1 if blind else 0 :] if tally_ is not None), None)
        if first is None:
            raise DataError(f"{judged}: the models give other numbers of values for every batch, so nothing can be compared")
        name = first.measure.name
        title = TITLES.get(name, name)
        why = [blind and f"{blind} on {self.samples} labelled samples: it tells nothing, {title} is judged"]
        if name == "agreement" and self.samples > 1 and len(np.unique(first.rows[:, 2])) == 1:
            one = f"the original gives one answer to all {self.samples} samples, as a model would that knows nothing: {title} tells little"
            why.append(f"{one}. Give data of several classes, labels, or --metric 'centred error'")
        return first.measure, "; ".join(filter(None, why))

    def _blind(self, name: str) -> str:
        """What to say of the original if it is no better on the labels than answers that were drawn without looking."""
        found, top1, overlap = (self.tally(own) for own in (name, "top-1", "mean IoU"))
        if found is None or found.value is None or not found.measure.labelled:
            return ""
        value, limit = found.value[0], 0.0
        if top1 is not None:
            rows = top1.rows
            value, limit = float(rows[:, 0].mean()), chance(rows[:, 2], rows[:, 3])[1]
        elif overlap is not None and overlap.value is not None:  # half of what one class everywhere would give
            value, limit = overlap.value[0], 1 / (2 * max(2, len(np.unique(overlap.rows[:, 0]))))
        useless = value <= limit if found.measure.larger else value >= 1
        shown = f"{name} of the original is {found.value[0]:.2%}"
        return f"{shown}, no better than chance" if useless else ""

    def _asked(self, asked: str) -> Measure:
        known = {_letters(name): found for (outputs_, name), found in self.tallies.items() if outputs_ == self.reading.judged.outputs}
        found = known.get(_letters(asked))
        if found is None or found.value is None:
            names = ", ".join(own.measure.name for own in known.values() if own.value is not None)
            raise OptionError(f"--metric '{asked}' cannot be taken of {self.reading.judged}. Known here: {names}, or module:function")
        return found.measure

    @property
    def distance(self) -> Tally | None:
        """What a repair is judged by: nothing coarser than need be; None if nothing could be compared."""
        judged = self.reading.judged
        names = (MAIN[judged.kind][2], "centred error", MAIN[judged.kind][1])  # one probability has no KL, and agreement is coarse
        return next((found for name in names if (found := self.tally(name)) is not None), None)

    @property
    def lost(self) -> str:
        """What is left, in words, if the model clearly (95 % confidence) lost more than half of the answers of the other; of plain numbers,
        if they are off by a fifth and by more than they vary from sample to sample, or by half."""
        found, error = self.tally(MAIN[self.reading.judged.kind][1]), self.relative_error
        if found is None or found.measure.name == "centred error":
            spread = 0.0 if found is None or found.value is None else found.value[1]
            wrong = error is not None and (error > LOST or (error > NOISY and spread > 1))
            return f"relative error {error:.3g} on {self.samples} samples to the outputs" if wrong else ""
        drop = found.drop(0.95)
        share = f"{found.measure.name} {drop.after:.2%} on {drop.samples} samples with the answers"
        return share if 2 * drop.drop - drop.bound > LOST else ""

    @property
    def relative_error(self) -> float | None:
        """Root mean square of the difference by that of the reference, over all floating outputs; None if that is 0 or there are none."""
        sums = [found.rows.sum(0).reshape(5, -1) for (_, name), found in self.tallies.items() if name == "centred error" and found.value]
        squares = sum(float(own[2].sum()) for own in sums)
        return float(np.sqrt(sum(float(own[1].sum()) for own in sums) / squares)) if squares else None

    @property
    def missed(self) -> list[str]:
        """What could not be compared everywhere, because the numbers of values differed."""
        found = [(names[0], own) for (names, name), own in self.tallies.items() if name == "centred error" and own.skipped]
        return [f"'{name}' has other numbers of values on {own.skipped} of {own.samples} samples: left out there" for name, own in found]

    @property
    def worst(self) -> str:
        """The output and channel that is farthest from the original's."""
        found = []
        for (outputs_, name), own in self.tallies.items():
            if name == "centred error" and own.value:
                errors = channel_errors(own.rows)[1]
                place = int(np.nan_to_num(errors, nan=np.inf).argmax())
                channel = f" channel {place} of {len(errors)}" if len(errors) > 1 else ""
                found.append((float(errors[place]), f"'{outputs_[0]}'{channel}: {errors[place]:.1%}"))
        error, text = max(found, default=(0.0, ""))
        return text if error else ""

    @property
    def figures(self) -> dict[str, dict[str, float]]:
        """Values of all measures, by output."""
        values: dict[str, dict[str, float]] = {}
        for (outputs_, name), own in self.tallies.items():
            if (value := own.value) is not None:
                values.setdefault(", ".join(outputs_), {})[name] = value[1]
        return values

    @property
    def shares(self) -> dict[str, float | None]:
        """Fields of `Evaluation` that speak of class scores; None where they do not apply."""
        meanings = sorted(self.reading.meanings, key=lambda own: own is not self.reading.judged)
        classes = next((own for own in meanings if own.kind is Kind.CLASSES), self.reading.judged)
        found = {key: self.tally(name, classes) for key, name in FIELDS.items()}
        return {key: own.value[1] if own is not None and own.value is not None else None for key, own in found.items()}


@dataclass(frozen=True)
class Distances:
    """How far models are from the original, the name of the ``measure`` (a share of answers counts as what is missing to all), and by how
    much the last is at least farther than the first, with 95 % confidence from the samples."""

    measure: str
    values: tuple[float, ...]
    farther: float

    @property
    def clearly_worse(self) -> bool:
        """Whether the last is not finite, or farther than the first beyond doubt and by more than a small part."""
        first, last = self.values[0], self.values[-1]
        return not np.isfinite(last) or (self.farther > 0 and last > (1 + FARTHER) * first)


def distances(compared: Sequence[Comparison]) -> Distances:
    """How far models are from the original that all of them were compared with, on the same batches."""
    found = [own.distance for own in compared]
    known = [own for own in found if own is not None]
    if len(known) < len(found):
        return Distances("nothing that can be compared", (0.0,) * len(found), 0.0)
    values = tuple(float(own.measure.loss(own.rows)[1]) for own in known)
    return Distances(known[0].measure.name, values, worsened(known[0], known[-1]))


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def reading_of(
    model: graph.Model, data: Dataset, options: MeasureOptions, known: Reading | None = None, tokens: Tokens | None = None
) -> Reading:
    """What the outputs of a model mean, from its first batch of data; ``known`` where the data have no labels that could say more.
    ``tokens``: rows that an input may switch off.

    Raises:
        ModelError: onnxruntime cannot run it. OptionError, DataError: see `read`.
    """
    if known is not None and data.labels is None:
        return known
    return replace(read(model, _first(model, data), data.labels, options, data.name), tokens=tokens)


def _first(model: graph.Model, data: Dataset) -> Observed:
    """What a model gives for the first batch of data. It runs a few samples at a time, as far as these can be put together: all
    activations of a whole batch may take more memory than anything else."""
    if data.plain and not data.fixed:
        few = list(observe(model, replace(data.stretch(0, 1), batch=TOGETHER).batches()))
        values = {name: [item.values[name] for item in few] for name in few[0].values}
        if all(_in_rows(arrays, [item.count for item in few]) for arrays in values.values()):
            return Observed({}, {name: np.concatenate(arrays) for name, arrays in values.items()}, 0, sum(item.count for item in few))
    return next(iter(observe(model, data.batches())))


def _in_rows(arrays: Sequence[Any], counts: Sequence[int]) -> bool:
    """Whether an output has a row per sample, of one shape."""
    pairs = zip(arrays, counts, strict=True)
    return all(isinstance(array, np.ndarray) and array.shape == (count, *arrays[0].shape[1:]) for array, count in pairs)


def tally(
    sessions: Sequence[Session], names: Sequence[str], batches: Batches, labels: Array | None, pairs: Sequence[tuple[int, int]],
    reading: Reading | Callable[[Observed], Reading], progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[Comparison], Feeds]:  # fmt: skip
    """Run sessions over the data once.

    Args:
        names: all outputs of the models. reading: what they mean, or what finds it out from the first batch of the first session.

    Returns comparisons for each of ``pairs`` (a session and the one that it is compared with, by their positions) and the first batch
    (for timing).
    """
    found: list[Comparison] = []
    first_feeds: Feeds = {}
    for batch in side_by_side(sessions, batches, names):
        if not found:
            known = reading if isinstance(reading, Reading) else reading(batch[0])
            first_feeds, found = batch[0].feeds, [Comparison(known, labels is not None) for _ in pairs]
        for comparison, (one, other) in zip(found, pairs, strict=True):
            comparison.update(batch[one], batch[other], labels)
        progress(batch[0].count)
    return found, first_feeds


def measure(
    models: Sequence[graph.Model], batches: Batches, labels: Array | None, reading: Reading, threads: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[Comparison], Feeds]:  # fmt: skip
    """Run all models over the data once. As `tally`, all against the first model.

    Raises:
        DataError: the models have other inputs or outputs than the first.
    """
    interfaces = [tuple([port.name for port in ends(model)] for ends in (graph.inputs, graph.outputs)) for model in models]
    for model, interface in zip(models, interfaces, strict=True):
        if interface != interfaces[0]:
            raise DataError(f"{model.name}: inputs and outputs {interface} differ from those of {models[0].name}: {interfaces[0]}")
    sessions = [open_model(model, threads=threads) for model in models]
    return tally(sessions, interfaces[0][1], batches, labels, [(number, 0) for number in range(len(models))], reading, progress)


# ---- measures of the user --------------------------------------------------------------------------------------------

Outputs = Sequence[Any]
Metric = Callable[[Outputs, "Array | None"], float]


def outputs(model: graph.Model, batches: Batches) -> list[Any]:
    """All outputs of a model on (inputs, number of real samples): arrays whose first axis runs over the samples; of outputs that have no
    such axis, or other sizes in each batch, a list of what each batch gave.

    Raises:
        ModelError: onnxruntime cannot run it.
    """
    parts: dict[str, list[Array]] = {port.name: [] for port in graph.outputs(model)}
    whole = dict.fromkeys(parts, True)
    for batch in observe(model, batches):
        for name, value in batch.values.items():
            parts[name].append(plain(value, batch.rows, batch.count))
            whole[name] &= parts[name][-1].shape == (batch.count, *parts[name][0].shape[1:])
    return [np.concatenate(arrays) if whole[name] else arrays for name, arrays in parts.items()]


def user_metric(name: str) -> Metric:
    """The metric of a name ``module:function`` (``function(outputs, labels) -> float``, larger is better).

    Raises:
        OptionError: the function cannot be imported.
    """
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise OptionError(f"--metric '{name}': expected module:function, or one of {', '.join(MEASURES)}")
    function = user_function(name, f"--metric '{name}'")

    def metric(answers: Outputs, labels: Array | None) -> float:
        try:
            value = float(function(list(answers), labels))
        except Exception as error:  # whatever the user's function raises
            raise OptionError(f"--metric '{name}' failed: {type(error).__name__}: {error}") from error
        if not np.isfinite(value):
            raise OptionError(f"--metric '{name}' gave {value}; expected a finite number, larger for better")
        return value

    return metric


def built_in(name: str | None) -> bool:
    """Whether a metric is one of ours (or the default).

    Raises:
        OptionError: there is none of that name, and it is no ``module:function``.
    """
    if name is None or _letters(name) in map(_letters, MEASURES):
        return True
    user_metric(name)
    return False


def unknown_meaning(reading: Reading, asker: str) -> None:
    """Refuse to judge what nobody knows the meaning of.

    Raises:
        OptionError: what was seen, and what to give.
    """
    if reading.judged.kind in (Kind.UNKNOWN, Kind.OTHER) and reading.metric is None:
        ways = "--task classify, multilabel, segment, detect, embed or regress, --output-name NAME for another output, or --metric"
        raise OptionError(f"{asker}: nothing says what is right or wrong in {reading.judged!s}. Say what it is: {ways}.")


def parse_drop(text: str) -> float:
    """Read ``1%`` or ``0.01``: how much a metric may fall, in its own unit (shares for top-1).

    Raises:
        OptionError: not a number from 0 up to 1 (100 %), or a 1 that could mean 1 % or all.
    """
    try:
        value = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        value = -1.0
    if value >= 1 and not text.strip().endswith("%"):
        raise OptionError(f"--max-drop '{text}': {value:g} % is written {value:g}%, and everything may be lost with 100%")
    if not 0 <= value <= 1:
        raise OptionError(f"--max-drop '{text}': expected 1% or 0.01")
    return value


# ---- several models on the same data ---------------------------------------------------------------------------------


def evaluate(
    models: Iterable[ModelSource], data: Dataset, latency: Latency | None = AS_DEFAULT, progress: Progress = silent,
    how: Reading | MeasureOptions = MeasureOptions(), analysis: Analysis | None = None, energy: Latency | None = None,
) -> list[Evaluation]:  # fmt: skip
    """Measure models on the same data; the first is the reference.

    Args:
        latency: how the models are timed (None: they are not).
        how: what the outputs mean, or what is known of it. analysis: the first, analysed with these data.
        energy: how the models are run for the energy of a run (None: that is not told).

    Raises:
        ModelError, DataError: a model or the data cannot be used, labels out of range. OptionError: see `read`.
    """
    loaded = [load(model) for model in models]
    analysis = analysis or inspect(loaded[0], data=data)
    own = None if built_in(how.metric) else user_metric(str(how.metric))
    reading = how if isinstance(how, Reading) else reading_of(loaded[0], data, how, tokens=analysis.prepared.tokens)
    with progress("evaluating", data.samples) as advance:
        compared = measure(loaded, data.batches(), data.labels, reading, latency.setup.threads if latency else 0, advance)[0]
    metric, why = compared[0].metric
    for text in filter(None, (why, *(text for found in compared for text in found.missed))):
        log.warning(text)
    results = []
    for model, found in zip(loaded, compared, strict=True):
        size = replace(counted(model, analysis.prepared.feeds, analysis.samples), bytes=file_bytes(model))
        shares, figures = found.shares, found.figures
        judged = figures.setdefault(", ".join(found.reading.judged.outputs), {})
        if own is not None:
            judged[str(how.metric)] = own(outputs(model, data.batches()), data.labels)
        name = metric.name if own is None else str(how.metric)
        results.append(Evaluation(
            model.name, found.samples, **shares, relative_error=found.relative_error, size=size, metric=name, value=judged.get(name),
            measures=figures, worst=found.worst if found is not compared[0] else "", timing="", energy=""))  # fmt: skip
    times = latency.of_models(loaded, analysis) if latency else [{}] * len(results)
    joules = energies(loaded, analysis, [result.size for result in results], energy) if energy else [{}] * len(results)
    return [replace(result, **time, **own) for result, time, own in zip(results, times, joules, strict=True)]


# ---- is a model still as good as it was? -----------------------------------------------------------------------------


class Verdict(NamedTuple):
    """What was checked, whether it holds, and what was expected and found."""

    name: str
    passed: bool
    text: str


SIZES = {"macs": "MACs", "params": "parameters", "bytes": "bytes"}


@dataclass(frozen=True)
class GateOptions:
    """What the last of some measured models must hold: a ``baseline`` (a manifest made with --test-data, or what `evaluate --json`
    prints), how much accuracy may fall (``max_drop``: below the baseline, by default 0, else below the first model), and ``targets``."""

    baseline: Any = option(
        None, "Manifest (made with --test-data) or output of evaluate --json: the last model must hold its accuracy, MACs, parameters and "
        "bytes, else exit code 3.", AMOUNT, path=True)  # fmt: skip
    max_drop: str | None = option(
        None, "How much the measure of the task (top-1; without labels agreement) may fall: of the last model below --baseline (default "
        "0), else below the first model.", AMOUNT, metavar="1%")  # fmt: skip
    targets: tuple[str, ...] = option(
        (), "The last model must hold it: macs, params, size, memory, latency. Repeatable.", AMOUNT, flag="target", metavar="macs=50%"
    )


class Gate:
    """What the last model must hold; read before anything is measured."""

    def __init__(self, options: GateOptions, models: int) -> None:
        """Read the baseline and check the options.

        Raises:
            OptionError: unreadable, or nothing to compare with.
        """
        self.path, self.targets, self.models = options.baseline, options.targets, models
        read: tuple[dict[str, Any] | None, str | None] = (None, None) if options.baseline is None else read_baseline(options.baseline)
        self.base, self.sha256 = read
        self.limit = None if options.max_drop is None else parse_drop(options.max_drop)
        if models < 2 and (self.targets or (self.limit is not None and self.path is None)):
            raise OptionError("--max-drop and --target compare the last model with the first: give two models, or --baseline")

    def asks(self, what: str) -> bool:
        """Whether a target is on this figure."""
        return any(parse_target(text).what == what for text in self.targets)

    def verdicts(self, results: Sequence[Evaluation], data: Dataset, more: Mapping[str, Sequence[float]] | None = None) -> list[Verdict]:
        """Every check, whether it holds, and what was expected and found: accuracy may fall by the limit; below a baseline, MACs,
        parameters and bytes may not rise. ``more``: by name, figures of the first and the last model that the results do not hold.

        Raises:
            OptionError: nothing can be compared, or a target that `evaluate` does not measure.
        """
        verdicts: list[Verdict] = []
        if self.base is not None:
            if self.sha256 is not None and self.sha256 != data.sha256:
                log.warning(f"{self.path} was measured on other data than {data.name}; accuracies are compared all the same")
            verdicts.append(_drop(results[-1], self.base, self.limit or 0.0, self.models < 2))
            for key, name in SIZES.items():
                before, now = self.base["size"][key], getattr(results[-1].size, key)
                if before is not None and now is not None:
                    verdicts.append(Verdict(name, now <= before, f"{now:,.0f} (baseline {before:,.0f})"))
        elif self.limit is not None:
            verdicts.append(_drop(results[-1], asdict(results[0]), self.limit, alone=False))
        return verdicts + reached(results, self.targets, more or {})


def read_baseline(path: str | Path) -> tuple[dict[str, Any], str | None]:
    """Figures of the last model of a manifest (made with --test-data) or of what `evaluate --json` printed, and the data's SHA-256.

    Raises:
        OptionError: unreadable, or without figures.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        figures = data["evaluation"] if isinstance(data, dict) else data
        if not figures:
            raise OptionError(f"{path}: no accuracy in it. Write the manifest with --test-data, or give what `evaluate --json` prints.")
        last = dict(figures[-1])
        for key in ("top1", "agreement", *SIZES):
            value = (last["size"] if key in SIZES else last)[key]
            if value is not None and not isinstance(value, (int, float)):
                raise ValueError(f"'{key}' is no number")
        test = data.get("test_data") if isinstance(data, dict) else None
        return last, (test or {}).get("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise OptionError(f"{path}: cannot read the baseline: {error}. Expected a manifest, or what `evaluate --json` prints.") from error


def _drop(measured: Evaluation, base: Mapping[str, Any], limit: float, alone: bool) -> Verdict:
    """How far accuracy fell; ``alone``: no original was measured beside the model, so that what is relative to it means nothing."""
    name, key = measured.metric, next((key for key, own in FIELDS.items() if own == measured.metric), None)
    top1 = base.get("top1")
    if alone and name == "agreement" and measured.top1 is not None and top1 is not None:  # no better than chance
        if base.get("metric") == "top-1" or top1 - measured.top1 > limit + 1e-12:  # once it was better
            name, key = "top-1", "top1"
        else:
            raise OptionError("top-1 is no better than chance, and may never have been: it proves nothing. Give the original, too")
    before, now = base.get(key) if key else None, getattr(measured, key) if key else measured.value
    if before is None and base.get("metric") == name:
        before = base["value"]
    known = MEASURES.get(name)
    if before is None or now is None or (alone and known is not None and not known.labelled):
        ways = "give labels, or the original before the model (then their agreement is compared)"
        raise OptionError(f"there is no accuracy to compare: {ways}")
    fallen = now - before if known is not None and not known.larger else before - now
    text = f"{now:.2%} on {measured.samples} samples (baseline {before:.2%}, may {'rise' if now > before else 'fall'} by {limit:.2%})"
    return Verdict(TITLES.get(name, name), fallen <= limit + 1e-12, text)


def reached(results: Sequence[Evaluation], targets: Sequence[str], more: Mapping[str, Sequence[float]]) -> list[Verdict]:
    """Targets of the last model, with the first as the original.

    Raises:
        OptionError: a target that `evaluate` does not measure.
    """
    figures: list[dict[str, float]] = []
    for at, result in ((0, results[0]), (-1, results[-1])):
        size, latency = result.size, {} if result.latency_min_ms is None else {"latency": result.latency_min_ms / 1e3}
        counts = {"macs": float(size.macs), "params": float(size.params), "size": float(size.bytes or 0)}
        figures.append({**counts, **latency, **{name: values[at] for name, values in more.items()}})
    (before, now), parsed = figures, [parse_target(text) for text in targets]
    for target in parsed:
        if target.what not in now:
            raise OptionError(f"--target {target.what}: evaluate has {', '.join(now)} here")
    verdicts = []
    for what, bound in bounds(parsed, before).items():
        timed = FIGURES[what].timed
        text = f"{show(what, now[what])} (at most {show(what, bound)}{f'; {results[-1].timing}' if timed else ''})"
        verdicts.append(Verdict(f"target {what}", now[what] <= bound * (1 + (TIMED_NOISE if timed else 0.0)), text))
    return verdicts
