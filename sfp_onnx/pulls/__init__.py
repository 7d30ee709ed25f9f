"""Pulling arms fast: what the outputs become when one unit is masked, for many units and few images."""

from .engine import Block, Pulls, Running
from .parts import Part, parts, share

__all__ = ["Block", "Part", "Pulls", "Running", "parts", "share"]
