"""Layers that nobody trained: tables of cosines and sines, as exporters write a (short-time) Fourier transform."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..core.types import Array, Coupling, Pinned
from ..graph import Constants, Prepared

FOURIER = "it is a Fourier transform (--only cuts it)"
BESIDE = "it can only leave together with a Fourier transform (--only cuts them)"
FEWEST = 16  # rows and columns: smaller tables may look so by chance
SAMPLED, PEAK = 3, 0.8  # rows that are looked at first, and how much of such a row's energy its four largest frequencies have at least
STEPS = (1, 2)  # rows from one frequency to the next: cosines, then sines, or by turns
NEAR = 1e-3
MOST = 0.9  # of the rows: not those where sines begin behind cosines


def is_fourier(rows: Array) -> bool:
    """Whether rows are w(t) cos(2 pi k t / M), or sines, for one window w and k = 0, 1, ...

    cos((k + 1) x) + cos((k - 1) x) = 2 cos(x) cos(k x), and the same for sines: row k times f(t) = 2 cos(2 pi t / M) is the sum of the
    rows beside it, whatever the window; and f is a wave itself.
    """
    count, length = rows.shape
    if min(count, length) < FEWEST:
        return False
    energy = np.abs(np.fft.rfft(rows[count * np.arange(1, SAMPLED + 1) // (SAMPLED + 2)].astype(np.float64))) ** 2
    if not (np.sort(energy)[:, -4:].sum(1) > PEAK * energy.sum(1)).all():
        return False
    rows = rows / np.abs(rows).max().astype(np.float64)
    return any(_turns(rows[2 * step :] + rows[: -2 * step], rows[step:-step]) for step in STEPS)


def _turns(beside: Array, middle: Array) -> bool:
    """Whether ``beside`` is ``middle`` times a wave along the columns, in most rows; the first of them tell the wave."""
    few = max(2, len(middle) // 5)
    energy = (middle[:few] ** 2).sum(0)
    inside = np.flatnonzero(energy > NEAR * energy.max())
    wave = (beside[:few, inside] * middle[:few, inside]).sum(0) / energy[inside]
    good = np.abs(beside[:, inside] - wave * middle[:, inside]).max(1) < NEAR
    around, centre = wave[2:] + wave[:-2], wave[1:-1]
    apart = np.abs(around - (around @ centre) / (centre @ centre) * centre)
    return bool(good.mean() >= MOST and len(inside) > FEWEST / 2 and np.median(apart) < NEAR and np.ptp(wave) > 1)


def with_transforms(coupling: Coupling, prepared: Prepared) -> Coupling:
    """The same, with a word on the groups that such a layer makes: they stay unless it is named."""
    constants, found = Constants(prepared.model), set[str]()
    for layer in coupling.layers:
        weight = constants.get(layer.node.inputs[layer.weight.position]) if layer.weight and layer.free else None
        if layer.weight and weight is not None and weight.dtype.kind == "f":
            rows = np.moveaxis(weight, layer.weight.out_axis, 0)
            if is_fourier(rows.reshape(len(rows), -1)):
                found.add(layer.node.name)
    if not found:
        return coupling
    held = {name for group in coupling.groups if found.intersection(group.producers) for name in group.producers}
    free = {layer.node.name: layer.free for layer in coupling.layers if layer.node.name in held}
    pinned = tuple(Pinned(FOURIER if name in found else BESIDE, name, count, (name,)) for name, count in free.items())
    prunable = coupling.channels_prunable - sum(pin.channels for pin in pinned)
    return replace(coupling, transforms=frozenset(held), pinned=(*coupling.pinned, *pinned), channels_prunable=prunable)
