"""What the sub-graphs of If, Loop and Scan cost: counted, named, and left as it is; but branches of If are pruned like the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import pytest
from building import FLOAT, Builder, assert_exact, assert_valid, error, masked, plan_of, random_plan, run

import sfp_onnx
from sfp_onnx.core.options import OutputOptions, PlanOptions
from sfp_onnx.coupling.cost import cuts
from sfp_onnx.graph import filled
from sfp_onnx.planning import removal_of
from sfp_onnx.report.text import inspection, inspection_text

INT64, BOOL = onnx.TensorProto.INT64, onnx.TensorProto.BOOL
STEPS, WIDTH = 7, 16


def graph(nodes: Sequence[onnx.NodeProto], inputs: Sequence[tuple[str, int]], outputs: Sequence[tuple[str, int]]) -> onnx.GraphProto:
    ports = [[oh.make_tensor_value_info(name, kind, None if kind == FLOAT else []) for name, kind in some] for some in (inputs, outputs)]
    return oh.make_graph(nodes, "body", *ports)


def step(weight: str, give: str) -> list[onnx.NodeProto]:
    """tanh of a state times a weight, to itself."""
    nodes = [oh.make_node("MatMul", ["h", weight], ["m"]), oh.make_node("Tanh", ["m"], ["t"]), oh.make_node("Identity", ["t"], [give])]
    return nodes


def looped(b: Builder, y: str, weight: str, known: bool) -> str:
    """As often as a constant says, or (unknown) as the steps that are stacked tell."""
    body = [*step(weight, "again"), oh.make_node("Identity", ["c"], ["on"]), oh.make_node("Identity", ["t"], ["row"])]
    inner = graph(body, [("i", INT64), ("c", BOOL), ("h", FLOAT)], [("on", BOOL), ("again", FLOAT), ("row", FLOAT)])
    often = b.const(STEPS, np.int64) if known else b.op("Cast", b.op("ReduceMax", b.op("Sign", b.op("Abs", y)), keepdims=0), to=INT64)
    often = often if known else b.op("Mul", often, b.const(STEPS, np.int64))
    return b.op("Loop", often, "", y, body=inner, outputs=["state", "rows"], name="loop")[0]


def scanned(b: Builder, y: str, weight: str, known: bool) -> str:
    body = [*step(weight, "again"), oh.make_node("Add", ["again", "x_t"], ["next"])]
    inner = graph(body, [("h", FLOAT), ("x_t", FLOAT)], [("next", FLOAT)])
    rows = b.const(np.ones((STEPS, 1, WIDTH)))
    return b.op("Scan", y, rows, body=inner, num_scan_inputs=1, name="loop")


def chosen(b: Builder, y: str, weight: str, known: bool) -> str:
    """The dearer of both, which here is a loop."""
    body = [*step(weight, "again"), oh.make_node("Identity", ["c"], ["on"])]
    inner = graph(body, [("i", INT64), ("c", BOOL), ("h", FLOAT)], [("on", BOOL), ("again", FLOAT)])
    often, nothing = b.const(STEPS, np.int64), oh.make_node("Abs", [y], ["small"])
    branch = graph([oh.make_node("Loop", [often, "", y], ["large"], body=inner)], [], [("large", FLOAT)])
    way = b.op("Greater", b.op("ReduceMax", y, keepdims=0), b.const(0.0))
    return b.op("If", way, then_branch=branch, else_branch=graph([nothing], [], [("small", FLOAT)]), name="loop")


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("kind", [looped, scanned, chosen])
def test_what_runs_inside_is_counted_and_stays(kind, known: bool) -> None:
    b = Builder(17, 1)
    x = b.gemm(b.input(["N", 12]), 12, WIDTH, name="first")
    y = kind(b, b.op("Relu", x), b.weight(WIDTH, WIDTH), known)
    y = b.gemm(b.op("Relu", b.gemm(y, WIDTH, 24, name="wide")), 24, 3, name="last")
    model = b.model(y, infer=False)
    analysis = sfp_onnx.inspect(model, expand="none")
    inner = STEPS * WIDTH * WIDTH
    assert analysis.size().macs == 12 * WIDTH + inner + WIDTH * 24 + 24 * 3
    assert {"wide"} == {name for group in analysis.coupling.groups for name in group.producers}
    shown = inspection(analysis, "m")
    assert shown["inside"] == {"loop": pytest.approx(inner / analysis.size().macs)}
    assert "of the MACs are inside of sub-graphs, which stay: loop" in inspection_text(shown)
    result = sfp_onnx.apply(analysis, random_plan(analysis, 0))
    assert_exact(model, result)
    assert result.plan.after.macs == sfp_onnx.inspect(result.to_proto()).size().macs


# ---- branches of If --------------------------------------------------------------------------------------------------


def branch(nodes: Sequence[onnx.NodeProto], outputs: Sequence[str], **held: np.ndarray) -> onnx.GraphProto:
    tensors = [nh.from_array(array.astype(np.float32), name) for name, array in held.items()]
    ports = [oh.make_tensor_value_info(name, FLOAT, [None] * 4) for name in outputs]
    return oh.make_graph(nodes, "branch", [], ports, tensors)


def choosing(b: Builder, x: str, then: onnx.GraphProto, other: onnx.GraphProto, outputs: int = 1, rank: int = 0) -> list[str]:
    """The first where the mean input is positive. The condition may have an axis."""
    way = b.op("Greater", b.op("ReduceMean", x, keepdims=0), b.const(np.zeros([1] * rank)))
    names = [f"chosen{at}" for at in range(outputs)]
    b.op("If", way, then_branch=then, else_branch=other, name="choice", outputs=names)
    return names


def layers(b: Builder, x: str, y: str) -> str:
    """Two convolutions with weights of the branch itself, or one with a weight from outside."""
    kernels = {"w1": b.random.standard_normal((12, 16, 3, 3)) / 9, "w2": b.random.standard_normal((8, 12, 3, 3)) / 9}
    first = [oh.make_node("Conv", [y, "w1"], ["a"], pads=[1] * 4), oh.make_node("Relu", ["a"], ["r"])]
    then = branch([*first, oh.make_node("Conv", ["r", "w2"], ["t"], pads=[1] * 4)], ["t"], **kernels)
    other = branch([oh.make_node("Conv", [y, b.weight(8, 16, 1, 1)], ["a"]), oh.make_node("Abs", ["a"], ["e"])], ["e"])
    return choosing(b, x, then, other)[0]


def captured(b: Builder, x: str, y: str) -> str:
    """What goes in is only scaled, by a condition with an axis; its convolution is outside."""
    then = branch([oh.make_node("Mul", [y, "s"], ["t"])], ["t"], s=b.random.standard_normal((16, 1, 1)))
    made = choosing(b, x, then, branch([oh.make_node("Relu", [y], ["e"])], ["e"]), rank=1)[0]
    return b.conv(made, 16, 8, name="behind")


def several(b: Builder, x: str, y: str) -> str:
    """Two outputs: one branch gives the same tensor twice, the other one from outside."""
    then = branch([oh.make_node("Neg", [y], ["t"])], ["t", "t"])
    then.node.append(oh.make_node("Identity", ["t"], ["u"]))
    then.output[1].name = "u"
    nodes = [oh.make_node("Conv", [y, "w"], ["e"], pads=[1] * 4), oh.make_node("Identity", [y], ["f"])]
    other = branch(nodes, ["e", "f"], w=b.random.standard_normal((16, 16, 3, 3)) / 9)
    left, right = choosing(b, x, then, other, 2)
    return b.conv(b.op("Concat", left, right, axis=1), 32, 8, name="behind")


def twice(b: Builder, x: str, y: str) -> str:
    """A branch that chooses again, by another condition, between a layer and what is captured two graphs up."""
    deep = branch([oh.make_node("Conv", [y, "v"], ["p"], pads=[1] * 4)], ["p"], v=b.random.standard_normal((16, 16, 3, 3)) / 9)
    plain = branch([oh.make_node("Relu", [y], ["q"])], ["q"])
    way = b.op("Less", b.op("ReduceMax", x, keepdims=0), b.const(2.5))
    nodes = [oh.make_node("If", [way], ["r"], name="again", then_branch=deep, else_branch=plain)]
    then = branch([*nodes, oh.make_node("Conv", ["r", b.weight(8, 16, 1, 1)], ["t"])], ["t"])
    return choosing(b, x, then, branch([oh.make_node("Conv", [y, b.weight(8, 16, 1, 1)], ["e"])], ["e"]))[0]


def chosen_model(kind: Callable[[Builder, str, str], str]) -> onnx.ModelProto:
    b = Builder(17, 1)
    x = b.input(["N", 3, 8, 8])
    inner = kind(b, x, b.op("Relu", b.conv(x, 3, 16, name="stem")))
    return b.model(b.conv(b.op("Relu", inner), 8, 5, name="last"), infer=False)


def inside(model: onnx.ModelProto) -> dict[str, list[str]]:
    """What either branch does, but for passing tensors on."""
    choice, = (node for node in model.graph.node if node.op_type == "If")
    return {item.name: [node.op_type for node in item.g.node if node.op_type != "Identity"] for item in choice.attribute}


WAYS = [np.random.default_rng(3).standard_normal((2, 3, 8, 8)).astype(np.float32) + shift for shift in (-1, 1)]


@pytest.mark.parametrize("kind", [layers, captured, several, twice])
def test_what_is_inside_of_branches_is_pruned_and_stays_inside(kind: Callable[[Builder, str, str], str]) -> None:
    model = chosen_model(kind)
    analysis = sfp_onnx.inspect(model)
    assert {pin.reason for pin in analysis.coupling.pinned} == {"graph output"}
    assert analysis.coupling.channels_prunable == analysis.coupling.channels_total - 5
    assert inspection(analysis, "m")["inside"] == {}
    flat = filled(analysis.prepared.base)
    for seed in range(4):
        plan = random_plan(analysis, seed)
        result = sfp_onnx.apply(analysis, plan)
        listed = cuts(analysis.coupling, analysis.prepared.trace, removal_of(plan, analysis.coupling, plan.model_sha256))
        outer = {name for node in model.graph.node for name in node.output}
        assert {cut.tensor for cut in result.cuts} == {cut.tensor for cut in listed} & outer
        proto = result.to_proto()
        assert inside(proto) == inside(model) and not any(node.op_type == "Where" for node in proto.graph.node)
        assert_valid(proto, model)
        for x in WAYS:
            expected, = run(masked(flat, listed), {"x": x})
            assert error(run(flat, {"x": x})[0], run(model, {"x": x})[0]) <= 1e-6
            assert error(run(proto, {"x": x})[0], expected) <= 1e-4
        again = sfp_onnx.inspect(proto).size()
        assert (result.plan.after.macs, result.plan.after.params) == (again.macs, again.params)
        assert result.plan.after.params < result.plan.before.params


def test_branches_with_layers_are_pruned_for_a_target_and_repaired() -> None:
    model = chosen_model(layers)
    data = np.random.default_rng(4).standard_normal((64, 3, 8, 8)).astype(np.float32)
    results = [sfp_onnx.prune(model, PlanOptions(targets=("macs=50%",)), data={"x": data}) for _ in range(2)]
    assert results[0].to_proto().SerializeToString() == results[1].to_proto().SerializeToString()
    assert results[0].plan.after.macs <= 0.5 * results[0].plan.before.macs
    assert results[0].repaired is not None and {"choice/Conv", "last"} & {fit.layer for fit in results[0].repaired.fits}


def test_dilution_leaves_branches_in_their_place() -> None:
    model = chosen_model(layers)
    diluted = sfp_onnx.dilute(sfp_onnx.inspect(model), sfp_onnx.DiluteOptions(method="magnitude", rate=0.5))
    assert inside(diluted.to_proto()) == inside(model)
    zeros = [float((nh.to_array(tensor) == 0).mean()) for tensor in diluted.to_proto().graph.initializer if tensor.name == "choice/w1"]
    assert zeros == [pytest.approx(0.5, abs=0.05)]


def test_branches_that_only_pass_a_weight_on() -> None:
    """Nothing in them depends on data."""
    b = Builder(17, 1)
    x = b.input(["N", 3, 8, 8])
    y, weight = b.conv(x, 3, 16, name="stem"), b.const(b.random.standard_normal((16, 8, 8)).astype(np.float32))
    either = (branch([oh.make_node(op, [weight], [name])], [name]) for op, name in (("Identity", "t"), ("Neg", "e")))
    made = b.op("Add", y, choosing(b, x, *either)[0])
    analysis = sfp_onnx.inspect(b.model(b.conv(made, 16, 5, name="last"), infer=False))
    assert [group.name for group in analysis.coupling.groups] == ["stem"]


@pytest.mark.parametrize("from_start", [True, False])
def test_a_branch_that_makes_no_numbers_of_data_that_do_not_take_it(from_start: bool) -> None:
    """On the sample already: it stays. Later: what it reads tells nothing, and its layers are left as they were cut."""
    b = Builder(17, 1)
    x = b.input(["N", 3, 8, 8])
    y = b.op("Relu", b.conv(x, 3, 16, name="stem"))
    nodes = [oh.make_node("Sub", ["k", y], ["s"]), oh.make_node("Log", ["s"], ["l"]), oh.make_node("Conv", ["l", "w"], ["c"], pads=[1] * 4)]
    held = {"k": np.asarray(-1.0 if from_start else 50.0), "w": b.random.standard_normal((12, 16, 3, 3)) / 9}
    nodes += [oh.make_node("Relu", ["c"], ["r"]), oh.make_node("Conv", ["r", "v"], ["e"], pads=[1] * 4)]
    other = branch(nodes, ["e"], **held, v=b.random.standard_normal((8, 12, 3, 3)) / 9)
    made = choosing(b, x, branch([oh.make_node("Conv", [y, b.weight(8, 16, 1, 1)], ["t"])], ["t"]), other)[0]
    model = b.model(b.conv(b.op("Relu", made), 8, 5, name="last"), infer=False)
    data = np.abs(np.random.default_rng(0).standard_normal((64, 3, 8, 8))).astype(np.float32)
    data[20:] *= 100
    analysis = sfp_onnx.inspect(model, data=sfp_onnx.data_for(sfp_onnx.inspect(model).model, {"x": data}))
    assert bool(analysis.coupling.groups) is not from_start
    if not from_start:
        result = sfp_onnx.prune(model, PlanOptions(targets=("macs=60%",)), data={"x": data})
        assert all(np.isfinite(nh.to_array(tensor)).all() for tensor in result.to_proto().graph.initializer)
        assert result.plan.after.macs <= 0.6 * result.plan.before.macs


def test_branches_of_other_shapes_stay_with_the_reason() -> None:
    b = Builder(17, 1)
    x = b.input(["N", 3, 8, 8])
    y = b.op("Relu", b.conv(x, 3, 16, name="stem"))
    then = branch([oh.make_node("MaxPool", [y], ["t"], kernel_shape=[2, 2])], ["t"])
    made = choosing(b, x, then, branch([oh.make_node("Relu", [y], ["e"])], ["e"]))[0]
    model = b.model(b.op("GlobalAveragePool", b.conv(made, 16, 5, name="last")), infer=False)
    analysis = sfp_onnx.inspect(model)
    assert not analysis.coupling.groups
    assert ("a sub-graph of If reads it", "choice") in {(pin.reason, pin.node) for pin in analysis.coupling.pinned}


def test_one_choice_of_other_shapes_leaves_the_others_free() -> None:
    b = Builder(17, 1)
    x = b.input(["N", 3, 8, 8])
    y = b.op("Relu", b.conv(x, 3, 16, name="stem"))
    then = branch([oh.make_node("MaxPool", [y], ["t"], kernel_shape=[2, 2])], ["t"])
    way = b.op("Greater", b.op("ReduceMean", x, keepdims=0), b.const(0.0))
    made = b.op("If", way, then_branch=then, else_branch=branch([oh.make_node("Relu", [y], ["e"])], ["e"]), name="uneven")
    inner = layers(b, x, b.op("Relu", b.conv(made, 16, 16)))
    model = b.model(b.op("GlobalAveragePool", b.conv(b.op("Relu", inner), 8, 5, name="last")), infer=False)
    analysis = sfp_onnx.inspect(model)
    assert ("a sub-graph of If reads it", "uneven") in {(pin.reason, pin.node) for pin in analysis.coupling.pinned}
    result = sfp_onnx.prune(analysis, PlanOptions(ratio=0.5))
    widths = {tensor.name: list(tensor.dims)[:2] for tensor in result.to_proto().graph.initializer}
    assert (widths["choice/w1"], widths["choice/w2"]) == ([6, 8], [4, 6])
    assert [node.name for node in result.to_proto().graph.node if node.op_type == "If"] == ["uneven", "choice"]
    assert (size := sfp_onnx.inspect(result.to_proto()).size()).params == result.plan.after.params and size.macs == result.plan.after.macs


def test_a_branch_that_fails_on_the_data_where_it_is_not_taken_stays(caplog: pytest.LogCaptureFixture) -> None:
    b = Builder(17, 1)
    x = b.input(["N", 3, 8, 8])
    y = b.op("Relu", b.conv(x, 3, 16, name="stem"))
    row, table = b.op("Cast", b.op("ReduceMax", x, keepdims=0), to=INT64), b.const(np.arange(1.0, 5.0))
    then = branch([oh.make_node("Gather", [table, row], ["g"]), oh.make_node("Mul", [y, "g"], ["t"])], ["t"])
    other = branch([oh.make_node("Abs", [y], ["e"])], ["e"])
    made = b.op("If", b.op("Less", row, b.const(4, np.int64)), then_branch=then, else_branch=other, name="choice")
    model = b.model(b.conv(b.op("Relu", b.conv(b.op("Relu", b.conv(made, 16, 16)), 16, 16)), 16, 5), infer=False)
    data = np.random.default_rng(4).standard_normal((64, 3, 8, 8)).astype(np.float32)
    data[7::8] *= 4
    assert "stem" in {name for group in sfp_onnx.inspect(model).coupling.groups for name in group.producers}
    with caplog.at_level("INFO"):
        result = sfp_onnx.prune(model, PlanOptions(targets=("params=70%",)), data={"x": data})
    assert "branches stay as they are: on the data, one fails where the other one is taken" in caplog.text
    assert "stem" not in {name for group in result.plan.groups if group.remove for name in group.producers}
    assert result.plan.after.params <= 0.7 * result.plan.before.params
    run(result.to_proto(), {"x": data[:8]})


def test_integers_beside_branches_that_read_what_is_quantised() -> None:
    """The quantiser leaves some activations out, also where a branch reads them."""
    model = chosen_model(captured)
    data = np.random.default_rng(4).standard_normal((64, 3, 8, 8)).astype(np.float32)
    output = OutputOptions(quantize="int8")
    result = sfp_onnx.prune(model, PlanOptions(ratio=0.25), data={"x": data}, output=output)
    nodes = [node.op_type for node in result.to_proto().graph.node]
    assert "If" in nodes and "QuantizeLinear" in nodes
    inner = sfp_onnx.prune(chosen_model(layers), PlanOptions(ratio=0.25), data={"x": data}, output=output)
    assert any("int8: 3 layers stay floating" in note for note in inner.notes), inner.notes
    for x in WAYS:
        assert np.isfinite(run(result.to_proto(), {"x": x})[0]).all()


def test_what_a_branch_gives_keeps_its_shape() -> None:
    """All channels of a layer inside may leave where what is left is added to, but not where it is all that the branch gives."""
    b = Builder(17, 1)
    x = b.input(["N", 3, 8, 8])
    y = b.op("Relu", b.conv(x, 3, 8, name="stem"))
    kernels = {f"w{at}": b.random.standard_normal((8, 8, 3, 3)) / 9 for at in range(4)}

    def two(reads: str, first: str, second: str) -> list[onnx.NodeProto]:
        made = [oh.make_node("Conv", [reads, first], [f"a{first}"], name=first, pads=[1] * 4)]
        made.append(oh.make_node("Relu", [f"a{first}"], [f"r{first}"]))
        return [*made, oh.make_node("Conv", [f"r{first}", second], [f"o{second}"], name=second, pads=[1] * 4)]

    bare = branch(two(y, "w0", "w1"), ["ow1"], w0=kernels["w0"], w1=kernels["w1"])
    added = branch([*two(y, "w2", "w3"), oh.make_node("Add", ["ow3", y], ["e"])], ["e"], w2=kernels["w2"], w3=kernels["w3"])
    model = b.model(b.conv(b.op("Relu", choosing(b, x, bare, added)[0]), 8, 5, name="last"), infer=False)
    analysis = sfp_onnx.inspect(model)
    names = {group.name: group.producers for group in analysis.coupling.groups}
    assert [names[name] for name in analysis.coupling.branches] == [("w2",)]
    whole = {name: range(8) for name, producers in names.items() if producers == ("w2",)}
    proto = sfp_onnx.apply(analysis, plan_of(analysis, whole)).to_proto()
    for inputs in WAYS:
        assert run(proto, {"x": inputs})[0].shape == (2, 5, 8, 8)


def test_rounds_know_what_is_inside_of_branches_by_its_name() -> None:
    model = chosen_model(layers)
    data = np.random.default_rng(4).standard_normal((64, 3, 8, 8)).astype(np.float32)
    result = sfp_onnx.prune(model, PlanOptions(targets=("macs=50%",)), data={"x": data}, steps=2)
    assert result.plan.after.macs <= 0.5 * result.plan.before.macs
    twice = [sfp_onnx.inspect(source).coupling.tensors for source in (model, result.to_proto())]
    assert set(twice[0]) == set(twice[1])


def test_an_output_with_a_projection_that_branches_give_stays_theirs() -> None:
    b = Builder(17, 1)
    x = b.input(["N", 3, 8, 8])
    model = b.model(layers(b, x, b.op("Relu", b.conv(x, 3, 16, name="stem"))), infer=False)
    result = sfp_onnx.prune(sfp_onnx.inspect(model, expand="all"), PlanOptions(ratio=0.5))
    nodes = [node.op_type for node in result.to_proto().graph.node]
    assert nodes[-2:] == ["If", "Conv"] and "Where" not in nodes and inside(result.to_proto()) == inside(model)
    for inputs in WAYS:
        assert run(result.to_proto(), {"x": inputs})[0].shape == (2, 8, 8, 8)
