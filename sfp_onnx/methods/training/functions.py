"""What ONNX operators compute, as functions of torch tensors: their registry, and the operators that work element by element or reduce.

A function is called with the node and its inputs (None where one is left out) and returns its output, or a list of them. The inputs at the
positions named with ``host`` (sizes, axes, indices) come as numpy arrays and are never trained. float16 is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from onnx import TensorProto

from ...core.types import Array, Node

Tensor = Any  # torch.Tensor: torch need not be installed where types are checked


class Unsupported(Exception):
    """A form of an operator that the functions here do not compute; says which."""


@dataclass(frozen=True)
class Call:
    """The node that is computed, and the version of ONNX's own operators."""

    node: Node
    opset: int

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute."""
        return self.node.attributes.get(name, default)

    def refuse(self, *names: str) -> None:
        """Say that attributes are not supported, if they are given and not zero or empty."""
        for name in names:
            if self.get(name):
                raise Unsupported(f"attribute {name}={self.get(name)}")

    def wants(self, position: int) -> bool:
        """Whether the node has an output at a position."""
        return len(self.node.outputs) > position and bool(self.node.outputs[position])


Function = Callable[..., Any]


@dataclass(frozen=True)
class Entry:
    """``function`` computes an operator; ``host``: inputs that it takes as numpy arrays; ``fixed``: inputs that are not trained
    (statistics, scales); ``weights``: inputs that are trained even if they hold one number; ``stored``: input 0 are numbers that stand
    for others."""

    function: Function
    host: tuple[int, ...] = ()
    fixed: tuple[int, ...] = ()
    weights: tuple[int, ...] = ()
    stored: bool = False


FUNCTIONS: dict[str, Entry] = {}


def computes(
    *operators: str, host: tuple[int, ...] = (), fixed: tuple[int, ...] = (), weights: tuple[int, ...] = (),
    stored: bool = False,
) -> Callable[[Function], Function]:  # fmt: skip
    """Register a function for operators (``Conv``, or ``domain.Op`` outside ONNX's own domain)."""

    def register(function: Function) -> Function:
        for operator in operators:
            if operator in FUNCTIONS:
                raise ValueError(f"operator {operator} has two functions")
            FUNCTIONS[operator] = Entry(function, host, fixed, weights, stored)
        return function

    return register


def ints(value: Array | Sequence[int] | None) -> list[int] | None:
    """Whole numbers of an attribute or a host input."""
    return None if value is None else [int(item) for item in np.ravel(np.asarray(value))]


# ---- element by element ----------------------------------------------------------------------------------------------

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin, "Asinh": torch.asinh, "Atan": torch.atan,
    "Atanh": torch.atanh, "Ceil": torch.ceil, "Cos": torch.cos, "Cosh": torch.cosh, "Erf": torch.erf, "Exp": torch.exp,
    "Floor": torch.floor, "Identity": lambda x: x, "IsNaN": torch.isnan, "Log": torch.log, "Neg": torch.neg, "Reciprocal": torch.reciprocal,
    "Relu": torch.relu, "Round": torch.round, "Sigmoid": torch.sigmoid, "Sign": torch.sign, "Sin": torch.sin, "Sinh": torch.sinh,
    "Softplus": F.softplus, "Softsign": F.softsign, "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh, "Mish": F.mish,
    "HardSwish": lambda x: x * torch.clamp(x / 6 + 0.5, 0, 1), "Not": torch.logical_not, "BitwiseNot": torch.bitwise_not,
    "com.microsoft.Gelu": F.gelu,
}  # fmt: skip
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Equal": torch.eq, "Greater": torch.gt, "Less": torch.lt,
    "GreaterOrEqual": torch.ge, "LessOrEqual": torch.le, "And": torch.logical_and, "Or": torch.logical_or, "Xor": torch.logical_xor,
    "BitwiseAnd": torch.bitwise_and, "BitwiseOr": torch.bitwise_or, "BitwiseXor": torch.bitwise_xor,
    "Div": lambda x, y: torch.div(x, y, rounding_mode=None if x.is_floating_point() else "trunc"),
    "Pow": lambda x, y: torch.pow(x, y).to(x.dtype), "PRelu": lambda x, slope: torch.where(x > 0, x, slope * x),
    "com.microsoft.BiasGelu": lambda x, bias: F.gelu(x + bias),
}  # fmt: skip
MANY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"Sum": torch.add, "Max": torch.maximum, "Min": torch.minimum}


def _plain(function: Callable[..., Tensor]) -> Function:
    """A function that needs nothing of the node."""
    return lambda call, *inputs: function(*inputs)


def _folded(function: Callable[[Tensor, Tensor], Tensor]) -> Function:
    """A function of two tensors, over any number of them."""

    def over_all(call: Call, first: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            first = function(first, other)
        return first

    return over_all


for _name, _one in (UNARY | BINARY).items():
    computes(_name)(_plain(_one))
for _name, _two in MANY.items():
    computes(_name)(_folded(_two))


@computes("Mean")
def mean(call: Call, *inputs: Tensor) -> Tensor:
    return _folded(torch.add)(call, *inputs) / len(inputs)


@computes("Mod")
def mod(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return torch.fmod(x, y) if call.get("fmod") else torch.remainder(x, y)


@computes("BitShift")
def bit_shift(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return torch.bitwise_left_shift(x, y) if call.get("direction") == "LEFT" else torch.bitwise_right_shift(x, y)


@computes("Where")
def where(call: Call, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(condition, x, y)


@computes("Dropout", host=(1, 2))
def dropout(call: Call, x: Tensor, ratio: Any = None, training: Any = None) -> Any:
    if training is not None and bool(training):
        raise Unsupported("training mode")
    return [x, torch.ones_like(x, dtype=torch.bool)] if call.wants(1) else x


@computes("IsInf")
def is_inf(call: Call, x: Tensor) -> Tensor:
    found = torch.isinf(x)
    for sign, name in ((x < 0, "detect_negative"), (x > 0, "detect_positive")):
        if not call.get(name, 1):
            found = found & ~sign
    return found


@computes("Clip", host=(1, 2))
def clip(call: Call, x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    bounds = [call.get(name) if value is None else value.item() for name, value in (("min", low), ("max", high))]
    return x if bounds == [None, None] else torch.clamp(x, *bounds)


@computes("Gelu")
def gelu(call: Call, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=call.get("approximate", "none"))


@computes("com.microsoft.FastGelu")
def fast_gelu(call: Call, x: Tensor, bias: Tensor = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@computes("com.microsoft.QuickGelu", "Swish")
def swish(call: Call, x: Tensor) -> Tensor:
    return x * torch.sigmoid(x * call.get("alpha", 1.702 if call.node.domain else 1.0))


@computes("Elu", "Celu")
def elu(call: Call, x: Tensor) -> Tensor:
    return (F.celu if call.node.op == "Celu" else F.elu)(x, call.get("alpha", 1.0))


@computes("Selu")
def selu(call: Call, x: Tensor) -> Tensor:
    return call.get("gamma", 1.0507009873554805) * F.elu(x, call.get("alpha", 1.6732632423543772))


@computes("HardSigmoid")
def hard_sigmoid(call: Call, x: Tensor) -> Tensor:
    return torch.clamp(x * call.get("alpha", 0.2) + call.get("beta", 0.5), 0, 1)


@computes("LeakyRelu")
def leaky_relu(call: Call, x: Tensor) -> Tensor:
    return F.leaky_relu(x, call.get("alpha", 0.01))


@computes("Shrink")
def shrink(call: Call, x: Tensor) -> Tensor:
    bias, edge, zero = call.get("bias", 0.0), call.get("lambd", 0.5), torch.zeros_like(x)
    return torch.where(x > edge, x - bias, torch.where(x < -edge, x + bias, zero))


@computes("ThresholdedRelu")
def thresholded_relu(call: Call, x: Tensor) -> Tensor:
    return torch.where(x > call.get("alpha", 1.0), x, torch.zeros_like(x))


TYPES = {
    TensorProto.FLOAT: torch.float32, TensorProto.DOUBLE: torch.float64, TensorProto.BOOL: torch.bool, TensorProto.INT8: torch.int8,
    TensorProto.UINT8: torch.uint8, TensorProto.INT16: torch.int16, TensorProto.INT32: torch.int32, TensorProto.INT64: torch.int64,
    TensorProto.UINT16: torch.uint16, TensorProto.UINT32: torch.uint32, TensorProto.UINT64: torch.uint64,
}  # fmt: skip
ROUNDED = {TensorProto.FLOAT16: torch.float16, TensorProto.BFLOAT16: torch.bfloat16}  # rounded to, and computed in float32


@computes("Cast")
def cast(call: Call, x: Tensor) -> Tensor:
    kind = call.get("to")
    if kind in ROUNDED:
        return x.to(ROUNDED[kind]).to(torch.float32)
    if kind not in TYPES:
        raise Unsupported(f"element type {kind}")
    return x.to(TYPES[kind])


@computes("CastLike", fixed=(1,))
def cast_like(call: Call, x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)


# ---- reductions and what compares along an axis ----------------------------------------------------------------------


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


REDUCE: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceSum": torch.sum, "ReduceMean": torch.mean, "ReduceMax": torch.amax, "ReduceMin": torch.amin, "ReduceProd": _product,
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keep), "ReduceL2": lambda x, axes, keep: (x * x).sum(axes, keep).sqrt(),
    "ReduceSumSquare": lambda x, axes, keep: (x * x).sum(axes, keep), "ReduceLogSumExp": torch.logsumexp,
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keep).log(),
}  # fmt: skip


@computes(*REDUCE, host=(1,))
def reduce(call: Call, x: Tensor, axes: Any = None) -> Tensor:
    chosen = ints(call.get("axes") if axes is None else axes)
    if not chosen:
        if call.get("noop_with_empty_axes"):
            return x
        chosen = list(range(x.ndim))
    return REDUCE[call.node.op](x, chosen, bool(call.get("keepdims", 1)))


@computes("ArgMax", "ArgMin")
def arg_extreme(call: Call, x: Tensor) -> Tensor:
    call.refuse("select_last_index")
    return (torch.argmax if call.node.op == "ArgMax" else torch.argmin)(x, call.get("axis", 0), bool(call.get("keepdims", 1)))


@computes("TopK", host=(1,))
def top_k(call: Call, x: Tensor, k: Any = None) -> Any:
    count = call.get("k") if k is None else int(np.ravel(k)[0])
    return list(torch.topk(x, count, call.get("axis", -1), bool(call.get("largest", 1)), bool(call.get("sorted", 1))))


@computes("CumSum", host=(1,))
def cumulative(call: Call, x: Tensor, axis: Any) -> Tensor:
    along = int(axis)
    turned = x.flip(along) if call.get("reverse") else x
    summed = turned.cumsum(along) - (turned if call.get("exclusive") else 0)
    return summed.flip(along) if call.get("reverse") else summed


@computes("DFT", host=(1, 2))
def fourier(call: Call, x: Tensor, length: Any = None, axis: Any = None) -> Tensor:
    """Real and imaginary part (none: it is zero) lie along the last axis."""
    along = int(axis) if axis is not None else call.get("axis", 1 if call.opset < 20 else -2) % x.ndim
    wave = torch.complex(x[..., 0], x[..., 1] if x.shape[-1] > 1 else torch.zeros_like(x[..., 0]))
    transform = torch.fft.ifft if call.get("inverse") else torch.fft.fft
    y = torch.view_as_real(transform(wave, None if length is None else int(length), along % x.ndim))
    return y.narrow(along, 0, y.shape[along] // 2 + 1) if call.get("onesided") else y


@computes("Softmax", "LogSoftmax", "Hardmax")
def softmax(call: Call, x: Tensor) -> Tensor:
    old = call.opset < 13  # then over all axes from the given one on
    axis = call.get("axis", 1 if old else -1) % x.ndim
    flat = x.reshape(*x.shape[:axis], -1) if old else x
    along = -1 if old else axis
    if call.node.op == "Hardmax":
        made = torch.zeros_like(flat).scatter(along, flat.argmax(along, keepdim=True), 1.0)
    else:
        made = (torch.softmax if call.node.op == "Softmax" else torch.log_softmax)(flat, along)
    return made.reshape(x.shape)


# ---- quantisation, straight through ----------------------------------------------------------------------------------


def along_axis(values: Tensor, axis: int, rank: int) -> Tensor:
    """A vector of scales, shaped to meet a tensor along an axis."""
    several = values.ndim == 1 and values.numel() > 1
    return values.reshape([-1 if place == axis % rank else 1 for place in range(rank)]) if several else values


def rounded(x: Tensor, low: int, high: int) -> Tensor:
    """Whole numbers within bounds, through which gradients go as if there were no rounding."""
    return torch.clamp(x + (torch.round(x) - x).detach(), low, high)


LIMITS = {name: np.iinfo(name) for name in ("int8", "uint8", "int16", "uint16", "int32")}


@computes("QuantizeLinear", host=(2,), fixed=(1,))
def quantize(call: Call, x: Tensor, scale: Tensor, zero: Any = None) -> Tensor:
    call.refuse("block_size", "output_dtype", "precision")
    if zero is not None and zero.dtype.name not in LIMITS:
        raise Unsupported(f"zero points of type {zero.dtype}")
    limit, axis = LIMITS["uint8" if zero is None else zero.dtype.name], call.get("axis", 1)
    shift = 0.0 if zero is None else along_axis(torch.as_tensor(zero.astype(np.float32), device=x.device), axis, x.ndim)
    return rounded(x / along_axis(scale, axis, x.ndim) + shift, limit.min, limit.max)


@computes("DequantizeLinear", host=(2,), fixed=(1,), stored=True)
def dequantize(call: Call, x: Tensor, scale: Tensor, zero: Any = None) -> Tensor:
    call.refuse("block_size", "output_dtype")
    axis = call.get("axis", 1)
    shift = 0.0 if zero is None else along_axis(torch.as_tensor(zero.astype(np.float32), device=x.device), axis, x.ndim)
    return (x.to(scale.dtype) - shift) * along_axis(scale, axis, x.ndim)

