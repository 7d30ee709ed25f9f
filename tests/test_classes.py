"""Class folders get the numbers of the model's outputs or none; presets, other readings of images, full temporary folders, threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from building import Builder
from conftest import CLASSES, classifier, images, invoke, labels_of

import sfp_onnx
from sfp_onnx.core import system
from sfp_onnx.core.errors import DataError, ModelError, OutputError
from sfp_onnx.core.options import DataOptions, OutputOptions, PlanOptions
from sfp_onnx.core.types import Port
from sfp_onnx.data import Preprocessing
from sfp_onnx.data.checks import _preprocessing, other_reading, wrong_reading
from sfp_onnx.data.classes import imagenet, numbered, read_classes
from sfp_onnx.data.readings import readings
from sfp_onnx.repair.walk import Store

Image = pytest.importorskip("PIL.Image", reason="Pillow (extra images) is not installed")
PORT = (Port("x", np.dtype(np.float32), ("N", 3, 8, 8)),)
RAW = Preprocessing(scale=1)


@pytest.fixture
def pictures(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of class folders, with two pictures each."""

    def make(names: Sequence[str], size: int = 8, mode: str = "RGB") -> Path:
        for number, name in enumerate(names):
            (tmp_path / "set" / name).mkdir(parents=True)
            for copy in range(2):
                pixels = np.random.default_rng(2 * number + copy).integers(0, 256, (size, size, 3)).astype(np.uint8)
                Image.fromarray(pixels).convert(mode).save(tmp_path / "set" / name / f"{copy}.png")
        return tmp_path / "set"

    return make


# ---- classes -----------------------------------------------------------------------------------------------------------


def test_the_list_of_imagenet() -> None:
    names = list(imagenet())
    assert len(names) == 1000 and names == sorted(names) and names[0] == "n01440764" and imagenet()["n01440764"] == "tench"


@pytest.mark.parametrize(("outputs", "first"), [(1000, 0), (1001, 1)])
def test_folders_named_by_imagenet(outputs: int, first: int, pictures: Callable[..., Path]) -> None:
    names = [list(imagenet())[place] for place in (999, 0, 388)]
    data = sfp_onnx.open_data(pictures(names), PORT, RAW, outputs=outputs)
    assert data.labels is not None and sorted(set(data.labels.tolist())) == [first, 388 + first, 999 + first]
    assert data.class_names[388 + first] == "giant panda" and len(data.class_names) == outputs
    assert "ImageNet's classes" in data.notes[0]


@pytest.mark.parametrize(
    "lines",
    [["Tench", "goldfish, Carp", "White_Shark"], ["n01440764 tench", "n01443537", "white shark"], ["tench", "x, goldfish", "white shark"]],
)
def test_classes_from_a_file(lines: list[str], pictures: Callable[..., Path], tmp_path: Path) -> None:
    listed = tmp_path / "names.txt"
    listed.write_text("\n".join(lines) + "\n\n")
    data = sfp_onnx.open_data(pictures(["white shark", "goldfish", "tench"]), PORT, RAW, classes=listed, outputs=3)
    assert data.labels is not None and data.labels.tolist() == [1, 1, 0, 0, 2, 2]  # in the order of the folders


@pytest.mark.parametrize(
    ("lines", "outputs", "words"),
    [
        (["a", "b"], 2, "'c' .* nowhere in the list"),
        (["a", "b", "c", "c"], 4, "'c' .* several lines"),
        (["a", "b", "c"], 4, "3 names, but the model has 4 outputs.* 'background'"),
        ([], 3, "no class names"),
    ],
)
def test_lists_that_do_not_fit(lines: list[str], outputs: int, words: str, pictures: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=words):
        sfp_onnx.open_data(pictures(["a", "b", "c"]), PORT, RAW, classes=np.asarray(lines, np.str_), outputs=outputs)


def test_fewer_folders_than_outputs_are_no_labels(pictures: Callable[..., Path]) -> None:
    data = sfp_onnx.open_data(pictures(["cat", "dog"]), PORT, RAW, outputs=5)
    assert data.labels is None and "5 outputs" in data.notes[0] and "--classes" in data.notes[0]
    assert numbered(["3", "4"], None, 5, "class folders").numbers == (3, 4)
    assert numbered(["a", "b"], None, None, "class folders").numbers == (0, 1)
    assert numbered(["a", "b"], None, 2, "class folders").classes == ("a", "b")


def test_evaluate_falls_back_to_agreement(pictures: Callable[..., Path], tmp_path: Path) -> None:
    onnx.save(classifier(), tmp_path / "m.onnx")
    given = ("evaluate", tmp_path / "m.onnx", "--data", pictures(["cat", "dog"]), "--scale", 255, "--no-latency", "--json")
    result = invoke(*given)
    assert result.exit_code == 0, result.output
    assert f"the model has {CLASSES} outputs" in result.stderr and '"top1": null' in result.stdout
    (tmp_path / "names.txt").write_text("\n".join(["bird", "dog", "fish", "cat", "cow"]))
    result = invoke(*given, "--classes", tmp_path / "names.txt")
    assert result.exit_code == 0 and '"top1": null' not in result.stdout, result.output


def test_class_names_unreadable(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read class names"):
        read_classes(tmp_path / "none.txt")


def test_pictures_may_be_links(pictures: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "links"
    folder.mkdir()
    (folder / "a.png").symlink_to(next(pictures(["cat"]).rglob("*.png")))
    (tmp_path / "labels.csv").write_text("a.png,3\n")
    data = sfp_onnx.open_data(folder, PORT, RAW, labels=tmp_path / "labels.csv")
    assert data.labels is not None and data.labels.tolist() == [3]
    (tmp_path / "labels.csv").write_text("../set/cat/0.png,3\n")
    with pytest.raises(DataError, match="there is no file"):
        sfp_onnx.open_data(folder, PORT, RAW, labels=tmp_path / "labels.csv")


# ---- preprocessing -----------------------------------------------------------------------------------------------------


def test_nothing_is_resized_that_fits(pictures: Callable[..., Path]) -> None:
    assert not any("resized" in note for note in sfp_onnx.open_data(pictures(["a"]), PORT, RAW).notes)


def steps_of(folder: Path, size: int = 8, **options: Any) -> tuple[Preprocessing, str]:
    b = Builder()
    model = sfp_onnx.load(b.model(b.conv(b.input(["N", 3, size, size]), 3, 4)))
    steps, notes = _preprocessing(model, folder, DataOptions(**options))
    return steps, notes[0]


@pytest.mark.parametrize("preset", ["tf", "inception"])
def test_presets_for_minus_one_to_one(preset: str, pictures: Callable[..., Path]) -> None:
    folder = pictures(["a"])
    steps, _ = steps_of(folder, preset=preset)
    data = sfp_onnx.open_data(folder, PORT, steps)
    raw = sfp_onnx.open_data(folder, PORT, Preprocessing(scale=1, resize=steps.resize, center_crop=steps.center_crop))
    (found, _), (pixels, _) = next(data.batches()), next(raw.batches())
    np.testing.assert_allclose(found["x"], pixels["x"] / 127.5 - 1, atol=1e-6)


def test_yolo_stays_square(pictures: Callable[..., Path]) -> None:
    steps, said = steps_of(pictures(["a"]), 64, preset="yolo", resize=(32,))
    assert steps.letterbox and steps.resize == (32, 32) and "32x32" in said and "--resize as given" in said


def test_what_is_said_of_a_preset_is_what_is_used(pictures: Callable[..., Path]) -> None:
    _, said = steps_of(pictures(["a"]), preset="imagenet", std=(0.5,))
    assert "std 0.5" in said and "0.229" not in said and "mean 0.485,0.456,0.406" in said


# ---- other readings ----------------------------------------------------------------------------------------------------


def sharp(channels: int = 3) -> onnx.ModelProto:
    """Class scores that depend much on mean and contrast."""
    b = Builder(seed=2)
    hidden = b.op("Tanh", b.conv(b.input(["N", channels, 8, 8]), channels, 12, bias=False))
    return b.model(b.op("Softmax", b.gemm(b.op("Flatten", hidden), 12 * 64, 5), axis=1))


@pytest.mark.parametrize(("channels", "scaled"), [(3, True), (3, False), (1, True), (1, False)])
def test_values_in_minus_one_to_one_are_tried(channels: int, scaled: bool) -> None:
    """Labels are the answers to (x - 0.5) / 0.5 of pixels; what is fed is in [0, 1] (and so are the pixels, unless they are 8-bit)."""
    model = sfp_onnx.load(sharp(channels))
    shares = np.random.default_rng(0).random((300, channels, 8, 8)).astype(np.float32)
    pixels = np.round(shares * 255).astype(np.uint8)
    meant = sfp_onnx.open_data({"x": pixels / np.float32(127.5) - 1}, inputs_of(model))
    labels = np.concatenate([run_of(model, feeds["x"]).argmax(1) for feeds, _ in meant.batches()])
    source = {"x": pixels if scaled else (pixels / 255).astype(np.float32), "labels": labels}
    data = sfp_onnx.open_data(source, inputs_of(model), Preprocessing(scale=255) if scaled else None)
    (said,) = wrong_reading(model, data)
    assert "with values in [-1, 1]" in said and "right on 100.0%" in said and "--mean 0.5 --std 0.5" in said


def inputs_of(model: sfp_onnx.Model) -> list[Port]:
    return sfp_onnx.graph.inputs(model)


def run_of(model: sfp_onnx.Model, x: np.ndarray) -> np.ndarray:
    from sfp_onnx.runtime import open_model

    return np.asarray(open_model(model).run({"x": x})[0])


def test_a_normalisation_is_undone_before_another_is_tried() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 3, 8, 8)).astype(np.uint8)
    data = sfp_onnx.open_data(pixels, PORT, Preprocessing((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616), 255))
    fed = next(data.batches())[0]["x"]
    mean, std = (np.reshape(values, (3, 1, 1)) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    found = {other.words.split(" (")[0]: other.change(fed) for other in readings(data)}
    np.testing.assert_allclose(found["with ImageNet's mean and std"], (pixels / 255 - mean) / std, atol=1e-5)
    np.testing.assert_allclose(found["with values in [0, 1]"], pixels / 255, atol=1e-5)
    assert "with CIFAR-10's mean and std" not in found


def test_hint_without_labels(shared: Path) -> None:
    model = sfp_onnx.load(shared / "models" / "resnet20_cifar10.onnx")
    pixels = np.load(shared / "data" / "cifar10_calib.npz")["images"][:64]
    right = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 255, layout="nhwc")
    assert other_reading(model, sfp_onnx.open_data(pixels, inputs_of(model), right)) == []
    (said,) = other_reading(model, sfp_onnx.open_data(pixels, inputs_of(model), Preprocessing(scale=255, layout="nhwc")))
    assert said.startswith("a hint") and "mean and std" in said and "mean top probability" in said


def test_a_model_in_onnxruntimes_format_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "m.ort").write_bytes(b"\x18\0\0\0ORTM" + bytes(64))
    with pytest.raises(ModelError, match=r"onnxruntime's own format \(\.ort\)"):
        sfp_onnx.load(tmp_path / "m.ort")


# ---- temporary files and threads -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened = [open("/dev/full", "r+b", buffering=0) for _ in range(2)]  # noqa: SIM115
    files = iter(opened)
    monkeypatch.setattr("tempfile.TemporaryFile", lambda *arguments, **named: next(files))
    with pytest.raises(OutputError, match=r"no room for .* \(No space left on device\)\. Set TMPDIR"):
        Store(0).put("a", np.zeros(1 << 20))
    onnx.save(classifier(), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=images(80), labels=labels_of(80))
    given = ("--ratio", 0.3, "--data", tmp_path / "d.npz", "--memory", "1kB")
    result = invoke("prune", tmp_path / "m.onnx", "-o", tmp_path / "o.onnx", *given)
    assert result.exit_code == 4 and "TMPDIR" in result.stderr and not (tmp_path / "o.onnx").exists()
    for file in opened:
        file.close()


def test_no_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*arguments: Any, **named: Any) -> str:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.raises(OutputError, match="TMPDIR"):
        system.folder.__wrapped__()
    with pytest.raises(OutputError, match="no room for a form"), system.temporary("a form"):
        full()


@pytest.mark.parametrize("threads", [1, 2])
def test_every_session_keeps_to_the_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, opened = [], onnxruntime.InferenceSession

    def noted(model: Any, options: Any = None, sess_options: Any = None, **named: Any) -> Any:
        asked.append((options or sess_options).intra_op_num_threads)
        return opened(model, options or sess_options, **named)

    monkeypatch.setattr(onnxruntime, "InferenceSession", noted)
    data = {"x": images(80), "labels": labels_of(80)}
    sfp_onnx.prune(classifier(), PlanOptions(ratio=0.3, threads=threads), data=data, test_data=data)
    assert len(asked) > 5 and set(asked) == {threads}
    asked.clear()
    sfp_onnx.prune(classifier(), PlanOptions(ratio=0.3, threads=threads), data=data, output=OutputOptions(quantize="int8"))
    assert len(asked) > 5 and set(asked) == {threads}, "onnxruntime's quantiser, too"
    asked.clear()
    sfp_onnx.evaluate([classifier(), classifier()], data, threads=threads)
    assert set(asked) == {threads}


def test_commands_keep_to_the_threads(tmp_path: Path, save: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, opened = [], onnxruntime.InferenceSession

    def noted(model: Any, options: Any, **named: Any) -> Any:
        asked.append(options.intra_op_num_threads)
        return opened(model, options, **named)

    monkeypatch.setattr(onnxruntime, "InferenceSession", noted)
    model, data, plan = save(classifier()), save({"x": images(80)}), tmp_path / "plan.json"
    assert invoke("plan", model, "-o", plan, "--ratio", "0.3", "--data", data).exit_code == 0
    asked.clear()
    out = tmp_path / "out.onnx"
    for words in (("score", model), ("apply", model, plan, "-o", out), ("dilute", model, "-o", out, "--rate", "0.5")):
        done = invoke(*words, "--data", data, "--threads", "1")
        assert done.exit_code == 0 and asked and set(asked) == {1}, done.stderr
        asked.clear()


def test_numpy_is_told_and_told_back() -> None:
    known = system._blas()
    if known is None:
        pytest.skip("numpy's linear algebra is not the one that comes with it")
    before = known[0]()
    with system.numpy_threads(1):
        assert known[0]() == 1
    assert known[0]() == before
