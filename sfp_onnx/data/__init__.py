"""From raw values to what a model takes, and the sources that give raw values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ..core.errors import OptionError
from ..core.types import Array, IntArray

RESAMPLING = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


@dataclass(frozen=True)
class Preprocessing:
    """From raw values to the model's input: layout, then ``(x / scale - mean) / std`` per channel.

    ``scale`` is the value range of the raw data (255 for 8-bit images); ``layout`` is that of the data ("nhwc" is moved to NCHW).
    The rest is for files of images, in this order: ``resize`` to (shorter side,) or (height, width), with ``letterbox`` padded to keep
    the aspect; ``center_crop`` (height, width); ``color`` order of the model's channels.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float | None = None
    layout: str = "nchw"
    resize: tuple[int, ...] | None = None
    center_crop: tuple[int, int] | None = None
    color: str = "rgb"
    resample: str = "bilinear"
    letterbox: bool = False

    @property
    def given(self) -> bool:
        """Whether values are changed at all."""
        return self.mean is not None or self.std is not None or self.scale is not None

    def check(self) -> None:
        """Check the numbers themselves.

        Raises:
            OptionError: not finite, division by zero, sizes under 1, unknown names.
        """
        scale = () if self.scale is None else (self.scale,)
        for name, values, low in (("mean", self.mean or (), -np.inf), ("std", self.std or (), 0), ("scale", scale, 0)):
            if not all(low < value < np.inf for value in values):
                raise OptionError(f"--{name} {','.join(map(str, values))}: expected {'positive' if low == 0 else 'finite'} numbers")
        for name, sizes in (("resize", self.resize), ("center-crop", self.center_crop)):
            if sizes is not None and not (1 <= len(sizes) <= 2 and all(1 <= size <= 1 << 14 for size in sizes)):
                raise OptionError(f"--{name} {'x'.join(map(str, sizes))}: expected pixels, such as 224 or 224x320 (height x width)")
        if self.color not in ("rgb", "bgr"):
            raise OptionError(f"--color {self.color}: expected rgb or bgr")
        if self.resample not in RESAMPLING:
            raise OptionError(f"resample '{self.resample}': expected one of {', '.join(RESAMPLING)}")


# ---- sources of data -------------------------------------------------------------------------------------------------


class Reader(Protocol):
    """Rows of one array on disk or in memory."""

    @property
    def shape(self) -> tuple[Any, ...]:
        """Shape of the whole array; None where rows differ."""

    @property
    def dtype(self) -> Any:
        """Its numpy type."""

    def rows(self, chunks: Iterable[IntArray]) -> Iterator[Array]:
        """The rows of each chunk of indices (ascending over all of them)."""


@dataclass(frozen=True)
class Memory:
    """An array in memory or memory-mapped."""

    array: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def rows(self, chunks: Iterable[IntArray]) -> Iterator[Array]:
        return (np.asarray(self.array[chunk]) for chunk in chunks)


@dataclass(frozen=True)
class Opened:
    """A source that was opened. ``labels`` are its own; ``steps`` replace those that were asked for; ``axis`` holds the channels of the
    rows as the model takes them. ``axes``: the sample axis of each input where that is not the first (None: it has none); ``groups``:
    samples that may run together have the same number, consecutively (None: all may); ``class_names``: by label."""

    readers: Mapping[str, Reader]
    name: str
    sha256: str
    labels: Array | None = None
    notes: tuple[str, ...] = ()
    steps: Preprocessing | None = None
    axis: int = 1
    axes: Mapping[str, int | None] = field(default_factory=dict)
    groups: IntArray | None = None
    class_names: tuple[str, ...] = ()
