"""init: a commented configuration for a model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from .. import pipeline
from ..core.errors import OutputError
from ..core.options import DataOptions, InspectOptions, OptionFacts, OutputOptions, PlanOptions, RepairOptions
from ..coupling.analysis import Analysis
from ..graph import inputs
from ..graph.save import write_text
from . import arguments as take
from .common import Command, say
from .config import FOUND, PRUNE_ALONE, names_of

WIDTH = 110
TABLES = ("prune", "sweep")
WRITTEN = {"model", "output", "targets", "sweeps"}  # with values of their own
FACTS: dict[str, OptionFacts] = {
    field.name: field.metadata["option"]
    for record in (PlanOptions, DataOptions, InspectOptions, RepairOptions, OutputOptions)
    for field in dataclasses.fields(record) if "option" in field.metadata
}  # fmt: skip


@click.command("init", cls=Command)
@take.takes(
    take.model_argument,
    click.option("-o", "--output", type=take.FILE, default=Path(FOUND), show_default=True, help="Where the configuration goes."),
    click.option("--force", is_flag=True, help="Replace a file that is there."),
)  # fmt: skip
def command(model: Path, output: Path, force: bool) -> None:
    """Write a commented configuration for a model; change nothing else.

    Example: sfp-onnx init model.onnx
    """
    analysis = pipeline.Sources().open(model, [output]).analysis
    if output.exists() and not force:
        raise OutputError(f"{output}: there is such a file already. Choose another name with -o, or --force.")
    group = click.get_current_context().find_root().command
    assert isinstance(group, click.Group)
    commands = {name: loaded for name in TABLES if (loaded := group.get_command(click.get_current_context(), name)) is not None}
    write_text(output, configuration(model, analysis, commands), analysis.model.paths)
    click.echo(f"wrote {output}")
    say(f"Next: edit {output}, then sfp-onnx prune --config {output}")


def configuration(model: Path, analysis: Analysis, commands: dict[str, click.Command]) -> str:
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
    shared = {parameter.name for parameter in commands["prune"].params} & {parameter.name for parameter in commands["sweep"].params}
    lines += _options(commands["prune"], lambda name: name in shared and name not in PRUNE_ALONE)
    for name, command in commands.items():
        lines += ["", "", f"[{name}]"]
        if name == "prune":
            lines += [f"output = {_text(model.stem + '-pruned.onnx')}", 'target = ["macs=50%"]']
        else:
            lines += ['targets = ["macs=90%:30%:20%"]']
        lines += _options(command, lambda option, name=name: option not in shared or (name == "prune" and option in PRUNE_ALONE))
    return "\n".join(lines) + "\n"


def _options(command: click.Command, wanted: Any) -> list[str]:
    lines: list[str] = []
    written: set[str | None] = set()
    for key, (parameter, negated) in names_of(command).items():
        if not isinstance(parameter, click.Option) or negated or parameter.name in WRITTEN | written or not wanted(parameter.name):
            continue
        written.add(parameter.name)
        text = " ".join((parameter.help or "").split())
        choices = parameter.type.choices if isinstance(parameter.type, click.Choice) else ()
        text += f" One of: {', '.join(map(str, choices))}." if choices else ""
        value = _value(parameter)
        described = text if value is not None else f"{key}: {text} (takes {parameter.metavar or 'a value'})"
        lines += ["", *(f"# {line}" for line in click.formatting.wrap_text(described, WIDTH).splitlines())]
        lines += [f"# {key} = {value}"] if value is not None else []
    return lines


def _value(option: click.Option) -> str | None:
    """What a commented line shows: the default, or a value that works with any model; None if there is none."""
    value = option.to_info_dict().get("default")
    facts = FACTS.get(str(option.name))
    if option.is_flag:
        return None if value is None else str(bool(value)).lower()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value:
        return _text(value)
    return _text(facts.example) if facts is not None and facts.example else None


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
