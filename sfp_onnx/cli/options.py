"""Options that several commands take."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..bandits import BANDIT_SCORES
from ..confidence import parse_confidence
from ..errors import OptionError
from ..metrics import parse_drop
from ..pipeline import REPAIRS
from ..plan import grid_of
from ..records import PlanOptions, RepairOptions
from ..scores import SCORES, parts
from ..sfp import PROBES
from ..targets import parse_target
from .bandit_options import bandit_options
from .common import F
from .config import settle
from .data_options import data_options
from .quantities import byte_size

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


def _score(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value in BANDIT_SCORES:
        return value
    try:
        return None if value is None else "+".join(own.name for own in parts(value))
    except OptionError as error:
        raise click.BadParameter(str(error)) from error


def _align(context: click.Context, parameter: click.Parameter, value: str) -> int | str | None:
    if value in ("none", "auto", "default"):
        return None if value == "none" else value
    try:
        grid_of(value)
    except OptionError as error:
        raise click.BadParameter(str(error)) from error
    return int(value) if value.isdigit() else value


def _confidence(context: click.Context, parameter: click.Parameter, value: str) -> float:
    found = parse_confidence(str(value))
    if found is None:
        raise click.BadParameter(f"'{value}': expected from 50% to below 100%")
    return found


def _stack(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


DATA = "images in a folder (class sub-folders are labels), .npz, .npy, test_data_set_* folders, or module:function that yields batches."
model_argument = click.argument("model", type=FILE)
shape_option = click.option(
    "--input-shape", "input_shapes", multiple=True, callback=_shapes, metavar="NAME=1,3,224,224",
    help="Concrete shape to trace an input with; needed only where dynamic dimensions cannot be guessed.",
)  # fmt: skip
layernorm_option = click.option(
    "--cut-layernorm", is_flag=True, help="Let axes under LayerNormalization shrink; it is rewritten exactly, and runs slower."
)
preprocessing_options = _stack(
    click.option("--labels", type=FILE, help="Labels, if they are not in the data: .npy, .npz, or for images .csv of filename,label."),
    click.option("--mean", callback=_floats, metavar="M1,M2,..", help="Subtracted per channel, after --scale."),
    click.option("--std", callback=_floats, metavar="S1,S2,..", help="Divided by per channel, after --mean."),
    click.option("--scale", type=click.FloatRange(min=0, min_open=True), help="Value range of the raw data: 255 for 8-bit images."),
    click.option("--layout", type=click.Choice(["nchw", "nhwc"]), default="nchw", show_default=True, help="Layout of the data."),
    data_options,
    click.option("--samples", type=click.IntRange(min=1), help="Use only so many samples, drawn with --seed."),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of everything random."),
)
machine_options = _stack(
    click.option("--threads", type=click.IntRange(min=0), default=0, show_default=True, help="Threads of onnxruntime (0: all cores)."),
    click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Batch size to time with."),
    click.option("--provider", default="cpu", show_default=True, help="Execution provider of onnxruntime."),
    click.option("--profile-budget", type=click.FloatRange(min=1), default=60.0, show_default=True, metavar="SECONDS",
                 help="Wall time for timing layers; where it does not suffice, fewer widths are timed."),
)  # fmt: skip
profile_options = _stack(
    click.option("--probe", type=click.Choice(list(PROBES)), default="sgd", show_default=True, help="How class profiles are learned."),
    click.option("--pool", type=click.IntRange(min=1), default=4, show_default=True, help="Side to which class profiles pool maps."),
)
score_options = _stack(
    click.option("--score", callback=_score, metavar="NAME[+NAME..]",
                 help="Importance of a channel: " + ", ".join(sorted(SCORES)) + "; joined by '+': their ranks, averaged; or "
                 + ", ".join(BANDIT_SCORES) + ".  "
                 "[default: obs where a repair follows, contribution with data, else magnitude]"),
    click.option("--p", type=click.IntRange(1, 2), default=2, show_default=True, help="Norm of the magnitude score."),
    profile_options,
    bandit_options,
)  # fmt: skip
plan_options = _stack(
    score_options,
    click.option("--ratio", type=click.FloatRange(0, 1, max_open=True), help="Remove this fraction of every prunable group."),
    click.option("--target", "targets", multiple=True, metavar="macs=50%",
                 help="Upper bound on the result: macs=50%, params=120k, size=2MB, latency=60%, latency=5ms, memory=1MiB. "
                      "Repeatable; all are held at once."),
    click.option("--max-drop", metavar="1%",
                 help="Top-1 (without labels: agreement with the original) falls by no more, on --eval-data or else a third of --data that "
                      "is not scored with; alone: the smallest model that holds it."),
    click.option("--confidence", callback=_confidence, default="95%", show_default=True, metavar="95%",
                 help="How sure --max-drop must be held, given how few samples it is judged on; 50%: take the measured drop as it is."),
    click.option("--metric", metavar="MODULE:FUNCTION", help="For --max-drop: function(outputs, labels) -> float, larger is better."),
    click.option("--allocation", type=click.Choice(["default", "uniform", "global", "solve"]), default="default",
                 help="The same share of every group, one ranking over all groups, or the least estimated error under all targets.  "
                      "[default: solve with --max-drop, a latency or memory target, or --score obs; else uniform]"),
    click.option("--keep", metavar="REGEX", help="Layers (node or weight names) that keep all their output channels."),
    click.option("--only", metavar="REGEX", help="Shrink only groups that are made by matching layers alone."),
    click.option("--min-channels", type=click.IntRange(min=1), default=1, show_default=True, help="Keep at least so many per group."),
    click.option("--align", callback=_align, default="default", metavar="auto|N|N:M|none",
                 help="Kept widths are multiples of N, and below N of M; auto: the measured staircase.  "
                      "[default: auto with a latency target; else of 16 (solved) or 4, below 12 any (16:1:12, 4:1:12)]"),
    machine_options,
    click.option("--device-profile", type=FILE, help="Latency from a profile measured elsewhere (`sfp-onnx profile`)."),
)  # fmt: skip


def chosen_plan(options: dict[str, Any]) -> PlanOptions:
    """The options of the plan, which must say how much leaves."""
    settle(options)
    if (options["ratio"] is None) == (not options["targets"] and options["max_drop"] is None):
        raise click.UsageError("Give either --ratio or --target (or --max-drop), for example --ratio 0.5 or --target macs=50%.")
    if options["metric"] is not None and options["max_drop"] is None:
        raise click.UsageError("--metric needs --max-drop.")
    if options["max_drop"] is not None:
        parse_drop(options["max_drop"])
    for text in options["targets"]:
        parse_target(text)
    names = "ratio targets allocation keep only min_channels align max_drop metric confidence threads batch provider profile_budget".split()
    profile = options["device_profile"]
    return PlanOptions(**{name: options[name] for name in names}, device_profile=None if profile is None else str(profile))


repair_options = _stack(
    click.option("--repair", type=click.Choice(REPAIRS),
                 help="Re-fit what is left so that the model answers like the original: weights and biases (lstsq), biases alone, or the "
                      "statistics of BatchNormalization (bn).  [default: lstsq with --data, else none]"),
    click.option("--memory", callback=byte_size, default="2GB", show_default=True, metavar="2GB",
                 help="What repair and `obs` hold in memory (GB: 10^9, GiB: 2^30 bytes); the rest goes to a temporary file."),
    click.option("--force", is_flag=True, help="Write the model even if the repair took it away from the original."),
)  # fmt: skip


def chosen_repair(options: dict[str, Any], data: object) -> RepairOptions | None:
    """The repair that the options ask for; by default least squares where there are data.

    Raises:
        OptionError: a repair without data.
    """
    kind = options["repair"] or ("none" if data is None else "lstsq")
    if kind == "none":
        return None
    if data is None:
        raise OptionError(f"--repair {kind} needs --data")
    return RepairOptions(fit=kind, seed=options["seed"], memory=options["memory"], force=options["force"])


verify_option = click.option(
    "--verify/--no-verify", default=True, show_default=True, help="Compare with the masked original before writing."
)
external_option = click.option(
    "--external-data/--single-file", "external", default=None, help="Weights in OUT.data, or in one file.  [default: one file up to 2 GB]"
)
eval_option = click.option(
    "--eval-data", type=FILE, help="What --max-drop is judged on, with labels of its own  [default: a third of --data]."
)
output_option = click.option("-o", "--output", type=FILE, required=True, help="Where the pruned model goes.")
manifest_option = click.option(
    "--manifest", type=FILE, help="Write versions, hashes, options, plan and cuts as JSON."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
locked_option = click.option(
    "--locked", type=FILE, metavar="MANIFEST", help="Reproduce the run of a manifest byte for byte, or say what differs (exit code 3)."
)
