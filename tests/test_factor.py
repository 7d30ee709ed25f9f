"""Layers that become two: the graph against the original with the product in its place, plans that say so, and the repair of both."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper as nh
import pytest
from building import Builder, error, feeds_for, low_rank, run
from conftest import model_of
from onnx import helper

import sfp_onnx
from sfp_onnx import planning
from sfp_onnx.core.errors import OptionError, PlanError
from sfp_onnx.core.options import OutputOptions, PlanOptions, RepairOptions, moves
from sfp_onnx.core.types import SIDES, Factor, Plan, Spectrum
from sfp_onnx.coupling.analysis import Analysis
from sfp_onnx.cut import factor as factors
from sfp_onnx.latency import Block, DeviceProfile, profiling, to_json
from sfp_onnx.planning.figures import ruler_for
from sfp_onnx.planning.ranks import Axis
from sfp_onnx.repair import ridge, steps
from sfp_onnx.repair.linear import Normal, Samples
from sfp_onnx.report.text import plan_text

RANK = 3


def chain(opset: int = 17, rank: int = 2, **attributes: Any) -> onnx.ModelProto:
    b = Builder(opset)
    y = b.op("Relu", b.conv(b.input(["N", 3, *[9] * rank]), 3, 10, rank=rank, name="stem"))
    y = b.op("Relu", b.conv(y, 10, 12, rank=rank, name="middle", **attributes))
    return b.model(b.conv(y, 12, 5, kernel=1, rank=rank, name="last"))


def dense(opset: int = 17, transposed: bool = True) -> onnx.ModelProto:
    b = Builder(opset)
    y = b.op("Relu", b.gemm(b.input(["N", 6]), 6, 16, name="stem"))
    y = b.op("Relu", b.op("Gemm", y, b.weight(*((12, 16) if transposed else (16, 12)), fan_in=16), b.weight(12), transB=int(transposed),
                          alpha=0.5, beta=2.0, name="middle"))  # fmt: skip
    return b.model(b.gemm(y, 12, 4, name="last"))


def product(opset: int = 17) -> onnx.ModelProto:
    b = Builder(opset)
    y = b.op("Relu", b.op("MatMul", b.input(["N", 4, 6]), b.weight(6, 16, fan_in=6), name="stem"))
    y = b.op("Relu", b.op("Add", b.op("MatMul", y, b.weight(16, 12, fan_in=16), name="middle"), b.weight(12)))
    return b.model(b.op("MatMul", y, b.weight(12, 4, fan_in=12), name="last"))


MODELS: dict[str, tuple[Callable[[], onnx.ModelProto], tuple[str, ...]]] = {
    "conv": (chain, SIDES), "stride": (lambda: chain(strides=[2, 2]), SIDES),
    "dilation": (lambda: chain(dilations=[2, 2], pads=[2] * 4), SIDES),
    "same": (lambda: chain(pads=None, auto_pad="SAME_UPPER", strides=[2, 2]), SIDES), "one axis": (lambda: chain(rank=1), SIDES),
    "no bias": (lambda: chain(bias=False), SIDES), "old": (lambda: chain(9), SIDES), "gemm": (dense, SIDES[:1]),
    "old gemm": (lambda: dense(9, False), SIDES[:1]), "matmul": (product, SIDES[:1]),
}  # fmt: skip
CASES = [(name, side) for name, (_, sides) in MODELS.items() for side in sides]


def planned(analysis: Analysis, removed: int, *found: Factor) -> Plan:
    """The first channels of every group leave."""
    flags = np.zeros(analysis.coupling.units, bool)
    for group in analysis.coupling.groups:
        flags[group.units[:removed]] = True
    return planning.make_plan(analysis, flags, {}, found)


def with_product(model: onnx.ModelProto, analysis: Analysis, plan: Plan, factor: Factor) -> onnx.ModelProto:
    """The naive reference of a plan that removes nothing: the truncated product in place of the weight."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    whole = analysis.wholes[factor.layer]
    tensor = next(tensor for tensor in changed.graph.initializer if tensor.name == whole.weight)
    weight = nh.to_array(tensor).astype(np.float64)
    moved = np.moveaxis(weight, (whole.makes, whole.reads), (0, 1))  # outputs, channels, window
    matrix = moved.reshape(len(moved), -1) if factor.narrow == SIDES[0] else np.moveaxis(moved, 1, 0).reshape(moved.shape[1], -1)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    low = (left[:, : factor.rank] * values[: factor.rank]) @ right[: factor.rank]
    low = low.reshape(moved.shape) if factor.narrow == SIDES[0] else np.moveaxis(low.reshape(np.moveaxis(moved, 1, 0).shape), 0, 1)
    tensor.CopyFrom(nh.from_array(np.moveaxis(low, (0, 1), (whole.makes, whole.reads)).astype(np.float32), whole.weight))
    return changed


@pytest.mark.parametrize(("name", "side"), CASES)
def test_two_layers_equal_the_product(name: str, side: str) -> None:
    model = MODELS[name][0]()
    analysis, factor = sfp_onnx.inspect(model), Factor("middle", RANK, side)
    result = sfp_onnx.apply(model, planned(analysis, 0, factor))
    feeds, made = feeds_for(model, batch=3), result.to_proto()
    reference = with_product(model, analysis, result.plan, factor)
    for found, expected in zip(run(made, feeds), run(reference, feeds), strict=True):
        assert error(found, expected) < 1e-5
    assert error(run(made, feeds)[0], run(model, feeds)[0]) > 1e-3  # it is no copy
    assert len(made.graph.node) == len(model.graph.node) + 1
    shapes = {tensor.name: list(tensor.dims) for tensor in made.graph.initializer}
    assert any(RANK in shape for name, shape in shapes.items() if name.endswith("/first"))


@pytest.mark.parametrize(("name", "side"), CASES)
def test_after_a_cut_too(name: str, side: str) -> None:
    model = MODELS[name][0]()
    analysis = sfp_onnx.inspect(model)
    result = sfp_onnx.apply(model, planned(analysis, 2, Factor("middle", RANK, side)))
    assert result.verification is not None and max(result.verification.errors.values()) < 1e-5
    counted = sfp_onnx.inspect(result.model).size()
    assert counted.macs == pytest.approx(planned(analysis, 2, Factor("middle", RANK, side)).after.macs)
    assert counted.params == planned(analysis, 2, Factor("middle", RANK, side)).after.params


def test_what_a_wrong_half_makes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = factors.halves
    calls: list[int] = []

    def wrong(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
        calls.append(rank)
        left, other = right(matrix, rank)
        return left, other * (1.01 if len(calls) > 1 else 1.0)  # the first call makes the reference

    monkeypatch.setattr(factors, "halves", wrong)
    model = chain()
    with pytest.raises(sfp_onnx.VerificationError, match="differs from the masked original"):
        sfp_onnx.apply(model, planned(sfp_onnx.inspect(model), 2, Factor("middle", RANK)))


# ---- plans -----------------------------------------------------------------------------------------------------------


def test_a_plan_with_factors_is_read_again() -> None:
    analysis = sfp_onnx.inspect(chain())
    plan = planned(analysis, 2, Factor("middle", RANK, "inputs"))
    data = json.loads(json.dumps(planning.to_json(plan)))
    assert data["version"] == 2 and planning.from_json(data) == plan
    assert "1 layer becomes two" in plan.summary() and "layer that becomes two" in plan_text(plan)


def test_a_plan_without_is_what_it_was() -> None:
    data = planning.to_json(planned(sfp_onnx.inspect(chain()), 2))
    assert data["version"] == 1 and "factors" not in data


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ((Factor("nowhere", 1),), "fits no layer"),
        ((Factor("middle", 1), Factor("middle", 2)), "listed twice"),
        ((Factor("middle", 12),), "expected 1 to 11"),
        ((Factor("middle", 0),), "expected 1 to 11"),
        ((Factor("middle", 10, "inputs"),), "expected 1 to 9"),
        ((Factor("middle", 1, "sideways"),), "outputs or inputs"),
        ((Factor("last", 1, "inputs"),), "expected outputs"),
    ],
)
def test_factors_that_fit_nothing_are_refused(found: tuple[Factor, ...], message: str) -> None:
    model = chain()
    plan = replace(planned(sfp_onnx.inspect(model), 0), factors=found)
    with pytest.raises(PlanError, match=message):
        sfp_onnx.apply(model, plan)


def test_grouped_shared_and_computed_weights_stay_one() -> None:
    b = Builder()
    y = b.conv(b.conv(b.input(["N", 4, 6, 6]), 4, 8, name="stem"), 8, 8, group=8, name="depthwise")
    shared = b.weight(8, 8, 1, 1)
    y = b.op("Conv", b.op("Conv", y, shared, name="one"), shared, name="two")
    y = b.op("Conv", y, b.op("Add", b.weight(8, 8, 1, 1), b.op("ReduceMean", y, axes=[0, 1, 2, 3], keepdims=1)), name="computed")
    assert set(sfp_onnx.inspect(b.model(y)).wholes) == {"stem"}


# ---- the repair ------------------------------------------------------------------------------------------------------


def sums(count: int, inputs: int, outputs: int, seed: int = 0) -> tuple[Normal | Samples, np.ndarray]:
    """Rows of which some are alike, and what a weight makes of them, as errors of a weight of zeros."""
    random = np.random.default_rng(seed)
    rows = (random.standard_normal((1, count, inputs)) * np.geomspace(3, 0.1, inputs)).astype(np.float32)
    weight = random.standard_normal((1, inputs, outputs))
    samples = Samples(rows, (rows @ weight).astype(np.float32))
    return (samples.summed() if count >= inputs else samples), weight


@pytest.mark.parametrize("count", [400, 20])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("alone", [False, True])
def test_the_lower_weight_is_nearest_in_what_it_makes(count: int, side: str, alone: bool) -> None:
    taps, rank = 4, 3
    found, weight = sums(count, 24, 10)
    none = np.zeros(found.shape)
    change = next(ridge.solutions(found, [1e-6]))
    low = ridge.lowered(found, 1e-6, none, change, Factor("", rank, side), taps, alone)
    matrix = factors.arranged(low[0][0], taps, side)
    assert np.linalg.matrix_rank(matrix, 1e-6 * np.abs(matrix).max()) == rank
    plain = factors.restored(np.matmul(*factors.halves(factors.arranged(weight[0], taps, side), rank)), taps, side)
    assert found.error(*low) < 0.9 * found.error(plain[None], ridge.best_bias(found, plain[None]))
    if side == SIDES[0]:  # the least that any weight of this rank leaves: the rest of the singular values of what is made
        rows = found.rows[0] if isinstance(found, Samples) else None
        if rows is not None:
            made = (rows - rows.mean(0)) @ weight[0]
            even = ridge.evened(np.square(made).mean(0)) if alone else np.ones(10)
            rest = np.linalg.svd(made * even, compute_uv=False)[rank:]
            assert (found.left(*low) * even**2).sum() == pytest.approx(np.square(rest).sum(), rel=2e-2)


def test_a_lower_rank_gives_up_no_faint_output() -> None:
    """Seven outputs vary more than the eighth, which none of them tells; two of them are nearly the same, and one of these can go."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((1, 4000, 8)).astype(np.float32)
    weight = np.linalg.qr(random.standard_normal((8, 8)))[0][None] * np.asarray([10.0] * 7 + [1.0])
    weight[..., 0] = weight[..., 1] + weight[..., 0] / 5  # nearly a copy of another
    found = Samples(rows, (rows @ weight).astype(np.float32)).summed()
    low = ridge.lowered(found, 1e-6, np.zeros(found.shape), next(ridge.solutions(found, [1e-6])), Factor("", 7), 1, True)
    left = found.left(*low)[0] / np.square(rows[0] @ weight[0]).sum(0)
    assert left[-1] < 0.01 and left.max() < 0.1


@pytest.mark.parametrize("groups", [1, 12])
def test_what_a_depthwise_layer_reads_is_read_alone(groups: int) -> None:
    random = np.random.default_rng(0)
    held = {
        "w1": random.standard_normal((12, 3, 1, 1)), "w2": random.standard_normal((12, 12 // groups, 3, 3)),
        "w3": random.standard_normal((5, 12, 1, 1)),
    }  # fmt: skip
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w1"], ["a"], "first"), node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "w2"], ["c"], "second", group=groups, pads=[1] * 4), node("Conv", ["c", "w3"], ["y"], "third"),
    ]  # fmt: skip
    constants = {name: array.astype(np.float32) for name, array in held.items()}
    model = model_of(nodes, [("x", np.float32, ["N", 3, 8, 8])], [("y", np.float32, ["N", 5, 8, 8])], constants)
    analysis = sfp_onnx.inspect(model)
    scene = steps.Scene(analysis.prepared.model, analysis.coupling, analysis.prepared.nodes, analysis.prepared.trace.shapes)
    planned = steps.plan_steps(scene, [[layer] for layer in analysis.coupling.layers], {})
    found = {task[0].layer: task[0].alone for task in planned if isinstance(task, tuple)}
    assert found == {"first": groups > 1, "second": False, "third": False}


@pytest.mark.parametrize(("name", "side"), [("conv", "outputs"), ("stride", "inputs"), ("gemm", "outputs"), ("matmul", "outputs")])
def test_the_repair_keeps_the_rank_and_brings_the_model_nearer(name: str, side: str) -> None:
    model = MODELS[name][0]()
    data = feeds_for(model, batch=200)["x"]
    plan = planned(sfp_onnx.inspect(model), 2, Factor("middle", RANK, side))
    plain, fitted = (sfp_onnx.apply(model, plan, data, repair=repair) for repair in (None, RepairOptions(fit="lstsq")))
    test = feeds_for(model, batch=50, seed=9)
    expected = run(model, test)[0]
    before, after = (np.square(run(result.to_proto(), test)[0] - expected).sum() for result in (plain, fitted))
    assert after < 0.7 * before
    assert fitted.repaired is not None and fitted.repaired.kept
    assert [list(tensor.dims) for tensor in fitted.to_proto().graph.initializer if tensor.name.endswith("/first")] == [
        list(tensor.dims) for tensor in plain.to_proto().graph.initializer if tensor.name.endswith("/first")
    ]
    again = sfp_onnx.apply(model, plan, data, repair=RepairOptions(fit="lstsq"))
    assert again.to_proto().SerializeToString() == fitted.to_proto().SerializeToString()


def test_a_plan_of_factors_alone_is_repaired() -> None:
    model = chain()
    data = feeds_for(model, batch=100)["x"]
    result = sfp_onnx.apply(model, planned(sfp_onnx.inspect(model), 0, Factor("middle", 6)), data)
    assert result.repaired is not None and result.repaired.after < result.repaired.before



# ---- choosing --------------------------------------------------------------------------------------------------------


TARGET = PlanOptions(targets=("macs=60%",), align=None)


def test_a_layer_of_low_rank_becomes_two() -> None:
    model = low_rank(6)
    data = feeds_for(model, batch=120)["x"]
    both, cut = (sfp_onnx.prune(model, options, data=data) for options in (TARGET, replace(TARGET, moves=("cut",))))
    assert [factor.layer for factor in both.plan.factors] == ["middle"] and not cut.plan.factors
    assert both.plan.factors[0].rank >= 6 and any("1 layer becomes two" in note for note in both.plan.notes)
    assert both.plan.after.macs <= 0.6 * both.plan.before.macs
    assert both.repaired is not None and cut.repaired is not None and both.repaired.after < 0.7 * cut.repaired.after
    counted = sfp_onnx.inspect(both.model).size()
    assert (counted.macs, counted.params) == (both.plan.after.macs, both.plan.after.params)
    again = sfp_onnx.apply(model, planning.from_json(json.loads(json.dumps(planning.to_json(both.plan)))), data)
    assert again.to_proto().SerializeToString() == both.to_proto().SerializeToString()


@pytest.mark.parametrize(("target", "form"), [
    ("params=60%", OutputOptions()), ("size=60%", OutputOptions()), ("size=40%", OutputOptions(fp16=True)),
    ("size=40%", OutputOptions(quantize="int8")),
])  # fmt: skip
def test_weights_and_bytes_are_priced_too(target: str, form: OutputOptions) -> None:
    """In each form that is written; the nodes that quantise a half are counted on built models alone."""
    model = low_rank(4)
    result = sfp_onnx.prune(model, replace(TARGET, targets=(target,)), data=feeds_for(model, batch=120)["x"], output=form)
    assert result.plan.factors
    (figures,) = result.plan.figures.values()
    near = 0.15 if form.quantize else 0.05
    assert figures["actual"] <= figures["bound"] and figures["actual"] == pytest.approx(figures["predicted"], rel=near)


def test_kept_layers_stay_whole_and_memory_gains_nothing() -> None:
    model = low_rank(6)
    data = feeds_for(model, batch=120)["x"]
    assert not sfp_onnx.plan(model, replace(TARGET, keep="middle|last"), data=data).factors
    assert not sfp_onnx.plan(model, replace(TARGET, targets=("macs=60%", "memory=99%")), data=data).factors


def test_without_a_gain_the_model_is_that_of_cuts_alone() -> None:
    b = Builder()
    y = b.op("Relu", b.conv(b.input(["N", 3, 8, 8]), 3, 8, 1, name="stem"))
    model = b.model(b.op("Flatten", b.op("GlobalAveragePool", b.conv(y, 8, 4, 1, name="last"))))
    data = feeds_for(model, batch=64)["x"]
    both, cut = (sfp_onnx.prune(model, options, data=data) for options in (TARGET, replace(TARGET, moves=("cut",))))
    assert not both.plan.factors and both.to_proto().SerializeToString() == cut.to_proto().SerializeToString()


@pytest.mark.parametrize("text", ["factor", "cut,fold", ""])
def test_moves_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="expected cut"):
        moves(text)


@pytest.mark.parametrize("alone", [False, True])
def test_estimated_errors_are_those_of_the_best_product(alone: bool) -> None:
    """Of a layer on inputs that all its taps see alike: what `ridge.lowered` leaves of it."""
    random = np.random.default_rng(0)
    taps, channels, made, rank = 4, 6, 10, 3
    rows = random.standard_normal((1, 40000, taps * channels)) * np.tile(np.geomspace(3, 0.1, channels), taps)
    weight = random.standard_normal((1, taps * channels, made))
    found = Samples(rows.astype(np.float32), (rows @ weight).astype(np.float32)).summed()
    outputs = Samples((rows @ weight).astype(np.float32), np.zeros((1, 40000, 0), np.float32)).summed()
    covariance = outputs.of_channels(1)
    even = ridge.evened(np.diag(covariance)) if alone else np.ones(made)
    spectrum = Spectrum(even[:, None] * covariance * even, found.of_channels(taps), even)
    whole = sfp_onnx.inspect(chain()).wholes["middle"]
    whole = replace(whole, form=replace(whole.form, kernel=(2, 2)), shape=(made, channels, 2, 2))  # type: ignore[type-var]
    axis = Axis(whole, spectrum, (Factor("middle", rank), Factor("middle", rank, "inputs")))
    expected = axis.errors(np.ones(channels, bool), np.ones(made, bool), weight[0])
    change = next(ridge.solutions(found, [1e-6]))
    for factor, value in zip(axis.options, expected[1:], strict=True):
        low = ridge.lowered(found, 1e-6, np.zeros(found.shape), change, factor, taps, alone)
        left = (found.left(*low) * even**2).sum() / found.count
        assert left == pytest.approx(value, rel=0.02)


def test_time_is_priced_in_whole_blocks(tmp_path: Path) -> None:
    """A board that takes a nanosecond for each multiplication, in blocks of 8 channels, and does nothing else."""
    model = low_rank(6)
    analysis = sfp_onnx.inspect(model)
    costs = dict.fromkeys(profiling.names_of(analysis), (0.0, 0.0, 1e-9, 0.0))
    board = DeviceProfile({"cpu": "a board"}, analysis.model.sha256, 1, 1.0, Block(8, 1.0, {}), 0.0, costs, 1.0, 0.0, 0)
    seconds = float(profiling.clock_of(analysis, board)(profiling.terms_of(analysis).full))
    path = tmp_path / "board.json"
    path.write_text(json.dumps(to_json(replace(board, seconds=seconds))))
    options = PlanOptions(targets=("latency=70%",), device_profile=str(path))
    ruler = ruler_for(analysis, options)
    none = np.zeros(analysis.coupling.units, bool)
    assert ruler.predicted(none)["latency"] == pytest.approx(seconds)
    saved = [seconds - ruler.predicted(none, [Factor("middle", rank, side)])["latency"] for rank in (3, 8, 9) for side in SIDES]
    whole, positions = 9 * 24 * 24, 64 * analysis.samples
    # what is made fills blocks; fewer channels than one are read one by one
    window, beside = 9 * 24 * np.asarray([8, 8, 16]), np.asarray([3, 8, 16]) * 24
    other = 9 * np.asarray([3, 8, 16]) * 24, 24 * np.asarray([8, 8, 16])
    for at in range(3):
        assert saved[2 * at] == pytest.approx(1e-9 * positions * (whole - profiling.PAIR * (window[at] + beside[at])))
        assert saved[2 * at + 1] == pytest.approx(1e-9 * positions * (whole - profiling.PAIR * (other[0][at] + other[1][at])))
    plan = sfp_onnx.plan(model, options, data=feeds_for(model, batch=120)["x"])
    assert [factor.layer for factor in plan.factors] == ["middle"]
    assert plan.figures["latency"]["predicted"] <= plan.figures["latency"]["bound"]
