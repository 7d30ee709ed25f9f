"""Options of prune that make other forms of the pruned model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .. import pipeline
from ..packaging import QUANTIZERS, operators_path
from ..report import number, table
from .common import F
from .options import FILE

_OPTIONS = (
    click.option("--half", is_flag=True, help="Store weights as float16; inputs, outputs and arithmetic stay float32."),
    click.option("--quantize", type=click.Choice(QUANTIZERS), help="8-bit integers, by onnxruntime's quantiser; static with --data."),
    click.option("--save-ort", type=FILE, help="Also write onnxruntime's .ort format, with the operators that a reduced build needs."),
)


def packaging_options(function: F) -> F:
    """The options, in the order of the steps."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def chosen_packaging(options: dict[str, Any]) -> pipeline.PackagingOptions:
    """What the options ask for."""
    return pipeline.PackagingOptions(options["half"], options["quantize"], options["save_ort"] is not None)


def ort_paths(options: dict[str, Any]) -> tuple[Path, ...]:
    """The files that --save-ort writes."""
    path = options["save_ort"]
    return () if path is None else (path, operators_path(path))


def steps_text(steps: tuple[pipeline.Step, ...]) -> str:
    """What every step gave, as a table."""
    rows = []
    for own in steps:
        shares = [f"{value:.2%}" if value is not None else "-" for value in (own.top1, own.agreement)]
        error = f"{own.relative_error:.4f}" if own.relative_error is not None else "-"
        rows.append([own.name, number(own.bytes), *shares, error, f"{own.latency_ms:.3f}", f"{own.latency_ratio:.2f}"])
    return table(["step", "bytes", "top-1", "agreement", "rel. error", "min ms", "ratio"], rows)
