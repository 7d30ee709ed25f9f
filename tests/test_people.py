"""The first five minutes, configuration as code, reproducing from a manifest, gates, and typical mistakes."""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import onnx
import pytest
from click.testing import Result
from conftest import CLASSES, IMAGE, classifier, classifier_nodes, files_in, images, invoke, model_of, run_model, weights_of
from onnx import helper

from sfp_onnx.cli import config, doctor, main
from sfp_onnx.cli.config import chosen, names_of, read_toml
from sfp_onnx.cli.init import TABLES
from sfp_onnx.core.errors import OptionError
from sfp_onnx.core.options import MeasureOptions
from sfp_onnx.coupling.analysis import data_for
from sfp_onnx.data.checks import Scorer, _remedies
from sfp_onnx.graph.load import load
from sfp_onnx.pipeline import pruned
from sfp_onnx.report import manifest as records
from sfp_onnx.report.manifest import clocked
from sfp_onnx.rules.registry import training_nodes


def good(*arguments: object) -> Result:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


def toml(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# ---- first five minutes ----------------------------------------------------------------------------------------------


def test_alone_it_says_what_to_do_first() -> None:
    text = good().stdout
    assert text.index("doctor") < text.index("inspect") < text.index("prune") < text.index("evaluate")


def test_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFP_ONNX_CACHE", str(tmp_path / "cache"))
    found = {own["name"]: own for own in json.loads(good("doctor", "--json").stdout)}
    assert "pruned, verified" in found["prune"]["text"] and "CPUExecutionProvider" in found["providers"]["text"]
    assert "ok      packages: sfp_onnx" in good("doctor").stdout


def test_doctor_finds_what_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SFP_ONNX_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(doctor, "prune", lambda *arguments: 1 / 0)
    result = invoke("doctor")
    assert result.exit_code == 3 and "cache folder, prune" in result.stderr
    assert "SFP_ONNX_CACHE" in result.stdout and "ZeroDivisionError" in result.stdout


# ---- typical mistakes ------------------------------------------------------------------------------------------------


@pytest.fixture
def centred(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """A classifier whose answers are spread over its classes, images, and its own answers as labels."""
    model = classifier()
    x = images(400, 5)
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "b3")
    values = onnx.numpy_helper.to_array(bias) - run_model(model, {"x": x})[0].mean(0)
    bias.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), "b3"))
    path = tmp_path / "centred.onnx"
    onnx.save(model, path)
    return path, x, run_model(model, {"x": x})[0].argmax(1)


def warnings_of(path: Path, x: np.ndarray, labels: np.ndarray, *arguments: object) -> str:
    np.savez(path.with_name("own.npz"), x=x, labels=labels)
    result = invoke("evaluate", path, "--data", path.with_name("own.npz"), "--no-latency", *arguments)
    return "".join(line for line in result.stderr.splitlines() if line.startswith("Warning"))


def test_good_data_raise_no_warning(centred: tuple[Path, np.ndarray, np.ndarray]) -> None:
    assert warnings_of(*centred) == ""


def test_labels_off_by_one(centred: tuple[Path, np.ndarray, np.ndarray]) -> None:
    path, x, labels = centred
    seen = labels < CLASSES - 1
    assert "off by one: with 1 less it is right on 100.0%" in warnings_of(path, x[seen], labels[seen] + 1)
    assert "off by one: with 1 more it is right on 100.0%" in warnings_of(path, x[labels > 0], labels[labels > 0] - 1)


def test_chance_level_without_a_remedy(centred: tuple[Path, np.ndarray, np.ndarray]) -> None:
    path, x, labels = centred
    said = warnings_of(path, x, np.random.default_rng(0).permutation(labels))
    assert "no better than chance" in said and "check normalisation" in said


def test_wrong_range(centred: tuple[Path, np.ndarray, np.ndarray]) -> None:
    """Bright 8-bit images that nobody divided by 255: the biases no longer matter."""
    model, x, labels = centred
    loaded = load(model)
    data = data_for(loaded, {"x": (x * 255).astype(np.float32), "labels": labels})
    assert data is not None
    scorer = Scorer.of(loaded, data, MeasureOptions())
    assert scorer is not None
    remedies = list(_remedies(scorer, data, np.zeros((len(x), CLASSES), np.float32), labels))
    assert any(other.words.startswith("with values divided by 255") and other.right.all() for other in remedies)


def test_colours_in_the_wrong_order(centred: tuple[Path, np.ndarray, np.ndarray]) -> None:
    """The accuracy is far above chance, but clearly higher with the channels reversed."""
    path, x, labels = centred
    assert 0.2 < (run_model(onnx.load(path), {"x": np.ascontiguousarray(x[:, ::-1])})[0].argmax(1) == labels).mean() < 0.9
    said = warnings_of(path, np.ascontiguousarray(x[:, ::-1]), labels)
    assert "with the colour channels reversed (--color bgr for images) it is right on 100.0%" in said and "chance" not in said


def test_noise_is_no_other_reading(centred: tuple[Path, np.ndarray, np.ndarray]) -> None:
    """A fifth of the labels wrong: no reading is clearly better."""
    path, x, labels = centred
    wrong = np.random.default_rng(0).random(len(labels)) < 0.2
    assert warnings_of(path, x, np.where(wrong, (labels + 1) % CLASSES, labels)) == ""


def test_few_samples_prove_nothing(centred: tuple[Path, np.ndarray, np.ndarray]) -> None:
    path, x, labels = centred
    assert "off by one" not in warnings_of(path, x[:20], (labels[:20] + 1) % CLASSES)


@pytest.mark.parametrize("kind", ["dropout", "norm", "none"])
def test_exports_for_training(kind: str, save: Callable[..., Path]) -> None:
    nodes, held = classifier_nodes(), weights_of()
    if kind == "dropout":
        held |= {"rate": np.array(0.5, np.float32), "on": np.array(True)}
        nodes.insert(3, helper.make_node("Dropout", ["r1", "rate", "on"], ["d1"], "drop"))
        nodes[4].input[0] = "d1"
    if kind == "norm":
        nodes[1].attribute.append(helper.make_attribute("training_mode", 1))
        nodes[1].output.extend(["running_mean", "running_var"])
    model = model_of(nodes, [("x", np.float32, ["N", *IMAGE])], [("logits", np.float32, ["N", CLASSES])], held)
    path = save(model)
    assert training_nodes(load(path)) == {"dropout": ["drop"], "norm": ["bn1"], "none": []}[kind]
    said = invoke("inspect", path).stderr
    assert ("exported in training mode" in said) == (kind != "none")


# ---- configuration ---------------------------------------------------------------------------------------------------


def test_options_from_a_file(model_file: Path, data_file: Path, tmp_path: Path) -> None:
    text = f'model = "{model_file}"\ndata = "{data_file}"\nscore = "magnitude"\nmean = [0.1, 0.2, 0.3]\nalign = 2\n'
    text += f'repair = "none"\nverify = true\nno-latency = false\n[prune]\noutput = "{tmp_path}/a.onnx"\nratio = 0.5\n'
    own = toml(tmp_path / "sfp.toml", text.replace("no-latency = false\n", ""))
    good("prune", "--config", own)
    good("prune", model_file, "--data", data_file, "--score", "magnitude", "--mean", "0.1,0.2,0.3", "--align", 2, "--repair", "none",
         "--ratio", 0.5, "-o", tmp_path / "b.onnx")  # fmt: skip
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_flags_win(model_file: Path, tmp_path: Path) -> None:
    own = toml(tmp_path / "sfp.toml", f'[prune]\noutput = "{tmp_path}/a.onnx"\nratio = 0.5\nscore = "random"\n')
    good("prune", model_file, "--config", own, "--target", "macs=60%", "--score", "magnitude", "-o", tmp_path / "b.onnx")
    good("prune", model_file, "--target", "macs=60%", "--score", "magnitude", "-o", tmp_path / "c.onnx")
    assert not (tmp_path / "a.onnx").exists()
    assert (tmp_path / "b.onnx").read_bytes() == (tmp_path / "c.onnx").read_bytes()


def test_what_a_file_says_of_data_waits_for_data(model_file: Path, tmp_path: Path) -> None:
    """One configuration serves commands with data and without; a flag that has nothing to read is still an error."""
    own = toml(tmp_path / "sfp.toml", "mean = [0.1, 0.2, 0.3]\nscale = 255\n")
    assert "prunable" in good("inspect", model_file, "--config", own).stdout
    good("prune", model_file, "--config", own, "--ratio", 0.5, "-o", tmp_path / "a.onnx")
    refused = invoke("inspect", model_file, "--config", own, "--scale", 2)
    assert refused.exit_code == 2 and refused.stderr.count("--scale") == 1 and "--mean" not in refused.stderr


def test_sweep_from_a_file(model_file: Path, data_file: Path, tmp_path: Path) -> None:
    """What is meant for prune at the top of the file does not disturb a sweep."""
    text = f'model = "{model_file}"\noutput = "{tmp_path}/a.onnx"\nratio = 0.5\n[sweep]\ntargets = "macs=80%:60%:20%"\njson = true\n'
    found = json.loads(good("sweep", "--config", toml(tmp_path / "sfp.toml", text)).stdout)
    assert [own["target"] for own in found["points"]] == ["original", "macs=80%", "macs=60%"] and not (tmp_path / "a.onnx").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ration = 0.5", "no option 'ration'. Did you mean 'ratio'?"),
        ("min_channels = 2", "Did you mean 'min-channels'?"),
        ("[sweep]\nratios = 1\noutput = 3", "no option 'ratios'"),
        ("[prune]\ntargets = 'macs=90%:20%:10%'", "[prune]: there is no option 'targets'"),
        ("ratio = true", "expected text, a number"),
        ("verify = 'yes'", "expected true or false"),
        ("ratio = [[1]]", "expected text, a number"),
        ("ratio = 'half'", "'half'"),
        ("ratio = ", "cannot read the configuration"),
        ("prune = 1", "must be a table"),
        ("[other]\nratio = 1", "no option 'other'"),
        ("when = 2024-01-01", "no option 'when'"),
        ("keep = 2024-01-01", "expected text"),
    ],
)
def test_files_that_make_no_sense(text: str, words: str, model_file: Path, tmp_path: Path) -> None:
    own = toml(tmp_path / "sfp.toml", text)
    before = files_in(tmp_path)
    result = invoke("prune", model_file, "-o", tmp_path / "out.onnx", "--config", own)
    assert result.exit_code == 2 and words in result.stderr.replace("\n", " "), result.stderr
    assert files_in(tmp_path) == before


def test_no_such_file(model_file: Path, tmp_path: Path) -> None:
    result = invoke("prune", model_file, "-o", tmp_path / "out.onnx", "--config", tmp_path / "none.toml")
    assert result.exit_code == 2 and "No such file" in result.stderr


def test_python_without_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.10 has no tomllib."""
    monkeypatch.setattr(config, "sys", SimpleNamespace(version_info=(3, 10)))
    monkeypatch.setitem(sys.modules, "tomli", None)
    with pytest.raises(OptionError, match=r"pip install tomli .*sfp_onnx\[toml\]"):
        read_toml(toml(tmp_path / "sfp.toml", ""))


def loaded() -> dict[str, click.Command]:
    """All commands."""
    context = click.Context(main)
    return {name: command for name in main.list_commands(context) if (command := main.get_command(context, name)) is not None}


def test_init_writes_every_option(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    good("init", model_file.name)
    text = Path("sfp.toml").read_text()
    good("prune", "--config", "sfp.toml")
    assert Path("model-pruned.onnx").exists()
    json.loads(good("sweep", "--config", "sfp.toml", "--json").stdout)
    for name in TABLES:
        for key, (own, negated) in names_of(loaded()[name]).items():
            primary = negated or own.opts.index(f"--{key}" if f"--{key}" in own.opts else key) > 0
            assert primary or f"\n{key} = " in text or f"\n# {key} = " in text or f"\n# {key}: " in text or key in ("output",), key


def commented(text: str) -> list[int]:
    """Lines that are commented assignments."""
    return [number for number, line in enumerate(text.splitlines()) if re.match(r"# [a-z][a-z-]* = ", line)]


def test_what_init_comments_out_may_be_commented_in(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line as it stands, and all of them together."""
    monkeypatch.chdir(tmp_path)
    good("init", model_file.name)
    lines = Path("sfp.toml").read_text().splitlines()
    numbers = commented("\n".join(lines))
    assert len(numbers) > 15
    every = [line.removeprefix("# ") if number in numbers else line for number, line in enumerate(lines)]
    for name in TABLES:
        assert len(chosen(read_toml(toml(tmp_path / "all.toml", "\n".join(every))), name, loaded(), tmp_path / "all.toml")) > 10
    sweep = lines.index("[sweep]")
    plain = Path("model-pruned.onnx")
    for number in numbers:
        text = "\n".join([*lines[:number], lines[number].removeprefix("# "), *lines[number + 1 :]])
        Path("sfp.toml").write_text(text)
        plain.unlink(missing_ok=True)
        result = good("sweep", "--json") if number > sweep else good("prune")
        assert result.exit_code == 0 and (number > sweep or plain.exists()), lines[number]


def test_init_replaces_nothing(model_file: Path, tmp_path: Path) -> None:
    own = toml(tmp_path / "sfp.toml", "# mine")
    assert invoke("init", model_file, "-o", own).exit_code == 4
    assert own.read_text() == "# mine"
    good("init", model_file, "-o", own, "--overwrite")
    assert own.read_text() != "# mine"
    own.write_text("# mine")
    good("init", model_file, "-o", own, "--force")
    assert own.read_text() != "# mine" and "--force" not in good("init", "--help").stdout


# ---- locked ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--external-data"], ["--repair", "lstsq", "--force"]])
def test_locked_gives_the_same_bytes(more: list[str], model_file: Path, data_file: Path, tmp_path: Path) -> None:
    shared = ["prune", model_file, "--data", data_file, "--ratio", 0.5, *(more if "--repair" in more else [*more, "--repair", "none"])]
    manifest = tmp_path / "m.json"
    good(*shared, "-o", tmp_path / "a.onnx", "--manifest", manifest)
    (tmp_path / "other folder").mkdir()
    result = good(*shared, "-o", tmp_path / "other folder" / "a.onnx", "--locked", manifest)
    assert "the same byte for byte" in result.stderr
    assert (tmp_path / "other folder" / "a.onnx").read_bytes() == (tmp_path / "a.onnx").read_bytes()


def test_locked_says_what_differs(model_file: Path, data_file: Path, tmp_path: Path, save: Callable[..., Path]) -> None:
    manifest, out = tmp_path / "m.json", tmp_path / "b.onnx"
    shared = ["--repair", "none", "--locked", manifest, "-o", out]
    good("prune", model_file, "--data", data_file, "--ratio", 0.5, "--repair", "none", "-o", tmp_path / "a.onnx", "--manifest", manifest)
    other_data, other_model = save({"x": images(9)}), save(classifier(seed=3))
    cases: list[tuple[list[Any], str]] = [
        ([model_file, "--data", data_file, "--ratio", 0.4], "option ratio: 0.5 then, 0.4 now"),
        ([model_file, "--data", other_data, "--ratio", 0.5], "SHA-256 of the data"),
        ([other_model, "--data", data_file, "--ratio", 0.5], "SHA-256 of the model"),
    ]
    for arguments, words in cases:
        result = invoke("prune", *arguments, *shared)
        assert result.exit_code == 3 and words in result.stderr and not out.exists(), result.stderr
    data = json.loads(manifest.read_text())
    data["versions"]["numpy"] = "0.1"
    data["output"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(data))
    result = invoke("prune", model_file, "--data", data_file, "--ratio", 0.5, *shared)
    assert result.exit_code == 3 and "the result is another one" in result.stderr and "numpy 0.1 then" in result.stderr
    assert not out.exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "sfp_onnx manifest"}'])
def test_locked_needs_a_manifest(text: str, model_file: Path, tmp_path: Path) -> None:
    own = toml(tmp_path / "m.json", text)
    result = invoke("prune", model_file, "-o", tmp_path / "out.onnx", "--ratio", 0.5, "--locked", own)
    assert result.exit_code == 2 and "cannot read the manifest" in result.stderr


def test_measured_plans_are_taken_from_the_manifest(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a clock in the test: a plan counts as measured, and cannot be made again."""
    assert clocked({"targets": ("macs=50%", "latency=60%")}) and not clocked({"targets": ("macs=50%",)})
    assert clocked({"score": "bandit:sar,budget=60s"}) and not clocked({"score": "bandit:sar"})
    manifest, shared = tmp_path / "m.json", ["prune", model_file, "--ratio", 0.5]
    good(*shared, "-o", tmp_path / "a.onnx", "--manifest", manifest)
    monkeypatch.setattr(records, "clocked", lambda options: True)
    monkeypatch.setattr(pruned, "planned_for", lambda *arguments: 1 / 0)
    result = good(*shared, "-o", tmp_path / "b.onnx", "--locked", manifest)
    assert "the plan is that of the manifest" in result.stderr
    assert (tmp_path / "b.onnx").read_bytes() == (tmp_path / "a.onnx").read_bytes()


# ---- gates -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def gate(centred: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path) -> dict[str, Path]:
    """A model, its pruned one, labelled data, and the manifest."""
    path, x, labels = centred
    found = {"model": path, "data": tmp_path / "test.npz", "pruned": tmp_path / "pruned.onnx", "manifest": tmp_path / "manifest.json"}
    np.savez(found["data"], x=x, labels=labels)
    good("prune", path, "-o", found["pruned"], "--ratio", 0.25, "--test-data", found["data"], "--manifest", found["manifest"])
    return found


def evaluate(gate: dict[str, Path], *arguments: object) -> Result:
    return invoke("evaluate", *arguments, "--data", gate["data"], "--no-latency")


def test_baseline_holds(gate: dict[str, Path]) -> None:
    result = evaluate(gate, gate["pruned"], "--baseline", gate["manifest"], "--max-drop", "1%")
    assert result.exit_code == 0 and result.stderr.count("passed: ") == 4, result.stderr


def test_regression_is_exit_3(gate: dict[str, Path], tmp_path: Path) -> None:
    worse = tmp_path / "worse.onnx"
    good("prune", gate["model"], "-o", worse, "--ratio", 0.8)
    report = tmp_path / "junit.xml"
    result = evaluate(gate, worse, "--baseline", gate["manifest"], "--max-drop", "1%", "--junit", report, "--github", "--json")
    assert result.exit_code == 3 and "FAILED: top-1" in result.stderr, result.stderr
    json.loads(result.stdout)
    assert "::error title=sfp-onnx top-1::" in result.stderr and "::notice title=sfp-onnx MACs::" in result.stderr
    suite = ElementTree.parse(report).getroot()[0]
    assert suite.get("tests") == "4" and suite.get("failures") == "1"
    assert [case.get("name") for case in suite if case.find("failure") is not None] == ["top-1"]
    assert evaluate(gate, worse, "--baseline", gate["manifest"], "--max-drop", "100%").exit_code == 0


def test_larger_is_a_regression(gate: dict[str, Path]) -> None:
    result = evaluate(gate, gate["model"], "--baseline", gate["manifest"])
    assert result.exit_code == 3 and "FAILED: MACs" in result.stderr and "passed: top-1" in result.stderr


def test_baseline_of_evaluate_itself(gate: dict[str, Path], tmp_path: Path) -> None:
    baseline = toml(tmp_path / "baseline.json", evaluate(gate, gate["model"], gate["pruned"], "--json").stdout)
    assert evaluate(gate, gate["model"], gate["pruned"], "--baseline", baseline).exit_code == 0


def test_against_the_first_model(gate: dict[str, Path]) -> None:
    models = (gate["model"], gate["pruned"])
    assert evaluate(gate, *models, "--max-drop", "100%", "--target", "macs=99%").exit_code == 0
    assert evaluate(gate, *models, "--target", "macs=1%").exit_code == 3
    assert evaluate(gate, gate["model"], "--max-drop", "1%").exit_code == 2


@pytest.mark.parametrize("text", ["", "{}", "[]", "[1]", '{"evaluation": null}', '[{"top1": "a", "agreement": 1, "size": {}}]'])
def test_damaged_baselines(text: str, gate: dict[str, Path], tmp_path: Path) -> None:
    result = evaluate(gate, gate["model"], "--baseline", toml(tmp_path / "own.json", text))
    assert result.exit_code == 2 and "own.json" in result.stderr


def test_other_data_are_said(gate: dict[str, Path], centred: tuple[Path, np.ndarray, np.ndarray]) -> None:
    _, x, labels = centred
    np.savez(gate["data"], x=x[:300], labels=labels[:300])
    assert "measured on other data" in evaluate(gate, gate["pruned"], "--baseline", gate["manifest"], "--max-drop", "100%").stderr


def test_prune_as_a_gate(gate: dict[str, Path], tmp_path: Path) -> None:
    report, out = tmp_path / "junit.xml", tmp_path / "out.onnx"
    result = invoke("prune", gate["model"], "-o", out, "--target", "params=10", "--junit", report, "--github")
    assert result.exit_code == 3 and "::error title=sfp-onnx target::" in result.stderr and not out.exists()
    assert ElementTree.parse(report).getroot()[0].get("failures") == "1"
    good("prune", gate["model"], "-o", out, "--ratio", 0.5, "--junit", report)
    assert ElementTree.parse(report).getroot()[0].get("failures") == "0"


def test_json_on_standard_output(gate: dict[str, Path], tmp_path: Path) -> None:
    out, plan = tmp_path / "out.onnx", tmp_path / "plan.json"
    found = json.loads(good("prune", gate["model"], "-o", out, "--ratio", 0.5, "--test-data", gate["data"], "--json").stdout)
    assert found["format"] == "sfp_onnx manifest" and found["evaluation"][1]["model"] == str(out)
    assert found["command"]["options"]["ratio"] == 0.5
    assert json.loads(good("plan", gate["model"], "-o", plan, "--ratio", 0.5, "--json").stdout) == json.loads(plan.read_text())
    assert json.loads(good("apply", gate["model"], plan, "-o", out, "--json").stdout)["output"]["path"] == str(out)
    assert json.loads(good("dilute", gate["model"], "-o", out, "--rate", 0.5, "--method", "l1", "--json").stdout)
