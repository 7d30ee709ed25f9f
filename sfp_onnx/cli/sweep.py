"""sweep: many targets from one calibration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..core.errors import OutputError
from ..core.options import ScoreOptions
from ..coupling.analysis import inspect, load
from ..pipeline import candidates, parse_sweep, sweep, sweep_data
from ..planning.max_drop import held_out
from ..report.manifest import Point, write_json
from ..report.page import Context, sweep_page
from ..report.text import number, table
from .arguments import (
    NOTHING,
    bandit_files,
    check_outputs,
    chosen_bandit,
    chosen_plan,
    chosen_repair,
    dataset,
    layernorm_option,
    model_argument,
    plan_options,
    preprocessing_options,
    repair_options,
    shape_option,
)
from .common import EPILOG, FILE, bar, check_report, guarded, report_option, say, typed, with_examples, write
from .config import config_option


@click.command("sweep", epilog=EPILOG)
@model_argument
@click.option("--targets", "sweeps", multiple=True, required=True, metavar="macs=90%:20%:10%", help="First:last:step. Repeatable.")
@click.option("--data", type=FILE, help="Calibration data; without --test-data a third of it is held out to judge on.")
@click.option("--test-data", type=FILE, help="Data to judge on.")
@click.option("-o", "--output", type=FILE, help="Where the JSON goes.")
@click.option("--save-dir", type=FILE, help="Folder (made if missing) for the models and their manifests.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@plan_options
@preprocessing_options
@shape_option
@layernorm_option
@repair_options
@config_option
@report_option
@guarded
def sweep_command(
    model: Path, sweeps: tuple[str, ...], data: Path | None, test_data: Path | None, output: Path | None, save_dir: Path | None,
    as_json: bool, report_to: Path | None, **options: Any,
) -> None:  # fmt: skip
    """Plan for many targets with one calibration; show accuracy, size and latency of each.

    Example: sfp-onnx sweep model.onnx --data calibration.npz --targets macs=90%:20%:10%
    """
    if options["ratio"] is not None or options["max_drop"] is not None:
        raise click.UsageError("A sweep takes --targets (and --target for bounds that hold for all of them), not --ratio or --max-drop.")
    for text in sweeps:
        parse_sweep(text)
    chosen = chosen_plan({**options, "targets": options["targets"] or ("macs=100%",)})
    loaded = load(model)
    check_outputs([*loaded.paths, data, test_data, options["labels"]], output, report_to, *bandit_files(options))
    check_report(report_to)
    if save_dir is not None:
        _make(save_dir)
    nothing = {**NOTHING, "labels": None, "samples": None}
    seen = dataset(loaded, data, options if data else {**options, **nothing})
    judge = dataset(loaded, test_data, {**options, "samples": None, "labels": None}) if test_data else None
    if judge is None and seen is not None:
        seen, judge = held_out(seen, options["seed"])
        say(f"accuracy on {judge.samples} samples held out from --data")
    analysis = inspect(loaded, options["input_shapes"], seen, options["cut_layernorm"])
    repair = chosen_repair(options, seen)
    details = ScoreOptions(options["p"], options["seed"], options["probe"], options["pool"], chosen_bandit(options), options["memory"])
    scored = candidates(analysis, chosen, options["score"], seen, details, bar, repair)
    points = sweep(scored, chosen, sweeps, judge, save_dir, bar)
    found = sweep_data(points, analysis, scored)
    if output is not None:
        write_json(output, found, loaded.paths)
    if report_to is not None:
        write(report_to, sweep_page(points, with_examples(scored, seen), Context(typed(), judge)), [*loaded.paths])
    click.echo(json.dumps(found, indent=1) if as_json else _text(points))
    for point in points:
        if point.failure:
            say(f"{point.target}: {point.failure}")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot make the folder: {error.strerror or error}") from error


def _text(points: list[Point]) -> str:
    rows = []
    for point in points:
        if point.size is None or point.failure:
            rows.append([point.target, *["-"] * 8, "not reached"])
            continue
        shares = [f"{value:.2%}" if value is not None else "-" for value in (point.top1, point.agreement)]
        error = f"{point.relative_error:.4f}" if point.relative_error is not None else "-"
        sizes = [number(point.size.macs), number(point.size.params), number(point.size.bytes or 0)]
        times = [f"{point.latency_ms:.3f}", f"{point.latency_ratio:.2f}"]
        rows.append([point.target, *shares, error, *sizes, *times, "yes" if point.front else ""])
    heads = ["target", "top-1", "agreement", "rel. error", "MACs", "params", "bytes", "min ms", "ratio", "front"]
    return table(heads, rows)
