"""One contract for all scores, and hand-computed values."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import onnx
import onnx.numpy_helper as nh
import pytest
from building import Builder, run, with_all_tensors

import sfp_onnx
from sfp_onnx.core.options import ScoreOptions
from sfp_onnx.coupling.analysis import Analysis
from sfp_onnx.scores.scoring import SCORES, STATISTICS, OfGroups, asked, parse

DATA = np.random.default_rng(3).standard_normal((24, 3, 8, 8)).astype(np.float32)
LABELS = np.random.default_rng(5).integers(0, 5, len(DATA))
WIDTH = 8


def chain(
    fold: bool = False, order: np.ndarray | None = None, dead: int | None = None, scale: float = 1.0, seed: int = 4
) -> onnx.ModelProto:
    """stem-bn-relu-second-relu-pool-gemm; ``fold`` folds the BatchNormalization, ``order`` permutes the stem's channels, ``dead`` is
    a channel with zero weights in and out, ``scale`` multiplies the weights of the second layer."""
    generator = np.random.default_rng(seed)
    order = np.arange(WIDTH) if order is None else order
    alive = np.ones(WIDTH)
    alive[[] if dead is None else [dead]] = 0
    w1, w2 = generator.standard_normal((WIDTH, 3, 3, 3)) / 5, generator.standard_normal((6, WIDTH, 3, 3)) / 8 * scale
    gamma, beta, mean = generator.uniform(0.5, 1.5, WIDTH), generator.standard_normal(WIDTH) / 3, generator.standard_normal(WIDTH) / 3
    variance = generator.uniform(0.5, 1.5, WIDTH)
    gamma, beta = gamma * alive, beta * alive
    w1, w2 = (w1 * alive[:, None, None, None])[order], (w2 * alive[None, :, None, None])[:, order]
    gamma, beta, mean, variance = (values[order] for values in (gamma, beta, mean, variance))
    b = Builder(17, seed)
    x = b.input(["N", 3, 8, 8])
    if fold:
        factor = gamma / np.sqrt(variance + 1e-5)
        weight, bias = w1 * factor[:, None, None, None], beta - mean * factor
        y = b.op("Conv", x, b.const(weight, name="w1"), b.const(bias), pads=[1] * 4, name="stem")
    else:
        y = b.op("Conv", x, b.const(w1, name="w1"), pads=[1] * 4, name="stem")
        y = b.op("BatchNormalization", y, *(b.const(values) for values in (gamma, beta, mean, variance)))
    y = b.op("Relu", y, outputs=["read"])
    y = b.op("Relu", b.op("Conv", y, b.const(w2, name="w2"), pads=[1] * 4, name="second"))
    out = b.gemm(b.op("Flatten", b.op("GlobalAveragePool", y)), 6, 5, name="head")
    return b.model(out)


def scores(model: onnx.ModelProto, text: str, data: np.ndarray = DATA, **options: int) -> tuple[Analysis, np.ndarray]:
    analysis = sfp_onnx.inspect(model)
    needed = any(own.needs_data for own in parse(text).scores)
    given = sfp_onnx.data_for(analysis.model, {"x": data, "labels": LABELS}) if needed else None
    return analysis, sfp_onnx.score(analysis, text, given, ScoreOptions(**options))


def stem_scores(model: onnx.ModelProto, name: str, data: np.ndarray = DATA, **options: int) -> np.ndarray:
    analysis, values = scores(model, name, data, **options)
    return values[next(group.units for group in analysis.coupling.groups if "stem" in group.producers)]


def arrays(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: nh.to_array(tensor).astype(np.float64) for tensor in model.graph.initializer}


def activations(model: onnx.ModelProto, name: str) -> np.ndarray:
    whole = with_all_tensors(model)
    return dict(zip([item.name for item in whole.graph.output], run(whole, {"x": DATA}), strict=True))[name].astype(np.float64)


# ---- the contract ----------------------------------------------------------------------------------------------------

SEARCHES = sorted(name for name in SCORES if name.startswith("bandit:"))  # what they find out is random, or takes all pulls to converge
EXACT = sorted(set(SCORES) - set(SEARCHES))
NON_DEFAULT = {int: "3", float: "0.5", str: "x"}


def test_the_registry_holds_scores_of_all_rooms() -> None:
    assert {"magnitude", "contribution", "obs", "sfp", "probe-drop", "bandit:sar"} <= set(SCORES)


def test_the_registry_alone_finds_plug_ins_and_importing_costs_nothing() -> None:
    find = "from sfp_onnx.scores.scoring import SCORES; assert {'obs', 'sfp', 'bandit:sar'} <= set(SCORES)"
    light = "import sfp_onnx, sys; assert not {'numpy', 'onnx', 'sfp_onnx.methods'} & set(sys.modules)"
    heavy = "import sfp_onnx.methods.sfp, sfp_onnx.methods.bandits, sys; assert not {'onnx', 'onnxruntime'} & set(sys.modules)"
    for code in (find, light, heavy):
        subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", sorted(SCORES))
def test_a_score_says_what_it_is_and_where_it_is_from(name: str) -> None:
    own = SCORES[name]
    assert own.name == name and own.summary and own.source
    if own.options is not None:
        assert is_dataclass(own.options) and own.options.__dataclass_params__.frozen  # type: ignore[attr-defined]
        hash(own.options())


@pytest.mark.parametrize("name", sorted(SCORES))
def test_options_round_trip_through_the_text(name: str) -> None:
    plain = parse(name)
    assert plain.text == name and plain.options == (SCORES[name].options and SCORES[name].options(),)
    kinds = get_type_hints(SCORES[name].options) if SCORES[name].options else {}
    for option in fields(SCORES[name].options) if SCORES[name].options else ():
        if "option" not in option.metadata:
            continue
        facts, kind = option.metadata["option"], kinds[option.name]
        kind = next(one for one in (kind, *get_args(kind)) if one in NON_DEFAULT)
        value = facts.choices[-1] if facts.choices else NON_DEFAULT[kind]
        read = parse(f"{name},{option.name}={value}")
        assert read.options[0] != plain.options[0] and getattr(read.options[0], option.name) != option.default
        assert parse(read.text) == read and parse(read.text).text == read.text == asked(read.text)[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("magnitud", r"unknown score 'magnitud' \(did you mean 'magnitude'\?\)\. Known: .*bandit:sar"),
        ("magnitude+sfpp", "unknown score 'sfpp'"),
        ("sfp,prob=ridge", r"score 'sfp': unknown option 'prob' \(did you mean 'probe'\?\)\. Known: probe, pool"),
        ("random,p=1", "unknown option 'p'. It has none"),
        ("magnitude,p", "expected option=value"),
        ("magnitude,p=two", "magnitude.*p=two: expected a whole number"),
        ("magnitude,p=0", "expected at least 1"),
        ("sfp,probe=tree", "expected one of sgd, ridge"),
        ("bandit:sar,budget=soon", "a positive time such as 60s"),
        ("bandit:sar,memory=much", "bytes such as 500MB"),
        ("bandit:sar,epsilon=2", "at least 0 and at most 1"),
        ("bandit:sar,temperature=nan", "more than 0"),
        ("bandit:sar,pulls=1,budget=1s", "either pulls or budget"),
        ("", "unknown score ''"),
    ],
)
def test_what_cannot_be_read_is_refused_with_what_is_known(text: str, words: str) -> None:
    with pytest.raises(sfp_onnx.OptionError, match=words):
        parse(text)


def test_an_option_holds_for_every_score_that_has_it() -> None:
    read = parse(" sfp + magnitude , probe = ridge, p=1 ")
    assert read.options[0].probe == "ridge" and read.options[1].p == 1 and read.text == "sfp+magnitude,probe=ridge,p=1"
    assert parse("bandit:sar,budget=2m,memory=1MB").text == "bandit:sar,budget=120s,memory=1000000"


@pytest.mark.parametrize("name", sorted(SCORES))
def test_one_finite_value_per_unit_and_the_same_twice(name: str) -> None:
    analysis, first = scores(chain(), name)
    assert first.shape == (analysis.coupling.units,) == (WIDTH + 6,) and first.dtype == np.float64
    assert np.isfinite(first).all() and (first >= 0).all()
    np.testing.assert_array_equal(first, scores(chain(), name)[1])


@pytest.mark.parametrize("name", sorted(set(EXACT) - {"random"}))
def test_permuted_channels_have_permuted_scores(name: str) -> None:
    order = np.random.default_rng(0).permutation(WIDTH)
    plain, permuted = stem_scores(chain(), name), stem_scores(chain(order=order), name)
    assert len(set(plain)) > 1
    np.testing.assert_allclose(permuted, plain[order], rtol=1e-5)


@pytest.mark.parametrize("name", sorted(set(EXACT) - {"random"}))
def test_a_dead_channel_has_the_lowest_score(name: str) -> None:
    values = stem_scores(chain(dead=5), name)
    if name == "fpgm":
        pytest.skip("fpgm ranks by distance to the other filters: a zero filter may be far from all of them")
    if name == "probe-drop":
        assert values[5] == 1
        pytest.skip("probe-drop ranks channels that the probe is better without under a dead one, which changes nothing")
    assert values.argmin() == 5 and (np.delete(values, 5) > values[5]).all()


@pytest.mark.parametrize("name", EXACT)
def test_scaling_a_layer_as_a_whole_changes_no_score(name: str) -> None:
    np.testing.assert_allclose(stem_scores(chain(scale=16.0), name), stem_scores(chain(), name), rtol=1e-6)


@pytest.mark.parametrize("name", EXACT)
def test_batch_size_and_order_of_samples_do_not_matter(name: str) -> None:
    if SCORES[name].needs_data:
        analysis = sfp_onnx.inspect(chain())
        found = []
        for data, labels, batch in ((DATA, LABELS, 5), (DATA[::-1], LABELS[::-1], 24)):
            given = sfp_onnx.data_for(analysis.model, {"x": np.ascontiguousarray(data), "labels": labels})
            assert given is not None
            found.append(sfp_onnx.score(analysis, name, replace(given, batch=batch)))
        # obs inverts matrices whose products are summed in float32 within a batch (and sees every position of maps as small as these), and
        # how much samples differ it measures about the mean of the first few
        np.testing.assert_allclose(*found, rtol=1e-2 if name == "obs" else 1e-5)


@pytest.mark.parametrize("name", sorted(set(EXACT) - {"random"}))
def test_a_kept_and_a_folded_batch_normalization_give_the_same_scores(name: str) -> None:
    if name == "bn-scale":
        assert set(stem_scores(chain(fold=True), name)) == {1.0}
        return
    np.testing.assert_allclose(stem_scores(chain(), name), stem_scores(chain(fold=True), name), rtol=1e-4)


def test_random_depends_on_the_seed_alone() -> None:
    first, second = (stem_scores(chain(), "random", seed=seed) for seed in (0, 1))
    assert (first != second).all()
    np.testing.assert_array_equal(first, stem_scores(chain(scale=3.0), "random", seed=0))


def test_scores_that_need_data_say_so() -> None:
    for name, own in SCORES.items():
        if own.needs_data:
            with pytest.raises(sfp_onnx.DataError, match=f"score '{name}' needs calibration data"):
                sfp_onnx.score(sfp_onnx.inspect(chain()), name)
    with pytest.raises(sfp_onnx.OptionError, match="unknown score"):
        sfp_onnx.score(sfp_onnx.inspect(chain()), "nonsense")


# ---- by hand ---------------------------------------------------------------------------------------------------------


def norms(rows: list[np.ndarray], p: int) -> np.ndarray:
    """p-norm of each row over the mean of all rows."""
    values = np.array([(np.abs(row) ** p).sum() ** (1 / p) for row in rows])
    return values / values.mean()


@pytest.mark.parametrize("p", [1, 2])
def test_magnitude(p: int) -> None:
    model = chain(fold=True)
    own = arrays(model)
    out = norms([own["w1"][c] for c in range(WIDTH)], p)
    read = norms([own["w2"][:, c] for c in range(WIDTH)], p)
    np.testing.assert_allclose(stem_scores(model, f"magnitude,p={p}"), ((out**p + read**p) / 2) ** (1 / p), rtol=1e-6)


@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_of_a_flattened_map_and_a_residual(p: int) -> None:
    """Four layers touch each unit; the Gemm has one row per channel and position, of which the mean (of p-th powers) counts."""
    b = Builder(17, 4)
    y = b.conv(b.input(["N", 3, 4, 4]), 3, 5, name="stem")
    inner = b.op("Relu", b.conv(y, 5, 6, name="in"))
    y = b.op("Add", y, b.conv(inner, 6, 5, name="out"))
    model = b.model(b.gemm(b.op("Flatten", y), 80, 4, name="head"))
    own = {node.name: arrays(model)[node.input[1]] for node in model.graph.node if node.op_type in ("Conv", "Gemm")}
    per_layer = [norms([own["stem"][c] for c in range(5)], p), norms([own["out"][c] for c in range(5)], p)]
    per_layer.append(norms([own["in"][:, c] for c in range(5)], p))
    total = sum(values**p for values in per_layer) + (norms(list(own["head"]), p).reshape(5, 16) ** p).mean(1)
    np.testing.assert_allclose(stem_scores(model, f"magnitude,p={p}"), (total / 4) ** (1 / p), rtol=1e-6)


def test_bn_scale() -> None:
    model = chain()
    gamma = np.abs(arrays(model)[model.graph.node[1].input[1]])
    np.testing.assert_allclose(stem_scores(model, "bn-scale"), gamma / gamma.mean(), rtol=1e-6)


def test_fpgm_against_loops() -> None:
    """The filters that make the channels, and the weights that read them."""
    own = arrays(chain(fold=True))
    expected = np.zeros(WIDTH)
    for rows in (own["w1"], own["w2"].swapaxes(0, 1)):
        distances = np.zeros(WIDTH)
        for i in range(WIDTH):
            for j in range(WIDTH):
                distances[i] += np.sqrt(((rows[i] - rows[j]) ** 2).sum())
        expected += distances / distances.mean() / 2
    np.testing.assert_allclose(stem_scores(chain(fold=True), "fpgm"), expected, rtol=1e-6)


def test_activation() -> None:
    read = activations(chain(), "read")
    rms = np.sqrt((read**2).mean((0, 2, 3)))
    np.testing.assert_allclose(stem_scores(chain(), "activation"), rms / rms.mean(), rtol=1e-5)


def test_apoz() -> None:
    read = activations(chain(), "read")
    np.testing.assert_allclose(stem_scores(chain(), "apoz"), (read != 0).mean((0, 2, 3)), rtol=1e-6)


def test_contribution() -> None:
    read, weight = activations(chain(), "read"), arrays(chain())["w2"]
    values = np.sqrt((read**2).mean((0, 2, 3))) * np.sqrt((weight**2).sum((0, 2, 3)))
    np.testing.assert_allclose(stem_scores(chain(), "contribution"), values / values.mean(), rtol=1e-5)


def dequantised(kept: bool) -> onnx.ModelProto:
    """Conv, Gemm and MatMul whose weights are dequantised integers (``kept``), or the same numbers as float constants."""
    b = Builder(17, 4)

    def weight(shape: tuple[int, ...], axis: int) -> str:
        whole, scales = b.random.integers(-127, 127, shape).astype(np.int8), b.random.uniform(0.001, 0.01, shape[axis]).astype(np.float32)
        if kept:
            return b.op("DequantizeLinear", b.const(whole), b.const(scales), axis=axis)
        return b.const(whole * np.expand_dims(scales, [own for own in range(len(shape)) if own != axis]))

    x = b.input(["N", 3, 8, 8])
    y = b.op("Relu", b.op("Conv", x, weight((8, 3, 3, 3), 0), name="stem"))
    y = b.op("Relu", b.op("Conv", y, weight((6, 8, 1, 1), 0), name="second"))
    y = b.op("Relu", b.op("MatMul", b.op("Flatten", b.op("GlobalAveragePool", y)), weight((6, 7), 1), name="third"))
    return b.model(b.op("Gemm", y, weight((5, 7), 0), transB=1, name="head"))


@pytest.mark.parametrize("name", EXACT)
def test_scores_see_dequantised_weights(name: str) -> None:
    (first, own), (second, other) = (scores(dequantised(kept), name) for kept in (True, False))
    assert [group.producers for group in first.coupling.groups] == [group.producers for group in second.coupling.groups]
    assert all(layer.weight is not None for layer in first.coupling.layers)
    assert first.coupling.channels_total == second.coupling.channels_total == 8 + 6 + 7 + 5
    # onnxruntime may multiply by the integers themselves while it calibrates
    needs = SCORES[name].needs_data
    profiled = needs and not isinstance(SCORES[name].prepare, OfGroups) and name != "obs"
    tolerance = 3e-2 if profiled else 1e-2 if needs else 1e-5  # a probe sees the last layers' errors several times over
    np.testing.assert_allclose(own, other, rtol=tolerance, atol=1e-3 if needs else 0)


def test_a_score_reads_what_the_layer_reads() -> None:
    """Two readers of different activations of the same units: the mean over both counts."""
    b = Builder(17, 4)
    y = b.conv(b.input(["N", 3, 8, 8]), 3, WIDTH, name="stem")
    first, second = b.op("Relu", y, outputs=["first"]), b.op("Abs", y, outputs=["second"])
    model = b.model(b.op("Add", b.conv(first, WIDTH, 4, name="one"), b.conv(second, WIDTH, 4, name="two")))
    expected = np.zeros(WIDTH)
    for name in ("first", "second"):
        rms = np.sqrt((activations(model, name) ** 2).mean((0, 2, 3)))
        expected += rms / rms.mean() / 2
    np.testing.assert_allclose(stem_scores(model, "activation"), expected, rtol=1e-5)


def test_a_grouped_convolution_is_read_by_group() -> None:
    """contribution of a channel inside of one of two groups: what it is times the weights of its group that read it."""
    b = Builder(17, 4)
    y = b.op("Relu", b.conv(b.input(["N", 3, 8, 8]), 3, 8, name="stem"), outputs=["read"])
    model = b.model(b.conv(b.op("Relu", b.conv(y, 8, 8, group=2, name="grouped")), 8, 4, name="last"))
    weight = arrays(model)[model.graph.node[2].input[1]]
    read = activations(model, "read")
    squares = (read**2).mean((0, 2, 3))
    values = np.sqrt(squares) * np.sqrt((weight.reshape(2, 4, 4, -1) ** 2).sum((1, 3))).reshape(-1)
    analysis, scored = scores(model, "contribution")
    inside = next(group for group in analysis.coupling.groups if group.inside and "stem" in group.producers)
    np.testing.assert_allclose(scored[inside.units], values / values.mean(), rtol=1e-5)


# ---- class profiles --------------------------------------------------------------------------------------------------


def stem_profile(model: onnx.ModelProto) -> sfp_onnx.LayerProfile:
    """That of the only tensor that reads the stem's channels."""
    analysis = sfp_onnx.inspect(model)
    data = sfp_onnx.data_for(analysis.model, {"x": DATA, "labels": LABELS})
    assert data is not None
    found = sfp_onnx.class_profiles(analysis, data, sfp_onnx.ProfileOptions(loss=True))
    return next(layer for layer in found.layers if layer.tensor == "read")


@pytest.mark.parametrize("name", ["sfp", "sfp-rms", "sfp-clusters", "probe-drop"])
def test_scores_of_class_profiles(name: str) -> None:
    own = stem_profile(chain())
    assert own.loss_ratio is not None and len(own.units) == WIDTH
    if name == "probe-drop":
        np.testing.assert_allclose(stem_scores(chain(), name), own.loss_ratio, rtol=1e-9)
        return
    values = []
    for matrix, clusters in zip(own.matrices.astype(np.float64), own.clusters, strict=True):
        inside = sum(matrix[a, b] for cluster in clusters for a in cluster for b in cluster)
        values.append({"sfp": matrix.max(), "sfp-rms": np.sqrt((matrix**2).mean()), "sfp-clusters": inside}[name])
    np.testing.assert_allclose(stem_scores(chain(), name), np.array(values) / np.mean(values), rtol=1e-5)


def test_joined_scores_are_mean_ranks_within_each_group() -> None:
    model = chain()
    analysis = sfp_onnx.inspect(model)
    data = sfp_onnx.data_for(analysis.model, {"x": DATA, "labels": LABELS})
    joined = sfp_onnx.score(analysis, "sfp+contribution", data)
    parts = [sfp_onnx.score(analysis, name, data) for name in ("sfp", "contribution")]
    for group in analysis.coupling.groups:
        ranks = [(np.argsort(np.argsort(own[group.units])) + 1) / group.width for own in parts]
        np.testing.assert_allclose(joined[group.units], (ranks[0] + ranks[1]) / 2)


def test_any_scores_join_and_what_they_say_is_put_together() -> None:
    analysis = sfp_onnx.inspect(chain())
    data = sfp_onnx.data_for(analysis.model, {"x": DATA})
    joined = sfp_onnx.scored(analysis, "bandit:sar+obs+sfp,pulls=2", data)
    assert joined.name == "bandit:sar+obs+sfp,pulls=2" and not joined.errors and joined.values.shape == (analysis.coupling.units,)
    assert joined.details is not None and any("argmax" in note for note in joined.notes)
    assert {"arms/pulls", "layer_names", "0/matrices"} <= {name for name, _ in joined.arrays()}


@pytest.mark.parametrize("text", ["sfp+sfp-rms+sfp-clusters+probe-drop", "probe-drop+sfp", "activation+apoz+contribution"])
def test_data_are_run_once_for_scores_that_are_asked_for_together(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sfp_onnx.methods.sfp import profiles
    from sfp_onnx.scores import statistics

    runs: list[str] = []
    for room in (profiles, statistics):
        monkeypatch.setattr(room, "observe", lambda *rest, real=room.observe, room=room: runs.append(room.__name__) or real(*rest))
    scores(chain(), text)
    assert len(runs) == 1


# ---- a score of one's own --------------------------------------------------------------------------------------------

ONE_FILE = '''
import numpy as np
from sfp_onnx.scores.scoring import score, statistic
from sfp_onnx.scores.weights import per_unit, readers

@statistic("fourths")
def fourths(editor, tensor, name):
    square = editor.append("Mul", [tensor, tensor], name=f"{name}/squared")
    return editor.append("Mul", [square, square], name=f"{name}/fourth")

@score("kurtosis", "fourth moment of the activation over its squared second", "ours", {"squares", "fourths"})
def kurtosis(view, setting):
    total = np.zeros(view.width)
    for (weights, rms), (_, fourth) in zip(readers(view, "squares"), readers(view, "fourths"), strict=True):
        total += per_unit(weights.unit, fourth / np.maximum(rms**4, 1e-12), view.width)
    return total
'''


def test_a_score_with_a_new_statistic_takes_one_small_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kurtosis, against plain numpy; then a model is pruned by it."""
    (tmp_path / "peaked.py").write_text(ONE_FILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        __import__("peaked")
        read = activations(chain(), "read")
        expected = (read**4).mean((0, 2, 3)) / (read**2).mean((0, 2, 3)) ** 2
        np.testing.assert_allclose(stem_scores(chain(), "kurtosis"), expected, rtol=1e-4)
        analysis = sfp_onnx.inspect(chain())
        data = sfp_onnx.data_for(analysis.model, {"x": DATA, "labels": LABELS})
        pruned = sfp_onnx.prune(analysis, sfp_onnx.PlanOptions(ratio=0.5), "kurtosis+apoz", data)
        assert pruned.plan.options["score"] == "kurtosis+apoz" and any(group.remove for group in pruned.plan.groups)
        alone = sfp_onnx.plan(analysis, sfp_onnx.PlanOptions(ratio=0.5), "kurtosis", data)
        stem = next(group for group in alone.groups if group.width == WIDTH)
        assert sorted(stem.remove) == sorted(np.argsort(expected)[: len(stem.remove)].tolist())
    finally:
        SCORES.pop("kurtosis", None)
        STATISTICS.pop("fourths", None)
        sys.modules.pop("peaked", None)
