"""From scores to a plan: one of ratio and targets decides how much leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from .. import plan as plans
from ..data import Dataset
from ..errors import TargetError
from ..records import FloatArray, Group, Plan, PlanOptions, RepairOptions
from ..targets import bounds, parse_target
from .analysis import Analysis, Progress, silent
from .comparing import enough, nearest
from .examples import FilterExample
from .reaching import reach
from .targeting import BLOCKS, LIGHT, Choice, Reached, Ruler, align_of, narrowest, ranking, ruler_for, solver


@dataclass(frozen=True)
class Candidates:
    """A model that is ready to be planned for.

    ``groups`` may shrink; ``scores`` has one value per unit; ``recorded`` goes into the options of plans; ``errors`` is the error of a
    group by the number of units that it keeps (0 .. width), for the allocation "solve" (default: from the scores). Where models are
    built to be measured, they are repaired with ``repair`` on ``data``.
    ``examples`` are filters that show what class profiles say, where the score needed any; ``traces`` what a bandit search saw of each arm.
    """

    analysis: Analysis
    groups: Sequence[Group]
    scores: FloatArray
    recorded: Mapping[str, Any]
    errors: Mapping[str, FloatArray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    data: Dataset | None = None
    repair: RepairOptions | None = None
    examples: tuple[FilterExample, ...] = ()
    traces: Mapping[str, Any] = field(default_factory=dict)


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
    grid = plans.grid_of(used.align)
    if options.align != used.align and "latency" in found.bounds and grid.fine < grid.block and found.removed.any():
        found, used = _compared(scored, (found, used), progress, ruler)
    recorded = {**asdict(used), "targets": list(options.targets), **scored.recorded}
    analysis = scored.analysis
    made = plans.make_plan(analysis.coupling, found.removed, analysis.model.sha256, analysis.parameters, analysis.samples, recorded)
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
        second = decide(scored, replace(used, align=str(plans.grid_of(used.align).block)), progress, ruler)
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
