"""Random small valid ONNX graphs.

An image (N x 3..4 x 8 x 8, fixed or dynamic batch) runs through blocks drawn from `BLOCKS`, then through one of `HEADS`. Choices of
structure are made by hypothesis (`samples`: failures shrink) or by a seeded generator (`sample`: no two graphs are alike), weights
come from a numpy seed. Activations stay about O(1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import onnx
from building import Builder, feeds_for
from hypothesis import strategies as st

T = TypeVar("T")
Choose = Callable[[Sequence[Any]], Any]
OPSETS = (11, 13, 17, 21)
WIDTHS = (4, 6, 8, 12)
SMALLEST = 1  # channels of the smallest piece of a split, slice or gather


@dataclass(frozen=True)
class Map:
    """A feature map N x channels x height x width."""

    name: str
    channels: int
    height: int
    width: int


@dataclass(frozen=True)
class Sample:
    """A drawn graph; its repr is what hypothesis reports."""

    model: onnx.ModelProto = field(repr=False)
    blocks: tuple[str, ...]
    opset: int
    batch: int | str
    seed: int

    @property
    def feeds(self) -> dict[str, np.ndarray]:
        return feeds_for(self.model, batch=3)


class Maker(Builder):
    """A builder that makes choices."""

    def __init__(self, choose: Choose, opset: int, batch: int | str, seed: int) -> None:
        super().__init__(opset, seed)
        self.choose, self.batch = choose, batch
        self.maps: list[Map] = []
        self.source = ""

    def pick(self, choices: Sequence[T]) -> T:
        chosen: T = self.choose(choices)
        return chosen

    def width(self, multiple: int = 1) -> int:
        return self.pick([width for width in WIDTHS if width % multiple == 0])

    def reshape(self, x: str, dims: Sequence[int]) -> str:
        """Reshape to (batch, *dims); the batch is written in one of the ways exporters use."""
        ways = ["zero", "shape"] + (["minus"] if -1 not in dims else []) + (["number"] if isinstance(self.batch, int) else [])
        way = self.pick(ways)
        if way == "shape":
            zero = self.const([0], np.int64)
            size = self.op("Gather", self.op("Shape", self.source), zero, axis=0)
            return self.op("Reshape", x, self.op("Concat", size, self.const(list(dims), np.int64), axis=0))
        first = {"zero": 0, "minus": -1, "number": self.batch}[way]
        return self.op("Reshape", x, self.const([first, *dims], np.int64))

    def convolved(self, m: Map, channels: int, kernel: int = 3, group: int = 1, bias: bool = True) -> Map:
        return Map(self.conv(m.name, m.channels, channels, kernel, group, bias), channels, m.height, m.width)

    def on(self, m: Map, name: str) -> Map:
        return Map(name, m.channels, m.height, m.width)

    def partner(self, m: Map) -> Map:
        """An earlier map of the same height and width (maybe the same one)."""
        return self.pick([other for other in self.maps if (other.height, other.width) == (m.height, m.width)])


Block = Callable[[Maker, Map], Map]


# ---- blocks: layers --------------------------------------------------------------------------------------------------


def conv(b: Maker, m: Map) -> Map:
    return b.convolved(m, b.width(), b.pick([1, 3]), bias=b.pick([True, False]))


def strided(b: Maker, m: Map) -> Map:
    if m.height < 4:
        return conv(b, m)
    out = b.width()
    name = b.conv(m.name, m.channels, out, strides=[2, 2])
    return Map(name, out, m.height // 2, m.width // 2)


def norm(b: Maker, m: Map) -> Map:
    return b.on(m, b.batch_norm(m.name, m.channels))


def activation(b: Maker, m: Map) -> Map:
    kind = b.pick(["Relu", "Sigmoid", "HardSwish", "PRelu", "Clip", "LeakyRelu", "Where", "Div"])
    if kind == "PRelu":
        return b.on(m, b.op("PRelu", m.name, b.uniform(m.channels, 1, 1, low=0.1, high=0.4)))
    if kind == "Clip":
        return b.on(m, b.clip(m.name, -0.5, 1.5))
    if kind == "HardSwish" and b.opset < 14:
        return b.on(m, b.op("Mul", m.name, b.op("HardSigmoid", m.name, alpha=1 / 6)))
    if kind == "Where":
        positive = b.op("Greater", m.name, b.const(np.zeros((1, m.channels, 1, 1), np.float32)))
        return b.on(m, b.op("Where", positive, m.name, b.uniform(m.channels, 1, 1)))
    if kind == "Div":
        return b.on(m, b.op("Div", m.name, b.uniform(1, m.channels, 1, 1)))
    return b.on(m, b.op(kind, m.name))


def depthwise(b: Maker, m: Map) -> Map:
    return b.convolved(m, m.channels * b.pick([1, 1, 2]), group=m.channels, bias=b.pick([True, False]))


def grouped(b: Maker, m: Map) -> Map:
    groups = b.pick([g for g in (1, 2, 3, 4) if m.channels % g == 0])
    return b.convolved(m, b.width(groups), group=groups)


def transposed(b: Maker, m: Map) -> Map:
    groups = b.pick([g for g in (1, 1, 2) if m.channels % g == 0])
    out = b.width(groups)
    weight = b.weight(m.channels, out // groups, 3, 3, fan_in=m.channels // groups * 9)
    return Map(b.op("ConvTranspose", m.name, weight, b.weight(out), group=groups, pads=[1] * 4), out, m.height, m.width)


def group_norm(b: Maker, m: Map) -> Map:
    """Native from opset 21, else (or by choice) as Reshape-InstanceNormalization-Reshape with an affine."""
    groups = b.pick([g for g in (1, 2, 3, 4) if m.channels % g == 0])
    scale, shift = b.uniform(m.channels), b.weight(m.channels, fan_in=8)
    if b.opset >= 21 and b.pick([True, False]):
        return b.on(m, b.op("GroupNormalization", m.name, scale, shift, num_groups=groups))
    ones, zeros = b.const(np.ones(groups, np.float32)), b.const(np.zeros(groups, np.float32))
    inner = b.op("InstanceNormalization", b.reshape(m.name, [groups, -1]), ones, zeros)
    outer = b.op("Reshape", inner, b.op("Shape", m.name)) if b.pick([True, False]) else b.reshape(inner, [m.channels, m.height, m.width])
    scaled = b.op("Mul", outer, b.uniform(m.channels, 1, 1))
    return b.on(m, b.op("Add", scaled, b.const(b.random.standard_normal((m.channels, 1, 1)))))


# ---- blocks: meetings ------------------------------------------------------------------------------------------------


def residual(b: Maker, m: Map) -> Map:
    inner = activation(b, conv(b, m))
    return b.on(m, b.op("Add", b.convolved(inner, m.channels).name, m.name))


def excite(b: Maker, m: Map) -> Map:
    pooled = b.op("GlobalAveragePool", m.name) if b.pick([True, False]) else b.reduce("ReduceMean", m.name, [2, 3], keepdims=1)
    hidden = b.pick([2, 4])
    inner = b.op("Relu", b.conv(pooled, m.channels, hidden, 1))
    gate = b.op("Sigmoid", b.conv(inner, hidden, m.channels, 1))
    return b.on(m, b.op("Mul", *b.pick([(m.name, gate), (gate, m.name)])))


def concat(b: Maker, m: Map) -> Map:
    parts = [b.pick([conv, activation])(b, m), b.partner(m), *b.pick([[], [m]])]
    total = sum(part.channels for part in parts)
    if total > 32:
        return conv(b, m)
    return Map(b.op("Concat", *(part.name for part in parts), axis=b.pick([1, -3])), total, m.height, m.width)


def split(b: Maker, m: Map) -> Map:
    """C2f-like: both parts are used again, the second also behind a convolution."""
    if m.channels < 2 * SMALLEST:
        return conv(b, m)
    at = b.pick(sorted({m.channels // 2, SMALLEST, m.channels - SMALLEST}))
    left, right = b.split(m.name, [at, m.channels - at], b.pick([1, -3]))
    part = Map(right, m.channels - at, m.height, m.width)
    extra = b.convolved(part, b.pick([part.channels, 4]))
    return Map(b.op("Concat", left, right, extra.name, axis=1), m.channels + extra.channels, m.height, m.width)


def halves(b: Maker, m: Map) -> Map:
    """Gated halves (GLU), with implied equal parts before opset 18."""
    if m.channels % 2 or m.channels < 2 * SMALLEST:
        return m
    if b.opset < 18 and b.pick([True, False]):
        left, right = b.op("Split", m.name, outputs=2, axis=1)
    else:
        left, right = b.split(m.name, [m.channels // 2] * 2)
    return Map(b.op("Mul", left, b.op("Sigmoid", right)), m.channels // 2, m.height, m.width)


def mean_gate(b: Maker, m: Map) -> Map:
    mean = b.reduce(b.pick(["ReduceMean", "ReduceMean", "ReduceSum", "ReduceMax", "ReduceL2"]), m.name, b.pick([[1], [-3]]), keepdims=1)
    return b.on(m, b.op("Mul", m.name, b.op("Sigmoid", mean)))


def attention(b: Maker, m: Map) -> Map:
    """Self-attention over positions with h heads of d dimensions."""
    heads, size, positions = b.pick([2, 3]), b.pick([2, 4]), m.height * m.width
    inner = heads * size
    tokens = b.op("Transpose", b.reshape(m.name, [m.channels, positions]), perm=[0, 2, 1])

    def projected(perm: list[int]) -> str:
        made = b.op("MatMul", tokens, b.weight(m.channels, inner, fan_in=m.channels))
        made = b.op("Add", made, b.weight(inner, fan_in=8)) if b.pick([True, False]) else made
        return b.op("Transpose", b.reshape(made, [positions, heads, size]), perm=perm)

    query, key, value = projected([0, 2, 1, 3]), projected([0, 2, 3, 1]), projected([0, 2, 1, 3])
    weights = b.op("Mul", b.op("MatMul", query, key), b.const(size**-0.5))
    weights = b.op("Softmax", weights, axis=-1 if b.opset >= 13 else 3)
    joined = b.reshape(b.op("Transpose", b.op("MatMul", weights, value), perm=[0, 2, 1, 3]), [positions, inner])
    out = b.op("Transpose", b.op("MatMul", joined, b.weight(inner, m.channels, fan_in=inner)), perm=[0, 2, 1])
    return b.on(m, b.op("Add", m.name, b.reshape(out, [m.channels, m.height, m.width])))


# ---- blocks: recurrent -----------------------------------------------------------------------------------------------


def recurrent(b: Maker, m: Map) -> Map:
    """A recurrent layer over the positions, and back to a map; or its last state as a gate for the channels."""
    op, hidden, size = b.pick(["LSTM", "GRU", "RNN"]), b.pick([3, 4, 6]), m.height * m.width
    direction = b.pick(["forward", "reverse", "bidirectional"])
    both, gates = 1 + (direction == "bidirectional"), {"LSTM": 4, "GRU": 3, "RNN": 1}[op] * hidden
    steps = b.op("Transpose", b.reshape(m.name, [m.channels, size]), perm=[2, 0, 1])
    operands = [b.weight(both, gates, m.channels, fan_in=m.channels), b.weight(both, gates, hidden, fan_in=hidden)]
    operands += [b.weight(both, 2 * gates, fan_in=4)] if b.pick([True, False]) else []
    attributes = {"linear_before_reset": b.pick([0, 1])} if op == "GRU" else {}
    made = b.op(op, steps, *operands, outputs=2, hidden_size=hidden, direction=direction, **attributes)
    if b.pick([True, False]):
        turned = b.op("Transpose", made[0], perm=[2, 1, 3, 0])
        name = b.reshape(turned, [both * hidden, m.height, m.width])
        return b.convolved(Map(name, both * hidden, m.height, m.width), m.channels, 1)
    last = b.reshape(b.op("Transpose", made[1], perm=[1, 0, 2]), [both * hidden])
    gate = b.reshape(b.op("Sigmoid", b.gemm(last, both * hidden, m.channels)), [m.channels, 1, 1])
    return b.on(m, b.op("Mul", m.name, gate))


# ---- blocks: quantised -----------------------------------------------------------------------------------------------


def quantised(b: Maker, m: Map) -> Map:
    """A convolution between QuantizeLinear and DequantizeLinear: its weight is an integer with one scale or one per output
    channel, its input and output are rounded (coarsely: a rounding that flips is no fault) or not."""
    out = b.width()
    groups = b.pick([g for g in (1, 1, 2) if m.channels % g == 0 and out % g == 0])
    each = b.opset >= 13 and b.pick([True, True, False])
    whole = b.const(b.random.integers(-127, 127, (out, m.channels // groups, 3, 3)), np.int8)
    scale = b.uniform(out, low=0.001, high=0.003) if each else b.const(np.float32(0.002))
    operands = [whole, scale] + ([b.const(np.zeros(out) if each else 0, np.int8)] if b.pick([True, False]) else [])
    weight = b.op("DequantizeLinear", *operands, axis=0 if each else None)
    bias = []
    if b.pick([True, False]):
        numbers, scales = b.const(b.random.integers(-900, 900, out), np.int32), b.uniform(out, low=0.0003, high=0.0006)
        bias = [b.op("DequantizeLinear", numbers, scales, axis=0) if b.opset >= 13 else b.weight(out, fan_in=8)]
    made = b.op("Conv", rounded(b, m) if b.pick([True, False]) else m.name, weight, *bias, group=groups, pads=[1] * 4)
    after = Map(made, out, m.height, m.width)
    return b.on(after, rounded(b, after)) if b.pick([True, False]) else after


def rounded(b: Maker, m: Map) -> str:
    """Through integers and back, with one scale or one per channel."""
    each = b.opset >= 13 and b.pick([True, False])
    pair = [b.uniform(m.channels, low=0.02, high=0.06), b.const(np.full(m.channels, 3), np.int8)]
    pair = pair if each else [b.const(np.float32(0.05)), b.const(120, np.uint8)]
    axis = b.pick([1, -3]) if each else None
    whole = b.op("QuantizeLinear", m.name, *pair, axis=axis)
    return b.op("DequantizeLinear", whole, *pair, axis=axis)


# ---- blocks: movement ------------------------------------------------------------------------------------------------


def slice_channels(b: Maker, m: Map) -> Map:
    start = b.pick([0, 1, m.channels // 2])
    stop = b.pick([m.channels, m.channels - 1, -1, 2**31 - 1])
    left = len(range(m.channels)[start:stop])
    if left < SMALLEST:
        return m
    return Map(b.slice(m.name, [start], [stop], b.pick([[1], [-3]])), left, m.height, m.width)


def gather_channels(b: Maker, m: Map) -> Map:
    index = b.random.integers(-m.channels, m.channels, max(SMALLEST, m.channels - b.pick([0, 1])))
    return Map(b.op("Gather", m.name, b.const(index, np.int64), axis=1), len(index), m.height, m.width)


def shuffle(b: Maker, m: Map) -> Map:
    groups = b.pick([g for g in (1, 2, 3) if m.channels % g == 0])
    wide = b.reshape(m.name, [groups, m.channels // groups, m.height, m.width])
    return b.on(m, b.reshape(b.op("Transpose", wide, perm=[0, 2, 1, 3, 4]), [m.channels, m.height, m.width]))


def pixel_shuffle(b: Maker, m: Map) -> Map:
    if m.channels % 4 or m.height > 8:
        m = b.convolved(m, 8) if m.height <= 8 else b.convolved(pool(b, m), 8)
    out = m.channels // 4
    form = b.pick(["DCR", "CRD", "reshape"])
    if form == "reshape":
        wide = b.op("Transpose", b.reshape(m.name, [out, 2, 2, m.height, m.width]), perm=[0, 1, 4, 2, 5, 3])
        name = b.reshape(wide, [out, 2 * m.height, 2 * m.width])
    else:
        name = b.op("DepthToSpace", m.name, blocksize=2, mode=form)
    return b.convolved(Map(name, out, 2 * m.height, 2 * m.width), b.width())


def unshuffle(b: Maker, m: Map) -> Map:
    if m.height % 2 or m.channels > 8:
        return conv(b, m)
    return conv(b, Map(b.op("SpaceToDepth", m.name, blocksize=2), 4 * m.channels, m.height // 2, m.width // 2))


def zero_pad(b: Maker, m: Map) -> Map:
    before, behind = b.pick([(1, 2), (2, 0), (0, 2)])
    name = b.pad(m.name, [0, before, 0, 0, 0, behind, 0, 0], value=b.pick([0.0, 0.0, 0.5]))
    return Map(name, m.channels + before + behind, m.height, m.width)


def shortcut_a(b: Maker, m: Map) -> Map:
    """The ResNet shortcut of option A: a strided slice, padded with zero channels."""
    if m.height < 4:
        return residual(b, m)
    out = m.channels + 4
    main = b.conv(activation(b, m).name, m.channels, out, strides=[2, 2])
    thin = b.slice(m.name, [0, 0], [2**31 - 1] * 2, [2, 3], [2, 2])
    name = b.op("Add", main, b.pad(thin, [0, 2, 0, 0, 0, 2, 0, 0]))
    return Map(name, out, m.height // 2, m.width // 2)


def pool(b: Maker, m: Map) -> Map:
    if m.height < 4:
        return m
    name = b.op(b.pick(["MaxPool", "AveragePool"]), m.name, kernel_shape=[2, 2], strides=[2, 2])
    return Map(name, m.channels, m.height // 2, m.width // 2)


def resize(b: Maker, m: Map) -> Map:
    if m.height > 8:
        return pool(b, m)
    height, width = 2 * m.height, 2 * m.width
    form = b.pick(["scales", "sizes", "spatial"])
    if form == "spatial" and b.opset >= 18:
        sizes = b.const([height, width], np.int64)
        name = b.op("Resize", m.name, None, None, sizes, axes=[2, 3], mode="linear")
    elif form == "scales" or not isinstance(b.batch, int):
        name = b.resize(m.name, scales=[1, 1, 2, 2])
    else:
        name = b.resize(m.name, sizes=[b.batch, m.channels, height, width])
    return Map(name, m.channels, height, width)


BLOCKS: tuple[Block, ...] = (
    conv, strided, norm, activation, depthwise, grouped, transposed, group_norm, residual, excite, concat, split, halves, mean_gate,
    attention, recurrent, quantised, slice_channels, gather_channels, shuffle, pixel_shuffle, unshuffle, zero_pad, shortcut_a, pool, resize,
)  # fmt: skip
PLAIN: tuple[Block, ...] = (conv, norm, activation, depthwise, residual, concat, shuffle, pool)


# ---- heads -----------------------------------------------------------------------------------------------------------


def flat_head(b: Maker, m: Map) -> str:
    flat = b.op("Flatten", m.name, axis=1) if b.pick([True, False]) else b.reshape(m.name, [m.channels * m.height * m.width])
    hidden = b.op("Relu", b.gemm(flat, m.channels * m.height * m.width, 6, transposed=b.pick([True, False])))
    return b.gemm(hidden, 6, 5, bias=b.pick([True, False]))


def pooled_head(b: Maker, m: Map) -> str:
    form = b.pick(["flatten", "squeeze", "mean"])
    if form == "mean":
        flat = b.reduce("ReduceMean", m.name, [2, 3], keepdims=0)
    else:
        pooled = b.op("GlobalAveragePool", m.name)
        flat = b.op("Flatten", pooled) if form == "flatten" else b.axes_op("Squeeze", pooled, [2, 3])
    return b.gemm(flat, m.channels, 5, transposed=b.pick([True, False]))


def dense_head(b: Maker, m: Map) -> str:
    return b.convolved(m, 3, 1).name


HEADS = (flat_head, pooled_head, dense_head)


def make(choose: Choose, seed: int, blocks: Sequence[Block], most: int) -> Sample:
    """A convolution, one to ``most`` blocks, a head, sometimes a second head somewhere else."""
    b = Maker(choose, choose(OPSETS), choose(["N", 3]), seed)
    channels = b.pick([3, 4])
    b.source = b.input([b.batch, channels, 8, 8])
    current = conv(b, Map(b.source, channels, 8, 8))
    b.maps.append(current)
    used = ["conv"]
    for _ in range(b.pick(range(1, most + 1))):
        block = b.pick(blocks)
        current = block(b, current)
        b.maps.append(current)
        used.append(block.__name__)
    head = b.pick(HEADS)
    outputs = [head(b, current)]
    if b.pick([False, False, True]):
        outputs.append(b.pick(HEADS)(b, b.pick(b.maps)))
        used.append("second")
    return Sample(b.model(*outputs), (*used, head.__name__), b.opset, b.batch, seed)


@st.composite
def samples(draw: Callable[[st.SearchStrategy[Any]], Any], blocks: Sequence[Block] = BLOCKS, most: int = 6) -> Sample:
    """Random models, drawn choice by choice."""
    return make(lambda choices: draw(st.sampled_from(choices)), draw(st.integers(0, 2**20)), blocks, most)


def sample(seed: int, blocks: Sequence[Block] = BLOCKS, most: int = 8) -> Sample:
    """The random model with a number."""
    generator = np.random.default_rng(seed)
    return make(lambda choices: choices[int(generator.integers(len(choices)))], seed, blocks, most)
