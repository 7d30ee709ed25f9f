"""What people read: results in a line, tables that fit, words from silent runs, -q and -v, help and version."""

from __future__ import annotations

import shlex
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import pytest
from conftest import IMAGE, classifier, images, invoke, labels_of

import sfp_onnx
from sfp_onnx.cli import common, main
from sfp_onnx.core.types import Shown
from sfp_onnx.report.text import table

# ---- from Python -----------------------------------------------------------------------------------------------------

LONG = 400  # characters


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What the public functions return, and what is in it."""
    path = tmp_path_factory.mktemp("shown") / "model.onnx"
    onnx.save(classifier(widths=(64, 96)), path)
    x = images(32)
    data = {"x": x, "labels": labels_of(len(x))}
    half = sfp_onnx.PlanOptions(ratio=0.5)
    pruned = sfp_onnx.prune(path, half, data=data, test_data=data)
    analysis = sfp_onnx.inspect(path)
    opened = sfp_onnx.data_for(analysis.model, data)
    diluted = sfp_onnx.dilute(path, sfp_onnx.DiluteOptions(rate=0.5, method="l1"), data=data)
    profiles = sfp_onnx.class_profiles(analysis, opened)
    return [
        pruned, pruned.plan, pruned.plan.groups[0], pruned.cuts[0], pruned.model, pruned.verification, *pruned.evaluation, analysis,
        analysis.coupling, analysis.coupling.groups[0], opened, sfp_onnx.scored(analysis, "magnitude", None), diluted, profiles,
        profiles.layers[0], sfp_onnx.sweep(path, "macs=80%:60%:20%", data=data), *sfp_onnx.evaluate(path, data, latency=False),
    ]  # fmt: skip


def test_results_show_themselves_in_a_line(results: list[Any]) -> None:
    for result in results:
        assert len(repr(result)) < LONG and "\n" not in repr(result), type(result)


def test_results_have_summaries(results: list[Any]) -> None:
    shown = [result for result in results if isinstance(result, Shown)]
    assert {type(result).__name__ for result in shown} >= {"Pruned", "Plan", "Analysis", "Model", "Sweep", "Dataset", "Scored", "Diluted"}
    for result in shown:
        first = result.summary().splitlines()[0]
        assert first in repr(result) and result._repr_html_().startswith("<pre>")
    html = repr(sfp_onnx.Group("a<b", np.arange(3), (), ())), sfp_onnx.Group("a<b", np.arange(3), (), ())._repr_html_()
    assert "a<b, 3 wide" in html[0] and "a&lt;b" in html[1]


def test_one_text_is_a_list_of_one() -> None:
    assert sfp_onnx.PlanOptions(targets="macs=50%") == sfp_onnx.PlanOptions(targets=("macs=50%",))  # type: ignore[arg-type]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes came with Python 3.11")
def test_errors_name_options_as_python_does(model_file: Path) -> None:
    with pytest.raises(sfp_onnx.DataError, match="--layout nhwc") as caught:
        sfp_onnx.prune(model_file, sfp_onnx.PlanOptions(ratio=0.5), data={"x": images(8).transpose(0, 2, 3, 1)})
    assert caught.value.__notes__ == ["From Python: --layout is DataOptions(layout=...)"]
    with pytest.raises(sfp_onnx.OptionError) as refused:
        sfp_onnx.prune(model_file, sfp_onnx.PlanOptions())
    assert "--target is PlanOptions(targets=...)" in refused.value.__notes__[0]
    assert "From Python" not in invoke("prune", model_file, "-o", "out.onnx").stderr


def test_public_names_are_listed() -> None:
    assert set(dir(sfp_onnx)) == {*sfp_onnx.__all__, "__version__"}
    assert sfp_onnx.__version__ in invoke("version").stdout


# ---- tables ----------------------------------------------------------------------------------------------------------

NAMES = [f"/encoder/layers.{index}/attention/projection/MatMul" for index in range(3)]


@pytest.mark.parametrize("room", [60, 80, 100])
def test_tables_fit_the_terminal(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(room))
    text = table(["group", "width", "made by", "read by"], [[name, "64", name, name] for name in NAMES])
    assert max(map(len, text.splitlines())) <= room and len(text.splitlines()) == 2 + len(NAMES)
    assert all(line.startswith("/enc") and " 64 " in line and line.endswith("MatMul") for line in text.splitlines()[2:])


def test_tables_that_cannot_fit_are_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    figures = [f"figure {number}" for number in range(9)]
    lines = table(["model", *figures, "none"], [["a.onnx", *"123456789", "-"], ["b.onnx", *"987654321", "-"]]).splitlines()
    assert lines[0].split() == ["model", "a.onnx", "b.onnx"] and lines[2].split() == ["figure", "0", "1", "9"]
    assert len(lines) == 11, "what applies to no model is left out"


def test_wide_terminals_show_whole_names(monkeypatch: pytest.MonkeyPatch, model_file: Path) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert all(name in table(["group", "width"], [[name, "1"] for name in NAMES]) for name in NAMES)


@pytest.mark.parametrize("room", [60, 80])
def test_what_commands_print_fits(room: int, model_file: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(room))
    for words in (["inspect", model_file], ["evaluate", model_file, model_file, "--data", data_file, "--no-latency"]):
        lines = invoke(*words).stdout.splitlines()
        assert max(len(line) for line in lines if "  " in line) <= room


# ---- -q, -v, help, version -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [True, False])
def test_quiet_prints_only_errors(before: bool, model_file: Path, tmp_path: Path) -> None:
    def quiet(*words: object) -> Any:
        return invoke("-q", *words) if before else invoke(*words, "--quiet")

    out = tmp_path / "out.onnx"
    done = quiet("prune", model_file, "-o", out, "--ratio", "0.5")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "") and out.exists()
    assert quiet("inspect", model_file, "--json").stdout.startswith("{")
    failed = quiet("inspect", tmp_path / "missing.onnx")
    assert failed.exit_code == 4 and failed.stderr.startswith("Error: ")


def test_verbose_behind_the_command(model_file: Path, tmp_path: Path) -> None:
    said = [invoke("prune", model_file, "-o", tmp_path / "out.onnx", "--target", "macs=60%", *more).stderr for more in ([], ["-v"])]
    assert "allocation:" in said[1] and "allocation:" not in said[0]


def test_help_and_version() -> None:
    assert invoke("help").stdout == invoke("--help").stdout
    for name in main.texts:
        shown = invoke("help", name)
        assert shown.exit_code == 0 and f" {name} " in f"{shown.stdout.splitlines()[0]} "
    assert invoke("help", "nothing").exit_code == 2
    assert invoke("version").stdout == invoke("--version").stdout


# ---- what to type next -----------------------------------------------------------------------------------------------


def following(*words: object) -> list[str]:
    """The words of the Next: line of a command, behind the program's name."""
    done = invoke(*words)
    assert done.exit_code == 0, done.stderr
    return shlex.split(done.stderr.split("Next: sfp-onnx ")[1].splitlines()[0])


def holds(words: list[str], *parts: object) -> bool:
    """Whether the words hold the parts behind one another."""
    wanted = [str(part) for part in parts]
    return any(words[start : start + len(wanted)] == wanted for start in range(len(words)))


def test_next_lines_repeat_what_was_typed(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each can be run as it stands, with data put in where there were none."""
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "raw data.npz", x=(images(16) * 255).astype(np.uint8), labels=labels_of(16))
    data, reading = ["--data", "raw data.npz"], ["--scale", "255", "--mean", "0.5,0.25,0.5"]
    known = {"FOLDER_OR_NPZ": "raw data.npz", "TEST_DATA": "raw data.npz"}

    def run(words: list[str]) -> list[str]:
        return following(*(known.get(word, word) for word in words))

    inspected = following("inspect", model_file, "--input-shape", "x=2,3,8,8")
    assert holds(inspected, "--input-shape", "x=2,3,8,8") and "--align" not in inspected
    pruned = run([*inspected, *reading])
    assert all(holds(pruned, *reading[at : at + 2]) for at in (0, 2)) and holds(pruned, "--data", "TEST_DATA")
    assert invoke(*(known.get(word, word) for word in pruned), "--no-latency").exit_code == 0
    scored = following("score", model_file, *data, *reading, "--score", "magnitude,p=1")
    assert holds(scored, *data) and holds(scored, "--score", "magnitude,p=1") and run(scored)[0] == "evaluate"
    planned = following("plan", model_file, "-o", "plan.json", "--ratio", "0.5", *data, *reading, "--samples", "8")
    assert holds(planned, "apply", model_file, "plan.json") and holds(planned, "--samples", "8")
    assert holds(run(planned), "--data", "TEST_DATA") and not holds(run(planned), "--samples", "8")
    diluted = following("dilute", model_file, "-o", "d.onnx", "--rate", "0.5", *data, *reading)
    assert holds(diluted, "evaluate", model_file, "d.onnx") and holds(diluted, *reading[:2])
    targets = "--targets", "macs=80%:60%:20%", "--test-data", "raw data.npz", "--min-channels", "2"
    swept = following("sweep", model_file, *targets, *data, *reading)
    assert holds(swept, *data) and holds(swept, "--min-channels", "2") and holds(swept, "--target", "macs=60%")
    assert invoke(*swept).exit_code == 0
    timed = following("profile", model_file, "-o", "cpu.json", "--threads", "1", "--batch", "2")
    assert holds(timed, "--threads", "1") and holds(timed, "--batch", "2") and holds(timed, "--device-profile", "cpu.json")


# ---- silent runs -----------------------------------------------------------------------------------------------------


def test_long_runs_say_how_far_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal: the stage, and how much of it is done."""
    said: list[str] = []
    heard = threading.Event()

    def echo(text: str, **more: Any) -> None:
        said.append(text)
        heard.set()

    monkeypatch.setattr(common, "EVERY", 0.001)
    monkeypatch.setattr(click, "echo", echo)

    def work() -> None:
        with common.bar("timing layers", 4) as advance:
            advance(1)
            said.clear()
            heard.clear()
            assert heard.wait(20)

    common.Command("work", callback=work).main([], standalone_mode=False)
    assert any(text.startswith("working for ") and text.endswith("s: timing layers, 25%") for text in said)
    count = len(said)
    assert len(said) == count and threading.active_count() == 1, "nobody speaks after the end"


def test_images_are_no_part_of_a_line(save: Callable[..., Path]) -> None:
    path = save(classifier())
    assert str(list(IMAGE))[1:-1] in repr(sfp_onnx.load(path))
