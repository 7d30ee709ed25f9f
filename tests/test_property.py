"""Random graphs times random legal plans: the result is valid and equals the masked original.

About a hundred graphs in a normal run, a few thousand with SFP_NIGHTLY set in the environment.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import onnx
import onnx.numpy_helper as nh
import pytest
from building import assert_exact, assert_listed, empty_plan, error, feeds_for, random_plan, run
from graphs import BLOCKS, PLAIN, Sample, sample, samples
from hypothesis import HealthCheck, given, settings, strategies as st

import sfp_onnx
from sfp_onnx.core.options import PlanOptions
from sfp_onnx.coupling.analysis import Analysis
from sfp_onnx.planning import from_json, to_json

NIGHTLY = bool(os.environ.get("SFP_NIGHTLY"))


def examples(count: int) -> settings:
    """``count`` examples in a normal run; more and different ones at night."""
    return settings(
        max_examples=count * 40 if NIGHTLY else count,
        deadline=None,
        derandomize=not NIGHTLY,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


def check_random_plan(case: Sample, seed: int) -> None:
    analysis = sfp_onnx.inspect(case.model)
    if not analysis.coupling.groups:
        return
    result = sfp_onnx.apply(analysis, random_plan(analysis, seed))
    assert result.cuts
    assert_exact(case.model, result, case.feeds)
    assert_listed(case.model, result, case.feeds)


@given(samples(), st.integers(0, 2**20))
@examples(50)
def test_random_plans_are_exact(case: Sample, seed: int) -> None:
    check_random_plan(case, seed)


@pytest.mark.parametrize("seed", range(4000 if NIGHTLY else 100))
def test_seeded_graphs_are_exact(seed: int) -> None:
    check_random_plan(sample(seed), seed)


# ---- planted dead channels -------------------------------------------------------------------------------------------


def planted(model: onnx.ModelProto, analysis: Analysis, dead: np.ndarray) -> onnx.ModelProto:
    """The model with zeros in every weight, bias, scale and shift (in and out) of the dead units."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    tensors = {tensor.name: tensor for tensor in result.graph.initializer}
    arrays = {name: nh.to_array(tensor).copy() for name, tensor in tensors.items()}
    places = {(layer.node.index, position) for layer in analysis.coupling.layers for position in range(1, len(layer.node.inputs))}
    places |= {(affine.node.index, position) for affine in analysis.coupling.affines for position in (1, 2)}
    for (index, position), channels in analysis.coupling.constants.items():
        name = analysis.prepared.nodes[index].inputs[position]
        if (index, position) in places and name in arrays:
            for own in channels:
                view = np.moveaxis(arrays[name], own.axis, 0)
                view[(own.units >= 0) & dead[np.maximum(own.units, 0)]] = 0
    for name, array in arrays.items():
        tensors[name].CopyFrom(nh.from_array(array, name))
    return result


@given(samples(PLAIN, most=3), st.integers(0, 2**20))
@examples(25)
def test_planted_dead_channels_leave_first_and_leave_no_trace(case: Sample, seed: int) -> None:
    analysis = sfp_onnx.inspect(case.model)
    groups = analysis.coupling.groups
    if not groups:
        return
    generator = np.random.default_rng(seed)
    group = groups[generator.integers(len(groups))]
    gone = sorted(generator.permutation(group.width)[: generator.integers(1, group.width)].tolist())
    dead = np.zeros(analysis.coupling.units, bool)
    dead[group.units[gone]] = True
    model = planted(case.model, analysis, dead)

    analysis = sfp_onnx.inspect(model)
    scores = sfp_onnx.score(analysis, "magnitude")[group.units]
    assert sorted(np.argsort(scores, kind="stable")[: len(gone)].tolist()) == gone
    plan = empty_plan(analysis)
    chosen = [replace(item, remove=tuple(gone)) if item.group == group.name else item for item in plan.groups]
    result = sfp_onnx.apply(analysis, replace(plan, groups=tuple(chosen)))
    for own, other in zip(run(result.to_proto(), case.feeds), run(model, case.feeds), strict=True):
        assert error(own, other) <= 1e-6


# ---- nothing, twice, and in two steps --------------------------------------------------------------------------------


@given(samples())
@examples(10)
def test_an_empty_plan_returns_an_equal_model(case: Sample) -> None:
    analysis = sfp_onnx.inspect(case.model)
    if not analysis.coupling.groups:
        return
    result = sfp_onnx.apply(analysis, empty_plan(analysis))
    assert result.cuts == ()
    proto = result.to_proto()
    for own, other in zip(run(proto, case.feeds), run(case.model, case.feeds), strict=True):
        np.testing.assert_array_equal(own, other)
    read = {name for node in case.model.graph.node for name in node.input}
    before = {tensor.name: nh.to_array(tensor) for tensor in case.model.graph.initializer if tensor.name in read}
    after = {tensor.name: nh.to_array(tensor) for tensor in proto.graph.initializer}
    assert list(before) == list(after)
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name])


@given(samples(), st.sampled_from([0.25, 0.5, 0.75]))
@examples(10)
def test_the_same_call_twice_gives_the_same_bytes_also_in_two_steps(case: Sample, ratio: float) -> None:
    if not sfp_onnx.inspect(case.model).coupling.groups:
        return
    once, twice = (sfp_onnx.prune(case.model, PlanOptions(ratio=ratio), "magnitude") for _ in range(2))
    assert bytes_of(once) == bytes_of(twice)
    assert once.cuts == twice.cuts and once.plan == twice.plan
    plan = from_json(json.loads(json.dumps(to_json(once.plan))))
    assert plan.groups == once.plan.groups
    applied = sfp_onnx.apply(case.model, plan)
    assert bytes_of(applied) == bytes_of(once)


def bytes_of(result: sfp_onnx.Pruned) -> bytes:
    return result.to_proto().SerializeToString(deterministic=True)


# ---- the generator itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_every_block_alone_is_exact_and_prunable(block: object) -> None:
    """Each block in front of a convolution: something can leave, exactly (the random graphs are not vacuous)."""
    tried = []

    @given(samples((block,), most=1), st.integers(0, 2**20))  # type: ignore[arg-type]
    @settings(examples(1), max_examples=4)
    def check(case: Sample, seed: int) -> None:
        onnx.checker.check_model(case.model, full_check=True)
        outputs = run(case.model, feeds_for(case.model, batch=3))
        assert all(np.isfinite(value).all() and value.std() > 1e-3 and np.abs(value).max() < 1e3 for value in outputs)
        analysis = sfp_onnx.inspect(case.model)
        tried.append(len(analysis.coupling.groups))
        if analysis.coupling.groups:
            assert_exact(case.model, sfp_onnx.apply(analysis, random_plan(analysis, seed)), case.feeds)

    check()
    assert any(tried), f"nothing can leave around {block}"
