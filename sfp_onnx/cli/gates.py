"""What a build pipeline reads: checks as JUnit XML and as annotations of GitHub Actions, and exit code 3 if one failed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar
from xml.sax.saxutils import escape, quoteattr

import click

from ..core.errors import SfpError, TargetError
from ..core.options import RUN
from ..graph.save import check_output, write_text
from .common import FILE, Option

F = TypeVar("F", bound=Callable[..., Any])
CHECKS = "sfp_onnx.checks"


@dataclass(frozen=True)
class Check:
    """One thing that was checked; ``text`` says what was expected and found."""

    name: str
    passed: bool
    text: str


def check(name: str, passed: bool, text: str) -> None:
    """Note a check of the running command."""
    click.get_current_context().meta.setdefault(CHECKS, []).append(Check(name, passed, text))


def junit(suite: str, checks: Sequence[Check]) -> str:
    """Checks as JUnit XML."""
    failed = sum(not own.passed for own in checks)
    head = f"name={quoteattr(suite)} tests={quoteattr(str(len(checks)))} failures={quoteattr(str(failed))}"
    lines = ['<?xml version="1.0" encoding="UTF-8"?>', f"<testsuites><testsuite {head}>"]
    for own in checks:
        text = "".join(letter for letter in own.text if letter.isprintable() or letter in "\n\t")
        inner = f"<system-out>{escape(text)}</system-out>" if own.passed else f"<failure message={quoteattr(text)}/>"
        lines.append(f"<testcase classname={quoteattr(suite)} name={quoteattr(own.name)}>{inner}</testcase>")
    return "\n".join([*lines, "</testsuite></testsuites>"]) + "\n"


def annotation(own: Check) -> str:
    """A workflow command of GitHub Actions."""

    def encoded(text: str, more: bool = False) -> str:
        text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
        return text.replace(":", "%3A").replace(",", "%2C") if more else text

    return f"::{'notice' if own.passed else 'error'} title={encoded('sfp-onnx ' + own.name, True)}::{encoded(own.text)}"


def gated(function: F) -> F:
    """Give a command --junit and --github, and end it with exit code 3 if one of its checks failed."""

    @wraps(function)
    def wrapper(*args: Any, junit_file: Path | None, github: bool, **kwargs: Any) -> Any:
        if junit_file is not None:
            check_output(junit_file)
        checks: list[Check] = click.get_current_context().meta.setdefault(CHECKS, [])
        try:
            result = function(*args, **kwargs)
        except SfpError as error:
            checks.append(Check(type(error).__name__.removesuffix("Error").lower(), False, str(error)))
            _report(checks, junit_file, github)
            raise
        _report(checks or [Check("done", True, "all checks passed")], junit_file, github)
        failed = [own for own in checks if not own.passed]
        if failed:
            raise TargetError("; ".join(f"{own.name}: {own.text}" for own in failed))
        return result

    options = (
        click.option("--junit", "junit_file", type=FILE, help="Write the checks as JUnit XML.", cls=Option, section=RUN, advanced=True),
        click.option(
            "--github", is_flag=True, help="Print annotations of GitHub Actions on standard error.", cls=Option, section=RUN, advanced=True
        ),
    )
    for option in reversed(options):
        wrapper = option(wrapper)
    return wrapper  # type: ignore[return-value]


def _report(checks: Sequence[Check], path: Path | None, github: bool) -> None:
    if path is not None:
        write_text(path, junit(f"sfp-onnx {click.get_current_context().info_name}", checks))
    for own in checks if github else ():
        click.echo(annotation(own), err=True)
