"""The latency model: block, cache, fit, and predictions; nothing here depends on how fast the machine is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import classifier, images, invoke

import sfp_onnx
from sfp_onnx import graph
from sfp_onnx.core.system import folder
from sfp_onnx.latency import FORMAT, Block, DeviceProfile, from_json, measure, nonnegative_fit, profiling, timing, to_json
from sfp_onnx.latency.measure import (
    CACHE_VARIABLE,
    PROBES,
    Bench,
    Timing,
    _owner,
    _probe,
    cache_folder,
    classes,
    fit,
    judge,
    timing_feeds,
)
from sfp_onnx.latency.profiling import CHECKED, FEWEST, _candidates, clock_of, measure_device_profile, names_of
from sfp_onnx.planning.figures import Kind, node_terms
from sfp_onnx.runtime import Setup, interleaved, kernel_times, open_timed
from sfp_onnx.runtime.on_board import cpu_name

SETUP = Setup(threads=1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


# ---- the block -------------------------------------------------------------------------------------------------------


def stairs(block: int, slow: float) -> dict[int, float]:
    return {width: (np.ceil(width / block) * block / 64) ** 2 * (slow if width % 4 else 1) for width in PROBES}


@pytest.mark.parametrize(("block", "slow", "expected"), [(16, 1.4, 16), (8, 1.3, 8), (32, 1.3, 32), (4, 1.2, 4), (1, 1.0, 1)])
def test_the_block_is_read_off_the_staircase(block: int, slow: float, expected: int) -> None:
    found = judge(stairs(block, slow))
    assert found.width == expected
    assert found.slow == pytest.approx(max(1.0, stairs(block, slow)[63]), abs=1e-3)


def test_a_device_whose_time_does_not_depend_on_channels() -> None:
    assert judge(dict.fromkeys(PROBES, 1.0)).width == 1


def test_the_block_of_this_machine_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(measure, "_probe", lambda setup: calls.append(setup) or stairs(16, 1.4))
    first, second = measure.block(SETUP), measure.block(SETUP)
    assert first == second and first.width == 16 and len(calls) == 1
    measure.block(Setup(threads=2))  # measured anew for other threads
    assert len(calls) == 2


def test_the_probe_runs() -> None:
    assert set(_probe(SETUP)) == set(PROBES)


# ---- cache -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"cache_version": 1}', "null", '{"cache_version": 99, "key": {}, "value": 1}'])
def test_a_corrupt_cache_is_ignored_and_rebuilt(damage: str, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_probe", lambda setup: stairs(8, 1.4))
    measure.block(SETUP)
    (file,) = own_cache.iterdir()
    good = file.read_text()
    file.write_text(damage)
    assert measure.block(SETUP).width == 8
    assert file.read_text() == good and list(own_cache.iterdir()) == [file]


def test_values_of_another_kind_in_the_cache_are_ignored(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_probe", lambda setup: stairs(8, 1.4))
    measure.block(SETUP)
    (file,) = own_cache.iterdir()
    file.write_text(json.dumps({**json.loads(file.read_text()), "value": {"width": "x", "slow": 1, "curve": {}}}))
    assert measure.block(SETUP).width == 8


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(measure, "_probe", lambda setup: stairs(16, 1.4))
    assert measure.block(SETUP).width == 16


@pytest.mark.parametrize(
    ("platform", "variable", "expected"),
    [("linux", "XDG_CACHE_HOME", "sfp_onnx"), ("win32", "LOCALAPPDATA", "sfp_onnx"), ("darwin", "HOME", "Library/Caches/sfp_onnx")],
)
def test_the_cache_folder_of_each_platform(
    platform: str, variable: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr(sys, "platform", platform)
    assert cache_folder() == tmp_path / expected
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


# ---- the fit ---------------------------------------------------------------------------------------------------------


def test_nonnegative_fit() -> None:
    random = np.random.default_rng(0)
    matrix = random.uniform(0, 1, (12, 4)) * [1, 1e6, 1e3, 1e9]
    truth = np.asarray([2.0, 0.0, 3e-3, 5e-9])
    assert nonnegative_fit(matrix, matrix @ truth) == pytest.approx(truth, rel=1e-6, abs=1e-12)
    assert (nonnegative_fit(matrix, -(matrix @ truth)) == 0).all()
    pulled = nonnegative_fit(np.column_stack([np.ones(3), [0.0, 1.0, 2.0]]), np.asarray([3.0, 2.0, 1.0]))
    assert pulled == pytest.approx([2.0, 0.0])  # a falling line has no such fit but its mean


def test_the_fit_finds_the_costs_of_a_made_up_machine(tmp_path: Path) -> None:
    path = tmp_path / "wide.onnx"
    onnx.save(classifier(widths=(64, 96)), path)
    analysis = sfp_onnx.inspect(path)
    nodes = analysis.prepared.nodes
    terms = node_terms(analysis.coupling, nodes, analysis.prepared.trace)
    kept = np.stack(_candidates(analysis, 16))
    work = terms.per_owner(terms.lengths(kept), len(nodes), 16, 1.5)
    truth = np.zeros((len(nodes), len(Kind)))
    layers = [layer.node.index for layer in analysis.coupling.layers]
    truth[layers, Kind.MACS], truth[layers, Kind.WRITTEN], overhead = 2e-9, 3e-8, 2e-6
    timings = []
    for own in work:  # nodes but layers are fused away; every record costs two microseconds more
        seconds, kernels = np.zeros(len(nodes)), np.zeros(len(nodes))
        kernels[layers] = 1
        seconds[layers] = (own * truth).sum(1)[layers] + 5e-6
        timings.append(Timing(seconds + overhead * kernels, kernels, np.ones(len(nodes), bool), float(seconds.sum())))
    profile = fit(work, timings, Bench(analysis, SETUP, 1), Block(16, 1.5, {}))
    assert profile.error < 1e-3 and profile.checked == 3 and profile.factor == pytest.approx(1, rel=1e-3)
    clock = clock_of(analysis, profile)
    assert clock(terms.lengths(kept)) == pytest.approx([own.whole for own in timings], rel=1e-3)
    # 16-channel blocks: 49 channels cost as much as 64 would, and more, being no multiple of 4
    widths = [np.asarray([width, 96]) for width in (64, 52, 49)]
    times = [float(clock(terms.lengths(own))) for own in widths]
    assert times[1] == pytest.approx(times[0]) and times[2] > times[0]
    assert from_json(json.loads(json.dumps(to_json(profile)))) == profile


def test_what_is_fused_goes_with_its_convolution(tmp_path: Path) -> None:
    nodes = sfp_onnx.inspect(classifier()).prepared.nodes  # conv1 bn1 relu1 conv2 relu2 pool flatten head
    mixing = np.asarray([name in ("conv1", "conv2", "head") for name in (node.name for node in nodes)])

    def found(*named: str) -> list[int]:
        kernels = np.asarray([float(node.name in named) for node in nodes])
        return classes(nodes, [Timing(kernels, kernels, np.ones(len(nodes), bool), 1.0)], mixing)

    assert found("conv1", "conv2", "pool", "head") == [0, 0, 0, 3, 3, 5, 5, 7]  # fused convolutions keep their names
    assert found("relu1", "relu2", "pool", "head") == [0, 0, 0, 3, 3, 5, 5, 7]  # or are called after what they make


def test_kernels_are_told_apart_by_what_they_make() -> None:
    owners = {"a": 0, "a_b": 1, "c/Conv_output_0": 2}
    assert [_owner(name, owners, 7) for name in ("a", "a_nchwc", "a_b_nchwc", "c/Conv_output_0/Fusion/", "ab", "Reorder_1")] == [
        0, 0, 1, 2, 7, 7,
    ]  # fmt: skip


def test_records_name_the_nodes_of_the_model(tmp_path: Path) -> None:
    model = graph.extract.named_by_output(sfp_onnx.load(classifier(batch=1)))
    session = open_timed(model, SETUP, events=True)
    interleaved([session], [{"x": np.zeros((1, 3, 8, 8), np.float32)}], 4)
    times = kernel_times(session)
    made = {name: node.index for node in graph.nodes(model) for name in node.outputs}
    owned = {_owner(name, made, -1) for name in times} - {-1}
    assert made["logits"] in owned and len(owned) >= 3
    assert all(len(own) == 5 for name, own in times.items() if name.startswith("logits"))
    assert not [*tmp_path.iterdir(), *Path.cwd().glob("*.json"), *folder().glob("events_*")]


# ---- the whole -------------------------------------------------------------------------------------------------------


def test_a_profile_is_measured_once(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    analysis = sfp_onnx.inspect(classifier(widths=(32, 32)))
    first = measure_device_profile(analysis, SETUP)
    monkeypatch.setattr(profiling, "_measure", None)  # calling it would fail
    assert measure_device_profile(analysis, SETUP) == first
    monkeypatch.undo()
    monkeypatch.setenv(CACHE_VARIABLE, str(own_cache))
    file = next(file for file in own_cache.iterdir() if file.name.startswith("profile"))
    file.write_text(file.read_text()[:100])
    assert measure_device_profile(analysis, SETUP).nodes.keys() == first.nodes.keys()
    assert json.loads(file.read_text())["value"]["format"] == FORMAT  # rebuilt


def test_a_model_with_a_fixed_batch_takes_no_other() -> None:
    analysis = sfp_onnx.inspect(classifier(batch=2))
    assert timing_feeds(analysis, 2)["x"].shape[0] == 2
    with pytest.raises(sfp_onnx.OptionError, match="fixed batch size 2"):
        timing_feeds(analysis, 3)
    assert timing_feeds(sfp_onnx.inspect(classifier()), 3)["x"].shape[0] == 3


# ---- the budget ------------------------------------------------------------------------------------------------------


def test_a_small_budget_times_fewer_widths_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = sfp_onnx.inspect(classifier(widths=(32, 32)))
    short = measure_device_profile(analysis, SETUP, budget=1e-3)
    assert short.cut_short == 1e-3 and short.checked == FEWEST // 5
    assert from_json(json.loads(json.dumps(to_json(short)))) == short
    assert measure_device_profile(analysis, SETUP, budget=1e-4) == short  # from the cache: no worse than asked
    whole = measure_device_profile(analysis, SETUP)  # measured again: more was asked
    assert whole.cut_short == 0 and whole.checked == CHECKED
    assert measure_device_profile(analysis, SETUP, budget=1e-3) == whole
    plan = sfp_onnx.plan(analysis, sfp_onnx.PlanOptions(targets=("latency=100%",), threads=1, profile_budget=1e-3))
    assert not any("budget" in note for note in plan.notes)
    monkeypatch.setenv(CACHE_VARIABLE, str(Path(cache_folder()) / "other"))
    plan = sfp_onnx.plan(analysis, sfp_onnx.PlanOptions(targets=("latency=100%",), threads=1, profile_budget=1e-3))
    assert any("the budget of 0.001 s for the profile was spent" in note for note in plan.notes)


def test_widths_around_a_plan() -> None:
    analysis = sfp_onnx.inspect(classifier(widths=(64, 96)))
    around = np.asarray([32, 48])
    rows = _candidates(analysis, 16, around)
    assert rows[0].tolist() == [64, 96] and rows[1].tolist() == [32, 48]
    near = np.stack(rows[3::2])
    assert set(near[:, 0]) <= {16, 32, 48} and set(near[:, 1]) <= {32, 48, 64} and len(near) >= 5
    assert all(width % 16 == 0 or (width < 16 and width % 4 == 0) for row in rows for width in row)


# ---- the staircase ---------------------------------------------------------------------------------------------------


def test_less_than_a_block_is_read_channel_by_channel_but_made_whole() -> None:
    analysis = sfp_onnx.inspect(classifier(widths=(64, 64)))
    terms = node_terms(analysis.coupling, analysis.prepared.nodes, analysis.prepared.trace)
    first, second = (layer.node.index for layer in analysis.coupling.layers[:2])

    def macs(width: int) -> tuple[float, float]:
        """Of the layer that makes ``width`` channels and of the one that reads them, as shares of all of it."""
        work, whole = (terms.per_owner(terms.lengths(np.asarray([own, 64])), 8, 16, 1.5)[:, Kind.MACS] for own in (width, 64))
        return work[first] / whole[first], work[second] / whole[second]

    assert macs(16) == (0.25, 0.25)
    assert macs(8) == (0.25, 0.125) and macs(6) == (0.25, pytest.approx(6 / 64))
    assert macs(36) == (0.75, 0.75)
    assert macs(38) == (0.75, 0.75 * 1.5)  # reads no multiple of 4


# ---- one latency for all that is shown of a run ----------------------------------------------------------------------

SLOW, FAST = 0.004, 0.001


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Times are made up: the first model takes 4 ms, every other 1 ms; what was asked for is noted (rows of the inputs, threads)."""
    seen: list[tuple[int, int]] = []

    def runs(sessions: Any, feeds: Any, repeats: int, clock: Any = None) -> list[list[float]]:
        for session, own in zip(sessions, feeds, strict=True):
            seen.append((len(next(iter(own.values()))), session.handle.get_session_options().intra_op_num_threads))
        return [[SLOW if number == 0 else FAST] * 3 for number in range(len(sessions))]

    monkeypatch.setattr(timing, "interleaved", runs)
    return seen


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A model, a smaller one, and data with more samples than one batch."""
    model, small, data = tmp_path / "model.onnx", tmp_path / "small.onnx", tmp_path / "data.npz"
    onnx.save(classifier(widths=(16, 24)), model)
    onnx.save(classifier(widths=(8, 12)), small)
    np.savez(data, x=images(100))
    return model, small, data


@pytest.mark.parametrize(("options", "words", "rows"), [((), "batch 1", 1), (("--batch", "8", "--threads", "1"), "batch 8, 1 thread", 8)])
def test_evaluate_says_how_it_times(options: Any, words: str, rows: int, pair: Any, clock: Any) -> None:
    model, small, data = pair
    result = invoke("evaluate", model, small, "--data", data, *options)
    assert result.exit_code == 0 and f"times: {words}" in result.stdout, result.stderr
    assert {asked[0] for asked in clock} == {rows} and (not options or {asked[1] for asked in clock} == {1})
    found = json.loads(invoke("evaluate", model, small, "--data", data, "--json", *options).stdout)
    assert [row["timing"].startswith(words) for row in found] == [True, True]
    assert (found[1]["latency_min_ms"], found[1]["latency_ratio"]) == (pytest.approx(1.0), pytest.approx(0.25))
    assert invoke("evaluate", model, small, "--data", data, "--provider", "none").exit_code == 2


def test_evaluate_gates_on_latency_and_memory(pair: Any, clock: Any) -> None:
    model, small, data = pair
    run = ("evaluate", model, small, "--data", data, "--threads", "1")
    held, missed = ("latency=2x", "latency=25%", "memory=60%", "memory=2x", "flops=2x"), ("latency=5x", "latency=0.9ms", "memory=40%")
    for target in (*held, *missed):
        result = invoke(*run, "--target", target)
        assert result.exit_code == (0 if target in held else 3), (target, result.stderr)
    assert "FAILED: target latency: 1.000 ms (at most 0.800 ms; batch 1, 1 thread)" in invoke(*run, "--target", "latency=5x").stderr
    refused = invoke(*run, "--target", "latency=2x", "--no-latency")
    assert refused.exit_code == 2 and "evaluate has macs, params, size here" in refused.stderr


def test_every_line_of_prune_says_the_same(pair: Any, clock: Any, tmp_path: Path) -> None:
    model, _, data = pair
    record, run = tmp_path / "record.json", ("prune", model, "-o", tmp_path / "out.onnx", "--ratio", "0.5", "--repair", "none")
    result = invoke(*run, "--data", data, "--test-data", data, "--threads", "1", "--quantize", "int8", "--manifest", record)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("batch 1, 1 thread") == 2 and result.stderr.count("times: batch 1, 1 thread") == 1
    assert "latency 4.000 ms -> 1.000 ms (0.25 of the original; batch 1, 1 thread)" in result.stdout
    assert set(clock) == {(1, 1)}
    found = json.loads(record.read_text())
    assert found["device"]["cpu"] == cpu_name() and (found["device"]["threads"], found["device"]["batch"]) == (1, 1)
    assert {step["timing"] for step in found["packaging"]} == {row["timing"] for row in found["evaluation"]} == {"batch 1, 1 thread"}


def test_a_fixed_batch_is_named_as_it_is(tmp_path: Path, clock: Any) -> None:
    model, data = tmp_path / "model.onnx", tmp_path / "data.npz"
    onnx.save(classifier(batch=4), model)
    np.savez(data, x=images(8))
    assert "times: batch 4, " in invoke("evaluate", model, "--data", data).stdout
    assert invoke("evaluate", model, "--data", data, "--batch", "3").exit_code == 2


def test_a_latency_target_names_its_conditions(pair: Any, clock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "block", lambda setup: Block(1, 1.0, {}))
    model = pair[0]
    analysis = sfp_onnx.inspect(model)
    costs = dict.fromkeys(names_of(analysis), (0.0, 0.0, 1e-9, 0.0))
    seconds = 1e-5 + 1e-9 * analysis.size().macs
    board = DeviceProfile({"cpu": "a board"}, analysis.model.sha256, 1, seconds, Block(1, 1.0, {}), 1e-5, costs, 1.0, 0.0, 0)
    path = tmp_path / "board.json"
    path.write_text(json.dumps(to_json(board)))
    result = invoke("plan", model, "-o", tmp_path / "plan.json", "--target", "latency=2x", "--device-profile", path, "--threads", "1")
    assert result.exit_code == 0 and "latency (batch 1, 1 thread)" in result.stdout, result.stderr
