"""A few filters that show what class profiles say."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..records import FloatArray, Profiles

PLACES = (1 / 3, 2 / 3, 1.0)


@dataclass(frozen=True)
class FilterExample:
    """One filter: its matrix (L, L), the field of each output of the probe on samples of each label, and the clusters in it."""

    layer: str
    filter: int
    accuracy: float
    matrix: FloatArray
    clusters: tuple[tuple[int, ...], ...]


def examples_of(profiles: Profiles | None) -> tuple[FilterExample, ...]:
    """The filter with the most ones inside its clusters and the fewest outside, from layers early, in the middle and last."""
    layers = [layer for layer in profiles.layers if len(layer.units)] if profiles else []
    chosen = sorted({min(int(len(layers) * place), len(layers) - 1) for place in PLACES}) if layers else []
    found = []
    for layer in (layers[index] for index in chosen):
        best = int(np.argmax(layer.signal - layer.noise))
        found.append(FilterExample(layer.layer, best, layer.accuracy, layer.matrix(best), layer.clusters[best]))
    return tuple(found)
