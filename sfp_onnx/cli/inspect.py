"""inspect: what can be pruned, and why the rest cannot."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click

from ..coupling.analysis import inspect
from ..data.checks import training_mode
from ..report.text import inspection, inspection_text
from .arguments import layernorm_option, model_argument, shape_option
from .common import EPILOG, guarded, say, warn


@click.command("inspect", epilog=EPILOG)
@model_argument
@shape_option
@layernorm_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@guarded
def inspect_command(model: Path, input_shapes: dict[str, list[int]], cut_layernorm: bool, as_json: bool) -> None:
    """Show what can be pruned, and why the rest cannot.

    Example: sfp-onnx inspect model.onnx
    """
    analysis = inspect(model, input_shapes, cut_layernorm=cut_layernorm)
    for text in training_mode(analysis.model):
        warn(text)
    found = inspection(analysis.coupling, analysis.size(), analysis.samples, str(model))
    click.echo(json.dumps(found, indent=1) if as_json else inspection_text(found))
    if not as_json and found["groups"]:
        name = shlex.quote(str(model))
        say(f"Next: sfp-onnx prune {name} -o {shlex.quote(model.stem + '-pruned.onnx')} --target macs=50% --align 8 --data FOLDER_OR_NPZ")
