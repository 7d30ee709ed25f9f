"""Manifests and plans as files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx

from ..core.errors import OptionError, PlanError
from ..core.types import Cut, Plan, Size, Verification
from ..data.dataset import Dataset
from ..graph.model import Model
from ..graph.save import file_bytes, fingerprint, full_size, save, to_proto, write_text
from ..methods.bandits import PREFIX
from ..planning import parse_target
from ..planning.record import from_json, to_json
from ..repair import Repaired

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
    digest, size = fingerprint(result.model, output, external) if output else (None, full_size(result.model))
    check = result.verification
    return {
        "format": "sfp_onnx manifest",
        "version": 1,
        "versions": versions(),
        "model": {"path": str(result.original.source), "sha256": result.original.sha256, "bytes": file_bytes(result.original)},
        "output": {"path": str(output) if output else None, "sha256": digest, "bytes": size},
        "options": dict(result.plan.options),
        "data": dict(result.data) or None,
        "before": asdict(result.plan.before),
        "after": asdict(result.plan.after),
        "verification": None if check is None else asdict(check),
        "repair": None if result.repaired is None else result.repaired.figures,
        "notes": list(result.notes),
        "plan": to_json(result.plan),
        "cuts": [asdict(item) for item in result.cuts],
    }


def read_plan(path: str | Path) -> Plan:
    """Read a plan from a JSON file.

    Raises:
        PlanError: no such file, not JSON, or not a plan.
    """
    try:
        return from_json(json.loads(Path(path).read_text()))
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"{path}: cannot read the plan: {error}") from error
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error


def write_json(path: str | Path, data: Mapping[str, Any], inputs: Iterable[Path] = ()) -> None:
    """Write JSON atomically.

    Raises:
        OutputError: the path cannot be written.
    """
    write_text(path, json.dumps(data, indent=1) + "\n", inputs)


# ---- reproducing a run from its manifest -----------------------------------------------------------------------------

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
    return from_json(manifest["plan"])


# ---- cut a model as planned ------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Pruned:
    """The result of `apply` and `prune`."""

    model: Model
    original: Model
    plan: Plan
    cuts: tuple[Cut, ...]
    verification: Verification | None
    notes: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    repaired: Repaired | None = None

    def save(self, path: str | Path, external: bool | None = None) -> Path:
        """Write the model atomically; ``external`` keeps weights in ``<path>.data`` (default: only over 2 GB)."""
        return save(self.model, path, external)

    def to_proto(self) -> onnx.ModelProto:
        """The model as a self-contained ModelProto."""
        return to_proto(self.model)


# ---- one calibration -------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Point:
    """One target of a sweep: what came out, or why nothing did (``failure``).

    ``latency_ratio`` is to the original, from minima of interleaved runs at the options' batch size; ``front``: no other point is at
    least as good in accuracy (top-1, else agreement, else relative error), file size and latency, and better in one.
    """

    target: str
    size: Size | None = None
    top1: float | None = None
    agreement: float | None = None
    kl: float | None = None
    relative_error: float | None = None
    latency_ms: float | None = None
    latency_ratio: float | None = None
    front: bool = False
    file: str | None = None
    manifest: str | None = None
    failure: str = ""
