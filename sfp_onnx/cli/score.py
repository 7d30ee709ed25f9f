"""score: importance of every channel, and what single filter performance says of the layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .. import pipeline
from ..core.options import DataOptions, InspectOptions, RepairOptions
from ..report.text import scores, scores_text
from . import arguments as take
from .common import Command, bar, say


@click.command("score", cls=Command)
@take.takes(
    take.model_argument, take.file_option("--save", help="Write scores (and class profiles) as .npz."), take.data_option,
    take.score_option, DataOptions, InspectOptions, RepairOptions, take.json_option, skip=("fit", "force"),
)  # fmt: skip
def command(model: Path, save: Path | None, data: Path | None, as_json: bool, **options: Any) -> None:
    """Score all channels that can be pruned; change nothing.

    Example: sfp-onnx score model.onnx --data calibration.npz --score sfp --save scores.npz
    """
    asked = take.scoring(options)
    analysis, scored = pipeline.scored_with(
        model, asked["score_name"], data, asked["score_options"], bar, inspect_options=take.build(InspectOptions, options), output=save,
        **take.reading(options),
    )  # fmt: skip
    for note in scored.notes:
        say(f"Note: {note}")
    click.echo(json.dumps(scores(analysis.coupling, scored), indent=1) if as_json else scores_text(analysis.coupling, scored))
    if save is not None:
        say(f"wrote {save}")
