"""evaluate: measure models on data, and gate on a baseline.

What a build pipeline reads: checks as JUnit XML and as annotations of GitHub Actions, and exit code 3 if one failed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import click

from .. import pipeline
from ..core.errors import SfpError, TargetError
from ..core.options import DATA, RUN, DataOptions
from ..evaluation import GateOptions, Verdict
from ..graph.save import check_output, write_text
from ..report.text import evaluation_text
from . import arguments as take
from .common import answer, bar, say


def junit(suite: str, checks: Sequence[Verdict]) -> str:
    """Checks as JUnit XML."""
    failed = sum(not verdict.passed for verdict in checks)
    head = f"name={quoteattr(suite)} tests={quoteattr(str(len(checks)))} failures={quoteattr(str(failed))}"
    lines = ['<?xml version="1.0" encoding="UTF-8"?>', f"<testsuites><testsuite {head}>"]
    for verdict in checks:
        text = "".join(letter for letter in verdict.text if letter.isprintable() or letter in "\n\t")
        inner = f"<system-out>{escape(text)}</system-out>" if verdict.passed else f"<failure message={quoteattr(text)}/>"
        lines.append(f"<testcase classname={quoteattr(suite)} name={quoteattr(verdict.name)}>{inner}</testcase>")
    return "\n".join([*lines, "</testsuite></testsuites>"]) + "\n"


def annotation(verdict: Verdict) -> str:
    """A workflow command of GitHub Actions."""
    name, text = (part.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A") for part in (verdict.name, verdict.text))
    title = f"sfp-onnx {name}".replace(":", "%3A").replace(",", "%2C")
    return f"::{'notice' if verdict.passed else 'error'} title={title}::{text}"


def gated(function: Callable[..., Any]) -> Callable[..., None]:
    """Give a command, which returns what it checked, --junit and --github; end it with exit code 3 if a check failed."""

    @wraps(function)
    def wrapper(*args: Any, junit_file: Path | None, github: bool, **kwargs: Any) -> None:
        if junit_file is not None:
            check_output(junit_file)
        try:
            verdicts = function(*args, **kwargs) or [Verdict("done", True, "all checks passed")]
        except SfpError as error:
            _report([Verdict(type(error).__name__.removesuffix("Error").lower(), False, str(error))], junit_file, github)
            raise
        _report(verdicts, junit_file, github)
        failed = [verdict for verdict in verdicts if not verdict.passed]
        if failed:
            raise TargetError("; ".join(f"{verdict.name}: {verdict.text}" for verdict in failed))

    note = "Print annotations of GitHub Actions on standard error."
    with_github = take.option("--github", is_flag=True, help=note, section=RUN, advanced=True)(wrapper)
    junit_option = take.file_option("--junit", "junit_file", help="Write the checks as JUnit XML.", section=RUN, advanced=True)
    return junit_option(with_github)


def _report(checks: Sequence[Verdict], path: Path | None, github: bool) -> None:
    if path is not None:
        write_text(path, junit(f"sfp-onnx {click.get_current_context().info_name}", checks))
    for verdict in checks if github else ():
        click.echo(annotation(verdict), err=True)


@take.command(
    "evaluate", take.argument("models", nargs=-1, required=True),
    take.file_option("--data", help=f"Test data: {take.SOURCES}", section=DATA, required=True), DataOptions,
    take.option("--latency/--no-latency", default=True, show_default=True, help="Time the models, interleaved.", section=RUN),
    take.option("--threads", type=click.IntRange(min=0), default=0, help="Threads of onnxruntime (0: all cores).", section=RUN),
    GateOptions, take.report_option, take.json_option, gated,
)  # fmt: skip
def command(models: list[Path], latency: bool, threads: int, report: Path | None, as_json: bool, **options: Any) -> Sequence[Verdict]:
    """Measure models on data; the first is the reference.

    Example: sfp-onnx evaluate model.onnx smaller.onnx --data test.npz
    """
    gate = take.build(GateOptions, options)
    measured = pipeline.compared(models, latency=latency, threads=threads, progress=bar, gate=gate, report=report, **take.reading(options))
    results = measured.evaluations
    answer([asdict(result) for result in results] if as_json else evaluation_text(results))
    if report is not None:
        say(f"report: {report}")
    for name, passed, text in measured.verdicts:
        say(f"{'passed' if passed else 'FAILED'}: {name}: {text}")
    return measured.verdicts
