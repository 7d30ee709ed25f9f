"""Benchmarks that need files which nobody has end in a sentence that says what is missing, and how to get it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
NEED = {
    "accuracy.py": ["cuts", "EMPTY", "ROWS"], "bandits.py": ["speed", "--shared", "EMPTY"], "coverage.py": ["EMPTY"],
    "dilution.py": ["vgg", "--shared", "EMPTY"], "ideas.py": ["EMPTY"], "joint.py": ["EMPTY"], "latency.py": ["EMPTY"],
    "minilm.py": ["EMPTY", "EMPTY"], "ranking.py": ["EMPTY"], "readings.py": ["--shared", "EMPTY"],
    "reach.py": ["EMPTY"], "sfp.py": ["EMPTY", "layers"], "targets.py": ["equal", "EMPTY"],
    "solver.py": ["seeds", "EMPTY", "ROWS"], "training.py": ["--shared", "EMPTY"],
    "training_peer.py": ["1", "EMPTY"],
}  # fmt: skip
ALONE = {  # these need no such files
    "arms.py", "bandits_tabular.py", "farm.py", "files.py", "make_cifar.py", "models.py", "others.py", "scaling.py", "speed.py",
}  # fmt: skip

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the benchmarks are not part of this copy")


@pytest.mark.parametrize("name", NEED)
def test_what_is_missing_is_said(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    known = {"EMPTY": str(tmp_path / "empty"), "ROWS": str(tmp_path / "rows.txt")}
    command = [sys.executable, str(FOLDER / name), *(known.get(word, word) for word in NEED[name])]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(FOLDER.parent)})
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stderr
    assert any(words in done.stderr for words in ("there is no such file. ", "there are no .onnx files", "pip install torch"))


def test_every_benchmark_is_known() -> None:
    assert {path.name for path in FOLDER.glob("*.py")} == {*NEED, *ALONE}
