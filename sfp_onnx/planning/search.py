"""Figures of a model after a removal, predicted and measured; and widths chosen so that bounds on them hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from .. import planning
from ..core.errors import TargetError
from ..core.options import PlanOptions, RepairOptions
from ..core.types import BoolArray, Coupling, FloatArray, Group, IntArray, Plan
from ..coupling.analysis import Analysis, Progress, silent
from ..data.dataset import Dataset
from ..latency import scaled
from ..latency.profiling import profile_around
from ..repair import distances, rebuilt
from . import Target, bounds, parse_target, unreachable
from . import widths as plans
from .figures import BLOCKS, LIGHT, Reached, Ruler, align_of, ruler_for
from .record import make_plan
from .solver import Allocation, Problem, choices, solve
from .widths import grid_of, least, of_widths, steps_of

# ---- choosing --------------------------------------------------------------------------------------------------------

Choice = Callable[[Mapping[str, float]], "tuple[BoolArray, str] | None"]
"""The removal that holds these bounds on predicted figures, and a word on how it was found; None if there is none."""


def errors_of_scores(groups: Sequence[Group], scores: FloatArray) -> list[FloatArray]:
    """Error of each group by the number of units it keeps, 0 .. width: share of the squared scores that leaves, summed over the layers
    that read it (as the errors of `obs` are: a residual stream is worth more than what one layer reads)."""
    found = []
    for group in groups:
        squares = np.sort(np.maximum(scores[group.units], 0)) ** 2
        total = squares.sum()
        lost = np.concatenate([[0.0], np.cumsum(squares)])[::-1]
        found.append(max(1, len(group.consumers)) * (lost / total if total > 0 else np.linspace(1, 0, group.width + 1)))
    return found


def solver(
    ruler: Ruler, groups: Sequence[Group], scores: FloatArray, options: PlanOptions, errors: Mapping[str, FloatArray] | None = None
) -> Choice:
    """Widths by `allocate.solve`, from errors per group by kept units (default: from scores)."""
    coupling = ruler.analysis.coupling
    table = dict(zip((group.name for group in groups), errors_of_scores(groups, scores), strict=True)) | dict(errors or {})
    widths = offered(coupling, groups, options)
    losses = [
        np.maximum.accumulate([table[group.name][width] for width in own]).tolist() if len(own) > 1 else [0.0]
        for group, own in zip(coupling.groups, widths, strict=True)
    ]
    costs = {name: ruler.cost(name) for name in ruler.names}

    def choose(bounds: Mapping[str, float]) -> tuple[BoolArray, str] | None:
        problem = Problem(widths, losses, [costs[name] for name in bounds], list(bounds.values()))
        found = solve(problem)
        if found is None:
            return None
        return of_widths(coupling, scores, found.kept.tolist()), compared(found)

    return choose


def offered(coupling: Coupling, groups: Sequence[Group], options: PlanOptions) -> list[list[int]]:
    """Widths that every group of the model may have; only ``groups`` have a choice."""
    grid = grid_of(options.align)
    chosen = {group.name for group in groups}
    found = []
    for group in coupling.groups:
        vanish = group.name in coupling.branches and options.min_channels == 1
        own = choices(group.width, steps_of(coupling, group, grid), options.min_channels, vanish)
        found.append(own if group.name in chosen else [group.width])
    return found


def narrowest(coupling: Coupling, groups: Sequence[Group], scores: FloatArray, options: PlanOptions) -> BoolArray:
    """The largest removal that the options allow."""
    if options.allocation == "solve":
        return of_widths(coupling, scores, [own[-1] for own in offered(coupling, groups, options)])
    return least(coupling, groups, scores, options)


def compared(found: Allocation) -> str:
    """Which method of the solver was better, and by how much."""
    if len(found.errors) < 2:
        return f"allocation: {found.method} only"
    worse = max(found.errors, key=lambda name: (found.errors[name], name != found.method))
    if found.errors[worse] == found.error:
        return f"allocation: greedy and Lagrangian sweep reach the same error ({found.error:.4g})"
    return f"allocation: {found.method} ({found.error:.4g}) better than {worse} ({found.errors[worse]:.4g}) by estimated error"


def ranking(ruler: Ruler, groups: Sequence[Group], scores: FloatArray, options: PlanOptions) -> Choice:
    """One number says how much leaves everywhere: the baselines `uniform` and `global`."""

    def choose(bounds: Mapping[str, float]) -> tuple[BoolArray, str] | None:
        removed = plans.choose(ruler.analysis.coupling, groups, scores, options, ruler.predicted, bounds)
        return None if removed is None else (removed, f"allocation: {options.allocation}")

    return choose


# ---- the closed loop -------------------------------------------------------------------------------------------------

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
    bounds = planning.bounds(wanted, ruler.before)
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
        raise unreachable(bounds, ruler.before, ruler.actual(most), _how(ruler, bounds))
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


# ---- from scores to a plan -------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Candidates:
    """A model that is ready to be planned for.

    ``groups`` may shrink; ``scores`` has one value per unit; ``recorded`` goes into the options of plans; ``errors`` is the error of a
    group by the number of units that it keeps (0 .. width), for the allocation "solve" (default: from the scores). Where models are
    built to be measured, they are repaired with ``repair`` on ``data``.
    ``details`` is what the score's plug-in shows in reports.
    """

    analysis: Analysis
    groups: Sequence[Group]
    scores: FloatArray
    recorded: Mapping[str, Any]
    errors: Mapping[str, FloatArray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    data: Dataset | None = None
    repair: RepairOptions | None = None
    details: Any = None


FULL = 0.95  # of a bound: less than this used, finer steps are worth more than whole blocks
Decision = tuple[Reached, PlanOptions]
"""Which units leave, and the options with their defaults filled in."""


def plan_for(scored: Candidates, options: PlanOptions, progress: Progress = silent, ruler: Ruler | None = None) -> Plan:
    """Decide which units leave. By default, solved widths are whole blocks, unless those leave much of a counted target unused; and with
    a latency target, and data and a repair to judge by, widths below one block of the device are compared with whole blocks.

    Raises:
        OptionError: bad options. TargetError: a target cannot be held.
    """
    ruler = ruler or ruler_for(scored.analysis, options, progress)
    found, used = decide(scored, options, progress, ruler)
    if options.align == "default" and used.align == BLOCKS and _used_share(found) < FULL:
        found, used = decide(scored, replace(options, align=LIGHT), progress, ruler)
    grid = grid_of(used.align)
    if options.align != used.align and "latency" in found.bounds and grid.fine < grid.block and found.removed.any():
        found, used = _compared(scored, (found, used), progress, ruler)
    recorded = {**asdict(used), "targets": list(options.targets), **scored.recorded}
    analysis = scored.analysis
    made = make_plan(analysis.coupling, found.removed, analysis.model.sha256, analysis.parameters, analysis.samples, recorded)
    return replace(made, notes=(*scored.notes, *found.notes), figures=_figures(found))


def decide(scored: Candidates, options: PlanOptions, progress: Progress, ruler: Ruler) -> Decision:
    """Which units leave, and the options with their defaults filled in.

    Raises:
        OptionError: neither or both of ratio and targets. TargetError: the targets cannot be held.
    """
    wanted = [parse_target(text) for text in options.targets]
    analysis, groups, scores = scored.analysis, scored.groups, scored.scores
    asked = {target.what for target in wanted}
    allocation = options.allocation
    if allocation == "default":
        allocation = "solve" if asked & {"latency", "memory"} or options.max_drop is not None or scored.errors else "uniform"
    if allocation == "solve" and (options.ratio is not None or not wanted):
        allocation = "uniform"
    used = replace(options, allocation=allocation)
    used = replace(used, align=align_of(used, ruler.profile))
    if options.ratio is not None or not wanted:
        removed = plans.choose(analysis.coupling, groups, scores, used, ruler.predicted)
        assert removed is not None
        return Reached(removed, {}, {}), used

    def choosing(own: Ruler) -> Choice:
        return solver(own, groups, scores, used, scored.errors) if allocation == "solve" else ranking(own, groups, scores, used)

    most = narrowest(analysis.coupling, groups, scores, used)
    with progress("planning", 1) as advance:
        found = reach(ruler, wanted, choosing, most)
        advance(1)
    if ruler.profile is not None and ruler.profile.cut_short:
        short = f"fewer widths than usual were timed, since the budget of {ruler.profile.cut_short:g} s for the profile was spent"
        found = replace(found, notes=(*found.notes, short))
    return replace(found, before=ruler.before, bounds=bounds(wanted, ruler.before)), used


def _used_share(found: Reached) -> float:
    """How much of the tightest bound is used; coarse steps leave a lot unused where there are few groups to choose from."""
    return max((found.actual[name] / bound for name, bound in found.bounds.items()), default=1.0)


def _compared(scored: Candidates, first: Decision, progress: Progress, ruler: Ruler) -> Decision:
    """A decision, or the one with whole blocks only if that leaves the model nearer to the original (where there is a repair, and
    enough data to tell)."""
    found, used = first
    if scored.repair is None or scored.data is None or not enough(scored.data):
        return first
    try:
        second = decide(scored, replace(used, align=str(grid_of(used.align).block)), progress, ruler)
    except TargetError:
        return first
    if not second[0].removed.any() or np.array_equal(found.removed, second[0].removed):
        return first
    decisions = {f"--align {own[1].align}": own for own in (first, second)}
    removals = {name: own[0].removed for name, own in decisions.items()}
    best, said = nearest(scored.analysis, removals, scored.data, scored.repair, progress)
    found, used = decisions[best]
    return replace(found, notes=(*found.notes, said)), used


def _figures(found: Reached) -> dict[str, dict[str, float]]:
    return {
        name: {"before": found.before[name], "bound": bound, "predicted": found.predicted[name], "actual": found.actual[name]}
        for name, bound in found.bounds.items()
    }


# ---- removals that hold the same targets -----------------------------------------------------------------------------

HELD_OUT = 1 / 4
FEWEST = 16  # samples to compare on


def enough(data: Dataset) -> bool:
    """Whether there are samples enough to compare on."""
    return data.samples * HELD_OUT >= FEWEST


def nearest(
    analysis: Analysis, removals: Mapping[str, BoolArray], data: Dataset, repair: RepairOptions, progress: Progress = silent
) -> tuple[str, str]:
    """The name of the removal whose repaired model is nearest to the original on a quarter of the data, which the repairs do not see, and
    a word on each."""
    count = int(data.samples * HELD_OUT)
    seen, judge = data.split(count, [repair.seed, data.samples])
    models = []
    with progress("comparing widths", len(removals)) as advance:
        for removed in removals.values():
            models.append(rebuilt(analysis, removed, seen, repair))
            advance(1)
    word, found = distances(analysis, models, judge)
    left = dict(zip(removals, found, strict=True))
    best = min(left, key=lambda name: left[name])
    shown = ", ".join(f"{value:.4g} with {name}" for name, value in left.items())
    return best, f"distance from the original after the repair ({word}), on {count} samples held out for this: {shown}; taken: {best}"
