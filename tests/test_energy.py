"""Energy of a run: counters that turn over, windows by a clock of its own, and the estimate by hand."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import classifier, images, invoke

import sfp_onnx
from sfp_onnx.latency import energy

MOST = 65_532_610_987


class Machine:
    """A fake powercap tree, and a clock that moves only where something runs; two packages that share the power."""

    def __init__(self, root: Path, start: int = 5, idle: float = 10.0) -> None:
        self.now, self.joules, self.idle, self.start, self.root = 0.0, 0.0, idle, start, root
        zones = {"intel-rapl:0": "package-0", "intel-rapl:1": "package-1", "intel-rapl:0:0": "core", "intel-rapl:2": "psys"}
        for zone, name in zones.items():
            (root / zone).mkdir(parents=True)
            (root / zone / "name").write_text(f"{name}\n")
            (root / zone / "max_energy_range_uj").write_text(f"{MOST}\n")
        self.work(0.0, 0.0)

    def work(self, seconds: float, watts: float) -> None:
        """Run for some time at a power above that at rest."""
        self.now += seconds
        self.joules += seconds * (self.idle + watts)
        for zone in self.root.iterdir():
            (zone / "energy_uj").write_text(f"{(self.start + round(self.joules / 2 * 1e6)) % MOST}\n")


@pytest.mark.parametrize("start", [5, MOST - 1_000_000])
def test_joules_above_rest(tmp_path: Path, start: int) -> None:
    machine = Machine(tmp_path, start)
    meters, why = energy.counters(tmp_path)
    assert [meter.path.parent.name for meter in meters] == ["intel-rapl:0", "intel-rapl:1"] and not why
    runs = [lambda: machine.work(0.02, 30.0), lambda: machine.work(0.01, 20.0)]
    found = energy.above_rest(runs, meters, lambda: machine.now, lambda seconds: machine.work(seconds, 0.0))
    assert found == pytest.approx([0.6, 0.2], rel=1e-5)


def test_counters_that_cannot_be_read(tmp_path: Path) -> None:
    assert energy.counters(tmp_path) == ([], f"there are no counters of processor packages in {tmp_path}")
    Machine(tmp_path)
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    (tmp_path / "intel-rapl:1" / "energy_uj").mkdir()  # unreadable, also to root
    meters, why = energy.counters(tmp_path)
    assert not meters and why.endswith("cannot be read: Is a directory")


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    sfp_onnx.save(sfp_onnx.load(classifier()), tmp_path / "model.onnx")
    np.savez(tmp_path / "test.npz", x=images(20))
    return tmp_path


def test_without_counters_it_is_an_estimate(arrays: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "POWERCAP", arrays / "none")
    words = ["evaluate", arrays / "model.onnx", "--data", arrays / "test.npz", "--no-latency", "--energy"]
    found = json.loads(invoke(*words, "--json").stdout)[0]
    graph = onnx.shape_inference.infer_shapes(onnx.load(arrays / "model.onnx")).graph
    held = (*graph.input, *graph.value_info, *graph.output)
    shapes = [[max(axis.dim_value, 1) for axis in info.type.tensor_type.shape.dim] for info in held]
    moved = found["size"]["bytes"] + 2 * 4 * sum(map(prod, shapes))  # weights once, activations written and read
    assert found["energy_mj"] == pytest.approx(found["size"]["macs"] * 4.6e-9 + moved / 4 * 640e-9)
    assert found["energy"].startswith("an estimate, not measured (there are no counters")
    text = invoke(*words).stdout
    assert "mJ" in text.splitlines()[0] and "energy of a run: an estimate" in text
    assert "mJ" not in invoke(*words[:-1]).stdout


def test_with_counters_it_is_measured(arrays: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(arrays / "powercap")
    monkeypatch.setattr(energy, "POWERCAP", arrays / "powercap")
    monkeypatch.setattr(energy, "above_rest", lambda runs, meters: [run() and 0.25 for run in runs])
    model = arrays / "model.onnx"
    found = sfp_onnx.evaluate([model, model], arrays / "test.npz", latency=False, energy=True)
    assert [own.energy_mj for own in found] == [250.0, 250.0] and found[0].energy.startswith("measured (RAPL")
    monkeypatch.setattr(energy, "above_rest", lambda runs, meters: [-1.0 for _ in runs])
    assert "disturbed" in sfp_onnx.evaluate([model], arrays / "test.npz", latency=False, energy=True)[0].energy


def test_the_card_and_the_report_of_a_run_tell_it(arrays: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jinja2", reason="needs the extra report")
    monkeypatch.setattr(energy, "POWERCAP", arrays / "none")
    words = ["prune", arrays / "model.onnx", "-o", arrays / "small.onnx", "--data", arrays / "test.npz", "--target", "macs=60%", "--energy"]
    assert "give --test-data" in invoke(*words).stderr and not (arrays / "small.onnx").exists()
    more = ["--test-data", arrays / "test.npz", "--card", arrays / "card.md", "--report", arrays / "page.html"]
    result = invoke(*words, *more)
    assert result.exit_code == 0, result.stderr
    assert "| energy of a run, mJ (an estimate, not measured" in (arrays / "card.md").read_text()
    assert "Energy of a run" in (arrays / "page.html").read_text()
