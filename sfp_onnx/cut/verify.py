"""Proof that the cut did what the plan says: pruned(x) == original(x) with the planned channels masked to zero."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..core.errors import ModelError, VerificationError
from ..core.types import Array, Cut
from ..graph import Constants, Model, outputs
from ..graph.edit import QUANTIZED, Editor, insert_mask, zero_of
from ..runtime import Feeds, Optimize, open_model

ROUNDING_STEP = 2e-2  # a last-bit difference before a QuantizeLinear may flip one of its 2^8 steps
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2}


@dataclass(frozen=True)
class Verification:
    """Largest relative difference between the pruned model and the masked original, per kind of input."""

    errors: Mapping[str, float]
    tolerance: float


def masked(model: Model, types: Mapping[str, Any], cuts: Iterable[Cut]) -> Model:
    """The original model with the removed channels of every listed tensor set to zero (also where they are infinite)."""
    editor, constants = Editor(model), Constants(model)
    for cut in cuts:
        dtype = np.dtype(types.get(cut.tensor) or types.get(cut.zero_point or "") or np.float32)
        shape = [1] * cut.rank
        shape[cut.axis] = cut.size
        mask = np.ones(cut.size, bool)
        mask[list(cut.removed)] = False
        put = _constant(editor, f"{cut.tensor}/mask", mask.reshape(shape))
        insert_mask(editor, cut.tensor, dtype, put, zero_of(constants, cut.zero_point, shape), select=True)
    return editor.finish()


def _constant(editor: Editor, name: str, mask: Array) -> Callable[[Any], Any]:
    return lambda dtype: editor.constant(name, mask.astype(dtype))


def maskable(types: Mapping[str, Any], cuts: Iterable[Cut], zero_points: Mapping[str, str]) -> list[Cut]:
    """Cuts with the zero point of quantised tensors; those whose zero point is unknown are left out."""
    listed = []
    for cut in cuts:
        point = zero_points.get(cut.tensor)
        dtype = np.dtype(types.get(cut.tensor) or types.get(point or "") or np.float32)
        if dtype.name not in QUANTIZED:
            listed.append(cut)
        elif point is not None:
            listed.append(replace(cut, zero_point=point))
    return listed


def relative_error(output: Any, expected: Any) -> float:
    """max |output - expected| / max |expected| (equal non-finite values agree; all but floating arrays must be equal).

    Infinity for other shapes or types.
    """
    if not isinstance(expected, np.ndarray):
        return 0.0 if str(output) == str(expected) else float("inf")
    if output.shape != expected.shape or output.dtype != expected.dtype:
        return float("inf")
    if not expected.size:
        return 0.0
    if expected.dtype.kind != "f":
        return 0.0 if (output == expected).all() else float("inf")
    a, b = output.astype(np.float64), expected.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if not np.isfinite(a[~same]).all() or not np.isfinite(b[~same]).all():
        return float("inf")
    scale = np.abs(b[np.isfinite(b)]).max(initial=0.0)
    difference = np.abs(a[~same] - b[~same]).max(initial=0.0)
    return float(difference / scale) if scale else float(difference)


def compare(original: Model, pruned: Model, types: Mapping[str, Any], cuts: Sequence[Cut], feeds: Mapping[str, Feeds]) -> Verification:
    """Run the pruned model and the masked original on each of ``feeds`` (name -> inputs), without onnxruntime's optimisations.

    Raises:
        VerificationError: an output differs by more than the tolerance of its type (1e-4 for float32).
    """
    sessions = [open_model(model, Optimize.NONE) for model in (pruned, masked(original, types, cuts))]
    names = [port.name for port in outputs(original)]
    floor = _coarsest(types, cuts)
    errors: dict[str, float] = {}
    limit = 0.0
    for kind, inputs in feeds.items():
        pruned_outputs, expected = (session.run(inputs, names) for session in sessions)
        for name, output, other in zip(names, pruned_outputs, expected, strict=True):
            error, tolerance = relative_error(output, other), max(floor, TOLERANCE.get(str(getattr(other, "dtype", "")), 0.0))
            errors[kind] = max(errors.get(kind, 0.0), error)
            limit = max(limit, tolerance)
            if not error <= tolerance:
                differs = f"differs from the masked original by {error:.3g} (relative, {kind} input; allowed {tolerance:g})"
                way = f"Please report this model; --keep on the layers near '{cuts[0].tensor if cuts else name}' may work around it."
                raise VerificationError(f"{original.name}: output '{name}' of the pruned model {differs}. Nothing was written. {way}")
    return Verification(errors, limit)


def _coarsest(types: Mapping[str, Any], cuts: Sequence[Cut]) -> float:
    """Tolerance of the coarsest arithmetic inside: half precision, or the rounding of quantised tensors."""
    half = any(dtype == np.float16 for dtype in types.values() if dtype is not None)
    steps = any(cut.zero_point is not None for cut in cuts)
    return max(TOLERANCE["float16"] if half else 0.0, ROUNDING_STEP if steps else 0.0)


def runs_at(original: Model, pruned: Model, inputs: Feeds, shapes: bool) -> None:
    """Run both models on inputs of other dynamic sizes, with constant folding, which believes the shapes recorded in the file.

    ``shapes``: compare the shapes of the outputs too (some depend on values, so this is for want of a comparison of those).

    Raises:
        VerificationError: the pruned model does not run there, or gives other shapes.
    """
    sessions = [open_model(model, Optimize.BASIC) for model in (original, pruned)]
    names = [port.name for port in outputs(original)]
    expected = [np.shape(value) for value in sessions[0].run(inputs, names)]
    sizes = {name: list(array.shape) for name, array in inputs.items()}
    try:
        shapes_after = [np.shape(value) for value in sessions[1].run(inputs, names)]
    except ModelError as error:
        raise VerificationError(f"{original.name}: the pruned model fails on inputs of shape {sizes}: {error}") from error
    if shapes and shapes_after != expected:
        differ = f"the pruned model gives outputs of shape {shapes_after}, the original {expected}"
        raise VerificationError(f"{original.name}: on inputs of shape {sizes} {differ}. Nothing was written. Please report this model.")
