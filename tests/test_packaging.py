"""Half precision, integers and onnxruntime's format of a pruned model."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from building import IR_VERSIONS, Builder
from conftest import CLASSES, WIDE, classifier, files_in, images, invoke, labels_of, relative, run_model
from onnx import TensorProto, helper, numpy_helper

import sfp_onnx
from sfp_onnx.core.options import OutputOptions
from sfp_onnx.export import TOLERANCES, halved, package
from sfp_onnx.export.integers import quantized
from sfp_onnx.graph.save import to_proto
from sfp_onnx.planning import max_drop


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
    result = prune(model, small, "--data", data, "--fp16")
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
    assert "fp16" in result.stdout and "measured on 80 calibration samples" in result.stderr


def test_ranges_of_all_layers_are_those_that_held_out_samples_prefer(tmp_path: Path) -> None:
    """One value in a thousand is a hundred times as large as the others: a range over all of them would leave these a few steps."""
    random = np.random.default_rng(0)
    x = random.standard_normal((256, 3, 8, 8)).astype(np.float32)
    x[:208, 0, 0, 0] *= np.where(np.arange(208) % 16, 1, 100)
    analysis = sfp_onnx.inspect(classifier(**WIDE))
    data = sfp_onnx.data_for(analysis.model, x)
    made = package(analysis, analysis.model, OutputOptions(quantize="int8"), data)
    words = next(note for note in made.notes if note.startswith("int8: static"))
    assert "taken: " in words and "taken: from least to largest" not in words
    feeds = {"x": x[208:]}
    exact, whole = run_model(classifier(**WIDE), feeds)[0], quantized(analysis.model, lambda: [{"x": x}])
    found = [np.square(run_model(to_proto(model), feeds)[0] - exact).mean() for model in (made.model, whole)]
    assert found[0] < 0.5 * found[1]


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


def test_a_form_that_is_larger_is_told_and_its_time_is_known(tmp_path: Path) -> None:
    """Of so few weights the scales and nodes of integers take more room than they save."""
    small = tmp_path / "few.onnx"
    onnx.save(classifier(widths=(2, 2)), small)
    result = prune(small, tmp_path / "out.onnx", "--quantize", "int8")
    assert result.exit_code == 0 and "leave this step out for a small file" in result.stderr, result.stderr
    assert "accuracy not measured" in result.stdout and "time and" not in result.stdout


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
    chosen = OutputOptions(fp16=True, quantize="int8", save_ort="model.ort")
    done = package(analysis, analysis.model, chosen, loaded)
    assert [step.name for step in done.steps] == ["original", "pruned", "fp16", "int8", "ort"]
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
    monkeypatch.setitem(TOLERANCES, "fp16", 1e-9)
    result = prune(model, output, "--data", data, "--half", "--save-ort", target)
    assert result.exit_code == 3 and "step 'fp16'" in result.stderr and not output.exists() and not target.exists()
    assert prune(model, output, "--save-ort", output).exit_code == 4 and not output.exists()


# ---- what the quantiser can and cannot take --------------------------------------------------------------------------


def net(b: Builder, output: str, shape: list[Any], dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """What a builder holds, with weights among the inputs where the IR version wants that."""
    ends = [helper.make_tensor_value_info(output, dtype, shape)]
    if IR_VERSIONS[b.opset] < 4:
        b.inputs += [helper.make_tensor_value_info(item.name, item.data_type, item.dims) for item in b.initializers]
    opsets = [helper.make_opsetid("", b.opset), *(helper.make_opsetid(domain, number) for domain, number in b.domains.items())]
    graph = helper.make_graph(b.nodes, "net", b.inputs, ends, b.initializers)
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSIONS[b.opset])


def pictures(opset: int) -> onnx.ModelProto:
    b = Builder(opset)
    x = b.op("Relu", b.conv(b.input(["N", 3, 8, 8]), 3, 16))
    x = b.clip(b.conv(x, 16, 24), 0.0, 6.0)
    x = b.op("Flatten", b.op("GlobalAveragePool", x))
    return net(b, b.op("Gemm", x, b.weight(CLASSES, 24), b.weight(CLASSES), transB=1), ["N", CLASSES])


def resized(opset: int) -> onnx.ModelProto:
    b = Builder(opset)
    x = b.resize(b.op("Relu", b.conv(b.input(["N", 3, 8, 8]), 3, 16)), [1, 1, 2, 2])
    x = b.reduce("ReduceMean", b.op("Relu", b.conv(b.pad(x, [0, 0, 1, 1, 0, 0, 1, 1]), 16, 24)), [2, 3], keepdims=0)
    return net(b, b.op("Softmax", b.op("MatMul", x, b.weight(24, CLASSES, fan_in=24)), axis=1), ["N", CLASSES])


def upsampling(opset: int) -> onnx.ModelProto:
    """A grouped ConvTranspose with a bias, which the static quantiser cannot take."""
    b = Builder(opset)
    x = b.op("Relu", b.conv(b.input(["N", 3, 8, 8]), 3, 32))
    x = b.op("ConvTranspose", x, b.weight(32, 12, 2, 2), b.weight(24), group=2, strides=[2, 2])
    return net(b, b.conv(b.op("Relu", x), 24, 4), ["N", 4, 16, 16])


OPSETS = [(pictures, opset) for opset in (7, 8, 9, 10, 11, 12, 17)]
OPSETS += [(make, opset) for make in (resized, upsampling) for opset in (8, 11, 17)]


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize(("make", "opset"), OPSETS)
def test_the_opset_is_raised_where_the_quantiser_needs_it(make: Any, opset: int, static: bool, data: Path, tmp_path: Path) -> None:
    model, output = tmp_path / "own.onnx", tmp_path / "small.onnx"
    onnx.save(make(opset), model)
    result = prune(model, output, *(("--data", data) if static else ()), "--quantize", "int8")
    assert result.exit_code == 0, result.stderr
    proto = onnx.load(output)
    onnx.checker.check_model(proto, full_check=True)
    assert (f"opset {opset} is raised to 13" in result.stderr) == (opset < 13)
    matrices = [tensor.data_type for tensor in proto.graph.initializer if len(tensor.dims) > 1]
    assert sum(kind in (TensorProto.INT8, TensorProto.UINT8) for kind in matrices) >= 2
    plain = tmp_path / "plain.onnx"
    prune(model, plain, *(("--data", data) if static else ()))
    assert relative(run_model(output, {"x": images(16)})[0], run_model(plain, {"x": images(16)})[0]) < 0.1
    if make is upsampling and static:
        assert "1 layers stay floating, since onnxruntime's quantiser cannot take them: ConvTranspose_2" in result.stderr


@pytest.mark.parametrize("opset", [11, 12])
def test_one_scale_per_tensor_where_the_opset_cannot_be_raised(opset: int, data: Path, tmp_path: Path) -> None:
    b = Builder(opset)
    x = b.op("Gelu", b.conv(b.input(["N", 3, 8, 8]), 3, 16), domain="com.microsoft")  # which onnx's converter does not know
    x = b.op("Flatten", b.op("GlobalAveragePool", b.op("Relu", b.conv(x, 16, 24))))
    proto = net(b, b.op("Gemm", x, b.weight(CLASSES, 24), b.weight(CLASSES), transB=1), ["N", CLASSES])
    model, output = tmp_path / "own.onnx", tmp_path / "small.onnx"
    onnx.save(proto, model)
    result = prune(model, output, "--data", data, "--quantize", "int8")
    assert result.exit_code == 0, result.stderr
    assert {node.op_type for node in onnx.load(output).graph.node} >= {"QuantizeLinear", "Gelu"}


def doubles(opset: int = 17) -> onnx.ModelProto:
    b, random = Builder(opset), np.random.default_rng(0)
    x = b.op("Relu", b.op("Gemm", b.input(["N", 12], dtype=TensorProto.DOUBLE), b.const(random.random((64, 12)), np.float64), transB=1))
    return net(b, b.op("Gemm", x, b.const(random.random((4, 64)), np.float64), transB=1), ["N", 4], TensorProto.DOUBLE)


def einsums(opset: int = 17) -> onnx.ModelProto:
    b = Builder(opset)
    x = b.op("Relu", b.op("Einsum", b.input(["N", 16]), b.weight(16, 32, fan_in=16), equation="nk,km->nm"))
    return net(b, b.op("Einsum", x, b.weight(32, 8, fan_in=32), equation="nk,km->nm"), ["N", 8])


def halves(opset: int = 17) -> onnx.ModelProto:
    proto = pictures(opset)
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for item in [*proto.graph.input, *proto.graph.output]:
        item.type.tensor_type.elem_type = TensorProto.FLOAT16
    return proto


def quantised(opset: int = 17) -> onnx.ModelProto:
    options, packed = sfp_onnx.PlanOptions(ratio=0.0), OutputOptions(quantize="int8")
    proto = sfp_onnx.prune(pictures(opset), options, data={"x": images(8)}, repair=None, output=packed).to_proto()
    assert "QuantizeLinear" in {node.op_type for node in proto.graph.node}
    return proto


REFUSED = [
    (doubles, "nothing would be quantised: the weights are float64"), (einsums, "nothing was quantised"),
    (halves, "float16 weights are quantised with --data only"), (quantised, "the model is quantised already"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "words"), REFUSED)
def test_what_cannot_be_quantised_is_refused_in_a_sentence(make: Any, words: str, tmp_path: Path) -> None:
    model, output = tmp_path / "own.onnx", tmp_path / "small.onnx"
    onnx.save(make(), model)
    result = invoke("prune", model, "-o", output, "--ratio", "0.25", "--quantize", "int8")
    assert result.exit_code in (2, 3) and words in result.stderr and not output.exists()


def test_both_names_of_half_precision_do_the_same(model: Path, tmp_path: Path) -> None:
    written = []
    for name in ("--fp16", "--half"):
        assert prune(model, tmp_path / "small.onnx", name).exit_code == 0
        written.append((tmp_path / "small.onnx").read_bytes())
    assert written[0] == written[1] and OutputOptions(half=True) == OutputOptions(fp16=True)


@pytest.mark.parametrize("tail", ["", "Softmax"])
def test_a_form_that_answers_otherwise_is_refused(tail: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, output = tmp_path / "own.onnx", tmp_path / "small.onnx"
    proto = pictures(17)
    if tail:
        proto.graph.node.append(helper.make_node("Softmax", [proto.graph.output[0].name], ["share"], axis=1))
        proto.graph.output[0].name = "share"
    onnx.save(proto, model)

    def broken(model: Any, batches: Any, **known: Any) -> Any:
        """What the quantiser makes of another model: the last weights are mirrored, and large."""
        proto = model.copied()
        for item in (item for item in proto.graph.initializer if len(item.dims) == 2):
            item.CopyFrom(numpy_helper.from_array(-5 * numpy_helper.to_array(item)[::-1], item.name))
        return quantized(replace(model, proto=proto), batches, **known)

    monkeypatch.setattr(sfp_onnx.export, "quantized", broken)
    result = prune(model, output, "--data", data, "--quantize", "int8")
    assert result.exit_code == 3 and "step 'int8': " in result.stderr and "Nothing was written" in result.stderr and not output.exists()


def test_the_packaged_model_holds_the_drop_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, output = (tmp_path / name for name in ("own.onnx", "data.npz", "small.onnx"))
    onnx.save(classifier(widths=(32, 48)), model)
    np.savez(data, x=images(400))
    asked = ("prune", model, "-o", output, "--target", "macs=80%", "--max-drop", "20%", "--data", data, "--task", "classify")
    result = invoke(*asked, "--quantize", "int8")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("agreement with the original on ") >= 2 and result.stderr.count("as packaged: agreement") == 1
    output.unlink()
    found = max_drop.Judge.drop

    def worse(self: Any, other: Any) -> Any:
        held = found(self, other)
        integer = any(node.op_type == "QuantizeLinear" for node in other.proto.graph.node)
        return replace(held, drop=0.5, bound=0.6) if integer else held

    monkeypatch.setattr(max_drop.Judge, "drop", worse)
    result = invoke(*asked, "--quantize", "int8")
    assert result.exit_code == 3 and "cannot be held by the packaged model" in result.stderr and not output.exists()


def stored_in_16_bits() -> onnx.ModelProto:
    """Weights as float16 behind a Cast, computed with as float32."""
    proto = pictures(17)
    casts = []
    for tensor in [item for item in proto.graph.initializer if len(item.dims) > 1]:
        casts.append(helper.make_node("Cast", [f"{tensor.name}/16"], [tensor.name], f"{tensor.name}/cast", to=TensorProto.FLOAT))
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), f"{tensor.name}/16"))
    for node in reversed(casts):
        proto.graph.node.insert(0, node)
    return proto


def with_a_dead_head() -> onnx.ModelProto:
    proto = pictures(17)
    weight = numpy_helper.from_array(np.ones((64, 24, 3, 3), np.float32), "dead")
    proto.graph.initializer.append(weight)
    made = next(node.output[0] for node in reversed(proto.graph.node) if node.op_type == "Clip")
    proto.graph.node.insert(len(proto.graph.node) - 2, helper.make_node("Conv", [made, "dead"], ["nowhere"], "head", pads=[1] * 4))
    return proto


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("make", [stored_in_16_bits, with_a_dead_head])
def test_all_weights_that_are_read_are_quantised(make: Any, static: bool, data: Path, tmp_path: Path) -> None:
    model, output = tmp_path / "own.onnx", tmp_path / "small.onnx"
    onnx.save(make(), model)
    run = ("prune", model, "-o", output, "--ratio", "0", "--repair", "none", "--quantize", "int8")
    result = invoke(*run, *(("--data", data) if static else ()))
    assert result.exit_code == 0 and "stay floating" not in result.stderr, result.stderr
    matrices = [tensor for tensor in onnx.load(output).graph.initializer if len(tensor.dims) > 1]
    assert len(matrices) == 3 and {tensor.data_type for tensor in matrices} <= {TensorProto.INT8, TensorProto.UINT8}


@pytest.mark.parametrize("make", [stored_in_16_bits, with_a_dead_head, pictures])
def test_the_budget_of_bytes_is_used(make: Any, data: Path, tmp_path: Path) -> None:
    model, output = tmp_path / "own.onnx", tmp_path / "small.onnx"
    onnx.save(make(17) if make is pictures else make(), model)
    assert prune(model, output, "--quantize", "int8").exit_code == 0
    bound = int(0.8 * output.stat().st_size)
    result = invoke("prune", model, "-o", output, "--target", f"size={bound}", "--quantize", "int8", "--align", "none")
    assert result.exit_code == 0, result.stderr
    assert 0.9 * bound < output.stat().st_size <= bound
