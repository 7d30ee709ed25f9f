"""How mixing layers are linear in their weight: outputs at chosen positions as rows times a matrix.

A form turns the data of a layer into rows P, its weight into a matrix W and its output into rows Y, with Y = P W + bias, per
block of a grouped convolution. Weights can then be re-fitted by least squares without knowing the operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np

from ..core.types import Array, BoolArray, IntArray


@dataclass(frozen=True)
class Window:
    """A convolution of any rank, y[n, o, q] = sum over channels c and taps t of W[o, c, t] x[n, c, stride q + dilation t - pad],
    or the transposed one, y[n, o, q] = sum over c, t with stride p = q + pad - dilation t of W[c, o, t] x[n, c, p].

    ``auto_pad`` is "SAME_UPPER", "SAME_LOWER" or empty (then ``pads`` holds those in front of each spatial axis). ``padded`` says whether
    anything is padded, behind an axis too.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str = ""
    transposed: bool = False
    padded: bool = False
    out_axis: int = 1
    scale: float = 1.0

    @property
    def front(self) -> str:
        """A convolution of size 1."""
        return "" if self.transposed else "Conv"

    def blocks(self, data: Sequence[int], weight: Sequence[int], output: Sequence[int]) -> int:
        """Number of groups of the convolution."""
        return (output if self.transposed else data)[1] // weight[1]

    def positions(self, output: Sequence[int]) -> tuple[int, int]:
        """Samples, and positions of each."""
        return output[0], prod(output[2:])

    def rows(self, data: Array, output: Sequence[int], chosen: IntArray, blocks: int) -> Array:
        """Input patches (blocks, positions, taps x channels of a block) at ``chosen`` (samples, positions) of the output."""
        samples, channels = data.shape[:2]
        size = prod(data.shape[2:])
        places = np.unravel_index(chosen, tuple(output[2:]))
        read = [self._read(places, tap, data.shape[2:], output[2:]) for tap in product(*(range(length) for length in self.kernel))]
        at, inside = (np.stack(found, 2) for found in zip(*read, strict=True))
        if at.size < samples * size:  # the places one by one; else all data once, channels last
            taken = data.reshape(samples, channels, size)[np.arange(samples)[:, None, None], :, at].astype(np.float32, copy=False)
            taken[~inside] = 0
        else:
            flat = np.zeros((samples * size + 1, channels), np.float32)  # the last row is what lies outside
            flat[:-1].reshape(samples, size, channels)[:] = np.moveaxis(data.reshape(samples, channels, size), 1, 2)
            taken = flat[np.where(inside, np.arange(samples)[:, None, None] * size + at, len(flat) - 1)]
        split = taken.reshape(chosen.size, at.shape[2], blocks, channels // blocks)
        rows: Array = split.transpose(2, 0, 1, 3).reshape(blocks, chosen.size, -1)
        return rows

    def _read(
        self, places: Sequence[IntArray], tap: Sequence[int], sizes: Sequence[int], output: Sequence[int]
    ) -> tuple[IntArray, BoolArray]:
        """Flat spatial index that each position reads through one tap, and whether it lies inside the data."""
        index = np.zeros(places[0].shape, np.int64)
        inside = np.ones(places[0].shape, bool)
        for axis, place in enumerate(places):
            stride, offset = self.strides[axis], tap[axis] * self.dilations[axis]
            if self.transposed:
                shifted = place + self.pads[axis] - offset
                at = shifted // stride
                inside &= shifted % stride == 0
            else:
                at = place * stride + offset - self._pad(axis, sizes[axis], output[axis])
            inside &= (at >= 0) & (at < sizes[axis])
            index = index * sizes[axis] + np.clip(at, 0, sizes[axis] - 1)
        return index, inside

    def _pad(self, axis: int, size: int, output: int) -> int:
        if not self.auto_pad:
            return self.pads[axis]
        reach = (self.kernel[axis] - 1) * self.dilations[axis] + 1
        total = max((output - 1) * self.strides[axis] + reach - size, 0)
        return total // 2 if self.auto_pad == "SAME_UPPER" else total - total // 2

    def answers(self, output: Array, chosen: IntArray, blocks: int) -> Array:
        """Outputs (blocks, positions, channels of a block) at the chosen positions."""
        samples, channels = output.shape[:2]
        flat = output.reshape(samples, channels, -1)
        picked = flat[np.arange(samples)[:, None], :, chosen].reshape(chosen.size, blocks, channels // blocks)
        answers: Array = picked.transpose(1, 0, 2)
        return answers

    def matrix(self, weight: Array, blocks: int) -> Array:
        """The weight as (blocks, taps x channels, output channels of a block)."""
        taps = prod(self.kernel)
        order = (0, 3, 1, 2) if self.transposed else (0, 3, 2, 1)
        split = weight.reshape(blocks, weight.shape[0] // blocks, weight.shape[1], taps).transpose(order)
        matrix: Array = split.reshape(blocks, taps * split.shape[2], -1)
        return matrix

    def weight(self, matrix: Array, like: Sequence[int]) -> Array:
        """The inverse of `matrix`, for a weight of shape ``like``."""
        blocks, taps = len(matrix), prod(self.kernel)
        split = matrix.reshape(blocks, taps, -1, matrix.shape[2])
        order = (0, 2, 3, 1) if self.transposed else (0, 3, 2, 1)
        weight: Array = split.transpose(order).reshape(like)
        return weight

    def inputs_of(self, weight: Sequence[int], blocks: int) -> IntArray:
        """Which input channel of the block each row of the matrix reads."""
        inputs = weight[0] // blocks if self.transposed else weight[1]
        return np.tile(np.arange(inputs), prod(self.kernel))


@dataclass(frozen=True)
class Dense:
    """A product with a 2-d weight: y = scale * (x contracted along ``data_axis``) W, the result along ``out_axis``.
    ``in_axis`` is the weight's axis that is contracted. ``front``: a product of the data's last axis, where that is contracted."""

    data_axis: int
    out_axis: int
    in_axis: int
    scale: float = 1.0
    front: str = ""
    padded: bool = False
    kernel: tuple[int, ...] = ()

    def blocks(self, data: Sequence[int], weight: Sequence[int], output: Sequence[int]) -> int:
        """Always one block."""
        return 1

    def positions(self, output: Sequence[int]) -> tuple[int, int]:
        """Samples, and positions of each."""
        others = [size for axis, size in enumerate(output) if axis != self.out_axis % len(output)]
        return (others[0] if others else 1), prod(others[1:])

    def rows(self, data: Array, output: Sequence[int], chosen: IntArray, blocks: int) -> Array:
        """Inputs (1, positions, features) at ``chosen`` (samples, positions)."""
        rows: Array = _chosen(data, self.data_axis, chosen)[None] * np.float32(self.scale)
        return rows

    def answers(self, output: Array, chosen: IntArray, blocks: int) -> Array:
        """Outputs (1, positions, features) at the chosen positions."""
        return _chosen(output, self.out_axis, chosen)[None]

    def matrix(self, weight: Array, blocks: int) -> Array:
        """The weight as (1, inputs, outputs)."""
        matrix: Array = (weight if self.in_axis == 0 else weight.T)[None]
        return matrix

    def weight(self, matrix: Array, like: Sequence[int]) -> Array:
        """The inverse of `matrix`."""
        weight: Array = matrix[0] if self.in_axis == 0 else matrix[0].T
        return weight

    def inputs_of(self, weight: Sequence[int], blocks: int) -> IntArray:
        """Which input feature each row of the matrix reads."""
        return np.arange(weight[self.in_axis])


def _chosen(data: Array, axis: int, chosen: IntArray) -> Array:
    moved = np.moveaxis(data, axis, -1)
    rows = moved.reshape(len(chosen), -1, moved.shape[-1])
    picked: Array = np.take_along_axis(rows, chosen[:, :, None], axis=1).reshape(-1, moved.shape[-1]).astype(np.float32)
    return picked
