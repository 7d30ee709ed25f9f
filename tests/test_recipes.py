"""The commands of docs/recipes.md do what they say: all are run, in the order of the page, in a folder with the files that it names."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import CLASSES, IMAGE, classifier_nodes, images, invoke, model_of, run_model, weights_of

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
ELSEWHERE = "photos/"  # tests/test_images.py


def blocks(kind: str = r"\w*") -> list[str]:
    """Code blocks of the page."""
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Arguments of every call of the program, also those of CI jobs, the Makefile and the Dockerfile."""
    calls = [re.match(r"^\s*(?:- run: |- |RUN )?sfp-onnx (.*)$", line) for block in blocks() for line in block.splitlines()]
    whole = [call[1] for call in calls if call and not re.search(r"part.*json", call[1])]  # the others: test_sweeps_in_parts
    return [shlex.split(text.replace("$@", "smaller.onnx"), comments=True) for text in whole]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with model.onnx, most of whose channels nobody would miss, calibration.npz and test.npz."""
    held = weights_of(widths=(32, 64))
    held["w2"][16:], held["b2"][16:] = 0, -1

    def model() -> onnx.ModelProto:
        return model_of(classifier_nodes(), [("x", np.float32, ["N", *IMAGE])], [("logits", np.float32, ["N", CLASSES])], held)

    held["b3"] = (held["b3"] - run_model(model(), {"x": images(300)})[0].mean(0)).astype(np.float32)  # all classes are answered
    onnx.save(model(), tmp_path / "model.onnx")
    for name, seed in (("calibration", 1), ("test", 2)):
        x = images(300, seed)
        np.savez(tmp_path / f"{name}.npz", x=x, labels=run_model(model(), {"x": x})[0].argmax(1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFP_ONNX_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_every_command_works(folder: Path) -> None:
    found = commands()
    assert len(found) >= 20
    for words in found:
        if ELSEWHERE in words:
            continue
        arguments, target = (words[: words.index(">")], words[-1]) if ">" in words else (words, None)
        result = invoke(*arguments)
        assert result.exit_code == 0, (words, result.stderr)
        assert "Warning" not in result.stderr, (words, result.stderr)
        if target:
            Path(target).write_text(result.stdout)
    for name in ("smaller.onnx", "manifest.json", "gate.xml", "figures.json", "board.json", "sfp.toml", "report.html", "smaller.ort"):
        assert (folder / name).stat().st_size


def test_the_makefile(folder: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    assert invoke("plan", "model.onnx", "-o", "plan.json", "--data", "calibration.npz", "--target", "macs=60%").exit_code == 0
    (folder / "Makefile").write_text(blocks("make")[0])
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["make", "gate"], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "smaller.onnx").exists() and "passed: top-1" in done.stdout + done.stderr
    again = subprocess.run(["make", "smaller.onnx"], cwd=folder, env=environment, capture_output=True, text=True)
    assert "up to date" in again.stdout


def test_sweeps_in_parts(folder: Path) -> None:
    """The matrix, the array and the indexed job as loops: the words of each with the numbers that its system gives."""
    found = [re.search(r"sfp-onnx (sweep .* --part .*)$", block, re.MULTILINE) for block in blocks() if "--part" in block]
    texts = [call[1] for call in found if call]
    numbers = ("${{ matrix.part }}", "$SLURM_ARRAY_TASK_ID", "$part")
    filled = [[shlex.split(text.replace(name, part)) for part in "1234"] for text, name in zip(texts, numbers, strict=True)]
    assert filled[0] == filled[1] == filled[2]
    for words in filled[0]:
        result = invoke(*words)
        assert result.exit_code == 0, (words, result.stderr)
    join = next(line.split("sfp-onnx ")[1] for block in blocks() for line in block.splitlines() if "sweep --join" in line)
    result = invoke(*shlex.split(join.replace("part*.json", " ".join(file.name for file in folder.glob("part*.json")))))
    assert result.exit_code == 0 and result.stdout.count("macs=") == 8, result.stderr
    assert (folder / "sweep.json").stat().st_size
