"""Planned against measured latency: ``python benchmarks/latency.py [folder with models/ and zoo/ [PROVIDER]] > benchmarks/latency.md``.

A PROVIDER, such as openvino, needs a build of onnxruntime that has it (``pip install onnxruntime-openvino openvino``, in an environment of
its own); the first four models are measured then.

``python benchmarks/latency.py forms`` times a LayerNormalization of which channels have left, in several forms (`FORMS`), beside the whole
one: behind an Add, as in a residual stream, and behind another operator. All of a shape in one interleaved run.

For each model and target (80, 60, 40 % of the original's latency): plan with the latency model and the closed loop, then time the
original and the three results again, interleaved in one run, one thread, batch 1, minimum of 400. The weights of the zoo are random,
so only latency means anything here; scores are magnitudes.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from files import HOME, needed
from onnx import TensorProto, helper, numpy_helper

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


# ---- forms of a LayerNormalization without the channels that left: all of them as if these were zeros ------------------


@dataclass(frozen=True)
class Norm:
    """A graph that normalises what Add, or Mul, makes of two inputs: ``kept`` of ``channels``, the rest being zeros."""

    channels: int
    kept: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    held: list[onnx.TensorProto] = field(default_factory=list)

    def op(self, kind: str, *given: Any, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node; arrays become constants."""
        names = []
        for value in given:
            names.append(value if isinstance(value, str) else f"c{len(self.held)}")
            self.held.extend([] if isinstance(value, str) else [numpy_helper.from_array(np.asarray(value), names[-1])])
        made = [f"t{len(self.nodes)}_{at}" for at in range(outputs)]
        self.nodes.append(helper.make_node(kind, names, made, **attributes))
        return made[0] if outputs == 1 else made

    def vectors(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Scale and bias of the first channels."""
        random = np.random.default_rng(0)
        return tuple(random.normal(1, 0.2, self.channels).astype(np.float32)[:count] for _ in range(2))

    def scaled(self, x: str) -> str:
        """Times the scale, plus the bias."""
        scale, bias = self.vectors(self.kept)
        return self.op("Add", self.op("Mul", x, scale), bias)

    def root(self, mean: str, squares: str) -> str:
        """The standard deviation over all channels, from the mean and the mean square about it of the kept ones."""
        removed = self.op("Mul", self.op("Mul", mean, mean), np.float32(1 - self.kept / self.channels))
        return self.op("Sqrt", self.op("Add", self.op("Add", squares, removed), np.float32(1e-5)))


def whole(net: Norm, x: str) -> str:
    return net.op("LayerNormalization", x, *net.vectors(net.channels), axis=-1, epsilon=1e-5)


def padded(net: Norm, x: str) -> str:
    """As the package writes it."""
    pads = np.asarray([0, 0, 0, 0, 0, net.channels - net.kept])
    return net.op("Slice", whole(net, net.op("Pad", x, pads)), np.asarray([0]), np.asarray([net.kept]), np.asarray([2]))


def sums(net: Norm, x: str) -> str:
    share = np.float32(1 / net.channels)
    mean = net.op("Mul", net.op("ReduceSum", x, np.asarray([-1]), keepdims=1), share)
    apart = net.op("Sub", x, mean)
    squares = net.op("Mul", net.op("ReduceSumSquare", apart, axes=[-1], keepdims=1), share)
    return net.scaled(net.op("Div", apart, net.root(mean, squares)))


def products(net: Norm, x: str) -> str:
    share = np.full((net.kept, 1), 1 / net.channels, np.float32)
    mean = net.op("MatMul", x, share)
    apart = net.op("Sub", x, mean)
    return net.scaled(net.op("Div", apart, net.root(mean, net.op("MatMul", net.op("Mul", apart, apart), share))))


def corrected(net: Norm, x: str) -> str:
    """LayerNormalization of what is kept, and from its mean m and deviation s to those of all, M and S:
    (x - M) / S = (x - m) / s * s / S + (m - M) / S."""
    ones, share = np.ones(net.kept, np.float32), np.float32(net.kept / net.channels)
    own, mean, inverse = net.op("LayerNormalization", x, ones, 0 * ones, outputs=3, axis=-1, epsilon=1e-12)
    squares = net.op("Mul", net.op("Reciprocal", net.op("Mul", inverse, inverse)), share)
    both = net.op("Mul", mean, np.float32(np.sqrt(net.kept / net.channels)))  # its square, times what is removed, is what the mean adds
    root = net.root(both, squares)
    moved = net.op("Div", net.op("Mul", mean, np.float32(1 - net.kept / net.channels)), root)
    return net.scaled(net.op("Add", net.op("Mul", own, net.op("Reciprocal", net.op("Mul", inverse, root))), moved))


FORMS = {"whole": whole, "Pad, LayerNormalization, Slice": padded, "sums": sums, "products": products, "corrected": corrected}
SHAPES = ((1, 128, 384, 256), (1, 32, 384, 256), (8, 197, 192, 128), (1, 197, 768, 512), (1, 16, 96, 48))


def formed(name: str, shape: Sequence[int], join: str) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A model, and what it is fed."""
    batch, rows, channels, kept = shape
    width, net = channels if name == "whole" else kept, Norm(channels, kept)
    output = FORMS[name](net, net.op(join, "a", "b"))
    ports = [helper.make_tensor_value_info(port, TensorProto.FLOAT, ["n", rows, width]) for port in "ab"]
    answer = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
    graph = helper.make_graph(net.nodes, "norm", ports, [answer], net.held)
    random = np.random.default_rng(1)
    feeds = {port: random.normal(0.3, 1, (batch, rows, channels)).astype(np.float32)[..., :width].copy() for port in "ab"}
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), feeds


def forms() -> None:
    """The table of all forms: microseconds, and the greatest difference to the form that the package writes."""
    print(f"{device(SETUP)['cpu']}, onnxruntime {version()}, load {os.getloadavg()[0]:.1f}\n")
    print("| behind | shape -> kept | " + " | ".join(FORMS) + " | greatest difference |\n|---" + "|---" * (len(FORMS) + 2) + "|")
    for join in ("Add", "Mul"):
        for shape in SHAPES:
            made = [formed(name, shape, join) for name in FORMS]
            sessions, feeds = [open_timed(sfp_onnx.load(model), SETUP) for model, _ in made], [fed for _, fed in made]
            answers = [session.run(fed)[0] for session, fed in zip(sessions, feeds, strict=True)][1:]
            apart = max(float(np.abs(answer - answers[0]).max()) for answer in answers)
            times = [1e6 * min(own) for own in interleaved(sessions, feeds, REPEATS, steady_clock(SETUP))]
            best = min(times[1:])
            cells = [f"**{value:.0f}**" if value == best else f"{value:.0f}" for value in times]
            print(f"| {join} | {'x'.join(map(str, shape[:3]))} -> {shape[3]} | {' | '.join(cells)} | {apart:.0e} |", flush=True)


def main() -> None:
    """Measure and print."""
    if sys.argv[1:] == ["forms"]:
        return forms()
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
