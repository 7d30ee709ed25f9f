"""Layers on 8-bit integers: what becomes so with them, in what ranges, when the solver takes them, and what is written."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from building import Builder, feeds_for, low_rank
from conftest import WIDE, at_all_levels, classifier, images, invoke, relative, run_model

import sfp_onnx
from sfp_onnx import graph, runtime
from sfp_onnx.core.options import RepairOptions
from sfp_onnx.core.types import SIDES, Factor, Node
from sfp_onnx.coupling.analysis import feeds_of, silent
from sfp_onnx.coupling.cost import params_of
from sfp_onnx.cut.factor import both, split
from sfp_onnx.export.integers import BINS, KINDS, Histogram, Integers, histograms, ranges_of, taken
from sfp_onnx.graph.save import file_bytes, to_proto
from sfp_onnx.graph.stored import Store
from sfp_onnx.latency import Block, DeviceProfile, measure, profiling
from sfp_onnx.pipeline import scored
from sfp_onnx.planning import max_drop, search, widths
from sfp_onnx.planning.figures import Kind, edges
from sfp_onnx.planning.precision import INTEGER, leaders, led, on_integers, storables, stores
from sfp_onnx.repair import rounded
from sfp_onnx.runtime import Optimize
from sfp_onnx.scores.rounding import with_errors

LAYERS = frozenset({"c1", "c2", "logits"})


@pytest.fixture
def model(wide_model: Path) -> Path:
    return wide_model


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.npz"
    np.savez(path, x=images(80))
    return path


def maker(kind: str = next(iter(KINDS))) -> tuple[graph.Model, Integers]:
    original = sfp_onnx.load(classifier(**WIDE))
    return original, Integers(LAYERS, ranges_of(histograms(original, lambda: [{"x": images(32)}]), kind))


# ---- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [{"c2"}, {"c1", "c2"}, LAYERS], ids=len)
@pytest.mark.parametrize("kind", KINDS)
def test_chosen_layers_become_integers_once_and_all_optimisation_levels_agree(chosen: set[str], kind: str) -> None:
    original, integers = maker(kind)
    made = integers(original, chosen)
    proto = to_proto(made)
    onnx.checker.check_model(proto, full_check=True)
    assert all(taken(made, original, {name}) == (name in chosen) for name in LAYERS)
    makers = {name: node for node in proto.graph.node for name in node.output}
    weights = {tensor.name for tensor in proto.graph.initializer if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1}
    assert len(weights) == len(chosen)
    read = [node.input[0] for node in proto.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in weights]
    assert Counter(read) == dict.fromkeys(weights, 1)
    for node in proto.graph.node:
        before = makers.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        assert before is None or before.op_type != "DequantizeLinear", f"'{node.name}' rounds what was rounded"
    feeds = {"x": images(8)}
    answers = at_all_levels(proto, feeds)
    exact = run_model(classifier(**WIDE), feeds)[0]
    assert 0 < relative(answers[0], exact) < 0.1
    assert all(relative(answer, answers[0]) < 0.02 for answer in answers), "no more than single steps of rounding apart"
    assert params_of(made) == params_of(original) and file_bytes(made) < file_bytes(original)
    assert integers(original, set()) is original


@pytest.mark.parametrize("wrong", [False, True])
def test_weights_take_seven_bits_where_products_of_eight_saturate(wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "saturates", lambda: wrong)
    original, integers = maker()
    made = to_proto(integers(original, LAYERS)).graph.initializer
    weights = [onnx.numpy_helper.to_array(tensor) for tensor in made if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1]
    assert len(weights) == len(LAYERS) and all(abs(weight.astype(int)).max() == (64 if wrong else 127) for weight in weights)


def test_products_saturate_where_onnxruntime_says_otherwise_when_asked_for_exact_ones() -> None:
    x = np.full((1, 64), 255, np.uint8)
    probe = graph.extract.integer_product()
    fast, exact = (runtime.open_model(probe, how).run({"x": x}, ["y"])[0].item() for how in (Optimize.ALL, Optimize.EXACT_INTEGERS))
    assert exact == 255 * 127 * 64 and runtime.saturates() == (fast != exact)


@pytest.mark.parametrize("follows", [("Relu",), ("Clip", "Relu"), ()], ids=len)
def test_what_stands_between_integers_is_one_of_them_as_onnxruntime_would_make_it(follows: tuple[str, ...]) -> None:
    """A floating convolution between rounded values is rounded by onnxruntime as it loads the model, with one scale for its weight: so it
    becomes an integer layer in the file, and the file means the same everywhere."""
    b = Builder()
    x, width, outputs = b.input(["N", 3, 8, 8]), 3, list[str]()
    for _ in range(3):
        weight = np.random.default_rng(width).standard_normal((24, width, 3, 3)) * np.geomspace(0.01, 1, 24).reshape(24, 1, 1, 1)
        x = b.op("Conv", x, b.const(weight, np.float32), b.weight(24), pads=[1] * 4)
        outputs.append(x)
        for op in follows:
            x = b.op(op, x)
        width = 24
    original = sfp_onnx.load(b.model(x))
    feeds = {"x": np.random.default_rng(1).standard_normal((16, 3, 8, 8)).astype(np.float32)}
    integers = Integers(frozenset(outputs), ranges_of(histograms(original, lambda: [feeds])))
    chosen = {outputs[0], outputs[2]}
    assert integers.between(original, chosen) == {outputs[1]} and integers.between(original, {outputs[0]}) == set()
    made = integers(original, chosen)
    assert taken(made, original, {outputs[1]})
    answers = at_all_levels(to_proto(made), feeds)
    assert all(relative(answer, answers[0]) < 0.02 for answer in answers)


def test_what_follows_a_layer_goes_with_it_and_of_several_layers_with_the_last() -> None:
    reads = {"scaled": "x", "a": "scaled w", "ra": "a", "b": "ra w", "sum": "ra b", "pool": "sum", "c": "pool w", "end": "c"}
    nodes = [Node(at, name, "Op", "", tuple(read.split()), (name,), {}) for at, (name, read) in enumerate(reads.items())]
    assert leaders(nodes, {"a", "b", "c"}) == {"a": "a", "ra": "a", "b": "b", "sum": "b", "pool": "b", "c": "c", "end": "c"}
    analysis = sfp_onnx.inspect(classifier(**WIDE))
    weights = storables(analysis.prepared, analysis.coupling)
    found = led(weights, analysis.prepared.nodes, analysis.coupling)
    which = dict(zip((node.name for node in analysis.prepared.nodes), found.tolist(), strict=True))
    assert which["conv1"] == which["relu1"] == 0 and which["conv2"] == which["pool"] == 1 and which["head"] == -1, "w3 is too small"


def test_integer_layers_are_fitted_again_on_rounded_activations_and_all_levels_agree() -> None:
    """Few layers of few bits' worth of range: what rounding does to activations and weights is taken back by weights behind it."""
    proto = classifier(**WIDE)
    analysis, random = sfp_onnx.inspect(proto), np.random.default_rng(5)
    x = random.standard_normal((320, 3, 8, 8)).astype(np.float32) * np.geomspace(0.02, 1, 3).astype(np.float32)[:, None, None]
    data = sfp_onnx.data_for(analysis.model, x[:256])
    assert data is not None
    weights = storables(analysis.prepared, analysis.coupling)
    kernels, removed = stores(weights, [INTEGER] * len(weights)), np.zeros(analysis.coupling.units, bool)
    made, words = rounded(analysis, analysis.model, removed, kernels, data, RepairOptions())
    plain, _ = rounded(analysis, analysis.model, removed, kernels, data, None)
    assert words[1].startswith("re-fit after rounding: ") and "left as rounded" not in words[1]
    feeds = {"x": x[256:]}
    exact = run_model(proto, feeds)[0]
    before, after = (float(np.square(run_model(to_proto(model), feeds)[0] - exact).mean()) for model in (plain, made))
    assert after < before
    answers = at_all_levels(to_proto(made), feeds, x64quantprecision="1")
    assert all(relative(answer, answers[0]) < 0.02 for answer in answers)
    held = [{name: item.dtype for name, item in graph.initializers(model).items() if len(item.shape) > 1} for model in (plain, made)]
    assert held[0] == held[1] and np.dtype(np.int8) in held[0].values()


# ---- ranges ----------------------------------------------------------------------------------------------------------


def test_ranges_are_those_of_the_values() -> None:
    found = histograms(sfp_onnx.load(classifier()), lambda: [{"x": images(512)[:200]}, {"x": images(512)[200:]}])
    values = images(512)
    assert found["x"].counts.sum() == values.size and (found["x"].least, found["x"].most) == (values.min(), values.max())
    low, high = ranges_of(found, "99.99% of the values")["x"]
    assert 0 < np.mean((values < low) | (values > high)) <= 1e-4 < np.mean((values < 0.95 * low) | (values > 0.95 * high))
    assert ranges_of(found)["r1"][0] == 0, "after a Relu"
    assert all(np.isfinite(pair).all() for kind in KINDS for pair in ranges_of(found, kind).values())


def test_the_least_squared_error_leaves_rare_values_outside_only_where_that_is_less() -> None:
    def changed(held: Histogram, ends: Any) -> float:
        scale = (ends[1] - ends[0]) / 255
        steps = np.clip(np.rint(held.centers / scale) * scale, ends[0], ends[1])
        return float((np.square(steps - held.centers) * held.counts).sum())

    half = BINS // 2
    even, tailed = (Histogram(-1.0, 3.0, np.asarray(counts)) for counts in ([100.0] * BINS, [1e6] * half + [0.0] * (half - 1) + [1.0]))
    assert KINDS["least squared error"](even).tolist() == [-1.0, 3.0]
    ends = KINDS["least squared error"](tailed)
    assert ends[1] < 3 and changed(tailed, ends) < changed(tailed, [-1.0, 3.0])
    assert ranges_of({"none": Histogram(0.0, 0.0, np.zeros(BINS))}, "99.99% of the values")["none"].tolist() == [0, 0]


# ---- the choice ------------------------------------------------------------------------------------------------------


def test_the_error_of_integers_is_that_of_the_outputs_and_no_less_than_that_of_the_weight(data: Path) -> None:
    analysis = sfp_onnx.inspect(classifier(**WIDE))
    loaded = sfp_onnx.data_for(analysis.model, data)
    assert loaded is not None
    integers = Integers(LAYERS, ranges_of(histograms(analysis.prepared.model, lambda: feeds_of(analysis, loaded))))
    weights = storables(analysis.prepared, analysis.coupling)
    assert all(np.isinf(item.errors[INTEGER]) for item in with_errors(analysis, weights, loaded, 0, silent))
    for item in with_errors(analysis, weights, loaded, 0, silent, integers):
        assert item.errors[1] <= item.errors[INTEGER] < 0.05


class Machine:
    """A processor on which a layer takes as long as its multiply-accumulates, and on integers ``times`` as long; tables say ``told``."""

    def __init__(self, times: float, monkeypatch: pytest.MonkeyPatch, told: float = 0.0) -> None:
        self.times, self.told = times, told or times
        monkeypatch.setattr(profiling, "measure_device_profile", self.profile)
        monkeypatch.setattr(measure, "latencies_of", lambda models, *others: [self.seconds(model, self.told) for model in models])
        for room in (measure, scored):
            monkeypatch.setattr(room, "latency_ratio", lambda analysis, model, *others: self.seconds(model) / self.seconds(analysis.model))
        monkeypatch.setattr(measure, "block", lambda setup: Block(1, 1.0, {}))

    def seconds(self, model: graph.Model, times: float = 0.0) -> float:
        held = [item for item in graph.initializers(model).values() if len(item.shape) == 4]
        return sum(np.prod(item.shape) * ((times or self.times) if item.dtype == np.int8 else 1) for item in held) * 1e-9

    def profile(self, analysis: sfp_onnx.Analysis, *others: Any, changed: Any = None, **named: Any) -> DeviceProfile:
        costs = np.zeros((len(analysis.prepared.nodes), len(Kind)))
        costs[:, Kind.MACS] = 1e-9 / 64 / analysis.samples * (self.told if changed else 1)
        nodes = dict(zip(profiling.names_of(analysis), map(tuple, costs.tolist()), strict=True))
        whole = self.seconds(analysis.model) * (self.told if changed else 1)
        return DeviceProfile({"cpu": "fake"}, analysis.model.sha256, 1, whole, Block(1, 1.0, {}), 0.0, nodes, 1.0, 0.0, 0)


def run(model: Path, data: Path, folder: Path, target: str, *options: object) -> Mapping[str, Any]:
    saved = ("-o", folder / "out.onnx", "--manifest", folder / "out.json")
    done = invoke("prune", model, "--data", data, "--target", target, "--precision", "auto", *saved, *options)
    assert done.exit_code == 0, done.stderr
    return {**json.loads((folder / "out.json").read_text()), "said": done.stderr}


def test_a_latency_target_takes_integers_before_channels(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(0.4, monkeypatch)
    held = run(model, data, tmp_path, "latency=60%")
    kinds = {item["layer"]: item["stored"] for item in held["plan"]["precisions"]}
    assert kinds["conv2"] == "int8" and not any(group["remove"] for group in held["plan"]["groups"])
    assert held["plan"]["figures"]["latency"]["actual"] <= 0.6 * held["plan"]["figures"]["latency"]["before"]
    assert machine.seconds(sfp_onnx.load(tmp_path / "out.onnx")) <= 0.6 * machine.seconds(sfp_onnx.load(model))
    assert all(item["reason"] for item in held["plan"]["precisions"] if item["stored"] != "int8")
    words = " ".join([*held["plan"]["notes"], *held["notes"]])
    assert "takes 40% of its time here" in words and "taken: " in words and "written unchanged" not in words
    assert held["after"]["params"] == params_of(sfp_onnx.load(tmp_path / "out.onnx"))
    plan, again = tmp_path / "plan.json", tmp_path / "again.onnx"
    plan.write_text(json.dumps(held["plan"]))
    applied = invoke("apply", model, plan, "-o", again, "--data", data)
    assert applied.exit_code == 0, applied.stderr
    assert again.read_bytes() == (tmp_path / "out.onnx").read_bytes()
    without = invoke("apply", model, plan, "-o", tmp_path / "none.onnx", "--repair", "none")
    assert without.exit_code == 2 or "give --data" in without.stderr
    assert not (tmp_path / "none.onnx").exists()


def test_all_layers_on_integers_are_measured_before_channels_leave(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables promise little of integers, and built models show that they are enough."""
    Machine(0.4, monkeypatch, told=0.9)
    held = run(model, data, tmp_path, "latency=42%", "--align", "none")
    assert {item["stored"] for item in held["plan"]["precisions"]} == {"int8"}
    assert not any(group["remove"] for group in held["plan"]["groups"])


def test_channels_leave_where_integers_are_not_enough(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(0.4, monkeypatch)
    held = run(model, data, tmp_path, "latency=25%", "--align", "none")
    assert "int8" in {item["stored"] for item in held["plan"]["precisions"]} and any(group["remove"] for group in held["plan"]["groups"])
    (told,) = (note for note in held["plan"]["notes"] if "taken: " in note and "integers" in note)
    left = {name: float(value) for value, name in re.findall(r"([0-9.e-]+) with ([a-z ]+ integers[a-z ]*)", told)}
    assert len(left) > 1 and f"taken: {min(left, key=lambda name: left[name])}" in told


def test_a_layer_on_integers_becomes_two_on_integers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither integers nor a lower rank are enough alone; both halves are integers, and each value is rounded once."""
    Machine(0.4, monkeypatch)
    proto = low_rank(4)
    feeds = feeds_for(proto, batch=120)
    (name,) = feeds
    onnx.save(proto, tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", **feeds)
    held = run(tmp_path / "model.onnx", tmp_path / "data.npz", tmp_path, "latency=22%", "--align", "none")
    assert [factor["layer"] for factor in held["plan"]["factors"]] == ["middle"]
    assert {item["layer"]: item["stored"] for item in held["plan"]["precisions"]}["middle"] == "int8"
    figures = held["plan"]["figures"]["latency"]
    assert figures["actual"] <= figures["bound"] and figures["actual"] == pytest.approx(figures["predicted"], rel=0.2)
    made = onnx.load(tmp_path / "out.onnx")
    whole = [tensor.name for tensor in made.graph.initializer if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4]
    assert sum("middle.weight" in tensor for tensor in whole) == 2
    makers = {output: node for node in made.graph.node for output in node.output}
    assert all(makers[node.input[0]].op_type != "DequantizeLinear" for node in made.graph.node
               if node.op_type == "QuantizeLinear" and node.input[0] in makers)  # fmt: skip
    answers, exact = at_all_levels(made, {name: feeds[name][:16]}), run_model(proto, {name: feeds[name][:16]})[0]
    assert all(relative(answer, answers[0]) < 0.02 for answer in answers) and relative(answers[0], exact) < 0.1
    (tmp_path / "plan.json").write_text(json.dumps(held["plan"]))
    again = invoke("apply", tmp_path / "model.onnx", tmp_path / "plan.json", "-o", tmp_path / "again.onnx", "--data", tmp_path / "data.npz")
    assert again.exit_code == 0 and (tmp_path / "again.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()


@pytest.mark.parametrize("narrow", SIDES)
@pytest.mark.parametrize("chosen", ["stem", "middle"])
def test_halves_are_integers_as_their_layer_is(chosen: str, narrow: str) -> None:
    analysis = sfp_onnx.inspect(low_rank(4))
    model, layers = analysis.prepared.model, {layer.node.name: layer.node.outputs[0] for layer in analysis.coupling.layers}
    factors = (Factor("middle", 4, narrow),)
    two = split(model, analysis.wholes, factors)
    kinds = both(two, analysis.wholes, factors, [Store(layers[chosen], 1, "int8", 0)])
    integers = Integers(frozenset(layers.values()), ranges_of(histograms(model, lambda: [analysis.prepared.feeds])))
    made = integers(two, on_integers(kinds), {store.layer for store in kinds})
    weights = {name for name, item in graph.initializers(made).items() if item.dtype == np.int8 and len(item.shape) == 4}
    expected = {"stem.weight"} if chosen == "stem" else {"middle.weight/first", "middle.weight/second"}
    assert {name.removesuffix("_quantized") for name in weights} == expected


def test_one_target_over_time_and_bytes(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(0.4, monkeypatch)
    held = run(model, data, tmp_path, "latency=60%", "--target", "size=45%", "--max-drop", "30%", "--confidence", "50%")
    assert (tmp_path / "out.onnx").stat().st_size <= 0.45 * model.stat().st_size
    assert "int8" in {item["stored"] for item in held["plan"]["precisions"]}


def test_the_gate_judges_the_model_with_integers(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(0.4, monkeypatch)
    held = run(model, data, tmp_path, "latency=60%", "--max-drop", "30%", "--confidence", "50%")
    assert "macs=" in held["said"] and "size=" not in held["said"] and "int8" in {item["stored"] for item in held["plan"]["precisions"]}
    judged = list[graph.Model]()
    own = max_drop.Judge.drop
    monkeypatch.setattr(max_drop.Judge, "drop", lambda judge, found: judged.append(found) or own(judge, found))
    again = run(model, data, tmp_path, "latency=60%", "--max-drop", "30%", "--confidence", "50%")
    assert len(judged) == 1 and to_proto(judged[0]).SerializeToString(deterministic=True) == (tmp_path / "out.onnx").read_bytes()
    assert again["plan"]["precisions"] == held["plan"]["precisions"]


def test_where_integers_are_slower_none_is_used_and_the_plan_says_so(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine(1.3, monkeypatch)
    held = run(model, data, tmp_path, "latency=60%", "--align", "none")
    assert {item["stored"] for item in held["plan"]["precisions"]} == {"float32"}
    assert all("no faster here" in item["reason"] for item in held["plan"]["precisions"])
    assert any("takes 130% of its time here: none is computed so" in note for note in held["plan"]["notes"])


def test_without_data_time_is_saved_by_widths_alone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(0.4, monkeypatch)
    made = sfp_onnx.plan(model, sfp_onnx.PlanOptions(targets=("latency=60%",), precision="auto", align=None))
    assert "int8" not in {item.stored for item in made.precisions} and any("need --data" in note for note in made.notes)


def kernels_of(analysis: sfp_onnx.Analysis, machine: Machine) -> profiling.Kernels:
    prepared = analysis.prepared
    clocks = [profiling.clock_of(analysis, machine.profile(analysis, changed=changed)) for changed in (None, True)]
    weights, between = storables(prepared, analysis.coupling), edges(analysis.coupling, prepared.nodes, prepared.trace)
    return profiling.Kernels(*clocks, led(weights, prepared.nodes, analysis.coupling), between)


def test_predictions_go_from_one_table_to_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(0.5, monkeypatch)
    analysis = sfp_onnx.inspect(classifier(**WIDE))
    kernels = kernels_of(analysis, machine)
    full, between = kernels.floating.terms.full, kernels.edges.terms.full
    plain, first, both = (float(kernels(full, between, codes)) for codes in ([4, 1], [INTEGER, 2], [INTEGER, INTEGER]))
    assert plain == pytest.approx(kernels.floating(full)) and both < first < plain and not kernels.slower(2)
    head = next(layer for layer in analysis.coupling.layers if layer.node.name == "head").macs / analysis.samples
    assert both == pytest.approx(0.5 * (plain - head * 1e-9 / 64) + head * 1e-9 / 64)
    assert replace(kernels, floating=kernels.integers, integers=kernels.floating).slower(2) == (0, 1)


def test_steps_between_floating_and_integer_layers_are_learnt_from_mixed_models(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(0.5, monkeypatch)
    analysis = sfp_onnx.inspect(classifier(**WIDE))
    kernels = kernels_of(analysis, machine)
    full, between = kernels.floating.terms.full, kernels.edges.terms.full
    codes = np.asarray([[INTEGER, 4], [4, INTEGER]])
    samples, image, first, second = analysis.samples, 3 * 64, 32 * 64, 48
    assert kernels.crossing(between, codes).tolist() == [samples * (image + first), samples * (first + second)]
    assert kernels.crossing(between, [4, 4]) == 0
    seconds = kernels(full, between, codes) + 3e-9 * kernels.crossing(between, codes)
    taught = kernels.fitted(profiling.OnIntegers(machine.profile(analysis), codes, seconds))
    alike = replace(kernels, integers=kernels.floating)
    assert alike.slower(2) == (0, 1) and not replace(alike, step=1.0).slower(2), "a layer between integers saves two steps"
    assert taught.step == pytest.approx(3e-9) and taught(full, between, codes) == pytest.approx(seconds)
    assert kernels.fitted(profiling.OnIntegers(machine.profile(analysis), codes, 0.1 * seconds)).step == 0


def test_integers_that_pay_only_together_are_found() -> None:
    """Every layer that is alone on integers takes two steps more than it saves."""

    def cost(kept: np.ndarray) -> np.ndarray:
        on = kept[..., 1:] == INTEGER
        return 10.0 * kept[..., 0] / 8 + (np.where(on, 5, 10)).sum(-1) + 6.0 * (np.diff(on, axis=-1, prepend=False, append=False)).sum(-1)

    codes, losses = [[8, 4]] + [[4, INTEGER]] * 4, [[0.0, 9.0]] + [[0.0, 0.1]] * 4
    problem = widths.Problem(codes, losses, [cost], [43.0])
    found = search._solved(problem, range(1, len(problem.widths)))
    assert found is not None and found.kept.tolist() == [8, INTEGER, INTEGER, INTEGER, INTEGER] and found.error == pytest.approx(0.4)
    found = search._solved(replace(problem, bounds=[60.0]), range(1, len(problem.widths)))
    assert found is not None and found.kept.tolist() == [8, 4, 4, 4, 4], "and are given back where there is room"


def test_a_plan_of_integers_is_refused_without_data(model: Path) -> None:
    made = sfp_onnx.plan(model, sfp_onnx.PlanOptions(ratio=0.25, precision="int8-weights"))
    other = replace(made, precisions=tuple(replace(item, stored="int8") for item in made.precisions))
    with pytest.raises(sfp_onnx.DataError, match=r"8-bit integers.*give --data"):
        sfp_onnx.apply(model, other)
    done = sfp_onnx.apply(model, other, images(40), repair=RepairOptions("none"))
    assert Counter(node.op for node in graph.nodes(done.model))["QuantizeLinear"] > 2
