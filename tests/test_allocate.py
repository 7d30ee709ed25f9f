"""The solver for widths: against brute force on small tables, and its pieces; and errors weighed by what reaches the outputs."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import pytest
from building import Builder, feeds_for, run
from conftest import invoke

import sfp_onnx
from sfp_onnx.core.errors import OptionError
from sfp_onnx.core.options import PlanOptions
from sfp_onnx.core.types import Align, FloatArray, IntArray
from sfp_onnx.data.checks import opened
from sfp_onnx.planning.widths import Problem, Tie, choices, greedy, lagrangian, solve, widen
from sfp_onnx.repair.walk import Walk
from sfp_onnx.report.manifest import Pruned
from sfp_onnx.scores import sensitivity
from sfp_onnx.scores.scoring import scored


def chain(kept: IntArray) -> FloatArray:
    """Products of neighbouring widths, as in a chain of layers; blocks of 4 are paid whole."""
    paid = np.ceil(np.asarray(kept, float) / 4) * 4
    found: FloatArray = (paid[..., 1:] * paid[..., :-1]).sum(-1) + 3 * paid[..., 0]
    return found


def total(kept: IntArray) -> FloatArray:
    return np.asarray(kept, float).sum(-1)


def random_problem(seed: int, groups: int = 4, convex: bool = True) -> Problem:
    random = np.random.default_rng(seed)
    widths, errors = [], []
    for _ in range(groups):
        width, step = int(random.integers(8, 17)), int(random.choice([1, 2, 4]))
        own = choices(width, Align(step, step, step), 1, vanish=bool(random.integers(2)), most=7)
        steps = random.exponential(1, len(own) - 1)
        steps = np.sort(steps) if convex else steps
        widths.append(own)
        errors.append([0.0, *np.cumsum(steps * random.uniform(0.1, 3)).tolist()])
    full = np.asarray([own[0] for own in widths])
    bounds = [float(chain(full) * random.uniform(0.2, 0.8)), float(total(full) * random.uniform(0.4, 0.9))]
    return Problem(widths, errors, [chain, total], bounds)


def best(problem: Problem) -> float | None:
    """The least error by trying everything."""
    states = (np.asarray(state) for state in product(*(range(len(own)) for own in problem.widths)))
    found = [problem.error(state) for state in states if problem.holds(state)]
    return min(found) if found else None


@pytest.mark.parametrize("convex", [True, False])
def test_close_to_brute_force(convex: bool) -> None:
    gaps = []
    for seed in range(40):
        problem = random_problem(seed, convex=convex)
        found, least = solve(problem), best(problem)
        assert (found is None) == (least is None)
        if found is None or least is None:
            continue
        assert all(np.asarray(cost(found.kept)) <= bound * (1 + 1e-9) for cost, bound in zip(problem.costs, problem.bounds, strict=True))
        assert all(width in own for width, own in zip(found.kept, problem.widths, strict=True))
        assert found.error == pytest.approx(min(found.errors.values())) and found.error >= least - 1e-9
        gaps.append(found.error - least if least == 0 else found.error / least - 1)
    assert len(gaps) > 30
    assert np.median(gaps) < 0.02 and np.mean(gaps) < 0.12, (np.median(gaps), np.mean(gaps), max(gaps))


@pytest.mark.parametrize("owner", [-1, 1])
@pytest.mark.parametrize("again", [-1, 0])
def test_choices_beside_widths_come_close_to_brute_force(owner: int, again: int) -> None:
    """A layer that may stay whole (first) or become two, at errors that depend on a width (or on none), and at other costs; the error of
    the first group may count twice then."""
    gaps = []
    for seed in range(12):
        random, plain = np.random.default_rng(seed), random_problem(seed, 3)
        table = np.pad(random.exponential(0.5, (len(plain.widths[owner]) if owner >= 0 else 1, 3)), ((0, 0), (1, 0)))
        saved = np.asarray([0.0, *random.uniform(0, 0.4, 3)])

        def cost(kept: IntArray, saved: FloatArray = saved) -> FloatArray:
            return np.asarray(chain(kept[..., :3]) * (1 - saved[kept[..., 3]]))

        def widths_only(kept: IntArray) -> FloatArray:
            return total(kept[..., :3])

        ties = {3: Tie(owner, table, again)}
        joined = Problem([*plain.widths, range(4)], [*plain.errors, [0.0] * 4], [cost, widths_only], plain.bounds, ties)
        state = np.asarray([random.integers(len(own)) for own in joined.widths])
        whole = sum(row[at] for row, at in zip(plain.errors, state[:3], strict=True)) + table[state[owner] if owner >= 0 else 0, state[3]]
        assert joined.error(state) == pytest.approx(whole + (plain.errors[0][state[0]] if again == 0 and state[3] else 0.0))
        for group, own in enumerate(joined.widths):
            moved = [joined.error(np.asarray([*state[:group], at, *state[group + 1 :]])) for at in range(len(own))]
            assert np.ptp(joined.terms(group, state) - moved) == pytest.approx(0, abs=1e-9)
        least, found = best(joined), solve(joined)
        assert (least is None) == (found is None)
        if least is not None and found is not None:
            assert found.error >= least - 1e-9 and (joined.load(found.kept) <= 1 + 1e-9).all()
            gaps.append(found.error / max(least, 1e-9))
    assert np.median(gaps) < 1.05 and max(gaps) < 2


def test_each_method_alone_and_the_choice_between_them() -> None:
    better = {"greedy": 0, "Lagrangian": 0}
    for seed in range(40):
        problem = random_problem(seed, convex=False)
        found = solve(problem)
        if found is None:
            continue
        for name, method in (("greedy", greedy), ("Lagrangian", lagrangian)):
            state = method(problem)
            assert state is not None and problem.holds(state)
            wider = widen(problem, state)
            assert problem.holds(wider) and problem.error(wider) <= problem.error(state) + 1e-12
            assert problem.error(wider) == pytest.approx(found.errors[name])
        better[found.method] += found.errors["greedy"] != found.errors["Lagrangian"]
    assert min(better.values()) > 0  # neither is superfluous


def test_loose_bounds_remove_nothing_and_impossible_ones_are_refused() -> None:
    problem = random_problem(1)
    full = [own[0] for own in problem.widths]
    loose = solve(Problem(problem.widths, problem.errors, problem.costs, [1e9, 1e9]))
    assert loose is not None and loose.kept.tolist() == full and loose.error == 0
    assert solve(Problem(problem.widths, problem.errors, problem.costs, [1e9, 1e-9])) is None


def test_the_same_table_gives_the_same_widths() -> None:
    for seed in range(5):
        one, two = solve(random_problem(seed)), solve(random_problem(seed))
        assert (one is None) == (two is None)
        assert one is None or two is None or one.kept.tolist() == two.kept.tolist()


def test_every_channel_of_a_paid_block_is_kept() -> None:
    widths = [list(range(16, 0, -1))] * 2
    errors = [[float(index) for index in range(16)]] * 2
    found = solve(Problem(widths, errors, [chain], [float(chain(np.asarray([8, 12])))]))
    assert found is not None and all(width % 4 == 0 for width in found.kept)


def test_a_peak_that_needs_two_groups_at_once() -> None:
    def peak(kept: IntArray) -> FloatArray:
        return np.asarray(kept, float).max(-1)

    found = solve(Problem([[8, 4, 2]] * 3, [[0.0, 1.0, 5.0]] * 3, [peak], [4.0]))
    assert found is not None and found.kept.tolist() == [4, 4, 4]


def test_choices() -> None:
    assert choices(12, Align(4, 4, 4), 1) == [12, 8, 4]
    assert choices(10, Align(4, 4, 4), 1) == [10, 8, 4]
    assert choices(12, Align(4, 4, 4), 5) == [12, 8]
    assert choices(3, Align(4, 4, 4), 1) == [3] and choices(3, Align(4, 4, 4), 1, vanish=True) == [3, 0]
    assert choices(40, Align(16, 4, 16), 1) == [40, 32, 16, 12, 8, 4]
    assert choices(12, Align(16, 4, 16), 5, vanish=True) == [12, 8, 0]
    assert choices(20, Align(4, 1, 12), 9) == [20, 16, 12, 11, 10, 9]
    many = choices(512, Align(1, 1, 1), 1)
    assert len(many) == 24 and many[0] == 512 and many[-1] == 1 and many == sorted(set(many), reverse=True)


# ---- alignments ------------------------------------------------------------------------------------------------------


def test_alignments_are_read_once_and_recorded_as_written() -> None:
    written = {8: (8, 8, 8), "8": (8, 8, 8), "16:4": (16, 4, 16), "4:1:12": (4, 1, 12), None: (1, 1, 1), "auto": (1, 1, 1)}
    for text, steps in written.items():
        align = Align.parse(text)
        assert (align.block, align.fine, align.start, align.written) == (*steps, text)
        assert Align.parse(align) is align and align.symbolic == (text == "auto")
        assert PlanOptions(align=text).align == align
    assert Align.parse("none") == Align.parse(None) and str(Align.parse(None)) == "none"
    for text in ("0", "x", "16:", "1:2:3:4", -8):
        with pytest.raises(OptionError, match=f"alignment '{text}'"):
            PlanOptions(align=text)


# ---- what reaches the outputs ----------------------------------------------------------------------------------------

HIDDEN, QUIET = 16, 0.1


def two_voices(softmax: bool = False, tied: bool = False) -> onnx.ModelProto:
    """Two branches of the same kind, of which the output hears one only faintly; with ``tied`` the layers behind both share a weight."""
    b = Builder(seed=3)
    x, voices, common = b.input(["N", 12]), [], b.weight(HIDDEN, 8, fan_in=HIDDEN, name="common")
    for name, volume in (("loud", 1.0), ("quiet", QUIET)):
        hidden = b.op("Relu", b.op("MatMul", x, b.weight(12, HIDDEN, fan_in=12), name=f"{name}.make"))
        read = b.op("MatMul", hidden, common if tied else b.weight(HIDDEN, 8, fan_in=HIDDEN), name=f"{name}.read")
        last = b.const(volume * b.random.standard_normal((8, 5)))
        voices.append(b.op("MatMul", b.op("Relu", read), last, name=f"{name}.last"))
    y = b.op("Add", *voices)
    return b.model(b.op("Softmax", y, axis=1) if softmax else y)


def rows(count: int = 256, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 12)).astype(np.float32)


def factors_of(model: onnx.ModelProto, data: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """By the first layer that makes the group."""
    found: dict[str, float] = {}
    own = sensitivity.factors
    monkeypatch.setattr(sensitivity, "factors", lambda *inputs: (found.update(own(*inputs)), own(*inputs))[1])
    analysis = sfp_onnx.inspect(model)
    scored(analysis, "obs", opened(analysis.model, data, sfp_onnx.DataOptions()))
    producers = {group.name: group.producers[0] for group in analysis.coupling.groups}
    return {producers[name]: factor for name, factor in found.items()}


def pruned(model: onnx.ModelProto, data: np.ndarray) -> Pruned:
    options = sfp_onnx.PlanOptions(targets=("macs=60%",), align=None, only="make")
    return sfp_onnx.prune(model, options, data=data)


def kept(result: Pruned) -> list[int]:
    return [group.width - len(group.remove) for group in result.plan.groups if group.producers[0].endswith("make")]


def distance(model: onnx.ModelProto, result: Pruned) -> float:
    data = rows(2000, seed=6)
    return float(np.square(run(result.to_proto(), {"x": data})[0] - run(model, {"x": data})[0]).mean())


def test_factors_tell_what_the_output_hears(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the error at the readers of a branch, the output gets the square of its volume; errors at the sum itself are heard alike."""
    factors = factors_of(two_voices(), rows(), monkeypatch)
    assert len(factors) == 4
    assert 0.2 < factors["quiet.make"] / factors["loud.make"] / QUIET**2 < 5
    assert 0.2 < factors["quiet.read"] / factors["loud.read"] < 5


def test_layers_that_share_a_weight_are_changed_each_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = factors_of(two_voices(tied=True), rows(), monkeypatch)
    assert len(factors) == 2 and max(factors.values()) < 5 * min(factors.values())


def test_local_errors_mislead_and_the_factors_mend_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both branches look alike to the layers that read them; the loud one must keep its channels."""
    model = two_voices()
    good = pruned(model, rows())
    assert any("weighed by how much of them reaches the outputs" in note for note in good.plan.notes)
    monkeypatch.setattr(sensitivity, "factors", lambda cuts, reached: {})
    local = pruned(model, rows())
    assert not any("weighed" in note for note in local.plan.notes)
    assert abs(np.subtract(*kept(local))) <= 4 and np.subtract(*kept(good)) >= 8
    assert distance(model, good) < 0.1 * distance(model, local)


def test_probabilities_are_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, soft = (factors_of(two_voices(softmax), rows(), monkeypatch) for softmax in (False, True))
    for name in plain:
        assert soft[name] == pytest.approx(plain[name], rel=0.5)


@pytest.mark.parametrize("kind", ["integers", "constant"])
def test_outputs_that_tell_nothing_leave_errors_as_they_are(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    b = Builder(seed=3)
    hidden = b.op("Relu", b.op("MatMul", b.input(["N", 12]), b.weight(12, HIDDEN), name="make"))
    y = b.op("MatMul", hidden, b.weight(HIDDEN, 5), name="read")
    model = b.model(b.op("ArgMax", y, axis=1) if kind == "integers" else b.op("Mul", y, b.const(0.0)))
    assert factors_of(model, rows(), monkeypatch) == {}


def test_a_layer_that_cannot_be_refitted_hides_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two groups one is also read by a recurrent layer, so that no change of weights tells what its cut does."""
    b = Builder(seed=3)
    x = b.input(["N", 3, 12])
    hidden, other = (b.op("Relu", b.op("MatMul", x, b.weight(12, HIDDEN), name=name)) for name in ("hidden", "seen"))
    gates = b.weight(1, 12, HIDDEN), b.weight(1, 12, 4)
    recurrent = b.op("GRU", b.op("Transpose", hidden, perm=[1, 0, 2]), *gates, outputs=["", "state"], hidden_size=4)[1]
    sums = [b.op("MatMul", wide, b.weight(HIDDEN, 5), name=f"read {wide}") for wide in (hidden, other)]
    state = b.op("Flatten", b.op("Transpose", recurrent, perm=[1, 0, 2]))
    model = b.model(b.op("Concat", state, b.op("Flatten", b.op("Add", *sums)), axis=1))
    assert len(sfp_onnx.inspect(model).coupling.groups) >= 2
    assert set(factors_of(model, rows().repeat(3, 1).reshape(-1, 3, 12), monkeypatch)) == {"seen"}


@pytest.mark.parametrize("joined", ["Add", "Mul", "Concat"])
def test_streams_are_what_branches_are_added_to(joined: str) -> None:
    b = Builder(seed=3)
    stream = b.op("MatMul", b.input(["N", 12]), b.weight(12, 8), name="stream")
    for number in range(2):
        hidden = b.op("Relu", b.op("MatMul", stream, b.weight(8, HIDDEN), name=f"inside{number}"))
        branch = b.op("MatMul", hidden, b.weight(HIDDEN, 8), name=f"branch{number}")
        stream = b.op(joined, stream, branch, **({"axis": 1} if joined == "Concat" else {}))
        stream = b.op("MatMul", stream, b.weight(16, 8), name=f"back{number}") if joined == "Concat" else stream
    analysis = sfp_onnx.inspect(b.model(b.op("MatMul", stream, b.weight(8, 5))))
    found = sensitivity.streams(analysis.prepared, analysis.coupling)
    makers = [group.producers for group in analysis.coupling.groups if group.name in found]
    assert makers == ([("stream", "branch0", "branch1")] if joined == "Add" else [])


@pytest.mark.parametrize(("samples", "shares", "held"), [(8, 1, 8), (63, 3, 63), (64, 3, 16), (256, 3, 64), (4096, 3, 128)])
def test_samples_to_look_with(samples: int, shares: int, held: int) -> None:
    """A quarter at most; where that is too little to tell anything, all, for both."""
    analysis = sfp_onnx.inspect(two_voices())
    data = opened(analysis.model, rows(samples), sfp_onnx.DataOptions())
    assert data is not None
    found = sensitivity.looks(analysis, data, 0, 10**9)
    assert (len(found.shares), found.held.samples) == (shares, held)
    assert found.fitted.samples == (samples if held == samples else samples - held)
    assert len(sensitivity.looks(analysis, data, 0, 100).shares) == 1


def test_the_same_bytes_however_it_is_asked_for(tmp_path: Path) -> None:
    model, data = tmp_path / "m.onnx", tmp_path / "x.npz"
    onnx.save(two_voices(), model)
    np.savez(data, x=rows())
    sfp_onnx.prune(
        model, sfp_onnx.PlanOptions(targets=("macs=60%",)), data=data, output=sfp_onnx.OutputOptions(tmp_path / "python.onnx")
    )
    plain: list[Any] = [model, "--data", data, "--target", "macs=60%"]
    for arguments in (["prune", *plain, "-o", tmp_path / "cli.onnx"], ["plan", *plain, "-o", tmp_path / "plan.json"]):
        assert invoke(*arguments).exit_code == 0
    assert invoke("apply", model, tmp_path / "plan.json", "-o", tmp_path / "applied.onnx", "--data", data).exit_code == 0
    first, *others = ((tmp_path / name).read_bytes() for name in ("python.onnx", "cli.onnx", "applied.onnx"))
    assert all(other == first for other in others)


@pytest.mark.parametrize("seed", range(0, 40, 4))
def test_cuts_run_only_what_lies_behind_them(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches the outputs is the same when every cut runs from the inputs on. No integers: a last bit may be a step there."""
    model = graphs.sample(seed, [block for block in graphs.BLOCKS if block is not graphs.quantised]).model
    analysis, found = sfp_onnx.inspect(model), list[dict[str, list[float]]]()
    own = sensitivity.reaching
    monkeypatch.setattr(sensitivity, "reaching", lambda *given: (found.append(own(*given)), found[-1])[1])
    data = opened(analysis.model, feeds_for(model, 3 if analysis.samples == 3 else 24), sfp_onnx.DataOptions())
    scored(analysis, "obs", data)
    monkeypatch.setattr(Walk, "until", lambda self, position, targets: None)
    scored(analysis, "obs", data)
    quick, whole = found
    assert list(quick) == list(whole)
    for name, errors in quick.items():
        np.testing.assert_allclose(errors, whole[name], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("samples", "noted"), [(16, True), (80, True), (200, False)])
@pytest.mark.parametrize("common", [0, 5])
def test_a_pooled_head_needs_as_many_samples_as_channels(samples: int, noted: bool, common: float) -> None:
    """A sample is one row there: with fewer than inputs some channels only seem to be sums of others. As many as are named are enough."""
    b, width = Builder(17, 4), 64
    y = b.op("Relu", b.conv(b.op("Relu", b.conv(b.input(["N", 3, 8, 8]), 3, 16, name="stem")), 16, width, name="wide"))
    model = b.model(b.gemm(b.op("Flatten", b.op("GlobalAveragePool", y)), width, 10, name="head"))
    random = np.random.default_rng(0)
    data = random.standard_normal((samples, 3, 8, 8)) + common * random.standard_normal((samples, 1, 1, 1))
    plan = sfp_onnx.plan(model, PlanOptions(targets=("macs=70%",)), "obs", data.astype(np.float32))
    notes = [note for note in plan.notes if "samples are few" in note]
    assert len(notes) == noted
    if noted:
        assert f"{samples} samples are few" in notes[0] and "most for head" in notes[0] and "About 200 samples would do" in notes[0]


# ---- whole groups of a convolution, and what is inside of them -------------------------------------------------------


def grouped(alike: bool) -> tuple[onnx.ModelProto, np.ndarray]:
    """Two groups of six channels of one convolution; either the second group is worth little, or (not ``alike``) half of either."""
    b = Builder(17, 4)
    x = b.input(["N", 3, 8, 8])
    worth = np.repeat([1.0, 0.02], 6) if alike else np.tile([1.0, 0.02, 1.0, 0.02, 0.02, 1.0], 2)
    stem = b.random.standard_normal((12, 3, 3, 3)) * worth[:, None, None, None]
    y = b.op("Relu", b.op("Conv", x, b.const(stem), pads=[1] * 4, name="stem"))
    kernel = b.random.standard_normal((12, 6, 3, 3)) / 7 * worth[:, None, None, None]
    y = b.op("Relu", b.op("Conv", y, b.const(kernel, name="grouped.w"), pads=[1] * 4, group=2, name="grouped"))
    return b.model(b.conv(y, 12, 5, name="last")), np.random.default_rng(0).standard_normal((96, 3, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("score", [None, "magnitude"])
@pytest.mark.parametrize("alike", [True, False])
def test_whole_groups_or_channels_inside_leave_whichever_is_worth_less(alike: bool, score: str | None) -> None:
    model, x = grouped(alike)
    data = {"x": x} if score is None else None
    result = sfp_onnx.prune(model, PlanOptions(targets=("macs=55%",), align=None), score, data)
    shape = next(list(item.dims[:2]) for item in result.to_proto().graph.initializer if item.name == "grouped.w")
    kept = {group.group: group.width - len(group.remove) for group in result.plan.groups}
    if alike:
        assert kept["stem"] == 1 and shape == [6, 6]
    else:
        assert kept["stem"] == 2 and shape[1] < 6
