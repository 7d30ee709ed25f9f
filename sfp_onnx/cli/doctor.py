"""Does this installation work?"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from ..core import system
from ..core.errors import TargetError
from ..core.options import PlanOptions
from ..core.system import quiet, versions
from ..graph.extract import conv_chain
from ..graph.load import load
from ..latency.measure import cache_folder
from ..pipeline.pruned import prune
from ..runtime import open_model, providers
from . import arguments as take
from .common import answer, say

EXTRAS = {"images": "PIL", "report": "jinja2", **({"toml": "tomli"} if sys.version_info < (3, 11) else {})}


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
        "providers": lambda: ", ".join(providers()), "cores": lambda: str(os.cpu_count()),
        "cache folder": lambda: _writable(cache_folder(), "Set SFP_ONNX_CACHE to a folder that can."),
        "temporary folder": lambda: _writable(Path(tempfile.gettempdir()), "Set TMPDIR to a folder that can."),
        "prune": _prune,
    }  # fmt: skip
    findings = []
    for name, check in checks.items():
        try:
            findings.append(Finding(name, True, check()))
        except Exception as error:  # whatever is broken here is the finding
            findings.append(Finding(name, False, f"{type(error).__name__}: {error}"))
    for extra, module in EXTRAS.items():
        there = find_spec(module) is not None
        text = "installed" if there else f"not installed; if you want it: pip install {system.PACKAGES.get(module, module)}"
        findings.append(Finding(f"extra {extra}", True if there else None, text))
    return findings


def _writable(folder: Path, hint: str) -> str:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(b"0" * 4096)
    except OSError as error:
        raise OSError(f"{folder} cannot be written: {error.strerror or error}. {hint}") from error
    return f"{folder} is writable"


def _prune() -> str:
    """Prune, save, load and run a tiny chain of convolutions."""
    with quiet():
        result = prune(conv_chain(8, layers=2, side=4), PlanOptions(ratio=0.5))
    with tempfile.TemporaryDirectory(dir=system.folder()) as folder:
        open_model(load(result.save(Path(folder) / "pruned.onnx")))
    assert result.verification is not None
    error = max(result.verification.errors.values())
    return f"a model of two convolutions: pruned, verified (relative difference {error:.1e}), saved, loaded"


MARKS = {True: "ok", False: "BROKEN", None: "-"}


@take.command("doctor", take.json_option)
def command(as_json: bool) -> None:
    """Check the installation: versions, providers, folders, a tiny prune end to end.

    Example: sfp-onnx doctor
    """
    findings = examine()
    lines = [f"{MARKS[finding.good]:7} {finding.name}: {finding.text}" for finding in findings]
    answer([asdict(finding) for finding in findings] if as_json else "\n".join(lines))
    broken = [finding.name for finding in findings if finding.good is False]
    if broken:
        raise TargetError(f"this installation does not work: {', '.join(broken)} (see above)")
    say("All good. Next: sfp-onnx inspect model.onnx")
