"""What all commands share: messages, progress, errors with exit codes, data and checks of paths."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from .. import graph, pipeline
from ..data import Dataset
from ..errors import OptionError, SfpError
from .data_options import given, preprocessing

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


def dataset(model: graph.Model, path: Path | None, options: dict[str, Any]) -> Dataset | None:
    """The data that the options describe; None without a path. Says what looks like a mistake of model or data."""
    for text in pipeline.training_mode(model):
        warn(text)
    if path is None:
        if given(options) or options["labels"] is not None or options["samples"] is not None:
            raise OptionError("--labels, --preset, --mean, --std, --scale, --resize, --center-crop, --color and --samples need --data")
        return None
    steps, notes = preprocessing(model, path, options)
    data = pipeline.data_for(
        model, path, preprocessing=steps, labels=options["labels"], samples=options["samples"], seed=options["seed"]
    )
    assert data is not None
    for note in (*notes, *data.notes):
        say(f"{data.name}: {note}")
    for text in pipeline.wrong_reading(model, data):
        warn(text)
    say(f"{data.name}: {data.samples} samples, labels {'given' if data.labels is not None else 'none'}", 1)
    return data


def check_outputs(inputs: Sequence[Path | None], *outputs: Path | None) -> None:
    """Refuse outputs that cannot be written, or are inputs or each other, before any work."""
    taken = [path for path in inputs if path is not None]
    for output in outputs:
        if output is not None:
            graph.check_output(output, taken)
            taken.append(output)
