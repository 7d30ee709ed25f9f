"""Tokens that an attention mask switches off are no data: whatever they are, every number and every byte is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from building import Builder, run, with_all_tensors

import sfp_onnx
from sfp_onnx.core.options import PlanOptions, RepairOptions
from sfp_onnx.core.types import Tokens
from sfp_onnx.coupling import analysis as analysed
from sfp_onnx.coupling.analysis import silent
from sfp_onnx.pipeline import scored
from sfp_onnx.scores import statistics
from sfp_onnx.scores.shares import Seen, joined

WORDS, WIDTH, HEADS, SIZE, HIDDEN, LENGTH = 30, 12, 3, 4, 16, 8
HALF = PlanOptions(targets=("macs=60%",), threads=1)


def encoder(mask: str = "sub", flat: bool = False, pooled: bool = True, hidden: float = -1e9) -> onnx.ModelProto:
    """One layer of attention and one of two products. ``mask``: how it gets into the Softmax ("": not at all); ``flat``: the inner products
    see tokens of all samples in a row; ``pooled``: the output is one vector for each sample, else one for each token."""
    b = Builder()
    kinds = {"ids": onnx.TensorProto.INT64, "mask": onnx.TensorProto.FLOAT if mask in ("floating", "added") else onnx.TensorProto.INT64}
    ids, given = (b.input(["batch", "length"], name, kind) for name, kind in kinds.items())
    x = b.op("Gather", b.weight(WORDS, WIDTH, fan_in=1), ids)

    def dense(data: str, inputs: int, outputs: int, name: str) -> str:
        return b.op("Add", b.op("MatMul", data, b.weight(inputs, outputs, fan_in=inputs), name=name), b.weight(outputs))

    def heads(name: str, perm: list[int]) -> str:
        return b.op("Transpose", b.op("Reshape", dense(x, WIDTH, HEADS * SIZE, name), b.const([0, 0, HEADS, SIZE], np.int64)), perm=perm)

    logits = b.op("Mul", b.op("MatMul", heads("q", [0, 2, 1, 3]), heads("k", [0, 2, 3, 1])), b.const(SIZE**-0.5))
    wide = b.axes_op("Unsqueeze", given, [1, 2])
    seen = b.op("Cast", given, to=1)
    if mask == "added":
        logits, seen = b.op("Add", logits, wide), b.op("Cast", b.op("Equal", given, b.const(0.0)), to=1)
    elif mask in ("sub", "floating"):
        off = b.op("Mul", b.op("Sub", b.const(1.0), b.op("Cast", wide, to=1)), b.const(hidden))
        logits = b.op("Add", logits, off)
    elif mask == "where":
        logits = b.op("Where", b.op("Equal", wide, b.const(0, np.int64)), b.const(hidden), logits)
    elif mask == "inverted":
        logits = b.op("Where", b.op("Cast", wide, to=9), b.const(hidden), logits)
        seen = b.op("Sub", b.const(1.0), seen)
    mixed = b.op("Transpose", b.op("MatMul", b.op("Softmax", logits, axis=-1), heads("v", [0, 2, 1, 3])), perm=[0, 2, 1, 3])
    x = b.op("Add", x, dense(b.op("Reshape", mixed, b.const([0, 0, HEADS * SIZE], np.int64)), HEADS * SIZE, WIDTH, "proj"))
    inner = b.op("Reshape", x, b.const([-1, WIDTH], np.int64)) if flat else x
    inner = dense(b.op("Relu", dense(inner, WIDTH, HIDDEN, "up")), HIDDEN, WIDTH, "down")
    x = b.op("Add", x, b.op("Reshape", inner, b.op("Shape", x)) if flat else inner)
    if pooled:
        x = b.reduce("ReduceSum", b.op("Mul", x, b.axes_op("Unsqueeze", seen, [2])), [1], keepdims=0)
        x = b.op("Div", x, b.reduce("ReduceSum", seen, [1], keepdims=1))
    return b.model(dense(x, WIDTH, 5, "last"))


def sentences(garbage: int = 0, samples: int = 96, inverted: bool = False) -> dict[str, np.ndarray]:
    """Sentences of 2 to 8 words; behind them the mask is 0, and the words are drawn with the seed ``garbage``."""
    random = np.random.default_rng(7)
    lengths = random.integers(2, LENGTH + 1, samples)
    on = np.arange(LENGTH) < lengths[:, None]
    ids = random.integers(1, WORDS, (samples, LENGTH))
    ids = np.where(on, ids, np.random.default_rng(garbage).integers(0, WORDS, ids.shape))
    return {"ids": ids, "mask": (on != inverted).astype(np.int64)}


def known(model: onnx.ModelProto) -> Tokens | None:
    return sfp_onnx.inspect(model).prepared.tokens


@pytest.mark.parametrize("mask", ["sub", "where", "inverted", "floating", "added"])
@pytest.mark.parametrize("flat", [False, True])
def test_a_mask_and_its_tokens_are_found(mask: str, flat: bool) -> None:
    model = encoder(mask, flat)
    analysis = sfp_onnx.inspect(model)
    tokens = analysis.prepared.tokens
    assert tokens is not None and tokens.mask == "mask" and tokens.inverted == (mask in ("inverted", "added"))
    made = {layer.node.name: layer.node.outputs[0] for layer in analysis.coupling.layers if layer.linear is not None}
    assert {made[name] for name in ("q", "k", "v", "proj")} <= tokens.laid and made["last"] not in tokens
    assert {made[name] for name in ("up", "down")} <= (tokens.flat if flat else tokens.laid)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(encoder(""), id="no attention is masked"),
        pytest.param(encoder(hidden=-0.5), id="the mask hides little"),
        pytest.param(encoder("inverted", pooled=False, hidden=0.0), id="the mask does nothing"),
    ],
)
def test_what_hides_nothing_is_no_mask(model: onnx.ModelProto) -> None:
    assert known(model) is None


def test_ids_are_no_mask() -> None:
    """Though they are compared for one inside of the model."""
    model = encoder()
    assert [item.name for item in model.graph.input] == ["ids", "mask"]
    for node in model.graph.node:
        node.input[:] = ["there" if name == "mask" else name for name in node.input]
    there = onnx.helper.make_node("Cast", ["ids"], ["nonzero"], to=onnx.TensorProto.BOOL)
    model.graph.node.insert(0, onnx.helper.make_node("Cast", ["nonzero"], ["there"], to=onnx.TensorProto.INT64))
    model.graph.node.insert(0, there)
    del model.graph.input[1]
    assert known(model) is None


def pruned(model: onnx.ModelProto, data: dict[str, np.ndarray], **named: Any) -> bytes:
    """The bytes of a repaired model."""
    result = sfp_onnx.prune(model, options=HALF, data=data, repair=RepairOptions(), **named)
    assert result.repaired is not None and any(fit.kind == "weights" for fit in result.repaired.fits)
    return bytes(result.to_proto().SerializeToString())


@pytest.mark.parametrize(("flat", "pooled", "score"), [(False, True, "obs"), (True, False, "obs"), (True, True, "contribution")])
def test_the_repaired_model_does_not_depend_on_tokens_that_are_off(
    flat: bool, pooled: bool, score: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = encoder(flat=flat, pooled=pooled)
    first = pruned(model, sentences(0), score_name=score)
    assert pruned(model, sentences(1), score_name=score) == first
    monkeypatch.setattr(analysed, "tokens_of", lambda prepared: None)
    assert pruned(model, sentences(0), score_name=score) != pruned(model, sentences(1), score_name=score)  # or this would prove nothing


@pytest.mark.parametrize(("pooled", "recipe"), [(True, "blocks"), (False, "features")])
def test_training_does_not_depend_on_tokens_that_are_off(pooled: bool, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="the extra `train` is not installed")
    from sfp_onnx.methods.training import TrainOptions, tuning

    model = encoder(pooled=pooled)
    small = sfp_onnx.prune(model, options=HALF, data=sentences(), repair=None)

    def tuned(garbage: int) -> bytes:
        data = sfp_onnx.open_data(sentences(garbage, 200), analysed.inputs(small.original))
        options = TrainOptions(recipe=recipe, epochs=3, lr=3e-3, train_batch=32)
        result = tuning.tuned(small.model, small.original, tuning.kept_channels(small.cuts), data, options)
        assert result.kept and result.tasks
        return bytes(sfp_onnx.graph.save.to_proto(result.model).SerializeToString(deterministic=True))

    first = tuned(0)
    assert tuned(1) == first
    monkeypatch.setattr(analysed, "tokens_of", lambda prepared: None)
    assert tuned(0) != tuned(1)  # or this would prove nothing


def test_samples_without_tokens_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Also where they come first; data of nothing else are refused."""
    model, data = encoder(pooled=False), sentences()
    empty = {name: np.concatenate([np.zeros((20, LENGTH), np.int64), array]) for name, array in data.items()}
    caplog.set_level("INFO", "sfp_onnx")
    pruned(model, empty)
    assert "20 samples have no others" in caplog.text
    with pytest.raises(sfp_onnx.DataError, match=f"switches off all {96 * LENGTH} tokens"):
        pruned(model, {**data, "mask": np.zeros_like(data["mask"])})


def test_statistics_are_those_of_the_tokens_that_are_there() -> None:
    for flat in (False, True):
        model, data = encoder(flat=flat), sentences()
        analysis = sfp_onnx.inspect(model)
        found = statistics.moments_of(analysis, sfp_onnx.open_data(data, analysed.inputs(analysis.model)), {"squares"}, silent)
        whole = with_all_tensors(model)
        arrays = dict(zip([item.name for item in whole.graph.output], run(whole, data), strict=True))
        layer = next(layer for layer in analysis.coupling.layers if layer.node.name == "down")
        rows = arrays[layer.data_name].reshape(-1, HIDDEN)[data["mask"].reshape(-1) == 1].astype(np.float64)
        moments = found[layer.data_name, layer.data_axis]
        assert moments.count == len(rows)
        np.testing.assert_allclose(moments.sums["squares"], np.square(rows).sum(0), rtol=1e-5)


def test_measures_compare_the_tokens_that_are_there() -> None:
    model = encoder(pooled=False)
    small = sfp_onnx.prune(model, options=HALF, data=sentences(), repair=None).to_proto()
    one, other = (sfp_onnx.evaluate([model, small], sentences(seed), latency=None)[1] for seed in (0, 1))
    assert one.measures == other.measures and one.samples == 96 and one.value
    data = sentences()
    old, new = (run(own, data)[0][data["mask"] == 1].astype(np.float64) for own in (model, small))
    errors = np.sqrt(np.square(new - old).mean(0) / old.var(0))
    assert one.value == pytest.approx(float(np.sqrt(np.square(errors).mean())), rel=1e-4)


def test_parts_add_up_where_rows_are_left_out(tmp_path: Path) -> None:
    onnx.save(encoder(), tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", **sentences(samples=400))
    files = [tmp_path / f"{number}.npz" for number in range(1, 4)]
    for number, file in enumerate(files, 1):
        scored.calibrate(tmp_path / "model.onnx", file, f"{number}/3", data=tmp_path / "data.npz", options=PlanOptions(threads=1))
    direct = sfp_onnx.plan(tmp_path / "model.onnx", HALF, data=tmp_path / "data.npz")
    assert sfp_onnx.plan(tmp_path / "model.onnx", HALF, statistics=files).groups == direct.groups


@pytest.mark.parametrize("cuts", [[4], [1, 2, 5]])
def test_stretches_lie_where_they_lie_in_one_pass(cuts: list[int]) -> None:
    random = np.random.default_rng(0)
    batches = [random.standard_normal((1, 40, 64)).astype(np.float32) for _ in range(9)]
    on = [random.random((8, 5)) < 0.5 for _ in batches]

    def seen(first: int, last: int) -> Seen:
        own = Seen.nothing(batches[0], np.ones(1), True)
        for at in range(9 if first else 0):
            own.centre(batches[at], 8, at == 8, on[at])
        for at in range(first, last):
            own.add(batches[at], 8, at, on[at])
            own.answered(batches[at].astype(float), on[at])
        return own

    whole, edges = seen(0, 9), [0, *cuts, 9]
    together = joined([dict(seen(a, b).arrays()).get for a, b in zip(edges, edges[1:], strict=False)])
    assert together is not None and whole.scatter is not None and together.scatter is not None
    rows = np.concatenate([batch[0][one.reshape(-1)] for batch, one in zip(batches, on, strict=True)]).astype(np.float64)
    found = whole.gathered.sums().summed()
    np.testing.assert_allclose(found.gram[0], rows.T @ rows, rtol=0, atol=1e-4)
    for name in ("gram", "rows", "count"):
        np.testing.assert_array_equal(getattr(together.gathered.sums().summed(), name), getattr(found, name))
    assert (together.scatter.rows, together.scatter.places) == (whole.scatter.rows, whole.scatter.places) == (len(rows), 360)


def test_padded_sentences_say_what_sentences_of_their_length_say(tmp_path: Path) -> None:
    padded = sentences(samples=40)
    lengths = padded["mask"].sum(1)
    own = [{name: array[row, : lengths[row]] for name, array in padded.items()} for row in range(40)]
    analysis = sfp_onnx.inspect(encoder())
    one, other = (
        statistics.moments_of(analysis, sfp_onnx.open_data(data, analysed.inputs(analysis.model)), {"squares"}, silent)
        for data in (padded, own)
    )
    for site, moments in one.items():
        assert moments.count == other[site].count
        np.testing.assert_allclose(moments.sums["squares"], other[site].sums["squares"], rtol=1e-4)
    with pytest.raises(sfp_onnx.OptionError, match="different shapes, which are measured in one pass"):
        scored.calibrate(encoder(), tmp_path / "part.npz", "1/2", data=own)


def test_the_first_sentence_may_be_one_word() -> None:
    """Of which a trial could tell nothing; without a mask, outputs of other lengths have the same channels."""
    data = sentences(samples=60)
    own = [{name: array[row, : 1 if row < 3 else 8 - row % 3] for name, array in data.items()} for row in range(60)]
    model = encoder(pooled=False)
    opened = sfp_onnx.open_data(own, analysed.inputs(sfp_onnx.load(model)))
    assert sfp_onnx.inspect(model, data=opened).prepared.tokens is not None
    constant = onnx.helper.make_node("ConstantOfShape", ["size"], ["mask"], value=onnx.helper.make_tensor("one", 7, [1], [1]))
    model.graph.node.insert(0, constant)
    model.graph.node.insert(0, onnx.helper.make_node("Shape", ["ids"], ["size"]))
    del model.graph.input[1]
    lone = [{"ids": feeds["ids"]} for feeds in own]
    assert pruned(model, lone)
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_param = "classes"
    with pytest.raises(sfp_onnx.DataError, match="longer in some samples"):
        pruned(model, lone)


def test_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    data = sentences()
    off = int((data["mask"] == 0).sum())
    caplog.set_level("INFO", "sfp_onnx")
    result = sfp_onnx.prune(encoder(), options=HALF, data=data)
    assert f"rows of {off} tokens that 'mask' switches off" in caplog.text
    assert any("tokens that 'mask' switches off" in note and "all rows count of 1 layers" in note for note in result.notes)
    caplog.clear()
    result = sfp_onnx.prune(encoder(), options=HALF, data={**data, "mask": np.ones_like(data["mask"])})
    assert not any("switches off" in text for text in (*result.notes, caplog.text))
