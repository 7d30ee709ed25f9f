"""Probes, fields and clusters on plain arrays, against other programs and loops that read the definition."""

from __future__ import annotations

from functools import cache
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from conftest import jaccard
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from sfp_onnx.methods.sfp import probe as probe_room
from sfp_onnx.methods.sfp.probe import (
    PROBES,
    Samples,
    accuracy,
    by_filter,
    fields,
    label_sets,
    loss_ratios,
    ridge,
    softmax_sgd,
    thresholded,
)
from sfp_onnx.scores.scoring import combined

CLASSES, FILTERS, POSITIONS = 10, 24, 4
COLUMNS = np.repeat(np.arange(FILTERS), POSITIONS)


@cache
def features(count: int = 3000, seed: int = 0) -> Samples:
    """Rectified filters, each of which answers to some of the labels; about nine of ten samples can be told."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, count)
    likes = np.random.default_rng(9).random((CLASSES, FILTERS)) < 0.25
    where = np.random.default_rng(8).uniform(0.2, 1, (CLASSES, FILTERS, POSITIONS))
    values = (likes[:, :, None] * where)[labels] + 0.7 * random.standard_normal((count, FILTERS, POSITIONS)) - 0.1
    return Samples(np.maximum(values, 0).reshape(count, -1).astype(np.float32), labels, np.arange(count))


def sets_of(weights: np.ndarray, data: Samples | None = None) -> np.ndarray:
    data = data or features()
    means = np.stack([data.features[data.labels == label].mean(0) for label in range(CLASSES)], 1)
    return label_sets(by_filter(means, COLUMNS), by_filter(weights, COLUMNS)).label_sets


def assert_agree(weights: np.ndarray, data: Samples) -> None:
    """The same accuracy on new samples to a point, and nearly the same label sets, as softmax SGD."""
    own, new = softmax_sgd(data, CLASSES), features(4000, seed=1)
    first, second = accuracy(new, own), accuracy(new, weights)
    assert 0.8 < first < 0.99 and abs(first - second) <= 0.01
    agreement = jaccard(sets_of(own, data), sets_of(weights, data))
    shuffled = jaccard(sets_of(own, data), np.random.default_rng(0).permutation(sets_of(weights, data).T).T)
    assert agreement >= 0.8 and shuffled < 0.5


# ---- probes ----------------------------------------------------------------------------------------------------------


def test_softmax_sgd_against_pytorch() -> None:
    """PyTorch's own linear layer (random start), loss and optimiser, other order of samples."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    torch.manual_seed(3)
    torch.set_num_threads(1)
    data = features()
    layer = torch.nn.Linear(data.features.shape[1], CLASSES, bias=False)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.975, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.975)
    x, y = torch.from_numpy(data.features), torch.from_numpy(data.labels)
    for _ in range(12):
        for rows in torch.randperm(len(y)).split(100):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(layer(x[rows]), y[rows]).backward()
            optimiser.step()
        schedule.step()
    assert_agree(layer.weight.detach().numpy().T, data)


@pytest.mark.parametrize("decay", [1e-3, 0.5])
def test_steps_are_pytorchs_steps(decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same start on one batch of all samples: equal to rounding. A large weight decay, because 12 steps hide a small one."""
    monkeypatch.setattr(probe_room, "WEIGHT_DECAY", decay)
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    whole = features()
    data = Samples(whole.features[:60], whole.labels[:60], np.arange(60))
    layer = torch.nn.Linear(data.features.shape[1], CLASSES, bias=False)
    torch.nn.init.zeros_(layer.weight)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.975, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.975)
    for _ in range(12):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(layer(torch.from_numpy(data.features)), torch.from_numpy(data.labels)).backward()
        optimiser.step()
        schedule.step()
    np.testing.assert_allclose(softmax_sgd(data, CLASSES), layer.weight.detach().numpy().T, rtol=1e-4, atol=1e-6)


def test_softmax_sgd_against_scikit_learn() -> None:
    """Its converged optimum of the same loss; with many samples the twelve epochs come close to it."""
    linear: Any = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    data = features(12000)
    model = linear.LogisticRegression(fit_intercept=False, C=1 / (1e-3 * len(data.labels)), max_iter=1000)
    assert_agree(model.fit(data.features, data.labels).coef_.T, data)


def test_ridge_is_the_minimum_and_its_dual_form_the_same() -> None:
    """(X^T X + lambda I) W = X^T Y, with more samples than features and with fewer."""
    whole = features()
    for count in (400, 40):
        data = Samples(whole.features, whole.labels, np.arange(count))
        x, y = whole.features[:count].astype(np.float64), np.eye(CLASSES)[whole.labels[:count]] - 1 / CLASSES
        gram = x.T @ x
        expected = np.linalg.inv(gram + np.eye(len(gram)) * np.diag(gram).mean()) @ x.T @ y
        np.testing.assert_allclose(ridge(data, CLASSES), expected, rtol=1e-4, atol=1e-7)


def test_the_order_of_training_follows_the_seed() -> None:
    first, again, other = (softmax_sgd(features(), CLASSES, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and jaccard(sets_of(first), sets_of(other)) >= 0.8


@pytest.mark.parametrize("probe", sorted(PROBES))
def test_fields_of_all_labels_add_up_to_zero_and_dead_features_get_no_weight(probe: str) -> None:
    whole = features()
    data = Samples(np.concatenate([whole.features, np.zeros((len(whole.labels), 2), np.float32)], 1), whole.labels, whole.rows)
    weights = PROBES[probe](data, CLASSES, 0)
    assert not weights[-2:].any() and weights[:-2].any()
    assert np.abs(weights.sum(1)).max() < 1e-4
    nothing = Samples(np.zeros((20, 3), np.float32), np.arange(20) % CLASSES, np.arange(20))
    assert not PROBES[probe](nothing, CLASSES, 0).any()


def test_loss_ratios_against_a_loop() -> None:
    whole = features()
    data = Samples(whole.features, whole.labels, np.arange(150))
    weights = softmax_sgd(whole, CLASSES)

    def loss(x: np.ndarray) -> float:
        logits = x.astype(np.float64) @ weights
        logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return float(-logs[np.arange(150), whole.labels[:150]].mean())

    expected = []
    for index in range(FILTERS):
        without = whole.features[:150].copy()
        without[:, index == COLUMNS] = 0
        expected.append(np.exp(loss(without) - loss(whole.features[:150])))
    np.testing.assert_allclose(loss_ratios(data, weights, COLUMNS), expected, rtol=1e-4)


# ---- fields ----------------------------------------------------------------------------------------------------------


def test_fields_against_a_loop_over_images() -> None:
    """The field of output k that the filter's weights give, image by image, averaged over the images of a label."""
    data = features(200)
    weights = softmax_sgd(data, CLASSES)
    total, count = np.zeros((FILTERS, CLASSES, CLASSES)), np.zeros(CLASSES)
    for image, label in zip(data.features, data.labels, strict=True):
        count[label] += 1
        for index in range(FILTERS):
            for column in np.flatnonzero(index == COLUMNS):
                total[index, label] += float(image[column]) * weights[column].astype(np.float64)
    means = np.stack([data.features[data.labels == label].mean(0, dtype=np.float64) for label in range(CLASSES)], 1)
    found = fields(by_filter(means, COLUMNS), by_filter(weights, COLUMNS))
    np.testing.assert_allclose(found, total / count[None, :, None], rtol=1e-5, atol=1e-7)


def test_features_of_a_filter_need_not_be_neighbours() -> None:
    filters = np.array([2, 0, 1, 0, 2, 2])
    found = by_filter(np.arange(12.0).reshape(6, 2), filters)
    assert found.shape == (3, 3, 2)
    np.testing.assert_array_equal(found[0], [[2, 3], [6, 7], [0, 0]])
    np.testing.assert_array_equal(found[1], [[4, 5], [0, 0], [0, 0]])
    np.testing.assert_array_equal(found[2], [[0, 1], [8, 9], [10, 11]])


# ---- clusters --------------------------------------------------------------------------------------------------------


def read_by_hand(field: np.ndarray) -> tuple[list[list[int]], int]:
    """The definition, element by element: normalise, threshold, open or join clusters in index order, count the ones outside."""
    size, top = len(field), max(value for row in field for value in row)
    ones = [[(value / top if top > 0 else value) >= 0.3 for value in row] for row in field]
    clusters: list[list[int]] = []
    for label in range(size):
        if not ones[label][label]:
            continue
        for cluster in clusters:
            if all(ones[label][other] and ones[other][label] for other in cluster):
                cluster.append(label)
                break
        else:
            clusters.append([label])
    inside = {(a, b) for cluster in clusters for a in cluster for b in cluster}
    return clusters, sum(ones[a][b] for a in range(size) for b in range(size) if (a, b) not in inside)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 7).flatmap(lambda size: arrays(np.float64, (size, size), elements=st.sampled_from([-1.0, 0.0, 0.2, 0.3, 0.5, 1.0]))))
def test_clusters_against_the_definition(field: np.ndarray) -> None:
    size = len(field)
    found = label_sets(np.eye(size)[None], field[None])  # means of one feature per label: the field is the weights
    expected, noise = read_by_hand(field.astype(np.float32).astype(np.float64))
    assert [list(own) for own in found.clusters[0]] == expected and found.noise[0] == noise
    assert set(np.flatnonzero(found.label_sets[0])) == {label for own in expected for label in own}
    binary = thresholded(field)
    for own in found.clusters[0]:
        assert binary[np.ix_(own, own)].all()


def test_a_field_without_positive_values_has_no_clusters() -> None:
    for value in (0.0, -2.0):
        found = label_sets(np.eye(4)[None], np.full((1, 4, 4), value))
        assert found.clusters == ((),) and not found.label_sets.any() and found.noise[0] == 0


def test_jaccard() -> None:
    first = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 0]], bool)
    second = np.array([[1, 0, 0], [0, 0, 0], [0, 1, 0]], bool)
    assert jaccard(first, second) == pytest.approx((0.5 + 1 + 0) / 3)


# ---- ranks -----------------------------------------------------------------------------------------------------------


def test_combined_scores_are_mean_ranks() -> None:
    first, second = np.array([5.0, 1.0, 3.0, 3.0]), np.array([0.0, 10.0, 20.0, 30.0])
    np.testing.assert_array_equal(combined([first]), first)
    np.testing.assert_allclose(combined([first, second]), np.array([4 + 1, 1 + 2, 2.5 + 3, 2.5 + 4]) / 8)
