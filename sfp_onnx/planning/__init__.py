"""What the user asks of the result: upper bounds on figures of the model. All figures are in one registry."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..core.errors import OptionError, TargetError
from ..core.options import BYTES as BYTES
from ..core.types import BoolArray, FloatArray, IntArray
from ..graph import Model

COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}


@dataclass(frozen=True)
class Gauge:
    """One figure of one model.

    ``predicted`` is the figure after a removal that is not built; ``cost`` that (...) of candidates (..., groups) of kept units, for the
    solver; ``measured`` that of a built model (None: nothing is known better than the prediction). ``before`` is that of the original
    (None: as predicted for no removal).

    For what is timed: ``again`` is this gauge after a new measurement around the widths after a removal, ``block`` the channels in which
    the device makes convolutions, ``how`` the figure is known (for messages), ``notes`` what the user should know of it.
    """

    predicted: Callable[[BoolArray], float]
    cost: Callable[[IntArray], FloatArray]
    measured: Callable[[Model], float] | None = None
    before: float | None = None
    again: Callable[[BoolArray], Gauge] | None = None
    block: int | None = None
    how: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figure:
    """A kind of target.

    ``units`` gives the factor of each unit in lower case; ``examples`` are targets as users write them; ``shown`` is a figure for people;
    ``gauge`` makes the `Gauge` of a model from a `figures.Scene`. ``timed``: it depends on a machine, and has noise; else it is counted.
    ``solved``: by default the solver chooses widths for it, since the same share of every group is a poor way to hold it.
    """

    name: str
    units: Mapping[str, float]
    examples: tuple[str, ...]
    shown: Callable[[float], str]
    gauge: Callable[..., Gauge]
    timed: bool = False
    solved: bool = False


FIGURES: dict[str, Figure] = {}
Maker = Callable[..., Gauge]


def figure(
    name: str, units: Mapping[str, float], *examples: str, shown: Callable[[float], str] = "{:,.0f}".format, timed: bool = False,
    solved: bool = False,
) -> Callable[[Maker], Maker]:  # fmt: skip
    """Register a function that makes gauges as a figure that targets may name; see `Figure`."""

    def register(gauge: Maker) -> Maker:
        FIGURES[name] = Figure(name, units, examples, shown, gauge, timed, solved)
        return gauge

    return register


@dataclass(frozen=True)
class Target:
    """An upper bound on a figure of the result, as a share of the original or an absolute number (bytes, seconds)."""

    what: str
    value: float
    relative: bool

    @property
    def figure(self) -> Figure:
        """What is bounded."""
        return FIGURES[self.what]

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
    units = {**FIGURES[what].units, "%": 0.01} if what in FIGURES else {}
    value = float(match[2]) if match else 0.0
    if unit not in units or not value > 0 or (unit == "%" and value > 100):
        *most, last = (example for known in FIGURES.values() for example in known.examples)
        hint = f"; units of {what}: %, {', '.join(unit for unit in units if unit not in ('', '%'))}" if units else ""
        raise OptionError(f"target '{text}': expected {', '.join(most)} or {last}{hint}")
    if value < 1 and not unit:
        raise OptionError(f"target '{text}': less than one of them; for a share write {what}={100 * value:g}%")
    return Target(what, value / 100, True) if unit == "%" else Target(what, value * units[unit], False)


def bounds(targets: Sequence[Target], before: Mapping[str, float]) -> dict[str, float]:
    """The tightest bound per figure, in the order in which figures were first named."""
    tightest: dict[str, float] = {}
    for target in targets:
        bound = target.bound(before)
        tightest[target.what] = min(bound, tightest.get(target.what, bound))
    return tightest


def show(what: str, value: float) -> str:
    """A figure for people."""
    return FIGURES[what].shown(value)


def unreachable(wanted: Mapping[str, float], before: Mapping[str, float], best: Mapping[str, float], how: str = "") -> TargetError:
    """The error that says what was asked and what is the best that can be had."""
    parts = [
        f"{what} of at most {show(what, bound)} asked, best reachable is {show(what, best[what])} "
        f"({best[what] / before[what]:.1%} of the original)"
        for what, bound in wanted.items()
    ]
    advice = "Nothing was written. Loosen --target, --min-channels, --align, --keep or --only."
    return TargetError(f"the target cannot be met: {'; '.join(parts)}{how}. {advice}")
