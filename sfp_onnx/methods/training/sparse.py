"""Sparse training: channels or weights become zero while the network learns on.

Groups: Fang et al., CVPR 2023 (DepGraph): the norm of every set of coupled channels shrinks, the smallest by 2^4 times the largest's share;
the pressure grows with the epochs (Wang et al., ICLR 2021). Ours is the proximal step of that penalty, so that sets become exactly zero.
Slimming: Liu et al., ICCV 2017, on scales of BatchNormalization. RigL: Evci et al., ICML 2020. SET: Mocanu et al., 2018.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from math import cos, pi
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ... import graph
from ...core.errors import DataError, ModelError, VerificationError
from ...core.options import DataOptions, MeasureOptions
from ...core.system import log, versions
from ...coupling.analysis import Analysis, DataSource, describe, inspect
from ...data.checks import opened
from ...data.dataset import Dataset
from ...evaluation import parse_drop, reading_of
from ...graph.load import ModelSource, load
from ...graph.save import check_output, save, together
from ...report.manifest import write_json
from . import SparseOptions
from .bridge import Network, as_tensor, write
from .engine import Checkpoint, Schedule, Stopped, Task, Tell, ended, fit, settle
from .functions import Tensor
from .masked import learning, task_of
from .reconstruct import Samples
from .tuning import apart, judged, stacked

LEAST_PRESSURE = 2.0**-4  # of the largest set, in that of the smallest
STILL = 0.75  # of the epochs after which weights no longer move
EVERY = 100  # steps between moves, as Evci et al.: what has come must learn before it is weighed


@dataclass(frozen=True)
class Sparse:
    """The result of `sparsify`: ``zeros`` are sets of coupled channels or single weights that became zero, of ``total``; ``measure`` is
    that of the task on held-out samples, ``before`` and ``after``. It is the given model where more is lost than may be (``kept`` False).
    """

    model: graph.Model
    zeros: int
    total: int
    measure: str
    before: float
    after: float
    kept: bool = True
    notes: tuple[str, ...] = ()
    manifest: Mapping[str, Any] = field(default_factory=dict)


# ---- pressure on sets of channels --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slices:
    """Where a parameter holds channels: along ``axis``, entry i belongs to the set ``units[i]`` (the last number: to none)."""

    value: Tensor
    axis: int
    units: Tensor

    def spread(self, per_unit: Tensor) -> Tensor:
        """One number per set, as it lies along the parameter."""
        shape = [1] * self.value.ndim
        shape[self.axis] = -1
        return per_unit[self.units].reshape(shape)

    def squares(self) -> Tensor:
        """Sum of squares along the axis."""
        others = [axis for axis in range(self.value.ndim) if axis != self.axis]
        return self.value.pow(2).sum(others) if others else self.value.pow(2)


class Pressure:
    """Shrinks sets of channels a little at every step; ``groups`` are the sets (rows of numbers) that are compared with each other."""

    def __init__(self, slices: list[Slices], count: int, groups: list[Tensor], total: float, steps: int) -> None:
        """``total``: what the smallest set of a group loses over the epochs, in mean norms, growing linearly; each has ``steps`` steps."""
        self.slices, self.count, self.groups, self.each, self.grown = slices, count, groups, 2 * total / steps, 0.0

    def norms(self) -> Tensor:
        """Norm of every set (the last entry stands for none)."""
        sums = torch.zeros(self.count + 1)
        for item in self.slices:
            sums.index_add_(0, item.units, item.squares().to(sums))
        return sums.sqrt()

    def begin(self, epoch: int, last: int) -> None:
        """The pressure of an epoch."""
        self.grown = (epoch + 0.5) / last**2

    def after(self) -> None:
        """Norms n become n - t mean(n) 2^(4 (max - n) / (max - min)) / 2^4, not below zero."""
        with torch.no_grad():
            norms = self.norms()
            factor = torch.ones(self.count + 1)
            for units in self.groups:
                own = norms[units]
                span = (own.max() - own.min()).clamp_min(1e-12)
                lost = self.each * self.grown * own.mean() * LEAST_PRESSURE ** (1 - (own.max() - own) / span)
                factor[units] = ((own - lost) / own.clamp_min(1e-12)).clamp_min(0)
            for item in self.slices:
                item.value.mul_(item.spread(factor).to(item.value))


def pressed(analysis: Analysis, network: Network, options: SparseOptions, samples: int) -> Pressure:
    """The pressure that the options ask for.

    Raises:
        ModelError: no BatchNormalization whose scales can be trained.
    """
    units, found = analysis.coupling.units, list[Slices]()
    if options.method == "slimming":
        rows = [(affine.node.inputs[1], 0, affine.units) for affine in analysis.coupling.affines]
        words = "no scale of a BatchNormalization is left in it (exports often fold them into convolutions); use --method groups"
    else:
        nodes, places = analysis.prepared.nodes, analysis.coupling.constants.items()
        rows = [(nodes[index].inputs[position], item.axis, item.units) for (index, position), channels in places for item in channels]
        words = "it has no weights of channels that can leave"
    for name, axis, own in dict.fromkeys((name, axis, tuple(own.tolist())) for name, axis, own in rows):
        value = network.parameters.get(name)
        if value is not None and axis < value.ndim and value.shape[axis] == len(own) and max(own, default=-1) >= 0:
            found.append(Slices(value, axis, torch.as_tensor([unit if unit >= 0 else units for unit in own], device=value.device)))
    if not found:
        raise ModelError(f"{analysis.model.name}: {words}")
    seen = torch.unique(torch.cat([item.units.cpu() for item in found]))
    groups = [torch.as_tensor(np.intersect1d(group.units, seen.numpy())) for group in analysis.coupling.groups]
    return Pressure(found, units, [group for group in groups if len(group) > 1], options.strength, -(-samples // options.train_batch))


# ---- masks that move ---------------------------------------------------------------------------------------------------


def moving(task: Task, options: SparseOptions) -> Callable[[int, int], None]:
    """What lets the smallest weights leave and others come before an epoch: alpha / 2 (1 + cos(pi t / T)) of those of each layer."""
    every = -(-EVERY // -(-task.samples // options.train_batch))
    if options.budget is None and every >= STILL * options.epochs:
        log.warning(f"no weight moves: {options.epochs} epochs are too few for moves every {every} (100 steps); the first mask stays")

    def begin(epoch: int, last: int) -> None:
        if epoch == 0 or epoch % every or epoch >= STILL * last:
            return
        share = options.moved / 2 * (1 + cos(pi * epoch / (STILL * last)))
        random = np.random.default_rng([options.seed, epoch, task.samples])
        if options.method == "rigl":
            places = np.sort(random.permutation(task.samples)[: options.train_batch])
            task.loss(places, random).backward()
        for name, mask in task.masks.items():
            value = task.parameters[name]
            worth = torch.as_tensor(random.random(tuple(mask.shape)))
            worth = value.grad.abs() if options.method == "rigl" and value.grad is not None else worth.to(value)
            task.masks[name] = moved(value.detach(), mask, worth, share)
        for value in task.parameters.values():
            value.grad = None

    return begin


def moved(value: Tensor, mask: Tensor, worth: Tensor, share: float) -> Tensor:
    """The mask without the share of the smallest weights, and with as many others, those that are worth most."""
    on = mask.reshape(-1) > 0
    count = min(int(share * int(on.sum())), int((~on).sum()))
    if not count:
        return mask
    sizes = torch.where(on, value.reshape(-1).abs(), torch.inf)
    gone = torch.argsort(sizes, stable=True)[:count]
    come = torch.argsort(torch.where(on, -torch.inf, worth.reshape(-1).to(value)), descending=True, stable=True)[:count]
    changed = mask.reshape(-1).clone()
    changed[gone], changed[come] = 0, 1
    return changed.reshape(mask.shape)


def first_masks(network: Network, rate: float) -> dict[str, Tensor]:
    """In every matrix and kernel the share ``rate`` of the smallest weights is zero."""
    masks = {}
    for name, value in network.parameters.items():
        if value.ndim > 1:
            order = torch.argsort(value.detach().abs().reshape(-1), stable=True)
            mask = torch.ones(value.numel(), dtype=value.dtype, device=value.device)
            mask[order[: int(rate * value.numel())]] = 0
            masks[name] = mask.reshape(value.shape)
    return masks


# ---- from beginning to end ---------------------------------------------------------------------------------------------


def _task(analysis: Analysis, network: Network, samples: Samples, data: tuple[Dataset, Dataset], options: SparseOptions) -> Task:
    fitted, held = data
    labels = None if fitted.classes is None or held.classes is None else np.concatenate([fitted.classes, held.classes])
    teacher = None if labels is not None else Network(analysis.model, options.device)
    loss = learning(network, reading_of(analysis.model, held, MeasureOptions()).judged, teacher, samples, labels)
    task = task_of(f"sparse ({options.method})", network, loss, samples, {})
    if options.method in ("rigl", "set"):
        task.masks = first_masks(network, options.rate)
        task.begin = moving(task, options)
        return task
    pressure = pressed(analysis, network, options, samples.train)
    task.begin, task.after, task.latest = pressure.begin, pressure.after, True
    return task


def sparsify(
    source: ModelSource, options: SparseOptions, data: DataSource, *, data_options: DataOptions = DataOptions(), output: Path | None = None,
    sparse: bool = False, manifest: Path | None = None, tell: Tell = lambda said: None,
) -> Sparse:  # fmt: skip
    """Train a network, by labels or else by its own answers, so that channels or weights become zero.

    Args:
        output, sparse: where the model goes, with sparse initializers where these are smaller.

    Raises:
        OptionError, DataError, ModelError: options, data or model do not allow it.
    """
    settle(options.device)
    model, most = load(source), parse_drop(options.max_drop)
    paths = [*model.paths, *(Path(item) for item in (data,) if isinstance(item, (str, Path)))]
    for path in (output, manifest, options.resume):
        if path is not None:
            check_output(Path(path), paths)
    used = opened(model, data, data_options)
    if used is None:
        raise DataError("sparse training needs data")
    parts, network, analysis = apart(used, options.seed), Network(model, options.device), inspect(model, data=used)
    tokens = analysis.prepared.tokens
    samples = stacked(*parts, options.train_batch, tokens)
    task = _task(analysis, network, samples, parts, options)
    said = {name: value for name, value in asdict(options).items() if name != "resume"}
    key = hashlib.sha256(repr([model.sha256, used.sha256, used.samples, said]).encode()).hexdigest()
    schedule = Schedule(options.epochs, options.lr, options.train_batch, samples.batch, samples.whole, options.seed, options.budget)
    keep = Checkpoint(None if options.resume is None else Path(options.resume), key)
    notes: list[str] = []
    try:
        epochs = fit(task, schedule, keep, tell)[-1]
        notes += [] if options.budget is None else [ended([epochs])]
    except Stopped:
        log.warning("the training was stopped; what there is so far is written")
    after = network.written()
    zeros, total = _counted(task, after, analysis, network, options)
    (name, first, _), (_, last, _) = judged([model, model, after], parts[1], tokens)
    kept = last >= first - most
    after = after if kept else model
    if not kept:
        words = f"{name} on {parts[1].samples} held-out samples falls from {abs(first):.4g} to {abs(last):.4g}"
        log.warning(f"{words}, by more than --max-drop {options.max_drop} allows, so the model is left as it was")
    result = Sparse(after, zeros, total, name, abs(first), abs(last), kept, tuple(notes))
    shown = {key: getattr(result, key) for key in ("zeros", "total", "measure", "before", "after", "kept", "notes")}
    recorded = {
        "format": "sfp_onnx sparse training manifest", "version": 1, "versions": {**versions(), "torch": str(torch.__version__)},
        "model": {"path": str(model.source), "sha256": model.sha256}, "output": {"path": str(output) if output else None},
        "options": said, "data": describe(used), **shown,
    }  # fmt: skip
    with together():
        if output is not None:
            save(after, output, sparse=True) if sparse else write(after, output)
        if manifest is not None:
            write_json(manifest, recorded, [*paths, *([output] if output is not None else [])])
    return Sparse(**{**vars(result), "manifest": recorded})


def _counted(task: Task, model: graph.Model, analysis: Analysis, network: Network, options: SparseOptions) -> tuple[int, int]:
    """How many sets of channels or weights are zero, of how many.

    Raises:
        VerificationError: a masked weight is not zero.
    """
    if not task.masks:
        pressure = pressed(analysis, network, options, task.samples)
        norms = pressure.norms()
        return sum(int((norms[units] == 0).sum()) for units in pressure.groups), sum(map(len, pressure.groups))
    held, masks = graph.Constants(model), {name: as_tensor(mask.cpu().numpy() > 0, "cpu").numpy() for name, mask in task.masks.items()}
    if any(np.any(held[name][~mask]) for name, mask in masks.items()):
        raise VerificationError(f"{model.name}: internal error: a masked weight is not zero. Please report it.")
    return sum(int((~mask).sum()) for mask in masks.values()), sum(mask.size for mask in masks.values())
