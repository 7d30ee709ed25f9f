"""Half precision, integers and onnxruntime's format of a pruned model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import CLASSES, classifier, files_in, images, invoke, labels_of, relative, run_model
from onnx import TensorProto, numpy_helper

import sfp_onnx
from sfp_onnx.core.options import OutputOptions
from sfp_onnx.export import TOLERANCES, halved, package


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(classifier(widths=(32, 48)), path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.npz"
    np.savez(path, x=images(80), labels=labels_of(80) % CLASSES)
    return path


def prune(model: Path, output: Path, *options: object) -> Any:
    return invoke("prune", model, "-o", output, "--ratio", "0.25", "--repair", "none", *options)


def kinds(path: Path) -> list[int]:
    return [tensor.data_type for tensor in onnx.load(path).graph.initializer if np.prod(tensor.dims) > 300]


def test_half_stores_rounded_weights_and_keeps_the_interface(model: Path, data: Path, tmp_path: Path) -> None:
    plain, small = tmp_path / "plain.onnx", tmp_path / "small.onnx"
    assert prune(model, plain, "--data", data).exit_code == 0
    result = prune(model, small, "--data", data, "--half")
    assert result.exit_code == 0, result.stderr
    proto = onnx.load(small)
    onnx.checker.check_model(proto, full_check=True)
    assert set(kinds(small)) == {TensorProto.FLOAT16} and set(kinds(plain)) == {TensorProto.FLOAT}
    ends = [item.type.tensor_type.elem_type for item in [*proto.graph.input, *proto.graph.output]]
    assert ends == [TensorProto.FLOAT] * 2 and small.stat().st_size < 0.6 * plain.stat().st_size
    rounded = onnx.load(plain)
    for tensor in rounded.graph.initializer:
        if np.prod(tensor.dims) > 300:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32), tensor.name))
    feeds = {"x": images(4)}
    assert relative(run_model(small, feeds)[0], run_model(rounded, feeds)[0]) < 1e-6
    assert "half" in result.stdout and "measured on 80 calibration samples" in result.stderr


def test_weights_that_half_cannot_hold_stay_and_all_of_them_are_an_error(tmp_path: Path) -> None:
    proto = classifier(widths=(32, 48))
    for tensor in proto.graph.initializer:
        if tensor.name == "w1":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1e6), "w1"))
    small, _, said = halved(sfp_onnx.load(proto))
    assert small.weights["w1"].dtype == np.float32 and "1 weights are too large" in said
    with pytest.raises(sfp_onnx.OptionError, match="no float32 weights"):
        halved(sfp_onnx.load(classifier(widths=(2, 2))))


@pytest.mark.parametrize("static", [True, False])
def test_int8_is_near_and_its_steps_are_listed(static: bool, model: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "small.onnx"
    result = prune(model, output, *(("--data", data) if static else ()), "--quantize", "int8")
    assert result.exit_code == 0, result.stderr
    plain = tmp_path / "plain.onnx"
    assert prune(model, plain, *(("--data", data) if static else ())).exit_code == 0
    feeds = {"x": images(16)}
    assert relative(run_model(output, feeds)[0], run_model(plain, feeds)[0]) < 0.2
    names = {node.op_type for node in onnx.load(output).graph.node}
    assert ("QuantizeLinear" in names) == static and ("static" if static else "dynamic, without data") in result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines() if line.startswith(("original", "pruned", "int8"))] == [
        "original", "pruned", "int8",
    ]  # fmt: skip


def test_ort_file_runs_and_all_else_is_the_same_each_time(model: Path, data: Path, tmp_path: Path) -> None:
    output, target = tmp_path / "small.onnx", tmp_path / "small.ort"
    handlers = list(logging.getLogger().handlers)
    assert prune(model, output, "--data", data, "--save-ort", target).exit_code == 0
    session = ort.InferenceSession(target.read_bytes(), providers=["CPUExecutionProvider"])
    feeds = {"x": images(4)}
    assert relative(session.run(None, feeds)[0], run_model(output, feeds)[0]) < 1e-5
    listed = (tmp_path / "small.required_operators_and_types.config").read_text()
    assert "Gemm" in listed and str(tmp_path) not in listed and "#" not in listed
    first = files_in(tmp_path)
    assert prune(model, output, "--data", data, "--save-ort", target).exit_code == 0
    second = files_in(tmp_path)
    assert len(first.pop("small.ort")) == len(second.pop("small.ort"))  # onnxruntime orders its tables by chance
    assert second == first
    assert logging.getLogger().handlers == handlers


def test_all_steps_in_order(model: Path, data: Path, tmp_path: Path) -> None:
    analysis = sfp_onnx.inspect(model)
    loaded = sfp_onnx.data_for(analysis.model, data)
    chosen = OutputOptions(half=True, quantize="int8", save_ort="model.ort")
    done = package(analysis, analysis.model, chosen, loaded)
    assert [step.name for step in done.steps] == ["original", "pruned", "half", "int8", "ort"]
    assert done.steps[1].relative_error == 0 and done.steps[1].agreement == 1
    assert 0 < (done.steps[2].relative_error or 0) < 1e-2 < 0.2 and done.steps[3].bytes < done.steps[2].bytes < done.steps[1].bytes
    assert done.ort and done.ort.data


def test_steps_are_compared_with_the_pruned_model(model: Path, data: Path) -> None:
    analysis = sfp_onnx.inspect(model)
    pruned = sfp_onnx.prune(model, sfp_onnx.PlanOptions(ratio=0.25), repair=None).model
    steps = package(analysis, pruned, OutputOptions(half=True), sfp_onnx.data_for(analysis.model, data)).steps
    assert steps[1].relative_error == 0 and (steps[2].relative_error or 0) < 0.01 < (steps[0].relative_error or 0)


def test_a_bad_step_writes_nothing(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, target = tmp_path / "small.onnx", tmp_path / "small.ort"
    monkeypatch.setitem(TOLERANCES, "half", 1e-9)
    result = prune(model, output, "--data", data, "--half", "--save-ort", target)
    assert result.exit_code == 3 and "step 'half'" in result.stderr and not output.exists() and not target.exists()
    assert prune(model, output, "--save-ort", output).exit_code == 4 and not output.exists()
