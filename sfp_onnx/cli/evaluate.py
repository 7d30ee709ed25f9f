"""evaluate: measure models on data."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .. import pipeline, report
from . import options as take
from .common import EPILOG, bar, check_outputs, dataset, guarded
from .reporting import check_report, report_option, typed, write


@click.command("evaluate", epilog=EPILOG)
@click.argument("models", nargs=-1, required=True, type=take.FILE)
@click.option("--data", type=take.FILE, required=True, help="Test data: .npz, .npy or test_data_set_* folders.")
@take.preprocessing_options
@click.option("--latency/--no-latency", default=True, show_default=True, help="Time the models, interleaved.")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Threads of onnxruntime (0: all cores).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@report_option
@guarded
def evaluate_command(
    models: tuple[Path, ...], data: Path, latency: bool, threads: int, as_json: bool, report_to: Path | None, **options: Any
) -> None:
    """Measure models on data; the first is the reference.

    Example: sfp-onnx evaluate model.onnx smaller.onnx --data test.npz
    """
    loaded = [pipeline.load(path) for path in models]
    inputs = [*(path for model in loaded for path in model.paths), data, *filter(None, [options["labels"]])]
    check_outputs(inputs, report_to)
    check_report(report_to)
    data_set = dataset(loaded[0], data, options)
    assert data_set is not None
    results = pipeline.evaluate(loaded, data_set, latency, threads, bar)
    click.echo(json.dumps([asdict(item) for item in results], indent=1) if as_json else report.evaluation_text(results))
    if report_to is not None:
        analyses = [pipeline.inspect(model, data=data_set) for model in loaded]
        write(report_to, pipeline.evaluate_page(analyses, results, pipeline.Context(typed(), data_set)), inputs)
