"""--report: one HTML file about a run."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from .. import html, pipeline
from ..data import Dataset
from ..records import Evaluation
from ..runtime import Setup
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


def page_of_prune(
    result: pipeline.Pruned, scored: pipeline.Candidates, packaged: pipeline.Packaged | None,
    data: tuple[Dataset | None, Dataset | None], measured: list[Evaluation] | None, setup: tuple[Setup, int],
) -> html.Page:  # fmt: skip
    """The report of a pruned model. ``data`` are those for calibration and those held out; without the latter the former are measured.
    ``setup`` is how layers are timed: threads and provider, and the batch size."""
    seen, judge = data
    used = judge or seen
    if not measured and used is not None:
        measured = pipeline.evaluate([result.original, result.model], used, progress=bar)
    scored = with_examples(scored, seen)
    times = pipeline.layer_times(scored.analysis, result.model, *setup, bar)
    context = pipeline.Context(typed(), used, judge is not None, packaged, times)
    return pipeline.prune_page(result, scored, measured or (), context)


def with_examples(scored: pipeline.Candidates, data: Dataset | None) -> pipeline.Candidates:
    """With filters that show what class profiles say, if the score has not brought any."""
    return scored if scored.examples else replace(scored, examples=pipeline.few_examples(scored.analysis, data, progress=bar))


def write(path: Path, page: html.Page, inputs: list[Path]) -> None:
    """Write a page and say so."""
    pipeline.write_page(path, page, inputs)
    say(f"report: {path}")
