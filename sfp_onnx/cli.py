"""The command line: a thin layer over `sfp_onnx.pipeline`.

Exit codes: 0 done, 1 internal error, 2 wrong usage, 3 a target or check could not be met, 4 bad model, data or path.
Results go to standard output, messages and progress to standard error.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from . import graph, pipeline, report
from .data import Dataset, Preprocessing
from .errors import OptionError, SfpError
from .plan import to_json
from .records import Evaluation, Plan, PlanOptions, ScoreOptions
from .scores import SCORES

F = TypeVar("F", bound=Callable[..., Any])

FILE = click.Path(path_type=Path, readable=False)  # what is wrong with a file is said by who reads it
EPILOG = "Exit codes: 0 done, 1 internal error, 2 wrong usage, 3 a target or check could not be met, 4 bad model, data or path."


# ---- shared pieces ---------------------------------------------------------------------------------------------------


def _verbosity() -> int:
    context = click.get_current_context()
    return int(context.find_root().params.get("verbose", 0)) - int(context.find_root().params.get("quiet", 0))


def say(text: str, level: int = 0) -> None:
    """A message for people on standard error (level 1: only with -v)."""
    if _verbosity() >= level:
        click.echo(text, err=True)


@contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error, if that is a terminal."""
    if not sys.stderr.isatty() or _verbosity() < 0:
        yield lambda steps: None
        return
    with click.progressbar(length=total, label=title, file=sys.stderr) as bar:
        yield bar.update


def guarded(function: F) -> F:
    """Turn errors into a message and an exit code; a traceback only for internal errors with -v."""

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except SfpError as error:
            click.echo(f"Error: {error}", err=True)
            raise click.exceptions.Exit(error.exit_code) from error
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if _verbosity() > 0:
                raise
            click.echo(f"Internal error: {type(error).__name__}: {error}. Run again with -v for the traceback, and report it.", err=True)
            raise click.exceptions.Exit(1) from error

    return wrapper  # type: ignore[return-value]


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
    click.option("--score", type=click.Choice(sorted(SCORES)),
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


def _dataset(model: graph.Model, path: Path | None, options: dict[str, Any]) -> Dataset | None:
    steps = Preprocessing(options["mean"], options["std"], options["scale"], options["layout"])
    if path is None:
        if steps.given or options["labels"] is not None or options["samples"] is not None:
            raise OptionError("--labels, --mean, --std, --scale and --samples need --data")
        return None
    data = pipeline.data_for(
        model, path, preprocessing=steps, labels=options["labels"], samples=options["samples"], seed=options["seed"]
    )
    assert data is not None
    say(f"{data.name}: {data.samples} samples, labels {'given' if data.labels is not None else 'none'}", 1)
    return data


def _options(options: dict[str, Any]) -> PlanOptions:
    if (options["ratio"] is None) == (not options["targets"]):
        raise click.UsageError("Give either --ratio or --target, for example --ratio 0.5 or --target macs=50%.")
    names = ("ratio", "targets", "allocation", "keep", "only", "min_channels", "align")
    return PlanOptions(**{name: options[name] for name in names})


def _analysed(model: graph.Model, data: Dataset | None, options: dict[str, Any]) -> pipeline.Analysis:
    return pipeline.inspect(model, options["input_shapes"], data, options["cut_layernorm"])


def _scored(analysis: pipeline.Analysis, data: Dataset | None, options: dict[str, Any]) -> Plan:
    name = options["score"] or pipeline.default_score(data)
    say(f"score: {name}{'' if options['score'] else ' (default)'}", 0)
    chosen = ScoreOptions(options["p"], options["seed"])
    return pipeline.plan(analysis, _options(options), name, data, chosen, _bar)


# ---- commands --------------------------------------------------------------------------------------------------------


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("-v", "--verbose", count=True, help="Say more.")
@click.option("-q", "--quiet", count=True, help="Say only errors.")
@click.version_option(package_name="sfp_onnx")
def main(verbose: int, quiet: int) -> None:
    """Make ONNX models smaller and faster by removing channels, and prove the result.

    Example: sfp-onnx prune model.onnx -o smaller.onnx --ratio 0.5
    """


@main.command("inspect", epilog=EPILOG)
@model_argument
@shape_option
@layernorm_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@guarded
def inspect_command(model: Path, input_shapes: dict[str, list[int]], cut_layernorm: bool, as_json: bool) -> None:
    """Show what can be pruned, and why the rest cannot.

    Example: sfp-onnx inspect model.onnx
    """
    analysis = pipeline.inspect(model, input_shapes, cut_layernorm=cut_layernorm)
    found = report.inspection(analysis.coupling, analysis.size(), analysis.samples, str(model))
    click.echo(json.dumps(found, indent=1) if as_json else report.inspection_text(found))
    if not as_json and found["groups"]:
        say(f"Next: sfp-onnx prune {model} -o {model.stem}-pruned.onnx --ratio 0.5 --data calibration.npz")


@main.command("plan", epilog=EPILOG)
@model_argument
@click.option("-o", "--output", type=FILE, required=True, help="Where the plan (JSON) goes.")
@click.option("--data", type=FILE, help="Calibration data: .npz, .npy or test_data_set_* folders.")
@plan_options
@preprocessing_options
@shape_option
@layernorm_option
@guarded
def plan_command(model: Path, output: Path, data: Path | None, **options: Any) -> None:
    """Decide which channels leave; cut nothing.

    Example: sfp-onnx plan model.onnx -o plan.json --target macs=50%
    """
    _options(options)
    loaded = pipeline.load(model)
    inputs = [*loaded.paths, data, options["labels"]]
    _check_outputs(inputs, output)
    dataset = _dataset(loaded, data, options)
    made = _scored(_analysed(loaded, dataset, options), dataset, options)
    pipeline.write_json(output, to_json(made), filter(None, inputs))
    click.echo(report.plan_text(made))
    say(f"Next: sfp-onnx apply {model} {output} -o {model.stem}-pruned.onnx")


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


@main.command("apply", epilog=EPILOG)
@model_argument
@click.argument("plan", type=FILE)
@output_option
@manifest_option
@verify_option
@external_option
@guarded
def apply_command(model: Path, plan: Path, output: Path, manifest: Path | None, verify: bool, external: bool | None) -> None:
    """Cut a model as a plan says.

    Example: sfp-onnx apply model.onnx plan.json -o smaller.onnx
    """
    loaded = pipeline.load(model)
    _check_outputs([*loaded.paths, plan], output, manifest)
    result = pipeline.apply(loaded, pipeline.read_plan(plan), verify=verify, progress=_bar)
    _write(result, output, manifest, external)


@main.command("prune", epilog=EPILOG)
@model_argument
@output_option
@click.option("--data", type=FILE, help="Calibration data: .npz, .npy or test_data_set_* folders.")
@click.option("--test-data", type=FILE, help="Held-out data: report accuracy and latency before and after.")
@plan_options
@preprocessing_options
@shape_option
@layernorm_option
@manifest_option
@verify_option
@external_option
@guarded
def prune_command(
    model: Path, output: Path, data: Path | None, test_data: Path | None, manifest: Path | None, verify: bool,
    external: bool | None, **options: Any,
) -> None:  # fmt: skip
    """Plan, cut, verify and write in one.

    Example: sfp-onnx prune model.onnx -o smaller.onnx --data calibration.npz --target macs=50%
    """
    _options(options)
    loaded = pipeline.load(model)
    _check_outputs([*loaded.paths, data, test_data, options["labels"]], output, manifest)
    held_out = _dataset(loaded, test_data, {**options, "samples": None, "labels": None}) if test_data else None
    shared = {"mean": None, "std": None, "scale": None} if test_data and not data else {}  # given for the held-out data
    dataset = _dataset(loaded, data, {**options, **shared})
    analysis = _analysed(loaded, dataset, options)
    made = _scored(analysis, dataset, options)
    say(report.plan_text(made), 1)
    result = pipeline.apply(analysis, made, dataset, verify, _bar)
    measured = None if held_out is None else pipeline.evaluate([loaded, result.model], held_out, progress=_bar)
    _write(result, output, manifest, external)
    if measured:
        measured[1] = replace(measured[1], model=str(output))
        _accuracy(measured)
        say(report.evaluation_text(measured))


def _check_outputs(inputs: Sequence[Path | None], *outputs: Path | None) -> None:
    """Refuse outputs that cannot be written, or are inputs or each other, before any work."""
    taken = [path for path in inputs if path is not None]
    for output in outputs:
        if output is not None:
            graph.check_output(output, taken)
            taken.append(output)


def _write(result: pipeline.Pruned, output: Path, manifest: Path | None, external: bool | None) -> None:
    result.save(output, external)
    if manifest is not None:
        pipeline.write_json(manifest, pipeline.manifest(result, output), [*result.original.paths, output])
    for note in result.notes:
        say(f"Note: {note}")
    check = result.verification
    click.echo(report.sizes_text(result.plan.before, result.plan.after))
    before, after = graph.file_bytes(result.original), graph.file_bytes(pipeline.load(output))
    click.echo(f"file {report.number(before)}B -> {report.number(after)}B ({after / before:.1%})")
    if check is None:
        click.echo("not verified (--no-verify)")
    else:
        parts = ", ".join(f"{kind} input {error:.1e}" for kind, error in check.errors.items())
        click.echo(f"verified: equal to the masked original (relative difference on {parts}; allowed {check.tolerance:g})")
    click.echo(f"wrote {output}")


def _accuracy(results: list[Evaluation]) -> None:
    before, after = results
    if before.top1 is not None and after.top1 is not None:
        click.echo(f"top-1 on {before.samples} held-out samples: {before.top1:.2%} -> {after.top1:.2%}")
    elif after.agreement is not None:
        click.echo(f"agreement with the original on {after.samples} held-out samples: {after.agreement:.2%}")
    elif after.relative_error is not None:
        click.echo(f"relative error to the original on {after.samples} held-out samples: {after.relative_error:.4f}")
    if after.latency_ratio is not None:
        times = f"{before.latency_min_ms:.3f} ms -> {after.latency_min_ms:.3f} ms"
        click.echo(f"latency {times} per batch ({after.latency_ratio:.2f} of the original)")


@main.command("evaluate", epilog=EPILOG)
@click.argument("models", nargs=-1, required=True, type=FILE)
@click.option("--data", type=FILE, required=True, help="Test data: .npz, .npy or test_data_set_* folders.")
@preprocessing_options
@click.option("--latency/--no-latency", default=True, show_default=True, help="Time the models, interleaved.")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Threads of onnxruntime (0: all cores).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@guarded
def evaluate_command(models: tuple[Path, ...], data: Path, latency: bool, threads: int, as_json: bool, **options: Any) -> None:
    """Measure models on data; the first is the reference.

    Example: sfp-onnx evaluate model.onnx smaller.onnx --data test.npz
    """
    loaded = [pipeline.load(path) for path in models]
    dataset = _dataset(loaded[0], data, options)
    assert dataset is not None
    results = pipeline.evaluate(loaded, dataset, latency, threads, _bar)
    click.echo(json.dumps([asdict(item) for item in results], indent=1) if as_json else report.evaluation_text(results))
