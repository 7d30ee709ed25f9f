"""What a bandit search removes for: the plan's ratio or counted targets, or a stand-in where those must be measured on models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .. import plan as plans
from ..records import BoolArray, FloatArray, Group, PlanOptions
from ..targets import bounds, parse_target
from .analysis import Analysis

COUNTED = ("macs", "params")
STAND_IN = PlanOptions(ratio=0.5)


@dataclass(frozen=True)
class Aim:
    """``groups`` may shrink as ``options`` say: a ratio, or targets on MACs and parameters, uniform or global."""

    analysis: Analysis
    groups: Sequence[Group]
    options: PlanOptions

    def removed(self, scores: FloatArray, part: float = 1.0) -> BoolArray:
        """Flags per unit of the model after a part of the removal: that part of the ratio, or of the way down to every target (all
        that may leave where the targets cannot be held)."""
        options, coupling = replace(self.options, align=None), self.analysis.coupling  # only the final plan needs aligned widths
        if options.ratio is not None:
            options = replace(options, ratio=options.ratio * part)
        before = self.figures(None)
        wanted = bounds([parse_target(text) for text in options.targets], before)
        wanted = {what: before[what] - (before[what] - min(bound, before[what])) * part for what, bound in wanted.items()}
        found = plans.choose(coupling, self.groups, scores, options, self.figures, wanted)
        return plans.least(coupling, self.groups, scores, options) if found is None else found

    def figures(self, removed: BoolArray | None) -> dict[str, float]:
        """What can be counted after a removal."""
        size = self.analysis.size(removed)
        return {"macs": size.macs, "params": float(size.params)}


def aim_of(analysis: Analysis, groups: Sequence[Group], options: PlanOptions) -> Aim:
    """The aim of a plan. Latency, memory, file size and ``max_drop`` are measured on models, too slow for a search: it then removes
    half of every group (which matters for `sar`, and for rounds), and the plan goes on from there, or stops before, in the order
    that was found."""
    counted = options.ratio is not None or _shrinks(analysis, options.targets)
    chosen = options if counted else replace(options, ratio=STAND_IN.ratio, targets=())
    allocation = "global" if options.allocation == "global" else "uniform"
    return Aim(analysis, groups, replace(chosen, allocation=allocation, max_drop=None))


def _shrinks(analysis: Analysis, targets: Sequence[str]) -> bool:
    """Whether targets are all counted and one of them is below what the model has (a sweep starts from macs=100%)."""
    wanted = [parse_target(text) for text in targets]
    if not wanted or any(target.what not in COUNTED for target in wanted):
        return False
    size = analysis.size()
    before = {"macs": size.macs, "params": float(size.params)}
    return any(bound < before[what] for what, bound in bounds(wanted, before).items())
