"""Batches from any Python function: ``module:function``, called again for every pass over the data."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..extras import user_function
from ..records import Array, IntArray, Port
from .labels import LABEL_NAMES
from .readers import Opened

NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_call(source: object) -> bool:
    """Whether a source is ``module:function`` and no path that exists, or a function itself."""
    if callable(source):
        return True
    return isinstance(source, (str, Path)) and NAME.fullmatch(str(source)) is not None and not Path(source).exists()


def _batches(function: Callable[[], Any], name: str, ports: Sequence[Port]) -> Iterator[tuple[dict[str, Array], Array | None]]:
    """Arrays by input name, and labels, of every batch.

    Raises:
        DataError: the function fails, or yields something else.
    """
    wanted = [port.name for port in ports]
    try:
        for number, item in enumerate(function()):
            arrays, labels = _parts(item, wanted)
            if arrays is None or len({len(array) for array in [*arrays.values(), *([] if labels is None else [labels])]}) != 1:
                raise DataError(
                    f"{name}: batch {number} is no batch for the inputs {wanted}: expected an array, (array, labels), or a dict by "
                    "input name (and 'labels'), all with the same number of rows"
                )
            yield arrays, labels
    except DataError:
        raise
    except Exception as error:  # whatever the user's function raises
        raise DataError(f"{name} failed: {type(error).__name__}: {error}") from error


def _parts(item: Any, wanted: Sequence[str]) -> tuple[dict[str, Array] | None, Array | None]:
    labels: Any = None
    if isinstance(item, (tuple, list)) and len(item) == 2:
        item, labels = item
    if isinstance(item, Mapping):
        key = next((key for key in LABEL_NAMES if key in item and key not in wanted), None)
        labels = item[key] if key else labels
        arrays = {name: np.asarray(item[name]) for name in wanted if name in item}
    else:
        arrays = {wanted[0]: np.asarray(item)}
    if len(arrays) != len(wanted) or any(array.ndim < 1 or array.dtype.hasobject for array in arrays.values()):
        return None, None
    return arrays, None if labels is None else np.asarray(labels).reshape(-1)


@dataclass(frozen=True)
class Called:
    """One input's rows, from a fresh call of the function for every pass."""

    function: Callable[[], Any]
    name: str
    ports: tuple[Port, ...]
    port: str
    shape: tuple[int, ...]
    dtype: Any

    def rows(self, indices: IntArray, size: int) -> Iterator[Array]:
        """The rows ``indices`` (ascending), ``size`` at a time.

        Raises:
            DataError: fewer rows than in the first pass.
        """
        wanted = np.zeros(self.shape[0], bool)
        wanted[indices] = True
        held: list[Array] = []
        start = 0
        for arrays, _ in _batches(self.function, self.name, self.ports):
            array = arrays[self.port]
            if array.shape[1:] != self.shape[1:] or start + len(array) > self.shape[0]:
                break
            held.append(array[wanted[start : start + len(array)]])
            start += len(array)
            while sum(map(len, held)) >= size:
                joined = np.concatenate(held)
                yield joined[:size]
                held = [joined[size:]]
        if start != self.shape[0]:
            raise DataError(f"{self.name} gave other rows than in its first pass. It must give the same data whenever it is called.")
        rest = np.concatenate(held) if held else np.zeros((0, *self.shape[1:]), self.dtype)
        if len(rest):
            yield rest


def open_call(source: Any, ports: Sequence[Port]) -> Opened:
    """Run through the function once: rows are counted, hashed and checked, labels collected.

    Raises:
        OptionError: it cannot be imported. DataError: it yields no batches for the model.
    """
    name = str(source) if not callable(source) else getattr(source, "__name__", "the function")
    function: Callable[[], Any] = source if callable(source) else user_function(name, f"--data {name}")
    digest, labels, count = hashlib.sha256(), [], 0
    first: dict[str, Array] = {}
    for arrays, own in _batches(function, name, ports):
        first = first or {key: array[:1] for key, array in arrays.items()}
        for key, array in sorted(arrays.items()):
            if array.shape[1:] != first[key].shape[1:]:
                raise DataError(f"{name}: rows of '{key}' have shape {list(array.shape[1:])} and {list(first[key].shape[1:])}")
            digest.update(key.encode() + np.ascontiguousarray(array).tobytes())
        count += len(next(iter(arrays.values())))
        labels.append(own)
    if not first:
        raise DataError(f"{name}: it yields no batches.")
    if any(own is None for own in labels) and not all(own is None for own in labels):
        raise DataError(f"{name}: some batches have labels, some have none.")
    joined = None if labels[0] is None else np.concatenate([own for own in labels if own is not None])
    readers = {
        port.name: Called(function, name, tuple(ports), port.name, (count, *first[port.name].shape[1:]), first[port.name].dtype)
        for port in ports
    }
    return Opened(readers, name, digest.hexdigest(), joined)
