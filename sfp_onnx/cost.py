"""What a model costs: multiply-accumulates and parameters, before and after a removal, without cutting anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .records import BoolArray, Channels, Coupling, Layer, Size
from .units import keep_mask


@dataclass(frozen=True)
class Parameter:
    """An initializer of floating or quantised weights: its shape and the unit-carrying axes of each distinct use."""

    shape: tuple[int, ...]
    uses: tuple[Channels, ...]


def layer_macs(layer: Layer, removed: BoolArray) -> float:
    """Multiply-accumulates of a layer: proportional to each extent that the removal shortens."""
    macs = layer.macs
    for units in layer.extents:
        macs *= float(keep_mask(units, removed).mean()) if len(units) else 1.0
    return macs


def macs(coupling: Coupling, removed: BoolArray, samples: int) -> float:
    """Multiply-accumulates for one sample; ``samples`` is the batch size of the traced run."""
    return sum(layer_macs(layer, removed) for layer in coupling.layers) / samples


def params(parameters: Iterable[Parameter], removed: BoolArray) -> int:
    """Number of weights that stay. Uses of one initializer that are cut differently count separately."""
    total = 0
    for parameter in parameters:
        sizes = set()
        for channels in parameter.uses:
            shape = list(parameter.shape)
            key = []
            for own in channels:
                mask = keep_mask(own.units, removed)
                shape[own.axis] = int(mask.sum())
                key.append((own.axis, mask.tobytes() if not mask.all() else b""))
            sizes.add((tuple(item for item in key if item[1]), int(np.prod(shape))))
        total += sum(size for _, size in sizes)
    return total


def parameters(
    shapes: Mapping[str, tuple[int, ...]], uses: Mapping[str, Sequence[tuple[int, int]]], coupling: Coupling
) -> list[Parameter]:
    """Parameters of a model from shapes and uses (node, position) of its initializers."""
    found = []
    for name, shape in shapes.items():
        found.append(Parameter(shape, tuple(coupling.constants.get(use, ()) for use in uses.get(name, ())) or ((),)))
    return found


def size(coupling: Coupling, weights: Sequence[Parameter], removed: BoolArray, samples: int) -> Size:
    """MACs and parameters after a removal."""
    return Size(macs(coupling, removed, samples), params(weights, removed))
