"""A few filters that show what class profiles say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from .. import profiles
from ..data import Dataset
from ..errors import SfpError
from ..profiles import ProfileOptions
from ..records import FloatArray, LayerProfile, Profiles
from .analysis import Analysis, Progress, silent
from .feeding import batch_size

PLACES = (1 / 3, 2 / 3, 1.0)
SAMPLES = 1024
T = TypeVar("T")


@dataclass(frozen=True)
class FilterExample:
    """One filter: its matrix (L, L), the field of each output of the probe on samples of each label, and the clusters in it."""

    layer: str
    filter: int
    accuracy: float
    matrix: FloatArray
    clusters: tuple[tuple[int, ...], ...]


def examples_of(known: Profiles | None) -> tuple[FilterExample, ...]:
    """The filter with the most ones inside its clusters and the fewest outside, from layers early, in the middle and last."""
    return _shown(_three([layer for layer in known.layers if len(layer.units)] if known else []))


def _shown(layers: Iterable[LayerProfile]) -> tuple[FilterExample, ...]:
    found = []
    for layer in layers:
        best = int(np.argmax(layer.signal - layer.noise))
        found.append(FilterExample(layer.layer, best, layer.accuracy, layer.matrix(best), layer.clusters[best]))
    return tuple(found)


def _three(items: Sequence[T]) -> list[T]:
    """Those at a third, at two thirds, and the last."""
    return [items[index] for index in sorted({min(int(len(items) * place), len(items) - 1) for place in PLACES})] if items else []


def few_examples(analysis: Analysis, data: Dataset | None, seed: int = 0, progress: Progress = silent) -> tuple[FilterExample, ...]:
    """The same from profiles of these three layers alone, on at most `SAMPLES` samples; none where there is no classifier or no data."""
    if data is None:
        return ()
    if data.samples > SAMPLES:
        data = data.part(np.sort(np.random.default_rng(seed).choice(data.samples, SAMPLES, replace=False)))
    options = ProfileOptions(seed=seed)
    try:
        output = profiles.classes_of(analysis.prepared, analysis.samples, "")
        taps, _ = profiles.taps(analysis.prepared, analysis.coupling, analysis.samples, options.pool)
        batches = replace(data, batch=batch_size(analysis, data)).batches()
        found = profiles.profile(analysis.prepared, _three(taps), output, (batches, data.samples, data.labels), options, "", progress)
    except SfpError:
        return ()  # a report can do without
    return _shown(layer for layer in found.layers if len(layer.units))
