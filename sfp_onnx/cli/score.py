"""score: importance of every channel, and what single filter performance says of the layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.options import DataOptions, InspectOptions, RepairOptions
from ..pipeline import opened, scored as scoring
from ..report.text import scores, scores_text
from . import arguments as take
from .common import answer, bar, say


@take.command(
    "score", take.model_argument, take.file_option("--save", help="Write scores (and class profiles) as .npz."), take.data_option,
    take.score_option, DataOptions, InspectOptions, RepairOptions, take.threads_option,
    take.json_option, skip=("fit", "force"))  # fmt: skip
def command(model: Path, save: Path | None, as_json: bool, **options: Any) -> None:
    """Score all channels that can be pruned; change nothing.

    Example: sfp-onnx score model.onnx --data calibration.npz --score sfp --save scores.npz
    """
    chosen = take.scoring(options)
    inputs = opened.Sources(**take.reading(options)).open(model, [save])
    scored = scoring.scored_on(inputs, chosen["score_name"], chosen["score_options"], bar, save)
    for note in scored.notes:
        say(f"Note: {note}")
    answer((scores if as_json else scores_text)(inputs.analysis.coupling, scored))
    if save is not None:
        say(f"wrote {save}")
    if not as_json:
        words = (model, "-o", f"{model.stem}-pruned.onnx", "--target", "macs=50%")
        take.following("prune", *words, names={"score", *take.READING, *take.TRACING}, missing="--data FOLDER_OR_NPZ")
