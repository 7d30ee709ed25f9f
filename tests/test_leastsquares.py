"""Streamed least squares and backward elimination against brute force."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import numpy as np
import pytest

from sfp_onnx.repair import ridge as ridge_room
from sfp_onnx.repair.linear import Gathered, Joint, Normal, Samples, positive_inverse, positive_solve, positive_solves, together
from sfp_onnx.repair.ridge import LOOKS, MOST_GAIN, Scatter, as_varied, best_ridge, best_steps, mean_shift, ridge_inverse, solve
from sfp_onnx.scores import elimination
from sfp_onnx.scores.elimination import Order, Reader, eliminate

BLOCKS, ROWS, INPUTS, OUTPUTS = 3, 60, 6, 4


def reader(covariance: np.ndarray, weights: np.ndarray, unit: np.ndarray, scale: float, ridge: float) -> Reader:
    """A reader from the covariance (k, k) of its inputs and its weights (k, o)."""
    strength = ridge * float(np.diag(covariance).mean())
    return Reader(positive_inverse(covariance.copy(), strength), weights.astype(np.float64), unit.copy(), scale)


def problem(seed: int = 0, rows: int = ROWS) -> tuple[np.ndarray, np.ndarray]:
    """Rows (g, n, k) with means other than zero and correlated columns, errors (g, n, o) that partly follow from them."""
    generator = np.random.default_rng(seed)
    p = generator.standard_normal((BLOCKS, rows, INPUTS)) @ generator.standard_normal((BLOCKS, INPUTS, INPUTS)) + 2
    e = p @ generator.standard_normal((BLOCKS, INPUTS, OUTPUTS)) / 4 + generator.standard_normal((BLOCKS, rows, OUTPUTS)) + 1
    return p, e


def summed(p: np.ndarray, e: np.ndarray, parts: int = 1) -> Normal:
    sums = Normal.empty(len(p), p.shape[2], e.shape[2])
    for rows, errors in zip(np.array_split(p, parts, 1), np.array_split(e, parts, 1), strict=True):
        sums.update(rows, errors)
    return sums


def brute(p: np.ndarray, e: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Ridge by augmented rows, the bias by a column of ones that is not penalised."""
    inputs = p.shape[1]
    rows = np.block([[p, np.ones((len(p), 1))], [np.sqrt(strength) * np.eye(inputs), np.zeros((inputs, 1))]])
    wanted = np.concatenate([e, np.zeros((inputs, e.shape[1]))])
    found = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    return found[:-1], found[-1]


def strength_of(p: np.ndarray, ridge: float) -> float:
    """The ridge is relative to the mean of the diagonal of C."""
    return ridge * float(np.square(p - p.mean(0)).sum(0).mean())


@pytest.mark.parametrize("ridge", [1e-4, 1e-3, 0.1, 10.0])
def test_solve_against_lstsq(ridge: float) -> None:
    p, e = problem()
    change, bias = solve(summed(p, e), ridge)
    for block in range(BLOCKS):
        own = p[block].astype(np.float64)
        expected = brute(own, e[block], strength_of(own, ridge))
        np.testing.assert_allclose(change[block], expected[0], rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(bias[block], expected[1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("ridge", [1e-3, 0.1])
def test_masked_solve_against_lstsq_of_each_column(ridge: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge_room, "CG_TOLERANCE", 1e-6)
    p, e = problem(1)
    mask = np.random.default_rng(2).random((BLOCKS, INPUTS, OUTPUTS)) < 0.6
    mask[0, :, 0] = False  # a column without any weight
    change, bias = solve(summed(p, e), ridge, mask)
    assert (change[~mask] == 0).all()
    for block in range(BLOCKS):
        own = p[block].astype(np.float64)
        for column in range(OUTPUTS):
            rows = mask[block, :, column]
            expected = brute(own[:, rows], e[block][:, [column]], strength_of(own, ridge))
            np.testing.assert_allclose(change[block, rows, column], expected[0][:, 0], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(bias[block, column], expected[1][0], rtol=1e-4, atol=1e-5)


def test_a_full_mask_is_no_mask() -> None:
    sums = summed(*problem())
    for own, other in zip(solve(sums, 0.1), solve(sums, 0.1, np.ones((BLOCKS, INPUTS, OUTPUTS), bool)), strict=True):
        np.testing.assert_array_equal(own, other)


def test_masked_solve_of_a_badly_conditioned_problem() -> None:
    """Conjugate gradients stop early, but not far from what is there to win."""
    generator = np.random.default_rng(3)
    p = (generator.standard_normal((1, 400, 40)) * np.logspace(0, -3, 40)).astype(np.float32)
    p[:, :, 1:] += p[:, :, :1]
    e = (p @ generator.standard_normal((1, 40, 3))).astype(np.float32)
    mask = generator.random((1, 40, 3)) < 0.7
    sums = summed(p, e)
    won = sums.error(*solve(sums, 1e-4, mask))
    best = 0.0
    for column in range(3):
        rows = mask[0, :, column]
        own = p[0].astype(np.float64)
        change, bias = brute(own[:, rows], e[0][:, [column]], strength_of(own, 1e-4))
        best += float(np.square(e[0][:, [column]] - own[:, rows] @ change - bias).sum())
    assert won <= best + 1e-3 * float(sums.squares.sum())


@pytest.mark.parametrize("ridge", [1e-2, 0.1])
def test_single_precision_of_wide_layers_is_enough(ridge: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of the change is that of double precision, on features of very different sizes."""
    generator = np.random.default_rng(5)
    p = (generator.standard_normal((1, 300, 50)) * np.logspace(-2, 3, 50)).astype(np.float32)
    e = (p @ generator.standard_normal((1, 50, 4)) * 1e-8).astype(np.float32)
    sums, mask = summed(p, e), generator.random((1, 50, 4)) < 0.5
    double = sums.error(*solve(sums, ridge, mask))
    monkeypatch.setattr(ridge_room, "WIDE", 1)
    single = sums.error(*solve(sums, ridge, mask))
    assert single == pytest.approx(double, rel=1e-3) and double < 0.9 * sums.squares.sum()


def test_steps_are_chosen_by_other_rows() -> None:
    """Of noise the fewest steps are taken, of what is there to learn as many as are left, and the error is the one that is reported."""
    generator = np.random.default_rng(6)
    p = (generator.standard_normal((1, 100, 80)) * np.logspace(0, -2, 80)).astype(np.float32)
    mask = generator.random((1, 80, 3)) < 0.8
    noise = generator.standard_normal((1, 100, 3)).astype(np.float32)
    fit, held = summed(p[:, :70], noise[:, :70]), summed(p[:, 70:], noise[:, 70:])
    steps, error = best_steps(fit, held, 1e-4, mask)
    assert steps == LOOKS[0] and error == pytest.approx(held.error(*solve(fit, 1e-4, mask, steps)))
    weights = np.where(mask[0], generator.standard_normal((80, 3)), 0)
    e = (p @ weights).astype(np.float32)
    fit, held = summed(p[:, :90], e[:, :90]), summed(p[:, 90:], e[:, 90:])
    steps, error = best_steps(fit, held, 1e-6, mask)
    assert steps > LOOKS[1] and error == pytest.approx(held.error(*solve(fit, 1e-6, mask, steps)), rel=1e-3)
    assert error < held.error(*solve(fit, 1e-6, mask, LOOKS[0]))


def test_adding_no_rows_changes_nothing() -> None:
    sums, (p, e) = summed(*problem()), problem(1)
    before = sums.gram.copy()
    sums.update(p[:, :0], e[:, :0])
    assert sums.count == ROWS and (sums.gram == before).all()


@pytest.mark.parametrize("kind", ["dead", "double", "few", "one", "constant", "zero"])
@pytest.mark.parametrize("masked", [False, True])
def test_rank_deficient_grams(kind: str, masked: bool) -> None:
    """Finite, no worse than nothing, and dead inputs keep their weights."""
    p, e = problem(4, {"few": 3, "one": 1}.get(kind, ROWS))
    p, e = p.astype(np.float32), e.astype(np.float32)
    if kind == "dead":
        p[:, :, 2] = 0
    elif kind == "double":
        p[:, :, 3] = p[:, :, 1]
    elif kind == "constant":
        p[:] = np.float32(1e3) * p[:, :1]
    elif kind == "zero":
        p[:] = 0
    mask = None
    if masked:
        mask = np.ones((BLOCKS, INPUTS, OUTPUTS), bool)
        mask[:, 0, 0] = False
    sums = summed(p, e)
    change, bias = solve(sums, 1e-3, mask)
    assert np.isfinite(change).all() and np.isfinite(bias).all() and np.abs(change).max() < 1e3
    nothing = sums.error(np.zeros_like(change), np.zeros_like(bias))
    assert sums.error(change, bias) <= sums.error(*mean_shift(sums)) * (1 + 1e-6) + 1e-3 <= nothing + 1e-3
    if kind == "dead":
        np.testing.assert_allclose(change[:, 2], 0, atol=1e-9)
    elif kind == "double" and not masked:  # equal inputs share the change
        np.testing.assert_allclose(change[:, 3], change[:, 1], rtol=1e-3, atol=1e-4)
    elif kind == "zero":
        np.testing.assert_allclose(bias, e.mean(1), rtol=1e-5)


def test_error_is_that_of_the_residuals() -> None:
    p, e = problem(5)
    generator = np.random.default_rng(6)
    change, bias = generator.standard_normal((BLOCKS, INPUTS, OUTPUTS)), generator.standard_normal((BLOCKS, OUTPUTS))
    expected = np.square(e - p.astype(np.float64) @ change - bias[:, None]).sum()
    assert summed(p, e).error(change, bias) == pytest.approx(expected, rel=1e-5)
    assert summed(p, e).error(np.zeros_like(change), np.zeros_like(bias)) == pytest.approx(np.square(e).sum(), rel=1e-5)


def test_a_fit_gets_the_variance_of_its_target() -> None:
    """What rows cannot tell of a target is made up for by a gain, which ends where they tell nothing."""
    random = np.random.default_rng(5)
    p, weight = random.standard_normal((1, 4000, 6)), random.standard_normal((1, 6, 3))
    target = p @ weight + random.standard_normal((1, 4000, 3)) * [0.0, 2.0, 100.0] + 3
    present = 0.7 * weight
    sums = summed(p, target - p @ present)
    change, bias = as_varied(sums, present, solve(sums, 1e-6), target.var(1))
    made = p @ (present + change) + bias[:, None]
    np.testing.assert_allclose(made.var(1)[:, :2], target.var(1)[:, :2], rtol=1e-2)
    np.testing.assert_allclose(made.mean(1), target.mean(1), atol=1e-2)
    plain = p @ (present + solve(sums, 1e-6)[0])
    np.testing.assert_allclose(made.std(1)[:, 2], MOST_GAIN * plain.std(1)[:, 2], rtol=1e-3)
    assert plain.var(1)[0, 1] < 0.8 * target.var(1)[0, 1]


def test_mean_shift_is_the_mean_error() -> None:
    p, e = problem(7)
    change, bias = mean_shift(summed(p, e))
    assert change.shape == (BLOCKS, INPUTS, OUTPUTS) and not change.any()
    np.testing.assert_allclose(bias, e.mean(1), rtol=1e-5)


def test_sums_of_parts_are_the_sums_of_all() -> None:
    p, e = problem(8)
    whole = summed(p, e)
    first, second = summed(p[:, :25], e[:, :25]), summed(p[:, 25:], e[:, 25:], 3)
    for both in (summed(p, e, 7), deepcopy(first).absorb(second), deepcopy(second).absorb(first)):
        assert both.count == whole.count == ROWS
        for name in ("gram", "cross", "rows", "errors", "squares"):
            np.testing.assert_allclose(getattr(both, name), getattr(whole, name), rtol=1e-4, atol=1e-3)
    for name in ("gram", "cross"):
        assert getattr(whole, name).dtype == np.float64
    np.testing.assert_array_equal(deepcopy(first).absorb(Normal.empty(BLOCKS, INPUTS, OUTPUTS)).gram, first.gram)
    single, own = summed(p[:1], e[:1]), Normal.empty(1, INPUTS, OUTPUTS)
    deepcopy(own).absorb(own)
    np.testing.assert_allclose(single.gram, whole.gram[:1], rtol=1e-5)


def test_no_rows_change_nothing() -> None:
    change, bias = solve(Normal.empty(BLOCKS, INPUTS, OUTPUTS), 1e-3)
    assert not change.any() and not bias.any()


def test_best_ridge_is_judged_on_other_rows() -> None:
    """Few rows of noise: the strongest ridge. Many rows of a plain dependence: the weakest."""
    ridges = (1e-4, 1e-1, 1e2)
    generator = np.random.default_rng(9)
    p = generator.standard_normal((1, 8, 6)).astype(np.float32)
    noise, other = (generator.standard_normal((1, 8, 2)).astype(np.float32) for _ in range(2))
    held = summed(generator.standard_normal((1, 8, 6)).astype(np.float32), other)
    ridge, error = best_ridge(summed(p, noise), held, ridges)
    assert ridge == 1e2 and error == held.error(*solve(summed(p, noise), 1e2))
    p = generator.standard_normal((1, 200, 6)).astype(np.float32)
    e = (p @ generator.standard_normal((6, 2))).astype(np.float32)
    assert best_ridge(summed(p[:, :100], e[:, :100]), summed(p[:, 100:], e[:, 100:]), ridges)[0] == 1e-4


# ---- backward elimination --------------------------------------------------------------------------------------------


class Brute:
    """A reader that solves anew after every removal: min over x of tr (x - w)' C (x - w) + strength |x - w|^2, x = 0 on removed rows."""

    def __init__(self, covariance: np.ndarray, weights: np.ndarray, unit: np.ndarray, scale: float, ridge: float) -> None:
        self.matrix = covariance + ridge * np.diag(covariance).mean() * np.eye(len(covariance))
        self.weights, self.unit, self.scale = weights, unit, scale

    def error(self, removed: Sequence[int]) -> float:
        gone = np.isin(self.unit, list(removed))
        half = np.linalg.cholesky(self.matrix).T  # |half (x - w)|^2
        found = np.zeros_like(self.weights)
        if not gone.all():
            found[~gone] = np.linalg.lstsq(half[:, ~gone], half @ self.weights, rcond=None)[0]
        return float(np.square(half @ (found - self.weights)).sum() / self.scale)


def brute_elimination(readers: Sequence[Brute], width: int) -> tuple[list[int], list[float]]:
    removed: list[int] = []
    errors = [0.0]
    while len(removed) < width:
        left = [unit for unit in range(width) if unit not in removed]
        costs = [sum(own.error([*removed, unit]) for own in readers) for unit in left]
        removed.append(left[int(np.argmin(costs))])
        errors.append(min(costs))
    return removed, errors


def readers_of(seed: int, count: int, width: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, float, float]]:
    """Layers of one to three rows per unit (in any order), some with rows of no unit of the group, of different scales."""
    generator = np.random.default_rng(seed)
    found = []
    for number in range(count):
        unit = np.repeat(np.arange(width), 1 + number)
        if number % 2:
            unit = np.concatenate([unit, [-1, -1]])
        unit = generator.permutation(unit)
        samples = generator.standard_normal((4 * len(unit), len(unit))) @ generator.standard_normal((len(unit), len(unit)))
        covariance = np.cov(samples.T)
        found.append((covariance, generator.standard_normal((len(unit), 3)), unit, float(generator.uniform(0.5, 20)), 1e-3))
    return found


def left(order: Order) -> tuple[np.ndarray, np.ndarray]:
    return order.units, order.added


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [1, 2, 3])
def test_elimination_against_solving_anew(seed: int, count: int) -> None:
    width = 6
    cases = readers_of(seed, count, width)
    order, added = left(eliminate([reader(*case) for case in cases], width))
    expected, errors = brute_elimination([Brute(*case) for case in cases], width)
    assert order.tolist() == expected
    np.testing.assert_allclose(added, np.maximum.accumulate(np.diff(errors)), rtol=1e-6)
    own, brute = reader(*cases[0]), Brute(*cases[0])
    np.testing.assert_allclose(own.costs(np.arange(width)), [brute.error([unit]) for unit in range(width)], rtol=1e-6)


def test_units_removed_together_cost_what_both_cost() -> None:
    case = readers_of(5, 2, 6)[1]
    own, brute = reader(*case), Brute(*case)
    assert own.remove(np.array([1, 4])) == pytest.approx(brute.error([1, 4]), rel=1e-6)
    assert own.remove(np.array([0])) == pytest.approx(brute.error([0, 1, 4]) - brute.error([1, 4]), rel=1e-6)
    assert own.remove(np.array([4])) == 0


def test_wide_groups_lose_several_units_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elimination, "PASSES", 4)
    cases = readers_of(6, 2, 10)
    order, added = left(eliminate([reader(*case) for case in cases], 10))
    assert sorted(order) == list(range(10)) and (np.diff(added) >= 0).all()
    brutes = [Brute(*case) for case in cases]
    first = np.argsort([sum(own.error([unit]) for own in brutes) for unit in range(10)])[:3]  # ten in four passes
    assert set(order[:3]) == set(first)
    assert 3 * added[0] == pytest.approx(sum(own.error(first) for own in brutes), rel=1e-6)


def test_a_copy_leaves_first_and_for_free() -> None:
    """One of two equal inputs costs nothing; afterwards the other one is precious."""
    generator = np.random.default_rng(7)
    x = generator.standard_normal((500, 4))
    x = np.concatenate([x, x[:, 2:3]], 1)
    weights = generator.standard_normal((5, 3)) + 3
    order, added = left(eliminate([reader(np.cov(x.T), weights, np.arange(5), 1.0, 1e-6)], 5))
    assert order[0] in (2, 4) and set(order[1:]) == set(range(5)) - {order[0]}
    assert added[0] < 1e-3 < added[1]


def test_looks_show_the_weights_of_those_that_are_left() -> None:
    cases = readers_of(8, 2, 6)
    order = eliminate([reader(*case) for case in cases], 6, (0.75, 0.5))
    assert list(order.looks) == [4, 3]
    for kept, weights in order.looks.items():
        removed = order.units[: 6 - kept].tolist()
        assert sum(Brute(*case).error(removed) for case in cases) == pytest.approx(order.errors[kept], rel=1e-6)
        for (covariance, old, unit, scale, ridge), new in zip(cases, weights, strict=True):
            assert not new[np.isin(unit, removed)].any() and new[~np.isin(unit, removed)].all()
            matrix = covariance + ridge * np.diag(covariance).mean() * np.eye(len(covariance))
            error = np.trace((new - old).T @ matrix @ (new - old)) / scale
            assert error == pytest.approx(Brute(covariance, old, unit, scale, ridge).error(removed), rel=1e-6)


# ---- few samples -----------------------------------------------------------------------------------------------------


def shrunk(parts: np.ndarray) -> float:
    """Ledoit and Wolf's share of samples (n, rows, k), from its definition."""
    centred = parts - parts.mean((0, 1))
    moments = np.stack([rows.T @ rows / len(rows) for rows in centred])
    covariance = moments.mean(0)
    size, count = len(covariance), len(parts)
    noise = np.square(moments - covariance).sum() / (count * (count - 1))
    return float(noise / np.square(covariance - np.trace(covariance) / size * np.eye(size)).sum())


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("count", [6, 40])
def test_what_few_samples_leave_unknown(count: int, rows: int) -> None:
    """In batches, from sums or from the rows themselves, with a first batch that is off the mean."""
    generator = np.random.default_rng(2)
    parts = (generator.standard_normal((count, rows, 12)) @ generator.standard_normal((12, 12))).astype(np.float32) + 2
    parts[:2] += 0.2
    expected = shrunk(parts.astype(np.float64))
    assert 0 < expected < 1
    flat = parts.reshape(1, -1, 12)
    for sums in (summed(flat, flat), Samples(flat, flat)):
        scatter = Scatter()
        for batch in np.split(parts, 2):
            scatter.add(batch.reshape(1, -1, 12), len(batch))
        inverse = next(iter(ridge_inverse(sums, 1e-3, scatter)))
        assert scatter.shares == [pytest.approx(expected, rel=0.1)]
        expected = scatter.shares[0]
        covariance = np.cov(flat[0].T, bias=True)
        matrix = (1 - expected) * covariance + expected * np.diag(covariance).mean() * np.eye(12)
        np.testing.assert_allclose(inverse @ matrix, np.eye(12), atol=2e-3)


def test_one_sample_tells_nothing_of_others() -> None:
    scatter = Scatter()
    scatter.add(np.ones((1, 5, 3), np.float32), 1)
    assert scatter.share(0, np.eye(3), 1.0, 0.0) == 0


def test_few_rows_do_not_look_like_few_needed_channels() -> None:
    """60 inputs, 30 samples: fitted to those, 30 inputs leave no error at all; on others a lot, and so the curve says."""
    generator = np.random.default_rng(3)
    p = generator.standard_normal((2000, 20)) @ generator.standard_normal((20, 60)) + 2 * generator.standard_normal((2000, 60))
    few, weights = p[None, :30].astype(np.float32), generator.standard_normal((60, 20))
    orders = []
    for scatter in (Scatter(), None):
        if scatter is not None:
            scatter.add(few, 30)
        inverse = next(iter(ridge_inverse(Samples(few, np.zeros((1, 30, 1), np.float32)), 1e-3, scatter)))
        orders.append(eliminate([Reader(inverse, weights.copy(), np.arange(60), float((p @ weights).var(0).sum()))], 60))
    kept, gone = orders[0].units[30:], orders[0].units[:30]
    covariance, rows = np.cov(few[0].T, bias=True), p[30:]
    matrix = covariance[np.ix_(kept, kept)] + 0.1 * np.diag(covariance).mean() * np.eye(30)
    change = np.linalg.solve(matrix, covariance[np.ix_(kept, gone)] @ weights[gone])
    outside = np.square(rows[:, gone] @ weights[gone] - rows[:, kept] @ change).sum() / np.square(rows @ weights).sum()
    assert outside > 0.2 and orders[0].errors[30] == pytest.approx(outside, rel=0.3)
    assert orders[1].errors[30] < 0.01 * outside


def test_no_variance_at_all() -> None:
    order, added = left(eliminate([reader(np.zeros((3, 3)), np.ones((3, 2)), np.arange(3), 1.0, 1e-3)], 3))
    assert order.tolist() == [0, 1, 2] and np.isfinite(added).all() and (added < 1e-6).all()
    assert isinstance(reader(np.eye(2), np.ones((2, 1)), np.arange(2), 1.0, 1e-3), Reader)


# ---- kinds of sums ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("ridge", [1e-2, 1e-1])
def test_few_rows_give_the_same_change_as_their_sums(centre: bool, ridge: float) -> None:
    """The dual problem: 5 rows of 40 inputs."""
    generator = np.random.default_rng(1)
    p, e = (generator.standard_normal((2, 5, size)).astype(np.float32) + 1 for size in (40, 3))
    samples, sums = Samples(p, e, centre), summed(p, e)
    sums = sums if centre else sums.without_means()
    for own, other in zip(solve(samples, ridge), solve(sums, ridge), strict=True):
        np.testing.assert_allclose(own, other, rtol=2e-3, atol=5e-4)  # that of the sums has float32 products
    change, bias = solve(sums, ridge)
    assert samples.error(change, bias) == pytest.approx(sums.error(change, bias), rel=1e-3, abs=1e-3)
    for own, other in zip(ridge_inverse(samples, ridge), ridge_inverse(sums, ridge), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-3, atol=1e-3 * np.abs(other).max())


@pytest.mark.parametrize("pieces", [1, 7, 60])
@pytest.mark.parametrize("rows", [3, 5, 6, 60])
def test_gathered_rows_become_sums_where_there_are_enough(pieces: int, rows: int) -> None:
    p, e = problem(2, rows)
    gathered = Gathered(BLOCKS, INPUTS, OUTPUTS)
    for own, other in zip(np.array_split(p, pieces, 1), np.array_split(e, pieces, 1), strict=True):
        gathered.add(own.astype(np.float32), other.astype(np.float32))
    found = gathered.sums()
    assert isinstance(found, Samples if rows < INPUTS else Normal) and found.count == rows and found.shape == (BLOCKS, INPUTS, OUTPUTS)
    for own, other in zip(solve(found, 1e-2), solve(summed(p, e), 1e-2), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("counts", [(2, 3), (3, 40), (40, 3), (40, 50)])
def test_together(counts: tuple[int, int]) -> None:
    """Whatever kinds they are."""
    parts, whole = [], [problem(seed, count) for seed, count in enumerate(counts)]
    for p, e in whole:
        gathered = Gathered(BLOCKS, INPUTS, OUTPUTS)
        gathered.add(p.astype(np.float32), e.astype(np.float32))
        parts.append(gathered.sums())
    found = solve(together(*parts), 1e-2)
    expected = solve(summed(*(np.concatenate([first, second], 1) for first, second in zip(*whole, strict=True))), 1e-2)
    for own, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-3, atol=1e-4)


def test_joint_sums_share_the_weight_and_not_the_bias() -> None:
    """Against one problem with an indicator column per use, which the ridge leaves alone."""
    (p, e), (q, f) = problem(1), problem(2, 30)
    f = f + 5
    change, bias = solve(Joint((summed(p, e), summed(q, f))), 1e-3)
    assert bias.shape == (2, BLOCKS, OUTPUTS)
    for block in range(BLOCKS):
        rows = np.concatenate([p[block] - p[block].mean(0), q[block] - q[block].mean(0)])
        errors = np.concatenate([e[block] - e[block].mean(0), f[block] - f[block].mean(0)])
        strength = 1e-3 * float(np.square(rows).sum(0).mean())
        expected = np.linalg.solve(rows.T @ rows + strength * np.eye(INPUTS), rows.T @ errors)
        np.testing.assert_allclose(change[block], expected, rtol=1e-5, atol=1e-7)
        for use, (own, other) in enumerate(((p, e), (q, f))):
            np.testing.assert_allclose(bias[use, block], other[block].mean(0) - own[block].mean(0) @ expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [1, 5, 127, 128, 129, 300])
def test_cholesky_against_numpy(size: int) -> None:
    generator = np.random.default_rng(size)
    half = generator.standard_normal((size, 2 * size))
    matrix, right = half @ half.T, generator.standard_normal((size, 3))
    loaded = matrix + 0.5 * np.eye(size)
    np.testing.assert_allclose(positive_solve(matrix.copy(), right, 0.5), np.linalg.solve(loaded, right), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(positive_inverse(matrix.copy(), 0.5), np.linalg.inv(loaded), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("size", [1, 9, 200])
@pytest.mark.parametrize("bad", [False, True])
def test_many_systems_at_once(size: int, bad: bool) -> None:
    """As one by one, to the bit; also where one of them needs more strength than it is given."""
    generator = np.random.default_rng(size)
    half, right = generator.standard_normal((3, size, 2 * size)), generator.standard_normal((3, size, 2))
    matrices, strengths = half @ half.transpose(0, 2, 1), np.array([0.5, 0.0, 1e-3])
    matrices[1] *= -1e-9 if bad else 1
    single = [positive_solve(*problem) for problem in zip(matrices.copy(), right, strengths.tolist(), strict=True)]
    np.testing.assert_array_equal(positive_solves(matrices.copy(), right, strengths), single)


@pytest.mark.parametrize("summed", [False, True])
def test_spread_is_the_variance_of_the_products(summed: bool) -> None:
    generator = np.random.default_rng(0)
    rows, weight = generator.standard_normal((2, 30, 8)).astype(np.float32) + 3, generator.standard_normal((2, 8, 5))
    sums = Samples(rows, np.zeros((2, 30, 0), np.float32))
    np.testing.assert_allclose((sums.summed() if summed else sums).spread(weight), (rows @ weight).var(1), rtol=1e-4)


def test_a_matrix_that_rounding_made_indefinite_takes_more_ridge() -> None:
    matrix = np.diag([1.0, 1.0, -1e-9])
    assert np.isfinite(positive_solve(matrix.copy(), np.ones((3, 1)), 1e-12)).all()
