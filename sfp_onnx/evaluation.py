"""Measure models on data: accuracy, agreement with the first model, divergence, size and latency; and what the last must hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import graph
from .core.errors import DataError, OptionError
from .core.options import AMOUNT, option
from .core.system import log, user_function
from .core.types import Array, BoolArray, FloatArray, IntArray, Size
from .coupling.analysis import Progress, counted, inspect, silent
from .data.dataset import Dataset
from .graph.load import ModelSource, load
from .graph.save import file_bytes
from .planning import bounds, parse_target, show
from .runtime import Batches, Feeds, Observed, Session, latencies, observe, open_model, side_by_side

LATENCY_REPEATS = 50


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model on data; None where it does not apply. ``latency_ratio`` is to the first model, from
    the minima of interleaved runs."""

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


@dataclass
class Answers:
    """Running sums of one model against the reference model; mergeable by addition."""

    samples: int = 0
    right: int = 0
    agree: int = 0
    divergence: float = 0.0
    squared_error: float = 0.0
    squared_reference: float = 0.0

    @property
    def relative_error(self) -> float | None:
        """Root mean square of the difference by that of the reference; None if that is 0 or nothing is floating."""
        return float(np.sqrt(self.squared_error / self.squared_reference)) if self.squared_reference else None

    def shares(self, classifier: bool, labelled: bool) -> dict[str, float | None]:
        """Fields of `Evaluation` that are means over the samples; None where they do not apply."""
        return {
            "top1": self.right / self.samples if classifier and labelled else None,
            "agreement": self.agree / self.samples if classifier else None,
            "kl": self.divergence / self.samples if classifier else None,
        }


def add(answers: Answers, observed: Observed, reference: Observed, labels: IntArray | None) -> None:
    """Add one batch; ``labels`` are those of all samples.

    Classification figures use the first output; the relative error runs over all floating outputs.

    Raises:
        DataError: an output has another shape than that of the reference.
    """
    count = observed.count
    first, other = observed.outputs[0][:count], reference.outputs[0][:count]
    answers.samples += count
    for output, original in zip(observed.outputs, reference.outputs, strict=True):
        if output.dtype.kind == "f":
            rows = slice(count if len(output.shape) and len(output) == observed.rows else None)  # without padding
            if output.shape != original.shape:
                raise DataError(f"outputs of shape {list(output.shape)} cannot be compared with {list(original.shape)} of the first model")
            a, b = output[rows].astype(np.float64), original[rows].astype(np.float64)
            answers.squared_error += float(((a - b) ** 2).sum())
            answers.squared_reference += float((b**2).sum())
    if not is_classifier(first, count):
        return
    answers.agree += int((first.argmax(1) == other.argmax(1)).sum())
    p, q = log_probabilities(other), log_probabilities(first)
    answers.divergence += float((np.exp(p) * (p - q)).sum())
    if labels is not None:
        answers.right += int((first.argmax(1) == observed.own(labels)).sum())


def tally(
    sessions: Sequence[Session], names: Sequence[str], batches: Batches, labels: IntArray | None, pairs: Sequence[tuple[int, int]],
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[Answers], bool, Feeds]:  # fmt: skip
    """Run sessions over the data once.

    Returns sums for each of ``pairs`` (a session and the one that it is compared with, by their positions), whether the first of the
    outputs ``names`` is that of a classifier, and the first batch (for timing).

    Raises:
        DataError: an output has another shape than that of the reference.
    """
    answers: list[Answers] = [Answers() for _ in pairs]
    first_feeds: Feeds = {}
    classifier = False
    for batch in side_by_side(sessions, batches, names):
        if not first_feeds:
            first_feeds, classifier = batch[0].feeds, is_classifier(batch[0].samples(names[0]), batch[0].count)
        for sums, (one, other) in zip(answers, pairs, strict=True):
            add(sums, batch[one], batch[other], labels)
        progress(batch[0].count)
    return answers, classifier, first_feeds


def measure(
    models: Sequence[graph.Model], batches: Batches, labels: IntArray | None, threads: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[Answers], bool, Feeds]:  # fmt: skip
    """Run all models over the data once. As `tally`, all against the first model.

    Raises:
        DataError: the models have other inputs or outputs than the first.
    """
    interfaces = [tuple([port.name for port in ends(model)] for ends in (graph.inputs, graph.outputs)) for model in models]
    for model, interface in zip(models, interfaces, strict=True):
        if interface != interfaces[0]:
            raise DataError(f"{model.name}: inputs and outputs {interface} differ from those of {models[0].name}: {interfaces[0]}")
    sessions = [open_model(model, threads=threads) for model in models]
    return tally(sessions, interfaces[0][1], batches, labels, [(number, 0) for number in range(len(models))], progress)


# ---- what the first output of a classifier says ----------------------------------------------------------------------

LEAST = 1e-12  # probabilities below are taken as this


def is_classifier(output: Array, samples: int) -> bool:
    """One row of at least two class scores per sample."""
    return output.dtype.kind == "f" and output.ndim == 2 and output.shape[0] == samples and output.shape[1] > 1


def log_probabilities(output: Array, temperature: float = 1.0) -> FloatArray:
    """Log of softmax(z / T) along the last axis, in float64, of logits z; rows that are probabilities already are taken as softmax(z)."""
    scores = output.astype(np.float64)
    if scores.size and (scores >= 0).all() and np.allclose(scores.sum(-1), 1, atol=1e-3):
        scores = np.log(np.maximum(scores, LEAST))
    scores = scores / temperature
    scores = scores - scores.max(-1, keepdims=True)
    return np.asarray(scores - np.log(np.exp(scores).sum(-1, keepdims=True)))


# ---- what a model is worth on data -----------------------------------------------------------------------------------

Metric = Callable[[Sequence[Array], "IntArray | None", Sequence[Array]], float]
"""(outputs, labels, outputs of the original) -> value, larger is better; the first axis of all runs over the samples."""


def outputs(model: graph.Model, batches: Batches) -> list[Array]:
    """All outputs of a model on (inputs, number of real samples), joined along the first axis.

    Raises:
        ModelError: onnxruntime cannot run it. DataError: an output has no sample axis.
    """
    parts: dict[str, list[Array]] = {port.name: [] for port in graph.outputs(model)}
    for batch in observe(model, batches):
        for name, value in batch.values.items():
            if not value.ndim or len(value) != batch.rows:
                size = f"the {batch.rows} samples of a batch"
                raise DataError(f"{model.name}: output '{name}' of shape {list(value.shape)} has no axis for {size}")
            parts[name].append(batch.samples(name))
    return [np.concatenate(arrays) for arrays in parts.values()]


def right(answers: Sequence[Array], labels: IntArray | None, original: Sequence[Array]) -> BoolArray:
    """Which samples have their largest class score at their label."""
    assert labels is not None
    return np.asarray(answers[0].argmax(1) == labels)


def same(answers: Sequence[Array], labels: IntArray | None, original: Sequence[Array]) -> BoolArray:
    """Which samples get the same class as from the original."""
    return np.asarray(answers[0].argmax(1) == original[0].argmax(1))


EACH = {"top-1": right, "agreement with the original": same}
"""The metrics that are shares of samples, as one value per sample."""


def metric_for(name: str | None, labelled: bool, original: Sequence[Array]) -> tuple[str, Metric]:
    """The metric of a name ``module:function`` (``function(outputs, labels) -> float``), else top-1 with labels, else agreement.

    ``original`` are the outputs of the original model.

    Raises:
        OptionError: the function cannot be imported, or the model is no classifier and no function is given.
    """
    if name is not None:
        return name, _imported(name)
    shape = list(original[0].shape)
    if not is_classifier(original[0], len(original[0])):
        raise OptionError(f"--max-drop: the first output, of shape {shape}, has no row of class scores per sample. Give --metric.")
    default = "top-1" if labelled else "agreement with the original"
    return default, lambda answers, labels, original: float(EACH[default](answers, labels, original).mean())


def _imported(name: str) -> Metric:
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise OptionError(f"--metric '{name}': expected module:function")
    function = user_function(name, f"--metric '{name}'")

    def metric(answers: Sequence[Array], labels: IntArray | None, original: Sequence[Array]) -> float:
        try:
            value = float(function(list(answers), labels))
        except Exception as error:  # whatever the user's function raises
            raise OptionError(f"--metric '{name}' failed: {type(error).__name__}: {error}") from error
        if not np.isfinite(value):
            raise OptionError(f"--metric '{name}' gave {value}; expected a finite number, larger for better")
        return value

    return metric


def parse_drop(text: str) -> float:
    """Read ``1%`` or ``0.01``: how much a metric may fall, in its own unit (shares for top-1).

    Raises:
        OptionError: not a number from 0 up to 1 (100 %).
    """
    try:
        value = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise OptionError(f"--max-drop '{text}': expected 1% or 0.01")
    return value


# ---- several models on the same data ---------------------------------------------------------------------------------


def evaluate(
    models: Iterable[ModelSource], data: Dataset, latency: bool = True, threads: int = 0, progress: Progress = silent
) -> list[Evaluation]:
    """Measure models on the same data; the first is the reference.

    Raises:
        ModelError, DataError: a model or the data cannot be used, labels out of range.
    """
    loaded = [load(model) for model in models]
    analysis = inspect(loaded[0], data=data)
    with progress("evaluating", data.samples) as advance:
        answers, classifier, feeds = measure(loaded, data.batches(), data.labels, threads, advance)
    sessions = [open_model(model, threads=threads) for model in loaded] if latency else []
    times = latencies(sessions, feeds, LATENCY_REPEATS)
    results = []
    for model, sums in zip(loaded, answers, strict=True):
        size = replace(counted(model, analysis.prepared.feeds, analysis.samples), bytes=file_bytes(model))
        shares = sums.shares(classifier, data.labels is not None)
        results.append(Evaluation(model.name, sums.samples, **shares, relative_error=sums.relative_error, size=size))
    for number, seconds in enumerate(times):
        least, median = min(seconds) * 1e3, float(np.median(seconds)) * 1e3
        ratio = min(seconds) / min(times[0])
        results[number] = replace(results[number], latency_min_ms=least, latency_median_ms=median, latency_ratio=ratio)
    return results


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
        None, "How much top-1 (without labels: agreement) may fall: of the last model below --baseline (default 0), else below the first "
        "model.", AMOUNT, metavar="1%")  # fmt: skip
    targets: tuple[str, ...] = option(
        (), "The last model must hold it: macs, params, size. Repeatable.", AMOUNT, flag="target", metavar="macs=50%"
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

    def verdicts(self, results: Sequence[Evaluation], data: Dataset) -> list[Verdict]:
        """Every check, whether it holds, and what was expected and found: accuracy may fall by the limit; below a baseline, MACs,
        parameters and bytes may not rise.

        Raises:
            OptionError: nothing can be compared, or a target that `evaluate` does not measure.
        """
        verdicts: list[Verdict] = []
        if self.base is not None:
            if self.sha256 is not None and self.sha256 != data.sha256:
                log.warning(f"{self.path} was measured on other data than {data.name}; accuracies are compared all the same")
            verdicts += _drop(results[-1], self.base, self.limit or 0.0, self.models < 2)
            for key, name in SIZES.items():
                before, now = self.base["size"][key], getattr(results[-1].size, key)
                if before is not None and now is not None:
                    verdicts.append(Verdict(name, now <= before, f"{now:,.0f} (baseline {before:,.0f})"))
        elif self.limit is not None:
            verdicts += _drop(results[-1], asdict(results[0]), self.limit, alone=False)
        return verdicts + reached(results, self.targets)


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


def _drop(measured: Evaluation, base: Mapping[str, Any], limit: float, alone: bool) -> list[Verdict]:
    """How far accuracy fell; ``alone``: no original was measured beside the model, so that agreement means nothing."""
    for key, name in (("top1", "top-1"), ("agreement", "agreement with the original")):
        before, now = base[key], getattr(measured, key)
        if before is not None and now is not None and not (key == "agreement" and alone):
            text = f"{now:.2%} on {measured.samples} samples (baseline {before:.2%}, may fall by {limit:.2%})"
            return [Verdict(name, before - now <= limit + 1e-12, text)]
    raise OptionError("there is no accuracy to compare: give labels, or the original before the model (then their agreement is compared)")


def reached(results: Sequence[Evaluation], targets: Sequence[str]) -> list[Verdict]:
    """Targets of the last model, with the first as the original.

    Raises:
        OptionError: a target that `evaluate` does not measure.
    """
    sizes = (results[0].size, results[-1].size)
    before, now = ({"macs": float(size.macs), "params": float(size.params), "size": float(size.bytes or 0)} for size in sizes)
    parsed = [parse_target(text) for text in targets]
    for target in parsed:
        if target.what not in now:
            raise OptionError(f"--target {target.what}: evaluate checks macs, params and size")
    return [
        Verdict(f"target {what}", now[what] <= bound, f"{show(what, now[what])} (at most {show(what, bound)})")
        for what, bound in bounds(parsed, before).items()
    ]
