"""Feeds of any shape: scalars, states with the batch on a later axis, texts, whole runs from folders, lists and functions, samples of
different length, inputs without a common sample axis. Models of several kinds go through scores, repair, verification and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import pytest
from building import FLOAT, Builder, run
from conftest import invoke, tensor_file

import sfp_onnx
from sfp_onnx.core.errors import DataError, ModelError
from sfp_onnx.core.options import PlanOptions, RepairOptions
from sfp_onnx.core.types import Port
from sfp_onnx.coupling.analysis import feeds_of
from sfp_onnx.data.layout import Apart, batch_symbol, sample_axes, traced_samples, with_samples
from sfp_onnx.graph import inputs
from sfp_onnx.latency.measure import timing_feeds

INT64, STRING = onnx.TensorProto.INT64, onnx.TensorProto.STRING
random = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32)


# ---- models ----------------------------------------------------------------------------------------------------------


def recurrent(batch: int | str = "batch", states: int | str | None = None, length: int | str = 5) -> onnx.ModelProto:
    """A GRU: frames (batch, 5, 8), state (2, batch, 12), of which the first is read."""
    b = Builder()
    frames, state = b.input([batch, length, 8]), b.input([2, batch if states is None else states, 12], "state")
    first = b.slice(state, [0], [1], [0])
    operands = [b.weight(1, 36, 8, fan_in=8), b.weight(1, 36, 12, fan_in=12), b.weight(1, 72, fan_in=72)]
    _, last = b.op("GRU", b.op("Transpose", frames, perm=[1, 0, 2]), *operands, None, first, outputs=2, hidden_size=12)
    return b.model(b.gemm(b.op("Relu", b.gemm(b.axes_op("Squeeze", last, [0]), 12, 16)), 16, 4))


def at_a_rate(shape: tuple[int, ...] = ()) -> onnx.ModelProto:
    """Sound (N, 1, 32) and its rate, a scalar (or a vector of one), which must be 16000: it picks a row of a table of one."""
    b = Builder()
    sound, rate = b.input(["N", 1, 32]), b.input(shape, "rate", INT64)
    factor = b.op("Gather", b.const([1.0]), b.op("Sub", rate, b.const(16000, np.int64)))
    hidden = b.op("Relu", b.conv(b.op("Mul", sound, factor), 1, 12, rank=1))
    hidden = b.op("Relu", b.conv(hidden, 12, 16, rank=1))
    return b.model(b.gemm(b.reduce("ReduceMean", hidden, [2], keepdims=0), 16, 4))


def of_regions(batch: int | str = 1) -> onnx.ModelProto:
    """An image and any number of regions on it (in quarters, say): class scores of each region."""
    b = Builder()
    image, regions = b.input([batch, 3, 8, 8], "image"), b.input(["regions", 4], "boxes")
    hidden = b.op("Relu", b.conv(image, 3, 16))
    hidden = b.op("Relu", b.conv(hidden, 16, 16))
    pooled = b.reduce("ReduceMean", hidden, [0, 2, 3], keepdims=0)
    joined = b.op("Add", b.gemm(regions, 4, 16), pooled)
    return b.model(b.gemm(b.op("Relu", joined), 16, 4))


def of_sequences(length: int | str = "T") -> onnx.ModelProto:
    """Sequences (N, T, 6): class scores from the mean over time."""
    b = Builder()
    x = b.input(["N", length, 6])
    hidden = b.op("Relu", b.op("Add", b.op("MatMul", x, b.weight(6, 16, fan_in=6)), b.weight(16, fan_in=16)))
    hidden = b.op("Relu", b.op("MatMul", hidden, b.weight(16, 16, fan_in=16)))
    return b.model(b.gemm(b.reduce("ReduceMean", hidden, [1], keepdims=0), 16, 4))


def of_texts(kinds: int = 1) -> onnx.ModelProto:
    """Numbers (N, 6) and a text of each sample, which chooses an offset."""
    b = Builder()
    b.domains["ai.onnx.ml"] = 2
    x, text = b.input(["N", 6]), b.input(["N", kinds] if kinds else ["N"], "text", STRING)
    facts: dict[str, Any] = {"keys_strings": ["a", "b"], "values_floats": [1.0, 2.0], "default_float": 0.0}
    b.nodes.append(oh.make_node("LabelEncoder", [text], ["code"], domain="ai.onnx.ml", **facts))
    code = "code" if kinds else b.axes_op("Unsqueeze", "code", [1])
    code = b.op("ReduceSum", code, b.const([1], np.int64), keepdims=1)
    hidden = b.op("Relu", b.op("Add", b.gemm(x, 6, 16), code))
    model = b.model(b.gemm(b.op("Relu", b.gemm(hidden, 16, 16)), 16, 4), infer=False)
    model.graph.output[0].CopyFrom(oh.make_tensor_value_info(model.graph.output[0].name, FLOAT, ["N", 4]))
    model.opset_import[1].version = 2
    return model


def wave() -> onnx.ModelProto:
    """One waveform of any length, without a batch."""
    b = Builder()
    frames = b.op("Reshape", b.input(["samples"]), b.const([1, 1, -1], np.int64))
    hidden = b.op("Relu", b.conv(b.op("Relu", b.conv(frames, 1, 12, rank=1)), 12, 16, rank=1))
    return b.model(b.gemm(b.reduce("ReduceMean", hidden, [2], keepdims=0), 16, 4))


# ---- data ------------------------------------------------------------------------------------------------------------


def lengths() -> Iterator[Any]:
    generator = np.random.default_rng(3)
    for number in range(24):
        yield generator.standard_normal((2, 3 + number % 4, 6)).astype(np.float32), [number % 4, (number + 1) % 4]


def waves() -> list[np.ndarray]:
    return [floats(40 + 7 * (number % 5)) for number in range(40)]


def region_runs() -> list[dict[str, np.ndarray]]:
    return [{"image": floats(1, 3, 8, 8), "boxes": floats(2 + number % 3, 4)} for number in range(40)]


def single_runs() -> list[dict[str, np.ndarray]]:
    state = floats(2, 1, 12)
    return [{"x": floats(1, 5, 8), "state": state if number % 5 else floats(2, 1, 12)} for number in range(48)]


TEXTS = np.asarray(["a", "b", "other"])[np.arange(48) % 3]
CASES: dict[str, tuple[Callable[[], onnx.ModelProto], Callable[[], Any], int]] = {
    "states on axis 1": (recurrent, lambda: {"x": floats(48, 5, 8), "state": floats(2, 48, 12)}, 48),
    "one state for all": (recurrent, lambda: {"x": floats(48, 5, 8), "state": floats(2, 1, 12)}, 48),
    "states of a fixed batch": (lambda: recurrent(1), lambda: {"x": floats(48, 5, 8), "state": floats(2, 48, 12)}, 48),
    "a state of each, stacked": (lambda: recurrent(1), lambda: {"x": floats(48, 5, 8), "state": floats(48, 2, 1, 12)}, 48),
    "a fixed state": (lambda: recurrent(1), lambda: {"x": floats(48, 5, 8), "state": floats(2, 1, 12)}, 48),
    "padded": (lambda: recurrent(5), lambda: {"x": floats(48, 5, 8), "state": floats(2, 48, 12)}, 48),
    "a fixed state beside an open batch": (lambda: recurrent("N", 1), lambda: {"x": floats(48, 5, 8), "state": floats(2, 1, 12)}, 48),
    "open sizes, too": (lambda: recurrent("N", 1, "T"), lambda: {"x": floats(48, 5, 8), "state": floats(2, 1, 12)}, 48),
    "fixed states, each its own": (lambda: recurrent("N", 1), lambda: {"x": floats(48, 5, 8), "state": floats(2, 48, 12)}, 48),
    "fixed states, stacked": (lambda: recurrent("N", 1), lambda: {"x": floats(48, 5, 8), "state": floats(48, 2, 1, 12)}, 48),
    "runs with fixed states": (lambda: recurrent("N", 1), single_runs, 48),
    "scalar": (at_a_rate, lambda: {"x": floats(48, 1, 32), "rate": np.asarray(16000)}, 48),
    "a vector of one for a scalar": (at_a_rate, lambda: {"x": floats(48, 1, 32), "rate": np.asarray([16000])}, 48),
    "a scalar for a vector of one": (lambda: at_a_rate((1,)), lambda: {"x": floats(48, 1, 32), "rate": np.asarray(16000)}, 48),
    "a scalar of each": (at_a_rate, lambda: {"x": floats(48, 1, 32), "rate": np.full(48, 16000)}, 48),
    "regions": (of_regions, region_runs, 40),
    "one image, many regions": (of_regions, lambda: {"image": floats(1, 3, 8, 8), "boxes": floats(40, 4)}, 1),
    "the same regions on many images": (lambda: of_regions("N"), lambda: {"image": floats(40, 3, 8, 8), "boxes": floats(7, 4)}, 40),
    "sequences of different length": (of_sequences, lambda: lengths, 48),
    "a list of sequences": (of_sequences, lambda: [floats(4 + number % 3, 6) for number in range(48)], 48),
    "lists by name": (of_sequences, lambda: {"x": [floats(4 + number % 3, 6) for number in range(48)]}, 48),
    "texts": (of_texts, lambda: {"x": floats(48, 6), "text": TEXTS[:, None]}, 48),
    "texts as objects": (lambda: of_texts(0), lambda: {"x": floats(48, 6), "text": TEXTS.astype(object)}, 48),
    "bytes": (lambda: of_texts(2), lambda: {"x": floats(48, 6), "text": np.stack([TEXTS, TEXTS], 1).astype("S")}, 48),
    "waves": (wave, waves, 40),
    "stacked waves": (wave, lambda: {"x": floats(40, 64)}, 40),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[onnx.ModelProto, Any, int]:
    build, data, count = CASES[request.param]
    return build(), data(), count


# ---- what is fed -----------------------------------------------------------------------------------------------------


def test_every_batch_runs_and_holds_its_samples(case: tuple[onnx.ModelProto, Any, int]) -> None:
    model, source, count = case
    data = sfp_onnx.data_for(sfp_onnx.load(model), source)
    assert data is not None and data.samples == count
    counts = []
    for feeds, samples in data.batches():
        assert all(array.flags.c_contiguous for array in feeds.values())
        run(model, feeds)
        counts.append(samples)
    assert sum(counts) == count
    some = data.part(np.arange(count)[::3])
    assert sum(samples for _, samples in some.batches()) == some.samples
    first, second = ([sorted((name, array.tobytes()) for name, array in feeds.items()) for feeds, _ in data.batches()] for _ in range(2))
    assert first == second


def test_states_stay_with_their_samples() -> None:
    source = {"x": floats(10, 5, 8), "state": floats(2, 10, 12)}
    data = sfp_onnx.data_for(sfp_onnx.load(recurrent()), source)
    assert data is not None
    ((feeds, count),) = data.part(np.array([1, 4, 7])).batches()
    assert count == 3
    np.testing.assert_array_equal(feeds["x"], source["x"][[1, 4, 7]])
    np.testing.assert_array_equal(feeds["state"], source["state"][:, [1, 4, 7]])


def test_padding_goes_along_the_sample_axis() -> None:
    source = {"x": floats(7, 5, 8), "state": floats(2, 7, 12)}
    data = sfp_onnx.data_for(sfp_onnx.load(recurrent(5)), source)
    assert data is not None
    batches = list(data.batches())
    assert [count for _, count in batches] == [5, 2]
    assert batches[1][0]["state"].shape == (2, 5, 12)
    np.testing.assert_array_equal(batches[1][0]["state"][:, 2:], np.repeat(source["state"][:, 6:7], 3, 1))


def test_sequences_run_together_where_they_are_equally_long() -> None:
    data = sfp_onnx.data_for(sfp_onnx.load(of_sequences()), [floats(size, 4, 6) for size in (2, 3, 1)] + [floats(2, 5, 6)])
    assert data is not None
    assert [(feeds["x"].shape, count) for feeds, count in data.batches()] == [((6, 4, 6), 6), ((2, 5, 6), 2)]


def folders(path: Path, runs: list[dict[str, np.ndarray]]) -> Path:
    for number, feeds in enumerate(runs):
        (path / f"test_data_set_{number}").mkdir(parents=True)
        for position, (name, array) in enumerate(feeds.items()):
            tensor_file(path / f"test_data_set_{number}" / f"input_{position}.pb", array, name)
        tensor_file(path / f"test_data_set_{number}" / "output_0.pb", floats(1), "y")
    return path


@pytest.mark.parametrize("kind", ["regions", "states", "sequences"])
def test_folders_are_whole_feeds(kind: str, tmp_path: Path) -> None:
    runs = {
        "regions": region_runs()[:5],
        "states": [{"x": floats(size, 5, 8), "state": floats(2, size, 12)} for size in (1, 3, 2)],
        "sequences": [{"x": floats(2, 4, 6)}, {"x": floats(2, 4, 6)}, {"x": floats(1, 9, 6)}],
    }[kind]
    model = {"regions": of_regions, "states": recurrent, "sequences": of_sequences}[kind]()
    data = sfp_onnx.data_for(sfp_onnx.load(model), folders(tmp_path, runs))
    assert data is not None
    batches = list(data.batches())
    assert len(batches) == len(runs)
    for (feeds, count), given in zip(batches, runs, strict=True):
        assert count == (1 if kind == "regions" else len(given["x"]))
        for name, array in given.items():
            np.testing.assert_array_equal(feeds[name], array)


@pytest.mark.parametrize(
    ("build", "source", "words"),
    [
        (recurrent, {"x": floats(8, 5, 8), "state": floats(2, 7, 12)}, "different numbers of samples"),
        (recurrent, lambda: [{"x": floats(8, 5, 8), "state": floats(2, 7, 12)}], "the same number of rows"),
        (of_texts, {"x": floats(8, 6), "text": np.zeros((8, 1))}, "expects text"),
        (of_texts, {"x": TEXTS[:8], "text": TEXTS[:8, None]}, "expects"),
        (of_sequences, {"x": [floats(4, 6), floats(5, 7)]}, "expects shape"),
        (of_regions, lambda: [({"image": floats(1, 3, 8, 8), "boxes": floats(2, 4)}, [1, 2])], "2 labels for 1 samples"),
        (at_a_rate, {"x": floats(8, 1, 32), "rate": np.arange(7)}, "different numbers of samples|expects shape"),
    ],
)
def test_what_fits_no_way_is_told(build: Callable[[], onnx.ModelProto], source: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        sfp_onnx.data_for(sfp_onnx.load(build()), source)


def test_bytes_in_files_are_texts(tmp_path: Path) -> None:
    model, arrays = sfp_onnx.load(of_texts()), {"x": floats(48, 6), "text": TEXTS[:, None].astype("S")}
    np.savez(tmp_path / "data.npz", **arrays)
    data = sfp_onnx.data_for(model, tmp_path / "data.npz")
    assert data is not None and next(iter(data.batches()))[0]["text"].dtype.kind in "UO"


# ---- which axis ------------------------------------------------------------------------------------------------------


def ports(**shapes: tuple[int | str | None, ...] | None) -> list[Port]:
    return [Port(name, np.dtype(np.float32), shape) for name, shape in shapes.items()]


@pytest.mark.parametrize(
    ("shapes", "symbol"),
    [
        ({"x": ("N", 3)}, "N"),
        ({"x": ("s0", 3), "m": ("s1", "s1")}, "s0"),
        ({"x": ("seq", "batch_size", 4), "h": (2, "batch_size", 8)}, "batch_size"),
        ({"x": ("seq", "b"), "y": ("seq",)}, "b"),
        ({"image": (1, 3, 8, 8), "boxes": ("boxes", 4)}, None),
        ({"p": (1, 4), "x": ("s77", 3)}, "s77"),
        ({"x": (1, 3, "height", "width")}, None),
        ({"x": ("samples",)}, None),
        ({"x": (None, 3)}, None),
    ],
)
def test_the_batch_is_the_dimension_called_so(shapes: dict[str, Any], symbol: str | None) -> None:
    assert batch_symbol(ports(**shapes)) == symbol


@pytest.mark.parametrize(
    ("declared", "given", "axes"),
    [
        ({"x": ("N", 3), "r": ()}, {"x": (9, 3), "r": ()}, {"x": 0, "r": None}),
        ({"x": (None, None), "h": (2, None, 8), "r": ()}, {"x": (9, 40), "h": (2, 9, 8), "r": ()}, {"x": 0, "h": 1, "r": None}),
        ({"h": (2, 1, 8), "x": (1, 40)}, {"h": (2, 1, 8), "x": (1, 40)}, {"h": 1, "x": 0}),
        ({"h": (2, 1, 8), "x": (1, 40)}, {"h": (2, 9, 8), "x": (9, 40)}, {"h": 1, "x": 0}),
        ({"x": ("unk__1", 3), "y": ("unk__2", 4)}, {"x": (9, 3), "y": (9, 4)}, {"x": 0, "y": 0}),
        ({"x": ("N", 3), "m": ("T", "T")}, {"x": (9, 3), "m": (5, 5)}, {"x": 0, "m": None}),
        ({"x": ("N", 3), "p": (1, 4)}, {"x": (9, 3), "p": (1, 4)}, {"x": 0, "p": None}),
        ({"x": None}, {"x": (9, 3)}, {"x": 0}),
        ({"x": ("unk__1", 3), "y": ("unk__2", 4)}, {"x": (9, 3), "y": (8, 4)}, None),
    ],
)
def test_sample_axes(declared: dict[str, Any], given: dict[str, tuple[int, ...]], axes: dict[str, int | None] | None) -> None:
    if axes is None:
        with pytest.raises(Apart):
            sample_axes(ports(**declared), [given])
    else:
        assert sample_axes(ports(**declared), [given]) == axes


def test_other_numbers_of_samples() -> None:
    model = sfp_onnx.load(recurrent())
    feeds = with_samples(inputs(model), {"x": floats(2, 5, 8), "state": floats(2, 2, 12)}, 5)
    assert feeds["x"].shape == (5, 5, 8) and feeds["state"].shape == (2, 5, 12)
    assert traced_samples(inputs(model), {name: array.shape for name, array in feeds.items()}) == 5


# ---- models that are fed so, from end to end ---------------------------------------------------------------------------


def test_prune_and_evaluate(case: tuple[onnx.ModelProto, Any, int], tmp_path: Path) -> None:
    model, source, count = case
    loaded = sfp_onnx.load(model)
    pruned = sfp_onnx.prune(loaded, PlanOptions(ratio=0.25), data=source, repair=RepairOptions(force=True)).model
    result = sfp_onnx.evaluate([loaded, pruned], source, latency=False)[1]
    assert result.samples == count and result.value is not None and np.isfinite(result.value)


@pytest.mark.parametrize("score", ["contribution", "bandit:leave-one-out,batch=4", "obs"])
def test_scores(case: tuple[onnx.ModelProto, Any, int], score: str) -> None:
    model, source, _ = case
    try:
        assert np.isfinite(sfp_onnx.score(model, score, source)).all()
    except DataError as error:
        assert "outputs of one size" in str(error) and isinstance(source, list)


def test_class_profiles_or_a_sentence(case: tuple[onnx.ModelProto, Any, int]) -> None:
    model, source, _ = case
    try:
        assert np.isfinite(sfp_onnx.score(model, "sfp", source)).all()
    except (DataError, ModelError) as error:
        words = "samples of one shape", "need a classifier", "compare at least 2 labels", "for 4 labels"
        assert any(word in str(error) for word in words)


def test_every_batch_is_held_in_memory_in_its_shape(case: tuple[onnx.ModelProto, Any, int]) -> None:
    model, source, _ = case
    loaded = sfp_onnx.load(model)
    data = sfp_onnx.data_for(loaded, source)
    analysis = sfp_onnx.inspect(loaded, data=data)
    assert data is not None
    for feeds in feeds_of(analysis, data):
        run(model, feeds)
    run(model, timing_feeds(analysis, 1))


def test_statistics_of_ragged_data_are_those_of_single_samples() -> None:
    model = of_sequences()
    source = [floats(4 + number % 3, 6) for number in range(24)]
    together, alone = sfp_onnx.score(model, "contribution", source), sfp_onnx.score(model, "contribution", [[row] for row in source])
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_inspect_with_data(tmp_path: Path) -> None:
    path, data = tmp_path / "m.onnx", tmp_path / "d.npz"
    onnx.save(at_a_rate(), path)
    np.savez(data, x=floats(8, 1, 32), rate=np.asarray(16000))
    failed = invoke("inspect", path)
    assert failed.exit_code == 4 and "--data" in failed.output
    assert invoke("inspect", path, "--data", data).exit_code == 0
    plan = tmp_path / "p.json"
    assert invoke("plan", path, "-o", plan, "--ratio", "0.25", "--data", data).exit_code == 0
    result = invoke("apply", path, plan, "-o", tmp_path / "out.onnx", "--data", data)
    assert result.exit_code == 0, result.output


def test_a_batch_that_a_fixed_state_forbids_is_refused(tmp_path: Path) -> None:
    path, data = tmp_path / "m.onnx", tmp_path / "d.npz"
    onnx.save(recurrent("N", 1), path)
    np.savez(data, x=floats(60, 5, 8), state=floats(2, 1, 12))
    alone = invoke("evaluate", path, path, "--data", data, "--task", "regress")
    assert alone.exit_code == 0 and "samples run one by one" in alone.stderr and "batch 1" in alone.output
    eight = invoke("evaluate", path, path, "--data", data, "--task", "regress", "--batch", "8")
    assert eight.exit_code == 2 and "'state' has the fixed batch size 1" in eight.stderr
