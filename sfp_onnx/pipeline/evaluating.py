"""Measure models on data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from .. import graph
from ..data import Dataset
from ..evaluate import measure, summarize, time_models
from ..records import Evaluation
from .analysis import ModelSource, Progress, inspect, load, silent


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
