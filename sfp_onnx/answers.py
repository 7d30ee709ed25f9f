"""What the first output of a classifier says, on values only."""

from __future__ import annotations

import numpy as np

from .records import Array, FloatArray

LEAST = 1e-12  # probabilities below are taken as this


def is_classifier(output: Array, samples: int) -> bool:
    """One row of at least two class scores per sample."""
    return output.dtype.kind == "f" and output.ndim == 2 and output.shape[0] == samples and output.shape[1] > 1


def log_probabilities(output: Array, temperature: float = 1.0) -> FloatArray:
    """Log of softmax(z / T) along the last axis, in float64, of logits z; rows that are probabilities already are taken as softmax(z)."""
    scores = output.astype(np.float64)
    if scores.size and (scores >= 0).all() and np.allclose(scores.sum(-1), 1, atol=1e-3):
        scores = np.log(np.maximum(scores, LEAST))
    scores = scores / temperature
    scores = scores - scores.max(-1, keepdims=True)
    normalised: FloatArray = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    return normalised
