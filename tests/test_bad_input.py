"""Bad input: a clear message that names what is wrong, the right exit code, and nothing written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import (
    CLASSES,
    IMAGE,
    classifier,
    classifier_nodes,
    external,
    files_in,
    images,
    invoke,
    labels_of,
    model_of,
    run_model,
    weights_of,
)
from onnx import TensorProto, helper

import sfp_onnx
from sfp_onnx.cli.common import EPILOG
from sfp_onnx.pipeline import opened

PORTS: dict[str, Any] = {"inputs": [("x", np.float32, ["N", *IMAGE])], "outputs": [("logits", np.float32, ["N", CLASSES])]}


def refused(folder: Path, *arguments: object, code: int = 4, words: tuple[str, ...] = ()) -> str:
    """Run a command that must fail with ``code``, name ``words``, and leave ``folder`` as it was; returns the message."""
    before = files_in(folder)
    folders = sorted(path for path in folder.rglob("*") if path.is_dir())
    result = invoke(*arguments)
    assert result.exit_code == code, (result.exit_code, result.stderr, result.exception)
    assert "Traceback" not in result.stderr and "Internal" not in result.stderr
    assert result.stderr.count("Error: ") == 1
    for word in words:
        assert word in result.stderr, result.stderr
    assert files_in(folder) == before
    assert sorted(path for path in folder.rglob("*") if path.is_dir()) == folders
    return result.stderr


# ---- models ----------------------------------------------------------------------------------------------------------


def custom_operator() -> onnx.ModelProto:
    nodes = classifier_nodes()
    nodes[4] = helper.make_node("Sparkle", ["c2"], ["r2"], "glitter", domain="my.domain")
    model = model_of(nodes, PORTS["inputs"], PORTS["outputs"], weights_of())
    model.opset_import.add(domain="my.domain", version=1)
    return model


def changed(change: Callable[[onnx.ModelProto], None]) -> onnx.ModelProto:
    model = classifier()
    change(model)
    return model


def wrong_operator(model: onnx.ModelProto) -> None:
    model.graph.node[4].op_type = "Relux"


def wrong_input(model: onnx.ModelProto) -> None:
    model.graph.node[4].input[0] = "nowhere"


def wrong_shape(model: onnx.ModelProto) -> None:
    model.graph.initializer[6].dims[:] = [12, 7, 3, 3]


def damaged_weight(model: onnx.ModelProto) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "w2")
    tensor.raw_data = tensor.raw_data[:-5]


def damaged_bias(model: onnx.ModelProto) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "b2")
    tensor.raw_data = tensor.raw_data[:-5]


def newer_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 999


def no_opset(model: onnx.ModelProto) -> None:
    del model.opset_import[:]


MODELS: dict[str, tuple[Callable[[], onnx.ModelProto | bytes], str]] = {
    "empty": (lambda: b"", "not an ONNX file"),
    "text": (lambda: b"This is not a model, it is a text.\n" * 20, "not an ONNX file"),
    "zeros": (lambda: bytes(1000), "not an ONNX file"),
    "truncated": (lambda: classifier().SerializeToString()[:-100], "truncated"),
    "half": (lambda: classifier().SerializeToString()[:1500], "truncated"),
    "archive": (lambda: b"PK\x03\x04" + bytes(500), "not an ONNX file"),
    "tensor": (lambda: helper.make_tensor("t", TensorProto.FLOAT, [3], [1, 2, 3]).SerializeToString(), "not an ONNX file"),
    "no graph": (lambda: helper.make_model(helper.make_graph([], "none", [], [])), "not an ONNX file"),
    "custom operator": (custom_operator, "Sparkle"),
    "wrong operator": (lambda: changed(wrong_operator), "Relux"),
    "wrong input": (lambda: changed(wrong_input), "nowhere"),
    "wrong shape": (lambda: changed(wrong_shape), "w2"),
    "damaged weight": (lambda: changed(damaged_weight), "w2"),
    "damaged bias": (lambda: changed(damaged_bias), "b2"),
    "newer opset": (lambda: changed(newer_opset), "999"),
    "no opset": (lambda: changed(no_opset), "opset"),
}


@pytest.mark.parametrize("command", ["inspect", "plan", "prune", "evaluate"])
@pytest.mark.parametrize("kind", MODELS)
def test_models(kind: str, command: str, tmp_path: Path, save: Callable[..., Path]) -> None:
    build, word = MODELS[kind]
    path, data = save(build(), "bad.onnx"), save({"x": images(2)})
    options = {
        "inspect": [],
        "plan": ["-o", tmp_path / "plan.json", "--ratio", "0.5"],
        "prune": ["-o", tmp_path / "out.onnx", "--ratio", "0.5", "--manifest", tmp_path / "m.json"],
        "evaluate": ["--data", data],
    }[command]
    refused(tmp_path, command, path, *options, words=("bad.onnx", word))


@pytest.mark.parametrize("what", ["missing.onnx", ".", "folder/missing.onnx"])
def test_models_that_are_no_files(what: str, tmp_path: Path) -> None:
    refused(tmp_path, "prune", tmp_path / what, "-o", tmp_path / "out.onnx", "--ratio", "0.5", words=(str(tmp_path / what), "cannot read"))


@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_external_data(how: str, tmp_path: Path) -> None:
    path = external(classifier(), tmp_path / "own.onnx")
    data = tmp_path / "own.onnx.data"
    if how == "missing":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:-3000])
    refused(tmp_path, "prune", path, "-o", tmp_path / "out.onnx", "--ratio", "0.5", words=("own.onnx.data", how))


def test_known_operators_of_other_domains_pin(save: Callable[..., Path], tmp_path: Path) -> None:
    """What onnxruntime can run but we have no rule for stays as it is, and inspect says so."""
    nodes = classifier_nodes()
    nodes.insert(7, helper.make_node("Normalizer", ["f"], ["g"], "glitter", domain="ai.onnx.ml", norm="L2"))
    nodes[8].input[0] = "g"
    model = model_of(nodes, PORTS["inputs"], PORTS["outputs"], weights_of())
    model.opset_import.add(domain="ai.onnx.ml", version=1)
    path = save(model)
    run_model(path, {"x": images(1)})
    found = json.loads(invoke("inspect", path, "--json").stdout)
    assert [group["group"] for group in found["groups"]] == ["conv1"]
    assert any("Normalizer" in pin["reason"] and pin["node"] == "glitter" for pin in found["pinned"])
    assert invoke("prune", path, "-o", tmp_path / "out.onnx", "--ratio", "0.5").exit_code == 0


def one_layer() -> onnx.ModelProto:
    nodes = [helper.make_node("Conv", ["x", "w1", "b1"], ["y"], "only", pads=[1] * 4)]
    return model_of(nodes, PORTS["inputs"], [("y", np.float32, ["N", 8, 8, 8])], {name: weights_of()[name] for name in ("w1", "b1")})


def no_layer() -> onnx.ModelProto:
    return model_of([helper.make_node("Relu", ["x"], ["y"], "relu")], PORTS["inputs"], [("y", np.float32, ["N", *IMAGE])], {})


@pytest.mark.parametrize(("build", "reason"), [(one_layer, "output"), (no_layer, "no layer")])
@pytest.mark.parametrize("command", ["plan", "prune"])
def test_nothing_to_prune(
    build: Callable[[], onnx.ModelProto], reason: str, command: str, save: Callable[..., Path], tmp_path: Path
) -> None:
    refused(tmp_path, command, save(build()), "-o", tmp_path / "out", "--ratio", "0.5", code=3, words=("nothing can be pruned", reason))


def test_nothing_left_to_prune(model_file: Path, tmp_path: Path) -> None:
    refused(tmp_path, "prune", model_file, "-o", tmp_path / "out", "--ratio", "0.5", "--only", "nowhere", code=3, words=("--only",))


# ---- data ------------------------------------------------------------------------------------------------------------


def one_bad(value: float) -> np.ndarray:
    array = images()
    array[3, 1, 2, 2] = value
    return array


DATA: dict[str, tuple[Callable[[], Any], str]] = {
    "wrong names": (lambda: {"a": images(), "b": images()}, "['x']"),
    "wrong channels": (lambda: {"x": images()[:, :2]}, "[10, 2, 8, 8]"),
    "wrong size": (lambda: {"x": images()[..., :7]}, "[10, 3, 8, 7]"),
    "wrong rank": (lambda: {"x": images().reshape(10, -1)}, "[10, 192]"),
    "channels last": (lambda: {"x": np.moveaxis(images(), 1, -1)}, "--layout nhwc"),
    "raw": (lambda: {"x": np.zeros((10, *IMAGE), np.uint8)}, "--scale 255"),
    "text": (lambda: {"x": np.full((10, *IMAGE), "a")}, "<U1"),
    "objects": (lambda: {"x": np.full((10, *IMAGE), None)}, "Python objects"),
    "nan": (lambda: {"x": one_bad(np.nan)}, "sample 3"),
    "inf": (lambda: {"x": one_bad(np.inf)}, "sample 3"),
    "no samples": (lambda: {"x": images(0)}, "no samples"),
    "no arrays": (dict, "['x']"),
    "few labels": (lambda: {"x": images(), "labels": labels_of(9)}, "9 labels for 10 samples"),
    "labels of floats": (lambda: {"x": images(), "labels": labels_of() / 2}, "float64"),
    "labels off by one": (lambda: {"x": images(), "labels": np.arange(10) % CLASSES + 1}, "started at 1"),
    "labels out of range": (lambda: {"x": images(), "labels": np.arange(10)}, "0 to 9, but the model has classes 0 to 4"),
    "negative labels": (lambda: {"x": images(), "y": np.arange(10) % CLASSES - 1}, "-1 to 3"),
    "no archive": (lambda: b"nothing of that kind", "not a readable"),
    "empty file": (lambda: b"", "not a readable"),
}


@pytest.mark.parametrize("option", ["--data", "--test-data"])
@pytest.mark.parametrize("kind", DATA)
def test_data(kind: str, option: str, model_file: Path, tmp_path: Path, save: Callable[..., Path]) -> None:
    """For scores and for the comparison afterwards: known before anything is written."""
    build, word = DATA[kind]
    arrays = build()
    path = tmp_path / "bad.npz"
    if isinstance(arrays, dict):
        np.savez(path, **arrays)
    else:
        path.write_bytes(arrays)
    arguments = ["prune", model_file, "-o", tmp_path / "out.onnx", "--ratio", "0.5", option, path, "--manifest", tmp_path / "m.json"]
    refused(tmp_path, *arguments, words=("bad.npz", word))
    refused(tmp_path, "evaluate", model_file, "--data", path, words=("bad.npz", word))


@pytest.mark.parametrize("name", ["bad.npz", "bad.npy", "folder"])
def test_data_that_are_not_there(name: str, model_file: Path, tmp_path: Path) -> None:
    if name == "folder":
        (tmp_path / name).mkdir()
    refused(tmp_path, "evaluate", model_file, "--data", tmp_path / name, words=(name, "test_data_set_*"))


@pytest.mark.parametrize("packed", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("how", ["truncated", "changed"])
def test_damaged_archives(packed: Callable[..., None], how: str, model_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    packed(path, x=images(), labels=labels_of())
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[:2000]
    else:
        content[1500:1600] = bytes(100)
    path.write_bytes(content)
    refused(tmp_path, "prune", model_file, "-o", tmp_path / "out.onnx", "--ratio", "0.5", "--data", path, words=("bad.npz",))


def test_damaged_npy_and_tensors(model_file: Path, tmp_path: Path, save: Callable[..., Path]) -> None:
    path = save(images(), "bad.npy")
    path.write_bytes(path.read_bytes()[:-10])
    refused(tmp_path, "evaluate", model_file, "--data", path, words=("bad.npy",))
    (tmp_path / "test_data_set_0").mkdir()
    (tmp_path / "test_data_set_0" / "input_0.pb").write_bytes(b"\xff\xff\xff")
    refused(tmp_path, "evaluate", model_file, "--data", tmp_path, words=("input_0.pb",))


@pytest.mark.parametrize("labels", [labels_of(3), np.eye(10), b"none", None])
def test_labels_of_their_own(labels: Any, model_file: Path, data_file: Path, save: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "bad.npy" if labels is None else save(labels, "bad.npy")
    words = ("one integer per sample",) if isinstance(labels, np.ndarray) and labels.ndim > 1 else ("bad.npy",)
    refused(tmp_path, "evaluate", model_file, "--data", data_file, "--labels", path, words=words)


def test_a_score_without_its_data(model_file: Path, tmp_path: Path) -> None:
    arguments = ["prune", model_file, "-o", tmp_path / "out.onnx", "--ratio", "0.5", "--score", "activation"]
    refused(tmp_path, *arguments, words=("'activation'", "--data", "magnitude"))


# ---- outputs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def paths(model_file: Path, data_file: Path, tmp_path: Path) -> dict[str, Path]:
    """Input files by name, and places that cannot be written."""
    plan = tmp_path / "plan.json"
    assert invoke("plan", model_file, "-o", plan, "--ratio", "0.5").exit_code == 0
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.onnx").symlink_to(model_file)
    os.mkfifo(tmp_path / "pipe")
    return {
        "model": model_file, "data": data_file, "plan": plan, "folder": tmp_path / "folder", "missing": tmp_path / "none" / "out.onnx",
        "file as folder": model_file / "out.onnx", "link": tmp_path / "link.onnx", "pipe": tmp_path / "pipe",
        "model by another name": tmp_path / "folder" / ".." / "model.onnx", "too long": tmp_path / ("n" * 300),
    }  # fmt: skip


@pytest.mark.parametrize(
    "where", ["model", "data", "folder", "missing", "file as folder", "link", "pipe", "model by another name", "too long"]
)
@pytest.mark.parametrize("which", ["plan", "prune", "manifest"])
def test_outputs(where: str, which: str, paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known before any work is done."""
    monkeypatch.setattr(opened, "inspect", lambda *arguments: pytest.fail("worked before looking at the output"))
    bad, good = paths[where], tmp_path / "out.onnx"
    output = ["-o", good, "--manifest", bad] if which == "manifest" else ["-o", bad]
    command = "plan" if which == "plan" else "prune"
    refused(tmp_path, command, paths["model"], *output, "--ratio", "0.5", "--data", paths["data"], words=(bad.name,))


@pytest.mark.parametrize("where", ["model", "plan", "folder", "missing"])
def test_outputs_of_apply(where: str, paths: dict[str, Path], tmp_path: Path) -> None:
    refused(tmp_path, "apply", paths["model"], paths["plan"], "-o", paths[where], words=(paths[where].name,))


def test_one_output_over_the_other(model_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(tmp_path, "prune", model_file, "-o", out, "--manifest", out, "--ratio", "0.5", words=("out",))


def test_no_permission(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    refused(tmp_path, "prune", model_file, "-o", tmp_path / "out.onnx", "--ratio", "0.5", words=("out.onnx", "permission"))


def test_disk_full(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused(tmp_path, "prune", model_file, "-o", tmp_path / "out.onnx", "--ratio", "0.5", words=("out.onnx", "No space left"))


# ---- plans -----------------------------------------------------------------------------------------------------------


def edit(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    """Change fields of the plan's first group."""
    return lambda plan: plan["groups"][0].update(changes)


def field(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda plan: plan.update({name: value})


def option(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda plan: plan["options"].update({name: value})


PLANS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another model": (field("model_sha256", "0" * 64), "another model"),
    "unknown group": (edit(group="nowhere"), "'nowhere'"),
    "group twice": (lambda plan: plan["groups"].append(plan["groups"][0]), "'conv1' twice"),
    "channel twice": (edit(remove=[1, 2, 1]), "channel 1 is listed twice"),
    "out of range": (edit(remove=[1, 8]), "channel 8 is out of range; expected 0 to 7"),
    "negative": (edit(remove=[-1]), "channel -1 is out of range"),
    "all channels": (edit(remove=list(range(8))), "removes all 8 channels"),
    "other width": (edit(width=9), "9 channels"),
    "text for a channel": (edit(remove=["1"]), "must be an integer, found '1'"),
    "number for a list": (edit(remove=1), "remove"),
    "object for a list": (edit(remove={}), "remove"),
    "text for a list": (edit(remove="12"), "remove"),
    "fraction": (edit(remove=[0.5]), "must be an integer, found 0.5"),
    "boolean": (edit(remove=[True]), "must be an integer, found True"),
    "no channels": (lambda plan: plan["groups"][0].pop("remove"), "'remove'"),
    "no groups": (lambda plan: plan.pop("groups"), "'groups'"),
    "group is text": (field("groups", ["conv1"]), "damaged"),
    "no hash": (lambda plan: plan.pop("model_sha256"), "'model_sha256'"),
    "no sizes": (lambda plan: plan.pop("before"), "'before'"),
    "other format": (field("format", "something"), "not an sfp_onnx plan"),
    "other version": (field("version", 3), "version"),
    "options are text": (field("options", "none"), "damaged"),
    "options are a list": (field("options", [1]), "damaged"),
    "shapes are text": (option("sample_shapes", "1,3,8,8"), "sample_shapes"),
    "shapes of text": (option("sample_shapes", {"x": ["a", 3, 8, 8]}), "sample_shapes"),
    "negative shapes": (option("sample_shapes", {"x": [-1, 3, 8, 8]}), "sample_shapes"),
    "no batch": (option("sample_shapes", {"x": [0, 3, 8, 8]}), "sample_shapes"),
    "shapes of another input": (option("sample_shapes", {"z": [1, 3, 8, 8]}), "'z'"),
    "shapes of another rank": (option("sample_shapes", {"x": [1, 3, 8]}), "'x'"),
}


@pytest.mark.parametrize("kind", PLANS)
def test_plans(kind: str, paths: dict[str, Path], tmp_path: Path) -> None:
    change, word = PLANS[kind]
    plan = json.loads(paths["plan"].read_text())
    change(plan)
    paths["plan"].write_text(json.dumps(plan))
    refused(tmp_path, "apply", paths["model"], paths["plan"], "-o", tmp_path / "out.onnx", "--manifest", tmp_path / "m.json", words=(word,))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"plan"', b"\xff\xfe\x00", b"[" * 100_000])
def test_files_that_are_no_plans(content: bytes, paths: dict[str, Path], tmp_path: Path) -> None:
    paths["plan"].write_bytes(content)
    refused(tmp_path, "apply", paths["model"], paths["plan"], "-o", tmp_path / "out.onnx", words=("plan",))


@pytest.mark.parametrize("name", ["missing.json", "folder"])
def test_plans_that_are_not_there(name: str, paths: dict[str, Path], tmp_path: Path) -> None:
    refused(tmp_path, "apply", paths["model"], tmp_path / name, "-o", tmp_path / "out.onnx", words=(name,))


def test_a_plan_for_a_model_that_has_changed(paths: dict[str, Path], tmp_path: Path) -> None:
    onnx.save(classifier(seed=1), paths["model"])
    refused(tmp_path, "apply", paths["model"], paths["plan"], "-o", tmp_path / "out.onnx", words=("another model", "SHA-256"))


def test_every_exit_code_is_in_the_help() -> None:
    public = [getattr(sfp_onnx, name) for name in sfp_onnx.__all__]
    codes = {error.exit_code for error in public if isinstance(error, type) and issubclass(error, sfp_onnx.SfpError)}
    assert codes == {1, 2, 3, 4} and all(f"{code} " in EPILOG for code in codes)


def test_a_model_that_may_not_be_read(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def deny(path: Path, *arguments: Any, **named: Any) -> Any:
        if path == model_file:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", deny)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.R_OK)
    result = invoke("inspect", model_file)
    assert result.exit_code == 4 and "model.onnx: cannot read the model: Permission denied" in result.stderr


def test_an_attribute_of_a_damaged_type(model_file: Path, tmp_path: Path) -> None:
    """It says that it is a tensor, but holds none; and the checker gives up earlier, at an operator that only onnxruntime knows."""
    proto = onnx.load(model_file)
    attribute = proto.graph.node[0].attribute[0]
    attribute.type = onnx.AttributeProto.TENSOR
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(8, np.float32), "gain"))
    proto.graph.node.insert(0, helper.make_node("SimplifiedLayerNormalization", ["x", "gain"], ["unused"], "norm"))
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(proto.SerializeToString())
    result = invoke("prune", bad, "-o", tmp_path / "out.onnx", "--ratio", "0.5")
    assert result.exit_code == 4 and f"attribute '{attribute.name}' of node 'conv1' (Conv) is damaged" in result.stderr, result.stderr
