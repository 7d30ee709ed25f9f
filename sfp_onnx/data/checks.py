"""Somebody's typical mistakes, noticed before they cost a day: wrong normalisation, labels off by one, an export for training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..core.errors import OptionError, SfpError
from ..core.options import DataOptions
from ..core.system import log
from ..core.types import Array, BoolArray, IntArray
from ..evaluation import outputs
from ..graph import Model, inputs
from ..rules.registry import training_nodes
from ..runtime import Batch
from . import Preprocessing
from .dataset import Dataset, Source, open_data
from .images import CONFIG, hub_config, is_images, preset

LOOKED_AT = 256
FEWEST = 50
CLEARLY = 2.5  # standard errors
MEAN, STD = (np.array(values, np.float32).reshape(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))  # ImageNet
CHANGES: dict[str, Callable[[Array], Array]] = {
    "with the colour channels reversed (--color bgr for images)": lambda x: np.ascontiguousarray(x[:, ::-1]),
    "with values divided by 255 (--scale 255)": lambda x: x / 255,
    "with values times 255 (--scale 1 for raw 8-bit images)": lambda x: x * 255,
    "with ImageNet's mean and std (--preset imagenet, or --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225)": lambda x: (x - MEAN) / STD,
    "with ImageNet's mean and std after a division by 255 (--preset imagenet)": lambda x: (x / 255 - MEAN) / STD,
}

FIELDS = ("mean", "std", "scale", "resize", "center_crop", "color", "resample")


def opened(model: Model, source: Source | Dataset | None, options: DataOptions) -> Dataset | None:
    """The data of a run, read as the options say; None without a source. What looks like a mistake is logged as a warning.

    Raises:
        OptionError: options for data that are not there, or that do not fit together. DataError: the data cannot be read.
    """
    if source is None or isinstance(source, Dataset):
        return source
    steps, notes = _preprocessing(model, source, options) if options.steps is None else (options.steps, [])
    data = open_data(source, inputs(model), steps, options.labels, options.samples, options.seed)
    for note in (*notes, *data.notes):
        log.info(f"{data.name}: {note}")
    for text in wrong_reading(model, data):
        log.warning(text)
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
    if options.preset:
        base = preset(options.preset, inputs(model), images)
        notes.append(f"preset {options.preset}: {_listed(base)} (options given win)")
    elif images and config is not None and config.is_file():
        base, left = hub_config(config)
        notes.append(f"preprocessing from {config}: {_listed(base) or 'none'} (options given win)")
        if left:
            notes.append(f"{config}: not followed: {', '.join(left)}")
    given = {name: getattr(options, name) for name in FIELDS if getattr(options, name) is not None}
    if given.get("color") == "bgr" and base.get("color", "rgb") == "rgb":  # figures of a preset are in the order red, green, blue
        base = {**base, **{name: base[name][::-1] for name in ("mean", "std") if name in base}}
    if "resize" in given:
        base.pop("letterbox", None)
    if len(given.get("center_crop", ())) == 1:
        given["center_crop"] *= 2
    return Preprocessing(**{**base, **given}, layout=options.layout), notes


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


def wrong_reading(model: Model, data: Dataset) -> list[str]:
    """What to say if the model is no better than chance on labelled data, or clearly better if they are read otherwise; nothing
    otherwise.

    Chance is the accuracy of answers as frequent as the model's, drawn without looking: sum over classes of p(answer) p(label). The model
    is at it if within two standard errors, on at least 50 samples. Another reading is clearly better if what it wins outweighs what it
    loses by two and a half standard errors (McNemar).
    """
    if data.labels is None or data.samples < FEWEST:
        return []
    part = data.part(np.unique(np.linspace(0, data.samples - 1, LOOKED_AT).astype(np.int64)))
    labels = part.labels
    assert labels is not None
    try:
        scores = outputs(model, part.batches())[0]
    except SfpError:
        return []  # who really needs to run the model says it better
    if scores.ndim != 2 or scores.shape[1] < 2 or labels.min() < 0 or labels.max() > scores.shape[1]:
        return []
    right, chance = _right(scores, labels), _chance(scores, labels)
    limit = chance + 2 * np.sqrt(max(chance * (1 - chance), 1e-6) / len(labels))
    words = f"the model is right on {right.mean():.1%} of {len(labels)} labelled samples of {data.name}"
    if right.mean() > limit:
        if (~right).sum() <= CLEARLY**2:
            return []  # too few mistakes for any other reading to be clearly better
        better = [(answers.mean(), text) for text, answers in _remedies(model, part, scores, labels) if _clearly(answers, right)]
        return [f"{words}, but {max(better)[1]}."] if better else []
    remedies = _remedies(model, part, scores, labels)
    helps = [(answers.mean(), text) for text, answers in remedies if answers.mean() > max(2 * limit, limit + 0.1)]
    advice = max(helps)[1] if helps else "check normalisation, colour order and layout, and that the labels are the model's class numbers"
    return [f"{words}, no better than chance ({chance:.1%}): {advice}."]


def _right(scores: Array, labels: IntArray) -> BoolArray:
    return np.asarray(scores.argmax(1) == labels)


def _clearly(other: BoolArray, right: BoolArray) -> bool:
    won, lost = int((other & ~right).sum()), int((right & ~other).sum())
    return bool(won - lost > CLEARLY * np.sqrt(won + lost))


def _chance(scores: Array, labels: IntArray) -> float:
    classes = scores.shape[1] + 1
    answers, asked = (np.bincount(indices, minlength=classes)[:classes] / len(labels) for indices in (scores.argmax(1), labels))
    return float((answers * asked).sum())


def _remedies(model: Model, part: Dataset, scores: Array, labels: IntArray) -> Iterator[tuple[str, BoolArray]]:
    """What else could be meant, and which answers are right with it."""
    for shift in (1, -1):
        right = _right(scores, labels - shift)
        yield f"labels are off by one: with {'1 less' if shift > 0 else '1 more'} it is right on {right.mean():.1%}", right
    port = part.ports[0]
    if len(part.ports) != 1 or part.axis != 1 or port.shape is None or len(port.shape) != 4 or port.shape[1] != 3:
        return
    for words, change in CHANGES.items():
        try:
            right = _right(outputs(model, _changed(part, port.name, change))[0], labels)
        except SfpError:
            continue
        yield f"{words} it is right on {right.mean():.1%}", right


def _changed(part: Dataset, name: str, change: Callable[[Array], Array]) -> Iterator[Batch]:
    for batch in part.batches():
        feeds, count = batch
        with np.errstate(all="ignore"):  # a wrong guess may overflow
            changed = np.ascontiguousarray(change(feeds[name])).astype(feeds[name].dtype)
        yield Batch.padded({name: changed}, count, batch.padding)
