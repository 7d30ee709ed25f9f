"""Training end to end under masks that stay: what is left of a diluted model learns to answer as before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ... import graph
from ...core.errors import DataError, ModelError
from ...core.options import MeasureOptions
from ...core.system import log
from ...core.types import BoolArray, IntArray
from ...coupling.analysis import Analysis
from ...data.dataset import Dataset
from ...evaluation import reading_of
from ...evaluation.meaning import Kind, Meaning
from .bridge import Network, as_tensor
from .engine import Checkpoint, Schedule, Stopped, Task, Tell, fit, settle
from .functions import Tensor
from .reconstruct import Samples, divergence, log_probabilities
from .tuning import apart, judged, stacked

MOMENTUM, DECAY = 0.9, 5e-4


def learning(
    network: Network, judged: Meaning, teacher: Network | None, samples: Samples, labels: IntArray | None
) -> Callable[[Any], Tensor]:  # fmt: skip
    """The loss of some of the samples on the output that is judged: cross-entropy with labels, else the KL divergence of class scores from
    the teacher's, and the squared difference by the variance of anything else.

    Raises:
        ModelError: labels for what is not one row of class scores per sample. DataError: labels out of range.
    """
    output = [judged.outputs[0]]
    wanted = None if labels is None else as_tensor(labels, network.device)

    def loss(places: Any) -> Tensor:
        rows = samples.rows(places)
        own = network.run(rows, output)[0]
        scores = own.ndim == 2 and len(own) == len(places) and judged.kind is Kind.CLASSES
        if wanted is not None:
            if not scores:
                shape = list(own.shape)
                raise ModelError(f"{network.model.name}: output '{output[0]}' of shape {shape} has no row of class scores per sample")
            if int(wanted.min()) < 0 or int(wanted.max()) >= own.shape[1]:
                raise DataError(f"labels run from {int(wanted.min())} to {int(wanted.max())}, but there are {own.shape[1]} class scores")
            return -log_probabilities(own)[torch.arange(len(own)), wanted[places]].mean()
        assert teacher is not None
        with torch.no_grad():
            target = teacher.run(rows, output)[0]
        own, target = samples.there([*output, *output], [own, target], rows)
        return divergence(own, target) if scores else ((own - target) ** 2).mean() / target.var()

    return loss


def task_of(name: str, network: Network, loss: Callable[[Any], Tensor], samples: Samples, masks: Mapping[str, BoolArray]) -> Task:
    """All weights, trained on that loss under masks, and judged by it on the held-out samples."""
    held = {key: as_tensor(mask, network.device) for key, mask in masks.items() if key in network.parameters}
    return Task(name, network.parameters, lambda places, random: loss(places), samples.train, lambda: samples.judge(loss), held)


def retrained(
    original: Analysis, diluted: graph.Model, masks: Mapping[str, BoolArray], data: Dataset, schedule: Schedule,
    tell: Tell = lambda said: None,
) -> tuple[graph.Model, str]:  # fmt: skip
    """Train what masks leave of a model (stochastic gradient descent with momentum), and keep it if held-out samples are answered better:
    the model, and what to say.

    Raises:
        DataError: too few samples, or labels out of range. ModelError: no gradient.
    """
    settle("cpu")
    fitted, held = apart(data, schedule.seed)
    tokens = original.prepared.tokens
    samples = stacked(fitted, held, schedule.batch, tokens)
    labels = None if fitted.classes is None or held.classes is None else np.concatenate([fitted.classes, held.classes])
    network, judged_output = Network(diluted), reading_of(original.model, held, MeasureOptions()).judged
    teacher = None if labels is not None else Network(original.model)
    task = task_of("retraining", network, learning(network, judged_output, teacher, samples, labels), samples, masks)
    try:
        fit(task, schedule, Checkpoint(None, ""), tell)
    except Stopped:
        log.warning("the retraining was stopped; what was best so far is judged")
    after = network.written()
    (name, first, tie), (_, last, other) = judged([original.model, diluted, after], held, tokens)
    better = (last, other) > (first, tie)
    first, last = abs(first), abs(last)
    by = "the answers of the original" if labels is None else "labels"
    words = f"retrained {schedule.epochs} epochs on {samples.train} samples by {by}: {name} on {held.samples} held-out samples"
    return after if better else diluted, f"{words} {first:.4g} -> {last:.4g}{'' if better else '; no better, so not kept'}"
