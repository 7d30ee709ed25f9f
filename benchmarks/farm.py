"""Work that is shared out: ``python benchmarks/farm.py library MODEL DATA``.

Prints a Markdown table. ``library``: seconds of a plan that measures and keeps a library, and of plans for further targets from it, each
in a process of its own (start of Python included), with processor seconds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
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


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["library"])
    parser.add_argument("model")
    parser.add_argument("data")
    arguments, options = parser.parse_known_args()
    print("| plan | wall s | processor s | bytes of the library |\n|---|---:|---:|---:|")
    for row in of_library(arguments.model, arguments.data, options):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
