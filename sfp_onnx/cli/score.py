"""score: importance of every channel, and what single filter performance says of the layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .. import pipeline, report
from ..records import ScoreOptions
from . import options as take
from .bandit_options import bandit_files, chosen_bandit
from .common import EPILOG, bar, check_outputs, dataset, guarded, say


@click.command("score", epilog=EPILOG)
@take.model_argument
@click.option("--data", type=take.FILE, help="Calibration data: " + take.DATA)
@take.score_options
@click.option("--save", type=take.FILE, help="Write scores (and class profiles) as .npz.")
@take.preprocessing_options
@take.shape_option
@take.layernorm_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@guarded
def score_command(model: Path, data: Path | None, save: Path | None, as_json: bool, **options: Any) -> None:
    """Score all channels that can be pruned; change nothing.

    Example: sfp-onnx score model.onnx --data calibration.npz --score sfp --save scores.npz
    """
    bandit = chosen_bandit(options)
    loaded = pipeline.load(model)
    inputs = [*loaded.paths, *filter(None, (data, options["labels"]))]
    check_outputs(inputs, save, *bandit_files(options))
    data_set = dataset(loaded, data, options)
    analysis = pipeline.inspect(loaded, options["input_shapes"], data_set, options["cut_layernorm"])
    name = options["score"] or pipeline.default_score(data_set)
    chosen = ScoreOptions(options["p"], options["seed"], options["probe"], options["pool"], bandit)
    found = pipeline.scored(analysis, name, data_set, chosen, bar)
    if save is not None:
        pipeline.save_scores(save, analysis, found, inputs)
    for note in found.notes:
        say(f"Note: {note}")
    shown = report.scores(analysis.coupling, found.name, found.values, found.profiles)
    click.echo(json.dumps(shown, indent=1) if as_json else report.scores_text(shown))
    if save is not None:
        say(f"wrote {save}")
