"""A source distribution holds all that its own tests and documents need: MANIFEST.in covers what is in the repository."""

from __future__ import annotations

import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALWAYS = ("MANIFEST.in", "pyproject.toml", "README.md", "LICENSE",
          "sfp_onnx/*.py", "sfp_onnx/*.pyi", "sfp_onnx/py.typed", "sfp_onnx/report/*.j2", "sfp_onnx/data/*.txt")


def tracked() -> list[str]:
    """Files of the repository, but for hidden ones."""
    try:
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        pytest.skip("no git")
    names = [name for name in done.stdout.split("\0") if name and not name.startswith(".")]
    if "pyproject.toml" not in names:
        pytest.skip("not in a repository of its own")
    return names


def patterns() -> list[str]:
    """What MANIFEST.in includes, as patterns in which * also stands for folders."""
    found = []
    for line in (ROOT / "MANIFEST.in").read_text().splitlines():
        what, *names = line.split()
        found += [f"{name}/*" for name in names] if what == "graft" else names if what == "include" else []
    return found


def test_the_source_distribution_is_complete() -> None:
    kept = [*ALWAYS, *patterns()]
    assert [name for name in tracked() if not any(fnmatch(name, pattern) for pattern in kept)] == []


def test_no_pattern_is_idle() -> None:
    assert [own for own in patterns() if not any(fnmatch(name, own) for name in tracked())] == []
