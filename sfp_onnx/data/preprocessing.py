"""From raw values to what a model takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import OptionError


@dataclass(frozen=True)
class Preprocessing:
    """From raw values to the model's input: layout, then ``(x / scale - mean) / std`` per channel.

    ``scale`` is the value range of the raw data (255 for 8-bit images); ``layout`` is that of the data ("nhwc" is moved to NCHW).
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float | None = None
    layout: str = "nchw"

    @property
    def given(self) -> bool:
        """Whether values are changed at all."""
        return self.mean is not None or self.std is not None or self.scale is not None

    def check(self) -> None:
        """Check the numbers themselves.

        Raises:
            OptionError: not finite, or division by zero.
        """
        scale = () if self.scale is None else (self.scale,)
        for name, values, low in (("mean", self.mean or (), -math.inf), ("std", self.std or (), 0), ("scale", scale, 0)):
            if not all(low < value < math.inf for value in values):
                raise OptionError(f"--{name} {','.join(map(str, values))}: expected {'positive' if low == 0 else 'finite'} numbers")
