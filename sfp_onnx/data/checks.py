"""Somebody's typical mistakes, noticed before they cost a day: wrong normalisation, labels off by one, an export for training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..core.errors import OptionError, SfpError
from ..core.options import DataOptions, MeasureOptions
from ..core.system import log
from ..core.types import Array, BoolArray, FloatArray, IntArray
from ..evaluation import outputs, reading_of
from ..evaluation.meaning import Kind, Meaning, log_probabilities
from ..evaluation.measures import chance
from ..graph import Model, inputs, outputs as model_outputs
from ..rules.registry import training_nodes
from ..runtime import Batch, Batches
from . import Preprocessing
from .dataset import Dataset, Source, one_by_one, open_data
from .images import CONFIG, hub_config, is_images, preset
from .readings import Change, readings

LOOKED_AT = 256
FEWEST = 50
CLEARLY = 2.5  # standard errors
SURER = 2.5  # standard errors of the mean log probability of the labels
TEMPERATURES = tuple(2.0 ** (power / 4) for power in range(-8, 9))
SCREENED = 4  # another reading is first tried on one sample in so many
LARGE = 3 * 64 * 64  # values of a sample from which on half as many are looked at
HINT, HINTED = 0.03, 4.0  # by how much, and by how many standard errors, a model must be surer of its answers to say so without labels
LIKE_CLASSES = 0.5  # outputs of unknown meaning are taken for class scores from this mean top probability on
FEW = 100
LEAST = -7.0  # log probabilities below are taken as this

FIELDS = ("mean", "std", "scale", "resize", "center_crop", "color", "resample")


def opened(
    model: Model, source: Source | Dataset | None, options: DataOptions, measures: MeasureOptions = MeasureOptions()
) -> Dataset | None:
    """The data of a run, read as the options say; None without a source. What looks like a mistake is logged as a warning.

    Args:
        measures: what is known of the outputs.

    Raises:
        OptionError: options for data that are not there, or that do not fit together. DataError: the data cannot be read.
    """
    if source is None or isinstance(source, Dataset):
        return source
    steps, notes = _preprocessing(model, source, options) if options.steps is None else (options.steps, [])
    shape = next((port.shape or () for port in model_outputs(model)), ())
    classes = shape[1] if len(shape) == 2 and isinstance(shape[1], int) else None
    data = open_data(source, inputs(model), steps, options.labels, options.samples, options.seed, options.classes, classes)
    data = one_by_one(model, data)
    if data.samples < FEW and options.samples is None:
        notes.append(f"{data.samples} samples are few: 200 to 2000 typical ones make scores, repair and figures sure")
    for note in (*notes, *data.notes):
        log.info(f"{data.name}: {note}")
    for text in wrong_reading(model, data, measures):
        log.warning(text)
    for text in other_reading(model, data, measures):
        log.info(text)
    log.debug(f"{data.name}: {data.samples} samples, labels {'given' if data.labels is not None else 'none'}")
    return data


def _preprocessing(model: Model, source: Source, options: DataOptions) -> tuple[Preprocessing, list[str]]:
    """What the options say, else the preset, else (for images) a ``preprocessor_config.json`` next to the model; and what to tell
    about it."""
    images, notes = is_images(source), []
    base: dict[str, Any] = {}
    config = model.source.parent / CONFIG if model.source is not None else None
    if images and options.layout != "nchw":
        raise OptionError("--layout is for arrays; images are laid out as the model takes them. Leave it away.")
    origin = ""
    if options.preset:
        base, origin = preset(options.preset, inputs(model), images), f"preset {options.preset}"
    elif images and config is not None and config.is_file():
        (base, left), origin = hub_config(config), f"preprocessing from {config}"
        if left:
            notes.append(f"{config}: not followed: {', '.join(left)}")
    given = {name: getattr(options, name) for name in FIELDS if getattr(options, name) is not None}
    if given.get("color") == "bgr" and base.get("color", "rgb") == "rgb":  # figures of a preset are in the order red, green, blue
        base = {**base, **{name: base[name][::-1] for name in ("mean", "std") if name in base}}
    if len(given.get("center_crop", ())) == 1:
        given["center_crop"] *= 2
    if base.get("letterbox") and len(given.get("resize", ())) == 1:
        given["resize"] *= 2
    used = {**base, **given}
    if origin:
        over = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        notes.insert(0, f"{origin}{f' with {over} as given' if over else ''}: {_listed(used) or 'none'}")
    return Preprocessing(**used, layout=options.layout), notes


def _listed(steps: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', '-')} {_shown(value)}" for name, value in steps.items())


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ("x" if all(isinstance(item, int) for item in value) else ",").join(f"{item:g}" for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


# ---- mistakes --------------------------------------------------------------------------------------------------------


def training_mode(model: Model) -> list[str]:
    """What to say of a model that was exported for training; nothing of others."""
    names = training_nodes(model)
    if not names:
        return []
    listed = ", ".join(names[:3]) + (f" (+{len(names) - 3})" if len(names) > 3 else "")
    advice = "Export it again in evaluation mode (PyTorch: model.eval() before torch.onnx.export)."
    return [f"{model.name}: exported in training mode: {listed} behave as in training (random, or by the batch). {advice}"]


def wrong_reading(model: Model, data: Dataset, measures: MeasureOptions = MeasureOptions()) -> list[str]:
    """What to say if a model that gives class scores is no better than chance on labelled data, or clearly better if they are read
    otherwise; nothing otherwise.

    Chance is the accuracy of answers as frequent as the model's, drawn without looking: sum over classes of p(answer) p(label). The model
    is at it if within two standard errors, on at least 50 samples. Another reading is clearly better if what it wins outweighs what it
    loses by two and a half standard errors (McNemar); or if it wins more than it loses, and the log probabilities of the labels are
    greater by as many. On three networks of 32 x 32 pixels, each read
    with five usual normalisations, it was said of all that cost 1.3 points or more and of none that cost less (benchmarks/readings.py).
    """
    if data.classes is None or data.samples < FEWEST:
        return []
    part = _some(data)
    labels = part.classes
    assert labels is not None
    scorer = Scorer.of(model, replace(part, labels=np.minimum(labels, max(labels.max() - 1, 0))), measures)  # they may start at 1
    scores = None if scorer is None or scorer.judged.kind is not Kind.CLASSES else scorer.scores(part.batches())
    if scores is None or scorer is None or labels.min() < 0 or labels.max() > scores.shape[1]:
        return []
    right, (blind, limit) = _right(scores, labels), chance(labels, scores.argmax(1))
    words = f"the model is right on {right.mean():.1%} of {len(labels)} labelled samples of {data.name}"
    if right.mean() <= limit and not right.all():
        clear = [other for other in _remedies(scorer, part, scores, labels) if _clearly(other.right, right)]
        helps = [(other.right.mean(), other.words) for other in clear if other.right.mean() > limit + 0.1]
        check = "check normalisation, colour order and layout, and that the labels are the model's class numbers"
        advice = max(helps)[1] if helps else check
        return [f"{words}, no better than chance ({blind:.1%}): {advice}."]
    if (~right).sum() <= CLEARLY**2:
        return []  # too few mistakes for any other reading to be clearly better
    others = [other for other in _remedies(scorer, part, scores, labels) if _clearly(other.right, right) or _surer(other, scores, labels)]

    def worth(other: Remedy) -> tuple[float, float]:
        known = other.scores is not None and labels.max() < other.scores.shape[1]
        return float(other.right.mean()), float(_label_scores(other.scores, labels).mean()) if known and other.scores is not None else LEAST

    return [f"{words}, but {max(others, key=worth).words}."] if others else []


def other_reading(model: Model, data: Dataset, measures: MeasureOptions = MeasureOptions()) -> list[str]:
    """A hint for data without labels: another normalisation with which a classifier of images is surer of its answers."""
    if data.labels is not None or data.samples < FEWEST or (others := [one for one in readings(data) if one.normal]) == []:
        return []
    part = _some(data, 2)
    scorer = Scorer.of(model, part, measures)
    scores = None if scorer is None else scorer.scores(part.batches())
    if scorer is None or scores is None:
        return []
    now, found = _top(scores), []
    least = 0.0 if scorer.judged.kind is Kind.CLASSES else LIKE_CLASSES
    for other in others:
        if (changed := scorer.scores(_changed(part, other.change))) is not None:
            gain = _top(changed) - now
            if gain.mean() > HINT and gain.mean() > HINTED * gain.std() / np.sqrt(len(gain)) and (now + gain).mean() >= least:
                found.append((float((now + gain).mean()), other.words))
    if not found:
        return []
    top, words = max(found)
    sure = f"is surer of its answers {words}: mean top probability {top:.3f} instead of {now.mean():.3f} on {len(now)} samples"
    return [f"a hint, without labels no more: the model {sure}. Was it trained so?"]


def _some(data: Dataset, share: int = 1) -> Dataset:
    """Samples to look at, from all places; fewer of large images."""
    size = max(int(np.prod([size or 1 for size in reader.shape[1:]])) for reader in data.readers.values())
    count = LOOKED_AT // share // (1 if size < LARGE else 2)
    return data.part(np.unique(np.linspace(0, data.samples - 1, count).astype(np.int64)))


@dataclass(frozen=True)
class Scorer:
    """How class scores, one row a sample, come from a model: its outputs at ``place``, as they are ``judged``."""

    model: Model
    judged: Meaning
    place: int

    @classmethod
    def of(cls, model: Model, data: Dataset, measures: MeasureOptions) -> Scorer | None:
        """The scorer of a model that gives class scores, or numbers that may be such; None for others."""
        try:
            judged = reading_of(model, data, measures).judged
        except SfpError:
            return None  # who really needs to run the model says it better
        flat = judged.kind is Kind.CLASSES and judged.axis is not None
        flat |= judged.kind is Kind.UNKNOWN and len(judged.shape) == 2 and judged.shape[1] > 1
        return cls(model, judged, [port.name for port in model_outputs(model)].index(judged.outputs[0])) if flat else None

    def scores(self, batches: Batches) -> Array | None:
        """Class scores; None where the model does not run, or gives no row for each sample."""
        try:
            scores = outputs(self.model, batches)[self.place]
        except SfpError:
            return None
        if not isinstance(scores, np.ndarray) or len(scores) == 0:
            return None
        return self.judged.scores(scores) if self.judged.kind is Kind.CLASSES else scores


def _top(scores: Array) -> FloatArray:
    return np.asarray(np.exp(log_probabilities(scores).max(1)))


def _right(scores: Array, labels: IntArray) -> BoolArray:
    return np.asarray(scores.argmax(1) == labels)


def _clearly(other: BoolArray, right: BoolArray) -> bool:
    won, lost = int((other & ~right).sum()), int((right & ~other).sum())
    return bool(won - lost > CLEARLY * np.sqrt(won + lost))


def _surer(other: Remedy, scores: Array, labels: IntArray) -> bool:
    """Whether another reading gives the labels a greater probability, beyond doubt, and is not less often right."""
    if other.scores is None or labels.max() >= scores.shape[1] or other.right.mean() <= _right(scores, labels).mean():
        return False
    gain = np.subtract(*(_label_scores(every, labels) for every in (other.scores, scores)))
    return bool(gain.mean() > SURER * gain.std() / np.sqrt(len(gain)))


def _label_scores(scores: Array, labels: IntArray) -> FloatArray:
    """Log probabilities of the labels, at the temperature with which they are greatest: another contrast alone gains nothing."""
    rows = np.arange(len(labels))
    every = [np.maximum(log_probabilities(scores, temperature)[rows, labels], LEAST) for temperature in TEMPERATURES]
    return max(every, key=lambda found: float(found.mean()))


@dataclass(frozen=True)
class Remedy:
    """What else could be meant, which answers are right with it, and the scores of another reading of the inputs."""

    words: str
    right: BoolArray
    scores: Array | None = None


def _remedies(scorer: Scorer, part: Dataset, scores: Array, labels: IntArray) -> Iterator[Remedy]:
    for shift in (1, -1):
        right = _right(scores, labels - shift)
        yield Remedy(f"labels are off by one: with {'1 less' if shift > 0 else '1 more'} it is right on {right.mean():.1%}", right)
    screen = np.arange(0, part.samples, SCREENED)
    now = _right(scores, labels)[screen].sum()
    for other in readings(part):
        tried = scorer.scores(_changed(part.part(screen), other.change))
        if tried is None or _right(tried, labels[screen]).sum() <= now:
            continue
        changed = scorer.scores(_changed(part, other.change))
        if changed is not None:
            right = _right(changed, labels)
            yield Remedy(f"{other.words} it is right on {right.mean():.1%}", right, changed)


def _changed(part: Dataset, change: Change) -> Iterator[Batch]:
    for batch in part.batches():
        feeds, count = batch
        with np.errstate(all="ignore"):  # a wrong guess may overflow
            changed = {name: np.ascontiguousarray(change(array)).astype(array.dtype) for name, array in feeds.items()}
        yield Batch.padded(changed, count, batch.padding)
