"""plan: decide which channels leave."""

from __future__ import annotations

from collections.abc import Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import click

from ..core.errors import OptionError
from ..core.options import DATA, RUN, DataOptions, InspectOptions, MeasureOptions, PlanOptions, RepairOptions
from ..pipeline import planned, scored
from ..planning import to_json
from ..report.text import figures_text, plan_text
from . import arguments as take
from .common import answer, bar, say
from .config import settle


@take.command(
    "plan", take.model_argument, take.argument("more", nargs=-1), take.file_option("-o", "--output", help="Where the plan (JSON) goes."),
    take.data_option, take.score_option, PlanOptions, take.eval_option, DataOptions, MeasureOptions, InspectOptions, RepairOptions,
    take.option("--part", metavar="I/N", section=RUN, advanced=True, help="Only measure a part of --data, into the file of --statistics."),
    take.file_option("--statistics", section=DATA, advanced=True, help="Plan from what --part measured: the files of all parts."),
    take.option("--workers", type=click.IntRange(1), metavar="N", section=RUN, advanced=True, help="Measure --data in N processes."),
    take.json_option)  # fmt: skip
def command(
    model: Path, more: Sequence[Path], output: Path | None, part: str | None, statistics: Path | None, workers: int | None, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Decide which channels leave; cut nothing.

    Example: sfp-onnx plan model.onnx -o plan.json --target macs=50%
    """
    settle(options)
    asked = take.build(PlanOptions, options)
    files = _files([*([statistics] if statistics else []), *more])
    if more and statistics is None:
        raise OptionError(f"unexpected '{more[0]}': several files follow only --statistics, the parts of the data")
    if part is not None:
        if len(files) != 1:
            raise OptionError("--part needs --statistics FILE: where what it measures goes")
        scored.calibrate(model, files[0], part, progress=bar, options=asked, **take.scoring(options), **take.reading(options))
        say(f"wrote {files[0]}. Next, with those of all parts: sfp-onnx plan {take.quoted(model)} --statistics ... -o plan.json")
        return
    if output is None:
        raise OptionError("-o says where the plan goes, for example -o plan.json")
    plan = planned.plan(
        model, asked, progress=bar, output=output, statistics=files, executor=workers, **take.scoring(options), **take.reading(options)
    )
    answer(to_json(plan) if as_json else plan_text(plan))
    if plan.figures and not as_json:
        answer(figures_text(plan))
    take.following("apply", model, output, "-o", f"{model.stem}-pruned.onnx", names=take.READING)


def _files(named: Sequence[Path]) -> list[Path]:
    """Files, also where no shell has put them in the place of a pattern."""
    return [Path(file) for name in map(str, named) for file in (sorted(glob(name)) if has_magic(name) else []) or [name]]
