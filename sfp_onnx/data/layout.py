"""Which axis of each input runs over the samples, for feeds of any shape: states with the batch on a later axis, scalars, and inputs that
have no such axis at all."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from ..core.types import Array, Port

Shape = Sequence[int]
Axes = Mapping[str, "int | None"]
"""The sample axis of each input; None: all samples of one run share its value."""

LIKE_BATCH = re.compile(r"batch|^(n|b|bs)$", re.IGNORECASE)
UNNAMED = re.compile(r"unk|s\d+$|.*_?dim_?\d+$|$", re.IGNORECASE)  # what exporters call a dimension that nobody named


class Apart(Exception):
    """The inputs of a run have no common axis of samples; why."""


def batch_symbol(ports: Sequence[Port]) -> str | None:
    """The name of the dynamic dimension that counts samples: one that is called like a batch, else that of a first axis (of inputs with
    several; where others have a fixed batch, a name says that it is something else), and of these the one that most inputs have; None
    where the batch is fixed or has no name."""
    found: dict[str, list[int]] = {}
    several = [port.shape for port in ports if port.shape and len(port.shape) > 1]
    fixed = any(isinstance(shape[0], int) for shape in several)
    for port in ports:
        shape = port.shape or ()
        for axis, dim in enumerate(shape):
            first = axis == 0 and len(shape) > 1 and (not fixed or _anonymous(dim))
            if isinstance(dim, str) and dim and shape.count(dim) == 1 and (first or LIKE_BATCH.search(dim)):
                found.setdefault(dim, []).append(axis)
    return max(found, key=lambda name: (bool(LIKE_BATCH.search(name)), len(found[name]), -min(found[name])), default=None)


def sample_axes(ports: Sequence[Port], runs: Sequence[Mapping[str, Shape]]) -> dict[str, int | None]:
    """The sample axis of each input, the same for all of ``runs`` (shapes by input name).

    An array of one more dimension than its input, and one entry per sample, holds a value of its own for each: its axis is None, too.

    Raises:
        Apart: they have none in common.
    """
    symbol = batch_symbol(ports)
    leaders = [port for port in ports if symbol in (port.shape or ())] if symbol else sorted(filter(_many, ports), key=_doubt)
    leaders = leaders or [port for port in ports if port.shape == (1,)]
    if not leaders:
        return dict.fromkeys(port.name for port in ports)
    best: dict[str, int | None] | None = None
    why = "no array has an axis for samples"
    for leader in leaders:
        axis = leader.shape.index(symbol) if leader.shape and symbol else 0
        if any(len(run[leader.name]) <= axis for run in runs):
            continue
        counts = [run[leader.name][axis] for run in runs]
        size = leader.shape[axis] if leader.shape else None
        try:
            axes = {port.name: _placed(port, [run[port.name] for run in runs], counts, symbol, size) for port in ports}
        except Apart as error:
            why = str(error)
            continue
        if best is None or known(axes) > known(best):
            best = axes
    if best is None:
        raise Apart(why)
    return best


def known(axes: Axes) -> int:
    """How many inputs have a sample axis."""
    return sum(axis is not None for axis in axes.values())


def _many(port: Port) -> bool:
    """Whether an input can have several samples: all but scalars, and vectors of a named length that is no batch."""
    return port.shape is None or len(port.shape) > 1 or (len(port.shape) == 1 and not isinstance(port.shape[0], str) and port.shape != (1,))


def _anonymous(dim: int | str | None) -> bool:
    return dim is None or (isinstance(dim, str) and UNNAMED.match(dim) is not None)


def _doubt(port: Port) -> int:
    """First those inputs whose first axis may well be the batch."""
    first = port.shape[0] if port.shape else None
    return 0 if _anonymous(first) else 1 if isinstance(first, int) else 2


def _placed(port: Port, shapes: Sequence[Shape], counts: Sequence[int], symbol: str | None, size: int | str | None) -> int | None:
    """The sample axis of one input where the others have ``counts`` samples, on a dimension that is declared as ``size``."""
    dims = port.shape
    if dims is None:
        return 0 if all(shape and shape[0] == count for shape, count in zip(shapes, counts, strict=True)) else None
    if all(len(shape) == len(dims) + 1 and shape[0] == count for shape, count in zip(shapes, counts, strict=True)):
        return None
    if any(len(shape) != len(dims) for shape in shapes):
        return 0 if dims else None  # what does not fit is told by who checks shapes
    sure = [axis for axis, dim in enumerate(dims) if symbol and dim == symbol]
    options = sure or [axis for axis, dim in enumerate(dims) if not isinstance(dim, int) or dim == size]
    if not sure and any(count != 1 for count in counts):
        options += [axis for axis, dim in enumerate(dims) if dim == 1 and axis not in options]  # runs of one sample each
    for wanted in (counts, [1] * len(counts)) if sure else (counts,):
        for axis in options:
            if all(shape[axis] == count for shape, count in zip(shapes, wanted, strict=True)):
                return axis
    whole = all(not isinstance(dim, int) or dim == length for shape in shapes for dim, length in zip(dims, shape, strict=True))
    if sure or (dims and _anonymous(dims[0])) or not whole:
        if len(dims) > 0 and not sure and all(shape[0] == count for shape, count in zip(shapes, counts, strict=True)):
            return 0
        raise Apart(f"'{port.name}' has shape {list(shapes[0])}, others have {counts[0]} samples")
    return None


def rows_of(array: Array, axis: int | None, port: Port, count: int) -> Array:
    """An array of ``count`` samples with these along its first axis."""
    if axis is not None:
        array = np.moveaxis(array, axis, 0)
        return array if len(array) == count else np.broadcast_to(array, (count, *array.shape[1:]))
    each = port.shape is not None and array.ndim == len(port.shape) + 1 and len(array) == count
    return array if each else np.broadcast_to(array, (count, *array.shape))


def may_be_single(ports: Sequence[Port], axes: Axes) -> list[Port]:
    """Inputs that may hold the state of a single sample, though others leave the number of samples open: a dimension is fixed to 1, and
    none is that of the samples."""
    open_ = any(axes.get(port.name, 0) is not None and not all(isinstance(dim, int) for dim in port.shape or (None,)) for port in ports)
    return [port for port in ports if open_ and axes.get(port.name, 0) is None and len(port.shape or ()) > 1 and 1 in (port.shape or ())]


def count_of(axes: Axes, run: Mapping[str, Shape]) -> int:
    """How many samples a run (shapes by input name) holds; 1 where they have no common axis."""
    return max((run[name][axis] for name, axis in axes.items() if axis is not None), default=1)


def texts(array: Array) -> Array:
    """An array of texts or bytes as one of numpy's own texts; any other as it is."""
    if array.dtype.kind not in "SO" or not all(isinstance(item, (str, bytes)) for item in array.reshape(-1)):
        return array
    return np.asarray([item.decode() if isinstance(item, bytes) else item for item in array.reshape(-1)], np.str_).reshape(array.shape)


def fitted(array: Array, port: Port, single: bool = False) -> Array:
    """What is meant by an array without or with dimensions of size 1: scalars and vectors of one; a ``single`` sample without its axis."""
    shape = port.shape
    if shape in ((), (1,)) and array.size == 1:
        return array.reshape((1,) * len(shape or ()))
    if single and shape and array.ndim == len(shape) - 1:
        symbol = batch_symbol([port])
        return np.expand_dims(array, shape.index(symbol) if symbol in shape else 0)
    return array


def traced_samples(ports: Sequence[Port], shapes: Mapping[str, Shape]) -> int:
    """How many samples a run of these shapes holds; 1 where that cannot be told."""
    try:
        return max(1, count_of(sample_axes(ports, [shapes]), shapes))
    except Apart:
        return 1


def with_samples(ports: Sequence[Port], feeds: Mapping[str, Array], count: int) -> dict[str, Array]:
    """Inputs with another number of samples: those that there are, again and again, where the model leaves the number open."""
    try:
        axes = sample_axes(ports, [{name: array.shape for name, array in feeds.items()}])
    except Apart:
        return dict(feeds)
    resized = dict(feeds)
    for port in ports:
        axis, array = axes[port.name], feeds[port.name]
        if axis is not None and not (port.shape and isinstance(port.shape[axis], int)):
            resized[port.name] = np.take(array, np.arange(count) % array.shape[axis], axis)
    return resized
