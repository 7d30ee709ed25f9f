"""Options from a TOML file (``--config``): flags win, keys are the options' names, tables [prune] and [sweep] hold what only one takes."""

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

COMMANDS = ("prune", "sweep")
PRUNE_ALONE = {"output", "ratio", "targets", "max_drop"}  # at the top of the file: for prune, to sweep they mean something else
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
        found: dict[str, Any] = toml.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OptionError(f"{path}: cannot read the configuration: {getattr(error, 'strerror', None) or error}") from error
    return found


def names_of(command: click.Command) -> dict[str, tuple[click.Parameter, bool]]:
    """Keys that a command takes: its parameter, and whether the key negates it (``no-verify``)."""
    found: dict[str, tuple[click.Parameter, bool]] = {}
    for own in command.params:
        if own.name is None or own.name in ("config", "locked"):
            continue
        keys = [own.name] if isinstance(own, click.Argument) else [text[2:] for text in own.opts if text.startswith("--")]
        found.update(dict.fromkeys(keys, (own, False)))
        found.update({text[2:]: (own, True) for text in own.secondary_opts if text.startswith("--")})
    return found


def chosen(data: Mapping[str, Any], name: str, commands: Mapping[str, click.Command], path: Path) -> dict[str, Any]:
    """Values of one command's parameters by name; a table of the command wins over the top of the file.

    Raises:
        OptionError: an unknown key, or a value of a wrong kind.
    """
    known = {own: names_of(commands[own]) for own in COMMANDS}
    found: dict[str, Any] = {}
    tables = {own: data.get(own, {}) for own in COMMANDS}
    for own, table in tables.items():
        if not isinstance(table, Mapping):
            raise OptionError(f"{path}: [{own}] must be a table of options")
        for key in table:
            _expect(key, known[own], f"{path}: [{own}]")
    for table in ({key: value for key, value in data.items() if key not in COMMANDS}, tables[name]):
        for key, value in table.items():
            _expect(key, known["prune"] | known["sweep"], str(path))
            if key not in known[name]:
                continue
            parameter, negated = known[name][key]
            if table is tables[name] or name == "prune" or parameter.name not in PRUNE_ALONE:
                found[str(parameter.name)] = _value(parameter, value, negated, f"{path}: {key}")
    return found


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
    if parameter.multiple:
        return [str(item) for item in items]
    return ",".join(map(str, items)) if isinstance(value, list) else value


def _take(context: click.Context, parameter: click.Parameter, value: Path | None) -> None:
    if value is None or context.resilient_parsing or context.parent is None:
        return
    group = context.parent.command
    assert isinstance(group, click.Group) and context.info_name is not None
    try:
        own = chosen(read_toml(value), str(context.command.name), group.commands, value)
    except OptionError as error:
        raise click.UsageError(str(error), context) from error
    context.default_map = {**(context.default_map or {}), **own}


config_option = click.option(
    "--config", type=click.Path(path_type=Path), is_eager=True, expose_value=False, callback=_take,
    help="Options from a TOML file (`sfp-onnx init` writes one); those on the command line win.",
)  # fmt: skip


def settle(options: dict[str, Any]) -> None:
    """How much leaves is said once: what the command line says of it drops what a configuration says otherwise."""
    context = click.get_current_context()

    def source(name: str) -> ParameterSource | None:
        return context.get_parameter_source(name)

    for name, others in EXCLUSIVE:
        if source(name) is ParameterSource.COMMANDLINE:
            for other in others:
                if source(other) is ParameterSource.DEFAULT_MAP:
                    options[other] = context.params[other] = () if other == "targets" else None
