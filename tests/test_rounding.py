"""Rounding is no wrong cut, and a wrong cut is no rounding: outputs that magnify last bits, step at ties, or are drawn at random."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import invoke, run_model
from onnx import TensorProto, helper, numpy_helper
from test_door import case

import sfp_onnx
from sfp_onnx import graph
from sfp_onnx.core.errors import VerificationError
from sfp_onnx.graph.extract import with_constants
from sfp_onnx.pipeline import applied
from sfp_onnx.runtime import open_model

node = helper.make_node


def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(shape).standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def network(tail: list[onnx.NodeProto], outputs: dict[str, int], **constants: Any) -> onnx.ModelProto:
    """x (N, 24) -> Gemm 24 -> 300 -> Relu -> Gemm 300 -> 40 -> Relu r -> Gemm 40 -> 200 = h -> the tail."""
    arrays = {"w0": normal(300, 24), "w1": normal(40, 300), "w2": normal(200, 40), **constants}
    front = [
        node("Gemm", ["x", "w0"], ["a"], "first", transB=1), node("Relu", ["a"], ["b"], "relu1"),
        node("Gemm", ["b", "w1"], ["c"], "second", transB=1), node("Relu", ["c"], ["r"], "relu2"),
        node("Gemm", ["r", "w2", *(["b2"] if "b2" in constants else [])], ["h"], "third", transB=1),
    ]  # fmt: skip
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
    ports = [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()]
    made = helper.make_graph(front + tail, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 24])], ports, tensors)
    if any(item.domain for item in tail):
        pairs = helper.make_map_type_proto(L, helper.make_tensor_type_proto(F, None))
        made.output[0].type.CopyFrom(helper.make_sequence_type_proto(pairs))
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)], ir_version=8)


F, L, B = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
LOW = np.full(200, -16, np.float32)


def twins(tail: list[onnx.NodeProto], outputs: dict[str, int], **constants: Any) -> onnx.ModelProto:
    """Every second class is the same as that before it, but for the order of its sum."""
    made = network([node("Gather", ["r", "order"], ["r1"], axis=1), node("Gemm", ["r1", "w3"], ["h1"], transB=1),
                    node("Concat", ["h", "h1"], ["all"], axis=1), *tail], outputs, **constants)  # fmt: skip
    weight = next(numpy_helper.to_array(tensor) for tensor in made.graph.initializer if tensor.name == "w2")
    order = np.arange(40)[::-1].copy()
    made.graph.initializer.extend([numpy_helper.from_array(order, "order"), numpy_helper.from_array(weight[:, order].copy(), "w3")])
    return made


def division() -> onnx.ModelProto:
    """Over a difference of what is the same but for the order of sums."""
    tail = [node("Sub", ["h", "h1"], ["d"], "difference"), node("Add", ["d", "least"], ["e"]), node("Div", ["h", "e"], ["y"], "quotient")]
    return twins(tail, {"y": F}, least=np.float32(1e-7))


def boxes() -> onnx.ModelProto:
    """NMS among pairs of boxes that are scored the same."""
    tail = [
        node("Unsqueeze", ["all", "one"], ["scores"]), node("Shape", ["h"], ["s"]), node("Gather", ["s", "zero"], ["n"]),
        node("Concat", ["n", "rest"], ["wide"], axis=0), node("Expand", ["boxes", "wide"], ["many"]),
        node("NonMaxSuppression", ["many", "scores", "most", "over"], ["y"], "nms"),
    ]  # fmt: skip
    place = np.repeat(np.arange(400) // 2, 4).reshape(1, 400, 4).astype(np.float32) + np.float32([0, 0, 1, 1])
    return twins(tail, {"y": L}, one=np.array([1]), zero=np.array([0]), rest=np.array([400, 4]), boxes=place, most=np.array([9]),
                 over=np.array([0.5], np.float32))  # fmt: skip


MAGNIFIES: dict[str, Callable[[], onnx.ModelProto]] = {
    "Sigmoid near 0": lambda: network([node("Sigmoid", ["h"], ["y"])], {"y": F}, b2=LOW),
    "Softmax near 0": lambda: network(
        [node("Concat", ["h", "high"], ["g"], axis=1), node("Softmax", ["g"], ["s"]), node("Slice", ["s", "from", "to", "axis"], ["y"])],
        {"y": F}, b2=LOW, high=np.full((2, 1), 9, np.float32), **{"from": np.array([0]), "to": np.array([200]), "axis": np.array([1])},
    ),
    "Exp near 0": lambda: network([node("Mul", ["h", "k"], ["g"]), node("Exp", ["g"], ["y"])], {"y": F}, b2=LOW, k=np.float32(4)),
    "division": division,
    "ArgMax": lambda: twins([node("ArgMax", ["all"], ["y"], axis=1)], {"y": L}),
    "TopK": lambda: twins([node("TopK", ["all", "k"], ["v", "y"])], {"v": F, "y": L}, k=np.array([5])),
    "NMS": boxes,
    "comparison": lambda: twins([node("Greater", ["h", "h1"], ["y"])], {"y": B}),
    "Round": lambda: network([node("Mul", ["h", "k"], ["g"]), node("Round", ["g"], ["y"])], {"y": F}, k=np.float32(3e5)),
    "map": lambda: network(
        [node("Softmax", ["h"], ["s"]), node("ZipMap", ["s"], ["y"], domain="ai.onnx.ml", classlabels_int64s=list(range(200)))], {"y": F}
    ),
    "Cast": lambda: network([node("Mul", ["h", "k"], ["g"]), node("Cast", ["g"], ["y"], to=L)], {"y": L}, k=np.float32(3e5)),
}  # fmt: skip


def steep() -> onnx.ModelProto:
    """What turns last bits into more, with layers behind it that are cut, too."""
    tail = [
        node("Mul", ["h", "k"], ["g"]), node("Sin", ["g"], ["n"]), node("Gemm", ["n", "w5"], ["p"], "fifth", transB=1),
        node("Relu", ["p"], ["q"]), node("Gemm", ["q", "w6"], ["y"], "sixth", transB=1),
    ]  # fmt: skip
    return network(tail, {"y": F}, k=np.float32(3e3), w5=normal(300, 200), w6=normal(4, 300))


def test_a_difference_that_rounding_alone_makes_is_accepted_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    result = chosen(steep())
    assert result.verification is not None and 1e-4 < result.verification.tolerance <= 1e-2
    assert any("than rounding alone" in note for note in result.notes)
    with pytest.raises(VerificationError):
        wrong(monkeypatch, lambda model: with_constants(model, {"w6": graph.Constants(model)["w6"] * np.float32(1.05)}))
        chosen(steep())


def chosen(model: onnx.ModelProto, **options: Any) -> Any:
    return sfp_onnx.prune(model, sfp_onnx.PlanOptions(ratio=0.3, align="none"), **options)


def wrong(monkeypatch: pytest.MonkeyPatch, change: Callable[[graph.Model], graph.Model]) -> None:
    right = applied.cut
    monkeypatch.setattr(applied, "cut", lambda *arguments: change(right(*arguments)))


@pytest.mark.parametrize("name", MAGNIFIES)
def test_rounding_is_no_wrong_cut(name: str) -> None:
    result = chosen(MAGNIFIES[name]())
    assert result.verification is not None
    assert max(result.verification.errors.values()) <= 1e-4
    if name in ("Sigmoid near 0", "division", "ArgMax", "TopK", "NMS", "comparison", "Cast"):
        assert any("behind which rounding shows" in note for note in result.notes)


@pytest.mark.parametrize("name", MAGNIFIES)
def test_a_wrong_cut_is_no_rounding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept channels with wrong weights."""

    def change(model: graph.Model) -> graph.Model:
        weight = graph.Constants(model)["w1"].copy()
        weight[::2] *= 1.05
        return with_constants(model, {"w1": weight})

    wrong(monkeypatch, change)
    with pytest.raises(VerificationError, match=r"differs from the masked original.*Nothing was written"):
        chosen(MAGNIFIES[name]())


@pytest.mark.parametrize("name", ["Sigmoid near 0", "ArgMax", "NMS", "Cast"])
def test_another_channel_than_planned_is_no_rounding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(model: graph.Model) -> graph.Model:
        weight = graph.Constants(model)["w2"]
        return with_constants(model, {"w2": weight[:, ::-1].copy()})

    wrong(monkeypatch, change)
    with pytest.raises(VerificationError):
        chosen(MAGNIFIES[name]())


def test_double_precision_is_held_to_its_own_grain(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network([node("Sigmoid", ["h"], ["y"])], {"y": TensorProto.DOUBLE})
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    assert chosen(model).verification is not None
    wrong(monkeypatch, lambda found: with_constants(found, {"w2": graph.Constants(found)["w2"] * (1 + 1e-6)}))
    with pytest.raises(VerificationError):
        chosen(model)


def test_inputs_that_the_compared_tensors_do_not_need() -> None:
    model = network([node("ArgMax", ["h"], ["y"], axis=1), node("Neg", ["other"], ["z"])], {"y": L, "z": F})
    model.graph.input.append(helper.make_tensor_value_info("other", F, ["N"]))
    assert chosen(model).verification is not None


# ---- at a step in the middle, everything behind is compared as well --------------------------------------------------


def gated() -> onnx.ModelProto:
    """A mask of ties in the middle, and layers behind it that are cut."""
    tail = [node("Equal", ["g1", "g2"], ["k"]), node("Cast", ["k"], ["f"], to=F), node("Gemm", ["f", "w5"], ["p"], transB=1),
            node("Relu", ["p"], ["q"]), node("Gemm", ["q", "w6"], ["y"], "sixth", transB=1)]  # fmt: skip
    made = twins(tail, {"y": F}, w5=normal(32, 200), w6=normal(4, 32))
    names = {"g1": "h", "g2": "h1"}
    for item in made.graph.node:
        item.input[:] = [names.get(name, name) for name in item.input]
    return made


def test_layers_behind_a_step_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(gated()).verification is not None

    def change(model: graph.Model) -> graph.Model:
        return with_constants(model, {"w6": graph.Constants(model)["w6"] * np.float32(1.01)})

    wrong(monkeypatch, change)
    with pytest.raises(VerificationError):
        chosen(gated())


# ---- random numbers --------------------------------------------------------------------------------------------------


def drawn(op: str, **attributes: Any) -> onnx.ModelProto:
    """Noise of an operator on what the first layers give, and two layers behind it."""
    source = {"RandomNormal": [], "RandomUniform": []}.get(op, ["s"])
    tail = [
        node("Sigmoid", ["h"], ["s"]), node(op, source, ["noise"], "noise", **attributes), node("Cast", ["noise"], ["e"], to=F),
        node("Add", ["h", "e"], ["z"]), node("Gemm", ["z", "w5"], ["p"], transB=1), node("Relu", ["p"], ["q"]),
        node("Gemm", ["q", "w6"], ["y"], "sixth", transB=1),
    ]  # fmt: skip
    return network(tail, {"y": F}, w5=normal(32, 200), w6=normal(4, 32))


DRAWN = {
    "RandomNormalLike": {}, "RandomUniformLike": {"low": -1.0, "high": 1.0}, "Bernoulli": {}, "RandomNormal": {"shape": [1, 200]},
    "RandomUniform": {"shape": [1, 200]}, "Multinomial": {"sample_size": 1},
}  # fmt: skip


@pytest.mark.parametrize("op", DRAWN)
def test_random_operators_draw_the_same_while_models_are_compared(op: str) -> None:
    model = drawn(op, **DRAWN[op])
    x = np.random.default_rng(5).standard_normal((48, 24)).astype(np.float32)
    result = chosen(model, data={"x": x}, repair=sfp_onnx.RepairOptions(force=True))
    assert result.verification is not None and result.repaired is not None
    assert result.repaired.after < 0.9
    written = graph.save.to_proto(result.model)
    assert all(item.name != "seed" for made in written.graph.node for item in made.attribute)
    assert np.isfinite(run_model(written, {"x": x})[0]).all()


def test_seeds_that_a_model_has_stay_and_nodes_draw_apart() -> None:
    tail = [node("RandomNormalLike", ["h"], [f"n{index}"], **given) for index, given in enumerate(({}, {}, {"seed": 3.0}))]
    proto = network([*tail, node("Sum", ["n0", "n1", "n2"], ["y"])], {"y": F})
    model = graph.Model(proto, {}, "")
    seeds = [item.f for made in graph.seeded(model).proto.graph.node for item in made.attribute if item.name == "seed"]
    assert len(set(seeds)) == 3 and seeds[2] == 3.0
    x = {"x": normal(2, 24)}
    assert np.array_equal(open_model(model).run(x)[0], open_model(model).run(x)[0])


@pytest.mark.parametrize("opset", [11, 12, 13, 17])
def test_a_seed_is_of_the_type_that_the_operator_set_takes(opset: int) -> None:
    proto = network([node("Dropout", ["h"], ["y"])], {"y": F})
    proto.opset_import[0].version = opset
    model = graph.Model(proto, {}, "")
    assert np.array_equal(open_model(model).run({"x": normal(2, 24)})[0], run_model(proto, {"x": normal(2, 24)})[0])
    assert (graph.seeded(model) is model) == (opset < 12)


# ---- the models of others --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["C1_sigmoid_tail", "H1_random_normal"])
def test_models_of_others(name: str, tmp_path: Path) -> None:
    path, out = case(name), tmp_path / "out.onnx"
    done = invoke("prune", path, "-o", out, "--ratio", 0.3, "--data", path.with_suffix(".npz"))
    assert done.exit_code == 0 and out.is_file(), done.output
