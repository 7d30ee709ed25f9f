"""Time of the analysis against the number of nodes: ``python benchmarks/scaling.py [--nodes 50 100 ...]``.

Prints a Markdown table for chains (Conv, BatchNormalization, Relu) and residual networks (two such layers and an Add per block) of
16 channels on 8 x 8 pixels: nodes, seconds for `inspect` (load, trace, fold, label, resolve; minimum of three runs), microseconds per
node, and seconds for the cut with its verification (one run, half of every group).
"""

from __future__ import annotations

import argparse
import time

import onnx
from models import Builder
from onnx import TensorProto, helper

import sfp_onnx

WIDTH = 16


def chain(count: int) -> onnx.ModelProto:
    """Layers one behind the other, about ``count`` nodes."""
    b = Builder()
    x = b.node("Relu", [b.conv("input", 3, WIDTH, 3)])
    while len(b.nodes) < count:
        x = b.node("Relu", [b.conv(x, WIDTH, WIDTH, 3)])
    return whole(b, x)


def residual(count: int) -> onnx.ModelProto:
    """Blocks of two layers with an identity shortcut, about ``count`` nodes."""
    b = Builder()
    x = b.node("Relu", [b.conv("input", 3, WIDTH, 3)])
    while len(b.nodes) < count:
        y = b.conv(b.node("Relu", [b.conv(x, WIDTH, WIDTH, 3)]), WIDTH, WIDTH, 3)
        x = b.node("Relu", [b.node("Add", [y, x])])
    return whole(b, x)


def whole(b: Builder, x: str) -> onnx.ModelProto:
    """With a last convolution, so that all before can shrink."""
    out = b.node("Conv", [x, b.weight("last.weight", b.random.standard_normal((4, WIDTH, 1, 1)))])
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size, 8, 8]) for name, size in (("input", 3), (out, 4))]
    graph = helper.make_graph(b.nodes, "scaling", ports[:1], ports[1:], b.weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def row(name: str, model: onnx.ModelProto) -> list[str]:
    """One line of the table."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        analysis = sfp_onnx.inspect(model)
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    sfp_onnx.prune(analysis, sfp_onnx.PlanOptions(ratio=0.5))
    nodes = len(model.graph.node)
    return [name, str(nodes), f"{min(times):.3f}", f"{min(times) / nodes * 1e6:.0f}", f"{time.perf_counter() - start:.3f}"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[50, 100, 200, 400, 800, 1600])
    options = parser.parse_args()
    print("| network | nodes | seconds to inspect | microseconds per node | seconds to prune and verify |")
    print("|---|---|---|---|---|")
    sfp_onnx.inspect(chain(10))  # imports and first sessions
    for name, make in (("chain", chain), ("residual", residual)):
        for count in options.nodes:
            print(f"| {' | '.join(row(name, make(count)))} |", flush=True)


if __name__ == "__main__":
    main()
