"""Sparse training: what becomes zero stays zero, masks keep their size, a run goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import classifier, images, invoke, labels_of

import sfp_onnx
from sfp_onnx.core.errors import ModelError
from sfp_onnx.core.options import PlanOptions
from sfp_onnx.graph import Constants
from sfp_onnx.methods.training import SparseOptions

torch = pytest.importorskip("torch", reason="training needs the extra 'train' (torch), which is not installed")

from sfp_onnx.methods.training import sparse  # noqa: E402

DATA = {"x": images(160), "labels": labels_of(160)}


def trained(**options: Any) -> sparse.Sparse:
    return sparse.sparsify(classifier(), SparseOptions(**{"epochs": 2, "max_drop": "100%", **options}), DATA)


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_masks_keep_their_size(method: str) -> None:
    result, still = (trained(method=method, epochs=9, rate=0.5, train_batch=8, moved=moved) for moved in (0.3, 0))
    held, other = Constants(result.model), Constants(still.model)
    assert any(((held[name] == 0) != (other[name] == 0)).any() for name in ("w1", "w2", "w3"))
    zeros = {name: int((held[name] == 0).sum()) for name in ("w1", "w2", "w3")}
    assert all(zeros[name] >= held[name].size // 2 for name in zeros)  # what came behind a dead channel is zero, and none of the mask's
    assert result.zeros == sum(held[name].size // 2 for name in zeros)


def test_epochs_too_few_for_a_move_are_named(caplog: pytest.LogCaptureFixture) -> None:
    trained(method="rigl", epochs=3)
    assert "no weight moves: 3 epochs are too few" in caplog.text


def test_weights_that_move_are_the_smallest_and_the_most_worth() -> None:
    value, mask = torch.tensor([3.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    found = sparse.moved(value, mask, torch.tensor([9.0, 9.0, 1.0, 2.0]), 0.5)
    assert found.tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("method", ["groups", "slimming"])
def test_channels_die_and_are_found(method: str) -> None:
    result = trained(method=method, strength=40.0)
    assert 0 < result.zeros < result.total
    scores = sfp_onnx.score(result.model, "magnitude" if method == "groups" else "bn-scale")
    assert (scores == 0).sum() >= result.zeros or method == "groups"
    if method == "groups":
        gone = sfp_onnx.prune(result.model, PlanOptions(targets=("params=90%",)), score_name="magnitude")
        found = sfp_onnx.evaluate([result.model, gone.model], DATA, latency=False)[1]
        assert found.relative_error is not None and found.relative_error < 0.5


def test_a_budget_takes_the_place_of_epochs() -> None:
    said: list[dict[str, Any]] = []
    options = SparseOptions(epochs=1000, budget=0.5, strength=10.0, max_drop="100%")
    result = sparse.sparsify(classifier(), options, DATA, tell=said.append)
    count = said[-1]["epoch"]
    assert 1 <= count < 1000 and len(said) == count
    assert result.notes == (f"the budget ended the training after {count} epoch{'s' if count > 1 else ''}",)
    assert result.manifest["notes"] == result.notes
    assert 0 < result.zeros < result.total  # the pressure is spread over the epochs that there are


def test_without_pressure_nothing_dies() -> None:
    assert trained(method="groups", strength=1e-6).zeros == 0


def test_what_loses_too_much_is_left_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    model = classifier()
    result = sparse.sparsify(model, SparseOptions(method="groups", strength=200.0, epochs=2), DATA)
    assert not result.kept and result.after < result.before - 0.02 and "left as it was" in caplog.text
    assert sfp_onnx.graph.save.to_proto(result.model) == sfp_onnx.graph.save.to_proto(sfp_onnx.load(model))
    assert result.manifest["kept"] is False


def test_slimming_needs_scales() -> None:
    model = classifier()
    folded = onnx.ModelProto()
    folded.CopyFrom(model)
    nodes = [node for node in folded.graph.node if node.op_type != "BatchNormalization"]
    for node in nodes:
        node.input[:] = ["c1" if name == "n1" else name for name in node.input]
    del folded.graph.node[:]
    folded.graph.node.extend(nodes)
    with pytest.raises(ModelError, match="no scale of a BatchNormalization"):
        sparse.sparsify(folded, SparseOptions(method="slimming", epochs=1), DATA)


@pytest.mark.parametrize("method", ["groups", "rigl"])
def test_a_stopped_run_goes_on_to_the_same_bytes(method: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    options = {"method": method, "epochs": 3, "strength": 10.0, "max_drop": "100%"}
    whole = trained(**options)

    def stop(said: dict[str, Any]) -> None:
        if said["epoch"] == 2:
            raise KeyboardInterrupt

    state = tmp_path / "state"
    sparse.sparsify(classifier(), SparseOptions(**options, resume=state), DATA, tell=stop)
    again = trained(**options, resume=state)
    assert again.zeros == whole.zeros
    for name in ("w1", "w2", "w3"):
        np.testing.assert_array_equal(Constants(whole.model)[name], Constants(again.model)[name])


def test_the_command(tmp_path: Path, save: Any) -> None:
    model, data, out = save(classifier()), save(DATA), tmp_path / "o.onnx"
    done = invoke("sparsify", model, "--data", data, "-o", out, "--method", "set", "--epochs", "1", "--store", "sparse")
    assert done.exit_code == 0 and "weights became zero" in done.stdout, done.stderr
    assert out.exists()
