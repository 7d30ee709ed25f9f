"""Repair of whole small models: what it recovers, what it leaves alone, and how it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper as nh
import pytest
from building import Builder, error, plan_of, run, with_all_tensors

import sfp_onnx
from sfp_onnx import graph
from sfp_onnx.core.options import RepairOptions
from sfp_onnx.core.types import BoolArray
from sfp_onnx.repair.lockstep import repair
from sfp_onnx.repair.ridge import MOST_GAIN
from sfp_onnx.report.manifest import Pruned

WIDTH = 8
EXACT = RepairOptions(ridges=(1e-7, 1e-3))
COPIES = {3: (1, 2.0), 7: (5, 0.5)}  # channel: (that of which it is a multiple, factor)


def images(*shape: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def arrays(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: nh.to_array(tensor) for tensor in model.graph.initializer}


def stem(b: Builder, x: str, inputs: int, rank: int = 2, copies: bool = True, outputs: Sequence[str] = ("read",)) -> str:
    """A convolution of which some channels are multiples of others, and Relu."""
    weight, bias = b.random.standard_normal((WIDTH, inputs, *[3] * rank)), b.random.standard_normal(WIDTH) / 3
    for channel, (other, factor) in COPIES.items() if copies else ():
        weight[channel], bias[channel] = weight[other] * factor, bias[other] * factor
    made = b.op("Conv", x, b.const(weight / 4, name="stem.w"), b.const(bias), pads=[1] * 2 * rank, name="stem")
    return b.op("Relu", made, outputs=list(outputs))


def tail(b: Builder, y: str, channels: int, rank: int = 2, name: str = "last") -> onnx.ModelProto:
    return b.model(b.conv(b.op("Relu", y), channels, 3, 1, rank=rank, name=name))


def repaired(
    model: onnx.ModelProto, data: np.ndarray, options: RepairOptions | None = EXACT, remove: dict[str, Sequence[int]] | None = None
) -> Pruned:
    """Cut (by default the copies that the stem makes) and repair."""
    analysis = sfp_onnx.inspect(model)
    if remove is None:
        group = max((group for group in analysis.coupling.groups if "stem" in group.producers), key=lambda group: group.width)
        remove = {group.name: [3, 7]}
    return sfp_onnx.apply(analysis, plan_of(analysis, remove), sfp_onnx.data_for(analysis.model, {"x": data}), repair=options)


def distance(model: onnx.ModelProto, result: Pruned, data: np.ndarray) -> float:
    return max(error(own, other) for own, other in zip(run(result.to_proto(), {"x": data}), run(model, {"x": data}), strict=True))


def fits(result: Pruned) -> dict[str, str]:
    assert result.repaired is not None
    return {own.layer: own.kind for own in result.repaired.fits}


# ---- exact recovery --------------------------------------------------------------------------------------------------


def conv_model(rank: int = 2, transposed: bool = False, group: int = 1, bias: bool = True, **attributes: Any) -> onnx.ModelProto:
    b = Builder(seed=rank)
    y = stem(b, b.input(["N", 2, *[6] * rank]), 2, rank)
    shape = (WIDTH, 6 // group) if transposed else (6, WIDTH // group)
    operands = [b.weight(*shape, *[3] * rank, fan_in=9 * WIDTH)] + ([b.weight(6, fan_in=6)] if bias else [])
    kind = "ConvTranspose" if transposed else "Conv"
    return tail(b, b.op(kind, y, *operands, group=group, name="reader", **attributes), 6, rank)


def dense_model(kind: str) -> onnx.ModelProto:
    """The stem's maps, averaged to features, or as rows of positions."""
    b = Builder(seed=5)
    y = stem(b, b.input(["N", 2, 6, 6]), 2)
    if kind == "gemm of a flattened map":
        return b.model(b.gemm(b.op("Relu", b.gemm(b.op("Flatten", y), 36 * WIDTH, 6, name="reader")), 6, 4, name="last"))
    if kind == "einsum":
        y = b.op("Einsum", y, b.weight(6, WIDTH), equation="nkhw,ok->nohw", name="reader")
        return b.model(b.op("Relu", y))
    if kind == "left":
        rows = b.op("Reshape", y, b.const([0, WIDTH, -1], np.int64))
        return b.model(b.op("Relu", b.op("MatMul", b.weight(6, WIDTH), rows, name="reader")))
    rows = b.op("Transpose", b.op("Reshape", y, b.const([0, WIDTH, -1], np.int64)), perm=[0, 2, 1])
    if kind == "gemm":
        pooled = b.op("Flatten", b.op("GlobalAveragePool", y))
        return b.model(b.gemm(b.op("Relu", b.gemm(pooled, WIDTH, 6, transposed=True, name="reader")), 6, 4, name="last"))
    made = b.op("MatMul", rows, b.weight(WIDTH, 6, fan_in=WIDTH), name="reader")
    if kind == "matmul and add":
        made = b.op("Add", b.weight(6, fan_in=6), made)
    return b.model(b.op("Relu", made))


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "conv": lambda: conv_model(pads=[1] * 4),
    "strided, dilated": lambda: conv_model(strides=[2, 1], dilations=[1, 2], pads=[1, 0, 2, 1]),
    "same": lambda: conv_model(strides=[2, 2], auto_pad="SAME_LOWER"),
    "conv without bias": lambda: conv_model(bias=False),
    "1-d": lambda: conv_model(1),
    "3-d": lambda: conv_model(3),
    "grouped": lambda: conv_model(group=2),
    "transposed": lambda: conv_model(transposed=True, strides=[2, 2], pads=[1] * 4),
    "transposed, grouped": lambda: conv_model(transposed=True, group=2, bias=False),
    **{
        kind: lambda kind=kind: dense_model(kind)  # type: ignore[misc]
        for kind in ("gemm", "gemm of a flattened map", "matmul", "matmul and add", "left", "einsum")
    },
}


def data_of(model: onnx.ModelProto, samples: int = 96, seed: int = 3) -> np.ndarray:
    return images(samples, *(dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim[1:]), seed=seed)


@pytest.mark.parametrize("kind", MODELS)
def test_linear_combinations_of_kept_channels_are_recovered(kind: str) -> None:
    model = MODELS[kind]()
    result, bare = (repaired(model, data_of(model, 400 if "gemm" in kind else 96), options) for options in (EXACT, None))
    fresh = data_of(model, 20, seed=9)
    assert fits(result)["reader"] == "weights"
    assert distance(model, bare, fresh) > 1e-2
    assert distance(model, result, fresh) <= 1e-4


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("fit", ["lstsq", "bias"])
def test_names_shapes_and_what_was_not_touched_stay(kind: str, fit: str) -> None:
    """New are biases alone; the same run twice gives the same bytes."""
    model = MODELS[kind]()
    result, again, bare = (repaired(model, data_of(model), options) for options in (RepairOptions(fit=fit, force=True),) * 2 + (None,))
    assert result.to_proto().SerializeToString() == again.to_proto().SerializeToString() != bare.to_proto().SerializeToString()
    own, other = arrays(result.to_proto()), arrays(bare.to_proto())
    assert {name: array.shape for name, array in own.items() if name in other} == {name: array.shape for name, array in other.items()}
    assert set(own) - set(other) <= {"reader/bias", "last/bias"}
    np.testing.assert_array_equal(own["stem.w"], other["stem.w"])
    nodes = {node.name: (node.op_type, list(node.output)) for node in result.to_proto().graph.node}
    assert set(nodes) >= {node.name for node in bare.to_proto().graph.node}
    assert [item.name for item in result.to_proto().graph.output] == [item.name for item in model.graph.output]
    if fit == "bias":
        reader = next(node for node in model.graph.node if node.name == "reader")
        (weight,) = [name for name in reader.input[:2] if name in other and other[name].ndim > 1]
        np.testing.assert_array_equal(own[weight], other[weight])
        assert set(fits(result).values()) <= {"bias", "unchanged"} and fits(result)["reader"] == "bias"


def test_depthwise() -> None:
    b = Builder(seed=2)
    y = stem(b, b.input(["N", 2, 6, 6]), 2)
    weight = b.random.standard_normal((WIDTH, 1, 3, 3))
    for channel, (other, _) in COPIES.items():
        weight[channel] = weight[other]
    y = b.op("Relu", b.op("Conv", y, b.const(weight), group=WIDTH, pads=[1] * 4, name="depthwise"))
    model = tail(b, b.conv(y, WIDTH, 5, name="reader"), 5)
    result = repaired(model, images(96, 2, 6, 6))
    assert distance(model, result, images(20, 2, 6, 6, seed=9)) <= 1e-4
    assert "depthwise" in fits(result)


@pytest.mark.parametrize("zero", [False, True])
def test_batch_normalization_behind_the_layer(zero: bool) -> None:
    """Also where it scales a channel by zero or by a negative number."""
    b = Builder(seed=2)
    y = stem(b, b.input(["N", 2, 6, 6]), 2)
    y = b.conv(y, WIDTH, 6, bias=False, name="reader")
    gamma = np.array([1.0, -2.0, 0.0 if zero else 0.3, 1.0, 0.1, 3.0])
    y = b.op("BatchNormalization", y, b.const(gamma), b.weight(6, fan_in=6), b.weight(6, fan_in=6), b.uniform(6))
    model = tail(b, y, 6)
    assert distance(model, repaired(model, images(96, 2, 6, 6)), images(20, 2, 6, 6, seed=9)) <= 1e-4


def test_several_consumers() -> None:
    b = Builder(seed=2)
    y = stem(b, b.input(["N", 2, 6, 6]), 2)
    first, second = b.op("Relu", b.conv(y, WIDTH, 6, name="first")), b.op("Sigmoid", b.conv(y, WIDTH, 6, name="second"))
    gemm = b.gemm(b.op("Flatten", b.op("GlobalAveragePool", y)), WIDTH, 3, name="third")
    model = b.model(b.op("Mul", first, second), gemm)
    result = repaired(model, images(300, 2, 6, 6))
    assert set(fits(result)) == {"first", "second", "third"}
    assert distance(model, result, images(20, 2, 6, 6, seed=9)) <= 1e-4


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("few", [False, True])
def test_shared_weights_are_fitted_to_all_their_layers(biased: bool, few: bool) -> None:
    """The weight stays one; it is the least-squares solution of both layers' rows together, each with a bias of its own."""
    b = Builder(seed=2)
    y = stem(b, b.input(["N", 2, 6, 6]), 2)
    shared, strides = b.weight(6, WIDTH, 3, 3, name="shared"), [2, 2]
    own = [b.weight(6, fan_in=6)] if biased else []
    one = b.op("Conv", y, shared, *own, name="one")
    two = b.op("Conv", b.op("Sqrt", b.op("Abs", y)), shared, *own, strides=strides, name="two")
    model = b.model(one, two)
    data = images(8 if few else 200, 2, 6, 6)
    removal = {"stem": [0, 3, 7]}
    result, bare = (repaired(model, data, options, removal) for options in (RepairOptions(ridges=(1e-6,), rows_per_input=1e6), None))
    assert fits(result) == {"one": "weights", "two": "weights"}
    nodes = {node.name: node for node in result.to_proto().graph.node}
    assert nodes["one"].input[1] == nodes["two"].input[1] == "shared"
    fresh = images(100, 2, 6, 6, seed=9)
    squares = [
        sum(float(np.square(x - y).sum()) for x, y in zip(run(own.to_proto(), {"x": fresh}), run(model, {"x": fresh}), strict=True))
        for own in (result, bare)
    ]
    assert squares[0] < (0.9 if few else 0.6) * squares[1]
    if not few:  # no other weight does better on the data of the fit: small steps in random directions
        plain = arrays(result.to_proto())["shared"]
        generator = np.random.default_rng(0)

        def error_of(weight: np.ndarray) -> float:
            proto = result.to_proto()
            next(item for item in proto.graph.initializer if item.name == "shared").CopyFrom(nh.from_array(weight, "shared"))
            pairs = zip(run(proto, {"x": data}), run(model, {"x": data}), strict=True)
            errors = [(x - y).astype(np.float64) for x, y in pairs]
            return sum(float(np.square(own - own.mean((0, 2, 3), keepdims=True)).sum()) for own in errors)

        best = error_of(plain)
        for _ in range(10):
            step = 0.02 * generator.standard_normal(plain.shape).astype(np.float32)
            assert error_of(plain + step) > best and error_of(plain - step) > best


def test_a_shared_weight_that_feeds_itself_is_left_alone() -> None:
    b = Builder(seed=2)
    y = b.conv(b.input(["N", 2, 6, 6]), 2, WIDTH, name="stem")
    shared = b.weight(WIDTH, WIDTH, 3, 3, name="shared")
    for number in range(2):
        y = b.op("Relu", b.op("Conv", y, shared, pads=[1] * 4, name=f"same{number}"))
    model = b.model(b.conv(y, WIDTH, 4, name="last"))
    group = sfp_onnx.inspect(model).coupling.groups[0].name
    result, bare = (repaired(model, images(96, 2, 6, 6), options, {group: [0, 3]}) for options in (EXACT, None))
    np.testing.assert_array_equal(arrays(result.to_proto())["shared"], arrays(bare.to_proto())["shared"])
    assert fits(result) == {"same0": "kept", "same1": "kept", "last": "weights"}
    assert "same0, same1" in " ".join(result.notes)


def heads(levels: int = 3) -> onnx.ModelProto:
    """Two layers whose weights every level of a pyramid uses, one level after the other in the file."""
    b = Builder(seed=2)
    first, second = b.weight(WIDTH, WIDTH, 3, 3, name="first"), b.weight(4, WIDTH, 1, 1, name="second")
    y = stem(b, b.input(["N", 2, 8, 8]), 2)
    found = []
    for level in range(levels):
        inner = b.op("Relu", b.op("Conv", y, first, pads=[1] * 4, name=f"first{level}"))
        found.append(b.op("Conv", inner, second, name=f"second{level}"))
        y = b.op("AveragePool", y, kernel_shape=[2, 2], strides=[2, 2])
    return b.model(*found)


def test_heads_that_share_weights_over_levels() -> None:
    model = heads()
    result, bare = (repaired(model, images(96, 2, 8, 8), options, {"stem": [1, 3, 7]}) for options in (RepairOptions(), None))
    assert set(fits(result).values()) == {"weights"} and len(fits(result)) == 6
    fresh = images(40, 2, 8, 8, seed=9)
    for own, plain, wanted in zip(*(run(proto, {"x": fresh}) for proto in (result.to_proto(), bare.to_proto(), model)), strict=True):
        assert np.square(own - wanted).sum() < np.square(plain - wanted).sum()


def test_a_shared_bias_is_split() -> None:
    b = Builder(seed=2)
    y = stem(b, b.input(["N", 2, 6, 6]), 2)
    bias = b.weight(6, fan_in=6, name="shared")
    one, two = (b.op("Relu", b.op("Conv", y, b.weight(6, WIDTH, 3, 3), bias, name=name)) for name in ("one", "two"))
    model = b.model(b.op("Add", one, two))
    result = repaired(model, images(96, 2, 6, 6))
    assert set(fits(result).values()) == {"weights"}
    biases = [node.input[2] for node in result.to_proto().graph.node if node.name in ("one", "two")]
    assert len(set(biases)) == 2
    assert distance(model, result, images(20, 2, 6, 6, seed=9)) <= 1e-4


# ---- where there is less to win --------------------------------------------------------------------------------------


def test_dead_channels() -> None:
    """Kept channels that are always zero neither break the fit nor get weights (what is there is scaled with the others of an output)."""
    b = Builder(seed=2)
    weight, bias = b.random.standard_normal((WIDTH, 2, 3, 3)) / 4, b.random.standard_normal(WIDTH) / 3
    weight[[0, 2, 4]], bias[[0, 2, 4]] = 0, -1
    y = b.op("Relu", b.op("Conv", b.input(["N", 2, 6, 6]), b.const(weight), b.const(bias), name="stem"))
    model = b.model(b.op("Relu", b.conv(y, WIDTH, 6, name="reader")))
    result, bare = (repaired(model, images(96, 2, 6, 6), options, {"stem": [1, 4]}) for options in (RepairOptions(), None))
    fresh = images(40, 2, 6, 6, seed=9)
    assert distance(model, result, fresh) < 0.9 * distance(model, bare, fresh)
    own, other = arrays(result.to_proto())["reader.weight"], arrays(bare.to_proto())["reader.weight"]
    gain = own[:, [0, 1]] / other[:, [0, 1]]  # channels 0 and 2
    np.testing.assert_allclose(gain, np.broadcast_to(gain[:, :1, :1, :1], gain.shape), rtol=1e-5)
    assert gain.min() >= 1 - 1e-6 and gain.max() <= MOST_GAIN + 1e-6


def test_only_dead_channels_are_left() -> None:
    b = Builder(seed=2)
    weight, bias = b.random.standard_normal((WIDTH, 2, 3, 3)) / 4, b.random.standard_normal(WIDTH) / 3
    weight[:4], bias[:4] = 0, -1
    y = b.op("Relu", b.op("Conv", b.input(["N", 2, 6, 6]), b.const(weight), b.const(bias), name="stem"))
    model = b.model(b.op("Relu", b.conv(y, WIDTH, 6, name="reader")))
    result = repaired(model, images(96, 2, 6, 6), RepairOptions(), {"stem": [4, 5, 6, 7]})
    made = run(result.to_proto(), {"x": images(20, 2, 6, 6)})[0]
    assert np.isfinite(made).all() and fits(result)["reader"] in ("bias", "weights")


@pytest.mark.parametrize("kind", ["conv", "gemm", "matmul and add", "transposed", "grouped"])
@pytest.mark.parametrize("fit", ["lstsq", "bias"])
def test_one_sample(kind: str, fit: str) -> None:
    model = MODELS[kind]()
    options = RepairOptions(fit=fit, force=True)
    result, bare = repaired(model, data_of(model, 1), options), repaired(model, data_of(model, 1), None)
    assert np.isfinite(run(result.to_proto(), {"x": data_of(model, 5)})[0]).all()
    assert result.repaired is not None and not result.repaired.held_out and "too few to hold any out" in " ".join(result.notes)
    if kind == "gemm":  # one row, so none that could judge
        assert set(fits(result).values()) == {"unchanged"}
        np.testing.assert_array_equal(
            run(result.to_proto(), {"x": data_of(model, 5)})[0], run(bare.to_proto(), {"x": data_of(model, 5)})[0]
        )


def residual(blocks: int = 2, wide: int = 24) -> onnx.ModelProto:
    """Stream of 6 channels, each block adds convolution, Relu, convolution to it."""
    b = Builder(seed=7)
    y = b.conv(b.input(["N", 2, 6, 6]), 2, 6, name="first")
    for number in range(blocks):
        inner = b.op("Relu", b.conv(y, 6, wide if number else WIDTH, name=f"in{number}"))
        y = b.op("Add", y, b.conv(inner, wide if number else WIDTH, 6, name=f"out{number}"), outputs=[f"sum{number}"])
    return b.model(b.op("Abs", y))


def stream_errors(model: onnx.ModelProto, result: Pruned, data: np.ndarray) -> dict[str, float]:
    found = []
    for own in (model, result.to_proto()):
        whole = with_all_tensors(own)
        found.append(dict(zip([item.name for item in whole.graph.output], run(whole, {"x": data}), strict=True)))
    before, after = found
    return {name: float(np.square(after[name] - before[name]).sum()) for name in before if name.startswith("sum")}


def test_a_block_corrects_the_error_of_the_stream() -> None:
    """The second block loses nothing itself, but brings the sum nearer to the original one than it came in."""
    model = residual()
    result, bare = (repaired(model, images(256, 2, 6, 6), options, {"in0": [0, 1, 2, 3, 4]}) for options in (RepairOptions(), None))
    fresh = images(40, 2, 6, 6, seed=9)
    own, plain = stream_errors(model, result, fresh), stream_errors(model, bare, fresh)
    assert own["sum0"] < 0.9 * plain["sum0"]
    assert own["sum1"] < 0.8 * own["sum0"]
    assert fits(result) == {"out0": "weights", "in1": "weights", "out1": "weights"}


def test_bias_is_fitted_to_the_mean() -> None:
    """What the removed channels fed on average: the means of the sums over the calibration data are those of the original."""
    model = residual(1)
    data = images(64, 2, 6, 6)
    result = repaired(model, data, RepairOptions(fit="bias", rows_per_input=1e6), {"in0": [0, 1, 2]})
    tensors = []
    for own in (model, result.to_proto()):
        whole = with_all_tensors(own)
        tensors.append(dict(zip([item.name for item in whole.graph.output], run(whole, {"x": data}), strict=True))["sum0"])
    bare = repaired(model, data, None, {"in0": [0, 1, 2]}).to_proto()
    whole = with_all_tensors(bare)
    plain = dict(zip([item.name for item in whole.graph.output], run(whole, {"x": data}), strict=True))["sum0"]
    shift = np.abs((tensors[1] - tensors[0]).mean((0, 2, 3))).max()
    assert shift < 0.1 * np.abs((plain - tensors[0]).mean((0, 2, 3))).max()


@pytest.mark.parametrize("shared", [False, True])
def test_batch_normalization_is_re_estimated(shared: bool) -> None:
    """One after the other: each sees the new statistics of those before. Vectors keep their names, shared ones are split."""
    b = Builder(seed=4)
    y = b.op("Relu", b.batch_norm(b.conv(b.input(["N", 2, 6, 6]), 2, WIDTH, bias=False, name="stem"), WIDTH, name="bn0"))
    y = b.op("Relu", b.batch_norm(b.conv(y, WIDTH, 6, bias=False, name="second"), 6, name="bn1"))
    y = b.conv(y, 6, 5, bias=False, name="third")
    vectors = [b.uniform(5)] * 4 if shared else [b.uniform(5) for _ in range(4)]
    y = b.op("BatchNormalization", y, *vectors, name="bn2")
    model, data = b.model(b.op("Abs", y)), images(64, 2, 6, 6)
    result, bare = (repaired(model, data, options, {"stem": [0, 1, 2, 3, 4]}) for options in (RepairOptions(fit="bn", force=True), None))
    proto = result.to_proto()
    assert [node.name for node in proto.graph.node] == [node.name for node in bare.to_proto().graph.node]
    whole, held = with_all_tensors(proto), arrays(proto)
    values = dict(zip([item.name for item in whole.graph.output], run(whole, {"x": data}), strict=True))
    plain = arrays(bare.to_proto())
    for node in proto.graph.node:
        if node.op_type == "BatchNormalization":
            _, _, _, mean, variance = node.input
            maps = values[node.input[0]]
            if node.name == "bn0":  # behind the layer that lost outputs: what it gets is as before
                np.testing.assert_array_equal(held[mean], plain[mean])
                np.testing.assert_array_equal(held[variance], plain[variance])
                continue
            np.testing.assert_allclose(held[mean], maps.mean((0, 2, 3)), atol=0.1)  # of all but the samples that judge
            np.testing.assert_allclose(held[variance], maps.var((0, 2, 3)), rtol=0.2)
    assert set(held) >= set(plain) if shared else set(held) == set(plain)


@pytest.mark.parametrize("fit", ["lstsq", "bias"])
def test_half_precision(fit: str) -> None:
    b = Builder(seed=2)
    y = b.input(["N", 2, 6, 6], dtype=onnx.TensorProto.FLOAT16)
    wide = [WIDTH, 6, 3]
    for number, (c_in, c_out) in enumerate(zip([2, *wide], wide, strict=False)):
        operands = [b.const(b.random.standard_normal(shape) / 4, np.float16) for shape in ((c_out, c_in, 3, 3), (c_out,))]
        y = b.op("Relu", b.op("Conv", y, *operands, pads=[1] * 4, name=f"conv{number}"))
    model = b.model(y)
    data = images(64, 2, 6, 6).astype(np.float16)
    tries = (RepairOptions(fit=fit, force=True), None)
    result, bare = (repaired(model, data, options, {"conv0": [0, 1, 2]}) for options in tries)
    assert {array.dtype for array in arrays(result.to_proto()).values()} == {np.dtype(np.float16)}
    dense, plain, own = (run(proto, {"x": data})[0].astype(np.float64) for proto in (model, bare.to_proto(), result.to_proto()))
    assert np.square(own - dense).sum() < (0.8 if fit == "lstsq" else 0.99) * np.square(plain - dense).sum()


@pytest.mark.parametrize("sparsity", ["unstructured", "2:4"])
def test_zeros_of_a_mask_stay_zero(sparsity: str) -> None:
    model = MODELS["conv"]()
    analysis, data = sfp_onnx.inspect(model), data_of(model)
    old = {name: array for name, array in arrays(model).items() if array.ndim == 4 and name != "stem.w"}
    masks: dict[str, BoolArray] = {}
    for name, array in old.items():
        mask = np.random.default_rng(1).random(array.shape) < 0.5
        if sparsity == "2:4":
            mask = np.zeros(array.shape, bool)
            mask.reshape(-1)[::2] = True
        masks[name] = mask
    changed = graph.extract.with_constants(analysis.prepared.model, {name: array * masks[name] for name, array in old.items()})
    none = np.zeros(analysis.coupling.units, bool)
    batches = [{"x": part} for part in np.array_split(data, 12)]
    made, found = repair(analysis.prepared, analysis.coupling, none, changed, batches, RepairOptions(), masks)
    assert found[0].kind == "weights" and len(found) == 2
    own = arrays(graph.save.to_proto(made))
    for (name, mask), fit in zip(masks.items(), found, strict=True):
        assert not own[name][~mask].any() and (own[name][mask] != old[name][mask]).any() == (fit.kind == "weights")
    fresh = data_of(model, 30, seed=9)
    dense, plain, fitted = (run(proto, {"x": fresh})[0] for proto in (model, graph.save.to_proto(changed), graph.save.to_proto(made)))
    assert np.square(fitted - dense).sum() < 0.8 * np.square(plain - dense).sum()
