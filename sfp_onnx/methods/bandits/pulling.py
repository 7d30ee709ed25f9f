"""What a bandit search removes for: the plan's ratio or counted targets, or a stand-in where those must be measured on models."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...core.errors import DataError, OptionError
from ...core.options import BanditOptions, PlanOptions, RepairOptions, ScoreOptions
from ...core.system import user_function
from ...core.types import Array, BoolArray, FloatArray, Group, IntArray
from ...coupling.analysis import Analysis, Progress, describe, inspect, silent
from ...cut import cut
from ...data.dataset import Dataset
from ...graph.model import Model
from ...graph.save import write_text
from ...planning import bounds, parse_target
from ...planning.widths import choose, least
from ...repair import repaired
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

    def removed(self, scores: FloatArray, part: float = 1.0) -> BoolArray:
        """Flags per unit of the model after a part of the removal: that part of the ratio, or of the way down to every target (all
        that may leave where the targets cannot be held)."""
        options, coupling = replace(self.options, align=None), self.analysis.coupling  # only the final plan needs aligned widths
        if options.ratio is not None:
            options = replace(options, ratio=options.ratio * part)
        before = self.figures(None)
        wanted = bounds([parse_target(text) for text in options.targets], before)
        wanted = {what: before[what] - (before[what] - min(bound, before[what])) * part for what, bound in wanted.items()}
        found = choose(coupling, self.groups, scores, options, self.figures, wanted)
        return least(coupling, self.groups, scores, options) if found is None else found

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


# ---- what a bandit search has seen -----------------------------------------------------------------------------------

FORMAT = "sfp_onnx bandit state"


class Log:
    """Pulls of one round: arm, mean reward and mean squared reward over the images. ``horizon`` if it had to be measured;
    ``seconds`` were spent on pulling."""

    def __init__(self, rows: Sequence[Sequence[float]] = (), horizon: int | None = None, seconds: float = 0.0) -> None:
        self.rows = [(int(arm), float(mean), float(square)) for arm, mean, square in rows]
        self.horizon, self.seconds = horizon, seconds

    def add(self, rows: Sequence[tuple[int, float, float]]) -> None:
        """Append pulls (at once, so that an interruption leaves whole rows)."""
        self.rows.extend(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def arms(self, start: int, stop: int) -> list[int]:
        """The arms of some pulls."""
        return [row[0] for row in self.rows[start:stop]]

    def means(self, start: int, stop: int) -> FloatArray:
        """Mean rewards of some pulls."""
        return np.array([row[1] for row in self.rows[start:stop]])

    def columns(self) -> tuple[IntArray, FloatArray, FloatArray]:
        """Arms, means and squares."""
        table = np.array(self.rows, np.float64).reshape(-1, 3)
        return table[:, 0].astype(np.int64), table[:, 1], table[:, 2]


class State:
    """Logs by round, kept in a file if there is a path."""

    def __init__(self, path: str | None, key: Mapping[str, Any], inputs: Sequence[Path]) -> None:
        """Read the file if it exists.

        Raises:
            OptionError: it is damaged, or belongs to another search.
        """
        self.path, self.key, self.inputs = path, json.loads(json.dumps(key)), tuple(inputs)
        self.logs: dict[int, Log] = {}
        if path is not None and Path(path).exists():
            self._read(Path(path))

    def _read(self, path: Path) -> None:
        try:
            data = json.loads(path.read_text())
            if data["format"] != FORMAT:
                raise ValueError("not a bandit state")
            found = data["search"]
            self.logs = {int(number): Log(own["pulls"], own["horizon"], float(own["seconds"])) for number, own in data["rounds"].items()}
            if not all(arm >= 0 and 0 <= mean <= 1 for log in self.logs.values() for arm, mean, _ in log.rows):
                raise ValueError("rewards outside [0, 1]")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise OptionError(f"{path}: cannot read the state: {error}. Delete the file to start again.") from error
        other = [name for name in self.key if found.get(name) != self.key[name]]
        if other:
            raise OptionError(
                f"{path}: the state belongs to another search: {', '.join(other)} differ. Use the same options, or another --state."
            )

    def log(self, number: int) -> Log:
        """The log of a round."""
        return self.logs.setdefault(number, Log())

    def save(self) -> None:
        """Write the file, if there is one."""
        if self.path is not None:
            rounds = {str(number): {"horizon": log.horizon, "seconds": log.seconds, "pulls": log.rows} for number, log in self.logs.items()}
            data = {"format": FORMAT, "version": 1, "search": self.key, "rounds": rounds}
            write_text(self.path, json.dumps(data), self.inputs)


# ---- steps of a bandit search ----------------------------------------------------------------------------------------

TIMED_GROUPS = 3


def order(policy: Policy, most: int, blocks: int) -> tuple[IntArray, IntArray]:
    """The arms that a policy selects, in the order in which they are pulled, and the block that each is pulled on: the j-th pull of
    any arm looks at block j, so that arms are compared on the same images."""
    arms = policy.select()[:most]
    places = policy.pulls[arms] % blocks
    order = np.argsort(places, kind="stable")
    return arms[order], places[order]


def replay(policy: Policy, log: Log, horizon: int, blocks: int, partial: bool = True) -> int:
    """Bring a fresh policy to where a log ends; returns the pulls of all its whole selections. ``partial``: learn the
    rest too.

    Raises:
        OptionError: the policy would have pulled other arms.
    """
    done = 0
    while done < len(log):
        before = policy.random.bit_generator.state
        arms, _ = order(policy, horizon - done, blocks)
        known = min(len(arms), len(log) - done)
        if not known or arms[:known].tolist() != log.arms(done, done + known):
            raise OptionError("the state does not fit this search: it holds other pulls. Delete the file to start again.")
        if known < len(arms) and not partial:
            policy.random.bit_generator.state = before  # it selects the same again
            return done
        policy.update(arms[:known], log.means(done, done + known))
        done += known
    return done


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
    policy = name.removeprefix(PREFIX)
    _check(policy, chosen)
    if data is None:
        raise DataError(f"score '{name}' needs calibration data: give --data, or use a score that needs none: magnitude")
    return _Search(analysis, policy, data, options, aim, progress).run()


def _check(policy: str, options: BanditOptions) -> None:
    if policy not in POLICIES:
        raise OptionError(f"unknown policy 'bandit:{policy}'. Known: {', '.join(BANDIT_SCORES)}")
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
    reward: Reward
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
        trace = summarise(arms, *log.columns(), own.engine.blocks[0].count)
        self.traces.append({"round": own.number, "units": own.units.tolist(), **trace, "forwards": own.engine.forwards})
        timed_out = deadline is not None and own.number < self.own.rounds
        return not interrupted and (ended or timed_out)

    def _note(self, own: _Round, policy: Policy, log: Log, interrupted: bool, horizon: int) -> None:
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

    def _policy(self, own: _Round, horizon: int) -> Policy:
        def quota(means: FloatArray) -> tuple[IntArray, IntArray]:
            scores = self.scores.copy()
            scores[own.units] = self.floor + 1 - means
            removed = self.aim.removed(scores, own.part)[own.units]
            owner = own.engine.owner if self.aim.options.allocation == "uniform" else np.zeros(len(own.units), np.int64)
            return owner, np.bincount(owner[removed], minlength=int(owner.max()) + 1)

        setting = Setting(
            len(own.units), horizon, self.options.seed + own.number - 1, self.own.epsilon, self.own.temperature, quota
        )
        return POLICIES[self.policy](setting)

    def _horizon(self, own: _Round, log: Log, deadline: float | None) -> int:
        """Pulls in all: asked for, of all data, or what the budget should last for."""
        arms = len(own.units)
        if self.policy == "leave-one-out":
            return arms * len(own.engine.blocks)
        if self.pulls is not None:
            return arms * self.pulls
        if log.horizon is None:
            assert deadline is not None
            needed = POLICIES[self.policy].needs_horizon
            log.horizon = max(arms, int((deadline - time.monotonic()) * rate(own.engine))) if needed else 2**62
        return log.horizon

    def _play(self, own: _Round, policy: Policy, log: Log, limits: tuple[int, float | None], advance: Callable[..., None]) -> bool:
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

    def _tell(self, own: _Round, policy: Policy, advance: Callable[..., None], steps: float) -> None:
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
            "score": PREFIX + self.policy, "data": describe(self.data), "notes": self.notes,
            "groups": {group.name: self.scores[group.units].tolist() for group in self.groups},
            "images_per_pull": self.own.pull_batch, "seconds": round(time.monotonic() - self.started, 3), "rounds": self.traces,
        }  # fmt: skip
        if self.own.traces is not None:
            write_text(self.own.traces, json.dumps(traced, indent=1) + "\n", self.analysis.model.paths)
        return traced


def _reward(name: str | None, engine: Pulls, labels: IntArray | None) -> Reward:
    if name is None or ":" not in name:
        return make_reward(name, engine.references, labels)
    return checked(user_function(name, f"--reward {name}"), name)
