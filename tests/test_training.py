"""Fine-tuning: blocks, the kept channels, the held-out guard, going on from a file, masks; and what is said without the extra."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from building import Builder, run
from click.testing import CliRunner

import sfp_onnx
from sfp_onnx import repair as repairs
from sfp_onnx.cli import main
from sfp_onnx.core.errors import DataError, OptionError
from sfp_onnx.core.options import DataOptions, OutputOptions, PlanOptions, RepairOptions
from sfp_onnx.data.checks import opened
from sfp_onnx.graph import Constants, initializers
from sfp_onnx.graph.save import to_proto
from sfp_onnx.methods.dilution.stages import DiluteOptions
from sfp_onnx.methods.training import TicketOptions, TrainOptions


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    result = CliRunner().invoke(main, ["finetune", "a.onnx", "--data", "d.npz", "-o", str(tmp_path / "o.onnx")])
    assert result.exit_code == 2
    assert "finetune needs torch, which is not installed: pip install torch (it is the extra 'train': sfp_onnx[train])" in result.output


torch = pytest.importorskip("torch", reason="training needs the extra 'train' (torch), which is not installed")

from sfp_onnx.methods.training import lottery, tuning  # noqa: E402
from sfp_onnx.methods.training.bridge import Network  # noqa: E402
from sfp_onnx.methods.training.engine import Checkpoint, Schedule, Task, fit  # noqa: E402
from sfp_onnx.methods.training.reconstruct import blocks, separators  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def residual(classes: int = 6) -> onnx.ModelProto:
    """Three residual blocks behind a convolution."""
    b = Builder(17, seed=2)
    y = b.op("Relu", b.conv(b.input(["N", 3, 8, 8]), 3, 12, name="stem"))
    for number in range(3):
        inner = b.op("Relu", b.conv(y, 12, 12, name=f"in{number}"))
        y = b.op("Relu", b.op("Add", b.conv(inner, 12, 12, name=f"out{number}"), y, name=f"sum{number}"), name=f"end{number}")
    y = b.op("Flatten", b.op("GlobalAveragePool", y))
    return b.model(b.gemm(y, 12, classes))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, samples, and the model pruned without a repair, with its manifest beside."""
    folder = tmp_path_factory.mktemp("training")
    onnx.save(residual(), folder / "model.onnx")
    images = np.random.default_rng(0).standard_normal((320, 3, 8, 8)).astype(np.float32)
    np.savez(folder / "data.npz", x=images)
    output = OutputOptions(path=folder / "small.onnx", manifest=folder / "small.json")
    sfp_onnx.prune(folder / "model.onnx", PlanOptions(ratio=0.5), "magnitude", output=output)
    return folder


def tune(place: Path, **changes: Any) -> tuning.Finetuned:
    arguments = {name: changes.pop(name) for name in ("teacher", "cuts", "tell", "output") if name in changes}
    options = TrainOptions(**{"epochs": 6, "lr": 3e-3, "train_batch": 64, "mirror": True, **changes})
    return tuning.finetune(place / "small.onnx", options, place / "data.npz", **arguments)


def test_blocks_lie_between_the_tensors_that_separate_the_graph(place: Path) -> None:
    student, teacher = Network(place / "small.onnx"), Network(place / "model.onnx")
    assert {"end0.out", "end1.out", "end2.out", "sum0.out"} <= set(separators(student))
    manifest = tuning.read_manifest(student.model, None)
    assert manifest is not None
    found = blocks(student, teacher, tuning.kept_channels(manifest["cuts"]), {"x": torch.zeros(3, 3, 8, 8)})
    assert [block.ends for block in found[:2]] == [("end0.out",), ("end1.out",)] and len(found) in (3, 4)
    assert {"stem.weight", "in0.weight"} <= set(found[0].weights) and found[1].start == found[0].ends
    names = [name for block in found for name in block.weights]
    assert sorted(names) == sorted(student.parameters)


def plain(factored: bool) -> onnx.ModelProto:
    """Four layers of convolution, normalisation and Relu; each convolution but the first as one or, ``factored``, as two."""
    b = Builder(17, seed=4)
    y = b.input(["N", 3, 8, 8])
    for number in range(4):
        inside = factored and number > 0
        y = b.conv(y, 8 if number else 3, 4, kernel=1, name=f"first{number}") if inside else y
        y = b.conv(y, 4 if inside else 8 if number else 3, 8, name=f"conv{number}")
        y = b.op("Relu", b.batch_norm(y, 8, name=f"norm{number}"), name=f"relu{number}")
    return b.model(b.gemm(b.op("Flatten", b.op("GlobalAveragePool", y), name="flat"), 8, 4, name="last"))


@pytest.mark.parametrize("factored", [True, False])
def test_a_block_ends_behind_what_follows_its_layers(factored: bool) -> None:
    """Not at their bare sums, which a repair has fitted; and two matrices that stand for one of the original are one layer."""
    found = blocks(Network(plain(factored)), Network(plain(False)), {}, {"x": torch.zeros(3, 3, 8, 8)})
    assert [block.ends for block in found] == [("relu1.out",), ("flat.out",), ("last.out",)]
    assert {"conv0.weight", "conv1.weight"} <= set(found[0].weights) and ("first2.weight" in found[1].weights) == factored


def test_data_are_varied_by_mirror_images_and_by_mixtures(place: Path) -> None:
    """A mixture lies between its sample and the mirror image of another, and nobody knows its label; words are not mixed."""
    x = np.load(place / "data.npz")["x"][:20]
    data = sfp_onnx.data_for(sfp_onnx.load(place / "model.onnx"), {"x": x, "labels": np.arange(20) % 6})
    assert data is not None and data.labels is not None

    def rows(mirror: bool, mixed: bool) -> tuple[np.ndarray, Any]:
        made = tuning.varied(data, mirror, mixed, 0)
        return np.concatenate([feeds["x"][:count] for feeds, count in made.batches()]), made.labels

    turned, labels = rows(True, False)
    assert np.array_equal(turned, np.concatenate([x, x[..., ::-1]])) and np.array_equal(labels, np.tile(data.labels, 2))
    assert np.array_equal(rows(False, False)[0], x)
    for mirror, others in ((True, x[..., ::-1]), (False, x)):
        made, labels = rows(mirror, True)
        assert labels is None and len(made) == 40 and np.array_equal(made[:20], x)
        far, ways = made[20:, None] - x[:, None], others[None] - x[:, None]
        shares = (far * ways).sum((2, 3, 4)) / (ways**2).sum((2, 3, 4)).clip(1e-9)
        off = np.abs(far - shares[..., None, None, None] * ways).max((2, 3, 4))
        assert (off.min(1) < 1e-5).all() and (np.take_along_axis(shares, off.argmin(1)[:, None], 1) <= 1).all()
    b = Builder(17)
    numbers = b.model(b.op("Gather", b.weight(9, 4), b.input(["N", 3], dtype=onnx.TensorProto.INT64)))
    words = sfp_onnx.data_for(sfp_onnx.load(numbers), np.zeros((20, 3), np.int64))
    assert words is not None and not tuning.mixable(words) and tuning.mixable(data)


def test_the_guard_looks_at_mixtures_unless_there_are_labels(place: Path, tmp_path: Path) -> None:
    """A repair has fitted the held-out samples, most often, and no mixture of them."""
    notes = " ".join(tune(place, epochs=1).notes)
    assert " on 40 held-out samples and mixtures of them" in notes and "mixtures of samples were trained on" in notes
    x = np.load(place / "data.npz")["x"]
    np.savez(tmp_path / "data.npz", x=x, labels=run(onnx.load(place / "model.onnx"), {"x": x})[0].argmax(1))
    result = tuning.finetune(place / "small.onnx", TrainOptions(epochs=1, lr=3e-3), tmp_path / "data.npz")
    assert "top-1 on 40 held-out samples 0" in result.notes[0]


@pytest.mark.parametrize("recipe", ["blocks", "features", "logits"])
def test_it_comes_nearer_to_the_original(place: Path, recipe: str) -> None:
    result = tune(place, recipe=recipe)
    assert result.kept, result.notes
    x = np.load(place / "data.npz")["x"]
    protos = (onnx.load(place / "model.onnx"), onnx.load(place / "small.onnx"), to_proto(result.model))
    other, before, after = (run(proto, {"x": x})[0].argmax(1) for proto in protos)
    assert (after == other).mean() > (before == other).mean() + 0.05
    assert initializers(result.model) == initializers(sfp_onnx.load(place / "small.onnx"))


def test_labels_are_learned_where_they_are_given(place: Path, tmp_path: Path) -> None:
    x = np.load(place / "data.npz")["x"]
    answers = run(onnx.load(place / "model.onnx"), {"x": x})[0].argmax(1)
    counts = np.bincount(answers, minlength=6)
    common, rare = np.argsort(counts)[-2], counts.argmin()
    labels = np.where(answers == common, rare, answers)  # not always what the original says: they must count
    np.savez(tmp_path / "data.npz", x=x, labels=labels)
    options = TrainOptions(recipe="labels", epochs=30, lr=1e-2, train_batch=64)
    result = tuning.finetune(place / "small.onnx", options, tmp_path / "data.npz")
    after = run(to_proto(result.model), {"x": x})[0].argmax(1)
    assert result.kept and result.measure == "top-1" and (after == rare)[answers == common].mean() > 0.5
    with pytest.raises(DataError, match="--recipe labels takes a classifier, and data with a class number per sample"):
        tune(place, recipe="labels")
    np.savez(tmp_path / "odd.npz", x=x, labels=np.arange(len(x)) % 7 + 1)
    with pytest.raises(DataError, match="labels run from 1 to 7, but the model has classes 0 to 5"):
        tuning.finetune(place / "small.onnx", options, tmp_path / "odd.npz")


def test_answers_that_are_no_class_scores_are_fitted_as_they_are(place: Path, tmp_path: Path) -> None:
    """Embeddings of length one: of a softmax over them nobody has anything."""
    for name in ("model", "small"):
        proto = onnx.load(place / f"{name}.onnx")
        norm = onnx.helper.make_node("LpNormalization", [proto.graph.output[0].name], ["embedding"], axis=1)
        proto.graph.node.append(norm)
        proto.graph.output[0].name = "embedding"
        onnx.save(proto, tmp_path / f"{name}.onnx")
    options = TrainOptions(recipe="logits", epochs=8, lr=3e-3, train_batch=64)
    default = tuning.finetune(tmp_path / "small.onnx", TrainOptions(epochs=1), place / "data.npz", tmp_path / "model.onnx")
    assert default.notes[0].startswith("fine-tuning (features") and "its answers are embeddings" in default.notes[1]
    result = tuning.finetune(tmp_path / "small.onnx", options, place / "data.npz", tmp_path / "model.onnx")
    assert result.kept and result.measure == "cosine" and result.after > result.before + 0.01
    x = np.load(place / "data.npz")["x"]
    own, other = (run(onnx.load(tmp_path / f"{name}.onnx"), {"x": x[:40]})[0] for name in ("small", "model"))
    first = ((own - other) ** 2).mean() / other.var(ddof=1)
    assert result.tasks[0]["before"] == pytest.approx(first, rel=0.5)  # a mean squared error, not a divergence of distributions


@pytest.mark.parametrize("recipe", ["blocks", "features"])
def test_a_diluted_model_stays_diluted(place: Path, tmp_path: Path, recipe: str) -> None:
    sparse = sfp_onnx.methods.dilution.stages.dilute(place / "model.onnx", DiluteOptions("magnitude", 0.7, layers="in|out"))
    sparse.save(tmp_path / "sparse.onnx")
    options = TrainOptions(recipe=recipe, epochs=3, lr=3e-3, train_batch=64)
    result = tuning.finetune(tmp_path / "sparse.onnx", options, place / "data.npz", place / "model.onnx")
    assert result.kept and any("diluted weights stay zero" in note for note in result.notes)
    before, after = Constants(sparse.model), Constants(result.model)
    names = [item.weight for item in sparse.layers]
    assert len(names) == 6 and all(((before[name] == 0) == (after[name] == 0)).all() for name in names)
    assert any((before[name] != after[name]).any() for name in names)


def test_the_same_seed_gives_the_same_bytes(place: Path, tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        tune(place, output=tmp_path / name)
    tune(place, output=tmp_path / "c.onnx", seed=1)
    a, b, c = ((tmp_path / f"{name}.onnx").read_bytes() for name in "abc")
    assert a == b != c and (place / "small.onnx").read_bytes() not in (a, c)


def test_what_is_no_better_is_not_kept(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure of the blocks that lies does not get past the guard, which looks at the whole model."""
    monkeypatch.setattr(tuning.Network, "written", lambda self: worse(place))
    result = tune(place, epochs=1, output=tmp_path / "o.onnx")
    assert not result.kept and "left as it was" in " ".join(result.notes)
    assert (tmp_path / "o.onnx").read_bytes() == (place / "small.onnx").read_bytes()


def test_blocks_that_give_the_same_already_are_not_trained(place: Path) -> None:
    original = place / "model.onnx"
    said: list[Any] = []
    result = tuning.finetune(original, TrainOptions(recipe="blocks", epochs=2), place / "data.npz", original, tell=said.append)
    assert result.tasks and not said and all(item["before"] <= 1e-6 for item in result.tasks)
    assert result.model.sha256 == result.original.sha256


def worse(place: Path) -> sfp_onnx.Model:
    proto = onnx.load(place / "small.onnx")
    for tensor in proto.graph.initializer:
        if tensor.name in proto.graph.node[-1].input:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * -1, tensor.name))
    return sfp_onnx.load(proto)


def test_a_rate_that_is_far_too_high_leaves_every_block_as_it_was(place: Path) -> None:
    result = tune(place, lr=1e4)
    assert not result.kept and all(item["after"] <= item["before"] for item in result.tasks)


@pytest.mark.parametrize("recipe", ["blocks", "features"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(place: Path, tmp_path: Path, recipe: str) -> None:
    whole = tune(place, recipe=recipe)
    seen: list[str] = []

    def stop(said: dict[str, Any]) -> None:
        seen.append(said["task"])
        if len(seen) == 2:
            raise KeyboardInterrupt

    state = tmp_path / "state"
    stopped = tune(place, recipe=recipe, resume=state, tell=stop)
    assert "stopped" in " ".join(stopped.notes) and state.exists()
    rest: list[str] = []
    again = tune(place, recipe=recipe, resume=state, tell=lambda said: rest.append(said["task"]))
    assert len(rest) + 2 == sum(6 for _ in whole.tasks)
    assert to_proto(again.model) == to_proto(whole.model)
    with pytest.raises(OptionError, match="another model, other data or options"):
        tune(place, recipe=recipe, resume=state, lr=1e-4)


def test_what_the_teacher_gives_is_kept_where_there_is_room(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs once and not in every epoch, to the same result."""
    runs, run_ = [0], Network.run

    def counting(self: Network, *arguments: Any) -> Any:
        runs[0] += 1
        return run_(self, *arguments)

    monkeypatch.setattr(Network, "run", counting)
    made = []
    for memory in (2 * 10**9, 1):
        runs[0] = 0
        result = tune(place, recipe="features", memory=memory, mirror=False)
        made.append((result.tasks[0]["after"], runs[0]))
    assert made[0][0] == pytest.approx(made[1][0], rel=1e-3) and made[0][1] < made[1][1] - 20


def test_a_budget_takes_the_place_of_epochs(place: Path) -> None:
    said: list[dict[str, Any]] = []
    result = tune(place, epochs=1000, budget=0.2, tell=said.append)
    made = {item["task"]: item["epochs"] for item in result.tasks}
    assert made == {item["task"]: item["epoch"] for item in said} and len(made) == 4
    assert any(note.startswith(f"the budget ended the training after {min(made.values())}") for note in result.notes)
    assert all(item["epochs"] < 1000 for item in said) and {item["task"] for item in said} == {f"block {n}/4" for n in (1, 2, 3, 4)}


def test_a_file_that_holds_no_run_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("nothing")
    with pytest.raises(OptionError, match="cannot read it"):
        tune(place, resume=tmp_path / "state")


def test_without_a_manifest_tensors_of_the_same_shape_are_compared(place: Path, tmp_path: Path) -> None:
    lonely = tmp_path / "lonely.onnx"
    lonely.write_bytes((place / "small.onnx").read_bytes())
    with pytest.raises(OptionError, match="give the original with --teacher"):
        tuning.finetune(lonely, TrainOptions(), place / "data.npz")
    result = tuning.finetune(lonely, TrainOptions(epochs=2), place / "data.npz", place / "model.onnx")
    assert "no manifest of the cut" in " ".join(result.notes)


def test_a_training_judges_on_what_the_repair_before_it_left_out(place: Path) -> None:
    data = opened(sfp_onnx.load(place / "model.onnx"), place / "data.npz", DataOptions())
    assert data is not None
    left, judge, apart = repairs._split(data, RepairOptions(finetune=4, seed=3))
    assert apart and np.array_equal(judge.indices, tuning.apart(data, 3)[1].indices) and not set(left.indices) & set(judge.indices)
    assert len(repairs._split(data, RepairOptions(seed=3))[1].indices) < len(judge.indices)


def test_refusals(place: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is not the model that the manifest says was cut"):
        tune(place, teacher=place / "small.onnx")
    with pytest.raises(DataError, match="an eighth of the data is held out to judge on; expected at least 128 samples, found 40"):
        tuning.finetune(place / "small.onnx", TrainOptions(), place / "data.npz", data_options=DataOptions(samples=40))
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(OptionError, match="cannot read the manifest"):
        tune(place, cuts=tmp_path / "no.json")
    if not torch.cuda.is_available():
        with pytest.raises(OptionError, match="finds no CUDA device"):
            tune(place, device="cuda")


@pytest.mark.parametrize("scaled", [True, False])
def test_small_weights_move_in_small_steps(scaled: bool) -> None:
    """Adam's first step is the learning rate, whatever the gradient."""
    values = {"usual": torch.full((4, 4), 0.1), "small": torch.full((4, 4), 0.005), "bias": torch.full((4,), 0.005)}
    before = {name: value.clone() for name, value in values.items()}
    for value in values.values():
        value.requires_grad_()
    task = Task("t", values, lambda *ignored: sum(value.sum() for value in values.values()), 8, lambda: 0.0, latest=True)
    fit(task, Schedule(1, 1e-3, 8, scaled=scaled), Checkpoint(None, ""))
    moved = {name: float((before[name] - value.detach()).mean()) for name, value in values.items()}
    assert moved == pytest.approx({"usual": 1e-3, "small": 1e-4 if scaled else 1e-3, "bias": 1e-3}, rel=1e-2)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_masks_hold_at_every_step(momentum: float) -> None:
    """Momentum and decay would move zeros, too."""
    weight = torch.linspace(-1, 1, 24).reshape(4, 6).requires_grad_()
    mask, zeros = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) > 0.5, []

    def loss(*ignored: Any) -> torch.Tensor:
        return ((weight.sum(1) - 3) ** 2).mean()

    task = Task("t", {"w": weight}, loss, 8, lambda: float(loss().detach()), {"w": mask})
    schedule = Schedule(5, 0.02, 2, momentum=momentum, decay=1e-3)
    first, last, epochs = fit(task, schedule, Checkpoint(None, ""), lambda said: zeros.append((weight == 0).clone()))
    assert epochs == 5 and last < first and all(torch.equal(held, ~mask) for held in zeros) and torch.equal(weight == 0, ~mask)


def test_command_line(place: Path, tmp_path: Path) -> None:
    output, record = tmp_path / "tuned.onnx", tmp_path / "tuned.json"
    words = ["finetune", place / "small.onnx", "-o", output, "--data", place / "data.npz", "--epochs", 2, "--lr", 3e-3]
    words += ["--manifest", record]
    result = CliRunner().invoke(main, [*map(str, words), "--json"])
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert lines[0]["epoch"] == 1 and {"loss", "held_out", "seconds"} <= set(lines[0]) and lines[-1] == json.loads(record.read_text())
    assert lines[-1]["output"]["sha256"] == sfp_onnx.load(output).sha256
    again = CliRunner().invoke(main, [*map(str, words[:-2]), "--test-data", str(place / "data.npz")])
    assert "on 320 held-out samples" in again.output
    assert "epoch 2/2: loss" in again.output and "held-out samples:" in again.output and f"wrote {output}" in again.output


def test_prune_does_it_in_one_run(place: Path, tmp_path: Path) -> None:
    """The same from `prune` as from a plan that is applied; the manifest says what it brought."""
    options, repair = PlanOptions(ratio=0.5), RepairOptions(finetune=6)
    data = np.load(place / "data.npz")["x"]
    result = sfp_onnx.prune(place / "model.onnx", options, "magnitude", data, repair=repair)
    figures = result.manifest["repair"]["finetune"]
    assert figures["tasks"] and figures["held_out"] == 40 and any("fine-tuning (blocks" in note for note in result.notes)
    planned = sfp_onnx.plan(place / "model.onnx", options, "magnitude", data, repair=repair)
    assert planned.options["repair"]["finetune"] == 6
    assert to_proto(sfp_onnx.apply(place / "model.onnx", planned, data).model) == to_proto(result.model)
    with pytest.raises(OptionError, match="--finetune follows a repair"):
        sfp_onnx.prune(place / "model.onnx", options, "magnitude", repair=repair)


def channels_last(batch: int | str) -> onnx.ModelProto:
    """Images as TensorFlow's exporters have them, for one batch only, with an index as second output."""
    b = Builder(17, seed=5)
    y = b.op("Transpose", b.input([batch, 8, 8, 3]), perm=[0, 3, 1, 2])
    for number, width in enumerate((12, 12, 16)):
        y = b.op("Relu", b.conv(y, 3 if not number else 12, width, name=f"conv{number}"))
    y = b.gemm(b.op("Reshape", b.op("GlobalAveragePool", y), b.const([batch if isinstance(batch, int) else -1, 16], np.int64)), 16, 4)
    return b.model(b.op("Softmax", y, axis=1), b.op("ArgMax", y, axis=1, keepdims=0))


@pytest.mark.parametrize("batch", [1, 4, "N"])
def test_fixed_batches_and_other_layouts(tmp_path: Path, batch: int | str) -> None:
    """A batch that the graph fixes is what is run at once, whatever the number of samples; images are mirrored by their width."""
    onnx.save(channels_last(batch), tmp_path / "model.onnx")
    images = np.random.default_rng(1).standard_normal((135, 8, 8, 3)).astype(np.float32)
    output = OutputOptions(path=tmp_path / "small.onnx", manifest=tmp_path / "small.json")
    sfp_onnx.prune(tmp_path / "model.onnx", PlanOptions(ratio=0.3), "magnitude", output=output)
    options = TrainOptions(epochs=2, lr=3e-3, train_batch=32, mirror=True)
    result = tuning.finetune(tmp_path / "small.onnx", options, images)
    assert all(item["after"] < item["before"] for item in result.tasks) and result.kept
    dataset = sfp_onnx.data_for(result.model, images)
    assert dataset is not None and tuning.columns(dataset) == (2 if dataset.axis == 3 else 3)


# ---- masks that stay -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labelled", [True, False])
def test_dilute_retrains_what_its_masks_leave(place: Path, labelled: bool) -> None:
    """Far enough diluted that it must help, by labels or by the original's answers; zeros stay zeros."""
    x = np.load(place / "data.npz")["x"]
    data = {"x": x, "labels": run(onnx.load(place / "model.onnx"), {"x": x})[0].argmax(1)} if labelled else {"x": x}
    options = DiluteOptions(method="magnitude", rate=0.8, refit=False)
    before = sfp_onnx.dilute(place / "model.onnx", options, data)
    result = sfp_onnx.dilute(place / "model.onnx", replace(options, retrain=8, retrain_lr=0.01), data)
    note = next(note for note in result.notes if note.startswith("retrained 8 epochs"))
    assert ("by labels" in note) == labelled
    assert "not kept" not in note or not labelled
    for old, new in ((Constants(model)[name] for model in (before.model, result.model)) for name in Constants(before.model)):
        assert old.shape == new.shape and (old.ndim < 2 or np.array_equal(old == 0, new == 0))


def test_retraining_without_data_is_refused(place: Path) -> None:
    with pytest.raises(DataError, match="--retrain needs --data"):
        sfp_onnx.dilute(place / "model.onnx", DiluteOptions(method="l1", rate=0.5, retrain=1))


# ---- lottery tickets -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled(place: Path) -> Path:
    """Samples with labels, and the model with other weights as its start."""
    x = np.load(place / "data.npz")["x"]
    np.savez(place / "labelled.npz", x=x, labels=run(onnx.load(place / "model.onnx"), {"x": x})[0].argmax(1))
    model = sfp_onnx.load(place / "model.onnx")
    sfp_onnx.save(lottery.redrawn(model, [name for name in Constants(model) if name.endswith("weight")], 7), place / "first.onnx")
    return place / "labelled.npz"


def test_a_ticket_begins_with_the_first_weights_and_keeps_its_zeros(place: Path, labelled: Path, tmp_path: Path) -> None:
    options = TicketOptions(rounds=2, rate=0.5, epochs=2, lr=3e-3, controls=True)
    paths = {"output": tmp_path / "ticket.onnx", "untrained": tmp_path / "start.onnx"}
    result = lottery.ticket(place / "model.onnx", options, labelled, place / "first.onnx", **paths)
    assert [item.left for item in result.rounds] == pytest.approx([0.5, 0.25], abs=0.01)
    assert all(set(item.controls) == {"new init", "random mask", "one-shot"} for item in result.rounds)
    first, start, end = (Constants(sfp_onnx.load(path)) for path in (place / "first.onnx", paths["untrained"], paths["output"]))
    for name, mask in result.masks.items():
        assert np.array_equal(start[name], first[name] * mask) and not end[name][~mask].any() and (end[name][mask] != 0).all()
    other = lottery.shuffled(result.masks, 0)
    assert all(other[name].sum() == mask.sum() for name, mask in result.masks.items())
    again = lottery.ticket(place / "model.onnx", options, labelled, place / "first.onnx")
    assert again.rounds == result.rounds and result.manifest["rounds"][1]["left"] == result.rounds[1].left


def test_tickets_without_first_weights(place: Path, labelled: Path, tmp_path: Path) -> None:
    """What a trained file cannot tell is asked for; rewinding the learning rate needs nothing; what is a control says so."""
    words = ["ticket", place / "model.onnx", "-o", tmp_path / "t.onnx", "--data", labelled, "--rounds", 1, "--epochs", 1]
    refused = CliRunner().invoke(main, list(map(str, words)))
    assert refused.exit_code == 2 and "does not hold its first weights: give them with --rewind INIT.onnx" in refused.output
    for more in (["--rewind", "none"], ["--reinit", "3"]):
        result = CliRunner().invoke(main, [*map(str, words), *more])
        assert result.exit_code == 0 and "weights left" in result.output and "80.0%" in result.output, result.output


def test_a_budget_is_shared_by_the_trainings_of_a_ticket(place: Path, labelled: Path) -> None:
    """Ticket and controls of a round are trained for as many epochs: they are compared."""
    said: list[dict[str, Any]] = []
    options = TicketOptions(rounds=2, rate=0.5, epochs=1000, budget=0.4, lr=3e-3, controls=True)
    result = lottery.ticket(place / "model.onnx", options, labelled, place / "first.onnx", tell=said.append)
    made = {item["task"]: item["epoch"] for item in said}
    for number, item in enumerate(result.rounds, 1):
        own = [count for task, count in made.items() if task.startswith(f"round {number}/2")]
        assert own == [item.epochs] * 4 and 1 <= item.epochs < 1000
    assert result.notes[0].startswith("the budget ended the training after") and result.manifest["notes"] == list(result.notes)


def test_refusals_of_tickets(place: Path, labelled: Path) -> None:
    options = TicketOptions(rounds=1, epochs=1)
    with pytest.raises(OptionError, match=r"its graph is another one than that of .* keep it unfolded"):
        lottery.ticket(place / "model.onnx", options, labelled, folded())
    with pytest.raises(OptionError, match=r"tensor '.*' is .*, in .* it is"):
        lottery.ticket(place / "model.onnx", options, labelled, residual(classes=7))
    with pytest.raises(DataError, match="a ticket is trained by class numbers"):
        lottery.ticket(place / "model.onnx", options, place / "data.npz", place / "first.onnx")


def folded() -> onnx.ModelProto:
    """Another graph."""
    b = Builder(17, seed=2)
    return b.model(b.op("Flatten", b.conv(b.input(["N", 3, 8, 8]), 3, 4)))
