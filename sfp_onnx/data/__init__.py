"""From raw values to what a model takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..core.errors import OptionError

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
        for name, values, low in (("mean", self.mean or (), -math.inf), ("std", self.std or (), 0), ("scale", scale, 0)):
            if not all(low < value < math.inf for value in values):
                raise OptionError(f"--{name} {','.join(map(str, values))}: expected {'positive' if low == 0 else 'finite'} numbers")
        for name, sizes in (("resize", self.resize), ("center-crop", self.center_crop)):
            if sizes is not None and not (1 <= len(sizes) <= 2 and all(1 <= size <= 1 << 14 for size in sizes)):
                raise OptionError(f"--{name} {'x'.join(map(str, sizes))}: expected pixels, such as 224 or 224x320 (height x width)")
        if self.color not in ("rgb", "bgr"):
            raise OptionError(f"--color {self.color}: expected rgb or bgr")
        if self.resample not in RESAMPLING:
            raise OptionError(f"resample '{self.resample}': expected one of {', '.join(RESAMPLING)}")
