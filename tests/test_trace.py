"""Gathers with computed indices that only reshape (as_strided of some exporters) are read as what they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from building import Builder
from conftest import CLASSES, IMAGE, images, masked_reference, model_of, relative, run_model, weights_of
from onnx import helper

import sfp_onnx
from sfp_onnx.core.types import Port
from sfp_onnx.coupling.trace import BATCHES, INTEGERS, SIDES, _candidates

WIDTH = 12


def strided(batch: int | str, offset: int = 0, stride: int = WIDTH) -> onnx.ModelProto:
    """conv-relu-mean-as_strided-gemm: indices n * stride + c + offset, modulo the length, into the flattened means."""
    held = {
        "w": weights_of(widths=(WIDTH, 4))["w1"], "head": weights_of(widths=(4, WIDTH))["w3"], "axes": np.array([2, 3]),
        "flat": np.array([-1]), "rows": np.array([-1, WIDTH]), "zero": np.array(0), "one": np.array(1), "width": np.array(WIDTH),
        "stride": np.array(stride), "inner": np.array([1, 2, 3]), "channels": np.arange(WIDTH).reshape(1, WIDTH, 1, 1) + offset,
    }  # fmt: skip
    nodes = [
        helper.make_node("Shape", ["x"], ["n1"], "size", start=0, end=1),
        helper.make_node("Squeeze", ["n1"], ["n"], "scalar"),
        helper.make_node("Conv", ["x", "w"], ["c"], "conv", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("ReduceMean", ["r", "axes"], ["m"], "mean", keepdims=1),
        helper.make_node("Reshape", ["m", "flat"], ["v"], "vector"),
        helper.make_node("Range", ["zero", "n", "one"], ["i"], "range"),
        helper.make_node("Mul", ["i", "stride"], ["s"], "mul"),
        helper.make_node("Unsqueeze", ["s", "inner"], ["u"], "unsqueeze"),
        helper.make_node("Add", ["u", "channels"], ["sum"], "add"),
        helper.make_node("Mul", ["n", "width"], ["length"], "length"),
        helper.make_node("Mod", ["sum", "length"], ["index"], "mod"),
        helper.make_node("Gather", ["v", "index"], ["g"], "as_strided"),
        helper.make_node("Reshape", ["g", "rows"], ["f"], "matrix"),
        helper.make_node("Gemm", ["f", "head"], ["y"], "head", transB=1),
    ]
    return model_of(nodes, [("x", np.float32, [batch, *IMAGE])], [("y", np.float32, [batch, CLASSES])], held, opset=18)


@pytest.mark.parametrize("batch", ["N", 3])
def test_a_gather_in_order_is_a_reshape(batch: int | str, save: Callable[..., Path], tmp_path: Path) -> None:
    path = save(strided(batch))
    analysis = sfp_onnx.inspect(path)
    assert [(group.width, group.producers) for group in analysis.coupling.groups] == [(WIDTH, ("conv",))]
    result = sfp_onnx.prune(path, sfp_onnx.PlanOptions(ratio=0.5, align=None), "magnitude")
    out = result.save(tmp_path / "out.onnx")
    proto = onnx.load(out)
    assert not {"Gather", "Range"} & {node.op_type for node in proto.graph.node} and result.plan.after.params < result.plan.before.params
    reference = masked_reference(strided(batch), [{**vars(cut), "removed": list(cut.removed)} for cut in result.cuts])
    for count in (1, 2, 7) if batch == "N" else (3,):
        x = images(count, seed=count)
        assert relative(run_model(proto, {"x": x})[0], run_model(reference, {"x": x})[0]) < 1e-5
        assert run_model(path, {"x": x})[0].shape == (count, CLASSES)


@pytest.mark.parametrize(("offset", "stride"), [(1, WIDTH), (0, WIDTH - 1)])
def test_other_gathers_stay_as_they_are(offset: int, stride: int, save: Callable[..., Path]) -> None:
    """Indices that start later, or overlap: the channels move between samples, and stay."""
    analysis = sfp_onnx.inspect(save(strided("N", offset, stride)))
    assert not analysis.coupling.groups
    assert any(node.op == "Gather" for node in analysis.prepared.nodes)


@pytest.mark.parametrize(
    ("ports", "count"),
    [
        ([Port("x", np.float32, ("N", 3, 8, 8))], len(BATCHES)),
        ([Port("x", np.float32, (1, 3, 8, 8))], 1),
        ([Port("x", np.int64, ("N", 4))], len(BATCHES) * len(INTEGERS)),
        ([Port("x", np.float32, (1, 3, "H", "W"))], len(SIDES)),
        ([Port("x", np.float32, ("N", 3, "H", "W"))], len(BATCHES) * len(SIDES)),
    ],
)
def test_no_sample_shape_is_tried_twice(ports: list[Port], count: int) -> None:
    found = [tuple(array.shape for array in feeds.values()) for feeds in _candidates(ports, {}, None)]
    assert len(found) == count
    assert len(list(_candidates(ports, {"x": [2, *[4] * (len(found[0][0]) - 1)]}, None))) == count // len(set(found))


@pytest.mark.parametrize("rank", [3, 4])
def test_an_axis_that_is_declared_open_and_has_one_size_inside(rank: int, save: Callable[..., Path]) -> None:
    """An exporter traced with 12 tokens, or 12 x 12 pixels, and named the axis all the same: onnxruntime names the size that fits."""
    b = Builder()
    x = b.input(["N", *["L"] * (rank - 2), 8])
    middle = b.op("Relu", b.op("MatMul", b.op("Add", x, b.weight(1, *[12] * (rank - 2), 8)), b.weight(8, 16, fan_in=8)))
    path = save(b.model(b.op("MatMul", middle, b.weight(16, 4, fan_in=16))))
    analysis = sfp_onnx.inspect(path)
    assert [group.width for group in analysis.coupling.groups] == [16]
    assert analysis.prepared.feeds["x"].shape[1] == 12


def test_sound_is_long(save: Callable[..., Path]) -> None:
    """Convolutions with strides leave nothing of a short wave."""
    b = Builder()
    x, width = b.input(["N", "T"]), 1
    x = b.axes_op("Unsqueeze", x, [1])
    for _ in range(6):
        x = b.op("Relu", b.op("Conv", x, b.weight(8, width, 5), strides=[4]))
        width = 8
    path = save(b.model(b.op("Conv", x, b.weight(2, 8, 1))))
    assert sfp_onnx.inspect(path).prepared.feeds["x"].shape[1] == 16384


def test_a_state_whose_size_follows_is_not_gathered_again(save: Callable[..., Path]) -> None:
    """A state of the shape (batch, channels of a tensor that is cut), as those of an unrolled Mamba, has the channels that are left. That
    it follows cannot be told from runs of several lengths: the model takes but one."""
    b = Builder()
    x = b.op("Add", b.input(["N", "L", 8]), b.weight(1, 12, 8))
    y = b.reduce("ReduceMean", b.op("Relu", b.op("MatMul", x, b.weight(8, 16, fan_in=8))), [1])
    shape = b.op("Shape", y)
    sizes = [b.op("Unsqueeze", b.op("Gather", shape, b.const(at, np.int64)), b.const([0], np.int64)) for at in (0, 1, 2)]
    state = b.op("ConstantOfShape", b.op("Concat", *sizes, axis=0), value=helper.make_tensor("value", 1, [1], [0.5]))
    path = save(b.model(b.op("MatMul", b.op("Mul", y, state), b.weight(16, 4, fan_in=16))))
    result = sfp_onnx.prune(path, sfp_onnx.PlanOptions(ratio=0.5, align=None), "magnitude")
    assert result.plan.after.params < result.plan.before.params and result.verification is not None
    reference = masked_reference(onnx.load(path), [{**vars(cut), "removed": list(cut.removed)} for cut in result.cuts])
    for count in (1, 5):
        feeds = {"x": np.random.default_rng(count).standard_normal((count, 12, 8)).astype(np.float32)}
        assert relative(run_model(result.to_proto(), feeds)[0], run_model(reference, feeds)[0]) < 1e-5
