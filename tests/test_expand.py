"""Whether something is expanded is a question for the plan: of the error that is expected with it and as the model stands."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from building import Builder

import sfp_onnx
from sfp_onnx.core.options import InspectOptions, OutputOptions, PlanOptions
from sfp_onnx.core.types import Plan
from sfp_onnx.coupling.analysis import free_share
from sfp_onnx.planning import removal_of

SHARED = Path(__file__).resolve().parents[2] / "shared"
WIDTH, INNER, ROWS = 16, 24, 96
TIGHT = PlanOptions(targets=("macs=60%",))
WIDE = PlanOptions(targets=("macs=35%",), min_channels=WIDTH // 2, moves=("cut",))  # branches stay, and layers stay one
STANDING = InspectOptions(expand="none")


def norm(b: Builder, x: str) -> str:
    return b.op("LayerNormalization", x, b.uniform(WIDTH), b.weight(WIDTH, fan_in=9), axis=-1)


def transformer(few_channels: bool, output: bool = False) -> onnx.ModelProto:
    """A stream to which two branches add, normalised in front of each. Half of the channels of the stream say next to nothing
    (``few_channels``), or else half of those inside the branches; the stream itself may be the ``output``."""
    b = Builder(17, 4)
    loud = np.asarray([1.0] * (WIDTH // 2) + [1e-3] * (WIDTH // 2) if few_channels else [1.0] * WIDTH)
    inside = np.ones(INNER) if few_channels else np.asarray([1.0] * (INNER // 2) + [1e-3] * (INNER // 2))

    def layer(x: str, inputs: int, outputs: int, scale: np.ndarray, name: str) -> str:
        weight = b.random.standard_normal((inputs, outputs)) / np.sqrt(inputs)
        return b.op("MatMul", x, b.const(weight * scale), name=name)

    y = layer(b.input(["N", 6, 12]), 12, WIDTH, loud, "stem")
    for number in range(2):
        inner = layer(norm(b, y), WIDTH, INNER, inside, f"wide{number}")
        y = b.op("Add", y, layer(b.op("Relu", inner), INNER, WIDTH, loud, f"narrow{number}"))
    return b.model(y if output else layer(norm(b, y), WIDTH, 4, np.ones(4), "last"))


def rows(seed: int = 2) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((ROWS, 6, 12)).astype(np.float32)}


def told(plan: Plan) -> str:
    """The line that says what was decided."""
    line, = (note for note in plan.notes if "expanded" in note)
    return line


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "model.onnx"
    onnx.save(transformer(True), found)
    return found


def test_what_says_little_leaves_the_stream(path: Path, tmp_path: Path) -> None:
    """Expanded although the target can be met without: the error is smaller, expected and on samples that nothing saw. The same bytes from
    the plan."""
    small, again = tmp_path / "small.onnx", tmp_path / "again.onnx"
    made = sfp_onnx.prune(path, TIGHT, data=rows(), output=OutputOptions(path=small))
    whole, standing = (sfp_onnx.prune(path, TIGHT, data=rows(), inspect_options=InspectOptions(expand=how)) for how in ("all", "none"))
    assert made.plan.options["cut_layernorm"] and not standing.plan.options["cut_layernorm"]
    assert told(made.plan).startswith("expanded: LayerNormalization at 3 places: estimated error") and "against" in told(made.plan)
    reference, feeds = sfp_onnx.load(path), rows(7)
    lost = [float(np.square(run(result.model, feeds) - run(reference, feeds)).mean()) for result in (made, whole, standing)]
    assert lost[0] <= lost[1] < lost[2] / 2
    plan = sfp_onnx.plan(path, TIGHT, data=rows())
    assert plan.after == made.plan.after and plan.after.bytes == small.stat().st_size
    sfp_onnx.apply(path, plan, data=rows(), output=OutputOptions(path=again))
    assert small.read_bytes() == again.read_bytes()


def run(model: sfp_onnx.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    from sfp_onnx.runtime import open_model

    return open_model(model).run(feeds)[0]


@pytest.mark.parametrize("output", [False, True])
def test_nothing_is_expanded_that_brings_nothing(output: bool, tmp_path: Path) -> None:
    """Then the plan is one for the model as it stands, and the file the one that is written without the question."""
    path, small, again, alike = (tmp_path / f"{name}.onnx" for name in ("model", "small", "again", "alike"))
    onnx.save(transformer(False, output), path)
    assert bool(sfp_onnx.inspect(path, expand="all").projected) == output
    made = sfp_onnx.prune(path, PlanOptions(targets=("macs=75%",)), data=rows(), output=OutputOptions(path=small))
    assert not made.plan.options["cut_layernorm"] and "expand_outputs" not in made.plan.options
    assert told(made.plan).startswith("not expanded: ") and "estimated error" in told(made.plan)
    assert [node.op_type for node in onnx.load(small).graph.node if node.op_type in ("Pad", "Slice", "Gather", "Identity")] == []
    plan = sfp_onnx.plan(path, PlanOptions(targets=("macs=75%",)), data=rows())
    assert plan.after == made.plan.after
    sfp_onnx.apply(path, plan, data=rows(), output=OutputOptions(path=again))
    sfp_onnx.prune(path, PlanOptions(targets=("macs=75%",)), data=rows(), inspect_options=STANDING, output=OutputOptions(path=alike))
    assert small.read_bytes() == again.read_bytes() == alike.read_bytes()


def test_a_projection_that_does_nothing_costs_nothing() -> None:
    """What the solver counts, and what the plan says, is what is written."""
    analysis = sfp_onnx.inspect(transformer(False, True), expand="all")
    plan = sfp_onnx.plan(analysis, PlanOptions(targets=("macs=75%",), keep="stem|narrow"), "magnitude")
    result = sfp_onnx.apply(analysis, plan)
    assert analysis.projected and not analysis.expansions(removal_of(plan, analysis.coupling, analysis.model.sha256))
    assert sfp_onnx.inspect(result.model).size().macs == plan.after.macs
    assert analysis.size(np.zeros(analysis.coupling.units, bool)).macs == analysis.size().macs


def test_what_is_measured_once_serves_both(path: Path, tmp_path: Path) -> None:
    """A library, a sweep, workers, and a limit on what is lost: all of them weigh."""
    library, loose = tmp_path / "library.zip", ("macs=95%",)
    first = sfp_onnx.plan(path, PlanOptions(targets=TIGHT.targets, save_library=library), data=rows())
    other = sfp_onnx.plan(path, PlanOptions(targets=loose), data=rows())
    for plan in (first, other):
        for data in (rows(), None):
            again = sfp_onnx.plan(path, PlanOptions(targets=tuple(plan.options["targets"]), library=library), data=data)
            assert (again.groups, again.after, told(again)) == (plan.groups, plan.after, told(plan))
            assert again.options["cut_layernorm"] == plan.options["cut_layernorm"]
    assert first.options["cut_layernorm"] and not other.options["cut_layernorm"]
    with ThreadPoolExecutor(2) as pool:
        arrays = tmp_path / "rows.npz"
        np.savez(arrays, **rows())
        shared = [sfp_onnx.plan(path, TIGHT, data=arrays, executor=executor) for executor in (pool, 1)]
    assert shared[0] == shared[1] and told(shared[0]).startswith("expanded: ")
    swept = sfp_onnx.sweep(path, ["macs=95%:60%:35%"], data=rows(), folder=tmp_path / "swept")
    pads = [sum(node.op_type == "Pad" for node in onnx.load(str(point.file)).graph.node) for point in swept.points[1:]]
    assert pads[1] == 3 > pads[0]
    dropped = sfp_onnx.plan(path, PlanOptions(max_drop="5%"), data=rows(), measure_options=sfp_onnx.MeasureOptions(task="embed"))
    assert "xpanded" in told(dropped)


@pytest.mark.parametrize("output", [False, True])
def test_several_bounds_and_how_weights_are_stored(output: bool, path: Path, tmp_path: Path) -> None:
    """Bounds of files are corrected by what files take, with the codes of the weights that are chosen."""
    small, again = tmp_path / "small.onnx", tmp_path / "again.onnx"
    onnx.save(transformer(False, output), path)
    both = PlanOptions(targets=("params=70%", "macs=70%"), moves=("cut",))
    made = sfp_onnx.prune(path, both, data=rows(), output=OutputOptions(path=small))
    assert told(made.plan) and all(figure["actual"] <= figure["bound"] for figure in made.plan.figures.values())
    sfp_onnx.apply(path, made.plan, data=rows(), output=OutputOptions(path=again))
    assert small.read_bytes() == again.read_bytes()
    stored = sfp_onnx.plan(path, PlanOptions(targets=("size=80%",), precision="auto"), data=rows())
    assert told(stored) and stored.figures["size"]["actual"] <= stored.figures["size"]["bound"]
    assert {item.layer for item in stored.precisions} <= {layer.node.name for layer in sfp_onnx.inspect(path).coupling.layers}


def test_without_errors_it_is_done_where_it_must_be(path: Path) -> None:
    """Without data, with another score, or for a share of every group there is nothing to weigh."""
    for given in ({"score_name": "magnitude"}, {"score_name": "contribution", "data": rows()}):
        assert not sfp_onnx.plan(path, TIGHT, **given).options["cut_layernorm"]
    assert not sfp_onnx.plan(path, PlanOptions(ratio=0.5), data=rows()).options["cut_layernorm"]
    for data in (rows(), None):
        assert "since the target cannot be met as it stands" in told(sfp_onnx.plan(path, WIDE, data=data))


# ---- errors that name what would help ---------------------------------------------------------------------------------


def gated() -> onnx.ModelProto:
    """The branch of a gMLP: half of the channels, normalised and mixed along the tokens, gate the other half."""
    b = Builder(17, 3)
    x = b.op("MatMul", b.input(["N", 6, WIDTH]), b.weight(WIDTH, WIDTH, fan_in=WIDTH), name="stem")
    inner = b.op("Erf", b.op("MatMul", norm(b, x), b.weight(WIDTH, 2 * WIDTH, fan_in=WIDTH), name="wide"))
    kept, gate = b.split(inner, [WIDTH, WIDTH], 2)
    along = b.op("Transpose", norm(b, gate), perm=[0, 2, 1])
    gate = b.op("Transpose", b.op("MatMul", along, b.weight(6, 6, fan_in=6)), perm=[0, 2, 1])
    y = b.op("Add", x, b.op("MatMul", b.op("Mul", kept, gate), b.weight(WIDTH, WIDTH, fan_in=WIDTH), name="narrow"))
    return b.model(b.op("MatMul", norm(b, y), b.weight(WIDTH, 4, fan_in=WIDTH), name="last"))


@pytest.mark.parametrize("data", [False, True])
def test_errors_name_the_expansion(data: bool, path: Path) -> None:
    feeds = {"x": np.random.default_rng(1).standard_normal((32, 6, WIDTH)).astype(np.float32)}
    given = {"data": feeds} if data else {}
    with pytest.raises(sfp_onnx.TargetError, match=r"nothing can be pruned.* with --expand auto or all: half of every group") as found:
        sfp_onnx.prune(gated(), TIGHT, inspect_options=STANDING, **given)
    assert str(found.value).count("--expand") == 1
    result = sfp_onnx.prune(gated(), TIGHT, **given)
    assert "since nothing can be pruned as it stands" in told(result.plan)
    assert result.plan.after.macs <= 0.6 * result.plan.before.macs
    further = {"data": rows()} if data else {}
    with pytest.raises(sfp_onnx.TargetError, match=r"cannot be met.* may leave with --expand auto or all"):
        sfp_onnx.prune(path, WIDE, inspect_options=STANDING, **further)
    with pytest.raises(sfp_onnx.TargetError) as impossible:
        sfp_onnx.prune(path, replace(WIDE, targets=("macs=1%",)), **further)
    assert "--expand" not in str(impossible.value)


ZOO = [("hf_vit", "macs=70%", False), ("hf_convnextv2", "macs=75%", False), ("hf_convnextv2", "macs=35%", True)]


@pytest.mark.parametrize(("name", "target", "expanded"), ZOO)
def test_transformers_of_the_zoo(name: str, target: str, expanded: bool, shared: Path) -> None:
    path = shared / "zoo" / f"{name}.onnx"
    plain, wide = (sfp_onnx.inspect(path, expand=how) for how in ("none", "all"))
    assert wide.expanding and not plain.expanding and free_share(wide) > free_share(plain) + 0.1
    random, feeds = np.random.default_rng(3), plain.prepared.feeds
    data = {key: random.standard_normal((48, *array.shape[1:])).astype(np.float32) for key, array in feeds.items()}
    made = sfp_onnx.plan(path, PlanOptions(targets=(target,)), data=data)
    standing = sfp_onnx.plan(path, PlanOptions(targets=(target,)), data=data, inspect_options=STANDING)
    assert told(made).startswith("expanded" if expanded else "not expanded") and made.options["cut_layernorm"] == expanded
    assert (made.groups == standing.groups) != expanded
    assert made.after.macs <= float(target[5:-1]) / 100 * made.before.macs
