"""What is printed, recorded and gated is what the written file has: counted here anew, with onnx alone."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from building import Builder
from conftest import classifier, images, invoke
from onnx import TensorProto, helper, shape_inference
from test_branches import residual

QUANTISED = {"QuantizeLinear", "DequantizeLinear", "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"}
FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16}
BYTES = {TensorProto.INT8, TensorProto.UINT8}


# ---- an independent count --------------------------------------------------------------------------------------------


def params(model: onnx.ModelProto) -> int:
    """Elements of floating initializers, and of integers that stand for such; without scales and zero points."""
    scales, biases = set(), set()
    dynamic = {node.output[1] for node in model.graph.node if node.op_type == "DynamicQuantizeLinear"}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scales.update(node.input[1:])
            biases.add(node.input[0])
        elif node.op_type in ("ConvInteger", "MatMulInteger"):
            scales.update(node.input[2:])
        elif node.op_type == "Mul" and dynamic & set(node.input):
            scales.update(node.input)
    counted = (tensor for tensor in model.graph.initializer if tensor.name not in scales)
    return sum(prod(tensor.dims) for tensor in counted if tensor.data_type in FLOATS | BYTES or tensor.name in biases)


def traced(model: onnx.ModelProto) -> tuple[list[onnx.NodeProto], dict[str, tuple[list[int], int]]]:
    """The nodes that the outputs need, and shape and element bytes of every tensor for one sample."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    for item in model.graph.input:
        for dim, size in zip(item.type.tensor_type.shape.dim, (1, 3, 8, 8), strict=False):
            if not dim.dim_value:
                dim.dim_value = size
    del model.graph.value_info[:]
    model = shape_inference.infer_shapes(model, data_prop=True)
    known = [*model.graph.input, *model.graph.value_info, *model.graph.output]
    types = {item.name: item.type.tensor_type for item in known}
    shapes = {name: ([dim.dim_value or 1 for dim in kind.shape.dim], kind.elem_type) for name, kind in types.items()}
    shapes |= {tensor.name: (list(tensor.dims), tensor.data_type) for tensor in model.graph.initializer}
    sized = {name: (shape, np.dtype(helper.tensor_dtype_to_np_dtype(kind)).itemsize) for name, (shape, kind) in shapes.items()}
    wanted, live = {item.name for item in model.graph.output}, []
    for node in reversed(model.graph.node):
        if wanted & set(node.output):
            live.insert(0, node)
            wanted.update(node.input)
    return live, sized


def macs(model: onnx.ModelProto) -> int:
    nodes, shapes = traced(model)
    total = 0
    for node in nodes:
        if node.op_type in ("Conv", "ConvInteger"):
            total += prod(shapes[node.output[0]][0]) * prod(shapes[node.input[1]][0][1:])
        elif node.op_type in ("Gemm", "MatMul", "MatMulInteger"):
            total += prod(shapes[node.output[0]][0]) * shapes[node.input[0]][0][-1]
    return total


def memory(model: onnx.ModelProto) -> int:
    """Most bytes of activations alive at once, node by node; what only constants make is none."""
    nodes, shapes = traced(model)
    fixed = {"", *(tensor.name for tensor in model.graph.initializer)}
    for node in nodes:
        if set(node.input) <= fixed:
            fixed.update(node.output)
    first = {name: step for step, node in enumerate(nodes) for name in node.output} | {item.name: 0 for item in model.graph.input}
    last = {name: step for step, node in enumerate(nodes) for name in (*node.input, *node.output)}
    last |= {item.name: len(nodes) for item in model.graph.output}
    size = {name: prod(shapes[name][0]) * shapes[name][1] for name in last if name not in fixed}
    return max(sum(each for name, each in size.items() if first[name] <= step <= last[name]) for step in range(len(nodes)))


def counts(path: Path) -> dict[str, int]:
    model = onnx.load(path)
    return {"macs": macs(model), "params": params(model), "size": path.stat().st_size, "memory": memory(model)}


# ---- models ----------------------------------------------------------------------------------------------------------


def plain() -> onnx.ModelProto:
    return classifier(widths=(32, 48))


def without_biases() -> onnx.ModelProto:
    """Convolutions and a product of matrices to which a repair adds biases: inside the layers, and behind them."""
    b = Builder()
    x = b.input(["N", 3, 8, 8])
    for wide in ((3, 32), (32, 48), (48, 32)):
        x = b.op("Relu", b.conv(x, *wide, bias=False))
    x = b.op("Flatten", b.op("GlobalAveragePool", x))
    x = b.op("Relu", b.op("MatMul", x, b.weight(32, 40, fan_in=32)))
    x = b.op("MatMul", x, b.weight(40, 10, fan_in=40))
    return finished(b, x, ["N", 10])


def dead_branch() -> onnx.ModelProto:
    """A head that no output needs, which some exporters leave behind."""
    b = Builder(seed=1)
    x = b.op("Relu", b.conv(b.input(["N", 3, 8, 8]), 3, 32))
    b.op("Relu", b.conv(x, 32, 64))
    x = b.op("Relu", b.conv(x, 32, 48))
    x = b.op("Gemm", b.op("Flatten", b.op("GlobalAveragePool", x)), b.weight(10, 48), b.weight(10), transB=1)
    return finished(b, x, ["N", 10])


def vanishing() -> onnx.ModelProto:
    return residual(width=32)


def finished(b: Builder, output: str, shape: list[Any]) -> onnx.ModelProto:
    graph = helper.make_graph(b.nodes, "net", b.inputs, [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)], b.initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", b.opset)], ir_version=8)


MODELS = {"plain": plain, "without_biases": without_biases, "dead_branch": dead_branch, "vanishing": vanishing}
PACKAGINGS = {"none": (), "fp16": ("--fp16",), "dynamic": ("--quantize", "int8"), "static": ("--quantize", "int8")}
TARGETS = {"macs": 0.5, "params": 0.5, "size": 0.4, "memory": 0.9}
SIZES = {"dynamic": 0.2, "static": 0.25}


CASES = [
    (name, what, packaging) for name in MODELS for what in TARGETS for packaging in PACKAGINGS
    if name == "plain" or what == "size" or packaging in ("none", "static")
]  # fmt: skip


@pytest.mark.parametrize(("name", "what", "packaging"), CASES)
def test_every_number_is_that_of_the_written_file(name: str, what: str, packaging: str, tmp_path: Path) -> None:
    model, data, output, record = (tmp_path / file for file in ("model.onnx", "data.npz", "out.onnx", "out.json"))
    onnx.save(MODELS[name](), model)
    np.savez(data, x=images(40))
    share = SIZES.get(packaging, TARGETS[what]) if what == "size" else TARGETS[what]
    words = (*PACKAGINGS[packaging], *(("--input-shape", "x=2,3,8,8") if packaging == "dynamic" else ("--data", data, "--repair", "bias")))
    result = invoke("prune", model, "-o", output, "--target", f"{what}={100 * share:g}%", "--manifest", record, *words)
    assert result.exit_code == 0, result.stderr
    found, before, told = counts(output), counts(model), json.loads(record.read_text())
    assert (told["after"]["macs"], told["after"]["params"], told["after"]["bytes"]) == (found["macs"], found["params"], found["size"])
    assert (told["before"]["macs"], told["before"]["params"]) == (before["macs"], before["params"])
    assert told["plan"]["figures"][what]["actual"] == found[what] <= share * before[what]
    assert f"{found[what]:,.0f}" in result.stdout
    assert told["output"]["bytes"] == found["size"]
    assert found["params"] < before["params"] or "the plan removes nothing" in result.stderr
    if what == "size" and name != "dead_branch":  # the budget is used; without a dead branch, much of it is not needed
        assert found["size"] > 0.8 * share * before["size"]
    gate = ("--no-latency", "--json", *(("--target", f"{what}={100 * share:g}%") if what != "memory" else ()))
    checked = invoke("evaluate", model, output, "--data", data, *gate)
    assert checked.exit_code == 0, checked.stderr
    sizes = [row["size"] for row in json.loads(checked.stdout)]
    assert [sizes[1][key] for key in ("macs", "params", "bytes")] == [found[key] for key in ("macs", "params", "size")]
    assert [sizes[0][key] for key in ("macs", "params", "bytes")] == [before[key] for key in ("macs", "params", "size")]


# ---- sizes that were guessed -----------------------------------------------------------------------------------------


def detector() -> onnx.ModelProto:
    """Convolutions of images of any size, behind them layers whose work does not depend on it."""
    b = Builder(seed=2)
    x = b.op("Relu", b.conv(b.input(["N", 3, "H", "W"], "images"), 3, 16))
    x = b.op("Flatten", b.op("GlobalAveragePool", b.op("Relu", b.conv(x, 16, 32))))
    x = b.op("Relu", b.op("MatMul", x, b.weight(32, 64, fan_in=32)))
    return finished(b, b.op("MatMul", x, b.weight(64, 10, fan_in=64)), ["N", 10])


def sentences() -> onnx.ModelProto:
    """Layers over tokens of any number, and one per sentence."""
    b = Builder(seed=3)
    x = b.op("Relu", b.op("MatMul", b.input(["N", "tokens", 12], "words"), b.weight(12, 32, fan_in=12)))
    x = b.op("Relu", b.op("MatMul", b.reduce("ReduceMean", x, [1], keepdims=0), b.weight(32, 48, fan_in=32)))
    return finished(b, b.op("MatMul", x, b.weight(48, 5, fan_in=48)), ["N", 5])


@pytest.mark.parametrize(("make", "name", "real"), [(detector, "images", [1, 3, 40, 24]), (sentences, "words", [1, 7, 12])])
def test_a_guessed_shape_is_said_wherever_work_is_counted(make: Any, name: str, real: list[int], tmp_path: Path) -> None:
    model, output, record = tmp_path / "model.onnx", tmp_path / "out.onnx", tmp_path / "out.json"
    onnx.save(make(), model)
    given = ("--input-shape", f"{name}={','.join(map(str, real))}")
    told = json.loads(invoke("inspect", model, "--json").stdout)["traced"][name]
    assert told["guessed"] and told["shape"] != real
    guess = " x ".join(map(str, told["shape"][1:]))
    words = f"counted for {name} of {guess}, which is a guess"
    runs = [("inspect", model), ("plan", model, "-o", tmp_path / "plan.json", "--target", "macs=50%")]
    runs.append(("prune", model, "-o", output, "--target", "macs=50%", "--manifest", record))
    for run in runs:
        result = invoke(*run)
        assert result.exit_code == 0 and words in result.stdout and f"--input-shape {name}=1," in result.stdout, result.stderr
        assert run[0] == "inspect" or f"Note: macs=50%: {words}" in result.stderr
        result = invoke(*run, *given)
        assert f"(counted for {name} of {' x '.join(map(str, real[1:]))})" in result.stdout
        assert "is a guess" not in result.stdout + result.stderr
    assert invoke(*runs[2]).exit_code == 0
    found = json.loads(record.read_text())
    assert found["options"]["traced"][name] == told and any(words in note for note in found["plan"]["notes"])
    result = invoke("prune", model, "-o", output, "--target", "params=50%")
    assert words in result.stdout and "Note: params" not in result.stderr  # no size decides what leaves


def test_real_data_and_fixed_sizes_are_no_guess(tmp_path: Path) -> None:
    model, data = tmp_path / "model.onnx", tmp_path / "data.npz"
    onnx.save(detector(), model)
    np.savez(data, images=np.random.default_rng(0).standard_normal((8, 3, 20, 28)).astype(np.float32))
    result = invoke("prune", model, "-o", tmp_path / "out.onnx", "--target", "macs=50%", "--data", data, "--repair", "none")
    assert "counted for images of 3 x 20 x 28)" in result.stdout and "is a guess" not in result.stdout + result.stderr
    onnx.save(plain(), model)
    assert "counted for" not in invoke("inspect", model).stdout and json.loads(invoke("inspect", model, "--json").stdout)["traced"] == {}
