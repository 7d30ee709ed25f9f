"""The closing sentence of a run, the model card, and what a written model says of where it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner
from conftest import classifier, invoke

import sfp_onnx
from sfp_onnx.cli import main
from sfp_onnx.report.verdict import Judged, concluded

OLD = {"macs": 1000, "bytes": 4000}


@pytest.mark.parametrize(
    ("after", "ratio", "worth", "text", "good"),
    [
        ({"macs": 400, "bytes": 2000}, 1 / 1.6, Judged("top-1", 0.956, 0.939, 1040),
         "1.6x faster, half the size, 1.7 points less right (95.6 -> 93.9 % on 1040 samples)", None),
        ({"macs": 400, "bytes": 1000}, 0.9, Judged("top-1", 0.9, 0.9, 10),
         "11% faster, a quarter of the size, as right as before (90.0 -> 90.0 % on 10 samples)", True),
        ({"macs": 400, "bytes": 3000}, 1.3, Judged("top-1", 0.9, 0.95, 10),
         "1.3x slower, 75% of the size, 5.0 points more right (90.0 -> 95.0 % on 10 samples)", False),
        ({"macs": 400, "bytes": 2000}, 1.0, Judged("top-1", 0.9, 0.5, 10),
         "as fast as before, half the size, 40.0 points less right (90.0 -> 50.0 % on 10 samples)", False),
        ({"macs": 250, "bytes": 4000}, None, None, "a quarter of the multiplications, the same size; time and accuracy not measured", None),
        ({"macs": 1000, "bytes": 1300}, 0.8, None, "1.2x faster, a third of the size; accuracy not measured", None),
        ({"macs": 400, "bytes": 2000}, 0.5, Judged("mean IoU", 0.8, 0.76, 20),
         "2.0x faster, half the size, 4.0 points less mean IoU (80.0 -> 76.0 % on 20 samples)", None),
        ({"macs": 400, "bytes": 2000}, 0.5, Judged("own:metric", 8, 7.5, 20, percent=False),
         "2.0x faster, half the size, own:metric 8 -> 7.5 on 20 samples", None),
    ],
)  # fmt: skip
def test_the_sentence(after: dict[str, int], ratio: float | None, worth: Judged | None, text: str, good: bool | None) -> None:
    said = concluded(OLD, after, ratio, worth)
    assert (said.text, said.good) == (text, good)


def test_against_the_original_alone() -> None:
    worth = Judged("agreement", 1.0, 0.97, 50, to_original=True)
    assert "the same answer as the original: 97.0 % on 50 samples" in concluded(OLD, OLD, 0.5, worth).text


def test_commands_close_with_it(model_file: Path, data_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    words = ["prune", model_file, "-o", out, "--ratio", "0.5"]
    assert invoke(*words).stdout.splitlines()[-1].endswith("; time and accuracy not measured.")
    measured = invoke(*words, "--test-data", data_file).stdout.splitlines()[-1]
    assert " samples" in measured and "not measured" not in measured
    compared = invoke("evaluate", model_file, out, "--data", data_file, "--no-latency").stdout.splitlines()[-1]
    assert compared.startswith(f"{out} against {model_file}: ") and compared.endswith("; time not measured.")
    assert " against " not in invoke("evaluate", model_file, "--data", data_file, "--no-latency").stdout


@pytest.mark.parametrize(("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colour_is_for_terminals_that_want_it(environment: dict[str, str], coloured: bool, model_file: Path, tmp_path: Path) -> None:
    words = ["prune", str(model_file), "-o", str(tmp_path / "out.onnx"), "--ratio", "0.5"]
    settled = {"NO_COLOR": None, "TERM": "xterm", **environment}
    assert ("\x1b[" in CliRunner().invoke(main, words, env=settled, color=True).output) is coloured
    assert "\x1b[" not in CliRunner().invoke(main, words, env=settled).output  # no terminal


def test_report_manifest_and_summary_say_the_same(model_file: Path, data_file: Path, tmp_path: Path) -> None:
    output = sfp_onnx.OutputOptions(path=tmp_path / "out.onnx", report=tmp_path / "r.html", card=tmp_path / "card.md")
    result = sfp_onnx.prune(model_file, sfp_onnx.PlanOptions(ratio=0.5), data=str(data_file), output=output)
    verdict = result.manifest["verdict"]
    assert verdict.endswith("; time and accuracy not measured")
    assert verdict in (tmp_path / "card.md").read_text() and verdict in repr(result)
    assert f'<p class="verdict ">{verdict[0].upper()}{verdict[1:]}.</p>' in (tmp_path / "r.html").read_text()


def test_card(model_file: Path, data_file: Path, tmp_path: Path) -> None:
    """What, verdict, figures, data, how, limits; the same run gives the same card but for measured times."""
    card, out = tmp_path / "card.md", tmp_path / "out.onnx"
    words = ["prune", model_file, "-o", out, "--ratio", "0.5", "--data", data_file, "--card", card]
    assert invoke(*words).exit_code == 0
    text = card.read_text()
    for part in ("# out.onnx", "| MACs per sample |", "## Data", "## How it was made", "## Limits", "not measured"):
        assert part in text
    for path in (model_file, data_file, out):
        assert hashlib.sha256(path.read_bytes()).hexdigest() in text
    assert invoke(*words).exit_code == 0 and card.read_text() == text
    assert invoke(*words[:-1], model_file).exit_code == 4, "the model is not written over"
    assert invoke(*words, "--test-data", data_file).exit_code == 0 and "| agreement |" in card.read_text()


# ---- provenance ------------------------------------------------------------------------------------------------------


def props(path: Path) -> dict[str, str]:
    return {item.key: item.value for item in onnx.load(path).metadata_props}


def test_a_written_model_says_what_made_it(model_file: Path, data_file: Path, tmp_path: Path) -> None:
    """The same from the command line, from Python and from plan and apply; and of what a file was made that is pruned again."""
    sha256 = hashlib.sha256(model_file.read_bytes()).hexdigest()
    paths = [tmp_path / f"{name}.onnx" for name in ("cli", "python", "applied", "again")]
    chosen = ["--ratio", "0.5", "--data", data_file]
    assert invoke("prune", model_file, "-o", paths[0], *chosen).exit_code == 0
    sfp_onnx.prune(model_file, sfp_onnx.PlanOptions(ratio=0.5), data=str(data_file)).save(paths[1])
    assert invoke("plan", model_file, "-o", tmp_path / "plan.json", *chosen).exit_code == 0
    assert invoke("apply", model_file, tmp_path / "plan.json", "-o", paths[2], "--data", data_file).exit_code == 0
    assert len({path.read_bytes() for path in paths[:3]}) == 1
    assert props(paths[0]) == {"sfp_onnx.version": sfp_onnx.__version__, "sfp_onnx.source_sha256": sha256}
    assert invoke("prune", paths[0], "-o", paths[3], "--ratio", "0.5").exit_code == 0
    again = props(paths[3])
    assert again["sfp_onnx.source_sha256"] == hashlib.sha256(paths[0].read_bytes()).hexdigest()
    assert again["sfp_onnx.first_source_sha256"] == sha256


@pytest.mark.parametrize("form", [["--fp16"], ["--quantize", "int8"]])
def test_other_forms_keep_it(form: list[str], save: Callable[..., Path], data_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    assert invoke("prune", save(classifier(widths=(64, 96))), "-o", out, "--ratio", "0.5", "--data", data_file, *form).exit_code == 0
    assert "sfp_onnx.source_sha256" in props(out)


def test_diluted_models_say_it_too(model_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    assert invoke("dilute", model_file, "-o", out, "--rate", "0.5").exit_code == 0 and "sfp_onnx.version" in props(out)
