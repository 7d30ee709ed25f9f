"""Class profiles of models: what is tapped, the numbers against plain onnxruntime and loops, bad input, memory, files."""

from __future__ import annotations

import io
import json
import tempfile
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper as nh
import pytest
from building import Builder, run, with_all_tensors
from conftest import CLASSES, classifier, files_in, images, invoke, jaccard, labels_of

import sfp_onnx
from sfp_onnx.methods.sfp import ProfileDetails, profiles
from sfp_onnx.methods.sfp.probe import PROBES, ProfileOptions
from sfp_onnx.methods.sfp.profiles import LayerProfile, Profiles

COUNT = 60


def profiled(model: onnx.ModelProto, data: np.ndarray, labels: np.ndarray | None = None, batch: int = 16, **options: object) -> Profiles:
    analysis = sfp_onnx.inspect(model)
    given = {"x": data} if labels is None else {"x": data, "labels": labels}
    found = sfp_onnx.data_for(analysis.model, given)
    assert found is not None
    return sfp_onnx.class_profiles(analysis, found if found.fixed else replace(found, batch=batch), ProfileOptions(**options))  # type: ignore[arg-type]


def tensors(model: onnx.ModelProto, data: np.ndarray) -> dict[str, np.ndarray]:
    whole = with_all_tensors(model)
    return dict(zip([item.name for item in whole.graph.output], run(whole, {"x": data}), strict=True))


def net(*shape: int, make: Callable[[Builder, str], str], seed: int = 0) -> onnx.ModelProto:
    b = Builder(17, seed)
    return b.model(make(b, b.input(["N", *shape])))


def data_of(*shape: int, count: int = COUNT) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    return random.standard_normal((count, *shape)).astype(np.float32), np.arange(count) % CLASSES


# ---- numbers ---------------------------------------------------------------------------------------------------------


def pooled_by_hand(values: np.ndarray, pool: int) -> np.ndarray:
    """(C, positions): means over windows of ceil(size / pool), the last of which may be cut short."""
    steps = [-(-size // pool) for size in values.shape[1:]]
    counts = [-(-size // step) for size, step in zip(values.shape[1:], steps, strict=True)]
    found = np.zeros((len(values), *counts))
    for index in np.ndindex(*counts):
        window = tuple(slice(at * step, (at + 1) * step) for at, step in zip(index, steps, strict=True))
        found[(slice(None), *index)] = values[(slice(None), *window)].reshape(len(values), -1).mean(1)
    return found.reshape(len(values), -1)


def assert_fields(layer: LayerProfile, values: np.ndarray, labels: np.ndarray, pool: int) -> None:
    """M_f against a loop over images: pool, times the probe's weights, summed over the images of each label."""
    total, count = np.zeros(layer.matrices.shape), np.zeros(CLASSES)
    for image, label in zip(values, labels, strict=True):
        count[label] += 1
        for index, positions in enumerate(pooled_by_hand(image, pool)):
            total[index, label] += positions @ layer.weights[index]
    np.testing.assert_allclose(layer.matrices, total / count[None, :, None], rtol=1e-4, atol=1e-6)
    assert np.abs(layer.matrices).max() > 0


def conv_net(b: Builder, x: str) -> str:
    y = b.op("Relu", b.conv(x, 3, 6, name="first"), outputs=["one"])
    y = b.op("MaxPool", b.op("Relu", b.conv(y, 6, 7, name="second")), outputs=["two"], kernel_shape=[2, 2], strides=[2, 2])
    y = b.op("GlobalAveragePool", b.op("Relu", b.conv(y, 7, 8, name="third")))
    return b.gemm(b.op("Flatten", y, outputs=["three"]), 8, CLASSES, name="head")


@pytest.mark.parametrize("pool", [1, 3, 4, 20])
@pytest.mark.parametrize("probe", sorted(PROBES))
def test_fields_of_a_convolutional_net_against_a_loop_over_images(pool: int, probe: str) -> None:
    """Maps of 10 x 7 and 5 x 3: windows that do not divide them; the tensor after activation and pooling counts."""
    model = net(3, 10, 7, make=conv_net)
    x, labels = data_of(3, 10, 7)
    found = profiled(model, x, labels, pool=pool, probe=probe)
    assert [layer.layer for layer in found.layers] == ["first", "second", "third"]
    assert [layer.tensor for layer in found.layers] == ["one", "two", "three"] and not found.skipped
    values = tensors(model, x)
    for layer in found.layers:
        own = values[layer.tensor]
        assert_fields(layer, own.reshape(*own.shape, 1) if own.ndim == 2 else own, labels, pool)


def test_channels_of_any_number_of_dimensions_and_fully_connected_layers() -> None:
    def line(b: Builder, x: str) -> str:
        y = b.op("Relu", b.op("Conv", x, b.weight(6, 3, 3), name="c"), outputs=["t"])
        return b.gemm(b.op("Flatten", b.op("GlobalAveragePool", b.op("Conv", y, b.weight(4, 6, 1)))), 4, CLASSES)

    def volume(b: Builder, x: str) -> str:
        y = b.op("Relu", b.op("Conv", x, b.weight(6, 3, 3, 3, 3), name="c"), outputs=["t"])
        return b.gemm(b.op("Flatten", b.op("GlobalAveragePool", b.op("Conv", y, b.weight(4, 6, 1, 1, 1)))), 4, CLASSES)

    def stack(b: Builder, x: str) -> str:
        return b.gemm(b.op("Relu", b.gemm(x, 9, 6, name="c"), outputs=["t"]), 6, CLASSES)

    for shape, make in (((3, 11), line), ((3, 6, 5, 7), volume), ((9,), stack)):
        model = net(*shape, make=make)
        x, labels = data_of(*shape)
        layer = profiled(model, x, labels, pool=2).layers[0]
        values = tensors(model, x)["t"]
        assert (layer.layer, layer.tensor, len(layer.units)) == ("c", "t", 6)
        assert_fields(layer, values.reshape(*values.shape, 1) if values.ndim == 2 else values, labels, 2)


def test_columns_of_a_flattened_map_are_one_filter() -> None:
    def make(b: Builder, x: str) -> str:
        y = b.op("Relu", b.conv(x, 3, 6, name="c"), outputs=["map"])
        return b.gemm(b.op("Flatten", y, outputs=["t"]), 6 * 8, CLASSES)

    model = net(3, 4, 2, make=make)
    x, labels = data_of(3, 4, 2)
    (layer,) = profiled(model, x, labels).layers
    np.testing.assert_array_equal(layer.filters, np.repeat(np.arange(6), 8))
    assert layer.means.shape == (6, 8, CLASSES) and layer.label_sets.shape == (6, CLASSES)
    assert_fields(layer, tensors(model, x)["map"], labels, 8)


def test_channels_last_are_moved_first() -> None:
    def make(b: Builder, x: str) -> str:
        y = b.op("Relu", b.op("MatMul", x, b.weight(5, 6), name="c"), outputs=["t"])
        return b.gemm(b.reduce("ReduceMean", b.op("MatMul", y, b.weight(6, 4)), [1], keepdims=0), 4, CLASSES)

    model = net(7, 5, make=make)
    x, labels = data_of(7, 5)
    layer = profiled(model, x, labels, pool=3).layers[0]
    assert layer.axis == 2 and layer.means.shape == (6, 3, CLASSES)
    assert_fields(layer, tensors(model, x)["t"].swapaxes(1, 2), labels, 3)


def test_half_precision_is_profiled_in_single_and_a_fixed_batch_without_its_padding() -> None:
    x, labels = data_of(3, 8, 8)
    whole = profiled(classifier(), x, labels)
    half, fixed = profiled(classifier(dtype=np.float16), x.astype(np.float16), labels), profiled(classifier(batch=16), x, labels)
    for own, other, third in zip(whole.layers, half.layers, fixed.layers, strict=True):
        np.testing.assert_allclose(own.means, other.means, atol=2e-2)
        np.testing.assert_allclose(own.means, third.means, rtol=1e-5, atol=1e-7)
        assert own.means.max() > 0
    assert fixed.samples == COUNT


def test_tensors_whose_first_axis_is_not_the_batch_are_listed() -> None:
    def make(b: Builder, x: str) -> str:
        y = b.op("Relu", b.gemm(b.op("Relu", b.gemm(x, 6, 6)), 6, 8))
        y = b.op("Reshape", y, b.const([-1, 4], np.int64), outputs=["rows"])
        return b.op("Reshape", b.gemm(y, 4, 4), b.const([-1, 8], np.int64))

    x, labels = data_of(6)
    found = profiled(net(6, make=make), x, labels)
    assert found.skipped[0][0] == "rows" and "is not the batch" in found.skipped[0][1]


def undecided() -> onnx.ModelProto:
    """`classifier` with a last layer that answers several labels on random images: no bias, features far from their mean."""
    model = classifier()
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = nh.to_array(held["w3"]).astype(np.float64)
    base = tensors(model, data_of(3, 8, 8)[0])["f"].mean(0)
    held["b3"].CopyFrom(nh.from_array((-weights @ base).astype(np.float32), "b3"))
    return model


# ---- labels ----------------------------------------------------------------------------------------------------------


def test_without_labels_the_models_own_answers_are_used_and_said() -> None:
    x, _ = data_of(3, 8, 8)
    model = undecided()
    answers = run(model, {"x": x})[0].argmax(1)
    own, given = profiled(model, x), profiled(model, x, answers)
    assert (own.labels, given.labels) == ("argmax", "given")
    for first, second in zip(own.layers, given.layers, strict=True):
        np.testing.assert_array_equal(first.matrices, second.matrices)


def test_labels_without_samples_have_no_part() -> None:
    x, labels = data_of(3, 8, 8)
    labels = np.where(labels == 3, 1, labels)
    found = profiled(classifier(), x, labels)
    assert found.missing == (3,)
    for layer in found.layers:
        assert not layer.label_sets[:, 3].any() and not layer.matrices[:, 3].any() and not layer.matrices[:, :, 3].any()
        assert layer.label_sets.any()


def test_accuracy_is_that_on_held_out_samples() -> None:
    """Random labels: the probes know the samples that trained them, and no others."""
    x, _ = data_of(3, 8, 8, count=400)
    labels = np.random.default_rng(0).integers(0, CLASSES, 400)
    found = profiled(classifier(), x, labels)
    assert found.trained + found.held_out == 400 and 50 < found.held_out < 120
    few = profiled(classifier(), x[:40], labels[:40])
    assert (few.trained, few.held_out) == (40, 0)
    assert all(layer.accuracy < 0.35 for layer in found.layers)


def test_the_order_of_the_samples_does_not_matter() -> None:
    """What is held out, and when it trains, hangs on the samples themselves; 200 samples are several batches of the probe."""
    x, labels = data_of(3, 8, 8, count=200)
    order = np.random.default_rng(4).permutation(200)
    first, second = profiled(classifier(), x, labels, 7), profiled(classifier(), x[order], labels[order], 64)
    for own, other in zip(first.layers, second.layers, strict=True):
        np.testing.assert_allclose(own.matrices, other.matrices, rtol=1e-3, atol=1e-5)
        assert own.accuracy == other.accuracy and jaccard(own.label_sets, other.label_sets) > 0.95


# ---- memory and temporary files --------------------------------------------------------------------------------------


def peak(count: int) -> int:
    x, labels = data_of(3, 8, 8, count=count)
    analysis = sfp_onnx.inspect(classifier(widths=(48, 64)))
    data = sfp_onnx.data_for(analysis.model, {"x": x, "labels": labels})
    tracemalloc.start()
    sfp_onnx.class_profiles(analysis, data)
    _, found = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return found


def test_features_are_not_held_in_memory() -> None:
    """48 x 16 + 64 features of 4 bytes per sample: 8 MB more for 2500 more samples, were they in memory."""
    peak(200)
    few, many = peak(500), peak(3000)
    assert many - few < 2 * 2**20


def test_more_features_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = data_of(3, 8, 8, count=300)
    whole = profiled(classifier(), x, labels)
    monkeypatch.setattr(profiles, "FEATURE_BYTES", 4 * (8 * 16 + 12) * 100)
    found = profiled(classifier(), x, labels)
    assert found.trained + found.held_out == 100 and found.samples == 300
    for own, other in zip(whole.layers, found.layers, strict=True):
        np.testing.assert_allclose(own.means, other.means, rtol=1e-6)


def test_no_room_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda prefix, buffering: Full())
    x, labels = data_of(3, 8, 8)
    with pytest.raises(sfp_onnx.OutputError, match=r"no room for .* MiB of features \(No space left on device\)"):
        profiled(classifier(), x, labels)


def test_nothing_is_left_behind_when_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    during = []

    def stop(*arguments: object) -> None:
        during.append(files_in(tmp_path))
        raise KeyboardInterrupt

    monkeypatch.setitem(PROBES, "sgd", stop)
    x, labels = data_of(3, 8, 8)
    with pytest.raises(KeyboardInterrupt):
        profiled(classifier(), x, labels)
    assert len(during) == 1 and not files_in(tmp_path)


# ---- bad input -------------------------------------------------------------------------------------------------------

FREE = "Scores that need no labels: activation, apoz"
FREE_TOO = "use a score that needs no labels: activation, apoz"


def refused(model: onnx.ModelProto, data: dict[str, np.ndarray], tmp_path: Path, code: int = 4) -> str:
    onnx.save(model, tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", **data)
    result = invoke("score", tmp_path / "model.onnx", "--data", tmp_path / "data.npz", "--score", "sfp", "--save", tmp_path / "out.npz")
    assert result.exit_code == code and not result.stdout and not (tmp_path / "out.npz").exists()
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.mark.parametrize("kind", ["one number", "a map"])
def test_a_model_that_is_no_classifier(kind: str, tmp_path: Path) -> None:
    def number(b: Builder, x: str) -> str:
        return b.gemm(b.op("Flatten", b.op("GlobalAveragePool", b.conv(x, 3, 6))), 6, 1)

    def picture(b: Builder, x: str) -> str:
        return b.conv(b.op("Relu", b.conv(x, 3, 6)), 6, 2)

    message = refused(net(3, 8, 8, make=number if kind == "one number" else picture), {"x": data_of(3, 8, 8)[0]}, tmp_path)
    assert "class profiles need a classifier" in message and FREE in message


def test_one_label_only(tmp_path: Path) -> None:
    x, labels = data_of(3, 8, 8)
    message = refused(classifier(), {"x": x, "labels": np.full_like(labels, 2)}, tmp_path)
    assert "all samples have the label 2" in message and FREE_TOO in message


def test_the_model_answers_one_label_only(tmp_path: Path) -> None:
    message = refused(classifier(), {"x": np.zeros((20, 3, 8, 8), np.float32)}, tmp_path)
    assert "all samples have the label" in message and FREE_TOO in message


def test_fewer_samples_than_labels(tmp_path: Path) -> None:
    x, labels = data_of(3, 8, 8, count=4)
    message = refused(classifier(), {"x": x, "labels": labels}, tmp_path)
    assert "4 samples for 5 labels" in message and FREE_TOO in message


def test_labels_out_of_range(tmp_path: Path) -> None:
    x, labels = data_of(3, 8, 8)
    assert "labels run from 1 to 5" in refused(classifier(), {"x": x, "labels": labels + 1}, tmp_path)


def test_activations_that_overflow(tmp_path: Path) -> None:
    x, labels = data_of(3, 8, 8)
    assert "is not finite" in refused(classifier(), {"x": np.sign(x) * np.float32(3e38), "labels": labels}, tmp_path)


def test_missing_labels_are_named_and_it_works_all_the_same(tmp_path: Path, model_file: Path) -> None:
    x, labels = data_of(3, 8, 8)
    np.savez(tmp_path / "two.npz", x=x, labels=np.where(labels > 2, 4, 0))
    result = invoke("score", model_file, "--data", tmp_path / "two.npz", "--score", "sfp")
    assert result.exit_code == 0 and "3 of 5 labels have no sample and no part in the profiles: 1, 2, 3" in result.stderr


def test_bad_options(model_file: Path, data_file: Path, tmp_path: Path) -> None:
    command = ["score", model_file, "--data", data_file]
    for more, code, words in (
        (["--score", "sfp,pool=0"], 2, "pool=0: expected at least 1"),
        (["--score", "sfp,probe=tree"], 2, "expected one of sgd, ridge"),
        (["--score", "sfp+nothing"], 2, "unknown score 'nothing'"),
        (["--score", "sfp", "--save", data_file], 4, "never touched"),
        (["--score", "sfp", "--save", tmp_path / "no" / "out.npz"], 4, "does not exist"),
    ):
        result = invoke(*command, *more)
        assert result.exit_code == code and words in result.stderr and not result.stdout
    assert invoke("score", model_file, "--score", "sfp").exit_code == 4
    wrong: dict[str, Any]
    for wrong in ({"probe": "tree"}, {"pool": 0}):
        with pytest.raises(sfp_onnx.OptionError):
            ProfileOptions(**wrong)


# ---- the command -----------------------------------------------------------------------------------------------------


def score(*arguments: object) -> str:
    result = invoke("score", *arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_score_writes_everything_and_the_same_twice(model_file: Path, data_file: Path, tmp_path: Path) -> None:
    for name in ("a.npz", "b.npz"):
        text = score(model_file, "--data", data_file, "--score", "sfp", "--save", tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert text.splitlines()[0].split()[:3] == ["layer", "filters", "probe"] and "10 samples, 5 labels (given)" in text
    analysis = sfp_onnx.inspect(model_file)
    found = sfp_onnx.scored(analysis, "sfp", sfp_onnx.data_for(analysis.model, data_file))
    assert isinstance(found.details, ProfileDetails)
    with np.load(tmp_path / "a.npz") as held:
        assert list(held["groups"]) == [group.name for group in analysis.coupling.groups]
        for index, group in enumerate(analysis.coupling.groups):
            part = slice(*held["offsets"][index : index + 2])
            np.testing.assert_array_equal(held["scores"][part], found.values[group.units])
        for index, layer in enumerate(found.details.profiles.layers):
            assert (held["layer_names"][index], held["tensors"][index]) == (layer.layer, layer.tensor)
            assert held["probe_accuracy"][index] == layer.accuracy
            for name in ("units", "matrices", "label_sets", "noise", "means", "weights"):
                np.testing.assert_array_equal(held[f"{index}/{name}"], getattr(layer, name))
            clusters: list[list[tuple[int, ...]]] = [[] for _ in layer.units]
            offsets, members = held[f"{index}/cluster_offsets"], held[f"{index}/cluster_labels"].tolist()
            for at, owner in enumerate(held[f"{index}/cluster_filter"]):
                clusters[owner].append(tuple(members[offsets[at] : offsets[at + 1]]))
            assert tuple(map(tuple, clusters)) == layer.clusters


def test_score_as_json_agrees_with_the_records(model_file: Path, data_file: Path) -> None:
    found = json.loads(score(model_file, "--data", data_file, "--score", "sfp-clusters,probe=ridge,pool=2", "--json"))
    assert found["score"] == "sfp-clusters,probe=ridge,pool=2" and [own["width"] for own in found["groups"]] == [8, 12]
    assert found["profiles"]["labels"] == "given" and found["profiles"]["missing"] == sorted(set(range(5)) - set(labels_of().tolist()))
    assert {"probe_accuracy", "cluster_size", "clusters_per_filter", "noise", "snr", "no_cluster"} <= set(found["profiles"]["layers"][0])


def test_score_without_labels_or_data(model_file: Path, tmp_path: Path) -> None:
    text = score(model_file, "--score", "magnitude+fpgm", "--save", tmp_path / "out.npz")
    assert "least magnitude+fpgm" in text
    with np.load(tmp_path / "out.npz") as held:
        assert sorted(held.files) == ["groups", "offsets", "scores"] and len(held["scores"]) == 20


def test_statistics_by_hand() -> None:
    """Two filters: clusters of 2 and 1 labels with 3 ones outside, and none with 4."""
    sets = np.array([[1, 1, 1, 0], [0, 0, 0, 0]], bool)
    layer = LayerProfile(
        "l", "t", 1, np.arange(2), np.arange(2), np.zeros((2, 1, 4), np.float32), np.zeros((2, 1, 4), np.float32),
        (((0, 1), (2,)), ()), sets, np.array([3, 4]), 0.5,
    )  # fmt: skip
    found = layer.statistics
    assert found["cluster_size"] == 1.5 and found["clusters_per_filter"] == 1 and found["noise"] == 3
    assert found["snr"] == pytest.approx(5 / 7) and found["no_cluster"] == 0.5 and found["labels_per_filter"] == 1.5
    assert replace(layer, noise=np.zeros(2, np.int64)).statistics["snr"] == float("inf")


@pytest.mark.parametrize("name", ["sfp", "probe-drop", "sfp+contribution"])
def test_prune_by_class_profiles(name: str, model_file: Path, data_file: Path, tmp_path: Path) -> None:
    out, manifest = tmp_path / "out.onnx", tmp_path / "m.json"
    result = invoke("prune", model_file, "-o", out, "--ratio", "0.5", "--data", data_file, "--score", f"{name},probe=ridge,pool=2",
                    "--manifest", manifest)  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert json.loads(manifest.read_text())["options"]["score"] == f"{name},probe=ridge,pool=2"


def test_plan_says_whose_labels(model_file: Path, tmp_path: Path) -> None:
    onnx.save(undecided(), model_file)
    np.savez(tmp_path / "bare.npz", x=images(30))
    result = invoke("plan", model_file, "-o", tmp_path / "p.json", "--ratio", "0.5", "--data", tmp_path / "bare.npz", "--score", "sfp")
    assert result.exit_code == 0 and "the model's own answers" in result.stderr
    assert any("argmax" in note for note in json.loads((tmp_path / "p.json").read_text())["notes"])
