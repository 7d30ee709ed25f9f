"""What can be cut in every model of a folder, and whether it is exact: ``python benchmarks/coverage.py FOLDER [--ratio 0.5]``.

Prints a Markdown table: prunable share of all channels, MACs and parameters cut when that fraction of every prunable group is
removed, largest relative difference to the masked original (random input), and seconds for everything (load, analyse, score,
plan, cut, verify). Where nothing can be cut: the reason.

``--decide 70 50 35``: instead, of every model that has more to cut if something is expanded, the error that plans for these shares of the
MACs expect, and that on samples which nothing saw (after the repair, on 256 random samples), as the model stands, with all that may be
expanded, and as the plan decides.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

import sfp_onnx
from sfp_onnx.coupling.analysis import free_share
from sfp_onnx.repair import distances


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


def rows(analysis: sfp_onnx.Analysis, seed: int, count: int = 256) -> dict[str, np.ndarray]:
    """Smooth images, tokens of which few are frequent, and masks that leave all of them on."""
    random, data = np.random.default_rng(seed), dict[str, np.ndarray]()
    for name, array in analysis.prepared.feeds.items():
        shape = (count, *array.shape[1:])
        if array.dtype.kind == "f" and array.ndim == 4:
            small = random.standard_normal((*shape[:2], -(-shape[2] // 8), -(-shape[3] // 8)))
            data[name] = small.repeat(8, 2).repeat(8, 3)[:, :, : shape[2], : shape[3]] + 0.3 * random.standard_normal(shape)
        elif array.dtype.kind == "f":
            data[name] = random.standard_normal(shape)
        else:
            tokens = np.minimum(random.zipf(1.3, shape), 90)
            data[name] = np.ones(shape) if "mask" in name else np.zeros(shape) if "type" in name else tokens
        data[name] = data[name].astype(array.dtype)
    return data


def decided(path: Path, shares: list[float]) -> None:
    """The lines of one model."""
    plain, wide = (sfp_onnx.inspect(path, expand=how) for how in ("none", "all"))
    if free_share(wide) < free_share(plain) + 0.05:
        return
    data, judge = rows(plain, 0), sfp_onnx.open_data(rows(plain, 1), sfp_onnx.graph.inputs(plain.model))
    for share in shares:
        cells, words = [], ""
        for how in ("none", "all", "auto"):
            start = time.process_time()
            try:
                options = sfp_onnx.InspectOptions(expand=how)
                result = sfp_onnx.prune(path, sfp_onnx.PlanOptions(targets=(f"macs={share}%",)), data=data, inspect_options=options)
            except sfp_onnx.TargetError:
                cells.append("not met")
                continue
            left, = distances(plain, [result.model], judge).values
            cells.append(f"{left:.3f} ({time.process_time() - start:.0f} s)")
            words = next((note for note in result.plan.notes if "xpanded" in note), words)
        print(f"| {path.stem} | {share:g} % | {' | '.join(cells)} | {words} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--expand", choices=("none", "all"), default="none")
    parser.add_argument("--decide", type=float, nargs="+")
    options = parser.parse_args()
    paths = sorted(options.folder.glob("*.onnx"))
    if not paths:
        parser.error(f"{options.folder}: there are no .onnx files in it")
    if options.decide:
        print("| model | MACs | error as it stands | all expanded | as decided | decision |\n|---|---|---|---|---|---|")
        for path in paths:
            decided(path, options.decide)
        return
    print("| model | prunable channels | MACs cut | parameters cut | relative error | seconds |")
    print("|---|---|---|---|---|---|")
    for path in paths:
        print(f"| {' | '.join(row(path, options.ratio, options.expand))} |", flush=True)


if __name__ == "__main__":
    main()
