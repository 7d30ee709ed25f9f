"""evaluate: measure models on data, and gate on a baseline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .. import pipeline
from ..core.options import DATA, RUN, DataOptions
from ..evaluation import GateOptions, Verdict
from ..report.text import evaluation_text
from . import arguments as take
from .common import Command, Option, bar, say
from .gates import gated


@click.command("evaluate", cls=Command)
@take.takes(
    click.argument("models", nargs=-1, required=True, type=take.FILE),
    take.file_option("--data", help=f"Test data: {take.SOURCES}", section=DATA, required=True), DataOptions,
    click.option("--latency/--no-latency", default=True, show_default=True, help="Time the models, interleaved.", cls=Option, section=RUN),
    click.option("--threads", type=click.IntRange(min=0), default=0, help="Threads of onnxruntime (0: all cores).", cls=Option,
                 section=RUN),
    GateOptions, take.file_option("--report", help="Write one HTML file with charts about the run (extra `report`)."), take.json_option,
)  # fmt: skip
@gated
def command(
    models: tuple[Path, ...], data: Path, latency: bool, threads: int, report: Path | None, as_json: bool, **options: Any
) -> Sequence[Verdict]:
    """Measure models on data; the first is the reference.

    Example: sfp-onnx evaluate model.onnx smaller.onnx --data test.npz
    """
    measured = pipeline.compared(
        models, data, latency, threads, bar, gate=take.build(GateOptions, options), report=report, **take.reading(options)
    )
    results = measured.evaluations
    click.echo(json.dumps([asdict(result) for result in results], indent=1) if as_json else evaluation_text(results))
    if report is not None:
        say(f"report: {report}")
    for name, passed, text in measured.verdicts:
        say(f"{'passed' if passed else 'FAILED'}: {name}: {text}")
    return measured.verdicts
