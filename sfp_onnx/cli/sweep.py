"""sweep: many targets from one calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .. import pipeline
from ..core.options import AMOUNT, DataOptions, InspectOptions, MeasureOptions, PlanOptions, RepairOptions
from ..report.text import points_text
from . import arguments as take
from .common import answer, bar, say


@take.command(
    "sweep", take.model_argument,
    take.option("--targets", "sweeps", multiple=True, required=True, metavar="macs=90%:20%:10%", help="First:last:step. Repeatable.",
                section=AMOUNT),
    take.file_option("-o", "--output", help="Where the JSON goes."),
    take.file_option("--save-dir", "folder", help="Folder (made if missing) for the models and their manifests."), take.report_option,
    take.option("--workers", type=click.IntRange(1), metavar="N", help="Work on N targets at once, in processes that share the cores."),
    take.data_option, take.test_option, take.score_option, PlanOptions, DataOptions, MeasureOptions, InspectOptions, RepairOptions,
    take.json_option, skip=("max_drop", "confidence", "ratio"))  # fmt: skip
def command(
    model: Path, sweeps: tuple[str, ...], output: Path | None, folder: Path | None, report: Path | None, workers: int | None, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Plan for many targets with one calibration; show accuracy, size and latency of each.

    Without --test-data a third of --data is held out to judge on.

    Example: sfp-onnx sweep model.onnx --data calibration.npz --targets macs=90%:20%:10%
    """
    swept = pipeline.sweep(
        model, sweeps, take.build(PlanOptions, options), progress=bar, output=output, folder=folder, report=report, executor=workers,
        **take.scoring(options), **take.reading(options))  # fmt: skip
    answer(swept.data if as_json else points_text(swept.points))
    for point in swept.points:
        if point.failure:
            say(f"{point.target}: {point.failure}")
    if report is not None:
        say(f"report: {report}")
