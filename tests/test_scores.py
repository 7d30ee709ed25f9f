"""One contract for all scores, and hand-computed values."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx.numpy_helper as nh
import pytest
from building import Builder, run, with_all_tensors

import sfp_onnx
from sfp_onnx.core.options import ScoreOptions
from sfp_onnx.core.types import LayerProfile
from sfp_onnx.coupling.analysis import Analysis
from sfp_onnx.scores.registry import SCORES

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


def scores(model: onnx.ModelProto, name: str, data: np.ndarray = DATA, **options: int) -> tuple[Analysis, np.ndarray]:
    analysis = sfp_onnx.inspect(model)
    given = sfp_onnx.data_for(analysis.model, {"x": data, "labels": LABELS}) if SCORES[name].needs else None
    return analysis, sfp_onnx.score(analysis, name, given, ScoreOptions(**options))


def stem_scores(model: onnx.ModelProto, name: str, data: np.ndarray = DATA, **options: int) -> np.ndarray:
    analysis, values = scores(model, name, data, **options)
    return values[next(group.units for group in analysis.coupling.groups if "stem" in group.producers)]


def arrays(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: nh.to_array(tensor).astype(np.float64) for tensor in model.graph.initializer}


def activations(model: onnx.ModelProto, name: str) -> np.ndarray:
    whole = with_all_tensors(model)
    return dict(zip([item.name for item in whole.graph.output], run(whole, {"x": DATA}), strict=True))[name].astype(np.float64)


# ---- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SCORES))
def test_one_finite_value_per_unit_and_the_same_twice(name: str) -> None:
    analysis, first = scores(chain(), name)
    assert first.shape == (analysis.coupling.units,) == (WIDTH + 6,) and first.dtype == np.float64
    assert np.isfinite(first).all() and (first >= 0).all()
    np.testing.assert_array_equal(first, scores(chain(), name)[1])


@pytest.mark.parametrize("name", sorted(set(SCORES) - {"random"}))
def test_permuted_channels_have_permuted_scores(name: str) -> None:
    order = np.random.default_rng(0).permutation(WIDTH)
    plain, permuted = stem_scores(chain(), name), stem_scores(chain(order=order), name)
    assert len(set(plain)) > 1
    np.testing.assert_allclose(permuted, plain[order], rtol=1e-5)


@pytest.mark.parametrize("name", sorted(set(SCORES) - {"random"}))
def test_a_dead_channel_has_the_lowest_score(name: str) -> None:
    values = stem_scores(chain(dead=5), name)
    if name == "fpgm":
        pytest.skip("fpgm ranks by distance to the other filters: a zero filter may be far from all of them")
    if name == "probe-drop":
        assert values[5] == 1
        pytest.skip("probe-drop ranks channels that the probe is better without under a dead one, which changes nothing")
    assert values.argmin() == 5 and (np.delete(values, 5) > values[5]).all()


@pytest.mark.parametrize("name", sorted(SCORES))
def test_scaling_a_layer_as_a_whole_changes_no_score(name: str) -> None:
    np.testing.assert_allclose(stem_scores(chain(scale=16.0), name), stem_scores(chain(), name), rtol=1e-6)


@pytest.mark.parametrize("name", sorted(SCORES))
def test_batch_size_and_order_of_samples_do_not_matter(name: str) -> None:
    if SCORES[name].needs:
        analysis = sfp_onnx.inspect(chain())
        found = []
        for data, labels, batch in ((DATA, LABELS, 5), (DATA[::-1], LABELS[::-1], 24)):
            given = sfp_onnx.data_for(analysis.model, {"x": np.ascontiguousarray(data), "labels": labels})
            assert given is not None
            found.append(sfp_onnx.score(analysis, name, replace(given, batch=batch)))
        # obs inverts matrices whose products are summed in float32 within a batch (and sees every position of maps as small as these)
        np.testing.assert_allclose(*found, rtol=1e-3 if name == "obs" else 1e-5)


@pytest.mark.parametrize("name", sorted(set(SCORES) - {"random"}))
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
        if own.needs:
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
    np.testing.assert_allclose(stem_scores(model, "magnitude", p=p), ((out**p + read**p) / 2) ** (1 / p), rtol=1e-6)


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
    np.testing.assert_allclose(stem_scores(model, "magnitude", p=p), (total / 4) ** (1 / p), rtol=1e-6)


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


@pytest.mark.parametrize("name", sorted(SCORES))
def test_scores_see_dequantised_weights(name: str) -> None:
    (first, own), (second, other) = (scores(dequantised(kept), name) for kept in (True, False))
    assert [group.producers for group in first.coupling.groups] == [group.producers for group in second.coupling.groups]
    assert all(layer.weight is not None for layer in first.coupling.layers)
    assert first.coupling.channels_total == second.coupling.channels_total == 8 + 6 + 7 + 5
    # onnxruntime may multiply by the integers themselves while it calibrates
    needs = SCORES[name].needs
    tolerance = 3e-2 if "profile" in needs else 1e-2 if needs else 1e-5  # a probe sees the last layers' errors several times over
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
    """contribution of a unit (one channel of each of two groups): mean over its rows of the weight's input axis."""
    b = Builder(17, 4)
    y = b.op("Relu", b.conv(b.input(["N", 3, 8, 8]), 3, 8, name="stem"), outputs=["read"])
    model = b.model(b.conv(b.op("Relu", b.conv(y, 8, 8, group=2, name="grouped")), 8, 4, name="last"))
    weight = arrays(model)[model.graph.node[2].input[1]]
    read = activations(model, "read")
    squares = (read**2).mean((0, 2, 3))
    mean_rms = np.sqrt(squares).reshape(2, 4).mean(0)
    values = mean_rms * np.sqrt((weight**2).sum((0, 2, 3)))
    np.testing.assert_allclose(stem_scores(model, "contribution"), values / values.mean(), rtol=1e-5)


# ---- class profiles --------------------------------------------------------------------------------------------------


def stem_profile(model: onnx.ModelProto) -> LayerProfile:
    """That of the only tensor that reads the stem's channels."""
    analysis = sfp_onnx.inspect(model)
    data = sfp_onnx.data_for(analysis.model, {"x": DATA, "labels": LABELS})
    assert data is not None
    found = sfp_onnx.profile(analysis, data, sfp_onnx.ProfileOptions(loss=True))
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
