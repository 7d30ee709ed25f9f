"""Operators with weights, pooling and normalisation, as functions of torch tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .functions import Call, Tensor, Unsupported, computes


def _side_pads(call: Call, sides: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> list[int]:
    """Padding before and after each spatial axis: before_1 .. before_r, after_1 .. after_r."""
    mode = call.get("auto_pad", "NOTSET") or "NOTSET"
    if mode == "NOTSET":
        return list(call.get("pads", [0] * (2 * len(sides))))
    if mode == "VALID":
        return [0] * (2 * len(sides))
    needed = [
        max(0, (-(-side // stride) - 1) * stride + (size - 1) * dilation + 1 - side)
        for side, size, stride, dilation in zip(sides, kernel, strides, dilations, strict=True)
    ]
    less, more = [item // 2 for item in needed], [item - item // 2 for item in needed]
    return less + more if mode == "SAME_UPPER" else more + less


def torch_pads(pads: Sequence[int]) -> list[int]:
    """ONNX's order of paddings in torch's: last axis first, before and after."""
    rank = len(pads) // 2
    return [pads[place + half * rank] for place in reversed(range(rank)) for half in (0, 1)]


def _settings(call: Call, rank: int) -> tuple[list[int], list[int]]:
    """Strides and dilations."""
    return list(call.get("strides", [1] * rank)), list(call.get("dilations", [1] * rank))


def _ranked(name: str, rank: int) -> Any:
    """A function of torch that exists for 1, 2 and 3 spatial axes."""
    if not 1 <= rank <= 3:
        raise Unsupported(f"{rank} spatial axes")
    return getattr(F, f"{name}{rank}d")


@computes("Conv", weights=(1, 2))
def conv(call: Call, x: Tensor, weight: Tensor, bias: Tensor = None) -> Tensor:
    rank = weight.ndim - 2
    strides, dilations = _settings(call, rank)
    pads = _side_pads(call, x.shape[2:], weight.shape[2:], strides, dilations)
    even = pads[:rank]
    if even != pads[rank:] or min(pads) < 0:
        x, even = F.pad(x, torch_pads(pads)), [0] * rank
    return _ranked("conv", rank)(x, weight, bias, strides, even, dilations, call.get("group", 1))


@computes("ConvTranspose", weights=(1, 2))
def conv_transpose(call: Call, x: Tensor, weight: Tensor, bias: Tensor = None) -> Tensor:
    rank = weight.ndim - 2
    strides, dilations = _settings(call, rank)
    extra, shape = list(call.get("output_padding", [0] * rank)), call.get("output_shape")
    mode = call.get("auto_pad", "NOTSET") or "NOTSET"
    full = _ranked("conv_transpose", rank)(x, weight, bias, strides, 0, extra, call.get("group", 1), dilations)
    if mode in ("SAME_UPPER", "SAME_LOWER") and not shape:
        shape = [side * stride for side, stride in zip(x.shape[2:], strides, strict=True)]
    if shape:
        surplus = [have - want for have, want in zip(full.shape[2:], shape[-rank:], strict=True)]
        less, more = [item // 2 for item in surplus], [item - item // 2 for item in surplus]
        pads = less + more if mode == "SAME_UPPER" else more + less
    else:
        pads = [0] * (2 * rank) if mode == "VALID" else list(call.get("pads", [0] * (2 * rank)))
    return F.pad(full, [-size for size in torch_pads(pads)]) if any(pads) else full


@computes("Gemm", weights=(1, 2))
def gemm(call: Call, a: Tensor, b: Tensor, c: Tensor = None) -> Tensor:
    product = (a.T if call.get("transA") else a) @ (b.T if call.get("transB") else b) * call.get("alpha", 1.0)
    return product if c is None else product + call.get("beta", 1.0) * c


@computes("MatMul", "com.microsoft.FusedMatMul", weights=(0, 1))
def matmul(call: Call, a: Tensor, b: Tensor) -> Tensor:
    moved = (x.movedim(0, -2) if call.get(f"transBatch{name}") else x for x, name in ((a, "A"), (b, "B")))
    left, right = (x.mT if call.get(f"trans{name}") else x for x, name in zip(moved, "AB", strict=True))
    return torch.matmul(left, right) * call.get("alpha", 1.0)


ACTIVATIONS = {
    "": lambda call, x: x, "Relu": lambda call, x: torch.relu(x), "Tanh": lambda call, x: torch.tanh(x),
    "Sigmoid": lambda call, x: torch.sigmoid(x), "LeakyRelu": lambda call, x: F.leaky_relu(x, _parameters(call)[0]),
    "Clip": lambda call, x: torch.clamp(x, *_parameters(call)[:2]),
    "HardSigmoid": lambda call, x: torch.clamp(_parameters(call)[0] * x + _parameters(call)[1], 0, 1),
}  # fmt: skip
"""What onnxruntime fuses into the layer in front."""


def _parameters(call: Call) -> list[float]:
    """Of an activation, as a convolution or a product keeps them."""
    return list(call.get("activation_params") or [call.get(f"activation_{name}", 0.0) for name in ("alpha", "beta")])


def _activated(call: Call, x: Tensor) -> Tensor:
    name = call.get("activation", "")
    if name not in ACTIVATIONS:
        raise Unsupported(f"activation {name}")
    return ACTIVATIONS[name](call, x)


@computes("com.microsoft.FusedConv", weights=(1, 2))
def fused_conv(call: Call, x: Tensor, weight: Tensor, bias: Tensor = None, added: Tensor = None) -> Tensor:
    made = conv(call, x, weight, bias)
    return _activated(call, made if added is None else made + added)


@computes("com.microsoft.FusedGemm", weights=(1, 2))
def fused_gemm(call: Call, a: Tensor, b: Tensor, c: Tensor = None) -> Tensor:
    return _activated(call, gemm(call, a, b, c))


# ---- pooling ---------------------------------------------------------------------------------------------------------


def _window(call: Call, x: Tensor) -> tuple[list[int], list[int], list[int], list[int]]:
    """Kernel, strides, dilations, and the padding with which windows cover exactly the output."""
    call.refuse("storage_order")
    kernel = list(call.get("kernel_shape"))
    strides, dilations = _settings(call, len(kernel))
    sides, rank = x.shape[2:], len(kernel)
    pads = _side_pads(call, sides, kernel, strides, dilations)
    if call.get("ceil_mode"):
        for axis, side in enumerate(sides):
            span = (kernel[axis] - 1) * dilations[axis] + 1
            room = side + pads[axis] + pads[rank + axis] - span
            last = -(-room // strides[axis])
            last -= last * strides[axis] >= side + pads[axis]  # a window that would start behind the data
            pads[rank + axis] += last * strides[axis] - room
    return kernel, strides, dilations, pads


@computes("MaxPool")
def max_pool(call: Call, x: Tensor) -> Tensor:
    if call.wants(1):
        raise Unsupported("its output of indices")
    kernel, strides, dilations, pads = _window(call, x)
    padded = F.pad(x, torch_pads(pads), value=float("-inf")) if any(pads) else x
    return _ranked("max_pool", len(kernel))(padded, kernel, strides, 0, dilations)


@computes("AveragePool")
def average_pool(call: Call, x: Tensor) -> Tensor:
    kernel, strides, dilations, pads = _window(call, x)
    if any(size != 1 for size in dilations):
        raise Unsupported("dilations")
    pool = _ranked("avg_pool", len(kernel))
    if not any(pads):
        return pool(x, kernel, strides)
    ones = torch.ones_like(x[:1, :1])
    own = _side_pads(call, x.shape[2:], kernel, strides, dilations)
    beyond = [size - given for size, given in zip(pads, own, strict=True)]  # what only fills up the last windows never counts
    counts = F.pad(F.pad(ones, torch_pads(own), value=float(call.get("count_include_pad", 0))), torch_pads(beyond))
    return pool(F.pad(x, torch_pads(pads)), kernel, strides) / pool(counts, kernel, strides)


@computes("LpPool")
def lp_pool(call: Call, x: Tensor) -> Tensor:
    kernel, strides, dilations, pads = _window(call, x)
    power, count = call.get("p", 2), 1
    if any(size != 1 for size in dilations):
        raise Unsupported("dilations")
    for size in kernel:
        count *= size
    means = _ranked("avg_pool", len(kernel))(F.pad(x.abs() ** power, torch_pads(pads)), kernel, strides)
    return (means * count) ** (1 / power)


@computes("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def global_pool(call: Call, x: Tensor) -> Tensor:
    axes = list(range(2, x.ndim))
    if call.node.op == "GlobalMaxPool":
        return x.amax(axes, True)
    if call.node.op == "GlobalAveragePool":
        return x.mean(axes, True)
    power = call.get("p", 2)
    return (x.abs() ** power).sum(axes, True) ** (1 / power)


# ---- normalisation ---------------------------------------------------------------------------------------------------


@computes("BatchNormalization", fixed=(3, 4), weights=(1, 2))
def batch_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    call.refuse("training_mode")
    return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, call.get("epsilon", 1e-5))


@computes("InstanceNormalization", weights=(1, 2))
def instance_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=call.get("epsilon", 1e-5))


@computes("GroupNormalization", weights=(1, 2))
def group_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups = call.get("num_groups")
    if call.opset < 21:
        scale, bias = (values.repeat_interleave(x.shape[1] // groups) for values in (scale, bias))
    return F.group_norm(x, groups, scale, bias, call.get("epsilon", 1e-5))


@computes("LayerNormalization", weights=(1, 2))
def layer_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor = None) -> Any:
    axis, epsilon = call.get("axis", -1) % x.ndim, call.get("epsilon", 1e-5)
    axes = list(range(axis, x.ndim))
    made = F.layer_norm(x, x.shape[axis:], eps=epsilon) * scale
    made = made if bias is None else made + bias
    if len(call.node.outputs) == 1:
        return made
    return [made, x.mean(axes, True), (x.var(axes, correction=0, keepdim=True) + epsilon).rsqrt()]


@computes("RMSNormalization", "SimplifiedLayerNormalization", weights=(1,))
def rms_norm(call: Call, x: Tensor, scale: Tensor) -> Tensor:
    if call.wants(1):
        raise Unsupported("its second output")
    axes = list(range(call.get("axis", -1) % x.ndim, x.ndim))
    return x * ((x * x).mean(axes, True) + call.get("epsilon", 1e-5)).rsqrt() * scale


@computes("com.microsoft.SkipLayerNormalization", "com.microsoft.SkipSimplifiedLayerNormalization", weights=(2, 3, 4))
def skip_norm(call: Call, x: Tensor, skip: Tensor, scale: Tensor, *vectors: Tensor) -> Any:
    if call.wants(1) or call.wants(2):
        raise Unsupported("its statistics")
    simple, epsilon = "Simplified" in call.node.op, call.get("epsilon", 1e-12)
    bias, added = ([None] if simple else []) + [*vectors, None, None][: 1 if simple else 2]
    total = x + skip if added is None else x + skip + added
    made = total * ((total * total).mean(-1, True) + epsilon).rsqrt() if simple else F.layer_norm(total, x.shape[-1:], eps=epsilon)
    made = made * scale if bias is None else made * scale + bias
    return [made, None, None, total] if call.wants(3) else made


@computes("MeanVarianceNormalization")
def mean_variance(call: Call, x: Tensor) -> Tensor:
    axes = list(call.get("axes", [0, 2, 3]))
    centred = x - x.mean(axes, True)
    return centred / ((centred * centred).mean(axes, True) + 1e-9).sqrt()


@computes("LpNormalization")
def lp_norm(call: Call, x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, call.get("p", 2), call.get("axis", -1), True)
    return x / torch.where(norm > 0, norm, torch.ones_like(norm))


@computes("LRN")
def local_response(call: Call, x: Tensor) -> Tensor:
    if call.get("size") % 2 == 0:
        raise Unsupported(f"size {call.get('size')}")
    return F.local_response_norm(x, call.get("size"), call.get("alpha", 1e-4), call.get("beta", 0.75), call.get("bias", 1.0))


# ---- attention -------------------------------------------------------------------------------------------------------


def _heads(x: Tensor, count: int) -> Tensor:
    """N x S x (H D) as N x H x S x D."""
    return x.reshape(*x.shape[:2], count, -1).transpose(1, 2)


def _joined(x: Tensor) -> Tensor:
    """N x H x S x D as N x S x (H D)."""
    return x.transpose(1, 2).flatten(2)


def _only(call: Call, *rest: Tensor) -> None:
    if any(item is not None for item in rest) or len(call.node.outputs) > 1:
        raise Unsupported("masks, past keys or further outputs")


@computes("Attention")
def attention(call: Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor = None, *rest: Tensor) -> Tensor:
    _only(call, *rest)
    call.refuse("softcap", "qk_matmul_output_mode")
    flat = q.ndim == 3
    if flat:
        q, k, v = _heads(q, call.get("q_num_heads")), *(_heads(item, call.get("kv_num_heads")) for item in (k, v))
    k, v = (item.repeat_interleave(q.shape[1] // item.shape[1], 1) for item in (k, v))
    made = F.scaled_dot_product_attention(q, k, v, mask, is_causal=bool(call.get("is_causal")), scale=call.get("scale"))
    return _joined(made) if flat else made


def _masks(call: Call, keys: Tensor, scores: Tensor) -> Tensor:
    """What is added to the scores (B, H, S, L): a bias, and a large negative number for keys (B, L) that are 0; None if nothing is."""
    if keys is None:
        return scores
    if keys.ndim != 2:
        raise Unsupported("masks other than of keys by sample")
    away = (1 - keys.to(torch.float32))[:, None, None] * (call.get("mask_filter_value") or -1e4)
    return away if scores is None else scores + away


@computes("com.microsoft.MultiHeadAttention")
def multi_head(
    call: Call, q: Tensor, k: Tensor, v: Tensor, bias: Tensor = None, keys: Tensor = None, scores: Tensor = None, *rest: Tensor
) -> Tensor:  # fmt: skip
    _only(call, *rest)
    call.refuse("unidirectional")
    if bias is not None:
        ends = q.shape[-1], q.shape[-1] + k.shape[-1]
        q, k, v = q + bias[: ends[0]], k + bias[ends[0] : ends[1]], v + bias[ends[1] :]
    count, mask = call.get("num_heads"), _masks(call, keys, scores)
    parts = (_heads(item, count) for item in (q, k, v))
    return _joined(F.scaled_dot_product_attention(*parts, attn_mask=mask, scale=call.get("scale") or None))


@computes("com.microsoft.Attention", weights=(1, 2))
def packed_attention(
    call: Call, x: Tensor, weight: Tensor, bias: Tensor = None, keys: Tensor = None, past: Tensor = None, scores: Tensor = None,
    *rest: Tensor,
) -> Tensor:  # fmt: skip
    _only(call, past, *rest)
    call.refuse("unidirectional", "do_rotary")
    made, count = x @ weight, call.get("num_heads")
    parts = (made if bias is None else made + bias).split(list(call.get("qkv_hidden_sizes") or [weight.shape[1] // 3] * 3), -1)
    heads, mask = (_heads(item, count) for item in parts), _masks(call, keys, scores)
    return _joined(F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=call.get("scale") or None))


@computes("RotaryEmbedding", "com.microsoft.RotaryEmbedding")
def rotary_embedding(call: Call, x: Tensor, *tables: Tensor) -> Tensor:
    call.refuse("is_packed_batching")
    cos, sin, places = (*tables[1:], tables[0]) if call.node.domain else (*tables, None)[:3]
    heads = x if x.ndim == 4 else _heads(x, call.get("num_heads") or x.shape[-1] // (2 * cos.shape[-1]))
    if places is not None:
        cos, sin = cos[places], sin[places]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    size = 2 * cos.shape[-1]
    turned = heads[..., :size]
    one, two = (turned[..., ::2], turned[..., 1::2]) if call.get("interleaved") else turned.chunk(2, -1)
    pair = cos * one - sin * two, sin * one + cos * two
    made = torch.stack(pair, -1).flatten(-2) if call.get("interleaved") else torch.cat(pair, -1)
    made = torch.cat([made, heads[..., size:]], -1)
    return made if x.ndim == 4 else _joined(made)


# ---- recurrence ------------------------------------------------------------------------------------------------------


def _lstm(x: Tensor, h: Tensor, c: Tensor, again: Tensor, bias: Tensor, peep: Tensor) -> tuple[Tensor, Tensor]:
    """Gates i, o, f, c."""
    i, o, f, g = (x + h @ again.T + bias).chunk(4, -1)
    pi, po, pf = (0, 0, 0) if peep is None else peep.chunk(3, -1)
    c_new = torch.sigmoid(f + pf * c) * c + torch.sigmoid(i + pi * c) * torch.tanh(g)
    return torch.sigmoid(o + po * c_new) * torch.tanh(c_new), c_new


def _gru(x: Tensor, h: Tensor, again: Tensor, bias: Tensor, linear: bool) -> Tensor:
    """Gates z, r, h; ``bias`` is that of the recurrence."""
    (xz, xr, xh), (wz, wr, wh), (bz, br, bh) = x.chunk(3, -1), again.chunk(3, 0), bias.chunk(3, -1)
    z, r = torch.sigmoid(xz + h @ wz.T + bz), torch.sigmoid(xr + h @ wr.T + br)
    inner = r * (h @ wh.T + bh) if linear else (r * h) @ wh.T + bh
    return (1 - z) * torch.tanh(xh + inner) + z * h


def _one_way(call: Call, x: Tensor, w: Tensor, r: Tensor, b: Tensor, h: Tensor, c: Tensor, peep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One direction over T x N x I: all states, the last one, the last cell."""
    ours, theirs = b.chunk(2, -1)
    states, kind = [], call.node.op
    for step in x @ w.T + ours:
        if kind == "LSTM":
            h, c = _lstm(step, h, c, r, theirs, peep)
        elif kind == "GRU":
            h = _gru(step, h, r, theirs, bool(call.get("linear_before_reset")))
        else:
            h = torch.tanh(step + h @ r.T + theirs)
        states.append(h)
    return torch.stack(states), h, c


@computes("LSTM", "GRU", "RNN", host=(4,), weights=(1, 2, 3))
def recurrent(
    call: Call, x: Tensor, w: Tensor, r: Tensor, b: Tensor = None, lengths: Any = None, h: Tensor = None, c: Tensor = None,
    peep: Tensor = None,
) -> list[Tensor]:  # fmt: skip
    call.refuse("activations", "clip", "layout", "input_forget")
    if lengths is not None and (lengths != x.shape[0]).any():
        raise Unsupported("sequences of different lengths")
    directions, hidden = r.shape[0], r.shape[2]
    zeros = x.new_zeros(directions, x.shape[1], hidden)
    h, c = zeros if h is None else h, zeros if c is None else c
    b = x.new_zeros(directions, 2 * w.shape[1]) if b is None else b
    parts = []
    for way in range(directions):
        back = way == 1 or call.get("direction", "forward") == "reverse"
        own = None if peep is None else peep[way]
        every, last, cell = _one_way(call, x.flip(0) if back else x, w[way], r[way], b[way], h[way], c[way], own)
        parts.append([every.flip(0) if back else every, last, cell])
    return [torch.stack([part[0] for part in parts], 1), *(torch.stack([part[place] for part in parts]) for place in (1, 2))]

