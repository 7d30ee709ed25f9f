"""Groups that may leave altogether: the branch beside a residual becomes a constant, exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import invoke, masked_reference, model_of, relative, run_model
from onnx import helper

import sfp_onnx
from sfp_onnx.core.errors import PlanError
from sfp_onnx.core.options import PlanOptions
from sfp_onnx.planning.figures import node_terms

RANDOM = np.random.default_rng(0)


def weight(*shape: int) -> np.ndarray:
    return (RANDOM.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def residual(second: str = "", tail: str = "Add", width: int = 8) -> onnx.ModelProto:
    """stem, then x + conv2(relu(conv1(x))) with a BatchNormalization behind conv2, relu, and a head. ``second`` names the tensor that is
    added (default: the stem's), ``tail`` the operator."""
    b = {name: weight(width) for name in ("b0", "b1", "b2", "gamma", "beta", "mean")}
    constants = {
        "w0": weight(width, 3, 3, 3), "w1": weight(width, width, 3, 3), "w2": weight(width, width, 3, 3),
        "var": np.abs(weight(width)) + 1, "wh": weight(5, width), **b,
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["s"], "stem", pads=[1] * 4),
        helper.make_node("Relu", ["s"], ["r0"]),
        helper.make_node("Conv", ["r0", "w1", "b1"], ["c1"], "conv1", pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], "conv2", pads=[1] * 4),
        helper.make_node("BatchNormalization", ["c2", "gamma", "beta", "mean", "var"], ["n2"], "bn2"),
        helper.make_node(tail, [second or "r0", "n2"], ["a"], "add"),
        helper.make_node("Relu", ["a"], ["r2"]),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "wh"], ["y"], "head", transB=1),
    ]
    return model_of(nodes, [("x", np.float32, ["N", 3, "H", "W"])], [("y", np.float32, ["N", 5])], constants)


def without(analysis: sfp_onnx.Analysis, name: str, others: float = 0.0) -> sfp_onnx.Plan:
    """A plan that removes the whole group of a name, and a share of the others."""
    plan = sfp_onnx.plan(analysis, PlanOptions(ratio=others))
    groups = tuple(replace(own, remove=tuple(range(own.width))) if own.group == name else own for own in plan.groups)
    return replace(plan, groups=groups)


def test_a_branch_vanishes_in_front_of_an_argmax() -> None:
    """Class numbers are right if what they are made from is: the constant of the branch, which is smaller, among it."""
    model = residual()
    head = model.graph.node[-1]
    head.output[0] = "scores"
    model.graph.node.append(helper.make_node("ArgMax", ["scores"], ["y"], axis=1, keepdims=0))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", onnx.TensorProto.INT64, ["N"]))
    analysis = sfp_onnx.inspect(model)
    result = sfp_onnx.apply(analysis, without(analysis, "conv1"))
    assert result.verification is not None and "conv2" not in {node.name for node in result.to_proto().graph.node}


@pytest.mark.parametrize("others", [0.0, 0.5])
@pytest.mark.parametrize("tail", ["Add", "Mul", "Sub"])
def test_a_branch_vanishes_exactly(tail: str, others: float, tmp_path: Path) -> None:
    model = residual(tail=tail)
    analysis = sfp_onnx.inspect(model)
    assert set(analysis.coupling.branches) == {"conv1"}
    result = sfp_onnx.apply(analysis, without(analysis, "conv1", others))
    proto = result.to_proto()
    assert [node.name for node in proto.graph.node if node.op_type == "Conv"] == ["stem"]
    cuts = [
        {"tensor": cut.tensor, "axis": cut.axis, "size": cut.size, "rank": cut.rank, "removed": list(cut.removed)} for cut in result.cuts
    ]
    for shape in ((2, 3, 8, 8), (1, 3, 5, 11)):
        feeds = {"x": RANDOM.standard_normal(shape).astype(np.float32)}
        assert relative(run_model(proto, feeds)[0], run_model(masked_reference(model, cuts), feeds)[0]) < 1e-5
    assert result.plan.after.params == sum(int(np.prod(tensor.dims)) for tensor in proto.graph.initializer)
    constant = [tensor for tensor in proto.graph.initializer if list(tensor.dims) == [1, 8 - int(8 * others), 1, 1]]
    assert len(constant) == 1


def test_two_constants_must_not_meet() -> None:
    # both operands of the Add come from branches that could vanish: only one of them may
    constants = {"w0": weight(8, 3, 1, 1), "wh": weight(5, 8)}
    nodes = [helper.make_node("Conv", ["x", "w0"], ["s"], "stem")]
    for own in "ab":
        constants |= {f"w{own}1": weight(8, 8, 1, 1), f"w{own}2": weight(8, 8, 1, 1), f"b{own}": weight(8)}
        nodes += [
            helper.make_node("Conv", ["s", f"w{own}1"], [f"{own}1"], f"first_{own}"),
            helper.make_node("Conv", [f"{own}1", f"w{own}2", f"b{own}"], [f"{own}2"], f"second_{own}"),
        ]
    nodes += [
        helper.make_node("Add", ["a2", "b2"], ["sum"]), helper.make_node("GlobalAveragePool", ["sum"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]), helper.make_node("Gemm", ["f", "wh"], ["y"], "head", transB=1),
    ]  # fmt: skip
    model = model_of(nodes, [("x", np.float32, [1, 3, 4, 4])], [("y", np.float32, [1, 5])], constants)
    analysis = sfp_onnx.inspect(model)
    assert set(analysis.coupling.branches) == {"first_a"}
    sfp_onnx.apply(analysis, without(analysis, "first_a"))


@pytest.mark.parametrize("second", ["n2", "c2"])
def test_a_branch_that_meets_only_itself_stays(second: str) -> None:
    assert not sfp_onnx.inspect(residual(second=second)).coupling.branches


def test_a_chain_cannot_lose_a_layer(model_file: Path) -> None:
    analysis = sfp_onnx.inspect(model_file)
    assert not analysis.coupling.branches
    with pytest.raises(PlanError, match="removes all 8 channels"):
        sfp_onnx.apply(analysis, without(analysis, "conv1"))


def test_no_time_is_predicted_for_what_vanished() -> None:
    analysis = sfp_onnx.inspect(residual())
    terms = node_terms(analysis.coupling, analysis.prepared.nodes, analysis.prepared.trace)
    kept = np.asarray([0 if group.name == "conv1" else group.width for group in analysis.coupling.groups])
    work = terms.per_owner(terms.lengths(kept), len(analysis.prepared.nodes))
    names = [node.name for node in analysis.prepared.nodes]
    for name in ("conv1", "conv2"):
        assert work[names.index(name)][2:].tolist() == [0.0, 0.0]  # neither multiplications nor runs
    assert work[names.index("stem")][3] == 1


def test_the_solver_may_take_a_branch_and_min_channels_forbids_it(save: Callable[..., Path], tmp_path: Path) -> None:
    path, out = save(residual(width=16)), tmp_path / "out.onnx"
    options = ["--target", "macs=12%", "--allocation", "solve", "--align", "16"]
    assert invoke("prune", path, "-o", out, *options).exit_code == 0
    assert len([node for node in onnx.load(out).graph.node if node.op_type == "Conv"]) == 1
    refused = invoke("prune", path, "-o", tmp_path / "no.onnx", *options, "--min-channels", "2")
    assert refused.exit_code == 3 and "best reachable" in refused.stderr
