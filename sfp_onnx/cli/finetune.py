"""finetune: train a pruned model with the original as its teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..core.options import DATA, OUTPUT, DataOptions
from ..core.system import need
from ..methods.training import TrainOptions, words
from ..report.text import accuracy_text, evaluation_text
from . import arguments as take
from .common import answer, bar, say


@take.command(
    "finetune", take.model_argument, take.output_option, take.option("--teacher", type=take.FILE, section=DATA,
        help="The original.  [default: the one that the manifest of the cut names]"),
    take.file_option("--data", help=f"Samples to train on, with labels or without: {take.SOURCES}", section=DATA, required=True),
    take.option("--cuts", type=take.FILE, section=DATA, help="Manifest of the cut.  [default: NAME.json or NAME.onnx.json beside MODEL]"),
    TrainOptions, take.test_option, DataOptions,
    take.file_option("--manifest", help="Write versions, hashes, options and figures as JSON."),
    take.option("--json", "as_json", is_flag=True, help="Print a line of JSON per epoch, and the manifest.", section=OUTPUT))  # fmt: skip
def command(
    model: Path, output: Path, teacher: Path | None, cuts: Path | None, manifest: Path | None, as_json: bool, **options: Any
) -> None:  # fmt: skip
    """Train a pruned model with the original as its teacher (extra `train`).

    Example: sfp-onnx finetune smaller.onnx --teacher model.onnx --data calibration.npz -o tuned.onnx
    """
    need("torch", "train", "finetune")
    from ..methods.training.tuning import finetune

    result = finetune(
        model, take.build(TrainOptions, options), teacher=teacher, cuts=cuts, output=output, manifest=manifest, progress=bar,
        tell=lambda said: click.echo(json.dumps(said)) if as_json else say(words(said)), **take.reading(options))  # fmt: skip
    for note in result.notes:
        say(f"Note: {note}")
    if as_json:
        click.echo(json.dumps(result.manifest))
        return
    answer(f"{result.measure} on {result.held_out} held-out samples: {result.before:.4g} -> {result.after:.4g}"
           f"{'' if result.kept else ' (not kept)'}")  # fmt: skip
    if result.evaluation:
        answer(accuracy_text(result.evaluation[1:]))
        say(evaluation_text(result.evaluation))
    answer(f"wrote {output}")

