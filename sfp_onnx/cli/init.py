"""init: a commented configuration for a model."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ..core.errors import OutputError
from ..core.options import RUN
from ..coupling.analysis import Analysis
from ..graph import inputs
from ..graph.save import write_text
from ..pipeline import opened
from . import arguments as take, prune, sweep
from .common import Option, answer, say
from .config import FOUND, PRUNE_ALONE, names_of

WIDTH = 110
TABLES: dict[str, click.Command] = {"prune": prune.command, "sweep": sweep.command}
WRITTEN = {"model", "output", "targets", "sweeps"}  # with values of their own


@take.command(
    "init", take.model_argument,
    take.file_option("-o", "--output", default=Path(FOUND), show_default=True, section=RUN, help="Where the configuration goes."),
    take.option("--overwrite", is_flag=True, help="Replace a file that is there."),
    take.option("--force", is_flag=True, hidden=True))  # fmt: skip
def command(model: Path, output: Path, overwrite: bool, force: bool) -> None:
    """Write a commented configuration for a model; change nothing else.

    Example: sfp-onnx init model.onnx
    """
    analysis = opened.Sources().open(model, [output]).analysis
    if output.exists() and not (overwrite or force):  # the older name means something else everywhere else
        raise OutputError(f"{output}: there is such a file already. Choose another name with -o, or --overwrite.")
    write_text(output, configuration(model, analysis), analysis.model.paths)
    answer(f"wrote {output}")
    say(f"Next: edit {output}, then sfp-onnx prune{'' if output == Path(FOUND) else f' --config {take.quoted(output)}'}")


def configuration(model: Path, analysis: Analysis) -> str:
    """The text: what the model is, then every option with its help. Lines that may be commented in as they stand are commented
    assignments; options that need a file or a choice of one's own are described."""
    ports = ", ".join(f"{port.name} {list(port.shape or ())}" for port in inputs(analysis.model))
    lines = [
        "# Options of `sfp-onnx prune`, `sfp-onnx sweep` and the other commands, by their long names. Use: sfp-onnx prune",
        "# (a file called sfp.toml is found where the command is started; others: --config). Options on the command line win.",
        "# Paths are relative to where the command is started. Lines with '=' may be commented in as they stand.",
        f"# {model.name}: inputs {ports}; {len(analysis.coupling.groups)} groups of channels can shrink".replace("\n", " "),
        "", f"model = {_text(str(model))}", "",
    ]  # fmt: skip
    first, second = ({str(parameter.name) for parameter in table.params} for table in TABLES.values())
    shared = first & second
    lines += _options(TABLES["prune"], shared - PRUNE_ALONE)
    lines += ["", "", "[prune]", f"output = {_text(model.stem + '-pruned.onnx')}", 'target = ["macs=50%"]']
    lines += _options(TABLES["prune"], first - shared | PRUNE_ALONE)
    lines += ["", "", "[sweep]", 'targets = ["macs=90%:30%:20%"]', *_options(TABLES["sweep"], second - shared)]
    return "\n".join(lines) + "\n"


def _options(command: click.Command, wanted: set[str]) -> list[str]:
    lines: list[str] = []
    left = wanted - WRITTEN
    for key, (option, negated) in names_of(command).items():
        if negated or option.name not in left or not isinstance(option, Option):
            continue
        left.remove(option.name)
        text = " ".join((option.help or "").split())
        text += f" One of: {', '.join(map(str, option.type.choices))}." if isinstance(option.type, click.Choice) else ""
        value = _value(option)
        described = text if value is not None else f"{key}: {text} (takes {option.metavar or 'a value'})"
        lines += ["", *(f"# {line}" for line in click.formatting.wrap_text(described, WIDTH).splitlines())]
        lines += [f"# {key} = {value}"] if value is not None else []
    return lines


def _value(option: Option) -> str | None:
    """What a commented line shows: the default, or a value that works with any model; None if there is none."""
    value = option.to_info_dict().get("default")
    if option.is_flag:
        return None if value is None else str(bool(value)).lower()
    if isinstance(value, (int, float)):
        return str(value)
    text = value if isinstance(value, str) and value else option.example
    return _text(text) if text else None


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
