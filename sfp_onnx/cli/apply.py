"""apply: cut a model as a plan says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.options import EXPANSIONS, DataOptions, InspectOptions, MeasureOptions, OutputOptions, RepairOptions
from ..graph.load import load
from ..pipeline import applied
from ..report.manifest import read_plan
from . import arguments as take
from .common import bar
from .prune import conclude, show, to_evaluate

FORMS = ("report", "card", "energy", "fp16", "quantize", "vocabulary", "unknown_token", "save_ort", "locked")


@take.command(
    "apply", take.model_argument, take.argument("plan"), take.output_option, take.data_option, DataOptions, MeasureOptions, RepairOptions,
    OutputOptions, InspectOptions, take.verify_option, take.threads_option, take.json_option,
    skip=(*FORMS, "input_shapes", *EXPANSIONS))  # fmt: skip
def command(model: Path, plan: Path, output: Path, custom_ops: tuple[str, ...], verify: bool, as_json: bool, **options: Any) -> None:
    """Cut a model as a plan says.

    Example: sfp-onnx apply model.onnx plan.json -o smaller.onnx
    """
    result = applied.apply(
        load(model, custom_ops), read_plan(plan), verify=verify, progress=bar, repair=take.build(RepairOptions, options),
        output=take.build(OutputOptions, options, path=output), paths=(plan,), **take.reading(options))  # fmt: skip
    show(result, output, as_json)
    if not as_json:
        conclude(result)
        to_evaluate(model, output)
