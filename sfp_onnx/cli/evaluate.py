"""evaluate: measure models on data, and gate on a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..core.options import DATA, ENERGY, RUN, DataOptions, InspectOptions, MeasureOptions, PlanOptions
from ..evaluation import GateOptions, Verdict
from ..graph.load import load
from ..latency.timing import Latency
from ..pipeline.measured import compared
from ..report.text import evaluation_text
from ..report.verdict import of_models
from . import arguments as take
from .common import answer, bar, conclude, say

JUDGED = MeasureOptions.__dataclass_fields__["output_name"].metadata["option"].help  # no file is written here: it has the short name, too


@take.command(
    "evaluate", take.argument("models", nargs=-1, required=True),
    take.file_option("--data", help=f"Test data: {take.SOURCES}", section=DATA, required=True), DataOptions,
    take.some(MeasureOptions, "task", "metric"),
    take.option("--output", "--output-name", "output_name", metavar="NAME", help=JUDGED, section=DATA, advanced=True),
    take.option("--latency/--no-latency", default=True, show_default=True, help="Time the models, interleaved.", section=RUN),
    take.option("--energy", is_flag=True, help=ENERGY, section=RUN, advanced=True),
    take.some(PlanOptions, "threads", "batch", "provider"), GateOptions, take.some(InspectOptions, "custom_ops"), take.report_option,
    take.json_option, take.gated)  # fmt: skip
def command(
    models: list[Path], custom_ops: tuple[str, ...], latency: bool, energy: bool, report: Path | None, as_json: bool, **options: Any
) -> Sequence[Verdict]:
    """Measure models on data; the first is the reference.

    Example: sfp-onnx evaluate model.onnx smaller.onnx --data test.npz
    """
    gate, loaded = take.build(GateOptions, options), [load(model, custom_ops) for model in models]
    how = Latency.of(options)
    measured = compared(
        loaded, latency=how if latency else None, energy=how if energy else None, progress=bar, gate=gate, report=report,
        **take.reading(options))  # fmt: skip
    results = measured.evaluations
    answer([asdict(result) for result in results] if as_json else evaluation_text(results))
    said = of_models(results)
    if said is not None and not as_json:
        conclude(f"{said.text}.", said.good)
    if report is not None:
        say(f"report: {report}")
    for name, passed, text in measured.verdicts:
        say(f"{'passed' if passed else 'FAILED'}: {name}: {text}")
    return measured.verdicts
