"""What planning measured, kept in a file: further plans from it are those that would have been made from the data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import images, invoke

import sfp_onnx
from sfp_onnx.core.errors import DataError, PlanError
from sfp_onnx.core.options import PlanOptions, ScoreOptions
from sfp_onnx.latency import measure
from sfp_onnx.pipeline import scored as scoring
from sfp_onnx.planning import library
from sfp_onnx.planning.library import read_library, save_library


@pytest.fixture
def data(tmp_path: Path) -> Path:
    np.savez(tmp_path / "calibration.npz", x=images(60))
    return tmp_path / "calibration.npz"


@pytest.fixture
def kept(model_file: Path, data: Path, tmp_path: Path) -> Path:
    """A library that a plan for another target has kept."""
    options = PlanOptions(targets=("macs=80%",), save_library=tmp_path / "kept.npz")
    sfp_onnx.plan(model_file, options, data=data)
    return tmp_path / "kept.npz"


def refuse(*arguments: Any, **named: Any) -> Any:
    raise AssertionError("measured again")


def test_a_plan_from_a_library_is_the_plan(model_file: Path, data: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = PlanOptions(targets=("macs=50%", "size=70%"))
    direct = sfp_onnx.plan(model_file, wanted, data=data)
    data.unlink()
    monkeypatch.setattr(scoring, "scored", refuse)
    found = sfp_onnx.plan(model_file, replace(wanted, library=kept))
    assert found == direct and found.options["score"] == "obs" and found.options["data"]["samples"] == 60
    assert "library" not in found.options and "kept" not in json.dumps(found.options)


def test_the_command_line(model_file: Path, data: Path, kept: Path, tmp_path: Path) -> None:
    again = ["plan", model_file, "-o", tmp_path / "first.json", "--data", data, "--target", "macs=80%"]
    assert invoke(*again, "--save-library", tmp_path / "b.npz").exit_code == 0
    assert (tmp_path / "b.npz").read_bytes() == kept.read_bytes()
    plans = [tmp_path / "direct.json", tmp_path / "again.json"]
    for plan, source in zip(plans, (["--data", data], ["--library", kept]), strict=True):
        result = invoke("plan", model_file, "-o", plan, *source, "--target", "macs=50%")
        assert result.exit_code == 0, result.stderr
    assert plans[0].read_bytes() == plans[1].read_bytes()
    made = []
    for name, source in (("a", []), ("b", ["--library", kept])):
        result = invoke("prune", model_file, "-o", tmp_path / f"{name}.onnx", "--data", data, "--target", "macs=50%", *source)
        assert result.exit_code == 0, result.stderr
        made.append((tmp_path / f"{name}.onnx").read_bytes())
    assert made[0] == made[1]
    result = invoke("prune", model_file, "-o", tmp_path / "c.onnx", "--target", "macs=50%", "--library", kept)
    assert result.exit_code == 4 and "made for a repair (lstsq)" in result.stderr and not (tmp_path / "c.onnx").exists()
    result = invoke("plan", model_file, "-o", kept, "--library", kept, "--target", "macs=50%")
    assert result.exit_code == 4 and "is an input file" in result.stderr


def test_sweeps_and_their_parts_share_one(model_file: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["sweep", model_file, "--data", data, "--targets", "macs=80%:40%:20%", "--threads", "1"]
    kept, folders = tmp_path / "sweep.npz", [tmp_path / "whole", tmp_path / "again"]
    assert invoke(*words, "--save-library", kept, "--save-dir", folders[0]).exit_code == 0
    monkeypatch.setattr(scoring, "scored", refuse)
    for number in (1, 2):
        more = ["--part", f"{number}/2", "-o", tmp_path / f"part{number}.json", "--save-dir", folders[1]]
        result = invoke(*words, "--library", kept, *more)
        assert result.exit_code == 0, result.stderr
    models = [{file.name: file.read_bytes() for file in folder.glob("*.onnx")} for folder in folders]
    assert len(models[0]) == 3 and models[0] == models[1]
    assert invoke("sweep", "--join", tmp_path / "part1.json", tmp_path / "part2.json").exit_code == 0


def test_latency_tables_are_kept(model_file: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "timed.npz"
    options = PlanOptions(targets=("latency=99%",), threads=1, save_library=kept)
    sfp_onnx.plan(model_file, options, data=data)
    assert (read_library(kept).profile or {})["batch"] == 1
    monkeypatch.setattr(scoring, "measure_device_profile", refuse)
    monkeypatch.setattr("sfp_onnx.latency.profiling.measure_device_profile", refuse)
    found = sfp_onnx.plan(model_file, PlanOptions(targets=("latency=98%",), threads=1, library=kept))
    assert found.options["device_profile"] == str(kept) and found.figures["latency"]["actual"] > 0
    monkeypatch.setattr(measure, "latency_ratio", refuse)  # of another machine: predicted
    sfp_onnx.plan(model_file, PlanOptions(targets=("latency=98%",), threads=2, library=kept))
    result = invoke("plan", model_file, "-o", tmp_path / "p.json", "--target", "latency=98%", "--device-profile", kept, "--threads", "2")
    assert result.exit_code == 0, result.stderr


# ---- foreign libraries -----------------------------------------------------------------------------------------------


def test_what_differs_is_said(model_file: Path, data: Path, kept: Path, tmp_path: Path) -> None:
    options = PlanOptions(targets=("macs=50%",), library=kept)

    def refused(*words: str, **named: Any) -> None:
        with pytest.raises(PlanError) as caught:
            sfp_onnx.plan(named.pop("model", model_file), options, **named)
        for word in words:
            assert word in str(caught.value)

    np.savez(tmp_path / "other.npz", x=images(50))
    refused("data sha256: ", "data samples: 60 then, 50 now", data=tmp_path / "other.npz")
    refused("score: obs then, magnitude now", score_name="magnitude")
    refused("seed: 0 then, 3 now", score_options=ScoreOptions(seed=3))
    refused("fit: lstsq then, none now", repair=None)
    other = tmp_path / "other.onnx"
    proto = onnx.load(model_file)
    proto.producer_version = "another"
    other.write_bytes(proto.SerializeToString())
    refused("made of another model", "of this model", model=other)
    held = read_library(kept)
    save_library(kept, replace(held, versions={**held.versions, "onnxruntime": "1.0"}))
    refused("version of onnxruntime: 1.0 then")


def test_what_is_no_library(model_file: Path, data: Path, kept: Path, tmp_path: Path) -> None:
    options = PlanOptions(targets=("macs=50%",))

    def refused(path: Path, words: str) -> None:
        with pytest.raises(DataError, match=words):
            sfp_onnx.plan(model_file, replace(options, library=path))

    refused(tmp_path / "nowhere.npz", "no such file")
    refused(data, "no sfp_onnx plan library")
    refused(model_file, "no sfp_onnx plan library")
    whole = kept.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "short.npz").write_bytes(whole[:size])
        refused(tmp_path / "short.npz", "no sfp_onnx plan library")
    held = read_library(kept)
    save_library(kept, replace(held, scores=held.scores[:-1]))
    refused(kept, "damaged: its scores")
    save_library(kept, replace(held, errors={name: row[:-1] for name, row in held.errors.items()}))
    refused(kept, "damaged: its scores")


def test_versions_of_the_format(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "VERSION", 2)
    with pytest.raises(DataError, match="version 1 of its format; this program reads 2"):
        read_library(kept)
