"""The smallest model whose metric falls by no more than allowed, on data that were not scored with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .. import plan as plans
from ..cut import cut
from ..data import Dataset
from ..errors import DataError, TargetError
from ..graph import Model
from ..metrics import metric_for, outputs, parse_drop
from ..records import Plan, PlanOptions
from .analysis import Progress, silent
from .deciding import Candidates, plan_for
from .repairing import repaired

HELD_OUT = 1 / 3
FEWEST = 8
TRIALS = 8

Build = Callable[[Candidates, Plan], Model]
"""The model that a plan makes."""


def built(scored: Candidates, plan: Plan) -> Model:
    """The cut model, repaired if the candidates say so (better or worse: it is judged afterwards)."""
    analysis = scored.analysis
    removed = plans.removal_of(plan, analysis.coupling, analysis.model.sha256)
    if not removed.any():
        return analysis.model
    pruned = cut(analysis.prepared, analysis.coupling, removed)
    if scored.repair is None or scored.data is None:
        return pruned
    return repaired(analysis, pruned, removed, scored.data, replace(scored.repair, force=True)).model


def held_out(data: Dataset | None, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Data to score with, and the third of the samples (seeded) that is held out from it.

    Raises:
        DataError: no data, or too few samples.
    """
    if data is None:
        raise DataError("--max-drop needs --data (with labels for top-1, without for agreement with the original)")
    order = np.random.default_rng(seed).permutation(data.samples)
    count = int(data.samples * HELD_OUT)
    if count < FEWEST:
        least = f"expected at least {3 * FEWEST} samples, found {data.samples}"
        raise DataError(f"--max-drop holds a third of the data out to judge on; {least}")
    return data.part(np.sort(order[count:])), data.part(np.sort(order[:count]))


@dataclass(frozen=True)
class _Trial:
    """A plan with what its model is worth."""

    plan: Plan
    value: float


def plan_with_drop(scored: Candidates, options: PlanOptions, judge: Dataset, build: Build = built, progress: Progress = silent) -> Plan:
    """The plan with the fewest MACs whose model loses no more than ``options.max_drop``; with targets, the plan that holds them too.

    Without targets the share of MACs is bisected, with eight models built and measured.

    Args:
        judge: data that were not used to score.

    Raises:
        TargetError: no such plan; with the drop of the best one.
    """
    limit = parse_drop(options.max_drop or "")
    original = outputs(scored.analysis.model, judge.batches())
    name, metric = metric_for(options.metric, judge.labels is not None, original)
    base = metric(original, judge.labels, original)

    def trial(targets: tuple[str, ...]) -> _Trial:
        plan = plan_for(scored, replace(options, targets=targets))
        return _Trial(plan, metric(outputs(build(scored, plan), judge.batches()), judge.labels, original))

    if options.targets:
        best = trial(options.targets)
        if base - best.value > limit + 1e-12:
            raise _too_much(name, base, best.value, limit, judge.samples, "at the targets")
    else:
        best = _smallest(trial, base - limit, progress)
        if base - best.value > limit + 1e-12:
            raise _too_much(name, base, best.value, limit, judge.samples, "at the lightest cut that was tried")
    word = f"{name} on {judge.samples} calibration samples that were not scored with: {base:.4f} -> {best.value:.4f}"
    return replace(best.plan, notes=(*best.plan.notes, f"{word} (drop {base - best.value:.4f}, allowed {limit:.4f})"))


def _smallest(trial: Callable[[tuple[str, ...]], _Trial], least: float, progress: Progress) -> _Trial:
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
            if found.value >= least - 1e-12:
                best, high = found, min(middle, found.plan.after.macs / found.plan.before.macs)
            else:
                low = middle
            advance(1)
    if best is None and lightest is None:
        raise TargetError("--max-drop: nothing can be removed under these options. Nothing was written.")
    found_best = best or lightest
    assert found_best is not None
    return found_best


def _too_much(name: str, base: float, value: float, limit: float, samples: int, where: str) -> TargetError:
    return TargetError(
        f"--max-drop cannot be held: {name} on {samples} held-out calibration samples falls from {base:.4f} to {value:.4f} {where} "
        f"(drop {base - value:.4f}, allowed {limit:.4f}). Nothing was written. Loosen --max-drop or the targets."
    )
