"""What samples/pipelines and .ci/action hold is whole: it parses, names only commands and options that exist, and does what it says."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import click
import pytest
from conftest import invoke

import sfp_onnx
from sfp_onnx.cli import main

ROOT = Path(__file__).resolve().parents[1]
PIPELINES, ACTION = ROOT / "samples" / "pipelines", ROOT / ".ci" / "action" / "action.yml"
RAW = {"scale": 16, "mean": 0.3, "std": 0.35, "layout": "nhwc"}  # samples/README.md


def read(path: Path) -> str:
    """A file; sdists hold no hidden ones."""
    if not path.exists():
        pytest.skip(f"{path.relative_to(ROOT)} is not here: this is no checkout")
    return path.read_text(encoding="utf-8")


def options_of(name: str) -> set[str]:
    command = main.get_command(click.Context(main), name)
    assert command is not None, f"there is no command {name}"
    shown = command.get_params(click.Context(command))
    return {flag for item in shown for flag in (*item.opts, *item.secondary_opts)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the sample under the names that the files use, and sfp.toml."""
    for name, sample in (("model.onnx", "digits.onnx"), ("calibration.npz", "digits_calibration.npz"), ("test.npz", "digits_heldout.npz")):
        shutil.copy(ROOT / "samples" / sample, tmp_path / name)
    settings = {"data": "calibration.npz", **RAW}
    (tmp_path / "sfp.toml").write_text("".join(f"{name} = {json.dumps(str(value))}\n" for name, value in settings.items()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFP_ONNX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    if shutil.which("sfp-onnx") is None:
        pytest.skip("sfp-onnx is not on the PATH: the package is not installed")
    return tmp_path


def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, env={**os.environ, **more}, capture_output=True, text=True)


# ---- what they name exists -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [ACTION, *sorted(PIPELINES.iterdir())], ids=lambda path: path.name)
def test_every_command_and_option_exists(path: Path) -> None:
    known = {name: options_of(name) for name in main.list_commands()}
    for line in read(path).splitlines():
        call = re.search(r"(?<![/\w.-])sfp-onnx ([a-z]+)(.*)", line)
        if re.search(r"\b(docker|pip)\b", line) and not (call and call[1] in known):
            continue
        found = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", call[2] if call else line)) - {"--help"}
        own = known[call[1]] if call and call[1] in known else known["prune"] if path == ACTION else set().union(*known.values())
        assert found <= own, line


@pytest.mark.parametrize("path", [ACTION, PIPELINES / "pre-commit-config.yaml"], ids=lambda path: path.name)
def test_yaml_parses(path: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    assert isinstance(yaml.safe_load(read(path)), dict)


def test_the_image_copies_what_is_there() -> None:
    text, project = read(PIPELINES / "Dockerfile"), read(ROOT / "pyproject.toml")
    copied = [name for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for name in line.split()[:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
    extras = re.findall(r"/src\[(.*?)\]", text)[0].split(",")
    assert all(re.search(rf"^{name} = \[", project, re.MULTILINE) for name in extras)
    assert all(re.match(r"(#|FROM|COPY|RUN|ENV|WORKDIR|ENTRYPOINT|CMD) ?", line) for line in text.splitlines())


# ---- the Action ------------------------------------------------------------------------------------------------------


def action(folder: Path, **inputs: str) -> tuple[subprocess.CompletedProcess[str], dict[str, str], str]:
    """Run the step as a runner does, with the defaults of the inputs; the outputs and the summary of the job."""
    text = read(ACTION)
    step = text[text.index("id: prune") :]
    declared = dict(re.findall(r'^  ([\w-]+): \{ description: "[^"]*", (?:required: true|default: "([^"]*)") \}$', text, re.MULTILINE))
    used = dict(re.findall(r"^        (\w+): \$\{\{ inputs\.([\w-]+) \}\}$", step, re.MULTILINE))
    assert sorted(used.values()) == sorted(declared) and inputs.keys() <= declared.keys()
    (folder / "step.sh").write_text(textwrap.dedent(step.split("run: |\n")[1]))
    files = {name: folder / name for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    for file in files.values():
        file.write_text("")
    environment = {name: {**declared, **inputs}[key] for name, key in used.items()}
    environment |= {"RUNNER_TEMP": str(folder), **{name: str(file) for name, file in files.items()}}
    done = run(*"bash --noprofile --norc -eo pipefail step.sh".split(), **environment)
    outputs = dict(line.split("=", 1) for line in files["GITHUB_OUTPUT"].read_text().splitlines())
    assert not outputs or set(outputs) == set(re.findall(r"steps\.prune\.outputs\.([\w-]+)", text))
    return done, outputs, files["GITHUB_STEP_SUMMARY"].read_text()


def test_the_action_prunes_and_tells(folder: Path) -> None:
    (folder / "sfp.toml").unlink()
    words = " ".join(f"--{name} {value}" for name, value in RAW.items())
    given = {"model": "model.onnx", "output": "smaller.onnx", "data": "calibration.npz", "test-data": "test.npz", "options": words}
    done, outputs, summary = action(folder, targets="macs=60% params=70%", **given)
    assert done.returncode == 0, done.stderr
    assert "::notice title=sfp-onnx done::" in done.stderr
    known = json.loads((folder / "smaller.onnx.json").read_text())
    assert known["plan"]["options"]["targets"] == ["macs=60%", "params=70%"]
    assert float(outputs["macs"]) == known["after"]["macs"] <= 0.6 * known["before"]["macs"]
    assert int(outputs["bytes"]) == (folder / "smaller.onnx").stat().st_size
    assert outputs["metric"] == "top-1" and float(outputs["value"]) > 0.9 and float(outputs["latency-ratio"]) > 0
    assert summary.startswith("# smaller.onnx\n") and outputs["verdict"] in summary


def test_the_action_fails_with_an_annotation(folder: Path) -> None:
    (folder / "sfp.toml").unlink()
    done, outputs, summary = action(folder, model="model.onnx", output="smaller.onnx", targets="macs=0.01%")
    assert done.returncode == 3 and "::error title=sfp-onnx target::" in done.stderr
    assert not outputs and not summary and not (folder / "smaller.onnx").exists()


# ---- hooks, agents, Olive --------------------------------------------------------------------------------------------


def test_the_hooks(folder: Path) -> None:
    entries = re.findall(r"^        entry: (.*)$", read(PIPELINES / "pre-commit-config.yaml"), re.MULTILINE)
    readable, gate = map(shlex.split, entries)
    shutil.copy("model.onnx", "smaller.onnx")
    (folder / "figures.json").write_text(invoke("evaluate", "smaller.onnx", "--data", "test.npz", "--no-latency", "--json").stdout)
    assert run(*readable, "model.onnx", "smaller.onnx").returncode == 0
    done = run(*gate)
    assert done.returncode == 0 and "passed: top-1" in done.stderr, done.stderr
    figures = json.loads((folder / "figures.json").read_text())
    figures[0]["size"]["macs"] -= 1
    (folder / "figures.json").write_text(json.dumps(figures))
    assert run(*gate).returncode == 3
    (folder / "broken.onnx").write_bytes(b"no model")
    assert run(*readable, "broken.onnx", "model.onnx").returncode == 4


def test_the_skill(folder: Path) -> None:
    text = read(PIPELINES / "SKILL.md")
    assert re.match(r"---\nname: [a-z-]+\ndescription: .{40,1024}\n---\n", text)
    answers = {}
    for line in re.findall(r"^ *sfp-onnx (.*)$", text, re.MULTILINE):
        words = shlex.split(line)
        result = invoke(*words)
        assert result.exit_code == 0, (line, result.stderr)
        answers[words[0]] = json.loads(result.stdout)
    assert set(answers) == {"inspect", "evaluate", "prune", "sweep"}
    assert {"prunable_share", "pinned"} <= answers["inspect"].keys() and answers["evaluate"][0]["top1"] > 0.9
    fields = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    for name in re.findall(r"`([\w.]+)`", " ".join(fields)):
        value: Any = answers["prune"]
        for part in name.split("."):
            value = value[part]
    row = re.search(r"^\| `evaluation` .*$", text, re.MULTILINE)
    assert row and set(re.findall(r"`(\w+)`", row[0])) - {"evaluation"} <= answers["prune"]["evaluation"][-1].keys()


def test_the_pass_of_olive(folder: Path) -> None:
    pytest.importorskip("olive", reason="olive-ai is not installed")
    source = PIPELINES / "olive_pass.py"
    code = f"""
import json, runpy
from olive.model import ONNXModelHandler
from olive.passes.olive_pass import create_pass_from_dict
own = runpy.run_path({str(source)!r})["ChannelPruning"]
options = {{"targets": ["macs=60%"], "data": "calibration.npz",
           "data_options": {{"scale": 16, "mean": [0.3], "std": [0.35], "layout": "nhwc"}}}}
made = create_pass_from_dict(own, options, disable_search=True).run(ONNXModelHandler(model_path="model.onnx"), "out/smaller.onnx")
print(json.dumps([made.model_path, made.model_attributes["sfp_onnx"]]))
"""
    done = run(sys.executable, "-c", code)  # in a process of its own: what olive-ai imports warns
    assert done.returncode == 0, done.stderr
    path, told = json.loads(done.stdout.splitlines()[-1])
    assert told["after"]["macs"] <= 0.6 * told["before"]["macs"] and Path(path).name == "smaller.onnx"
    assert sfp_onnx.load(folder / path).source is not None


def test_the_pass_of_olive_names_what_exists() -> None:
    """What can be checked without olive-ai: it compiles, and calls the API with fields that there are."""
    text = read(PIPELINES / "olive_pass.py")
    compile(text, "olive_pass.py", "exec")
    for name in re.findall(r"sfp_onnx\.(\w+)\(", text):
        assert hasattr(sfp_onnx, name)
    assert importlib.util.find_spec("sfp_onnx") and {"targets", "max_drop"} <= sfp_onnx.PlanOptions.__dataclass_fields__.keys()
