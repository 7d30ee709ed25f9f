"""What is known of a device: the channel block of its convolutions, and what each node of one model costs there.

    seconds(widths) = constant + sum over nodes n, kinds k of cost[n][k] * work[n][k](widths)

where work counts elements read, elements written and multiply-accumulates in whole blocks of channels (see `planning.figures`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from ..core.errors import ProfileError
from ..core.types import FloatArray, Shown
from ..planning.figures import Kind, Terms

FORMAT, VERSION = "sfp_onnx device profile", 1


@dataclass(frozen=True)
class Block:
    """The staircase of convolutions. ``width`` is the channel block, ``slow`` how many times longer a width takes that is no multiple of
    4, ``curve`` the measured time per width relative to the widest."""

    width: int
    slow: float
    curve: Mapping[str, float]


@dataclass(frozen=True, repr=False)
class DeviceProfile(Shown):
    """Costs of one model on one device.

    ``device`` says which (CPU, onnxruntime, threads, provider); ``batch`` and ``seconds`` are batch size and measured time of the whole
    original; ``nodes`` maps the first output of a node to its seconds per unit of each `Kind`. ``factor`` brought the sum of nodes to the
    measured time of whole models; ``error`` is the mean relative error of predictions on ``checked`` models that were not used to fit.
    ``cut_short`` is the budget (seconds) that kept some models from being timed, 0 if all were.
    """

    device: Mapping[str, Any]
    model_sha256: str
    batch: int
    seconds: float
    block: Block
    constant: float
    nodes: Mapping[str, tuple[float, ...]]
    factor: float
    error: float
    checked: int
    cut_short: float = 0.0

    def summary(self) -> str:
        """The device, and what the whole model takes."""
        threads = f"{self.device['threads'] or 'all'} threads"
        return f"{self.device['cpu']}, {threads}, batch {self.batch}: {self.seconds * 1e3:.3f} ms, predicted to {self.error:.1%}"


def to_json(device_profile: DeviceProfile) -> dict[str, Any]:
    """A device profile as plain data."""
    return {"format": FORMAT, "version": VERSION, **asdict(device_profile)}


def from_json(data: object, sha256: str | None = None) -> DeviceProfile:
    """Read a device profile from plain data.

    Raises:
        ProfileError: damaged, or made for another model than ``sha256``.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ProfileError(f'this is not a device profile (no "format": "{FORMAT}"). Make one with `sfp-onnx profile`.')
    if data.get("version") != VERSION:
        raise ProfileError(f"the device profile has version {data.get('version')}; this program reads version {VERSION}. Make it again.")
    try:
        block = data["block"]
        device_profile = DeviceProfile(
            device=dict(data["device"]), model_sha256=str(data["model_sha256"]), batch=int(data["batch"]), checked=int(data["checked"]),
            block=Block(int(block["width"]), float(block["slow"]), {str(key): float(value) for key, value in block["curve"].items()}),
            nodes={str(key): tuple(float(cost) for cost in costs) for key, costs in data["nodes"].items()},
            cut_short=float(data.get("cut_short", 0.0)), **{key: float(data[key]) for key in ("seconds", "constant", "factor", "error")},
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__} {error}"
        raise ProfileError(f"the device profile is damaged: {what}. Make it again with `sfp-onnx profile`.") from error
    rows = device_profile.nodes.values()
    numbers = [device_profile.seconds, device_profile.constant, device_profile.factor, device_profile.error, device_profile.block.slow]
    numbers += [*device_profile.block.curve.values(), *(cost for row in rows for cost in row)]
    whole = all(len(row) == len(Kind) for row in rows) and np.isfinite(numbers).all()
    if not (whole and device_profile.block.width >= 1 and device_profile.batch >= 1 and device_profile.seconds > 0):
        raise ProfileError("the device profile is damaged: numbers are missing or out of range. Make it again with `sfp-onnx profile`.")
    known = device_profile.model_sha256
    if sha256 is not None and known != sha256:
        both = f"its SHA-256 is {known[:12]}..., the model's is {sha256[:12]}..."
        raise ProfileError(f"the device profile was made for another model: {both}. Make it again for this model with `sfp-onnx profile`.")
    return device_profile


def scaled(device_profile: DeviceProfile, seconds: float) -> DeviceProfile:
    """The profile of a machine that is in another mood: the original takes ``seconds`` now, and everything else in proportion."""
    share = seconds / device_profile.seconds
    nodes = {name: tuple(share * cost for cost in row) for name, row in device_profile.nodes.items()}
    return replace(device_profile, seconds=seconds, constant=share * device_profile.constant, nodes=nodes)


@dataclass(frozen=True)
class Clock:
    """Predicts seconds from a device profile."""

    terms: Terms
    costs: FloatArray
    constant: float
    block: Block

    def __call__(self, lengths: FloatArray) -> FloatArray:
        """Seconds (...) at lengths (..., axes)."""
        return np.asarray(self.constant + self.terms.values(lengths, self.block.width, self.block.slow) @ self.costs)


def nonnegative_fit(matrix: FloatArray, values: FloatArray) -> FloatArray:
    """min over x >= 0 of |matrix x - values|, by trying every set of columns (there are five or fewer).

    Args:
        matrix: (observations, columns). values: (observations,).
    """
    scale = np.abs(matrix).max(0)
    usable = [column for column in range(matrix.shape[1]) if scale[column] > 0]
    best, least = np.zeros(matrix.shape[1]), float((values**2).sum())
    for count in range(1, len(usable) + 1):
        for chosen in combinations(usable, count):
            part = matrix[:, chosen] / scale[list(chosen)]
            fitted, *_ = np.linalg.lstsq(part, values, rcond=1e-6)
            rest = float(((part @ fitted - values) ** 2).sum())
            if (fitted >= 0).all() and rest < least * (1 - 1e-9):
                best, least = np.zeros(matrix.shape[1]), rest
                best[list(chosen)] = fitted / scale[list(chosen)]
    return best
