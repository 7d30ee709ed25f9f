"""What a bandit search removes for: the plan's ratio or counted targets, or a stand-in where those must be measured on models."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...core.errors import DataError, OptionError
from ...core.options import BanditOptions, PlanOptions, ScoreOptions
from ...core.system import user_function
from ...core.types import Array, BoolArray, FloatArray, Group, IntArray
from ...coupling.analysis import Analysis, Progress, describe, silent
from ...data.dataset import Dataset
from ...graph.save import write_text
from ...planning import bounds, parse_target
from ...planning.widths import choose, least
from . import BANDIT_SCORES, PREFIX, Reward, checked, make_reward
from .policies import POLICIES, Policy, Setting, summarise
from .pulls import Block, Pulls, Running

COUNTED = ("macs", "params")
STAND_IN = PlanOptions(ratio=0.5)


@dataclass(frozen=True)
class Aim:
    """``groups`` may shrink as ``options`` say: a ratio, or targets on MACs and parameters, uniform or global."""

    analysis: Analysis
    groups: Sequence[Group]
    options: PlanOptions

    def removed(self, scores: FloatArray) -> BoolArray:
        """Flags per unit of the model after the removal (all that may leave where the targets cannot be held)."""
        options, coupling = replace(self.options, align=None), self.analysis.coupling  # only the final plan needs aligned widths
        wanted = bounds([parse_target(text) for text in options.targets], self.figures(None))
        found = choose(coupling, self.groups, scores, options, self.figures, wanted)
        return least(coupling, self.groups, scores, options) if found is None else found

    def figures(self, removed: BoolArray | None) -> dict[str, float]:
        """What can be counted after a removal."""
        size = self.analysis.size(removed)
        return {"macs": size.macs, "params": float(size.params)}


def aim_of(analysis: Analysis, groups: Sequence[Group], options: PlanOptions) -> Aim:
    """The aim of a plan. Latency, memory, file size and ``max_drop`` are measured on models, too slow for a search: it then removes
    half of every group (which matters for `sar`), and the plan goes on from there, or stops before, in the order
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


# ---- steps of a bandit search ----------------------------------------------------------------------------------------

TIMED_GROUPS = 3
Pull = tuple[int, float, float]
"""Arm, and the mean reward and mean squared reward over the images."""


def order(policy: Policy, most: int, blocks: int) -> tuple[IntArray, IntArray]:
    """The arms that a policy selects, in the order in which they are pulled, and the block that each is pulled on: the j-th pull of
    any arm looks at block j, so that arms are compared on the same images."""
    arms = policy.select()[:most]
    places = policy.pulls[arms] % blocks
    order = np.argsort(places, kind="stable")
    return arms[order], places[order]


def columns(log: Sequence[Pull]) -> tuple[IntArray, FloatArray, FloatArray]:
    """Arms, means and squares of some pulls."""
    table = np.array(log, np.float64).reshape(-1, 3)
    return table[:, 0].astype(np.int64), table[:, 1], table[:, 2]


def replayed(policy: Policy, log: Sequence[Pull], horizon: int, blocks: int) -> Policy:
    """A fresh policy after the pulls of a log, which may end within a selection."""
    done = 0
    while done < len(log):
        arms = order(policy, horizon - done, blocks)[0][: len(log) - done]
        policy.update(arms, columns(log[done : done + len(arms)])[1])
        done += len(arms)
    return policy


def rate(engine: Pulls) -> float:
    """Pulls per second, from one timed run of some groups, weighted by their arms."""
    groups = np.unique(np.linspace(0, engine.owner.max(), TIMED_GROUPS).astype(np.int64))
    seconds = pulled = 0.0
    for group in groups:
        arms = np.flatnonzero(engine.owner == group)
        run = engine.runs(arms)[0]
        start = time.perf_counter()
        engine.outputs(run, 0)
        seconds += (time.perf_counter() - start) / len(run) * len(arms)
        pulled += len(arms)
    return pulled / max(seconds, 1e-9)


def gather(data: Dataset, order: IntArray, batch: int) -> list[Block]:
    """The samples ``order`` in blocks of ``batch``; padded to the batch of the model where that is fixed."""
    place = np.full(data.samples, -1, np.int64)
    place[order] = np.arange(len(order))
    held: dict[str, Array] = {}
    start = 0
    for feeds, count in data.batches():
        target = place[start : start + count]
        for name, array in feeds.items():
            rows = held.setdefault(name, np.empty((len(order), *array.shape[1:]), array.dtype))
            rows[target[target >= 0]] = array[:count][target >= 0]
        start += count
    blocks = []
    for first in range(0, len(order), batch):
        own = {name: rows[first : first + batch] for name, rows in held.items()}
        labels = None if data.labels is None else data.labels[order[first : first + batch]]
        if data.fixed and batch < data.batch:
            own = {name: np.concatenate([rows, np.repeat(rows[-1:], data.batch - batch, axis=0)]) for name, rows in own.items()}
        blocks.append(Block(own, batch, labels))
    return blocks


# ---- the scores ``bandit:*`` -----------------------------------------------------------------------------------------

DEFAULT_PULLS = 5
SPARE_BLOCKS = 4  # policies that choose may pull an arm on so many times the average number of blocks before images come again
BUDGET_BLOCKS = 64
INPUT_SHARE = 0.25  # of the memory, for input images
SHOW_SECONDS = 2.0
NOTHING = "stopped before the first pull; there is nothing to plan with. Give a larger --budget."


@dataclass(frozen=True)
class Found:
    """Importance per unit (larger = keep), what the user should know, and for every arm its ``units``, ``pulls``, ``mean`` reward and
    ``half_width`` of the 95 % interval of that."""

    scores: FloatArray
    notes: tuple[str, ...]
    arms: Mapping[str, Array]


def search(
    analysis: Analysis, name: str, data: Dataset | None, options: ScoreOptions, aim: tuple[PlanOptions, Sequence[Group]],
    progress: Progress = silent,
) -> Found:  # fmt: skip
    """Importance of the units of some groups by pulling them.

    Args:
        aim: what the plan asks for, and the groups that it may choose from.

    Raises:
        OptionError: options out of range, unknown policy or reward, or stopped before the first pull.
        DataError: no data, or data that the reward cannot use.
    """
    chosen = options.bandit or BanditOptions()
    policy = name.removeprefix(PREFIX)
    _check(policy, chosen)
    if data is None:
        raise DataError(f"score '{name}' needs calibration data: give --data, or use a score that needs none: magnitude")
    try:
        opened = _Search(analysis, policy, data, options, aim, progress)
    except KeyboardInterrupt:
        raise OptionError(NOTHING) from None
    return opened.run()


def _check(policy: str, options: BanditOptions) -> None:
    if policy not in POLICIES:
        raise OptionError(f"unknown policy 'bandit:{policy}'. Known: {', '.join(BANDIT_SCORES)}")
    if options.pulls is not None and options.budget is not None:
        raise OptionError("give either --pulls or --budget")
    for what, value in (("pulls", options.pulls), ("pull-batch", options.pull_batch)):
        if value is not None and value < 1:
            raise OptionError(f"--{what} {value}: expected at least 1")
    positive = (("budget", options.budget), ("temperature", options.temperature), ("pull-memory", options.pull_memory))
    for what, number in positive:
        if number is not None and not 0 < number < float("inf"):
            raise OptionError(f"--{what} {number}: expected a positive number")
    if not 0 <= options.epsilon <= 1:
        raise OptionError(f"--epsilon {options.epsilon}: expected a number from 0 to 1")


class _Search:
    """One search, with all sessions open and nothing pulled yet."""

    def __init__(
        self, analysis: Analysis, policy: str, data: Dataset, options: ScoreOptions, aim: tuple[PlanOptions, Sequence[Group]],
        progress: Progress,
    ) -> None:  # fmt: skip
        self.started = self.shown = time.monotonic()
        self.analysis, self.policy, self.data, self.progress = analysis, policy, data, progress
        self.seed, self.own = options.seed, options.bandit or BanditOptions()
        self.groups, self.aim = aim[1], aim_of(analysis, aim[1], aim[0])
        self.pulls = None if self.own.budget is not None else self.own.pulls or DEFAULT_PULLS
        self.log: list[Pull] = []
        self.text: str | None = None
        self.last: BoolArray = np.zeros(analysis.coupling.units, bool)
        blocks = self._blocks()
        self.engine = Pulls(analysis.prepared, analysis.coupling, self.groups, blocks, Running(self.own.pull_memory))
        labels = None if data.labels is None else np.concatenate([own.labels for own in blocks if own.labels is not None])
        self.reward = _reward(self.own.reward, self.engine, labels)
        self.deadline = time.monotonic() + (self.own.budget or np.inf)  # opening sessions is not part of the budget
        self.horizon = self._horizon()

    def _blocks(self) -> list[Block]:
        """Random images, the same for all arms, in blocks of ``batch`` (as many as the policy can use, the data hold, and the memory
        allows)."""
        data, own = self.data, self.own
        batch = min(own.pull_batch, data.samples, data.batch if data.fixed else own.pull_batch)
        wanted = data.samples // batch
        if self.policy != "leave-one-out":
            spread = 1 if self.policy in ("round-robin", "hedge") else SPARE_BLOCKS
            wanted = min(wanted, BUDGET_BLOCKS if self.pulls is None else self.pulls * spread)
        feeds = self.analysis.prepared.feeds
        size = sum(array.nbytes / max(1, len(array)) for array in feeds.values() if array.ndim)
        count = max(1, min(wanted, int(own.pull_memory * INPUT_SHARE / max(size * batch, 1)))) * batch
        drawn = np.random.default_rng(self.seed).permutation(data.samples)[:count]
        return gather(data, drawn, batch)

    def _horizon(self) -> int:
        """Pulls in all: asked for, of all data, or what the budget should last for."""
        arms = len(self.engine.arms)
        if self.policy == "leave-one-out":
            return arms * len(self.engine.blocks)
        if self.pulls is not None:
            return arms * self.pulls
        needed = POLICIES[self.policy].needs_horizon
        return max(arms, int((self.deadline - time.monotonic()) * rate(self.engine))) if needed else 2**62

    def run(self) -> Found:
        """Pull until the horizon, the deadline or Ctrl-C."""
        policy, ended, interrupted = self._fresh(), False, False
        total = self.horizon if self.own.budget is None else max(1, int(self.deadline - time.monotonic()))
        try:
            with self.progress("pulling", total) as advance:
                ended = self._play(policy, advance)
        except KeyboardInterrupt:
            interrupted = True
        if not self.log:
            raise OptionError(NOTHING)
        if not ended:
            policy = replayed(self._fresh(), self.log, self.horizon, len(self.engine.blocks))
        scores, notes = self._scores(policy.standing()), self._notes(policy, interrupted)
        arms = summarise(len(self.engine.arms), *columns(self.log), self.engine.blocks[0].count)
        if self.own.traces is not None:
            self._write(self.own.traces, scores, notes, arms)
        return Found(scores, notes, {"units": self.engine.arms, **arms})

    def _fresh(self) -> Policy:
        def quota(means: FloatArray) -> tuple[IntArray, IntArray]:
            removed = self.aim.removed(self._scores(means))[self.engine.arms]
            owner = self.engine.owner if self.aim.options.allocation == "uniform" else np.zeros_like(self.engine.owner)
            return owner, np.bincount(owner[removed], minlength=int(owner.max()) + 1)

        own = self.own
        return POLICIES[self.policy](Setting(len(self.engine.arms), self.horizon, self.seed, own.epsilon, own.temperature, quota))

    def _scores(self, standing: FloatArray) -> FloatArray:
        scores = np.ones(self.analysis.coupling.units)
        scores[self.engine.arms] = 1 - standing
        return scores

    def _play(self, policy: Policy, advance: Callable[..., None]) -> bool:
        """Whether the policy was done before the deadline."""
        while (done := len(self.log)) < self.horizon:
            arms, places = order(policy, self.horizon - done, len(self.engine.blocks))
            if not len(arms):
                return True
            at = 0
            while at < len(arms):
                now = time.monotonic()
                if now >= self.deadline:
                    return False
                same = int(np.searchsorted(places[at:], places[at], side="right"))
                run = self.engine.runs(arms[at : at + same])[0]
                self._pull(run, int(places[at]))
                at += len(run)
                self._tell(policy, advance, len(run) if self.own.budget is None else time.monotonic() - now)
            policy.update(arms, columns(self.log[done:])[1])
        return True

    def _pull(self, run: IntArray, block: int) -> None:
        reference, labels = self.engine.references[block], self.engine.blocks[block].labels
        found = [self.reward(reference, outputs, labels) for outputs in self.engine.outputs(run, block)]
        # at once, so that an interruption leaves whole pulls
        self.log.extend([(int(arm), float(item.mean()), float((item**2).mean())) for arm, item in zip(run, found, strict=True)])

    def _tell(self, policy: Policy, advance: Callable[..., None], steps: float) -> None:
        """Move the bar; now and then work out the current cut."""
        now = time.monotonic()
        if now - self.shown > SHOW_SECONDS and self.progress is not silent:
            removed = self.aim.removed(self._scores(policy.standing()))
            size, before = self.analysis.size(removed), self.analysis.size()
            changed = int((removed & ~self.last).sum())
            self.text = f"cut now: {removed.sum()} units, {size.macs / before.macs:.0%} of the MACs, {changed} new"
            self.last, self.shown = removed, now
        advance(steps, self.text)

    def _notes(self, policy: Policy, interrupted: bool) -> tuple[str, ...]:
        notes = []
        if interrupted:
            of = f" of {self.horizon}" if self.own.budget is None else ""
            notes.append(f"stopped by the user after {len(self.log)}{of} pulls; the plan is the best so far")
        missing = int((policy.pulls == 0).sum())
        if missing:
            notes.append(f"{missing} of {len(policy.pulls)} units were never pulled and rank at the mean of the others")
        return tuple(notes)

    def _write(self, path: str, scores: FloatArray, notes: Sequence[str], arms: Mapping[str, Array]) -> None:
        named = {
            "group": [group.name for group in self.groups for _ in range(group.width)],
            "position": [at for group in self.groups for at in range(group.width)],
        }
        traced = {
            "format": "sfp_onnx scores", "version": 1, "model_sha256": self.analysis.model.sha256,
            "score": PREFIX + self.policy, "data": describe(self.data), "notes": notes,
            "groups": {group.name: scores[group.units].tolist() for group in self.groups},
            "images_per_pull": self.own.pull_batch, "seconds": round(time.monotonic() - self.started, 3),
            "forwards": self.engine.forwards, "arms": named | {name: array.tolist() for name, array in arms.items()},
        }  # fmt: skip
        write_text(path, json.dumps(traced, indent=1) + "\n", self.analysis.model.paths)


def _reward(name: str | None, engine: Pulls, labels: IntArray | None) -> Reward:
    if name is None or ":" not in name:
        return make_reward(name, engine.references, labels)
    return checked(user_function(name, f"--reward {name}"), name)
