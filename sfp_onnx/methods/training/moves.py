"""Operators that move data, choose among them, or write into them, as functions of torch tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ...core.types import Array, IntArray
from .functions import Call, Tensor, Unsupported, computes, ints


@computes("Reshape", host=(1,))
def reshape(call: Call, x: Tensor, shape: Any) -> Tensor:
    sizes = ints(shape) or []
    kept = [x.shape[axis] if size == 0 and not call.get("allowzero") else size for axis, size in enumerate(sizes)]
    return x.reshape(kept)


@computes("Flatten")
def flatten(call: Call, x: Tensor) -> Tensor:
    axis = call.get("axis", 1)
    return x.reshape(int(np.prod(x.shape[: axis + x.ndim if axis < 0 else axis], dtype=np.int64)), -1)


@computes("Squeeze", host=(1,))
def squeeze(call: Call, x: Tensor, axes: Any = None) -> Tensor:
    chosen = ints(call.get("axes") if axes is None else axes)
    return x.squeeze() if chosen is None else x.squeeze(chosen)


@computes("Unsqueeze", host=(1,))
def unsqueeze(call: Call, x: Tensor, axes: Any = None) -> Tensor:
    chosen = ints(call.get("axes") if axes is None else axes) or []
    for axis in sorted(axis % (x.ndim + len(chosen)) for axis in chosen):
        x = x.unsqueeze(axis)
    return x


@computes("Transpose")
def transpose(call: Call, x: Tensor) -> Tensor:
    return x.permute(*call.get("perm", range(x.ndim - 1, -1, -1)))


@computes("Expand", host=(1,))
def expand(call: Call, x: Tensor, shape: Any) -> Tensor:
    return x.expand(torch.broadcast_shapes(tuple(x.shape), tuple(ints(shape) or ())))


@computes("Tile", host=(1,))
def tile(call: Call, x: Tensor, repeats: Any) -> Tensor:
    return x.repeat(*(ints(repeats) or []))


@computes("Concat")
def concat(call: Call, *parts: Tensor) -> Tensor:
    return torch.cat(parts, call.get("axis"))


@computes("Split", host=(1,))
def split(call: Call, x: Tensor, sizes: Any = None) -> list[Tensor]:
    axis, chosen = call.get("axis", 0), ints(call.get("split") if sizes is None else sizes)
    return list(torch.split(x, chosen or -(-x.shape[axis] // len(call.node.outputs)), axis))


@computes("Slice", host=(1, 2, 3, 4))
def slice_(call: Call, x: Tensor, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None) -> Tensor:
    first, last = (ints(call.get(name) if given is None else given) or [] for name, given in (("starts", starts), ("ends", ends)))
    along = ints(call.get("axes") if axes is None else axes) or range(len(first))
    for start, end, axis, step in zip(first, last, along, ints(steps) or [1] * len(first), strict=True):
        chosen = range(x.shape[axis])[slice(start, end, step)]
        if step > 0:
            x = x[(slice(None),) * (axis % x.ndim) + (slice(chosen.start, chosen.stop, step),)]
        else:
            x = x.index_select(axis, torch.tensor(list(chosen), dtype=torch.int64, device=x.device))
    return x


def counted(index: Tensor, size: int) -> Tensor:
    """Indices without those that count from the end."""
    index = index.to(torch.int64)
    return torch.where(index < 0, index + size, index)


@computes("Gather")
def gather(call: Call, x: Tensor, index: Tensor) -> Tensor:
    axis = call.get("axis", 0) % x.ndim
    chosen = x.index_select(axis, counted(index, x.shape[axis]).reshape(-1))
    return chosen.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


@computes("GatherElements")
def gather_elements(call: Call, x: Tensor, index: Tensor) -> Tensor:
    axis = call.get("axis", 0)
    return torch.gather(x, axis, counted(index, x.shape[axis]))


@computes("GatherND")
def gather_nd(call: Call, x: Tensor, index: Tensor) -> Tensor:
    batch, depth = call.get("batch_dims", 0), index.shape[-1]
    places = [counted(index[..., place], x.shape[batch + place]) for place in range(depth)]
    for axis in range(batch):
        shape = [-1 if place == axis else 1 for place in range(index.ndim - 1)]
        places.insert(axis, torch.arange(x.shape[axis], device=x.device).reshape(shape))
    return x[tuple(places)]


REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@computes("ScatterElements", "Scatter")
def scatter(call: Call, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    axis, reduction = call.get("axis", 0), call.get("reduction", "none")
    places = counted(index, x.shape[axis])
    if reduction == "none":
        return x.scatter(axis, places, updates)
    return x.scatter_reduce(axis, places, updates, REDUCTIONS[reduction])


@computes("ScatterND")
def scatter_nd(call: Call, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    reduction, depth = call.get("reduction", "none"), index.shape[-1]
    places = tuple(counted(index[..., place], x.shape[place]) for place in range(depth))
    if reduction in ("none", "add"):
        return x.index_put(places, updates, accumulate=reduction == "add")
    rest = x.shape[depth:]
    flat = torch.zeros_like(places[0])
    for place, size in zip(places, x.shape, strict=False):
        flat = flat * size + place
    rows, own = x.reshape(-1, *rest), updates.reshape(-1, *rest)
    spread = flat.reshape([-1] + [1] * len(rest)).expand(own.shape)
    return rows.scatter_reduce(0, spread, own, REDUCTIONS[reduction]).reshape(x.shape)


@computes("DepthToSpace")
def depth_to_space(call: Call, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    size = call.get("blocksize")
    if call.get("mode", "DCR") == "DCR":
        parts = x.reshape(n, size, size, -1, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        parts = x.reshape(n, -1, size, size, h, w).permute(0, 1, 4, 2, 5, 3)
    return parts.reshape(n, c // size**2, h * size, w * size)


@computes("SpaceToDepth")
def space_to_depth(call: Call, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    size = call.get("blocksize")
    parts = x.reshape(n, c, h // size, size, w // size, size).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(n, c * size**2, h // size, w // size)


@computes("Shape")
def shape(call: Call, x: Tensor) -> Array:
    return np.asarray(tuple(x.shape)[call.get("start", 0) : call.get("end")], np.int64)


@computes("Size")
def size(call: Call, x: Tensor) -> Array:
    return np.asarray(x.numel(), np.int64)


@computes("Einsum")
def einsum(call: Call, *inputs: Tensor) -> Tensor:
    return torch.einsum(call.get("equation").replace(" ", ""), *inputs)


# ---- padding and resizing --------------------------------------------------------------------------------------------


def _mirrored(size: int, before: int, after: int, mode: str) -> IntArray:
    """Positions that an axis padded with its own values reads."""
    places = np.arange(-before, size + after)
    if mode == "edge":
        return np.clip(places, 0, size - 1)
    if mode == "wrap":
        return places % size
    folded = np.abs(places) % (2 * size - 2) if size > 1 else np.zeros_like(places)
    return np.where(folded >= size, 2 * size - 2 - folded, folded)


def take(x: Tensor, axis: int, places: Array) -> Tensor:
    """Chosen positions of an axis."""
    return x.index_select(axis, torch.as_tensor(places, dtype=torch.int64, device=x.device))


@computes("Pad", host=(1, 2, 3))
def pad(call: Call, x: Tensor, pads: Any = None, value: Any = None, axes: Any = None) -> Tensor:
    sizes, mode = ints(call.get("pads") if pads is None else pads) or [], call.get("mode", "constant")
    chosen = [axis % x.ndim for axis in (ints(axes) or range(x.ndim))]
    ends = {axis: (sizes[place], sizes[place + len(chosen)]) for place, axis in enumerate(chosen)}
    if mode == "constant":
        fill = call.get("value", 0.0) if value is None else value.item()
        return F.pad(x, [size for axis in reversed(range(x.ndim)) for size in ends.get(axis, (0, 0))], value=fill)
    for axis, (before, after) in ends.items():
        if before or after:
            x = take(x, axis, _mirrored(x.shape[axis], before, after, mode))
    return x


def _sources(call: Call, old: int, new: int, scale: float) -> Array:
    """Where each position of a resized axis lies in the old one."""
    default = "asymmetric" if call.node.op == "Upsample" or call.opset < 11 else "half_pixel"
    mode, places = call.get("coordinate_transformation_mode", default), np.arange(new, dtype=np.float64)
    if mode == "asymmetric":
        return places / scale
    if mode == "align_corners":
        return places * (old - 1) / (new - 1) if new > 1 else places * 0
    if mode == "pytorch_half_pixel" and new == 1:
        return places * 0
    if mode == "half_pixel_symmetric":
        return old / 2 * (1 - new / (scale * old)) + (places + 0.5) / scale - 0.5
    if mode not in ("half_pixel", "pytorch_half_pixel"):
        raise Unsupported(f"coordinates {mode}")
    return (places + 0.5) / scale - 0.5


NEAREST: dict[str, Callable[[Array], Array]] = {
    "floor": np.floor, "ceil": np.ceil, "round_prefer_ceil": lambda x: np.floor(x + 0.5), "round_prefer_floor": lambda x: np.ceil(x - 0.5),
}  # fmt: skip


def _resized(call: Call, x: Tensor, axis: int, new: int, scale: float) -> Tensor:
    """One axis of a tensor, resized."""
    old, mode = x.shape[axis], call.get("mode", "nearest")
    where = _sources(call, old, new, scale)
    if mode == "nearest":
        rounding = "floor" if call.node.op == "Upsample" or call.opset < 11 else "round_prefer_floor"
        chosen = NEAREST[call.get("nearest_mode", rounding)](where)
        return take(x, axis, np.clip(chosen, 0, old - 1))
    floor = np.floor(where)
    share, a = where - floor, call.get("cubic_coeff_a", -0.75)
    if mode == "linear":
        weights = [1 - share, share]
    else:
        near, far = ([((a + 2) * t - (a + 3)) * t**2 + 1 for t in (share, 1 - share)],
                     [((a * t - 5 * a) * t + 8 * a) * t - 4 * a for t in (share + 1, 2 - share)])  # fmt: skip
        weights = [far[0], near[0], near[1], far[1]]
    total, first = 0, -(len(weights) // 2 - 1)
    shape = [-1 if place == axis else 1 for place in range(x.ndim)]
    for offset, weight in enumerate(weights, first):
        factor = torch.as_tensor(weight, dtype=x.dtype, device=x.device).reshape(shape)
        total = total + take(x, axis, np.clip(floor + offset, 0, old - 1)) * factor
    return total


@computes("Resize", "Upsample", host=(1, 2, 3))
def resize(call: Call, x: Tensor, second: Any = None, third: Any = None, sizes: Any = None) -> Tensor:
    call.refuse("antialias", "exclude_outside")
    given = second if call.node.op == "Upsample" or call.opset < 11 else third
    scales = call.get("scales") if given is None else np.ravel(given).tolist()
    axes = [axis % x.ndim for axis in call.get("axes", range(x.ndim))]
    if sizes is not None and np.size(sizes):
        wanted = ints(sizes) or []
        scales = [size / x.shape[axis] for size, axis in zip(wanted, axes, strict=True)]
        policy = call.get("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            scales = [(min if policy == "not_larger" else max)(scales)] * len(axes)
            wanted = [int(np.floor(scales[0] * x.shape[axis] + 0.5)) for axis in axes]
    else:
        wanted = [int(np.floor(x.shape[axis] * scale)) for axis, scale in zip(axes, scales or [], strict=True)]
    for axis, size, scale in zip(axes, wanted, scales or [], strict=True):
        if size != x.shape[axis] or scale != 1:
            x = _resized(call, x, axis, size, scale)
    return x


# ---- sampling --------------------------------------------------------------------------------------------------------


@computes("Col2Im", host=(1, 2))
def column_to_image(call: Call, x: Tensor, image: Any, block: Any) -> Tensor:
    pads, kernel = call.get("pads", [0] * 4), ints(block) or []
    if len(kernel) != 2 or pads[:2] != pads[2:]:
        raise Unsupported("other than two axes, or uneven padding")
    return F.fold(x, ints(image), kernel, list(call.get("dilations", [1, 1])), list(pads[:2]), list(call.get("strides", [1, 1])))


@computes("GridSample")
def grid_sample(call: Call, x: Tensor, grid: Tensor) -> Tensor:
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(call.get("mode", ""), call.get("mode", "bilinear"))
    return F.grid_sample(x, grid, mode, call.get("padding_mode", "zeros"), bool(call.get("align_corners")))


@computes("ReverseSequence")
def reverse_sequence(call: Call, x: Tensor, lengths: Tensor) -> Tensor:
    time, batch = call.get("time_axis", 0), call.get("batch_axis", 1)
    step = torch.arange(x.shape[time], device=x.device)[:, None]
    index = torch.where(step < lengths, lengths - 1 - step, step)
    index = index if time < batch else index.T
    return x.gather(time, index.reshape(*x.shape[:2], *[1] * (x.ndim - 2)).expand(x.shape))
