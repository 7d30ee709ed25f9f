"""Positive definite systems by Cholesky factors, in blocks of matrix products: numpy has the factor, but no triangular solver."""

from __future__ import annotations

import numpy as np

from .records import FloatArray

SMALL = 128  # below, a general solver is as fast


def factor(matrix: FloatArray, strength: float) -> FloatArray:
    """Lower L with L L' = matrix + strength I; ``matrix`` (k, k) is symmetric and changed on its diagonal.

    A matrix whose rounding errors are larger than ``strength`` takes as much more as it needs (ten times as much at a time); one that is
    not finite gives NaN.
    """
    size = np.arange(len(matrix))
    diagonal = matrix[size, size].copy()
    strength = max(strength, float(np.finfo(np.float32).tiny))
    while np.isfinite(strength):
        matrix[size, size] = diagonal + strength
        try:
            return np.asarray(np.linalg.cholesky(matrix), np.float64)
        except np.linalg.LinAlgError:
            strength *= 10
    return np.full_like(matrix, np.nan)


def forward(lower: FloatArray, right: FloatArray) -> FloatArray:
    """L^-1 B for L (k, k), B (k, n)."""
    size = len(lower)
    if size <= SMALL:
        return np.asarray(np.linalg.solve(lower, right), np.float64)
    half = size // 2
    first = forward(lower[:half, :half], right[:half])
    return np.concatenate([first, forward(lower[half:, half:], right[half:] - lower[half:, :half] @ first)])


def backward(lower: FloatArray, right: FloatArray) -> FloatArray:
    """L'^-1 B for L (k, k), B (k, n)."""
    size = len(lower)
    if size <= SMALL:
        return np.asarray(np.linalg.solve(lower.T, right), np.float64)
    half = size // 2
    last = backward(lower[half:, half:], right[half:])
    return np.concatenate([backward(lower[:half, :half], right[:half] - lower[half:, :half].T @ last), last])


def positive_solve(matrix: FloatArray, right: FloatArray, strength: float) -> FloatArray:
    """(matrix + strength I)^-1 B. The diagonal of ``matrix`` is changed."""
    lower = factor(matrix, strength)
    return backward(lower, forward(lower, right))


def positive_inverse(matrix: FloatArray, strength: float) -> FloatArray:
    """(matrix + strength I)^-1, symmetric. The diagonal of ``matrix`` is changed."""
    lower = factor(matrix, strength)
    half = _lower_inverse(lower)
    del lower
    found: FloatArray = half.T @ half
    return found


def _lower_inverse(lower: FloatArray) -> FloatArray:
    """L^-1, itself lower triangular."""
    size = len(lower)
    if size <= SMALL:
        return np.asarray(np.tril(np.linalg.inv(lower)), np.float64)
    half = size // 2
    found = np.zeros_like(lower)
    found[:half, :half], found[half:, half:] = _lower_inverse(lower[:half, :half]), _lower_inverse(lower[half:, half:])
    found[half:, :half] = -found[half:, half:] @ (lower[half:, :half] @ found[:half, :half])
    return found
