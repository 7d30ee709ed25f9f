"""Reproducing a run from its manifest: what differs, and whether the result is the same byte for byte."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import plan as plans
from ..bandits import PREFIX
from ..data import Dataset
from ..errors import OptionError
from ..graph import Model
from ..records import Plan
from ..targets import parse_target
from .manifest import versions

FREE = {"model", "data", "test_data", "output", "manifest", "locked", "as_json", "report_to", "save_ort"}
"""Options that say where things are or go, not what is done; model and data are compared by their hashes."""
CLOCKED = ("latency",)


def read_manifest(path: str | Path) -> dict[str, Any]:
    """A manifest of a model that was pruned.

    Raises:
        OptionError: unreadable, or no manifest.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if data["format"] != "sfp_onnx manifest" or not isinstance(data["output"]["sha256"], str):
            raise ValueError("it is no manifest of a written model")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise OptionError(f"{path}: cannot read the manifest: {error}. Expected what --manifest writes.") from error
    return dict(data)


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON holds them, without those that do not change the result."""
    found = {key: str(value) if isinstance(value, Path) else value for key, value in sorted(options.items()) if key not in FREE}
    return dict(json.loads(json.dumps(found)))


def differences(manifest: Mapping[str, Any], options: Mapping[str, Any], model: Model, data: Dataset | None) -> list[str]:
    """Where this run's options, model or data are not those of the manifest."""
    command = manifest.get("command")
    if not isinstance(command, Mapping):
        return ["the manifest holds no options: it was made by an older version"]
    then, now = command.get("options", {}), plain_options(options)
    found = [
        f"option {key}: {then.get(key)!r} then, {now.get(key)!r} now" for key in sorted({*then, *now}) if then.get(key) != now.get(key)
    ]
    digests = {
        "model": (manifest["model"]["sha256"], model.sha256),
        "data": ((manifest.get("data") or {}).get("sha256"), None if data is None else data.sha256),
    }
    return found + [f"SHA-256 of the {what}: {_short(old)} then, {_short(new)} now" for what, (old, new) in digests.items() if old != new]


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:16]


def version_differences(manifest: Mapping[str, Any]) -> list[str]:
    """Packages of other versions than in the manifest."""
    then, now = manifest.get("versions", {}), versions()
    return [f"{name} {then.get(name)} then, {now.get(name)} now" for name in now if then.get(name) != now.get(name)]


def clocked(options: Mapping[str, Any]) -> bool:
    """Whether a plan depends on measured times, which never come out the same twice."""
    timed = any(parse_target(text).what in CLOCKED for text in options.get("targets") or ())
    return timed or options.get("align") == "auto" or (str(options.get("score")).startswith(PREFIX) and options.get("budget") is not None)


def locked_plan(manifest: Mapping[str, Any]) -> Plan:
    """The plan in a manifest.

    Raises:
        PlanError: damaged.
    """
    return plans.from_json(manifest["plan"])
