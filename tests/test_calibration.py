"""The factor on the class scores of a repaired classifier."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from building import Builder, run

import sfp_onnx
from sfp_onnx.core.options import MeasureOptions
from sfp_onnx.repair import confidence
from sfp_onnx.report.manifest import Pruned

CLASSES = 6


def network(tail: str = "Softmax", bias: bool = True, beside: bool = False) -> onnx.ModelProto:
    """A classifier that is sure of its answers; ``beside``: what the last layer makes is an output, too."""
    b = Builder(seed=3)
    y = b.input(["N", 12])
    for name, inputs, width in (("first", 12, 24), ("second", 24, 24)):
        y = b.op("Relu", b.op("MatMul", y, b.weight(inputs, width, fan_in=inputs // 2), name=name))
    last = b.const(3 * b.random.standard_normal((24, CLASSES)) / np.sqrt(24))
    y = b.op("Gemm", y, last, *([b.uniform(CLASSES)] if bias else []), name="last")
    outputs = [y] if beside else []
    if tail == "Flatten":
        y = b.op("Softmax", b.op("Flatten", b.op("Identity", y)), axis=1)
    elif tail:
        y = b.op(tail, y, axis=1)
    return b.model(y, *outputs)


def rows(count: int = 512, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 12)).astype(np.float32)


def pruned(model: onnx.ModelProto, **options: Any) -> Pruned:
    return sfp_onnx.prune(model, sfp_onnx.PlanOptions(ratio=0.6), data=rows(), **options)


def divergence(model: onnx.ModelProto, result: Pruned) -> float:
    old, new = (confidence.log_probabilities(run(one, {"x": rows(2000, 6)})[0]) for one in (model, result.to_proto()))
    return confidence._divergence(old, new, 1.0)


def without(monkeypatch: pytest.MonkeyPatch, model: onnx.ModelProto, **options: Any) -> Pruned:
    with monkeypatch.context() as patch:
        patch.setattr(confidence, "calibrated", lambda analysis, own, judge, how: (own, ""))
        return pruned(model, **options)


@pytest.mark.parametrize("tail", ["Softmax", "LogSoftmax", "Flatten"])
@pytest.mark.parametrize("bias", [False, True])
def test_nearer_to_the_original_with_the_same_answers(tail: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(tail, bias)
    plain, better = without(monkeypatch, model), pruned(model)
    assert any("class scores times" in note and "in last" in note for note in better.notes), better.notes
    assert not any("class scores times" in note for note in plain.notes)
    assert divergence(model, better) < 0.97 * divergence(model, plain)
    one, two = (run(own.to_proto(), {"x": rows(500, 7)})[0] for own in (plain, better))
    assert (one.argmax(1) == two.argmax(1)).all() and not np.allclose(one, two)


def test_the_task_that_is_asked_for_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bare numbers may be anything."""
    model = network("")
    assert not any("class scores times" in note for note in pruned(model).notes)
    assert any("class scores times" in note for note in pruned(model, measure_options=MeasureOptions(task="classify")).notes)


def test_other_outputs_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(beside=True)
    plain, other = without(monkeypatch, model), pruned(model)
    assert not any("class scores times" in note for note in other.notes)
    assert plain.to_proto().SerializeToString() == other.to_proto().SerializeToString()


def test_the_best_factor_is_found() -> None:
    generator = np.random.default_rng(1)
    old = confidence.log_probabilities(3 * generator.standard_normal((40, 5)))
    for factor in (0.5, 1.0, 4.0):
        assert confidence._best(old, confidence.log_probabilities(old / factor)) == pytest.approx(factor, rel=0.03)
