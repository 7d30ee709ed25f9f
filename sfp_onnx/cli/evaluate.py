"""evaluate: measure models on data."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .. import pipeline, report
from . import options as take
from .common import EPILOG, bar, dataset, guarded


@click.command("evaluate", epilog=EPILOG)
@click.argument("models", nargs=-1, required=True, type=take.FILE)
@click.option("--data", type=take.FILE, required=True, help="Test data: " + take.DATA)
@take.preprocessing_options
@click.option("--latency/--no-latency", default=True, show_default=True, help="Time the models, interleaved.")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Threads of onnxruntime (0: all cores).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@guarded
def evaluate_command(models: tuple[Path, ...], data: Path, latency: bool, threads: int, as_json: bool, **options: Any) -> None:
    """Measure models on data; the first is the reference.

    Example: sfp-onnx evaluate model.onnx smaller.onnx --data test.npz
    """
    loaded = [pipeline.load(path) for path in models]
    data_set = dataset(loaded[0], data, options)
    assert data_set is not None
    results = pipeline.evaluate(loaded, data_set, latency, threads, bar)
    click.echo(json.dumps([asdict(item) for item in results], indent=1) if as_json else report.evaluation_text(results))
