"""Sweeps over several processes, parts and models: the same bytes as one thread, rows for what fails, workers that come and go."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import ctrl_c, images, invoke

import sfp_onnx
from sfp_onnx.core.errors import OptionError, TargetError, VerificationError
from sfp_onnx.core.options import PlanOptions
from sfp_onnx.core.workers import each, reason
from sfp_onnx.pipeline import swept

ONE = PlanOptions(threads=1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    np.savez(tmp_path / "calibration.npz", x=images(60))
    return tmp_path / "calibration.npz"


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.onnx"))}


def rows(points: Sequence[Any]) -> list[dict[str, Any]]:
    """Points without what is timed, and where they lie."""
    left = ("latency_ms", "latency_ratio", "front", "file", "manifest")
    return [{key: value for key, value in vars(point).items() if key not in left} for point in points]


# ---- executors -------------------------------------------------------------------------------------------------------


def spawned() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(2, get_context("spawn"))


class Elsewhere(Executor):
    """One that pickles as a cluster does, with a failure for what it cannot."""

    def submit(self, call: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        import pickle

        done: Future[Any] = Future()
        swept._BENCHES, kept = {}, swept._BENCHES
        try:
            sent, given = pickle.loads(pickle.dumps((call, arguments)))
            done.set_result(pickle.loads(pickle.dumps(sent(*given, **named))))
        except Exception as error:
            done.set_exception(error)
        finally:
            swept._BENCHES = kept
        return done


@pytest.mark.parametrize("make", [partial(ThreadPoolExecutor, 2), spawned, Elsewhere, partial(nullcontext, 2)])
def test_executors_give_the_same_bytes(make: Any, model_file: Path, data: Path, tmp_path: Path) -> None:
    asked = ["macs=80%:40%:20%", "size=0.1%:0.1%:1%"]
    alone = sfp_onnx.sweep(model_file, asked, ONE, data=data, folder=tmp_path / "a")
    with make() as executor:
        found = sfp_onnx.sweep(model_file, asked, ONE, data=data, folder=tmp_path / "b", executor=executor)
    assert len(hashes(tmp_path / "a")) == 3 and hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert rows(found.points) == rows(alone.points) and "best reachable" in found.points[-1].failure
    assert {key: found.data[key] for key in ("model", "options")} == {key: alone.data[key] for key in ("model", "options")}
    assert not swept._BENCHES


def test_workers_on_the_command_line(model_file: Path, data: Path, tmp_path: Path) -> None:
    base = ["sweep", model_file, "--data", data, "--targets", "macs=80%:60%:20%", "--save-dir"]
    for folder, more in (("a", ["--threads", "1"]), ("b", ["--workers", "2"])):
        result = invoke(*base, tmp_path / folder, *more)
        assert result.exit_code == 0, result.stderr
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b") != {}


def test_a_dask_cluster_gives_the_same_bytes(model_file: Path, data: Path, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed", reason="needs the extra dask")
    base = ["sweep", model_file, "--data", data, "--targets", "macs=80%:60%:20%", "--threads", "1", "--save-dir"]
    assert invoke(*base, tmp_path / "a").exit_code == 0
    quiet = {"dashboard_address": None, "silence_logs": 50}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own
        with distributed.LocalCluster(n_workers=2, threads_per_worker=1, **quiet) as cluster:
            result = invoke(*base, tmp_path / "b", "--dask", cluster.scheduler_address)
    assert result.exit_code == 0, result.stderr
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b") != {}


def test_a_dask_cluster_that_is_not_there_is_said(model_file: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = ["sweep", model_file, "--data", data, "--targets", "macs=80%:60%:20%"]
    assert "give one of them" in invoke(*base, "--dask", "tcp://127.0.0.1:1", "--workers", "2").stderr
    monkeypatch.setitem(sys.modules, "distributed", None)
    missing = invoke(*base, "--dask", "tcp://127.0.0.1:1")
    assert missing.exit_code == 2 and "pip install distributed" in missing.stderr

    class Unanswered:
        def __init__(self, *_: object, **named: object) -> None:
            raise OSError("timed out")

    monkeypatch.setitem(sys.modules, "distributed", SimpleNamespace(Client=Unanswered))
    refused = invoke(*base, "--dask", "tcp://127.0.0.1:1")
    assert refused.exit_code == 2 and "no scheduler answers" in refused.stderr and "Traceback" not in refused.stderr


def test_what_cannot_be_sent_is_said(model_file: Path) -> None:
    with pytest.raises(OptionError, match="Give them as paths"):
        sfp_onnx.sweep(model_file, ["macs=80%:60%:20%"], ONE, data=lambda: iter([{"x": images(60)}]), executor=2)
    with pytest.raises(OptionError, match="at least 1"):
        sfp_onnx.sweep(model_file, ["macs=80%:60%:20%"], ONE, executor=0)


def test_what_is_timed_runs_where_nothing_else_does(model_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "sfp_onnx")

    class Never(Executor):
        def submit(self, call: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
            raise AssertionError("a timed target was sent")

    with Never() as executor:
        found = sfp_onnx.sweep(model_file, ["latency=99%:98%:1%"], ONE, executor=executor)
    assert len(found.points) == 3 and "nothing disturbs the clock" in caplog.text
    assert not any("timed target was sent" in point.failure for point in found.points)


# ---- points that fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [VerificationError("it differs"), MemoryError(), ValueError("odd")])
def test_a_point_that_fails_is_a_row(error: Exception, model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = swept._point

    def broken(work: swept.Work, target: str) -> Any:
        if target == "macs=60%":
            raise error
        return point(work, target)

    monkeypatch.setattr(swept, "_point", broken)
    found = sfp_onnx.sweep(model_file, ["macs=80%:40%:20%"], ONE).points
    assert [bool(own.failure) for own in found] == [False, False, True, False] and found[2].failure == reason(error)
    monkeypatch.setattr(swept, "_point", lambda work, target: broken(work, "macs=60%"))
    with pytest.raises(TargetError, match="none of the 3 targets"):
        sfp_onnx.sweep(model_file, ["macs=80%:40%:20%"], ONE)


DYING = """
import os
import signal
import time
from pathlib import Path
from sfp_onnx.core.errors import OptionError

def dying(folder: Path, item: int) -> int:
    seen = folder / f"{item}"
    while item == 2 and not (folder / "1").exists():  # it would end the pool before 1 was begun there
        time.sleep(0.01)
    if item in (1, 2) and not (item == 1 and seen.exists()):  # 1 ends its worker the first time, 2 each time
        seen.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 3:
        raise OptionError("three")
    return item * 10
"""


@pytest.mark.parametrize("make", [spawned, partial(nullcontext, 2)])
def test_a_call_whose_worker_was_killed_is_tried_again(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dying_sweep.py").write_text(DYING)
    monkeypatch.syspath_prepend(tmp_path)
    dying = importlib.import_module("dying_sweep").dying
    told: list[int] = []
    with make() as executor:
        found = each(partial(dying, tmp_path), range(5), executor, told.append)
    assert found[:2] == [0, 10] and found[4] == 40 and sum(told) == 5
    assert "again when tried alone" in reason(found[2]) and reason(found[3]) == "three"


SCRIPT = """
import time
from functools import partial
from sfp_onnx.core.workers import each
if __name__ == "__main__":
    each(time.sleep, [300, 300], 2)
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_workers_end_with_their_parent(number: str, tmp_path: Path) -> None:
    if not Path("/proc/self/task").exists():
        pytest.skip("children are found in /proc")
    script = tmp_path / "waits.py"
    script.write_text(SCRIPT)
    path = os.pathsep.join([str(Path(sfp_onnx.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    with ctrl_c():
        parent = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60

    def workers() -> set[int]:
        listed = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        return {int(child) for child in listed if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()}

    while len(workers()) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    found = workers()
    time.sleep(1)  # for what they do first
    parent.send_signal(getattr(signal, number))
    parent.wait(60)

    def alive(child: int) -> bool:
        stat = Path(f"/proc/{child}/stat")
        return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"

    while any(map(alive, found)) and time.monotonic() < until:
        time.sleep(0.05)
    assert len(found) == 2 and not any(map(alive, found))


# ---- parts, and several models ---------------------------------------------------------------------------------------


TIMED = {"latency_ms", "latency_ratio", "front", "timing"}


def untimed(data: dict[str, Any]) -> dict[str, Any]:
    return {**data, "points": [{key: value for key, value in row.items() if key not in TIMED} for row in data["points"]]}


@pytest.fixture
def parts(model_file: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Words of a sweep of three targets, one of which cannot be reached, whose four parts are there as part1.json ..."""
    monkeypatch.chdir(tmp_path)
    targets = ["--targets", "macs=80%:40%:40%", "--targets", "size=0.1%:0.1%:1%"]
    words = ["sweep", str(model_file), "--data", str(data), *targets, "--threads", "1"]
    for number in range(1, 5):
        result = invoke(*words, "--part", f"{number}/4", "-o", f"part{number}.json")
        assert result.exit_code == 0, result.stderr
    return words


def test_parts_join_to_the_whole(parts: list[str]) -> None:
    assert invoke(*parts, "-o", "whole.json").exit_code == 0
    result = invoke("sweep", "--join", *(f"part{number}.json" for number in (3, 1, 4, 2)), "-o", "joined.json")
    assert result.exit_code == 0 and "size=0.1%: the target cannot be met" in result.stderr, result.stderr
    whole, joined = (json.loads(Path(name).read_text()) for name in ("whole.json", "joined.json"))
    assert untimed(whole) == untimed(joined) and whole.keys() == joined.keys()
    assert [row["target"] for row in joined["points"]] == ["original", "macs=80%", "macs=40%", "size=0.1%"]
    assert any(row["front"] for row in joined["points"]) and "macs=40%" in result.stdout
    assert json.loads(invoke("sweep", "--join", *sorted(map(str, Path().glob("part*"))), "--json").stdout) == joined


def test_parts_that_do_not_fit_are_refused(parts: list[str], tmp_path: Path) -> None:
    names = [f"part{number}.json" for number in range(1, 5)]

    def refused(*words: str, code: int = 4) -> str:
        result = invoke("sweep", *words, "-o", "joined.json")
        assert result.exit_code == code and not Path("joined.json").exists(), result.stderr
        return result.stderr

    assert "missing: 4; there twice: 2" in refused("--join", *names[:3], "part2.json", code=2)
    other = [*parts[:-1], "1", "--align", "8", "--part", "2/4", "-o", "other.json"]
    assert invoke(*other).exit_code == 0
    assert "they differ in options of the plan" in refused("--join", names[0], "other.json", *names[2:])
    Path("odd.json").write_text('{"part": {"part": "1"}}')
    for odd in ("odd.json", "nowhere.json", parts[1]):
        assert odd in refused("--join", odd, *names)
    assert "none of the 1 targets" in _unreached(parts)
    for wrong in ("0/4", "5/4", "x"):
        assert "such as 3/16" in refused(*parts[1:], "--part", wrong, code=2)


def _unreached(parts: list[str]) -> str:
    words = [*parts[:4], "--targets", "size=0.1%:0.1%:1%", "--part", "1/1", "-o", "none.json"]
    assert invoke(*words).exit_code == 0
    result = invoke("sweep", "--join", "none.json")
    assert result.exit_code == 3
    return result.stderr


def test_several_models(model_file: Path, tmp_path: Path) -> None:
    second, broken, out = tmp_path / "second.onnx", tmp_path / "broken.onnx", tmp_path / "all.json"
    second.write_bytes(model_file.read_bytes())
    broken.write_bytes(b"no model")
    words = ["--targets", "macs=80%:60%:20%", "--save-dir", tmp_path / "made", "-o", out]
    result = invoke("sweep", model_file, broken, second, *words)
    assert result.exit_code == 4 and "broken.onnx: not an ONNX file" in result.stderr
    sweeps = json.loads(out.read_text())["sweeps"]
    assert [len(one["points"]) for one in sweeps] == [3, 0, 3] and "not an ONNX file" in sweeps[1]["failure"]
    assert sweeps[2]["points"][1]["size"] == sweeps[0]["points"][1]["size"] and str(second) in result.stdout
    assert len(hashes(tmp_path / "made")) == 4
    for more in (["--report", tmp_path / "r.html"], ["--part", "1/2"]):
        assert "is for one model" in invoke("sweep", model_file, second, *words, *more).stderr
    assert "the same name" in invoke("sweep", model_file, tmp_path / "x" / model_file.name, *words).stderr


def test_targets_are_asked_for(model_file: Path) -> None:
    result = invoke("sweep", model_file)
    assert result.exit_code == 2 and "needs --targets" in result.stderr
