"""plan: decide which channels leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .. import pipeline
from ..core.options import DataOptions, InspectOptions, PlanOptions, RepairOptions
from ..planning import to_json
from ..report.text import figures_text, plan_text
from . import arguments as take
from .common import Command, bar, say
from .config import settle


@click.command("plan", cls=Command)
@take.takes(
    take.model_argument, take.file_option("-o", "--output", help="Where the plan (JSON) goes.", required=True), take.data_option,
    take.score_option, PlanOptions, take.eval_option, DataOptions, InspectOptions, RepairOptions, take.json_option,
)  # fmt: skip
def command(model: Path, output: Path, data: Path | None, eval_data: Path | None, as_json: bool, **options: Any) -> None:
    """Decide which channels leave; cut nothing.

    Example: sfp-onnx plan model.onnx -o plan.json --target macs=50%
    """
    settle(options)
    plan = pipeline.plan(
        model, take.build(PlanOptions, options), data=data, progress=bar, eval_data=eval_data, output=output,
        inspect_options=take.build(InspectOptions, options), **take.scoring(options), **take.reading(options),
    )  # fmt: skip
    click.echo(json.dumps(to_json(plan), indent=1) if as_json else plan_text(plan))
    if plan.figures and not as_json:
        click.echo(figures_text(plan))
    beside = take.retyped(click.get_current_context())
    say(f"Next: sfp-onnx apply {take.quoted(model, output, '-o', f'{model.stem}-pruned.onnx')}{' ' + beside if beside else ''}")
