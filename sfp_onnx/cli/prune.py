"""prune: plan, cut, verify and write in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..core.options import REPAIR, DataOptions, InspectOptions, MeasureOptions, OutputOptions, PlanOptions, RepairOptions
from ..graph.save import file_bytes
from ..pipeline import pruned
from ..report import number
from ..report.manifest import Pruned
from ..report.text import accuracy_text, evaluation_text, figures_text, sizes_text, steps_text, traced_text
from ..report.verdict import of_run
from . import arguments as take, common
from .common import answer, bar, say
from .config import settle


@take.command(
    "prune", take.model_argument, take.output_option, take.data_option, take.test_option, take.score_option, PlanOptions, take.eval_option,
    DataOptions, MeasureOptions, InspectOptions, RepairOptions, OutputOptions, take.verify_option, take.json_option,
    take.option("--rounds", type=click.IntRange(1), default=1, show_default=True, section=REPAIR, advanced=True,
                help="Rank, cut, repair and fine-tune in so many rounds, each by the same factor."),
    take.option("--resume", type=click.Path(path_type=Path), section=REPAIR, advanced=True,
                help="--rounds: go on from this file if it is there; write it after every round."),
    take.gated)  # fmt: skip
def command(model: Path, output: Path, verify: bool, as_json: bool, rounds: int, resume: Path | None, **options: Any) -> None:
    """Plan, cut, verify and write in one.

    Example: sfp-onnx prune model.onnx -o smaller.onnx --data calibration.npz --target macs=50%
    """
    settle(options)
    result = pruned.prune(
        model, take.build(PlanOptions, options), verify=verify, progress=bar, steps=rounds, resume=resume,
        output=take.build(OutputOptions, options, path=output), **take.scoring(options), **take.reading(options))  # fmt: skip
    show(result, output, as_json)
    if not as_json:
        if result.packaged:
            answer(steps_text(result.packaged.steps))
        if result.evaluation:
            answer(accuracy_text(result.evaluation))
            say(evaluation_text(result.evaluation))
        conclude(result)
        if not result.evaluation:
            to_evaluate(model, output)
    if options["report"] is not None:
        say(f"report: {options['report']}")


def conclude(result: Pruned) -> None:
    """Say what came of it in a sentence."""
    said = of_run(result, (result.manifest["model"]["bytes"], result.manifest["output"]["bytes"]))
    common.conclude(said.text[0].upper() + said.text[1:] + ".", said.good)


def to_evaluate(model: Path, output: Path) -> None:
    """Say how to measure what was written."""
    take.following("evaluate", model, output, names=(take.READING | take.MEANING) - take.THIS_DATA - {"data"}, missing="--data TEST_DATA")


def show(result: Pruned, output: Path, as_json: bool) -> None:
    """Say what was written."""
    for note in result.notes:
        say(f"Note: {note}")
    if as_json:
        answer(result.manifest)
        return
    answer(sizes_text(result.plan.before, result.plan.after))
    if traced := traced_text(result.plan.options.get("traced", {})):
        answer(f"({traced})")
    before, after = file_bytes(result.original), result.manifest["output"]["bytes"]
    answer(f"file {number(before)}B -> {number(after)}B ({after / before:.1%})")
    if (check := result.verification) is None:
        answer("not verified (--no-verify)")
    else:
        parts = ", ".join(f"{kind} input {error:.1e}" for kind, error in check.errors.items())
        word = "verified before the repair" if result.repaired else "verified"
        answer(f"{word}: equal to the masked original (relative difference on {parts}; allowed {check.tolerance:g})")
    if result.plan.figures:
        answer(figures_text(result.plan))
    answer(f"wrote {output}")
