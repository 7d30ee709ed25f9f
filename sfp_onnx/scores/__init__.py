"""Importance of coupled channels (larger = keep), in a registry."""

from importlib import import_module

from ..core import PLUGINS
from . import weights  # noqa: F401  (registration)

for name in PLUGINS:
    import_module(name)
