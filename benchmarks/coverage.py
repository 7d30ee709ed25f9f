"""What can be cut in every model of a folder, and whether it is exact: ``python benchmarks/coverage.py FOLDER [--ratio 0.5]``.

Prints a Markdown table: prunable share of all channels, MACs and parameters cut when that fraction of every prunable group is
removed, largest relative difference to the masked original (random input), and seconds for everything (load, analyse, score,
plan, cut, verify). Where nothing can be cut: the reason.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import sfp_onnx


def row(path: Path, ratio: float, expand: str) -> list[str]:
    """One line of the table."""
    start = time.perf_counter()
    try:
        analysis = sfp_onnx.inspect(path, expand=expand)
        share = analysis.coupling.channels_prunable / max(1, analysis.coupling.channels_total)
        result = sfp_onnx.prune(analysis, sfp_onnx.PlanOptions(ratio=ratio))
        before, after = result.plan.before, result.plan.after
        cut = [f"{1 - new / old:.1%}" for old, new in ((before.macs, after.macs), (before.params, after.params))]
        error = max(result.verification.errors.values()) if result.verification else float("nan")
        figures = [f"{share:.0%}", *cut, f"{error:.0e}"]
    except sfp_onnx.SfpError as failure:
        figures = [str(failure).replace("|", "/")[:200], "", "", ""]
    return [path.stem, *figures, f"{time.perf_counter() - start:.2f}"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--expand", choices=("none", "all"), default="none")
    options = parser.parse_args()
    paths = sorted(options.folder.glob("*.onnx"))
    if not paths:
        parser.error(f"{options.folder}: there are no .onnx files in it")
    print("| model | prunable channels | MACs cut | parameters cut | relative error | seconds |")
    print("|---|---|---|---|---|---|")
    for path in paths:
        print(f"| {' | '.join(row(path, options.ratio, options.expand))} |", flush=True)


if __name__ == "__main__":
    main()
