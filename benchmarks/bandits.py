"""Bandit pruning measured: ``python benchmarks/bandits.py [speed policies tabular rounds] [--shared FOLDER]``.

1. speed: pulls per second of the naive way (the whole model at every pull) and ours, 32-image pulls, one thread, CPU time, interleaved.
2. policies: at equal pulls on ResNet-56, 1008 block-internal channels, 4 images per pull of 128: overlap with the leave-one-out choice
   (5 seeds: other images in other order, other draws), and top-1 on 1000 test images (2 seeds at 5 pulls; leave-one-out, `contribution`
   and `random` beside it). The policies are replayed on the table of all rewards, which the pull engine measures once.
3. tabular: scikit-learn's MLPs (64 and 32 neurons) on five data sets, 10 seeds; test accuracy or R^2 at 30, 50 and 70 % of the neurons
   removed, 5 pulls of 8 rows per arm; mean ranks over data set x rate with Friedman's test and Nemenyi's critical difference.
4. rounds: ResNet-20's top-1 on 1000 test images after 1, 3 and 10 rounds of round-robin at 40 and 60 %, at equal pulls in all.

No repair anywhere yet. Needs ``pip install -r benchmarks/requirements.txt`` for 3.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import sfp_onnx
from sfp_onnx import bandits, graph, runtime
from sfp_onnx.cut import cut
from sfp_onnx.evaluate import measure
from sfp_onnx.pipeline.bandit_aim import Aim
from sfp_onnx.pipeline.bandit_steps import gather, order
from sfp_onnx.pipeline.repairing import repaired
from sfp_onnx.plan import eligible
from sfp_onnx.pulls import Block, Pulls, Running, share
from sfp_onnx.units import removal

NORMALISATION = sfp_onnx.Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), scale=255, layout="nhwc")
MODELS = {"ResNet-20": ("resnet20_cifar10.onnx", r"layer.*conv1"), "ResNet-56": ("resnet56_cifar10_bn.onnx", r"layer\d/layer\d\.\d/conv1")}
TEST_IMAGES, REPAIR_IMAGES = 1000, 512
NAMES = [name for name in bandits.POLICIES if name != "leave-one-out"]


def line(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def head(*cells: object) -> None:
    line(*cells)
    print("|" + "---|" * len(cells))


class Net:
    """A CIFAR network, its groups that may shrink, and its data."""

    def __init__(self, title: str, shared: Path) -> None:
        self.title, (file, self.only) = title, MODELS[title]
        self.analysis = sfp_onnx.inspect(shared / "models" / file)
        calib, test = (shared / "data" / f"cifar10_{part}.npz" for part in ("calib", "test"))
        self.calib = sfp_onnx.data_for(self.analysis.model, calib, preprocessing=NORMALISATION)
        self.test = sfp_onnx.data_for(self.analysis.model, test, preprocessing=NORMALISATION, samples=TEST_IMAGES)
        drawn = np.random.default_rng(0).permutation(self.calib.samples)
        self.fitted, self.judge = (self.calib.part(np.sort(own)) for own in (drawn[:REPAIR_IMAGES], drawn[-REPAIR_IMAGES:]))
        self.groups = eligible(self.analysis.coupling, sfp_onnx.PlanOptions(ratio=0.5, only=self.only), {})

    def blocks(self, images: int, batch: int) -> list[Block]:
        return gather(self.calib, np.random.default_rng(0).permutation(self.calib.samples)[:images], batch)

    def removed(self, scores: np.ndarray, ratio: float, allocation: str = "uniform") -> np.ndarray:
        return Aim(self.analysis, self.groups, sfp_onnx.PlanOptions(ratio=ratio, allocation=allocation)).removed(scores)

    def whole(self, engine: Pulls, values: np.ndarray) -> np.ndarray:
        """Scores of all units from those of the arms."""
        scores = np.ones(self.analysis.coupling.units)
        scores[engine.arms] = values
        return scores

    def pruned(self, removed: np.ndarray, repair: str = "none") -> Any:
        if not removed.any():
            return self.analysis.model
        model = cut(self.analysis.prepared, self.analysis.coupling, removed)
        if repair == "none":
            return model
        return repaired(self.analysis, model, removed, self.fitted, sfp_onnx.RepairOptions(fit=repair, force=True)).model

    def judged(self, removed: np.ndarray, repair: str = "none") -> tuple[float, float]:
        """Top-1 on test images, and the divergence from the original on calibration images that nothing was fitted or searched on."""
        model = self.pruned(removed, repair)
        answers = measure([self.analysis.model, model], self.judge.batches(), None)[0][1]
        return _top1(model, self.test), answers.divergence / answers.samples

    def top1(self, removed: np.ndarray, repair: str = "none") -> float:
        return _top1(self.pruned(removed, repair), self.test)


def _top1(model: Any, data: Any) -> float:
    session = runtime.open_session(graph.serialized(model), model.weights, "pruned")
    right = start = 0
    for feeds, count in data.batches():
        right += int((session.run(feeds)[0].argmax(1) == data.labels[start : start + count]).sum())
        start += count
    return right / start


# ---- 1. speed --------------------------------------------------------------------------------------------------------


def speed(shared: Path) -> None:
    print("\n### 1. Pulls per second (32 images per pull, one thread, CPU time)\n")
    head("model", "arms", "naive", "ours", "ratio", "ceiling", "share of the ceiling", "sessions opened in")
    subjects = [(title, Net(title, shared)) for title in MODELS]
    for title, net in subjects:
        _speed(title, net.analysis, net.groups, net.blocks(32, 32))
    mlp = sfp_onnx.inspect(shared / "zoo" / "mlp.onnx")
    shape = mlp.prepared.feeds[next(iter(mlp.prepared.feeds))].shape[1:]
    rows = np.random.default_rng(0).standard_normal((32, *shape)).astype(np.float32)
    _speed("MLP of the zoo", mlp, list(mlp.coupling.groups), [Block({next(iter(mlp.prepared.feeds)): rows}, 32)])


def _speed(title: str, analysis: sfp_onnx.Analysis, groups: list[Any], blocks: list[Block]) -> None:
    start = time.process_time()
    ours = Pulls(analysis.prepared, analysis.coupling, groups, blocks)
    opened = time.process_time() - start
    naive = Pulls(analysis.prepared, analysis.coupling, groups, blocks, Running(whole=True))
    spent = {"ours": 0.0, "naive": 0.0}
    for _ in range(2):  # the first time warms up
        spent = dict.fromkeys(spent, 0.0)
        for group in range(len(groups)):
            arms = np.flatnonzero(ours.owner == group)
            for kind, engine, run in (("ours", ours, ours.runs(arms)[0]), ("naive", naive, arms[:1])):
                start = time.process_time()
                engine.outputs(run, 0)
                spent[kind] += (time.process_time() - start) / len(run) * len(arms)
    total = len(ours.arms)
    shares = [share(section.part, analysis.coupling) for section in ours.sections]
    ceiling = total / sum(own * group.width for own, group in zip(shares, groups, strict=True))
    ratio = spent["naive"] / spent["ours"]
    line(title, total, f"{total / spent['naive']:.1f}", f"{total / spent['ours']:.1f}", f"{ratio:.2f}", f"{ceiling:.2f}",
         f"{ratio / ceiling:.0%}", f"{opened:.2f} s")  # fmt: skip


# ---- replaying policies on a table of rewards ------------------------------------------------------------------------


def table_of(engine: Pulls) -> np.ndarray:
    """Rewards (arms, images) of all arms on all blocks."""
    reward = bandits.make_reward(None, engine.references, None)
    found = np.zeros((len(engine.arms), sum(block.count for block in engine.blocks)))
    size = engine.blocks[0].count
    for block in range(len(engine.blocks)):
        for run in engine.runs(np.arange(len(engine.arms))):
            for arm, outputs in zip(run, engine.outputs(run, block), strict=True):
                found[arm, block * size : (block + 1) * size] = reward(engine.references[block], outputs, None)
    return found


def replayed(name: str, table: np.ndarray, batch: int, pulls: int, seed: int, quota: Any) -> np.ndarray:
    """Importance per arm of a policy, images in an order drawn with the seed."""
    images = np.random.default_rng(seed).permutation(table.shape[1])
    blocks = table[:, images[: len(images) // batch * batch]].reshape(len(table), -1, batch).mean(2)
    horizon = pulls * len(table)
    policy = bandits.POLICIES[name](bandits.Setting(len(table), horizon, seed, quota=quota))
    done = 0
    while done < horizon:
        arms, places = order(policy, horizon - done, blocks.shape[1])
        if not len(arms):
            break
        policy.update(arms, blocks[arms, places])
        done += len(arms)
    return 1 - policy.standing()


# ---- 2. policies -----------------------------------------------------------------------------------------------------


def policies(shared: Path, tables: Path | None) -> None:
    net = Net("ResNet-56", shared)
    kinds = {"zero": Running(), "mean": Running(means=True)}
    engines, rewards = {}, {}
    for kind, how in kinds.items():
        start = time.process_time()
        engines[kind] = Pulls(net.analysis.prepared, net.analysis.coupling, net.groups, net.blocks(128, 32), how)
        file = None if tables is None else tables / f"ResNet-56-{kind}.npy"
        rewards[kind] = np.load(file) if file and file.exists() else table_of(engines[kind])
        if file:
            np.save(file, rewards[kind])
        own = rewards[kind]
        spread, spent = f"{own.mean():.4f} +- {own.mean(1).std():.4f}", time.process_time() - start
        print(f"\nRewards, masked by the {kind}: {spread} over arms ({spent:.0f} s of CPU).")
    engine, table = engines["zero"], rewards["zero"]
    _overlaps(net, engine, table)
    _accuracies(net, engine, rewards, Known(None if tables is None else tables / "top1.json"))


class Known:
    """Figures by what was removed and how it was repaired, kept in a file so that a run that is cut off can go on."""

    def __init__(self, file: Path | None) -> None:
        self.file, self.held = file, json.loads(file.read_text()) if file and file.exists() else {}

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self.held:
            self.held[key] = make()
            if self.file:
                self.file.write_text(json.dumps(self.held))
        return self.held[key]

    def top1(self, net: Net, removed: np.ndarray, repair: str) -> float:
        key = f"{net.title} {repair} {hashlib.sha256(removed.tobytes()).hexdigest()}"
        return float(self.get(key, lambda: net.top1(removed, repair)))


def quota_of(engine: Pulls, ratio: float, allocation: str = "uniform") -> Any:
    """What a removal gives up of every group, or of all arms."""
    if allocation == "global":
        return lambda means: (np.zeros(len(means), np.int64), np.array([int(ratio * len(means) + 1e-9)]))
    widths = np.bincount(engine.owner)
    return lambda means: (engine.owner, np.array([int(ratio * width + 1e-9) for width in widths]))


def _overlaps(net: Net, engine: Pulls, table: np.ndarray) -> None:
    print(f"\n### 2. Policies at equal pulls, ResNet-56 ({len(table)} arms, 128 images, 4 per pull, 40 % of every group)\n")
    best = net.removed(net.whole(engine, 1 - table.mean(1)), 0.4)
    budgets, seeds = (1, 2, 5, 20), 5
    head("policy", *[f"overlap at {pulls} pulls" for pulls in budgets])
    for name in NAMES:
        cells = []
        for pulls in budgets:
            found = [replayed(name, table, 4, pulls, seed, quota_of(engine, 0.4)) for seed in range(seeds)]
            overlap = [(net.removed(net.whole(engine, own), 0.4) & best).sum() / best.sum() for own in found]
            cells.append(f"{np.mean(overlap):.3f} +- {np.std(overlap):.3f}")
        line(name, *cells)


def _accuracies(net: Net, engine: Pulls, rewards: dict[str, np.ndarray], known: Known) -> None:
    """Top-1 by policy, per layer and global, without and with repair; what removes the same is measured once."""
    none = np.zeros(net.analysis.coupling.units, bool)
    print(f"\nTop-1 on {TEST_IMAGES} test images (dense {net.top1(none):.3f}):\n")
    rows: dict[str, tuple[Any, int]] = {}
    for kind, own in rewards.items():
        word = "" if kind == "zero" else ", masked by the mean"
        rows[f"leave-one-out (128 images){word}"] = (lambda ratio, seed, how, own=own: 1 - own.mean(1)), 1
        for name in NAMES if kind == "zero" else ("round-robin", "sar"):
            rows[f"{name}, 5 pulls{word}"] = (
                lambda ratio, seed, how, name=name, own=own: replayed(name, own, 4, 5, seed, quota_of(engine, ratio, how)), 2)  # fmt: skip
    for name in ("contribution", "obs"):
        data = sfp_onnx.score(net.analysis, name, net.calib)[engine.arms]
        rows[f"{name} (all images)"] = (lambda ratio, seed, how, data=data: data), 1
    rows["random"] = (lambda ratio, seed, how: np.random.default_rng(seed).random(len(engine.arms))), 2
    for allocation in ("uniform", "global"):
        print(f"\n{'The same share of every group' if allocation == 'uniform' else 'One ranking over all groups'}:\n")
        head("score", "20 %", "40 %", "20 %, lstsq", "40 %, lstsq")
        for title, (make, seeds) in rows.items():
            cells = []
            for kind in ("none", "lstsq"):
                for ratio in (0.2, 0.4):
                    found = []
                    for seed in range(seeds):
                        removed = net.removed(net.whole(engine, make(ratio, seed, allocation)), ratio, allocation)
                        found.append(known.top1(net, removed, kind))
                    cells.append(" / ".join(f"{value:.3f}" for value in found))
            line(title, *cells)


# ---- 3. tabular ------------------------------------------------------------------------------------------------------


def _datasets() -> dict[str, tuple[np.ndarray, np.ndarray, bool]]:
    from sklearn import datasets

    found = {name: (*getattr(datasets, f"load_{name}")(return_X_y=True), name != "diabetes")
             for name in ("breast_cancer", "wine", "digits", "diabetes")}  # fmt: skip
    return {**found, "friedman (20640 x 8)": (*datasets.make_friedman1(20640, 8, noise=1.0, random_state=0), False)}


def _trained(x: np.ndarray, y: np.ndarray, classes: bool, seed: int) -> tuple[Any, ...]:
    """A network (list of (weights, biases)), and standardised training and test data."""
    from sklearn.model_selection import train_test_split
    from sklearn.neural_network import MLPClassifier, MLPRegressor
    from sklearn.preprocessing import StandardScaler

    x, tx, y, ty = train_test_split(x, y, test_size=0.3, random_state=seed, stratify=y if classes else None)
    scaler = StandardScaler().fit(x)
    x, tx = (scaler.transform(own).astype(np.float32) for own in (x, tx))
    if not classes:
        centre, spread = y.mean(), y.std()
        y, ty = (y - centre) / spread, (ty - centre) / spread
    kind = MLPClassifier if classes else MLPRegressor
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = kind(hidden_layer_sizes=(64, 32), random_state=seed, max_iter=10 if len(x) > 5000 else 150).fit(x, y)
    layers = list(zip(net.coefs_, net.intercepts_, strict=True))
    if classes and layers[-1][0].shape[1] == 1:  # one logit becomes two
        w, b = layers[-1]
        layers[-1] = (np.concatenate([0 * w, w], 1), np.concatenate([0 * b, b]))
    return [(w.astype(np.float32), b.astype(np.float32)) for w, b in layers], (x, y), (tx, ty)


def _exported(layers: list[tuple[np.ndarray, np.ndarray]]) -> onnx.ModelProto:
    nodes, held, name = [], [], "x"
    for index, (w, b) in enumerate(layers):
        held += [numpy_helper.from_array(w, f"w{index}"), numpy_helper.from_array(b, f"b{index}")]
        last = index == len(layers) - 1
        nodes.append(helper.make_node("Gemm", [name, f"w{index}", f"b{index}"], ["y" if last else f"h{index}"], f"layer{index}"))
        if not last:
            nodes.append(helper.make_node("Relu", [f"h{index}"], [f"r{index}"]))
        name = f"r{index}"
    ports = [helper.make_tensor_value_info(port, TensorProto.FLOAT, ["n", size])
             for port, size in (("x", layers[0][0].shape[0]), ("y", layers[-1][0].shape[1]))]  # fmt: skip
    made = helper.make_graph(nodes, "mlp", ports[:1], ports[1:], held)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _quality(layers: list[Any], masks: list[np.ndarray], data: tuple[np.ndarray, np.ndarray], classes: bool) -> float:
    """Accuracy or R^2 with hidden neurons masked (the same as cut, see tests/test_bandits.py)."""
    z, y = data
    for index, (w, b) in enumerate(layers):
        z = z @ w + b
        if index < len(masks):
            z = np.maximum(z, 0) * masks[index]
    if classes:
        return float((z.argmax(1) == y).mean())
    return float(1 - ((z[:, 0] - y) ** 2).sum() / ((y - y.mean()) ** 2).sum())


def tabular(seeds: int = 10) -> None:
    print(f"\n### 3. Tabular MLPs (64 + 32 neurons, {seeds} seeds, 5 pulls of 8 rows per arm, the same share of both layers)\n")
    rates = (0.3, 0.5, 0.7)
    names = ["leave-one-out", *NAMES, "contribution", "magnitude", "random"]
    sets = _datasets()
    found = np.zeros((len(sets), len(rates), seeds, len(names)))
    dense = np.zeros((len(sets), seeds))
    for at, (x, y, classes) in enumerate(sets.values()):
        for seed in range(seeds):
            layers, train, test = _trained(x, y, classes, seed)
            analysis = sfp_onnx.inspect(_exported(layers))
            data = sfp_onnx.data_for(analysis.model, {"x": train[0]})
            rows = np.random.default_rng(seed).permutation(len(train[0]))[:120]
            groups = list(analysis.coupling.groups)
            engine = Pulls(analysis.prepared, analysis.coupling, groups, gather(data, rows, 8))
            table = table_of(engine)
            dense[at, seed] = _quality(layers, [np.ones(64), np.ones(32)], test, classes)
            free = {name: sfp_onnx.score(analysis, name, data)[engine.arms] for name in ("contribution", "magnitude")}
            for number, rate in enumerate(rates):
                counts = np.array([int(rate * group.width + 1e-9) for group in groups])
                for place, name in enumerate(names):
                    values = (free[name] if name in free else np.random.default_rng(seed).random(len(table)) if name == "random"
                              else 1 - table.mean(1) if name == "leave-one-out"
                              else replayed(name, table, 8, 5, seed, lambda means, m=counts, own=engine.owner: (own, m)))  # fmt: skip
                    masks = []
                    for index, group in enumerate(groups):
                        own, mask = np.flatnonzero(engine.owner == index), np.ones(group.width)
                        mask[np.argsort(values[own], kind="stable")[: counts[index]]] = 0
                        masks.append(mask)
                    found[at, number, seed, place] = _quality(layers, masks, test, classes)
    head("data set", "removed", "dense", *names)
    for at, title in enumerate(sets):
        for number, rate in enumerate(rates):
            line(title, f"{rate:.0%}", f"{dense[at].mean():.3f}", *[f"{value:.3f}" for value in found[at, number].mean(0)])
    _ranks(found.mean(2).reshape(-1, len(names)), names)


def _ranks(results: np.ndarray, names: list[str]) -> None:
    """Friedman's test over the rows, and Nemenyi's critical difference of mean ranks (Demsar, JMLR 7, 2006)."""
    from scipy.stats import friedmanchisquare, rankdata, studentized_range

    ranks = np.array([rankdata(-row) for row in results])
    rows, kinds = ranks.shape
    test = friedmanchisquare(*results.T)
    difference = studentized_range.ppf(0.95, kinds, np.inf) / np.sqrt(2) * np.sqrt(kinds * (kinds + 1) / (6 * rows))
    print(f"\nMean ranks over {rows} cells (1 = best): Friedman chi2 = {test.statistic:.1f}, p = {test.pvalue:.2g}; "
          f"Nemenyi's critical difference at 5 %: {difference:.2f}\n")  # fmt: skip
    head(*np.array(names)[np.argsort(ranks.mean(0), kind="stable")])
    line(*[f"{value:.2f}" for value in np.sort(ranks.mean(0))])
    try:
        import scikit_posthocs
    except ImportError:
        print("\n(scikit-posthocs is not installed; the critical difference is from scipy's studentized range.)")
        return
    table = np.asarray(scikit_posthocs.posthoc_nemenyi_friedman(results))
    pairs = [f"{names[i]} - {names[j]} ({table[i, j]:.2g})" for i in range(kinds) for j in range(i) if table[i, j] < 0.05]
    print(f"\nPairs that differ (Nemenyi, p): {', '.join(pairs) or 'none'}")


# ---- 4. rounds -------------------------------------------------------------------------------------------------------


CELLS = [(mask, repair) for repair in ("none", "bias", "lstsq") for mask in ("zero", "mean")]


def rounds(shared: Path, tables: Path | None, titles: Sequence[str] = ("ResNet-20", "ResNet-56")) -> None:
    print(f"\n### 4. Rounds of round-robin at equal pulls per arm in all (4 images per pull), top-1 on {TEST_IMAGES} test images\n")
    known = Known(None if tables is None else tables / "rounds.json")
    figures = ("top-1", "KL", "top-1, lstsq", "KL, lstsq")
    head("model", "removed", "masked by", "between rounds", "rounds", "images per arm", *figures)
    for title in titles:
        net = Net(title, shared)
        images = {"ResNet-20": 40, "ResNet-56": 20}[title]
        for ratio in (0.4, 0.6):
            for count in (1, 3, 10):
                for mask, repair in CELLS:
                    if (count == 1 and repair != "none") or (title == "ResNet-56" and repair == "bias"):
                        continue
                    pulls = max(1, images // 4 // count)
                    key = f"{title} {ratio} {mask} {repair} {count} {pulls}"
                    found = known.get(key, lambda: _after_rounds(net, ratio, mask, repair, count, pulls))  # noqa: B023
                    line(title, f"{ratio:.0%}", mask, repair, count, 4 * pulls * count, *[f"{value:.4g}" for value in found])


def _after_rounds(net: Net, ratio: float, mask: str, repair: str, count: int, pulls: int) -> list[float]:
    """Top-1 and divergence without a last repair, and the two with one."""
    own = sfp_onnx.BanditOptions(pulls=pulls, pull_batch=4, rounds=count, masked_by=mask, round_repair=repair)
    aim = sfp_onnx.PlanOptions(ratio=ratio, only=net.only)
    plan = sfp_onnx.plan(net.analysis, aim, "bandit:round-robin", net.fitted, sfp_onnx.ScoreOptions(bandit=own))
    removed = removal(net.analysis.coupling, {own.group: own.remove for own in plan.groups})
    return [figure for kind in ("none", "lstsq") for figure in net.judged(removed, kind)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["speed", "policies", "tabular", "rounds"])
    parser.add_argument("--shared", type=Path, default=Path(__file__).parent.parent.parent / "shared")
    parser.add_argument("--tables", type=Path, help="Folder that keeps the tables of all rewards.")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity") and options.parts == ["speed"]:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])  # one thread
    for part in options.parts:
        start = time.perf_counter()
        given = {"tabular": (), "speed": (options.shared,)}.get(part, (options.shared, options.tables))
        globals()[part](*given)
        print(f"\n({part}: {time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
