"""Training on top, from the ONNX file alone: fine-tuning of a pruned model with the original as its teacher.

It needs the optional extra ``train`` (PyTorch); nothing but the modules of this room imports that, and they are imported when a run
needs them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...core.options import AMOUNT, REPAIR, RUN, Checked, RepairOptions, option, rare, seconds
from ...core.system import FINISHERS, NEEDS, log, need
from ...core.types import Cut

if TYPE_CHECKING:
    from ...data.dataset import Dataset
    from ...graph import Model

RECIPES = ("blocks", "features", "logits", "labels")


def budget(of: str) -> Any:
    """The option for the time of a training."""
    return option(None, f"Time for {of}, in place of --epochs.", AMOUNT, parse=seconds, metavar="10m", low=0, low_open=True,
                  high=float("inf"), high_open=True)  # fmt: skip


@dataclass(frozen=True)
class TrainOptions(Checked):
    """How to train.

    ``recipe``: "blocks" (each part between two tensors that separate the graph, on its own), "features" (the ends of all of them and the
    answers at once, end to end), "logits" (the answers alone, on mixtures of samples), "labels" (the answers and the given class numbers,
    on samples as they are). ``epochs`` passes over the data (over those of each block, with mirrored images where these help);
    ``budget``: seconds that take their place. ``lr``: that of Adam at the start of a cosine.
    ``memory``: bytes of activations held in memory, the rest in a temporary file. ``resume``: a file that holds where the run stands.
    """

    recipe: str | None = option(None, "What is fitted to the original: the output of each block on its own, all of them and the answers, "
                                "the answers alone (with mixtures of samples), or these and given labels.  [default: blocks; features for "
                                "embeddings]", REPAIR, choices=RECIPES)  # fmt: skip
    epochs: int = option(4, "Passes over the data, for each block.", AMOUNT, low=1)
    budget: float | None = budget("all of it")
    lr: float | None = option(None, "Learning rate at the start.  [default: 1e-3 for blocks, 1e-4 for logits, else 3e-4]", REPAIR,
                              low=0, low_open=True, high=float("inf"), high_open=True)  # fmt: skip
    device: str = option("cpu", "Where it is computed.", RUN, choices=("cpu", "cuda"))
    resume: Any = option(None, "Go on from this file if it is there; write it after every epoch.", RUN, path=True)
    mirror: bool | None = rare(None, "Mirrored images, too.  [default: where the original answers them alike]", REPAIR,
                               flag="mirror/--no-mirror")  # fmt: skip
    train_batch: int | None = rare(None, "Samples per step.  [default: 128; 32 for embeddings]", REPAIR, low=1)
    seed: int = 0
    memory: int = 2 * 10**9


@dataclass(frozen=True)
class TicketOptions(Checked):
    """How to look for a lottery ticket: ``rounds`` of training for ``epochs`` each (Adam, ``lr`` at the start of a cosine); before each the
    share ``rate`` of the smallest weights that are left leaves. ``budget``: seconds for all trainings; those of a round are equally
    long. ``reinit``: start from random weights of this seed. ``controls``: train
    networks to compare with, too."""

    rounds: int = option(8, "Rounds of pruning and training.", AMOUNT, low=1)
    rate: float = option(0.2, "Share of the weights that are left to remove in each round.", AMOUNT, low=0, low_open=True, high=1,
                         high_open=True)  # fmt: skip
    epochs: int = option(30, "Passes over the data in each training.", AMOUNT, low=1)
    budget: float | None = budget("all trainings, shared by them")
    lr: float = option(3e-3, "Learning rate at the start of each training.", REPAIR, low=0, low_open=True, high=1)
    reinit: int | None = option(None, "Start from new random weights of this seed, not from --rewind: a control, no ticket.", REPAIR,
                                low=0, metavar="SEED")  # fmt: skip
    controls: bool = option(False, "Also train the same mask from new weights, a random mask, and a mask made at once.", REPAIR)
    train_batch: int = rare(64, "Samples per step.", REPAIR, low=1)
    seed: int = 0


SPARSE = ("groups", "slimming", "rigl", "set")


@dataclass(frozen=True)
class SparseOptions(Checked):
    """How to train sparsely.

    ``method``: "groups" (sets of coupled channels lose norm, the small ones most), "slimming" (so do scales of BatchNormalization), "rigl"
    and "set" (a fixed share ``rate`` of the weights is zero; every 100 steps the smallest leave, and those with the largest gradient,
    or random ones, come). ``budget``: seconds that take the place of ``epochs``. ``strength``:
    what the smallest set loses over all epochs, in mean norms. ``moved``: share of the weights that move at first.
    ``max_drop``: what loses more on held-out samples is not kept.
    """

    method: str = option("groups", "What becomes zero: sets of coupled channels, channels by their BatchNormalization scale, or single "
                         "weights (the largest gradients come back: rigl; random ones: set).", REPAIR, choices=SPARSE)  # fmt: skip
    epochs: int = option(10, "Passes over the data.", AMOUNT, low=1)
    budget: float | None = budget("all of it")
    rate: float = option(0.5, "rigl, set: share of the weights that is zero.", AMOUNT, low=0, low_open=True, high=1, high_open=True)
    strength: float = option(0.1, "groups, slimming: what the smallest lose over all epochs, in mean norms.", AMOUNT, low=0, low_open=True,
                             high=float("inf"), high_open=True)  # fmt: skip
    lr: float = option(1e-4, "Learning rate at the start.", REPAIR, low=0, low_open=True, high=1)
    max_drop: str = option("2%", "How much the measure of the task (top-1; without labels agreement) may fall on held-out samples; else "
                           "the model is left as it was.", AMOUNT, metavar="2%")  # fmt: skip
    moved: float = rare(0.3, "rigl, set: share of the weights that move at first.", REPAIR, low=0, high=1)
    device: str = option("cpu", "Where it is computed.", RUN, choices=("cpu", "cuda"))
    resume: Any = option(None, "Go on from this file if it is there; write it after every epoch.", RUN, path=True)
    train_batch: int = rare(64, "Samples per step.", REPAIR, low=1)
    seed: int = 0


def words(said: Mapping[str, Any]) -> str:
    """What is said of an epoch."""
    left = said["seconds"] / said["epoch"] * (said["epochs"] - said["epoch"])
    figures = f"loss {said['loss']:.4g}, held-out {said['before']:.4g} -> {said['held_out']:.4g}, {left:.0f} s left"
    return f"{said['task']}, epoch {said['epoch']}/{said['epochs']}: {figures}"


def finish(
    original: Model, pruned: Model, cuts: Sequence[Cut], data: Dataset, options: RepairOptions
) -> tuple[Model, Mapping[str, object], tuple[str, ...]]:
    """Fine-tune what `prune` made; see `tuning.tuned`."""
    from .tuning import kept_channels, tuned

    chosen = TrainOptions(epochs=options.finetune, seed=options.seed, memory=options.memory)
    result = tuned(pruned, original, kept_channels(cuts), data, chosen, lambda said: log.info(words(said)))
    return result.model, result.figures, result.notes


FINISHERS["finetune"] = finish
NEEDS["finetune"] = lambda: need("torch", "train", "--finetune")
