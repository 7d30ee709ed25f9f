"""Manifests and plans as files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import graph
from .. import plan as plans
from ..errors import PlanError
from ..records import Plan
from .cutting import Pruned

PACKAGES = ("sfp_onnx", "onnx", "onnxruntime", "onnx-graphsurgeon", "numpy", "click")


def versions() -> dict[str, str]:
    """Versions of this package and what it runs on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def manifest(result: Pruned, output: Path | None = None, external: bool | None = None) -> dict[str, Any]:
    """Everything needed to check or repeat a run, as plain data for JSON; ``output`` and ``external`` as the result is saved."""
    digest, size = graph.fingerprint(result.model, output, external) if output else (None, graph.full_size(result.model))
    check = result.verification
    return {
        "format": "sfp_onnx manifest",
        "version": 1,
        "versions": versions(),
        "model": {"path": str(result.original.source), "sha256": result.original.sha256, "bytes": graph.file_bytes(result.original)},
        "output": {"path": str(output) if output else None, "sha256": digest, "bytes": size},
        "options": dict(result.plan.options),
        "data": dict(result.data) or None,
        "before": asdict(result.plan.before),
        "after": asdict(result.plan.after),
        "verification": None if check is None else asdict(check),
        "repair": None if result.repaired is None else result.repaired.figures,
        "notes": list(result.notes),
        "plan": plans.to_json(result.plan),
        "cuts": [asdict(item) for item in result.cuts],
    }


def read_plan(path: str | Path) -> Plan:
    """Read a plan from a JSON file.

    Raises:
        PlanError: no such file, not JSON, or not a plan.
    """
    try:
        return plans.from_json(json.loads(Path(path).read_text()))
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"{path}: cannot read the plan: {error}") from error
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error


def write_json(path: str | Path, data: Mapping[str, Any], inputs: Iterable[Path] = ()) -> None:
    """Write JSON atomically.

    Raises:
        OutputError: the path cannot be written.
    """
    graph.write_text(path, json.dumps(data, indent=1) + "\n", inputs)
