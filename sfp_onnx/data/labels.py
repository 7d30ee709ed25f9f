"""Labels: read and checked."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import DataError
from ..records import Array, IntArray
from .readers import DAMAGED

LABEL_NAMES = ("labels", "label", "y", "targets")


def load_labels(source: str | Path | Array) -> Array:
    if isinstance(source, np.ndarray):
        return source
    path = Path(source)
    try:
        loaded = np.load(path)
        if isinstance(loaded, np.ndarray):
            return loaded
        names = [key for key in LABEL_NAMES if key in loaded.files] or loaded.files
        if len(names) != 1:
            raise DataError(f"{path}: which of the arrays {loaded.files} holds the labels? Name it 'labels'.")
        return np.asarray(loaded[names[0]])
    except DAMAGED as error:
        raise DataError(f"{path}: cannot read labels (.npy or .npz expected): {getattr(error, 'strerror', None) or error}") from error


def check_labels(labels: Array, count: int, name: str) -> IntArray:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        hint = "Number the classes as the model's outputs, from 0 on."
        if labels.ndim == 2 and np.issubdtype(labels.dtype, np.number):
            hint = "If they are one-hot, give their argmax(1)."
        elif labels.ndim == 1 and labels.dtype.kind == "f":
            hint = "Save them as integers: labels.astype(int)."
        raise DataError(f"{name}: labels must be one integer per sample, found {labels.dtype} of shape {list(labels.shape)}. {hint}")
    if len(labels) != count:
        raise DataError(f"{name}: {len(labels)} labels for {count} samples. Give one for each, in the order of the samples.")
    return labels.astype(np.int64)
