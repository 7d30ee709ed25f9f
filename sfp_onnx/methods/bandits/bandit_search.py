"""The search: what an ablation is worth (rewards), what a plan asks for (aims), and the policy played until its horizon or its budget."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ...core.errors import DataError, OptionError
from ...core.options import PlanOptions
from ...core.system import user_function
from ...core.types import Array, BoolArray, FloatArray, Group, IntArray
from ...coupling.analysis import Analysis, describe, silent
from ...data.dataset import Dataset
from ...evaluation.meaning import Kind, Meaning, log_probabilities, read
from ...graph.save import write_text
from ...planning import bounds, parse_target, widths
from ...runtime import observe
from ...scores.scoring import Scored, Setting
from . import PREFIX, REWARDS, BanditOptions, policies
from .ablation import Ablations, Block, Running

# ---- how little the outputs changed ----------------------------------------------------------------------------------

Outputs = Sequence[Array]
Reward = Callable[[Outputs, Outputs, IntArray | None], FloatArray]
TEMPERATURE = 4.0  # softens the outputs: the ranking is the same from 5 to 30 times fewer images than at 1


def make_reward(
    name: str | None, references: Sequence[Outputs], labels: IntArray | None, judged: Meaning | None = None, place: int = 0
) -> Reward:  # fmt: skip
    """The built-in reward of that name. None: for what is known of the output at ``place``, `divergence` for class scores and maps,
    `angle` for embeddings, `relative-error` of it alone for numbers and multi-label scores; `relative-error` of all where nothing is known.

    Args:
        references: the model's outputs on all blocks of images.
        judged: what is known of the output.

    Raises:
        DataError: the reward needs labels, class scores or floating outputs, and there are none.
        OptionError: unknown name.
    """
    first = references[0][place]
    axis = 1 if judged is None or judged.axis is None else judged.axis
    scores = judged is not None and judged.kind in (Kind.CLASSES, Kind.MAP) and judged.axis is not None
    classes = first.dtype.kind == "f" and (scores or (first.ndim == 2 and first.shape[1] > 1))  # may be scores, if it is asked for
    embeds = judged is not None and judged.kind is Kind.EMBEDDING and first.dtype.kind == "f"
    named = name or ("divergence" if classes and scores else "angle" if embeds else "relative-error")
    if named == "divergence":
        if not classes:
            raise DataError("reward 'divergence' needs class scores (one row of at least two per image); use relative-error")
        return partial(divergence, place=place, axis=axis)
    if named == "angle":
        if first.dtype.kind != "f":
            raise DataError("reward 'angle' needs a floating output; use relative-error")
        return partial(angle, place=place)
    if named == "relative-error":
        alone = not name and judged is not None and judged.kind in (Kind.NUMBERS, Kind.MARKS) and first.dtype.kind == "f"
        return _relative_error(references, place if alone else None)
    if named != "loss":
        raise OptionError(f"unknown reward '{name}'. Known: {', '.join(REWARDS)}, or module:function")
    if labels is None:
        raise DataError("reward 'loss' needs labels (--labels, or an array 'labels' in the data); the default reward needs none")
    if classes and first.ndim == 2:
        return partial(cross_entropy, place=place)
    if first.size != len(first):
        raise DataError(f"reward 'loss' needs class scores or one number per image; the output has shape {list(first.shape)}")
    return _squared_error(float(np.var(labels.astype(np.float64))) or 1.0, place)


def divergence(reference: Outputs, outputs: Outputs, labels: IntArray | None = None, place: int = 0, axis: int = 1) -> FloatArray:
    """r = 1 - min(1, sqrt(KL(softmax(z0 / T) || softmax(z / T)) / 2)), T = 4; of a map the mean KL over its places.

    By Pinsker's inequality a lower bound of 1 - the total variation between the softened outputs.
    """
    p, q = (log_probabilities(np.moveaxis(part[place], axis, -1), TEMPERATURE) for part in (reference, outputs))
    kl = (np.exp(p) * (p - q)).sum(-1).reshape(len(p), -1).mean(1)
    return _bounded(1 - np.sqrt(np.maximum(kl, 0) / 2))


def angle(reference: Outputs, outputs: Outputs, labels: IntArray | None = None, place: int = 0) -> FloatArray:
    """r = 1 - sqrt((1 - cos) / 2), with the cosine of the angle between the vectors (last axis), mean over those of a sample: half their
    distance on the unit sphere."""
    one, other = (part[place].astype(np.float64).reshape(len(part[place]), -1, part[place].shape[-1]) for part in (reference, outputs))
    sizes = np.maximum(np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1), 1e-12)
    cosine = ((one * other).sum(-1) / sizes).mean(1)
    return _bounded(1 - np.sqrt(np.maximum(1 - cosine, 0) / 2))


def _relative_error(references: Sequence[Outputs], place: int | None) -> Reward:
    """r = 1 - min(1, ||z - z0|| / s), s^2 = mean over images of ||z0 - mean z0||^2: s is fixed by the unmasked model before the search.

    All floating outputs count, or the one at ``place``. Where the model gives the same for all images, s is ||z0|| (or 1).
    """
    kept = [index for index, array in enumerate(references[0]) if array.dtype.kind == "f" and place in (None, index)]
    if not kept:
        raise DataError("the model has no floating output to compare; give reward=module:function")
    blocks = [[block[index] for index in kept] for block in references]
    sizes = {_flat(block).shape[1] for block in blocks}
    if len(sizes) > 1:
        raise DataError(f"bandit scores compare outputs of one size for all samples, these have {min(sizes)} to {max(sizes)} values. "
                        "Give reward=module:function, or use a score such as obs or contribution.")  # fmt: skip
    count = sum(len(block[0]) for block in blocks)
    centre = sum(_flat(block).sum(0) for block in blocks) / count
    scale = (sum(float(((_flat(block) - centre) ** 2).sum()) for block in blocks) / count) ** 0.5
    scale = scale or float((centre**2).sum()) ** 0.5 or 1.0

    def relative_error(reference: Outputs, outputs: Outputs, labels: IntArray | None = None) -> FloatArray:
        change = _flat([outputs[index] for index in kept]) - _flat([reference[index] for index in kept])
        return _bounded(1 - np.sqrt((change**2).sum(1)) / scale)

    return relative_error


def cross_entropy(reference: Outputs, outputs: Outputs, labels: IntArray | None, place: int = 0) -> FloatArray:
    """d = CE(z) - CE(z0), the change of the loss that the paper measures; r = 1 / (1 + exp(d)) = p(y) / (p(y) + p0(y)), 1/2 where
    nothing changed."""
    assert labels is not None
    rows = np.arange(len(labels))
    change = log_probabilities(reference[place])[rows, labels] - log_probabilities(outputs[place])[rows, labels]
    return _logistic(change)


def _squared_error(spread: float, place: int) -> Reward:
    def squared_error(reference: Outputs, outputs: Outputs, labels: IntArray | None) -> FloatArray:
        """d = ((z - y)^2 - (z0 - y)^2) / var(y); r = 1 / (1 + exp(d))."""
        assert labels is not None
        changed, before = (item[place].astype(np.float64).reshape(-1) for item in (outputs, reference))
        return _logistic(((changed - labels) ** 2 - (before - labels) ** 2) / spread)

    return squared_error


def _logistic(change: FloatArray) -> FloatArray:
    return _bounded(1 / (1 + np.exp(np.clip(change, -700, 700))))


def _flat(arrays: Sequence[Array]) -> FloatArray:
    return np.concatenate([array.reshape(len(array), -1).astype(np.float64) for array in arrays], axis=1)


def _bounded(rewards: FloatArray) -> FloatArray:
    """Into [0, 1]; outputs that are not numbers any more are the worst."""
    return np.clip(np.nan_to_num(rewards, nan=0.0), 0.0, 1.0)


def checked(reward: Reward, name: str) -> Reward:
    """A user's reward whose values are checked at every ablation.

    Raises:
        OptionError: it fails, or does not give one number in [0, 1] per image.
    """

    def call(reference: Outputs, outputs: Outputs, labels: IntArray | None) -> FloatArray:
        images = len(reference[0])
        try:
            values = np.asarray(reward(reference, outputs, labels), np.float64)
        except Exception as error:
            raise OptionError(f"reward={name} failed: {type(error).__name__}: {error}") from error
        if values.shape != (images,) or not ((values >= 0) & (values <= 1)).all():
            span = f" with values from {values.min():.3g} to {values.max():.3g}" if values.size else ""
            raise OptionError(f"reward={name}: expected {images} numbers in [0, 1], one per image; found shape {list(values.shape)}{span}")
        return values

    return call


# ---- what a plan asks for --------------------------------------------------------------------------------------------

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
        wanted = bounds([parse_target(text) for text in options.targets], _counted(self.analysis))
        chosen = widths.choose(coupling, self.groups, scores, options, lambda removed: _counted(self.analysis, removed), wanted)
        return widths.least(coupling, self.groups, scores, options) if chosen is None else chosen


def _counted(analysis: Analysis, removed: BoolArray | None = None) -> dict[str, float]:
    """What can be counted after a removal."""
    size = analysis.size(removed)
    return {"macs": size.macs, "params": float(size.params)}


def aim_of(analysis: Analysis, groups: Sequence[Group] | None = None, options: PlanOptions | None = None) -> Aim:
    """The aim of a plan. Without one, and where latency, memory, file size or ``max_drop`` would have to be measured on models (too slow
    for a search), half of every group (which matters for `sar`); the plan goes on from there, or stops before, in the order found."""
    options, groups = options or STAND_IN, analysis.coupling.groups if groups is None else groups
    wanted, before = [parse_target(text) for text in options.targets], _counted(analysis)
    counted = all(target.what in before for target in wanted)
    shrinks = counted and any(bound < before[what] for what, bound in bounds(wanted, before).items())  # a sweep starts from macs=100%
    chosen = options if options.ratio is not None or shrinks else replace(options, ratio=STAND_IN.ratio, targets=())
    return Aim(analysis, groups, replace(chosen, allocation="global" if options.allocation == "global" else "uniform", max_drop=None))


# ---- images and time -------------------------------------------------------------------------------------------------


def rate(engine: Ablations) -> float:
    """Ablations per second, from one timed run of some groups, weighted by their units."""
    seconds = done = 0.0
    for group in np.unique(np.linspace(0, engine.owner.max(), TIMED_GROUPS).astype(np.int64)):
        places = np.flatnonzero(engine.owner == group)
        run = engine.runs(places)[0]
        start = time.perf_counter()
        engine.outputs(run, 0)
        seconds += (time.perf_counter() - start) / len(run) * len(places)
        done += len(places)
    return done / max(seconds, 1e-9)


def gather(data: Dataset, order: IntArray, batch: int) -> list[Block]:
    """The samples ``order`` in blocks of ``batch``; padded to the batch of the model where that is fixed."""
    if not data.plain:
        parts = (data.part(np.sort(order[first : first + batch])) for first in range(0, len(order), batch))
        return [Block(*made, part.labels, made.padding) for part in parts for made in part.batches()]
    place = np.full(data.samples, -1, np.int64)
    place[order] = np.arange(len(order))
    held, start = dict[str, Array](), 0
    for feeds, count in data.batches():
        target = place[start : start + count]
        for name, array in feeds.items():
            rows = held.setdefault(name, np.empty((len(order), *array.shape[1:]), array.dtype))
            rows[target[target >= 0]] = array[:count][target >= 0]
        start += count
    blocks = []
    for first in range(0, len(order), batch):
        images = {name: rows[first : first + batch] for name, rows in held.items()}
        labels = None if data.classes is None else data.classes[order[first : first + batch]]
        padding = data.batch - batch if data.fixed else 0
        if padding:
            images = {name: np.concatenate([rows, np.repeat(rows[-1:], padding, axis=0)]) for name, rows in images.items()}
        blocks.append(Block(images, batch, labels, padding))
    return blocks


# ---- the scores ``bandit:*`` -----------------------------------------------------------------------------------------

DEFAULT_PULLS, TIMED_GROUPS = 5, 3
SPARE_BLOCKS = 4  # policies that choose may ablate a unit on so many times the average number of blocks before images come again
BUDGET_BLOCKS = 64
INPUT_SHARE = 0.25  # of the memory, for input images
SHOW_SECONDS = 2.0
NOTHING = "stopped before the first ablation; there is nothing to plan with. Give a larger budget."


def search(policy: str, analysis: Analysis, data: Dataset, setting: Setting) -> Scored:
    """Importance of the units of some groups by ablations: ``setting.groups`` as ``setting.plan`` asks for, else half of every group.

    Raises:
        OptionError: unknown reward, or stopped before the first ablation.
        DataError: data that the reward cannot use.
    """
    try:
        opened = _Search(policy, analysis, data, setting)
    except KeyboardInterrupt:
        raise OptionError(NOTHING) from None
    return opened.run()


class _Search:
    """One search, with all sessions open and nothing ablated yet."""

    def __init__(self, policy: str, analysis: Analysis, data: Dataset, setting: Setting) -> None:
        self.started = self.shown = time.monotonic()
        self.analysis, self.policy, self.data, self.progress = analysis, policy, data, setting.progress
        self.seed, self.options = setting.seed, setting.options or BanditOptions()
        self.aim = aim_of(analysis, setting.groups, setting.plan)
        self.pulls = None if self.options.budget is not None else self.options.pulls or DEFAULT_PULLS
        self.log: list[policies.Pull] = []
        self.text: str | None = None
        blocks = self._blocks()
        self.engine = Ablations(analysis.prepared, analysis.coupling, self.aim.groups, blocks, Running(self.options.memory))
        labels = None if data.classes is None else np.concatenate([block.labels for block in blocks if block.labels is not None])
        named = self.options.reward or ""
        theirs = checked(user_function(named, f"reward={named}"), named) if ":" in named else None
        seen = next(iter(observe(analysis.model, [(blocks[0].feeds, blocks[0].count)])))
        judged = read(analysis.model, seen, labels, setting.measures, data.name).judged
        place = self.engine.names.index(judged.outputs[0])
        self.reward = theirs or make_reward(named or None, self.engine.references, labels, judged, place)
        self.deadline = time.monotonic() + (self.options.budget or np.inf)  # opening sessions is not part of the budget
        self.horizon = self._horizon()

    def _blocks(self) -> list[Block]:
        """Random images, the same for all units, in blocks: as many as the policy can use, the data hold, and the memory allows."""
        data, options = self.data, self.options
        batch = 1 if data.groups is not None else min(options.batch, data.samples, data.batch if data.fixed else options.batch)
        wanted = data.samples // batch
        if self.policy != "leave-one-out":
            spread = 1 if self.policy in ("round-robin", "hedge") else SPARE_BLOCKS
            wanted = min(wanted, BUDGET_BLOCKS if self.pulls is None else self.pulls * spread)
        size = sum(array.nbytes / max(1, len(array)) for array in self.analysis.prepared.feeds.values() if array.ndim)
        count = max(1, min(wanted, int(options.memory * INPUT_SHARE / max(size * batch, 1)))) * batch
        return gather(data, np.random.default_rng(self.seed).permutation(data.samples)[:count], batch)

    def _horizon(self) -> int:
        """Ablations in all: asked for, of all data, or what the budget should last for."""
        arms = len(self.engine.units)
        if self.policy == "leave-one-out":
            return arms * len(self.engine.blocks)
        if self.pulls is not None:
            return arms * self.pulls
        if not policies.POLICIES[self.policy].needs_horizon:
            return 2**62
        return max(arms, int((self.deadline - time.monotonic()) * rate(self.engine)))

    def run(self) -> Scored:
        """Ablate until the horizon, the deadline or Ctrl-C."""
        policy, interrupted = self._policy(), False
        total = self.horizon if self.options.budget is None else max(1, int(self.deadline - time.monotonic()))
        try:
            with self.progress("ablating", total) as advance:
                self._play(policy, advance)
        except KeyboardInterrupt:
            interrupted = True
        if not self.log:
            raise OptionError(NOTHING)
        scores, notes = self._scores(policy.standing()), self._notes(policy, interrupted)
        summary = policies.summarise(len(self.engine.units), self.log, self.engine.blocks[0].count)
        ablated = {f"arms/{name}": array for name, array in ({"units": self.engine.units} | summary).items()}
        if self.options.traces is not None:
            self._write(self.options.traces, scores, notes, summary)
        return Scored(PREFIX + self.policy, scores, notes=notes, arrays=ablated.items)

    def _policy(self) -> policies.Policy:
        def quota(means: FloatArray) -> tuple[IntArray, IntArray]:
            removed = self.aim.removed(self._scores(means))[self.engine.units]
            owner = self.engine.owner if self.aim.options.allocation == "uniform" else np.zeros_like(self.engine.owner)
            return owner, np.bincount(owner[removed], minlength=int(owner.max()) + 1)

        arms, options = len(self.engine.units), self.options
        return policies.POLICIES[self.policy](policies.Setting(arms, self.horizon, self.seed, options.epsilon, options.temperature, quota))

    def _scores(self, standing: FloatArray) -> FloatArray:
        scores = np.ones(self.analysis.coupling.units)
        scores[self.engine.units] = 1 - standing
        return scores

    def _play(self, policy: policies.Policy, advance: Callable[..., None]) -> None:
        """Until the policy is done or the deadline; the policy learns of whole ablations only, also where an interruption ends them."""
        while (done := len(self.log)) < self.horizon:
            arms, places = policies.order(policy, self.horizon - done, len(self.engine.blocks))
            if not len(arms):
                return
            try:
                while (at := len(self.log) - done) < len(arms):
                    now = time.monotonic()
                    if now >= self.deadline:
                        return
                    same = int(np.searchsorted(places[at:], places[at], side="right"))
                    run = self.engine.runs(arms[at : at + same])[0]
                    self._ablate(run, int(places[at]))
                    self._tell(policy, advance, len(run) if self.options.budget is None else time.monotonic() - now)
            finally:
                policy.update(arms[: len(self.log) - done], np.array([mean for _, mean, _ in self.log[done:]]))

    def _ablate(self, run: IntArray, block: int) -> None:
        reference, labels = self.engine.references[block], self.engine.blocks[block].labels
        rewards = [self.reward(reference, outputs, labels) for outputs in self.engine.outputs(run, block)]
        # at once, so that an interruption leaves whole ablations
        self.log += [(int(arm), float(item.mean()), float((item**2).mean())) for arm, item in zip(run, rewards, strict=True)]

    def _tell(self, policy: policies.Policy, advance: Callable[..., None], steps: float) -> None:
        """Move the bar; now and then work out the current cut."""
        now = time.monotonic()
        if now - self.shown > SHOW_SECONDS and self.progress is not silent:
            removed = self.aim.removed(self._scores(policy.standing()))
            size, before = self.analysis.size(removed), self.analysis.size()
            self.text = f"cut now: {removed.sum()} sets of coupled channels, {size.macs / before.macs:.0%} of the MACs"
            self.shown = now
        advance(steps, self.text)

    def _notes(self, policy: policies.Policy, interrupted: bool) -> tuple[str, ...]:
        notes = []
        if interrupted:
            of = f" of {self.horizon}" if self.options.budget is None else ""
            notes.append(f"stopped by the user after {len(self.log)}{of} ablations; the plan is the best so far")
        if missing := int((policy.pulls == 0).sum()):
            notes.append(f"{missing} of {len(policy.pulls)} sets of coupled channels were never ablated and rank at the mean of the others")
        return tuple(notes)

    def _write(self, path: str, scores: FloatArray, notes: Sequence[str], summary: Mapping[str, Array]) -> None:
        named = {"group": [group.name for group in self.aim.groups for _ in range(group.width)],
                 "position": [at for group in self.aim.groups for at in range(group.width)]}  # fmt: skip
        traced = {
            "format": "sfp_onnx scores", "version": 1, "model_sha256": self.analysis.model.sha256, "score": PREFIX + self.policy,
            "data": describe(self.data), "notes": notes, "groups": {group.name: scores[group.units].tolist() for group in self.aim.groups},
            "images_per_pull": self.options.batch, "seconds": round(time.monotonic() - self.started, 3), "forwards": self.engine.forwards,
            "arms": named | {name: array.tolist() for name, array in summary.items()},
        }  # fmt: skip
        write_text(path, json.dumps(traced, indent=1) + "\n", self.analysis.model.paths)
