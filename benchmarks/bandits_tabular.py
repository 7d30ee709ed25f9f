"""Part 3 of benchmarks/bandits.py: MLPs on tables of numbers."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import onnx
from arms import NAMES, head, line, replayed, table_of
from files import packages
from onnx import TensorProto, helper, numpy_helper

import sfp_onnx
from sfp_onnx.methods.bandits.ablation import Ablations
from sfp_onnx.methods.bandits.bandit_search import gather


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
    packages("sklearn", "scipy")
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
            engine = Ablations(analysis.prepared, analysis.coupling, groups, gather(data, rows, 8))
            table = table_of(engine)
            dense[at, seed] = _quality(layers, [np.ones(64), np.ones(32)], test, classes)
            free = {name: sfp_onnx.score(analysis, name, data)[engine.units] for name in ("contribution", "magnitude")}
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
