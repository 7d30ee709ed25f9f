"""One story: the same request gives the same bytes from Python, from the command line, and from plan and apply."""

from __future__ import annotations

import ast
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import classifier, images, invoke, labels_of

import sfp_onnx
from sfp_onnx import DataOptions, OutputOptions, PlanOptions, RepairOptions, ScoreOptions

ROOT = Path(__file__).resolve().parents[1]
SAMPLE, SAMPLE_DATA = ROOT / "samples" / "digits.onnx", ROOT / "samples" / "digits_calibration.npz"
RAW = DataOptions(scale=16.0, mean=(0.3,), std=(0.35,), layout="nhwc")
AS_TYPED = ("--scale", "16", "--mean", "0.3", "--std", "0.35", "--layout", "nhwc")

# Ten requests: how they are typed, and the arguments of `prune` that mean the same.
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ratio": ("--ratio 0.5", {"options": PlanOptions(ratio=0.5)}),
    "macs": ("--data DATA --target macs=50% --align 8", {"options": PlanOptions(targets=("macs=50%",), align=8), "data": True}),
    "two targets": (
        "--data DATA --target params=60% --target size=70%", {"options": PlanOptions(targets=("params=60%", "size=70%")), "data": True}
    ),
    "memory": ("--data DATA --target memory=70%", {"options": PlanOptions(targets=("memory=70%",)), "data": True}),
    "drop": ("--data DATA --max-drop 20%", {"options": PlanOptions(max_drop="20%"), "data": True}),
    "bias": (
        "--data DATA --ratio 0.3 --repair bias --score contribution",
        {"options": PlanOptions(ratio=0.3), "data": True, "score_name": "contribution", "repair": RepairOptions(fit="bias")},
    ),
    "no repair": ("--data DATA --ratio 0.3 --repair none", {"options": PlanOptions(ratio=0.3), "data": True, "repair": None}),
    "score with options": (
        "--data DATA --ratio 0.3 --score bandit:sar,pulls=2 --seed 3",
        {
            "options": PlanOptions(ratio=0.3), "data": True, "score_name": "bandit:sar,pulls=2", "score_options": ScoreOptions(seed=3),
            "repair": RepairOptions(seed=3), "data_options": {"seed": 3},
        },
    ),
    "fewer samples": (
        "--data DATA --ratio 0.3 --samples 100 --seed 1",
        {
            "options": PlanOptions(ratio=0.3), "data": True, "score_options": ScoreOptions(seed=1), "repair": RepairOptions(seed=1),
            "data_options": {"seed": 1, "samples": 100},
        },
    ),
    "other form": (
        "--data DATA --ratio 0.3 --quantize int8", {"options": PlanOptions(ratio=0.3), "data": True, "output": {"quantize": "int8"}}
    ),
}  # fmt: skip


def typed(text: str) -> list[str]:
    words = shlex.split(text.replace("DATA", str(SAMPLE_DATA)))
    return [*words, *AS_TYPED] if "DATA" in text else words


def from_python(arguments: dict[str, Any], path: Path) -> bytes:
    arguments = dict(arguments)
    options = DataOptions(**{**vars(RAW), **arguments.pop("data_options", {})})
    if arguments.pop("data", False):
        arguments |= {"data": SAMPLE_DATA, "data_options": options}
    output = OutputOptions(path=path, **arguments.pop("output", {}))
    sfp_onnx.prune(SAMPLE, **arguments, output=output)
    return path.read_bytes()


@pytest.mark.parametrize("name", REQUESTS)
def test_python_and_the_command_line_write_the_same_bytes(name: str, tmp_path: Path) -> None:
    text, arguments = REQUESTS[name]
    result = invoke("prune", SAMPLE, "-o", tmp_path / "typed.onnx", *typed(text))
    assert result.exit_code == 0, result.stderr
    assert from_python(arguments, tmp_path / "python.onnx") == (tmp_path / "typed.onnx").read_bytes()


@pytest.mark.parametrize("name", [name for name in REQUESTS if name != "other form"])
def test_plan_and_apply_write_the_same_bytes_as_prune(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next command is the one that `plan` prints."""
    monkeypatch.chdir(tmp_path)
    text = REQUESTS[name][0]
    assert invoke("prune", SAMPLE, "-o", "once.onnx", *typed(text)).exit_code == 0
    planned = invoke("plan", SAMPLE, "-o", "plan.json", *typed(text))
    assert planned.exit_code == 0, planned.stderr
    following = shlex.split(planned.stderr.split("Next: sfp-onnx ")[1].splitlines()[0])
    applied = invoke(*following)
    assert applied.exit_code == 0, applied.stderr
    assert Path("digits-pruned.onnx").read_bytes() == Path("once.onnx").read_bytes()


def test_without_arguments_python_repairs_as_the_command_line_does(tmp_path: Path) -> None:
    result = sfp_onnx.prune(SAMPLE, PlanOptions(targets=("macs=50%",), align=8), data=SAMPLE_DATA, data_options=RAW)
    assert result.repaired is not None and result.repaired.kind == "lstsq" and result.plan.options["score"] == "obs"
    opened = sfp_onnx.data_for(sfp_onnx.load(SAMPLE), SAMPLE_DATA, preprocessing=sfp_onnx.Preprocessing((0.3,), (0.35,), 16.0, "nhwc"))
    again = sfp_onnx.prune(SAMPLE, PlanOptions(targets=("macs=50%",), align=8), data=opened)
    assert again.to_proto() == result.to_proto()


def test_a_plan_for_a_repair_is_not_applied_without_data(model_file: Path, data_file: Path, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out.onnx"
    assert invoke("plan", model_file, "-o", plan, "--data", data_file, "--ratio", "0.5").exit_code == 0
    refused = invoke("apply", model_file, plan, "-o", out)
    assert refused.exit_code == 4 and f"--data {data_file}" in refused.stderr and "--repair none" in refused.stderr and not out.exists()
    assert invoke("apply", model_file, plan, "-o", out, "--repair", "none").exit_code == 0
    with pytest.raises(sfp_onnx.DataError, match="made for a repair"):
        sfp_onnx.apply(model_file, sfp_onnx.read_plan(plan))


def test_a_plan_applied_with_other_data_says_so(model_file: Path, data_file: Path, tmp_path: Path) -> None:
    plan, other = tmp_path / "plan.json", tmp_path / "other.npz"
    np.savez(other, x=images(12, seed=9), labels=labels_of(12))
    assert invoke("plan", model_file, "-o", plan, "--data", data_file, "--ratio", "0.5").exit_code == 0
    result = invoke("apply", model_file, plan, "-o", tmp_path / "out.onnx", "--data", other, "--force")
    assert result.exit_code == 0 and "Warning: the plan was made with other data" in result.stderr


def test_a_plan_of_an_older_version_still_applies(model_file: Path, tmp_path: Path) -> None:
    """Plans of before the repair was recorded, with options that are gone."""
    made = sfp_onnx.plan(model_file, PlanOptions(ratio=0.5), "magnitude")
    data = json.loads(json.dumps({"format": "sfp_onnx plan", "version": 1, **_plain(made)}))
    data["options"] |= {"p": 2, "probe": "sgd", "pool": 4, "bandit": None}
    data["options"].pop("repair", None)
    plan = tmp_path / "old.json"
    plan.write_text(json.dumps(data))
    assert invoke("apply", model_file, plan, "-o", tmp_path / "out.onnx").exit_code == 0
    now = sfp_onnx.prune(model_file, PlanOptions(ratio=0.5), "magnitude").save(tmp_path / "b.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == now.read_bytes()


def _plain(plan: sfp_onnx.Plan) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(plan)


# ---- what is loaded when ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["import sfp_onnx", "from sfp_onnx.cli import main; main(['--help'], standalone_mode=False)"])
def test_nothing_heavy_is_loaded_before_it_is_used(code: str) -> None:
    check = f"import sys\n{code}\nprint([name for name in ('onnx', 'onnxruntime', 'onnx_graphsurgeon') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_public_name_is_there_and_typed() -> None:
    for name in sfp_onnx.__all__:
        assert getattr(sfp_onnx, name) is not None
    tree = ast.parse((Path(sfp_onnx.__file__).parent / "__init__.pyi").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    places = {f".{place}": set(names.split()) for place, names in sfp_onnx.PLACES.items()}
    assert {f".{node.module}": {name.name for name in node.names} for node in imports} == places


def test_configuration_is_found_where_the_command_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(classifier(), tmp_path / "model.onnx")
    text = 'model = "model.onnx"\nscore = "magnitude"\nratio = 0.5\n[prune]\noutput = "out.onnx"\n[plan]\noutput = "plan.json"\n'
    Path("sfp.toml").write_text(text)
    result = invoke("prune")
    assert result.exit_code == 0 and "options from sfp.toml" in result.stderr and Path("out.onnx").exists()
    assert invoke("plan").exit_code == 0 and Path("plan.json").exists()
    assert "prunable" in invoke("inspect").stdout
    assert invoke("prune", "--score", "random").exit_code == 0
    assert json.loads(invoke("plan", "--score", "random", "--json").stdout)["options"]["score"] == "random"


def test_apply_reads_data_as_the_plan_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The preprocessing and the number of samples are those of the plan, unless others are given."""
    monkeypatch.chdir(tmp_path)
    text = "--data DATA --ratio 0.3 --samples 100 --seed 1"
    assert invoke("prune", SAMPLE, "-o", "once.onnx", *typed(text)).exit_code == 0
    assert invoke("plan", SAMPLE, "-o", "plan.json", *typed(text)).exit_code == 0
    assert invoke("apply", SAMPLE, "plan.json", "-o", "again.onnx", "--data", SAMPLE_DATA).exit_code == 0
    assert Path("again.onnx").read_bytes() == Path("once.onnx").read_bytes()
    result = sfp_onnx.apply(SAMPLE, sfp_onnx.read_plan("plan.json"), SAMPLE_DATA)
    assert result.save("python.onnx").read_bytes() == Path("once.onnx").read_bytes()


def test_next_lines_repeat_what_a_configuration_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.toml").write_text('scale = 16\nmean = 0.3\nstd = 0.35\nlayout = "nhwc"\nratio = 0.3\n')
    planned = invoke("plan", SAMPLE, "-o", "plan.json", "--config", "own.toml", "--data", SAMPLE_DATA)
    following = planned.stderr.split("Next: sfp-onnx ")[1].splitlines()[0]
    for words in (f"--data {SAMPLE_DATA}", "--scale 16", "--mean 0.3", "--std 0.35", "--layout nhwc"):
        assert words in following
    assert invoke(*shlex.split(following)).exit_code == 0


def test_what_protects_nothing_is_refused(model_file: Path, tmp_path: Path) -> None:
    refused = invoke("prune", model_file, "-o", tmp_path / "out.onnx", "--ratio", "0.5", "--keep", "nothere")
    assert refused.exit_code == 2 and "--keep 'nothere' matches no layer" in refused.stderr


@pytest.mark.parametrize(
    ("record", "values"),
    [
        (PlanOptions, {"targets": 0.5}), (PlanOptions, {"targets": (0.5,)}), (PlanOptions, {"ratio": 2}),
        (PlanOptions, {"ratio": "0.5"}),
        (PlanOptions, {"align": 0}), (PlanOptions, {"min_channels": 0}), (PlanOptions, {"allocation": "all"}), (PlanOptions, {"keep": 3}),
        (PlanOptions, {"max_drop": 0.01}), (PlanOptions, {"confidence": "95%"}), (PlanOptions, {"threads": -1}),
        (PlanOptions, {"batch": 0}),
        (RepairOptions, {"fit": "all"}), (RepairOptions, {"memory": "2GB"}), (RepairOptions, {"seed": -1}), (ScoreOptions, {"seed": "x"}),
        (DataOptions, {"preset": "x"}), (DataOptions, {"mean": 0.3}), (DataOptions, {"layout": "x"}), (DataOptions, {"labels": 3}),
        (DataOptions, {"samples": 0}), (OutputOptions, {"quantize": "int4"}), (OutputOptions, {"path": 3}),
        (OutputOptions, {"half": "yes"}),
        (sfp_onnx.InspectOptions, {"input_shapes": {"x": 3}}),
        (sfp_onnx.ProfileOptions, {"pool": 0}), (sfp_onnx.DiluteOptions, {"scope": "all"}), (RepairOptions, {"ridges": ()}),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused_where_they_are_made(record: Any, values: dict[str, Any]) -> None:
    with pytest.raises(sfp_onnx.OptionError, match="expected"):
        record(**values)


def test_arguments_of_a_wrong_kind_are_refused_in_a_sentence(model_file: Path) -> None:
    half: Any = PlanOptions(ratio=0.5)
    for values in ({"options": 3}, {"score_name": 3}, {"repair": "lstsq"}, {"score_options": 3}, {"data_options": {}}, {"output": "x.onnx"},
                   {"data": 3}, {"data": {1, 2}}, {"source": 3}):  # fmt: skip
        arguments: dict[str, Any] = {"source": model_file, "options": half, **values}
        with pytest.raises(sfp_onnx.SfpError, match="expected"):
            sfp_onnx.prune(**arguments)
    with pytest.raises(sfp_onnx.OptionError, match="unknown score"):
        sfp_onnx.prune(model_file, half, "")


def test_apply_draws_the_samples_that_a_plan_was_judged_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    drawn = ("--max-drop", "20%", "--data", SAMPLE_DATA, *AS_TYPED, "--samples", "280", "--seed", "2")
    invoke("prune", SAMPLE, "-o", "whole.onnx", *drawn)
    invoke("plan", SAMPLE, "-o", "plan.json", *drawn)
    invoke("apply", SAMPLE, "plan.json", "-o", "applied.onnx", "--data", SAMPLE_DATA)
    assert Path("applied.onnx").read_bytes() == Path("whole.onnx").read_bytes()


@pytest.mark.parametrize(
    "more",
    [["-o", "sfp.toml"], ["-o", "x.onnx", "--manifest", "sfp.toml"], ["-o", "x.onnx", "--junit", "model.onnx"],
     ["-o", "x.onnx", "--junit", "x.onnx"], ["-o", "x.onnx", "--manifest", "x.json", "--junit", "x.json"],
     ["-o", "x.onnx", "--junit", "labels.npy"], ["-o", "x.onnx", "--device-profile", "p.json", "--manifest", "p.json"],
     ["-o", "x.onnx", "--device-profile", "p.json", "--junit", "p.json"]],
)  # fmt: skip
def test_nothing_that_is_named_is_written_over(
    more: list[str], model_file: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.onnx").write_bytes(model_file.read_bytes())
    Path("sfp.toml").write_text("ratio = 0.5\n")
    Path("p.json").write_text("{}")
    np.save("labels.npy", np.load(data_file)["labels"] if "labels" in np.load(data_file) else np.zeros(64, np.int64))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = invoke("prune", "model.onnx", "--data", data_file, "--labels", "labels.npy", "--repair", "none", *more)
    assert done.exit_code == 4
    assert "never touched" in done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_sweep_does_not_write_over_the_device_profile(model_file: Path, tmp_path: Path) -> None:
    profile = tmp_path / "p.json"
    profile.write_text("{}")
    with pytest.raises(sfp_onnx.OutputError, match="never touched"):
        sfp_onnx.sweep(model_file, ["macs=90%:50%:20%"], PlanOptions(device_profile=str(profile)), output=profile)
    assert profile.read_text() == "{}"


def test_configuration_with_a_byte_order_mark_and_a_list_of_models(
    model_file: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = f"models = {json.dumps([str(model_file), str(model_file)])}\ndata = {json.dumps(str(data_file))}\n"
    Path("sfp.toml").write_text(f"[evaluate]\n{names}latency = false\n", encoding="utf-8-sig")
    assert len(json.loads(invoke("evaluate", "--json").stdout)) == 2
