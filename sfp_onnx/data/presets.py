"""Usual preprocessing by name, and as Hugging Face's ``preprocessor_config.json`` says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..records import Port
from .images import image_side

CONFIG = "preprocessor_config.json"
PRESETS = ("imagenet", "cifar10", "yolo")
IMAGENET: dict[str, Any] = {"scale": 255.0, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CIFAR10: dict[str, Any] = {"scale": 255.0, "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
CROP_SHARE = 0.875  # 224 of 256
PILLOW = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # Pillow's numbers


def preset(name: str, ports: Sequence[Port], images: bool) -> dict[str, Any]:
    """Fields of `Preprocessing` for a model; those of image files only for ``images``.

    imagenet: torchvision's evaluation (shorter side to 8/7 of the crop, central crop, mean and std of ImageNet); cifar10: mean and std of
    CIFAR-10; yolo: letterbox to the model's size, values in [0, 1].

    Raises:
        DataError: the model takes no images.
    """
    values: dict[str, Any] = {"imagenet": IMAGENET, "cifar10": CIFAR10, "yolo": {"scale": 255.0}}[name]
    if not images:
        return dict(values)
    _, height, width, _ = image_side(ports)
    if name == "imagenet":
        crop = (height or 224, width or 224)
        return {**values, "resize": (round(min(crop) / CROP_SHARE),), "center_crop": crop}
    if name == "yolo":
        return {**values, "resize": (height or 640, width or 640), "letterbox": True}
    return {**values, "resize": (height or 32, width or 32)}


def hub_config(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Fields of `Preprocessing` from a ``preprocessor_config.json``, and what in it is not followed.

    Raises:
        DataError: not such a file.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return _fields(data), _left(data)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, RecursionError) as error:
        raise DataError(f"{path}: no Hugging Face preprocessor_config.json: {error}. Repair or move it.") from error


def _fields(data: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    crop = _size(data.get("crop_size", 224)) if data.get("do_center_crop") else None
    if data.get("do_resize", "size" in data) and "size" in data:
        size = _size(data["size"], short=crop is not None)
        share = data.get("crop_pct")
        if share and len(size) == 1 and size[0] < 384:  # as ConvNeXT does
            crop, size = (size[0], size[0]), (int(size[0] / share),)
        found["resize"] = size
    if crop is not None:
        found["center_crop"] = crop * 2 if len(crop) == 1 else crop
    if data.get("do_rescale", True):
        found["scale"] = round(1 / float(data.get("rescale_factor", 1 / 255)), 6)
    if data.get("do_normalize"):
        found["mean"] = tuple(float(value) for value in data["image_mean"])
        found["std"] = tuple(float(value) for value in data["image_std"])
    if "resample" in data:
        found["resample"] = PILLOW[int(data["resample"])]
    if data.get("do_flip_channel_order"):
        found["color"] = "bgr"
    return found


def _size(value: Any, short: bool = False) -> tuple[int, ...]:
    """{"height", "width"}, {"shortest_edge"}, or a number: the shorter side if a crop follows (``short``), else a square."""
    if isinstance(value, Mapping):
        return (int(value["shortest_edge"]),) if "shortest_edge" in value else (int(value["height"]), int(value["width"]))
    return (int(value),) if short else (int(value), int(value))


def _left(data: Mapping[str, Any]) -> list[str]:
    known = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_flip_channel_order", "do_convert_rgb"}
    return sorted(key for key, value in data.items() if key.startswith("do_") and value and key not in known)
