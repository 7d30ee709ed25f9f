"""What an output means, and why: from the task that is asked for, the graph, its name, the values of one batch, and labels that fit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np

from ..core.errors import DataError, OptionError
from ..core.options import MeasureOptions
from ..core.types import Array, FloatArray, Tokens
from ..graph import Model, outputs
from ..rules.tails import Tail, tails
from ..runtime import Observed


class Kind(Enum):
    """What values are; how messages say it."""

    CLASSES = "class scores"
    MAP = "class map"
    MARKS = "multi-label scores"
    EMBEDDING = "embedding"
    NUMBERS = "numbers"
    BOXES = "boxes with scores"
    INTEGERS = "integers"
    OTHER = "values that are no numbers"
    UNKNOWN = "numbers of unknown meaning"


TASKS = {"classify": Kind.CLASSES, "segment": Kind.MAP, "detect": Kind.BOXES, "embed": Kind.EMBEDDING, "regress": Kind.NUMBERS,
         "multilabel": Kind.MARKS}  # fmt: skip
ONE_EACH = {Kind.CLASSES, Kind.MAP}  # one class for each sample or place
LEAST = 1e-12  # probabilities below are taken as this


@dataclass(frozen=True)
class Meaning:
    """What ``outputs`` (one; of boxes, several together) are, and the ``reason``. Of class scores and maps: ``axis`` is that of the
    ``classes`` (how many there are), None where the values are class numbers, or marks that hold above ``threshold``. Of multi-label
    scores: the axis of the classes, each of which holds above the threshold. ``labelled``: the labels of the data fit it. ``channels``: of
    the second and the last axis the one of which alone the model declares how long it is."""

    outputs: tuple[str, ...]
    kind: Kind
    reason: str
    shape: tuple[int, ...] = ()
    axis: int | None = None
    classes: int = 0
    threshold: float | None = None
    labelled: bool = False
    channels: int | None = None

    @property
    def name(self) -> str:
        """The outputs, as messages name them."""
        return " and ".join(f"'{name}'" for name in self.outputs)

    def __str__(self) -> str:
        """What it is read as, in a line."""
        if self.kind is Kind.UNKNOWN:
            return f"output {self.name} {list(self.shape)}: {self.kind.value}{f' ({self.reason})' if self.reason else ''}"
        return f"output{'s' * (len(self.outputs) > 1)} {self.name} read as {self.kind.value} ({self.reason})"

    def answers(self, array: Array) -> Array:
        """Class numbers: of class scores (N,), of a map (N, ...); of multi-label scores whether each holds, in their shape."""
        if self.kind is Kind.MARKS:
            return array > self.threshold
        if self.axis is not None:
            array = array.argmax(self.axis)
        elif self.threshold is not None:
            array = array > self.threshold
        return array.reshape(len(array)) if self.kind is Kind.CLASSES else array

    def scores(self, array: Array) -> Array:
        """Class scores (N, classes)."""
        return np.moveaxis(array, self.axis or 0, -1).reshape(len(array), self.classes)


def log_probabilities(output: Array, temperature: float = 1.0) -> FloatArray:
    """Log of softmax(z / T) along the last axis, in float64, of logits z; rows that are probabilities already are taken as softmax(z)."""
    scores = output.astype(np.float64)
    if scores.size and (scores >= 0).all() and np.allclose(scores.sum(-1), 1, atol=1e-3):
        scores = np.log(np.maximum(scores, LEAST))
    scores = scores / temperature
    scores = scores - scores.max(-1, keepdims=True)
    return np.asarray(scores - np.log(np.exp(scores).sum(-1, keepdims=True)))


def same(arrays: Sequence[Array]) -> bool:
    """Whether arrays have one shape."""
    return len({array.shape for array in arrays}) == 1


def plain(value: Any, rows: int, count: int) -> Array:
    """What onnxruntime gave for an output as an array, without padding. Maps with equal keys become rows of numbers, tensors of one
    shape an axis behind the first, others with a row for each sample one row of all their numbers; else the items stay as they are."""
    items: list[Any] | None = value if isinstance(value, list) else [value] if isinstance(value, Mapping) else None
    if items is not None:
        if items and all(isinstance(item, Mapping) and item.keys() == items[0].keys() for item in items):
            value = np.array([[item[key] for key in items[0]] for item in items])
        elif items and all(isinstance(item, np.ndarray) and item.ndim and item.dtype.kind == "f" for item in items) and same(items):
            value = np.stack(items, 1)
        elif items and all(isinstance(item, np.ndarray) and item.shape[:1] == (rows,) and item.dtype.kind == "f" for item in items):
            value = np.concatenate([item.reshape(rows, -1) for item in items], 1)
        else:
            value = np.empty(len(items), object)
            for place, item in enumerate(items):
                value[place] = item
    return np.asarray(value[:count] if value.ndim and len(value) == rows else value)


# ---- one output ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """What is known of one output: its values in one batch of ``count`` samples, what its operators say, and the labels of all samples."""

    name: str
    array: Array
    count: int
    tail: Tail | None
    labels: Array | None

    @property
    def rows(self) -> bool:
        """Whether there is a row for each sample."""
        return self.array.ndim > 0 and len(self.array) == self.count and (self.tail is None or self.tail.says not in ("boxes", "listed"))

    @property
    def inner(self) -> tuple[int, ...]:
        """Sizes over 1 of a sample's values."""
        return tuple(size for size in self.array.shape[1:] if size > 1)

    def like(self, shape: tuple[int, ...]) -> bool:
        """Whether a sample's values have this shape, but for sizes of 1."""
        return tuple(size for size in shape if size > 1) == self.inner

    def named(self, pattern: str) -> bool:
        """Whether the name says so."""
        return re.search(pattern, self.name.lower()) is not None

    def along(self, function: Any) -> int | None:
        """The axis of a sample's values along which a function gives 1 everywhere."""
        axes = [axis for axis in range(1, self.array.ndim) if self.array.shape[axis] > 1]
        return next((axis for axis in reversed(axes) if np.allclose(function(axis), 1, atol=1e-3)), None)


CLASS_NAMES, EMBEDDING_NAMES, SCORE_NAMES = r"logit|prob|softmax|class_?scores", r"embed|feature|descriptor|last_hidden", r"^scores?$"


def _meaning(seen: _Seen) -> Meaning:
    array = seen.array
    base = Meaning((seen.name,), Kind.UNKNOWN, "", array.shape)
    if array.dtype.kind not in "fiub":
        return replace(base, kind=Kind.OTHER, reason="text or sequences" if array.ndim else "text")
    if not seen.rows:
        reason = "no row for each sample" if array.ndim else "one for the whole batch"
        return replace(base, kind=Kind.INTEGERS if array.dtype.kind != "f" else Kind.UNKNOWN, reason=reason)
    found = _integers(seen, base) if array.dtype.kind != "f" else _by_tail(seen, base) or _by_name(seen, base) or _by_values(seen, base)
    return _by_labels(seen, found)


def _integers(seen: _Seen, base: Meaning) -> Meaning:
    """Class numbers where an operator chose them, else integers."""
    if seen.tail is not None and seen.tail.says == "chosen":
        kind = Kind.MAP if seen.inner else Kind.CLASSES
        return replace(base, kind=kind, reason=f"{seen.tail.operator}: class numbers")
    return replace(base, kind=Kind.INTEGERS, reason=f"their type is {seen.array.dtype}")


def _by_tail(seen: _Seen, base: Meaning) -> Meaning | None:
    if seen.tail is None:
        return None
    says, operator = seen.tail
    if says == "sorted":
        return replace(base, reason=f"{operator} sorts them")
    if says == "unit":
        return replace(base, kind=Kind.EMBEDDING, reason=operator)
    shape = seen.array.shape
    if says == "marks" and (seen.inner == shape[1:2] or (len(seen.inner) > 1 and 1 not in (shape[1], shape[-1]))):
        marks, alike = _marks(seen, base, f"{operator}: each class on its own"), seen.labels is None or seen.like(seen.labels.shape[1:])
        if (seen.labels is None or seen.labels.dtype.kind == "f") and len(seen.inner) == 3 and marks.classes in COLOURS:
            return replace(base, reason=f"{operator} over {marks.classes} channels: an image, or --task multilabel")
        return marks if alike else _classes(seen, base, operator)
    return _classes(seen, base, operator, marks=says == "marks") if says in ("classes", "marks") else None


IGNORED = 255  # a label that marks nothing
COLOURS = (3, 4)  # channels of images


def _marks(seen: _Seen, base: Meaning, reason: str) -> Meaning:
    """Scores of classes of which several may hold at once."""
    array = seen.array
    axes = [axis for axis in range(1, array.ndim) if array.shape[axis] > 1]
    axis = min((axes[0], axes[-1]), key=lambda axis: array.shape[axis])
    threshold = 0.5 if array.size and array.min() >= 0 and array.max() <= 1 else 0.0
    return replace(base, kind=Kind.MARKS, reason=reason, axis=axis, classes=array.shape[axis], threshold=threshold)


def _by_name(seen: _Seen, base: Meaning) -> Meaning | None:
    if seen.named(EMBEDDING_NAMES) and seen.inner:
        return replace(base, kind=Kind.EMBEDDING, reason="its name")
    if seen.named(CLASS_NAMES) or (seen.named(SCORE_NAMES) and len(seen.inner) == 1):
        return _classes(seen, base, "its name")
    return _classes(seen, base, "its name") if seen.named("mask|segment") and seen.array.ndim == 4 else None


def _by_values(seen: _Seen, base: Meaning) -> Meaning:
    array = seen.array
    if array.size and (array >= 0).all() and seen.along(array.sum) is not None:
        return _classes(seen, base, "rows sum to one")
    if len(seen.inner) == 1 and seen.along(lambda axis: np.linalg.norm(array.astype(np.float64), axis=axis)) is not None:
        return replace(base, kind=Kind.EMBEDDING, reason="rows of length one")
    return base


def _by_labels(seen: _Seen, found: Meaning) -> Meaning:
    """The same, with whether the labels fit; which tell what it is where nothing else does."""
    labels = seen.labels
    if labels is None:
        return found
    shape = labels.shape[1:]
    several = found.kind is Kind.UNKNOWN and len(shape) == 1 and shape == seen.array.shape[1:] and labels.dtype.kind in "iub"
    if several and labels.size and labels.min() >= 0 and labels.max() <= 1 and (labels.sum(1) != 1).any():
        found = _marks(seen, found, "labels that fit")
    if found.kind is Kind.MARKS:
        known = labels[(labels >= 0) & (labels != IGNORED)]
        return replace(found, labelled=seen.like(shape) and bool(len(known)) and bool(known.max() <= 1))
    if labels.dtype.kind in "iu" and found.kind is not Kind.NUMBERS:
        low, high = int(labels.min(initial=0)), int(labels.max(initial=0))
        if found.kind is Kind.UNKNOWN and not shape and len(seen.inner) == 1 and low >= 0 and high < seen.inner[0]:
            found = _classes(seen, found, "labels that fit")
        elif found.kind is Kind.INTEGERS and not shape and not seen.inner:
            found = replace(found, kind=Kind.CLASSES, reason="labels that fit: class numbers")
        elif found.kind in (Kind.UNKNOWN, Kind.INTEGERS) and len(shape) > 1:
            axes = [axis for axis in range(1, seen.array.ndim) if seen.array.shape[1:axis] + seen.array.shape[axis + 1 :] == shape]
            if seen.array.shape[1:] == shape or axes:
                found = replace(_classes(seen, found, "labels that fit"), kind=Kind.MAP)
        if found.kind is Kind.CLASSES:
            known = found.classes or (2 if found.threshold is not None else 1 << 62)
            return replace(found, labelled=not shape and low >= 0 and high < known)
        return replace(found, labelled=found.kind is Kind.MAP and tuple(size for size in shape if size > 1) == _positions(found))
    fits = seen.array.size == len(seen.array) * labels[:1].size and found.kind in (Kind.UNKNOWN, Kind.NUMBERS)
    return replace(found, kind=Kind.NUMBERS, reason="labels that fit", labelled=True) if fits else found


def _positions(found: Meaning) -> tuple[int, ...]:
    """Sizes over 1 of a sample's class numbers."""
    shape = [size for axis, size in enumerate(found.shape) if axis and axis != found.axis]
    return tuple(size for size in shape if size > 1)


def _classes(seen: _Seen, base: Meaning, reason: str, marks: bool = False) -> Meaning:
    """Class scores, one row each or a map of them."""
    array, inner = seen.array, seen.inner
    kind = Kind.MAP if len(inner) > 1 or (len(inner) == 1 and array.ndim > 3 and array.shape[1] == 1) else Kind.CLASSES
    found = replace(base, kind=kind, reason=reason)
    if array.dtype.kind != "f":
        return found
    shape = None if seen.labels is None else seen.labels.shape[1:]
    axes = [axis for axis in range(1, array.ndim) if array.shape[axis] > 1]
    labelled = [axis for axis in axes if array.shape[1:axis] + array.shape[axis + 1 :] == shape and shape]
    single = kind is Kind.MAP and (marks or (array.ndim > 3 and array.shape[1] == 1))
    if not inner or single or shape == array.shape[1:]:
        shares = array.size and array.min() >= 0 and array.max() <= 1
        return replace(found, threshold=0.5 if shares else 0.0)
    sums = seen.along(array.sum) if (array >= 0).all() else seen.along(lambda axis: np.exp(array.astype(np.float64)).sum(axis))
    usual = axes[-1] if array.ndim < 4 else min((axes[0], axes[-1]), key=lambda axis: array.shape[axis])
    axis = labelled[0] if labelled else usual if sums is None or kind is Kind.CLASSES else sums
    return replace(found, axis=axis, classes=array.shape[axis])


# ---- all outputs of a model ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """What all outputs mean, and which is ``judged``; ``metric``: by what, if it is asked for. ``notes`` say it. ``tokens``: rows that an
    input may switch off, which then are not compared."""

    meanings: tuple[Meaning, ...]
    judged: Meaning
    metric: str | None = None
    notes: tuple[str, ...] = ()
    tokens: Tokens | None = None


def read(
    model: Model, batch: Observed, labels: Array | None, options: MeasureOptions = MeasureOptions(), place: str = "the data"
) -> Reading:
    """What the outputs of a model mean.

    Args:
        batch: what the model gave for one batch. labels: of all samples. place: where these come from.

    Raises:
        OptionError: no such output, or it cannot be what the task says. DataError: labels that are no classes of what has classes.
    """
    known = tails(model)
    seen = [
        _Seen(name, plain(value, batch.rows, batch.count), batch.count, known.get(name), labels) for name, value in batch.values.items()
    ]
    if options.output_name is not None and options.output_name not in batch.values:
        raise OptionError(f"--output-name '{options.output_name}': the outputs are {', '.join(batch.values)}")
    declared = {port.name: port.shape for port in outputs(model)}
    meanings = [replace(_meaning(item), channels=_channels(declared.get(item.name))) for item in seen]
    task = None if options.task is None else TASKS[options.task]
    boxes = _boxes(seen, options, task)
    if boxes is not None:
        boxes = replace(boxes, labelled=labels is not None and labels.ndim == 3 and labels.shape[2] >= 5)
        meanings = [replace(own, kind=Kind.UNKNOWN, reason="", labelled=False) if own.outputs[0] in boxes.outputs and own.kind
                    in {*ONE_EACH, Kind.MARKS} else own for own in meanings]  # fmt: skip
        meanings.insert(0, boxes)
    wanted = [item for item in meanings if options.output_name in (None, *item.outputs)]
    judged = _chosen(wanted)
    if task is not None and judged.kind is not task:
        item = next(item for item in seen if item.name == judged.outputs[0])
        again = _as_task(item, judged, task, options)
        meanings[meanings.index(judged)] = again
        judged = again
    _check_labels(judged, labels, place)
    notes = [str(own) for own in meanings if boxes is None or own is boxes or own.outputs[0] not in boxes.outputs]
    if len(notes) > 1:
        notes.append(f"judged: {judged.name}")
    if labels is not None and not judged.labelled:
        notes.append(f"labels ({labels.dtype} of shape {list(labels.shape)}) are not used: they do not fit {judged.kind.value}")
    return Reading(tuple(meanings), judged, options.metric, tuple(notes))


def _channels(declared: Sequence[int | str | None] | None) -> int | None:
    fixed = [axis for axis in (1, len(declared or ()) - 1) if declared and axis < len(declared) and isinstance(declared[axis], int)]
    return fixed[0] if len(fixed) == 1 and len(declared or ()) > 2 else None


def _chosen(meanings: Sequence[Meaning]) -> Meaning:
    """The one to judge by: what labels fit, else the first whose meaning is known (scores before class numbers), else
    the first."""
    known = (Kind.CLASSES, Kind.MAP, Kind.MARKS, Kind.EMBEDDING, Kind.NUMBERS)
    order = [(Kind.BOXES,), known, (Kind.UNKNOWN,), (Kind.INTEGERS,), (Kind.OTHER,)]

    def rank(own: Meaning) -> tuple[bool, int, bool]:
        return not own.labelled, next(place for place, kinds in enumerate(order) if own.kind in kinds), own.axis is None

    return min(meanings, key=rank)


def _as_task(seen: _Seen, found: Meaning, task: Kind, options: MeasureOptions) -> Meaning:
    """An output read as the task says."""
    base = replace(found, kind=Kind.UNKNOWN, reason="", labelled=False, axis=None, classes=0, threshold=None)
    reason = f"--task {options.task}"
    fits = seen.array.dtype.kind in "fiub" and (task is Kind.NUMBERS or seen.rows)
    if task in ONE_EACH and fits:
        made = _classes(seen, base, reason)
        fits = made.kind is task or (task is Kind.MAP and not seen.inner)
        return _by_labels(seen, replace(made, kind=task)) if fits else _refused(found, options)
    if task is Kind.MARKS and fits and seen.inner and seen.array.dtype.kind == "f":
        return _by_labels(seen, _marks(seen, base, reason))
    if not fits or task in (Kind.BOXES, Kind.MARKS) or (task is Kind.EMBEDDING and not seen.inner):
        return _refused(found, options)
    return _by_labels(seen, replace(base, kind=task, reason=reason))


def _refused(found: Meaning, options: MeasureOptions) -> Meaning:
    seen = f"output {found.name} of shape {list(found.shape)} cannot be that"
    raise OptionError(f"--task {options.task}: {seen}. Give --output-name or --metric")


def _check_labels(judged: Meaning, labels: Array | None, place: str) -> None:
    """Labels of class scores must be classes; where nothing says that an output has classes, labels that are nearly so are a mistake."""
    row = judged.kind is Kind.UNKNOWN and len(judged.shape) == 2 and judged.shape[1] > 1
    if labels is None or judged.labelled or not len(labels) or not (row or judged.kind is Kind.CLASSES):
        return
    if labels.ndim == 1 and labels.dtype.kind == "i":
        classes = judged.shape[1] if row else judged.classes or 2
        low, high = int(labels.min()), int(labels.max())
        hint = " They look as if they started at 1." if low == 1 and high == classes else ""
        hint += " If the output holds no class scores, give --task." if row else ""
        raise DataError(f"{place}: labels run from {low} to {high}, but the model has classes 0 to {classes - 1}.{hint}")
    if not row:
        hint = "If they are one-hot, give their argmax(1); if several hold at once, --task multilabel"
        hint = "Save them as integers: labels.astype(int)" if labels.ndim == 1 else hint
        found = f"found {labels.dtype} of shape {list(labels.shape)}"
        raise DataError(f"{place}: labels of {judged.kind.value} must be one integer per sample, {found}. {hint}.")


# ---- boxes -----------------------------------------------------------------------------------------------------------

BOX_NAMES, SCORE_LIKE, LABEL_LIKE = r"box|rect|^loc", r"score|conf|cls|class|prob|logit", r"label|class|categor"


def _boxes(seen: Sequence[_Seen], options: MeasureOptions, task: Kind | None) -> Meaning | None:
    """Outputs that hold boxes, their scores, and (if there are any) their classes, or one output that holds all of these."""
    if task not in (None, Kind.BOXES):
        return None
    suppressed = any(item.tail is not None and item.tail.says == "boxes" for item in seen)
    corners = [item for item in seen if item.array.ndim in (2, 3) and item.array.shape[-1] == 4 and item.array.dtype.kind == "f"]
    for item in corners:
        lead = item.array.shape[:-1]
        beside = [own for own in seen if own is not item and own.array.shape[: len(lead)] == lead and own.array.ndim - len(lead) < 2]
        floating = [own for own in beside if own.array.dtype.kind == "f"]
        scores = next((own for own in floating if own.named(SCORE_LIKE)), floating[0] if len(floating) == 1 and task else None)
        if scores is None or not (item.named(BOX_NAMES) or suppressed or task):
            continue
        flat = (own for own in beside if own is not scores and own.array.shape == lead and own.named(LABEL_LIKE))
        parts = (item, scores, *list(flat)[:1])
        reason = "NonMaxSuppression" if suppressed else "--task detect" if task else "their names"
        return Meaning(tuple(own.name for own in parts), Kind.BOXES, reason, item.array.shape)
    named = [item for item in seen if options.output_name in (None, item.name)]
    for item in named:
        last = item.array.shape[-1] if item.array.ndim in (2, 3) else 0
        whole = last in (6, 7) or (item.array.ndim == 3 and min(item.array.shape[1:]) > 4)
        if item.array.dtype.kind == "f" and whole and (task or (suppressed and item.tail and item.tail.says == "boxes")):
            return Meaning((item.name,), Kind.BOXES, "--task detect" if task else "NonMaxSuppression", item.array.shape)
    return None
