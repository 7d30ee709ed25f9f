"""sweep: many targets from one calibration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from ..core.errors import OptionError, SfpError
from ..core.options import AMOUNT, DataOptions, InspectOptions, MeasureOptions, PlanOptions, RepairOptions
from ..core.workers import cluster
from ..pipeline.swept import sweep
from ..report.manifest import write_json
from ..report.points import joined, points_of
from ..report.text import points_text
from . import arguments as take
from .common import answer, bar, say

PLANNED = {field.name for field in fields(PlanOptions)}
SWEPT = take.READING | take.TRACING | take.MEANING | PLANNED | {"test_data", "score", "fit"}  # what `prune` takes, too


@take.command(
    "sweep", take.argument("model", nargs=-1, required=True),
    take.option("--targets", "sweeps", multiple=True, metavar="macs=90%:20%:10%", help="First:last:step. Repeatable.",
                section=AMOUNT),
    take.file_option("-o", "--output", help="Where the JSON goes."),
    take.file_option("--save-dir", "folder", help="Folder (made if missing) for the models and their manifests."), take.report_option,
    take.option("--workers", type=click.IntRange(1), metavar="N", help="Work on N targets at once, in processes that share the cores."),
    take.option("--dask", metavar="ADDRESS", help="Work on the targets with the workers of this Dask scheduler (extra `dask`)."),
    take.option("--part", metavar="I/N", help="Only every Nth target, from the Ith on; join the N files that -o writes with --join."),
    take.option("--join", is_flag=True, help="Join the JSON of all parts, which are given in place of the model."),
    take.data_option, take.test_option, take.score_option, PlanOptions, DataOptions, MeasureOptions, InspectOptions, RepairOptions,
    take.json_option, skip=("max_drop", "confidence", "ratio"))  # fmt: skip
def command(
    model: tuple[Path, ...], sweeps: tuple[str, ...], output: Path | None, folder: Path | None, report: Path | None, join: bool,
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Plan for many targets with one calibration; show accuracy, size and latency of each. Several models are swept one after the other.

    Without --test-data a third of --data is held out to judge on.

    Example: sfp-onnx sweep model.onnx --data calibration.npz --targets macs=90%:20%:10%
    """
    failed: list[SfpError] = []
    if join:
        swept: list[Mapping[str, Any]] = [joined(model)]
    elif not sweeps:
        raise OptionError("sweep needs --targets, for example --targets macs=90%:20%:10%")
    elif len(model) == 1:
        swept = [_swept(model[0], sweeps, options, output=output, folder=folder, report=report)]
    else:
        _check_several(model, folder, report, options["part"])
        swept = list(_each(model, sweeps, options, folder, failed))
    data = swept[0] if len(model) == 1 or join else {"format": "sfp_onnx sweeps", "version": 1, "sweeps": swept}
    if output is not None and (join or len(model) > 1):
        write_json(output, data, model)
    for one in swept:
        if len(model) > 1 and not join and not as_json:
            answer(one["model"]["path"])
        _told(one, as_json)
    if as_json:
        answer(data)
    if report is not None and not join:
        say(f"report: {report}")
    if len(model) == 1 and not join and not as_json:
        _next(model[0], swept[0])
    if failed:
        raise failed[0]


def _swept(model: Path, sweeps: Sequence[str], options: Mapping[str, Any], **places: Path | None) -> Mapping[str, Any]:
    if options["dask"] is not None and options["workers"] is not None:
        raise OptionError("--workers are processes of this machine, --dask those of a cluster: give one of them")
    with nullcontext(options["workers"]) if options["dask"] is None else cluster(options["dask"]) as executor:
        return sweep(
            model, sweeps, take.build(PlanOptions, options), progress=bar, executor=executor, part=options["part"],
            **places, **take.scoring(options), **take.reading(options)).data  # type: ignore[arg-type]  # fmt: skip


def _each(
    models: Sequence[Path], sweeps: Sequence[str], options: Mapping[str, Any], folder: Path | None, failed: list[SfpError]
) -> Iterator[Mapping[str, Any]]:  # fmt: skip
    """The sweeps of several models; what fails is there with its reason, and the others go on."""
    for number, model in enumerate(models, 1):
        say(f"{model} ({number} of {len(models)})")
        try:
            yield _swept(model, sweeps, options, folder=folder)
        except OptionError:  # that of all
            raise
        except SfpError as error:
            failed.append(error)
            yield {"model": {"path": str(model)}, "failure": str(error), "points": []}


def _check_several(models: Sequence[Path], folder: Path | None, report: Path | None, part: str | None) -> None:
    for option, value in (("--report", report), ("--part", part)):
        if value is not None:
            raise OptionError(f"{option} is for one model; {len(models)} were given")
    if folder is not None and len({model.stem for model in models}) < len(models):
        raise OptionError("--save-dir: two of the models have the same name, and so would the results. Sweep each into its own folder.")


def _told(data: Mapping[str, Any], as_json: bool) -> None:
    """A sweep as a table, and why what failed did."""
    points = points_of(data)
    if not as_json and points:
        answer(points_text(points))
    for point in points:
        if point.failure:
            say(f"{point.target}: {point.failure}")
    if data.get("failure"):
        say(f"failed: {data['failure']}")


def _next(model: Path, data: Mapping[str, Any]) -> None:
    """Say how to get the model of the smallest point that was reached."""
    reached = [point.target for point in points_of(data)[1:] if not point.failure]
    if reached:
        words = (model, "-o", f"{model.stem}-pruned.onnx", "--target", reached[-1])
        take.following("prune", *words, names=SWEPT, missing="--data FOLDER_OR_NPZ")
