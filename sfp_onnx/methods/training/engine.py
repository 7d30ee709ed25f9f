"""The one training loop: Adam or SGD over parameters, masks, the best epoch by a held-out figure, and a file to go on from."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import cos, pi
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...core.errors import OptionError
from ...core.system import log
from ...core.types import IntArray
from ...graph.save import atomic, check_output, writing
from .functions import Tensor

MASK = "mask of "
SAME = 1e-6  # held-out figure up to which there is nothing to learn: rounding
USUAL = 0.05  # root mean square of weights of narrow convolutional networks, for which learning rates are known
Tell = Callable[[dict[str, Any]], None]
"""Takes what is to be said of an epoch."""


class Stopped(Exception):
    """The user stopped the run, or its time is over; what was best so far is in place."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast. ``seconds`` (if given) takes the place of ``epochs``. At most ``most`` samples are run at once; ``whole``: and
    never fewer. ``momentum`` 0: Adam, else SGD with it and ``decay``. ``scaled``: Adam's steps, which are as large for small weights as for
    large ones, are smaller for a matrix whose root mean square is below `USUAL`, in proportion."""

    epochs: int
    lr: float
    batch: int = 128
    most: int = 128
    whole: bool = False
    seed: int = 0
    seconds: float | None = None
    momentum: float = 0.0
    decay: float = 0.0
    scaled: bool = False


@dataclass
class Task:
    """What is trained: ``parameters`` by name, to lower ``loss`` of samples 0 .. ``samples`` - 1 (a mean over those that it is given);
    ``judge`` is the held-out figure, smaller is better. ``masks``: where parameters may be other than zero. ``begin`` is called with the
    number of the epoch and of all before each of them (it may change masks), ``after`` after every step. ``latest``: the last epoch
    counts, not the best."""

    name: str
    parameters: Mapping[str, Tensor]
    loss: Callable[[IntArray, np.random.Generator], Tensor]
    samples: int
    judge: Callable[[], float]
    masks: dict[str, Tensor] = field(default_factory=dict)
    begin: Callable[[int, int], None] = lambda epoch, last: None
    after: Callable[[], None] = lambda: None
    latest: bool = False

    def copies(self) -> dict[str, Tensor]:
        """Parameters and masks as they are now."""
        held = {f"{MASK}{name}": mask.clone() for name, mask in self.masks.items()}
        return held | {name: value.detach().clone() for name, value in self.parameters.items()}

    def restore(self, copies: Mapping[str, Tensor]) -> None:
        """Put values into parameters and masks."""
        self.masks.update({name: copies[f"{MASK}{name}"].clone() for name in self.masks})
        with torch.no_grad():
            for name, value in self.parameters.items():
                value.copy_(copies[name])

    def hold(self, gradients: bool = False) -> None:
        """Zero what the masks forbid (momentum and decay move zeros, too, so weights as well as gradients)."""
        with torch.no_grad():
            for name, mask in self.masks.items():
                value = self.parameters[name].grad if gradients else self.parameters[name]
                value.mul_(mask)


class Checkpoint:
    """Where a run stands, in a file (None: nowhere). ``key`` says which run it is."""

    def __init__(self, path: Path | None, key: str) -> None:
        """Read the file, if it is there.

        Raises:
            OptionError: it holds another run, or none. OutputError: it cannot be written.
        """
        self.path, self.key, self.tasks = path, key, dict[str, Any]()
        if path is None:
            return
        check_output(path)
        if path.exists():
            try:
                held = torch.load(io.BytesIO(path.read_bytes()), weights_only=True)
                found, self.tasks = held["key"], held["tasks"]
            except Exception as error:  # torch raises whatever it meets
                raise OptionError(f"--resume {path}: cannot read it: {error}. Expected what --resume wrote, or no file.") from error
            if found != key:
                raise OptionError(f"--resume {path}: it is of a run with another model, other data or options. Give another file.")

    def put(self, name: str, state: Any) -> None:
        """Keep the state of a task."""
        self.tasks[name] = state
        if self.path is not None:
            buffer = io.BytesIO()
            torch.save({"key": self.key, "tasks": self.tasks}, buffer)
            with writing(self.path), atomic(self.path) as (stream,):
                stream.write(buffer.getvalue())


def share(budget: float | None, began: float, left: int) -> float | None:
    """Seconds for the next of ``left`` trainings that share a budget (None: as long as they take) since ``began``."""
    return None if budget is None else max(0.0, budget - (time.monotonic() - began)) / left


def ended(epochs: Sequence[int]) -> str:
    """What to say of trainings that a budget ended after so many epochs."""
    fewest, most = min(epochs), max(epochs)
    return f"the budget ended the training after {fewest}{f' to {most}' if most > fewest else ''} epoch{'s' if most > 1 else ''}"


def settle(device: str) -> None:
    """Have torch compute the same for the same.

    Raises:
        OptionError: there is no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise OptionError("--device cuda: this PyTorch finds no CUDA device. Use --device cpu, or install a build for CUDA.")
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def _optimiser(task: Task, schedule: Schedule) -> Any:
    values = list(task.parameters.values())
    if schedule.momentum:
        return torch.optim.SGD(values, lr=schedule.lr, momentum=schedule.momentum, weight_decay=schedule.decay)
    sizes = [float(value.detach().square().mean().sqrt()) if schedule.scaled and value.ndim > 1 else USUAL for value in values]
    groups = [{"params": [value], "share": min(1.0, size / USUAL)} for value, size in zip(values, sizes, strict=True)]
    return torch.optim.Adam(groups, lr=schedule.lr)


def _epoch(task: Task, schedule: Schedule, optimiser: Any, epoch: int, last: int) -> float:
    """One pass over the samples; the mean loss."""
    random = np.random.default_rng([schedule.seed, epoch, *task.name.encode()])
    order, total, most = random.permutation(task.samples), 0.0, min(schedule.most, schedule.batch)
    order = order[: len(order) // most * most] if schedule.whole else order
    for start in range(0, len(order), schedule.batch):
        for group in optimiser.param_groups:
            group["lr"] = schedule.lr * group.get("share", 1.0) * (1 + cos(pi * (epoch + start / len(order)) / last)) / 2
        optimiser.zero_grad()
        chosen = order[start : start + schedule.batch]
        for first in range(0, len(chosen), most):
            part = chosen[first : first + most]
            loss = task.loss(np.sort(part), random) * (len(part) / len(chosen))
            loss.backward()
            total += float(loss.detach()) * len(chosen) / len(order)
        task.hold(gradients=True)
        optimiser.step()
        task.after()
        task.hold()
    return total


def fit(task: Task, schedule: Schedule, keep: Checkpoint, tell: Tell = lambda said: None) -> tuple[float, float, int]:
    """Train; the parameters end as they were best by the held-out figure (at worst, as they began; without an epoch where that is 0 and
    nothing presses on them). Returns the figure before and after, and the number of epochs.

    Raises:
        Stopped: Ctrl-C; the best so far is in place.
    """
    task.hold()
    optimiser, began = _optimiser(task, schedule), time.monotonic()
    state = keep.tasks.get(task.name)
    if state is None:
        figure = task.judge()
        last = schedule.epochs if figure > SAME or task.latest else 0
        state = {"epoch": 0, "last": last, "first": figure, "figure": figure, "best": task.copies()}
    elif "optimiser" in state:
        task.restore(state["now"])
        optimiser.load_state_dict(state["optimiser"])
    try:
        while state["epoch"] < state["last"]:
            task.begin(state["epoch"], state["last"])
            loss = _epoch(task, schedule, optimiser, state["epoch"], state["last"])
            figure = task.judge() if np.isfinite(loss) else float("inf")
            better = {"figure": figure, "best": task.copies()} if figure < state["figure"] or (task.latest and np.isfinite(figure)) else {}
            spent, state = time.monotonic() - began, {**state, **better, "epoch": state["epoch"] + 1}
            if not np.isfinite(loss):
                log.warning(f"{task.name}: the loss is no longer finite; what was best before is kept. Use a smaller --lr.")
                state["last"] = state["epoch"]
            elif schedule.seconds is not None:  # how many there are is known after the first; slower ones end it all the same
                last = max(1, int(schedule.seconds / spent)) if state["epoch"] == 1 else state["last"]
                state["last"] = state["epoch"] if spent >= schedule.seconds else last
            done = state["epoch"] == state["last"]
            keep.put(task.name, state if done else {**state, "now": task.copies(), "optimiser": optimiser.state_dict()})
            said = {"task": task.name, "epoch": state["epoch"], "epochs": state["last"], "loss": loss, "held_out": figure}
            tell({**said, "before": state["first"], "seconds": spent})
    except KeyboardInterrupt:
        task.restore(state["best"])
        raise Stopped from None
    task.restore(state["best"])
    return state["first"], state["figure"], state["epoch"]
