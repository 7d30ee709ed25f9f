"""Damaged models and data by the thousand: each must end in a clear error or a correct result, never in a traceback, a hang, exhausted
memory or a crash of the interpreter.

``python tests/fuzzing.py --cases 3000`` runs the long form and counts; tests/test_faults.py a few. Cases run in worker processes with a
limit on memory, several per process; a process that dies or takes too long counts against its last case.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

HERE = Path(__file__).resolve().parent
MEMORY = 4 << 30  # bytes of address space of a worker
SECONDS = 40.0  # for one case
SLOW = 5.0  # worth a look
ALLOWED = (0, 2, 3, 4)  # exit codes: done, usage, not reached, bad input
NUMBERS = (0, -1, 1, 2, 3, 7, 127, 255, 1 << 16, 1 << 20, (1 << 31) - 1, -(1 << 31), 10**10, 10**12, (1 << 62), (1 << 63) - 1, -(1 << 63))


@dataclass(frozen=True)
class Outcome:
    """How one case ended; ``fault`` is empty if it was as it should be."""

    kind: str
    seed: int
    code: int | None
    fault: str
    text: str
    seconds: float


# ---- damage ----------------------------------------------------------------------------------------------------------


def bytes_damaged(content: bytes, draw: random.Random) -> bytes:
    """Flipped bits, overwritten or missing or repeated pieces, a missing end."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        if not data:
            break
        at = draw.randrange(len(data))
        length = min(len(data) - at, draw.choice((1, 2, 4, 16, 100)))
        how = draw.randrange(6)
        if how <= 2:
            data[at] ^= 1 << draw.randrange(8)
        elif how == 3:
            data[at : at + length] = draw.choice((bytes(length), b"\xff" * length, draw.randbytes(length)))
        elif how == 4:
            del data[at : at + length]
        else:
            data[at:at] = data[at : at + length]
    if draw.random() < 0.15:
        del data[draw.randrange(len(data) + 1) :]
    return bytes(data)


def _fields(message: Any) -> Iterator[tuple[Any, Any]]:
    """All (message, field) that are set, at any depth."""
    for field, value in message.ListFields():
        yield message, field
        if field.type == field.TYPE_MESSAGE:
            for inner in value if field.is_repeated else [value]:
                yield from _fields(inner)


def fields_damaged(content: bytes, draw: random.Random) -> bytes:
    """A parsed model with changed numbers, names, and lists of nodes, dimensions or inputs: the damage that still parses."""
    model = onnx.ModelProto.FromString(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        found = list(_fields(model))
        groups: dict[str, list[tuple[Any, Any]]] = {}
        for owner, field in found:
            groups.setdefault(f"{owner.DESCRIPTOR.name}.{field.name}", []).append((owner, field))
        owner, field = draw.choice(groups[draw.choice(sorted(groups))])
        _change(owner, field, draw)
    return model.SerializeToString()


def _change(owner: Any, field: Any, draw: random.Random) -> None:
    try:
        if field.is_repeated:
            items = getattr(owner, field.name)
            at, how = draw.randrange(len(items)), draw.randrange(4)
            if how == 0:
                del items[at]
            elif field.type == field.TYPE_MESSAGE:
                (items.add() if how == 1 else items[draw.randrange(len(items))]).CopyFrom(items[at])
            elif how == 1:
                items.append(items[at])
            else:
                items[at] = _other(items[at], field, draw, list(items))
        elif field.type == field.TYPE_MESSAGE or draw.random() < 0.2:
            owner.ClearField(field.name)
        else:
            setattr(owner, field.name, _other(getattr(owner, field.name), field, draw, []))
    except (ValueError, TypeError):
        pass  # a number too large for the field


def _other(value: Any, field: Any, draw: random.Random, known: list[Any]) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.choice((*NUMBERS, value + 1, value - 1, value * 2, -value))
    if isinstance(value, float):
        return draw.choice((0.0, -1.0, 1e30, float("nan"), float("inf")))
    if isinstance(value, bytes):
        return draw.choice((b"", value[:-1], value + b"\0" * 4, b"\xff" * len(value)))
    return draw.choice(("", "x", value + "_", "\u4e2d\n\0", "Reshape", "Conv", "Loop", *known))


# ---- cases -----------------------------------------------------------------------------------------------------------


def base_models() -> list[bytes]:
    """Small models with all operators that have a rule."""
    sys.path.insert(0, str(HERE))
    from conftest import classifier
    from graphs import sample
    from rule_cases import CASES, model_of

    found = [classifier().SerializeToString()] * 8
    found += [sample(seed).model.SerializeToString() for seed in range(20)]
    for cases in CASES.values():
        for own in cases:
            found.append(model_of(own, own.opsets()[-1]).SerializeToString())
    return found


def base_archives(folder: Path) -> list[bytes]:
    """Calibration data that fit the classifier: stored and deflated, with labels and without; and a plain array."""
    from conftest import images, labels_of

    found = []
    for number, (save, arrays) in enumerate(
        [
            (np.savez, {"x": images(20), "labels": labels_of(20)}),
            (np.savez_compressed, {"x": images(20), "labels": labels_of(20)}),
            (np.savez, {"x": images(20)}),
            (np.savez, {"x": np.asfortranarray(images(20))}),
        ]
    ):
        path = folder / f"base{number}.npz"
        save(path, **arrays)
        found.append(path.read_bytes())
    return found


def header_damaged(content: bytes, draw: random.Random) -> bytes:
    """An archive that is whole, whose array headers lie."""
    from io import BytesIO

    given, made = BytesIO(content), BytesIO()
    with zipfile.ZipFile(given) as old, zipfile.ZipFile(made, "w", draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as new:
        for name in old.namelist():
            data = old.read(name)
            if draw.random() < 0.7:
                end = 128 if draw.random() < 0.5 else 20
                data = bytes_damaged(data[:end], draw) + data[end:]
                number = str(draw.choice((10**6, 10**12, 2**62, -1, 0)))
                data = data.replace(b"20, 3", f"{number}, 3".encode()) if draw.random() < 0.5 else data
            new.writestr(name, data)
    return made.getvalue()


# ---- workers ---------------------------------------------------------------------------------------------------------


def work() -> None:
    """Read cases as JSON lines (kind, seed), run each, and print what came of it."""
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    models, archives = base_models(), base_archives(folder)
    good = folder / "good.onnx"
    good.write_bytes(models[0])
    print(json.dumps({"ready": str(folder)}), flush=True)
    for line in sys.stdin:
        kind, seed = json.loads(line)
        try:
            found = _case(kind, seed, folder, (models, archives), good)
        except MemoryError:
            found = {"code": 1, "text": "MemoryError reached the worker"}
        print(json.dumps(found), flush=True)


Bases = tuple[list[bytes], list[bytes]]


def _case(kind: str, seed: int, folder: Path, bases: Bases, good: Path, more: tuple[str, ...] = ()) -> dict[str, Any]:
    from conftest import invoke

    draw = random.Random(f"{kind} {seed}")
    out = folder / "out.onnx"
    out.unlink(missing_ok=True)
    if kind.startswith("onnx"):
        path = folder / "bad.onnx"
        damage: Callable[[bytes, random.Random], bytes] = bytes_damaged if kind == "onnx bytes" else fields_damaged
        path.write_bytes(damage(draw.choice(bases[0]), draw))
        command: list[object] = ["prune", path, "-o", out, "--ratio", "0.4"]
        command = command if draw.random() < 0.8 else ["inspect", path, "--json"]
    else:
        path = folder / "bad.npz"
        damage = bytes_damaged if kind == "npz bytes" else header_damaged
        path.write_bytes(damage(draw.choice(bases[1]), draw))
        options = draw.choice((["--ratio", "0.4", "--repair", "none"], ["--ratio", "0.4", "--score", "apoz"], ["--ratio", "0.5"]))
        command = ["prune", good, "-o", out, "--data", path, *options]
        command = command if draw.random() < 0.8 else ["evaluate", good, "--data", path, "--no-latency"]
    if more == ("apart",):
        words = [sys.executable, "-m", "sfp_onnx", *map(str, command)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
        return {"code": done.returncode, "text": done.stderr[-1500:]}
    result = invoke(*more, *command)
    text = result.stderr
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        if more:
            traceback.print_exception(result.exception)
        text += f" ESCAPED {type(result.exception).__name__}: {result.exception}"
    left = [own.name for own in folder.iterdir() if own.name.endswith(".tmp")]
    if left:
        text += f" LEFT BEHIND {left}"
    if result.exit_code and out.exists():
        text += " OUTPUT AFTER AN ERROR"
    return {"code": result.exit_code, "text": text[-1500:]}


class Worker:
    """One process that runs cases."""

    def __init__(self) -> None:
        """Start it."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE), environment.get("PYTHONPATH", "")])
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "fuzzing.py"), "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            env=environment, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(self.errors.read().decode(errors="replace")[-3000:])
        self.folder = json.loads(line)["ready"]

    def run(self, kind: str, seed: int) -> Outcome:
        """One case."""
        assert self.process.stdin is not None and self.process.stdout is not None
        start = time.monotonic()
        late = threading.Timer(SECONDS, self.process.kill)
        late.start()
        try:
            self.process.stdin.write(json.dumps([kind, seed]) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        expired = late.finished.is_set()
        late.cancel()
        seconds = time.monotonic() - start
        if not line:
            self.process.wait()
            self.errors.seek(0)
            last = self.errors.read()[-1500:].decode(errors="replace")
            how = f"no end after {SECONDS:g} s" if expired else f"the interpreter died ({self.process.returncode})"
            return Outcome(kind, seed, None, how, last, seconds)
        found = json.loads(line)
        return Outcome(kind, seed, found["code"], fault_of(found["code"], found["text"]), found["text"], seconds)

    def close(self) -> None:
        """End it and remove its files."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            assert stream is not None
            with suppress(OSError):
                stream.close()
        if self.folder:
            import shutil

            shutil.rmtree(self.folder, ignore_errors=True)


def fault_of(code: int, text: str) -> str:
    """What is wrong with an exit code and the words on standard error; empty if nothing."""
    for word in ("Traceback", "Internal error", "ESCAPED", "LEFT BEHIND", "OUTPUT AFTER"):
        if word in text:
            return word
    if code not in ALLOWED:
        return f"exit code {code}"
    return "" if code == 0 or "Error: " in text else "no message"


def apart(outcome: Outcome) -> Outcome:
    """A case that brought its process down again, as a user would run it: the command line must say something."""
    if outcome.fault.startswith("no end"):
        return outcome
    with tempfile.TemporaryDirectory() as folder:
        bases = base_models(), base_archives(Path(folder))
        good = Path(folder) / "good.onnx"
        good.write_bytes(bases[0][0])
        found = _case(outcome.kind, outcome.seed, Path(folder), bases, good, ("apart",))
    text = f"(brought its process down: {outcome.fault}) {found['text']}"
    return Outcome(outcome.kind, outcome.seed, found["code"], fault_of(found["code"], found["text"]), text, outcome.seconds)


def run(cases: Iterable[tuple[str, int]], workers: int = 1, show: Callable[[Outcome], None] = lambda own: None) -> list[Outcome]:
    """Run cases on some workers; a worker that died is replaced."""
    waiting, found, lock = iter(list(cases)), [], threading.Lock()

    def drain() -> None:
        worker = Worker()
        while True:
            with lock:
                own = next(waiting, None)
            if own is None:
                break
            outcome = worker.run(*own)
            if outcome.code is None:
                worker.close()
                worker = Worker()
                outcome = apart(outcome)
            with lock:
                found.append(outcome)
                show(outcome)
        worker.close()

    threads = [threading.Thread(target=drain) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


KINDS = ("onnx bytes", "onnx fields", "npz bytes", "npz headers")


def main() -> None:
    """The long form."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="per kind of damage")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=KINDS)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--again", nargs=2, metavar=("KIND", "SEED"), help="one case, in this process, with its traceback")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.again:
        with tempfile.TemporaryDirectory() as folder:
            models, archives = base_models(), base_archives(Path(folder))
            good = Path(folder) / "good.onnx"
            good.write_bytes(models[0])
            print(_case(given.again[0], int(given.again[1]), Path(folder), (models, archives), good, ("-v",)))
        return
    if given.worker:
        work()
        return

    def show(own: Outcome) -> None:
        if own.fault or own.seconds > SLOW:
            print(f"{'FAULT' if own.fault else 'SLOW'} {own.kind} {own.seed}: {own.fault} ({own.code}, {own.seconds:.0f} s)", flush=True)
            print(f"    {own.text.strip()[-700:]}", flush=True)

    cases = [(kind, seed) for seed in range(given.first, given.first + given.cases) for kind in given.kinds]
    start = time.monotonic()
    found = run(cases, given.workers, show)
    for kind in given.kinds:
        own = [outcome for outcome in found if outcome.kind == kind]
        codes = Counter(outcome.code for outcome in own)
        faults = sum(bool(outcome.fault) for outcome in own)
        longest = max((outcome.seconds for outcome in own), default=0.0)
        crashed = sum(outcome.text.startswith("(brought") for outcome in own)
        counted = ", ".join(f"exit {code}: {count}" for code, count in sorted(codes.items(), key=str))
        print(f"{kind}: {len(own)} cases, {faults} faults; {counted}; crashes caught: {crashed}; longest {longest:.1f} s")
    print(f"{time.monotonic() - start:.0f} s")
    sys.exit(any(outcome.fault for outcome in found))


if __name__ == "__main__":
    main()
