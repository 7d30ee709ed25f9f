"""Options that several commands take."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..bandits import BANDIT_SCORES
from ..records import PlanOptions
from ..scores import SCORES
from .common import F

FILE = click.Path(path_type=Path, readable=False)  # what is wrong with a file is said by who reads it


def _floats(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    if value is None:
        return None
    try:
        return tuple(float(item) for item in re.split(r"[,\s]+", value.strip("[]() ")))
    except ValueError as error:
        raise click.BadParameter(f"'{value}': expected numbers separated by commas, such as 0.485,0.456,0.406") from error


def _shapes(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, list[int]]:
    shapes = {}
    for value in values:
        match = re.fullmatch(r"(.+)[=:]([0-9]+(?:[,x][0-9]+)*)", value)
        if match is None:
            raise click.BadParameter(f"'{value}': expected NAME=1,3,224,224")
        shapes[match[1]] = [int(item) for item in re.split("[,x]", match[2])]
    return shapes


def _align(context: click.Context, parameter: click.Parameter, value: str) -> int | None:
    if value == "none":
        return None
    if not value.isdigit() or int(value) < 1:
        raise click.BadParameter(f"'{value}': expected a positive number or 'none'")
    return int(value)


def _stack(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


model_argument = click.argument("model", type=FILE)
shape_option = click.option(
    "--input-shape", "input_shapes", multiple=True, callback=_shapes, metavar="NAME=1,3,224,224",
    help="Concrete shape to trace an input with; needed only where dynamic dimensions cannot be guessed.",
)  # fmt: skip
layernorm_option = click.option(
    "--cut-layernorm", is_flag=True, help="Let axes under LayerNormalization shrink; it is rewritten exactly, and runs slower."
)
preprocessing_options = _stack(
    click.option("--labels", type=FILE, help="Labels (.npy or .npz), if they are not in the data."),
    click.option("--mean", callback=_floats, metavar="M1,M2,..", help="Subtracted per channel, after --scale."),
    click.option("--std", callback=_floats, metavar="S1,S2,..", help="Divided by per channel, after --mean."),
    click.option("--scale", type=click.FloatRange(min=0, min_open=True), help="Value range of the raw data: 255 for 8-bit images."),
    click.option("--layout", type=click.Choice(["nchw", "nhwc"]), default="nchw", show_default=True, help="Layout of the data."),
    click.option("--samples", type=click.IntRange(min=1), help="Use only so many samples, drawn with --seed."),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of everything random."),
)
plan_options = _stack(
    click.option("--score", type=click.Choice([*sorted(SCORES), *BANDIT_SCORES]),
                 help="Importance of a channel.  [default: contribution with data, else magnitude]"),
    click.option("--p", type=click.IntRange(1, 2), default=2, show_default=True, help="Norm of the magnitude score."),
    click.option("--ratio", type=click.FloatRange(0, 1, max_open=True), help="Remove this fraction of every prunable group."),
    click.option("--target", "targets", multiple=True, metavar="macs=50%",
                 help="Upper bound on the result: macs=50%, params=50%, macs=40M. Repeatable."),
    click.option("--allocation", type=click.Choice(["uniform", "global"]), default="uniform", show_default=True,
                 help="The same share of every group, or one ranking over all groups."),
    click.option("--keep", metavar="REGEX", help="Layers (node or weight names) that keep all their output channels."),
    click.option("--only", metavar="REGEX", help="Shrink only groups that are made by matching layers alone."),
    click.option("--min-channels", type=click.IntRange(min=1), default=1, show_default=True, help="Keep at least so many per group."),
    click.option("--align", callback=_align, default="none", show_default=True, metavar="N|none", help="Kept widths are multiples of N."),
)  # fmt: skip


def chosen_plan(options: dict[str, Any]) -> PlanOptions:
    """The options of the plan, of which exactly one says how much leaves."""
    if (options["ratio"] is None) == (not options["targets"]):
        raise click.UsageError("Give either --ratio or --target, for example --ratio 0.5 or --target macs=50%.")
    names = ("ratio", "targets", "allocation", "keep", "only", "min_channels", "align")
    return PlanOptions(**{name: options[name] for name in names})


verify_option = click.option(
    "--verify/--no-verify", default=True, show_default=True, help="Compare with the masked original before writing."
)
external_option = click.option(
    "--external-data/--single-file", "external", default=None, help="Weights in OUT.data, or in one file.  [default: one file up to 2 GB]"
)
output_option = click.option("-o", "--output", type=FILE, required=True, help="Where the pruned model goes.")
manifest_option = click.option(
    "--manifest", type=FILE, help="Write versions, hashes, options, plan and cuts as JSON."
)
