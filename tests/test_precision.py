"""Weights in fewer bits: how they are stored, how widths and precisions are chosen together, and what is written."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from building import Builder, feeds_for, low_rank
from conftest import CLASSES, WIDE, at_all_levels, classifier, images, invoke, labels_of, relative, run_model
from onnx import TensorProto, helper, numpy_helper

import sfp_onnx
from sfp_onnx.coupling.analysis import silent
from sfp_onnx.coupling.cost import params_of
from sfp_onnx.graph.save import file_bytes, to_proto
from sfp_onnx.graph.stored import STORED, Store, coded, rounded, stored
from sfp_onnx.planning import from_json, to_json
from sfp_onnx.planning.precision import storables
from sfp_onnx.scores.rounding import with_errors


@pytest.fixture
def model(wide_model: Path) -> Path:
    return wide_model


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.npz"
    np.savez(path, x=images(80), labels=labels_of(80) % CLASSES)
    return path


def whole(kind: str) -> list[Store]:
    return [Store(name, 1, kind, 0) for name in ("c1", "c2", "logits")]


# ---- how weights are stored ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "allowed"), [("float16", 2e-3), ("int8-weights", 2e-2)])
def test_what_is_stored_is_what_is_computed_with_at_all_optimisation_levels(kind: str, allowed: float) -> None:
    original = sfp_onnx.load(classifier(**WIDE))
    made = stored(original, whole(kind))
    proto = to_proto(made)
    onnx.checker.check_model(proto, full_check=True)
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in classifier(**WIDE).graph.initializer}
    plain = classifier(**WIDE)
    for tensor in plain.graph.initializer:
        if tensor.name in ("w1", "w2", "w3"):
            new = rounded(held[tensor.name], kind, 0).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(new, tensor.name))
    feeds = {"x": images(4)}
    answers = at_all_levels(proto, feeds)
    assert all(relative(answer, run_model(plain, feeds)[0]) < 1e-5 for answer in answers)
    assert relative(answers[0], run_model(classifier(**WIDE), feeds)[0]) < allowed
    assert params_of(made) == params_of(original) and file_bytes(made) < file_bytes(original) * (0.6 if kind == "float16" else 0.45)


def test_codes_are_the_nearest_of_each_channel_and_empty_channels_stay_zero() -> None:
    weight = np.random.default_rng(0).standard_normal((4, 3, 2)).astype(np.float32)
    weight[1] = 0
    for axis in range(3):
        whole_numbers, scale = coded(weight, axis)
        assert whole_numbers.dtype == np.int8 and scale.size == weight.shape[axis]
        assert (np.abs(whole_numbers * scale - weight) <= scale / 2 + 1e-7).all()
    assert not coded(weight, 0)[0][1].any() and np.isfinite(coded(weight, 0)[1]).all()


def test_a_weight_that_two_layers_read_is_stored_once_and_others_are_left() -> None:
    proto = classifier(**WIDE)
    proto.graph.node.append(helper.make_node("Gemm", ["f", "w3"], ["more"], "again", transB=1))
    proto.graph.output.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, ["N", CLASSES]))
    made = stored(sfp_onnx.load(proto), [*whole("int8-weights"), Store("more", 1, "int8-weights", 0), Store("absent", 1, "float16", 0)])
    assert [node.op_type for node in made.proto.graph.node].count("Cast") == 3
    feeds = {"x": images(2)}
    first, second = run_model(to_proto(made), feeds)
    bias = next(numpy_helper.to_array(tensor) for tensor in proto.graph.initializer if tensor.name == "b3")
    assert relative(second + bias, first) < 1e-5
    assert stored(made, whole("int8-weights")).proto == made.proto, "nothing is stored twice"


def test_what_rounding_does_is_measured_at_the_outputs(data: Path) -> None:
    analysis = sfp_onnx.inspect(classifier(**WIDE))
    weights = storables(analysis.prepared, analysis.coupling)
    assert [item.weight for item in weights] == ["w1", "w2"], "w3 is smaller than what would be saved"
    for item in with_errors(analysis, weights, sfp_onnx.data_for(analysis.model, data), 0, silent):
        assert item.errors[4] == 0 < item.errors[2] < 1e-2 * item.errors[1] and item.errors[1] < 1e-2


# ---- the choice, and what is written ---------------------------------------------------------------------------------


def run(model: Path, data: Path, folder: Path, *options: object) -> Any:
    return invoke("prune", model, "-o", folder / "out.onnx", "--data", data, "--manifest", folder / "out.json", *options)


def test_one_target_over_widths_and_precisions(model: Path, data: Path, tmp_path: Path) -> None:
    done = run(model, data, tmp_path, "--target", "size=40%", "--precision", "auto")
    assert done.exit_code == 0, done.stderr
    bound = 0.4 * model.stat().st_size
    assert 0.8 * bound < (tmp_path / "out.onnx").stat().st_size <= bound
    held = json.loads((tmp_path / "out.json").read_text())
    kinds = {item["layer"]: item["stored"] for item in held["plan"]["precisions"]}
    assert set(kinds) == {"conv1", "conv2"} and "int8-weights" in kinds.values()
    assert held["plan"]["figures"]["size"]["actual"] == (tmp_path / "out.onnx").stat().st_size
    assert any("re-fit after rounding" in note for note in held["notes"])
    assert held["after"]["params"] == params_of(sfp_onnx.load(tmp_path / "out.onnx"))
    plan, again = tmp_path / "plan.json", tmp_path / "again.onnx"
    plan.write_text(json.dumps(held["plan"]))
    applied = invoke("apply", model, plan, "-o", again, "--data", data)
    assert applied.exit_code == 0, applied.stderr
    assert again.read_bytes() == (tmp_path / "out.onnx").read_bytes()
    alone = run(model, data, tmp_path, "--target", "size=40%")
    assert alone.exit_code == 0
    assert json.loads((tmp_path / "out.json").read_text())["after"]["params"] < held["after"]["params"]


@pytest.mark.parametrize("target", ["size=40%", "size=16%"])
def test_ranks_are_chosen_together_with_precisions(target: str) -> None:
    """A layer of low rank becomes two, in fewer bits where that is needed: nearer to the original than widths and precisions alone."""
    model = low_rank(4)
    data = feeds_for(model, batch=120)["x"]
    options = sfp_onnx.PlanOptions(targets=(target,), precision="auto", align=None)
    both, cut = (sfp_onnx.prune(model, replace(options, moves=moves), data=data) for moves in (("cut", "factor"), ("cut",)))
    assert [factor.layer for factor in both.plan.factors] == ["middle"] and not cut.plan.factors
    (figures,) = both.plan.figures.values()
    assert figures["actual"] <= figures["bound"] and figures["actual"] == pytest.approx(figures["predicted"], rel=0.05)
    (kind,) = (item.stored for item in both.plan.precisions if item.layer == "middle")
    proto = both.to_proto()
    stored_as = {tensor.data_type for tensor in proto.graph.initializer if np.prod(tensor.dims) >= 4 * 24 and len(tensor.dims) == 4}
    assert kind in ("float16", "int8-weights") if target == "size=16%" else TensorProto.FLOAT in stored_as
    assert TensorProto.FLOAT not in stored_as if target == "size=16%" else True
    feeds = {"x": data[:16]}
    exact = run_model(model, feeds)[0]
    errors = [relative(answer, exact) for result in (both, cut) for answer in at_all_levels(result.to_proto(), feeds)]
    assert max(errors[: len(errors) // 2]) < 0.8 * min(errors[len(errors) // 2 :])
    again = sfp_onnx.apply(model, from_json(json.loads(json.dumps(to_json(both.plan)))), data)
    assert again.to_proto().SerializeToString() == proto.SerializeToString()


def test_a_layer_that_rounding_hurts_stays_float_and_the_plan_says_why(data: Path) -> None:
    """One weight that is much larger than those that it stands among takes all of the integers' range."""
    proto = classifier(**WIDE)
    for tensor in proto.graph.initializer:
        if tensor.name == "w1":
            weight = numpy_helper.to_array(tensor).copy()
            weight[:, 0, 0, 0] *= 200
            tensor.CopyFrom(numpy_helper.from_array(weight, "w1"))
    options = sfp_onnx.PlanOptions(targets=("size=45%",), precision="auto", keep="conv2", min_channels=32)  # nothing can be cut
    made = sfp_onnx.prune(proto, options, data=data)
    found = {item.layer: item for item in made.plan.precisions}
    assert found["conv1"].stored != "int8-weights" and "times the median" in found["conv1"].reason
    assert found["conv2"].stored == "int8-weights" and not found["conv2"].reason


@pytest.mark.parametrize("kind", ["float16", "int8-weights"])
def test_the_same_precision_of_all_layers_without_data(kind: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    done = invoke("prune", model, "-o", out, "--ratio", "0.25", "--precision", kind)
    assert done.exit_code == 0, done.stderr
    types = {tensor.data_type for tensor in onnx.load(out).graph.initializer if np.prod(tensor.dims) > 300}
    assert types == {{"float16": TensorProto.FLOAT16, "int8-weights": TensorProto.INT8}[kind]}
    again = invoke("prune", out, "-o", tmp_path / "smaller.onnx", "--ratio", "0.25")
    assert again.exit_code == 0, "a model that is stored so can be cut further: " + again.stderr


def without_biases() -> onnx.ModelProto:
    """Three products with weights alone, to which the repair adds biases."""
    b, random = Builder(), np.random.default_rng(0)
    x = b.input(["N", 16])
    for at, shape in enumerate(((16, 32), (32, 32), (32, 8))):
        x = b.op("MatMul", x, b.const(random.standard_normal(shape), np.float32))
        x = b.op("Relu", x) if at < 2 else x
    return b.model(x)


def recurrent() -> onnx.ModelProto:
    """An LSTM, which reads two weights, between two layers."""
    b, random = Builder(), np.random.default_rng(0)
    x = b.op("MatMul", b.input([6, "N", 8]), b.const(random.standard_normal((8, 16)) / 3, np.float32))
    weights = [b.const(random.standard_normal((1, 96, width)) / 4, np.float32) for width in (16, 24)]
    x = b.op("Squeeze", b.op("LSTM", x, *weights, hidden_size=24), b.const([1], np.int64))
    return b.model(b.op("MatMul", x, b.const(random.standard_normal((24, 48)), np.float32)))


@pytest.mark.parametrize(("proto", "shape"), [(without_biases(), (64, 16)), (recurrent(), (6, 64, 8))], ids=["MLP", "LSTM"])
@pytest.mark.parametrize("share", ["95%", "40%"])
def test_what_a_plan_promises_of_small_models_is_what_the_file_has(
    proto: onnx.ModelProto, shape: tuple[int, ...], share: str, tmp_path: Path
) -> None:
    """Scales, nodes and biases are a large part of these; each bias is given once, and each weight is stored as the plan says."""
    data = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    made = sfp_onnx.prune(proto, sfp_onnx.PlanOptions(targets=(f"size={share}",), precision="auto"), data={"x": data})
    figure = made.plan.figures["size"]
    assert figure["actual"] == file_bytes(made.model) <= figure["bound"]
    assert abs(figure["predicted"] - figure["actual"]) < 0.02 * figure["before"]
    kinds = Counter(item.stored for item in made.plan.precisions if item.stored != "float32")
    held = Counter(tensor.data_type for tensor in made.model.proto.graph.initializer)
    assert (kinds["int8-weights"], kinds["float16"]) == (held[TensorProto.INT8], held[TensorProto.FLOAT16])
    assert len({(item.layer, item.weight) for item in made.plan.precisions}) == len(made.plan.precisions)
    adds = [node for node in made.model.proto.graph.node if node.op_type == "Add"]
    assert len(adds) <= 3
    again = sfp_onnx.apply(proto, from_json(json.loads(json.dumps(to_json(made.plan)))), {"x": data})
    assert to_proto(again.model) == to_proto(made.model)


def test_the_smallest_file_within_a_drop(model: Path, data: Path, tmp_path: Path) -> None:
    done = run(model, data, tmp_path, "--max-drop", "30%", "--confidence", "50%", "--precision", "auto")
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "out.onnx").stat().st_size < 0.45 * model.stat().st_size


def test_what_does_not_go_together_is_refused(model: Path, tmp_path: Path) -> None:
    for options, words in (
        (("--ratio", "0.5", "--precision", "auto"), "--precision auto"),
        (("--target", "size=50%", "--precision", "auto", "--allocation", "uniform"), "--allocation"),
        (("--target", "size=50%", "--precision", "auto", "--quantize", "int8"), "--quantize"),
        (("--target", "size=50%", "--precision", "int8-weights", "--fp16"), "--fp16"),
    ):
        done = invoke("prune", model, "-o", tmp_path / "out.onnx", *options)
        assert done.exit_code == 2 and words in done.stderr and not (tmp_path / "out.onnx").exists(), done.stderr


def test_a_plan_with_precisions_is_read_back_and_a_damaged_one_refused(model: Path) -> None:
    made = sfp_onnx.plan(model, sfp_onnx.PlanOptions(ratio=0.25, precision="int8-weights"))
    assert from_json(json.loads(json.dumps(to_json(made)))).precisions == made.precisions and len(made.precisions) == 2
    assert {item.stored for item in made.precisions} == {"int8-weights"} <= set(STORED)
    other = replace(made, precisions=(replace(made.precisions[0], layer="none"),))
    with pytest.raises(sfp_onnx.PlanError, match="'none'"):
        sfp_onnx.apply(model, other)
    data: Any = json.loads(json.dumps(to_json(made)))
    data["precisions"][0]["stored"] = "int3"
    with pytest.raises(sfp_onnx.PlanError, match="int3"):
        from_json(data)
