"""What the user asks of the result: upper bounds on figures of the model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core.errors import OptionError, TargetError

COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
BYTES = {
    "": 1.0, "b": 1.0, "k": 1e3, "m": 1e6, "g": 1e9,
    "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30,
}
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
UNITS: Mapping[str, Mapping[str, float]] = {"macs": COUNTS, "params": COUNTS, "size": BYTES, "latency": SECONDS, "memory": BYTES}
EXAMPLES = "macs=50%, params=120k, size=2MB, latency=60%, latency=5ms or memory=1.5MiB"
DIGITS = {"macs": "{:,.0f}", "params": "{:,.0f}", "size": "{:,.0f} bytes", "memory": "{:,.0f} bytes"}


@dataclass(frozen=True)
class Target:
    """An upper bound on a figure of the result, as a share of the original or an absolute number (bytes, seconds)."""

    what: str
    value: float
    relative: bool

    def bound(self, before: Mapping[str, float]) -> float:
        """The bound as an absolute number, from the figures of the original."""
        return self.value * before[self.what] if self.relative else self.value


def parse_target(text: str) -> Target:
    """Read ``macs=50%``, ``params=120k``, ``size=2MB``, ``latency=5ms``, ``memory=1.5MiB``.

    Raises:
        OptionError: not of that form, or out of range.
    """
    match = re.fullmatch(r"\s*([a-z]+)\s*=\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*(%|[a-zµ]*)\s*", text, re.IGNORECASE)
    what, unit = (match[1].lower(), match[3].lower()) if match else ("", "")
    known = UNITS.get(what, {})
    value = float(match[2]) if match else 0.0
    if match is None or not known or (unit != "%" and unit not in known) or not value > 0 or (unit == "%" and value > 100):
        units = f"; units of {what}: %, {', '.join(filter(None, known))}" if known else ""
        raise OptionError(f"target '{text}': expected {EXAMPLES}{units}")
    if value < 1 and not unit:
        raise OptionError(f"target '{text}': less than one of them; for a share write {what}={100 * value:g}%")
    return Target(what, value / 100, True) if unit == "%" else Target(what, value * known[unit], False)


def bounds(targets: Sequence[Target], before: Mapping[str, float]) -> dict[str, float]:
    """The tightest bound per figure, in the order in which figures were first named."""
    found: dict[str, float] = {}
    for target in targets:
        bound = target.bound(before)
        found[target.what] = min(bound, found.get(target.what, bound))
    return found


def show(what: str, value: float) -> str:
    """A figure for people."""
    return f"{value * 1e3:.3f} ms" if what == "latency" else DIGITS[what].format(value)


def unreachable(wanted: Mapping[str, float], before: Mapping[str, float], best: Mapping[str, float], how: str = "") -> TargetError:
    """The error that says what was asked and what is the best that can be had."""
    parts = [
        f"{what} of at most {show(what, bound)} asked, best reachable is {show(what, best[what])} "
        f"({best[what] / before[what]:.1%} of the original)"
        for what, bound in wanted.items()
    ]
    advice = "Nothing was written. Loosen --target, --min-channels, --align, --keep or --only."
    return TargetError(f"the target cannot be met: {'; '.join(parts)}{how}. {advice}")
