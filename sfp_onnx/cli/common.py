"""What all commands share: messages, progress, errors with exit codes, help in sections, and a process of their own."""

from __future__ import annotations

import importlib
import json
import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

from ..core.errors import SfpError
from ..core.options import AMOUNT, CHANNELS, DATA, FORMS, LATENCY, OUTPUT, REPAIR, RUN
from ..core.system import command_line, is_full, log, no_room
from ..core.workers import die_with
from . import config

FILE = click.Path(path_type=Path, readable=False)  # what is wrong with a file is said by who reads it
LONGEST = 1200  # characters of an error
INTERRUPTED = 130  # as shells count a program that Ctrl-C ended
EPILOG = "Exit codes: 0 done, 1 internal error, 2 wrong usage, 3 a target or check could not be met, 4 bad model, data or path."
WRITES = {"output", "manifest", "report", "card", "save", "save_ort", "junit_file", "save_library"}  # parameters that name files to write
SECTIONS = (OUTPUT, DATA, AMOUNT, CHANNELS, REPAIR, LATENCY, FORMS, RUN)


# ---- messages --------------------------------------------------------------------------------------------------------


LOUDNESS = "sfp_onnx.loudness"


def verbosity() -> int:
    """How often -v was given, less how often -q was; before the command or behind it."""
    return int(click.get_current_context().meta.get(LOUDNESS, 0))


def _louder(context: click.Context, parameter: click.Parameter, value: int) -> None:
    context.meta[LOUDNESS] = context.meta.get(LOUDNESS, 0) + (value if parameter.name == "verbose" else -value)


def loudness(kind: Callable[..., click.Option]) -> list[click.Option]:
    """The options -v and -q."""
    facts: dict[str, Any] = {"count": True, "is_eager": True, "expose_value": False, "callback": _louder}
    texts = {"verbose": "Say more.", "quiet": "Print only errors (and what --json prints)."}
    return [kind([f"-{name[0]}", f"--{name}"], help=text, **facts) for name, text in texts.items()]


def say(text: str, level: int = 0) -> None:
    """A message for people on standard error (level 1: only with -v)."""
    if verbosity() >= level:
        click.echo(text, err=True)


def answer(result: Any) -> None:
    """A result on standard output: words as they are (not with -q), anything else as JSON."""
    if not isinstance(result, str):
        click.echo(json.dumps(result, indent=1))
    elif verbosity() >= 0:
        click.echo(result)


COLOURS = {True: "green", False: "red", None: "yellow"}


def conclude(text: str, good: bool | None) -> None:
    """The closing sentence on standard output, in colour on a terminal that has not asked for none (https://no-color.org)."""
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    answer(text if plain else click.style(text, fg=COLOURS[good], bold=True))


class _Printer(logging.Handler):
    """What a run says, on standard error; every warning once."""

    def __init__(self) -> None:
        super().__init__()
        self.warned: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        text = record.getMessage()
        if record.levelno < logging.WARNING:
            say(text, 0 if record.levelno >= logging.INFO else 1)
        elif text not in self.warned:
            self.warned.add(text)
            say(f"Warning: {text}")


@contextmanager
def _printed() -> Iterator[None]:
    handler, level, propagate = _Printer(), log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


EVERY = 20.0  # seconds between two words on how far a run is, where no terminal shows it
STAGES = "sfp_onnx.stages"


@dataclass
class _Stage:
    """A part of a run that says how far it is."""

    title: str
    total: int
    done: int = 0

    def advance(self, steps: int, text: str | None = None) -> None:
        """Some more is done."""
        self.done += steps


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[..., None]]:
    """A progress bar on standard error, if that is a terminal; else what `_pulse` says."""
    if sys.stderr.isatty() and verbosity() >= 0:
        with click.progressbar(length=total, label=title, file=sys.stderr, item_show_func=lambda text: text) as shown:
            yield shown.update
        return
    stages, stage = click.get_current_context().meta.setdefault(STAGES, []), _Stage(title, total)
    stages.append(stage)
    try:
        yield stage.advance
    finally:
        stages.remove(stage)


@contextmanager
def _pulse(context: click.Context) -> Iterator[None]:
    """Say every now and then how far the run is, where no terminal shows it (logs of builds)."""
    stages, over, start = context.meta.setdefault(STAGES, []), threading.Event(), time.monotonic()

    def speak() -> None:
        while not over.wait(EVERY):
            where = [f": {stage.title}, {stage.done / max(stage.total, 1):.0%}" for stage in stages[-1:]]
            with suppress(OSError, ValueError):  # nobody listens any more
                click.echo(f"working for {time.monotonic() - start:.0f} s{''.join(where)}", err=True)

    speaker = threading.Thread(target=speak, daemon=True)
    if not sys.stderr.isatty() and verbosity() >= 0:
        speaker.start()
    try:
        yield
    finally:
        over.set()
        if speaker.is_alive():
            speaker.join()


# ---- commands --------------------------------------------------------------------------------------------------------


class Option(click.Option):
    """An option of a section of the help; ``advanced`` ones are shown by --help-all only; ``example``: a value that always works."""

    def __init__(self, *declarations: Any, section: str = RUN, advanced: bool = False, example: str = "", **facts: Any) -> None:
        super().__init__(*declarations, **facts)
        self.section, self.advanced, self.example = section, advanced, example


def _show_all(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        context.meta["sfp_onnx.help_all"] = True
        click.echo(context.get_help(), color=context.color)
        context.exit()


class Command(click.Command):
    """A command whose help comes in sections, that takes --config, and whose errors are messages with exit codes."""

    def __init__(self, *arguments: Any, **facts: Any) -> None:
        super().__init__(*arguments, **{"epilog": EPILOG, **facts})
        if self.name not in ("init", "doctor"):
            text = "Options from a TOML file (`sfp-onnx init` writes one); flags win.  [default: sfp.toml, where there is one]"
            self.params.append(Option(["--config"], type=FILE, is_eager=True, expose_value=False, callback=config.take, help=text))
        self.params += loudness(partial(Option, advanced=True))
        if any(getattr(parameter, "advanced", False) for parameter in self.params):
            text = "Show all options and exit."
            self.params.append(Option(["--help-all"], is_flag=True, is_eager=True, expose_value=False, callback=_show_all, help=text))

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Options by section, those of beginners first; the advanced ones only if asked for."""
        everything = context.meta.get("sfp_onnx.help_all", False)
        rows: dict[str, list[tuple[str, str]]] = {section: [] for section in SECTIONS}
        for parameter in self.get_params(context):
            record = parameter.get_help_record(context) if isinstance(parameter, click.Option) else None
            if record is not None and (everything or not getattr(parameter, "advanced", False)):
                rows[getattr(parameter, "section", RUN)].append(record)
        for section, records in rows.items():
            if records:
                with formatter.section(section if len(rows) > 1 else "Options"):
                    formatter.write_dl(records)

    def invoke(self, context: click.Context) -> Any:
        """Run the command; errors become a message and an exit code, a traceback only internal errors with -v."""
        try:
            with _printed(), _pulse(context):
                _keep_apart(context)
                return super().invoke(context)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except BaseException as error:
            if isinstance(error, SfpError):
                text, code = f"Error: {_bounded(str(error))}", error.exit_code
            elif is_full(error):
                text, code = f"Error: {no_room('temporary files', error)}", 4
            elif isinstance(error, MemoryError):
                detail = f" ({error})" if str(error) else ""
                text, code = f"Error: not enough memory{detail}. Are the sizes in the model and the data what you expect?", 4
            elif _interrupted(error):
                text, code = "Interrupted; nothing was written that is not whole.", INTERRUPTED
            elif verbosity() > 0 or not isinstance(error, Exception):
                raise
            else:
                name = type(error).__name__
                text, code = f"Internal error: {name}: {error}. Run again with -v for the traceback, and report it.", 1
            click.echo(text, err=True)
            raise click.exceptions.Exit(code) from error


def _keep_apart(context: click.Context) -> None:
    """Refuse to write over anything else that the command names, and over its configuration."""
    from ..graph.save import check_output

    named = [(item.name, context.params.get(str(item.name))) for item in context.command.params if isinstance(item.type, click.Path)]
    several = [(name, value if isinstance(value, (tuple, list)) else [value]) for name, value in named]
    paths = [(name, Path(path)) for name, values in several for path in values if path is not None]
    for name, path in paths:
        if name in WRITES:
            check_output(path, [*context.meta.get(config.FOUND, ()), *(other for key, other in paths if key != name)])


def _interrupted(error: BaseException | None) -> bool:
    """Whether an error is Ctrl-C, or came of it (an import that was interrupted raises ImportError)."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _bounded(text: str) -> str:
    """A message of bearable length: names in damaged files can be anything."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST * 3 // 4]} [...] {text[-LONGEST // 4 :]}"


class Program(click.Group):
    """The commands, each loaded when it is used; remembers what was typed."""

    texts: dict[str, str]

    def make_context(self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any) -> click.Context:
        """As click does, with the words of the command line kept for reports."""
        command_line.set(shlex.join(["sfp-onnx", *args]))
        return super().make_context(info_name, args, parent, **extra)

    def list_commands(self, context: click.Context | None = None) -> list[str]:
        """Names, in the order in which one needs them."""
        return list(self.texts)

    def get_command(self, context: click.Context | None, name: str) -> click.Command | None:
        """A command, loaded."""
        if name in self.commands or name not in self.texts:
            return self.commands.get(name)
        command: click.Command = importlib.import_module(f".{name}", __package__).command
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """All commands with what they do, without loading them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(self.texts.items()))


# ---- a process of its own --------------------------------------------------------------------------------------------
# If onnxruntime brings that down, as it can with damaged models, there is still an error. The process is made by fork, before onnxruntime
# is loaded: that starts threads, which do not survive it (see `runtime`).

CRASHES = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL")
PATIENCE = 0.5  # seconds in which a child that got Ctrl-C itself may end
EXIT_CODE = 4


def guarded_run(run: Callable[[], None]) -> None:
    """Call ``run`` in a child process and end as it ended; a crash becomes a message and exit code 4. Without fork: just call it."""
    if not hasattr(os, "fork"):
        run()
        return
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        die_with(parent)
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
        text = f"Error: onnxruntime or onnx crashed ({what}). The model or the data are damaged, or this is a bug there; "
        click.echo(text + "`python -X faulthandler -m sfp_onnx ...` shows where. Nothing was written that is not whole.", err=True)
        sys.exit(EXIT_CODE)
    signal.signal(number, signal.SIG_DFL) if number is not signal.SIGKILL else None
    os.kill(parent, number)


def _pass_on(child: int, number: int) -> None:
    """A signal for both: Ctrl-C reaches the child by itself, unless it was sent to the parent alone."""
    if number == signal.SIGINT:
        time.sleep(PATIENCE)
    with suppress(ProcessLookupError):  # one that has ended and is not yet waited for keeps its number, and heeds no signal
        os.kill(child, number)
