"""Data as people have them: folders of images, presets, Hugging Face's configuration, functions that yield batches."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import IMAGE, images, invoke, labels_of

import sfp_onnx
from sfp_onnx.core.errors import DataError, OptionError
from sfp_onnx.core.types import Port
from sfp_onnx.data import Preprocessing
from sfp_onnx.data.images import hub_config, preset

Image = pytest.importorskip("PIL.Image", reason="Pillow (extra images) is not installed")
PORT = (Port("x", np.dtype(np.float32), ("N", *IMAGE)),)
RAW = Preprocessing(scale=1)


def whole(data: sfp_onnx.Dataset) -> np.ndarray:
    return np.concatenate([feeds[data.ports[0].name][:count] for feeds, count in data.batches()])


def picture(path: Path, size: tuple[int, int] = IMAGE[1:], seed: int = 0) -> np.ndarray:
    """A saved picture of (height, width) and its pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten pictures in five class folders."""
    for index in range(10):
        picture(tmp_path / "own pictures" / f"class {'edcba'[index % 5]}" / f"{index:02}.png", seed=index)
    return tmp_path / "own pictures"


def test_class_folders(folder: Path) -> None:
    data = sfp_onnx.open_data(folder, PORT, RAW)
    assert data.labels is not None and data.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    order = [4, 9, 3, 8, 2, 7, 1, 6, 0, 5]
    expected = np.stack([np.random.default_rng(index).integers(0, 256, (8, 8, 3)) for index in order]).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(whole(data), expected)
    assert "0 class a" in data.notes[0]


def test_colours_and_normalisation(folder: Path) -> None:
    red = whole(sfp_onnx.open_data(folder, PORT, RAW))
    np.testing.assert_array_equal(whole(sfp_onnx.open_data(folder, PORT, Preprocessing(scale=1, color="bgr"))), red[:, ::-1])
    steps = Preprocessing((0.1, 0.2, 0.3), (0.5, 0.6, 0.7), 255)
    expected = (red / 255 - np.reshape(steps.mean, (1, 3, 1, 1))) / np.reshape(steps.std, (1, 3, 1, 1))
    np.testing.assert_allclose(whole(sfp_onnx.open_data(folder, PORT, steps)), expected, rtol=1e-5, atol=1e-6)


def test_models_with_channels_last(folder: Path) -> None:
    steps = Preprocessing((1, 2, 3), (1, 2, 4), 1)
    last = sfp_onnx.open_data(folder, (Port("x", np.dtype(np.float32), ("N", 8, 8, 3)),), steps)
    np.testing.assert_array_equal(whole(last), np.moveaxis(whole(sfp_onnx.open_data(folder, PORT, steps)), 1, -1))


def test_grey_models(folder: Path) -> None:
    grey = whole(sfp_onnx.open_data(folder, (Port("x", np.dtype(np.float32), ("N", 1, 8, 8)),), RAW))
    assert grey.shape == (10, 1, 8, 8)


def test_resize_and_crop_are_those_of_pillow(tmp_path: Path) -> None:
    pixels = picture(tmp_path / "set" / "a.png", (30, 20))
    steps = Preprocessing(scale=1, resize=(12,), center_crop=(8, 8))
    image = Image.fromarray(pixels).resize((12, 18), Image.Resampling.BILINEAR).crop((2, 5, 10, 13))
    np.testing.assert_array_equal(whole(sfp_onnx.open_data(tmp_path / "set", PORT, steps))[0], np.moveaxis(np.asarray(image), -1, 0))
    boxed = whole(sfp_onnx.open_data(tmp_path / "set", PORT, Preprocessing(scale=1, resize=(8, 8), letterbox=True)))[0]
    assert (boxed[:, :, 0] == 114).all() and (boxed[:, :, -1] == 114).all() and not (boxed[:, :, 3] == 114).all()


def test_default_size_is_that_of_the_model(tmp_path: Path) -> None:
    picture(tmp_path / "set" / "a.png", (30, 20))
    data = sfp_onnx.open_data(tmp_path / "set", PORT, RAW)
    assert whole(data).shape == (1, *IMAGE) and "resized to 8x8" in data.notes[0]


def test_crop_over_the_edge(tmp_path: Path) -> None:
    picture(tmp_path / "set" / "a.png", (6, 20))
    with pytest.raises(DataError, match=r"a\.png: 6x20 pixels .* less than --center-crop 8x8"):
        sfp_onnx.open_data(tmp_path / "set", PORT, Preprocessing(scale=1, center_crop=(8, 8)))


def test_different_sizes(tmp_path: Path) -> None:
    for name, size in (("a", (8, 8)), ("b", (9, 8))):
        picture(tmp_path / "set" / f"{name}.png", size)
    free = (Port("x", np.dtype(np.float32), ("N", 3, "H", "W")),)
    with pytest.raises(DataError, match=r"b\.png: 9x8 pixels, others have 8x8"):
        sfp_onnx.open_data(tmp_path / "set", free, RAW)


def test_samples_are_drawn_before_decoding(folder: Path) -> None:
    data = sfp_onnx.open_data(folder, PORT, RAW, samples=4, seed=3)
    chosen = np.sort(np.random.default_rng(3).choice(10, 4, replace=False))
    np.testing.assert_array_equal(whole(data), whole(sfp_onnx.open_data(folder, PORT, RAW))[chosen])
    assert data.labels is not None and data.samples == 4
    assert data.labels.tolist() == [index // 2 for index in chosen]
    assert data.sha256 != sfp_onnx.open_data(folder, PORT, RAW).sha256


# ---- labels.csv ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["", "filename,label\n"])
@pytest.mark.parametrize(("names", "expected"), [(("2", "0", "1"), [2, 0, 1]), (("dog", "cat", "eel"), [1, 0, 2])])
def test_labels_from_csv(head: str, names: tuple[str, ...], expected: list[int], tmp_path: Path) -> None:
    for name in "abc":
        picture(tmp_path / "set" / f"{name}.png")
    (tmp_path / "own.csv").write_text(head + "".join(f"{file}.png,{name}\n" for file, name in zip("abc", names, strict=True)))
    data = sfp_onnx.open_data(tmp_path / "set", PORT, RAW, tmp_path / "own.csv")
    assert data.labels is not None and data.labels.tolist() == expected
    (tmp_path / "own.csv").write_text("a.png,0\nb.png,0\nc.png,0\n")
    assert sfp_onnx.open_data(tmp_path / "set", PORT, RAW, tmp_path / "own.csv").sha256 != data.sha256


@pytest.mark.parametrize(
    ("text", "words"),
    [("a.png,0\nb.png,1", "line 2: there is no file 'b.png'"), ("a.png,0\na.png,1", "line 2: 'a.png' is there twice"), ("", "no rows"),
     ("a.png", "expected filename,label"), ("../own.csv,1\n", "no file '../own.csv'|no rows")],
)  # fmt: skip
def test_csv_that_does_not_fit(text: str, words: str, tmp_path: Path) -> None:
    picture(tmp_path / "set" / "a.png")
    (tmp_path / "own.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        sfp_onnx.open_data(tmp_path / "set", PORT, RAW, tmp_path / "own.csv")


# ---- damaged files ---------------------------------------------------------------------------------------------------


def test_one_damaged_image_is_skipped(folder: Path) -> None:
    damaged = folder / "class b" / "03.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    data = sfp_onnx.open_data(folder, PORT, RAW)
    assert data.samples == 9 and len(whole(data)) == 9
    assert data.labels is not None and data.labels.tolist() == [0, 0, 1, 2, 2, 3, 3, 4, 4]
    assert any(note.startswith("skipped class b/03.png: cannot be decoded") for note in data.notes)


def test_two_of_ten_are_too_many(folder: Path) -> None:
    (folder / "class a" / "04.png").write_bytes(b"no picture")
    (folder / "class b" / "03.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"more than 1 of 10 images .* class a/04\.png.* class b/03\.png"):
        sfp_onnx.open_data(folder, PORT, RAW)


def test_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    picture(tmp_path / "set" / "a.png")
    with pytest.raises(DataError, match=r"no image can be decoded: a\.png"):
        sfp_onnx.open_data(tmp_path / "set", PORT, RAW)


def test_folders_without_images_or_with_both(folder: Path, tmp_path: Path) -> None:
    picture(folder / "beside.png")
    with pytest.raises(DataError, match="beside the class sub-folders"):
        sfp_onnx.open_data(folder, PORT, RAW)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images in this folder"):
        sfp_onnx.open_data(tmp_path / "empty", PORT, RAW)


def test_without_pillow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(OptionError, match=r"pip install pillow .*sfp_onnx\[images\]"):
        sfp_onnx.open_data(folder, PORT, RAW)


def test_pixel_steps_are_not_for_arrays() -> None:
    with pytest.raises(OptionError, match="--resize are for a folder of images"):
        sfp_onnx.open_data(images(), PORT, Preprocessing(resize=(8,)))


# ---- presets and configurations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["imagenet", "cifar10", "yolo"])
def test_presets_make_what_the_model_takes(name: str, folder: Path) -> None:
    data = sfp_onnx.open_data(folder, PORT, Preprocessing(**preset(name, PORT, True)))
    assert whole(data).shape == (10, *IMAGE)
    assert set(preset(name, PORT, False)) <= {"scale", "mean", "std"}


def test_imagenet_is_resize_256_crop_224() -> None:
    ports = (Port("x", np.dtype(np.float32), (1, 3, 224, 224)),)
    found = preset("imagenet", ports, True)
    assert found["resize"] == (256,) and found["center_crop"] == (224, 224) and found["scale"] == 255


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"do_resize": True, "size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224},
          "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 3, "do_rescale": True,
          "rescale_factor": 1 / 255},
         {"resize": (256,), "center_crop": (224, 224), "mean": (0.5,) * 3, "std": (0.25,) * 3, "resample": "bicubic", "scale": 255.0}),
        ({"size": 224, "do_normalize": False}, {"resize": (224, 224), "scale": 255.0}),
        ({"do_resize": True, "size": {"shortest_edge": 224}, "crop_pct": 0.875, "do_rescale": False},
         {"resize": (256,), "center_crop": (224, 224)}),
        ({"do_flip_channel_order": True}, {"color": "bgr", "scale": 255.0}),
    ],
)  # fmt: skip
def test_hugging_face_configurations(config: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**config, "do_pad": True}))
    assert hub_config(path) == (expected, ["do_pad"])


@pytest.mark.parametrize("text", ["", "[]", '{"do_normalize": true}', '{"size": "big"}', '{"rescale_factor": 0}', '{"resample": 9}'])
def test_damaged_configurations(text: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(DataError, match="preprocessor_config"):
        hub_config(tmp_path / "preprocessor_config.json")


def test_configuration_next_to_the_model(folder: Path, model_file: Path) -> None:
    config = {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"height": 8, "width": 8}}
    (model_file.parent / "preprocessor_config.json").write_text(json.dumps(config))
    manifest = model_file.with_name("manifest.json")
    out = model_file.with_name("small.onnx")
    result = invoke("prune", model_file, "-o", out, "--ratio", 0.5, "--data", folder, "--std", "0.2", "--manifest", manifest)
    assert result.exit_code == 0, result.stderr
    assert "preprocessing from" in result.stderr and "preprocessor_config.json" in result.stderr
    used = json.loads(manifest.read_text())["data"]
    assert used["mean"] == [0.5] * 3 and used["std"] == [0.2] and used["scale"] == 255 and used["resize"] == [8, 8]


COLOURS = ["--scale", "255", "--color", "bgr", "--resize", "10", "--center-crop", "8"]


@pytest.mark.parametrize("arguments", [[], ["--preset", "imagenet"], COLOURS])
def test_evaluate_on_a_folder(arguments: list[str], folder: Path, model_file: Path) -> None:
    result = invoke("evaluate", model_file, "--data", folder, "--no-latency", "--json", *arguments)
    assert result.exit_code == (0 if arguments else 4), result.stderr
    if arguments:
        assert json.loads(result.stdout)[0]["samples"] == 10
    else:
        assert "--preset imagenet" in result.stderr


# ---- functions -------------------------------------------------------------------------------------------------------


def in_batches(kind: str) -> Callable[[], Iterator[Any]]:
    def batches() -> Iterator[Any]:
        for start in range(0, 10, 3):
            x, y = images()[start : start + 3], labels_of()[start : start + 3]
            yield {"dict": {"x": x, "labels": y}, "array": x, "pair": (x, y), "pair of dict": ({"x": x}, y)}[kind]

    return batches


@pytest.mark.parametrize("kind", ["dict", "array", "pair", "pair of dict"])
@pytest.mark.parametrize("samples", [None, 4])
def test_functions(kind: str, samples: int | None) -> None:
    data = sfp_onnx.open_data(in_batches(kind), PORT, samples=samples)
    expected = sfp_onnx.open_data({"x": images(), "labels": labels_of()}, PORT, samples=samples)
    np.testing.assert_array_equal(whole(data), whole(expected))
    np.testing.assert_array_equal(whole(data), whole(expected))  # a second pass
    if kind != "array":
        assert data.labels is not None and expected.labels is not None
        np.testing.assert_array_equal(data.labels, expected.labels)


def test_two_inputs() -> None:
    ports = (Port("a", np.dtype(np.float32), ("N", 2)), Port("b", np.dtype(np.int64), ("N",)))
    rows = np.arange(20, dtype=np.float32).reshape(10, 2)
    data = sfp_onnx.open_data(lambda: ({"a": rows[i : i + 4], "b": np.arange(10)[i : i + 4]} for i in (0, 4, 8)), ports)
    feeds, count = next(data.batches())
    assert count == 10 and (feeds["a"] == rows).all() and (feeds["b"] == np.arange(10)).all()


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda: iter([]), "yields no batches"),
        (lambda: 1 / 0, "ZeroDivisionError"),
        (lambda: [{"z": images()}], "is no batch for the inputs"),
        (lambda: [(images(4), labels_of(3))], "is no batch"),
        (lambda: [images(4), (images(4), labels_of(4))], "some batches have labels"),
        (lambda: [np.float32(1)], r"expects shape .*, the data have \[\]"),
        (lambda: [images(2), images(2)[:, :2]], r"the data have \[4, '\?', 8, 8\]"),
    ],
)
def test_functions_that_do_not_fit(function: Callable[[], Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        sfp_onnx.open_data(function, PORT)


def test_a_function_that_changes_its_mind() -> None:
    left = [3, 2]
    data = sfp_onnx.open_data(lambda: [images(left.pop(0))], PORT)
    with pytest.raises(DataError, match="other rows than in its first pass"):
        list(data.batches())


def test_functions_by_name(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model_file.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("own_source.py").write_text("import numpy as np\ndef batches():\n    yield np.zeros((4, 3, 8, 8), 'f4'), [0, 1, 2, 3]\n")
    result = invoke("evaluate", model_file, "--data", "own_source:batches", "--no-latency", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)[0]["samples"] == 4, result.stderr
    result = invoke("evaluate", model_file, "--data", "own_source:nothing", "--no-latency")
    assert result.exit_code == 2 and "cannot be imported" in result.stderr
