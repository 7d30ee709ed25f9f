"""init: a commented configuration for a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..core.errors import OutputError
from ..coupling.analysis import Analysis, inspect
from ..graph.model import inputs
from ..graph.save import write_text
from .arguments import check_outputs, model_argument
from .common import EPILOG, FILE, guarded, say
from .config import COMMANDS, PRUNE_ALONE, names_of

WIDTH = 110
OWN = {"model", "output", "data", "targets", "sweeps"}  # written with values of their own


@click.command("init", epilog=EPILOG)
@model_argument
@click.option("-o", "--output", type=FILE, default=Path("sfp.toml"), show_default=True, help="Where the configuration goes.")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@guarded
def init_command(model: Path, output: Path, force: bool) -> None:
    """Write a commented configuration for a model; change nothing else.

    Example: sfp-onnx init model.onnx
    """
    analysis = inspect(model)
    check_outputs(analysis.model.paths, output)
    if output.exists() and not force:
        raise OutputError(f"{output}: there is such a file already. Choose another name with -o, or --force.")
    group = click.get_current_context().find_root().command
    assert isinstance(group, click.Group)
    write_text(output, configuration(model, analysis, {name: group.commands[name] for name in COMMANDS}), analysis.model.paths)
    click.echo(f"wrote {output}")
    say(f"Next: edit {output}, then sfp-onnx prune --config {output}")


def configuration(model: Path, analysis: Analysis, commands: dict[str, click.Command]) -> str:
    """The text: what the model is, then every option with its help, commented out at its default."""
    ports = ", ".join(f"{port.name} {list(port.shape or ())}" for port in inputs(analysis.model))
    lines = [
        "# Options of `sfp-onnx prune` and `sfp-onnx sweep`, by their long names. Use: sfp-onnx prune --config sfp.toml",
        "# Options on the command line win. Paths are relative to where the command is started.",
        f"# {model.name}: inputs {ports}; {len(analysis.coupling.groups)} groups of channels can shrink".replace("\n", " "),
        "", f"model = {_text(str(model))}", "",
        "# Calibration data: a folder of images, .npz, .npy, or module:function. Without data nothing is repaired.",
        '# data = "calibration"',
    ]  # fmt: skip
    shared = {own.name for own in commands["prune"].params} & {own.name for own in commands["sweep"].params}
    lines += _options(commands["prune"], lambda name: name in shared and name not in PRUNE_ALONE)
    for name, command in commands.items():
        lines += ["", "", f"[{name}]"]
        if name == "prune":
            lines += [f"output = {_text(model.stem + '-pruned.onnx')}", 'target = ["macs=50%"]']
        else:
            lines += ['targets = ["macs=90%:30%:20%"]']
        lines += _options(command, lambda own, name=name: own not in shared or (name == "prune" and own in PRUNE_ALONE))
    return "\n".join(lines) + "\n"


def _options(command: click.Command, wanted: Any) -> list[str]:
    lines: list[str] = []
    seen: set[str | None] = set()
    for key, (own, negated) in names_of(command).items():
        if not isinstance(own, click.Option) or negated or own.name in OWN | seen or not wanted(own.name):
            continue
        seen.add(own.name)
        text = click.formatting.wrap_text(" ".join((own.help or "").split()), WIDTH)
        kind = own.type.choices if isinstance(own.type, click.Choice) else ()
        lines += ["", *(f"# {line}" for line in text.splitlines())]
        lines += [f"# One of: {', '.join(map(str, kind))}"] if kind else []
        lines.append(f"# {key} = {_default(own)}")
    return lines


def _default(option: click.Option) -> str:
    """What a commented line shows: the default, or a value of the right kind."""
    value = option.to_info_dict().get("default")
    if option.is_flag:
        return "true" if value is True else "false"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value:
        return _text(value)
    choices = option.type.choices if isinstance(option.type, click.Choice) else ()
    if isinstance(option.type, (click.types.IntRange, click.types.FloatRange)):
        return "1"
    return _text(str(choices[0]) if choices else (option.metavar or ""))


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
