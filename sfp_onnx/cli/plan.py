"""plan: decide which channels leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import pipeline
from ..core.options import DataOptions, InspectOptions, MeasureOptions, PlanOptions, RepairOptions
from ..planning import to_json
from ..report.text import figures_text, plan_text
from . import arguments as take
from .common import answer, bar
from .config import settle


@take.command(
    "plan", take.model_argument, take.file_option("-o", "--output", help="Where the plan (JSON) goes.", required=True), take.data_option,
    take.score_option, PlanOptions, take.eval_option, DataOptions, MeasureOptions, InspectOptions, RepairOptions,
    take.json_option)  # fmt: skip
def command(model: Path, output: Path, as_json: bool, **options: Any) -> None:
    """Decide which channels leave; cut nothing.

    Example: sfp-onnx plan model.onnx -o plan.json --target macs=50%
    """
    settle(options)
    plan = pipeline.plan(
        model, take.build(PlanOptions, options), progress=bar, output=output, **take.scoring(options), **take.reading(options)
    )
    answer(to_json(plan) if as_json else plan_text(plan))
    if plan.figures and not as_json:
        answer(figures_text(plan))
    take.following("apply", model, output, "-o", f"{model.stem}-pruned.onnx", names=take.READING)
