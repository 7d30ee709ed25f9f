"""The commands that make a plan or a pruned model: plan, apply, prune."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from ..core.errors import TargetError
from ..core.options import RepairOptions, ScoreOptions
from ..core.types import Evaluation, Plan
from ..coupling.analysis import Analysis, describe, inspect, load
from ..data.dataset import Dataset
from ..evaluation import evaluate
from ..export import Packaged, package
from ..graph.model import Model
from ..graph.save import file_bytes, fingerprint, together
from ..pipeline import apply, default_score, planned
from ..planning import max_drop
from ..planning.record import to_json
from ..planning.search import Candidates
from ..report import manifest as written
from ..report.manifest import (
    Pruned,
    clocked,
    differences,
    locked_plan,
    plain_options,
    read_manifest,
    read_plan,
    version_differences,
    write_json,
)
from ..report.page import write_page
from ..report.text import evaluation_text, figures_text, number, plan_text, sizes_text
from ..runtime import Setup
from ..scores.registry import SCORES
from .arguments import (
    DATA,
    NOTHING,
    bandit_files,
    check_outputs,
    chosen_bandit,
    chosen_packaging,
    chosen_plan,
    chosen_repair,
    dataset,
    eval_option,
    external_option,
    json_option,
    layernorm_option,
    locked_option,
    manifest_option,
    model_argument,
    ort_paths,
    output_option,
    packaging_options,
    plan_options,
    preprocessing_options,
    repair_options,
    shape_option,
    steps_text,
    verify_option,
)
from .common import EPILOG, FILE, bar, check_report, gated, guarded, page_of_prune, report_option, say
from .config import config_option


def _analysed(model: Model, data: Dataset | None, options: dict[str, Any]) -> Analysis:
    return inspect(model, options["input_shapes"], data, options["cut_layernorm"])


def _judge(model: Model, path: Path | None, options: dict[str, Any]) -> Dataset | None:
    """The data of --eval-data, read as those of --data are."""
    if path is not None and options["max_drop"] is None:
        raise click.UsageError("--eval-data needs --max-drop.")
    return dataset(model, path, {**options, "samples": None, "labels": None}) if path else None


def _scored(
    analysis: Analysis, data: Dataset | None, options: dict[str, Any], repair: RepairOptions | None, judge: Dataset | None
) -> tuple[Candidates, Plan]:
    name = options["score"] or default_score(data, repair)
    known = SCORES.get(name)
    meaning = f": {known.summary}" if known else ""
    say(f"score: {name}{'' if options['score'] else ' (default)'}{meaning}")
    chosen = ScoreOptions(options["p"], options["seed"], options["probe"], options["pool"], chosen_bandit(options), options["memory"])
    candidates, made = planned(analysis, chosen_plan(options), name, data, chosen, bar, repair, judge)
    for note in made.notes:
        say(f"Note: {note}", 1 if note.startswith("allocation:") else 0)
    return candidates, made


@click.command("plan", epilog=EPILOG)
@model_argument
@click.option("-o", "--output", type=FILE, required=True, help="Where the plan (JSON) goes.")
@click.option("--data", type=FILE, help="Calibration data: " + DATA)
@eval_option
@plan_options
@preprocessing_options
@shape_option
@layernorm_option
@repair_options
@json_option
@guarded
def plan_command(model: Path, output: Path, data: Path | None, eval_data: Path | None, as_json: bool, **options: Any) -> None:
    """Decide which channels leave; cut nothing.

    Example: sfp-onnx plan model.onnx -o plan.json --target macs=50%
    """
    chosen_plan(options)
    chosen_bandit(options)
    loaded = load(model)
    inputs = [*loaded.paths, data, eval_data, options["labels"]]
    check_outputs(inputs, output, *bandit_files(options))
    judge = _judge(loaded, eval_data, options)
    data_set = dataset(loaded, data, options)
    repair = chosen_repair(options, data_set)
    made = _scored(_analysed(loaded, data_set, options), data_set, options, repair, judge)[1]
    write_json(output, to_json(made), filter(None, inputs))
    click.echo(json.dumps(to_json(made), indent=1) if as_json else plan_text(made))
    if made.figures and not as_json:
        click.echo(figures_text(made))
    say(f"Next: sfp-onnx apply {shlex.quote(str(model))} {shlex.quote(str(output))} -o {shlex.quote(model.stem)}-pruned.onnx")


@click.command("apply", epilog=EPILOG)
@model_argument
@click.argument("plan", type=FILE)
@output_option
@click.option("--data", type=FILE, help="Calibration data, for the repair.")
@preprocessing_options
@repair_options
@manifest_option
@verify_option
@external_option
@json_option
@guarded
def apply_command(
    model: Path, plan: Path, output: Path, data: Path | None, manifest: Path | None, verify: bool, external: bool | None, **options: Any
) -> None:
    """Cut a model as a plan says.

    Example: sfp-onnx apply model.onnx plan.json -o smaller.onnx
    """
    loaded = load(model)
    check_outputs([*loaded.paths, plan, data, options["labels"]], output, manifest)
    data_set = dataset(loaded, data, options)
    repair = chosen_repair(options, data_set)
    result = apply(loaded, read_plan(plan), data_set, verify, bar, repair)
    found = _described(result, output, external)
    _write(result, output, manifest, external, found)
    _show(result, output, found)


@click.command("prune", epilog=EPILOG)
@model_argument
@output_option
@click.option("--data", type=FILE, help="Calibration data: " + DATA)
@click.option("--test-data", type=FILE, help="Held-out data: report accuracy and latency before and after.")
@eval_option
@plan_options
@preprocessing_options
@shape_option
@layernorm_option
@repair_options
@manifest_option
@verify_option
@external_option
@json_option
@locked_option
@config_option
@packaging_options
@report_option
@guarded
@gated
def prune_command(
    model: Path, output: Path, data: Path | None, test_data: Path | None, eval_data: Path | None, manifest: Path | None, verify: bool,
    external: bool | None, locked: Path | None, report_to: Path | None, **options: Any,
) -> None:  # fmt: skip
    """Plan, cut, verify and write in one.

    Example: sfp-onnx prune model.onnx -o smaller.onnx --data calibration.npz --target macs=50%
    """
    chosen_plan(options)
    chosen_bandit(options)
    lock = None if locked is None else Lock(locked)
    loaded = load(model)
    written = (output, manifest, report_to, *ort_paths(options), *bandit_files(options))
    check_outputs([*loaded.paths, locked, data, test_data, eval_data, options["labels"]], *written)
    check_report(report_to)
    held_out = dataset(loaded, test_data, {**options, "samples": None, "labels": None}) if test_data else None
    shared = NOTHING if test_data and not data else {}  # given for the held-out data
    judge = _judge(loaded, eval_data, options)
    data_set = dataset(loaded, data, {**options, **shared})
    repair = chosen_repair(options, data_set)
    analysis = _analysed(loaded, data_set, options)
    scored: Candidates | None = None
    made = lock.plan(loaded, data_set, options) if lock else None
    if made is None:
        scored, made = _scored(analysis, data_set, options, repair, judge)
    say(plan_text(made), 1)
    if options["max_drop"] is not None and judge is None:
        data_set = max_drop.held_out(data_set, options["seed"])[0]  # the model that was judged is the one that is written
    result = apply(analysis, made, data_set, verify, bar, repair)
    if lock:
        lock.check(result, output, external)
    packaged = None
    if chosen_packaging(options).given:
        packaged = package(analysis, result.model, chosen_packaging(options), data_set, held_out)
        result = replace(result, model=packaged.model, notes=(*result.notes, *packaged.notes))
    measured = _measured(result, held_out, output, external)
    page = None
    if report_to is not None:
        scored = scored or Candidates(analysis, analysis.coupling.groups, np.zeros(analysis.coupling.units), {})
        setup = (Setup(options["threads"], options["provider"]), options["batch"])
        page = page_of_prune(result, scored, packaged, (data_set, held_out), measured, setup)
    found = _described(result, output, external, measured, held_out, packaged)
    with together():  # of two runs to the same names, one wins as a whole
        _write(result, output, manifest, external, found)
        if packaged and packaged.ort:
            packaged.ort.save(options["save_ort"], [*loaded.paths, output])
        if page is not None and report_to is not None:
            write_page(report_to, page, [*loaded.paths, output])
    shown = _show(result, output, found)
    if shown:
        _show_measured(packaged, measured, (model, output))
    if report_to is not None:
        say(f"report: {report_to}")


def _measured(result: Pruned, data: Dataset | None, output: Path, external: bool | None) -> list[Evaluation]:
    """The original and the result on held-out data, if there are any."""
    if data is None:
        return []
    first, last = evaluate([result.original, result.model], data, progress=bar)
    size = replace(last.size, bytes=fingerprint(result.model, output, external)[1])
    return [first, replace(last, model=str(output), size=size)]


def _show_measured(packaged: Packaged | None, measured: list[Evaluation], paths: tuple[Path, Path]) -> None:
    """Say what the steps gave, and how good the result is or how to find out."""
    if packaged:
        click.echo(steps_text(packaged.steps))
    if measured:
        _accuracy(measured)
        say(evaluation_text(measured))
    else:
        model, output = (shlex.quote(str(path)) for path in paths)
        say(f"Next: sfp-onnx evaluate {model} {output} --data TEST_DATA (with the same preprocessing)")


def _described(
    result: Pruned, output: Path, external: bool | None, measured: Sequence[Evaluation] = (), test_data: Dataset | None = None,
    packaged: Packaged | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The manifest of a run."""
    return {
        **written.manifest(result, output, external),
        "command": command(),
        "evaluation": [asdict(own) for own in measured] or None,
        "packaging": packaged.figures if packaged else None,
        "test_data": None if test_data is None else describe(test_data),
    }


def _write(result: Pruned, output: Path, manifest: Path | None, external: bool | None, found: dict[str, Any]) -> None:
    """Write the model, and its manifest if wanted."""
    with together():
        result.save(output, external)
        if manifest is not None:
            write_json(manifest, found, [*result.original.paths, output])


def _show(result: Pruned, output: Path, found: dict[str, Any]) -> bool:
    """Say what was written; whether it was said in words (and not as JSON)."""
    for note in result.notes:
        say(f"Note: {note}")
    if click.get_current_context().params.get("as_json"):
        click.echo(json.dumps(found, indent=1))
        return False
    _say_sizes(result, output, found["output"]["bytes"])
    return True


def _say_sizes(result: Pruned, output: Path, after: int) -> None:
    check = result.verification
    click.echo(sizes_text(result.plan.before, result.plan.after))
    before = file_bytes(result.original)
    click.echo(f"file {number(before)}B -> {number(after)}B ({after / before:.1%})")
    if check is None:
        click.echo("not verified (--no-verify)")
    else:
        parts = ", ".join(f"{kind} input {error:.1e}" for kind, error in check.errors.items())
        word = "verified before the repair" if result.repaired else "verified"
        click.echo(f"{word}: equal to the masked original (relative difference on {parts}; allowed {check.tolerance:g})")
    if result.plan.figures:
        click.echo(figures_text(result.plan))
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


# ---- prune --locked --------------------------------------------------------------------------------------------------

QUIET = ("junit_file", "github")  # options that only report


def command() -> dict[str, Any]:
    """The running command and its options, for the manifest."""
    context = click.get_current_context()
    options = {key: value for key, value in context.params.items() if key not in QUIET}
    return {"name": context.command.name, "options": plain_options(options)}


class Lock:
    """A manifest that the running command must reproduce."""

    def __init__(self, path: Path) -> None:
        """Read the manifest.

        Raises:
            OptionError: unreadable, or no manifest.
        """
        self.path, self.manifest = path, read_manifest(path)
        self.versions = version_differences(self.manifest)

    def plan(self, model: Model, data: Dataset | None, options: dict[str, Any]) -> Plan | None:
        """Check that the run is the same so far; the manifest's plan, if it was made with a clock and cannot be made again.

        Raises:
            TargetError: options, model or data differ; which.
        """
        found = differences(self.manifest, command()["options"], model, data)
        if found:
            raise TargetError(f"{self.path}: this is another run: {'; '.join([*found, *self.versions])}. Nothing was written.")
        for text in self.versions:
            say(f"Note: --locked: {text}")
        if clocked(options):
            say("Note: --locked: the plan is that of the manifest, since it was made with measured times")
            return locked_plan(self.manifest)
        return None

    def check(self, result: Pruned, output: Path, external: bool | None) -> None:
        """Check that the result is the manifest's, byte for byte.

        Raises:
            TargetError: it is not; with the versions that differ.
        """
        name = Path(self.manifest["output"]["path"] or output.name).name
        found, expected = fingerprint(result.model, output.with_name(name), external)[0], self.manifest["output"]["sha256"]
        if found != expected:
            why = "; ".join(self.versions) or "all versions are the same; the processor or its number of threads may differ"
            raise TargetError(
                f"{self.path}: the result is another one: SHA-256 {expected[:16]} then, {found[:16]} now ({why}). Nothing was written."
            )
        say(f"--locked: the same byte for byte as in {self.path}")
