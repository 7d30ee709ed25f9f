"""inspect: what can be pruned, and why the rest cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.options import DataOptions, InspectOptions
from ..pipeline import opened
from ..report.text import inspection, inspection_text
from . import arguments as take
from .common import answer


@take.command("inspect", take.model_argument, take.data_option, DataOptions, InspectOptions, take.json_option)
def command(model: Path, as_json: bool, **options: Any) -> None:
    """Show what can be pruned, and why the rest cannot.

    Example: sfp-onnx inspect model.onnx
    """
    analysis = opened.Sources(**take.reading(options)).open(model).analysis
    facts = inspection(analysis, str(model))
    answer(facts if as_json else inspection_text(facts))
    if not as_json and facts["groups"]:
        words = (model, "-o", f"{model.stem}-pruned.onnx", "--target", "macs=50%")
        take.following("prune", *words, names=take.READING | take.TRACING, missing="--data FOLDER_OR_NPZ")
