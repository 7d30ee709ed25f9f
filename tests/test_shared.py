"""Real exports (a folder beside the repository that is not part of it): half of the channels leave, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx.checker
import onnx.numpy_helper
import pytest
from building import error, feeds_for, masked, run

import sfp_onnx
from sfp_onnx.core.options import PlanOptions
from sfp_onnx.coupling.analysis import Analysis
from sfp_onnx.report.manifest import Pruned

SHARED = Path(__file__).resolve().parents[2] / "shared"
FILES = sorted([*SHARED.glob("models/*.onnx"), *SHARED.glob("zoo/*.onnx")]) or [SHARED / "none"]
RESNETS = ("resnet20_cifar10", "resnet56_cifar10_bn", "resnet56_cifar10_dynamo")


@cache
def analysed(path: Path) -> Analysis:
    return sfp_onnx.inspect(path)


@cache
def halved(path: Path, score: str) -> Pruned:
    analysis = analysed(path)
    return sfp_onnx.apply(analysis, sfp_onnx.plan(analysis, PlanOptions(ratio=0.5), score))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_half_of_the_channels_leave_exactly(path: Path, shared: Path) -> None:
    original = onnx.load(path)
    result = halved(path, "random")
    proto = result.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    feeds = feeds_for(original, batch=1) if not _needs_traced_shapes(original) else dict(analysed(path).prepared.feeds)
    reference = run(masked(original, result.cuts), feeds)
    for own, other in zip(run(proto, feeds), reference, strict=True):
        assert error(own, other) <= 1e-4
    assert result.plan.after.params < 0.8 * result.plan.before.params
    assert [item.name for item in proto.graph.output] == [item.name for item in original.graph.output]
    assert [item.name for item in proto.graph.input] == [item.name for item in original.graph.input]


def _needs_traced_shapes(model: onnx.ModelProto) -> bool:
    """Dynamic dimensions besides the batch."""
    return any(not dim.HasField("dim_value") for item in model.graph.input for dim in item.type.tensor_type.shape.dim[1:])


# ---- the three ResNets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RESNETS)
def test_at_least_seventy_percent_of_the_macs_leave(name: str, shared: Path) -> None:
    plan = halved(shared / "models" / f"{name}.onnx", "random").plan
    assert plan.after.macs <= 0.3 * plan.before.macs


@pytest.mark.parametrize(("name", "blocks"), [*zip(RESNETS, (9, 27, 27), strict=True)])
def test_inspect_lists_block_internals_and_residual_stages(name: str, blocks: int, shared: Path) -> None:
    groups = analysed(shared / "models" / f"{name}.onnx").coupling.groups
    internal = [group for group in groups if len(group.producers) == 1 and len(group.consumers) == 1]
    stages = [group for group in groups if len(group.producers) > 2]
    assert len(internal) == blocks and len(internal) + len(stages) == len(groups)
    assert sorted(group.width for group in stages) == [16, 16, 32]
    assert {group.width for group in internal} == {16, 32, 64}


def weights(result: Pruned) -> dict[str, np.ndarray]:
    """Weights of the layers in order."""
    proto = result.to_proto()
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    nodes = [node for node in proto.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    return {str(index): held[node.input[1]] for index, node in enumerate(nodes)}


def removed(result: Pruned) -> Sequence[tuple[int, tuple[int, ...]]]:
    return [(group.width, group.remove) for group in result.plan.groups]


def test_both_export_styles_get_the_same_widths_and_channels(shared: Path) -> None:
    first, second = (halved(shared / "models" / f"resnet56_cifar10_{style}.onnx", "magnitude") for style in ("bn", "dynamo"))
    assert removed(first) == removed(second)
    assert [array.shape for array in weights(first).values()] == [array.shape for array in weights(second).values()]
    assert first.plan.after.macs == second.plan.after.macs
