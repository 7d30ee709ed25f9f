"""Dilution: masks against naive loops, the registry under one contract, dead channels, sparse files, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.checker
import pytest
from conftest import classifier, images, invoke, labels_of, model_of, relative, run_model
from onnx import helper, numpy_helper

import sfp_onnx
from sfp_onnx import graph
from sfp_onnx.core.errors import DataError, OptionError, TargetError
from sfp_onnx.core.options import RepairOptions
from sfp_onnx.methods.dilution import (
    METHODS,
    Ends,
    KernelView,
    MethodOptions,
    Profile,
    even_labels,
    find_method,
    keep_by_rank,
    label_profile,
)
from sfp_onnx.methods.dilution.connections import Chosen, choose, targets
from sfp_onnx.methods.dilution.ends import kernel_losses, look
from sfp_onnx.methods.dilution.stages import Diluted, DiluteOptions, choose_masks, dilute
from sfp_onnx.methods.sfp.probe import ProfileOptions

NAMES = [own.pattern.replace("N:M", "2:4").replace("AxB", "1x4") or own.name for own in METHODS.values()]
RANKED = [name for name in NAMES if not find_method(name)[0].fixed]
FIXED = [name for name in NAMES if find_method(name)[0].fixed]


def profile(name: str, filters: int, labels: int, seed: int) -> Profile:
    random = np.random.default_rng(seed)
    evidence, activity = random.standard_normal((filters, labels)), random.random((filters, labels))
    return Profile(name, evidence, activity, random.random((filters, labels)) < 0.4, 2.0)


def view(outputs: int = 12, inputs: int = 10, positions: int = 9, seed: int = 0) -> KernelView:
    random = np.random.default_rng(seed)
    rows, columns = np.arange(outputs)[:, None], np.arange(inputs)[None, :]
    return KernelView(
        "layer", random.standard_normal((outputs, inputs, positions)).astype(np.float32), columns + 0 * rows, rows + 0 * columns,
        random.random(inputs) + 0.1, Ends(profile("a", inputs, 6, seed + 1), profile("b", outputs, 6, seed + 2)),
        random.random((outputs, inputs)) + 0.1,
    )  # fmt: skip


def chosen(own: KernelView, name: str, rate: float = 0.5, scope: str = "layer") -> Chosen:
    (found,) = choose(lambda: iter([own]), {"layer": "w"}, *find_method(name), rate, scope)
    return found


# ---- the contract of all methods -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("positions", [1, 9])
def test_masks_are_deterministic_and_cover_the_weight(name: str, positions: int) -> None:
    own = view(positions=positions)
    first, second = chosen(own, name), chosen(own, name)
    assert first.mask.shape == own.values.shape and first.mask.dtype == bool
    assert (first.mask == second.mask).all() and first.figures == second.figures
    assert first.figures.weights_removed == (~first.mask).sum() and first.figures.weights == first.mask.size
    assert 0 <= first.figures.lost <= 1


@pytest.mark.parametrize("name", NAMES)
def test_units_of_masking_stay_whole(name: str) -> None:
    method, options = find_method(name)
    found = chosen(view(), name)
    if method.tile(options).whole:
        assert (found.mask == found.mask[:, :, :1]).all()


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize("rate", [0.0, 0.1, 1 / 3, 0.5, 0.66, 0.8, 0.99])
def test_rates_are_hit_exactly(name: str, rate: float) -> None:
    figures = chosen(view(13, 9), name, rate).figures
    assert abs(figures.removed - rate * figures.total) <= 0.5


@pytest.mark.parametrize("name", RANKED)
def test_higher_rates_remove_more_of_the_same(name: str) -> None:
    low, high = (chosen(view(), name, rate).mask for rate in (0.3, 0.7))
    assert (low >= high).all() and low.sum() > high.sum()


# ---- each method against a loop --------------------------------------------------------------------------------------


def naive_scores(own: KernelView, name: str) -> np.ndarray:
    outputs, inputs, positions = own.values.shape
    assert own.ends is not None and own.rms is not None
    found = np.zeros((outputs, inputs, positions))
    for o in range(outputs):
        for i in range(inputs):
            kernel = own.values[o, i].astype(np.float64)
            if name == "l1":
                found[o, i] = sum(abs(item) for item in kernel)
            elif name == "wanda":
                found[o, i] = sum(item**2 for item in kernel) ** 0.5 * own.rms[i]
            elif name == "obs":
                assert own.losses is not None
                found[o, i] = (own.losses[o, i] * sum(abs(item) for item in kernel)) ** 0.5
            elif name == "magnitude":
                found[o, i] = [abs(item) for item in kernel]
    return found


@pytest.mark.parametrize("name", ["l1", "wanda", "obs", "magnitude"])
def test_scores_against_a_loop(name: str) -> None:
    own = view()
    kept, scores = chosen(own, name).mask, naive_scores(own, name)
    assert scores[kept].min() > scores[~kept].max()


def test_afcc_keeps_kernels_between_filters_with_a_common_label() -> None:
    own = view()
    assert own.ends is not None
    found = chosen(own, "afcc").mask
    for o in range(12):
        for i in range(10):
            common = set(np.flatnonzero(own.ends.writes.labels[o])) & set(np.flatnonzero(own.ends.reads.labels[i]))
            assert found[o, i].all() == bool(common) and found[o, i].any() == bool(common)


def test_afcc_at_a_classifier_keeps_the_labels_of_each_filter() -> None:
    reads = profile("a", 10, 6, 3)
    rows, columns = np.arange(6)[:, None], np.arange(10)[None, :]
    ends = Ends(reads, label_profile("y", 6))
    own = KernelView("layer", np.ones((6, 10, 1), np.float32), columns + 0 * rows, rows + 0 * columns, None, ends)
    assert (chosen(own, "afcc").mask[:, :, 0] == reads.labels.T).all()


def test_heads_stand_for_what_their_dimensions_say_together() -> None:
    from sfp_onnx.methods.sfp import probe, profiles

    random = np.random.default_rng(2)
    means, weights = (random.standard_normal((6, 4, 5)).astype(np.float32) for _ in range(2))
    sets = probe.label_sets(means, weights)
    units = np.asarray([7, 7, 7, 3, 3, 3])
    known = profiles.LayerProfile("a", "t", 2, np.arange(6), units, means, weights, *sets, 0.5)
    heads = known.heads()
    assert heads is not None and heads.units.tolist() == [7, 3]
    for head in range(2):
        field = sum(known.matrix(index) for index in range(3 * head, 3 * head + 3))
        np.testing.assert_allclose(heads.matrix(head), field, rtol=1e-4, atol=1e-5)
        assert (np.flatnonzero(heads.label_sets[head]) == np.flatnonzero(np.diag(field) >= 0.3 * field.max())).all()
    assert replace(known, units=np.arange(6)).heads() is None and replace(known, units=np.asarray([7, 7, 7, 7, 3, 3])).heads() is None


def test_andc_is_of_nodes_and_queries_stand_for_their_head() -> None:
    from test_masks import HEADS, LENGTH, SIZE, encoder, sentences

    data = sentences(0, 300)
    data["labels"] = data["ids"][:, 0] % 5
    analysis = sfp_onnx.inspect(encoder(), {name: [32, LENGTH] for name in ("ids", "mask")})
    opened = sfp_onnx.data_for(analysis.model, data)
    seen = look(analysis, "^(q|proj|up|down|last)$", opened, ProfileOptions())
    found = choose_masks(analysis, seen, DiluteOptions("andc"))
    masks = {figures.layer: found.masks[figures.weight] for figures in found.figures}
    assert set(masks) == {"proj", "up", "down"}  # embeddings are read by no layer that could say what they stand for
    assert "makes the class scores" in next(item.reason for item in found.skipped if item.layer == "last")
    ends = seen.ends["proj"]
    assert isinstance(ends, Ends) and ends.reads.labels.shape == (HEADS * SIZE, 5)
    for i, j in np.ndindex(HEADS * SIZE, 12):
        assert masks["proj"][i, j] == bool((ends.reads.labels[i] & ends.writes.labels[j]).any())
    assert any(note.startswith("heads in front of") for note in found.notes)


def test_random_label_sets_keep_their_sizes_and_are_even() -> None:
    sizes = np.asarray([3, 1, 0, 6, 2, 4, 4, 4])
    found = even_labels(sizes, 6, np.random.default_rng(0))
    assert (found.sum(1) == sizes).all()
    assert np.ptp(found.sum(0)) <= 1


def test_two_of_four_inputs_stay_at_every_position() -> None:
    own = view(5, 10)
    found = chosen(own, "nm:2:4").mask
    for o in range(5):
        for k in range(9):
            for start in (0, 4, 8):
                block = found[o, start : start + 4, k]
                assert block.sum() == 2
                values = np.abs(own.values[o, start : start + 4, k])
                assert values[block].min() >= values[~block].max(initial=0)


@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (4, 1), (2, 3)])
def test_blocks_leave_whole_and_by_their_norm(rows: int, columns: int) -> None:
    own = view(12, 10)
    found = chosen(own, f"block:{rows}x{columns}").mask
    kept, gone = [], []
    for o in range(0, 12, rows):
        for i in range(0, 10, columns):
            for k in range(9):
                block = found[o : o + rows, i : i + columns, k]
                assert block.all() or not block.any()
                (kept if block.all() else gone).append(np.abs(own.values[o : o + rows, i : i + columns, k]).mean())
    assert min(kept) >= max(gone)


def test_scopes() -> None:
    small, large = np.arange(8.0).reshape(2, 4), 100 + np.arange(8.0).reshape(2, 4)
    assert [keep.sum() for keep in keep_by_rank([small, large], 0.5, "layer")] == [4, 4]
    assert [keep.sum() for keep in keep_by_rank([small, large], 0.5, "global")] == [0, 8]
    assert [keep.sum(1).tolist() for keep in keep_by_rank([small, large], 0.5, "filter")] == [[2, 2], [2, 2]]


# ---- whole models ----------------------------------------------------------------------------------------------------


def diluted(model: onnx.ModelProto, data: bool = False, **options: Any) -> Diluted:
    loaded = sfp_onnx.load(model)
    given = sfp_onnx.data_for(loaded, {"x": images(64), "labels": labels_of(64)}) if data else None
    return dilute(loaded, DiluteOptions(**{"refit": False, **options}), given)


def weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}


def test_the_diluted_model_is_the_original_with_masked_weights() -> None:
    original = classifier(widths=(16, 24))
    result = diluted(original, method="l1", rate=0.5)
    proto = result.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    expected = onnx.ModelProto()
    expected.CopyFrom(original)
    before = weights(original)
    scale = np.abs(before["gamma"] / np.sqrt(before["var"] + 1e-5))  # the BatchNormalization behind w1 counts
    for tensor in expected.graph.initializer:
        if tensor.name in ("w1", "w2", "w3"):
            array = before[tensor.name].copy()
            norms = np.abs(array.reshape(*array.shape[:2], -1)).sum(2) * (scale[:, None] if tensor.name == "w1" else 1)
            array[norms <= np.sort(norms.reshape(-1))[round(norms.size / 2) - 1]] = 0
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    x = images()
    assert relative(run_model(proto, {"x": x})[0], run_model(expected, {"x": x})[0]) < 1e-5


@pytest.mark.parametrize("name", ["l1", "magnitude", "nm:2:4", "block:1x4", "random"])
def test_the_same_model_twice(name: str) -> None:
    rate = None if name in FIXED else 0.5
    first, second = (diluted(classifier(), method=name, rate=rate).to_proto().SerializeToString() for _ in range(2))
    assert first == second


def test_layers_are_chosen_by_name_of_node_or_weight() -> None:
    assert [item.layer for item in diluted(classifier(), method="l1", rate=0.5, layers="conv2|w3").layers] == ["conv2", "head"]


def test_depthwise_kernels_and_shared_weights_are_skipped() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], "plain", pads=[1] * 4),
        helper.make_node("Conv", ["a", "wd"], ["b"], "deep", pads=[1] * 4, group=8),
        helper.make_node("Conv", ["b", "ws"], ["c"], "one", pads=[1] * 4),
        helper.make_node("Conv", ["c", "ws"], ["y"], "two", pads=[1] * 4),
    ]
    random = np.random.default_rng(0)
    constants = {name: random.standard_normal(shape).astype(np.float32) for name, shape in
                 {"w1": (8, 3, 3, 3), "wd": (8, 1, 3, 3), "ws": (8, 8, 3, 3)}.items()}  # fmt: skip
    model = model_of(nodes, [("x", np.float32, ["N", 3, 8, 8])], [("y", np.float32, ["N", 8, 8, 8])], constants)
    result = diluted(model, method="l1", rate=0.5)
    assert [item.layer for item in result.layers] == ["plain"]
    reasons = {item.layer: item.reason for item in result.skipped}
    assert "depthwise" in reasons["deep"] and "read elsewhere" in reasons["one"] and "read elsewhere" in reasons["two"]


# ---- dead channels ---------------------------------------------------------------------------------------------------


def chain(pads: int = 0, bias: float = 1.0) -> onnx.ModelProto:
    """conv-relu-conv-relu-gap-gemm; channel 1 of the first is constant, channel 2 is read by nobody."""
    random = np.random.default_rng(0)
    w1, w2, w3 = (random.standard_normal(shape).astype(np.float32) for shape in ((4, 3, 3, 3), (6, 4, 3, 3), (5, 6)))
    b1 = np.asarray([0.1, bias, 0.2, 0.3], np.float32)
    w1[1], w2[:, 2] = 0, 0
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "conv1", pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], "conv2", pads=[pads] * 4),
        helper.make_node("Relu", ["c2"], ["r2"]),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], "head", transB=1),
    ]
    constants = {"w1": w1, "b1": b1, "w2": w2, "b2": np.ones(6, np.float32), "w3": w3, "b3": np.zeros(5, np.float32)}
    return model_of(nodes, [("x", np.float32, ["N", 3, 8, 8])], [("y", np.float32, ["N", 5])], constants)


@pytest.mark.parametrize(("pads", "bias", "width"), [(0, 1.0, 2), (1, 1.0, 3), (1, -1.0, 2)], ids=["folded", "padded", "zero"])
def test_dead_channels_leave_and_the_rest_is_the_same(pads: int, bias: float, width: int) -> None:
    model = chain(pads, bias)
    result = diluted(model, method="magnitude", rate=0.0)
    proto = result.to_proto()
    assert weights(proto)["w1"].shape[0] == width and result.cut == 4 - width
    assert relative(run_model(proto, {"x": images()})[0], run_model(model, {"x": images()})[0]) < 1e-5
    assert any("constant channels were left" in note for note in result.notes) == (width == 3)


# ---- sparse files ----------------------------------------------------------------------------------------------------


def test_sparse_initializers_are_smaller_run_and_load_as_dense(tmp_path: Path) -> None:
    model = classifier(widths=(32, 64))
    result = diluted(model, method="magnitude", rate=0.9)
    dense, sparse = result.save(tmp_path / "dense.onnx"), result.save(tmp_path / "sparse.onnx", sparse=True)
    proto = onnx.load(sparse)
    onnx.checker.check_model(proto)
    assert {item.values.name for item in proto.graph.sparse_initializer} >= {"w2"}
    assert sparse.stat().st_size < 0.4 * dense.stat().st_size
    x = images()
    assert (run_model(sparse, {"x": x})[0] == run_model(dense, {"x": x})[0]).all()
    again = graph.save.to_proto(sfp_onnx.load(sparse))
    assert not again.graph.sparse_initializer and {k: v.tobytes() for k, v in weights(again).items()} == {
        k: v.tobytes() for k, v in weights(onnx.load(dense)).items()
    }
    first, second = (sfp_onnx.inspect(path).coupling for path in (dense, sparse))
    assert [own.width for own in first.groups] == [own.width for own in second.groups]


def test_a_dense_model_gets_no_sparse_initializers(tmp_path: Path) -> None:
    path = graph.save.save(sfp_onnx.load(classifier()), tmp_path / "dense.onnx", sparse=True)
    assert not onnx.load(path).graph.sparse_initializer


def test_coordinates_are_read_too(tmp_path: Path) -> None:
    model = classifier()
    held = {item.name: item for item in model.graph.initializer}
    array = numpy_helper.to_array(held["w3"]).copy()
    array[:, ::2] = 0
    sparse = model.graph.sparse_initializer.add(dims=array.shape)
    sparse.values.CopyFrom(numpy_helper.from_array(array[array != 0], "w3"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.argwhere(array).astype(np.int64)))
    model.graph.initializer.remove(held["w3"])
    assert (graph.Constants(sfp_onnx.load(model))["w3"] == array).all()


def test_damaged_sparse_initializers_are_refused() -> None:
    model = classifier()
    sparse = model.graph.sparse_initializer.add(dims=[2, 2])
    sparse.values.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "extra"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.asarray([9], np.int64)))
    with pytest.raises(sfp_onnx.ModelError, match="sparse initializer 'extra'"):
        sfp_onnx.load(model)


# ---- labels and the re-fit -------------------------------------------------------------------------------------------


def labelled(rate: float | None = None, **options: Any) -> Diluted:
    return diluted(classifier(widths=(16, 24)), data=True, rate=rate, **options)


def test_afcc_follows_the_label_sets_of_both_ends() -> None:
    model = sfp_onnx.load(classifier(widths=(16, 24)))
    data = sfp_onnx.data_for(model, {"x": images(64), "labels": labels_of(64)})
    analysis = sfp_onnx.inspect(model, data=data)
    assert data is not None
    known = {own.tensor: own for own in sfp_onnx.class_profiles(analysis, data).layers}
    result = dilute(analysis, DiluteOptions("afcc", refit=False, force=True), data)
    assert [item.layer for item in result.layers] == ["conv2", "head"]
    assert [item.layer for item in result.skipped] == ["conv1"] and "no layer made it" in result.skipped[0].reason
    sets = [known[name].label_sets for name in ("r1", "f")]
    common = (sets[1].astype(int) @ sets[0].T.astype(int)) > 0
    removed = {item.layer: item.removed for item in result.layers}
    assert removed == {"conv2": (~common).sum(), "head": (~sets[1]).sum()}
    seen = look(analysis, None, data, ProfileOptions())
    masks_of, *_ = choose_masks(analysis, seen, DiluteOptions("afcc", force=True))
    assert (masks_of["w2"].any((2, 3)) == common).all() and (masks_of["w3"] == sets[1].T).all()


@pytest.mark.parametrize("kind", ["stack", "flatten"])
def test_afcc_of_fully_connected_stacks_and_heads_after_flatten(kind: str) -> None:
    """Nodes have label sets like filters; all columns of a flattened map have those of their filter."""
    random = np.random.default_rng(5)
    shapes = {"stack": {"w1": (192, 12), "w2": (12, 10), "w3": (10, 5)}, "flatten": {"w1": (6, 3, 3, 3), "w3": (6 * 64, 5)}}[kind]
    constants = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    if kind == "stack":
        steps = [("Flatten", ["x"], "f"), ("Gemm", ["f", "w1"], "a"), ("Relu", ["a"], "p"), ("Gemm", ["p", "w2"], "b")]
        steps.append(("Relu", ["b"], "q"))
        nodes = [helper.make_node(op, inputs, [output], output) for op, inputs, output in steps]
    else:
        nodes = [helper.make_node("Conv", ["x", "w1"], ["a"], "a", pads=[1] * 4), helper.make_node("Relu", ["a"], ["p"], "p")]
        nodes.append(helper.make_node("Flatten", ["p"], ["q"], "q"))
    nodes.append(helper.make_node("Gemm", ["q", "w3"], ["logits"], "head"))
    model = sfp_onnx.load(model_of(nodes, [("x", np.float32, ["N", 3, 8, 8])], [("logits", np.float32, ["N", 5])], constants))
    data = sfp_onnx.data_for(model, {"x": images(80), "labels": labels_of(80)})
    assert data is not None
    analysis = sfp_onnx.inspect(model, data=data)
    known = {own.tensor: own for own in sfp_onnx.class_profiles(analysis, data, ProfileOptions("ridge", 2)).layers}
    seen = look(analysis, None, data, ProfileOptions("ridge", 2))
    found, *_ = choose_masks(analysis, seen, DiluteOptions("afcc", force=True))
    own = known["q"]
    assert (found["w3"] == own.label_sets[own.filters]).all() and 0 < found["w3"].mean() < 1
    if kind == "stack":
        first, second = known["p"].label_sets.astype(int), own.label_sets.astype(int)
        assert (found["w2"] == (first @ second.T > 0)).all()
    made = dilute(analysis, DiluteOptions("afcc", force=True, probe="ridge", pool=2), data)
    zeros = [item.weights_removed for item in made.layers]
    assert zeros == [int((~found[item.weight]).sum()) for item in made.layers]


def test_layers_with_too_little_signal_are_skipped_unless_forced() -> None:
    with pytest.raises(TargetError, match="signal-to-noise"):  # random weights and labels
        labelled(method="afcc", layers="conv2")
    forced = labelled(method="afcc", layers="conv2", force=True)
    assert any("because of --force" in note for note in forced.notes)
    assert not any("force" in note for note in labelled(0.5, method="soft-afcc", layers="conv2").notes)


def test_soft_afcc_against_a_loop() -> None:
    own = view()
    assert own.ends is not None
    scores = naive_scores(own, "obs")[:, :, 0]
    for o in range(12):
        for i in range(10):
            rho = float(np.corrcoef(own.ends.writes.evidence[o], own.ends.reads.evidence[i])[0, 1])
            scores[o, i] *= 1 + np.sign(own.values[o, i].astype(np.float64).sum()) * rho / 8
    kept = chosen(own, "soft-afcc").mask[:, :, 0]
    assert scores[kept].min() > scores[~kept].max()


def test_obs_without_losses_is_wanda() -> None:
    own = replace(view(), losses=None)
    assert (chosen(own, "obs").mask == chosen(own, "wanda").mask).all()


@pytest.mark.parametrize("kind", ["conv", "grouped", "transposed", "gemm"])
def test_losses_against_a_re_fit_without_each_kernel(kind: str) -> None:
    """The loss of a kernel is the error of its filter when the others are re-fitted by least squares without it."""
    groups, spatial = (2 if kind == "grouped" else 1), kind != "gemm"
    random = np.random.default_rng(3)
    shape = {"conv": (5, 4, 2, 2), "grouped": (6, 2, 2, 2), "transposed": (4, 5, 2, 2), "gemm": (4, 5)}[kind]
    size = 6 if spatial else 1
    first = random.standard_normal((4, 3, 1, 1) if spatial else (3, 4)).astype(np.float32)
    weight = random.standard_normal(shape).astype(np.float32)
    middle = {"transposed": "ConvTranspose", "gemm": "Gemm"}.get(kind, "Conv")
    nodes = [
        helper.make_node("Conv" if spatial else "Gemm", ["x", "w1"], ["a"], "first"),
        helper.make_node(middle, ["a", "w2"], ["y"], "second", **({"group": groups} if spatial else {})),
    ]
    ports = [("x", np.float32, ["N", 3, size, size] if spatial else ["N", 3])], [("y", np.float32, None)]
    x = random.standard_normal((40, 3, size, size) if spatial else (400, 3)).astype(np.float32)
    analysis = sfp_onnx.inspect(sfp_onnx.load(model_of(nodes, *ports, {"w1": first, "w2": weight})), {"x": (2, *x.shape[1:])})
    options = RepairOptions(rows_per_input=1e9, least_positions=10**6)
    batches = [{"x": own} for own in np.array_split(x, 4)]
    found = kernel_losses(analysis.prepared, analysis.coupling, {"second"}, batches, options)["second"]
    (target,), _ = targets(analysis.prepared, analysis.coupling, "second")
    assert found.shape == target.channel.shape
    layer = target.layer
    assert layer.linear is not None
    middle_x = np.tensordot(first[:, :, 0, 0], x, (1, 1)).swapaxes(0, 1) if spatial else x @ first
    output = run_model(analysis.model.proto, {"x": x})[0]
    form = layer.linear.form
    chosen = np.broadcast_to(np.arange(form.positions(output.shape)[1]), form.positions(output.shape))
    rows, matrix = form.rows(middle_x, output.shape, chosen, groups), form.matrix(weight, groups).astype(np.float64)
    every = form.inputs_of(weight.shape, groups)
    expected = []
    for block in range(groups):
        centred = rows[block].astype(np.float64) - rows[block].mean(0)
        extra = np.sqrt(1e-2 * np.square(centred).sum(0).mean()) * np.eye(len(every))  # the ridge, towards the present weights
        system = np.concatenate([centred, extra])
        errors = []
        for channel in range(every.max() + 1):
            left = every != channel
            gone = system[:, ~left] @ matrix[block][~left]
            fitted = system[:, left] @ np.linalg.lstsq(system[:, left], gone, rcond=None)[0]
            errors.append(np.sqrt(np.square(gone - fitted).sum(0) / len(centred)))
        expected.append(np.stack(errors, 1))
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-3)


def test_models_that_are_no_classifiers_are_refused() -> None:
    nodes = [helper.make_node("Conv", ["x", "w1"], ["a"], "one"), helper.make_node("Conv", ["a", "w2"], ["y"], "two")]
    constants = {"w1": np.ones((4, 3, 1, 1), np.float32), "w2": np.ones((2, 4, 1, 1), np.float32)}
    model = model_of(nodes, [("x", np.float32, ["N", 3, 8, 8])], [("y", np.float32, ["N", 2, 8, 8])], constants)
    for method, rate in (("afcc", None), ("soft-afcc", 0.5)):
        with pytest.raises(sfp_onnx.ModelError, match=r"need a classifier.*l1, wanda, obs"):
            diluted(model, data=True, method=method, rate=rate)


def test_the_re_fit_keeps_zeros_and_comes_nearer() -> None:
    model, x = classifier(widths=(16, 24)), images(64)
    reference = run_model(model, {"x": x})[0]
    errors = []
    for refit in (False, True):
        result = diluted(model, data=True, method="obs", rate=0.6, refit=refit, layers="conv")
        errors.append(float(np.square(run_model(result.to_proto(), {"x": x})[0] - reference).mean()))
        zeros = [(own == 0).sum() for own in weights(result.to_proto()).values() if own.ndim == 4]
        assert sum(zeros) >= sum(item.weights_removed for item in result.layers) - 9 * 16 * result.cut * 2
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("name", ["afcc", "random-afcc", "soft-afcc", "obs", "wanda"])
def test_the_same_model_twice_with_labels(name: str) -> None:
    rate = None if name in FIXED else 0.5
    first, second = (labelled(rate, method=name, force=True, refit=True).to_proto().SerializeToString() for _ in range(2))
    assert first == second


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_writes_and_keeps_a_manifest(model_file: Path, data_file: Path, tmp_path: Path) -> None:
    out, manifest = tmp_path / "out.onnx", tmp_path / "m.json"
    done = invoke("dilute", model_file, "-o", out, "--rate", "0.5", "--data", data_file, "--no-refit", "--test-data", data_file,
                  "--store", "sparse", "--manifest", manifest)  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "conv2" in done.stdout and "obs" in done.stdout and "top-1 on 10 held-out samples" in done.stdout
    assert "method: obs (default)" in done.stderr
    saved = json.loads(manifest.read_text())
    assert saved["options"]["method"] == "obs" and [item["layer"] for item in saved["layers"]] == ["conv1", "conv2", "head"]
    assert saved["output"]["bytes"] == out.stat().st_size and saved["output"]["sha256"] == sfp_onnx.load(out).sha256
    assert invoke("inspect", out).exit_code == 0
    assert invoke("evaluate", model_file, out, "--data", data_file, "--no-latency").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--method", "l2", "--rate", "0.5"], 2, "unknown dilution method 'l2'"),
        (["--method", "nm:4:2"], 2, "N smaller than M"),
        (["--method", "nm"], 2, "expected nm:N:M"),
        (["--method", "block:0x4", "--rate", "0.5"], 2, "expected block:AxB"),
        (["--method", "l1:3", "--rate", "0.5"], 2, "expected l1"),
        (["--rate", "1"], 2, "not in the range 0<=x<1"),
        (["--rate", "-0.1"], 2, "not in the range 0<=x<1"),
        (["--rate", "nan"], 2, "rate=nan: expected at least 0 and less than 1"),
        (["--method", "l1"], 2, "needs --rate"),
        (["--method", "l1", "--rate", "0.5", "--layers", "("], 2, "not a regular expression"),
        (["--method", "l1", "--rate", "0.5", "--layers", "nowhere"], 2, "matches no layer"),
        (["--method", "wanda", "--rate", "0.5"], 4, "needs calibration data"),
        (["--method", "afcc"], 4, "needs calibration data"),
        (["--method", "l1", "--rate", "0.5", "--refit"], 4, "--refit needs calibration data"),
    ],
)
def test_bad_options(arguments: list[str], code: int, message: str, model_file: Path, tmp_path: Path) -> None:
    done = invoke("dilute", model_file, "-o", tmp_path / "out.onnx", *arguments)
    assert done.exit_code == code and message in done.stderr and not (tmp_path / "out.onnx").exists()


def test_a_rate_that_is_ignored_is_said(model_file: Path, tmp_path: Path) -> None:
    done = invoke("dilute", model_file, "-o", tmp_path / "out.onnx", "--method", "nm:2:4", "--rate", "0.7")
    assert done.exit_code == 0 and "--rate 0.7 is ignored" in done.stderr


def test_errors_are_of_this_package() -> None:
    with pytest.raises(OptionError):
        find_method("nm:x")
    with pytest.raises(DataError):
        diluted(classifier(), method="afcc")
    with pytest.raises(TargetError):
        nodes = [helper.make_node("Conv", ["x", "wd"], ["y"], "deep", group=3)]
        ports = [[(name, np.float32, ["N", 3, 8, 8])] for name in "xy"]
        model = model_of(nodes, *ports, {"wd": np.ones((3, 1, 1, 1), np.float32)})
        diluted(model, method="l1", rate=0.5)


def test_method_options_carry_numbers() -> None:
    assert find_method("nm:2:4", 7)[1] == MethodOptions((2, 4), 7)
