"""Other ways in which images could have been meant to be read, applied to what a model is fed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.types import Array
from .dataset import Dataset

Change = Callable[[Array], Array]
BRIGHT = 2.0  # values above are no shares of the full brightness


@dataclass(frozen=True)
class Normal:
    """A usual normalisation of values in [0, 1], and what it is called."""

    words: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    preset: str = ""

    def option(self, grey: bool, scale: str) -> str:
        """How it is asked for."""
        mean, std = (",".join(f"{value:g}" for value in _fitting(values, grey)) for values in (self.mean, self.std))
        given = f"{scale}--mean {mean} --std {std}" if self.mean != (0.0,) else "--scale 255 alone"
        return f"--preset {self.preset}, or {given}" if self.preset and not grey else given


NORMALS = (
    Normal("ImageNet's mean and std", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "imagenet"),
    Normal("CIFAR-10's mean and std", (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616), "cifar10"),
    Normal("values in [-1, 1]", (0.5,), (0.5,), "tf"),
    Normal("values in [0, 1]", (0.0,), (1.0,)),
    Normal("MNIST's mean and std", (0.1307,), (0.3081,)),
)


def _fitting(values: tuple[float, ...], grey: bool) -> tuple[float, ...]:
    return (round(sum(values) / len(values), 4),) if grey else values


@dataclass(frozen=True)
class Reading:
    """Another reading: in words, as a change of what is fed, and whether it only normalises otherwise."""

    words: str
    change: Change
    normal: bool = False


def readings(data: Dataset) -> Iterator[Reading]:
    """Other readings of data that are one input of images: channels reversed, other ranges, other mean and std. Where it is known how the
    values were normalised, that is undone first."""
    port, steps = data.ports[0], data.preprocessing
    shape = port.shape or ()
    if len(data.ports) != 1 or len(shape) != 4 or shape[data.axis] not in (1, 3) or np.dtype(port.dtype).kind != "f":
        return
    grey = shape[data.axis] == 1
    if not grey:
        yield Reading("with the colour channels reversed (--color bgr for images)", lambda x: np.flip(x, data.axis))
    first = next(data.part(np.arange(min(8, data.samples))).batches())[0][port.name]
    used: Any = None
    if steps.given:
        whole = np.dtype(data.readers[port.name].dtype).kind in "iu" or steps.scale == 255
        used = np.float32((steps.scale or 1) / (255 if whole else 1)), steps.mean or (0.0,), steps.std or (1.0,)
        first = _to_shares(first, used, data.axis)
    bright = first.max() > BRIGHT
    if used is None and not bright:
        yield Reading("with values times 255 (--scale 1 for raw 8-bit images)", lambda x: x * 255)
    if used is not None and steps.scale != 1:
        yield Reading("with values in [0, 255] (--scale 1)", lambda x: _to_shares(x, used, data.axis) * 255)
    if bright:
        yield Reading("with values divided by 255 (--scale 255)", lambda x: x / 255)
    for normal in NORMALS:
        mean, std = (_fitting(values, grey) for values in (normal.mean, normal.std))
        now = ((0.0,), (1.0,)) if used is None else used[1:] if used[0] == 1 else None
        if now is not None and _same(now[0], mean) and _same(now[1], std):
            continue
        words, change = f"with {normal.words}", _normalised(mean, std, used, data.axis, 255 if bright else 1)
        if used is None:
            words += " after a division by 255" if bright else ""
        yield Reading(f"{words} ({normal.option(grey, '--scale 255 ' if used is not None or bright else '')})", change, True)


def _same(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return bool(np.allclose(np.broadcast_to(one, 3), np.broadcast_to(other, 3), atol=2e-3))


def _vector(values: tuple[float, ...], axis: int) -> Array:
    return np.asarray(values, np.float32).reshape([-1 if at == axis % 4 else 1 for at in range(4)])


def _to_shares(x: Array, used: Any, axis: int) -> Array:
    """What was fed, back to values in [0, 1]."""
    return np.asarray((x * _vector(used[2], axis) + _vector(used[1], axis)) * used[0])


def _normalised(mean: tuple[float, ...], std: tuple[float, ...], used: Any, axis: int, scale: float) -> Change:
    def change(x: Array) -> Array:
        shares = x / scale if used is None else _to_shares(x, used, axis)
        return np.asarray((shares - _vector(mean, axis)) / _vector(std, axis))

    return change
