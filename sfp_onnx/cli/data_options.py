"""Options that say how data are read, and the preprocessing that they, a preset and the model's own configuration make together."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from .. import graph
from ..data import CONFIG, PRESETS, RESAMPLING, Preprocessing, hub_config, is_images, preset
from ..errors import OptionError

F = TypeVar("F", bound=Callable[..., Any])
FIELDS = ("mean", "std", "scale", "resize", "center_crop", "color", "resample")
NOTHING: dict[str, Any] = {**dict.fromkeys(FIELDS), "preset": None}
"""Preprocessing options as if none was given."""


def _pixels(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not re.fullmatch(r"[0-9]+(?:[x,][0-9]+)?", value.strip()):
        raise click.BadParameter(f"'{value}': expected pixels, such as 224 or 224x320 (height x width)")
    return tuple(int(item) for item in re.split("[x,]", value.strip()))


_OPTIONS = (
    click.option("--preset", type=click.Choice(PRESETS), help="Usual preprocessing; options given beside it win."),
    click.option("--resize", callback=_pixels, metavar="S|HxW", help="Images: the shorter side, or height x width.  [default: model's]"),
    click.option("--center-crop", callback=_pixels, metavar="S|HxW", help="Images: the middle, after --resize."),
    click.option("--color", type=click.Choice(["rgb", "bgr"]), help="Images: order of the model's colour channels.  [default: rgb]"),
    click.option("--resample", type=click.Choice(RESAMPLING), help="Images: how --resize interpolates.  [default: bilinear]"),
)


def data_options(function: F) -> F:
    """The options, on a command."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def given(options: dict[str, Any]) -> bool:
    """Whether any preprocessing was asked for."""
    return any(options.get(name) is not None for name in (*FIELDS, "preset"))


def preprocessing(model: graph.Model, path: Path, options: dict[str, Any]) -> tuple[Preprocessing, list[str]]:
    """What the flags say, else the preset, else (for images) a ``preprocessor_config.json`` next to the model; and what to tell about it.

    Raises:
        DataError: the preset or the configuration does not fit. OptionError: --layout for images.
    """
    images, notes = is_images(path), []
    base: dict[str, Any] = {}
    config = model.source.parent / CONFIG if model.source is not None else None
    if images and options["layout"] != "nchw":
        raise OptionError("--layout is for arrays; images are laid out as the model takes them. Leave it away.")
    if options.get("preset"):
        base = preset(options["preset"], graph.inputs(model), images)
        notes.append(f"preset {options['preset']}: {_listed(base)} (options given win)")
    elif images and config is not None and config.is_file():
        base, left = hub_config(config)
        notes.append(f"preprocessing from {config}: {_listed(base) or 'none'} (options given win)")
        if left:
            notes.append(f"{config}: not followed: {', '.join(left)}")
    own = {name: options[name] for name in FIELDS if options.get(name) is not None}
    if own.get("color") == "bgr" and base.get("color", "rgb") == "rgb":  # figures of a preset are in the order red, green, blue
        base = {**base, **{name: base[name][::-1] for name in ("mean", "std") if name in base}}
    if "resize" in own:
        base.pop("letterbox", None)
    crop = own.get("center_crop")
    if crop is not None and len(crop) == 1:
        own["center_crop"] = crop * 2
    return Preprocessing(**{**base, **own}, layout=options["layout"]), notes


def _listed(steps: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', '-')} {_shown(value)}" for name, value in steps.items())


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ("x" if all(isinstance(item, int) for item in value) else ",").join(f"{item:g}" for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
