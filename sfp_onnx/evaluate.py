"""Measure models on data: accuracy, agreement with the first model, divergence, size and latency."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from . import graph, runtime
from .answers import is_classifier, log_probabilities
from .errors import DataError
from .graph import Model
from .records import Array, Evaluation, IntArray, Size

LATENCY_REPEATS = 50


@dataclass
class Answers:
    """Running sums of one model against the reference model; mergeable by addition."""

    samples: int = 0
    right: int = 0
    agree: int = 0
    divergence: float = 0.0
    squared_error: float = 0.0
    squared_reference: float = 0.0


def add(answers: Answers, found: Sequence[Array], reference: Sequence[Array], labels: IntArray | None, count: int, batch: int) -> None:
    """Add one batch, of which the first ``count`` rows are samples.

    Classification figures use the first output; the relative error runs over all floating outputs.

    Raises:
        DataError: an output has another shape than that of the reference.
    """
    first, other = found[0][:count], reference[0][:count]
    answers.samples += count
    for own, original in zip(found, reference, strict=True):
        if own.dtype.kind == "f":
            rows = slice(count if len(own.shape) and len(own) == batch else None)  # without padding
            if own.shape != original.shape:
                raise DataError(f"outputs of shape {list(own.shape)} cannot be compared with {list(original.shape)} of the first model")
            a, b = own[rows].astype(np.float64), original[rows].astype(np.float64)
            answers.squared_error += float(((a - b) ** 2).sum())
            answers.squared_reference += float((b**2).sum())
    if not is_classifier(first, count):
        return
    answers.agree += int((first.argmax(1) == other.argmax(1)).sum())
    p, q = log_probabilities(other), log_probabilities(first)
    answers.divergence += float((np.exp(p) * (p - q)).sum())
    if labels is not None:
        answers.right += int((first.argmax(1) == labels).sum())


def measure(
    models: Sequence[Model],
    batches: Iterable[tuple[Mapping[str, Array], int]],
    labels: IntArray | None,
    threads: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[Answers], bool, Mapping[str, Array]]:
    """Run all models over the data once.

    Returns sums per model, whether the first output is that of a classifier, and the first batch (for timing).

    Raises:
        DataError: the models have other inputs or outputs than the first.
    """
    _same_interface(models)
    sessions = [runtime.open_session(graph.serialized(model), model.weights, model.name, threads=threads) for model in models]
    names = [port.name for port in graph.outputs(models[0])]
    answers = [Answers() for _ in models]
    first_feeds: Mapping[str, Array] = {}
    classifier, start = False, 0
    for feeds, count in batches:
        results = [session.run(feeds, names) for session in sessions]
        if not first_feeds:
            first_feeds = feeds
            classifier = is_classifier(results[0][0][:count], count)
        own_labels = None if labels is None else labels[start : start + count]
        for own, result in zip(answers, results, strict=True):
            add(own, result, results[0], own_labels, count, len(next(iter(feeds.values()))))
        start += count
        progress(count)
    return answers, classifier, first_feeds


def time_models(models: Sequence[Model], feeds: Mapping[str, Array], threads: int, repeats: int = LATENCY_REPEATS) -> list[list[float]]:
    """Seconds per run of each model, interleaved."""
    sessions = [runtime.open_session(graph.serialized(model), model.weights, model.name, threads=threads) for model in models]
    return runtime.latencies(sessions, feeds, repeats)


def _same_interface(models: Sequence[Model]) -> None:
    first = ([port.name for port in graph.inputs(models[0])], [port.name for port in graph.outputs(models[0])])
    for model in models[1:]:
        own = ([port.name for port in graph.inputs(model)], [port.name for port in graph.outputs(model)])
        if own != first:
            raise DataError(f"{model.name}: inputs and outputs {own} differ from those of {models[0].name}: {first}")


def summarize(
    name: str, answers: Answers, size: Size, times: tuple[Sequence[float], Sequence[float]] | None, known: tuple[bool, bool]
) -> Evaluation:
    """Figures of one model. ``times`` are its seconds and those of the reference; ``known`` is (classifier, labels given)."""
    classifier, labels = known
    samples = answers.samples
    return Evaluation(
        model=name,
        samples=samples,
        top1=answers.right / samples if classifier and labels else None,
        agreement=answers.agree / samples if classifier else None,
        kl=answers.divergence / samples if classifier else None,
        relative_error=float(np.sqrt(answers.squared_error / answers.squared_reference)) if answers.squared_reference else None,
        size=size,
        latency_min_ms=None if times is None else min(times[0]) * 1e3,
        latency_median_ms=None if times is None else float(np.median(times[0])) * 1e3,
        latency_ratio=None if times is None else min(times[0]) / min(times[1]),
    )
