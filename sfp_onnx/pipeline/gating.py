"""Is a model still as good as it was? Figures against a baseline."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import OptionError
from ..records import Evaluation
from ..targets import bounds, parse_target, show

Verdict = tuple[str, bool, str]
"""(what was checked, whether it holds, what was expected and found)."""
SIZES = {"macs": "MACs", "params": "parameters", "bytes": "bytes"}


def read_baseline(path: str | Path) -> tuple[dict[str, Any], str | None]:
    """Figures of the last model of a manifest (made with --test-data) or of what `evaluate --json` printed, and the data's SHA-256.

    Raises:
        OptionError: unreadable, or without figures.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        figures = data["evaluation"] if isinstance(data, dict) else data
        if not figures:
            raise OptionError(f"{path}: no accuracy in it. Write the manifest with --test-data, or give what `evaluate --json` prints.")
        last = dict(figures[-1])
        for key in ("top1", "agreement", *SIZES):
            value = last["size"][key] if key in SIZES else last[key]
            if value is not None and not isinstance(value, (int, float)):
                raise ValueError(f"'{key}' is no number")
        test = data.get("test_data") if isinstance(data, dict) else None
        return last, (test or {}).get("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise OptionError(f"{path}: cannot read the baseline: {error}. Expected a manifest, or what `evaluate --json` prints.") from error


def against(own: Evaluation, base: Mapping[str, Any], limit: float, alone: bool) -> list[Verdict]:
    """A model against a baseline: accuracy may fall by ``limit``, MACs, parameters and bytes may not rise.

    ``alone``: no original was measured beside it, so that agreement means nothing.

    Raises:
        OptionError: nothing can be compared.
    """
    found = _drop(own, base, limit, alone)
    for key, name in SIZES.items():
        before, now = base["size"][key], getattr(own.size, key)
        if before is not None and now is not None:
            found.append((name, now <= before, f"{now:,.0f} (baseline {before:,.0f})"))
    return found


def dropped(results: Sequence[Evaluation], limit: float) -> list[Verdict]:
    """The last model against the first."""
    return _drop(results[-1], asdict(results[0]), limit, len(results) < 2)


def _drop(own: Evaluation, base: Mapping[str, Any], limit: float, alone: bool) -> list[Verdict]:
    for key, name in (("top1", "top-1"), ("agreement", "agreement with the original")):
        before, now = base[key], getattr(own, key)
        if before is not None and now is not None and not (key == "agreement" and alone):
            text = f"{now:.2%} on {own.samples} samples (baseline {before:.2%}, may fall by {limit:.2%})"
            return [(name, before - now <= limit + 1e-12, text)]
    raise OptionError("there is no accuracy to compare: give labels, or the original before the model (then their agreement is compared)")


def reached(results: Sequence[Evaluation], targets: Sequence[str]) -> list[Verdict]:
    """Targets of the last model, with the first as the original.

    Raises:
        OptionError: a target that `evaluate` does not measure.
    """
    values = [{"macs": own.size.macs, "params": own.size.params, "size": own.size.bytes or 0} for own in (results[0], results[-1])]
    parsed = [parse_target(text) for text in targets]
    for target in parsed:
        if target.what not in values[0]:
            raise OptionError(f"--target {target.what}: evaluate checks macs, params and size")
    before, now = ({key: float(value) for key, value in own.items()} for own in values)
    return [
        (f"target {what}", now[what] <= bound, f"{show(what, now[what])} (at most {show(what, bound)})")
        for what, bound in bounds(parsed, before).items()
    ]
