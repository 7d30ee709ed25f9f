"""Bandit pruning measured: ``python benchmarks/bandits.py [speed policies tabular settings] [--shared FOLDER]``.

1. speed: pulls per second of the naive way (the whole model at every pull) and ours, 32-image pulls, one thread, CPU time, interleaved.
2. policies: at equal pulls on ResNet-56, 1008 block-internal channels, 4 images per pull of 128: overlap with the leave-one-out choice
   (5 seeds: other images in other order, other draws), and top-1 on 1000 test images without and with repair, the same share of every
   group and one ranking (2 seeds at 5 pulls; leave-one-out, `contribution`, `obs` and `random` beside it), and by pulls (5 seeds).
   The policies are replayed on the table of all rewards, which the pull engine measures once.
3. tabular: scikit-learn's MLPs (64 and 32 neurons) on five data sets, 10 seeds; test accuracy or R^2 at 30, 50 and 70 % of the neurons
   removed, 5 pulls of 8 rows per arm; mean ranks over data set x rate with Friedman's test and Nemenyi's critical difference.
4. settings: what the defaults of the reward and of the policies do to the choice, on ResNet-20.

2 takes half an hour: with ``--tables FOLDER`` what was measured is kept there, and ``--limit SECONDS`` ends a piece.
Needs ``pip install -r benchmarks/requirements.txt`` for 3.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from arms import MODELS, NAMES, TEST_IMAGES, Known, Net, head, line, quota_of, replayed, table_of
from files import HOME, needed

import sfp_onnx
from sfp_onnx.evaluation.meaning import log_probabilities
from sfp_onnx.methods.bandits.ablation import Ablations, Block, Part, Running

# ---- 1. speed --------------------------------------------------------------------------------------------------------


def speed(shared: Path) -> None:
    print("\n### 1. Pulls per second (32 images per pull, one thread, CPU time)\n")
    head("model", "arms", "naive", "ours", "ratio", "ceiling", "share of the ceiling", "sessions opened in")
    subjects = [(title, Net(title, shared)) for title in MODELS]
    for title, net in subjects:
        _speed(title, net.analysis, net.groups, net.blocks(32, 32))
    mlp = sfp_onnx.inspect(needed(shared / "zoo" / "mlp.onnx"))
    shape = mlp.prepared.feeds[next(iter(mlp.prepared.feeds))].shape[1:]
    rows = np.random.default_rng(0).standard_normal((32, *shape)).astype(np.float32)
    _speed("MLP of the zoo", mlp, list(mlp.coupling.groups), [Block({next(iter(mlp.prepared.feeds)): rows}, 32)])


def share(part: Part, analysis: sfp_onnx.Analysis) -> float:
    """Share of the model's multiply-accumulates that an ablation of this part runs."""
    behind = {node.index for node in analysis.prepared.index.reached({name for name, _, _ in part.masked})}
    total = sum(layer.macs for layer in analysis.coupling.layers)
    return sum(layer.macs for layer in analysis.coupling.layers if layer.node.index in behind) / total


def _speed(title: str, analysis: sfp_onnx.Analysis, groups: list[Any], blocks: list[Block]) -> None:
    start = time.process_time()
    ours = Ablations(analysis.prepared, analysis.coupling, groups, blocks)
    opened = time.process_time() - start
    naive = Ablations(analysis.prepared, analysis.coupling, groups, blocks, Running(whole=True))
    spent = {"ours": 0.0, "naive": 0.0}
    for _ in range(2):  # the first time warms up
        spent = dict.fromkeys(spent, 0.0)
        for group in range(len(groups)):
            arms = np.flatnonzero(ours.owner == group)
            run = ours.runs(arms)[0]
            for kind, engine, chosen in (("ours", ours, run), ("naive", naive, arms[:1])):
                start = time.process_time()
                engine.outputs(chosen, 0)
                spent[kind] += (time.process_time() - start) / len(chosen) * len(arms)
    total = len(ours.units)
    shares = [share(section.part, analysis) for section in ours.sections]
    ceiling = total / sum(own * group.width for own, group in zip(shares, groups, strict=True))
    ratio = spent["naive"] / spent["ours"]
    line(title, total, f"{total / spent['naive']:.1f}", f"{total / spent['ours']:.1f}", f"{ratio:.2f}", f"{ceiling:.2f}",
         f"{ratio / ceiling:.0%}", f"{opened:.2f} s")  # fmt: skip


# ---- 2. policies -----------------------------------------------------------------------------------------------------

BUDGETS, SEEDS = (1, 2, 5, 20), 5


CELLS = [("uniform", "lstsq", 0.4), ("global", "lstsq", 0.4), ("uniform", "none", 0.4), ("global", "none", 0.4),
         ("uniform", "lstsq", 0.2), ("global", "lstsq", 0.2), ("uniform", "none", 0.2), ("global", "none", 0.2)]  # fmt: skip


def policies(shared: Path, tables: Path | None, deadline: float) -> None:
    net = Net("ResNet-56", shared)
    engine = Ablations(net.analysis.prepared, net.analysis.coupling, net.groups, net.blocks(128, 32))
    start = time.process_time()
    file = None if tables is None else tables / "ResNet-56.npy"
    rewards = np.load(file) if file and file.exists() else table_of(engine)
    if file:
        np.save(file, rewards)
    spread, spent = f"{rewards.mean():.4f} +- {rewards.mean(1).std():.4f}", time.process_time() - start
    print(f"\nRewards: {spread} over arms ({spent:.0f} s of CPU).")
    _overlaps(net, engine, rewards)
    known = Known(None if tables is None else tables / "top1.json", deadline)
    _accuracies(net, engine, rewards, known)
    _budgets(net, engine, rewards, known)


def _overlaps(net: Net, engine: Ablations, table: np.ndarray) -> None:
    print(f"\n### 2. Policies at equal pulls, ResNet-56 ({len(table)} arms, 128 images, 4 per pull, 40 % of every group)\n")
    best = net.removed(net.whole(engine, 1 - table.mean(1)), 0.4)
    head("policy", *[f"overlap at {pulls} pulls" for pulls in BUDGETS])
    for name in NAMES:
        cells = []
        for pulls in BUDGETS:
            found = [replayed(name, table, 4, pulls, seed, quota_of(engine, 0.4)) for seed in range(SEEDS)]
            overlap = [(net.removed(net.whole(engine, own), 0.4) & best).sum() / best.sum() for own in found]
            cells.append(f"{np.mean(overlap):.3f} +- {np.std(overlap):.3f}")
        line(name, *cells)


def _accuracies(net: Net, engine: Ablations, table: np.ndarray, known: Known) -> None:
    """Top-1 by policy, per layer and global, without and with repair; what removes the same is measured once."""
    print(f"\nTop-1 on {TEST_IMAGES} test images (dense {net.top1(np.zeros(net.analysis.coupling.units, bool)):.3f}):")
    rows = {title: (make, seeds) for title, make, seeds in _rows(net, engine, table)}

    def cell(title: str, allocation: str, repair: str, ratio: float) -> str:
        make, seeds = rows[title]
        found = [known.top1(net, net.removed(net.whole(engine, make(ratio, seed, allocation)), ratio, allocation), repair)
                 for seed in range(seeds)]  # fmt: skip
        return " / ".join("" if value is None else f"{value:.3f}" for value in found).strip(" /")

    shown = {(title, *own): cell(title, *own) for own in CELLS for title in rows}
    for allocation in ("uniform", "global"):
        print(f"\n{'The same share of every group' if allocation == 'uniform' else 'One ranking over all groups'}:\n")
        head("score", "20 %", "40 %", "20 %, lstsq", "40 %, lstsq")
        for title in rows:
            line(title, *[shown[title, allocation, repair, ratio] for repair in ("none", "lstsq") for ratio in (0.2, 0.4)])


def _budgets(net: Net, engine: Ablations, table: np.ndarray, known: Known) -> None:
    """Top-1 by policy and pulls, the same share of every group: mean and standard deviation over the seeds."""
    for repair, ratio in product(("none", "lstsq"), (0.4, 0.2)):
        print(f"\nTop-1 by pulls, {ratio:.0%} of every group removed, {'no repair' if repair == 'none' else repair} ({SEEDS} seeds):\n")
        head("policy", *[f"{pulls} pulls" for pulls in BUDGETS])
        for name in NAMES:
            cells = []
            for pulls in BUDGETS:
                masks = [replayed(name, table, 4, pulls, seed, quota_of(engine, ratio)) for seed in range(SEEDS)]
                found = [known.top1(net, net.removed(net.whole(engine, own), ratio), repair) for own in masks]
                values = [value for value in found if value is not None]
                cells.append(f"{np.mean(values):.3f} +- {np.std(values):.3f}" if len(values) == SEEDS else "")
            line(name, *cells)


def _rows(net: Net, engine: Ablations, table: np.ndarray) -> Iterator[tuple[str, Any, int]]:
    """Title, scores of the arms by (ratio, seed, allocation), seeds."""
    yield "leave-one-out (128 images)", lambda ratio, seed, how: 1 - table.mean(1), 1
    for name in NAMES:

        def made(ratio: float, seed: int, how: str, name: str = name) -> np.ndarray:
            return replayed(name, table, 4, 5, seed, quota_of(engine, ratio, how))

        yield f"{name}, 5 pulls", made, 2
    for name in ("contribution", "obs"):
        data = sfp_onnx.score(net.analysis, name, net.calib)[engine.units]
        yield f"{name} (all images)", lambda ratio, seed, how, data=data: data, 1
    yield "random", lambda ratio, seed, how: np.random.default_rng(seed).random(len(engine.units)), 2


# ---- 4. defaults -----------------------------------------------------------------------------------------------------

TEMPERATURES, BATCHES = (1.0, 2.0, 4.0, 8.0), (1, 4, 8, 20)
IMAGES = 40  # per arm


def settings(shared: Path) -> None:
    """What temperature of the reward, batch, epsilon and temperature of `softmax` do to the choice, on ResNet-20."""
    net = Net("ResNet-20", shared)
    engine = Ablations(net.analysis.prepared, net.analysis.coupling, net.groups, net.blocks(160, 32))
    found, labels = logits_of(engine)
    rewards = {f"divergence, T = {own:g}": _softened(found, own) for own in TEMPERATURES}
    before, after = (-log_probabilities(own)[..., np.arange(len(labels)), labels] for own in found)
    rewards["loss (labels)"] = 1 / (1 + np.exp(after - before))
    print(f"\n### 4. Defaults, ResNet-20 ({len(engine.units)} arms, 160 images, 40 % of every group)\n")
    head("reward", "split-half rank correlation", "8 images against all", "top-1, no repair", "top-1, lstsq")
    for name, table in rewards.items():
        halves, few = _reliability(table)
        removed = net.removed(net.whole(engine, 1 - table.mean(1)), 0.4)
        line(name, f"{halves:.2f}", f"{few:.2f}", *[f"{net.top1(removed, kind):.3f}" for kind in ("none", "lstsq")])
    table = rewards["divergence, T = 4"]
    best = net.removed(net.whole(engine, 1 - table.mean(1)), 0.4)

    def overlap(name: str, batch: int, **more: float) -> str:
        kept = [net.removed(net.whole(engine, replayed(name, table, batch, IMAGES // batch, seed, quota_of(engine, 0.4), **more)), 0.4)
                for seed in range(5)]  # fmt: skip
        each = [(own & best).sum() / best.sum() for own in kept]
        return f"{np.mean(each):.3f} +- {np.std(each):.3f}"

    print(f"\nOverlap with the choice from all images at {IMAGES} images per arm (5 seeds):\n")
    head("images per pull", *BATCHES)
    for name in ("round-robin", "sar", "ucb1"):
        line(name, *[overlap(name, batch) for batch in BATCHES])
    print()
    head("epsilon (8 images per pull)", 0.01, 0.1, 0.5, 1.0)
    line("epsilon-greedy", *[overlap("epsilon-greedy", 8, epsilon=own) for own in (0.01, 0.1, 0.5, 1.0)])
    print()
    head("temperature (8 images per pull)", 0.001, 0.005, 0.05, 0.5)
    line("softmax", *[overlap("softmax", 8, temperature=own) for own in (0.001, 0.005, 0.05, 0.5)])


def logits_of(engine: Ablations) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Logits of the model (images, classes) and of every masked one (arms, images, classes); labels."""
    before = np.concatenate([own[0] for own in engine.references])
    after, start = np.zeros((len(engine.units), *before.shape), np.float32), 0
    for block, own in enumerate(engine.blocks):
        for run in engine.runs(np.arange(len(engine.units))):
            for arm, outputs in zip(run, engine.outputs(run, block), strict=True):
                after[arm, start : start + own.count] = outputs[0]
        start += own.count
    return (before, after), np.concatenate([own.labels for own in engine.blocks])


def _softened(logits: tuple[np.ndarray, np.ndarray], temperature: float) -> np.ndarray:
    p, q = (log_probabilities(own, temperature) for own in logits)
    return np.clip(1 - np.sqrt(np.maximum((np.exp(p) * (p - q)).sum(-1), 0) / 2), 0, 1)


def _reliability(table: np.ndarray) -> tuple[float, float]:
    """Spearman's rank correlation of the arms between halves of the images, and between 8 images and all; means of 10 draws."""
    halves, few = [], []
    for seed in range(10):
        order = np.random.default_rng(seed).permutation(table.shape[1])
        parts = np.array_split(order, 2)
        halves.append(_spearman(*[table[:, own].mean(1) for own in parts]))
        few.append(_spearman(table[:, order[:8]].mean(1), table.mean(1)))
    return float(np.mean(halves)), float(np.mean(few))


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(own, kind="stable"), kind="stable") for own in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["speed", "policies", "tabular", "settings"])
    parser.add_argument("--shared", type=Path, default=HOME)
    parser.add_argument("--tables", type=Path, help="Folder that keeps the tables of all rewards.")
    parser.add_argument("--limit", type=float, default=float("inf"), help="Seconds for `policies`; later cells stay empty.")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity") and options.parts == ["speed"]:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])  # one thread
    for part in options.parts:
        start = time.perf_counter()
        timed = (options.shared, options.tables, time.monotonic() + options.limit)
        given = {"tabular": (), "policies": timed}.get(part, (options.shared,))
        globals()[part](*given)
        print(f"\n({part}: {time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
