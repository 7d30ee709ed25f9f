"""Proof that the cut did what the plan says: pruned(x) == original(x) with the planned channels masked to zero."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from . import graph, runtime
from .errors import VerificationError
from .graph import Model
from .records import Array, Cut, Verification

FIRST_WHERE = 9  # opset
WITH_WHERE = ("float32", "float64", "int32", "int64")  # other types have no Where in onnxruntime
QUANTIZED = ("int4", "uint4", "int8", "uint8", "int16", "uint16")
ROUNDING_STEP = 2e-2  # a last-bit difference before a QuantizeLinear may flip one of its 2^8 steps
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2}


def masked(model: Model, cuts: Iterable[Cut], zero_points: Mapping[str, str] | None = None) -> Model:
    """The original model with the removed channels of every listed tensor set to zero, or to its zero point if it is one of
    ``zero_points`` (quantised tensor -> tensor with its zero point)."""
    editor, points = graph.Editor(model), zero_points or {}
    types = _types(model, points)
    for cut in cuts:
        dtype = types(cut.tensor)
        shape = [1] * cut.rank
        shape[cut.axis] = cut.size
        mask = np.ones(cut.size, bool)
        mask[list(cut.removed)] = False
        tensor, name = editor.tensor(cut.tensor), f"{cut.tensor}/mask"
        if model.opset < FIRST_WHERE or dtype.name not in (*WITH_WHERE, *QUANTIZED):
            editor.insert_after(tensor, "And" if dtype.kind == "b" else "Mul", [editor.constant(name, mask.reshape(shape).astype(dtype))])
        else:
            point = points.get(cut.tensor) if dtype.name in QUANTIZED else None
            zero = editor.constant(f"{cut.tensor}/zero", np.zeros((), dtype)) if point is None else editor.tensor(point)
            editor.insert_after(tensor, "Where", [editor.constant(name, mask.reshape(shape)), zero], first=1)
    return editor.finish()


def _types(model: Model, zero_points: Mapping[str, str]) -> Callable[[str], np.dtype[Any]]:
    """Dtype of a tensor: inferred, else that of its zero point, else float32."""
    types = graph.tensor_types(model)
    return lambda name: np.dtype(types.get(name) or types.get(zero_points.get(name, "")) or np.float32)


def maskable(model: Model, cuts: Iterable[Cut], zero_points: Mapping[str, str], quantized: bool) -> list[Cut]:
    """Cuts of tensors in which a removed channel is a zero; with ``quantized`` also of those whose zero point is known."""
    types = _types(model, zero_points)
    return [cut for cut in cuts if types(cut.tensor).name not in QUANTIZED or (quantized and cut.tensor in zero_points)]


def relative_error(found: Array, expected: Array) -> float:
    """max |found - expected| / max |expected| (equal non-finite values agree; integers and strings must be equal).

    Infinity for other shapes or types.
    """
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    if not expected.size:
        return 0.0
    if expected.dtype.kind != "f":
        return 0.0 if (found == expected).all() else float("inf")
    a, b = found.astype(np.float64), expected.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if not np.isfinite(a[~same]).all() or not np.isfinite(b[~same]).all():
        return float("inf")
    scale = np.abs(b[np.isfinite(b)]).max(initial=0.0)
    difference = np.abs(a[~same] - b[~same]).max(initial=0.0)
    return float(difference / scale) if scale else float(difference)


def compare(
    original: Model,
    pruned: Model,
    cuts: Sequence[Cut],
    feeds: Mapping[str, Mapping[str, Array]],
    zero_points: Mapping[str, str] | None = None,
) -> Verification:
    """Run the pruned model and the masked original on each of ``feeds`` (name -> inputs), without onnxruntime's optimisations.

    Raises:
        VerificationError: an output differs by more than the tolerance of its type (1e-4 for float32).
    """
    reference = masked(original, cuts, zero_points)
    sessions = [runtime.open_session(graph.serialized(model), model.weights, model.name, optimize=False) for model in (pruned, reference)]
    names = [port.name for port in graph.outputs(original)]
    errors: dict[str, float] = {}
    limit = 0.0
    for kind, inputs in feeds.items():
        found, expected = (session.run(inputs, names) for session in sessions)
        for name, own, other in zip(names, found, expected, strict=True):
            error, tolerance = _judge(own, other)
            tolerance = max(tolerance, ROUNDING_STEP) if zero_points else tolerance
            errors[kind] = max(errors.get(kind, 0.0), error)
            limit = max(limit, tolerance)
            if not error <= tolerance:
                raise VerificationError(
                    f"{original.name}: output '{name}' of the pruned model differs from the masked original by {error:.3g} "
                    f"(relative, {kind} input; allowed {tolerance:g}). Nothing was written. Please report this model; "
                    f"--keep on the layers near '{cuts[0].tensor if cuts else name}' may work around it."
                )
    return Verification(errors, limit)


def _judge(found: Any, expected: Any) -> tuple[float, float]:
    if isinstance(expected, np.ndarray):
        return relative_error(found, expected), TOLERANCE.get(str(expected.dtype), 0.0)
    return (0.0 if str(found) == str(expected) else float("inf")), 0.0
