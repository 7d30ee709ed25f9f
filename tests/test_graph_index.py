"""Makers, readers and walks of a graph; batches that are run and looked at."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from building import Builder, error, feeds_for, run

import sfp_onnx
from sfp_onnx.core.types import Node
from sfp_onnx.graph import CAPTURED, GraphIndex
from sfp_onnx.graph.load import load
from sfp_onnx.repair.steps import Scene, plan_steps
from sfp_onnx.runtime import Batch, Optimize, observe, open_model, side_by_side, unpadded


def node(index: int, reads: str, makes: str, captures: str = "") -> Node:
    return Node(index, f"n{index}", "Op", "", tuple(reads.split(" ")), tuple(makes.split(" ")), {}, tuple(captures.split()))


#      x -> a -> b c -> d (of c twice) -> f;   e (reads a in a sub-graph, an input is left out) -> g
NODES = [("x w", "a"), ("a", "b c"), ("c c", "d"), ("d  b", "f"), ("x ", "e", "a"), ("e", "g ")]
GRAPH = GraphIndex([node(index, *names) for index, names in enumerate(NODES)])


def test_makers_and_readers() -> None:
    assert GRAPH.maker("x") is None and GRAPH.maker("") is None
    assert [own.index for own in map(GRAPH.maker, "abcdfeg") if own] == [0, 1, 1, 2, 3, 4, 5]
    assert [(own.index, at) for own, at in GRAPH.readers("c")] == [(2, 0), (2, 1)] and [own.index for own in GRAPH.reading("c")] == [2]
    assert [(own.index, at) for own, at in GRAPH.readers("a")] == [(1, 0), (4, CAPTURED)]
    assert [(own.index, at) for own, at in GRAPH.operands("a")] == [(1, 0)]
    assert not GRAPH.readers("") and not GRAPH.readers("f")


@pytest.mark.parametrize(
    ("outputs", "stop", "indices"),
    [("f", "", [0, 1, 2, 3]), ("f", "c", [0, 1, 2, 3]), ("f", "bc", [2, 3]), ("f", "f", []), ("g", "", [0, 4, 5]), ("x", "", [])],
)
def test_the_walk_up(outputs: str, stop: str, indices: list[int]) -> None:
    assert [own.index for own in GRAPH.needed(outputs, set(stop))] == indices


@pytest.mark.parametrize(("names", "indices"), [("c", [2, 3]), ("a", [1, 2, 3, 4, 5]), ("w", [0, 1, 2, 3, 4, 5]), ("fg", [])])
def test_the_walk_down(names: str, indices: list[int]) -> None:
    assert [own.index for own in GRAPH.reached(names)] == indices


@pytest.mark.parametrize("part", [0, 1])
def test_a_target_waits_for_every_output_of_a_node(part: int) -> None:
    """A sum is no target of one of its layers while the other, of which a Split's output goes in, is still to be re-fitted."""
    b = Builder(seed=0)
    x = b.input(["N", 4, 6, 6])
    first, second = b.conv(x, 4, 3, pads=[1] * 4, name="first"), b.conv(x, 4, 6, pads=[1] * 4, name="second")
    parts = b.split(second, [3, 3])
    model = b.model(b.conv(b.op("Add", first, parts[part]), 3, 4, name="last"))
    analysis = sfp_onnx.inspect(model)
    prepared, coupling = analysis.prepared, analysis.coupling
    scene = Scene(prepared.model, coupling, prepared.nodes, prepared.trace.shapes)
    layers = {layer.node.name: layer for layer in coupling.layers}
    (step,) = plan_steps(scene, [[layers["first"]], [layers["second"]]], {})[0]
    assert step.target == step.output


def test_batches_side_by_side() -> None:
    b = Builder(seed=0)
    model = sfp_onnx.load(b.model(b.conv(b.input(["N", 3, 4, 4]), 3, 2, name="only")))
    data = np.random.default_rng(0).standard_normal((5, 3, 4, 4)).astype(np.float32)
    padded = [({"x": data[:3]}, 3), Batch.padded({"x": np.concatenate([data[3:], data[:1]])}, 2, 1)]
    labels = np.arange(5)
    seen = list(observe(model, padded))
    name = next(iter(seen[0].values))
    assert [(own.first, own.count, own.rows) for own in seen] == [(0, 3, 3), (3, 2, 3)]
    whole = open_model(model).run({"x": data}, [name])[0]
    np.testing.assert_allclose(np.concatenate([own.samples(name) for own in seen]), whole, rtol=1e-5, atol=1e-6)
    assert np.array_equal(np.concatenate([own.own(labels) for own in seen]), labels) and seen[0].own(None) is None
    sessions = [open_model(model), open_model(model)]
    for first, second in side_by_side(sessions, unpadded([{"x": data}]), [name]):
        assert first.count == 5 and np.array_equal(first.outputs[0], second.outputs[0])


def test_weights_that_do_not_lie_in_one_piece_live_until_they_are_copied() -> None:
    """Cutting leaves some in the order of other axes, and onnxruntime is given copies of these."""
    b = Builder(17, 2)
    y = b.input(["N", 3, 8, 8])
    for _ in range(12):
        y = b.op("Relu", b.conv(y, 3, 16))
        y = b.conv(y, 16, 3)
    proto = b.model(y)
    model = load(proto)
    model = replace(model, weights={name: np.asfortranarray(array) for name, array in model.weights.items()})
    assert model.weights and not any(array.flags.c_contiguous for array in model.weights.values())
    feeds = feeds_for(proto)
    for optimize in (Optimize.NONE, Optimize.ALL):
        assert error(open_model(model, optimize).run(feeds)[0], run(proto, feeds)[0]) < 1e-5
