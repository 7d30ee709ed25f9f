"""The report: one file, well-formed, no resource from elsewhere, the same bytes for the same input, and right in a browser."""

from __future__ import annotations

import json
import re
import shutil
import struct
import sys
import zlib
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import CLASSES, classifier, images, invoke, labels_of
from onnx import numpy_helper

pytest.importorskip("jinja2", reason="needs the extra `report` (Jinja2)")

import sfp_onnx
from sfp_onnx import graph
from sfp_onnx.coupling.analysis import data_for, inspect
from sfp_onnx.latency.profiling import layer_times
from sfp_onnx.methods.sfp import few_examples
from sfp_onnx.pipeline.pruned import prune
from sfp_onnx.report import Dot, heat_map, png, scatter, ticks
from sfp_onnx.runtime import Setup

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Checker(HTMLParser):
    """Counts elements; fails on one that is not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.found)


def checked(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert text.startswith("<!DOCTYPE html>") and not checker.open
    assert not re.search(r"https?://|//[a-z]+\.|<script|@import|url\(", text)
    for _, attributes in checker.found:
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
    numbers = [value or "" for _, own in checker.found for name, value in own.items() if name in ("x", "y", "cx", "cy", "width", "height")]
    assert not [value for value in numbers if "nan" in value or "inf" in value]
    return checker


def page_of(*arguments: object, report: Path) -> str:
    result = invoke(*arguments, "--report", report)
    assert result.exit_code == 0, result.stderr
    return report.read_text()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "many.npz"
    np.savez(path, x=images(60), labels=labels_of(60) % CLASSES)
    return path


def test_prune_shows_widths_scores_repair_and_clusters(model_file: Path, data: Path, tmp_path: Path) -> None:
    text = page_of(
        "prune", model_file, "-o", tmp_path / "small.onnx", "--data", data, "--ratio", "0.5", "--score", "sfp", report=tmp_path / "r.html"
    )
    checker = checked(text)
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles[:4] == ["Widths", "Where the MACs went", "Where the milliseconds went", "Scores and the cut"]
    assert {"What single filters recognise", "Repair (lstsq)", "What could not shrink", "To repeat this"} <= set(titles)
    assert checker.count("svg") >= 5 and checker.count("circle") == 20  # 8 + 12 channels
    assert "--ratio 0.5 --score sfp" in text and "onnxruntime" in text and "calibration samples" in text
    assert "conv1: 8 \u2192 4" in text


def test_pictures_show_the_original_pixels_where_answers_differ(model_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    opposite = classifier()
    for tensor in opposite.graph.initializer:
        if tensor.name in ("w3", "b3"):
            tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
    onnx.save(opposite, other)
    raw = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3)).astype(np.uint8)
    path = tmp_path / "raw.npz"
    np.savez(path, x=raw, labels=labels_of(20))
    options = ("--layout", "nhwc", "--scale", "255", "--mean", "0.4,0.5,0.6", "--std", "0.2,0.3,0.4", "--no-latency")
    command = ("evaluate", model_file, other, "--data", path, *options)
    text = page_of(*command, report=tmp_path / "r.html")
    checker = checked(text)
    assert 1 <= checker.count("img") <= 12
    shown = [b64decode(own["src"].split(",")[1]) for tag, own in checker.found if tag == "img"]  # type: ignore[union-attr]
    decoded = {zlib.decompress(own[41 : 41 + struct.unpack(">I", own[33:37])[0]]) for own in shown}
    known = {b"".join(b"\0" + line.tobytes() for line in image) for image in raw}
    assert decoded <= known
    assert page_of(*command, report=tmp_path / "r.html") == text  # the same input, the same bytes
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\ndog\nelk\n")
    told = page_of(*command, "--classes", tmp_path / "classes.txt", report=tmp_path / "r.html")
    assert re.search(r"label (ant \(0\)|bee \(1\)|cat \(2\)|dog \(3\)|elk \(4\))<br>before: [a-z]{3} \(\d\), \d+%", told)


def test_sweep_shows_the_front(model_file: Path, data: Path, tmp_path: Path) -> None:
    text = page_of("sweep", model_file, "--data", data, "--targets", "macs=90%:50%:20%", report=tmp_path / "r.html")
    assert checked(text).count("svg") == 5 and "single filters recognise" in text and "macs=70%" in text and "Pareto front" in text


def test_packaging_stands_in_the_report_and_the_manifest(data: Path, tmp_path: Path) -> None:
    model, output, manifest = tmp_path / "wide.onnx", tmp_path / "small.onnx", tmp_path / "m.json"
    onnx.save(classifier(widths=(32, 48)), model)
    options = ("--ratio", "0.25", "--repair", "none", "--fp16", "--save-ort", tmp_path / "small.ort", "--manifest", manifest)
    text = page_of("prune", model, "-o", output, "--data", data, "--test-data", data, *options, report=tmp_path / "r.html")
    assert "<h2>Packaging</h2>" in text and "<td>fp16</td>" in text and "<td>ort</td>" in text
    found = json.loads(manifest.read_text())
    assert [step["name"] for step in found["packaging"]] == ["original", "pruned", "fp16", "ort"]
    assert found["evaluation"][1]["size"]["bytes"] == found["output"]["bytes"] == output.stat().st_size


def test_what_is_measured_is_what_is_written(data: Path, tmp_path: Path) -> None:
    """Quantised: the accuracy in the manifest, on which a gate relies, is that of the integers."""
    model, output, manifest = tmp_path / "wide.onnx", tmp_path / "small.onnx", tmp_path / "m.json"
    onnx.save(classifier(widths=(32, 48)), model)
    options = ("--ratio", "0.25", "--repair", "none", "--test-data", data, "--quantize", "int8", "--manifest", manifest)
    assert invoke("prune", model, "-o", output, "--data", data, *options).exit_code == 0
    again = json.loads(invoke("evaluate", model, output, "--data", data, "--no-latency", "--json").stdout)[1]
    then = json.loads(manifest.read_text())["evaluation"][1]
    assert then["relative_error"] == pytest.approx(again["relative_error"], rel=1e-5) and then["size"] == again["size"]


def test_layers_add_up_to_a_run(model_file: Path, data: Path) -> None:
    analysis = inspect(model_file)
    result = prune(analysis, sfp_onnx.PlanOptions(ratio=0.5))
    found = layer_times(analysis, result.model, Setup(1))
    assert found is not None and found.names == ("conv1", "conv2", "head", "all else") and found.timing.startswith("batch 1, ")
    for column in (found.before, found.after):
        assert (column >= 0).all() and (column[:2] > 0).all() and 1e-4 < column.sum() < 100
    assert layer_times(analysis, graph.extract.conv_chain(8, layers=2, side=4)) is None  # another model: other tensors


def test_filters_are_shown_where_there_are_classes(model_file: Path, data: Path) -> None:
    analysis = inspect(model_file)
    seen = data_for(analysis.model, data)
    found = few_examples(analysis, seen)
    assert 1 <= len(found) <= 3 and all(own.matrix.shape == (CLASSES, CLASSES) for own in found)
    assert few_examples(analysis, None) == ()
    chain = inspect(graph.extract.conv_chain(8, layers=2, side=4))
    assert few_examples(chain, seen) == ()


def test_names_of_points_do_not_lie_on_each_other() -> None:
    chart = scatter("s", [Dot(1.0, 2.0, "one", True), Dot(1.02, 2.0, "two", False), Dot(3.0, 1.0, "far", False)], ("x", "y"))
    heights = {mark.text: mark.numbers[1] for mark in chart.marks if mark.shape == "text" and mark.kind == "name"}
    assert heights["one"] != heights["two"]


def test_what_the_user_names_is_escaped(data: Path, tmp_path: Path) -> None:
    model = classifier()
    model.graph.node[0].name = '<script>alert("1")</script>'
    path = tmp_path / "a & b.onnx"
    onnx.save(model, path)
    text = page_of("evaluate", path, path, "--data", data, "--no-latency", report=tmp_path / "r.html")
    checked(text)
    assert "a &amp; b.onnx" in text and "&lt;script&gt;" in text


def test_without_jinja_the_extra_is_named_before_any_work(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    result = invoke("prune", model_file, "-o", tmp_path / "s.onnx", "--ratio", "0.5", "--report", tmp_path / "r.html")
    assert result.exit_code == 2 and "sfp_onnx[report]" in result.stderr
    assert not (tmp_path / "s.onnx").exists() and not (tmp_path / "r.html").exists()


def test_a_report_is_no_input_and_no_other_output(model_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "s.onnx"
    for path in (model_file, output, tmp_path / "missing" / "r.html"):
        result = invoke("prune", model_file, "-o", output, "--ratio", "0.5", "--report", path)
        assert result.exit_code == 4 and not output.exists()


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 64), (93.1, 93.4), (-3, 5), (0, 2.4e6), (5, 5), (0, 0)])
def test_ticks_are_round_and_cover_the_values(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low + 1e-9 and found[-1] >= high - 1e-9 and 2 <= len(found) <= 8


def test_heat_map_frames_clusters_as_blocks() -> None:
    matrix = np.zeros((4, 4))
    matrix[np.ix_([1, 3], [1, 3])] = 2
    chart = heat_map("m", matrix, [(1, 3)])
    frames = [mark for mark in chart.marks if mark.kind == "frame"]
    assert len(frames) == 1 and frames[0].numbers[2] * 2 == pytest.approx(heat_map("m", matrix, []).marks[0].numbers[2])


def test_png_refuses_other_arrays() -> None:
    with pytest.raises(ValueError, match="uint8"):
        png(np.zeros((2, 2, 3)))


# ---- a real browser --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prune", "sweep", "evaluate"])
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1000, "light")])
def test_a_browser_shows_it_without_errors_or_requests(
    kind: str, width: int, scheme: Any, model_file: Path, data: Path, tmp_path: Path
) -> None:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("there is no Chromium")
    report = tmp_path / "r.html"
    small = tmp_path / "s.onnx"
    sfp_onnx.prune(model_file, sfp_onnx.PlanOptions(ratio=0.5)).save(small)
    words: dict[str, tuple[object, ...]] = {
        "prune": ("prune", model_file, "-o", tmp_path / "p.onnx", "--data", data, "--ratio", "0.5"),
        "sweep": ("sweep", model_file, "--data", data, "--targets", "macs=90%:50%:20%"),
        "evaluate": ("evaluate", model_file, small, "--data", data),
    }
    page_of(*words[kind], report=report)
    said: list[str] = []
    asked: list[str] = []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(report.as_uri())
        boxes = page.eval_on_selector_all("svg", "all => all.map(own => own.getBoundingClientRect().height)")
        overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        browser.close()
    assert said == [] and [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
    assert len(boxes) >= 3 and min(boxes) > 20 and overflow == 0
    assert (max(map(int, re.findall(r"\d+", background)[:3])) < 60) == (scheme == "dark")
