"""What a model is worth on data: top-1, agreement with the original, or a function of the user."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from . import graph, runtime
from .errors import DataError, OptionError
from .extras import user_function
from .graph import Model
from .records import Array, BoolArray, IntArray

Metric = Callable[[Sequence[Array], "IntArray | None", Sequence[Array]], float]
"""(outputs, labels, outputs of the original) -> value, larger is better; the first axis of all runs over the samples."""


def outputs(model: Model, batches: Iterable[tuple[Mapping[str, Array], int]]) -> list[Array]:
    """All outputs of a model on (inputs, number of real samples), joined along the first axis.

    Raises:
        ModelError: onnxruntime cannot run it. DataError: an output has no sample axis.
    """
    session = runtime.open_session(graph.serialized(model), model.weights, model.name)
    names = [port.name for port in graph.outputs(model)]
    parts: list[list[Array]] = [[] for _ in names]
    for feeds, count in batches:
        size = len(next(iter(feeds.values())))
        for own, value, name in zip(parts, session.run(feeds, names), names, strict=True):
            if not value.ndim or len(value) != size:
                raise DataError(f"{model.name}: output '{name}' of shape {list(value.shape)} has no axis for the {size} samples of a batch")
            own.append(value[:count])
    return [np.concatenate(own) for own in parts]


def right(found: Sequence[Array], labels: IntArray | None, original: Sequence[Array]) -> BoolArray:
    """Which samples have their largest class score at their label."""
    assert labels is not None
    return np.asarray(found[0].argmax(1) == labels)


def same(found: Sequence[Array], labels: IntArray | None, original: Sequence[Array]) -> BoolArray:
    """Which samples get the same class as from the original."""
    return np.asarray(found[0].argmax(1) == original[0].argmax(1))


EACH: Mapping[str, Callable[[Sequence[Array], IntArray | None, Sequence[Array]], BoolArray]]
EACH = {"top-1": right, "agreement with the original": same}
"""The metrics that are shares of samples, as one value per sample."""


def _share(name: str) -> Metric:
    return lambda found, labels, original: float(EACH[name](found, labels, original).mean())


def metric_for(name: str | None, labelled: bool, original: Sequence[Array]) -> tuple[str, Metric]:
    """The metric of a name ``module:function`` (``function(outputs, labels) -> float``), else top-1 with labels, else agreement.

    ``original`` are the outputs of the original model.

    Raises:
        OptionError: the function cannot be imported, or the model is no classifier and no function is given.
    """
    if name is not None:
        return name, _imported(name)
    first = original[0]
    if first.dtype.kind != "f" or first.ndim != 2 or first.shape[1] < 2:
        shape = list(first.shape)
        raise OptionError(f"--max-drop: the first output, of shape {shape}, has no row of class scores per sample. Give --metric.")
    own = "top-1" if labelled else "agreement with the original"
    return own, _share(own)


def _imported(name: str) -> Metric:
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise OptionError(f"--metric '{name}': expected module:function")
    function = user_function(name, f"--metric '{name}'")

    def metric(found: Sequence[Array], labels: IntArray | None, original: Sequence[Array]) -> float:
        try:
            value = float(function(list(found), labels))
        except Exception as error:  # whatever the user's function raises
            raise OptionError(f"--metric '{name}' failed: {type(error).__name__}: {error}") from error
        if not np.isfinite(value):
            raise OptionError(f"--metric '{name}' gave {value}; expected a finite number, larger for better")
        return value

    return metric


def parse_drop(text: str) -> float:
    """Read ``1%`` or ``0.01``: how much a metric may fall, in its own unit (shares for top-1).

    Raises:
        OptionError: not a number from 0 up to 1 (100 %).
    """
    try:
        value = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise OptionError(f"--max-drop '{text}': expected 1% or 0.01")
    return value


