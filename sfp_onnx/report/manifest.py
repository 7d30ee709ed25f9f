"""The result of a run, its manifest, and reproducing a run from that."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx

from ..core.errors import OptionError, PlanError, TargetError
from ..core.options import PLANNED, OutputOptions
from ..core.system import log, versions
from ..core.types import Cut, Plan, Shown
from ..cut.verify import Verification
from ..data.dataset import Dataset
from ..evaluation import Evaluation
from ..export import Packaged
from ..graph import Model
from ..graph.save import file_bytes, fingerprint, full_size, save, to_proto, write_text
from ..latency.measure import device
from ..latency.timing import Latency
from ..planning import from_json, parse_target, to_json
from ..repair import Repaired
from . import verdict


@dataclass(frozen=True, repr=False)
class Pruned(Shown):
    """The result of `apply` and `prune`. ``data`` and ``test_data`` describe what was used; ``evaluation`` holds the original and the
    result as measured on test data; ``packaged`` the other forms; ``command`` the options; ``manifest`` what is recorded of the run."""

    model: Model
    original: Model
    plan: Plan
    cuts: tuple[Cut, ...]
    verification: Verification | None
    notes: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    repaired: Repaired | None = None
    packaged: Packaged | None = None
    evaluation: tuple[Evaluation, ...] = ()
    test_data: Mapping[str, Any] | None = None
    command: Mapping[str, Any] | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)

    def summary(self) -> str:
        """What came of it."""
        return f"{self.original.name}, {self.manifest.get('verdict', '')}\n{self.plan.summary()}"

    def save(self, path: str | Path, external: bool | None = None) -> Path:
        """Write the model atomically; ``external`` keeps weights in ``<path>.data`` (default: only over 2 GB)."""
        return save(self.model, path, external)

    def to_proto(self) -> onnx.ModelProto:
        """The model as a self-contained ModelProto."""
        return to_proto(self.model)


def manifest(result: Pruned, output: Path | None = None, external: bool | None = None) -> dict[str, Any]:
    """Everything needed to check or repeat a run, as plain data for JSON; ``output`` and ``external`` as the result is saved."""
    digest, size = fingerprint(result.model, output, external) if output else (None, full_size(result.model))
    check, original = result.verification, file_bytes(result.original)
    return {
        "format": "sfp_onnx manifest", "version": 1, "versions": versions(),
        "model": {"path": str(result.original.source), "sha256": result.original.sha256, "bytes": original},
        "output": {"path": str(output) if output else None, "sha256": digest, "bytes": size},
        "verdict": verdict.of_run(result, (original, size)).text,
        "options": dict(result.plan.options), "data": dict(result.data) or None,
        "device": {**device(Latency.of(result.plan.options).setup), "batch": result.plan.options.get("batch", 1)},
        "before": asdict(result.plan.before), "after": asdict(result.plan.after),
        "verification": None if check is None else asdict(check),
        "repair": None if result.repaired is None else result.repaired.figures,
        "notes": list(result.notes), "plan": to_json(result.plan), "cuts": [dict(vars(item)) for item in result.cuts],
        "command": None if result.command is None else {"name": "prune", "options": dict(result.command)},
        "evaluation": [asdict(measured) for measured in result.evaluation] or None,
        "packaging": None if result.packaged is None else [asdict(step) for step in result.packaged.steps],
        "test_data": None if result.test_data is None else dict(result.test_data),
    }  # fmt: skip


def read_plan(path: str | Path) -> Plan:
    """Read a plan from a JSON file.

    Raises:
        PlanError: no such file, not JSON, or not a plan.
    """
    try:
        return from_json(json.loads(Path(path).read_text(encoding="utf-8-sig")))
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

PLACES = {"path", "manifest", "report", "card", "save_ort", "locked", *PLANNED}


def command_of(*records: Any, **more: Any) -> dict[str, Any]:
    """The options of a run as JSON holds them, without those that say where things are or go: model and data are compared by hash."""
    fields = {name: value for record in records if record is not None for name, value in vars(record).items()}
    return dict(json.loads(json.dumps({key: value for key, value in sorted({**fields, **more}.items()) if key not in PLACES}, default=str)))


def differences(manifest: Mapping[str, Any], options: Mapping[str, Any], model: Model, data: Dataset | None) -> list[str]:
    """Where this run's options, model or data are not those of the manifest (options that only one of the two versions knows are none:
    the result is compared all the same)."""
    command = manifest.get("command")
    if not isinstance(command, Mapping):
        return ["the manifest holds no options: it was made by an older version, or by `apply`"]
    then = command.get("options", {})
    keys = sorted({*then} & {*options})
    different = [f"option {key}: {then[key]!r} then, {options[key]!r} now" for key in keys if then[key] != options[key]]
    for what, opened in (("model", model), ("data", data)):
        old, new = (manifest.get(what) or {}).get("sha256"), None if opened is None else opened.sha256
        if old != new:
            different.append(f"SHA-256 of the {what}: {(old or 'none')[:16]} then, {(new or 'none')[:16]} now")
    return different


def clocked(options: Mapping[str, Any]) -> bool:
    """Whether a plan depends on measured times, which never come out the same twice."""
    timed = any(parse_target(text).figure.timed for text in options.get("targets") or ())
    return timed or str(options.get("align")) == "auto" or "budget=" in str(options.get("score"))


class Lock:
    """A manifest whose run must come out again."""

    def __init__(self, path: Path) -> None:
        """Read the manifest.

        Raises:
            OptionError: unreadable, or no manifest.
        """
        self.path = path
        try:
            self.manifest: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
            if self.manifest["format"] != "sfp_onnx manifest" or not isinstance(self.manifest["output"]["sha256"], str):
                raise ValueError("it is no manifest of a written model")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise OptionError(f"{path}: cannot read the manifest: {error}. Expected what --manifest writes.") from error
        then, now = self.manifest.get("versions", {}), versions()
        self.versions = [f"{name} {then.get(name)} then, {now[name]} now" for name in now if then.get(name) != now[name]]

    def plan(self, model: Model, data: Dataset | None, options: Mapping[str, Any]) -> Plan | None:
        """Check that the run is the same so far; the manifest's plan, if it was made with a clock and cannot be made again.

        Raises:
            TargetError: options, model or data differ; which.
        """
        different = differences(self.manifest, options, model, data)
        if different:
            raise TargetError(f"{self.path}: this is another run: {'; '.join([*different, *self.versions])}. Nothing was written.")
        for text in self.versions:
            log.info(f"Note: --locked: {text}")
        if clocked(options):
            log.info("Note: --locked: the plan is that of the manifest, since it was made with measured times")
            return from_json(self.manifest["plan"])
        return None

    def check(self, result: Pruned, output: OutputOptions) -> None:
        """Check that the result is the manifest's, byte for byte.

        Raises:
            TargetError: it is not; with the versions that differ.
        """
        path, then = Path(output.path or "model.onnx"), self.manifest["output"]
        name, expected = Path(then["path"] or path.name).name, then["sha256"]
        digest = fingerprint(result.model, path.with_name(name), output.external)[0]
        if digest != expected:
            others = "the processor, its number of threads or a file that an option names may differ"
            why = "; ".join(self.versions) or f"all versions are the same; {others}"
            raise TargetError(
                f"{self.path}: the result is another one: SHA-256 {expected[:16]} then, {digest[:16]} now ({why}). Nothing was written."
            )
        log.info(f"--locked: the same byte for byte as in {self.path}")
