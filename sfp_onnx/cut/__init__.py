"""Physical removal: slice every constant, let sizes follow, drop what is dead."""

from .apply import cut

__all__ = ["cut"]
