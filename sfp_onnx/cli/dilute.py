"""dilute: zero connections without changing a shape."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from ..core.options import RepairOptions
from ..coupling.analysis import inspect, load
from ..evaluation import evaluate
from ..graph.save import together
from ..methods.dilution import METHODS
from ..methods.dilution.masks import removed_share
from ..methods.dilution.stages import Diluted, DiluteOptions, check_dilution, default_method, dilute, dilution_manifest
from ..report.manifest import write_json
from ..report.text import evaluation_text, number, sizes_text, table
from .arguments import (
    DATA,
    NOTHING,
    check_outputs,
    dataset,
    json_option,
    manifest_option,
    model_argument,
    output_option,
    preprocessing_options,
    profile_options,
    shape_option,
)
from .common import EPILOG, FILE, bar, guarded, say
from .prune import _accuracy

NAMES = ", ".join(own.pattern or own.name for own in METHODS.values())


@click.command("dilute", epilog=EPILOG)
@model_argument
@output_option
@click.option("--method", help=f"How connections are chosen: {NAMES}.  [default: obs with data, else l1]")
@click.option("--rate", type=float, help="Share of the kernels (weights, blocks) to remove; AFCC and nm set it themselves.")
@click.option("--scope", type=click.Choice(["layer", "global", "filter"]), default="layer", show_default=True,
              help="The same share of every layer, one ranking over all layers, or the same share of every filter.")
@click.option("--layers", metavar="REGEX", help="Layers (node or weight names) to dilute.  [default: all]")
@click.option("--refit/--no-refit", default=None, help="Re-fit the remaining weights by least squares.  [default: with data]")
@click.option("--store", type=click.Choice(["dense", "sparse"]), default="dense", show_default=True,
              help="sparse: weights as sparse initializers where that is smaller.")
@click.option("--force", is_flag=True, help="Dilute layers by labels even where these carry too little signal.")
@profile_options
@click.option("--data", type=FILE, help="Calibration data: " + DATA)
@click.option("--test-data", type=FILE, help="Held-out data: report accuracy before and after.")
@preprocessing_options
@shape_option
@manifest_option
@json_option
@guarded
def dilute_command(
    model: Path, output: Path, data: Path | None, test_data: Path | None, manifest: Path | None, store: str, as_json: bool, **options: Any
) -> None:
    """Zero connections (kernels, weights) without changing a shape.

    Example: sfp-onnx dilute model.onnx -o sparse.onnx --data calibration.npz --rate 0.5
    """
    names = ("rate", "scope", "layers", "refit", "force", "seed", "probe", "pool")
    method = options["method"] or default_method(data is not None)
    wanted = DiluteOptions(method=method, repair=RepairOptions(seed=options["seed"]), **{name: options[name] for name in names})
    check_dilution(wanted, data is not None)
    loaded = load(model)
    check_outputs([*loaded.paths, data, test_data, options["labels"]], output, manifest)
    held_out = dataset(loaded, test_data, {**options, "samples": None, "labels": None}) if test_data else None
    shared = NOTHING if test_data and not data else {}  # given for the held-out data
    data_set = dataset(loaded, data, {**options, **shared})
    say(f"method: {method}{'' if options['method'] else ' (default)'}")
    analysis = inspect(loaded, options["input_shapes"], data_set)
    result = dilute(analysis, wanted, data_set, bar)
    measured = None if held_out is None else evaluate([loaded, result.model], held_out, progress=bar)
    sparse = store == "sparse"
    found = dilution_manifest(result, output, sparse)
    with together():
        result.save(output, sparse=sparse)
        if manifest is not None:
            write_json(manifest, found, [*loaded.paths, output])
    if as_json:
        click.echo(json.dumps(found | {"evaluation": [asdict(own) for own in measured] if measured else None}, indent=1))
        return
    _show(result, output, store, found)
    if measured:
        measured[1] = replace(measured[1], model=str(output))
        _accuracy(measured)
        say(evaluation_text(measured))


def _show(result: Diluted, output: Path, store: str, found: dict[str, Any]) -> None:
    click.echo(_table(result))
    for item in result.skipped:
        say(f"Skipped '{item.layer}': {item.reason}")
    for note in result.notes:
        say(f"Note: {note}")
    share = removed_share(result.layers)
    click.echo(f"{share:.1%} of the weights of {len(result.layers)} layers are zero; {len(result.skipped)} layers skipped")
    if result.cut:
        click.echo(sizes_text(result.before, result.after))
    before, after = found["model"]["bytes"], found["output"]["bytes"]
    click.echo(f"file {number(before)}B -> {number(after)}B ({after / before:.1%}, stored {store})")
    checks = "".join(f"; {step}: relative difference {error:.1e}" for step, error in result.checks.items())
    click.echo(f"verified: masked weights are zero, outputs finite{checks}")
    click.echo(f"wrote {output}")


def _table(result: Diluted) -> str:
    rows = [
        [item.layer, result.options.method, item.unit, f"{item.removed}/{item.total}", f"{item.removed / item.total:.1%}",
         f"{item.lost:.2%}", f"{item.lost_l1:.2%}"]
        for item in result.layers
    ]  # fmt: skip
    return table(["layer", "method", "unit", "removed", "share", "est. L1 error", "of kernel L1"], rows)
