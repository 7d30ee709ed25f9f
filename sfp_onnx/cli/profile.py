"""profile: measure what a model costs on this machine, for plans made here or elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.options import LATENCY, RUN, InspectOptions, PlanOptions
from ..latency import to_json
from ..latency.profiling import seconds_of_nodes
from ..pipeline import measured
from ..report.text import table
from . import arguments as take
from .common import answer, bar

SHOWN = 10


@take.command(
    "profile", take.model_argument, take.file_option("-o", "--output", help="Where the profile (JSON) goes.", required=True),
    take.some(PlanOptions, "threads", "batch", "provider", "profile_budget", "adb", "board_python", "perf_test"), InspectOptions,
    take.option("--host", multiple=True, metavar="USER@BOARD", section=LATENCY,
                help="Time on this board, over ssh. Repeatable: a profile of each, OUTPUT-USER@BOARD."),
    take.option("--fresh", is_flag=True, help="Measure again, whatever the cache holds.", section=RUN), take.json_option)  # fmt: skip
def command(model: Path, output: Path, host: tuple[str, ...], fresh: bool, as_json: bool, **options: Any) -> None:
    """Measure the model's nodes at many widths on this machine, or on a board (--host, --adb); plan with it anywhere.

    Example: sfp-onnx profile model.onnx -o cpu.json --threads 1
    """
    for name in host or (None,):
        place = output if name is None or len(host) == 1 else output.with_name(f"{output.stem}-{name}{output.suffix}")
        _measure(model, place, take.build(PlanOptions, options, host=name), take.build(InspectOptions, options), fresh, as_json)


def _measure(model: Path, output: Path, machine: PlanOptions, inspecting: InspectOptions, fresh: bool, as_json: bool) -> None:
    """Measure on one machine, and say what was found."""
    analysis, profile = measured.device_profile(model, machine, bar, inspect_options=inspecting, fresh=fresh, output=output)
    if as_json:
        answer(to_json(profile))
        return
    where, block = profile.device, profile.block
    answer(f"{where['host'] + ': ' if 'host' in where else ''}{where['cpu']}, onnxruntime {where['onnxruntime']}, {where['provider']}")
    answer(f"threads {where['threads'] or 'all'}, batch {machine.batch}")
    curve = ", ".join(f"{width}: {ratio:.2f}" for width, ratio in block.curve.items())
    answer(f"convolutions run in blocks of {block.width} channels (time by width: {curve})")
    if profile.cut_short:
        answer(f"fewer widths were timed than usual, since --profile-budget {profile.cut_short:g} s was spent")
    answer(f"measured {profile.seconds * 1e3:.3f} ms for the whole model; sum of kernels times {profile.factor:.3f}")
    answer(f"mean error of predictions on {profile.checked} models with other widths, not used to fit: {profile.error:.1%}")
    slowest = seconds_of_nodes(analysis, profile)[:SHOWN]
    rows = [(name, f"{seconds * 1e3:.3f}", f"{seconds / profile.seconds:.1%}") for name, seconds in slowest]
    answer(table(("node (first output)", "ms", "share"), rows))
    words = (model, "-o", f"{model.stem}-pruned.onnx", "--target", "latency=60%", "--device-profile", output)
    take.following("prune", *words, names={"threads", "batch", "provider", *take.TRACING}, missing="--data FOLDER_OR_NPZ")
