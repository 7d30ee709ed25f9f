"""Boards: other machines on which models are timed, over the OpenSSH client or adb. Nothing stays there.

A board needs Python with onnxruntime; or, where it has no Python, the program onnxruntime_perf_test, which is sent along.
"""

from __future__ import annotations

import io
import json
import re
import secrets
import shlex
import shutil
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import BoardError, OptionError
from ..core.system import log
from ..core.types import Array
from ..graph import Model, filled, seeded, serialized
from ..graph.save import PROTOBUF_LIMIT, full_size
from . import on_board

CONNECT, SILENT, GRACE = 10, 15, 120  # seconds: to connect, until a silent connection counts as lost, for start and transfer
LOST = 255  # exit code of ssh where the connection is
ONCE = 3  # runs of onnxruntime_perf_test to see how long one takes


@dataclass(frozen=True)
class Job:
    """How models are timed, interleaved: run ``warm`` times, then as often as fits into ``seconds`` by the clock that times, within ``low``
    to ``high``; less often, but at least ``least`` times, where ``wall`` seconds of wall time do not suffice. ``events``: and so their
    kernels."""

    seconds: float
    low: int
    high: int
    warm: int = 2
    wall: float | None = None
    least: int = 1
    events: bool = False


@dataclass(frozen=True)
class Timed:
    """What models took: seconds of every run of each, seconds of every run of their kernels by name, and how often those were run."""

    seconds: Sequence[Sequence[float]]
    kernels: Sequence[Mapping[str, Sequence[float]]]
    runs: int
    about: Mapping[str, Any]


@dataclass(frozen=True)
class Board:
    """A machine that models are timed on: a ``host`` as ssh names it, or the serial number of an Android device (``adb``); its ``python``;
    ``perf_test``: the program onnxruntime_perf_test for it, which takes the place of Python."""

    host: str | None = None
    adb: str | None = None
    python: str = "python3"
    perf_test: str | None = None

    def __post_init__(self) -> None:
        """Refuse what is no name of a machine, and a program that is not there."""
        name = self.host or self.adb or ""
        if (self.host is None) == (self.adb is None) or not re.fullmatch(r"[A-Za-z0-9_.@:%\[\]][A-Za-z0-9_.@:%\[\]-]*", name):
            raise OptionError(f"'{name}': expected --host user@board, or --adb SERIAL (`adb devices` lists them)")
        if self.perf_test is not None and not Path(self.perf_test).is_file():
            raise OptionError(f"--perf-test {self.perf_test}: no such file. Expected onnxruntime_perf_test, built for the board")

    @staticmethod
    def of(options: Mapping[str, Any]) -> Board | None:
        """As options say; None: this machine."""
        host, serial = options.get("host"), options.get("adb")
        if host is None and serial is None:
            return None
        return Board(host, serial, options.get("board_python") or "python3", options.get("perf_test"))

    @property
    def name(self) -> str:
        """For people."""
        return self.host or f"adb {self.adb}"

    def time(self, models: Sequence[Model], feeds: Sequence[Mapping[str, Array]], threads: int, provider: str, job: Job) -> Timed:
        """Time models there, each on inputs of its own.

        Raises:
            BoardError: no connection, no onnxruntime, another architecture, a model that it cannot run, or no answer in time; what to do.
        """
        if self.perf_test is not None:
            return _by_program(self, self.perf_test, models, feeds, threads, provider, job)
        told = {**vars(job), "threads": threads, "provider": provider, "models": len(models)}
        files = {"on_board.py": Path(on_board.__file__).read_bytes()}
        files |= {f"{at}.onnx": _stored(model) for at, model in enumerate(models)}
        place = {id(own): at for at, own in reversed(list(enumerate(feeds)))}
        files |= {f"{at}.npz": _packed(feeds[at]) for at in sorted(set(place.values()))}
        files["job.json"] = json.dumps({**told, "feeds": [place[id(own)] for own in feeds]}).encode()
        said = self.run(files, f"{shlex.quote(self.python)} on_board.py", GRACE + 20 * job.seconds + 2 * (job.wall or 0.0))
        line = next((line for line in said.splitlines() if line.startswith(on_board.MARK)), None)
        if line is None:
            raise BoardError(f"{self.name}: its {self.python} gave no answer, but: {said[-300:].strip() or 'nothing'}")
        found = json.loads(line.removeprefix(on_board.MARK))
        self._check(found, provider)
        about = {name: found[name] for name in ("cpu", "onnxruntime", "provider")}
        return Timed(found["seconds"], found["kernels"], found["runs"], about)

    def _check(self, found: Mapping[str, Any], provider: str) -> None:
        if "missing" in found:
            what, python, machine = found["missing"], found["python"], found["machine"]
            raise BoardError(
                f"{self.name}: its Python {python} ({machine}) has no {what}. There: `{self.python} -m pip install onnxruntime` (for "
                "x86_64 and aarch64), or name another Python with --board-python; without one, --perf-test PATH sends onnxruntime_perf_test"
            )
        if found["provider"] is None:
            have = ", ".join(found["providers"])
            raise BoardError(f"{self.name}: its onnxruntime {found['onnxruntime']} has no provider '{provider}'. Available: {have}")
        if "failure" in found:
            raise BoardError(f"{self.name}: its onnxruntime {found['onnxruntime']} cannot run the model: {found['failure'][:600]}")

    def run(self, files: Mapping[str, bytes], command: str, limit: float) -> str:
        """What a command says in a new folder with these files there, which is removed afterwards. A connection that was lost is tried
        once more.

        Raises:
            BoardError: it failed, or took longer than ``limit`` seconds.
        """
        try:
            return self._once(files, command, limit)
        except _LostError as lost:
            log.info(f"{lost}: trying once more")
        try:
            return self._once(files, command, limit)
        except _LostError as lost:
            who = self.host or ""
            raise BoardError(
                f"{lost}, twice. Nothing was written. Does `ssh {who} true` work here without a question (a key, and a known host)? "
                "Then run the same command again"
            ) from lost

    def _once(self, files: Mapping[str, bytes], command: str, limit: float) -> str:
        packed, folder = _tar(files), f"sfp_onnx.{secrets.token_hex(6)}"
        if self.host is not None:
            made = f'd="${{TMPDIR:-/tmp}}/{folder}"; mkdir "$d" || exit 73; trap \'rm -rf "$d"\' EXIT; trap "exit 75" HUP INT TERM PIPE'
            inner = f'{made}; cd "$d" && tar xf - && {command}'
            kept = ["-o", f"ServerAliveInterval={SILENT // 3}", "-o", "ServerAliveCountMax=3", "-o", f"ConnectTimeout={CONNECT}"]
            words = [_client("ssh", "openssh-client"), "-o", "BatchMode=yes", *kept, "--", self.host, f"sh -c {shlex.quote(inner)}"]
            return self._said(words, packed, command, limit)
        base, place = [_client("adb", "adb (Android platform tools)"), "-s", str(self.adb)], f"/data/local/tmp/{folder}"
        self._said([*base, "shell", f"mkdir {place} && cat > {place}/all.tar"], packed, "", GRACE)
        try:
            return self._said([*base, "shell", f"cd {place} && tar xf all.tar && {command}"], b"", command, limit)
        finally:
            with suppress(BoardError, _LostError):
                self._said([*base, "shell", f"rm -rf {place}"], b"", "", GRACE)

    def _said(self, words: Sequence[str], given: bytes, command: str, limit: float) -> str:
        try:
            done = subprocess.run(words, input=given, capture_output=True, timeout=limit)
        except subprocess.TimeoutExpired as error:
            advice = "Is it busy, or asleep? --profile-budget SECONDS times fewer widths"
            raise BoardError(f"{self.name}: no answer within {limit:.0f} s. {advice}") from error
        told = done.stderr.decode(errors="replace").strip()
        last = told.splitlines()[-1][:300] if told else "no words"
        if done.returncode == 0:
            return done.stdout.decode(errors="replace")
        if self.host is not None and done.returncode == LOST:
            raise _LostError(f"{self.name}: the connection failed or was lost ({last})")
        if self.adb is not None and re.search(r"device .*(not found|offline|unauthorized)|no devices", told):
            raise BoardError(f"{self.name}: {last}. `adb devices` must list it as a device: connect it, and allow debugging on it")
        if done.returncode == 127 or "not found" in last:
            raise BoardError(
                f"{self.name}: there is no {command.split()[0]} ({last}). Install Python and onnxruntime there (`apt install python3-pip`, "
                "`pip install onnxruntime`), name the Python with --board-python, or send onnxruntime_perf_test with --perf-test PATH"
            )
        if done.returncode == 126 or "Exec format error" in told or "not executable" in told:
            what = f"{self.name}: it cannot run {command.split()[0]} ({last})"
            raise BoardError(f"{what}: built for another architecture? Give one for the board")
        raise BoardError(f"{self.name}: it ended with exit code {done.returncode}: {last}")


class _LostError(Exception):
    """The connection was lost."""


def _client(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise OptionError(f"there is no {name} on this machine: install {package}")
    return found


@cache
def device_of(board: Board, threads: int, provider: str) -> dict[str, Any]:
    """What a measurement on a board depends on, besides the model."""
    about = board.time([], [], threads, provider, Job(0, 0, 0)).about
    known = {name: about[name] for name in ("cpu", "onnxruntime")}
    return {**known, "threads": threads, "provider": about["provider"], "host": board.name}


# ---- what is sent ----------------------------------------------------------------------------------------------------


def _stored(model: Model) -> bytes:
    """A model in one file."""
    if model.libraries:
        raise OptionError(f"{model.name}: operators of --custom-ops are not on the board; it cannot be timed there")
    if full_size(model) > PROTOBUF_LIMIT:
        raise OptionError(f"{model.name}: over 2 GB, which no model for a board may have")
    return bytes(filled(seeded(model)).SerializeToString())


def _packed(feeds: Mapping[str, Array]) -> bytes:
    stream = io.BytesIO()
    if any(array.dtype.kind not in "biuf" for array in feeds.values()):
        raise OptionError("a model with inputs of text cannot be timed on a board")
    np.savez(stream, **dict(feeds))  # type: ignore[arg-type]
    return stream.getvalue()


def _tar(files: Mapping[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in files.items():
            facts = tarfile.TarInfo(name)
            facts.size, facts.mode = len(data), 0o755
            archive.addfile(facts, io.BytesIO(data))
    return stream.getvalue()


# ---- onnxruntime_perf_test -------------------------------------------------------------------------------------------


def _by_program(
    board: Board, program: str, models: Sequence[Model], feeds: Sequence[Mapping[str, Array]], threads: int, provider: str, job: Job
) -> Timed:
    """As `Board.time`. The program has random inputs of its own for no shape but 1, so that it is given ours."""
    about = {"cpu": board.name, "onnxruntime": Path(program).name, "provider": provider}
    if not models:
        said = board.run({}, "uname -m; cat /proc/cpuinfo", GRACE)
        named = re.search(r"^(?:model name|Hardware)\s*:\s*(.+)$", said, re.MULTILINE)
        return Timed([], [], 0, {**about, "cpu": f"{named[1] if named else 'unknown'} ({said.split()[0]})"})
    files = {path.name: path.read_bytes() for path in sorted(Path(program).parent.glob("libonnxruntime*.so*")) if path.is_file()}
    files["onnxruntime_perf_test"] = Path(program).read_bytes()
    for at, (model, own) in enumerate(zip(models, feeds, strict=True)):
        files[f"{at}/model.onnx"] = _stored(model)
        files |= {f"{at}/test_data_set_0/input_{place}.pb": serialized(name, own[name]) for place, name in enumerate(own)}

    def told(repeats: int, events: bool, limit: float) -> list[str]:
        words = f"-e {provider.lower().removesuffix('executionprovider')} -x {threads} -m times -r {repeats} -s"
        more = "-p $i/events" if events else ""
        run = f"echo; echo {on_board.MARK}; LD_LIBRARY_PATH=. ./onnxruntime_perf_test {words} {more} $i/model.onnx || exit $?"
        tail = f"; echo {on_board.MARK}; cat $i/events*" if events else ""
        each = " ".join(map(str, range(len(models))))
        return board.run(files, f"(for i in {each}; do {run}{tail}; done)", limit).split(f"\n{on_board.MARK}\n")[1:]

    short = [_least(board, text) for text in told(ONCE, False, GRACE)]
    repeats = int(np.clip(job.seconds / max(sum(short), 1e-6), max(job.low, 1), job.high))
    limit = GRACE + 3 * repeats * sum(short)
    times = [_least(board, text) for text in told(repeats, False, limit)]
    parts = told(repeats, True, limit)[1::2] if job.events else []
    kernels = [on_board.kernels_in(json.loads(text)) for text in parts]
    return Timed([[seconds] for seconds in times], kernels, repeats + 1, about)


def _least(board: Board, text: str) -> float:
    """Seconds of the fastest run, in what the program says; of the mean run, where it says no more."""
    for pattern, unit in ((r"Min Latency:\s*([0-9.e+-]+)\s*s", 1.0), (r"Average inference time cost[^:]*:\s*([0-9.e+-]+)\s*ms", 1e-3)):
        if (match := re.search(pattern, text)) is not None:
            return float(match[1]) * unit
    raise BoardError(f"{board.name}: onnxruntime_perf_test told no times, but: {text[-300:].strip()}")
