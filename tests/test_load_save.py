"""Every kind of ONNX file comes in, and goes out as what it was, but smaller."""

from __future__ import annotations

import hashlib
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from building import NEWEST
from conftest import (
    CLASSES,
    IMAGE,
    classifier,
    classifier_nodes,
    external,
    files_in,
    images,
    masked_reference,
    model_of,
    relative,
    run_model,
    sizes,
    weights_of,
)
from onnx import TensorProto, helper, numpy_helper

import sfp_onnx
from sfp_onnx import graph, runtime
from sfp_onnx.core.errors import ModelError, OutputError
from sfp_onnx.core.options import PlanOptions
from sfp_onnx.report.manifest import Pruned

saving = importlib.import_module("sfp_onnx.graph.save")
loading = importlib.import_module("sfp_onnx.graph.load")
HALF = PlanOptions(ratio=0.5)


def cuts_of(result: Pruned) -> list[dict[str, Any]]:
    """Cuts as the manifest gives them."""
    return [
        {"tensor": cut.tensor, "axis": cut.axis, "size": cut.size, "rank": cut.rank, "removed": list(cut.removed)} for cut in result.cuts
    ]


def proven(model: onnx.ModelProto, result: Pruned, feeds: dict[str, np.ndarray], limit: float = 1e-4) -> onnx.ModelProto:
    """Check the result against a masked reference that is built here, and onnx's full check; returns it."""
    proto = result.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    reference = masked_reference(model, cuts_of(result))
    for own, expected in zip(run_model(proto, feeds), run_model(reference, feeds), strict=True):
        assert relative(own, expected) <= limit
    return proto


def interface(model: onnx.ModelProto) -> list[Any]:
    """All that a caller of the model relies on."""
    held = {tensor.name for tensor in model.graph.initializer}
    ports = [item for item in model.graph.input if item.name not in held]
    return [
        [item.SerializeToString() for item in ports], [item.SerializeToString() for item in model.graph.output], model.ir_version,
        [(item.domain, item.version) for item in model.opset_import],
    ]  # fmt: skip


# ---- forms that weights and nodes come in ----------------------------------------------------------------------------


def as_inputs(ir: int) -> onnx.ModelProto:
    """Initializers that are graph inputs too, as old exporters wrote them."""
    model = classifier(ir=ir, opset=8 if ir == 3 else 17)
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return model


def as_constants(ir: int = 8) -> onnx.ModelProto:
    """All weights in Constant nodes."""
    model = classifier(ir=ir, opset=8 if ir == 3 else 17)
    nodes = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in model.graph.initializer]
    nodes += list(model.graph.node)
    del model.graph.initializer[:]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def unnamed() -> onnx.ModelProto:
    model = classifier()
    for node in model.graph.node:
        node.name = ""
    return model


def same_names() -> onnx.ModelProto:
    model = classifier()
    for node in model.graph.node:
        node.name = "node"
    return model


def misleading_names() -> onnx.ModelProto:
    """A node has the name that an unnamed one would be given."""
    model = classifier()
    model.graph.node[3].name = "Conv_0"
    model.graph.node[0].name = ""
    return model


def functions() -> onnx.ModelProto:
    """conv-relu as a local function, called for the second conv."""
    nodes = [helper.make_node("Conv", ["X", "W", "B"], ["C"], "inner", pads=[1] * 4), helper.make_node("Relu", ["C"], ["Y"], "inner_relu")]
    function = helper.make_function("own", "ConvRelu", ["X", "W", "B"], ["Y"], nodes, [helper.make_opsetid("", 17)])
    whole = classifier_nodes()
    call = helper.make_node("ConvRelu", ["r1", "w2", "b2"], ["r2"], "call", domain="own")
    graph = helper.make_graph(
        whole[:3] + [call] + whole[5:], "net", classifier().graph.input, classifier().graph.output, classifier().graph.initializer
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=8)


FORMS: dict[str, Callable[[], onnx.ModelProto]] = {
    "plain": classifier,
    "inputs, IR 3": lambda: as_inputs(3),
    "inputs, IR 4": lambda: as_inputs(4),
    "inputs, IR 8": lambda: as_inputs(8),
    "constants": as_constants,
    "constants, IR 3": lambda: as_constants(3),
    "unnamed": unnamed,
    "same names": same_names,
    "misleading names": misleading_names,
    "fixed batch": lambda: classifier(batch=2),
}


@pytest.mark.parametrize("build", FORMS.values(), ids=FORMS)
def test_forms(build: Callable[[], onnx.ModelProto]) -> None:
    model = build()
    before = model.SerializeToString()
    result = sfp_onnx.prune(model, HALF)
    assert model.SerializeToString() == before
    assert [group.width for group in result.plan.groups] == [8, 12]
    for node in model.graph.node:
        node.name = ""  # onnxruntime refuses names that occur twice
    smaller = proven(model, result, {"x": images(2)})
    shapes = [sizes(smaller)[name] for name in ("w1", "b1", "gamma", "w2", "b2", "w3", "b3")]
    assert shapes == [(4, 3, 3, 3), (4,), (4,), (6, 4, 3, 3), (6,), (CLASSES, 6), (CLASSES,)]
    assert interface(smaller) == interface(model)


def test_functions_are_inlined() -> None:
    model = functions()
    result = sfp_onnx.prune(model, HALF)
    smaller = result.to_proto()
    assert not smaller.functions and {node.op_type for node in smaller.graph.node} >= {"Conv", "Relu"}
    assert sizes(smaller)["w2"] == (6, 4, 3, 3)
    inlined = onnx.inliner.inline_local_functions(model)
    proven(inlined, result, {"x": images(2)})


@pytest.mark.parametrize("opset", sorted({*range(7, 23), NEWEST}))
def test_opsets(opset: int) -> None:
    model = classifier(opset=opset, ir=3 if opset < 9 else 8)
    if opset < 9:
        for tensor in model.graph.initializer:
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    data = sfp_onnx.data_for(sfp_onnx.load(model), images(6))
    for score in ("magnitude", "contribution", "apoz"):
        result = sfp_onnx.prune(model, HALF, score, data, repair=None)
        smaller = proven(model, result, {"x": images(2)})
        assert interface(smaller) == interface(model)
        assert sizes(smaller)["w2"] == (6, 4, 3, 3)


def test_float16() -> None:
    model = classifier(dtype=np.float16)
    result = sfp_onnx.prune(model, HALF)
    smaller = result.to_proto()
    onnx.checker.check_model(smaller, full_check=True)
    own, original = (run_model(proto, {"x": images(2).astype(np.float16)})[0] for proto in (smaller, model))
    assert own.dtype == original.dtype == np.float16 and own.shape == original.shape
    assert {tensor.data_type for tensor in smaller.graph.initializer} == {TensorProto.FLOAT16}
    assert sizes(smaller)["w2"] == (6, 4, 3, 3)
    assert result.verification is not None and result.verification.tolerance == 2e-2


def perceptron(dtype: Any) -> onnx.ModelProto:
    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["r"], "relu"),
        helper.make_node("Gemm", ["r", "w2"], ["y"], "second", transB=1),
    ]
    shapes = {"w1": (6, 32), "b1": (32,), "w2": (4, 32)}
    held = {name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    return model_of(nodes, [("x", dtype, ["N", 6])], [("y", dtype, ["N", 4])], held)


def test_float64() -> None:
    model = perceptron(np.float64)
    result = sfp_onnx.prune(model, HALF)
    feeds = {"x": np.random.default_rng(1).standard_normal((3, 6))}
    smaller = result.to_proto()
    assert {tensor.data_type for tensor in smaller.graph.initializer} == {TensorProto.DOUBLE}
    assert sizes(smaller) == {"w1": (6, 16), "b1": (16,), "w2": (4, 16)}
    gone = list(result.cuts[0].removed)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    hidden = np.maximum(feeds["x"] @ weights["w1"] + weights["b1"], 0)
    hidden[:, gone] = 0
    np.testing.assert_allclose(run_model(smaller, feeds)[0], hidden @ weights["w2"].T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("attribute", [{"value_float": 2.0}, {"value_floats": [2.0]}, {"value_int": 3}, {"value_ints": [0, -1]}])
def test_constant_attributes(attribute: dict[str, Any]) -> None:
    """Constant nodes of every numeric kind become what they meant."""
    (name,) = attribute
    nodes = classifier_nodes()
    constant = helper.make_node("Constant", [], ["k"], "k", **attribute)
    if name.startswith("value_float"):
        extra = [helper.make_node("Mul", ["r2", "k"], ["m"], "scale"), helper.make_node("GlobalAveragePool", ["m"], ["p"], "pool")]
        nodes[5:6] = extra
    elif name == "value_ints":
        nodes[6] = helper.make_node("Reshape", ["p", "k"], ["f"], "flatten")
    else:
        cast = helper.make_node("Cast", ["k"], ["kf"], "cast", to=1)
        nodes[5:6] = [
            cast,
            helper.make_node("Mul", ["r2", "kf"], ["m"], "scale"),
            helper.make_node("GlobalAveragePool", ["m"], ["p"], "pool"),
        ]
    model = model_of([constant, *nodes], [("x", np.float32, ["N", *IMAGE])], [("logits", np.float32, ["N", CLASSES])], weights_of())
    result = sfp_onnx.prune(model, HALF)
    assert sizes(proven(model, result, {"x": images(2)}))["w3"] == (CLASSES, 6)


# ---- shared initializers ---------------------------------------------------------------------------------------------


def two_branches(tied: bool) -> onnx.ModelProto:
    """Two convs with one bias tensor; their outputs are concatenated, or added (``tied``)."""
    random = np.random.default_rng(0)
    held = {
        name: random.standard_normal(shape).astype(np.float32)
        for name, shape in {"wa": (8, 3, 3, 3), "wb": (8, 3, 3, 3), "bias": (8,)}.items()
    }
    held["wc"] = random.standard_normal((CLASSES, 8 if tied else 16)).astype(np.float32)
    join = helper.make_node("Add", ["a", "b"], ["j"], "join") if tied else helper.make_node("Concat", ["a", "b"], ["j"], "join", axis=1)
    nodes = [
        helper.make_node("Conv", ["x", "wa", "bias"], ["a"], "conv_a"),
        helper.make_node("Conv", ["x", "wb", "bias"], ["b"], "conv_b"),
        join,
        helper.make_node("Relu", ["j"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "wc"], ["logits"], "head", transB=1),
    ]
    return model_of(nodes, [("x", np.float32, ["N", *IMAGE])], [("logits", np.float32, ["N", CLASSES])], held)


@pytest.mark.parametrize("tied", [True, False])
def test_shared_bias(tied: bool) -> None:
    model = two_branches(tied)
    result = sfp_onnx.prune(model, HALF)
    smaller = proven(model, result, {"x": images(2)})
    biases = {node.name: node.input[2] for node in smaller.graph.node if node.op_type == "Conv"}
    removed = {group.group: group.remove for group in result.plan.groups}
    if tied:
        assert biases == {"conv_a": "bias", "conv_b": "bias"}
        assert sizes(smaller)["bias"] == (4,)
    else:
        assert removed["conv_a"] != removed["conv_b"]
        assert biases["conv_a"] != biases["conv_b"]
        original = numpy_helper.to_array(next(tensor for tensor in model.graph.initializer if tensor.name == "bias"))
        held = {tensor.name: numpy_helper.to_array(tensor) for tensor in smaller.graph.initializer}
        for name, tensor in biases.items():
            np.testing.assert_array_equal(held[tensor], np.delete(original, removed[name]))


def test_one_branch_cut_leaves_the_shared_bias_of_the_other() -> None:
    model = two_branches(tied=False)
    result = sfp_onnx.prune(model, PlanOptions(ratio=0.5, only="conv_a"))
    smaller = proven(model, result, {"x": images(2)})
    assert {tuple(sizes(smaller)[node.input[2]]) for node in smaller.graph.node if node.op_type == "Conv"} == {(4,), (8,)}


# ---- several inputs and outputs, and all that is not the graph -------------------------------------------------------


def two_ends() -> onnx.ModelProto:
    """Inputs b and a (in that order), outputs z and feature, with value_info for all that lies between."""
    random = np.random.default_rng(0)
    held = {"wa": (16, 3, 3, 3), "wb": (16, 2, 1, 1), "wz": (4, 16, 1, 1), "wf": (6, 16, 3, 3)}
    nodes = [
        helper.make_node("Conv", ["a", "wa"], ["ca"], "conv_a", pads=[1] * 4),
        helper.make_node("Conv", ["b", "wb"], ["cb"], "conv_b"),
        helper.make_node("Add", ["ca", "cb"], ["s"], "add"),
        helper.make_node("Conv", ["s", "wz"], ["z"], "conv_z"),
        helper.make_node("Conv", ["s", "wf"], ["feature"], "conv_f", strides=[2, 2]),
    ]
    weights = {name: random.standard_normal(shape).astype(np.float32) for name, shape in held.items()}
    model = model_of(
        nodes, [("b", np.float32, ["N", 2, "H", "W"]), ("a", np.float32, ["N", 3, "H", "W"])],
        [("z", np.float32, ["N", 4, "H", "W"]), ("feature", np.float32, ["N", 6, "h", "w"])], weights,
    )  # fmt: skip
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    model = two_ends()
    assert {item.name for item in model.graph.value_info} == {"ca", "cb", "s"}
    result = sfp_onnx.prune(model, HALF)
    feeds = {"a": np.ones((1, 3, 6, 7), np.float32), "b": np.ones((1, 2, 6, 7), np.float32)}
    smaller = proven(model, result, feeds)
    assert interface(smaller) == interface(model)
    for item, old in zip(smaller.graph.value_info, model.graph.value_info, strict=True):
        assert old.type.tensor_type.shape.dim[1].dim_value == 16
        old.type.tensor_type.shape.dim[1].dim_value = 8
        assert item == old
    path = result.save(tmp_path / "out.onnx")
    onnx.checker.check_model(str(path), full_check=True)


def described() -> onnx.ModelProto:
    model = two_ends()
    model.producer_name, model.producer_version, model.domain, model.model_version, model.doc_string = (
        "exporter",
        "1.2",
        "org.own",
        7,
        "A net.",
    )
    model.graph.doc_string, model.graph.name = "The graph.", "main"
    helper.set_model_props(model, {"author": "someone", "classes": '["a", "b"]'})
    model.graph.metadata_props.add(key="graph", value="kept")
    for index, node in enumerate(model.graph.node):
        node.doc_string = f"doc {index}"
        node.metadata_props.add(key="namespace", value=f"layer{index}")
    for item in (*model.graph.input, *model.graph.output, *model.graph.initializer, *model.graph.value_info):
        item.doc_string = f"doc of {item.name}"
    return model


def documented(model: onnx.ModelProto) -> dict[str, Any]:
    graph = model.graph
    return {
        "model": (model.producer_name, model.producer_version, model.domain, model.model_version, model.doc_string, model.ir_version),
        "props": [(own.key, own.value) for own in (*model.metadata_props, *graph.metadata_props) if not own.key.startswith("sfp_onnx.")],
        "graph": (graph.name, graph.doc_string),
        "nodes": [(node.name, node.doc_string, [(item.key, item.value) for item in node.metadata_props]) for node in graph.node],
        "tensors": {item.name: item.doc_string for item in (*graph.input, *graph.output, *graph.initializer, *graph.value_info)},
    }


@pytest.mark.parametrize("ratio", [0.0, 0.5])
@pytest.mark.parametrize("extern", [False, True])
def test_documentation_is_kept(ratio: float, extern: bool, tmp_path: Path) -> None:
    model = described()
    path = sfp_onnx.prune(model, PlanOptions(ratio=ratio)).save(tmp_path / "out.onnx", external=extern)
    assert documented(onnx.load(path)) == documented(model)


def test_an_empty_plan_returns_an_equal_model(tmp_path: Path) -> None:
    model = described()
    result = sfp_onnx.prune(model, PlanOptions(ratio=0.0))
    assert result.to_proto() == model
    assert result.cuts == () and result.notes


# ---- external data ---------------------------------------------------------------------------------------------------


def test_external_data_is_mapped_not_read(tmp_path: Path) -> None:
    path = external(classifier(widths=(16, 24)), tmp_path / "big.onnx")
    model = sfp_onnx.load(path)
    assert model.weights and all(isinstance(array, np.memmap) for array in model.weights.values())
    result = sfp_onnx.prune(path, HALF)
    smaller = proven(onnx.load(path), result, {"x": images(2)})
    assert sizes(smaller)["w2"] == (12, 8, 3, 3)


def test_small_external_shape_constants_are_seen(tmp_path: Path) -> None:
    """Exporters put every tensor in the external file, also the two numbers of a Reshape."""
    nodes = classifier_nodes()
    nodes[6] = helper.make_node("Reshape", ["p", "shape"], ["f"], "flatten")
    held = {**weights_of(), "shape": np.asarray([-1, 12], np.int64)}
    model = model_of(nodes, [("x", np.float32, ["N", *IMAGE])], [("logits", np.float32, ["N", CLASSES])], held)
    path = external(model, tmp_path / "own.onnx")
    result = sfp_onnx.prune(path, HALF)
    smaller = proven(model, result, {"x": images(2)})
    assert sizes(smaller)["w3"] == (CLASSES, 6)


def test_external_constant_nodes(tmp_path: Path) -> None:
    model = as_constants()
    blob = b""
    for node in model.graph.node:
        if node.op_type == "Constant":
            raw = node.attribute[0].t.raw_data
            onnx.external_data_helper.set_external_data(node.attribute[0].t, "weights.bin", len(blob), len(raw))
            node.attribute[0].t.ClearField("raw_data")
            blob += raw
    (tmp_path / "weights.bin").write_bytes(blob)
    path = tmp_path / "own.onnx"
    path.write_bytes(model.SerializeToString())
    loaded = sfp_onnx.load(path)
    proven(as_constants(), sfp_onnx.prune(path, HALF), {"x": images(2)})
    (tmp_path / "weights.bin").write_bytes(blob[:-4] + b"\0\0\0\1")
    assert sfp_onnx.load(path).sha256 != loaded.sha256


def broken_external(path: Path, how: str) -> str:
    """Damage the external data of a saved model; returns what the message must name."""
    data = path.with_name(f"{path.name}.data")
    if how == "missing":
        data.unlink()
        return data.name
    if how == "truncated":
        data.write_bytes(data.read_bytes()[:1000])
        return "truncated"
    model = onnx.load(path, load_external_data=False)
    values = {"outside": "../elsewhere.data", "absolute": "/dev/zero", "no location": ""}
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and how in values:
                entry.value = values[how]
            if entry.key == "offset" and how in ("negative offset", "no number"):
                entry.value = "-8" if how == "negative offset" else "eight"
            if entry.key == "length" and how == "other length":
                entry.value = "4"
    path.write_bytes(model.SerializeToString())
    return {**values, "no number": "eight", "other length": "4"}.get(how, "w1")


@pytest.mark.parametrize(
    "how", ["missing", "truncated", "outside", "absolute", "no location", "negative offset", "no number", "other length"]
)
def test_broken_external_data_is_refused(how: str, tmp_path: Path) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    (tmp_path / "elsewhere.data").write_bytes(bytes(100_000))
    path = external(classifier(), folder / "own.onnx")
    words = broken_external(path, how)
    with pytest.raises(ModelError) as caught:
        sfp_onnx.load(path)
    assert words in str(caught.value) and "own.onnx" in str(caught.value)


def test_a_proto_with_external_data_has_no_folder(tmp_path: Path) -> None:
    path = external(classifier(), tmp_path / "own.onnx")
    with pytest.raises(ModelError, match="pass the path"):
        sfp_onnx.load(onnx.load(path, load_external_data=False))


def test_external_output(tmp_path: Path) -> None:
    result = sfp_onnx.prune(classifier(widths=(16, 24)), HALF)
    single, apart = result.save(tmp_path / "single.onnx"), result.save(tmp_path / "apart.onnx", external=True)
    assert sorted(files_in(tmp_path)) == ["apart.onnx", "apart.onnx.data", "single.onnx"]
    assert apart.stat().st_size < single.stat().st_size
    onnx.checker.check_model(str(apart), full_check=True)
    held = [
        {tensor.name: numpy_helper.to_array(tensor).tobytes() for tensor in onnx.load(path).graph.initializer} for path in (apart, single)
    ]
    assert held[0] == held[1] and sum(map(len, held[0].values())) > 1024
    np.testing.assert_array_equal(run_model(apart, {"x": images(3)})[0], run_model(single, {"x": images(3)})[0])
    assert sfp_onnx.load(apart).sha256 != sfp_onnx.load(single).sha256
    again = sfp_onnx.prune(apart, HALF)
    assert again.save(tmp_path / "again.onnx").exists()


@pytest.mark.parametrize(("name", "extern"), [("own.onnx.data", False), ("weights.onnx", True)])
def test_external_data_of_the_input_are_never_overwritten(name: str, extern: bool, tmp_path: Path) -> None:
    path, location = tmp_path / "own.onnx", "weights.onnx.data" if extern else "own.onnx.data"
    onnx.save_model(classifier(), path, save_as_external_data=True, location=location, size_threshold=0)
    before = files_in(tmp_path)
    result = sfp_onnx.prune(path, HALF)
    with pytest.raises(OutputError, match="input"):
        result.save(tmp_path / name, extern)
    assert files_in(tmp_path) == before


# ---- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extern", [False, True])
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("when", ["fsync", "replace"])
def test_a_failed_write_leaves_what_was_there(
    when: str, existing: bool, extern: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.onnx"
    if existing:
        sfp_onnx.prune(classifier(seed=3), HALF).save(path, extern)
    before = files_in(tmp_path)
    result = sfp_onnx.prune(classifier(), HALF)

    def fail(*arguments: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving.os, when, fail)
    if when == "replace":
        monkeypatch.setattr(saving.os, "link", fail)
    with pytest.raises(OutputError, match="No space left"):
        result.save(path, extern)
    if when == "replace" and existing and extern:  # the last moment: rather no model than one beside the weights of another
        before.pop("out.onnx")
    assert files_in(tmp_path) == before


def test_external_save_writes_nothing_before_all_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that cannot be serialised must not have replaced the weights of the one before."""
    path = tmp_path / "out.onnx"
    sfp_onnx.prune(classifier(seed=3), HALF).save(path, external=True)
    before = files_in(tmp_path)
    result = sfp_onnx.prune(classifier(), HALF)
    synced: list[int] = []

    def fail_second(handle: int) -> None:
        synced.append(handle)
        if len(synced) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving.os, "fsync", fail_second)
    with pytest.raises(OutputError, match="No space left"):
        result.save(path, external=True)
    assert files_in(tmp_path) == before


def test_the_input_is_not_touched(model_file: Path, tmp_path: Path) -> None:
    os.utime(model_file, (1_000_000_000, 1_000_000_000))
    before = model_file.read_bytes()
    sfp_onnx.prune(model_file, HALF).save(tmp_path / "out.onnx")
    assert model_file.read_bytes() == before
    assert model_file.stat().st_mtime == 1_000_000_000


def test_output_has_usual_permissions(model_file: Path, tmp_path: Path) -> None:
    path = sfp_onnx.prune(model_file, HALF).save(tmp_path / "out.onnx")
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_link_is_replaced_not_followed(model_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    other.write_bytes(b"kept")
    link = tmp_path / "link.onnx"
    link.symlink_to(other)
    sfp_onnx.prune(model_file, HALF).save(link)
    assert other.read_bytes() == b"kept" and onnx.load(link)


# ---- the same again --------------------------------------------------------------------------------------------------


def test_hash_is_that_of_the_file(model_file: Path, tmp_path: Path) -> None:
    assert sfp_onnx.load(model_file).sha256 == hashlib.sha256(model_file.read_bytes()).hexdigest()
    proto = onnx.load(model_file)
    assert sfp_onnx.load(proto).sha256 == sfp_onnx.load(proto).sha256
    path = external(classifier(), tmp_path / "own.onnx")
    first = sfp_onnx.load(path).sha256
    data = path.with_name("own.onnx.data")
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    assert sfp_onnx.load(path).sha256 != first


SCRIPT = """
import sys, sfp_onnx
result = sfp_onnx.prune(sys.argv[1], sfp_onnx.PlanOptions(ratio=0.5))
result.save(sys.argv[2])
"""


def test_same_bytes_in_every_process(tmp_path: Path, save: Callable[..., Path]) -> None:
    source = save(two_branches(tied=False))
    found = set()
    for seed in ("0", "1"):
        path = tmp_path / f"out{seed}.onnx"
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", SCRIPT, str(source), str(path)], check=True, env=environment)
        found.add(path.read_bytes())
    result = sfp_onnx.prune(source, HALF)
    found.add(result.save(tmp_path / "here.onnx").read_bytes())
    assert len(found) == 1


def test_damaged_files_are_model_errors(model_file: Path, tmp_path: Path) -> None:
    """Whatever byte is wrong: the file is refused with a ModelError, or it is a model that onnxruntime takes."""
    good = model_file.read_bytes()
    random = np.random.default_rng(0)
    path = tmp_path / "damaged.onnx"
    refused = 0
    for _ in range(60):
        data = bytearray(good)
        start = int(random.integers(len(data)))
        data[start : start + 4] = random.integers(0, 256, len(data[start : start + 4])).astype(np.uint8).tobytes()
        path.write_bytes(data)
        try:
            sfp_onnx.inspect(path)
        except ModelError as error:
            assert "damaged.onnx" in str(error)
            refused += 1
    assert refused


def test_truncated_at_any_byte(model_file: Path, tmp_path: Path) -> None:
    good = model_file.read_bytes()
    path = tmp_path / "short.onnx"
    for end in [*range(0, len(good) - 1, 97), *range(len(good) - 12, len(good))]:
        path.write_bytes(good[:end])
        with pytest.raises(ModelError, match=r"short\.onnx"):
            sfp_onnx.load(path)


def test_large_weights_are_neither_parsed_nor_copied_as_a_whole(tmp_path: Path) -> None:
    """Whatever their type, they are read from where they stand, and the file that is written is the one that protobuf would write."""
    kinds = [np.float32, np.float16, np.int8, np.int64]
    arrays = [np.arange(4096).reshape(64, 64).astype(kind) for kind in kinds]
    held = [numpy_helper.from_array(array, f"w{index}") for index, array in enumerate(arrays)]
    held[0].doc_string = "words"
    inner = helper.make_node("MatMul", ["x", "w0"], ["y"])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 64]) for name in "xy")
    uses = [helper.make_node("Identity", [f"w{index}"], [f"y{index}"]) for index in range(1, 4)]
    ends = [helper.make_tensor_value_info(f"y{index}", held[index].data_type, [64, 64]) for index in range(1, 4)]
    proto = helper.make_model(helper.make_graph([inner, *uses], "g", [x], [y, *ends], held), opset_imports=[helper.make_opsetid("", 17)])
    onnx.save(proto, tmp_path / "a.onnx")
    model = loading.load(tmp_path / "a.onnx")
    assert model.proto.ByteSize() < 2500 and [*model.weights] == ["w0", "w1", "w2", "w3"]
    for array, weight in zip(arrays, model.weights.values(), strict=True):
        assert weight.dtype == array.dtype and np.array_equal(weight, array) and weight.flags.aligned
    saving.save(model, tmp_path / "b.onnx")
    assert (tmp_path / "b.onnx").read_bytes() == saving.to_proto(model).SerializeToString(deterministic=True)
    again = onnx.load(tmp_path / "b.onnx")
    assert again.graph.initializer[0] == held[0]


def test_a_damaged_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    data = (tmp_path / "whole.onnx").with_suffix("")
    held = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 64]) for name in "xy")
    proto = helper.make_model(helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [held]))
    whole = proto.SerializeToString()
    for end in (*range(1, len(whole) - 1, 97), len(whole) - 1):
        data.write_bytes(whole[:end])
        with pytest.raises(ModelError):
                loading.load(data)


def test_weights_that_are_handed_over_in_another_order_stay_where_they_lie() -> None:
    """Onnxruntime reads them in C order, from a copy that must live as long as the session."""
    weight = np.random.default_rng(0).standard_normal((200, 300)).astype(np.float32).T
    x = np.random.default_rng(1).standard_normal((4, 300)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    shapes = {"x": [4, 300], "y": [4, 200]}
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    weights: dict[str, np.ndarray] = {}
    held = [graph.make_initializer("w", weight, weights)]
    made = helper.make_graph(nodes, "g", ports[:1], ports[1:], held)
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = runtime.open_model(graph.Model(proto, weights, ""))
    junk = [np.full((300, 200), np.nan, np.float32) for _ in range(8)]
    np.testing.assert_allclose(session.run({"x": x})[0], x @ weight, rtol=1e-4, atol=1e-4)
    assert len(junk) == 8
