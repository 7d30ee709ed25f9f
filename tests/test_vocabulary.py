"""Tables that are looked up keep the rows that are used; inputs stay what they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import invoke, model_of, run_model
from onnx import TensorProto, helper, numpy_helper

import sfp_onnx
from sfp_onnx.core.options import OutputOptions, PlanOptions
from sfp_onnx.graph.save import to_proto
from sfp_onnx.graph.vocabulary import tables, with_rows

ROWS, WIDE, LONG = 900, 24, 6
node = helper.make_node


def encoder(form: str = "plain") -> onnx.ModelProto:
    """Words -> table -> layer -> relu -> mean -> layer."""
    random = np.random.default_rng(0)
    held = {
        "table": random.standard_normal((ROWS, WIDE)).astype(np.float32), "w1": random.standard_normal((WIDE, 32)).astype(np.float32),
        "w2": random.standard_normal((32, 5)).astype(np.float32),
    }  # fmt: skip
    words, table, before = "words", "table", []
    if form == "cast":
        before, words = [node("Cast", ["words"], ["numbers"], to=TensorProto.INT64)], "numbers"
    elif form == "half":
        held["table"], table = held["table"].astype(np.float16), "whole"
        before = [node("Cast", ["table"], ["whole"], to=TensorProto.FLOAT)]
    elif form == "scaled":
        held["table"], table = np.rint(held["table"] * 30).clip(-127, 127).astype(np.int8), "whole"
        held |= {"scale": np.float32(1 / 30), "zero": np.int8(0)}
        before = [node("DequantizeLinear", ["table", "scale", "zero"], ["whole"])]
    elif form == "bool":
        before = [node("Cast", ["words"], ["any"], to=TensorProto.BOOL), node("Cast", ["any"], ["numbers"], to=TensorProto.INT64)]
        words = "numbers"
    nodes = [
        *before, node("Gather", [table, words], ["e"]), node("MatMul", ["e", "w1"], ["m"], "first"), node("Relu", ["m"], ["r"]),
        node("ReduceMean", ["r"], ["p"], axes=[1], keepdims=0), node("MatMul", ["p", "w2"], ["y"], "second"),
    ]  # fmt: skip
    outputs = [("y", np.float32, ["N", 5])]
    if form == "tied":
        held["axis"] = np.array([1, 0], np.int64)
        nodes += [node("Transpose", ["table"], ["t"], perm=[1, 0]), node("MatMul", ["e", "t"], ["z"])]
        outputs.append(("z", np.float32, ["N", LONG, ROWS]))
    if form == "answered":
        outputs.append(("table", np.float32, [ROWS, WIDE]))
    if form == "computed":
        held["one"] = np.array(1, np.int64)
        nodes[0] = node("Gather", [table, "more"], ["e"])
        nodes.insert(0, node("Add", ["words", "one"], ["more"]))
    return model_of(nodes, [("words", np.int32 if form == "cast" else np.int64, ["N", LONG])], outputs, held)


def sentences(count: int, most: int, seed: int = 0, kind: type = np.int64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, most, (count, LONG)).astype(kind)


@pytest.mark.parametrize("form", ["plain", "cast", "half", "scaled"])
def test_the_rows_that_data_use_are_kept(form: str, tmp_path: Path) -> None:
    kind = np.int32 if form == "cast" else np.int64
    model, seen, new = encoder(form), sentences(80, 100, kind=kind), sentences(20, ROWS, 1, kind)
    few = np.where(np.arange(LONG) == 0, new, seen[:20])  # one word of each is new
    plain = sfp_onnx.prune(model, PlanOptions(ratio=0.25), data={"words": seen})
    output = OutputOptions(path=tmp_path / "small.onnx", vocabulary="from-data", unknown_token=7)
    result = sfp_onnx.prune(model, PlanOptions(ratio=0.25), data={"words": seen}, output=output, test_data={"words": few})
    small = onnx.load(tmp_path / "small.onnx")
    kept = np.union1d(np.unique(seen), [7])
    shapes = {tensor.name: tuple(tensor.dims) for tensor in small.graph.initializer}
    assert shapes["table"][0] == len(kept) and shapes["table_places"] == (ROWS,)
    assert [item.name for item in small.graph.input] == ["words"] and any("held-out numbers" in note for note in result.notes)
    plain.save(tmp_path / "plain.onnx")
    np.testing.assert_array_equal(run_model(small, {"words": seen})[0], run_model(tmp_path / "plain.onnx", {"words": seen})[0])
    known = np.where(np.isin(new, kept), new, 7).astype(kind)  # what has no row is the unknown word
    np.testing.assert_array_equal(run_model(small, {"words": new})[0], run_model(tmp_path / "plain.onnx", {"words": known})[0])


def test_others_share_their_mean_and_numbers_below_zero_count_from_the_end() -> None:
    model = sfp_onnx.load(encoder())
    rows = {"words": np.array([0, 5, ROWS - 1])}
    small = to_proto(with_rows(model, rows))
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in encoder().graph.initializer}
    mean = np.delete(found["table"], rows["words"], 0).mean(0, dtype=np.float64).astype(np.float32)
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in small.graph.initializer}
    np.testing.assert_array_equal(held["table"], [*found["table"][rows["words"]], mean])
    ends = np.full((2, LONG), -1)
    np.testing.assert_allclose(run_model(small, {"words": ends})[0], run_model(encoder(), {"words": ends})[0], rtol=1e-6)


def doubled(inputs: int) -> onnx.ModelProto:
    """A table of all rows that two inputs look up, or one of them twice, beside a smaller one that the first looks up."""
    random = np.random.default_rng(0)
    held = {name: random.standard_normal((rows, WIDE)).astype(np.float32) for name, rows in (("table", ROWS), ("less", ROWS // 2))}
    held["w"] = random.standard_normal((WIDE, 32)).astype(np.float32)
    nodes = [
        node("Gather", ["table", "words"], ["a"]), node("Gather", ["table", "more" if inputs > 1 else "words"], ["b"]),
        node("Gather", ["less", "words"], ["c"]), node("Sum", ["a", "b", "c"], ["e"]), node("MatMul", ["e", "w"], ["m"]),
        node("ReduceMean", ["m"], ["y"], axes=[1], keepdims=0),
    ]  # fmt: skip
    ports = [(name, np.int64, ["N", LONG]) for name in ("words", "more")[:inputs]]
    return model_of(nodes, ports, [("y", np.float32, ["N", 32])], held)


@pytest.mark.parametrize("inputs", [1, 2])
def test_numbers_of_several_inputs_and_tables(inputs: int) -> None:
    """Those below 0 count from the end of each table; of what several inputs look up rows of all of them stay."""
    model = sfp_onnx.load(doubled(inputs))
    rows = {"words": np.array([-2, 3]), "more": np.array([7, -1])}
    held = {tensor.name: tensor.dims[0] for tensor in to_proto(with_rows(model, rows)).graph.initializer}
    assert (held["table"], held["less"]) == (2 * inputs + 1, 3)
    feeds = {name: np.resize(kept, (4, LONG)) for name, kept in [*rows.items()][:inputs]}
    np.testing.assert_array_equal(run_model(to_proto(with_rows(model, rows)), feeds)[0], run_model(doubled(inputs), feeds)[0])
    data = {name: sentences(40, 50) for name in feeds}
    with pytest.raises(sfp_onnx.OptionError, match="no row of 900"):
        sfp_onnx.prune(doubled(inputs), PlanOptions(ratio=0.2), data=data, output=OutputOptions(vocabulary="from-data", unknown_token=ROWS))
    result = sfp_onnx.prune(
        doubled(inputs), PlanOptions(ratio=0.2), data=data, output=OutputOptions(vocabulary="from-data", unknown_token=ROWS - 1)
    )
    said = {name: next(note for note in result.notes if f"'{name}'" in note and "vocabulary" in note) for name in ("table", "less")}
    assert said["table"].endswith(f"that of {ROWS - 1}") and said["less"].endswith("the mean of the others")


@pytest.mark.parametrize("form", ["tied", "computed", "answered", "bool"])
def test_tables_that_something_else_needs_stay(form: str) -> None:
    assert not tables(sfp_onnx.load(encoder(form)))
    output = OutputOptions(vocabulary="from-data")
    with pytest.raises(sfp_onnx.OptionError, match="no table of the model"):
        sfp_onnx.prune(encoder(form), PlanOptions(ratio=0.25), output=output, data={"words": sentences(40, 9)})


def test_a_file_of_numbers_on_the_command_line(tmp_path: Path) -> None:
    onnx.save(encoder(), tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", words=sentences(60, 50))
    base = ["prune", tmp_path / "model.onnx", "-o", tmp_path / "small.onnx", "--data", tmp_path / "data.npz", "--target", "size=11kB"]
    base += ["--min-channels", "8"]
    result = invoke(*base)
    assert result.exit_code == 3  # the table alone is larger
    keep = tmp_path / "keep.txt"
    keep.write_text("\n".join(map(str, range(60))) + "\n")
    result = invoke(*base, "--vocabulary", keep)
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "small.onnx").stat().st_size <= 11_000 and "60 of 900 rows" in result.stderr
    first = (tmp_path / "small.onnx").read_bytes()
    assert len(first) > 10_000  # what is planned with counts the rows that stay, so that the target is used
    assert invoke(*base, "--vocabulary", keep, "--manifest", tmp_path / "run.json").exit_code == 0
    assert (tmp_path / "small.onnx").read_bytes() == first
    locked = invoke(*base, "--vocabulary", keep, "--locked", tmp_path / "run.json")
    assert locked.exit_code == 0, locked.stderr
    half = [*base[:-4], "--target", "size=50kB", "--fp16"]  # other forms are locked as they are written
    assert invoke(*half, "--manifest", tmp_path / "run.json").exit_code == 0
    assert invoke(*half, "--locked", tmp_path / "run.json").exit_code == 0


@pytest.mark.parametrize("vocabulary", [None, "from-data"])
def test_targets_count_tables_as_the_quantiser_leaves_them(vocabulary: str | None, tmp_path: Path) -> None:
    """In a byte: a target that can be reached was refused."""
    limit = 15_000 if vocabulary is None else 9_000
    output = OutputOptions(path=tmp_path / "small.onnx", quantize="int8", vocabulary=vocabulary)
    sfp_onnx.prune(encoder(), PlanOptions(targets=(f"size={limit}",)), output=output, data={"words": sentences(60, 100)})
    assert 0.8 * limit < (tmp_path / "small.onnx").stat().st_size <= limit


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("3\nword\n", "line 2"),
        ("9" * 30, "line 1"),
        ("1000\n", "no row of 900"),
        ("\n".join(map(str, range(900))), "nothing would be saved"),
    ],
)
def test_files_that_hold_no_rows_are_refused(text: str, said: str, tmp_path: Path) -> None:
    onnx.save(encoder(), tmp_path / "model.onnx")
    (tmp_path / "keep.txt").write_text(text)
    words = ["prune", tmp_path / "model.onnx", "-o", tmp_path / "small.onnx", "--ratio", "0.25", "--vocabulary"]
    result = invoke(*words, tmp_path / "keep.txt")
    assert result.exit_code == 2 and said in result.stderr and not (tmp_path / "small.onnx").exists()
    assert "cannot be read" in invoke(*words, tmp_path / "none.txt").stderr
    assert "needs --data" in invoke(*words, "from-data").stderr
    assert "needs --vocabulary" in invoke(*words[:-1], "--unknown-token", "3").stderr
