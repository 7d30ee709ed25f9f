"""Calibration in parts: any number of parts adds up to what one pass gives, and any number of workers gives the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import classifier, images, invoke

import sfp_onnx
from sfp_onnx.core.errors import DataError, OptionError, PlanError
from sfp_onnx.core.options import PlanOptions, RepairOptions, ScoreOptions
from sfp_onnx.coupling.analysis import batched, silent
from sfp_onnx.graph.arrays import Arrays
from sfp_onnx.pipeline import scored
from sfp_onnx.pipeline.opened import Sources
from sfp_onnx.runtime import using_threads
from sfp_onnx.scores import elimination, parts, sensitivity, shares as shares_of, statistics
from sfp_onnx.scores.scoring import SCORES, OfGroups

HALF = PlanOptions(targets=("macs=50%",), threads=1)
ABLE = [name for name, own in SCORES.items() if name == "obs" or (isinstance(own.prepare, OfGroups) and own.prepare.needs)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    np.savez(tmp_path / "calibration.npz", x=images(530))  # 402 of them are fitted on: nine batches
    return tmp_path / "calibration.npz"


@pytest.fixture
def measured(model_file: Path, data: Path, tmp_path: Path) -> Callable[..., list[Path]]:
    """Makes all parts of the data, in files."""

    def made(count: int, **named: Any) -> list[Path]:
        files = [tmp_path / f"part_{number}_of_{count}.npz" for number in range(1, count + 1)]
        for number, file in enumerate(files, 1):
            scored.calibrate(model_file, file, f"{number}/{count}", data=data, options=PlanOptions(threads=1), **named)
        return files

    return made


def opened(files: Sequence[Path]) -> list[parts.Source]:
    return [Arrays(file, *parts.WRITTEN) for file in files]


def near(found: Any, expected: Any, within: float = 1e-12) -> None:
    assert np.abs(np.asarray(found) - expected).max(initial=0) <= within * np.abs(expected).max(initial=1e-300)


# ---- the sums --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7])
def test_parts_add_up_to_one_pass(count: int, model_file: Path, data: Path, measured: Callable[..., list[Path]]) -> None:
    analysis = sfp_onnx.inspect(sfp_onnx.load(model_file))
    whole = Sources(data).open(model_file).data
    assert whole is not None
    fitted = batched(analysis, sensitivity.looks(analysis, whole, 0, ScoreOptions.memory).fitted)
    assert fitted.runs == 9
    told = RepairOptions(seed=0, rows_per_input=elimination.ROWS, memory=ScoreOptions.memory)
    look = elimination.look_of(analysis.prepared, analysis.coupling, told)
    together = parts.Joined(opened(measured(count, score_name="obs+contribution"))).layers()
    with using_threads(1):
        every = list(look.seen((feeds for feeds, _ in fitted.batches()), lambda steps: None))
    for seen, other in zip(every, together, strict=False):
        assert seen is not None and other is not None and seen.scatter is not None and other.scatter is not None
        near(other.total, seen.total)
        near(other.squares, seen.squares)
        near(other.scale, seen.scale)
        near(other.scatter.settled(), seen.scatter.settled())
        near(other.scatter.squares, seen.scatter.squares)
        assert other.scatter.count == seen.scatter.count
        for name in ("gram", "rows", "count"):
            near(getattr(other.gathered.sums().summed(), name), getattr(seen.gathered.sums().summed(), name))
    look.store.close()
    moments = parts.shared_by(analysis, opened(measured(count, score_name="contribution")))["moments"]
    with using_threads(1):
        expected = statistics.moments_of(analysis, whole, {"squares"}, silent)
    assert moments.keys() == expected.keys()
    for site, found in moments.items():
        assert found.count == expected[site].count
        near(found.sums["squares"], expected[site].sums["squares"])


@pytest.mark.parametrize("rows", [3, 40, 200])  # per batch, of 64 inputs: several batches a stretch, none whole, each whole
@pytest.mark.parametrize("cuts", [[], [4], [1, 2, 5], [3, 4, 8]])
def test_stretches_lie_where_they_lie_in_one_pass(rows: int, cuts: list[int]) -> None:
    random = np.random.default_rng(0)
    batches = [random.standard_normal((2, rows, 64)).astype(np.float32) for _ in range(9)]

    def seen(first: int, last: int) -> Any:
        own = shares_of.Seen.nothing(batches[0], np.ones(1), True)
        if first:
            for at in range(9):
                own.centre(batches[at], rows, at == 8)
        for at in range(first, last):
            own.add(batches[at], rows, at)
            own.answered(batches[at].astype(float))
        return own

    whole = seen(0, 9)
    edges = [0, *cuts, 9]
    shares = [dict(seen(a, b).arrays()) for a, b in zip(edges, edges[1:], strict=False)]
    if rows * 9 < 16:
        return
    together = shares_of.joined([share.get for share in shares])
    assert together is not None
    for name in ("gram", "rows", "count"):
        near(getattr(together.gathered.sums().summed(), name), getattr(whole.gathered.sums().summed(), name))
    near(together.total, whole.total)


# ---- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ABLE)
def test_a_plan_from_parts_is_that_of_one_pass(name: str, model_file: Path, data: Path, measured: Callable[..., list[Path]]) -> None:
    direct = sfp_onnx.plan(model_file, HALF, name, data)
    files = measured(3, score_name=name)
    data.unlink()
    found = sfp_onnx.plan(model_file, HALF, statistics=[files[number] for number in (2, 0, 1)])
    assert found.groups == direct.groups and found.options == direct.options
    near(sfp_onnx.plan(model_file, HALF, name, statistics=files).after.macs, direct.after.macs)


@pytest.mark.parametrize("make", [partial(nullcontext, 1), partial(nullcontext, 2), partial(ThreadPoolExecutor, 3)])
def test_the_number_of_workers_changes_nothing(
    make: Any, model_file: Path, data: Path, measured: Callable[..., list[Path]], tmp_path: Path
) -> None:
    """And n parts on one machine give the same bytes."""
    options = PlanOptions(targets=("macs=50%",), threads=1, save_library=tmp_path / "a")
    sfp_onnx.plan(model_file, options, statistics=measured(scored.PARTS))
    with make() as executor:
        options = PlanOptions(targets=("macs=50%",), threads=1, save_library=tmp_path / "b")
        sfp_onnx.plan(model_file, options, data=data, executor=executor)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_max_drop_is_judged_on_is_not_measured(model_file: Path, data: Path, tmp_path: Path) -> None:
    words = ["plan", model_file, "--data", data, "--max-drop", "60%", "--task", "classify", "--threads", "1", "--confidence", "50%"]
    for number in (1, 2):
        result = invoke(*words, "--part", f"{number}/2", "--statistics", tmp_path / f"p{number}.npz")
        assert result.exit_code == 0 and "--statistics" in result.stderr, result.stderr
    plans = []
    for more in (["--statistics", tmp_path / "p1.npz", tmp_path / "p2.npz"], ["--statistics", tmp_path / "p*.npz"], []):
        plans.append(tmp_path / f"plan{len(plans)}.json")
        result = invoke(*words, "-o", plans[-1], *more)
        assert result.exit_code == 0, result.stderr
    assert plans[0].read_bytes() == plans[1].read_bytes() == plans[2].read_bytes()
    result = invoke(*words[:4], "-o", plans[0], "--target", "macs=50%", "--statistics", tmp_path / "p*.npz")
    assert result.exit_code == 4 and "data samples: 354 then, 530 now" in result.stderr  # with the judge's third


def test_workers_on_the_command_line(model_file: Path, data: Path, tmp_path: Path) -> None:
    result = invoke("plan", model_file, "-o", tmp_path / "p.json", "--data", data, "--target", "macs=50%", "--workers", "2")
    assert result.exit_code == 0 and "measured in 8 parts" in result.stderr, result.stderr


# ---- what does not fit -----------------------------------------------------------------------------------------------


def test_parts_that_do_not_fit_are_refused(model_file: Path, data: Path, measured: Callable[..., list[Path]], tmp_path: Path) -> None:
    first, second = measured(2)
    third = measured(3)[1]

    def refused(kind: type[Exception], words: str, files: Sequence[Path], model: Path = model_file) -> None:
        with pytest.raises(kind, match=words):
            sfp_onnx.plan(model, HALF, statistics=files)

    refused(OptionError, "missing: 2", [first])
    refused(OptionError, "there twice: 1", [first, second, first])
    refused(DataError, "they differ in parts", [first, third])
    refused(DataError, "no sfp_onnx statistics", [data])
    refused(DataError, "no such file", [tmp_path / "nowhere.npz"])
    other = tmp_path / "other.onnx"
    onnx.save(classifier(seed=3), other)
    refused(PlanError, "of another model", [first, second], other)
    second.write_bytes(second.read_bytes()[:-100])
    refused(DataError, "or damaged", [first, second])


def test_what_cannot_be_measured_in_parts_is_said(model_file: Path, data: Path, tmp_path: Path) -> None:
    def refused(words: str, *more: Any) -> None:
        result = invoke("plan", model_file, *more)
        assert result.exit_code == 2 and words in result.stderr, result.stderr
        assert not (tmp_path / "p.npz").exists()

    measure = ["--data", data, "--part", "1/2", "--statistics", tmp_path / "p.npz"]
    refused("these can: activation, apoz, contribution, obs", *measure, "--score", "bandit:sar")
    refused("needs no data", *measure, "--score", "magnitude")
    refused("such as 3/16", *measure[:2], "--part", "3/2", *measure[4:])
    refused("expected at most 9 parts", *measure[:2], "--part", "1/900", *measure[4:])
    refused("needs --data", *measure[2:])
    refused("--part needs --statistics", *measure[:4])
    refused("-o says where", "--data", data, "--target", "macs=50%")
    refused("follow only --statistics", data, "-o", tmp_path / "p.json", "--target", "macs=50%")
