"""What the sub-graphs of If, Loop and Scan cost: counted, named, and left as it is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx.helper as oh
import pytest
from building import FLOAT, Builder, assert_exact, random_plan

import sfp_onnx
from sfp_onnx.report.text import inspection, inspection_text

INT64, BOOL = onnx.TensorProto.INT64, onnx.TensorProto.BOOL
STEPS, WIDTH = 7, 16


def graph(nodes: Sequence[onnx.NodeProto], inputs: Sequence[tuple[str, int]], outputs: Sequence[tuple[str, int]]) -> onnx.GraphProto:
    ports = [[oh.make_tensor_value_info(name, kind, None if kind == FLOAT else []) for name, kind in some] for some in (inputs, outputs)]
    return oh.make_graph(nodes, "body", *ports)


def step(weight: str, give: str) -> list[onnx.NodeProto]:
    """tanh of a state times a weight, to itself."""
    nodes = [oh.make_node("MatMul", ["h", weight], ["m"]), oh.make_node("Tanh", ["m"], ["t"]), oh.make_node("Identity", ["t"], [give])]
    return nodes


def looped(b: Builder, y: str, weight: str, known: bool) -> str:
    """As often as a constant says, or (unknown) as the steps that are stacked tell."""
    body = [*step(weight, "again"), oh.make_node("Identity", ["c"], ["on"]), oh.make_node("Identity", ["t"], ["row"])]
    inner = graph(body, [("i", INT64), ("c", BOOL), ("h", FLOAT)], [("on", BOOL), ("again", FLOAT), ("row", FLOAT)])
    often = b.const(STEPS, np.int64) if known else b.op("Cast", b.op("ReduceMax", b.op("Sign", b.op("Abs", y)), keepdims=0), to=INT64)
    often = often if known else b.op("Mul", often, b.const(STEPS, np.int64))
    return b.op("Loop", often, "", y, body=inner, outputs=["state", "rows"], name="loop")[0]


def scanned(b: Builder, y: str, weight: str, known: bool) -> str:
    body = [*step(weight, "again"), oh.make_node("Add", ["again", "x_t"], ["next"])]
    inner = graph(body, [("h", FLOAT), ("x_t", FLOAT)], [("next", FLOAT)])
    rows = b.const(np.ones((STEPS, 1, WIDTH)))
    return b.op("Scan", y, rows, body=inner, num_scan_inputs=1, name="loop")


def chosen(b: Builder, y: str, weight: str, known: bool) -> str:
    """The dearer of both, which here is a loop."""
    body = [*step(weight, "again"), oh.make_node("Identity", ["c"], ["on"])]
    inner = graph(body, [("i", INT64), ("c", BOOL), ("h", FLOAT)], [("on", BOOL), ("again", FLOAT)])
    often, nothing = b.const(STEPS, np.int64), oh.make_node("Abs", [y], ["small"])
    branch = graph([oh.make_node("Loop", [often, "", y], ["large"], body=inner)], [], [("large", FLOAT)])
    way = b.op("Greater", b.op("ReduceMax", y, keepdims=0), b.const(0.0))
    return b.op("If", way, then_branch=branch, else_branch=graph([nothing], [], [("small", FLOAT)]), name="loop")


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("kind", [looped, scanned, chosen])
def test_what_runs_inside_is_counted_and_stays(kind, known: bool) -> None:
    b = Builder(17, 1)
    x = b.gemm(b.input(["N", 12]), 12, WIDTH, name="first")
    y = kind(b, b.op("Relu", x), b.weight(WIDTH, WIDTH), known)
    y = b.gemm(b.op("Relu", b.gemm(y, WIDTH, 24, name="wide")), 24, 3, name="last")
    model = b.model(y, infer=False)
    analysis = sfp_onnx.inspect(model, expand="none")
    inner = STEPS * WIDTH * WIDTH
    assert analysis.size().macs == 12 * WIDTH + inner + WIDTH * 24 + 24 * 3
    assert {"wide"} == {name for group in analysis.coupling.groups for name in group.producers}
    shown = inspection(analysis, "m")
    assert shown["inside"] == {"loop": pytest.approx(inner / analysis.size().macs)}
    assert "of the MACs are inside of sub-graphs, which stay: loop" in inspection_text(shown)
    result = sfp_onnx.apply(analysis, random_plan(analysis, 0))
    assert_exact(model, result)
    assert result.plan.after.macs == sfp_onnx.inspect(result.to_proto()).size().macs
