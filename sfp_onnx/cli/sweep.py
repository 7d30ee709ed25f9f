"""sweep: many targets from one calibration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .. import pipeline
from ..core.options import AMOUNT, DataOptions, InspectOptions, PlanOptions, RepairOptions
from ..report.text import points_text
from . import arguments as take
from .common import Command, Option, bar, say


@click.command("sweep", cls=Command)
@take.takes(
    take.model_argument,
    click.option("--targets", "sweeps", multiple=True, required=True, metavar="macs=90%:20%:10%", help="First:last:step. Repeatable.",
                 cls=Option, section=AMOUNT),
    take.file_option("-o", "--output", help="Where the JSON goes."),
    take.file_option("--save-dir", help="Folder (made if missing) for the models and their manifests."),
    take.file_option("--report", help="Write one HTML file with charts about the run (extra `report`)."),
    take.data_option, take.test_option, take.score_option, PlanOptions, DataOptions, InspectOptions, RepairOptions, take.json_option,
    skip=("max_drop", "metric", "confidence", "ratio"),
)  # fmt: skip
def command(
    model: Path, sweeps: tuple[str, ...], output: Path | None, save_dir: Path | None, report: Path | None, data: Path | None,
    test_data: Path | None, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Plan for many targets with one calibration; show accuracy, size and latency of each.

    Without --test-data a third of --data is held out to judge on.

    Example: sfp-onnx sweep model.onnx --data calibration.npz --targets macs=90%:20%:10%
    """
    swept = pipeline.sweep(
        model, sweeps, take.build(PlanOptions, options), data=data, test_data=test_data, progress=bar, output=output, folder=save_dir,
        report=report, inspect_options=take.build(InspectOptions, options), **take.scoring(options), **take.reading(options),
    )  # fmt: skip
    click.echo(json.dumps(swept.data, indent=1) if as_json else points_text(swept.points))
    for point in swept.points:
        if point.failure:
            say(f"{point.target}: {point.failure}")
    if report is not None:
        say(f"report: {report}")
