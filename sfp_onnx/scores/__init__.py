"""Importance of channels: plain functions from a view of one group to one value per unit (larger = keep)."""

from . import weights  # noqa: F401  (registration)
