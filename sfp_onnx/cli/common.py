"""Options that several commands take."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar
from xml.sax.saxutils import escape, quoteattr

import click

from ..core.errors import SfpError, TargetError
from ..core.types import Evaluation
from ..data.dataset import Dataset
from ..evaluation import evaluate
from ..export import Packaged
from ..graph.save import check_output, write_text
from ..latency.profiling import layer_times
from ..methods.sfp import few_examples
from ..planning.search import Candidates
from ..report.charts import Page, require
from ..report.manifest import Pruned
from ..report.page import Context, prune_page, write_page
from ..runtime import Setup

FILE = click.Path(path_type=Path, readable=False)  # what is wrong with a file is said by who reads it


# ---- what all commands share -----------------------------------------------------------------------------------------

F = TypeVar("F", bound=Callable[..., Any])
LONGEST = 1200  # characters of an error
INTERRUPTED = 130  # as shells count a program that Ctrl-C ended
EPILOG = "Exit codes: 0 done, 1 internal error, 2 wrong usage, 3 a target or check could not be met, 4 bad model, data or path."


def _verbosity() -> int:
    context = click.get_current_context()
    return int(context.find_root().params.get("verbose", 0)) - int(context.find_root().params.get("quiet", 0))


def say(text: str, level: int = 0) -> None:
    """A message for people on standard error (level 1: only with -v)."""
    if _verbosity() >= level:
        click.echo(text, err=True)


def warn(text: str) -> None:
    """A warning on standard error, once per command."""
    said = click.get_current_context().meta.setdefault("sfp_onnx.warnings", set())
    if text not in said:
        said.add(text)
        say(f"Warning: {text}")


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[..., None]]:
    """A progress bar on standard error, if that is a terminal."""
    if not sys.stderr.isatty() or _verbosity() < 0:
        yield lambda steps, text=None: None
        return
    with click.progressbar(length=total, label=title, file=sys.stderr, item_show_func=lambda text: text) as shown:
        yield shown.update


def _bounded(text: str) -> str:
    """A message of bearable length: names in damaged files can be anything."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST * 3 // 4]} [...] {text[-LONGEST // 4 :]}"


def guarded(function: F) -> F:
    """Turn errors into a message and an exit code; a traceback only for internal errors with -v."""

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except SfpError as error:
            click.echo(f"Error: {_bounded(str(error))}", err=True)
            raise click.exceptions.Exit(error.exit_code) from error
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt as error:
            click.echo("Interrupted; nothing was written that is not whole.", err=True)
            raise click.exceptions.Exit(INTERRUPTED) from error
        except MemoryError as error:
            said = f" ({error})" if str(error) else ""
            click.echo(f"Error: not enough memory{said}. Are the sizes in the model and the data what you expect?", err=True)
            raise click.exceptions.Exit(4) from error
        except Exception as error:
            if _verbosity() > 0:
                raise
            click.echo(f"Internal error: {type(error).__name__}: {error}. Run again with -v for the traceback, and report it.", err=True)
            raise click.exceptions.Exit(1) from error

    return wrapper  # type: ignore[return-value]


# ---- what a build pipeline reads -------------------------------------------------------------------------------------

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
        click.option("--junit", "junit_file", type=click.Path(path_type=Path), help="Write the checks as JUnit XML."),
        click.option("--github", is_flag=True, help="Print annotations of GitHub Actions on standard error."),
    )
    for option in reversed(options):
        wrapper = option(wrapper)
    return wrapper  # type: ignore[return-value]


def _report(checks: Sequence[Check], path: Path | None, github: bool) -> None:
    if path is not None:
        write_text(path, junit(f"sfp-onnx {click.get_current_context().info_name}", checks))
    for own in checks if github else ():
        click.echo(annotation(own), err=True)


# ---- the command line in a process of its own ------------------------------------------------------------------------

CRASHES = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL")
PATIENCE = 0.5  # seconds in which a child that got Ctrl-C itself may end
PR_SET_PDEATHSIG = 1
EXIT_CODE = 4


def guarded_run(run: Callable[[], None]) -> None:
    """Call ``run`` in a child process and end as it ended; a crash becomes a message and exit code 4. Without fork: just call it."""
    if not hasattr(os, "fork"):
        run()
        return
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        _die_with(parent)
        run()
        return
    for name in ("SIGTERM", "SIGHUP", "SIGINT"):
        signal.signal(getattr(signal, name), lambda number, frame: _pass_on(child, number))
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        sys.exit(os.WEXITSTATUS(status))
    number = signal.Signals(os.WTERMSIG(status))
    if number.name in CRASHES:
        what = (signal.strsignal(number) or number.name).lower()
        print(
            f"Error: onnxruntime or onnx crashed ({what}). The model or the data are damaged, or this is a bug there; "
            "`python -X faulthandler -m sfp_onnx ...` shows where. Nothing was written that is not whole.",
            file=sys.stderr,
        )
        sys.exit(EXIT_CODE)
    signal.signal(number, signal.SIG_DFL) if number is not signal.SIGKILL else None
    os.kill(parent, number)


def _die_with(parent: int) -> None:
    """End when the parent does, however that ends (Linux)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(EXIT_CODE)


def _pass_on(child: int, number: int) -> None:
    """A signal for both: Ctrl-C reaches the child by itself, unless it was sent to the parent alone."""
    if number == signal.SIGINT:
        time.sleep(PATIENCE)
    with suppress(ProcessLookupError, ChildProcessError):
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            os.kill(child, number)


# ---- --report --------------------------------------------------------------------------------------------------------

KEY = "sfp_onnx.command"
report_option = click.option("--report", "report_to", type=FILE, help="Write one HTML file with charts about the run (extra `report`).")


class Recorded(click.Group):
    """A group of commands that remembers what was typed."""

    def make_context(self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any) -> click.Context:
        """As click does, with the words of the command line kept in the context's ``meta``."""
        given = list(args)
        context = super().make_context(info_name, args, parent, **extra)
        context.meta[KEY] = given
        return context


def typed() -> str:
    """The command line as it was typed."""
    return shlex.join(["sfp-onnx", *click.get_current_context().meta.get(KEY, ())])


def check_report(path: Path | None) -> None:
    """Refuse, before any work, a report that cannot be made.

    Raises:
        OptionError: the extra is not installed.
    """
    if path is not None:
        require()


def page_of_prune(
    result: Pruned, scored: Candidates, packaged: Packaged | None,
    data: tuple[Dataset | None, Dataset | None], measured: list[Evaluation] | None, setup: tuple[Setup, int],
) -> Page:  # fmt: skip
    """The report of a pruned model. ``data`` are those for calibration and those held out; without the latter the former are measured.
    ``setup`` is how layers are timed: threads and provider, and the batch size."""
    seen, judge = data
    used = judge or seen
    if not measured and used is not None:
        measured = evaluate([result.original, result.model], used, progress=bar)
    scored = with_examples(scored, seen)
    times = layer_times(scored.analysis, result.model, *setup, bar)
    context = Context(typed(), used, judge is not None, packaged, times)
    return prune_page(result, scored, measured or (), context)


def with_examples(scored: Candidates, data: Dataset | None) -> Candidates:
    """With filters that show what class profiles say, if the score has not brought any."""
    return scored if scored.examples else replace(scored, examples=few_examples(scored.analysis, data, progress=bar))


def write(path: Path, page: Page, inputs: list[Path]) -> None:
    """Write a page and say so."""
    write_page(path, page, inputs)
    say(f"report: {path}")
