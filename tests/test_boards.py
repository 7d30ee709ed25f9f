"""Timing on boards: an OpenSSH server on the loopback address that the tests start, and an adb that is none."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import invoke

from sfp_onnx.core.errors import BoardError, OptionError
from sfp_onnx.latency import Block, measure, profiling, timing
from sfp_onnx.runtime import boards
from sfp_onnx.runtime.boards import Board

CUT = """#!/bin/sh
# Cuts the connection that it runs behind, the first {times} times; then it is Python.
echo x >> {count}
if [ "$(wc -l < {count})" -le {times} ]; then
  at=$$
  while ! grep -q '^Name:.sshd' "/proc/$at/status"; do at=$(awk '/^PPid:/ {{print $2}}' "/proc/$at/status"); done
  kill -9 "$at"
  sleep 1
fi
exec {python} "$@"
"""
ADB = """#!/bin/sh
# Stands for adb and for the device behind it, whose /data/local/tmp is a folder here.
[ "$2" = fake ] || {{ echo "adb: device '$2' not found" >&2; exit 1; }}
shift 3
exec sh -c "$(echo "$*" | sed 's#/data/local/tmp#{folder}#g')"
"""
PERF_TEST = """#!{python}
import sys, time
from pathlib import Path
import numpy as np, onnx, onnxruntime
words = sys.argv[1:]
model, repeats = Path(words[-1]), int(words[words.index("-r") + 1])
options = onnxruntime.SessionOptions()
if "-p" in words:
    options.enable_profiling, options.profile_file_prefix = True, words[words.index("-p") + 1]
session = onnxruntime.InferenceSession(str(model), options)
tensors = [onnx.load_tensor(str(path)) for path in sorted((model.parent / "test_data_set_0").glob("*.pb"))]
feeds = {{tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in tensors}}
times = []
for _ in range(repeats + 1):
    start = time.perf_counter()
    session.run(None, feeds)
    times.append(time.perf_counter() - start)
if "-p" in words:
    session.end_profiling()
print("Average inference time cost: 1 ms")
print(f"Min Latency: {{min(times)}} s")
"""


def script(path: Path, text: str, **facts: Any) -> Path:
    path.write_text(text.format(python=sys.executable, **facts))
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with an ``ssh`` that knows the host "board": a server that runs here as long as the tests do."""
    server, folder = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin"), tmp_path_factory.mktemp("board")
    if server is None or shutil.which("ssh") is None:
        pytest.skip("needs OpenSSH's server and client (Debian: openssh-server)")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    shutil.copy(folder / "user.pub", folder / "allowed")
    (folder / "known").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    lines = [
        f"Port {port}", "ListenAddress 127.0.0.1", f"HostKey {folder}/host", f"AuthorizedKeysFile {folder}/allowed", "StrictModes no",
        "PermitRootLogin yes", "UsePAM no", "PasswordAuthentication no", f"PidFile {folder}/pid",
    ]  # fmt: skip
    (folder / "sshd_config").write_text("\n".join(lines) + "\n")
    client = [
        "Host board other", "HostName 127.0.0.1", f"Port {port}", f"IdentityFile {folder}/user", "IdentitiesOnly yes",
        f"UserKnownHostsFile {folder}/known", "StrictHostKeyChecking yes",
    ]  # fmt: skip
    (folder / "config").write_text("\n".join(client) + "\n")
    script(folder / "ssh", '#!/bin/sh\nexec {client} -F {folder}/config "$@"\n', client=shutil.which("ssh"), folder=folder)
    running = subprocess.Popen([server, "-D", "-f", str(folder / "sshd_config")], stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while subprocess.run([str(folder / "ssh"), "-o", "BatchMode=yes", "board", "true"], capture_output=True).returncode:
            if time.monotonic() > until or running.poll() is not None:
                pytest.skip("the OpenSSH server does not start here")
            time.sleep(0.2)
        yield folder
    finally:
        running.terminate()
        running.wait()


@pytest.fixture(autouse=True)
def quick(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few runs, and one cache for all tests."""
    monkeypatch.setenv("SFP_ONNX_CACHE", str(tmp_path_factory.getbasetemp() / "board-cache"))
    for module, name, value in ((profiling, "SECONDS_EASY", 0.2), (timing, "TIMING_SECONDS", 0.05), (timing, "REPEATS", 5)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(measure, "MOST_RUNS", 10)
    monkeypatch.setattr(profiling, "TOGETHER", 15)


@pytest.fixture
def board(served: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options that name the board."""
    monkeypatch.setenv("PATH", f"{served}:{os.environ['PATH']}")
    return ["--host", "board", "--board-python", sys.executable, "--threads", "1"]


# ---- over ssh --------------------------------------------------------------------------------------------------------


def test_the_loop_is_closed_on_the_board(board: list[str], model_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before, left = model_file.read_bytes(), set(Path("/tmp").glob("sfp_onnx.*"))
    result = invoke("profile", model_file, *board, "-o", tmp_path / "board.json")
    assert result.exit_code == 0 and "board: " in result.stdout, result.stderr
    profile = json.loads((tmp_path / "board.json").read_text())
    assert profile["device"]["host"] == "board" and profile["device"]["threads"] == 1 and profile["seconds"] > 0
    more = ["--target", "latency=99%", "--device-profile", tmp_path / "board.json", "--manifest", tmp_path / "m.json"]
    result = invoke("prune", model_file, "-o", tmp_path / "small.onnx", *more, *board)
    assert result.exit_code == 0, result.stderr
    options = json.loads((tmp_path / "m.json").read_text())["options"]
    assert options["host"] == "board"
    assert model_file.read_bytes() == before and set(Path("/tmp").glob("sfp_onnx.*")) == left


def test_several_boards_have_a_profile_each(board: list[str], model_file: Path, tmp_path: Path) -> None:
    result = invoke("profile", model_file, *board, "--host", "other", "-o", tmp_path / "farm.json")
    assert result.exit_code == 0, result.stderr
    found = {file.name: json.loads(file.read_text())["device"]["host"] for file in tmp_path.glob("farm*.json")}
    assert found == {"farm-board.json": "board", "farm-other.json": "other"}


def test_a_connection_that_is_cut_is_tried_again(
    board: list[str], model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And if that is cut as well, nothing is written."""
    boards.device_of.cache_clear()
    for times, code in ((1, 0), (9, 4)):
        python = script(tmp_path / f"cut{times}", CUT, count=tmp_path / f"count{times}", times=times)
        before, out = model_file.read_bytes(), tmp_path / f"out{times}.json"
        words = ["--host", "board", "--board-python", python, "--threads", "1", "--fresh"]
        result = invoke("profile", model_file, *words, "-o", out)
        assert result.exit_code == code, result.stderr
        assert "the connection failed or was lost" in result.stderr and "trying once more" in result.stderr
        assert out.exists() == (code == 0) and model_file.read_bytes() == before
    assert "twice. Nothing was written. Does `ssh board true` work" in result.stderr


@pytest.mark.parametrize(
    ("python", "words"),
    [
        ("#!/bin/sh\nexec {python} -S -E \"$@\"\n", "-m pip install onnxruntime"),
        ("#!/bin/sh\nexit 3\n", "exit code 3"),
        ("#!/bin/sh\necho hello\n", "gave no answer, but: hello"),
        (None, "Install Python and onnxruntime there"),
        ("#!/nowhere/python\n", "Install Python and onnxruntime there"),
        ("\x7fELF\x02", "built for another architecture"),
    ],
)
def test_what_is_wrong_with_a_board_is_said(python: str | None, words: str, board: list[str], tmp_path: Path) -> None:
    place = tmp_path / "nowhere" if python is None else script(tmp_path / "python", python)
    with pytest.raises(BoardError, match="board: ") as caught:
        boards.device_of(Board("board", python=str(place)), 1, "cpu")
    assert words in str(caught.value)


def test_providers_models_and_time(board: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BoardError, match=r"has no provider 'tpu'\. Available: .*cpu"):
        boards.device_of(Board("board", python=sys.executable), 1, "tpu")
    monkeypatch.setattr(boards, "GRACE", 2)
    with pytest.raises(BoardError, match="no answer within 2 s"):
        boards.device_of(Board("board", python=str(script(tmp_path / "python", "#!/bin/sh\nsleep 30\n"))), 1, "cpu")


def test_a_host_that_is_not_there(board: list[str], model_file: Path, tmp_path: Path) -> None:
    result = invoke("profile", model_file, "--host", "nowhere.invalid", "-o", tmp_path / "p.json")
    assert result.exit_code == 4 and "Does `ssh nowhere.invalid true` work" in result.stderr and not (tmp_path / "p.json").exists()


@pytest.mark.parametrize("host", ["-oProxyCommand=touch x", "a b", ""])
def test_hosts_are_names(host: str) -> None:
    with pytest.raises(OptionError, match="expected --host user@board"):
        Board(host)
    with pytest.raises(OptionError):
        Board("board", "serial")


# ---- over adb --------------------------------------------------------------------------------------------------------


@pytest.fixture
def adb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a device, "fake"."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "device").mkdir()
    script(tmp_path / "bin" / "adb", ADB, folder=tmp_path / "device")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path / "device"


@pytest.mark.parametrize("program", [False, True])
def test_an_android_device(program: bool, adb: Path, model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "FITTED", 3)
    monkeypatch.setattr(profiling, "CHECKED", 0)
    monkeypatch.setattr(measure, "block", lambda setup: Block(8, 1.0, {"64": 1.0}))
    monkeypatch.setattr(boards, "GRACE", 600)
    way = ["--perf-test", script(tmp_path / "perf_test", PERF_TEST)] if program else ["--board-python", sys.executable]
    result = invoke("profile", model_file, "--adb", "fake", *way, "--threads", "1", "-o", tmp_path / "board.json")
    assert result.exit_code == 0, result.stderr
    profile = json.loads((tmp_path / "board.json").read_text())
    assert profile["device"]["host"] == "adb fake" and profile["seconds"] > 0
    assert profile["constant"] + sum(map(sum, profile["nodes"].values())) > 0  # kernels this short may cost the same at all widths
    assert not list(adb.iterdir())


def test_devices_and_programs_that_are_not_there(adb: Path, model_file: Path, tmp_path: Path) -> None:
    def refused(words: str, *more: Any) -> None:
        result = invoke("profile", model_file, *more, "-o", tmp_path / "p.json")
        assert result.exit_code in (2, 4) and words in result.stderr, result.stderr

    refused("`adb devices` must list it", "--adb", "other")
    refused("no such file. Expected onnxruntime_perf_test", "--adb", "fake", "--perf-test", tmp_path / "none")
    refused("built for another architecture", "--adb", "fake", "--perf-test", script(tmp_path / "elf", "\x7fELF\x02"))
    refused("told no times", "--adb", "fake", "--perf-test", script(tmp_path / "silent", "#!/bin/sh\necho hello\n"))
