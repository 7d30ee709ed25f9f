"""What a file holds reaches onnxruntime, whatever reads it and of whatever type it is; what a model declares is believed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import classifier, external, invoke, masked_reference, run_model, sizes
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


FREE = {"If", "nested If", "function"}  # whose channels leave like all others


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("limit", [None, 0], ids=["from memory", "through a file"])
def test_what_anything_reads_is_handed_over(name: str, limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = READ[name]()
    if limit is not None:
        monkeypatch.setattr(runtime, "PROTOBUF_LIMIT", limit)
    result = pruned(external(original, tmp_path / "own.onnx"))
    x = {original.graph.input[0].name: normal(3, 16)}
    assert run_model(result, x)[0].shape == run_model(original, x)[0].shape
    assert sizes(result)["w1"] == ((16, 8) if name in FREE else (16, 16))
    assert result.ByteSize() < original.ByteSize()
    assert [inner.name for below in [*graph.graphs(result.graph)][1:] for inner in below.initializer] == []


def test_constants_that_sub_graphs_read_stand_in_the_main_graph_once() -> None:
    edited = Editor(load(model(branches(), CONSTANTS))).finish()
    assert [tensor.name for tensor in edited.proto.graph.initializer].count("w") == 1
    assert set(edited.weights) >= {"w", "v"}


def test_nodes_that_are_written_again_take_no_more_bytes() -> None:
    loaded = load(classifier())
    before, after = ({node.output[0]: node.ByteSize() for node in item.proto.graph.node} for item in (loaded, Editor(loaded).finish()))
    assert all(after[name] <= size for name, size in before.items() if name in after)


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


# ---- weights that are stored in fewer bits than they are read with ---------------------------------------------------


def stored(kind: int, turned: bool, outside: int = 96) -> onnx.ModelProto:
    """MatMul -> Relu -> MatMul, of weights that are cast, or cast and transposed."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    nodes, arrays = [], {}
    for name, shape in (("u", (16, outside)), ("v", (outside, 16))):
        arrays[f"{name}16"] = numpy_helper.from_array(normal(*(shape[::-1] if turned else shape)).astype(dtype), f"{name}16")
        nodes.append(helper.make_node("Cast", [f"{name}16"], [f"{name}c" if turned else name], to=TensorProto.FLOAT))
        if turned:
            nodes.append(helper.make_node("Transpose", [f"{name}c"], [name], perm=[1, 0]))
    return model([
        *nodes, helper.make_node("MatMul", ["x", "u"], ["a"], "one"), helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "v"], ["h"], "two"),
    ], arrays)  # fmt: skip


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("turned", [False, True], ids=["cast", "cast and transposed"])
@pytest.mark.parametrize("width", [24, 96])
def test_sixteen_bits_stay(kind: int, turned: bool, width: int, tmp_path: Path) -> None:
    original = stored(kind, turned, width)
    options = sfp_onnx.PlanOptions(ratio=0.25, align="none", only="one")
    result = sfp_onnx.prune(original, options, data={"x": normal(200, 16)}, repair=sfp_onnx.RepairOptions(force=True))
    assert result.repaired is not None
    assert {fit.layer: fit.kind for fit in result.repaired.fits}["two"] == "weights"
    path = result.save(tmp_path / "out.onnx")
    if width > 24:  # what is written of the run outweighs what leaves of so small a file
        assert path.stat().st_size < original.ByteSize()
    held = [tensor for tensor in onnx.load(path).graph.initializer if tensor.data_type == kind]
    assert sorted(tuple(tensor.dims) for tensor in held) == sorted([(16, width * 3 // 4), (width * 3 // 4, 16)])


def test_our_own_half_weights_stay_half(tmp_path: Path) -> None:
    small = tmp_path / "half.onnx"
    front = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("MatMul", ["p", "v"], ["h"])]
    first = model(front, CONSTANTS)  # half of it is so small that it stays in the protobuf
    sfp_onnx.prune(first, sfp_onnx.PlanOptions(ratio=0.1), output=sfp_onnx.OutputOptions(path=small, half=True))
    again = pruned(small)
    assert again.ByteSize() < small.stat().st_size
    assert TensorProto.FLOAT16 in {tensor.data_type for tensor in again.graph.initializer}


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


# ---- control flow that constants and declared shapes decide ----------------------------------------------------------


def choice(condition: list[onnx.NodeProto], number: int, source: str, target: str) -> list[onnx.NodeProto]:
    """Relu(source @ w) of an inner weight, or source @ v - 1; names inside are the same in every choice."""
    inner = numpy_helper.from_array(normal(16, 16), "inside")
    then = body([helper.make_node("MatMul", [source, "inside"], ["m"]), helper.make_node("Relu", ["m"], ["o"])], [], ["o"])
    then.initializer.append(inner)
    one = helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(np.float32(1)))
    other = body([helper.make_node("MatMul", [source, "u"], ["m"]), one, helper.make_node("Sub", ["m", "k"], ["o"])], [], ["o"])
    return [*condition, helper.make_node("If", [f"c{number}"], [target], f"if{number}", then_branch=then, else_branch=other)]


def size_is(axis: int, size: int, number: int, source: str = "x") -> list[onnx.NodeProto]:
    """c = whether the size of an axis is this."""
    return [
        helper.make_node("Shape", [source], [f"s{number}"]), helper.make_node("Gather", [f"s{number}", f"at{axis}"], [f"d{number}"]),
        helper.make_node("Equal", [f"d{number}", f"size{size}"], [f"c{number}"]),
    ]  # fmt: skip


SIZES = {"at0": np.int64(0), "at1": np.int64(1), "size16": np.int64(16), "size1": np.int64(1), "u": normal(16, 16)}


def test_branches_that_constants_and_declared_shapes_choose() -> None:
    first, second = choice(size_is(1, 16, 1), 1, "x", "t"), choice([], 2, "t", "h")
    original = model([*first, *second], {**SIZES, "c2": np.bool_(False)})
    result = pruned(original)
    assert "If" not in {item.op_type for item in result.graph.node}
    assert sizes(result)["u"][0] == 8 and sizes(result)["if1/inside"] == (16, 8)
    analysis = sfp_onnx.inspect(original)
    whole = sfp_onnx.graph.save.to_proto(analysis.prepared.model)
    x = {"x": normal(3, 16)}
    np.testing.assert_array_equal(run_model(whole, x)[0], run_model(original, x)[0])


def test_a_branch_in_a_branch_is_chosen_as_well() -> None:
    inner = body(choice(size_is(1, 16, 1), 1, "x", "t"), [], ["t"])
    other = body([helper.make_node("Neg", ["x"], ["n"])], [], ["n"])
    outer = helper.make_node("If", ["yes"], ["h"], "outer", then_branch=inner, else_branch=other)
    analysis = sfp_onnx.inspect(model([outer], {**SIZES, "yes": np.bool_(True)}))
    assert "If" not in {found.op for found in analysis.prepared.nodes}


def test_work_inside_a_chosen_branch_counts_in_every_command() -> None:
    """A gate compares what `evaluate` counts of the original with what `prune` wrote."""
    original = model(choice(size_is(1, 16, 1), 1, "x", "h"), SIZES)
    data = {"x": normal(24, 16)}
    result = sfp_onnx.prune(original, sfp_onnx.PlanOptions(ratio=0.5), data=data)
    before, same, after = sfp_onnx.evaluate([original, original, result.to_proto()], data, latency=False)
    assert before.size.macs == same.size.macs == result.plan.before.macs > after.size.macs == result.plan.after.macs


@pytest.mark.parametrize("size", [1, 16])
def test_a_choice_by_the_batch_stays(size: int) -> None:
    """Also by a batch of 1, or of 16, which no run may have had: the condition is computed, not what it was in the runs."""
    original = model(choice(size_is(0, size, 1), 1, "x", "h"), SIZES)
    result = sfp_onnx.prune(original, sfp_onnx.PlanOptions(ratio=0.5, align="none"))
    assert "If" in {node.op_type for node in result.to_proto().graph.node} and result.cuts
    reference = masked_reference(original, [{**vars(cut), "removed": list(cut.removed)} for cut in result.cuts])
    for batch in (1, 2, 16):
        x = {"x": normal(batch, 16)}
        np.testing.assert_allclose(run_model(result.to_proto(), x)[0], run_model(reference, x)[0], atol=1e-5)


def test_a_choice_by_the_data_stays() -> None:
    assert "If" in {node.op_type for node in pruned(model(branches(), CONSTANTS)).graph.node}


CASES = (
    "B1_if_reads_outer_weight", "B2_unused_weight", "I1_float16_storage", "J1_symbol_on_two_axes", "L1_skip_layernorm",
    "O1_if_of_static_shape",
)  # fmt: skip

# ---- the models of others --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_models_of_others(name: str, tmp_path: Path) -> None:
    path = case(name)
    assert invoke("inspect", path).exit_code == 0
    data = ["--data", path.with_suffix(".npz")] if path.with_suffix(".npz").is_file() else []
    done = invoke("prune", path, "-o", tmp_path / "out.onnx", "--ratio", 0.1, "--align", "none", *data)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out.onnx").stat().st_size < path.stat().st_size


# ---- operators that no rule describes --------------------------------------------------------------------------------


def fused() -> onnx.ModelProto:
    """What onnxruntime makes of MatMul and convolution when it optimises."""
    nodes = [
        helper.make_node("Unsqueeze", ["x", "axes"], ["a"]),
        helper.make_node("FusedConv", ["a", "k"], ["b"], "fused1", domain="com.microsoft", activation="Relu"),
        helper.make_node("FusedConv", ["b", "k2"], ["c"], "fused2", domain="com.microsoft", activation="Relu"),
        helper.make_node("Squeeze", ["c", "axes"], ["h"]),
    ]  # fmt: skip
    return model(nodes, {"axes": np.array([2]), "k": normal(12, 16, 1), "k2": normal(16, 12, 1)}, domains=["com.microsoft"])


def packed() -> onnx.ModelProto:
    """A weight of 4 bits that is packed into its operator."""
    nodes = [helper.make_node("MatMulNBits", ["x", "q", "s"], ["h"], "packed", domain="com.microsoft", K=16, N=16, bits=4, block_size=16)]
    held = {"q": RANDOM.integers(0, 255, (16, 1, 8)).astype(np.uint8), "s": np.full(16, 0.1, np.float32)}
    return model(nodes, held, domains=["com.microsoft"])


def skipped() -> onnx.ModelProto:
    """A residual and its normalisation in one, of whose result onnx knows no type."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Relu", ["p"], ["q"]),
        helper.make_node("MatMul", ["q", "v"], ["e"]), helper.make_node("Unsqueeze", ["e", "axes"], ["e1"]),
        helper.make_node("Unsqueeze", ["x", "axes"], ["x1"]),
        helper.make_node("SkipLayerNormalization", ["e1", "x1", "gamma"], ["n"], "skip", domain="com.microsoft"),
        helper.make_node("Squeeze", ["n", "axes"], ["h"]),
    ]  # fmt: skip
    more = {"w": WEIGHT, "v": normal(32, 16), "gamma": np.ones(16, np.float32), "axes": np.array([1])}
    return model(nodes, more, domains=["com.microsoft"])


def of_other_shapes() -> onnx.ModelProto:
    """One branch gives all rows, the other the first."""
    *front, chooses = branches()
    first = helper.make_node("Slice", ["q", "begin", "end"], ["q2"])
    chooses.attribute[1].g.node.append(first)
    chooses.attribute[1].g.output[0].name = "q2"
    return model([*front, chooses], {**CONSTANTS, "begin": np.array([0]), "end": np.array([1])})


UNRULED = {
    "If": (of_other_shapes, r"1 node of If holds weights and has no rule \(choice\)"),
    "Loop": (looped, r"1 node of Loop holds weights and has no rule \(loop\)"),
}


@pytest.mark.parametrize("name", UNRULED)
def test_nodes_with_weights_and_without_a_rule_are_named_and_counted(name: str, tmp_path: Path) -> None:
    make, expected = UNRULED[name]
    onnx.save(make(), tmp_path / "own.onnx")
    said = invoke("inspect", tmp_path / "own.onnx")
    assert said.exit_code == 0 and re.search(expected, said.stdout), said.stdout
    listed = json.loads(invoke("inspect", tmp_path / "own.onnx", "--json").stdout)["without_rule"]
    assert [operator.rpartition(".")[2] for operator in listed] == [name]


def test_models_of_known_operators_have_none_without_a_rule() -> None:
    for made in (model([helper.make_node("Identity", ["x"], ["h"])], {}), fused(), packed(), skipped()):
        analysis = sfp_onnx.inspect(made)
        assert analysis.coupling.unruled == {}
        assert sfp_onnx.apply(analysis, sfp_onnx.plan(analysis, sfp_onnx.PlanOptions(ratio=0.4))).verification is not None


def test_a_file_that_onnxruntime_optimised(tmp_path: Path) -> None:
    """With whatever layouts it chooses on this processor."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(classifier(batch=1).SerializeToString(), options, providers=["CPUExecutionProvider"])
    said = invoke("inspect", tmp_path / "optimised.onnx")
    assert "'extended' or below" in said.stdout + said.stderr


def test_onnxruntime_is_asked_for_types() -> None:
    half, anyway = sfp_onnx.PlanOptions(ratio=0.5), sfp_onnx.RepairOptions(force=True)
    result = sfp_onnx.prune(skipped(), half, data={"x": normal(64, 16)}, repair=anyway)
    assert result.repaired is not None and "weights" in {fit.kind for fit in result.repaired.fits}
    types = runtime.tensor_types(load(skipped()))
    assert types["n"] == np.float32


# ---- files that onnxruntime does not run -----------------------------------------------------------------------------


def foreign(op: str, domain: str) -> onnx.ModelProto:
    return model([helper.make_node(op, ["x"], ["h"], "foreign", domain=domain)], {}, domains=[domain] if domain else [])


@pytest.mark.parametrize(
    ("op", "domain", "advice"),
    [
        ("Quant", "qonnx.custom_op.general", "QONNX files.*QCDQ"), ("Quant", "onnx.brevitas", "QONNX files"),
        ("EfficientNMS_TRT", "", "TensorRT's plug-ins"), ("TRT_FP8QuantizeLinear", "trt", "TensorRT's plug-ins"),
        ("EfficientNMS_TRT", "trt.plugins", "TensorRT's plug-ins"), ("TRTBatchedNMS", "mmdeploy", "TensorRT's plug-ins"),
        ("Magic", "house.of.mine", "need their library: --custom-ops LIB"),
    ],
)  # fmt: skip
def test_what_to_do_about_foreign_files(op: str, domain: str, advice: str, tmp_path: Path) -> None:
    onnx.save(foreign(op, domain), tmp_path / "own.onnx")
    said = invoke("inspect", tmp_path / "own.onnx")
    assert said.exit_code == 4 and re.search(advice, said.stderr), said.stderr


def test_what_to_do_about_old_operator_sets(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["x", "b"], ["a"], broadcast=1, axis=1), helper.make_node("Relu", ["a"], ["y"])]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4]) for name in ("x", "b", "y")]
    del ports[1].type.tensor_type.shape.dim[0]
    tensors = [numpy_helper.from_array(np.ones(4, np.float32), "b")]
    made = helper.make_graph(nodes, "g", ports[:2], ports[2:], tensors)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 6)], ir_version=3), tmp_path / "own.onnx")
    said = invoke("inspect", tmp_path / "own.onnx")
    assert said.exit_code == 4 and re.search("operator set 6.*convert_version", said.stderr), said.stderr


# ---- libraries of custom operators -----------------------------------------------------------------------------------


def test_libraries_go_with_every_session_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(runtime, "_register", lambda options, library: seen.append(library))
    path, data = tmp_path / "own.onnx", tmp_path / "data.npz"
    onnx.save(model([helper.make_node("Identity", ["x"], ["h"])], {}), path)
    np.savez(data, x=normal(64, 16))
    libraries = ["--custom-ops", "one.so", "--custom-ops", "two.so"]
    for words in (
        ["inspect", path], ["prune", path, "-o", tmp_path / "out.onnx", "--ratio", 0.5, "--data", data, "--force"],
        ["plan", path, "-o", tmp_path / "plan.json", "--ratio", 0.5],
        ["apply", path, tmp_path / "plan.json", "-o", tmp_path / "again.onnx"],
        ["evaluate", path, tmp_path / "out.onnx", "--data", data, "--no-latency"],
    ):  # fmt: skip
        seen.clear()
        done = invoke(*words, *libraries)
        assert done.exit_code == 0, done.output
        assert len(seen) > 1 and seen == ["one.so", "two.so"] * (len(seen) // 2)


def test_a_library_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "none.so").write_text("no library")
    onnx.save(model([helper.make_node("Identity", ["x"], ["h"])], {}), tmp_path / "own.onnx")
    said = invoke("inspect", tmp_path / "own.onnx", "--custom-ops", tmp_path / "none.so")
    assert said.exit_code == 2 and "--custom-ops" in said.stderr and "RegisterCustomOps" in said.stderr
