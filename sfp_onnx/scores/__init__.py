"""Channel scores: plain functions from a view of one group to importance per unit (larger = keep)."""

from . import activations, weights  # noqa: F401  (registration)
from .registry import SCORES, Score

__all__ = ["SCORES", "Score"]
