"""The bridge to torch: every operator that has a rule, against onnxruntime; weights under their own names; writing back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper as nh
import onnxruntime as ort
import pytest
from building import Builder, error, feeds_for, run
from rule_cases import CASES, Case, model_of

import sfp_onnx
from sfp_onnx.core.errors import ModelError
from sfp_onnx.graph.save import to_proto
from sfp_onnx.rules.registry import RULES

torch = pytest.importorskip("torch", reason="training needs the extra 'train' (torch), which is not installed")

from sfp_onnx.methods.training.bridge import Network, write  # noqa: E402
from sfp_onnx.methods.training.functions import FUNCTIONS  # noqa: E402

SHARED = Path(__file__).resolve().parents[2] / "shared"
# Operators without a function: whole numbers throughout, through which no gradient goes. Sizes depend on no data.
INTEGERS = {"ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "DynamicQuantizeLinear"}
INTEGERS |= {"com.microsoft.DynamicQuantizeMatMul", "com.microsoft.MatMulIntegerToFloat"}
INTEGERS |= {name for name in RULES if name.startswith("com.microsoft.Q") and name != "com.microsoft.QuickGelu"}
SIZES = {"ConstantOfShape", "Range"}
FIRST = {"com.microsoft.EmbedLayerNormalization"}  # reads words alone: nothing in front of it could be trained
TORCHLESS = {"DeformConv", "RoiAlign", "com.microsoft.MatMulNBits"}  # torch itself has no function for them: no gradient goes through
REFUSED = {"pool_indices"}  # forms of operators that have a function for others


def every() -> Iterator[object]:
    for own in (own for cases in CASES.values() for own in cases):
        for opset in own.opsets():
            yield pytest.param(own, opset, id=f"{own.operator}-{own.build.__name__}-{opset}")


def tensors(feeds: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in feeds.items()}


def answers(network: Network, feeds: dict[str, np.ndarray]) -> list[torch.Tensor]:
    return network.run(tensors(feeds), [item.name for item in network.model.proto.graph.output])


def close(network: Network, model: onnx.ModelProto, feeds: dict[str, np.ndarray], tolerance: float = 1e-4) -> None:
    expected = run(model, feeds)
    for item, own, other in zip(model.graph.output, answers(network, feeds), expected, strict=True):
        found = own.detach().numpy().astype(other.dtype)
        assert error(found, other) <= tolerance, f"{item.name} differs by {error(found, other):.2g}"


@pytest.mark.parametrize(("own", "opset"), list(every()))
def test_equal_to_onnxruntime(own: Case, opset: int) -> None:
    model = model_of(own, opset)
    try:
        run(model, feeds_for(model))
    except Exception:
        pytest.skip("this onnxruntime has no kernel for the model")
    network = Network(model)
    tolerance = 1e-3 if own.operator == "Tan" else 1e-4  # near its poles the last bit of an operand is large
    if own.operator in INTEGERS | TORCHLESS or own.build.__name__ in REFUSED:
        with pytest.raises(ModelError, match=own.operator.rpartition(".")[2]):
            answers(network, feeds_for(model))
        with torch.no_grad():
            close(network, model, feeds_for(model))
        return
    close(network, model, feeds_for(model), tolerance)
    close(network, model, feeds_for(model), tolerance)  # what depends on shapes alone is known now
    close(network, model, feeds_for(model, batch=3), tolerance)
    assert {"first.weight", "first.bias"} <= set(network.parameters)
    sum(item.sum() for item in answers(network, feeds_for(model)) if item.is_floating_point()).backward()
    assert network.written() is network.model


def test_every_float_operator_with_a_rule_has_a_function() -> None:
    assert set(RULES) - set(FUNCTIONS) == INTEGERS | SIZES | TORCHLESS | FIRST


def session(file: Path, optimised: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, "ORT_ENABLE_ALL" if optimised else "ORT_DISABLE_ALL")
    return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared files here")
@pytest.mark.parametrize("file", sorted([*SHARED.glob("zoo/*.onnx"), *SHARED.glob("models/*.onnx")]), ids=lambda file: file.stem)
def test_real_models(file: Path, tmp_path: Path) -> None:
    """Equal to onnxruntime, to as much as that is to itself; gradients for all weights; unchanged: the same bytes."""
    network, feeds = Network(file), dict(sfp_onnx.inspect(file).prepared.feeds)
    exact, fast = (session(file, optimised).run(None, feeds) for optimised in (False, True))
    made = answers(network, feeds)
    for own, one, other in zip(made, exact, fast, strict=True):
        assert error(own.detach().numpy().astype(one.dtype), one) <= max(1e-4, 3 * error(other, one))
    torch.manual_seed(0)
    sum((item * torch.randn_like(item)).sum() for item in made if item.is_floating_point()).backward()
    assert [name for name, value in network.parameters.items() if value.grad is None or not value.grad.abs().max() > 0] == []
    path = write(network.written(), tmp_path / file.name)
    assert network.model.files or path.read_bytes() == file.read_bytes()


# ---- how weights are stored ------------------------------------------------------------------------------------------


def small(shared: bool = False, half: bool = False) -> onnx.ModelProto:
    """Two convolutions (of the same weight, or of weights in float16), a BatchNormalization and a layer over whatever batch comes."""
    b = Builder(17, seed=3)
    weights = [b.weight(8, 8, 3, 3, name=name) for name in (("w", "v") if not shared else ("w",))]
    if half:
        for tensor in b.initializers:
            tensor.CopyFrom(nh.from_array(nh.to_array(tensor).astype(np.float16), tensor.name))
        weights = [b.op("Cast", name, to=onnx.TensorProto.FLOAT) for name in weights]
    x = b.op("Relu", b.conv(b.input(["N", 3, 8, 8]), 3, 8, name="first"))
    for name in (weights[0], weights[-1]):
        x = b.op("Relu", b.op("Conv", x, name, pads=[1] * 4))
    x = b.op("Flatten", b.op("GlobalAveragePool", b.batch_norm(x, 8)))
    return b.model(b.gemm(x, 8, 5))


def nudged(network: Network) -> onnx.ModelProto:
    """All parameters moved by a step along some gradient, and written back."""
    feeds = feeds_for(to_proto(network.model))
    sum((item**2).sum() for item in answers(network, feeds)).backward()
    with torch.no_grad():
        for value in network.parameters.values():
            value -= 0.05 * value.abs().mean() * torch.sign(value.grad)
    return to_proto(network.written())


@pytest.mark.parametrize("model", [small(), small(shared=True), small(half=True)], ids=["plain", "shared", "half"])
def test_changed_weights_are_written_under_their_names(model: onnx.ModelProto) -> None:
    network = Network(model)
    changed = nudged(network)
    old, new = ({item.name: nh.to_array(item) for item in proto.graph.initializer} for proto in (model, changed))
    assert {name for name in old if not np.array_equal(old[name], new[name])} == set(network.parameters)
    assert {name: item.dtype for name, item in old.items()} == {name: item.dtype for name, item in new.items()}
    assert changed.graph.node == model.graph.node and "w" in network.parameters
    close(network, changed, feeds_for(model, batch=5), 2e-3 if any(item.dtype == np.float16 for item in old.values()) else 1e-4)


def test_statistics_of_batch_normalization_stay() -> None:
    network, model = Network(small()), small()
    node = next(node for node in model.graph.node if node.op_type == "BatchNormalization")
    assert set(node.input[1:3]) <= set(network.parameters) and not set(node.input[3:]) & set(network.parameters)


def test_external_data_stay_external(tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    onnx.save(small(), source, save_as_external_data=True, location="model.bin", size_threshold=0)
    network = Network(source)
    nudged(network)
    path = write(network.written(), tmp_path / "new.onnx")
    assert path.stat().st_size < path.with_name("new.onnx.data").stat().st_size
    close(network, onnx.load(path), feeds_for(small()))


def quantised() -> onnx.ModelProto:
    """Integers behind DequantizeLinear, per channel and per tensor, and quantised activations."""
    b = Builder(17, seed=4)
    x = b.input(["N", 3, 8, 8])
    pair = [b.const(np.float32(0.05)), b.const(120, np.uint8)]
    x = b.op("DequantizeLinear", b.op("QuantizeLinear", x, *pair), *pair)
    weight = b.const(b.random.integers(-127, 127, (6, 3, 3, 3)), np.int8, name="weight")
    scales = [b.uniform(6, low=0.004, high=0.008), b.const(np.zeros(6), np.int8)]
    bias = b.op("DequantizeLinear", b.const(b.random.integers(-90, 90, 6), np.int32, name="bias"), b.const(np.float32(1e-3)))
    x = b.op("Conv", x, b.op("DequantizeLinear", weight, *scales, axis=0), bias, pads=[1] * 4)
    x = b.op("DequantizeLinear", b.op("QuantizeLinear", b.op("Relu", x), *pair), *pair)
    return b.model(b.conv(x, 6, 4))


def test_quantised_weights_are_trained_straight_through() -> None:
    model = quantised()
    network = Network(model)
    assert network.written() is network.model and {"weight", "bias"} <= set(network.parameters)
    close(network, model, feeds_for(model))
    changed = nudged(network)
    old, new = ({item.name: nh.to_array(item) for item in proto.graph.initializer} for proto in (model, changed))
    assert new["weight"].dtype == np.int8 and 0 < np.abs(new["weight"].astype(int) - old["weight"]).max() < 40
    scales = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.input[1:]}
    assert not scales & set(network.parameters)
    close(network, changed, feeds_for(model), 0.02)  # a rounding of an activation may fall to the other side


def test_gradients_agree_with_differences() -> None:
    model = small()
    network, feeds = Network(model), feeds_for(model)
    weight = network.parameters["w"]

    def loss() -> torch.Tensor:
        return sum((item**2).sum() for item in answers(network, feeds))

    loss().backward()
    direction = weight.grad / weight.grad.norm()
    with torch.no_grad():
        weight += 1e-2 * direction
        above = loss()
        weight -= 2e-2 * direction
        below = loss()
    assert float((above - below) / 2e-2) == pytest.approx(float(weight.grad.norm()), rel=0.02)


def test_an_operator_without_a_function_runs_where_nothing_is_trained_in_front() -> None:
    b = Builder(17, seed=1)
    x = b.input(["N", 3, 8, 8])
    x = b.op("Add", x, b.op("Trilu", x, upper=0))
    model = b.model(b.conv(x, 3, 4))
    close(Network(model), model, feeds_for(model))
    behind = Builder(17, seed=1)
    y = behind.op("Trilu", behind.conv(behind.input(["N", 3, 8, 8]), 3, 4), name="lower")
    with pytest.raises(ModelError, match=r"node 'lower' .* has no gradient here"):
        answers(Network(behind.model(y)), feeds_for(behind.model(y)))


def test_weights_that_overflow_their_type_are_refused() -> None:
    network = Network(small(half=True))
    with torch.no_grad():
        network.parameters["w"] *= 1e7
    with pytest.raises(ModelError, match="'w' is no longer finite as float16"):
        network.written()
