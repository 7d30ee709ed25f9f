"""Calibration data in batches that the memory can hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod

from .. import graph
from ..data import Dataset
from ..records import Array
from .analysis import Analysis

ACTIVATION_BYTES = 512 * 2**20
BATCH, LEAST_BATCHES = 64, 8
PASS_BATCH = 32


def pass_batches(analysis: Analysis, data: Dataset) -> Iterator[tuple[Mapping[str, Array], int]]:
    """Inputs for the pass that collects class profiles, in batches whose feature maps are still in the caches when they are pooled."""
    most = data.batch if data.fixed else PASS_BATCH
    return replace(data, batch=min(most, batch_size(analysis, data))).batches()


def feeds_of(analysis: Analysis, data: Dataset) -> Iterator[Mapping[str, Array]]:
    """Inputs in batches that are small enough to hold their activations, and (if possible) at least eight."""
    if not data.fixed:
        data = replace(data, batch=max(1, min(BATCH, batch_size(analysis, data), data.samples // LEAST_BATCHES)))
    for feeds, count in data.batches():
        yield feeds if data.fixed else {name: array[:count] for name, array in feeds.items()}


def batch_size(analysis: Analysis, data: Dataset) -> int:
    """The data's batch size, less if all activations of one batch would take more than `ACTIVATION_BYTES`."""
    if data.fixed:
        return data.batch
    held = graph.initializers(analysis.prepared.model)
    total = sum(prod(shape) for name, shape in analysis.prepared.trace.shapes.items() if name not in held) * 4 / analysis.samples
    return max(1, min(data.batch, int(ACTIVATION_BYTES / max(total, 1))))
