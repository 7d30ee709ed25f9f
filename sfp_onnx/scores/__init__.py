"""Channel scores: plain functions from a view of one group to importance per unit (larger = keep)."""

from . import activations, classes, errors, weights  # noqa: F401  (registration)
from .registry import SCORES, Score, combined, parts

__all__ = ["SCORES", "Score", "combined", "parts"]
