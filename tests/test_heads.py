"""Dimensions of queries and keys that leave from all heads at once, in the coordinates that lose least."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from building import Builder, assert_exact, plan_of, run

import sfp_onnx
from sfp_onnx import PlanOptions
from sfp_onnx.coupling.cost import removal
from sfp_onnx.cut import cut
from sfp_onnx.graph import extract, inputs
from sfp_onnx.planning.rounds import composed
from sfp_onnx.repair import heads
from sfp_onnx.runtime import open_model

WIDTH, HEADS, SIZE, TOKENS = 12, 3, 4, 6


def transformer(turn: str = "", fused: bool = False) -> onnx.ModelProto:
    """Two tokens-wise layers around an attention; ``turn``: what stands between queries or keys and their product."""
    b = Builder()
    x = b.op("MatMul", b.input(["batch", TOKENS, WIDTH]), b.weight(WIDTH, WIDTH, fan_in=WIDTH), name="stem")
    inner = HEADS * SIZE

    def split(made: str, perm: list[int]) -> str:
        parted = b.op("Reshape", made, b.const([0, 0, HEADS, SIZE], np.int64))
        if turn == "rotary":
            halves = b.split(parted, [SIZE // 2] * 2, axis=3)
            other = b.op("Concat", b.op("Neg", halves[1]), halves[0], axis=3)
            angles = np.concatenate([np.outer(np.arange(TOKENS), [1, 0.3])] * 2, 1)[None, :, None]
            parted = b.op("Add", b.op("Mul", parted, b.const(np.cos(angles))), b.op("Mul", other, b.const(np.sin(angles))))
        return b.op("Transpose", parted, perm=perm)

    def projected(name: str) -> str:
        return b.op("Add", b.op("MatMul", x, b.weight(WIDTH, inner, fan_in=WIDTH), name=name), b.weight(inner))

    if fused:
        made = b.op("Add", b.op("MatMul", x, b.weight(WIDTH, 3 * inner, fan_in=WIDTH), name="qkv"), b.weight(3 * inner))
        parts = b.split(made, [inner] * 3, axis=2)
    else:
        parts = [projected(name) for name in "qkv"]
    logits = b.op("Mul", b.op("MatMul", split(parts[0], [0, 2, 1, 3]), split(parts[1], [0, 2, 3, 1]), name="scores"), b.const(SIZE**-0.5))
    value = b.op("Transpose", b.op("Reshape", parts[2], b.const([0, 0, HEADS, SIZE], np.int64)), perm=[0, 2, 1, 3])
    mixed = b.op("Transpose", b.op("MatMul", b.op("Softmax", logits, axis=-1), value), perm=[0, 2, 1, 3])
    joined = b.op("Reshape", mixed, b.const([0, 0, inner], np.int64))
    out = b.op("Add", x, b.op("MatMul", joined, b.weight(inner, WIDTH, fan_in=inner), name="proj"))
    return b.model(b.op("MatMul", out, b.weight(WIDTH, 5, fan_in=WIDTH), name="last"))


def feeds(samples: int = 2) -> dict[str, np.ndarray]:
    common = np.random.default_rng(1).standard_normal((WIDTH, WIDTH)) * np.linspace(1.5, 0.1, WIDTH)
    return {"x": (np.random.default_rng(2).standard_normal((samples, TOKENS, WIDTH)) @ common).astype(np.float32)}


@pytest.mark.parametrize("fused", [False, True])
def test_heads_and_dimensions_leave_independently(fused: bool) -> None:
    model = transformer(fused=fused)
    analysis = sfp_onnx.inspect(model)
    groups = {group.name: group for group in analysis.coupling.groups}
    first = "qkv" if fused else "q"
    assert (groups[first].width, groups["scores"].width) == (HEADS, SIZE) and groups["scores"].dimensions
    for chosen in ({"scores": [0, 2]}, {first: [1]}, {"scores": [3], first: [0]}):
        result = sfp_onnx.apply(analysis, plan_of(analysis, chosen))
        assert_exact(model, result, feeds())
        kept = (HEADS - len(chosen.get(first, ()))) * (SIZE - len(chosen.get("scores", ())))
        shapes = {item.name: tuple(item.dims) for item in result.to_proto().graph.initializer}
        layer = next(node for node in result.to_proto().graph.node if node.name == first)
        value = (HEADS - len(chosen.get(first, ()))) * SIZE
        assert shapes[layer.input[1]][1] == (2 * kept + value if fused else kept)
        assert result.plan.after.macs == sfp_onnx.inspect(result.to_proto()).size().macs


def test_dimensions_that_rotate_together_leave_together() -> None:
    model = transformer("rotary")
    analysis = sfp_onnx.inspect(model)
    group = next(group for group in analysis.coupling.groups if group.dimensions)
    assert group.width == SIZE // 2
    assert_exact(model, sfp_onnx.apply(analysis, plan_of(analysis, {group.name: [1]})), feeds())


@pytest.mark.parametrize(("turn", "fused", "free"), [("", False, True), ("", True, True), ("rotary", False, False)])
def test_coordinates_are_free_where_nothing_turns_them(turn: str, fused: bool, free: bool) -> None:
    analysis = sfp_onnx.inspect(transformer(turn, fused))
    assert [pair.free for pair in heads.pairs(analysis.prepared, analysis.coupling)] in ([free], [] if not free else [free])


@pytest.mark.parametrize("fused", [False, True])
def test_turned_products_lose_what_the_singular_values_say(fused: bool) -> None:
    """The error of logits, for queries and keys of all samples against each other, is the share of the singular values left out."""
    analysis = sfp_onnx.inspect(transformer(fused=fused))
    prepared, coupling = analysis.prepared, analysis.coupling
    (pair,) = heads.pairs(prepared, coupling)
    data = feeds(64)
    moment = heads.moments(prepared.model, [pair], [data])[pair.group.name]
    turns, singular = heads.coordinates(moment)
    names = sorted({side.step.target for side in pair.sides})
    part = extract.segment(prepared.model, inputs(prepared.model), dict.fromkeys(names, np.dtype(np.float32)))
    tensors = dict(zip(names, open_model(part).run(data, names), strict=True))
    query, key = (tensors[side.step.target].reshape(-1, tensors[side.step.target].shape[-1])[:, side.places] for side in pair.sides)
    for kept in (1, 2, 3):
        lost = whole = 0.0
        for head in range(HEADS):
            exact = query[:, head] @ key[:, head].T
            low = (query[:, head] @ turns[0, head, :, :kept]) @ (key[:, head] @ turns[1, head, :, :kept]).T
            lost, whole = lost + np.square(exact - low).sum(), whole + np.square(exact).sum()
        assert lost / whole == pytest.approx(np.square(singular[:, kept:]).sum() / np.square(singular).sum(), rel=0.02, abs=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_the_repair_turns_and_fits(tmp_path: Path, fused: bool) -> None:
    """With fewer dimensions, turned, the model is far nearer than with dimensions as they are."""
    model, data = transformer(fused=fused), feeds(64)
    np.savez(tmp_path / "data.npz", **data)
    analysis = sfp_onnx.inspect(model)
    expected, answers = run(model, data)[0], {}
    for repair in ("none", "lstsq"):
        options = sfp_onnx.RepairOptions(repair)
        plan = plan_of(analysis, {"scores": [2]})
        result = sfp_onnx.apply(analysis, plan, tmp_path / "data.npz", repair=options)
        answers[repair] = np.linalg.norm(run(result.to_proto(), data)[0] - expected)
    assert answers["lstsq"] < 0.85 * answers["none"]


@pytest.mark.parametrize("fused", [False, True])
def test_where_all_heads_have_left_nothing_is_turned(fused: bool) -> None:
    model, data = transformer(fused=fused), feeds(64)
    analysis = sfp_onnx.inspect(model)
    plan = plan_of(analysis, {"scores": [0], "qkv" if fused else "q": range(HEADS)})
    result = sfp_onnx.apply(analysis, plan, data)
    assert "Softmax" not in {node.op_type for node in result.to_proto().graph.node} and result.repaired is not None
    assert_exact(model, sfp_onnx.apply(analysis, plan), feeds())


def test_only_a_score_that_knows_dimensions_cuts_them(tmp_path: Path) -> None:
    model = transformer()
    np.savez(tmp_path / "data.npz", **feeds(64))
    by_obs = sfp_onnx.plan(model, PlanOptions(targets=("macs=60%",), align="none"), "obs", tmp_path / "data.npz")
    assert next(group for group in by_obs.groups if group.group == "scores").remove
    for options, score in ((PlanOptions(ratio=0.5), "obs"), (PlanOptions(targets=("macs=80%",)), "magnitude")):
        plan = sfp_onnx.plan(model, options, score, tmp_path / "data.npz")
        assert not next(group for group in plan.groups if group.group == "scores").remove


def test_rounds_know_heads_from_dimensions() -> None:
    """What a second round removes of the cut network is, of the original, of the same kind."""
    original = sfp_onnx.inspect(transformer())
    first = removal(original.coupling, {"q": [1], "scores": [0]})
    present = sfp_onnx.inspect(cut(original.prepared, original.coupling, first))
    for kind, chosen in (("q", {"q": [1]}), ("scores", {"scores": [1, 2]})):
        total = composed(original, first, present, removal(present.coupling, chosen))
        expected = removal(original.coupling, {"q": [1, 2], "scores": [0]} if kind == "q" else {"q": [1], "scores": [0, 2, 3]})
        assert np.array_equal(total, expected)
