"""Where a repair has no place for a bias or no constant scale, how it ends, and the command line."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from building import Builder, run, with_all_tensors
from conftest import files_in, images as pictures, invoke, run_model
from test_leastsquares import left, reader, shrunk
from test_repair import EXACT, WIDTH, arrays, distance, fits, images, repaired, residual, stem, tail

import sfp_onnx
from sfp_onnx import graph, repair
from sfp_onnx.core.errors import VerificationError
from sfp_onnx.core.options import RepairOptions, byte_size
from sfp_onnx.repair import lockstep, walk as walks
from sfp_onnx.repair.lockstep import LayerFit
from sfp_onnx.repair.walk import Store, Walk
from sfp_onnx.report.manifest import Pruned
from sfp_onnx.scores.elimination import MOST_BLOCKS, Reader, eliminate, elimination

# ---- biases and scales -----------------------------------------------------------------------------------------------


def squared(model: onnx.ModelProto, result: Pruned, data: np.ndarray) -> float:
    """Summed squared difference of the first output."""
    return float(np.square(run(result.to_proto(), {"x": data})[0] - run(model, {"x": data})[0]).sum())


def rows_of(b: Builder) -> str:
    """The stem's features as rows (N, 36, 8); their means are not zero."""
    y = stem(b, b.input(["N", 2, 6, 6]), 2, copies=False)
    return str(b.op("Transpose", b.op("Reshape", y, b.const([0, WIDTH, -1], np.int64)), perm=[0, 2, 1]))


def product_is_an_output(b: Builder) -> onnx.ModelProto:
    return b.model(b.op("MatMul", rows_of(b), b.weight(WIDTH, 6, fan_in=WIDTH), name="reader"))


def product_is_read_twice(b: Builder) -> onnx.ModelProto:
    y = b.op("MatMul", rows_of(b), b.weight(WIDTH, 6, fan_in=WIDTH), name="reader")
    return b.model(b.op("Add", b.op("Tanh", y), y))


def bias_times_zero(b: Builder) -> onnx.ModelProto:
    y = b.op("Flatten", b.op("GlobalAveragePool", stem(b, b.input(["N", 2, 6, 6]), 2, copies=False)))
    return b.model(b.op("Gemm", y, b.weight(WIDTH, 6, fan_in=WIDTH), b.weight(6), beta=0.0, name="reader"))


def table_as_long_as_wide(b: Builder) -> onnx.ModelProto:
    """What is added has one value per position, not per feature, and as many."""
    y = b.op("MatMul", rows_of(b), b.weight(WIDTH, 36, fan_in=WIDTH), name="reader")
    return b.model(b.op("Add", y, b.weight(36, 1, name="table")))


@pytest.mark.parametrize("make", [product_is_an_output, product_is_read_twice, bias_times_zero, table_as_long_as_wide])
def test_weights_alone_where_no_bias_can_be(make: Callable[[Builder], onnx.ModelProto]) -> None:
    """The fit is the best one without a bias: no worse than brute force on the same (fitting) data."""
    model, data = make(Builder(seed=3)), images(320, 2, 6, 6)
    options = RepairOptions(ridges=(1e-6,), rows_per_input=1e6)
    result, bare = (repaired(model, data, own, {"stem": [0, 2, 5]}) for own in (options, None))
    assert fits(result)["reader"] == "weights"
    node = next(node for node in bare.to_proto().graph.node if node.name == "reader")
    wanted, plain = (np.asarray(run(proto, {"x": data})[0], np.float64) for proto in (model, bare.to_proto()))
    if make is not product_is_read_twice:
        whole = with_all_tensors(bare.to_proto())
        values = dict(zip([item.name for item in whole.graph.output], run(whole, {"x": data}), strict=True))
        rows, errors = values[node.input[0]].reshape(-1, WIDTH - 3), (wanted - plain).reshape(-1, wanted.shape[-1])
        best = errors - rows @ np.linalg.lstsq(rows.astype(np.float64), errors, rcond=None)[0]
        assert squared(model, result, data) <= 1.02 * float(np.square(best).sum())
    assert squared(model, result, images(40, 2, 6, 6, seed=9)) < squared(model, bare, images(40, 2, 6, 6, seed=9))
    if make is table_as_long_as_wide:
        np.testing.assert_array_equal(arrays(result.to_proto())["table"], arrays(model)["table"])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (5, 6), (5, 1), None])
def test_a_gemm_that_adds_what_is_no_vector_is_left_alone(shape: tuple[int, ...] | None) -> None:
    """A scalar, a value per sample, a map, or an activation."""
    b = Builder(seed=3)
    features = b.op("Flatten", b.op("GlobalAveragePool", stem(b, b.input([5, 2, 6, 6]), 2, copies=False)))
    added = b.op("Slice", b.op("Flatten", "x"), *(b.const([own], np.int64) for own in (0, 5, 1))) if shape is None else b.weight(*shape)
    y = b.op("Gemm", features, b.weight(WIDTH, 5 if shape is None else 6, name="w"), added, name="reader")
    model = b.model(b.gemm(b.op("Relu", y), 5 if shape is None else 6, 3, name="last"))
    result, bare = (repaired(model, images(320, 2, 6, 6), own, {"stem": [0, 2, 5]}) for own in (EXACT, None))
    assert fits(result).pop("reader") == "kept" and set(fits(result)) == {"last", "reader"}
    np.testing.assert_array_equal(arrays(result.to_proto())["w"], arrays(bare.to_proto())["w"])
    fresh = images(5, 2, 6, 6, seed=9)
    assert squared(model, result, fresh) < squared(model, bare, fresh)


@pytest.mark.parametrize("shape", [(1, 1, 6, 6), (6, 6), (1, 6, 1, 1), (6, 1), (1, 1, 1, 6)])
def test_a_constant_factor_behind_the_layer(shape: tuple[int, ...]) -> None:
    """Whether it is one per channel, per row, per column or per position; there are 6 of each."""
    b = Builder(seed=2)
    y = b.conv(stem(b, b.input(["N", 2, 6, 6]), 2), WIDTH, 6, name="reader")
    y = b.op("Mul", y, b.const(np.random.default_rng(1).uniform(-3, 3, shape)))
    model = tail(b, b.op("Add", y, b.conv("x", 2, 6, name="other")), 6)
    assert distance(model, repaired(model, images(96, 2, 6, 6)), images(20, 2, 6, 6, seed=9)) <= 1e-4


@pytest.mark.parametrize("shape", [(1, 1, 6, 6), (1, 6, 1, 1), (1, 6, 6, 6)])
def test_a_constant_added_behind_the_layer(shape: tuple[int, ...]) -> None:
    b = Builder(seed=2)
    y = b.conv(stem(b, b.input(["N", 2, 6, 6]), 2), WIDTH, 6, bias=False, name="reader")
    model = tail(b, b.op("Add", y, b.const(np.random.default_rng(1).uniform(-3, 3, shape), name="table")), 6)
    result = repaired(model, images(96, 2, 6, 6))
    assert distance(model, result, images(20, 2, 6, 6, seed=9)) <= 1e-4
    np.testing.assert_array_equal(arrays(result.to_proto())["table"], arrays(model)["table"])


def test_a_gate_behind_the_layer() -> None:
    """A factor that is an activation is no constant scale: the layer aims at its own output."""
    b = Builder(seed=2)
    y = stem(b, b.input(["N", 2, 6, 6]), 2)
    gate = b.op("Sigmoid", b.conv(b.op("GlobalAveragePool", y), WIDTH, 6, 1, name="gate"))
    model = tail(b, b.op("Mul", b.conv(y, WIDTH, 6, name="reader"), gate), 6)
    assert distance(model, repaired(model, images(300, 2, 6, 6)), images(20, 2, 6, 6, seed=9)) <= 1e-4


# ---- files and ends --------------------------------------------------------------------------------------------------


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_small_memory_spills_and_changes_nothing(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spilled: list[int] = []
    monkeypatch.setattr(Store, "close", lambda self, close=Store.close: (spilled.append(self.spilled), close(self))[1])
    model = residual()
    found = [
        repaired(model, images(64, 2, 6, 6), RepairOptions(memory=memory), {"in0": [0, 1], "in1": [3]}).to_proto().SerializeToString()
        for memory in (10**9, 30_000, 1)
    ]
    assert found[0] == found[1] == found[2]
    assert spilled[:2] == [0, 0] and min(spilled[2:]) > 0
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("large", [10**6, 10_000])
def test_what_is_large_and_made_from_little_is_made_again(large: int, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wide tensor between narrow ones is neither held nor written; what comes of it is the same."""
    monkeypatch.setattr(walks, "LARGE", large)
    b = Builder(seed=1)
    narrow = b.op("Relu", b.conv(b.input(["N", 2, 6, 6]), 2, 4, 1, name="narrow"))
    wide = b.op("Relu", b.conv(narrow, 4, 32, 1, name="wide"))
    inner = b.op("Relu", b.conv(wide, 32, 32, 1, name="inner"))
    model, batches = b.model(b.conv(inner, 32, 3, 1, name="last")), np.split(images(6, 2, 6, 6), 3)
    loaded = sfp_onnx.load(model)
    wanted = [narrow, wide, inner, loaded.proto.graph.output[0].name]
    store, held = Store(0), list[int]()
    walk, plain = Walk(loaded, store), with_all_tensors(model)
    found = [dict(zip([item.name for item in plain.graph.output], run(plain, {"x": batch}), strict=True)) for batch in batches]
    for batch in batches:
        walk.feed({"x": batch})
    for name in wanted:
        segment = walk.advance([name])
        for number, every in enumerate(found):
            np.testing.assert_allclose(segment(number)[name], every[name], rtol=1e-5, atol=1e-6)
        walk.finish()
        held.append(sum(int(np.prod(place[1])) for place in store._places.values()))
    assert held == [6 * 36 * channels for channels in ((4, 32, 32, 0) if large == 10**6 else (4, 4, 4, 0))]
    assert store.spilled == 6 * 36 * 4 * (2 + 4 + (32 if large == 10**6 else 0))  # a batch takes the place of the one that it is made from
    store.close()


@pytest.mark.parametrize("when", ["solve", "best_ridge", "give_biases"])
def test_interruption_leaves_nothing_behind(when: str, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    closed: list[Store] = []
    monkeypatch.setattr(Store, "close", lambda self, close=Store.close: (closed.append(self), close(self))[1])
    monkeypatch.setattr(lockstep, when, stop)
    with pytest.raises(KeyboardInterrupt):
        repaired(residual(), images(64, 2, 6, 6), RepairOptions(memory=1), {"in0": [0, 1]})
    assert not list(scratch.iterdir())
    assert all(store._file is not None and store._file.closed for store in closed) and len(closed) == (0 if when == "give_biases" else 2)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, bool])
def test_store(dtype: Any, scratch: Path) -> None:
    store = Store(100)
    generator = np.random.default_rng(0)
    kept = {}
    for number in range(30):
        shape = [(5, 4), (2, 3, 2), (0, 4), ()][number % 4]
        kept[("a", number)] = generator.integers(0, 2, shape).astype(dtype)
        store.put(("a", number), kept[("a", number)])
        if number % 3 == 2:
            store.drop(("a", number - 1))
            del kept[("a", number - 1)]
        for key, array in kept.items():
            found = store.get(key)
            assert found.dtype == array.dtype
            np.testing.assert_array_equal(found, array)
    assert store.used <= 100 and 0 < store.spilled < sum(array.nbytes for array in kept.values()) + 200
    turned = np.arange(60).astype(dtype).reshape(6, 10).T[::2]
    store.put(("b", 0), turned)
    np.testing.assert_array_equal(store.get(("b", 0)), turned)
    store.close()
    assert not list(scratch.iterdir())


# ---- refusal ---------------------------------------------------------------------------------------------------------


def spoil(factor: float) -> Callable[..., tuple[graph.Model, list[LayerFit]]]:
    """A repair that multiplies all weights of the last layer."""

    def broken(prepared: Any, coupling: Any, removed: Any, changed: graph.Model, *rest: Any) -> tuple[graph.Model, list[LayerFit]]:
        name = "w3" if "w3" in graph.initializers(changed) else "out0.weight"
        return graph.extract.with_constants(changed, {name: graph.Constants(changed)[name] * np.float32(factor)}), []

    return broken


@pytest.mark.parametrize("factor", [-1.0, np.nan, np.inf])
@pytest.mark.parametrize("kind", ["classifier", "other"])
def test_a_repair_that_makes_it_worse_is_refused(
    factor: float, kind: str, model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repair, "repair", spoil(factor))
    data = tmp_path / "own.npz"
    np.savez(data, x=pictures(40) if kind == "classifier" else images(40, 2, 6, 6))
    if kind == "other":
        onnx.save(residual(1), model_file)
    out, manifest = tmp_path / "out.onnx", tmp_path / "m.json"
    command = ["prune", model_file, "-o", out, "--data", data, "--ratio", "0.3", "--manifest", manifest]
    before = files_in(tmp_path)
    result = invoke(*command)
    assert result.exit_code == 3, result.stderr
    assert "took the model away from the original" in result.stderr and "--force" in result.stderr and "Traceback" not in result.stderr
    assert ("KL divergence" if kind == "classifier" else "centred error") in result.stderr
    assert files_in(tmp_path) == before
    result = invoke(*command, "--force")
    assert result.exit_code == 0, result.stderr
    assert "took the model away from the original" in result.stderr and "Kept, because of --force" in result.stderr
    assert out.exists()
    if np.isfinite(factor):
        assert json.loads(manifest.read_text())["repair"]["after"] > json.loads(manifest.read_text())["repair"]["before"]


def test_the_message_is_that_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair, "repair", spoil(-1.0))
    with pytest.raises(VerificationError, match=r"distance from the original \(centred error\) on 8 held-out samples"):
        repaired(residual(1), images(64, 2, 6, 6), RepairOptions(), {"in0": [0, 1]})
    result = repaired(residual(1), images(64, 2, 6, 6), RepairOptions(force=True), {"in0": [0, 1]})
    assert "Kept, because of --force" in " ".join(result.notes)


# ---- command line ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["prune", "apply"])
@pytest.mark.parametrize("kind", ["lstsq", "bias", "bn"])
def test_a_repair_needs_data(command: str, kind: str, model_file: Path, tmp_path: Path) -> None:
    assert invoke("plan", model_file, "-o", tmp_path / "plan.json", "--ratio", "0.5").exit_code == 0
    before = files_in(tmp_path)
    own = ["--ratio", "0.5"] if command == "prune" else [tmp_path / "plan.json"]
    result = invoke(command, model_file, *own, "-o", tmp_path / "out.onnx", "--repair", kind)
    assert result.exit_code == 2 and "needs --data" in result.stderr
    assert files_in(tmp_path) == before
    assert invoke(command, model_file, *own, "-o", tmp_path / "out.onnx", "--repair", "none").exit_code == 0


@pytest.mark.parametrize("memory", ["", "0", "-1GB", "2XB", "lots", "1.2.3GB", "0.0001", "1e3", "1 0 MB"])
def test_bad_memory(memory: str, model_file: Path, data_file: Path, tmp_path: Path) -> None:
    result = invoke("prune", model_file, "-o", tmp_path / "out.onnx", "--ratio", "0.5", "--data", data_file, "--memory", memory)
    assert result.exit_code == 2 and "--memory" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("12k", 12_000), ("1.5KB", 1500), (".5 mb", 500_000), ("2GB", 2 * 10**9), ("1GiB", 2**30)]
)
def test_sizes_are_decimal_unless_they_say_otherwise(text: str, size: int) -> None:
    assert byte_size(text) == size


def test_memory_changes_no_byte(model_file: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", x=pictures(160))
    found = []
    for memory in ("2GB", "1.5e0KB", "12k", "1"):
        out = tmp_path / "out.onnx"
        result = invoke("prune", model_file, "-o", out, "--ratio", "0.5", "--data", tmp_path / "own.npz", "--memory", memory)
        if memory == "1.5e0KB":
            assert result.exit_code == 2
            continue
        assert result.exit_code == 0, result.stderr
        found.append(out.read_bytes())
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("kind", ["none", "bias", "bn", "lstsq"])
def test_every_repair(kind: str, model_file: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", x=pictures(160))
    out, manifest = tmp_path / "out.onnx", tmp_path / "m.json"
    options = ["--data", tmp_path / "own.npz", "--score", "contribution", "--repair", kind, "--manifest", manifest, "--force"]
    result = invoke("prune", model_file, "-o", out, "--ratio", "0.5", *options)
    assert result.exit_code == 0, result.stderr
    found = json.loads(manifest.read_text())["repair"]
    assert (found is None) if kind == "none" else found["kind"] == kind
    assert ("repair (" in result.stderr) == (kind != "none")
    assert np.isfinite(run_model(out, {"x": pictures(4)})[0]).all()


def test_bn_without_batch_normalization(tmp_path: Path) -> None:
    onnx.save(residual(1), tmp_path / "model.onnx")
    np.savez(tmp_path / "own.npz", x=images(40, 2, 6, 6))
    command = ["prune", tmp_path / "model.onnx", "-o", tmp_path / "out.onnx", "--ratio", "0.5", "--data", tmp_path / "own.npz"]
    result = invoke(*command, "--repair", "bn")
    assert result.exit_code == 2 and "no BatchNormalization" in result.stderr
    assert not (tmp_path / "out.onnx").exists()


def test_obs_passes_wide_depthwise_layers() -> None:
    """They lose outputs with their inputs, so only the layers behind them count."""
    b, width = Builder(seed=2), MOST_BLOCKS + 2
    y = b.op("Relu", b.conv(b.input(["N", 2, 4, 4]), 2, width, name="stem"))
    y = b.op("Relu", b.conv(y, width, width, group=width, name="depthwise"))
    analysis = sfp_onnx.inspect(b.model(b.conv(y, width, 3, 1, name="last")))
    values = sfp_onnx.score(analysis, "obs", sfp_onnx.data_for(analysis.model, {"x": images(40, 2, 4, 4)}))
    assert values.shape == (analysis.coupling.units,) and np.isfinite(values).all() and (values > 0).any()


def test_obs_knows_that_copies_are_free() -> None:
    """Of two channels that are multiples of each other one leaves for free, the other one does not."""
    b = Builder(seed=2)
    model = tail(b, b.conv(stem(b, b.input(["N", 2, 6, 6]), 2), WIDTH, 6, name="reader"), 6)
    analysis = sfp_onnx.inspect(model)
    values = sfp_onnx.score(analysis, "obs", sfp_onnx.data_for(analysis.model, {"x": images(96, 2, 6, 6)}))
    group = next(group for group in analysis.coupling.groups if "stem" in group.producers)
    own = values[group.units]
    free = {int(unit) for unit in np.argsort(own)[:2]}
    assert len(free & {1, 3}) == 1 and len(free & {5, 7}) == 1
    assert max(own[list(free)]) < 0.1 * min(np.delete(own, list(free)))


def two_groups() -> onnx.ModelProto:
    """Two layers; one reader of both (1 x 1), another of the first alone."""
    b = Builder(seed=4)
    x = b.input(["N", 2, 6, 6])
    first, second = (b.op("Relu", b.conv(x, 2, size, name=name), outputs=[f"read {name}"]) for name, size in (("one", 8), ("two", 4)))
    both = b.op("Relu", b.conv(b.op("Concat", first, second, axis=1), 12, 5, 1, name="both"))
    return b.model(b.conv(b.op("Concat", both, b.op("Relu", b.conv(first, 8, 3, 1, name="alone")), axis=1), 8, 2, 1, name="last"))


def few(rows: np.ndarray, weights: np.ndarray, unit: np.ndarray, scale: float, share: float) -> Reader:
    """A reader of rows whose covariance is shrunk by a share."""
    return reader((1 - share) * np.cov(rows.T, bias=True), weights, unit, scale, max(share, 1e-3) / (1 - share))


@pytest.mark.parametrize("memory", [10**9, 1])
def test_selection_against_elimination_by_hand(memory: int, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers of several groups are kept (in the file, if memory is small) until their last group was eliminated."""
    spilled: list[int] = []
    monkeypatch.setattr(Store, "close", lambda self, close=Store.close: (spilled.append(self.spilled), close(self))[1])
    model, data = two_groups(), images(64, 2, 6, 6)
    analysis = sfp_onnx.inspect(model)
    options = RepairOptions(rows_per_input=1e6, memory=memory)
    found = elimination(analysis.prepared, analysis.coupling, [{"x": own} for own in np.split(data, 8)], options)
    assert (spilled[0] > 0) == (memory == 1) and not list(scratch.glob("sfp_onnx*"))
    whole, held = with_all_tensors(model), arrays(model)
    values = dict(zip([item.name for item in whole.graph.output], run(whole, {"x": data}), strict=True))
    rows = {name: np.moveaxis(values[f"read {name}"], 1, -1).reshape(-1, size) for name, size in (("one", 8), ("two", 4))}
    joined = np.concatenate([rows["one"], rows["two"]], 1)
    weights = {name: held[f"{name}.weight"].reshape(-1, held[f"{name}.weight"].shape[1]).T for name in ("both", "alone")}
    shares = {name: shrunk(own.reshape(64, 36, -1)) for name, own in (("both", joined), ("alone", rows["one"]))}
    assert max(shares.values()) < 0.2
    spread = {name: values[next(node for node in model.graph.node if node.name == name).output[0]].var((0, 2, 3)).sum() for name in weights}
    none = np.full(8, -1)
    for name, own in (("one", np.r_[np.arange(8), none[:4]]), ("two", np.r_[none, np.arange(4)])):
        readers = [few(joined, weights["both"], own, spread["both"], shares["both"])]
        if name == "one":
            readers.append(few(rows["one"], weights["alone"], np.arange(8), spread["alone"], shares["alone"]))
        group = next(group for group in analysis.coupling.groups if group.producers == (name,))
        order, added = left(eliminate(readers, group.width))
        np.testing.assert_allclose(found.scores[group.units[order]], added, rtol=2e-3)
        np.testing.assert_allclose(found.errors[group.name][0], added.sum(), rtol=2e-3)
