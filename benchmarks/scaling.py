"""Time and memory against the size of the model: ``python benchmarks/scaling.py [--nodes 1000 2500 ...] [--memory] [--gib 1.08]``.

Prints a Markdown table of processor time (one thread) for chains (Conv, BatchNormalization, Relu), residual networks (two such layers and
an Add per block), concatenating ones (C2f as in YOLOv8: Split, two bottlenecks, Concat) and decoders (RMSNorm, rotary attention, SwiGLU),
of 16 channels on 8 x 8 pixels or 16 tokens: nodes, milliseconds a node for `inspect` (load, trace, fold, label, resolve), for a cut of half
of every group with its verification, and for the same without it. ``--memory``: the most memory of a process that inspects, prunes without
verification and writes, or prunes and verifies a made-up model of so many GiB, as a multiple of the file: all pages count that are
resident, mapped files among them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from models import Builder
from onnx import TensorProto, helper

import sfp_onnx

WIDTH, TOKENS, HEADS = 16, 16, 2
GIB = 2**30
BLOCK, BLOCK_NODES = 13 * 1024**2 * 4, 49  # bytes of a block of the decoder with 1024 channels, and its nodes


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


def concatenating(count: int) -> onnx.ModelProto:
    """Blocks that split their channels, pass half of them through two bottlenecks, and join all, about ``count`` nodes."""
    b = Builder()

    def layer(x: str, ins: int, outs: int, kernel: int) -> str:
        y = b.conv(x, ins, outs, kernel)
        return b.node("Mul", [y, b.node("Sigmoid", [y])])

    x = layer("input", 3, WIDTH, 3)
    while len(b.nodes) < count:
        y, half = layer(x, WIDTH, WIDTH, 1), WIDTH // 2
        parts = [f"split_{len(b.nodes)}_a", f"split_{len(b.nodes)}_b"]
        b.nodes.append(helper.make_node("Split", [y], parts, f"Split_{len(b.nodes)}", axis=1))
        for _ in range(2):
            inner = layer(layer(parts[-1], half, half, 3), half, half, 3)
            parts.append(b.node("Add", [parts[-1], inner]))
        x = layer(b.node("Concat", parts, axis=1), half * len(parts), WIDTH, 1)
    return whole(b, x)


def whole(b: Builder, x: str) -> onnx.ModelProto:
    """With a last convolution, so that all before can shrink."""
    out = b.node("Conv", [x, b.weight("last.weight", b.random.standard_normal((4, WIDTH, 1, 1)))])
    return model(b, {"input": ["batch", 3, 8, 8]}, {out: ["batch", 4, 8, 8]})


def model(b: Builder, inputs: dict[str, list[object]], outputs: dict[str, list[object]]) -> onnx.ModelProto:
    """What was built, with its ends."""
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in ports.items()] for ports in (inputs, outputs)]
    graph = helper.make_graph(b.nodes, "scaling", *ends, b.weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def decoder(count: int, width: int = WIDTH * HEADS, inner: int = 0) -> onnx.ModelProto:
    """Blocks of RMSNorm, attention with rotary positions, and SwiGLU of ``inner`` channels, about ``count`` nodes."""
    b = Builder()
    inner, dim = inner or 3 * width, width // HEADS
    shape = b.weight("heads", np.array([0, 0, HEADS, dim]))
    whole = b.weight("joined", np.array([0, 0, width]))
    for tensor in b.weights[-2:]:
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.int64), tensor.name))
    angles = np.outer(np.arange(TOKENS), 1e4 ** (-np.arange(0, dim, 2) / dim))
    cos, sin = (b.weight(name, np.tile(f(angles), 2)[None, None]) for name, f in (("cos", np.cos), ("sin", np.sin)))
    scale, eps, two = b.weight("scale", np.array(dim**-0.5)), b.weight("eps", np.array(1e-6)), b.weight("two", np.array(2.0))

    def dense(x: str, ins: int, outs: int) -> str:
        return b.node("MatMul", [x, b.weight(f"w{len(b.nodes)}", b.random.standard_normal((ins, outs), np.float32) / np.float32(ins**0.5))])

    def norm(x: str) -> str:
        mean = b.node("Add", [b.node("ReduceMean", [b.node("Pow", [x, two])], axes=[-1]), eps])
        gamma = b.weight(f"gamma{len(b.nodes)}", b.random.uniform(0.5, 1.5, width))
        return b.node("Mul", [b.node("Div", [x, b.node("Sqrt", [mean])]), gamma])

    def turned(x: str) -> str:
        parts = [f"half_{len(b.nodes)}_a", f"half_{len(b.nodes)}_b"]
        b.nodes.append(helper.make_node("Split", [x], parts, f"Split_{len(b.nodes)}", axis=3))
        other = b.node("Concat", [b.node("Neg", [parts[1]]), parts[0]], axis=3)
        return b.node("Add", [b.node("Mul", [x, cos]), b.node("Mul", [other, sin])])

    def heads(x: str) -> str:
        return b.node("Transpose", [b.node("Reshape", [x, shape])], perm=[0, 2, 1, 3])

    x = dense("input", 8, width)
    while len(b.nodes) < count:
        y = norm(x)
        q, k, v = (heads(dense(y, width, width)) for _ in range(3))
        scores = b.node("MatMul", [turned(q), b.node("Transpose", [turned(k)], perm=[0, 1, 3, 2])])
        y = b.node("MatMul", [b.node("Softmax", [b.node("Mul", [scores, scale])], axis=-1), v])
        y = b.node("Reshape", [b.node("Transpose", [y], perm=[0, 2, 1, 3]), whole])
        x = b.node("Add", [x, dense(y, width, width)])
        y = norm(x)
        gate = dense(y, width, inner)
        gate = b.node("Mul", [gate, b.node("Sigmoid", [gate])])
        x = b.node("Add", [x, dense(b.node("Mul", [gate, dense(y, width, inner)]), inner, width)])
    return model(b, {"input": ["batch", TOKENS, 8]}, {dense(norm(x), width, 4): ["batch", TOKENS, 4]})


MADE = {"chain": chain, "residual": residual, "C2f": concatenating, "decoder": decoder}


def row(name: str, made: onnx.ModelProto) -> list[str]:
    """One line of the table of times."""
    nodes, moments = len(made.graph.node), [time.process_time()]
    analysis = sfp_onnx.inspect(made)
    moments.append(time.process_time())
    for verify in (True, False):
        prune(analysis, verify)
        moments.append(time.process_time())
    return [name, str(nodes), *(f"{seconds / nodes * 1e3:.2f}" for seconds in np.diff(moments))]


def prune(source: object, verify: bool, path: str | None = None) -> object:
    """Half of every group leaves."""
    return sfp_onnx.prune(source, sfp_onnx.PlanOptions(ratio=0.5), verify=verify, output=sfp_onnx.OutputOptions(path=path))


# ---- memory ----------------------------------------------------------------------------------------------------------

STEPS = {
    "inspect": "sfp_onnx.inspect(source)",
    "prune --no-verify": "sfp_onnx.prune(source, half, verify=False, output=to)",
    "prune": "sfp_onnx.prune(source, half, output=to)",
}
PROGRAM = """
import sys, sfp_onnx
source, target = sys.argv[1:]
half, to = sfp_onnx.PlanOptions(ratio=0.5), sfp_onnx.OutputOptions(path=target)
{step}
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def memory(gib: float) -> None:
    """Print the table of memory: of a decoder in one file and with external data, each step in a process of its own."""
    print("| file | GiB | step | GiB at most | times the file |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for form in ("one file", "external data"):
            path = Path(folder) / form.split()[0] / "model.onnx"
            path.parent.mkdir()
            made = decoder(round(gib * GIB / BLOCK) * BLOCK_NODES, 1024)
            onnx.save(made, path, save_as_external_data=form != "one file", location="model.onnx.data")
            del made
            size = sum(file.stat().st_size for file in path.parent.iterdir()) / GIB
            for name, step in STEPS.items():
                command = [sys.executable, "-c", PROGRAM.format(step=step), str(path), str(path.with_name("out.onnx"))]
                told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                peak = int(told.split()[-1]) / 2**20
                print(f"| {form} | {size:.2f} | {name} | {peak:.2f} | {peak / size:.2f} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1000, 2500, 5000, 10000])
    parser.add_argument("--networks", nargs="+", default=[*MADE], choices=[*MADE])
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    parser.add_argument("--gib", type=float, default=1.08, help="size of the model for --memory")
    options = parser.parse_args()
    if options.memory:
        memory(options.gib)
        return
    print("| network | nodes | inspect, ms a node | prune and verify | prune --no-verify |")
    print("|---|---|---|---|---|")
    sfp_onnx.inspect(chain(10))  # imports and first sessions
    for name in options.networks:
        for count in options.nodes:
            print(f"| {' | '.join(row(name, MADE[name](count)))} |", flush=True)


if __name__ == "__main__":
    main()
