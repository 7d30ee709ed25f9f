"""Pulling arms fast: what the outputs become when one unit is masked, for many units and few images."""

from .engine import ROWS, Block, Pulls, Running
from .parts import Part, parts, share

__all__ = ["ROWS", "Block", "Part", "Pulls", "Running", "parts", "share"]
