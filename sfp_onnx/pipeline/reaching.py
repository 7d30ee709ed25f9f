"""The closed loop: choose, build, measure against the original in the same run, correct, at most a handful of rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .. import targets
from ..device import scaled
from ..records import BoolArray, IntArray
from ..targets import Target
from .profiling import profile_around
from .targeting import Choice, Reached, Ruler

ROUNDS = 5
CLOSE = 0.015  # a latency this far below its bound (as a share of the original) is raised again, if rounds are left
MARGIN = 0.985  # aim below the bounds after a plan that broke one
NOISE = 0.005  # of a measured latency ratio; a bound counts as held up to it
SURPRISE = 0.05  # prediction and measurement this far apart (as a share of the original): measure again, then time the layers again


@dataclass
class _Loop:
    """What is known so far. ``ratio`` is actual over predicted, by figure; ``tried`` the removals that were built."""

    ruler: Ruler
    choose: Choice
    ratio: dict[str, float]
    held: Reached | None = None
    closest: Reached | None = None
    retimed: bool = False
    tried: frozenset[bytes] = frozenset()
    notes: tuple[str, ...] = ()


def reach(ruler: Ruler, wanted: Sequence[Target], choosing: Callable[[Ruler], Choice], most: BoolArray) -> Reached:
    """Choose, build, measure and correct; the result holds every target as built and measured.

    Args:
        choosing: how to choose, given a ruler; asked again if the layers were timed again.
        most: the largest removal, for the message if the targets cannot be held.

    Raises:
        TargetError: the targets cannot be held; with the best reachable figures.
    """
    bounds = targets.bounds(wanted, ruler.before)
    loop = _Loop(ruler, choosing(ruler), dict.fromkeys(bounds, 1.0))
    for number in range(1, ROUNDS + 1):
        aim = 1.0 if loop.closest is None or loop.held is not None else MARGIN
        found = loop.choose({name: aim * bound / loop.ratio[name] for name, bound in bounds.items()})
        if found is None and loop.closest is not None:
            break
        removed, note = found or (most, "allocation: the narrowest widths")
        if removed.tobytes() in loop.tried and (loop.held is not None or not loop.retimed):
            break  # the correction leads nowhere new
        own = Reached(removed, loop.ruler.predicted(removed), loop.ruler.actual(removed), number, (note,))
        if surprised(own, loop.ruler):
            own = _checked(loop, own, choosing)
        loop.tried |= {removed.tobytes()}
        if loop.closest is None or _excess(own, bounds) < _excess(loop.closest, bounds):
            loop.closest = own
        if _excess(own, bounds) <= NOISE and (loop.held is None or own.actual["macs"] >= loop.held.actual["macs"]):
            loop.held = own
        loop.ratio = {name: own.actual[name] / own.predicted[name] for name in bounds}
        if not _again(own, bounds, loop.ruler) or (found is None and loop.held is None):
            break
    if loop.held is None:
        raise targets.unreachable(bounds, ruler.before, ruler.actual(most), _how(ruler, bounds))
    return replace(loop.held, notes=(*loop.held.notes, *loop.notes))


def surprised(found: Reached, ruler: Ruler) -> bool:
    """Whether the measured latency is so far from the predicted one that one of them must be wrong."""
    if "latency" not in found.actual or not ruler.here:
        return False
    return abs(found.actual["latency"] - found.predicted["latency"]) > SURPRISE * ruler.before["latency"]


def _checked(loop: _Loop, found: Reached, choosing: Callable[[Ruler], Choice]) -> Reached:
    """Measure twice more and believe the median; if it still surprises, time the layers again at widths around these (once)."""
    times = [found.actual["latency"], *(loop.ruler.actual(found.removed)["latency"] for _ in range(2))]
    found = replace(found, actual={**found.actual, "latency": float(np.median(times))})
    if not surprised(found, loop.ruler) or loop.retimed:
        return found
    before = loop.ruler.before["latency"]
    gap = (found.actual["latency"] - found.predicted["latency"]) / before
    kept = np.asarray([int((~found.removed[group.units]).sum()) for group in loop.ruler.analysis.coupling.groups], np.int64)
    loop.ruler = retimed(loop.ruler, kept)
    loop.choose, loop.retimed, loop.tried = choosing(loop.ruler), True, frozenset()
    loop.notes = (f"the measured latency was {100 * gap:+.0f} points from the predicted one: layers timed again around the plan's widths",)
    return replace(found, predicted=loop.ruler.predicted(found.removed))


def retimed(ruler: Ruler, kept: IntArray) -> Ruler:
    """The ruler with a profile that was measured now, at widths around ``kept`` units per group."""
    profile = profile_around(ruler.analysis, ruler.setup, ruler.batch, kept)
    return replace(ruler, profile=scaled(profile, ruler.before["latency"]))


def _excess(found: Reached, bounds: Mapping[str, float]) -> float:
    """How far the worst figure is above its bound, relatively; counted figures have no noise."""
    over = {name: found.actual[name] / bound - 1 for name, bound in bounds.items()}
    return max(value if name == "latency" or value <= 1e-12 else value + NOISE for name, value in over.items())


def _again(found: Reached, bounds: Mapping[str, float], ruler: Ruler) -> bool:
    """Whether another round may help: a bound is broken, or latency is the only limit and far below it."""
    if _excess(found, bounds) > NOISE:
        return True
    if "latency" not in bounds or not ruler.here:
        return False
    slack = (bounds["latency"] - found.actual["latency"]) / ruler.before["latency"]
    others = [name for name in bounds if name != "latency"]
    limited = any(found.actual[name] > 0.99 * bounds[name] for name in others)
    return slack > CLOSE and not limited


def _how(ruler: Ruler, bounds: Mapping[str, float]) -> str:
    if "latency" not in bounds:
        return ""
    return " (latency measured on this machine)" if ruler.here else " (latency predicted from the device profile)"
