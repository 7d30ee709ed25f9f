"""Calibration data in batches that the memory can hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod

from ..data import Dataset
from ..records import Array
from .analysis import Analysis

ACTIVATION_BYTES = 512 * 2**20
BATCH, LEAST_BATCHES = 64, 8


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
    total = sum(prod(shape) for shape in analysis.prepared.trace.shapes.values()) * 4 / analysis.samples
    return max(1, min(data.batch, int(ACTIVATION_BYTES / max(total, 1))))
