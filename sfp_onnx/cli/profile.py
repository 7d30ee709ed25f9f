"""profile: measure what a model costs on this machine, for plans made here or elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ..coupling.analysis import inspect, load
from ..latency import to_json
from ..latency.profiling import measure_device_profile, seconds_of_nodes
from ..report.manifest import write_json
from ..report.text import table
from ..runtime import Setup
from .arguments import check_outputs, json_option, layernorm_option, machine_options, model_argument, shape_option
from .common import EPILOG, FILE, bar, guarded, say

SHOWN = 10


@click.command("profile", epilog=EPILOG)
@model_argument
@click.option("-o", "--output", type=FILE, required=True, help="Where the profile (JSON) goes.")
@machine_options
@click.option("--fresh", is_flag=True, help="Measure again, whatever the cache holds.")
@shape_option
@layernorm_option
@json_option
@guarded
def profile_command(
    model: Path, output: Path, threads: int, batch: int, provider: str, profile_budget: float, fresh: bool,
    input_shapes: dict[str, list[int]], cut_layernorm: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measure the model's nodes at many widths on this machine; plan with it anywhere.

    Example: sfp-onnx profile model.onnx -o cpu.json --threads 1
    """
    loaded = load(model)
    check_outputs(loaded.paths, output)
    analysis = inspect(loaded, input_shapes, cut_layernorm=cut_layernorm)
    profile = measure_device_profile(analysis, Setup(threads, provider), batch, bar, fresh, profile_budget)
    write_json(output, to_json(profile), loaded.paths)
    if as_json:
        click.echo(json.dumps(to_json(profile), indent=1))
        return
    where = profile.device
    click.echo(f"{where['cpu']}, onnxruntime {where['onnxruntime']}, {where['provider']}")
    click.echo(f"threads {where['threads'] or 'all'}, batch {batch}")
    block = profile.block
    curve = ", ".join(f"{width}: {ratio:.2f}" for width, ratio in block.curve.items())
    click.echo(f"convolutions run in blocks of {block.width} channels (time by width: {curve})")
    if profile.cut_short:
        click.echo(f"fewer widths were timed than usual, since --profile-budget {profile.cut_short:g} s was spent")
    click.echo(f"measured {profile.seconds * 1e3:.3f} ms for the whole model; sum of kernels times {profile.factor:.3f}")
    click.echo(f"mean error of predictions on {profile.checked} models with other widths, not used to fit: {profile.error:.1%}")
    rows = [(name, f"{own * 1e3:.3f}", f"{own / profile.seconds:.1%}") for name, own in seconds_of_nodes(analysis, profile)[:SHOWN]]
    click.echo(table(("node (first output)", "ms", "share"), rows))
    say(f"Next: sfp-onnx prune {model} -o {model.stem}-pruned.onnx --target latency=60% --device-profile {output}")
