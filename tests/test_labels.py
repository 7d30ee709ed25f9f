"""Arithmetic on label arrays against the naive answer."""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from sfp_onnx.rules.labels import align, blocks, compact, components, keep_varying, reshape, reshaped_size, varying, vector

FAST = settings(max_examples=150, deadline=None, derandomize=True, database=None)


@st.composite
def factored(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes of the same number of elements."""
    total = draw(st.sampled_from([1, 2, 4, 6, 8, 12, 16, 24, 36, 48]))

    def shape() -> tuple[int, ...]:
        rest, sizes = total, []
        while len(sizes) < 4 and (rest > 1 or draw(st.booleans())):
            size = rest if len(sizes) == 3 else draw(st.sampled_from([n for n in range(1, rest + 1) if rest % n == 0]))
            sizes.append(size)
            rest //= size
        return tuple([*sizes, rest] if rest > 1 else sizes)

    return shape(), shape()


@given(factored(), st.integers(0, 1000))
@FAST
def test_reshape_equals_numpy_on_the_full_array(shapes: tuple[tuple[int, ...], tuple[int, ...]], seed: int) -> None:
    old, new = shapes
    generator = np.random.default_rng(seed)
    array = generator.integers(1, 50, [size if generator.random() < 0.5 else 1 for size in old])
    result = reshape(array, old, new)
    assert result.ndim == len(new)
    np.testing.assert_array_equal(np.broadcast_to(result, new), np.broadcast_to(array, old).reshape(new))
    assert result.size <= reshaped_size(array, old, new) <= prod(old)
    for axis in varying(result):
        assert (result != result.take([0], axis)).any(), "an axis of size over 1 on which nothing varies"


@given(factored())
@FAST
def test_blocks_are_the_shortest_runs_of_equal_size(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    old, new = shapes
    runs = blocks(old, new)
    assert [axis for run, _ in runs for axis in run] == list(range(len(old)))
    assert [axis for _, run in runs for axis in run] == list(range(len(new)))
    for before, after in runs:
        left, right = [old[axis] for axis in before], [new[axis] for axis in after]
        assert prod(left) == prod(right)
        splits = [(i, j) for i, j in product(range(1, len(left)), range(1, len(right))) if prod(left[:i]) == prod(right[:j])]
        assert not splits, f"the run {left} -> {right} could be split at {splits}"


@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40))
@FAST
def test_components_equal_depth_first_search(count: int, pairs: list[tuple[int, int]]) -> None:
    edges = [(a % count, b % count) for a, b in pairs]
    left, right = (np.array([edge[side] for edge in edges], np.int64) for side in (0, 1))
    expected = list(range(count))
    changed = True
    while changed:
        changed = False
        for a, b in edges:
            low = min(expected[a], expected[b])
            changed |= expected[a] != low or expected[b] != low
            expected[a] = expected[b] = low
    assert components(count, left, right).tolist() == expected
    half = len(edges) // 2
    first = components(count, left[:half], right[:half])
    assert components(count, left[half:], right[half:], first).tolist() == expected


def test_components_of_a_long_chain() -> None:
    order = np.random.default_rng(0).permutation(20000)
    assert (components(20000, order[:-1], order[1:]) == 0).all()


def test_compact_align_vector_and_varying() -> None:
    array = np.array([[[1, 1], [2, 2]], [[1, 1], [2, 2]]])
    assert compact(array).tolist() == [[[1], [2]]]
    assert varying(compact(array)) == (1,)
    assert align(np.array([1, 2]), 3).shape == (1, 1, 2)
    assert vector(np.array([1, 2, 3]), 1, 3).shape == (1, 3, 1)


def test_keep_varying_drops_constant_and_fixed_arrays() -> None:
    kept = keep_varying([np.array([[5]]), np.array([[0, 0]]), np.array([[0, 4]])])
    assert [array.tolist() for array in kept] == [[[0, 4]]]


@pytest.mark.parametrize(("old", "new"), [((2, 6, 5), (2, 2, 3, 5)), ((4, 1, 6), (24,)), ((), (1, 1)), ((1,), ())])
def test_reshape_of_every_axis(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    for axis in range(len(old)):
        array = vector(np.arange(1, old[axis] + 1), axis, len(old))
        result = np.broadcast_to(reshape(array, old, new), new)
        np.testing.assert_array_equal(result, np.broadcast_to(array, old).reshape(new))
