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

from .. import graph, pipeline, report
from ..data import Dataset
from ..plan import to_json
from ..records import Evaluation, Plan, RepairOptions, ScoreOptions
from ..runtime import Setup
from ..scores import SCORES
from . import options as take
from .bandit_options import bandit_files, chosen_bandit
from .common import EPILOG, bar, check_outputs, dataset, guarded, say
from .config import config_option
from .data_options import NOTHING
from .gates import gated
from .locked import Lock, command
from .packaging import chosen_packaging, ort_paths, packaging_options, steps_text
from .reporting import check_report, page_of_prune, report_option


def _analysed(model: graph.Model, data: Dataset | None, options: dict[str, Any]) -> pipeline.Analysis:
    return pipeline.inspect(model, options["input_shapes"], data, options["cut_layernorm"])


def _judge(model: graph.Model, path: Path | None, options: dict[str, Any]) -> Dataset | None:
    """The data of --eval-data, read as those of --data are."""
    if path is not None and options["max_drop"] is None:
        raise click.UsageError("--eval-data needs --max-drop.")
    return dataset(model, path, {**options, "samples": None, "labels": None}) if path else None


def _scored(
    analysis: pipeline.Analysis, data: Dataset | None, options: dict[str, Any], repair: RepairOptions | None, judge: Dataset | None
) -> tuple[pipeline.Candidates, Plan]:
    name = options["score"] or pipeline.default_score(data, repair)
    known = SCORES.get(name)
    meaning = f": {known.summary}" if known else ""
    say(f"score: {name}{'' if options['score'] else ' (default)'}{meaning}")
    chosen = ScoreOptions(options["p"], options["seed"], options["probe"], options["pool"], chosen_bandit(options), options["memory"])
    candidates, made = pipeline.planned(analysis, take.chosen_plan(options), name, data, chosen, bar, repair, judge)
    for note in made.notes:
        say(f"Note: {note}", 1 if note.startswith("allocation:") else 0)
    return candidates, made


@click.command("plan", epilog=EPILOG)
@take.model_argument
@click.option("-o", "--output", type=take.FILE, required=True, help="Where the plan (JSON) goes.")
@click.option("--data", type=take.FILE, help="Calibration data: " + take.DATA)
@take.eval_option
@take.plan_options
@take.preprocessing_options
@take.shape_option
@take.layernorm_option
@take.repair_options
@take.json_option
@guarded
def plan_command(model: Path, output: Path, data: Path | None, eval_data: Path | None, as_json: bool, **options: Any) -> None:
    """Decide which channels leave; cut nothing.

    Example: sfp-onnx plan model.onnx -o plan.json --target macs=50%
    """
    take.chosen_plan(options)
    chosen_bandit(options)
    loaded = pipeline.load(model)
    inputs = [*loaded.paths, data, eval_data, options["labels"]]
    check_outputs(inputs, output, *bandit_files(options))
    judge = _judge(loaded, eval_data, options)
    data_set = dataset(loaded, data, options)
    repair = take.chosen_repair(options, data_set)
    made = _scored(_analysed(loaded, data_set, options), data_set, options, repair, judge)[1]
    pipeline.write_json(output, to_json(made), filter(None, inputs))
    click.echo(json.dumps(to_json(made), indent=1) if as_json else report.plan_text(made))
    if made.figures and not as_json:
        click.echo(report.figures_text(made))
    say(f"Next: sfp-onnx apply {shlex.quote(str(model))} {shlex.quote(str(output))} -o {shlex.quote(model.stem)}-pruned.onnx")


@click.command("apply", epilog=EPILOG)
@take.model_argument
@click.argument("plan", type=take.FILE)
@take.output_option
@click.option("--data", type=take.FILE, help="Calibration data, for the repair.")
@take.preprocessing_options
@take.repair_options
@take.manifest_option
@take.verify_option
@take.external_option
@take.json_option
@guarded
def apply_command(
    model: Path, plan: Path, output: Path, data: Path | None, manifest: Path | None, verify: bool, external: bool | None, **options: Any
) -> None:
    """Cut a model as a plan says.

    Example: sfp-onnx apply model.onnx plan.json -o smaller.onnx
    """
    loaded = pipeline.load(model)
    check_outputs([*loaded.paths, plan, data, options["labels"]], output, manifest)
    data_set = dataset(loaded, data, options)
    repair = take.chosen_repair(options, data_set)
    result = pipeline.apply(loaded, pipeline.read_plan(plan), data_set, verify, bar, repair)
    found = _described(result, output, external)
    _write(result, output, manifest, external, found)
    _show(result, output, found)


@click.command("prune", epilog=EPILOG)
@take.model_argument
@take.output_option
@click.option("--data", type=take.FILE, help="Calibration data: " + take.DATA)
@click.option("--test-data", type=take.FILE, help="Held-out data: report accuracy and latency before and after.")
@take.eval_option
@take.plan_options
@take.preprocessing_options
@take.shape_option
@take.layernorm_option
@take.repair_options
@take.manifest_option
@take.verify_option
@take.external_option
@take.json_option
@take.locked_option
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
    take.chosen_plan(options)
    chosen_bandit(options)
    lock = None if locked is None else Lock(locked)
    loaded = pipeline.load(model)
    written = (output, manifest, report_to, *ort_paths(options), *bandit_files(options))
    check_outputs([*loaded.paths, locked, data, test_data, eval_data, options["labels"]], *written)
    check_report(report_to)
    held_out = dataset(loaded, test_data, {**options, "samples": None, "labels": None}) if test_data else None
    shared = NOTHING if test_data and not data else {}  # given for the held-out data
    judge = _judge(loaded, eval_data, options)
    data_set = dataset(loaded, data, {**options, **shared})
    repair = take.chosen_repair(options, data_set)
    analysis = _analysed(loaded, data_set, options)
    scored: pipeline.Candidates | None = None
    made = lock.plan(loaded, data_set, options) if lock else None
    if made is None:
        scored, made = _scored(analysis, data_set, options, repair, judge)
    say(report.plan_text(made), 1)
    if options["max_drop"] is not None and judge is None:
        data_set = pipeline.held_out(data_set, options["seed"])[0]  # the model that was judged is the one that is written
    result = pipeline.apply(analysis, made, data_set, verify, bar, repair)
    if lock:
        lock.check(result, output, external)
    packaged = None
    if chosen_packaging(options).given:
        packaged = pipeline.package(analysis, result.model, chosen_packaging(options), data_set, held_out)
        result = replace(result, model=packaged.model, notes=(*result.notes, *packaged.notes))
    measured = _measured(result, held_out, output, external)
    page = None
    if report_to is not None:
        scored = scored or pipeline.Candidates(analysis, analysis.coupling.groups, np.zeros(analysis.coupling.units), {})
        setup = (Setup(options["threads"], options["provider"]), options["batch"])
        page = page_of_prune(result, scored, packaged, (data_set, held_out), measured, setup)
    found = _described(result, output, external, measured, held_out, packaged)
    with graph.together():  # of two runs to the same names, one wins as a whole
        _write(result, output, manifest, external, found)
        if packaged and packaged.ort:
            packaged.ort.save(options["save_ort"], [*loaded.paths, output])
        if page is not None and report_to is not None:
            pipeline.write_page(report_to, page, [*loaded.paths, output])
    shown = _show(result, output, found)
    if shown:
        _show_measured(packaged, measured, (model, output))
    if report_to is not None:
        say(f"report: {report_to}")


def _measured(result: pipeline.Pruned, data: Dataset | None, output: Path, external: bool | None) -> list[Evaluation]:
    """The original and the result on held-out data, if there are any."""
    if data is None:
        return []
    first, last = pipeline.evaluate([result.original, result.model], data, progress=bar)
    size = replace(last.size, bytes=graph.fingerprint(result.model, output, external)[1])
    return [first, replace(last, model=str(output), size=size)]


def _show_measured(packaged: pipeline.Packaged | None, measured: list[Evaluation], paths: tuple[Path, Path]) -> None:
    """Say what the steps gave, and how good the result is or how to find out."""
    if packaged:
        click.echo(steps_text(packaged.steps))
    if measured:
        _accuracy(measured)
        say(report.evaluation_text(measured))
    else:
        model, output = (shlex.quote(str(path)) for path in paths)
        say(f"Next: sfp-onnx evaluate {model} {output} --data TEST_DATA (with the same preprocessing)")


def _described(
    result: pipeline.Pruned, output: Path, external: bool | None, measured: Sequence[Evaluation] = (), test_data: Dataset | None = None,
    packaged: pipeline.Packaged | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The manifest of a run."""
    return {
        **pipeline.manifest(result, output, external),
        "command": command(),
        "evaluation": [asdict(own) for own in measured] or None,
        "packaging": packaged.figures if packaged else None,
        "test_data": None if test_data is None else pipeline.describe(test_data),
    }


def _write(result: pipeline.Pruned, output: Path, manifest: Path | None, external: bool | None, found: dict[str, Any]) -> None:
    """Write the model, and its manifest if wanted."""
    with graph.together():
        result.save(output, external)
        if manifest is not None:
            pipeline.write_json(manifest, found, [*result.original.paths, output])


def _show(result: pipeline.Pruned, output: Path, found: dict[str, Any]) -> bool:
    """Say what was written; whether it was said in words (and not as JSON)."""
    for note in result.notes:
        say(f"Note: {note}")
    if click.get_current_context().params.get("as_json"):
        click.echo(json.dumps(found, indent=1))
        return False
    _say_sizes(result, output, found["output"]["bytes"])
    return True


def _say_sizes(result: pipeline.Pruned, output: Path, after: int) -> None:
    check = result.verification
    click.echo(report.sizes_text(result.plan.before, result.plan.after))
    before = graph.file_bytes(result.original)
    click.echo(f"file {report.number(before)}B -> {report.number(after)}B ({after / before:.1%})")
    if check is None:
        click.echo("not verified (--no-verify)")
    else:
        parts = ", ".join(f"{kind} input {error:.1e}" for kind, error in check.errors.items())
        word = "verified before the repair" if result.repaired else "verified"
        click.echo(f"{word}: equal to the masked original (relative difference on {parts}; allowed {check.tolerance:g})")
    if result.plan.figures:
        click.echo(report.figures_text(result.plan))
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
