"""What a build pipeline reads: checks as JUnit XML and as annotations of GitHub Actions, and exit code 3 if one failed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar
from xml.sax.saxutils import escape, quoteattr

import click

from ..core.errors import SfpError, TargetError
from ..core.options import RUN
from ..evaluation import Verdict
from ..graph.save import check_output, write_text
from .common import FILE, Option

F = TypeVar("F", bound=Callable[..., Any])


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

    def encoded(text: str, more: bool = False) -> str:
        text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
        return text.replace(":", "%3A").replace(",", "%2C") if more else text

    return f"::{'notice' if verdict.passed else 'error'} title={encoded('sfp-onnx ' + verdict.name, True)}::{encoded(verdict.text)}"


def gated(function: F) -> F:
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

    options = (
        click.option("--junit", "junit_file", type=FILE, help="Write the checks as JUnit XML.", cls=Option, section=RUN, advanced=True),
        click.option(
            "--github", is_flag=True, help="Print annotations of GitHub Actions on standard error.", cls=Option, section=RUN, advanced=True
        ),
    )
    for option in reversed(options):
        wrapper = option(wrapper)
    return wrapper  # type: ignore[return-value]


def _report(checks: Sequence[Verdict], path: Path | None, github: bool) -> None:
    if path is not None:
        write_text(path, junit(f"sfp-onnx {click.get_current_context().info_name}", checks))
    for verdict in checks if github else ():
        click.echo(annotation(verdict), err=True)
