"""What a file holds reaches onnxruntime, whatever reads it and of whatever type it is; what a model declares is believed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import external, invoke, run_model, sizes
from onnx import TensorProto, helper, numpy_helper

import sfp_onnx
from sfp_onnx import graph, runtime
from sfp_onnx.coupling.trace import prepare
from sfp_onnx.graph.edit import Editor
from sfp_onnx.graph.load import load

RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return (RANDOM.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def case(name: str) -> Path:
    """A small model of the shared folder."""
    path = Path(__file__).resolve().parents[2] / "shared" / "cases" / f"{name}.onnx"
    if not path.is_file():
        pytest.skip("the folder ../shared with models is not here")
    return path


def body(nodes: list[onnx.NodeProto], inputs: list[Any], outputs: list[str], name: str = "body") -> onnx.GraphProto:
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    return helper.make_graph(nodes, name, inputs, made)


def model(nodes: list[onnx.NodeProto], constants: dict[str, Any], inputs: dict[str, Any] | None = None, **options: Any) -> onnx.ModelProto:
    """x (N, 16) -> the nodes, which end in ``h`` (N, 16) -> Gemm 16 -> 32 -> Relu -> Gemm 32 -> 5 -> y."""
    arrays = {**constants, "w1": normal(32, 16), "b1": normal(32), "w2": normal(5, 32)}
    tail = [
        helper.make_node("Gemm", ["h", "w1", "b1"], ["g"], "first", transB=1), helper.make_node("Relu", ["g"], ["r"], "relu"),
        helper.make_node("Gemm", ["r", "w2"], ["y"], "last", transB=1),
    ]  # fmt: skip
    tensors = [item if isinstance(item, onnx.TensorProto) else numpy_helper.from_array(item, name) for name, item in arrays.items()]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (inputs or {"x": ["N", 16]}).items()]
    ends = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    functions, opset = options.pop("functions", []), options.pop("opset", 21)
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in options.pop("domains", ()))]
    made = helper.make_graph([*nodes, *tail], "g", ports, ends, tensors)
    return helper.make_model(made, opset_imports=imports, ir_version=options.pop("ir", 10), functions=functions)


def pruned(source: onnx.ModelProto | Path, **options: Any) -> onnx.ModelProto:
    """Half of the channels gone, and proved."""
    result = sfp_onnx.prune(source, sfp_onnx.PlanOptions(ratio=0.5, align="none"), **options)
    assert result.verification is not None
    return sfp_onnx.graph.save.to_proto(result.model)


# ---- weights that something else than a node of the main graph reads -------------------------------------------------

WEIGHT = normal(16, 32)  # 2 KiB


def branches(inner: str = "w") -> list[onnx.NodeProto]:
    """If the sum of x is positive: x @ W @ V, else x @ W @ V + 1."""
    product = [helper.make_node("MatMul", ["x", inner], ["p"]), helper.make_node("MatMul", ["p", "v"], ["q"])]
    plus = [helper.make_node("Add", ["q", "one"], ["q1"])]
    return [
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0), helper.make_node("Greater", ["s", "zero"], ["k"]),
        helper.make_node("If", ["k"], ["h"], "choice", then_branch=body(product, [], ["q"]), else_branch=body(product + plus, [], ["q1"])),
    ]  # fmt: skip


CONSTANTS = {"w": WEIGHT, "v": normal(32, 16), "zero": np.float32(0), "one": np.float32(1)}


def nested() -> onnx.ModelProto:
    *front, choice = branches()
    one, other = (attribute.g for attribute in choice.attribute)
    inner = body([helper.make_node("If", ["k"], ["deep"], then_branch=one, else_branch=other)], [], ["deep"])
    return model([*front, helper.make_node("If", ["k"], ["h"], then_branch=inner, else_branch=one)], CONSTANTS)


def looped() -> onnx.ModelProto:
    state = [helper.make_tensor_value_info(*item) for item in (("i", 7, []), ("c", 9, []), ("a", 1, [None, 16]))]
    step = [helper.make_node("MatMul", ["a", "w"], ["p"]), helper.make_node("MatMul", ["p", "v"], ["a1"])]
    inner = body([helper.make_node("Identity", ["c"], ["c1"]), *step], state, ["a1"])
    inner.output.insert(0, helper.make_tensor_value_info("c1", TensorProto.BOOL, []))
    return model([helper.make_node("Loop", ["times", "", "x"], ["h"], "loop", body=inner)], {**CONSTANTS, "times": np.int64(3)})


def scanned() -> onnx.ModelProto:
    step = [helper.make_node("MatMul", ["row", "w"], ["p"]), helper.make_node("MatMul", ["p", "v"], ["out"])]
    row = helper.make_tensor_value_info("row", TensorProto.FLOAT, [16])
    return model([helper.make_node("Scan", ["x"], ["h"], "scan", num_scan_inputs=1, body=body(step, [row], ["out"]))], CONSTANTS)


def in_function() -> onnx.ModelProto:
    front = branches()
    inside = [helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(WEIGHT)), front[-1]]
    function = helper.make_function("own", "Choose", ["x", "k", "v", "one"], ["h"], inside, [helper.make_opsetid("", 21)])
    call = helper.make_node("Choose", ["x", "k", "v", "one"], ["h"], "call", domain="own")
    return model([*front[:-1], call], {key: array for key, array in CONSTANTS.items() if key != "w"}, functions=[function], domains=["own"])


def shared_with_a_node() -> onnx.ModelProto:
    both = [helper.make_node("MatMul", ["x0", "w"], ["a"]), helper.make_node("MatMul", ["a", "v"], ["x"])]
    return model([*both, *branches()], CONSTANTS, {"x0": ["N", 16]})


def long_vector() -> onnx.ModelProto:
    """A vector of sizes of more than 1 KiB."""
    parts = [f"p{number}" for number in range(160)]
    split = helper.make_node("Split", ["wide", "sizes"], parts, axis=1)
    joined = helper.make_node("Concat", parts[:16], ["h"], axis=1)
    tile = helper.make_node("Tile", ["x", "by"], ["wide"])
    return model([tile, split, joined], {"by": np.array([1, 10]), "sizes": np.ones(160, np.int64)})


READ: dict[str, Callable[[], onnx.ModelProto]] = {
    "If": lambda: model(branches(), CONSTANTS), "nested If": nested, "Loop": looped, "Scan": scanned, "function": in_function,
    "If and a node": shared_with_a_node, "vector of sizes": long_vector,
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("limit", [None, 0], ids=["from memory", "through a file"])
def test_what_anything_reads_is_handed_over(name: str, limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = READ[name]()
    if limit is not None:
        monkeypatch.setattr(runtime, "PROTOBUF_LIMIT", limit)
    result = pruned(external(original, tmp_path / "own.onnx"))
    x = {original.graph.input[0].name: normal(3, 16)}
    assert run_model(result, x)[0].shape == run_model(original, x)[0].shape
    assert sizes(result)["w1"] == (16, 16)
    assert result.ByteSize() < original.ByteSize()
    assert [inner.name for below in [*graph.graphs(result.graph)][1:] for inner in below.initializer] == []


def test_constants_that_sub_graphs_read_stand_in_the_main_graph_once() -> None:
    edited = Editor(load(model(branches(), CONSTANTS))).finish()
    assert [tensor.name for tensor in edited.proto.graph.initializer].count("w") == 1
    assert set(edited.weights) >= {"w", "v"}


# ---- weights that nothing reads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ir", [3, 10])
def test_an_unread_weight_goes(ir: int, tmp_path: Path) -> None:
    original = model([helper.make_node("Identity", ["x"], ["h"])], {"old.weight": normal(40, 27), "few": normal(3, 3)}, ir=ir, opset=13)
    if ir == 3:
        original.graph.input.extend(helper.make_tensor_value_info(item.name, 1, item.dims) for item in original.graph.initializer)
    assert set(sizes(pruned(original))) == {"w1", "b1", "w2"}
    onnx.save(original, tmp_path / "own.onnx")
    assert invoke("prune", tmp_path / "own.onnx", "-o", tmp_path / "out.onnx", "--ratio", 0.5).exit_code == 0
    assert (tmp_path / "out.onnx").stat().st_size < (tmp_path / "own.onnx").stat().st_size / 2


# ---- types that numpy does not know ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["INT4", "UINT4", "FLOAT8E4M3FN", "FLOAT8E5M2"])
@pytest.mark.parametrize("outside", [False, True], ids=["in the file", "beside it"])
def test_types_that_numpy_does_not_know(kind: str, outside: bool, tmp_path: Path) -> None:
    values = np.clip(np.rint(3 * RANDOM.standard_normal((16, 16))), 0 if kind[0] == "U" else -8, 7)
    stored = numpy_helper.from_array(values.astype(helper.tensor_dtype_to_np_dtype(getattr(TensorProto, kind))), "q")
    nodes = [
        helper.make_node("Gemm", ["x", "w0"], ["a"], "zeroth"), helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["f"]), helper.make_node("MatMul", ["b", "f"], ["h"], "coded"),
    ]  # fmt: skip
    original = model(nodes, {"q": stored, "w0": normal(16, 16), "scale": np.float32(0.1)})
    path = tmp_path / "own.onnx"
    if outside:
        external(original, path)
    else:
        onnx.save(original, path)
    result = pruned(path, data={"x": normal(64, 16)}, repair=sfp_onnx.RepairOptions(force=True))
    held = next(tensor for tensor in result.graph.initializer if tensor.name == "q")
    assert held.data_type == getattr(TensorProto, kind) and tuple(held.dims) == (8, 8)
    assert np.isfinite(run_model(result, {"x": normal(3, 16)})[0]).all()


# ---- one name, one size ----------------------------------------------------------------------------------------------


def with_state(second: list[Any], total: Any = None) -> onnx.ModelProto:
    """h = x + a row of each sample of the state, of which the batch is axis 1."""
    front = [helper.make_node("ReduceMean", ["state", "axis"], ["m"], keepdims=0), helper.make_node("Add", ["x", "m"], ["h"])]
    return model(front, {"axis": np.array([0])}, {"x": ["B", 16], "state": second})


def test_one_name_has_one_size_on_all_axes() -> None:
    prepared = prepare(load(with_state([2, "B", 16])))
    assert prepared.feeds["state"].shape[1] == len(prepared.feeds["x"])
    assert prepared.variant is not None and prepared.variant["state"].shape[1] == len(prepared.variant["x"])


def test_a_given_shape_holds_for_all_uses_of_its_names() -> None:
    assert prepare(load(with_state([2, "B", 16])), {"x": [5, 16]}).feeds["state"].shape == (2, 5, 16)
    assert prepare(load(with_state(["L", "B", 16])), {"state": [4, 3, 16]}).feeds["x"].shape == (3, 16)


def test_a_size_may_be_a_sum_of_others() -> None:
    front = [helper.make_node("Concat", ["past", "x"], ["all"], axis=0), helper.make_node("Add", ["all", "mask"], ["h"])]
    made = model(front, {}, {"x": ["now", 16], "past": ["past", 16], "mask": ["past + now", 16]})
    feeds = prepare(load(made), {"past": [7, 16]}).feeds
    assert len(feeds["mask"]) == 7 + len(feeds["x"])


def test_names_that_stand_for_different_things_are_let_go() -> None:
    front = [helper.make_node("Expand", ["x", "shape"], ["wide"]), helper.make_node("Slice", ["wide", "from", "to", "axes"], ["h"])]
    made = model(front, {"shape": np.array([2, 1]), "from": np.array([0]), "to": np.array([16]), "axes": np.array([1])}, {"x": ["?", "?"]})
    assert prepare(load(made)).feeds["x"].shape == (2, 16)


# ---- the models of others --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["B1_if_reads_outer_weight", "B2_unused_weight", "J1_symbol_on_two_axes"])
def test_models_of_others(name: str, tmp_path: Path) -> None:
    path = case(name)
    assert invoke("inspect", path).exit_code == 0
    done = invoke("prune", path, "-o", tmp_path / "out.onnx", "--ratio", 0.3)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out.onnx").stat().st_size < path.stat().st_size
