"""Cuts in rounds: every result is a cut of the original, in its numbering."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from conftest import classifier, images, invoke, labels_of, masked_reference, relative, run_model as run

import sfp_onnx
from sfp_onnx.core.errors import OptionError
from sfp_onnx.core.options import PlanOptions, RepairOptions
from sfp_onnx.planning import search
from sfp_onnx.planning.rounds import targets_of
from sfp_onnx.report.manifest import Pruned


def rounds(steps: int, **options: object) -> Pruned:
    data = {"x": images(120), "labels": labels_of(120)}
    return sfp_onnx.prune(classifier(), PlanOptions(targets=("macs=40%",)), data=data, steps=steps, **options)


@pytest.fixture(scope="module")
def three() -> Pruned:
    return rounds(3)


def test_shares_grow_by_the_same_factor() -> None:
    before = {"macs": 1000.0, "params": 100.0}
    assert targets_of(["macs=12.5%"], before, 1 / 3) == ("macs=500.000",)
    assert targets_of(["macs=12.5%", "params=50"], before, 1.0) == ("macs=125.000", "params=50.000")


def test_the_last_round_holds_the_target_of_the_original(three: Pruned) -> None:
    assert three.plan.before.macs == sfp_onnx.inspect(classifier()).size().macs
    assert three.plan.after.macs <= 0.4 * three.plan.before.macs
    assert three.verification is not None and three.plan.options["rounds"] == 3
    assert three.plan.figures["macs"]["before"] == three.plan.before.macs


def test_cuts_are_those_of_the_original(three: Pruned) -> None:
    """The listed channels, masked in the original, give what the same plan cuts without a repair."""
    bare = sfp_onnx.apply(classifier(), three.plan, repair=None)
    cuts = [{**asdict(cut), "removed": list(cut.removed)} for cut in three.cuts]
    feeds = {"x": images(8)}
    assert relative(run(bare.to_proto(), feeds)[0], run(masked_reference(classifier(), cuts), feeds)[0]) < 1e-5
    shapes = [{name: held.shape for name, held in sfp_onnx.graph.initializers(model).items()} for model in (bare.model, three.model)]
    assert all(shapes[1][name] == shape for name, shape in shapes[0].items())


def test_one_round_is_the_usual_run() -> None:
    usual = sfp_onnx.prune(classifier(), PlanOptions(targets=("macs=40%",)), data={"x": images(120), "labels": labels_of(120)})
    assert rounds(1).to_proto().SerializeToString(deterministic=True) == usual.to_proto().SerializeToString(deterministic=True)


def test_rounds_repeat_to_the_byte(three: Pruned) -> None:
    assert rounds(3).to_proto().SerializeToString(deterministic=True) == three.to_proto().SerializeToString(deterministic=True)


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(three: Pruned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second round (its result is that of the first), at once when it goes on (nothing is whole), and in the third; a file of
    another run is refused."""
    seen, file, plan_for = [0], tmp_path / "state", search.plan_for

    def stopping(*arguments: object) -> object:
        seen[0] += 1
        if seen[0] == 3:  # the first is asked for twice
            raise KeyboardInterrupt
        return plan_for(*arguments)

    for before, whole in ((0, 1), (1, 0), (0, 2)):
        monkeypatch.setattr(search, "plan_for", stopping)
        seen[0] = before
        if whole:
            early = rounds(3, resume=file)
            assert early.notes[0] == f"stopped: this is the result of round {whole} of 3, larger than asked for (macs=40%)"
            assert 0.4 < early.plan.after.macs / early.plan.before.macs <= 0.4 ** (whole / 3) and early.verification is not None
        else:
            with pytest.raises(KeyboardInterrupt):
                rounds(3, resume=file)
        monkeypatch.undo()
    again = rounds(3, resume=file)
    assert again.to_proto().SerializeToString(deterministic=True) == three.to_proto().SerializeToString(deterministic=True)
    assert again.cuts == three.cuts and again.plan == three.plan
    with pytest.raises(OptionError, match="another model, other data or options"):
        rounds(2, resume=file)
    file.write_text("nothing")
    with pytest.raises(OptionError, match="cannot read it"):
        rounds(3, resume=file)


def test_no_layer_becomes_two_and_none_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plan_for = search.plan_for
    monkeypatch.setattr(search, "plan_for", lambda ready, options, *more: seen.append(options.moves) or plan_for(ready, options, *more))
    rounds(2)
    assert len(seen) == 3 and set(seen) == {("cut",)}


def test_what_does_not_go_with_rounds(model_file: Path, data_file: Path) -> None:
    run_ = ("prune", model_file, "-o", model_file.parent / "out.onnx", "--rounds", "2")
    for words, said in (
        (("--data", data_file, "--ratio", "0.5"), "--rounds needs"), (("--target", "macs=50%"), "--rounds needs"),
        (("--data", data_file, "--target", "latency=50%"), "--rounds takes targets that are counted"),
        (("--data", data_file, "--target", "macs=50%", "--rounds", "1", "--resume", "state"), "--resume goes with --rounds"),
    ):  # fmt: skip
        done = invoke(*run_, *words)
        assert done.exit_code == 2 and said in done.stderr, done.stderr


def test_rounds_with_a_training_between(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the extra `train` is not installed")
    data = {"x": images(160), "labels": labels_of(160)}
    options = PlanOptions(targets=("macs=60%",))
    result = sfp_onnx.prune(classifier(), options, data=data, repair=RepairOptions(finetune=1), steps=2)
    assert result.plan.after.macs <= 0.6 * result.plan.before.macs
    assert result.repaired is not None and "finetune" in result.repaired.finished
    assert np.isfinite(sfp_onnx.evaluate([classifier(), result.model], data, latency=False)[1].value or 0)


def test_a_training_that_is_stopped_ends_all_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its best so far is the result, and the round is made again when the run goes on."""
    pytest.importorskip("torch", reason="the extra `train` is not installed")
    from sfp_onnx.methods import training

    data, file = {"x": images(160), "labels": labels_of(160)}, tmp_path / "state"

    def stopping(said: object) -> str:
        raise KeyboardInterrupt

    def run_() -> Pruned:
        return sfp_onnx.prune(
            classifier(), PlanOptions(targets=("macs=60%",)), data=data, repair=RepairOptions(finetune=1), steps=2, resume=file
        )

    with monkeypatch.context() as patched:
        patched.setattr(training, "words", stopping)
        early = run_()
    assert early.repaired is not None and early.repaired.finished["finetune"]["stopped"] is True
    assert early.notes[0].startswith("stopped: this is the result of round 1 of 2") and not file.exists()
    assert early.plan.after.macs > 0.6 * early.plan.before.macs
    whole = run_()
    assert whole.plan.after.macs <= 0.6 * whole.plan.before.macs and whole.repaired is not None
    assert whole.repaired.finished["finetune"]["stopped"] is False
