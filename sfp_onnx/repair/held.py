"""Constants that layers read: initializers, or integers that the graph itself dequantises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..records import Array

Get = Callable[[str], Array]
"""The present value of an initializer."""


@dataclass(frozen=True)
class Held:
    """The initializer ``name``; or, with a ``scale``, (name - zero_point) * scale, where scale and zero point are initializers of
    one value or of one per index of ``axis``. ``alone``: nothing else reads the scale, so that it may change."""

    name: str
    shape: tuple[int, ...]
    scale: str = ""
    zero_point: str = ""
    axis: int = 0
    alone: bool = False

    def value(self, get: Get) -> Array:
        """The constant as the layer sees it."""
        if not self.scale:
            return get(self.name)
        scale = get(self.scale)
        found: Array = (get(self.name).astype(scale.dtype) - self._zero(get).astype(scale.dtype)) * self._along(scale)
        return found

    def _along(self, vector: Array) -> Array:
        if vector.size == 1:
            return vector.reshape(())
        return vector.reshape([-1 if axis == self.axis % len(self.shape) else 1 for axis in range(len(self.shape))])

    def _zero(self, get: Get) -> Array:
        return self._along(get(self.zero_point)).astype(np.float64) if self.zero_point else np.zeros(())

    def nearest(self, get: Get, value: Array, ratio: Array | None = None) -> tuple[dict[str, Array], Array]:
        """Initializers that come nearest to a value, and the value that they then stand for. ``ratio``: factor on the scale (its shape)."""
        if not self.scale:
            stored = np.asarray(value.astype(get(self.name).dtype), order="C")
            return {self.name: stored}, stored
        scale, integers = get(self.scale), get(self.name)
        changed = {} if ratio is None else {self.scale: (scale * ratio).astype(scale.dtype)}
        steps = self._along(changed.get(self.scale, scale)).astype(np.float64)
        steps = np.where(steps == 0, 1.0, steps)
        limits = np.iinfo(integers.dtype)
        changed[self.name] = np.clip(np.rint(value / steps) + self._zero(get), limits.min, limits.max).astype(integers.dtype)
        found: Array = (changed[self.name].astype(np.float64) - self._zero(get)) * steps
        return changed, found

    def fitting(self, get: Get, value: Array) -> Array:
        """The factor on the scale with which a value just fits into the integers."""
        scale, limits = get(self.scale), np.iinfo(get(self.name).dtype)
        zero = self._zero(get)
        steps = np.maximum(value / np.maximum(limits.max - zero, 1), value / np.minimum(limits.min - zero, -1))
        axes = tuple(axis for axis in range(value.ndim) if scale.size == 1 or axis != self.axis % value.ndim)
        largest = steps.max(axes).reshape(scale.shape)
        found: Array = np.where((largest > 0) & (scale > 0), largest / np.where(scale > 0, scale, 1), 1.0)
        return found
