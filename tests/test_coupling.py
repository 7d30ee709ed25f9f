"""Expected units, groups and reasons on graphs built by hand."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.helper as oh
import pytest
from building import FLOAT, Builder, assert_exact, assert_listed, error, masked, plan_of, random_plan, run

import sfp_onnx
from sfp_onnx.core.errors import PlanError
from sfp_onnx.coupling.analysis import Analysis
from sfp_onnx.planning import removal_of
from sfp_onnx.report.page import widths_of


def groups(analysis: Analysis) -> dict[str, int]:
    """Width by group name."""
    return {group.name: group.width for group in analysis.coupling.groups}


def producers(analysis: Analysis) -> list[set[str]]:
    return [set(group.producers) for group in analysis.coupling.groups]


def check(model: onnx.ModelProto, analysis: Analysis | None = None, **options: bool) -> Analysis:
    """Random plans are exact; returns the analysis."""
    analysis = analysis or sfp_onnx.inspect(model)
    for seed in range(4):
        result = sfp_onnx.apply(analysis, random_plan(analysis, seed))
        assert_exact(model, result)
        assert_listed(model, result)
    return analysis


def start(opset: int = 17, channels: int = 8, seed: int = 2) -> tuple[Builder, str]:
    b = Builder(opset, seed)
    return b, b.conv(b.input(["N", 3, 8, 8]), 3, channels, name="stem")


# ---- who leaves with whom --------------------------------------------------------------------------------------------


def test_a_plain_chain_has_a_group_per_convolution_but_the_last() -> None:
    b, y = start()
    out = b.conv(b.op("Relu", b.conv(b.op("Relu", y), 8, 6, name="middle")), 6, 5, name="last")
    analysis = check(b.model(out))
    assert groups(analysis) == {"stem": 8, "middle": 6}
    assert analysis.coupling.groups[0].consumers == ("middle",)
    assert [(pin.reason, pin.node, pin.channels, pin.layers) for pin in analysis.coupling.pinned] == [("graph output", out, 5, ("last",))]
    assert (analysis.coupling.channels_total, analysis.coupling.channels_prunable) == (19, 14)


def test_a_residual_stage_is_one_group() -> None:
    b, y = start()
    for index in range(2):
        inner = b.op("Relu", b.conv(y, 8, 6, name=f"a{index}"))
        y = b.op("Relu", b.op("Add", y, b.conv(inner, 6, 8, name=f"b{index}")))
    analysis = check(b.model(b.conv(y, 8, 5, name="last")))
    assert groups(analysis) == {"stem": 8, "a0": 6, "a1": 6}
    assert producers(analysis)[0] == {"stem", "b0", "b1"}


@pytest.mark.parametrize("flip", [False, True])
def test_a_squeeze_excite_gate_is_tied_to_what_it_gates(flip: bool) -> None:
    b, y = start()
    hidden = b.op("Relu", b.conv(b.op("GlobalAveragePool", y), 8, 4, 1, name="squeeze"))
    gate = b.op("Sigmoid", b.conv(hidden, 4, 8, 1, name="excite"))
    out = b.conv(b.op("Mul", *((gate, y) if flip else (y, gate))), 8, 5, name="last")
    analysis = check(b.model(out))
    assert producers(analysis) == [{"stem", "excite"}, {"squeeze"}]


def test_concatenated_parts_stay_separate_groups() -> None:
    b, y = start()
    other = b.conv("x", 3, 6, name="other")
    analysis = check(b.model(b.conv(b.op("Concat", y, other, axis=1), 14, 5, name="last")))
    assert groups(analysis) == {"stem": 8, "other": 6}
    one = sfp_onnx.apply(analysis, plan_of(analysis, {"other": [0, 5]}))
    assert {(cut.tensor, cut.removed) for cut in one.cuts} == {("other.out", (0, 5)), ("Concat_2.out", (8, 13))}


def test_a_zero_padded_shortcut_has_units_of_three_kinds() -> None:
    """DESIGN: the last stage holds units that reach back to the first stage, and padding channels tied to its own."""
    b, y = start(channels=4)
    for stage, width in enumerate((8, 16)):
        half = width // 4
        main = b.op("Relu", b.conv(y, width // 2, 6, strides=[2, 2], name=f"in{stage}"))
        main = b.conv(main, 6, width, name=f"out{stage}")
        thin = b.slice(y, [0, 0], [2**31 - 1] * 2, [2, 3], [2, 2])
        y = b.op("Relu", b.op("Add", main, b.pad(thin, [0, half, 0, 0, 0, half, 0, 0])))
    analysis = check(b.model(b.gemm(b.op("Flatten", b.op("GlobalAveragePool", y)), 16, 5)))
    found = {(frozenset(group.producers), group.width) for group in analysis.coupling.groups}
    assert found == {
        (frozenset({"stem", "out0", "out1"}), 4),
        (frozenset({"out0", "out1"}), 4),
        (frozenset({"out1"}), 8),
        (frozenset({"in0"}), 6),
        (frozenset({"in1"}), 6),
    }


def shuffled(b: Builder, y: str, count: int, channels: int) -> str:
    wide = b.op("Reshape", y, b.const([0, count, channels // count, 8, 8], np.int64))
    return b.op("Reshape", b.op("Transpose", wide, perm=[0, 2, 1, 3, 4]), b.const([0, channels, 8, 8], np.int64))


def test_a_channel_shuffle_has_units_of_two() -> None:
    """ONNX cannot reshape what does not divide: one channel of each of the two groups leaves, or a whole group of two."""
    b, y = start()
    out = b.conv(shuffled(b, b.op("Relu", y), 2, 8), 8, 5, name="last")
    analysis = check(b.model(out))
    assert groups(analysis) == {"stem": 4}
    result = sfp_onnx.apply(analysis, plan_of(analysis, {"stem": [1]}))
    assert result.cuts[0].removed == (1, 5)
    assert next(cut.removed for cut in result.cuts if cut.tensor == "Reshape_4.out") == (2, 3)


def attention(b: Builder, tokens: str, width: int, heads: int, size: int, shared_kv: bool = False) -> str:
    def projected(name: str, perm: list[int], count: int) -> str:
        made = b.op("Add", b.op("MatMul", tokens, b.weight(width, count * size, fan_in=width), name=name), b.weight(count * size))
        return b.op("Transpose", b.op("Reshape", made, b.const([0, 0, count, size], np.int64)), perm=perm)

    kv = 1 if shared_kv else heads
    query, key, value = projected("q", [0, 2, 1, 3], heads), projected("k", [0, 2, 3, 1], kv), projected("v", [0, 2, 1, 3], kv)
    weights = b.op("Softmax", b.op("MatMul", query, key, name="scores"), axis=-1)
    mixed = b.op("Transpose", b.op("MatMul", weights, value, name="mixed"), perm=[0, 2, 1, 3])
    joined = b.op("Reshape", mixed, b.const([0, 0, heads * size], np.int64))
    return b.op("MatMul", joined, b.weight(heads * size, width, fan_in=heads * size), name="proj")


def test_attention_heads_leave_whole() -> None:
    b, y = start()
    tokens = b.op("Transpose", b.op("Reshape", y, b.const([0, 8, -1], np.int64)), perm=[0, 2, 1])
    out = b.op("MatMul", b.op("Add", tokens, attention(b, tokens, 8, 3, 4)), b.weight(8, 5), name="last")
    analysis = check(b.model(out))
    heads = next(group for group in analysis.coupling.groups if "q" in group.producers)
    assert heads.width == 3 and {"q", "k", "v"} <= set(heads.producers)
    assert {"stem", "proj"} == set(analysis.coupling.groups[0].producers)
    result = sfp_onnx.apply(analysis, plan_of(analysis, {heads.name: [1]}))
    assert next(cut.removed for cut in result.cuts if cut.tensor == "k.out") == (4, 5, 6, 7)


# ---- grouped convolutions --------------------------------------------------------------------------------------------


def in_groups(b: Builder, y: str, width: int, made: int, count: int, transposed: bool = False) -> str:
    """Its kernel has channels of every group along its second axis."""
    if transposed:
        weight = b.weight(width, made // count, 3, 3, name="grouped.weight")
        return b.op("ConvTranspose", y, weight, pads=[1] * 4, group=count, name="grouped")
    return b.conv(y, width, made, group=count, name="grouped")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("count", "each", "made"), [(8, 4, 4), (2, 16, 6), (3, 2, 1), (3, 1, 2)])
def test_groups_leave_whole_and_lose_channels_of_their_own_inside(count: int, each: int, made: int, transposed: bool) -> None:
    """Both kinds at once, on both sides of the convolution: every group keeps as many channels, each its own."""
    b, y = start(channels=count * each)
    inner = b.op("Relu", in_groups(b, b.op("Relu", y), count * each, count * made, count, transposed))
    model = b.model(b.conv(inner, count * made, 5, name="last"))
    analysis = check(model)
    whole = next(group for group in analysis.coupling.groups if group.name == "stem")
    insides = [group for group in analysis.coupling.groups if group.blocks > 1]
    assert whole.width == count and whole.blocks == 1
    assert [group.width for group in insides] == [count * width for width in (each, made) if width > 1]
    assert all(group.blocks == count and group.inside == ("stem",) for group in insides)
    own = {group.name: [at * (group.width // count) + at % (group.width // count) for at in range(count)] for group in insides}
    result = sfp_onnx.apply(analysis, plan_of(analysis, {"stem": [0], **own}))
    assert_exact(model, result)
    node = next(node for node in result.to_proto().graph.node if node.name == "grouped")
    assert next(attribute.i for attribute in node.attribute if attribute.name == "group") == count - 1
    shape = next(list(tensor.dims) for tensor in result.to_proto().graph.initializer if tensor.name == "grouped.weight")
    left, right = each - (each > 1), made - (made > 1)
    assert shape[:2] == ([(count - 1) * left, right] if transposed else [(count - 1) * right, left])
    assert result.plan.after.macs == sfp_onnx.inspect(result.to_proto()).size().macs
    if not transposed:  # a transposed one has the channels of all groups along no axis of its weight
        told = {own.name: own.width for own in widths_of(analysis, removal_of(result.plan, analysis.coupling, result.plan.model_sha256))}
        assert (told["stem"], told["grouped"]) == ((count - 1) * left, (count - 1) * right)


def test_groups_behind_each_other_share_blocks_and_a_plan_must_keep_them_even() -> None:
    """Two groups, then four: each half of one of the two loses as many. A squeeze-and-excite gate and a residual follow."""
    b, y = start(channels=16)
    gate = b.op("Sigmoid", b.conv(b.op("GlobalAveragePool", y), 16, 16, 1, name="gate"))
    inner = b.op("Relu", b.conv(b.op("Relu", b.op("Mul", y, gate)), 16, 16, group=2, name="two"))
    inner = b.op("Add", b.conv(inner, 16, 16, group=4, name="four"), y)
    model = b.model(b.conv(inner, 16, 5, name="last"))
    analysis = check(model)
    inside = [group for group in analysis.coupling.groups if group.inside]
    assert {(group.blocks, group.width) for group in inside} == {(4, 16)}
    assert groups(analysis)["stem"] == 2
    even = {inside[0].name: [0, 5, 10, 15]}
    assert_exact(model, sfp_onnx.apply(analysis, plan_of(analysis, even)))
    with pytest.raises(PlanError, match=r"4 groups of channels.*leaves \[3, 4, 3, 3\]"):
        sfp_onnx.apply(analysis, plan_of(analysis, {inside[0].name: [0, 8, 15]}))


def test_where_groups_cannot_be_even_one_channel_of_each_leaves() -> None:
    """A concatenation that no groups fit: the blocks would be of 6, 2 and 8 channels, so that all groups lose the same places."""
    b, y = start(channels=6)
    other = b.conv(b.op("Relu", y), 6, 10, name="beside")
    inner = b.conv(b.op("Concat", y, other, axis=1), 16, 16, group=2, name="grouped")
    analysis = check(b.model(b.conv(b.op("Relu", inner), 16, 5, name="last")))
    assert not any(group.inside or group.blocks > 1 for group in analysis.coupling.groups) and analysis.coupling.groups


def test_a_depthwise_convolution_passes_channels_through() -> None:
    b, y = start()
    deep = b.op("Relu", b.conv(b.op("Relu", y), 8, 8, group=8, name="depthwise"))
    analysis = check(b.model(b.conv(deep, 8, 5, 1, name="last")))
    assert producers(analysis) == [{"stem", "depthwise"}] and groups(analysis) == {"stem": 8}


# ---- shared weights --------------------------------------------------------------------------------------------------


def test_siamese_towers_are_cut_once_and_alike() -> None:
    b = Builder(17, 2)
    left, right = b.input(["N", 3, 8, 8], "left"), b.input(["N", 3, 8, 8], "right")
    first, second = b.weight(8, 3, 3, 3, name="w1"), b.weight(6, 8, 3, 3, name="w2")
    towers = []
    for tower, x in (("l", left), ("r", right)):
        y = b.op("Relu", b.op("Conv", x, first, name=f"{tower}1"))
        towers.append(b.op("Relu", b.op("Conv", y, second, name=f"{tower}2")))
    out = b.conv(b.op("Concat", *towers, axis=1), 12, 5, name="last")
    model = b.model(out)
    analysis = check(model)
    assert groups(analysis) == {"l1": 8, "l2": 6}
    result = sfp_onnx.apply(analysis, plan_of(analysis, {"l1": [0, 3], "l2": [5]}))
    shapes = {tensor.name: list(tensor.dims) for tensor in result.to_proto().graph.initializer}
    assert shapes["w1"] == [6, 3, 3, 3] and shapes["w2"] == [5, 6, 3, 3]
    assert len(shapes) == len(model.graph.initializer)


def test_equal_vectors_that_an_exporter_merged_are_unshared() -> None:
    """Two BatchNormalizations that share their (equal) vectors may be cut differently."""
    b, y = start()
    vectors = [b.uniform(8), b.weight(8), b.weight(8), b.uniform(8)]
    y = b.op("Relu", b.op("BatchNormalization", y, *vectors))
    y = b.op("Relu", b.op("BatchNormalization", b.conv(y, 8, 8, name="second"), *vectors))
    analysis = check(b.model(b.conv(y, 8, 5, name="last")))
    assert groups(analysis) == {"stem": 8, "second": 8}


# ---- reasons ---------------------------------------------------------------------------------------------------------


def reason(analysis: Analysis, layer: str) -> tuple[str, str]:
    pin = next(pin for pin in analysis.coupling.pinned if layer in pin.layers)
    return pin.reason, pin.node


def behind(b: Builder, y: str, channels: int = 8) -> onnx.ModelProto:
    """A hidden layer and an output behind ``y``."""
    return b.model(b.conv(b.op("Relu", b.conv(y, channels, 6, name="hidden")), 6, 5, name="last"))


@pytest.mark.parametrize(
    ("operator", "attributes", "words"),
    [("Softmax", {"axis": 1}, "Softmax normalises"), ("LRN", {"size": 3}, "neighbouring channels"), ("LpPool", None, "")],
)
def test_the_reason_names_the_node(operator: str, attributes: dict[str, int] | None, words: str) -> None:
    b, y = start()
    if attributes is None:
        analysis = check(behind(b, b.op(operator, y, kernel_shape=[3, 3], name="culprit")))
        assert groups(analysis) == {"stem": 8, "hidden": 6}
        return
    analysis = check(behind(b, b.op(operator, y, name="culprit", **attributes)))
    assert groups(analysis) == {"hidden": 6}
    text, node = reason(analysis, "stem")
    assert words in text and node == "culprit"


def test_layer_normalization_pins_its_axis() -> None:
    b, y = start()
    last = b.op("Transpose", y, perm=[0, 2, 3, 1])
    normal = b.op("LayerNormalization", last, b.uniform(8), b.weight(8), name="culprit")
    analysis = check(behind(b, b.op("Transpose", normal, perm=[0, 3, 1, 2])))
    assert groups(analysis) == {"hidden": 6}
    assert reason(analysis, "stem")[1] == "culprit" and "LayerNormalization" in reason(analysis, "stem")[0]


def test_a_custom_operator_that_onnxruntime_knows_is_pinned_by_name() -> None:
    b, y = start()
    flat = b.op("Flatten", b.op("GlobalAveragePool", y))
    made = b.op("CDist", flat, b.weight(4, 8), domain="com.microsoft", name="culprit", metric="euclidean")
    out = b.gemm(b.op("Relu", b.gemm(made, 4, 6, name="hidden")), 6, 5)
    analysis = check(b.model(out))
    assert groups(analysis) == {"hidden": 6}
    assert reason(analysis, "stem") == ("operator com.microsoft.CDist has no rule", "culprit")


@pytest.mark.parametrize("whole", [False, True])
def test_what_a_branch_reads_may_leave_unless_a_loop_is_in_it(whole: bool) -> None:
    b, y = start()
    z = b.op("Relu", b.conv(y, 8, 8, name="captured"))
    branches = {}
    for name, op in (("then_branch", "Neg"), ("else_branch", "Abs")):
        inner = [oh.make_node(op, [z], [f"{name}.y"])]
        if whole:
            kinds = {"i": onnx.TensorProto.INT64, "c": onnx.TensorProto.BOOL}
            ports = [oh.make_tensor_value_info(port, kind, []) for port, kind in kinds.items()]
            carried = [oh.make_tensor_value_info(port, FLOAT, None) for port in ("h", "g")]
            steps = [oh.make_node("Identity", ["c"], ["d"]), oh.make_node("Relu", ["h"], ["g"])]
            last = oh.make_tensor_value_info("d", onnx.TensorProto.BOOL, [])
            body = oh.make_graph(steps, "body", [*ports, carried[0]], [last, carried[1]])
            inner.append(oh.make_node("Loop", [b.const(2, np.int64), "", f"{name}.y"], [f"{name}.z"], body=body))
            inner.append(oh.make_node("Identity", [f"{name}.z"], [f"{name}.w"]))
        name_of = inner[-1].output[0]
        branches[name] = oh.make_graph(inner, name, [], [oh.make_tensor_value_info(name_of, FLOAT, [None, 8, 8, 8])])
    flag = b.input([1], "flag", onnx.TensorProto.BOOL)
    made = b.op("If", flag, name="choice", **branches)
    analysis = check(behind(b, made))
    assert groups(analysis) == ({"stem": 8, "hidden": 6} if whole else {"stem": 8, "captured": 8, "hidden": 6})
    if whole:
        assert reason(analysis, "captured") == ("a sub-graph of If reads it", "choice")


def test_a_weight_that_is_computed_from_data_keeps_its_channels() -> None:
    """Dynamic convolution: the weight is an activation."""
    b, y = start()
    kernel = b.gemm(b.op("Flatten", b.op("GlobalAveragePool", b.reduce("ReduceMean", y, [0], keepdims=1))), 8, 6 * 8, name="maker")
    kernel = b.op("Reshape", kernel, b.const([6, 8, 1, 1], np.int64))
    analysis = check(behind(b, b.op("Relu", b.op("Conv", y, kernel, name="dynamic")), 6))
    assert "maker" not in {name for group in analysis.coupling.groups for name in group.producers}
    assert reason(analysis, "maker") == reason(analysis, "stem") == ("the weight of dynamic is computed at run time", "dynamic")


def test_what_a_product_needs_of_an_input_is_gathered() -> None:
    b, y = start()
    other = b.input([8, 6], "other")
    made = b.op("MatMul", b.op("Flatten", b.op("GlobalAveragePool", y)), other, name="dynamic")
    assert "stem" in groups(check(b.model(b.gemm(made, 6, 5, name="last"))))


def test_what_a_residual_needs_of_a_graph_input_is_gathered() -> None:
    """The input keeps its channels; those that the block keeps are gathered from it."""
    b = Builder(17, 2)
    x = b.input(["N", 8, 8, 8])
    y = b.op("Add", x, b.conv(x, 8, 8, name="block"))
    assert "block" in groups(check(b.model(b.conv(y, 8, 5, name="last"))))


@pytest.mark.parametrize("operator", ["Split", "Slice", "Gather"])
def test_a_piece_of_one_channel_keeps_it(operator: str) -> None:
    b, y = start(channels=2)
    if operator == "Split":
        left, right = b.split(y, [1, 1])
    elif operator == "Slice":
        left, right = b.slice(y, [0], [1], [1]), b.slice(y, [1], [2], [1])
    else:
        left, right = (b.op("Gather", y, b.const([index], np.int64), axis=1) for index in (0, 1))
    out = b.model(b.conv(b.op("Mul", left, right), 1, 5, name="last"))
    analysis = sfp_onnx.inspect(out)
    assert groups(analysis) == {}


# ---- sizes that are computed in the graph ----------------------------------------------------------------------------


def feeds(batch: int, height: int, width: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(7).standard_normal((batch, 3, height, width)).astype(np.float32)}


@pytest.mark.parametrize("opset", [11, 13, 18])
@pytest.mark.parametrize("way", ["whole shape", "batch and channels", "gathered batch", "minus one"])
def test_the_batch_stays_dynamic(way: str, opset: int) -> None:
    b, y = start(opset)
    y = b.op("Relu", b.conv(y, 8, 8, name="middle"))
    if way == "whole shape":
        wide = b.op("Reshape", b.op("Abs", y), b.op("Shape", y))
    else:
        size = b.op("Shape", y)
        if way == "batch and channels":
            head = b.slice(size, [0], [2], [0])
            target = b.op("Concat", head, b.const([64], np.int64), axis=0)
        elif way == "gathered batch":
            one = b.axes_op("Unsqueeze", b.op("Gather", size, b.const(0, np.int64)), [0])
            target = b.op("Concat", one, b.const([8, -1], np.int64), axis=0)
        else:
            target = b.const([-1, 8, 64], np.int64)
        wide = b.op("Reshape", y, target)
    flat = b.op("Flatten", wide)
    model = b.model(b.gemm(flat, 512, 5))
    analysis = check(model)
    assert groups(analysis) == {"stem": 8, "middle": 8}
    result = sfp_onnx.apply(analysis, plan_of(analysis, {"stem": [1, 2], "middle": [0, 7]}))
    reference = masked(model, result.cuts)
    for batch in (1, 2, 5):
        own, other = (run(item, feeds(batch, 8, 8))[0] for item in (result.to_proto(), reference))
        assert error(own, other) < 1e-5


@pytest.mark.parametrize("opset", [11, 13, 18])
@pytest.mark.parametrize("way", ["resize", "resize like", "crop", "flatten positions"])
def test_height_and_width_stay_dynamic(way: str, opset: int) -> None:
    b = Builder(opset, 2)
    x = b.input(["N", 3, "H", "W"])
    y = b.op("Relu", b.conv(x, 3, 8, name="stem"))
    small = b.op("Relu", b.conv(y, 8, 6, strides=[2, 2], name="down"))
    empty = b.const([], np.float32) if opset < 13 else None
    if way == "resize":
        sizes = b.op("Mul", b.slice(b.op("Shape", small), [2], [4], [0]), b.const([2, 2], np.int64))
        sizes = b.op("Concat", b.slice(b.op("Shape", small), [0], [2], [0]), sizes, axis=0)
        up = b.op("Resize", small, empty, empty, sizes, mode="nearest")
    elif way == "resize like":
        head, tail = b.slice(b.op("Shape", small), [0], [2], [0]), b.slice(b.op("Shape", y), [2], [4], [0])
        up = b.op("Resize", small, empty, empty, b.op("Concat", head, tail, axis=0), mode="nearest")
    elif way == "crop":
        up = b.resize(small, scales=[1, 1, 2, 2])
        ends = b.slice(b.op("Shape", y), [2], [4], [0])
        up = b.op("Slice", up, b.const([0, 0], np.int64), ends, b.const([2, 3], np.int64))
    else:
        size = b.op("Shape", small)
        flat = b.op("Reshape", small, b.const([0, 6, -1], np.int64))
        mixed = b.op("Transpose", b.op("Sigmoid", b.op("Transpose", flat, perm=[0, 2, 1])), perm=[0, 2, 1])
        up = b.resize(b.op("Reshape", mixed, size), scales=[1, 1, 2, 2])
    model = b.model(b.conv(b.op("Concat", y, up, axis=1), 14, 5, name="last"))
    analysis = sfp_onnx.inspect(model)
    assert groups(analysis) == {"stem": 8, "down": 6}
    result = sfp_onnx.apply(analysis, plan_of(analysis, {"stem": [1, 2], "down": [0, 5]}))
    reference = masked(model, result.cuts)
    for batch, height, width in ((1, 8, 8), (2, 12, 20), (3, 32, 16)):
        own, other = (run(item, feeds(batch, height, width))[0] for item in (result.to_proto(), reference))
        assert error(own, other) < 1e-5
