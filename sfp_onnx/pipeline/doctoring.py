"""Does this installation work?"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .. import graph, runtime, scratch
from ..extras import PACKAGES
from ..latency import cache_folder
from ..records import PlanOptions
from .analysis import load
from .cutting import prune
from .manifest import versions

EXTRAS = {"images": "PIL", "report": "jinja2"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; ``good`` None: optional, and not there."""

    name: str
    good: bool | None
    text: str


def examine() -> list[Finding]:
    """Look at versions, providers, the cache, temporary space and extras, and prune a tiny model end to end."""
    checks: dict[str, Callable[[], str]] = {
        "python": lambda: f"{platform.python_version()} on {platform.platform()}",
        "packages": lambda: ", ".join(f"{name} {version}" for name, version in versions().items()),
        "providers": lambda: ", ".join(runtime.providers()),
        "cores": lambda: str(os.cpu_count()),
        "cache folder": _cache,
        "temporary folder": lambda: _writable(Path(tempfile.gettempdir())),
        "prune": _prune,
    }
    found = [_tried(name, own) for name, own in checks.items()]
    for extra, module in EXTRAS.items():
        there = find_spec(module) is not None
        text = "installed" if there else f"not installed; if you want it: pip install {PACKAGES.get(module, module)}"
        found.append(Finding(f"extra {extra}", True if there else None, text))
    if sys.version_info < (3, 11):
        there = find_spec("tomli") is not None
        found.append(Finding("extra toml", True if there else None, "installed" if there else "for --config: pip install tomli"))
    return found


def _tried(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, check())
    except Exception as error:  # whatever is broken here is the finding
        return Finding(name, False, f"{type(error).__name__}: {error}")


def _writable(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as stream:
        stream.write(b"0" * 4096)
    return f"{folder} is writable"


def _cache() -> str:
    try:
        return _writable(cache_folder())
    except OSError as error:
        raise OSError(f"{cache_folder()} cannot be written: {error.strerror or error}. Set SFP_ONNX_CACHE to a folder that can.") from error


def _prune() -> str:
    """Prune, save, load and run a tiny chain of convolutions."""
    result = prune(graph.conv_chain(8, layers=2, side=4), PlanOptions(ratio=0.5))
    with tempfile.TemporaryDirectory(dir=scratch.folder()) as folder:
        saved = load(result.save(Path(folder) / "pruned.onnx"))
        runtime.open_session(graph.serialized(saved), saved.weights, saved.name)
    assert result.verification is not None
    error = max(result.verification.errors.values())
    return f"a model of two convolutions: pruned, verified (relative difference {error:.1e}), saved, loaded"
