"""Lottery tickets: iterative magnitude pruning with rewinding, and the controls that tell a ticket from any sparse network.

Frankle & Carbin, ICLR 2019: train, mask the smallest weights of all, reset the others to what they were at the start (or early in the
training: Frankle et al., ICML 2020), train again, and so on. Renda et al., ICLR 2020, go on from the trained weights instead and start the
learning rate again. A trained file does not hold its first weights: these must be given.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ... import graph
from ...core.errors import DataError, OptionError, VerificationError
from ...core.options import DataOptions, MeasureOptions
from ...core.system import versions
from ...core.types import Array, BoolArray
from ...coupling.analysis import DataSource, describe
from ...data.checks import opened
from ...data.dataset import Dataset
from ...evaluation import measure, reading_of
from ...graph.extract import with_constants
from ...graph.load import ModelSource, load
from ...graph.save import check_output, together
from ...report.manifest import write_json
from ..dilution import keep_by_rank, named_generator
from . import TicketOptions
from .bridge import Network, write
from .engine import Checkpoint, Schedule, Tell, ended, fit, settle, share
from .masked import learning, task_of
from .tuning import apart, stacked

Weights = Mapping[str, Array]
Masks = Mapping[str, BoolArray]


@dataclass(frozen=True)
class Round:
    """One round: the share of the weights that is left, the accuracy of the ticket and of its controls (by name), all after so many
    ``epochs``."""

    left: float
    ticket: float
    controls: Mapping[str, float]
    epochs: int


@dataclass(frozen=True)
class Ticket:
    """The result of `ticket`: the sparse network before (``start``) and after its last training, its ``masks``, the accuracy of the dense
    network, and all rounds; ``judged`` says on what; ``notes`` are for the user."""

    start: graph.Model
    model: graph.Model
    masks: Masks
    dense: float
    rounds: tuple[Round, ...]
    judged: str
    notes: tuple[str, ...] = ()
    manifest: Mapping[str, Any] = field(default_factory=dict)


def first_weights(trained: graph.Model, source: ModelSource) -> graph.Model:
    """The file with the first weights, checked to be of the same network.

    Raises:
        OptionError: another graph, other names or shapes.
    """
    first = load(source)
    ours, theirs = ([(node.operator, node.inputs, node.outputs) for node in graph.nodes(model)] for model in (trained, first))
    if ours != theirs:
        raise OptionError(
            f"--rewind {first.name}: its graph is another one than that of {trained.name}. Export both in the same way; where the export "
            "folds BatchNormalization away, weights at the start and at the end are not the same parameters: keep it unfolded."
        )
    shapes = [graph.initializers(model) for model in (trained, first)]
    for name, held in shapes[0].items():
        if shapes[1].get(name) != held:
            raise OptionError(f"--rewind {first.name}: tensor '{name}' is {shapes[1].get(name)}, in {trained.name} it is {held}")
    return first


def redrawn(model: graph.Model, names: list[str], seed: int) -> graph.Model:
    """The model with other weights of the same mean and spread."""
    held = graph.Constants(model)
    drawn = {name: named_generator(seed, name).normal(held[name].mean(), held[name].std(), held[name].shape) for name in names}
    return with_constants(model, {name: value.astype(held[name].dtype) for name, value in drawn.items()})


def masked(weights: Weights, masks: Masks, rate: float) -> dict[str, BoolArray]:
    """The share ``rate`` of the smallest weights that are left leaves, over all layers."""
    scores = [np.where(masks[name], np.abs(weights[name].astype(np.float64)), -1.0) for name in masks]
    gone = 1 - sum(mask.sum() for mask in masks.values()) / sum(mask.size for mask in masks.values())
    kept = keep_by_rank([values.reshape(1, -1) for values in scores], gone + (1 - gone) * rate, "global")
    return {name: keep.reshape(masks[name].shape) for name, keep in zip(masks, kept, strict=True)}


def shuffled(masks: Masks, seed: int) -> dict[str, BoolArray]:
    """Random masks, as dense in every layer."""
    return {name: named_generator(seed, name).permutation(mask.reshape(-1)).reshape(mask.shape) for name, mask in masks.items()}


@dataclass(frozen=True)
class Trainer:
    """Trains networks on the same samples, and measures them."""

    data: Dataset
    test: Dataset | None
    options: TicketOptions
    tell: Tell

    def train(
        self, start: graph.Model, masks: Masks, name: str, epochs: int | None = None, seconds: float | None = None
    ) -> tuple[graph.Model, int]:  # fmt: skip
        """From these weights, under these masks, for so many epochs (default: the options') or seconds; the epochs that were made, too."""
        fitted, held = apart(self.data, self.options.seed)
        samples = stacked(fitted, held, self.options.train_batch)
        assert fitted.classes is not None and held.classes is not None
        network = Network(start)
        judged = reading_of(start, held, MeasureOptions(task="classify")).judged
        loss = learning(network, judged, None, samples, np.concatenate([fitted.classes, held.classes]))
        options = self.options
        schedule = Schedule(epochs or options.epochs, options.lr, options.train_batch, seed=options.seed, seconds=seconds)
        made = fit(task_of(name, network, loss, samples, masks), schedule, Checkpoint(None, ""), self.tell)[-1]
        return network.written(), made

    def accuracy(self, model: graph.Model) -> float:
        """Top-1 on the test samples, else on those held out of the training."""
        used = self.test or apart(self.data, self.options.seed)[1]
        reading = reading_of(model, used, MeasureOptions(task="classify"))
        found = measure([model], used.batches(), used.labels, reading)[0][0].tally("top-1")
        if found is None or found.value is None:
            raise DataError(f"{model.name}: top-1 cannot be taken of its outputs with these labels")
        return found.value[1]


def ticket(
    source: ModelSource, options: TicketOptions, data: DataSource, rewind: ModelSource | None, *, test_data: DataSource | None = None,
    data_options: DataOptions = DataOptions(), output: Path | None = None, untrained: Path | None = None, manifest: Path | None = None,
    tell: Tell = lambda said: None,
) -> Ticket:  # fmt: skip
    """Find a lottery ticket in a trained network.

    Args:
        source: the trained network.
        rewind: the same network with its weights at the start (or early in the training). None: go on from the trained weights
            (learning-rate rewinding), or with ``options.reinit`` from new random ones (which is the control of the paper).
        output, untrained: where the trained ticket and the sparse network before its last training go.

    Raises:
        OptionError: the first weights are of another network. DataError: no labels. ModelError: no classifier, or no gradient.
    """
    settle("cpu")
    trained = load(source)
    paths = [*trained.paths, *(Path(item) for item in (data, test_data, rewind) if isinstance(item, (str, Path)))]
    for path in (output, untrained, manifest):
        if path is not None:
            check_output(path, paths)
    used, test = opened(trained, data, data_options), opened(trained, test_data, data_options)
    if used is None or used.classes is None or (test is not None and test.classes is None):
        raise DataError("a ticket is trained by class numbers: give data (and test data) with labels, in full if there are more")
    names = [name for name, value in Network(trained).parameters.items() if value.ndim > 1]
    first = None if rewind is None else first_weights(trained, rewind)
    first = redrawn(trained, names, options.reinit) if first is None and options.reinit is not None else first
    result = _rounds(trained, first, names, Trainer(used, test, options, tell))
    held = graph.Constants(result.model)
    if any(np.any(held[name][~mask]) for name, mask in result.masks.items()):
        raise VerificationError(f"{trained.name}: internal error: a masked weight is not zero. Please report it.")
    recorded = {
        "format": "sfp_onnx ticket manifest", "version": 1, "versions": versions(), "options": asdict(options), "data": describe(used),
        "model": {"path": str(trained.source), "sha256": trained.sha256}, "rewind": None if first is None else first.sha256 or "drawn anew",
        "dense": result.dense, "judged": result.judged, "rounds": [asdict(item) for item in result.rounds], "notes": list(result.notes),
        "zeros": {name: int((~mask).sum()) for name, mask in result.masks.items()},
    }  # fmt: skip
    with together():
        for path, model in ((output, result.model), (untrained, result.start)):
            if path is not None:
                write(model, path)
        if manifest is not None:
            write_json(manifest, recorded, paths)
    return Ticket(**{**vars(result), "manifest": recorded})


def _rounds(trained: graph.Model, first: graph.Model | None, names: list[str], trainer: Trainer) -> Ticket:
    options, rounds, began = trainer.options, list[Round](), time.monotonic()
    masks: Masks = {name: np.ones(graph.initializers(trained)[name].shape, bool) for name in names}
    model = start = trained
    for number in range(options.rounds):
        weights = graph.Constants(model)
        masks = masked(weights, masks, options.rate)
        left = sum(mask.sum() for mask in masks.values()) / sum(mask.size for mask in masks.values())
        start = _zeroed(model if first is None else first, masks)
        others = _controls(trained, first, masks, left) if options.controls and first is not None else {}
        word = f"round {number + 1}/{options.rounds}, {left:.1%} left"
        seconds = share(options.budget, began, (options.rounds - number) * (1 + len(others)))
        model, epochs = trainer.train(start, masks, word, seconds=seconds)
        rivals = {name: trainer.train(_zeroed(*pair), pair[1], f"{word}, {name}", epochs)[0] for name, pair in others.items()}
        measured = {name: trainer.accuracy(rival) for name, rival in rivals.items()}
        rounds.append(Round(float(left), trainer.accuracy(model), measured, epochs))
    notes = [] if options.budget is None else [ended([item.epochs for item in rounds])]
    place = f"{trainer.test.samples} test samples" if trainer.test is not None else "samples held out of the training"
    return Ticket(start, model, masks, trainer.accuracy(trained), tuple(rounds), place, tuple(notes))


def _controls(trained: graph.Model, first: graph.Model, masks: Masks, left: float) -> dict[str, tuple[graph.Model, Masks]]:
    """Networks to start from, and their masks: what a ticket must beat."""
    whole: Masks = {name: np.ones(mask.shape, bool) for name, mask in masks.items()}
    once = masked(graph.Constants(trained), whole, 1 - float(left))
    return {"new init": (redrawn(first, list(masks), 1), masks), "random mask": (first, shuffled(masks, 1)), "one-shot": (first, once)}


def _zeroed(model: graph.Model, masks: Masks) -> graph.Model:
    held = graph.Constants(model)
    return with_constants(model, {name: held[name] * mask for name, mask in masks.items()})
