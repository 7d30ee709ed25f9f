"""--report: one HTML file about a run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from .. import graph, html, pipeline
from ..data import Dataset
from ..records import Evaluation
from .common import bar, say
from .options import FILE

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
        html.require()


def report_prune(
    path: Path, result: pipeline.Pruned, scored: pipeline.Candidates, output: Path, data: tuple[Dataset | None, Dataset | None],
    measured: list[Evaluation] | None,
) -> None:  # fmt: skip
    """The report of a pruned model. ``data`` are those for calibration and those held out; without the latter the former are measured."""
    seen, judge = data
    used = judge or seen
    if not measured and used is not None:
        measured = pipeline.evaluate([result.original, result.model], used, progress=bar)
    sizes = (graph.file_bytes(result.original), graph.file_bytes(pipeline.load(output)))
    context = pipeline.Context(typed(), used, judge is not None)
    write(path, pipeline.prune_page(result, scored, sizes, measured or (), context), [*result.original.paths, output])


def write(path: Path, page: html.Page, inputs: list[Path]) -> None:
    """Write a page and say so."""
    pipeline.write_page(path, page, inputs)
    say(f"report: {path}")
