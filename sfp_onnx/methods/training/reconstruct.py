"""What a pruned network is fitted to: the activations and answers of the original, channel by channel that is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from math import prod
from typing import Any

import numpy as np
import torch

from ... import graph
from ...core.system import folder
from ...core.types import IntArray, Tokens
from .bridge import Network
from .engine import Checkpoint, Schedule, Task, Tell, fit, share
from .functions import Tensor

LEAST = 2  # matrices (or kernels) that a block holds at least: they are fitted jointly
DILUTED = 0.05  # share of zeros from which on a weight counts as diluted
Kept = Mapping[str, Sequence[tuple[int, IntArray]]]
"""Of tensors of the original: axes that lost channels, and which indices are left."""


@dataclass(frozen=True)
class Block:
    """A part of both networks, from ``start`` (none: from the inputs) to ``ends``, and the ``weights`` that only it reads."""

    start: tuple[str, ...]
    ends: tuple[str, ...]
    weights: tuple[str, ...]


@dataclass
class Samples:
    """Tensors by name, one row a sample: the first ``train`` are trained on, the others judge. ``batch`` are run at once. ``tokens``: rows
    that an input switches off."""

    values: dict[str, Tensor]
    train: int
    batch: int
    whole: bool = False
    tokens: Tokens | None = None

    @property
    def count(self) -> int:
        """All rows."""
        return len(next(iter(self.values.values())))

    def rows(self, chosen: Any) -> dict[str, Tensor]:
        """Some of the rows."""
        return {name: value[chosen] for name, value in self.values.items()}

    def judge(self, loss: Callable[[IntArray], Tensor]) -> float:
        """The mean loss of the rows that judge."""
        held = np.arange(self.train, self.count)
        parts = [held[place : place + self.batch] for place in range(0, len(held), self.batch)]
        parts = [part for part in parts if not self.whole or len(part) == self.batch]
        with torch.no_grad():
            return sum(float(loss(part)) * len(part) for part in parts) / max(1, sum(map(len, parts)))

    def there(self, names: Sequence[str], made: Sequence[Tensor], rows: Mapping[str, Tensor]) -> list[Tensor]:
        """Tensors of some rows without the tokens that are switched off: these count in no loss."""
        if self.tokens is None:
            return list(made)
        on = self.tokens.on({self.tokens.mask: rows[self.tokens.mask].cpu().numpy()})
        return [self.tokens.there(name, value, on) for name, value in zip(names, made, strict=True)]


# ---- where blocks begin and end --------------------------------------------------------------------------------------


def active(network: Network) -> set[str]:
    """Tensors that depend on the inputs through trained weights; all others are at hand whenever the inputs are."""
    fed = {port.name for port in graph.inputs(network.model)}
    trained = set(network.parameters)
    on_inputs, on_both = set(fed), set[str]()
    for node in network.index.nodes:
        data = on_inputs & set(node.reads)
        weights = trained & set(node.reads)
        if data:
            on_inputs.update(node.outputs)
        if data and (weights or on_both & set(node.reads)):
            on_both.update(node.outputs)
        elif weights:
            trained.update(node.outputs)
    return on_both - {""}


def separators(network: Network) -> list[str]:
    """Tensors that all paths from trained weights to the outputs go through, in their order."""
    outputs = {port.name for port in graph.outputs(network.model)}
    nodes, tensors = network.index.needed(outputs), active(network)
    last = {name: node.index for node in nodes for name in node.reads}
    live, found = set[str](), []
    for node in nodes:
        live = {name for name in live if name in outputs or last[name] > node.index}
        live |= {name for name in node.outputs if name in tensors and (name in outputs or name in last)}
        if len(live) == 1 and node.outputs[0] in live:
            found.append(node.outputs[0])
    return found


def comparable(student: Network, teacher: Network, names: Iterable[str], kept: Kept, feeds: Mapping[str, Tensor]) -> list[str]:
    """Of the student's tensors those that the teacher has, too, with one row a sample and the same shape where channels are left."""
    known = [name for name in dict.fromkeys(names) if name in teacher.index.makers]
    rows = {len(value) for value in feeds.values() if value.ndim}
    with torch.no_grad():
        ours, theirs = student.run(feeds, known), teacher.run(feeds, known)
    pairs = zip(known, ours, theirs, strict=True)
    return [
        name for name, own, other in pairs
        if own.is_floating_point() and own.ndim > 1 and {len(own)} == rows and own.shape == chosen(other, name, kept).shape
    ]  # fmt: skip


def chosen(value: Tensor, name: str, kept: Kept) -> Tensor:
    """Of a tensor of the original the channels that are left."""
    for axis, indices in kept.get(name, ()):
        value = value.index_select(axis, torch.as_tensor(indices, device=value.device))
    return value


def blocks(student: Network, teacher: Network, kept: Kept, feeds: Mapping[str, Tensor]) -> list[Block]:
    """Consecutive parts between separators, each as short as may be with `LEAST` matrices of the original (two that stand for one are one
    layer still) and all that follows them up to the next one: what a normalisation takes out again (mean, scale) is no error."""
    outputs = [port.name for port in graph.outputs(student.model)]
    ends = [name for name in comparable(student, teacher, separators(student), kept, feeds) if name not in outputs]
    answers = comparable(student, teacher, outputs, kept, feeds)
    found: list[Block] = []
    start: tuple[str, ...] = ()
    for name, following in zip_longest(ends, ends[1:]):
        after = (following,) if following else tuple(outputs)
        if matrices(teacher, (name,), after) and matrices(teacher, start, (name,)) >= LEAST:
            found.append(Block(start, (name,), weights_between(student, start, (name,))))
            start = (name,)
    rest = Block(start, tuple(answers), weights_between(student, start, tuple(answers)))
    return [*found, rest] if rest.ends and rest.weights else found


def weights_between(network: Network, start: Sequence[str], ends: Sequence[str]) -> tuple[str, ...]:
    """Parameters that are read between tensors, and nowhere else."""
    nodes = network.index.needed(ends, set(start))
    inside = {node.index for node in nodes}
    read = dict.fromkeys(name for node in nodes for name in node.reads if name in network.parameters)
    return tuple(name for name in read if all(node.index in inside for node in network.index.reading(name)))


def matrices(network: Network, start: Sequence[str], ends: Sequence[str]) -> int:
    """How many of the weights between tensors are matrices or kernels."""
    return sum(network.parameters[name].ndim > 1 for name in weights_between(network, start, ends))


# ---- running parts over all samples ----------------------------------------------------------------------------------


def through(network: Network, samples: Samples, wanted: Sequence[str], memory: int) -> dict[str, Tensor]:
    """Tensors of all samples, in memory or in a file."""
    made: dict[str, Tensor] = {}
    for first in range(0, samples.count, samples.batch):
        places = np.minimum(np.arange(first, first + samples.batch), samples.count - 1)  # a fixed batch is filled up
        places = places if samples.whole else places[: samples.count - first]
        with torch.no_grad():
            results = network.run(samples.rows(places), wanted)
        for name, value in zip(wanted, results, strict=True):
            if name not in made:
                made[name] = _held((samples.count, *value.shape[1:]), memory)
            made[name][first : first + samples.batch] = value[: samples.count - first].cpu()
    return made


def _held(shape: tuple[int, ...], memory: int) -> Tensor:
    """Room for floats: of a file where it is more than may be held in memory."""
    if prod(shape) * 4 <= memory:
        return torch.empty(shape)
    path = folder() / f"activations-{time.monotonic_ns()}"
    array = np.memmap(path, np.float32, "w+", shape=shape)
    path.unlink()  # the file goes with the array
    return torch.from_numpy(array)


def spread(value: Tensor, name: str, kept: Kept, inputs: Samples) -> float:
    """Variance of what is left of a tensor over the samples that are trained on (1 where it is constant), a batch at a time: it may lie in
    a file."""
    count, total, squares = 0, 0.0, 0.0
    for first in range(0, inputs.train, inputs.batch):
        places = np.arange(first, min(first + inputs.batch, inputs.train))
        part = inputs.there([name], [chosen(value[places], name, kept)], inputs.rows(places))[0].double()
        count, total, squares = count + part.numel(), total + float(part.sum()), squares + float((part * part).sum())
    return (squares - total * total / max(1, count)) / max(1, count - 1) or 1.0


def distance(own: Sequence[Tensor], target: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """Sum over tensors of the mean squared difference by the target's variance."""
    return sum(((a - b.to(a.device)) ** 2).mean() / scale for a, b, scale in zip(own, target, scales, strict=True))


@dataclass
class Reconstruction:
    """A student and its teacher over the same samples."""

    student: Network
    teacher: Network
    kept: Kept
    samples: Samples
    schedule: Schedule
    keep: Checkpoint
    tell: Tell
    memory: int
    labels: Tensor | None = None
    figures: list[dict[str, Any]] = field(default_factory=list)

    def by_blocks(self, parts: Sequence[Block]) -> None:
        """Fit every block's output on what the student gives in front of it.

        Raises:
            Stopped: Ctrl-C, after the present block took what was best.
        """
        fed = {port.name for port in graph.inputs(self.student.model)}
        own, other = dict(self.samples.values), dict(self.samples.values)
        began = time.monotonic()
        for number, block in enumerate(parts):
            inputs, theirs = (replace(self.samples, values=values) for values in (own, other))
            target = through(self.teacher, theirs, block.ends, self.memory // 4)
            seconds = share(self.schedule.seconds, began, len(parts) - number)
            task = self.task(f"block {number + 1}/{len(parts)}", block, inputs, target)
            self._fitted(task, seconds)
            if number + 1 < len(parts):
                own = {name: own[name] for name in fed} | through(self.student, inputs, block.ends, self.memory // 4)
                other = {name: other[name] for name in fed} | target

    def _fitted(self, task: Task, seconds: float | None) -> None:
        schedule = Schedule(**{**vars(self.schedule), "seconds": seconds})
        first, last, epochs = fit(task, schedule, self.keep, self.tell)
        self.figures.append({"task": task.name, "weights": len(task.parameters), "before": first, "after": last, "epochs": epochs})

    def task(self, name: str, block: Block, inputs: Samples, target: Mapping[str, Tensor]) -> Task:
        """The fit of one block."""
        known = tuple(target)
        scales = [spread(value, end, self.kept, inputs) for end, value in target.items()]

        def compared(places: Any) -> Tensor:
            rows = inputs.rows(places)
            made = inputs.there(block.ends, self.student.run(rows, block.ends), rows)
            theirs = inputs.there(known, [chosen(value[places], end, self.kept) for end, value in target.items()], rows)
            return distance(made, theirs, scales)

        weights = {weight: self.student.parameters[weight] for weight in block.weights}
        return Task(name, weights, lambda places, random: compared(places), inputs.train, lambda: inputs.judge(compared), diluted(weights))

    def _known(self, ends: Sequence[str], rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The teacher's tensors of all samples, run once; none if memory does not hold them. ``rows`` tell how large they are."""
        with torch.no_grad():
            size = 4 * self.samples.count * sum(prod(value.shape[1:]) for value in self.teacher.run(rows, ends))
        return through(self.teacher, self.samples, ends, self.memory) if size <= self.memory else {}

    def end_to_end(self, answers: Sequence[str], inner: Sequence[str], scores: bool) -> None:
        """Fit tensors all at once, on what the teacher gives beside; ``inner`` ones count together as much as an answer. ``scores``: the
        first is compared as class scores, on mixtures, or as they are and with the labels, too, if there are any."""
        ends = [*answers, *inner]
        inputs, first = self.samples, self.samples.rows(np.arange(min(self.samples.batch, self.samples.count)))
        known = {} if scores and self.labels is None else self._known(ends, first)  # of mixtures nothing can be

        def wanted(rows: Mapping[str, Tensor], places: IntArray | None = None) -> list[Tensor]:
            with torch.no_grad():
                made = [known[name][places] for name in ends] if known and places is not None else self.teacher.run(rows, ends)
                target = [chosen(value.to(self.student.device), name, self.kept) for name, value in zip(ends, made, strict=True)]
            return inputs.there(ends, target, rows)

        counts = [1] * len(answers) + [len(inner)] * len(inner)
        scales = [count * (float(value.var()) or 1.0) for count, value in zip(counts, wanted(first), strict=True)]

        def compared(rows: Mapping[str, Tensor], places: IntArray | None = None) -> Tensor:
            target, own = wanted(rows, places), inputs.there(ends, self.student.run(rows, ends), rows)
            return divergence(own[0], target[0]) if scores else distance(own, target, scales)

        def taught(places: IntArray) -> Tensor:
            rows = inputs.rows(places)
            if not scores or self.labels is None:
                return compared(rows, places)
            own, labels = self.student.run(rows, ends[:1])[0], self.labels[places]
            return divergence(own, wanted(rows, places)[0]) - log_probabilities(own)[torch.arange(len(labels)), labels].mean()

        def loss(places: IntArray, random: np.random.Generator) -> Tensor:
            if self.labels is not None or not scores:
                return taught(places)
            rows, part, others = inputs.rows(places), float(random.beta(1, 1)), inputs.rows(random.permutation(places))
            mixed = {name: part * value + (1 - part) * others[name] for name, value in rows.items() if value.is_floating_point()}
            return compared({**rows, **mixed})

        weights = weights_between(self.student, (), tuple(ends))
        trained = {name: self.student.parameters[name] for name in weights}
        task = Task("all", trained, loss, inputs.train, lambda: inputs.judge(taught), diluted(trained))
        self._fitted(task, self.schedule.seconds)


def diluted(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks of the matrices and kernels that were diluted: what is zero there stays so."""
    masks = {name: (value.detach() != 0).to(value.dtype) for name, value in weights.items() if value.ndim > 1}
    return {name: mask for name, mask in masks.items() if float(mask.mean()) <= 1 - DILUTED}


def log_probabilities(scores: Tensor) -> Tensor:
    """Log of the probabilities of class scores; rows that are probabilities already are taken as such."""
    given = bool((scores >= 0).all() and ((scores.sum(-1) - 1).abs() < 1e-3).all())
    return torch.log(scores.clamp_min(1e-12)) if given else torch.log_softmax(scores, -1)


def divergence(own: Tensor, target: Tensor) -> Tensor:
    """KL(target || own) of class scores."""
    p, q = log_probabilities(target), log_probabilities(own)
    return (p.exp() * (p - q)).sum(-1).mean()


def features(network: Network) -> list[str]:
    """Tensors that layers with a matrix read."""
    tensors = active(network)
    weights = {name for name, value in network.parameters.items() if value.ndim > 1}
    return [name for node in network.index.nodes if weights & set(node.inputs) for name in node.inputs if name in tensors]
