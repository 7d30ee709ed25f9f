"""score: importance of every channel, and what single filter performance says of the layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..core.options import ScoreOptions
from ..coupling.analysis import inspect, load
from ..pipeline import default_score
from ..report.text import scores, scores_text
from ..scores.scoring import save_scores, scored
from .arguments import (
    DATA,
    bandit_files,
    check_outputs,
    chosen_bandit,
    dataset,
    layernorm_option,
    model_argument,
    preprocessing_options,
    score_options,
    shape_option,
)
from .common import EPILOG, FILE, bar, guarded, say


@click.command("score", epilog=EPILOG)
@model_argument
@click.option("--data", type=FILE, help="Calibration data: " + DATA)
@score_options
@click.option("--save", type=FILE, help="Write scores (and class profiles) as .npz.")
@preprocessing_options
@shape_option
@layernorm_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@guarded
def score_command(model: Path, data: Path | None, save: Path | None, as_json: bool, **options: Any) -> None:
    """Score all channels that can be pruned; change nothing.

    Example: sfp-onnx score model.onnx --data calibration.npz --score sfp --save scores.npz
    """
    bandit = chosen_bandit(options)
    loaded = load(model)
    inputs = [*loaded.paths, *filter(None, (data, options["labels"]))]
    check_outputs(inputs, save, *bandit_files(options))
    data_set = dataset(loaded, data, options)
    analysis = inspect(loaded, options["input_shapes"], data_set, options["cut_layernorm"])
    name = options["score"] or default_score(data_set)
    chosen = ScoreOptions(options["p"], options["seed"], options["probe"], options["pool"], bandit)
    found = scored(analysis, name, data_set, chosen, bar)
    if save is not None:
        save_scores(save, analysis, found, inputs)
    for note in found.notes:
        say(f"Note: {note}")
    shown = scores(analysis.coupling, found.name, found.values, found.profiles)
    click.echo(json.dumps(shown, indent=1) if as_json else scores_text(shown))
    if save is not None:
        say(f"wrote {save}")
