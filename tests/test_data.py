"""Data come in from every accepted form, preprocessed as plain numpy would, and statistics are those of brute force."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import CLASSES, IMAGE, classifier, images, labels_of, model_of, run_model, tensor_file
from onnx import helper, numpy_helper

import sfp_onnx
from sfp_onnx.core.errors import DataError, ModelError, OptionError
from sfp_onnx.core.options import PlanOptions
from sfp_onnx.core.types import Array, Moments, Port
from sfp_onnx.data import Preprocessing
from sfp_onnx.data.dataset import BATCH, Dataset
from sfp_onnx.scores.statistics import Statistics, calibrate

PORT = (Port("x", np.dtype(np.float32), ("N", *IMAGE)),)
TWO = (Port("a", np.dtype(np.float32), ("N", 2)), Port("b", np.dtype(np.int64), ("N", 3)))


def whole(data: Dataset) -> dict[str, np.ndarray]:
    """All batches joined, without padding."""
    found: dict[str, list[np.ndarray]] = {}
    for feeds, count in data.batches():
        for name, array in feeds.items():
            found.setdefault(name, []).append(array[:count])
    return {name: np.concatenate(arrays) for name, arrays in found.items()}


# ---- forms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("name", ["x", "images"])
def test_npz(packed: Callable[..., None], order: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    packed(path, **{name: np.asarray(images(), order=order), "labels": labels_of()})
    data = sfp_onnx.open_data(path, PORT)
    np.testing.assert_array_equal(whole(data)["x"], images())
    np.testing.assert_array_equal(data.labels, labels_of())
    assert data.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert all(array.flags.c_contiguous for feeds, _ in data.batches() for array in feeds.values())


@pytest.mark.parametrize("order", ["C", "F"])
def test_npy(order: str, save: Callable[..., Path]) -> None:
    data = sfp_onnx.open_data(save(np.asarray(images(), order=order)), PORT)
    np.testing.assert_array_equal(whole(data)["x"], images())
    assert data.labels is None


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("single", [True, False])
def test_data_set_folders(named: bool, single: bool, tmp_path: Path) -> None:
    """Tensors belong to inputs by name, else by number; the sets follow each other."""
    a = np.arange(8, dtype=np.float32).reshape(4, 2)
    b = np.arange(12).reshape(4, 3)
    for number in range(2):
        rows = slice(2 * number, 2 * number + 2)
        folder = tmp_path / f"test_data_set_{number}"
        files = (
            {"input_0.pb": (b[rows], "b"), "input_1.pb": (a[rows], "a")}
            if named
            else {"input_0.pb": (a[rows], ""), "input_1.pb": (b[rows], "")}
        )
        for file, (array, name) in files.items():
            tensor_file(folder / file, array, name)
        tensor_file(folder / "output_0.pb", np.zeros(3), "y")
    data = sfp_onnx.open_data(tmp_path / "test_data_set_1" if single else tmp_path, TWO)
    found = whole(data)
    rows = slice(2, 4) if single else slice(None)
    np.testing.assert_array_equal(found["a"], a[rows])
    np.testing.assert_array_equal(found["b"], b[rows])


def test_data_set_folders_beyond_ten(tmp_path: Path) -> None:
    """input_10.pb is the eleventh input, not the third."""
    ports = [Port(f"in{index}", np.dtype(np.float32), ("N", 1)) for index in range(12)]
    for index in range(12):
        tensor_file(tmp_path / "test_data_set_0" / f"input_{index}.pb", np.full((2, 1), index, np.float32))
    found = whole(sfp_onnx.open_data(tmp_path, ports))
    assert [found[port.name][0, 0] for port in ports] == list(range(12))


def test_arrays_in_memory() -> None:
    np.testing.assert_array_equal(whole(sfp_onnx.open_data(images(), PORT))["x"], images())
    data = sfp_onnx.open_data({"x": images(), "y": labels_of()}, PORT)
    np.testing.assert_array_equal(data.labels, labels_of())


def test_an_input_called_y_is_not_labels() -> None:
    ports = (Port("y", np.dtype(np.float32), ("N", 2)),)
    data = sfp_onnx.open_data({"y": np.ones((3, 2), np.float32), "labels": np.arange(3)}, ports)
    assert whole(data)["y"].shape == (3, 2) and data.labels is not None and list(data.labels) == [0, 1, 2]


@pytest.mark.parametrize("form", ["npy", "npz", "column"])
def test_labels_of_their_own(form: str, save: Callable[..., Path]) -> None:
    source = {"npy": labels_of(), "npz": {"anything": labels_of()}, "column": labels_of().astype(np.uint8)[:, None]}[form]
    data = sfp_onnx.open_data(
        save({"x": images(), "labels": np.zeros(10, int)}), PORT, labels=save(source, f"l.{'npz' if form == 'npz' else 'npy'}")
    )
    np.testing.assert_array_equal(data.labels, labels_of())


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"z": images(), "w": images()}, ["['x']", "'w'", "'z'"]),
        ({"labels": labels_of()}, ["['x']", "labels"]),
        ({"x": images(), "labels": labels_of(9)}, ["9 labels", "10 samples"]),
        ({"x": images(), "labels": np.asarray(3)}, ["labels"]),
        ({"x": images(), "labels": np.full(10, "a")}, ["numbers for each sample", "<U1"]),
        ({"x": np.asarray(1.0)}, ["'x'", "['N', 3, 8, 8]", "have []"]),
        ({"x": images(0)}, ["no samples"]),
        ({"x": images()[:, :2]}, ["'x'", "['N', 3, 8, 8]", "[10, 2, 8, 8]"]),
        ({"x": images()[:, 0]}, ["'x'", "[10, 8, 8]"]),
        ({"x": np.moveaxis(images(), 1, -1)}, ["--layout nhwc"]),
        ({"x": images().astype(np.complex64)}, ["complex64", "float32"]),
        ({"x": np.full((10, *IMAGE), "a")}, ["<U1"]),
        ({"x": np.full((10, *IMAGE), 7, np.uint8)}, ["uint8", "--scale 255"]),
    ],
)
@pytest.mark.parametrize("on_disk", [False, True])
def test_data_that_do_not_fit(arrays: dict[str, np.ndarray], words: list[str], on_disk: bool, save: Callable[..., Path]) -> None:
    with pytest.raises(DataError) as caught:
        sfp_onnx.open_data(save(arrays) if on_disk else arrays, PORT)
    for word in words:
        assert word in str(caught.value)


def test_inputs_of_different_length() -> None:
    with pytest.raises(DataError, match="different numbers of samples"):
        sfp_onnx.open_data({"a": np.ones((3, 2), np.float32), "b": np.ones((4, 3), int)}, TWO)


def test_floats_are_not_fed_to_integers() -> None:
    with pytest.raises(DataError, match="'b' expects int64, the data are float64"):
        sfp_onnx.open_data({"a": np.ones((3, 2), np.float32), "b": np.ones((3, 3))}, TWO)


@pytest.mark.parametrize("seed", range(40))
def test_damaged_archives_are_data_errors(seed: int, tmp_path: Path) -> None:
    """Whatever byte is wrong: refused with a DataError that names the file, or read."""
    path = tmp_path / "own.npz"
    (np.savez_compressed if seed % 2 else np.savez)(path, x=images(4).round(), labels=labels_of(4))
    content = bytearray(path.read_bytes())
    random = np.random.default_rng(seed)
    where = random.integers(len(content)) if seed % 4 < 2 else random.integers(300)
    content[where] ^= int(random.integers(1, 256))
    path.write_bytes(content)
    try:
        list(sfp_onnx.open_data(path, PORT).batches())
    except DataError as error:
        assert "own.npz" in str(error)


@pytest.mark.parametrize("packed", [np.savez, np.savez_compressed])
def test_truncated_archives(packed: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    packed(path, x=images(4))
    content = path.read_bytes()
    for end in range(0, len(content), 211):
        path.write_bytes(content[:end])
        with pytest.raises(DataError, match=r"own\.npz"):
            list(sfp_onnx.open_data(path, PORT).batches())


# ---- preprocessing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("scale", [None, 255.0])
@pytest.mark.parametrize(("mean", "std"), [(None, None), ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)), ((0.5,), (0.25,)), (None, (2.0, 3.0, 4.0))])
def test_preprocessing(layout: str, scale: float | None, mean: Any, std: Any) -> None:
    raw = np.random.default_rng(0).integers(0, 256, (5, *IMAGE)).astype(np.uint8)
    steps = Preprocessing(mean, std, scale, layout)
    if not steps.given:
        raw = raw.astype(np.float32)
    expected = raw.astype(np.float64) / (scale or 1)
    expected = (expected - np.reshape(mean or 0.0, (1, -1, 1, 1))) / np.reshape(std or 1.0, (1, -1, 1, 1))
    data = sfp_onnx.open_data(np.moveaxis(raw, 1, -1) if layout == "nhwc" else raw, PORT, steps)
    found = whole(data)["x"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_layout_of_volumes_and_rows() -> None:
    """Channels-last is moved behind the batch for any rank; rows of numbers have no layout."""
    volume = np.arange(2 * 4 * 5 * 6 * 3, dtype=np.float32).reshape(2, 4, 5, 6, 3)
    ports = (Port("v", np.dtype(np.float32), ("N", 3, 4, 5, 6)),)
    np.testing.assert_array_equal(whole(sfp_onnx.open_data(volume, ports, Preprocessing(layout="nhwc")))["v"], np.moveaxis(volume, -1, 1))
    rows = (Port("r", np.dtype(np.float32), ("N", 6)),)
    np.testing.assert_array_equal(
        whole(sfp_onnx.open_data(volume[0, 0, 0, :, :].repeat(2, 1), rows, Preprocessing(layout="nhwc")))["r"].shape, (6, 6)
    )


@pytest.mark.parametrize("steps", [{"std": (0.0,)}, {"std": (-1.0,)}, {"scale": 0.0}, {"scale": float("nan")}, {"mean": (float("inf"),)}])
def test_numbers_that_make_no_sense(steps: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"--{next(iter(steps))}"):
        sfp_onnx.open_data(images(), PORT, Preprocessing(**steps))


def test_wrong_number_of_means() -> None:
    with pytest.raises(DataError, match="--mean has 2 values, input 'x' has 3 channels"):
        sfp_onnx.open_data(images(), PORT, Preprocessing(mean=(0.0, 1.0)))


@pytest.mark.parametrize(("dtype", "value"), [(np.float16, 1e6), (np.float32, 1e300), (np.float32, np.nan), (np.float64, -np.inf)])
def test_values_that_are_not_finite(dtype: Any, value: float) -> None:
    """Also those that only the model's type cannot hold. The message gives the sample's number in the file."""
    array = np.zeros((130, 2))
    array[100, 1] = value
    ports = (Port("x", np.dtype(dtype), ("N", 2)),)
    with pytest.raises(DataError, match="sample 100 of 'x'"):
        list(sfp_onnx.open_data(array, ports).batches())
    chosen = sfp_onnx.open_data(array, ports, samples=129, seed=0)
    with pytest.raises(DataError, match="sample 100 of 'x'"):
        list(chosen.batches())


# ---- streaming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["npz", "fortran", "npy", "memory"])
@pytest.mark.parametrize("samples", [None, 1, 70, 150])
def test_streaming_equals_the_whole(form: str, samples: int | None, save: Callable[..., Path]) -> None:
    array = np.random.default_rng(0).standard_normal((150, 4)).astype(np.float32)
    labels = np.arange(150)
    ports = (Port("x", np.dtype(np.float32), ("N", 4)),)
    sources: dict[str, Callable[[], Any]] = {
        "npz": lambda: save({"x": array}),
        "fortran": lambda: save({"x": np.asfortranarray(array)}),
        "npy": lambda: save(array),
        "memory": lambda: array,
    }
    data = sfp_onnx.open_data(sources[form](), ports, samples=samples, labels=labels)
    sizes = [count for _, count in data.batches()]
    assert sum(sizes) == data.samples == (samples or 150)
    assert all(size == BATCH for size in sizes[:-1]) and 0 < sizes[-1] <= BATCH
    assert data.labels is not None
    np.testing.assert_array_equal(whole(data)["x"], array[data.labels])
    assert len(set(data.labels.tolist())) == data.samples


def test_samples_depend_on_the_seed_alone() -> None:
    array = np.arange(100, dtype=np.float32)[:, None]
    ports = (Port("x", np.dtype(np.float32), ("N", 1)),)
    first, again, other = (whole(sfp_onnx.open_data(array, ports, samples=10, seed=seed))["x"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("count", [1, 3, 4, 7, 8])
def test_fixed_batch_is_padded_with_the_last_sample(count: int) -> None:
    ports = (Port("x", np.dtype(np.float32), (4, *IMAGE)),)
    data = sfp_onnx.open_data(images(count), ports)
    counts = []
    for feeds, real in data.batches():
        assert feeds["x"].shape == (4, *IMAGE)
        assert (feeds["x"][real:] == feeds["x"][real - 1]).all()
        counts.append(real)
    assert sum(counts) == count
    np.testing.assert_array_equal(whole(data)["x"], images(count))


# ---- statistics ------------------------------------------------------------------------------------------------------


def statistics(model: onnx.ModelProto, array: np.ndarray, wanted: list[tuple[str, int]]) -> dict[tuple[str, int], Moments]:
    loaded = sfp_onnx.load(model)
    data = sfp_onnx.data_for(loaded, array)
    assert data is not None
    ranks = {name: len(shape) for name, shape in sfp_onnx.inspect(loaded, data=data).prepared.trace.shapes.items()}
    return calibrate(loaded, ranks, wanted, frozenset({"squares", "zeros"}), data.batches()).moments


def activations(model: onnx.ModelProto, array: np.ndarray, name: str) -> np.ndarray:
    """A tensor of the model, run with one sample at a time padded to the model's batch."""
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    kind = model.graph.input[0].type.tensor_type.elem_type
    tapped.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 1
    found = [run_model(tapped, {"x": np.repeat(row[None], batch, 0)}, [name])[0] for row in array]
    return np.concatenate([rows[: len(rows) // batch] for rows in found]).astype(np.float64)


def assert_moments(found: Moments, values: np.ndarray, axis: int, rtol: float = 1e-5) -> None:
    rows = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    np.testing.assert_allclose(found.squares, (rows**2).sum(1), rtol=rtol)
    np.testing.assert_allclose(found.zeros, (rows == 0).sum(1), rtol=1e-6)
    assert found.count == pytest.approx(rows.shape[1])


@pytest.mark.parametrize("batch", ["N", 1, 4, 49])
@pytest.mark.parametrize("opset", [8, 12, 17, 20])
def test_statistics_are_those_of_numpy(batch: int | str, opset: int) -> None:
    model = classifier(batch=batch, opset=opset)
    array = images(10)
    found = statistics(model, array, [("r1", 1), ("r2", 1), ("f", 1)])
    for (name, axis), moments in found.items():
        assert_moments(moments, activations(model, array, name), axis)
    assert found["r1", 1].zeros.sum() > 0


@pytest.mark.parametrize("batch", ["N", 4])
def test_batch_merged_with_another_axis(batch: int | str) -> None:
    """Rows of (N * 4, 6): a padded sample fills four rows."""
    random = np.random.default_rng(0)
    held = {
        "shape": np.asarray([-1, 6], np.int64),
        "w1": random.standard_normal((6, 8)).astype(np.float32),
        "w2": random.standard_normal((8, 2)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["rows"], "rows"),
        helper.make_node("Gemm", ["rows", "w1"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["r"], "relu"),
        helper.make_node("Gemm", ["r", "w2"], ["y"], "second"),
    ]
    model = model_of(nodes, [("x", np.float32, [batch, 4, 6])], [("y", np.float32, ["M", 2])], held)
    array = random.standard_normal((7, 4, 6)).astype(np.float32)
    assert_moments(statistics(model, array, [("r", 1)])["r", 1], activations(model, array, "r"), 1)


def test_channels_on_the_first_axis() -> None:
    """One sample at a time, with channels first: (C, H, W) models."""
    random = np.random.default_rng(0)
    held = {"w1": random.standard_normal((8, 6)).astype(np.float32), "w2": random.standard_normal((2, 8)).astype(np.float32)}
    nodes = [
        helper.make_node("MatMul", ["w1", "x"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["r"], "relu"),
        helper.make_node("MatMul", ["w2", "r"], ["y"], "second"),
    ]
    model = model_of(nodes, [("x", np.float32, [6, 5])], [("y", np.float32, [2, 5])], held)
    array = random.standard_normal((6, 5)).astype(np.float32)
    moments = statistics(model, array, [("r", 0)])["r", 0]
    assert_moments(moments, np.maximum(held["w1"].astype(np.float64) @ array, 0), 0)


def test_half_and_half_is_the_whole() -> None:
    loaded = sfp_onnx.load(classifier())
    ranks, wanted, needs = {"r1": 4, "f": 2}, [("r1", 1), ("f", 1)], frozenset({"squares", "zeros"})

    def run(array: Array) -> Statistics:
        data = sfp_onnx.data_for(loaded, array)
        assert data is not None
        return calibrate(loaded, ranks, wanted, needs, data.batches())

    array = images(100)
    total, left, right = run(array), run(array[:37]), run(array[37:])
    left.merge(right)
    for site, moments in total.moments.items():
        np.testing.assert_allclose(left.moments[site].squares, moments.squares, rtol=1e-6)
        np.testing.assert_allclose(left.moments[site].zeros, moments.zeros, rtol=1e-6)
        assert left.moments[site].count == pytest.approx(moments.count)


def test_half_precision_does_not_overflow() -> None:
    """Squares of fp16 activations do not fit fp16."""
    random = np.random.default_rng(0)
    held = {"w1": (100 * random.standard_normal((4, 8))).astype(np.float16), "w2": random.standard_normal((8, 2)).astype(np.float16)}
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["r"], "relu"),
        helper.make_node("MatMul", ["r", "w2"], ["y"], "second"),
    ]
    model = model_of(nodes, [("x", np.float16, ["N", 4])], [("y", np.float16, ["N", 2])], held)
    array = (4 * random.standard_normal((9, 4))).astype(np.float16)
    values = activations(model, array, "r")
    assert values.max() > 256
    moments = statistics(model, array, [("r", 1)])["r", 1]
    assert_moments(moments, values, 1, rtol=1e-3)  # onnxruntime may leave out the rounding to fp16 before a Cast


def test_progress_counts_samples() -> None:
    loaded = sfp_onnx.load(classifier(batch=4))
    data = sfp_onnx.data_for(loaded, images(10))
    assert data is not None
    seen: list[int] = []
    calibrate(loaded, {"r1": 4}, [("r1", 1)], frozenset({"zeros"}), data.batches(), seen.append)
    assert seen == [4, 4, 2]


def test_activations_that_are_not_finite() -> None:
    model = classifier()
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "w1")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1e38), "w1"))
    data = sfp_onnx.data_for(sfp_onnx.load(model), images() * 100)
    with pytest.raises((DataError, ModelError), match="'r1' is not finite"):
        sfp_onnx.prune(model, PlanOptions(ratio=0.5), "activation", data)


def test_fixed_batch_and_dynamic_batch_choose_the_same() -> None:
    """Padding has no influence on what is removed."""
    chosen = []
    for batch in ("N", 4):
        model = classifier(batch=batch)
        data = sfp_onnx.data_for(sfp_onnx.load(model), images(9))
        chosen.append([group.remove for group in sfp_onnx.prune(model, PlanOptions(ratio=0.5), "contribution", data).plan.groups])
    assert chosen[0] == chosen[1] and sum(map(len, chosen[0])) == 10


def test_classes_are_those_of_the_output() -> None:
    assert classifier().graph.output[0].type.tensor_type.shape.dim[1].dim_value == CLASSES
    loaded = sfp_onnx.load(classifier())
    for labels in (labels_of() + 1, labels_of() - 1):
        data = sfp_onnx.data_for(loaded, images(), labels=labels)
        with pytest.raises(DataError, match="classes 0 to 4"):
            sfp_onnx.evaluate([loaded], data)
