"""Options from a TOML file (``--config``, or sfp.toml where the command is started): flags win, keys are the options' names, a table of a
command's name holds what only that one takes."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..core.errors import OptionError
from ..core.system import need

FOUND = "sfp.toml"
# At the top of the file these are for prune (and what is in the second set for plan): elsewhere they mean something else.
PRUNE_ALONE, PLAN_TOO = {"output", "ratio", "targets", "max_drop"}, {"ratio", "targets", "max_drop"}
OTHER_DATA = {("evaluate", "data")}  # calibration data at the top of the file are no test data
EXCLUSIVE = (("ratio", ("targets", "max_drop")), ("targets", ("ratio",)), ("max_drop", ("ratio",)))


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as plain data.

    Raises:
        OptionError: unreadable, not TOML, or Python 3.10 without the extra ``toml``.
    """
    if sys.version_info >= (3, 11):
        import tomllib as toml
    else:
        toml = need("tomli", "toml", f"--config {path}: reading TOML with Python 3.10")
    try:
        return dict(toml.loads(path.read_text(encoding="utf-8-sig")))
    except (OSError, ValueError, RecursionError) as error:
        raise OptionError(f"{path}: cannot read the configuration: {getattr(error, 'strerror', None) or error}") from error


def names_of(command: click.Command) -> dict[str, tuple[click.Parameter, bool]]:
    """Keys that a command takes: its parameter, and whether the key negates it (``no-verify``)."""
    names: dict[str, tuple[click.Parameter, bool]] = {}
    for parameter in command.params:
        if parameter.name in (None, "config", "locked", "help_all", "verbose", "quiet"):
            continue
        argument = isinstance(parameter, click.Argument)
        keys = [str(parameter.name)] if argument else [text[2:] for text in parameter.opts if text.startswith("--")]
        names.update(dict.fromkeys(keys, (parameter, False)))
        names.update({text[2:]: (parameter, True) for text in parameter.secondary_opts if text.startswith("--")})
    return names


def chosen(data: Mapping[str, Any], name: str, commands: Mapping[str, click.Command], path: Path) -> dict[str, Any]:
    """Values of one command's parameters by name; a table of the command wins over the top of the file.

    Raises:
        OptionError: an unknown key, or a value of a wrong kind.
    """
    known = {command: names_of(commands[command]) for command in commands}
    every = {key: value for names in known.values() for key, value in names.items()}
    tables = {key: value for key, value in data.items() if key in commands and (isinstance(value, Mapping) or key not in every)}
    for command, table in tables.items():
        if not isinstance(table, Mapping):
            raise OptionError(f"{path}: [{command}] must be a table of options")
        for key in table:
            _expect(key, known[command], f"{path}: [{command}]")
    top = {key: value for key, value in data.items() if key not in tables}
    for key in top:
        _expect(key, every, str(path))
    values: dict[str, Any] = {}
    for table in (top, tables.get(name, {})):
        for key, value in table.items():
            parameter, negated = known[name].get(key, (None, False))
            if parameter is not None and (table is not top or _meant(str(parameter.name), name)):
                values[str(parameter.name)] = _value(parameter, value, negated, f"{path}: {key}")
    return values


def _meant(parameter: str, command: str) -> bool:
    """Whether a key at the top of the file is for a command."""
    alone = parameter in PRUNE_ALONE and not (command == "plan" and parameter in PLAN_TOO)
    return (command, parameter) not in OTHER_DATA and (command == "prune" or not alone)


def _expect(key: str, known: Mapping[str, Any], where: str) -> None:
    if key not in known:
        close = difflib.get_close_matches(key.replace("_", "-"), known, 1)
        hint = f"Did you mean '{close[0]}'?" if close else "Keys are the long names of the options, without --."
        raise OptionError(f"{where}: there is no option '{key}'. {hint}")


def _value(parameter: click.Parameter, value: Any, negated: bool, where: str) -> Any:
    flag = isinstance(parameter, click.Option) and parameter.is_flag
    items = value if isinstance(value, list) else [value]
    if flag != isinstance(value, bool) or not all(isinstance(item, (str, int, float)) for item in items):
        raise OptionError(f"{where} = {value!r}: expected {'true or false' if flag else 'text, a number, or a list of these'}")
    if flag:
        return value != negated
    if parameter.multiple or parameter.nargs == -1:
        return [str(item) for item in items]
    return ",".join(map(str, items)) if isinstance(value, list) else value


def take(context: click.Context, parameter: click.Parameter, value: Path | None) -> None:
    """Make what a file says the defaults of the running command."""
    if context.resilient_parsing or context.parent is None or (value is None and not Path(FOUND).is_file()):
        return
    group = context.parent.command
    assert isinstance(group, click.Group) and context.info_name is not None
    path = Path(FOUND) if value is None else value
    commands = {name: command for name in group.list_commands(context) if (command := group.get_command(context, name)) is not None}
    try:
        values = chosen(read_toml(path), str(context.command.name), commands, path)
    except OptionError as error:
        raise click.UsageError(str(error), context) from error
    if value is None and context.meta.get("sfp_onnx.loudness", 0) >= 0:
        click.echo(f"options from {path}: {', '.join(sorted(values)) or 'none'}", err=True)
    context.meta[FOUND] = (path,)
    context.default_map = {**(context.default_map or {}), **values}


def settle(options: dict[str, Any]) -> None:
    """How much leaves is said once: what the command line says of it drops what a configuration says otherwise."""
    context = click.get_current_context()
    source = context.get_parameter_source
    for name, others in EXCLUSIVE:
        if source(name) is ParameterSource.COMMANDLINE:
            for other in others:
                if source(other) is ParameterSource.DEFAULT_MAP:
                    options[other] = context.params[other] = () if other == "targets" else None
