"""Work that is shared out: ``python benchmarks/farm.py library MODEL DATA`` or ``python benchmarks/farm.py sweep MODEL DATA``.

Prints a Markdown table; further options are those of the command. ``library``: seconds of a plan that measures and keeps a library, and of
plans for further targets from it, each in a process of its own (start of Python included), with processor seconds. ``sweep``: `POINTS`
targets with one thread each, in one process, in two, in two of which one is killed, on a Dask cluster of two (where `distributed` is
installed), and in three parts that are joined: seconds, and whether the models are those of the first to the byte.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path


def timed(words: Sequence[str]) -> tuple[float, float]:
    """Wall and processor seconds of a command."""
    start, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, "-m", "sfp_onnx", *words, "-q"], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - start, spent


def of_library(model: str, data: str, options: Sequence[str]) -> list[list[str]]:
    """Rows of the table: what was run, wall and processor seconds, bytes of the library."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        kept, plan = str(Path(folder, "kept.npz")), str(Path(folder, "plan.json"))
        runs = {"macs=50%, measured and kept": ["--data", data, *options, "--target", "macs=50%", "--save-library", kept]}
        for target in ("macs=30%", "params=40%", "size=60%"):
            runs[f"{target}, from the library"] = ["--library", kept, "--target", target]
        for name, words in runs.items():
            wall, spent = timed(["plan", model, "-o", plan, *words])
            rows.append([name, f"{wall:.1f}", f"{spent:.1f}", f"{Path(kept).stat().st_size:,}"])
    return rows


POINTS = "macs=85%:30%:5%"
PATIENCE = 3  # seconds after the first point until a worker is killed


def hashes(folder: Path) -> dict[str, str]:
    """Of all models in a folder."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.onnx"))}


def killed(words: Sequence[str], folder: Path) -> None:
    """Run a sweep, and kill the youngest of its workers in the middle."""
    run = subprocess.Popen([sys.executable, "-m", "sfp_onnx", *words, "-q"], stdout=subprocess.DEVNULL)
    workers: list[int] = []
    while run.poll() is None and len(workers) < 2:
        time.sleep(0.2)
        found = subprocess.run(["pgrep", "-P", str(run.pid), "-f", "spawn_main"], capture_output=True, text=True).stdout
        workers = [int(line) for line in found.split()]
    time.sleep(PATIENCE)
    if run.poll() is None:
        os.kill(workers[-1], signal.SIGKILL)
    if run.wait():
        sys.exit(f"{folder}: the sweep did not survive")


def of_sweep(model: str, data: str, options: Sequence[str]) -> list[list[str]]:
    """Rows of the table: how, wall seconds, and whether the models are the same."""
    rows, first = list[list[str]](), dict[str, str]()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        base = ["sweep", model, "--data", data, "--targets", POINTS, "--threads", "1", *options]

        def row(how: str, folder: Path, start: float) -> None:
            found = hashes(folder)
            first.update(found if not first else {})
            same = "yes" if found == first else "NO"
            rows.append([how, f"{time.perf_counter() - start:.1f}", f"{len(found)}", same])

        for how, more in {"one process": [], "two processes": ["--workers", "2"]}.items():
            start = time.perf_counter()
            timed([*base, "--save-dir", str(root / how), *more])
            row(how, root / how, start)
        start = time.perf_counter()
        killed([*base, "--save-dir", str(root / "killed"), "--workers", "2"], root / "killed")
        row("two processes, one killed", root / "killed", start)
        parts = [str(root / f"part{number}.json") for number in (1, 2, 3)]
        start = time.perf_counter()
        for number, part in enumerate(parts, 1):
            timed([*base, "--save-dir", str(root / "parts"), "--part", f"{number}/3", "-o", part])
        timed(["sweep", "--join", *parts, "-o", str(root / "whole.json")])
        row("three parts, joined", root / "parts", start)
        try:
            import distributed
        except ImportError:
            return rows
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
                start = time.perf_counter()
                timed([*base, "--save-dir", str(root / "dask"), "--dask", cluster.scheduler_address])
                row("Dask, two workers", root / "dask", start)
    return rows


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["library", "sweep"])
    parser.add_argument("model")
    parser.add_argument("data")
    arguments, options = parser.parse_known_args()
    shares = arguments.what == "sweep"
    print("| how | wall s | models | the same bytes |" if shares else "| plan | wall s | processor s | bytes of the library |")
    print("|---|---:|---:|---:|")
    for row in (of_sweep if shares else of_library)(arguments.model, arguments.data, options):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
