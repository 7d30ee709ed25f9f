"""Planned against measured latency: ``python benchmarks/latency.py [folder with models/ and zoo/ [PROVIDER]] > benchmarks/latency.md``.

A PROVIDER, such as openvino, needs a build of onnxruntime that has it (``pip install onnxruntime-openvino openvino``, in an environment of
its own); the first four models are measured then.

For each model and target (80, 60, 40 % of the original's latency): plan with the latency model and the closed loop, then time the
original and the three results again, interleaved in one run, one thread, batch 1, minimum of 400. The weights of the zoo are random,
so only latency means anything here; scores are magnitudes.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from files import HOME, needed

import sfp_onnx
from sfp_onnx.latency.measure import device, timing_feeds
from sfp_onnx.latency.profiling import measure_device_profile
from sfp_onnx.runtime import Setup, interleaved, open_timed, steady_clock, version

MODELS = (
    "models/resnet56_cifar10_bn", "models/resnet20_cifar10", "zoo/mobilenet_v3_small", "zoo/squeezenet1_1", "zoo/resnet18__dynamo",
    "zoo/unet", "zoo/yolov5_c3", "zoo/shufflenet_v2_x1_0",
)  # fmt: skip
TARGETS = (80, 60, 40)
PROVIDER = sys.argv[2] if len(sys.argv) > 2 else "cpu"
SETUP = Setup(1, PROVIDER)
LEAST = 1 if PROVIDER == "cpu" else 4  # OpenVINO 2026.4 cannot compile ResNet-56 with a branch that vanished
REPEATS = 400


def row(path: Path) -> str:
    """One line per model: the profile, and per target the predicted, looped and finally measured share."""
    analysis = sfp_onnx.inspect(path)
    start = time.perf_counter()
    profile = measure_device_profile(analysis, SETUP, fresh=True)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    measure_device_profile(analysis, SETUP)
    cached = time.perf_counter() - start
    models, cells, spent = [analysis.model], [], []
    for target in TARGETS:
        start = time.perf_counter()
        try:
            options = sfp_onnx.PlanOptions(targets=(f"latency={target}%",), threads=1, provider=PROVIDER, min_channels=LEAST)
            plan = sfp_onnx.plan(analysis, options, "magnitude")
        except sfp_onnx.TargetError as error:
            cells.append([str(error).partition("best reachable is ")[2].partition(")")[0] + ")", "", ""])
            models.append(analysis.model)
            continue
        finally:
            spent.append(f"{time.perf_counter() - start:.0f}")
        figures = plan.figures["latency"]
        models.append(sfp_onnx.apply(analysis, plan).model)
        cells.append([f"{figures[key] / figures['before']:.1%}" for key in ("predicted", "actual")])
    feeds = timing_feeds(analysis, 1)
    sessions = [open_timed(own, SETUP) for own in models]
    times = [min(own) for own in interleaved(sessions, [feeds] * len(sessions), REPEATS, steady_clock(SETUP))]
    found = [f"{' / '.join(own[:2])} / **{other / times[0]:.1%}**" for own, other in zip(cells, times[1:], strict=True)]
    first = f"{path.stem} | {times[0] * 1e3:.3f} ms | {seconds:.1f} s, then {cached:.2f} s | {profile.error:.1%}"
    return f"| {first} | {' | '.join(found)} | {', '.join(spent)} s |"


def main() -> None:
    """Measure and print."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else HOME
    print("# Planned and measured latency\n")
    print("`python benchmarks/latency.py`: per target, predicted by the last plan / measured by the loop / **measured again at the end**,")
    print("as shares of the original in the same interleaved run. One thread, batch 1, minimum of at least 50 (loop) and 400 (end).")
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print("Times are processor time of the one thread, so that other programs do not count; they equal wall time on an idle machine.")
    print("The machine is shared and noisy; differences of one or two points between the last two numbers are noise.")
    print(f"{device(SETUP)['cpu']}, onnxruntime {version()}, {SETUP.words(1)}, load {load} at the start.\n")
    heads = " | ".join(f"target {target} %" for target in TARGETS)
    print(f"| model | original | profile: first, cached | error of predictions | {heads} | planning |")
    print("|---|---|---|---|---|---|---|---|")
    for name in MODELS[: None if PROVIDER == "cpu" else 4]:
        print(row(needed(root / f"{name}.onnx")), flush=True)


if __name__ == "__main__":
    main()
