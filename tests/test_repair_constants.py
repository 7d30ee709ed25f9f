"""Repair of what is no plain weight: integers that the graph dequantises, and the constants that stand for vanished branches."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import pytest
from building import Builder, plan_of, run, with_all_tensors
from conftest import ctrl_c
from test_repair import WIDTH, arrays, conv_model, fits, images, repaired, stem

import sfp_onnx
from sfp_onnx.core.options import RepairOptions
from sfp_onnx.repair.walk import Held
from sfp_onnx.runtime import quantize


def integers(b: Builder, values: np.ndarray, scale: np.ndarray, kind: type, axis: int = 0, zero: int = 0) -> tuple[str, str]:
    """A dequantised constant, and the name of its scale."""
    along = scale.reshape([-1 if own == axis else 1 for own in range(values.ndim)]) if scale.ndim else scale
    limits = np.iinfo(kind)
    stored = np.clip(np.rint(values / along) + zero, limits.min, limits.max).astype(kind)
    name = b.const(scale.astype(np.float32))
    return b.op("DequantizeLinear", b.const(stored), name, b.const(np.full(scale.shape, zero, kind)), axis=axis), name


def dequantised(per_channel: bool = True, kind: type = np.int8, zero: int = 0, shared: bool = False) -> tuple[onnx.ModelProto, str, str]:
    """Stem, then a convolution with 8-bit weights and a 32-bit bias, as onnxruntime's quantiser writes them; names of both scales."""
    b = Builder(seed=2)
    y = stem(b, b.input(["N", 2, 6, 6]), 2)
    weight = b.random.standard_normal((6, WIDTH, 3, 3)) / 8
    size = np.abs(weight).max((1, 2, 3)) if per_channel else np.abs(weight).max()
    scale = size / 127
    made, first = integers(b, weight, scale, kind, 0, zero)
    bias, second = integers(b, b.random.standard_normal(6), scale if shared else scale / 100, np.int32)
    if shared:  # exporters merge equal vectors
        b.nodes[-1].input[1] = second = first
    return b.model(b.op("Abs", b.op("Conv", y, made, bias, name="reader"))), first, second


REMOVED = {"stem": [0, 3, 7]}


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", [np.int8, np.uint8])
@pytest.mark.parametrize("shared", [False, True])
def test_dequantised_weights_are_fitted_and_rounded(per_channel: bool, kind: type, shared: bool) -> None:
    """The file keeps integers of the same type and shape; scales change only where nothing else reads them, those of the bias along."""
    model, first, second = dequantised(per_channel, kind, 128 if kind is np.uint8 else 0, shared)
    result, bare = (repaired(model, images(200, 2, 6, 6), options, REMOVED) for options in (RepairOptions(), None))
    assert fits(result)["reader"] == "weights"
    own, plain, old = (arrays(proto) for proto in (result.to_proto(), bare.to_proto(), model))
    assert {name: (array.shape, array.dtype) for name, array in own.items()} == {n: (a.shape, a.dtype) for n, a in plain.items()}
    assert [node.op_type for node in result.to_proto().graph.node] == [node.op_type for node in bare.to_proto().graph.node]
    ratio = own[first] / old[first]
    if shared:
        np.testing.assert_array_equal(ratio, np.ones_like(ratio))
    np.testing.assert_allclose(own[second] / old[second], ratio, rtol=1e-5)
    fresh = images(60, 2, 6, 6, seed=9)
    dense, before, after = (run(proto, {"x": fresh})[0] for proto in (model, bare.to_proto(), result.to_proto()))
    assert np.square(after - dense).sum() < 0.7 * np.square(before - dense).sum()



def test_a_model_quantised_by_onnxruntime(tmp_path: Path) -> None:
    """The repair brings it nearer to the whole quantised model; its weights are still integers."""
    onnx.save(conv_model(pads=[1] * 4), tmp_path / "float.onnx")
    data = images(120, 2, 6, 6)
    quantize(tmp_path / "float.onnx", tmp_path / "int8.onnx", [{"x": data}], "model")
    model = onnx.load(tmp_path / "int8.onnx")
    result, bare = (repaired(model, data, options, {"stem": [0, 3, 7]}) for options in (RepairOptions(), None))
    assert fits(result)["reader"] == "weights"
    fresh = images(60, 2, 6, 6, seed=9)
    dense, before, after = (run(proto, {"x": fresh})[0] for proto in (model, bare.to_proto(), result.to_proto()))
    assert np.square(after - dense).sum() < 0.8 * np.square(before - dense).sum()
    kinds = [{name: (array.shape, array.dtype) for name, array in arrays(own.to_proto()).items()} for own in (result, bare)]
    assert kinds[0] == kinds[1]


def products(kind: str, per_channel: bool, zero: bool, reduce: bool) -> onnx.ModelProto:
    """Two layers on integers, of data that are quantised at run time, as onnxruntime's quantiser and its fusions write them."""
    b, rows, most = Builder(seed=3), kind != "ConvInteger", 63 if reduce else 127
    y, width = b.input(["N", 12] if rows else ["N", 12, 5, 5]), 12

    def layer(x: str, ins: int, outs: int, name: str) -> str:
        weight = b.random.standard_normal((ins, outs) if rows else (outs, ins, 1, 1)) / np.sqrt(ins)
        along = ((0,) if rows else (1, 2, 3)) if per_channel else None
        scale = np.asarray(np.abs(weight).max(along, keepdims=per_channel) / most, np.float32)
        point = np.full(outs if per_channel and rows else (), 5 if zero else 0, np.int8)
        values = np.clip(np.rint(weight / scale), -most, most - 5) + (5 if zero else 0)
        flat = scale.reshape(-1) if rows and per_channel else scale.reshape(-1, 1, 1) if per_channel else scale
        held, factor, shift = b.const(values.astype(np.int8), name=f"{name}/weight"), b.const(flat), b.const(point)
        bias = b.weight(outs) if rows else b.weight(outs, 1, 1)
        if kind == "DynamicQuantizeMatMul":
            return b.op(kind, x, held, factor, shift, bias, domain="com.microsoft", name=name)
        whole, size, own = b.op("DynamicQuantizeLinear", x, outputs=3)
        if kind == "MatMulIntegerToFloat":
            return b.op(kind, whole, held, size, factor, own, shift, bias, domain="com.microsoft", name=name)
        made = b.op("Cast", b.op(kind, whole, held, own, shift, name=name), to=onnx.TensorProto.FLOAT)
        return b.op("Add", b.op("Mul", made, b.op("Mul", size, factor)), bias)

    y = b.op("Relu", layer(y, width, WIDTH, "stem"))
    return b.model(layer(y, WIDTH, 6, "reader"))


KINDS = ["MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("per_channel", "zero", "reduce"), [(False, False, False), (True, True, False), (True, False, True)])
def test_products_of_integers_are_fitted_and_rounded(kind: str, per_channel: bool, zero: bool, reduce: bool) -> None:
    """Between floats; the integers keep type, shape and range."""
    model = products(kind, per_channel, zero, reduce)
    sizes = (12, 5, 5) if kind == "ConvInteger" else (12,)
    mixed = np.random.default_rng(5).standard_normal((12, 12))
    data, fresh = (np.einsum("nc...,cd->nd...", images(300, *sizes, seed=seed), mixed).astype(np.float32) for seed in (0, 9))
    result, bare = (repaired(model, data, options, {"stem": [0, 3, 7]}) for options in (RepairOptions(), None))
    assert fits(result)["reader"] == "weights"
    dense, before, after = (run(proto, {"x": fresh})[0] for proto in (model, bare.to_proto(), result.to_proto()))
    assert np.square(after - dense).sum() < 0.8 * np.square(before - dense).sum()
    own, plain = (arrays(proto.to_proto()) for proto in (result, bare))
    assert {name: (array.shape, array.dtype) for name, array in own.items()} == {n: (a.shape, a.dtype) for n, a in plain.items()}
    assert not np.array_equal(own["reader/weight"], plain["reader/weight"])
    assert not reduce or np.abs(own["reader/weight"]).max() <= 64


@pytest.mark.parametrize("zero", [0, 100])
@pytest.mark.parametrize("axis", [0, 1])
def test_rounding(zero: int, axis: int) -> None:
    """Values that the integers can hold come back; a stretched scale takes the largest without clipping."""
    generator = np.random.default_rng(0)
    kind = np.uint8 if zero else np.int8
    limits = np.iinfo(kind)
    constants = {
        "q": generator.integers(limits.min, limits.max, (4, 5), endpoint=True).astype(kind),
        "s": generator.uniform(0.1, 1, (4, 5)[axis]).astype(np.float32),
        "z": np.full((4, 5)[axis], zero, kind),
    }
    held = Held("q", (4, 5), "s", "z", axis, True)
    value = held.value(constants.__getitem__)
    along = constants["s"][:, None] if axis == 0 else constants["s"]
    np.testing.assert_allclose(value, (constants["q"].astype(float) - zero) * along, rtol=1e-6)
    changed, found = held.nearest(constants.__getitem__, value)
    np.testing.assert_array_equal(changed["q"], constants["q"])
    np.testing.assert_allclose(found, value, rtol=1e-6)
    wide = value.astype(np.float64) * 3 + generator.standard_normal((4, 5))
    ratio = held.fitting(constants.__getitem__, wide)
    changed, found = held.nearest(constants.__getitem__, wide, ratio)
    steps = changed["s"][:, None] if axis == 0 else changed["s"]
    assert (np.abs(found - wide) <= 0.51 * steps).all()
    clipped = held.nearest(constants.__getitem__, wide)[1]
    assert np.abs(clipped - wide).max() > np.abs(found - wide).max()


# ---- vanished branches -----------------------------------------------------------------------------------------------


def residual(norm: bool = False) -> onnx.ModelProto:
    """A stream of 6 channels; two blocks add to it, each followed by Relu."""
    b = Builder(seed=7)
    y = b.op("Relu", b.conv(b.input(["N", 2, 6, 6]), 2, 6, name="first"))
    for number in range(2):
        inner = b.op("Relu", b.conv(y, 6, WIDTH, name=f"in{number}"))
        made = b.conv(inner, WIDTH, 6, name=f"out{number}")
        made = b.batch_norm(made, 6) if norm else made
        y = b.op("Relu", b.op("Add", made, y, outputs=[f"sum{number}"]))
    return b.model(b.conv(y, 6, 3, 1, name="last"))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("fit", ["lstsq", "bias"])
@pytest.mark.parametrize("blocks", [(0,), (1,), (0, 1)])
def test_the_constant_of_a_vanished_branch_is_the_mean_of_what_is_missing(norm: bool, fit: str, blocks: tuple[int, ...]) -> None:
    """Original sum minus the rest of the changed one: nothing is left on average."""
    model, data = residual(norm), images(256, 2, 6, 6)
    analysis = sfp_onnx.inspect(model)
    plan = plan_of(analysis, {f"in{number}": range(WIDTH) for number in blocks})
    own = sfp_onnx.data_for(analysis.model, {"x": data})
    result, bare = (sfp_onnx.apply(analysis, plan, own, repair=options) for options in (RepairOptions(fit=fit), None))
    assert not {node.name for node in result.to_proto().graph.node} & {f"out{number}" for number in blocks}
    sums = []
    for proto in (model, result.to_proto(), bare.to_proto()):
        whole = with_all_tensors(proto)
        sums.append(dict(zip([item.name for item in whole.graph.output], run(whole, {"x": data}), strict=True)))
    for number in blocks:
        original, after, before = (found[f"sum{number}"] for found in sums)
        gap, old = ((original - found).mean((0, 2, 3)) for found in (after, before))
        assert np.abs(gap).max() < 0.05 < np.abs(old).max()  # the samples that judge had no part
    assert sum("vanished branch" in layer and kind == "bias" for layer, kind in fits(result).items()) == len(blocks)
    before, after = (np.square(found[list(sums[0])[-1]] - sums[0][list(sums[0])[-1]]).sum() for found in (sums[2], sums[1]))
    assert after < before


# ---- the temporary file ----------------------------------------------------------------------------------------------


def largest(folder: Path) -> int:
    """Bytes of the largest file (onnxruntime leaves small ones of its own)."""
    return max((path.stat().st_size for path in folder.rglob("*")), default=0)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_stopped_process_leaves_no_file(how: str, tmp_path: Path) -> None:
    """Stopped in the middle of a repair that has spilled 8 MB."""
    script = """
        import os, signal, sys
        import numpy as np
        from sfp_onnx.repair.walk import Store
        store = Store(0)
        store.put(("a", 0), np.ones(2**20))
        assert store.spilled == 2**23 and os.fstat(store._file.fileno()).st_size >= 2**22
        print("spilled", flush=True)
        sys.stdin.read()
    """
    folder = tmp_path / "scratch"
    folder.mkdir()
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    with ctrl_c():
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=environment,
        )  # fmt: skip
    with process:
        assert process.stdout is not None and process.stdout.readline().strip() == b"spilled"
        assert largest(folder) < 2**20  # it has no name from the start
        process.send_signal(getattr(signal, how))
        assert process.wait(30) != 0
    assert largest(folder) < 2**20
