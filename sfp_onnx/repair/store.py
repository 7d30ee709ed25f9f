"""Arrays that a run must remember between segments: in memory up to a budget, the rest in one temporary file."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np

from ..records import Array


@dataclass(frozen=True)
class _Place:
    offset: int
    shape: tuple[int, ...]
    dtype: Any


@dataclass
class Store:
    """Arrays by key. The file has no name in the file system (where the system allows it), so that nothing is left behind,
    however the program ends; space of dropped arrays is used again."""

    budget: int
    used: int = 0
    spilled: int = 0
    _memory: dict[tuple[str, int], Array] = field(default_factory=dict)
    _places: dict[tuple[str, int], _Place] = field(default_factory=dict)
    _free: dict[int, list[int]] = field(default_factory=dict)
    _file: IO[bytes] | None = None
    _end: int = 0

    def put(self, key: tuple[str, int], array: Array) -> None:
        """Remember an array."""
        if self.used + array.nbytes <= self.budget:
            self.used += array.nbytes
            self._memory[key] = array
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="sfp_onnx")  # noqa: SIM115 - lives as long as the store
        free = self._free.get(array.nbytes)
        offset = free.pop() if free else self._end
        self._end = max(self._end, offset + array.nbytes)
        self.spilled = max(self.spilled, self._end)
        self._file.seek(offset)
        self._file.write(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
        self._places[key] = _Place(offset, array.shape, array.dtype)

    def get(self, key: tuple[str, int]) -> Array:
        """An array that was put."""
        if key in self._memory:
            return self._memory[key]
        place = self._places[key]
        array = np.empty(place.shape, place.dtype)
        assert self._file is not None
        self._file.seek(place.offset)
        self._file.readinto(array.data.cast("B")) if array.size else None  # type: ignore[attr-defined]
        return array

    def drop(self, key: tuple[str, int]) -> None:
        """Forget an array."""
        if key in self._memory:
            self.used -= self._memory.pop(key).nbytes
        elif key in self._places:
            place = self._places.pop(key)
            size = int(np.prod(place.shape)) * np.dtype(place.dtype).itemsize
            self._free.setdefault(size, []).append(place.offset)

    def close(self) -> None:
        """Forget everything and remove the file."""
        self._memory.clear()
        if self._file is not None:
            self._file.close()
