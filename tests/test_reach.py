"""Kinds of graphs that modern exporters write: what may be gathered instead of pinned, shared weights, rewritten normalisations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import pytest
from building import Builder, assert_exact, assert_listed, random_plan

import sfp_onnx
from sfp_onnx.core.options import InspectOptions, PlanOptions
from sfp_onnx.coupling.analysis import Analysis
from sfp_onnx.evaluation import Distances
from sfp_onnx.graph import inputs
from sfp_onnx.planning.figures import macs_terms

SHARED = Path(__file__).resolve().parents[2] / "shared"
GRAPHS = sorted(SHARED.glob("graphs/*.onnx")) or [SHARED / "none"]
ZOO = sorted(SHARED.glob("zoo/*.onnx")) or [SHARED / "none"]
FULL = {"eca"}  # nothing of these can shrink as they stand; the reason is given


def samples(analysis: Analysis, count: int = 8) -> dict[str, np.ndarray] | None:
    """Rows like those that the model was traced with, no two alike where they are floats; none for inputs without a common batch."""
    random, data = np.random.default_rng(3), {}
    shapes = {port.name: port.shape or () for port in inputs(analysis.model)}
    axes = {name: next((axis for axis, size in enumerate(shape) if not isinstance(size, int)), 0) for name, shape in shapes.items()}
    feeds = analysis.prepared.feeds
    if len({array.shape[axes[name]] for name, array in feeds.items() if array.ndim}) > 1:
        return None
    for name, array in feeds.items():
        rows = np.concatenate([array] * count, axes[name]) if array.ndim else array
        data[name] = rows + random.standard_normal(rows.shape).astype(rows.dtype) if rows.dtype.kind == "f" else rows
    return data


def pruned_half(analysis: Analysis) -> Any:
    return sfp_onnx.prune(analysis, PlanOptions(ratio=0.5), data=samples(analysis))


def pruned(path: Path | onnx.ModelProto, expand: str) -> Any:
    return pruned_half(sfp_onnx.inspect(path, expand=expand))


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_small_graphs_are_cut_and_repaired(path: Path, shared: Path) -> None:
    """As they stand; and with all that may be expanded, where that frees anything."""
    plain, wide = (sfp_onnx.inspect(path, expand=expand) for expand in ("none", "all"))
    if path.stem in FULL:
        with pytest.raises(sfp_onnx.TargetError, match="nothing can be pruned"):
            pruned_half(plain)
    widths = [{group.name: group.width for group in analysis.coupling.groups} for analysis in (plain, wide)]
    for analysis in [*([] if path.stem in FULL else [plain]), *([wide] if widths[0] != widths[1] else [])]:
        result = pruned_half(analysis)
        assert result.verification is not None and (result.repaired is not None or not result.data)
        assert result.plan.after.macs < result.plan.before.macs


@pytest.mark.parametrize("path", ZOO, ids=lambda path: path.stem)
def test_zoo_with_data_and_every_flag(path: Path, shared: Path) -> None:
    """There is no file whose inputs have no common batch. What the solver counts is what the written model has, as far as all units of a
    group hold the same share of an axis (long chains of shuffles do not)."""
    analysis = sfp_onnx.inspect(path, expand="all")
    result = pruned_half(analysis)
    assert result.repaired is not None
    kept = np.asarray([group.width - len(group.remove) for group in result.plan.groups])
    cost = float(macs_terms(analysis.coupling, analysis.samples).total(kept))
    assert cost == pytest.approx(result.plan.after.macs, rel=0.03 if path.stem.startswith("shufflenet") else 1e-9)


# ---- kinds, by hand --------------------------------------------------------------------------------------------------


def cut(model: onnx.ModelProto, *names: str, select: bool = False, **options: Any) -> Analysis:
    """Random plans are exact, and these layers can shrink. ``select``: what is removed is divided by."""
    analysis = sfp_onnx.inspect(model, **options)
    for seed in range(3):
        result = sfp_onnx.apply(analysis, random_plan(analysis, seed))
        assert_exact(model, result, select=select)
        assert_listed(model, result)
    assert {*names} <= {name for group in analysis.coupling.groups for name in group.producers}
    return analysis


def test_a_constant_that_expands_an_axis_is_gathered() -> None:
    """A token of its own in front of the others: Expand makes it for every sample."""
    b = Builder(17, 1)
    x = b.input(["N", 6, 12])
    y = b.op("MatMul", x, b.weight(12, 16, name="w1"), name="embed")
    batch = b.op("Slice", b.op("Shape", x), b.const([0], np.int64), b.const([1], np.int64))
    shape = b.op("Concat", batch, b.const([1, 16], np.int64), axis=0)
    token = b.op("Expand", b.const(np.random.default_rng(0).standard_normal((1, 1, 16))), shape)
    y = b.op("Concat", token, y, axis=1)
    cut(b.model(b.op("MatMul", b.reduce("ReduceMean", y, [1]), b.weight(16, 3))), "embed")


def test_states_that_start_as_zeros_are_gathered() -> None:
    b = Builder(17, 2)
    x = b.input(["N", 12])
    y = b.gemm(x, 12, 16, name="inner")
    batch = b.op("Slice", b.op("Shape", x), b.const([0], np.int64), b.const([1], np.int64))
    zeros = b.op("Expand", b.const(np.zeros((1, 1))), b.op("Concat", batch, b.const([16], np.int64), axis=0))
    cut(b.model(b.gemm(b.op("Relu", b.op("Add", y, zeros)), 16, 3, name="last")), "inner")


def test_a_table_of_positions_is_gathered() -> None:
    """Sines of the positions that are there: as many as the sequence is long."""
    b = Builder(17, 3)
    x = b.input(["N", "T", 12])
    y = b.op("MatMul", x, b.weight(12, 16), name="embed")
    length = b.op("Slice", b.op("Shape", x), b.const([1], np.int64), b.const([2], np.int64))
    table = b.op("Slice", b.const(np.sin(np.arange(64 * 16).reshape(64, 16))), b.const([0], np.int64), length, b.const([0], np.int64))
    y = b.op("Relu", b.op("Add", y, b.op("Sin", table)))
    cut(b.model(b.op("MatMul", b.reduce("ReduceMean", y, [1]), b.weight(16, 3))), "embed")


def test_a_weight_that_is_read_through_identities_stays_one() -> None:
    b = Builder(17, 4)
    y = b.input(["N", 12])
    inner, outer = b.weight(12, 20, name="inner"), b.weight(20, 12, name="outer")
    for step in range(3):
        first, second = (name if not step else b.op("Identity", name) for name in (inner, outer))
        y = b.op("Add", y, b.op("MatMul", b.op("Relu", b.op("MatMul", y, first)), second))
    model = b.model(b.gemm(y, 12, 3, name="last"))
    analysis = cut(model)
    result = sfp_onnx.apply(analysis, sfp_onnx.plan(analysis, PlanOptions(ratio=0.5)))
    held = [tensor.name for tensor in result.to_proto().graph.initializer if len(tensor.dims) == 2]
    assert held.count("inner") == held.count("outer") == 1 and len(held) <= 4


def test_a_transposed_convolution_with_one_output_channel_gets_one_bias() -> None:
    b = Builder(17, 5)
    y = b.op("Relu", b.conv(b.input(["N", 3, 8, 8]), 3, 16, name="stem"))
    y = b.op("ConvTranspose", y, b.weight(16, 1, 2, 2), strides=[2, 2], name="up")
    analysis = sfp_onnx.inspect(b.model(y))
    result = sfp_onnx.prune(analysis, PlanOptions(ratio=0.5), data=samples(analysis))
    biases = [tensor for tensor in result.to_proto().graph.initializer if tensor.name == "up/bias"]
    assert [list(tensor.dims) for tensor in biases] == [[1]]


@pytest.mark.parametrize("recorded", [False, True])
def test_normalisations_over_a_cut_axis_are_repaired(recorded: bool) -> None:
    b = Builder(17, 6)
    x = b.input(["N", 5, 12])
    y = b.op("MatMul", x, b.weight(12, 16), name="embed")
    for _ in range(2):
        y = b.op("LayerNormalization", y, b.uniform(16), b.weight(16, fan_in=16), axis=-1)
    y = b.op("MatMul", b.op("Relu", b.op("MatMul", y, b.weight(16, 24), name="wide")), b.weight(24, 3))
    model = b.model(y)
    if not recorded:
        del model.graph.value_info[:]
    result = pruned(model, "all")
    assert result.repaired is not None and result.plan.after.macs < 0.5 * result.plan.before.macs


@pytest.mark.parametrize("table", [False, True])
def test_sums_that_onnxruntime_normalises_are_cut(table: bool) -> None:
    """Padded on both sides; what is added inside counts in the place of a removed channel too."""
    b = Builder(17, 8)
    y = b.op("MatMul", b.input(["N", 5, 12]), b.weight(12, 16), name="embed")
    skip = b.weight(5, 16) if table else b.op("MatMul", b.op("Relu", b.op("MatMul", y, b.weight(16, 24))), b.weight(24, 16))
    vectors = [b.uniform(16), b.weight(16, fan_in=16), b.weight(16, fan_in=16)]
    y = b.op("SkipLayerNormalization", y, skip, *vectors, domain="com.microsoft", epsilon=1e-4)
    model = b.model(b.op("MatMul", y, b.weight(16, 3)))
    assert "embed" in {name for pin in sfp_onnx.inspect(model).coupling.pinned for name in pin.layers}
    analysis = sfp_onnx.inspect(model, expand="all")
    assert "embed" in {name for group in analysis.coupling.groups for name in group.producers}
    for seed in range(3):
        assert_exact(model, sfp_onnx.apply(analysis, random_plan(analysis, seed)))
    assert pruned(model, "all").repaired is not None


def reasons(model: onnx.ModelProto) -> dict[str, tuple[str, str]]:
    """Reason and node for every layer that cannot shrink."""
    return {name: (pin.reason, pin.node) for pin in sfp_onnx.inspect(model).coupling.pinned for name in pin.layers}


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("kind", ["LayerNormalization", "Softmax", "LRN"])
def test_the_first_cause_is_named_across_a_depthwise_convolution(kind: str, multiplier: int) -> None:
    """What an operator needs whole stays with that reason, in front of depthwise convolutions and beside them."""
    b = Builder(17, 9)
    x = b.conv(b.input(["N", 3, 8, 8]), 3, 16, name="stem")
    y = b.conv(b.conv(x, 16, 16, group=16, name="depthwise"), 16, 16 * multiplier, group=16, name="again")
    y = b.conv(y, 16 * multiplier, 16, group=16, name="back")
    if kind == "LRN":
        y = b.op("LRN", y, size=3, name="whole")
    else:
        vectors = [b.uniform(16), b.weight(16)] if kind == "LayerNormalization" else []
        y = b.op("Transpose", b.op(kind, b.op("Transpose", y, perm=[0, 2, 3, 1]), *vectors, axis=-1, name="whole"), perm=[0, 3, 1, 2])
    y = b.op("Add", x, b.conv(b.op("Relu", b.conv(y, 16, 24, name="wide")), 24, 16, name="beside"))
    found = reasons(b.model(b.conv(y, 16, 4, name="last")))
    assert "wide" not in found
    assert {found[name][1] for name in ("back", "beside", "stem")[: 3 if multiplier == 1 else 1]} == {"whole"}


def test_what_ties_all_channels_is_named() -> None:
    b = Builder(21, 10)
    y = b.conv(b.input(["N", 8, 8, 8]), 8, 8, group=8, name="depthwise")
    y = b.conv(b.op("Relu", y), 8, 16, name="wide")
    y = b.op("GroupNormalization", y, b.uniform(16), b.weight(16), num_groups=1, name="norm")
    found = reasons(b.model(b.conv(y, 16, 4, name="last")))
    assert found["wide"] == ("all channels of this axis can only leave together", "norm")
    assert found["depthwise"] == ("its grouped convolution has no channels on its other side that can leave", "depthwise")


@pytest.mark.parametrize("maps", [False, True])
def test_channels_in_front_of_an_embedding_may_leave(maps: bool, tmp_path: Path) -> None:
    """A projection gives the output all its channels again; where nothing leaves in front of it, it does nothing."""
    b = Builder(17, 7)
    y = b.conv(b.input(["N", 3, 8, 8]), 3, 16, name="stem") if maps else b.op("MatMul", b.input(["N", 5, 12]), b.weight(12, 16))
    for _ in range(2):
        inner = b.op("Relu", b.conv(y, 16, 24) if maps else b.op("MatMul", y, b.weight(16, 24, fan_in=16)))
        y = b.op("Add", y, b.conv(inner, 24, 16) if maps else b.op("MatMul", inner, b.weight(24, 16, fan_in=24)))
    model = b.model(y)
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    before = sfp_onnx.inspect(path)
    analysis = sfp_onnx.inspect(path, expand_outputs=True)
    assert analysis.coupling.channels_prunable > before.coupling.channels_prunable
    expand = InspectOptions(expand_outputs=True)
    data, small = samples(analysis, 64), tmp_path / "small.onnx"
    result = sfp_onnx.prune(path, PlanOptions(ratio=0.5), data=data, inspect_options=expand, output=sfp_onnx.OutputOptions(path=small))
    assert result.repaired is not None and result.repaired.after < 0.9 * result.repaired.before
    shapes = [[dim.dim_value for dim in item.type.tensor_type.shape.dim[1:]] for item in result.to_proto().graph.output]
    assert shapes == [[dim.dim_value for dim in item.type.tensor_type.shape.dim[1:]] for item in model.graph.output]
    plan = sfp_onnx.plan(path, PlanOptions(ratio=0.5), data=data, inspect_options=expand)
    again = tmp_path / "again.onnx"
    sfp_onnx.apply(path, plan, data=data, output=sfp_onnx.OutputOptions(path=again))
    assert again.read_bytes() == small.read_bytes()
    inside = sfp_onnx.plan(path, PlanOptions(ratio=0.5, keep=r"stem|MatMul_0|MatMul_2|Conv_2|projection"), inspect_options=expand)
    unused = sfp_onnx.apply(path, inside).to_proto().graph
    assert not [tensor.name for tensor in unused.initializer if tensor.name.endswith("projection")]


# ---- operators that need all channels --------------------------------------------------------------------------------


def several_axes(b: Builder, x: str) -> str:
    """Over channels, height and width at once."""
    return b.op("LayerNormalization", x, b.weight(16, 8, 8), b.weight(16, 8, 8), axis=1)


def one_group(b: Builder, x: str) -> str:
    """GroupNorm with one group as it is exported: normalised as one long row, and scaled per channel."""
    row = b.op("Reshape", x, b.const([0, 1, -1], np.int64))
    row = b.op("InstanceNormalization", row, b.const([1.0]), b.const([0.0]))
    y = b.op("Reshape", row, b.op("Shape", x))
    return b.op("Add", b.op("Mul", y, b.weight(16, 1, 1)), b.weight(16, 1, 1))


def channels_last(b: Builder, x: str) -> str:
    """The same, of maps whose channels are the last axis."""
    y = b.op("Transpose", x, perm=[0, 2, 3, 1])
    row = b.op("InstanceNormalization", b.op("Reshape", y, b.const([0, 1, -1], np.int64)), b.const([1.0]), b.const([0.0]))
    return b.op("Transpose", b.op("Reshape", row, b.op("Shape", y)), perm=[0, 3, 1, 2])


def efficient_attention(b: Builder, x: str) -> str:
    """A gate from a convolution along channels."""
    row = b.op("Unsqueeze", b.op("Flatten", b.op("GlobalAveragePool", x), axis=1), b.const([1], np.int64))
    row = b.op("Sigmoid", b.op("Conv", row, b.weight(1, 1, 3), pads=[1, 1], name="along"))
    gate = b.op("Unsqueeze", b.op("Squeeze", row, b.const([1], np.int64)), b.const([2, 3], np.int64))
    return b.op("Mul", x, gate)


def narrower(b: Builder, x: str) -> str:
    """A convolution along channels that makes fewer of them."""
    row = b.op("Unsqueeze", b.op("Flatten", b.op("GlobalAveragePool", x), axis=1), b.const([1], np.int64))
    row = b.op("Conv", row, b.weight(1, 1, 4), strides=[4], name="along")
    return b.op("Mul", x, b.op("Unsqueeze", b.op("ReduceMean", row, axes=[2], keepdims=1), b.const([3], np.int64)))


def neighbours(b: Builder, x: str) -> str:
    return b.op("LRN", x, size=3, alpha=0.5)


def one_of_all(b: Builder, x: str) -> str:
    return b.op("GroupNormalization", x, b.weight(1), b.weight(1), num_groups=1)


def probabilities(b: Builder, x: str) -> str:
    return b.op("Softmax", x, axis=1)


def without_rule(b: Builder, x: str) -> str:
    """What it makes cannot be cut again."""
    y = b.op("Det", x)
    return b.op("Mul", x, b.op("Unsqueeze", b.op("ReduceMean", y, axes=[1], keepdims=1), b.const([2, 3], np.int64)))


WHOLE = [several_axes, one_group, channels_last, efficient_attention, narrower, neighbours, one_of_all, probabilities, without_rule]


@pytest.mark.parametrize("open_size", [False, True])
@pytest.mark.parametrize("form", WHOLE)
def test_what_needs_all_channels_gets_them_again(form: Any, open_size: bool) -> None:
    opset = 18 if form is one_of_all else 17
    if open_size and form is several_axes:
        pytest.skip("its scale has the size of the maps")
    b = Builder(opset, 11)
    sides = ["H", "W"] if open_size and form is not without_rule else [8, 8]
    x = b.op("Relu", b.conv(b.input(["N", 3, *sides]), 3, 16, name="stem"))
    y = b.conv(b.op("Relu", b.conv(form(b, x), 16, 24, name="wide")), 24, 16, name="beside")
    model = b.model(b.conv(b.op("Add", x, y), 16, 4, name="last"))
    assert "stem" in reasons(model)
    analysis = sfp_onnx.inspect(model, expand="all")
    assert {"stem", "beside", "wide"} <= {name for group in analysis.coupling.groups for name in group.producers}
    for seed in range(3):
        assert_exact(model, sfp_onnx.apply(analysis, random_plan(analysis, seed)))
    assert pruned(model, "all").repaired is not None


def test_expansion_is_a_matter_of_the_plan(tmp_path: Path) -> None:
    """By default only if the target cannot be met without it; and the same from a plan, and from a manifest."""
    b = Builder(17, 12)
    x = b.conv(b.input(["N", 3, 8, 8]), 3, 16, name="stem")
    for _ in range(2):
        inner = b.op("Relu", b.conv(neighbours(b, x), 16, 24))
        x = b.op("Add", x, b.conv(inner, 24, 16))
    path, small, again, third = (tmp_path / name for name in ("m.onnx", "small.onnx", "again.onnx", "third.onnx"))
    onnx.save(b.model(b.conv(x, 16, 4, name="last")), path)
    loose = sfp_onnx.prune(path, PlanOptions(targets=("macs=70%",)))
    assert not loose.plan.options["cut_layernorm"]
    tight, output = PlanOptions(targets=("macs=5%",)), sfp_onnx.OutputOptions(path=small, manifest=tmp_path / "m.json")
    with pytest.raises(sfp_onnx.TargetError, match="cannot be met"):
        sfp_onnx.prune(path, tight, inspect_options=InspectOptions(expand="none"))
    result = sfp_onnx.prune(path, tight, output=output)
    assert result.plan.options["cut_layernorm"] and result.plan.after.macs <= 0.05 * result.plan.before.macs
    sfp_onnx.apply(path, result.plan, output=sfp_onnx.OutputOptions(path=again))
    sfp_onnx.prune(path, tight, output=sfp_onnx.OutputOptions(path=third, locked=tmp_path / "m.json"))
    assert small.read_bytes() == again.read_bytes() == third.read_bytes()


def test_a_target_is_met_where_units_hold_different_shares() -> None:
    """The solver counts every channel of a group alike; those that leave first are the ones that one layer reads once only."""
    b = Builder(17, 13)
    scales = np.asarray([1.0] * 8 + [0.01] * 8, np.float32)
    x = b.conv(b.input(["N", 3, 8, 8]), 3, 16, name="stem")
    x = b.op("Relu", b.op("Mul", x, b.const(scales.reshape(16, 1, 1))))
    twice = b.op("Gather", x, b.const([*range(16), *range(8)], np.int64), axis=1)
    model = b.model(b.conv(b.op("Relu", b.conv(twice, 24, 32, name="wide")), 32, 4, name="last"))
    for share in (80, 60, 40):
        options = PlanOptions(targets=(f"macs={share}%",), allocation="solve", align=1)
        result = sfp_onnx.prune(model, options, inspect_options=InspectOptions(expand="none"))
        assert share - 12 < 100 * result.plan.after.macs / result.plan.before.macs <= share


# ---- heads in the forms that exporters write --------------------------------------------------------------------------


def heads(b: Builder, x: str, name: str, count: int = 4, size: int = 4) -> str:
    """N x 6 x 12 -> N x heads x 6 x dimensions."""
    y = b.op("MatMul", x, b.weight(12, count * size), name=name)
    return b.op("Transpose", b.op("Reshape", y, b.const([0, 0, count, size], np.int64)), perm=[0, 2, 1, 3])


def joined(b: Builder, y: str) -> str:
    """N x heads x 6 x dimensions -> N x 6 x 16."""
    return b.op("Reshape", b.op("Transpose", y, perm=[0, 2, 1, 3]), b.const([0, 0, -1], np.int64))


def test_a_column_that_is_padded_to_every_head_leaves_with_it() -> None:
    """Attention without a Softmax: ones beside the values sum up what the queries are divided by."""
    b = Builder(17, 14)
    x = b.input(["N", 6, 12])
    q, k, v = (heads(b, x, name) for name in "qkv")
    v = b.op("Pad", v, b.const([0] * 7 + [1], np.int64), b.const(np.float32(1)))
    y = b.op("MatMul", b.op("Relu", q), b.op("MatMul", b.op("Transpose", b.op("Relu", k), perm=[0, 1, 3, 2]), v))
    last = b.const([-1], np.int64)
    total = b.op("Slice", y, last, b.const([2**31], np.int64), last)
    y = b.op("Div", b.op("Slice", y, b.const([0], np.int64), last, last), b.op("Add", total, b.const(1e-3)))
    cut(b.model(b.op("MatMul", joined(b, y), b.weight(16, 3))), "q", "k", "v", select=True)


def test_tables_that_exporters_merged_are_cut_apart() -> None:
    """Two attentions with equal biases per head; one adds its bias to a mask first, which is none of the data."""
    b = Builder(17, 15)
    x, table = b.input(["N", 6, 12]), b.weight(1, 4, 6, 6)
    batch = b.op("Slice", b.op("Shape", x), b.const([0], np.int64), b.const([1], np.int64))
    mask = b.op("Expand", b.const(np.triu(np.ones((1, 1, 6, 6)))), b.op("Concat", batch, b.const([1, 6, 6], np.int64), axis=0))
    parts = []
    for bias in (table, b.op("Add", table, mask)):
        q, k, v = (heads(b, x, f"{name}{len(parts)}") for name in "qkv")
        scores = b.op("Add", b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2])), bias)
        parts.append(b.op("MatMul", joined(b, b.op("MatMul", b.op("Softmax", scores, axis=-1), v)), b.weight(16, 12)))
    cut(b.model(b.op("MatMul", b.op("Add", *parts), b.weight(12, 3))), *(f"{name}{part}" for name in "qkv" for part in (0, 1)))


def test_heads_that_are_merged_with_windows_stay_heads() -> None:
    """Windows of tokens beside the samples, heads behind them on one axis: those of all windows are the same."""
    b = Builder(17, 17)
    x = b.input(["N", 6, 12])
    for block in range(2):
        windows = b.op("Reshape", x, b.const([-1, 3, 12], np.int64))
        q, k, v = (b.op("MatMul", windows, b.weight(12, 16), name=f"{name}{block}") for name in "qkv")
        q, k, v = (b.op("Transpose", b.op("Reshape", y, b.const([0, 0, 4, 4], np.int64)), perm=[0, 2, 1, 3]) for y in (q, k, v))
        q, k, v = (b.op("Reshape", y, b.const([-1, 3, 4], np.int64)) for y in (q, k, v))
        y = b.op("MatMul", b.op("Softmax", b.op("MatMul", q, b.op("Transpose", k, perm=[0, 2, 1])), axis=-1), v)
        y = b.op("Transpose", b.op("Reshape", y, b.const([-1, 4, 3, 4], np.int64)), perm=[0, 2, 1, 3])
        y = b.op("MatMul", b.op("Reshape", y, b.const([0, 0, -1], np.int64)), b.weight(16, 12))
        x = b.op("Add", x, b.op("Reshape", y, b.const([-1, 6, 12], np.int64)))
    cut(b.model(b.op("MatMul", x, b.weight(12, 3))), *(f"{name}{block}" for name in "qkv" for block in (0, 1)))


def test_indices_that_are_computed_from_a_size_that_shrinks_stay_consistent() -> None:
    """Numbers of rows, spread to the shape of what was computed from them."""
    b = Builder(17, 18)
    x = b.input(["N", 16, 12])
    table = b.op("ConstantOfShape", b.const([1, 16, 12], np.int64), value=oh.make_tensor("value", onnx.TensorProto.FLOAT, [1], [0.5]))
    size = b.op("Gather", b.op("Shape", table), b.const(1, np.int64))
    rows = b.op("Reshape", b.op("Range", b.const(0, np.int64), size, b.const(1, np.int64)), b.const([-1, 1], np.int64))
    rows = b.op("Expand", rows, b.op("Shape", b.op("Add", rows, b.const([[0, 1]], np.int64))))
    first = b.op("Gather", b.op("Transpose", rows), b.const(0, np.int64), axis=0)
    table = b.op("Gather", table, first, axis=1)
    batch = b.op("Slice", b.op("Shape", x), b.const([0], np.int64), b.const([1], np.int64))
    table = b.op("Expand", table, b.op("Concat", batch, b.const([16, 12], np.int64), axis=0))
    y = b.op("Relu", b.op("Add", b.op("MatMul", x, b.weight(12, 24), name="wide"), b.op("MatMul", table, b.weight(12, 24))))
    cut(b.model(b.op("MatMul", b.reduce("ReduceSum", y, [1]), b.weight(24, 3))), "wide")


def test_parts_of_a_weight_that_are_cut_by_a_size_stay_as_they_were() -> None:
    """A probe that asks all samples the same: its projection is a part of a weight, up to the size of the probe's own channels."""
    b = Builder(17, 19)
    x = b.input(["N", 6, 12])
    batch = b.op("Slice", b.op("Shape", x), b.const([0], np.int64), b.const([1], np.int64))
    probe = b.op("Expand", b.weight(1, 1, 16), b.op("Concat", batch, b.const([1, 16], np.int64), axis=0))
    width = b.op("Slice", b.op("Shape", probe), b.const([2], np.int64), b.const([3], np.int64))
    weight, axis, nothing = b.weight(32, 16), b.const([0], np.int64), b.const([0], np.int64)
    first = b.op("Slice", weight, nothing, width, axis)
    q = b.op("MatMul", probe, b.op("Transpose", first, perm=[1, 0]))
    k = b.op("MatMul", x, b.weight(12, 16), name="k")
    scores = b.op("Softmax", b.op("MatMul", q, b.op("Transpose", k, perm=[0, 2, 1])), axis=-1)
    y = b.op("MatMul", scores, b.op("MatMul", x, b.weight(12, 24), name="v"))
    cut(b.model(b.op("MatMul", y, b.weight(24, 3))), "k", "v")


def test_lengths_that_cannot_grow_are_traced_with_less() -> None:
    """A table of positions has as many rows as the model takes words."""
    b = Builder(17, 20)
    words = b.input(["N", "T"], dtype=onnx.TensorProto.INT64)
    y = b.op("Gather", b.weight(30, 12), words)
    length = b.op("Slice", b.op("Shape", words), b.const([1], np.int64), b.const([2], np.int64))
    y = b.op("Add", y, b.op("Slice", b.weight(20, 12), b.const([0], np.int64), length, b.const([0], np.int64)))
    analysis = sfp_onnx.inspect(b.model(b.op("MatMul", y, b.weight(12, 3), name="last")))
    assert analysis.prepared.trace.dynamic_axes[analysis.prepared.nodes[-1].outputs[0]] == (0, 1)


def test_places_in_an_embedding_are_no_channels() -> None:
    """Rows of zeros behind the words vary along the places of the output, too; what gets a projection is the axis of the channels."""
    b = Builder(17, 21)
    y = b.op("MatMul", b.input(["N", 5, 12]), b.weight(12, 16), name="embed")
    batch = b.op("Slice", b.op("Shape", y), b.const([0], np.int64), b.const([1], np.int64))
    zeros = b.op("ConstantOfShape", b.op("Concat", batch, b.const([3, 16], np.int64), axis=0))
    y = b.op("Concat", y, zeros, axis=1)
    y = b.op("Add", y, b.op("MatMul", b.op("Relu", b.op("MatMul", y, b.weight(16, 24))), b.weight(24, 16), name="beside"))
    analysis = sfp_onnx.inspect(b.model(y), expand="all")
    assert analysis.projected and {"embed", "beside"} <= {name for group in analysis.coupling.groups for name in group.producers}
    for seed in range(3):
        sfp_onnx.apply(analysis, random_plan(analysis, seed))


def test_a_cut_that_changes_nothing_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that start as zeros: what is cut in front of them told nobody anything, and a repair can only do harm (as here)."""
    b = Builder(17, 16)
    x = b.conv(b.input(["N", 3, 8, 8]), 3, 16, name="stem")
    inner = b.op("Relu", b.conv(x, 16, 24, name="inner"))
    x = b.op("Add", x, b.op("Conv", inner, b.const(np.zeros((16, 24, 1, 1))), name="zero"))
    analysis = sfp_onnx.inspect(b.model(b.conv(b.op("Relu", x), 16, 4, name="last")))
    options, data = PlanOptions(ratio=0.5, only="inner"), samples(analysis)
    assert sfp_onnx.prune(analysis, options, data=data).repaired.before == 0
    monkeypatch.setattr("sfp_onnx.repair.distances", lambda *_: Distances("centred error", (0.0, 1e-4), 1e-5))
    result = sfp_onnx.prune(analysis, options, data=data)
    assert result.repaired is not None and not result.repaired.kept
    monkeypatch.setattr("sfp_onnx.repair.distances", lambda *_: Distances("centred error", (1e-5, 1e-4), 1e-5))
    with pytest.raises(sfp_onnx.VerificationError, match="away from the original"):
        sfp_onnx.prune(analysis, options, data=data)
