"""What all commands share: messages, progress, errors with exit codes, data and checks of paths."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from .. import graph
from ..core.errors import OptionError
from ..core.options import BanditOptions, PlanOptions, RepairOptions
from ..core.types import Align
from ..coupling.analysis import data_for
from ..data import RESAMPLING, Preprocessing
from ..data.checks import training_mode, wrong_reading
from ..data.dataset import Dataset
from ..data.images import CONFIG, PRESETS, hub_config, is_images, preset
from ..evaluation import parse_drop
from ..export import QUANTIZERS, PackagingOptions, Step, operators_path
from ..graph.model import Model
from ..graph.save import check_output
from ..methods.bandits import BANDIT_SCORES
from ..methods.bandits.pulling import MASKS, ROUND_REPAIRS
from ..methods.sfp.probe import PROBES
from ..planning import BYTES, parse_target
from ..planning.max_drop import parse_confidence
from ..repair import REPAIRS
from ..report.text import number, table
from ..scores.registry import SCORES, parts
from .common import FILE, F, say, warn
from .config import settle


def dataset(model: Model, path: Path | None, options: dict[str, Any]) -> Dataset | None:
    """The data that the options describe; None without a path. Says what looks like a mistake of model or data."""
    for text in training_mode(model):
        warn(text)
    if path is None:
        if given(options) or options["labels"] is not None or options["samples"] is not None:
            raise OptionError("--labels, --preset, --mean, --std, --scale, --resize, --center-crop, --color and --samples need --data")
        return None
    steps, notes = preprocessing(model, path, options)
    data = data_for(
        model, path, preprocessing=steps, labels=options["labels"], samples=options["samples"], seed=options["seed"]
    )
    assert data is not None
    for note in (*notes, *data.notes):
        say(f"{data.name}: {note}")
    for text in wrong_reading(model, data):
        warn(text)
    say(f"{data.name}: {data.samples} samples, labels {'given' if data.labels is not None else 'none'}", 1)
    return data


def check_outputs(inputs: Sequence[Path | None], *outputs: Path | None) -> None:
    """Refuse outputs that cannot be written, or are inputs or each other, before any work."""
    taken = [path for path in inputs if path is not None]
    for output in outputs:
        if output is not None:
            check_output(output, taken)
            taken.append(output)


# ---- amounts with units on the command line --------------------------------------------------------------------------

SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def seconds(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """``60s``, ``5m``, ``1h``, or a number of seconds, as a callback of an option."""
    return None if value is None else _quantity(value, SECONDS, "a positive time such as 60s, 5m or 1h")


def byte_size(context: click.Context, parameter: click.Parameter, value: str) -> int:
    """``500MB`` (decimal), ``2GiB`` (binary), ``12k``, or a number of bytes, as a callback of an option."""
    found = int(_quantity(value, BYTES, expected := "bytes such as 500MB, 2GB (10^9 bytes) or 2GiB (2^30)"))
    if found < 1:
        raise click.BadParameter(f"'{value}': expected {expected}")
    return found


def _quantity(text: str, units: Mapping[str, float], expected: str) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in units or not float(match[1]):
        raise click.BadParameter(f"'{text}': expected {expected}")
    return float(match[1]) * units[match[2]]


# ---- options that say how data are read ------------------------------------------------------------------------------

FIELDS = ("mean", "std", "scale", "resize", "center_crop", "color", "resample")
NOTHING: dict[str, Any] = {**dict.fromkeys(FIELDS), "preset": None}
"""Preprocessing options as if none was given."""


def _pixels(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not re.fullmatch(r"[0-9]+(?:[x,][0-9]+)?", value.strip()):
        raise click.BadParameter(f"'{value}': expected pixels, such as 224 or 224x320 (height x width)")
    return tuple(int(item) for item in re.split("[x,]", value.strip()))


_DATA_OPTIONS = (
    click.option("--preset", type=click.Choice(PRESETS), help="Usual preprocessing; options given beside it win."),
    click.option("--resize", callback=_pixels, metavar="S|HxW", help="Images: the shorter side, or height x width.  [default: model's]"),
    click.option("--center-crop", callback=_pixels, metavar="S|HxW", help="Images: the middle, after --resize."),
    click.option("--color", type=click.Choice(["rgb", "bgr"]), help="Images: order of the model's colour channels.  [default: rgb]"),
    click.option("--resample", type=click.Choice(RESAMPLING), help="Images: how --resize interpolates.  [default: bilinear]"),
)


def data_options(function: F) -> F:
    """The options, on a command."""
    for option in reversed(_DATA_OPTIONS):
        function = option(function)
    return function


def given(options: dict[str, Any]) -> bool:
    """Whether any preprocessing was asked for."""
    return any(options.get(name) is not None for name in (*FIELDS, "preset"))


def preprocessing(model: Model, path: Path, options: dict[str, Any]) -> tuple[Preprocessing, list[str]]:
    """What the flags say, else the preset, else (for images) a ``preprocessor_config.json`` next to the model; and what to tell about it.

    Raises:
        DataError: the preset or the configuration does not fit. OptionError: --layout for images.
    """
    images, notes = is_images(path), []
    base: dict[str, Any] = {}
    config = model.source.parent / CONFIG if model.source is not None else None
    if images and options["layout"] != "nchw":
        raise OptionError("--layout is for arrays; images are laid out as the model takes them. Leave it away.")
    if options.get("preset"):
        base = preset(options["preset"], graph.inputs(model), images)
        notes.append(f"preset {options['preset']}: {_listed(base)} (options given win)")
    elif images and config is not None and config.is_file():
        base, left = hub_config(config)
        notes.append(f"preprocessing from {config}: {_listed(base) or 'none'} (options given win)")
        if left:
            notes.append(f"{config}: not followed: {', '.join(left)}")
    own = {name: options[name] for name in FIELDS if options.get(name) is not None}
    if own.get("color") == "bgr" and base.get("color", "rgb") == "rgb":  # figures of a preset are in the order red, green, blue
        base = {**base, **{name: base[name][::-1] for name in ("mean", "std") if name in base}}
    if "resize" in own:
        base.pop("letterbox", None)
    crop = own.get("center_crop")
    if crop is not None and len(crop) == 1:
        own["center_crop"] = crop * 2
    return Preprocessing(**{**base, **own}, layout=options["layout"]), notes


def _listed(steps: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', '-')} {_shown(value)}" for name, value in steps.items())


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ("x" if all(isinstance(item, int) for item in value) else ",").join(f"{item:g}" for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


# ---- options of the scores ``bandit:*`` ------------------------------------------------------------------------------

NAMES = tuple(vars(BanditOptions()))
_BANDIT_OPTIONS = (
    click.option("--pulls", type=click.IntRange(min=1), help="bandit: pulls per arm and round.  [default: 5]"),
    click.option("--budget", callback=seconds, metavar="60s", help="bandit: time for pulling (5m, 1h), instead of --pulls."),
    click.option("--pull-batch", "pull_batch", type=click.IntRange(min=1), default=8, show_default=True,
                 help="bandit: images in one pull."),
    click.option("--epsilon", type=click.FloatRange(0, 1), default=0.1, show_default=True, help="Exploration of bandit:epsilon-greedy."),
    click.option("--temperature", type=click.FloatRange(min=0, min_open=True), default=0.05, show_default=True,
                 help="Temperature of bandit:softmax."),
    click.option("--reward", metavar="NAME|MODULE:FUNCTION",
                 help="bandit: divergence, relative-error, loss (needs labels), or your own function.  [default: divergence for "
                      "classifiers, else relative-error]"),
    click.option("--masked-by", type=click.Choice(MASKS), default="zero", show_default=True,
                 help="bandit: what stands for a masked channel; mean: as if a repair had folded it into biases."),
    click.option("--rounds", type=click.IntRange(min=1), default=1, show_default=True,
                 help="bandit: remove a share, and pull again on the pruned network."),
    click.option("--round-repair", type=click.Choice(ROUND_REPAIRS), default="none", show_default=True,
                 help="bandit: repair between rounds."),
    click.option("--pull-memory", callback=byte_size, default="1GiB", show_default=True, help="bandit: bound on kept activations."),
    click.option("--state", type=click.Path(), help="bandit: file to resume from, written while pulling."),
    click.option("--traces", type=click.Path(), help="bandit: write scores, pulls, means and 95 % intervals per arm as JSON."),
)  # fmt: skip


def bandit_options(function: F) -> F:
    """The options, on a command."""
    for option in reversed(_BANDIT_OPTIONS):
        function = option(function)
    return function


def chosen_bandit(options: dict[str, Any]) -> BanditOptions | None:
    """The options of the search; None if the score is no bandit.

    Raises:
        UsageError: options of a search without one, or both --pulls and --budget.
    """
    if not (options["score"] or "").startswith("bandit:"):
        defaults = BanditOptions()
        given = [name for name in NAMES if options[name] != getattr(defaults, name)]
        if given:
            raise click.UsageError(f"--{given[0].replace('_', '-')} belongs to the scores bandit:*; add --score bandit:sar.")
        return None
    if options["pulls"] is not None and options["budget"] is not None:
        raise click.UsageError("Give either --pulls or --budget.")
    if ":" in (options["reward"] or "") and "" not in sys.path:
        sys.path.insert(0, "")  # the user's function may lie in the working directory
    return BanditOptions(**{name: options[name] for name in NAMES})


def bandit_files(options: dict[str, Any]) -> list[Path]:
    """Files that the search writes."""
    return [Path(options[name]) for name in ("state", "traces") if options[name] is not None]


# ---- options that several commands take ------------------------------------------------------------------------------

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
        Align.parse(value)
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


# ---- options of prune that make other forms of the pruned model ------------------------------------------------------

_PACKAGING_OPTIONS = (
    click.option("--half", is_flag=True, help="Store weights as float16; inputs, outputs and arithmetic stay float32."),
    click.option("--quantize", type=click.Choice(QUANTIZERS), help="8-bit integers, by onnxruntime's quantiser; static with --data."),
    click.option("--save-ort", type=FILE, help="Also write onnxruntime's .ort format, with the operators that a reduced build needs."),
)


def packaging_options(function: F) -> F:
    """The options, in the order of the steps."""
    for option in reversed(_PACKAGING_OPTIONS):
        function = option(function)
    return function


def chosen_packaging(options: dict[str, Any]) -> PackagingOptions:
    """What the options ask for."""
    return PackagingOptions(options["half"], options["quantize"], options["save_ort"] is not None)


def ort_paths(options: dict[str, Any]) -> tuple[Path, ...]:
    """The files that --save-ort writes."""
    path = options["save_ort"]
    return () if path is None else (path, operators_path(path))


def steps_text(steps: tuple[Step, ...]) -> str:
    """What every step gave, as a table."""
    rows = []
    for own in steps:
        shares = [f"{value:.2%}" if value is not None else "-" for value in (own.top1, own.agreement)]
        error = f"{own.relative_error:.4f}" if own.relative_error is not None else "-"
        rows.append([own.name, number(own.bytes), *shares, error, f"{own.latency_ms:.3f}", f"{own.latency_ratio:.2f}"])
    return table(["step", "bytes", "top-1", "agreement", "rel. error", "min ms", "ratio"], rows)
