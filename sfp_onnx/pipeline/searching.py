"""The scores ``bandit:*``: pull arms, remove the safest, pull again on the pruned model, until the rounds are done."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import bandits
from ..cut import cut
from ..data import Dataset
from ..errors import DataError, OptionError
from ..extras import user_function
from ..graph import Model, write_text
from ..pulls import Block, Pulls, Running
from ..records import BanditOptions, BoolArray, FloatArray, Group, IntArray, PlanOptions, RepairOptions, ScoreOptions
from .analysis import Analysis, Progress, describe, inspect, silent
from .bandit_aim import aim_of
from .bandit_state import Log, State
from .bandit_steps import gather, order, rate, replay
from .repairing import repaired

DEFAULT_PULLS = 5
SPARE_BLOCKS = 4  # policies that choose may pull an arm on so many times the average number of blocks before images come again
BUDGET_BLOCKS = 64
INPUT_SHARE = 0.25  # of the memory, for input images
SHOW_SECONDS, SAVE_SECONDS = 2.0, 10.0
REPAIR_SAMPLES = 512  # of the repair between rounds, drawn at random
MASKS, ROUND_REPAIRS = ("zero", "mean"), ("none", "bias", "lstsq")


@dataclass(frozen=True)
class Found:
    """Importance per unit (larger = keep), what the user should know, and the traces as plain data."""

    scores: FloatArray
    notes: tuple[str, ...]
    traces: Mapping[str, Any]


def search(
    analysis: Analysis, name: str, data: Dataset | None, options: ScoreOptions, aim: tuple[PlanOptions, Sequence[Group]],
    progress: Progress = silent,
) -> Found:  # fmt: skip
    """Importance of the units of some groups by pulling them.

    Args:
        aim: what the plan asks for, and the groups that it may choose from.

    Raises:
        OptionError: options out of range, unknown policy or reward, or a state that belongs to another search.
        DataError: no data, or data that the reward cannot use.
    """
    chosen = options.bandit or BanditOptions()
    policy = name.removeprefix(bandits.PREFIX)
    _check(policy, chosen)
    if data is None:
        raise DataError(f"score '{name}' needs calibration data: give --data, or use a score that needs none: magnitude")
    return _Search(analysis, policy, data, options, aim, progress).run()


def _check(policy: str, options: BanditOptions) -> None:
    if policy not in bandits.POLICIES:
        raise OptionError(f"unknown policy 'bandit:{policy}'. Known: {', '.join(bandits.BANDIT_SCORES)}")
    if options.pulls is not None and options.budget is not None:
        raise OptionError("give either --pulls or --budget")
    for what, value, low in (("pulls", options.pulls, 1), ("pull-batch", options.pull_batch, 1), ("rounds", options.rounds, 1)):
        if value is not None and value < low:
            raise OptionError(f"--{what} {value}: expected at least {low}")
    positive = (("budget", options.budget), ("temperature", options.temperature), ("pull-memory", options.pull_memory))
    for what, number in positive:
        if number is not None and not 0 < number < float("inf"):
            raise OptionError(f"--{what} {number}: expected a positive number")
    for what, word, known in (("masked-by", options.masked_by, MASKS), ("round-repair", options.round_repair, ROUND_REPAIRS)):
        if word not in known:
            raise OptionError(f"unknown --{what} '{word}'. Known: {', '.join(known)}")
    if not 0 <= options.epsilon <= 1:
        raise OptionError(f"--epsilon {options.epsilon}: expected a number from 0 to 1")


@dataclass
class _Round:
    """One round on the (pruned) model: ``units`` are the original units of its arms; ``part`` of the removal is done after it."""

    number: int
    engine: Pulls
    reward: bandits.Reward
    units: IntArray
    part: float


class _Search:
    def __init__(
        self, analysis: Analysis, policy: str, data: Dataset, options: ScoreOptions, aim: tuple[PlanOptions, Sequence[Group]],
        progress: Progress,
    ) -> None:  # fmt: skip
        self.analysis, self.policy, self.data, self.progress = analysis, policy, data, progress
        self.options, self.own = options, options.bandit or BanditOptions()
        self.floor = 0.0  # what the scores of a round are added to: no unit that is left is worth less than one that is gone
        self.groups = aim[1]
        self.aim = aim_of(analysis, aim[1], aim[0])
        self.pulls = None if self.own.budget is not None else self.own.pulls or DEFAULT_PULLS
        self.scores = np.ones(analysis.coupling.units)
        self.state = State(self.own.state, self._key(), analysis.model.paths)
        self.started = time.monotonic()
        self.traces: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.shown, self.saved = (time.monotonic(),) * 2
        self.text: str | None = None
        self.last: BoolArray = np.zeros(analysis.coupling.units, bool)

    def _key(self) -> dict[str, Any]:
        """What a state must agree on to be resumed."""
        own = self.own
        return {
            "policy": self.policy, "model": self.analysis.model.sha256, "data": describe(self.data), "pulls": self.pulls,
            "batch": own.pull_batch, "seed": self.options.seed, "epsilon": own.epsilon, "temperature": own.temperature,
            "reward": own.reward, "masked_by": own.masked_by, "rounds": own.rounds, "round_repair": own.round_repair,
            "groups": [group.name for group in self.groups], "memory": own.pull_memory,
            "aim": [str(value) for value in vars(self.aim.options).values()],
        }  # fmt: skip

    # ---- rounds --------------------------------------------------------------------------------------------------

    def run(self) -> Found:
        current, units = self.analysis, np.concatenate([group.units for group in self.groups])
        groups, images = list(self.groups), self._blocks()
        for number in range(1, self.own.rounds + 1):
            try:
                own = self._opened(number, current, groups, units, images)
            except KeyboardInterrupt:
                self._stopped(number)
                break
            whole = self._round(own)
            if not whole or number == self.own.rounds:
                break
            try:
                current, groups, units = self._pruned(self._removed(own), number)
            except KeyboardInterrupt:
                self._stopped(number + 1)
                break
            if not groups:
                self.notes.append(f"round {number} left no group with two units to choose from")
                break
        return Found(self.scores, tuple(self.notes), self._traced())

    def _opened(self, number: int, current: Analysis, groups: list[Group], units: IntArray, images: list[Block]) -> _Round:
        blocks = self._part(images, number)
        how = Running(self.own.pull_memory, means=self.own.masked_by == "mean")
        engine = Pulls(current.prepared, current.coupling, groups, blocks, how)
        labels = None if blocks[0].labels is None else np.concatenate([own.labels for own in blocks if own.labels is not None])
        return _Round(number, engine, _reward(self.own.reward, engine, labels), units, number / self.own.rounds)

    def _stopped(self, number: int) -> None:
        """Interrupted before a round's first pull."""
        if number == 1:
            raise OptionError("stopped before the first pull; there is nothing to plan with. Give a larger --budget.")
        self.notes.append(f"stopped before the first pull of round {number}; the plan is that of the round before")

    def _removed(self, own: _Round) -> BoolArray:
        """What is gone after a round; what stays is worth more from now on."""
        removed = self.aim.removed(self.scores, own.part)
        every = np.concatenate([group.units for group in self.groups])
        gone, left = every[removed[every]], every[~removed[every]]
        if len(gone):
            floor = float(np.nextafter(self.scores[gone].max(), np.inf))
            self.scores[left] += floor - self.floor
            self.floor = floor
        return removed

    def _part(self, images: list[Block], number: int) -> list[Block]:
        """The blocks of a round: every round looks at other images, lest the search fits a few (where there are enough)."""
        size = len(images) // self.own.rounds
        return images[(number - 1) * size : number * size] if size and self.policy != "leave-one-out" else images

    def _pruned(self, removed: BoolArray, number: int) -> tuple[Analysis, list[Group], IntArray]:
        """The (repaired) model after the removal of a round, its groups that are still in play, and the original units of those."""
        shapes = {name: array.shape for name, array in self.analysis.prepared.feeds.items()}
        model = cut(self.analysis.prepared, self.analysis.coupling, removed) if removed.any() else self.analysis.model
        if removed.any() and self.own.round_repair != "none":
            model = self._repaired(model, removed, number)
        analysis = inspect(model, shapes, cut_layernorm=self.analysis.cut_layernorm)
        named = {group.name: group for group in analysis.coupling.groups}
        groups, units = [], [np.zeros(0, np.int64)]
        for group in self.groups:
            left = group.units[~removed[group.units]]
            own = named.get(group.name)
            if own is not None and own.width == len(left):
                groups.append(own)
                units.append(left)
            elif len(left) > 1:
                self.notes.append(f"group '{group.name}' changed with the cut; its units keep the scores of the round before")
        return analysis, groups, np.concatenate(units)

    def _repaired(self, model: Model, removed: BoolArray, number: int) -> Model:
        """The model re-fitted to the original, unless that takes it away from it on held-out samples."""
        seen = self.data.split(REPAIR_SAMPLES, self.options.seed)[1]
        options = RepairOptions(fit=self.own.round_repair, seed=self.options.seed, force=True)
        found = repaired(self.analysis, model, removed, seen, options, self.progress)
        better = found.after <= found.before
        self.notes.append(
            f"after round {number}: distance from the original ({found.measure}) on {found.checked} samples {found.before:.4g}, "
            f"repaired ({found.kind}) {found.after:.4g}{'' if better else '; not repaired'}"
        )
        return found.model if better else model

    def _round(self, own: _Round) -> bool:
        """Pull until the horizon or the deadline; sets the scores. False: stopped by the user or the budget before the round's end."""
        state, arms = self.state, len(own.units)
        log = state.log(own.number)
        share = (self.own.budget or 0.0) / self.own.rounds  # for pulling; opening sessions comes on top
        deadline = None if self.own.budget is None else time.monotonic() - log.seconds + share
        horizon = self._horizon(own, log, deadline)
        policy = self._policy(own, horizon)
        ended, interrupted = True, False
        total = horizon if deadline is None else max(1, int(deadline - time.monotonic()))
        title = "pulling" if self.own.rounds == 1 else f"pulling, round {own.number} of {self.own.rounds}"
        try:
            with self.progress(title, total) as advance:
                ended = self._play(own, policy, log, (horizon, deadline), advance)
        except KeyboardInterrupt:
            interrupted = True
        if interrupted or not ended:
            policy = self._policy(own, horizon)
            replay(policy, log, horizon, len(own.engine.blocks))
        if not len(log):
            self._stopped(own.number)
            return False
        self.scores[own.units] = self.floor + 1 - policy.standing()
        state.save()
        self._note(own, policy, log, interrupted, horizon)
        trace = bandits.summarise(arms, *log.columns(), own.engine.blocks[0].count)
        self.traces.append({"round": own.number, "units": own.units.tolist(), **trace, "forwards": own.engine.forwards})
        timed_out = deadline is not None and own.number < self.own.rounds
        return not interrupted and (ended or timed_out)

    def _note(self, own: _Round, policy: bandits.Policy, log: Log, interrupted: bool, horizon: int) -> None:
        missing = int((policy.pulls == 0).sum())
        if interrupted:
            of = f" of {horizon}" if self.own.budget is None else ""
            more = "; run again with the same --state to go on" if self.own.state else ""
            done = f"{len(log)}{of} pulls in round {own.number}"
            self.notes.append(f"stopped by the user after {done}; the plan is the best so far{more}")
        if missing:
            of = f"{missing} of {len(own.units)} units"
            self.notes.append(f"{of} were never pulled (round {own.number}) and rank at the mean of the others")

    # ---- one round -----------------------------------------------------------------------------------------------

    def _policy(self, own: _Round, horizon: int) -> bandits.Policy:
        def quota(means: FloatArray) -> tuple[IntArray, IntArray]:
            scores = self.scores.copy()
            scores[own.units] = self.floor + 1 - means
            removed = self.aim.removed(scores, own.part)[own.units]
            owner = own.engine.owner if self.aim.options.allocation == "uniform" else np.zeros(len(own.units), np.int64)
            return owner, np.bincount(owner[removed], minlength=int(owner.max()) + 1)

        setting = bandits.Setting(
            len(own.units), horizon, self.options.seed + own.number - 1, self.own.epsilon, self.own.temperature, quota
        )
        return bandits.POLICIES[self.policy](setting)

    def _horizon(self, own: _Round, log: Log, deadline: float | None) -> int:
        """Pulls in all: asked for, of all data, or what the budget should last for."""
        arms = len(own.units)
        if self.policy == "leave-one-out":
            return arms * len(own.engine.blocks)
        if self.pulls is not None:
            return arms * self.pulls
        if log.horizon is None:
            assert deadline is not None
            needed = bandits.POLICIES[self.policy].needs_horizon
            log.horizon = max(arms, int((deadline - time.monotonic()) * rate(own.engine))) if needed else 2**62
        return log.horizon

    def _play(self, own: _Round, policy: bandits.Policy, log: Log, limits: tuple[int, float | None], advance: Callable[..., None]) -> bool:
        """Whether the horizon was reached before the deadline."""
        horizon, deadline = limits
        blocks = len(own.engine.blocks)
        done = replay(policy, log, horizon, blocks, partial=False)
        if deadline is None:
            advance(done)
        while done < horizon:
            arms, places = order(policy, horizon - done, blocks)
            if not len(arms):
                return True
            at = len(log) - done
            while at < len(arms):
                now = time.monotonic()
                if deadline is not None and now >= deadline:
                    return False
                same = int(np.searchsorted(places[at:], places[at], side="right"))
                run = own.engine.runs(arms[at : at + same])[0]
                self._pull(own, log, run, int(places[at]))
                log.seconds += time.monotonic() - now
                at += len(run)
                self._tell(own, policy, advance, len(run) if deadline is None else time.monotonic() - now)
            policy.update(arms, log.means(done, done + len(arms)))
            done += len(arms)
        return True

    def _pull(self, own: _Round, log: Log, run: IntArray, block: int) -> None:
        engine = own.engine
        # The change of the pruned model's own outputs: against the original's, arms that seem to undo earlier damage are removed
        # together and overshoot.
        reference, labels = engine.references[block], engine.blocks[block].labels
        found = [own.reward(reference, outputs, labels) for outputs in engine.outputs(run, block)]
        log.add([(int(arm), float(item.mean()), float((item**2).mean())) for arm, item in zip(run, found, strict=True)])

    def _tell(self, own: _Round, policy: bandits.Policy, advance: Callable[..., None], steps: float) -> None:
        """Move the bar; now and then work out the current cut, and save the state."""
        now = time.monotonic()
        if now - self.shown > SHOW_SECONDS and self.progress is not silent:
            scores = self.scores.copy()
            scores[own.units] = self.floor + 1 - policy.standing()
            removed = self.aim.removed(scores, own.part)
            size, before = self.analysis.size(removed), self.analysis.size()
            changed = int((removed & ~self.last).sum())
            self.text = f"cut now: {removed.sum()} units, {size.macs / before.macs:.0%} of the MACs, {changed} new"
            self.last, self.shown = removed, now
        if now - self.saved > SAVE_SECONDS:
            self.state.save()
            self.saved = now
        advance(steps, self.text)

    # ---- images --------------------------------------------------------------------------------------------------

    def _blocks(self) -> list[Block]:
        """Random images, the same for all arms, in blocks of ``batch`` (as many as the policy can use, the data hold, and the memory
        allows)."""
        data, own = self.data, self.own
        batch = min(own.pull_batch, data.samples, data.batch if data.fixed else own.pull_batch)
        wanted = data.samples // batch
        if self.policy != "leave-one-out":
            spread = 1 if self.policy in ("round-robin", "hedge") else SPARE_BLOCKS
            wanted = min(wanted, self.own.rounds * (BUDGET_BLOCKS if self.pulls is None else self.pulls * spread))
        feeds = self.analysis.prepared.feeds
        size = sum(array.nbytes / max(1, len(array)) for array in feeds.values() if array.ndim)
        count = max(1, min(wanted, int(own.pull_memory * INPUT_SHARE / max(size * batch, 1)))) * batch
        drawn = np.random.default_rng(self.options.seed).permutation(data.samples)[:count]
        return gather(data, drawn, batch)

    def _traced(self) -> dict[str, Any]:
        position = np.full(self.analysis.coupling.units, -1, np.int64)
        names = np.full(self.analysis.coupling.units, "", object)
        for group in self.groups:
            position[group.units] = np.arange(group.width)
            names[group.units] = group.name
        for trace in self.traces:
            units = np.asarray(trace.pop("units"), np.int64)
            trace["group"], trace["position"] = names[units].tolist(), position[units].tolist()
        traced = {
            "format": "sfp_onnx scores", "version": 1, "model_sha256": self.analysis.model.sha256,
            "score": bandits.PREFIX + self.policy, "data": describe(self.data), "notes": self.notes,
            "groups": {group.name: self.scores[group.units].tolist() for group in self.groups},
            "images_per_pull": self.own.pull_batch, "seconds": round(time.monotonic() - self.started, 3), "rounds": self.traces,
        }  # fmt: skip
        if self.own.traces is not None:
            write_text(self.own.traces, json.dumps(traced, indent=1) + "\n", self.analysis.model.paths)
        return traced


def _reward(name: str | None, engine: Pulls, labels: IntArray | None) -> bandits.Reward:
    if name is None or ":" not in name:
        return bandits.make_reward(name, engine.references, labels)
    return bandits.checked(user_function(name, f"--reward {name}"), name)
