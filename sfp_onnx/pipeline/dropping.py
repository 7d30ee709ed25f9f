"""The smallest model whose metric falls by no more than allowed, on data that were not scored with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .. import plan as plans
from ..errors import TargetError
from ..graph import Model
from ..records import Plan, PlanOptions
from .analysis import Progress, silent
from .deciding import Candidates, plan_for
from .judging import Drop, Judge
from .repairing import rebuilt

TRIALS = 8

Build = Callable[[Candidates, Plan], Model]
"""The model that a plan makes."""


def built(scored: Candidates, plan: Plan) -> Model:
    """The model of a plan, repaired if the candidates say so."""
    analysis = scored.analysis
    removed = plans.removal_of(plan, analysis.coupling, analysis.model.sha256)
    if not removed.any():
        return analysis.model
    return rebuilt(analysis, removed, scored.data, scored.repair)


@dataclass(frozen=True)
class _Trial:
    """A plan with what its model loses."""

    plan: Plan
    drop: Drop


def plan_with_drop(scored: Candidates, options: PlanOptions, judge: Judge, build: Build = built, progress: Progress = silent) -> Plan:
    """The plan with the fewest MACs whose model loses no more than the judge allows; with targets, the plan that holds them too.

    Without targets the share of MACs is bisected, with eight models built and measured.

    Args:
        judge: on data that were not used to score.

    Raises:
        TargetError: no such plan; with the drop of the best one.
    """
    judge.check()

    def trial(targets: tuple[str, ...]) -> _Trial:
        plan = plan_for(scored, replace(options, targets=targets))
        return _Trial(plan, judge.drop(build(scored, plan)))

    best = trial(options.targets) if options.targets else _smallest(trial, judge, progress)
    if not judge.holds(best.drop):
        raise _too_much(judge, best.drop, "at the targets" if options.targets else "at the lightest cut that was tried")
    return replace(best.plan, notes=(*best.plan.notes, *judge.notes(best.drop)))


def _smallest(trial: Callable[[tuple[str, ...]], _Trial], judge: Judge, progress: Progress) -> _Trial:
    low, high = 0.0, 1.0  # shares of MACs; low is not tried
    best: _Trial | None = None
    lightest: _Trial | None = None
    with progress("searching", TRIALS) as advance:
        for _ in range(TRIALS):
            middle = (low + high) / 2
            try:
                found = trial((f"macs={100 * middle:.6f}%",))
            except TargetError:
                low = middle
                advance(1)
                continue
            lightest = found if lightest is None or found.plan.after.macs > lightest.plan.after.macs else lightest
            if judge.holds(found.drop):
                best, high = found, min(middle, found.plan.after.macs / found.plan.before.macs)
            else:
                low = middle
            advance(1)
    if best is None and lightest is None:
        raise TargetError("--max-drop: nothing can be removed under these options. Nothing was written.")
    found_best = best or lightest
    assert found_best is not None
    return found_best


def _too_much(judge: Judge, found: Drop, where: str) -> TargetError:
    sure = f"; at most {found.bound:.4f} with {judge.confidence:.0%} confidence" if found.bound > found.drop else ""
    return TargetError(
        f"--max-drop cannot be held: {judge.name} on {judge.place} falls from {found.before:.4f} to {found.after:.4f} {where} "
        f"(drop {found.drop:.4f}{sure}; allowed {judge.limit:.4f}). Nothing was written. "
        "Loosen --max-drop or the targets, or give more data."
    )
