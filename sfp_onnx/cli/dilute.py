"""dilute: zero connections without changing a shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..core.options import EXPANSIONS, OUTPUT, DataOptions, InspectOptions, MeasureOptions
from ..methods.dilution.connections import removed_share
from ..methods.dilution.stages import Diluted, DiluteOptions, dilute
from ..report import number
from ..report.text import accuracy_text, evaluation_text, sizes_text, table, traced_text
from . import arguments as take
from .common import answer, bar, say
from .prune import to_evaluate


@take.command(
    "dilute", take.model_argument, take.output_option, DiluteOptions,
    take.option("--store", type=click.Choice(["dense", "sparse"]), default="dense", show_default=True, section=OUTPUT,
                help="sparse: weights as sparse initializers where that is smaller."),
    take.data_option, take.file_option("--test-data", help="Held-out data: report accuracy before and after."), DataOptions, MeasureOptions,
    InspectOptions, take.file_option("--manifest", help="Write versions, hashes, options and layers as JSON."),
    take.threads_option, take.json_option, skip=EXPANSIONS)  # fmt: skip
def command(model: Path, output: Path, manifest: Path | None, store: str, as_json: bool, **options: Any) -> None:
    """Zero connections (kernels, weights) without changing a shape.

    Example: sfp-onnx dilute model.onnx -o sparse.onnx --data calibration.npz --rate 0.5
    """
    result = dilute(
        model, take.build(DiluteOptions, options), progress=bar, output=output, manifest=manifest, sparse=store == "sparse",
        **take.reading(options))  # fmt: skip
    if as_json:
        answer(result.manifest)
        return
    _show(result, output, store)
    if result.evaluation:
        answer(accuracy_text(result.evaluation))
        say(evaluation_text(result.evaluation))
    else:
        to_evaluate(model, output)


def _show(result: Diluted, output: Path, store: str) -> None:
    rows = [
        [item.layer, str(result.options.method), item.unit, f"{item.removed}/{item.total}", f"{item.removed / item.total:.1%}",
         f"{item.lost:.2%}", f"{item.lost_l1:.2%}"]
        for item in result.layers
    ]  # fmt: skip
    answer(table(["layer", "method", "unit", "removed", "share", "est. L1 error", "of kernel L1"], rows))
    for item in result.skipped:
        say(f"Skipped '{item.layer}': {item.reason}")
    for note in result.notes:
        say(f"Note: {note}")
    share = removed_share(result.layers)
    answer(f"{share:.1%} of the weights of {len(result.layers)} layers are zero; {len(result.skipped)} layers skipped")
    if result.cut:
        answer(sizes_text(result.before, result.after))
    if traced := traced_text(result.manifest["traced"]):
        answer(f"({traced})")
    before, after = result.manifest["model"]["bytes"], result.manifest["output"]["bytes"]
    answer(f"file {number(before)}B -> {number(after)}B ({after / before:.1%}, stored {store})")
    checks = "".join(f"; {step}: relative difference {error:.1e}" for step, error in result.checks.items())
    answer(f"verified: masked weights are zero, outputs finite{checks}")
    answer(f"wrote {output}")
