"""Every command, its exit codes, what it prints and what it writes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
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
    external,
    files_in,
    images,
    invoke,
    labels_of,
    masked_reference,
    relative,
    run_model,
    sizes,
    weights_of,
)
from onnx import numpy_helper

import sfp_onnx
from sfp_onnx import cut as cut_room
from sfp_onnx.pipeline import applied, opened

COMMANDS = ("inspect", "plan", "apply", "prune", "evaluate", "profile", "sweep")
# One sample of the classifier: 8x8 positions; conv1 3->8, conv2 8->12, head 12->5.
MACS = 64 * 9 * (3 * 8 + 8 * 12) + 12 * 5
PARAMS = sum(array.size for array in weights_of().values())


def done(*arguments: object) -> str:
    """Run a command that must succeed; returns its standard output."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def parameters(path: Path) -> int:
    return sum(int(np.prod(tensor.dims)) for tensor in onnx.load(path).graph.initializer)


def macs(path: Path) -> int:
    shapes = sizes(onnx.load(path))
    return int(64 * (np.prod(shapes["w1"]) + np.prod(shapes["w2"])) + np.prod(shapes["w3"]))


def log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values.astype(np.float64) - values.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


# ---- help and usage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_the_exit_codes(command: str) -> None:
    text = done(command, "--help")
    assert f"Example: sfp-onnx {command} " in text.replace("\n  ", " ")
    assert "0 done" in text and "4 bad model" in text
    assert all(name in done("--help") for name in COMMANDS)


def test_version() -> None:
    from importlib.metadata import version

    assert version("sfp_onnx") in done("--version")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["inspect"],
        ["inspect", "MODEL", "--input-shape", "x"],
        ["prune", "MODEL", "--ratio", "0.5"],
        ["prune", "MODEL", "-o", "OUT"],
        ["prune", "MODEL", "-o", "OUT", "--ratio", "0.5", "--target", "macs=50%"],
        ["prune", "MODEL", "-o", "OUT", "--ratio", "1"],
        ["prune", "MODEL", "-o", "OUT", "--ratio", "-0.1"],
        ["prune", "MODEL", "-o", "OUT", "--ratio", "nan"],
        ["prune", "MODEL", "-o", "OUT", "--ratio", "0.5", "--score", "nothing"],
        ["prune", "MODEL", "-o", "OUT", "--ratio", "0.5", "--p", "3"],
        ["prune", "MODEL", "-o", "OUT", "--ratio", "0.5", "--align", "0"],
        ["prune", "MODEL", "-o", "OUT", "--ratio", "0.5", "--align", "few"],
        ["prune", "MODEL", "-o", "OUT", "--ratio", "0.5", "--min-channels", "0"],
        ["prune", "MODEL", "-o", "OUT", "--ratio", "0.5", "--seed", "-1"],
        ["prune", "MODEL", "-o", "OUT", "--ratio", "0.5", "--keep", "("],
        ["prune", "MODEL", "-o", "OUT", "--ratio", "0.5", "--mean", "0.5"],
        ["prune", "MODEL", "-o", "OUT", "--ratio", "0.5", "--data", "DATA", "--mean", "a,b"],
        ["prune", "MODEL", "-o", "OUT", "--ratio", "0.5", "--data", "DATA", "--std", "0"],
        ["prune", "MODEL", "-o", "OUT", "--ratio", "0.5", "--data", "DATA", "--samples", "0"],
        ["prune", "MODEL", "-o", "OUT", "--ratio", "0.5", "--data", "DATA", "--scale", "0"],
        *(
            ["prune", "MODEL", "-o", "OUT", "--target", target]
            for target in ("macs", "macs=", "macs=0%", "macs=101%", "flops=5G", "macs=1.2.3", "macs=-5", "params=0.5x")
        ),
        ["plan", "MODEL", "--ratio", "0.5"],
        ["evaluate", "MODEL"],
    ],
)
def test_usage_errors(arguments: list[str], model_file: Path, data_file: Path, tmp_path: Path) -> None:
    known = {"MODEL": model_file, "OUT": tmp_path / "out.onnx", "DATA": data_file}
    before = files_in(tmp_path)
    result = invoke(*(known.get(item, item) for item in arguments))
    assert result.exit_code == 2, result.stderr
    assert "Error" in result.stderr and "Traceback" not in result.stderr
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("verbose", [False, True])
def test_internal_errors(verbose: bool, model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(opened, "inspect", fail)
    result = invoke(*(["-v"] if verbose else []), "inspect", model_file)
    assert result.exit_code == 1
    if verbose:
        assert isinstance(result.exception, RuntimeError)
    else:
        assert "RuntimeError: a fault of ours" in result.stderr and "-v" in result.stderr and "Traceback" not in result.stderr


def test_as_a_module(model_file: Path) -> None:
    command = [sys.executable, "-m", "sfp_onnx"]
    found = subprocess.run([*command, "inspect", str(model_file), "--json"], check=True, capture_output=True, text=True)
    assert json.loads(found.stdout)["channels"] == 8 + 12 + CLASSES and not found.stderr
    assert subprocess.run([*command, "inspect", "missing.onnx"], capture_output=True).returncode == 4
    assert subprocess.run([*command, "inspect"], capture_output=True).returncode == 2
    assert subprocess.run([*command, "--help"], capture_output=True, text=True).stdout.startswith("Usage: ")


# ---- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_json(model_file: Path) -> None:
    found = json.loads(done("inspect", model_file, "--json"))
    assert found["macs"] == MACS and found["params"] == PARAMS
    assert [(group["group"], group["width"], group["producers"], group["consumers"]) for group in found["groups"]] == [
        ("conv1", 8, ["conv1"], ["conv2"]),
        ("conv2", 12, ["conv2"], ["head"]),
    ]
    assert [group["macs_share"] for group in found["groups"]] == pytest.approx([64 * 9 * 24 / MACS, 64 * 9 * 96 / MACS])
    assert found["macs_around"] == pytest.approx(1.0) and not found["tables"]
    assert found["channels"] == 25 and found["channels_prunable"] == 20 and found["prunable_share"] == pytest.approx(0.8)
    (pinned,) = found["pinned"]
    assert pinned["channels"] == CLASSES and pinned["layers"] == ["head"] and "output" in pinned["reason"]


def test_inspect_text(model_file: Path) -> None:
    result = invoke("inspect", model_file)
    assert "80% of channels prunable" in result.stdout
    assert all(word in result.stdout for word in ("conv1", "conv2", "head", "cannot shrink because"))
    assert "sfp-onnx prune" in result.stderr
    assert invoke("-q", "inspect", model_file).stderr == ""


def test_inspect_with_a_shape(save: Callable[..., Path]) -> None:
    model = save(classifier())
    assert json.loads(done("inspect", model, "--input-shape", "x=2,3,8,8", "--json"))["macs"] == MACS
    result = invoke("inspect", model, "--input-shape", "other=1,2")
    assert result.exit_code == 4 and "'other'" in result.stderr and "x ['N', 3, 8, 8]" in result.stderr


# ---- prune, plan, apply ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [None, "magnitude", "bn-scale", "activation", "apoz", "contribution", "fpgm", "random"])
def test_prune_with_manifest(score: str | None, model_file: Path, data_file: Path, tmp_path: Path) -> None:
    """The manifest is enough to rebuild the masked reference without this package."""
    out, manifest = tmp_path / "out.onnx", tmp_path / "m.json"
    chosen = ["--score", score] if score else []
    options = ["--data", data_file, "--repair", "none", "--ratio", "0.5", "--manifest", manifest, *chosen]
    text = done("prune", model_file, "-o", out, *options)
    assert "verified" in text and f"wrote {out}" in text
    found = json.loads(manifest.read_text())
    assert found["model"]["sha256"] == hashlib.sha256(model_file.read_bytes()).hexdigest()
    assert found["output"]["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert found["data"]["sha256"] == hashlib.sha256(data_file.read_bytes()).hexdigest()
    assert found["options"]["score"] == (score or "contribution") and found["options"]["ratio"] == 0.5 and found["options"]["seed"] == 0
    assert set(found["versions"]) == {"sfp_onnx", "onnx", "onnxruntime", "onnx-graphsurgeon", "numpy", "click"}
    assert found["versions"]["numpy"] == np.__version__
    assert found["before"]["macs"] == MACS and found["before"]["params"] == PARAMS
    assert found["after"]["macs"] == macs(out) and found["after"]["params"] == parameters(out)
    assert found["model"]["bytes"] == model_file.stat().st_size
    assert abs(found["output"]["bytes"] - out.stat().st_size) < 100
    cuts = found["cuts"]
    assert [cut["tensor"] for cut in cuts] == ["c1", "n1", "r1", "c2", "r2", "p", "f"]
    assert all(cut["axis"] == 1 and cut["size"] == (8 if cut["tensor"] in ("c1", "n1", "r1") else 12) for cut in cuts)
    assert [cut["rank"] for cut in cuts] == [4, 4, 4, 4, 4, 4, 2]
    assert [group["remove"] for group in found["plan"]["groups"]] == [cuts[0]["removed"], cuts[3]["removed"]]
    reference = masked_reference(onnx.load(model_file), cuts)
    feeds = {"x": images(20, seed=9)}
    assert relative(run_model(out, feeds)[0], run_model(reference, feeds)[0]) <= 1e-4
    assert relative(run_model(model_file, feeds)[0], run_model(reference, feeds)[0]) > 1e-3


def test_prune_repairs_where_there_is_data(model_file: Path, save: Callable[..., Path], tmp_path: Path) -> None:
    """With data `obs` scores and `lstsq` repairs; the answers come nearer to the original, at the same size."""
    data, out, manifest = save({"x": images(160)}), tmp_path / "out.onnx", tmp_path / "m.json"
    result = invoke("prune", model_file, "-o", out, "--data", data, "--ratio", "0.5", "--manifest", manifest)
    assert result.exit_code == 0, result.stderr
    assert "score: obs (default)" in result.stderr and "repair (lstsq, 150 samples)" in result.stderr
    found = json.loads(manifest.read_text())
    assert found["options"]["score"] == "obs" and found["repair"]["kind"] == "lstsq" and found["repair"]["held_out"]
    assert found["repair"]["after"] < found["repair"]["before"] and [own["layer"] for own in found["repair"]["layers"]] == ["conv2", "head"]
    done("prune", model_file, "-o", tmp_path / "bare.onnx", "--data", data, "--ratio", "0.5", "--score", "obs", "--repair", "none")
    assert sizes(onnx.load(out)) == sizes(onnx.load(tmp_path / "bare.onnx"))
    feeds = {"x": images(20, seed=9)}
    dense, bare, own = (run_model(path, feeds)[0] for path in (model_file, tmp_path / "bare.onnx", out))
    assert np.square(own - dense).sum() < 0.7 * np.square(bare - dense).sum()


def test_plan_and_apply_with_repair_give_the_same_bytes_as_prune(model_file: Path, save: Callable[..., Path], tmp_path: Path) -> None:
    data = ["--data", save({"x": images(160)}), "--seed", "3"]
    done("prune", model_file, "-o", tmp_path / "a.onnx", "--ratio", "0.5", *data)
    done("plan", model_file, "-o", tmp_path / "plan.json", "--ratio", "0.5", *data)
    done("apply", model_file, tmp_path / "plan.json", "-o", tmp_path / "b.onnx", *data)
    done("apply", model_file, tmp_path / "plan.json", "-o", tmp_path / "bare.onnx", "--repair", "none")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes() != (tmp_path / "bare.onnx").read_bytes()


def test_plan_and_apply_give_the_same_bytes_as_prune(model_file: Path, data_file: Path, tmp_path: Path) -> None:
    options = [
        "--data",
        data_file,
        "--target",
        "macs=40%",
        "--score",
        "activation",
        "--allocation",
        "global",
        "--samples",
        "7",
        "--seed",
        "3",
    ]
    done("prune", model_file, "-o", tmp_path / "a.onnx", "--repair", "none", *options)
    text = done("plan", model_file, "-o", tmp_path / "plan.json", "--repair", "none", *options)
    assert "conv1" in text and "MACs" in text
    assert not (tmp_path / "b.onnx").exists()
    done("apply", model_file, tmp_path / "plan.json", "-o", tmp_path / "b.onnx", "--manifest", tmp_path / "m.json")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    plan, manifest = json.loads((tmp_path / "plan.json").read_text()), json.loads((tmp_path / "m.json").read_text())
    assert manifest["plan"] == plan and manifest["options"] == plan["options"]
    assert plan["options"]["data"]["samples"] == 7
    done("plan", model_file, "-o", tmp_path / "again.json", "--repair", "none", *options)
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()


def test_an_edited_plan_is_applied(model_file: Path, tmp_path: Path) -> None:
    done("plan", model_file, "-o", tmp_path / "plan.json", "--ratio", "0.5")
    plan = json.loads((tmp_path / "plan.json").read_text())
    plan["groups"][0]["remove"] = [7, 0]
    del plan["groups"][1]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    done("apply", model_file, tmp_path / "plan.json", "-o", tmp_path / "out.onnx", "--manifest", tmp_path / "m.json")
    old, new = (
        {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
        for path in (model_file, tmp_path / "out.onnx")
    )
    np.testing.assert_array_equal(new["w1"], old["w1"][1:7])
    np.testing.assert_array_equal(new["w2"], old["w2"][:, 1:7])
    assert json.loads((tmp_path / "m.json").read_text())["cuts"][0]["removed"] == [0, 7]


@pytest.mark.parametrize(
    ("target", "measure", "limit"),
    [("macs=50%", macs, MACS / 2), ("params=50%", parameters, PARAMS / 2), ("macs=30k", macs, 30_000), ("params=900", parameters, 900)],
)
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_targets_are_met_and_not_overshot(
    target: str, measure: Callable[[Path], int], limit: float, allocation: str, model_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.onnx"
    done("prune", model_file, "-o", out, "--target", target, "--allocation", allocation)
    assert 0.75 * limit <= measure(out) <= limit


def test_several_targets(model_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    done("prune", model_file, "-o", out, "--target", "macs=90%", "--target", "params=40%")
    assert macs(out) <= 0.9 * MACS and parameters(out) <= 0.4 * PARAMS


@pytest.mark.parametrize(
    ("options", "best"), [(["--min-channels", "6"], (6, 6)), (["--keep", "conv1"], (8, 1)), (["--align", "4"], (4, 4))]
)
@pytest.mark.parametrize("command", ["plan", "prune"])
def test_impossible_targets(options: list[str], best: tuple[int, int], command: str, model_file: Path, tmp_path: Path) -> None:
    before = files_in(tmp_path)
    result = invoke(command, model_file, "-o", tmp_path / "out", "--target", "macs=1%", *options)
    first, second = best
    reachable = 64 * 9 * (3 * first + first * second) + second * 5
    assert result.exit_code == 3
    assert f"{reachable:,}" in result.stderr and f"{MACS / 100:,.0f}" in result.stderr and "Traceback" not in result.stderr
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "widths"),
    [
        ([], (4, 6)),
        (["--keep", "conv1"], (8, 6)),
        (["--keep", "^w2$"], (4, 12)),
        (["--only", "conv1"], (4, 12)),
        (["--only", "conv[12]"], (4, 6)),
        (["--min-channels", "7"], (7, 7)),
        (["--align", "4"], (4, 8)),
        (["--align", "8"], (8, 8)),
        (["--align", "none"], (4, 6)),
    ],
)
def test_what_may_shrink(options: list[str], widths: tuple[int, int], model_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    done("prune", model_file, "-o", out, "--ratio", "0.5", *options)
    shapes = sizes(onnx.load(out))
    assert (shapes["w1"][0], shapes["w2"][0]) == widths


def test_global_allocation_ranks_over_all_groups(save: Callable[..., Path], tmp_path: Path) -> None:
    """conv1's channels are all but dead: they leave before any of conv2 does."""
    model = classifier()
    for tensor in model.graph.initializer:
        if tensor.name in ("w1", "gamma"):
            array = numpy_helper.to_array(tensor).copy()
            array[2:] *= 1e-3
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    path, out = save(model), tmp_path / "out.onnx"
    options = ["--allocation", "global", "--score", "contribution", "--data", save({"x": images()}), "--repair", "none"]
    done("prune", path, "-o", out, "--ratio", "0.3", *options)
    shapes = sizes(onnx.load(out))
    assert shapes["w1"][0] == 2 and shapes["w2"][0] == 12


def test_ratio_zero_writes_the_model_unchanged(model_file: Path, tmp_path: Path) -> None:
    result = invoke("prune", model_file, "-o", tmp_path / "out.onnx", "--ratio", "0")
    assert result.exit_code == 0 and "removes nothing" in result.stderr
    assert onnx.load(tmp_path / "out.onnx") == onnx.load(model_file)


def test_no_verify_says_so(model_file: Path, tmp_path: Path) -> None:
    done("prune", model_file, "-o", tmp_path / "a.onnx", "--ratio", "0.5")
    text = done("prune", model_file, "-o", tmp_path / "b.onnx", "--ratio", "0.5", "--no-verify", "--manifest", tmp_path / "m.json")
    assert "not verified" in text
    assert json.loads((tmp_path / "m.json").read_text())["verification"] is None
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_a_wrong_cut_is_refused(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """verify compares: a model that is not what was planned is not written."""
    original = cut_room.cut

    def wrong(*arguments: Any) -> Any:
        model = original(*arguments)
        tensor = next(tensor for tensor in model.proto.graph.initializer if tensor.name == "b3")
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(0.01), "b3"))
        return model

    monkeypatch.setattr(applied, "cut", wrong)
    before = files_in(tmp_path)
    result = invoke("prune", model_file, "-o", tmp_path / "out.onnx", "--ratio", "0.5", "--manifest", tmp_path / "m.json")
    assert result.exit_code == 3 and "'logits'" in result.stderr and "Nothing was written" in result.stderr
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("command", ["prune", "apply"])
def test_external_output(command: str, tmp_path: Path) -> None:
    model = external(classifier(widths=(16, 24)), tmp_path / "model.onnx")
    out = tmp_path / "out.onnx"
    if command == "apply":
        done("plan", model, "-o", tmp_path / "plan.json", "--ratio", "0.5")
        done("apply", model, tmp_path / "plan.json", "-o", out, "--external-data")
    else:
        done("prune", model, "-o", out, "--ratio", "0.5", "--external-data")
    assert (tmp_path / "out.onnx.data").stat().st_size >= 4 * 12 * 8 * 9
    found = json.loads(done("evaluate", model, out, "--data", _saved(tmp_path), "--no-latency", "--json"))
    assert [item["size"]["bytes"] for item in found] == [path.stat().st_size + Path(f"{path}.data").stat().st_size for path in (model, out)]


def _saved(folder: Path) -> Path:
    np.savez(folder / "own.npz", x=images())
    return folder / "own.npz"


def test_preprocessing_reaches_the_scores(save: Callable[..., Path], model_file: Path, tmp_path: Path) -> None:
    raw = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3)).astype(np.uint8)
    steps = ["--layout", "nhwc", "--scale", "255", "--mean", "0.5,0.4,0.3", "--std", "0.2, 0.3, 0.4"]
    ready = (np.moveaxis(raw, -1, 1) / np.float32(255) - np.reshape([0.5, 0.4, 0.3], (3, 1, 1))) / np.reshape([0.2, 0.3, 0.4], (3, 1, 1))
    plans = []
    for source, options in ((save({"x": raw}, "raw.npz"), steps), (save({"x": ready.astype(np.float32)}, "ready.npz"), [])):
        done("plan", model_file, "-o", tmp_path / "p.json", "--ratio", "0.5", "--score", "activation", "--data", source, *options)
        plans.append([group["remove"] for group in json.loads((tmp_path / "p.json").read_text())["groups"]])
    assert plans[0] == plans[1]


def test_held_out_data(model_file: Path, data_file: Path, tmp_path: Path) -> None:
    text = done("prune", model_file, "-o", tmp_path / "out.onnx", "--ratio", "0.5", "--test-data", data_file)
    before, after = (np.mean(run_model(path, {"x": images()})[0].argmax(1) == labels_of()) for path in (model_file, tmp_path / "out.onnx"))
    assert f"top-1 on 10 held-out samples: {before:.2%} -> {after:.2%}" in text
    raw = tmp_path / "raw.npz"
    np.savez(raw, x=np.full((4, *IMAGE), 3, np.uint8))
    text = done("prune", model_file, "-o", tmp_path / "out2.onnx", "--ratio", "0.5", "--test-data", raw, "--scale", "255")
    assert "agreement with the original on 4 held-out samples" in text


def test_quiet_and_verbose(model_file: Path, tmp_path: Path) -> None:
    arguments = ["prune", model_file, "-o", tmp_path / "out.onnx", "--ratio", "0.5"]
    assert invoke("-q", *arguments).stderr == ""
    assert "score: magnitude (default)" in invoke(*arguments).stderr
    assert "conv2" in invoke("-v", *arguments).stderr


# ---- evaluate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", ["N", 4])
def test_evaluate_json(batch: int | str, save: Callable[..., Path], data_file: Path, tmp_path: Path) -> None:
    """Against onnxruntime and numpy; a fixed batch (10 samples in batches of 4) changes nothing."""
    model, out = save(classifier(batch=batch)), tmp_path / "out.onnx"
    done("prune", model, "-o", out, "--ratio", "0.5")
    first, second = json.loads(done("evaluate", model, out, "--data", data_file, "--json"))
    padded = np.concatenate([images(), np.zeros((2, *IMAGE), np.float32)])
    blocks = [padded] if batch == "N" else np.split(padded, 3)
    a, b = (np.concatenate([run_model(path, {"x": block})[0] for block in blocks])[:10] for path in (model, out))
    p, q = log_softmax(a), log_softmax(b)
    assert first["samples"] == second["samples"] == 10
    assert first["top1"] == np.mean(a.argmax(1) == labels_of()) and second["top1"] == np.mean(b.argmax(1) == labels_of())
    assert first["agreement"] == 1 and second["agreement"] == np.mean(a.argmax(1) == b.argmax(1))
    assert first["kl"] == pytest.approx(0, abs=1e-9) and second["kl"] == pytest.approx((np.exp(p) * (p - q)).sum(1).mean(), rel=1e-5)
    assert first["relative_error"] == 0
    assert second["relative_error"] == pytest.approx(np.linalg.norm(a.astype(float) - b) / np.linalg.norm(a.astype(float)), rel=1e-5)
    assert first["size"] == {"macs": MACS, "params": PARAMS, "bytes": model.stat().st_size}
    assert second["size"] == {"macs": macs(out), "params": parameters(out), "bytes": out.stat().st_size}
    for item in (first, second):
        assert 0 < item["latency_min_ms"] <= item["latency_median_ms"]
    assert first["latency_ratio"] == 1 and second["latency_ratio"] == pytest.approx(second["latency_min_ms"] / first["latency_min_ms"])


def test_evaluate_without_labels_and_latency(model_file: Path, save: Callable[..., Path]) -> None:
    (found,) = json.loads(done("evaluate", model_file, "--data", save(images()), "--no-latency", "--json"))
    assert found["top1"] is None and found["latency_min_ms"] is None and found["latency_ratio"] is None and found["agreement"] == 1
    text = done("evaluate", model_file, "--data", save(images()), "--no-latency")
    assert "model.onnx" in text and "agreement" in text


def test_evaluate_probabilities(save: Callable[..., Path], data_file: Path) -> None:
    """Softmax at the end: KL is that of the probabilities, not of a softmax of them."""
    paths = []
    for seed in (0, 1):
        model = classifier(seed=seed)
        model.graph.node.append(onnx.helper.make_node("Softmax", ["logits"], ["probabilities"], "softmax", axis=1))
        model.graph.output[0].name = "probabilities"
        paths.append(save(model, f"p{seed}.onnx"))
    _, second = json.loads(done("evaluate", *paths, "--data", data_file, "--no-latency", "--json"))
    p, q = (run_model(path, {"x": images()})[0].astype(np.float64) for path in paths)
    assert second["kl"] == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-4)


def test_evaluate_models_that_do_not_compare(model_file: Path, save: Callable[..., Path], data_file: Path) -> None:
    renamed = classifier()
    renamed.graph.node[-1].output[0] = renamed.graph.output[0].name = "scores"
    wider = onnx.ModelProto()
    wider.CopyFrom(classifier())
    for tensor in wider.graph.initializer:
        if tensor.name in ("w3", "b3"):
            array = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(np.concatenate([array, array]), tensor.name))
    wider.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 2 * CLASSES
    for model, words in ((renamed, "scores"), (wider, "[10, 10]")):
        result = invoke("evaluate", model_file, save(model), "--data", data_file)
        assert result.exit_code == 4 and words in result.stderr and "Traceback" not in result.stderr


# ---- the real thing --------------------------------------------------------------------------------------------------


def test_resnet20(shared: Path, tmp_path: Path) -> None:
    out, manifest = tmp_path / "out.onnx", tmp_path / "m.json"
    model = shared / "models" / "resnet20_cifar10.onnx"
    done("prune", model, "-o", out, "--ratio", "0.5", "--manifest", manifest)
    found = json.loads(manifest.read_text())
    assert found["after"]["macs"] <= 0.3 * found["before"]["macs"]
    proto = onnx.load(model)
    (port,) = [item for item in proto.graph.input if item.name not in sizes(proto)]
    feeds = {port.name: np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)}
    assert relative(run_model(out, feeds)[0], run_model(masked_reference(proto, found["cuts"]), feeds)[0]) <= 1e-4


def test_all_public_names_are_documented() -> None:
    for name in sfp_onnx.__all__:
        assert getattr(sfp_onnx, name).__doc__, name


def test_evaluate_in_memory(model_file: Path, tmp_path: Path) -> None:
    """A result that is not saved yet is not mistaken for the file that it was made from."""
    result = sfp_onnx.prune(model_file, sfp_onnx.PlanOptions(ratio=0.5))
    data = sfp_onnx.data_for(result.original, images())
    assert data is not None
    first, second = sfp_onnx.evaluate([model_file, result.model], data, latency=False)
    assert first.size.bytes == model_file.stat().st_size
    assert second.size.bytes is not None and abs(second.size.bytes - result.save(tmp_path / "out.onnx").stat().st_size) < 100
