"""How sure a drop is: against simulation, known values, and on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import classifier, images, invoke, labels_of

import sfp_onnx
from sfp_onnx.core.errors import OptionError
from sfp_onnx.core.options import confidence as read_confidence
from sfp_onnx.core.types import IntArray
from sfp_onnx.evaluation import outputs
from sfp_onnx.evaluation.measures import matched, needed
from sfp_onnx.planning.max_drop import held_out, jackknifed


def test_nothing_changed_proves_little_on_few_samples() -> None:
    same = np.ones(100, bool)
    drop, bound = matched(same, same, 0.95)
    assert drop == 0 and bound == pytest.approx(1.6449 / 102, rel=1e-3)  # z sqrt(0 + 0 + 1) / (n + 2)
    assert matched(same, same, 0.5) == (0, 0)


def test_the_formula_by_hand() -> None:
    before, after = np.ones(200, bool), np.ones(200, bool)
    after[:6], before[6:8] = False, False  # 6 lost, 2 won
    drop, bound = matched(before, after, 0.95)
    assert drop == pytest.approx(4 / 200)
    assert bound == pytest.approx(4 / 202 + 1.644854 * np.sqrt(9 - 16 / 202) / 202, rel=1e-5)


def test_the_bound_is_above_the_true_drop_as_often_as_it_says() -> None:
    random, held = np.random.default_rng(0), 0
    for _ in range(2000):
        value = random.random(400)
        before, after = value < 0.95, (value > 0.03) & (value < 0.96)  # 3 % lost, 1 % won
        held += matched(before, after, 0.95)[1] >= 0.02
    assert 0.94 < held / 2000 < 0.985


def test_needed_samples() -> None:
    least = needed(0.01, 0.95)
    every, fewer = np.ones(least, bool), np.ones(least - 1, bool)
    assert matched(every, every, 0.95)[1] <= 0.01 < matched(fewer, fewer, 0.95)[1]
    assert needed(0, 0.95) == 0 and needed(0.5, 0.5) == 1


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(1).standard_normal(2000)

    def mean(rows: IntArray) -> float:
        return float(values[rows].mean())

    whole, bound = jackknifed(mean, 2000, 0.95)
    assert whole == pytest.approx(values.mean())
    assert (bound - whole) / 1.645 == pytest.approx(values.std() / np.sqrt(2000), rel=0.4)  # 20 parts: a rough estimate
    assert jackknifed(mean, 2000, 0.5) == (whole, whole)
    assert jackknifed(mean, 1, 0.95) == (values[0], values[0])


@pytest.mark.parametrize(("text", "value"), [("95%", 0.95), ("0.9", 0.9), ("50%", 0.5), ("100%", None), ("40%", None), ("x", None)])
def test_reading_a_confidence(text: str, value: float | None) -> None:
    if value is None:
        with pytest.raises(OptionError, match="expected from 50% to below 100%"):
            read_confidence(text)
    else:
        assert read_confidence(text) == value


# ---- on the command line ---------------------------------------------------------------------------------------------


def right_labels(model: Path, data: np.ndarray) -> np.ndarray:
    answers = outputs(sfp_onnx.load(model), [({"x": data}, len(data))])[0]
    return np.asarray(answers.argmax(1))


@pytest.fixture
def wide(save: Callable[..., Path]) -> Path:
    return save(classifier(widths=(24, 32)))


@pytest.fixture
def spread() -> np.ndarray:
    return images(90) + 3 * np.random.default_rng(7).standard_normal((90, 3, 1, 1)).astype(np.float32)


def test_too_few_samples_are_refused_with_how_many_it_takes(wide: Path, save: Callable[..., Path], spread: np.ndarray) -> None:
    data = save({"x": spread, "labels": right_labels(wide, spread)})
    result = invoke("prune", wide, "-o", wide.with_name("out.onnx"), "--data", data, "--max-drop", "1%")
    assert result.exit_code == 3 and "cannot be told with 95% confidence from 30 calibration samples" in result.stderr
    assert "at least 163 (a third of 489 of --data), or --max-drop-data" in result.stderr and not wide.with_name("out.onnx").exists()
    result = invoke("plan", wide, "-o", wide.with_name("p.json"), "--data", data, "--max-drop", "1%", "--confidence", "50%")
    assert result.exit_code in (0, 3) and "cannot be told" not in result.stderr
    assert invoke("plan", wide, "-o", wide.with_name("p.json"), "--max-drop", "1%", "--confidence", "30%").exit_code == 2


def test_the_confidence_makes_the_cut_smaller(wide: Path, save: Callable[..., Path], spread: np.ndarray) -> None:
    data = save({"x": spread, "labels": right_labels(wide, spread)})
    kept = []
    for confidence in ("50%", "99%"):
        out = wide.with_name(f"plan{confidence}.json")
        arguments = ("--data", data, "--max-drop", "20%", "--confidence", confidence, "--repair", "none", "--align", "none")
        assert invoke("plan", wide, "-o", out, *arguments).exit_code == 0
        kept.append(json.loads(out.read_text())["after"]["macs"])
    assert kept[0] < kept[1]


def test_eval_data_are_judged_on_and_all_of_the_data_are_used(wide: Path, save: Callable[..., Path], spread: np.ndarray) -> None:
    data, other = save({"x": spread}), save({"x": spread[::-1], "labels": right_labels(wide, spread[::-1].copy())})
    manifest = wide.with_name("m.json")
    result = invoke("prune", wide, "-o", wide.with_name("out.onnx"), "--data", data, "--eval-data", other, "--max-drop", "10%",
                    "--manifest", manifest)  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "top-1 on 90 samples of --max-drop-data: 1.0000 -> " in result.stderr and "with 95% confidence" in result.stderr
    assert "as networks do on samples that they were trained on" in result.stderr
    found = json.loads(manifest.read_text())
    assert found["data"]["samples"] == 90 and found["options"]["eval_data"]["samples"] == 90
    refused = invoke("prune", wide, "-o", wide.with_name("o2.onnx"), "--data", data, "--max-drop-data", other, "--target", "macs=50%")
    assert refused.exit_code == 2 and "--max-drop-data needs --max-drop" in refused.stderr


def test_the_model_that_was_judged_is_the_one_that_is_written(wide: Path, save: Callable[..., Path], spread: np.ndarray) -> None:
    data = save({"x": spread, "labels": right_labels(wide, spread)})
    out = wide.with_name("out.onnx")
    result = invoke("prune", wide, "-o", out, "--data", data, "--max-drop", "20%", "--confidence", "50%")
    assert result.exit_code == 0, result.stderr
    whole = sfp_onnx.data_for(sfp_onnx.load(wide), data)
    assert whole is not None
    judge = held_out(whole)[1]
    top1 = sfp_onnx.evaluate([wide, out], judge, latency=False)[1].top1
    assert f"1.0000 -> {top1:.4f} " in result.stderr


def test_a_wrong_original_is_not_called_trained_on_these(wide: Path, save: Callable[..., Path], spread: np.ndarray) -> None:
    data = save({"x": spread, "labels": labels_of(90)})
    result = invoke("plan", wide, "-o", wide.with_name("p.json"), "--data", data, "--max-drop", "40%")
    assert result.exit_code == 0 and "trained on" not in result.stderr
