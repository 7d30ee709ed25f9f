"""Targets in every unit, alone and together, held or refused; device profiles of other machines; the closed loop."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import classifier, files_in, images, invoke, labels_of, model_of, weights_of
from onnx import helper
from test_branches import residual, without

import sfp_onnx
from sfp_onnx import graph
from sfp_onnx.core.errors import TargetError
from sfp_onnx.core.options import MeasureOptions, PlanOptions, RepairOptions
from sfp_onnx.core.types import Group
from sfp_onnx.evaluation import outputs
from sfp_onnx.latency import Block, DeviceProfile, measure, profiling, to_json
from sfp_onnx.latency.measure import CACHE_VARIABLE
from sfp_onnx.latency.profiling import clock_of, names_of, read_device_profile
from sfp_onnx.planning import Target, bounds, parse_target, removal_of, search
from sfp_onnx.planning.figures import ruler_for
from sfp_onnx.planning.max_drop import held_out
from sfp_onnx.planning.search import BLOCKS, LIGHT, NOISE, ROUNDS, Candidates, Trial, errors_of_scores, nearest
from sfp_onnx.report.points import Point, front, parse_sweep

WIDE = (64, 96)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """`classifier` with 64 and 96 channels."""
    path = tmp_path / "wide.onnx"
    onnx.save(classifier(widths=WIDE), path)
    return path


def profile_of(path: Path, per_mac: float = 1e-9, constant: float = 1e-4, block: int = 16, slow: float = 1.5) -> DeviceProfile:
    """A made-up device on which only multiplications cost time, besides a constant."""
    analysis = sfp_onnx.inspect(path)
    costs = dict.fromkeys(names_of(analysis), (0.0, 0.0, per_mac, 0.0))
    work = analysis.size().macs * analysis.samples
    found = DeviceProfile(
        {"cpu": "a board", "onnxruntime": "1.0", "threads": 1, "provider": "X"}, analysis.model.sha256, 1, constant + per_mac * work,
        Block(block, slow, {"64": 1.0}), constant, costs, 1.0, 0.01, 3,
    )  # fmt: skip
    return found


@pytest.fixture
def profile_file(wide: Path, tmp_path: Path) -> Path:
    path = tmp_path / "board.json"
    path.write_text(json.dumps(to_json(profile_of(wide))))
    return path


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("macs=50%", Target("macs", 0.5, True)),
        ("MACs = 40M", Target("macs", 40e6, False)),
        ("params=120k", Target("params", 120e3, False)),
        ("size=2MB", Target("size", 2e6, False)),
        ("size=1.5MiB", Target("size", 1.5 * 2**20, False)),
        ("size=900000", Target("size", 900000, False)),
        ("memory=300kB", Target("memory", 300e3, False)),
        ("latency=60%", Target("latency", 0.6, True)),
        ("latency=5ms", Target("latency", 5e-3, False)),
        ("latency=.25s", Target("latency", 0.25, False)),
        ("latency=800us", Target("latency", 800e-6, False)),
        ("latency=2x", Target("latency", 0.5, True)),
        ("macs=1.25x", Target("macs", 0.8, True)),
        ("flops=50%", Target("macs", 0.5, True)),
        ("FLOPs = 4X", Target("macs", 0.25, True)),
    ],
)
def test_units_of_targets(text: str, expected: Target) -> None:
    found = parse_target(text)
    assert (found.what, found.relative) == (expected.what, expected.relative)
    assert found.value == pytest.approx(expected.value, rel=1e-12)


BAD = ("flops=5G", "gain=50%", "macs=0.5x", "macs=0x", "macs", "macs=", "macs=0%",
        "macs=101%", "latency=5", "latency=5MB", "size=5ms", "macs=1.2.3", "x")


@pytest.mark.parametrize("text", BAD)
def test_bad_targets_are_refused_with_the_units(text: str, model_file: Path, tmp_path: Path) -> None:
    result = invoke("prune", model_file, "-o", tmp_path / "out.onnx", "--target", text)
    assert result.exit_code == 2 and f"target '{text}'" in result.stderr and "expected macs=50%" in result.stderr
    assert not (tmp_path / "out.onnx").exists()


def test_a_number_that_was_meant_as_a_share_is_told_so(model_file: Path, tmp_path: Path) -> None:
    result = invoke("prune", model_file, "-o", tmp_path / "out.onnx", "--target", "macs=50")
    assert result.exit_code == 3 and "macs=50 is a number; a share is written macs=50%." in result.stderr


def test_the_tightest_of_several_bounds_counts() -> None:
    asked = [parse_target(text) for text in ("macs=50%", "params=10", "macs=30")]
    assert bounds(asked, {"macs": 100.0, "params": 40.0}) == {"macs": 30.0, "params": 10.0}


# ---- holding ---------------------------------------------------------------------------------------------------------


def actual(path: Path) -> dict[str, float]:
    size = sfp_onnx.inspect(path).size()
    return {"macs": size.macs, "params": size.params, "size": path.stat().st_size}


@pytest.mark.parametrize("allocation", ["uniform", "global", "solve"])
@pytest.mark.parametrize(
    ("targets", "limits"),
    [
        (("macs=50%",), {"macs": 0.5}),
        (("params=30%",), {"params": 0.3}),
        (("size=40%",), {"size": 0.4}),
        (("macs=60%", "params=40%"), {"macs": 0.6, "params": 0.4}),
        (("macs=60%", "size=30%", "memory=70%"), {"macs": 0.6, "size": 0.3}),
    ],
)
def test_targets_are_held_together(
    allocation: str, targets: tuple[str, ...], limits: Mapping[str, float], wide: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.onnx"
    options = [item for text in targets for item in ("--target", text)]
    result = invoke("prune", wide, "-o", out, "--allocation", allocation, *options)
    assert result.exit_code == 0, result.stderr
    before, after = actual(wide), actual(out)
    for name, limit in limits.items():
        assert after[name] <= limit * before[name]
    assert max(after[name] / (limit * before[name]) for name, limit in limits.items()) > 0.85  # no more than needed
    assert all(text.split("=")[0] in result.stdout for text in targets)


def test_absolute_size(wide: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    assert invoke("prune", wide, "-o", out, "--target", "size=100kB").exit_code == 0
    assert 90e3 < out.stat().st_size <= 100e3


def test_unreachable_targets_write_nothing_and_say_what_can_be_had(wide: Path, tmp_path: Path) -> None:
    held = files_in(tmp_path)
    for targets in (("size=100",), ("macs=50%", "memory=10"), ("params=1",)):
        options = [item for text in targets for item in ("--target", text)]
        result = invoke("prune", wide, "-o", tmp_path / "out.onnx", *options)
        assert result.exit_code == 3 and "best reachable is" in result.stderr and "of the original" in result.stderr
        assert "Nothing was written" in result.stderr
    assert files_in(tmp_path) == held


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_memory_against_a_hand_count(save: Callable[..., Path]) -> None:
    # One sample: x 3x8x8, conv1 -> 8x8x8, bn, relu 8x8x8, conv2 -> 12x8x8, relu 12x8x8, pool 12, flatten 12, logits 5; 4 bytes each.
    # relu2 reads 12 channels and writes 12: 24 * 64 * 4. conv2 holds 8 + 12, bn1 and relu1 8 + 8.
    analysis = sfp_onnx.inspect(save(classifier(batch=1)))
    ruler = ruler_for(analysis, PlanOptions(targets=("memory=50%",)))
    assert ruler.before["memory"] == 24 * 64 * 4
    # 3 of 12 channels of conv2 stay: relu2 6, conv2 8 + 3, bn1 16 channels.
    removed = np.zeros(analysis.coupling.units, bool)
    second = next(group for group in analysis.coupling.groups if group.width == 12)
    removed[second.units[3:]] = True
    assert ruler.predicted(removed)["memory"] == 16 * 64 * 4
    kept = np.asarray([group.width if group is not second else 3 for group in analysis.coupling.groups])
    assert float(ruler.cost("memory")(kept)) == 16 * 64 * 4


def test_memory_counts_a_residual_while_its_branch_runs(save: Callable[..., Path]) -> None:
    # a = relu(x); b = relu(a); c = relu(b); y = a + c: while c is made, a, b and c are alive; with x only at the first step.
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]), helper.make_node("Add", ["a", "c"], ["y"]),
    ]  # fmt: skip
    model = model_of(nodes, [("x", np.float32, [1, 4, 5])], [("y", np.float32, [1, 4, 5])], {})
    analysis = sfp_onnx.inspect(save(model))
    assert ruler_for(analysis, PlanOptions(targets=("memory=50%",))).before["memory"] == 3 * 20 * 4


@pytest.mark.parametrize("others", [0.0, 0.5])
@pytest.mark.parametrize("tail", ["Add", "Mul"])
def test_memory_without_a_branch_is_that_of_the_built_model(tail: str, others: float) -> None:
    analysis = sfp_onnx.inspect(residual(tail=tail))
    ruler = ruler_for(analysis, PlanOptions(targets=("memory=50%",)))
    plan = without(analysis, "conv1", others)
    removed = removal_of(plan, analysis.coupling, analysis.model.sha256)
    shape = {"x": list(analysis.prepared.feeds["x"].shape)}
    built = sfp_onnx.inspect(sfp_onnx.apply(analysis, plan).model, shape)
    found = ruler_for(built, PlanOptions(targets=("memory=50%",))).before["memory"]
    assert ruler.predicted(removed)["memory"] == found < ruler.before["memory"]
    kept = np.asarray([int((~removed[group.units]).sum()) for group in analysis.coupling.groups])
    assert found <= float(ruler.cost("memory")(kept)) <= ruler.before["memory"]


# ---- latency from a profile of another machine -----------------------------------------------------------------------


def test_a_profile_from_another_machine_plans_without_measuring(
    wide: Path, profile_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("measured on this machine")

    monkeypatch.setattr(measure, "latencies_of", never)
    monkeypatch.setattr(profiling, "measure_device_profile", never)
    plans = [tmp_path / "one.json", tmp_path / "two.json"]
    for path in plans:
        result = invoke("plan", wide, "-o", path, "--target", "latency=50%", "--device-profile", profile_file)
        assert result.exit_code == 0, result.stderr
    assert plans[0].read_bytes() == plans[1].read_bytes()  # the same table, the same plan
    plan = json.loads(plans[0].read_text())
    figures = plan["figures"]["latency"]
    assert figures["predicted"] == figures["actual"] <= figures["bound"] == pytest.approx(0.5 * figures["before"])
    widths = [group["width"] - len(group["remove"]) for group in plan["groups"]]
    assert all(width % (16 if width > 16 else 4) == 0 for width in widths) and widths != list(WIDE)  # its block, not this machine's
    assert plan["options"]["align"] == "16:4" and plan["options"]["allocation"] == "solve"


def test_absolute_latency_and_other_targets_with_a_profile(wide: Path, profile_file: Path, tmp_path: Path) -> None:
    seconds = profile_of(wide).seconds
    out = tmp_path / "out.onnx"
    bound = f"latency={seconds * 0.7 * 1e3:.6f}ms"
    result = invoke("prune", wide, "-o", out, "--target", bound, "--target", "params=60%", "--device-profile", profile_file)
    assert result.exit_code == 0, result.stderr
    assert actual(out)["params"] <= 0.6 * actual(wide)["params"]
    refused = invoke("prune", wide, "-o", out, "--target", "latency=1us", "--device-profile", profile_file)
    assert refused.exit_code == 3 and "predicted from the device profile" in refused.stderr


@pytest.mark.parametrize("damage", ["no json", "other format", "other version", "missing", "nan", "short row", "text"])
def test_damaged_profiles_are_refused(damage: str, wide: Path, tmp_path: Path) -> None:
    data = to_json(profile_of(wide))
    name = next(iter(data["nodes"]))
    changes: dict[str, dict[str, Any]] = {
        "other format": {"format": "x"}, "other version": {"version": 99}, "missing": {"block": {}}, "nan": {"constant": float("nan")},
        "short row": {"nodes": {name: [1.0]}}, "text": {"seconds": "fast"},
    }  # fmt: skip
    path = tmp_path / "bad.json"
    path.write_text("{" if damage == "no json" else json.dumps({**data, **changes[damage]}))
    result = invoke("prune", wide, "-o", tmp_path / "out.onnx", "--target", "latency=50%", "--device-profile", path)
    assert result.exit_code == 4 and "profile" in result.stderr and str(path) in result.stderr, result.stderr


def test_a_profile_of_another_model_is_refused(profile_file: Path, model_file: Path, tmp_path: Path) -> None:
    result = invoke("prune", model_file, "-o", tmp_path / "out.onnx", "--target", "latency=50%", "--device-profile", profile_file)
    assert result.exit_code == 4 and "another model" in result.stderr


def test_an_unknown_provider_is_refused(model_file: Path, tmp_path: Path) -> None:
    result = invoke("profile", model_file, "-o", tmp_path / "p.json", "--provider", "abacus")
    assert result.exit_code == 2 and "'abacus'" in result.stderr and "cpu" in result.stderr


# ---- alignment -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("align", "step", "fine"), [("8", 8, 8), ("16", 16, 16), ("16:8", 16, 8), ("none", 1, 1), ("auto", 32, 4)])
def test_alignment(align: str, step: int, fine: int, wide: Path, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(to_json(profile_of(wide, block=32))))
    out = tmp_path / "plan.json"
    options = ["--target", "latency=60%", "--device-profile", path, "--align", align]
    assert invoke("plan", wide, "-o", out, *options).exit_code == 0
    for group in json.loads(out.read_text())["groups"]:
        width = group["width"] - len(group["remove"])
        assert width % (step if width > step else fine) == 0 or width == group["width"]


def test_counted_targets_do_not_depend_on_the_machine(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any) -> Any:
        raise AssertionError("measured")

    monkeypatch.setattr(measure, "block", never)
    plan = sfp_onnx.plan(wide, PlanOptions(targets=("macs=50%",)))
    assert plan.options["align"] == LIGHT
    with pytest.raises(AssertionError, match="measured"):
        sfp_onnx.plan(wide, PlanOptions(targets=("macs=50%",), align="auto"))


# ---- the closed loop -------------------------------------------------------------------------------------------------


def looped(wide: Path, monkeypatch: pytest.MonkeyPatch, wrong: float, target: str = "latency=60%") -> tuple[sfp_onnx.Plan, list[float]]:
    """A plan on a machine that takes ``wrong`` times what its profile says for the part that is not constant."""
    profile = profile_of(wide, constant=1e-6, block=1, slow=1.0)
    analysis = sfp_onnx.inspect(wide)
    ratios: list[float] = []

    def measured(own: Any, model: Any, setup: Any, batch: int) -> float:
        share = sfp_onnx.inspect(model.proto if not model.weights else graph.save.to_proto(model)).size().macs / analysis.size().macs
        ratios.append(share * (1 if share == 1 else wrong))
        return ratios[-1]

    monkeypatch.setattr(profiling, "measure_device_profile", lambda *arguments, **options: profile)
    monkeypatch.setattr(measure, "latencies_of", lambda *arguments: [profile.seconds])
    monkeypatch.setattr(measure, "latency_ratio", measured)
    monkeypatch.setattr(profiling, "device_profile_around", lambda *arguments: profile)
    return sfp_onnx.plan(analysis, PlanOptions(targets=(target,), align=None, allocation="solve")), ratios


@pytest.mark.parametrize("wrong", [0.7, 1.0, 1.3])
def test_the_loop_corrects_a_wrong_prediction(wrong: float, wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, ratios = looped(wide, monkeypatch, wrong)
    figures = plan.figures["latency"]
    assert 0.55 < figures["actual"] / figures["before"] <= 0.6 * (1 + NOISE)
    assert len(ratios) <= ROUNDS + 4  # surprises are measured twice more
    assert len(ratios) == 1 or wrong != 1.0
    assert any("timed again" in note for note in plan.notes) == (wrong != 1.0)
    assert figures["actual"] / figures["predicted"] == pytest.approx(wrong, rel=0.05)


def test_a_single_wrong_measurement_is_repeated_not_believed(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(profiling, "device_profile_around", lambda *arguments: calls.append("timed again"))
    profile = profile_of(wide, constant=1e-6, block=1, slow=1.0)
    monkeypatch.setattr(profiling, "measure_device_profile", lambda *arguments, **options: profile)
    monkeypatch.setattr(measure, "latencies_of", lambda *arguments: [profile.seconds])
    ratios = iter([0.2, 0.595, 0.59])
    monkeypatch.setattr(measure, "latency_ratio", lambda *arguments: next(ratios))
    plan = sfp_onnx.plan(wide, PlanOptions(targets=("latency=60%",), align=None, allocation="solve"))
    assert plan.figures["latency"]["actual"] == pytest.approx(0.59 * profile.seconds) and not calls


def test_the_loop_gives_up_with_the_best_measured_figure(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TargetError, match=r"latency of at most .* best reachable is .* measured on this machine"):
        looped(wide, monkeypatch, 1e5, "latency=20%")


# ---- accuracy --------------------------------------------------------------------------------------------------------


@pytest.fixture
def labelled(wide: Path, tmp_path: Path) -> Path:
    """Images with the model's own answers as labels, so that the original is right everywhere."""
    data = images(90) + 3 * np.random.default_rng(7).standard_normal((90, 3, 1, 1)).astype(np.float32)
    answers = outputs(sfp_onnx.load(wide), [({"x": data}, 90)])[0].argmax(1)
    assert np.bincount(answers).max() < 70
    path = tmp_path / "labelled.npz"
    np.savez(path, x=data, labels=answers)
    return path


def test_max_drop_finds_a_smaller_model_that_holds_it(wide: Path, labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    result = invoke("prune", wide, "-o", out, "--data", labelled, "--max-drop", "10%", "--align", "none", "--repair", "none")
    assert result.exit_code == 0, result.stderr
    assert "top-1 on 30 calibration samples that were not scored with: 1.0000 -> " in result.stderr
    drop = float(result.stderr.split("(drop ")[1].split(",")[0])
    assert 0 <= drop <= 0.1 + 1e-9
    assert actual(out)["macs"] < 0.95 * actual(wide)["macs"]
    looser = tmp_path / "looser.onnx"
    again = invoke("prune", wide, "-o", looser, "--data", labelled, "--max-drop", "40%", "--align", "none", "--repair", "none")
    assert again.exit_code == 0
    assert actual(looser)["macs"] < actual(out)["macs"]


def test_max_drop_without_labels_is_agreement(wide: Path, save: Callable[..., Path], tmp_path: Path) -> None:
    data = save({"x": images(60)})
    result = invoke("prune", wide, "-o", tmp_path / "out.onnx", "--data", data, "--max-drop", "20%", "--align", "none")
    assert result.exit_code == 0, result.stderr
    assert "agreement with the original on 20 calibration samples" in result.stderr


def test_max_drop_and_a_target_are_both_held_or_refused(wide: Path, labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    common = ["prune", wide, "-o", out, "--data", labelled, "--align", "none", "--repair", "none"]
    refused = invoke(*common, "--target", "macs=1%", "--max-drop", "6%")
    assert refused.exit_code == 3 and "--max-drop cannot be held" in refused.stderr and not out.exists()
    held = invoke(*common, "--target", "macs=90%", "--max-drop", "60%")
    assert held.exit_code == 0, held.stderr
    assert actual(out)["macs"] <= 0.9 * actual(wide)["macs"]


def test_a_metric_of_the_user(wide: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_metric.py").write_text(
        "def right(outputs, labels):\n    return (outputs[0].argmax(1) == labels).mean() / 2\n"
        "def broken(outputs, labels):\n    raise KeyError('x')\n"
        "def nothing(outputs, labels):\n    return float('nan')\n"
    )
    monkeypatch.chdir(tmp_path)
    common = ["prune", wide, "-o", tmp_path / "out.onnx", "--data", labelled, "--max-drop", "20%", "--align", "none"]
    result = invoke(*common, "--metric", "own_metric:right")
    assert result.exit_code == 0 and "own_metric:right on 30 calibration samples" in result.stderr and "0.5000 -> " in result.stderr
    for metric, words in {
        "own_metric:broken": "failed: KeyError", "own_metric:nothing": "gave nan", "own_metric:absent": "cannot be imported",
        "absent_module:f": "cannot be imported", "own_metric": "expected module:function",
    }.items():  # fmt: skip
        refused = invoke(*common, "--metric", metric)
        assert refused.exit_code == 2 and words in refused.stderr, refused.stderr


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--max-drop", "1%"], 4, "needs --data"),
        (["--max-drop", "x"], 2, "expected 1% or 0.01"),
        (["--max-drop", "1%", "--ratio", "0.5"], 2, "either --ratio or --target"),
        (["--target", "macs=50%", "--metric", "a:b"], 2, "--metric needs --max-drop or --test-data"),
        (["--target", "macs=50%", "--task", "classify"], 2, "which needs --data"),
        (["--max-drop", "1"], 2, "1 % is written 1%"),
    ],
)
def test_bad_use_of_max_drop(options: list[str], code: int, words: str, wide: Path, tmp_path: Path) -> None:
    result = invoke("prune", wide, "-o", tmp_path / "out.onnx", *options)
    assert result.exit_code == code and words in result.stderr


def test_max_drop_needs_enough_samples(wide: Path, save: Callable[..., Path], tmp_path: Path) -> None:
    data = save({"x": images(20), "labels": labels_of(20)})
    result = invoke("prune", wide, "-o", tmp_path / "out.onnx", "--data", data, "--max-drop", "1%")
    assert result.exit_code == 4 and "expected at least 24 samples, found 20" in result.stderr


def test_held_out_samples_are_not_scored_with(wide: Path, labelled: Path) -> None:
    data = sfp_onnx.data_for(sfp_onnx.load(wide), labelled)
    assert data is not None
    seen, judge = held_out(data)
    assert not set(seen.indices) & set(judge.indices) and len(seen.indices) + len(judge.indices) == 90
    assert seen.labels is not None and data.labels is not None
    assert (seen.labels == data.labels[seen.indices]).all()


# ---- sweep -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("macs=90%:20%:35%", ["macs=90%", "macs=55%", "macs=20%"]),
        ("latency=8ms:2ms:3ms", ["latency=8ms", "latency=5ms", "latency=2ms"]),
        ("latency=1.5x:3x:0.5x", ["latency=1.5x", "latency=2x", "latency=2.5x", "latency=3x"]),
        ("size=1MB:2MB:0.5MB", ["size=1MB", "size=1.5MB", "size=2MB"]),
    ],
)
def test_reading_sweeps(text: str, expected: list[str]) -> None:
    assert parse_sweep(text) == expected


@pytest.mark.parametrize("text", ["macs=90%", "macs=90%:20%", "macs=90%:20%:0%", "macs=90%:20M:1M", "macs=90%:20%:0.1%", "speed=2x:3x:1x"])
def test_bad_sweeps(text: str, wide: Path) -> None:
    result = invoke("sweep", wide, "--targets", text)
    assert result.exit_code == 2 and "Error: targ" in result.stderr, result.stderr


def test_sweep(wide: Path, labelled: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "models", tmp_path / "sweep.json"
    targets = ["--targets", "macs=80%:40%:40%", "--targets", "size=0.1%:0.1%:1%"]
    result = invoke("sweep", wide, "--data", labelled, *targets, "--save-dir", folder, "-o", out, "--threads", "1")
    assert result.exit_code == 0, result.stderr
    points = json.loads(out.read_text())["points"]
    assert [point["target"] for point in points] == ["original", "macs=80%", "macs=40%", "size=0.1%"]
    assert points[0]["top1"] == 1.0 and points[0]["latency_ratio"] == 1.0
    assert "best reachable" in points[3]["failure"] and not points[3]["front"]
    for point, share in zip(points[1:3], (0.8, 0.4), strict=True):
        assert actual(Path(point["file"]))["macs"] == pytest.approx(point["size"]["macs"])
        assert point["size"]["macs"] <= share * points[0]["size"]["macs"]
        assert Path(point["file"]).stat().st_size == pytest.approx(point["size"]["bytes"], rel=0.01)
        notes = json.loads(Path(point["manifest"]).read_text())
        assert notes["output"]["sha256"] == sfp_onnx.load(Path(point["file"])).sha256
        assert notes["after"]["macs"] == point["size"]["macs"] and notes["plan"]["options"]["targets"][-1] == point["target"]
    assert any(point["front"] for point in points) and len(list(folder.iterdir())) == 4
    assert "not reached" in result.stdout and "size=0.1%: the target cannot be met" in result.stderr


def test_a_sweep_of_unreachable_targets(wide: Path) -> None:
    result = invoke("sweep", wide, "--targets", "size=0.1%:0.2%:0.1%")
    assert result.exit_code == 3 and "none of the 2 targets" in result.stderr


def test_pareto_front() -> None:
    def point(name: str, top1: float, size: int, ratio: float) -> Point:
        return Point(name, sfp_onnx.Size(1.0, 1, size), metric="top-1", value=top1, latency_ms=1.0, latency_ratio=ratio)

    points = [point("a", 0.9, 100, 1.0), point("b", 0.8, 50, 0.5), point("c", 0.8, 60, 0.5)]
    points += [point("d", 0.7, 60, 0.4), point("e", 0.7, 50, 0.6)]
    assert [own.target for own in front(points) if own.front] == ["a", "b", "d"]


def test_profile_command(model_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    result = invoke("profile", model_file, "-o", out, "--threads", "1")
    assert result.exit_code == 0, result.stderr
    assert "blocks of" in result.stdout and "mean error of predictions on 3 models" in result.stdout
    profile = read_device_profile(out, sfp_onnx.load(model_file).sha256)
    assert profile.seconds > 0 and profile.batch == 1
    clock = clock_of(sfp_onnx.inspect(model_file), profile)
    assert float(clock(clock.terms.full)) > 0
    again = invoke("profile", model_file, "-o", tmp_path / "again.json", "--threads", "1")
    assert again.exit_code == 0 and (tmp_path / "again.json").read_bytes() == out.read_bytes()  # from the cache


def test_weights_of_the_wide_classifier(wide: Path) -> None:
    assert actual(wide)["params"] == sum(array.size for array in weights_of(widths=WIDE).values())


def test_alignments_that_are_none(wide: Path, tmp_path: Path) -> None:
    for align in ("0", "x", "16:", "1:2:3:4", "-8"):
        result = invoke("plan", wide, "-o", tmp_path / "p.json", "--target", "macs=50%", "--align", align)
        assert result.exit_code == 2 and "alignment" in result.stderr, result.stderr


@pytest.mark.parametrize("options", [["--target", "macs=50%"], ["--ratio", "0.4"], ["--target", "size=60%", "--allocation", "solve"]])
def test_by_default_widths_are_not_slower_than_wider_ones(options: list[str], wide: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    assert invoke("plan", wide, "-o", out, *options).exit_code == 0
    plan = json.loads(out.read_text())
    widths = [group["width"] - len(group["remove"]) for group in plan["groups"]]
    assert plan["options"]["align"] == LIGHT and all(width % 4 == 0 or width < 12 for width in widths) and widths != list(WIDE)
    out.unlink()
    assert invoke("plan", wide, "-o", out, *options, "--align", "none").exit_code == 0
    assert any(group["remove"] for group in json.loads(out.read_text())["groups"])


@pytest.mark.parametrize(("layers", "align"), [(8, BLOCKS), (1, LIGHT)])
def test_solved_widths_fill_blocks_where_there_is_a_choice(layers: int, align: str, save: Callable[..., Path]) -> None:
    """Among many groups whole blocks use the target up; with one group they would leave much of it, so its steps are finer."""
    random = np.random.default_rng(0)
    nodes, held, name = [], {"head": random.standard_normal((5, 64, 1, 1)).astype(np.float32)}, "x"
    for layer in range(layers):
        held[f"w{layer}"] = random.standard_normal((64, 64 if layer else 3, 3, 3)).astype(np.float32) / 24
        nodes += [helper.make_node("Conv", [name, f"w{layer}"], [f"c{layer}"], f"conv{layer}", pads=[1] * 4)]
        nodes += [helper.make_node("Relu", [f"c{layer}"], [f"r{layer}"], f"relu{layer}")]
        name = f"r{layer}"
    nodes += [helper.make_node("Conv", [name, "head"], ["y"], "last")]
    path = save(model_of(nodes, [("x", np.float32, ["N", 3, 8, 8])], [("y", np.float32, ["N", 5, 8, 8])], held))
    plan = sfp_onnx.plan(path, PlanOptions(targets=("macs=45%",), allocation="solve"), "magnitude")
    widths = [group.width - len(group.remove) for group in plan.groups]
    block = 16 if align == BLOCKS else 4
    assert plan.options["align"] == align and all(width % block == 0 or width < 12 for width in widths), widths
    assert 0.42 < plan.after.macs / plan.before.macs <= 0.45


def test_a_plan_on_the_measured_staircase_is_reproduced(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "block", lambda setup: Block(16, 1.5, {}))
    out, manifest = tmp_path / "out.onnx", tmp_path / "m.json"
    common = ["prune", wide, "--target", "macs=50%", "--align", "auto"]
    assert invoke(*common, "-o", out, "--manifest", manifest).exit_code == 0
    assert json.loads(manifest.read_text())["options"]["align"] == "16:4"
    monkeypatch.setattr(measure, "block", lambda setup: Block(8, 1.5, {}))  # another machine
    again = invoke(*common, "-o", tmp_path / "again.onnx", "--locked", manifest)
    assert again.exit_code == 0, again.stderr
    assert (tmp_path / "again.onnx").read_bytes() == out.read_bytes()


def test_errors_of_scores_count_every_reader() -> None:
    """Half of the squared scores lost is half an error for each layer that reads the group."""
    scores = np.array([1.0, 1.0, 1.0, 1.0])
    one, three = Group("a", np.arange(4), ("p",), ("q",)), Group("b", np.arange(4), ("p",), ("q", "r", "s"))
    first, second = errors_of_scores([one, three], scores)
    assert first.tolist() == [1, 0.75, 0.5, 0.25, 0] and (second == 3 * first).all()


def test_the_default_score_knows_the_repair(wide: Path, save: Callable[..., Path]) -> None:
    analysis = sfp_onnx.inspect(wide)
    data = sfp_onnx.data_for(analysis.model, save({"x": images(40)}))
    options = PlanOptions(targets=("macs=50%",))
    repairs = (None, RepairOptions(fit="bias"), RepairOptions())
    found = [sfp_onnx.plan(analysis, options, data=data, repair=repair).options["score"] for repair in repairs]
    assert found == ["contribution", "contribution", "obs"]


# ---- plans compared --------------------------------------------------------------------------------------------------


def test_the_removal_that_leaves_less_is_taken(wide: Path, save: Callable[..., Path]) -> None:
    analysis = sfp_onnx.inspect(wide)
    data = sfp_onnx.data_for(analysis.model, save({"x": images(160)}))
    assert data is not None
    trials = {}
    for name, share in (("most", 0.9), ("few", 0.2), ("half", 0.5)):
        plan = sfp_onnx.plan(analysis, PlanOptions(ratio=share), "magnitude")
        trials[name] = Trial(PlanOptions(ratio=share), removal_of(plan, analysis.coupling, plan.model_sha256))
    scores, how = np.zeros(analysis.coupling.units), MeasureOptions(task="classify")
    ready = Candidates(analysis, analysis.coupling.groups, scores, {}, data=data, repair=RepairOptions(), measures=how)
    best, said = nearest(ready, trials)
    assert best == "few" and "(KL divergence)" in said and "on 40 samples" in said and said.endswith("taken: few")
    values = {name: float(value) for value, name in re.findall(r"([0-9.e-]+) with (\w+)", said)}
    assert 0 < values["few"] < values["half"] < values["most"]


@pytest.mark.parametrize("winner", ["16:4", "16"])
def test_widths_below_one_block_must_pay(winner: str, wide: Path, profile_file: Path, save: Callable[..., Path], monkeypatch: Any) -> None:
    """A latency target offers two staircases where a repair and data can tell which is better; the nearer model decides."""
    analysis = sfp_onnx.inspect(wide)
    data = sfp_onnx.data_for(analysis.model, save({"x": images(160)}))
    seen: list[dict[str, Any]] = []

    def taken(*arguments: Any) -> tuple[str, str]:
        seen.append(arguments[1])
        return f"--align {winner}", "compared"

    monkeypatch.setattr(search, "nearest", taken)
    options = PlanOptions(targets=("latency=15%",), device_profile=profile_file)
    plan = sfp_onnx.plan(analysis, options, "magnitude", data, repair=RepairOptions())
    assert [*seen[0]] == ["--align 16:4", "--align 16"] and not np.array_equal(*(trial.removed for trial in seen[0].values()))
    assert plan.options["align"] == winner and plan.notes[-1] == "compared"
    assert np.array_equal(removal_of(plan, analysis.coupling, plan.model_sha256), seen[0][f"--align {winner}"].removed)
    widths = [group.width - len(group.remove) for group in plan.groups]
    assert all(width % 16 == 0 for width in widths) == (winner == "16")
    for own in ({"repair": None}, {"data": None}):
        sfp_onnx.plan(analysis, options, "magnitude", **{"data": data, "repair": RepairOptions(), **own})
    assert len(seen) == 1  # nothing to judge with
