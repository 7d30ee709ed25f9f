"""Calibration data in batches that the memory can hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod

import numpy as np

from .. import graph
from ..data import Dataset
from ..errors import OptionError
from ..records import Array
from .analysis import Analysis

ACTIVATION_BYTES = 512 * 2**20
BATCH, LEAST_BATCHES = 64, 8
PASS_BATCH = 32
IMAGE_RANK, MOST_COLOURS = 4, 4  # batch, channels, height and width, in either layout


def pass_batches(analysis: Analysis, data: Dataset) -> Iterator[tuple[Mapping[str, Array], int]]:
    """Inputs for the pass that collects class profiles, in batches whose feature maps are still in the caches when they are pooled."""
    most = data.batch if data.fixed else PASS_BATCH
    return replace(data, batch=min(most, batch_size(analysis, data))).batches()


def feeds_of(analysis: Analysis, data: Dataset, mirror: bool = False) -> Iterator[Mapping[str, Array]]:
    """Inputs in batches that are small enough to hold their activations, and (if possible) at least eight. ``mirror``: every image, and
    its mirror image in the same batch (in the next one, where the model fixes their size).

    Raises:
        OptionError: ``mirror`` for inputs that are no images.
    """
    if mirror and not any(len(port.shape or ()) == IMAGE_RANK for port in data.ports):
        raise OptionError("--mirror: expected images (an input of four dimensions); the model has none")
    if not data.fixed:
        most = min(BATCH, batch_size(analysis, data), data.samples // LEAST_BATCHES)
        data = replace(data, batch=max(1, most // 2 if mirror else most))
    for feeds, count in data.batches():
        feeds = feeds if data.fixed else {name: array[:count] for name, array in feeds.items()}
        if not mirror:
            yield feeds
            continue
        other = {name: _mirrored(array) for name, array in feeds.items()}
        if data.fixed:
            yield feeds
            yield other
        else:
            yield {name: np.concatenate([array, other[name]]) for name, array in feeds.items()}


def _mirrored(array: Array) -> Array:
    """Images with left and right exchanged; anything else as it is."""
    if array.ndim != IMAGE_RANK:
        return array
    channels_last = array.shape[-1] <= MOST_COLOURS < array.shape[1]
    return np.ascontiguousarray(np.flip(array, IMAGE_RANK - 2 if channels_last else IMAGE_RANK - 1))


def batch_size(analysis: Analysis, data: Dataset) -> int:
    """The data's batch size, less if all activations of one batch would take more than `ACTIVATION_BYTES`."""
    if data.fixed:
        return data.batch
    held = graph.initializers(analysis.prepared.model)
    total = sum(prod(shape) for name, shape in analysis.prepared.trace.shapes.items() if name not in held) * 4 / analysis.samples
    return max(1, min(data.batch, int(ACTIVATION_BYTES / max(total, 1))))
