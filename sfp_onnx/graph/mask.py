"""Putting a 0/1 mask behind a tensor: what zero means depends on the type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np

from ..records import Array
from .edit import Editor
from .view import Constants

FIRST_WHERE = 9  # opset
WITH_WHERE = ("float32", "float64", "int32", "int64")  # other types have no Where in onnxruntime
QUANTIZED = ("int4", "uint4", "int8", "uint8", "int16", "uint16")


def insert_mask(
    editor: Editor, name: str, dtype: np.dtype[Any], mask: Callable[[Any], Any], zero: Array | str | None = None, select: bool = False
) -> None:
    """Let all readers of tensor ``name`` see 0 (in a quantised tensor: its zero point) where a mask is 0.

    Args:
        dtype: type of the tensor.
        mask: gives the operand for the mask in the type asked for (bool, or ``dtype``).
        zero: zero point of a quantised tensor (see `zero_of`).
        select: zero even what is infinite or NaN, where onnxruntime can (slower than a product).
    """
    tensor = editor.tensor(name)
    if isinstance(zero, np.ndarray):  # through int32: not every onnxruntime has a Where for int8
        point = editor.constant(f"{name}/zero", zero)
        editor.insert_after(tensor, "Cast", attributes={"to": dtype.type})
        editor.insert_after(tensor, "Where", [mask(bool), point], first=1)
        editor.insert_after(tensor, "Cast", attributes={"to": np.int32})
    elif zero is not None:
        editor.insert_after(tensor, "Where", [mask(bool), editor.tensor(zero)], first=1)
    elif not select or editor.model.opset < FIRST_WHERE or dtype.name not in WITH_WHERE:
        editor.insert_after(tensor, "And" if dtype.kind == "b" else "Mul", [mask(dtype)])
    else:
        editor.insert_after(tensor, "Where", [mask(bool), editor.constant(f"{name}/zero", np.zeros((), dtype))], first=1)


def insert_shift(editor: Editor, name: str, shift: Any) -> None:
    """Let all readers of tensor ``name`` see it plus a shift; call it before `insert_mask`, so that the mask comes first."""
    editor.insert_after(editor.tensor(name), "Add", [shift])


def zero_of(constants: Constants, zero_point: str | None, shape: Sequence[int]) -> Array | str | None:
    """The zero point of a quantised tensor: its value in int32 where it is a constant (one per channel takes ``shape``), else its name."""
    if zero_point is None or zero_point not in constants:
        return zero_point
    value = constants[zero_point].astype(np.int32)
    if value.size == prod(shape):
        return value.reshape(shape)
    return np.asarray(value.flat[0] if np.ptp(value) == 0 else value)
