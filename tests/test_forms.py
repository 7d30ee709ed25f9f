"""Mixing layers as matrix products: rows P, matrix W and answers Y of a form obey Y = P W + bias, as onnxruntime has it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper as nh
import pytest
from building import Builder, feeds_for, run
from hypothesis import given, strategies as st
from test_property import examples

import sfp_onnx
from sfp_onnx.core.types import Layer
from sfp_onnx.rules.forms import Dense


def only_layer(model: onnx.ModelProto) -> Layer:
    (layer,) = sfp_onnx.inspect(model).coupling.layers
    return layer


def check_form(model: onnx.ModelProto, seed: int = 0, batch: int = 3) -> None:
    """All positions, and some of them in any order, against the model's output; the matrix and back; which rows read what."""
    layer = only_layer(model)
    assert layer.linear is not None and layer.weight is not None
    form = layer.linear.form
    held = {tensor.name: nh.to_array(tensor) for tensor in model.graph.initializer}
    feeds = feeds_for(model, batch)
    data, output = feeds[layer.data_name], run(model, feeds)[0]
    weight = held[layer.node.inputs[layer.weight.position]]
    bias = layer.linear.bias
    name = layer.node.inputs[bias] if bias is not None and bias < len(layer.node.inputs) else ""
    vector = held[name] * layer.linear.bias_scale if name else np.zeros(1)
    blocks = form.blocks(data.shape, weight.shape, output.shape)
    matrix = form.matrix(weight, blocks)
    np.testing.assert_array_equal(form.weight(matrix, weight.shape), weight)
    samples, size = form.positions(output.shape)
    generator = np.random.default_rng(seed)
    for chosen in (np.broadcast_to(np.arange(size), (samples, size)), generator.integers(0, size, (samples, 5))):
        rows, answers = form.rows(data, output.shape, chosen, blocks), form.answers(output, chosen, blocks)
        assert rows.dtype == np.float32 and rows.shape == (blocks, chosen.size, matrix.shape[1])
        assert answers.shape == (blocks, chosen.size, matrix.shape[2])
        made = rows @ matrix + np.broadcast_to(vector.reshape(-1), blocks * matrix.shape[2]).reshape(blocks, 1, -1)
        np.testing.assert_allclose(made, answers, rtol=1e-4, atol=1e-4)
    axis = form.data_axis if isinstance(form, Dense) else 1
    per_block = data.shape[axis] // blocks
    reads = form.inputs_of(weight.shape, blocks)
    for channel in range(per_block):  # that channel alone, of every block
        alone = np.zeros_like(np.moveaxis(data, axis, 0))
        alone[channel::per_block] = 1
        rows = form.rows(np.moveaxis(alone, 0, axis), output.shape, np.broadcast_to(np.arange(size), (samples, size)), blocks)
        assert not rows[:, :, reads != channel].any() and rows[:, :, reads == channel].any()


@st.composite
def windows(draw: st.DrawFn, rank: int, transposed: bool = False) -> dict[str, Any]:
    """Sizes and attributes of a convolution that has an output."""

    def each(low: int, high: int) -> list[int]:
        return [draw(st.integers(low, high)) for _ in range(rank)]

    kernel, strides, dilations = each(1, 3), each(1, 3), each(1, 2)
    group = draw(st.integers(1, 3))
    inputs = group * draw(st.integers(1, 3))
    outputs = group * draw(st.integers(1, 3))
    sides = [draw(st.integers((length - 1) * dilation + 1, 7)) for length, dilation in zip(kernel, dilations, strict=True)]
    attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": strides, "dilations": dilations, "group": group}
    padding = draw(st.sampled_from(["none", "pads", "VALID", "SAME_UPPER", "SAME_LOWER"][: 3 if transposed else 5]))
    if padding == "pads":
        attributes["pads"] = [
            draw(st.integers(0, (length - 1) * dilation)) for length, dilation in zip(kernel * 2, dilations * 2, strict=True)
        ]
        if transposed:  # an output must be left
            attributes["pads"] = [min(value, (side - 1) // 2) for value, side in zip(attributes["pads"], sides * 2, strict=True)]
            if draw(st.booleans()):
                attributes["output_padding"] = [draw(st.integers(0, max(0, stride - 1))) for stride in strides]
    elif padding != "none":
        attributes["auto_pad"] = padding
        if padding != "VALID":  # onnxruntime knows no dilated SAME for more than one step
            attributes["dilations"] = [1] * rank
    return {"inputs": inputs, "outputs": outputs, "sides": sides, "bias": draw(st.booleans()), "attributes": attributes}


def convolution(kind: str, case: dict[str, Any]) -> onnx.ModelProto:
    b, own = Builder(), case["attributes"]
    x = b.input(["N", case["inputs"], *case["sides"]])
    shape = (case["outputs"], case["inputs"] // own["group"])
    if kind == "ConvTranspose":
        shape = (case["inputs"], case["outputs"] // own["group"])
    operands = [b.weight(*shape, *own["kernel_shape"])] + ([b.weight(case["outputs"])] if case["bias"] else [])
    return b.model(b.op(kind, x, *operands, **own))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolutions(rank: int) -> None:
    @examples(25)
    @given(windows(rank), st.integers(0, 99))
    def check(case: dict[str, Any], seed: int) -> None:
        check_form(convolution("Conv", case), seed)

    check()


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_transposed_convolutions(rank: int) -> None:
    @examples(25)
    @given(windows(rank, transposed=True), st.integers(0, 99))
    def check(case: dict[str, Any], seed: int) -> None:
        check_form(convolution("ConvTranspose", case), seed)

    check()


@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise(multiplier: int) -> None:
    own = {"kernel_shape": [3, 3], "strides": [2, 1], "group": 4, "pads": [1, 0, 0, 2]}
    check_form(convolution("Conv", {"inputs": 4, "outputs": 4 * multiplier, "sides": [6, 5], "bias": True, "attributes": own}))


@pytest.mark.parametrize("pad", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("stride", [1, 2])
def test_automatic_padding_of_even_kernels(pad: str, stride: int) -> None:
    own = {"kernel_shape": [4, 2], "strides": [stride, stride], "group": 1, "auto_pad": pad}
    check_form(convolution("Conv", {"inputs": 2, "outputs": 3, "sides": [7, 6], "bias": True, "attributes": own}))


def test_what_follows_from_the_output_size_has_no_form() -> None:
    own = {"kernel_shape": [3, 3], "strides": [2, 2], "group": 1, "auto_pad": "SAME_UPPER"}
    model = convolution("ConvTranspose", {"inputs": 2, "outputs": 3, "sides": [4, 4], "bias": True, "attributes": own})
    assert only_layer(model).linear is None


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("second", [0, 1])
@pytest.mark.parametrize("bias", [(), (5,), (1, 5)])
def test_gemm(first: int, second: int, bias: tuple[int, ...]) -> None:
    b = Builder()
    x = b.input([4, 3] if first else ["N", 4])
    weight = b.weight(5, 4) if second else b.weight(4, 5)
    operands = [b.const(b.random.standard_normal(bias))] if bias else []
    model = b.model(b.op("Gemm", x, weight, *operands, transA=first, transB=second, alpha=0.7, beta=-1.5))
    check_form(model)


@pytest.mark.parametrize("shape", [["N", 4], ["N", 3, 4], ["N", 2, 3, 4]])
def test_matrix_products(shape: list[int | str]) -> None:
    b = Builder()
    check_form(b.model(b.op("MatMul", b.input(shape), b.weight(4, 5))))


@pytest.mark.parametrize("shape", [[4, 3], ["N", 4, 3], ["N", 2, 4, 3]])
def test_a_constant_on_the_left(shape: list[int | str]) -> None:
    b = Builder()
    x = b.input(shape)
    check_form(b.model(b.op("MatMul", b.weight(5, 4), x)))


@pytest.mark.parametrize(
    ("equation", "data", "weight"),
    [
        ("nck,ko->nco", ["N", 3, 4], (4, 5)),
        ("nck,ok->nco", ["N", 3, 4], (5, 4)),
        ("nkc,ko->noc", ["N", 4, 3], (4, 5)),
        ("nkhw,ok->nohw", ["N", 4, 3, 2], (5, 4)),
        ("nck,ok->onc", ["N", 3, 4], (5, 4)),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_einsum(equation: str, data: list[int | str], weight: tuple[int, ...], swapped: bool) -> None:
    b = Builder()
    operands = [b.input(data), b.weight(*weight)]
    left, right = equation.split("->")
    if swapped:
        operands, left = operands[::-1], ",".join(left.split(",")[::-1])
    check_form(b.model(b.op("Einsum", *operands, equation=f"{left}->{right}")))


@pytest.mark.parametrize("equation", ["nck,ok->cno", "nck,nk->nc", "nck,kop->ncop"])
def test_einsum_without_a_form(equation: str) -> None:
    """The data's axes change their order, the weight has the batch's axis, or more than two axes."""
    b = Builder()
    shapes = {"nck,ok->cno": (5, 4), "nck,nk->nc": (2, 4), "nck,kop->ncop": (4, 5, 6)}
    model = b.model(b.op("Einsum", b.input([2, 3, 4]), b.weight(*shapes[equation]), equation=equation))
    assert all(layer.linear is None for layer in sfp_onnx.inspect(model).coupling.layers)
