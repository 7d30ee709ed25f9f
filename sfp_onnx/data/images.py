"""Folders of image files: found, labelled, decoded one batch at a time with Pillow (extra ``images``);
and usual preprocessing by name."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import DataError, OptionError
from ..core.system import need
from ..core.types import Array, IntArray, Port
from . import Opened, Preprocessing
from .classes import Numbering, numbered

ENDINGS = frozenset(".jpg .jpeg .png .bmp .webp .gif .tif .tiff .ppm .pgm".split())
SKIPPED = 0.01  # share of damaged images up to which they are left out (one is always allowed)
SHOWN = 10
GREY = (114, 114, 114)  # what YOLO pads with
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def is_images(source: object) -> bool:
    """Whether a source is a folder of images: any folder without ``input_*.pb`` tensors."""
    folder = Path(source) if isinstance(source, (str, Path)) else None
    return folder is not None and folder.is_dir() and not any((*folder.glob("input_*.pb"), *folder.glob("test_data_set_*")))


@dataclass(frozen=True)
class ImagePort:
    """The one image input of a model; dynamic sides are None. ``last``: its channels come last."""

    channels: int
    height: int | None
    width: int | None
    last: bool


def image_port(ports: Sequence[Port]) -> ImagePort:
    """The one input of a model, as it takes images.

    Raises:
        DataError: the model has several inputs, or none of the shape of an image.
    """
    shape = ports[0].shape if len(ports) == 1 else None
    if shape is None or len(shape) != 4:
        taken = ", ".join(f"'{port.name}' {list(port.shape) if port.shape else 'of unknown shape'}" for port in ports)
        raise DataError(f"a folder of images feeds one input of four dimensions; the model takes {taken}. Give arrays (.npz).")
    last = shape[3] in MODES and shape[1] not in MODES
    height, width = (dim if isinstance(dim, int) else None for dim in (shape[1:3] if last else shape[2:4]))
    channels = shape[3] if last else shape[1]
    if isinstance(channels, int) and channels not in MODES:
        raise DataError(f"input '{ports[0].name}' has {channels} channels; images have 1, 3 or 4. Give arrays (.npz).")
    return ImagePort(channels if isinstance(channels, int) else 3, height, width, last)


# ---- decoding --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Decoded images as uint8 rows; the shape is (N, height, width, channels). ``files`` are relative to ``folder``."""

    folder: Path
    files: tuple[str, ...]
    steps: Preprocessing
    shape: tuple[int, ...]
    dtype: Any = np.uint8

    def rows(self, chunks: Iterable[IntArray]) -> Iterator[Array]:
        """The images of each chunk.

        Raises:
            DataError: an image that could be decoded before no longer can.
        """
        return (np.stack([self._row(self.files[index]) for index in chunk]) for chunk in chunks)

    def _row(self, file: str) -> Array:
        try:
            return decode(self.folder / file, self.steps, self.shape[3])
        except Damaged as error:
            raise DataError(f"{self.folder / file}: {error}") from error


class Damaged(Exception):
    """An image cannot be decoded; why."""


def decode(path: Path, steps: Preprocessing, channels: int) -> Array:
    """One image, resized and cropped, as uint8 (H, W, C).

    Raises:
        Damaged: Pillow cannot read it. DataError: it is smaller than the crop.
    """
    return shaped(opened(path, channels), steps, path)


def opened(path: Path, channels: int) -> Any:
    """One image, as Pillow has it.

    Raises:
        Damaged: Pillow cannot read it.
    """
    pillow = need("PIL.Image", "images", "reading images")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a truncated tag in a readable file is nobody's business here
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            with pillow.open(path) as image:
                return image.convert(MODES[channels])
    except Exception as error:  # Pillow's plugins raise whatever their parsers do
        raise Damaged(f"cannot be decoded: {error}") from error


def shaped(image: Any, steps: Preprocessing, path: Path) -> Array:
    """An image, resized and cropped, as uint8 (H, W, C).

    Raises:
        DataError: it is smaller than the crop.
    """
    channels = len(image.getbands())
    image = _resized(image, steps, need("PIL.Image", "images", "reading images"))
    if steps.center_crop is not None:
        height, width = steps.center_crop
        if image.height < height or image.width < width:
            size = f"{image.height}x{image.width}"
            raise DataError(f"{path}: {size} pixels (height x width) are less than --center-crop {height}x{width}. Give --resize as well.")
        top, left = round((image.height - height) / 2), round((image.width - width) / 2)
        image = image.crop((left, top, left + width, top + height))
    array: Array = np.asarray(image, np.uint8).reshape(image.height, image.width, channels)
    return array[:, :, ::-1] if steps.color == "bgr" and channels == 3 else array


def _resized(image: Any, steps: Preprocessing, pillow: Any) -> Any:
    """The shorter side to ``resize`` (as torchvision does, with antialiasing), or exactly to (height, width)."""
    if steps.resize is None:
        return image
    how = getattr(pillow.Resampling, steps.resample.upper())
    if len(steps.resize) == 1:
        side, short = steps.resize[0], min(image.width, image.height)
        return image.resize(tuple(side if length == short else int(side * length / short) for length in image.size), how)
    height, width = steps.resize
    if not steps.letterbox:
        return image.resize((width, height), how)
    ratio = min(height / image.height, width / image.width)
    inner = image.resize((max(1, round(image.width * ratio)), max(1, round(image.height * ratio))), how)
    canvas = pillow.new(image.mode, (width, height), GREY[0] if image.mode == "L" else GREY + (255,) * (image.mode == "RGBA"))
    canvas.paste(inner, ((width - inner.width) // 2, (height - inner.height) // 2))
    return canvas


# ---- files and labels ------------------------------------------------------------------------------------------------


def find(folder: Path) -> tuple[list[str], list[str] | None]:
    """Images under a folder (relative, sorted), and the names of their class sub-folders if they lie in such.

    Raises:
        DataError: no images, or some in class sub-folders and some beside these.
    """
    files = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.suffix.lower() in ENDINGS and file.is_file())
    files = [file for file in files if not any(part.startswith(".") for part in file.parts)]
    if not files:
        raise DataError(f"{folder}: no images in this folder ({' '.join(sorted(ENDINGS))}), and no test_data_set_*/input_*.pb tensors.")
    beside = [file for file in files if len(file.parts) == 1]
    if beside and len(beside) < len(files):
        advice = "Move them into their class, or give --labels labels.csv."
        raise DataError(f"{folder}: {len(beside)} images such as {beside[0]} lie beside the class sub-folders. {advice}")
    return [file.as_posix() for file in files], None if beside else [file.parts[0] for file in files]


def read_csv(path: Path, folder: Path) -> tuple[list[str], list[int] | list[str]]:
    """Files of a folder and their labels, numbers or names of classes, from rows ``filename,label`` (a first row that names no file is a
    header).

    Raises:
        DataError: unreadable, not two columns, a file that is missing, outside of the folder, or twice there.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = [(number, [cell.strip() for cell in row]) for number, row in enumerate(csv.reader(stream), 1) if any(row)]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot read labels: {error}") from error
    if short := next(((number, row) for number, row in rows if len(row) < 2), None):
        raise DataError(f"{path}: line {short[0]}: expected filename,label, found '{','.join(short[1])}'")
    if rows and not (folder / rows[0][1][0]).is_file() and Path(rows[0][1][0]).suffix.lower() not in ENDINGS:
        rows = rows[1:]
    root, listed = Path(os.path.abspath(folder)), set()
    for number, row in rows:
        place = Path(os.path.abspath(folder / row[0]))  # as written: pictures may be links to others elsewhere
        if not place.is_relative_to(root) or not place.is_file():
            raise DataError(f"{path}: line {number}: there is no file '{row[0]}' in {folder}")
        if row[0] in listed:
            raise DataError(f"{path}: line {number}: '{row[0]}' is there twice")
        listed.add(row[0])
    if not rows:
        raise DataError(f"{path}: no rows filename,label in it")
    names, texts = [row[0] for _, row in rows], [row[1] for _, row in rows]
    return names, [int(text) for text in texts] if all(text.lstrip("-").isdecimal() for text in texts) else texts


# ---- opening ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labelling:
    """Where labels come from: a ``file`` (None: class sub-folders); ``classes`` in the order of the model's ``outputs``, where known."""

    file: str | Path | Array | None = None
    classes: tuple[str, ...] | None = None
    outputs: int | None = None


def open_images(folder: Path, ports: Sequence[Port], steps: Preprocessing, labels: Labelling, samples: int | None, seed: int) -> Opened:
    """A folder of images as one array, or ``samples`` of them, drawn with ``seed``. All chosen ones are decoded once, to find damaged ones.

    Raises:
        DataError: no images, too many damaged ones, different sizes, labels that do not fit.
    """
    need("PIL.Image", "images", f"{folder}: reading images")
    if isinstance(labels.file, np.ndarray) or (labels.file is not None and Path(labels.file).suffix.lower() != ".csv"):
        raise OptionError("labels of a folder of images come from class sub-folders, or from --labels labels.csv (filename,label)")
    names, words = read_csv(Path(labels.file), folder) if labels.file is not None else find(folder)
    numbers, known = _numbers(words, labels)
    notes = [known.note] if known.note else []
    chosen = np.arange(len(names))
    if samples is not None and samples < len(names):
        chosen = np.sort(np.random.default_rng(seed).choice(len(names), samples, replace=False))
    port = image_port(ports)
    own = steps.resize is None and steps.center_crop is None and port.height and port.width
    if own:
        steps = replace(steps, resize=(port.height or 0, port.width or 0))
    kept, sizes, digest, bad = _decoded(folder, [names[index] for index in chosen], steps, port.channels)
    side = sizes.after
    if own and sizes.before != {side[:2]}:
        size = f"{port.height}x{port.width}"
        notes.append(f"images are resized to {size}, as the model takes them (else give --resize, --center-crop or --preset)")
    steps = replace(steps, layout="nchw" if port.last else "nhwc")
    notes += [f"skipped {text}" for text in bad]
    reader = Images(folder, tuple(names[chosen[index]] for index in kept), steps, (len(kept), *side))
    chosen_labels = None if numbers is None else np.asarray(numbers, np.int64)[chosen[kept]]
    if chosen_labels is not None:  # a file of labels is part of the data
        digest = hashlib.sha256(digest.encode() + chosen_labels.tobytes()).hexdigest()
    axis = -1 if port.last else 1
    return Opened({ports[0].name: reader}, str(folder), digest, chosen_labels, tuple(notes), steps, axis, class_names=known.classes)


def _numbers(words: Sequence[int] | Sequence[str] | None, labels: Labelling) -> tuple[list[int] | None, Numbering]:
    """Labels as numbers, and what is known of the classes."""
    texts = [word for word in words or () if isinstance(word, str)]
    if words is None or not texts:
        return None if words is None else list(map(int, words)), Numbering(None, labels.classes or ())
    found = sorted(set(texts))
    known = numbered(found, labels.classes, labels.outputs, "class folders" if labels.file is None else "class names")
    if known.numbers is None:
        return None, known
    number_of = dict(zip(found, known.numbers, strict=True))
    return [number_of[text] for text in texts], known


@dataclass(frozen=True)
class _Sizes:
    """Heights and widths of images before they are resized, and their common shape (height, width, channels) after."""

    before: set[tuple[int, int]]
    after: tuple[int, ...]


def _decoded(folder: Path, names: Sequence[str], steps: Preprocessing, channels: int) -> tuple[IntArray, _Sizes, str, list[str]]:
    """Which images can be decoded, their sizes, the SHA-256 of all files, and what is wrong with the others."""
    digest, kept, bad, before = hashlib.sha256(), [], [], set()
    side: tuple[int, ...] | None = None
    allowed = max(1, int(SKIPPED * len(names)))
    for index, name in enumerate(names):
        try:
            digest.update(name.encode() + b"\0" + hashlib.sha256((folder / name).read_bytes()).digest())
            image = opened(folder / name, channels)
            shape = shaped(image, steps, folder / name).shape
        except (Damaged, OSError) as error:
            bad.append(f"{name}: {error}")
            if len(bad) > allowed:
                rule, listed = "(1 %, at least one, may be skipped)", "; ".join(bad[:SHOWN])
                raise DataError(f"{folder}: more than {allowed} of {len(names)} images cannot be decoded {rule}: {listed}") from error
            continue
        if side is not None and shape != side:
            sizes = f"{shape[0]}x{shape[1]} pixels, others have {side[0]}x{side[1]}"
            raise DataError(f"{folder / name}: {sizes}. Give --resize HxW, or --resize and --center-crop.")
        side = shape
        before.add((image.height, image.width))
        kept.append(index)
    if side is None:
        raise DataError(f"{folder}: no image can be decoded: {'; '.join(bad)}")
    return np.asarray(kept, np.int64), _Sizes(before, side), digest.hexdigest(), bad


# ---- usual preprocessing by name -------------------------------------------------------------------------------------

CONFIG = "preprocessor_config.json"
FOLLOWED = frozenset("do_resize do_center_crop do_rescale do_normalize do_flip_channel_order do_convert_rgb".split())
IMAGENET: dict[str, Any] = {"scale": 255.0, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF: dict[str, Any] = {"scale": 255.0, "mean": (0.5,), "std": (0.5,)}
CIFAR10: dict[str, Any] = {"scale": 255.0, "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
PRESETS = {"imagenet": IMAGENET, "cifar10": CIFAR10, "inception": HALF, "tf": HALF, "yolo": {"scale": 255.0}}
CROP_SHARE = 0.875  # 224 of 256
PILLOW = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # Pillow's numbers


def preset(name: str, ports: Sequence[Port], images: bool) -> dict[str, Any]:
    """Fields of `Preprocessing` for a model; those of image files only for ``images``.

    imagenet: torchvision's evaluation (shorter side to 8/7 of the crop, central crop, mean and std of ImageNet); inception: the same with
    values in [-1, 1] (mean and std 0.5); tf: values in [-1, 1], resized straight to the model's size; cifar10: mean and std of CIFAR-10;
    yolo: letterbox to the model's size, values in [0, 1].

    Raises:
        DataError: the model takes no images.
    """
    values = PRESETS[name]
    if not images:
        return dict(values)
    port = image_port(ports)
    if name in ("imagenet", "inception"):
        crop = (port.height or 224, port.width or 224)
        return {**values, "resize": (round(min(crop) / CROP_SHARE),), "center_crop": crop}
    if name == "yolo":
        return {**values, "resize": (port.height or 640, port.width or 640), "letterbox": True}
    side = 224 if name == "tf" else 32
    return {**values, "resize": (port.height or side, port.width or side)}


def hub_config(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Fields of `Preprocessing` from a ``preprocessor_config.json``, and what in it is not followed.

    Raises:
        DataError: not such a file.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return _fields(data), sorted(key for key, value in data.items() if key.startswith("do_") and value and key not in FOLLOWED)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, RecursionError) as error:
        raise DataError(f"{path}: no Hugging Face preprocessor_config.json: {error}. Repair or move it.") from error


def _fields(data: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    crop = _size(data.get("crop_size", 224)) if data.get("do_center_crop") else None
    if data.get("do_resize", "size" in data) and "size" in data:
        size = _size(data["size"], short=crop is not None)
        share = data.get("crop_pct")
        if share and len(size) == 1 and size[0] < 384:  # as ConvNeXT does
            crop, size = (size[0], size[0]), (int(size[0] / share),)
        fields["resize"] = size
    if crop is not None:
        fields["center_crop"] = crop * 2 if len(crop) == 1 else crop
    if data.get("do_rescale", True):
        fields["scale"] = round(1 / float(data.get("rescale_factor", 1 / 255)), 6)
    if data.get("do_normalize"):
        fields |= {name: tuple(float(value) for value in data[f"image_{name}"]) for name in ("mean", "std")}
    if "resample" in data:
        fields["resample"] = PILLOW[int(data["resample"])]
    if data.get("do_flip_channel_order"):
        fields["color"] = "bgr"
    return fields


def _size(value: Any, short: bool = False) -> tuple[int, ...]:
    """{"height", "width"}, {"shortest_edge"}, or a number: the shorter side if a crop follows (``short``), else a square."""
    if isinstance(value, Mapping):
        return (int(value["shortest_edge"]),) if "shortest_edge" in value else (int(value["height"]), int(value["width"]))
    return (int(value),) if short else (int(value), int(value))
