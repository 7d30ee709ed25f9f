"""--mirror: the repair also looks at the mirror images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import IMAGE, classifier, images, invoke, run_model

import sfp_onnx
from sfp_onnx.errors import OptionError
from sfp_onnx.pipeline.feeding import feeds_of


@pytest.mark.parametrize("batch", ["N", 5])
def test_every_image_comes_with_its_mirror_image(batch: int | str, tmp_path: Path) -> None:
    onnx.save(classifier(batch=batch), tmp_path / "model.onnx")
    analysis = sfp_onnx.inspect(tmp_path / "model.onnx")
    x = images(20)
    data = sfp_onnx.data_for(analysis.model, {"x": x})
    assert data is not None
    found = [feeds["x"] for feeds in feeds_of(analysis, data, mirror=True)]
    together = found if batch == "N" else [np.concatenate(pair) for pair in zip(found[::2], found[1::2], strict=True)]
    for own in together:  # in one batch, so that judging samples are no mirror images of fitted ones
        half = len(own) // 2
        assert np.array_equal(own[half:], own[:half, :, :, ::-1])
    assert np.array_equal(np.concatenate([own[: len(own) // 2] for own in together]), x)


def test_channels_last_are_not_mixed_up(tmp_path: Path) -> None:
    nodes = [onnx.helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]), *classifier().graph.node]
    nodes[1].input[0] = "t"
    model = classifier()
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.input[0].CopyFrom(onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", *IMAGE[1:], IMAGE[0]]))
    onnx.save(model, tmp_path / "model.onnx")
    analysis = sfp_onnx.inspect(tmp_path / "model.onnx")
    x = np.moveaxis(images(8), 1, -1)
    data = sfp_onnx.data_for(analysis.model, {"x": x})
    assert data is not None
    own = next(feeds_of(analysis, data, mirror=True))["x"]
    assert np.array_equal(own[len(own) // 2 :], own[: len(own) // 2, :, ::-1])


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mlp.onnx"
    layer = onnx.helper.make_node("Gemm", ["x", "w"], ["y"], "layer")
    ports = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 4]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([layer], "mlp", ports[:1], ports[1:], [onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    analysis = sfp_onnx.inspect(path)
    data = sfp_onnx.data_for(analysis.model, {"x": np.zeros((4, 4), np.float32)})
    assert data is not None
    with pytest.raises(OptionError, match="--mirror: expected images"):
        next(iter(feeds_of(analysis, data, mirror=True)))


def test_the_repair_is_better_on_mirror_images(model_file: Path, save: Callable[..., Path], tmp_path: Path) -> None:
    """Calibration images with something on their left only; judged on images with something on their right."""
    x = images(160)
    x[..., IMAGE[2] // 2 :] = 0
    data, errors = save({"x": x}), {}
    fresh = np.ascontiguousarray(images(100, seed=9))
    fresh[..., : IMAGE[2] // 2] = 0
    original = run_model(onnx.load(model_file), {"x": fresh})[0]
    for flag in ((), ("--mirror",)):
        out = tmp_path / f"out{len(flag)}.onnx"
        result = invoke("prune", model_file, "-o", out, "--data", data, "--ratio", "0.5", *flag)
        assert result.exit_code == 0, result.stderr
        assert ("150 samples and their mirror images" in result.stderr) == bool(flag)
        errors[flag] = float(np.square(run_model(onnx.load(out), {"x": fresh})[0] - original).sum())
    assert errors["--mirror",] < 0.9 * errors[()]
