"""What outputs mean, and how far models are apart by that: one contract for all measures, a model for each kind, and the gates."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import pytest
from building import FLOAT, Builder
from conftest import classifier, images, invoke

import sfp_onnx
from sfp_onnx import MeasureOptions, PlanOptions, repair
from sfp_onnx.core.errors import DataError, OptionError, VerificationError
from sfp_onnx.evaluation import Comparison, outputs, parse_drop, reading_of
from sfp_onnx.evaluation.boxes import Boxes, average_precision, matched, overlaps, read_pair
from sfp_onnx.evaluation.meaning import Kind, Meaning, Reading, plain
from sfp_onnx.evaluation.measures import MEASURES, PARTS, Pair, Tally, channel_errors, worsened

CASES = Path(__file__).resolve().parents[2] / "shared" / "cases"

# ---- one contract for all measures -----------------------------------------------------------------------------------

MEANINGS = {
    Kind.CLASSES: Meaning(("y",), Kind.CLASSES, "", (0, 9), axis=1, classes=9, labelled=True),
    Kind.MAP: Meaning(("y",), Kind.MAP, "", (0, 4, 3, 5), axis=1, classes=4, labelled=True),
    Kind.MARKS: Meaning(("y",), Kind.MARKS, "", (0, 4, 3, 5), axis=1, classes=4, threshold=5.0, labelled=True),
    Kind.EMBEDDING: Meaning(("y",), Kind.EMBEDDING, "", (0, 8)),
    Kind.NUMBERS: Meaning(("y",), Kind.NUMBERS, "", (0, 3), labelled=True),
    Kind.UNKNOWN: Meaning(("y",), Kind.UNKNOWN, "", (0, 3)),
    Kind.BOXES: Meaning(("boxes", "scores", "labels"), Kind.BOXES, "", (0, 6, 4), labelled=True),
    Kind.INTEGERS: Meaning(("y",), Kind.INTEGERS, "", (0, 7)),
    Kind.OTHER: Meaning(("y",), Kind.OTHER, "", (0,)),
}


def values(kind: Kind, count: int, noise: float = 0.0) -> list[np.ndarray]:
    """Outputs of an original (no noise) or of a model that is near to it."""
    random, other = np.random.default_rng(3), np.random.default_rng(4)
    shape = {Kind.CLASSES: (9,), Kind.MAP: (4, 3, 5), Kind.MARKS: (4, 3, 5), Kind.EMBEDDING: (8,)}.get(kind, (3,))
    if kind is Kind.BOXES:
        low = 40 * random.random((count, 6, 2))
        boxes = np.concatenate([low, low + 5 + 5 * random.random((count, 6, 2))], -1)
        boxes = boxes + 3 * noise * other.standard_normal(boxes.shape)
        return [boxes, 0.5 + random.random((count, 6)) / 2, random.integers(0, 2, (count, 6))]
    if kind in (Kind.INTEGERS, Kind.OTHER):
        found = random.integers(0, 5, (count, 7)) + (other.random((count, 7)) < noise / 4)
        return [found if kind is Kind.INTEGERS else np.array(["".join(map(str, row[:2])) for row in found])]
    return [(5 + random.standard_normal((count, *shape)) + noise * other.standard_normal((count, *shape))).astype(np.float32)]


def truth(kind: Kind, count: int) -> Any:
    base = values(kind, count)
    if kind is Kind.BOXES:
        return np.concatenate([base[0], base[2][..., None]], -1)
    meaning = MEANINGS[kind]
    return meaning.answers(base[0]).astype(np.int64) if meaning.axis is not None else base[0] + 0.1


def tallied(name: str, kind: Kind, noise: float, count: int = 60, step: int = 16, order: int = 1) -> Tally:
    measure, found = MEASURES[name], Tally(MEASURES[name])
    old, new, labels = values(kind, count), values(kind, count, noise), truth(kind, count) if measure.labelled else None
    for first in list(range(0, count, step))[::order]:
        rows = slice(first, min(first + step, count))
        parts = [[array[rows] for array in arrays] for arrays in (old, new)]
        found.update(Pair(MEANINGS[kind], *parts, None if labels is None else labels[rows], first, len(parts[0][0])))
    return found


ALL = [(name, kind) for name, own in MEASURES.items() for kind in Kind if kind in own.kinds]


@pytest.mark.parametrize(("name", "kind"), ALL, ids=lambda item: str(getattr(item, "value", item)))
def test_every_measure_keeps_the_contract(name: str, kind: Kind) -> None:
    measure = MEASURES[name]
    same, near, far = (tallied(name, kind, noise) for noise in (0.0, 0.3, 2.0))
    found = [own.value for own in (same, near, far)]
    assert all(value is not None and np.isfinite(value).all() for value in found), found
    before, after = same.value  # type: ignore[misc]
    assert before == pytest.approx(after), "equal models are equally good"
    losses = [float(measure.loss(own.rows)[1]) for own in (same, near, far)]
    assert losses[0] <= losses[1] < losses[2], "what is farther is worse"
    for own in (near, far):
        drop = own.drop(0.95)
        assert drop.bound >= drop.drop and own.drop(0.5).bound <= drop.bound and drop.samples == 60
        assert drop.drop == pytest.approx(measure.loss(own.rows)[1] - measure.loss(own.rows)[0])
    assert far.drop(0.95).drop > near.drop(0.95).drop - 1e-12


@pytest.mark.parametrize(("name", "kind"), ALL, ids=lambda item: str(getattr(item, "value", item)))
def test_every_measure_merges_and_does_not_care_for_batches(name: str, kind: Kind) -> None:
    whole = tallied(name, kind, 0.5)
    for other in (tallied(name, kind, 0.5, step=5), tallied(name, kind, 0.5, order=-1)):
        assert other.value == pytest.approx(whole.value)
        assert other.drop(0.9).bound == pytest.approx(whole.drop(0.9).bound)
    halves = [Tally(MEASURES[name]) for _ in range(2)]
    old, new, labels = values(kind, 60), values(kind, 60, 0.5), truth(kind, 60) if MEASURES[name].labelled else None
    for place, first in enumerate((0, 30)):
        parts = [[array[first : first + 30] for array in arrays] for arrays in (old, new)]
        given = None if labels is None else labels[first : first + 30]
        halves[place].update(Pair(MEANINGS[kind], *parts, given, first, 30))
    halves[0].merge(halves[1])
    assert halves[0].value == pytest.approx(whole.value) and halves[0].samples == 60


def test_rows_do_not_grow_where_they_may_be_added() -> None:
    assert sum(map(len, tallied("centred error", Kind.UNKNOWN, 0.1, 500).parts)) == PARTS


# ---- values that are known by hand -----------------------------------------------------------------------------------


def pair(kind: Kind, old: Any, new: Any, labels: Any = None, **facts: Any) -> Pair:
    parts = [[np.asarray(own)] if not isinstance(own, list) else own for own in (old, new)]
    return Pair(replace(MEANINGS[kind], **facts), *parts, labels, 0, len(parts[0][0]))


def value(name: str, given: Pair) -> tuple[float, float]:
    found = Tally(MEASURES[name])
    found.update(given)
    assert found.value is not None
    return found.value


def test_mean_iou_by_hand() -> None:
    labels = np.array([[[0, 0], [1, 255]]])
    old, new = np.array([[[0, 0], [1, 1]]]), np.array([[[0, 1], [1, 0]]])
    given = pair(Kind.MAP, old, new, labels, axis=None, classes=2)
    assert value("mean IoU", given) == pytest.approx((1.0, (1 / 2 + 1 / 2) / 2))  # 255 marks nothing
    assert value("pixel accuracy", given) == pytest.approx((1.0, 2 / 3))
    assert value("pixel agreement", given) == pytest.approx((1.0, 2 / 4))


def test_multi_label_scores_by_hand() -> None:
    labels = np.array([[1, 0, 255], [1, 0, 0]])
    old, new = np.array([[0.9, 0.2, 0.1], [0.8, 0.6, 0.0]]), np.array([[0.4, 0.2, 0.9], [0.8, 0.6, 0.0]])
    given = pair(Kind.MARKS, old, new, labels, axis=1, classes=3, threshold=0.5)
    assert value("right decisions", given) == pytest.approx((4 / 5, 3 / 5))  # 255 marks nothing
    assert value("equal decisions", given) == pytest.approx((1.0, 4 / 6))
    assert value("class IoU", given) == pytest.approx((1 / 2, (1 / 2 + 0) / 2))
    assert value("class IoU to the original", given) == pytest.approx((1.0, (1 / 2 + 1 + 0) / 3))
    nothing = pair(Kind.MARKS, 0 * old, 0 * new, None, axis=1, classes=3, threshold=0.5)
    assert value("class IoU to the original", nothing) == (1.0, 1.0)


def test_tags_with_one_class_each_are_class_scores() -> None:
    assert reading("tags", np.arange(20) % 6).judged.kind is Kind.CLASSES
    assert reading("picture", np.zeros((20, 3, 8, 8))).judged.kind is Kind.NUMBERS


def test_centred_errors_are_by_channel() -> None:
    """Boxes of 0 to 640 do not drown the scores."""
    random = np.random.default_rng(0)
    old = np.stack([320 + 100 * random.standard_normal((50, 4)), random.random((50, 4))], 1).reshape(50, 8)
    new = old.copy()
    new[:, 6] += 0.2
    found = Tally(MEASURES["centred error"])
    found.update(pair(Kind.UNKNOWN, old.astype(np.float32), new.astype(np.float32)))
    errors = channel_errors(found.rows)[1]
    assert errors.argmax() == 6 and errors[6] == pytest.approx(0.2 / old[:, 6].std(), rel=1e-4) and errors[:6].max() < 1e-6


def test_average_precision_by_hand() -> None:
    scores, hits = np.array([0.9, 0.8, 0.7, 0.6]), np.array([1.0, 0, 1, 0])
    assert average_precision(scores, hits, 3) == pytest.approx((1 + 2 / 3) / 3)


def test_boxes_are_matched_once_and_by_class() -> None:
    corners = np.array([[0.0, 0, 10, 10], [1, 1, 11, 11], [50, 50, 60, 60]])
    assert overlaps(corners, corners)[0, 1] == pytest.approx(81 / 119)
    two, one = Boxes(corners[:2], np.array([0.9, 0.8]), np.array([1, 1])), Boxes(corners[:1], np.ones(1), np.array([1]))
    assert matched(two, one).tolist() == [True, False]
    assert matched(two, one._replace(classes=np.array([2]))).tolist() == [False, False]


@pytest.mark.parametrize("form", ["listed", "anchors first", "anchors last", "seven", "parts", "centres", "background"])
def test_forms_of_detectors(form: str) -> None:
    """The same two boxes of two classes in all forms that exporters write."""
    corners = np.array([[10.0, 10, 30, 30], [40, 40, 60, 64]])
    centres = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)
    shares, labels = np.array([[0.9, 0.1, 0.2], [0.2, 0.8, 0.1]]), np.array([0.0, 1])
    best = shares.max(1)
    many = np.concatenate([np.concatenate([centres, shares], 1), np.tile([5.0, 5, 2, 2, 0.01, 0.01, 0], (40, 1))])
    forms: dict[str, list[np.ndarray]] = {
        "listed": [np.concatenate([corners, best[:, None], labels[:, None]], 1)[None]],
        "anchors first": [many.T[None]],
        "anchors last": [np.concatenate([many[:, :4], np.ones((42, 1)), many[:, 4:]], 1)[None]],
        "seven": [np.concatenate([np.zeros((2, 1)), corners, labels[:, None], best[:, None]], 1)],
        "parts": [corners, best, labels.astype(np.int64)],
        "centres": [np.concatenate([centres, centres])[None], np.concatenate([shares, shares])[None]],
        "background": [np.concatenate([corners, corners + 1])[None],
                       np.array([[0.1, 0.8, 0.1], [0.1, 0.2, 0.7], [0.9, 0.05, 0.05], [0.9, 0.05, 0.05]])[None]],
    }  # fmt: skip
    (found, other), *more = read_pair(forms[form], forms[form], 0.25)
    assert not more and len(found.scores) == 2 and matched(found, other).all()
    np.testing.assert_allclose(np.sort(found.corners, 0), np.sort(corners, 0), atol=1e-6)
    assert len(set(found.classes)) == 2


def test_maps_become_rows_and_sequences_stay() -> None:
    assert plain([{"a": 0.25, "b": 0.75}, {"a": 1.0, "b": 0.0}], 2, 2).tolist() == [[0.25, 0.75], [1.0, 0.0]]
    assert plain([np.zeros(2), np.zeros(3)], 2, 2).dtype == object
    assert plain(np.zeros(()), 4, 3).shape == () and plain(np.zeros((4, 2)), 4, 3).shape == (3, 2)


def test_clearly_worse_needs_more_than_noise() -> None:
    random = np.random.default_rng(0)
    tallies = []
    for shift in (0.0, 0.01, 5.0):
        old = random.standard_normal((8, 3)).astype(np.float32)
        found = Tally(MEASURES["centred error"])
        found.update(pair(Kind.UNKNOWN, old, old + (1 + shift) * random.standard_normal((8, 3)).astype(np.float32)))
        tallies.append(found)
    assert worsened(tallies[0], tallies[1]) < 0 < worsened(tallies[0], tallies[2])


# ---- what outputs mean: a model for each kind ------------------------------------------------------------------------


def trunk(b: Builder) -> str:
    x = b.op("Relu", b.conv(b.input(["N", 3, 8, 8]), 3, 10))
    return str(b.op("Relu", b.conv(x, 10, 12)))


def vector(b: Builder, width: int = 6) -> str:
    return str(b.gemm(b.op("Flatten", b.op("GlobalAveragePool", trunk(b))), 12, width))


def last(b: Builder, kind: str, *inputs: str, name: str = "y", **attributes: Any) -> str:
    return str(b.op(kind, *inputs, outputs=[name], **attributes))


def saved(b: Builder, *names: str) -> onnx.ModelProto:
    model = b.model(*names, infer=False)
    del model.graph.output[:]
    known = {item.name: item for item in onnx.shape_inference.infer_shapes(b.model(*names)).graph.output}
    model.graph.output.extend(known[name] for name in names)
    return model


def softmax(b: Builder) -> list[str]:
    return [last(b, "Softmax", vector(b))]


def log_softmax_moved(b: Builder) -> list[str]:
    shares = b.op("LogSoftmax", vector(b), axis=1)
    return [last(b, "Identity", b.op("Reshape", shares, b.const([-1, 6], np.int64)))]


def written_out(b: Builder) -> list[str]:
    power = b.op("Exp", vector(b))
    return [last(b, "Div", power, b.reduce("ReduceSum", power, [1]))]


def binary(b: Builder) -> list[str]:
    return [last(b, "Sigmoid", vector(b, 1))]


def chosen(b: Builder) -> list[str]:
    return [last(b, "ArgMax", vector(b), axis=1, keepdims=0)]


def named(b: Builder) -> list[str]:
    return [last(b, "Identity", vector(b), name="class_logits")]


def plain_row(b: Builder) -> list[str]:
    return [last(b, "Identity", vector(b))]


def sorted_scores(b: Builder) -> list[str]:
    b.op("TopK", b.op("Sigmoid", vector(b)), b.const([3], np.int64), outputs=["scores", "places"])
    return ["scores", "places"]


def pixels(b: Builder) -> list[str]:
    return [last(b, "Softmax", b.conv(trunk(b), 12, 4), axis=1)]


def pixels_last(b: Builder) -> list[str]:
    return [last(b, "Softmax", b.op("Transpose", b.conv(trunk(b), 12, 4), perm=[0, 2, 3, 1]), axis=-1)]


def pixels_chosen(b: Builder) -> list[str]:
    return [last(b, "Cast", b.op("ArgMax", b.conv(trunk(b), 12, 4), axis=1, keepdims=0), to=onnx.TensorProto.INT32)]


def saliency(b: Builder) -> list[str]:
    return [last(b, "Sigmoid", b.conv(trunk(b), 12, 1))]


def tags(b: Builder) -> list[str]:
    return [last(b, "Sigmoid", vector(b))]


def tagged_map(b: Builder) -> list[str]:
    return [last(b, "Sigmoid", b.conv(trunk(b), 12, 5))]


def picture(b: Builder) -> list[str]:
    return [last(b, "Sigmoid", b.conv(trunk(b), 12, 3))]


def steps(b: Builder) -> list[str]:
    rows = b.op("Transpose", b.op("Reshape", b.conv(trunk(b), 12, 6), b.const([0, 6, 64], np.int64)), perm=[0, 2, 1])
    return [last(b, "Softmax", rows, axis=2)]


def unit_norm(b: Builder) -> list[str]:
    return [last(b, "LpNormalization", vector(b), axis=1, p=2)]


def unit_by_hand(b: Builder) -> list[str]:
    rows = vector(b)
    return [last(b, "Div", rows, b.op("Sqrt", b.reduce("ReduceSum", b.op("Mul", rows, rows), [1])))]


def embedding_name(b: Builder) -> list[str]:
    return [last(b, "Identity", vector(b), name="face_embedding")]


def counts(b: Builder) -> list[str]:
    return [last(b, "Cast", b.op("Round", b.op("Mul", vector(b), b.const(8.0))), to=onnx.TensorProto.INT64)]


def total(b: Builder) -> list[str]:
    rows = vector(b)
    shares = last(b, "Softmax", rows, name="shares")
    return [shares, str(b.op("ReduceSum", rows, outputs=["total"], keepdims=0))]


def suppressed(b: Builder) -> list[str]:
    """A detector of one class that lists the boxes it is sure of: their number differs."""
    maps = b.op("Sigmoid", b.conv(trunk(b), 12, 5))
    rows = b.op("Reshape", b.op("Transpose", maps, perm=[0, 2, 3, 1]), b.const([1, 64, 5], np.int64))
    low, size, sure = b.op("Split", rows, b.const([2, 2, 1], np.int64), axis=2, outputs=3)
    corners = b.op("Concat", low, b.op("Add", low, size), axis=2)
    flat = b.op("Transpose", sure, perm=[0, 2, 1])
    picked = b.op("NonMaxSuppression", corners, flat, b.const([50], np.int64), b.const([0.5], np.float32), b.const([0.55], np.float32))
    rows_of = b.op("Squeeze", b.slice(picked, [2], [3], [1]), b.const([1], np.int64))
    boxes = last(b, "Gather", b.op("Squeeze", corners, b.const([0], np.int64)), rows_of, name="found", axis=0)
    return [boxes, last(b, "Gather", b.op("Reshape", sure, b.const([-1], np.int64)), rows_of, name="confidence", axis=0)]


def sequence(b: Builder) -> list[str]:
    rows = vector(b)
    return [last(b, "SequenceConstruct", rows, b.op("Relu", rows), name="parts")]


def unlike(b: Builder) -> list[str]:
    return [last(b, "SplitToSequence", vector(b), b.const([2, 4], np.int64), name="parts", axis=1)]


def endless(b: Builder) -> list[str]:
    return [last(b, "Log", b.op("Relu", vector(b)))]


def words(b: Builder) -> list[str]:
    place = b.op("ArgMax", vector(b), axis=1, keepdims=0)
    text = last(b, "LabelEncoder", place, domain="ai.onnx.ml", keys_int64s=list(range(6)), values_strings=list("abcdef"))
    b.domains["ai.onnx.ml"] = 2
    return [text]


def listed(b: Builder) -> list[str]:
    """Places of a map that are above zero: their number differs."""
    return [last(b, "Transpose", b.op("NonZero", b.op("Relu", vector(b))), perm=[1, 0])]


TYPES = {  # outputs of which inference does not tell
    "parts": oh.make_value_info("parts", oh.make_sequence_type_proto(oh.make_tensor_type_proto(FLOAT, None))),
    "text": oh.make_tensor_value_info("y", onnx.TensorProto.STRING, ["N"]),
    "y": oh.make_tensor_value_info("y", onnx.TensorProto.INT64, ["k", 2]),
}  # fmt: skip
MODELS: dict[str, tuple[Callable[[Builder], list[str]], Kind, str]] = {
    "softmax": (softmax, Kind.CLASSES, "Softmax"), "log softmax, reshaped": (log_softmax_moved, Kind.CLASSES, "LogSoftmax"),
    "exp / sum": (written_out, Kind.CLASSES, "rows sum to one"), "one sigmoid": (binary, Kind.CLASSES, "Sigmoid"),
    "argmax": (chosen, Kind.CLASSES, "ArgMax"), "named": (named, Kind.CLASSES, "its name"), "plain": (plain_row, Kind.UNKNOWN, ""),
    "sorted": (sorted_scores, Kind.UNKNOWN, "TopK sorts them"), "pixels": (pixels, Kind.MAP, "Softmax"),
    "pixels, channels last": (pixels_last, Kind.MAP, "Softmax"), "pixels, chosen": (pixels_chosen, Kind.MAP, "ArgMax"),
    "tags": (tags, Kind.MARKS, "Sigmoid: each class"), "map of tags": (tagged_map, Kind.MARKS, "Sigmoid: each class"),
    "saliency": (saliency, Kind.MAP, "Sigmoid"), "picture": (picture, Kind.UNKNOWN, "image, or --task"),
    "steps": (steps, Kind.MAP, "Softmax"),
    "unit": (unit_norm, Kind.EMBEDDING, "LpNormalization"), "unit by hand": (unit_by_hand, Kind.EMBEDDING, "length one"),
    "embedding": (embedding_name, Kind.EMBEDDING, "its name"), "integers": (counts, Kind.INTEGERS, "int64"),
    "with a scalar": (total, Kind.CLASSES, "Softmax"), "suppressed": (suppressed, Kind.BOXES, "NonMaxSuppression"),
    "sequence": (sequence, Kind.UNKNOWN, ""), "unlike": (unlike, Kind.UNKNOWN, ""), "endless": (endless, Kind.UNKNOWN, ""),
    "words": (words, Kind.OTHER, "text"), "listed": (listed, Kind.INTEGERS, "no row"),
}  # fmt: skip


def built(name: str) -> onnx.ModelProto:
    b = Builder(seed=7)
    names = MODELS[name][0](b)
    if name == "suppressed":
        b.inputs[0] = oh.make_tensor_value_info("x", FLOAT, [1, 3, 8, 8])
    if name in ("sequence", "unlike", "words", "listed"):
        model = b.model(*names, infer=False)
        model.graph.output[0].CopyFrom(TYPES[{"sequence": "parts", "unlike": "parts", "words": "text"}.get(name, "y")])
        return model
    return saved(b, *names)


def reading(name: str, labels: Any = None, **options: Any) -> Any:
    model = sfp_onnx.load(built(name))
    data = sfp_onnx.data_for(model, {"x": images(20)} | ({} if labels is None else {"labels": labels}))
    assert data is not None
    return reading_of(model, data, MeasureOptions(**options))


@pytest.mark.parametrize("name", MODELS)
def test_meanings(name: str) -> None:
    _, kind, reason = MODELS[name]
    judged = reading(name).judged
    assert judged.kind is kind and reason in judged.reason, str(judged)


@pytest.mark.parametrize("name", MODELS)
def test_models_of_every_kind_are_pruned_and_measured(name: str, save: Callable[..., Path], tmp_path: Path) -> None:
    kind, model, data, out = MODELS[name][1], save(built(name)), save({"x": images(40)}), tmp_path / "out.onnx"
    result = invoke("prune", model, "-o", out, "--data", data, "--ratio", "0.25")
    assert result.exit_code == 0, result.stderr
    measured = invoke("evaluate", model, out, "--data", data, "--no-latency", "--json")
    assert measured.exit_code == 0, measured.stderr
    first, second = json.loads(measured.stdout)
    assert first["metric"] == second["metric"] != "" and second["value"] is not None
    own = MEASURES[first["metric"]]
    assert first["value"] == pytest.approx(1.0 if own.larger else 0.0)
    assert (second["value"] < 1 if own.larger else second["value"] > 0) or kind in (Kind.CLASSES, Kind.OTHER)
    assert "output" in invoke("evaluate", model, out, "--data", data, "--no-latency").stderr


def test_the_axis_of_classes_is_where_shares_sum_to_one() -> None:
    assert [reading(name).judged.axis for name in ("pixels", "pixels, channels last", "steps", "pixels, chosen")] == [1, 3, 2, None]
    assert reading("saliency").judged.threshold == 0.5


LABELS = {
    "plain": (np.arange(20) % 6, Kind.CLASSES), "integers": (np.arange(20), Kind.INTEGERS), "argmax": (np.arange(20) % 6, Kind.CLASSES),
    "pixels": (np.arange(20 * 64).reshape(20, 8, 8) % 4, Kind.MAP), "picture": (np.arange(20 * 64).reshape(20, 8, 8) % 3, Kind.MAP),
    "tags": (np.eye(6, dtype=int)[np.arange(20) % 6] | np.eye(6, dtype=int)[np.arange(20) % 4], Kind.MARKS),
    "map of tags": (np.arange(20 * 320).reshape(20, 5, 8, 8) % 2, Kind.MARKS),
    "pixels, chosen": (np.full((20, 8, 8), 255), Kind.MAP), "suppressed": (np.zeros((20, 3, 5)), Kind.BOXES),
}  # fmt: skip


@pytest.mark.parametrize("name", LABELS)
def test_labels_that_fit(name: str) -> None:
    labels, kind = LABELS[name]
    found = reading(name, labels)
    assert found.judged.kind is kind and found.judged.labelled is (name != "integers")
    assert any("are not used" in note for note in found.notes) is (name == "integers")


def test_floating_labels_make_a_regression() -> None:
    found = reading("plain", np.random.default_rng(0).standard_normal((20, 6)))
    assert found.judged.kind is Kind.NUMBERS and found.judged.labelled


def test_whole_numbers_are_labels_of_a_regression() -> None:
    """Ages of people, and which of several classes hold at once."""
    for name, labels in (("plain", np.arange(120).reshape(20, 6) % 2), ("one sigmoid", np.arange(20) % 2)):
        found = reading(name, labels, task="regress")
        assert found.judged.kind is Kind.NUMBERS and found.judged.labelled, name
    with pytest.raises(DataError, match="several hold at once, --task multilabel"):
        reading("softmax", np.arange(120).reshape(20, 6) % 2)


def test_boxes_and_scores_without_telling_names() -> None:
    b = Builder(seed=7)
    rows = b.op("Transpose", b.op("Reshape", b.conv(trunk(b), 12, 6), b.const([0, 6, 64], np.int64)), perm=[0, 2, 1])
    places, sure = b.op("Split", rows, b.const([4, 2], np.int64), axis=2, outputs=["out1", "out2"])
    model = sfp_onnx.load(saved(b, places, sure))
    data = sfp_onnx.data_for(model, {"x": images(20)})
    assert data is not None
    assert reading_of(model, data, MeasureOptions()).judged.kind is Kind.UNKNOWN
    judged = reading_of(model, data, MeasureOptions(task="detect")).judged
    assert judged.kind is Kind.BOXES and judged.outputs == ("out1", "out2")


def test_one_answer_to_all_tells_little(save: Callable[..., Path]) -> None:
    """Agreement is then perfect for a model that knows nothing; and the distance of one probability is finer than agreement."""
    b = Builder(seed=7)
    model = saved(b, last(b, "Sigmoid", b.op("Sub", vector(b, 1), b.const(30.0))))
    told = invoke("evaluate", save(model), save(model), "--data", save({"x": images(40)}), "--no-latency", "--max-drop", "1%").stderr
    assert "one answer to all 40 samples" in told
    many = pair(Kind.CLASSES, np.full((9, 1), 0.1), np.full((9, 1), 0.2), axis=None, threshold=0.5)
    compared = Comparison(Reading((many.meaning,), many.meaning), False)
    for found in compared.tallies.values():
        found.update(many)
    assert compared.distance is not None and compared.distance.measure.name == "centred error"


WRONG = [(np.arange(20) % 6 + 1, "started at 1"), (np.eye(20, 6), "argmax"), (np.arange(20.0) / 2, "astype")]


@pytest.mark.parametrize(("labels", "words"), WRONG)
def test_labels_that_cannot_be_classes(labels: np.ndarray, words: str) -> None:
    with pytest.raises(DataError, match=words):
        reading("softmax", labels)


@pytest.mark.parametrize(("name", "task", "kind"), [
    ("plain", "classify", Kind.CLASSES), ("plain", "regress", Kind.NUMBERS), ("plain", "embed", Kind.EMBEDDING),
    ("softmax", "regress", Kind.NUMBERS), ("picture", "segment", Kind.MAP), ("picture", "multilabel", Kind.MARKS),
    ("tags", "classify", Kind.CLASSES), ("plain", "multilabel", Kind.MARKS), ("sorted", "classify", Kind.CLASSES),
])  # fmt: skip
def test_the_task_overrides(name: str, task: str, kind: Kind) -> None:
    judged = reading(name, task=task).judged
    assert judged.kind is kind and judged.reason == f"--task {task}"


def test_what_cannot_be_is_refused() -> None:
    for name, task in (("pixels", "detect"), ("plain", "segment")):
        with pytest.raises(OptionError, match=f"--task {task}: output 'y' of shape"):
            reading(name, task=task)
    with pytest.raises(OptionError, match="the outputs are shares, total"):
        reading("with a scalar", output_name="nothing")
    assert reading("with a scalar", output_name="total").judged.kind is Kind.UNKNOWN


def test_the_judged_output_is_named(save: Callable[..., Path]) -> None:
    model, data = save(built("with a scalar")), save({"x": images(20)}, "own.npz")
    for flag in ("--output", "--output-name"):
        found = invoke("evaluate", model, "--data", data, "--no-latency", "--json", flag, "total")
        assert found.exit_code == 0 and json.loads(found.stdout)[0]["metric"] == "centred error", found.stderr


def test_sequences_of_maps(save: Callable[..., Path], tmp_path: Path) -> None:
    """What converters of scikit-learn write: a label, and a map of shares for each sample."""
    b = Builder(seed=3)
    hidden = b.op("Relu", b.gemm(b.input(["N", 6]), 6, 16))
    shares = b.op("Softmax", b.gemm(hidden, 16, 3))
    label = last(b, "ArgMax", shares, name="output_label", axis=1, keepdims=0)
    b.op("ZipMap", shares, domain="ai.onnx.ml", outputs=["output_probability"], classlabels_int64s=[0, 1, 2])
    model = b.model(label, infer=False)
    model.graph.output[0].CopyFrom(oh.make_tensor_value_info(label, onnx.TensorProto.INT64, ["N"]))
    kind = oh.make_sequence_type_proto(oh.make_map_type_proto(onnx.TensorProto.INT64, oh.make_tensor_type_proto(FLOAT, [])))
    model.graph.output.append(oh.make_value_info("output_probability", kind))
    x = np.random.default_rng(0).standard_normal((60, 6)).astype(np.float32)
    path, data, out = save(model), save({"x": x}), tmp_path / "out.onnx"
    result = invoke("prune", path, "-o", out, "--data", data, "--ratio", "0.25")
    assert result.exit_code == 0, result.stderr
    found = json.loads(invoke("evaluate", path, out, "--data", data, "--no-latency", "--json").stdout)[1]
    assert found["metric"] == "agreement" and 0 < found["agreement"] <= 1
    assert set(found["measures"]) == {"output_label", "output_probability"}


# ---- the cases of others ---------------------------------------------------------------------------------------------


def case(name: str) -> tuple[Path, Path]:
    paths = (CASES / f"{name}.onnx", CASES / f"{name}.npz")
    if not paths[0].is_file():
        pytest.skip("the folder ../shared with larger models is not here")
    return paths


@pytest.mark.parametrize(("name", "metric"), [
    ("A1_keypoints", "centred error"), ("F1_nms", "matched boxes"), ("F3_scalar_output", "centred error"), ("G1_argmax", "pixel agreement"),
    ("H1_random_normal", "centred error"),
])  # fmt: skip
def test_cases_are_measured(name: str, metric: str, tmp_path: Path) -> None:
    model, data = case(name)
    out = tmp_path / "out.onnx"
    if name != "H1_random_normal":
        result = invoke("prune", model, "-o", out, "--data", data, "--target", "macs=60%")
        assert result.exit_code == 0, result.stderr
    found = invoke("evaluate", model, out if out.exists() else model, "--data", data, "--no-latency", "--json")
    assert found.exit_code == 0 and json.loads(found.stdout)[1]["metric"] == metric, found.stderr


def test_key_points_are_not_taken_for_classes(tmp_path: Path) -> None:
    model, data = case("A1_keypoints")
    common = ("prune", model, "-o", tmp_path / "out.onnx", "--data", data, "--max-drop", "1%")
    asked = invoke(*common)
    assert asked.exit_code == 2 and "numbers of unknown meaning" in asked.stderr and "--task" in asked.stderr and "--metric" in asked.stderr
    refused = invoke(*common, "--task", "regress")
    assert refused.exit_code == 3 and "centred error" in refused.stderr and not (tmp_path / "out.onnx").exists()


# ---- gates -----------------------------------------------------------------------------------------------------------


def varied(count: int) -> np.ndarray:
    """Images that are answered differently."""
    return images(count) + 3 * np.random.default_rng(7).standard_normal((count, 3, 1, 1)).astype(np.float32)


@pytest.fixture
def two(save: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    model, out = save(classifier()), tmp_path / "pruned.onnx"
    assert invoke("prune", model, "-o", out, "--ratio", "0.5").exit_code == 0
    return model, out


def test_top1_at_chance_passes_nothing(two: tuple[Path, Path], save: Callable[..., Path], tmp_path: Path) -> None:
    """Folders that are numbered otherwise than the outputs: no label is right, before as after."""
    x = varied(60)
    answers = outputs(sfp_onnx.load(two[0]), [({"x": x}, 60)])[0].argmax(1)
    data = save({"x": x, "labels": (answers + 1) % 5})
    result = invoke("evaluate", *two, "--data", data, "--no-latency", "--max-drop", "1%")
    assert result.exit_code == 3 and "FAILED: agreement with the original" in result.stderr and "passed" not in result.stderr
    assert "top-1 of the original is 0.00%, no better than chance" in result.stderr
    baseline = tmp_path / "baseline.json"
    baseline.write_text(invoke("evaluate", two[0], "--data", data, "--no-latency", "--json").stdout)
    alone = invoke("evaluate", two[1], "--data", data, "--no-latency", "--baseline", baseline)
    assert alone.exit_code == 2 and "proves nothing" in alone.stderr
    pruned = invoke("prune", two[0], "-o", tmp_path / "o.onnx", "--data", data, "--max-drop", "60%", "--confidence", "50%")
    assert "agreement with the original on 20 calibration samples" in pruned.stderr, pruned.stderr


def test_gates_ask_what_it_is(save: Callable[..., Path]) -> None:
    model, data = save(built("plain")), save({"x": images(20)}, "own.npz")
    asked = invoke("evaluate", model, model, "--data", data, "--no-latency", "--max-drop", "1%")
    assert asked.exit_code == 2 and "output 'y' [20, 6]: numbers of unknown meaning" in asked.stderr
    for given in (("--task", "classify"), ("--metric", "centred error"), ("--task", "regress")):
        assert invoke("evaluate", model, model, "--data", data, "--no-latency", "--max-drop", "1%", *given).exit_code == 0, given


def test_metrics_by_name_and_of_the_user(save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "own_measure.py").write_text("def least(outputs, labels):\n    return float(outputs[0].min())\n")
    monkeypatch.chdir(tmp_path)
    model, data = save(built("softmax")), save({"x": images(20)}, "own.npz")
    for metric, name in (("kl-divergence", "KL divergence"), ("own_measure:least", "own_measure:least")):
        found = invoke("evaluate", model, "--data", data, "--no-latency", "--json", "--metric", metric)
        assert found.exit_code == 0 and json.loads(found.stdout)[0]["metric"] == name, found.stderr
        assert json.loads(found.stdout)[0]["value"] == json.loads(found.stdout)[0]["measures"]["y"][name]
    for metric, words in (("mean IoU", "cannot be taken"), ("nonsense", "expected module:function, or one of top-1")):
        refused = invoke("evaluate", model, "--data", data, "--no-latency", "--metric", metric)
        assert refused.exit_code == 2 and words in refused.stderr


def test_the_repair_is_not_refused_on_noise(save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Slightly farther on eight samples: the model stays as it was cut; clearly farther: refused."""
    model, options, data = sfp_onnx.load(save(classifier())), PlanOptions(ratio=0.25), {"x": images(64)}
    factor = [1.0]

    def spoilt(prepared: Any, coupling: Any, removed: Any, pruned: Any, *others: Any) -> Any:
        proto = pruned.copied()
        head = next(own for own in proto.graph.initializer if own.name == "w3")
        head.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(head) * np.float32(factor[0]), head.name))
        return replace(pruned, proto=proto), []

    monkeypatch.setattr(repair, "repair", spoilt)
    results = {}
    for factor[0] in (0.999, 1.001):
        result = sfp_onnx.prune(model, options, data=data)
        assert result.repaired is not None and result.repaired.before > 1e-6
        results[result.repaired.kept] = result
    kept = results[False]
    assert kept.repaired.after > kept.repaired.before and "kept as it was cut" in " ".join(kept.notes)
    assert kept.to_proto() == sfp_onnx.apply(model, kept.plan, data, repair=None).to_proto()
    factor[0] = 30.0
    with pytest.raises(VerificationError, match="took the model away"):
        sfp_onnx.prune(model, options, data=data)
    found = sfp_onnx.prune(model, PlanOptions(max_drop="90%", confidence=0.5), data=data)  # judged anyway
    assert found.repaired is not None and not found.repaired.kept
    assert "farther from the original: the model is kept" in " ".join(found.notes)


# ---- --max-drop ------------------------------------------------------------------------------------------------------


def test_trials_are_told_and_what_limited_them(save: Callable[..., Path], tmp_path: Path) -> None:
    model, data = save(built("softmax")), save({"x": varied(300)})
    result = invoke("plan", model, "-o", tmp_path / "p.json", "--data", data, "--max-drop", "10%", "--align", "none")
    assert result.exit_code == 0, result.stderr
    trials = [line for line in result.stderr.splitlines() if line.startswith("macs=") and "drop " in line]
    assert len(trials) >= 3 and any("rejected" in line for line in trials) and any("held" in line for line in trials)
    assert "with 100 samples" in trials[0] and "limited by" in result.stderr
    assert "output 'y' read as class scores (Softmax)" in result.stderr


def test_more_samples_that_would_allow_it() -> None:
    from sfp_onnx.evaluation.measures import Drop
    from sfp_onnx.planning.max_drop import Judge

    data = sfp_onnx.data_for(sfp_onnx.load(built("softmax")), {"x": images(20)})
    assert data is not None
    judge = Judge(sfp_onnx.load(built("softmax")), data, 0.02, 0.95, reading("softmax"))
    assert judge.enough(Drop(1, 0.99, 0.01, 0.04, 100)) == 900  # (0.03 / 0.01)^2 times as many
    assert judge.enough(Drop(1, 0.97, 0.03, 0.04, 100)) is None and judge.enough(Drop(1, 0.99, 0.01, 0.015, 100)) is None
    assert "900 samples would allow it" in judge.tried("macs=80%", Drop(1, 0.99, 0.01, 0.04, 100))


@pytest.mark.parametrize(("text", "found"), [("1%", 0.01), ("0.01", 0.01), ("100%", 1.0), ("0", 0.0)])
def test_reading_a_drop(text: str, found: float) -> None:
    assert parse_drop(text) == found


@pytest.mark.parametrize("text", ["1", "2", "1.0", "101%", "-1%", "x"])
def test_drops_that_could_mean_anything(text: str) -> None:
    with pytest.raises(OptionError, match="%"):
        parse_drop(text)


def anchors(b: Builder) -> list[str]:
    """Centres, sizes and two class scores at 64 anchors, as single-stage detectors are exported."""
    maps = b.op("Reshape", b.conv(trunk(b), 12, 6), b.const([0, 6, 64], np.int64))
    places, sizes, scores = b.op("Split", maps, b.const([2, 2, 2], np.int64), axis=1, outputs=3)
    sizes = b.op("Mul", b.op("Sigmoid", sizes), b.const(90.0))
    parts = (b.op("Mul", b.op("Sigmoid", places), b.const(640.0)), sizes, b.op("Sigmoid", scores))
    return [last(b, "Concat", *parts, name="output0", axis=1)]


def test_detectors_of_one_output(save: Callable[..., Path], tmp_path: Path) -> None:
    b = Builder(seed=7)
    model, x, out = save(saved(b, *anchors(b))), varied(40), tmp_path / "out.onnx"
    data = save({"x": x}, "own.npz")
    common = ("prune", model, "-o", out, "--data", data)
    assert invoke(*common, "--max-drop", "20%").exit_code == 2
    result = invoke(*common, "--ratio", "0.25", "--task", "detect")
    assert result.exit_code == 0 and "distance from the original (matched boxes)" in result.stderr, result.stderr
    found = json.loads(invoke("evaluate", model, out, "--data", data, "--no-latency", "--json", "--task", "detect").stdout)
    assert found[0]["value"] == 1.0 and 0 < found[1]["value"] < 1 and "'output0' channel" in found[1]["worst"]
    old = outputs(sfp_onnx.load(model), [({"x": x}, 40)])
    boxes = [own for own, _ in read_pair(old, old, 0.25)]
    labels = np.full((40, max(len(own.scores) for own in boxes), 5), -1.0)
    for row, own in zip(labels, boxes, strict=True):
        row[: len(own.scores)] = np.concatenate([own.corners, own.classes[:, None]], 1)
    labelled = save({"x": x, "labels": labels}, "labelled.npz")
    found = json.loads(invoke("evaluate", model, out, "--data", labelled, "--no-latency", "--json", "--task", "detect").stdout)
    assert found[0]["metric"] == "mAP" and found[0]["value"] > 0.99 > found[1]["value"] > 0
    labels[..., 4] = 7  # classes that there are not
    other = save({"x": x, "labels": labels}, "other.npz")
    told = invoke("evaluate", model, out, "--data", other, "--no-latency", "--task", "detect", "--max-drop", "1%")
    assert told.exit_code == 3 and "mAP of the original is 0.00%" in told.stderr and "FAILED: matched boxes" in told.stderr


def test_maps_of_other_classes_judge_nothing(save: Callable[..., Path]) -> None:
    x = varied(40)
    model = save(built("pixels, chosen"))
    answers = outputs(sfp_onnx.load(model), [({"x": x}, 40)])[0]
    for labels, metric in (((answers + 1) % 4, "pixel agreement"), (answers, "mean IoU")):
        data = save({"x": x, "labels": labels}, "own.npz")
        found = invoke("evaluate", model, "--data", data, "--no-latency", "--json")
        assert json.loads(found.stdout)[0]["metric"] == metric, found.stderr


def test_large_outputs_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    old, new = (random.standard_normal((9, 3, 5, 7)).astype(np.float32) for _ in range(2))
    whole = value("centred error", pair(Kind.UNKNOWN, old, new))
    monkeypatch.setattr("sfp_onnx.evaluation.measures.AT_ONCE", 200)
    assert value("centred error", pair(Kind.UNKNOWN, old, new)) == pytest.approx(whole)
    deep = random.standard_normal((9, 4, 8)), random.standard_normal((9, 4, 8))
    assert np.isfinite(value("rank correlation", pair(Kind.EMBEDDING, *deep))[1])


def test_labels_of_maps_and_numbers(save: Callable[..., Path], tmp_path: Path) -> None:
    """Dense labels give mean IoU, floating ones an error to the labels; gates and --max-drop judge by them."""
    x = varied(120)
    for name, metric in (("pixels", "mean IoU"), ("plain", "error to labels")):
        model, out = save(built(name), f"{name}.onnx"), tmp_path / f"{name}2.onnx"
        answers = outputs(sfp_onnx.load(model), [({"x": x}, 120)])[0]
        labels = answers.argmax(1) if name == "pixels" else answers.astype(np.float64) + 0.01
        data = save({"x": x, "labels": labels}, "labelled.npz")
        result = invoke("prune", model, "-o", out, "--data", data, "--max-drop", "40%", "--test-data", data)
        assert result.exit_code == 0 and f"{metric} on 40 calibration samples" in result.stderr, result.stderr
        assert f"{metric} on 120 held-out samples" in result.stdout
        found = json.loads(invoke("evaluate", model, out, "--data", data, "--no-latency", "--json").stdout)
        assert [own["metric"] for own in found] == [metric] * 2
        gate = invoke("evaluate", model, out, "--data", data, "--no-latency", "--max-drop", "0")
        assert gate.exit_code == 3 and f"FAILED: {metric}" in gate.stderr


def test_comparisons_need_equal_shapes_of_what_is_fixed() -> None:
    found = Comparison(reading("softmax"), False)
    assert {name for _, name in found.tallies} >= {"agreement", "KL divergence", "centred error"} and found.distance is None
