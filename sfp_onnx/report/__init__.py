"""report"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PLUGIN_SECTIONS: list[Callable[..., list[Any]]] = []
"""What plug-ins add to the pages: (candidates, data, progress) -> sections."""
