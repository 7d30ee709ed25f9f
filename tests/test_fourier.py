"""Tables of cosines and sines that nobody trained: recognised, and left as they are unless they are named."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from building import Builder, assert_exact

import sfp_onnx
from sfp_onnx.core.options import PlanOptions
from sfp_onnx.coupling.fourier import FOURIER, is_fourier

TAPS, SIZE, BINS = 48, 64, 33


def table(taps: int = TAPS, size: int = SIZE, window: str = "hann", order: str = "blocks") -> np.ndarray:
    """Rows w(t) cos(2 pi k t / size), and the negative sines."""
    t, k = np.arange(taps), np.arange(size // 2 + 1)[:, None]
    shapes = {"hann": 0.5 - 0.5 * np.cos(2 * np.pi * t / taps), "none": np.ones(taps)}
    waves = [shapes[window] * np.cos(2 * np.pi * k * t / size), -shapes[window] * np.sin(2 * np.pi * k * t / size)]
    rows = {"blocks": np.concatenate(waves), "turns": np.stack(waves, 1).reshape(-1, taps), "cosines": waves[0], "sines": waves[1]}
    return rows[order].astype(np.float32)


@pytest.mark.parametrize("order", ["blocks", "turns", "cosines", "sines"])
@pytest.mark.parametrize("window", ["hann", "none"])
@pytest.mark.parametrize(("taps", "size"), [(64, 64), (400, 512), (512, 512)])
def test_fourier_transforms_are_recognised(taps: int, size: int, window: str, order: str) -> None:
    rows = table(taps, size, window, order)
    assert is_fourier(rows)
    assert not is_fourier(rows + 0.02 * np.random.default_rng(0).standard_normal(rows.shape).astype(np.float32))


@pytest.mark.parametrize("rows", [np.zeros((64, 64)), np.ones((64, 64)), np.eye(64), np.random.default_rng(1).standard_normal((128, 64))])
def test_other_tables_are_none(rows: np.ndarray) -> None:
    assert not is_fourier(rows.astype(np.float32))


def spectrogram(kind: str) -> onnx.ModelProto:
    """|STFT|^2 of a signal, a filter bank, and two convolutions; the transform as one convolution, or as two products of frames."""
    b = Builder(17, 1)
    x = b.input(["N", 1, 400] if kind == "Conv" else ["N", 12, TAPS])
    if kind == "Conv":
        y = b.op("Conv", x, b.const(table()[:, None, :]), strides=[16], name="stft")
        parts = b.split(y, [BINS, BINS])
    else:
        frames = [b.op("MatMul", x, b.const(table(order=order).T), name=f"stft_{order}") for order in ("cosines", "sines")]
        parts = [b.op("Transpose", y, perm=[0, 2, 1]) for y in frames]
    power = b.op("Add", *(b.op("Mul", part, part) for part in parts))
    mel = b.op("MatMul", b.op("Transpose", power, perm=[0, 2, 1]), b.uniform(BINS, 20), name="mel")
    y = b.op("Relu", b.op("Conv", b.op("Transpose", mel, perm=[0, 2, 1]), b.weight(24, 20, 3), name="first"))
    return b.model(b.op("Conv", y, b.weight(4, 24, 3), name="last"))


@pytest.mark.parametrize("kind", ["Conv", "MatMul"])
def test_a_transform_stays_unless_it_is_named(kind: str) -> None:
    model = spectrogram(kind)
    analysis = sfp_onnx.inspect(model)
    pinned = {pin.layers[0] for pin in analysis.coupling.pinned if pin.reason == FOURIER}
    assert pinned == ({"stft"} if kind == "Conv" else {"stft_cosines", "stft_sines"})
    plan = sfp_onnx.plan(analysis, PlanOptions(ratio=0.5))
    cut = {group.group for group in plan.groups if group.remove}
    assert cut == {"mel", "first"}
    named = sfp_onnx.apply(analysis, sfp_onnx.plan(analysis, PlanOptions(ratio=0.5, only="stft")))
    assert {bool(group.remove) for group in named.plan.groups if not group.group.startswith("stft")} == {False}
    assert sum(len(group.remove) for group in named.plan.groups) > BINS // 3
    assert_exact(model, named)
    with pytest.raises(sfp_onnx.TargetError, match="Fourier transforms stay"):
        sfp_onnx.plan(analysis, PlanOptions(ratio=0.5, keep="mel|first"))
