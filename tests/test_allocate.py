"""The solver for widths: against brute force on small tables, and its pieces."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from sfp_onnx.core.errors import OptionError
from sfp_onnx.core.options import PlanOptions
from sfp_onnx.core.types import Align, FloatArray, IntArray
from sfp_onnx.planning.widths import Problem, choices, greedy, lagrangian, solve, widen


def chain(kept: IntArray) -> FloatArray:
    """Products of neighbouring widths, as in a chain of layers; blocks of 4 are paid whole."""
    paid = np.ceil(np.asarray(kept, float) / 4) * 4
    found: FloatArray = (paid[..., 1:] * paid[..., :-1]).sum(-1) + 3 * paid[..., 0]
    return found


def total(kept: IntArray) -> FloatArray:
    return np.asarray(kept, float).sum(-1)


def random_problem(seed: int, groups: int = 4, convex: bool = True) -> Problem:
    random = np.random.default_rng(seed)
    widths, errors = [], []
    for _ in range(groups):
        width, step = int(random.integers(8, 17)), int(random.choice([1, 2, 4]))
        own = choices(width, Align(step, step, step), 1, vanish=bool(random.integers(2)), most=7)
        steps = random.exponential(1, len(own) - 1)
        steps = np.sort(steps) if convex else steps
        widths.append(own)
        errors.append([0.0, *np.cumsum(steps * random.uniform(0.1, 3)).tolist()])
    full = np.asarray([own[0] for own in widths])
    bounds = [float(chain(full) * random.uniform(0.2, 0.8)), float(total(full) * random.uniform(0.4, 0.9))]
    return Problem(widths, errors, [chain, total], bounds)


def best(problem: Problem) -> float | None:
    """The least error by trying everything."""
    states = (np.asarray(state) for state in product(*(range(len(own)) for own in problem.widths)))
    found = [problem.error(state) for state in states if problem.holds(state)]
    return min(found) if found else None


@pytest.mark.parametrize("convex", [True, False])
def test_close_to_brute_force(convex: bool) -> None:
    gaps = []
    for seed in range(40):
        problem = random_problem(seed, convex=convex)
        found, least = solve(problem), best(problem)
        assert (found is None) == (least is None)
        if found is None or least is None:
            continue
        assert all(np.asarray(cost(found.kept)) <= bound * (1 + 1e-9) for cost, bound in zip(problem.costs, problem.bounds, strict=True))
        assert all(width in own for width, own in zip(found.kept, problem.widths, strict=True))
        assert found.error == pytest.approx(min(found.errors.values())) and found.error >= least - 1e-9
        gaps.append(found.error - least if least == 0 else found.error / least - 1)
    assert len(gaps) > 30
    assert np.median(gaps) < 0.02 and np.mean(gaps) < 0.12, (np.median(gaps), np.mean(gaps), max(gaps))


def test_each_method_alone_and_the_choice_between_them() -> None:
    better = {"greedy": 0, "Lagrangian": 0}
    for seed in range(40):
        problem = random_problem(seed, convex=False)
        found = solve(problem)
        if found is None:
            continue
        for name, method in (("greedy", greedy), ("Lagrangian", lagrangian)):
            state = method(problem)
            assert state is not None and problem.holds(state)
            wider = widen(problem, state)
            assert problem.holds(wider) and problem.error(wider) <= problem.error(state) + 1e-12
            assert problem.error(wider) == pytest.approx(found.errors[name])
        better[found.method] += found.errors["greedy"] != found.errors["Lagrangian"]
    assert min(better.values()) > 0  # neither is superfluous


def test_loose_bounds_remove_nothing_and_impossible_ones_are_refused() -> None:
    problem = random_problem(1)
    full = [own[0] for own in problem.widths]
    loose = solve(Problem(problem.widths, problem.errors, problem.costs, [1e9, 1e9]))
    assert loose is not None and loose.kept.tolist() == full and loose.error == 0
    assert solve(Problem(problem.widths, problem.errors, problem.costs, [1e9, 1e-9])) is None


def test_the_same_table_gives_the_same_widths() -> None:
    for seed in range(5):
        one, two = solve(random_problem(seed)), solve(random_problem(seed))
        assert (one is None) == (two is None)
        assert one is None or two is None or one.kept.tolist() == two.kept.tolist()


def test_every_channel_of_a_paid_block_is_kept() -> None:
    widths = [list(range(16, 0, -1))] * 2
    errors = [[float(index) for index in range(16)]] * 2
    found = solve(Problem(widths, errors, [chain], [float(chain(np.asarray([8, 12])))]))
    assert found is not None and all(width % 4 == 0 for width in found.kept)


def test_a_peak_that_needs_two_groups_at_once() -> None:
    def peak(kept: IntArray) -> FloatArray:
        return np.asarray(kept, float).max(-1)

    found = solve(Problem([[8, 4, 2]] * 3, [[0.0, 1.0, 5.0]] * 3, [peak], [4.0]))
    assert found is not None and found.kept.tolist() == [4, 4, 4]


def test_choices() -> None:
    assert choices(12, Align(4, 4, 4), 1) == [12, 8, 4]
    assert choices(10, Align(4, 4, 4), 1) == [10, 8, 4]
    assert choices(12, Align(4, 4, 4), 5) == [12, 8]
    assert choices(3, Align(4, 4, 4), 1) == [3] and choices(3, Align(4, 4, 4), 1, vanish=True) == [3, 0]
    assert choices(40, Align(16, 4, 16), 1) == [40, 32, 16, 12, 8, 4]
    assert choices(12, Align(16, 4, 16), 5, vanish=True) == [12, 8, 0]
    assert choices(20, Align(4, 1, 12), 9) == [20, 16, 12, 11, 10, 9]
    many = choices(512, Align(1, 1, 1), 1)
    assert len(many) == 24 and many[0] == 512 and many[-1] == 1 and many == sorted(set(many), reverse=True)


# ---- alignments ------------------------------------------------------------------------------------------------------


def test_alignments_are_read_once_and_recorded_as_written() -> None:
    written = {8: (8, 8, 8), "8": (8, 8, 8), "16:4": (16, 4, 16), "4:1:12": (4, 1, 12), None: (1, 1, 1), "auto": (1, 1, 1)}
    for text, steps in written.items():
        align = Align.parse(text)
        assert (align.block, align.fine, align.start, align.written) == (*steps, text)
        assert Align.parse(align) is align and align.symbolic == (text == "auto")
        assert PlanOptions(align=text).align == align
    assert Align.parse("none") == Align.parse(None) and str(Align.parse(None)) == "none"
    for text in ("0", "x", "16:", "1:2:3:4", -8):
        with pytest.raises(OptionError, match=f"alignment '{text}'"):
            PlanOptions(align=text)
