"""Command-line options made from the records that hold them, and records made from the options."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints
from xml.sax.saxutils import escape, quoteattr

import click
from click.core import ParameterSource

from ..core import options as records
from ..core.errors import OptionError, SfpError, TargetError
from ..core.options import AMOUNT, CHANNELS, DATA, OUTPUT, RUN, DataOptions, InspectOptions, MeasureOptions, OptionFacts, RepairOptions
from ..evaluation import Verdict
from ..graph.save import write_text
from ..runtime import using_threads
from ..scores.scoring import SCORE_NAMES, asked
from .common import FILE as FILE, Command, Option, say

R = TypeVar("R")
Decorator = Callable[[Any], Any]
SOURCES = "images in a folder (class sub-folders are labels), .npz, .npy, test_data_set_* folders, or module:function that yields batches."


# ---- from records to options -----------------------------------------------------------------------------------------


def command(name: str, *items: type | Decorator, skip: tuple[str, ...] = ()) -> Decorator:
    """A command that takes the options of records (all their fields that are options, but ``skip``), and single options."""

    def decorate(function: Callable[..., Any]) -> click.Command:
        for item in reversed(items):
            for decorator in reversed(_options(item, skip) if isinstance(item, type) else [item]):
                function = decorator(function)
        return click.command(name, cls=Command)(function)

    return decorate


def some(record: type, *names: str) -> Decorator:
    """Only these options of a record."""
    left = tuple(field.name for field in dataclasses.fields(record) if field.name not in names)

    def decorate(function: Any) -> Any:
        for decorator in reversed(_options(record, left)):
            function = decorator(function)
        return function

    return decorate


def build(record: type[R], values: Mapping[str, Any], **more: Any) -> R:
    """A record from a command's values."""
    names = {field.name for field in dataclasses.fields(record)}  # type: ignore[arg-type]
    return record(**{name: value for name, value in values.items() if name in names}, **more)


def _options(record: type, skip: tuple[str, ...]) -> list[Decorator]:
    kinds = get_type_hints(record)
    fields = dataclasses.fields(record)
    return [_of_field(field, kinds[field.name]) for field in fields if "option" in field.metadata and field.name not in skip]


def _of_field(field: dataclasses.Field[Any], kind: Any) -> Decorator:
    facts: OptionFacts = field.metadata["option"]
    flag = "/".join(f"--{name}".replace("----", "--") for name in (facts.flag or field.name.replace("_", "-")).split("/"))
    flags = (flag, f"--{facts.alias}") if facts.alias else (flag,)
    given: dict[str, Any] = {"help": facts.help, "metavar": facts.metavar, "default": field.default}
    if kind is bool:
        given |= {"is_flag": True}
    elif "/" in flag:
        given |= {"default": None}
    elif field.name == "input_shapes":
        given |= {"multiple": True, "default": (), "callback": _shapes}
    elif kind == tuple[str, ...]:
        given |= {"multiple": True}
    elif facts.parse is not None:
        given |= {"callback": _parsed(facts.parse), "default": facts.example or None, "show_default": facts.example not in ("", "default")}
    elif facts.path:
        given |= {"type": FILE if kind is Any else click.Path(readable=False)}
    else:
        given |= {"type": _type(facts, kind), "show_default": field.default not in (None, "default")}
    if facts.alone:
        given |= {"is_flag": False, "flag_value": facts.alone}
    return option(*flags, field.name, section=facts.section, advanced=facts.advanced, example=facts.example, **given)


def _type(facts: OptionFacts, kind: Any) -> Any:
    if facts.choices:
        return click.Choice(facts.choices)
    if facts.low is None:
        return str
    if kind in (int, int | None):
        return click.IntRange(int(facts.low))
    return click.FloatRange(facts.low, facts.high, facts.low_open, facts.high_open)


def _parsed(parse: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    def callback(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
        try:
            return parse(str(value)) if value is not None else None
        except OptionError as error:
            raise click.BadParameter(str(error)) from error

    return callback


def _shapes(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, list[int]]:
    shapes = {}
    for value in values:
        match = re.fullmatch(r"(.+)[=:]([0-9]+(?:[,x][0-9]+)*)", value)
        if match is None:
            raise click.BadParameter(f"'{value}': expected NAME=1,3,224,224")
        shapes[match[1]] = [int(item) for item in re.split("[,x]", match[2])]
    return shapes


# ---- options that belong to no record --------------------------------------------------------------------------------


option = partial(click.option, cls=Option)
argument = partial(click.argument, type=FILE)
file_option = partial(option, type=FILE, section=OUTPUT)
model_argument = argument("model")
output_option = file_option("-o", "--output", help="Where the model goes.", required=True)
data_option = file_option("--data", help=f"Calibration data: {SOURCES}", section=DATA)
test_option = file_option("--test-data", help="Held-out data: report accuracy and latency before and after.", section=DATA)
eval_option = file_option(
    "--max-drop-data", "--eval-data", "eval_data", section=AMOUNT,
    help="What --max-drop is judged on, with labels of its own  [default: a third of --data].",
)
report_option = file_option("--report", help="Write one HTML file with charts about the run (extra `report`).")
json_option = option("--json", "as_json", is_flag=True, help="Print JSON.", section=OUTPUT)
verify_option = option(
    "--verify/--no-verify", default=True, show_default=True, help="Compare with the masked original before writing.", section=RUN,
    advanced=True)  # fmt: skip


def threads_option(function: Callable[..., Any]) -> Decorator:
    """--threads, to which the whole command keeps."""

    @wraps(function)
    def kept(*args: Any, threads: int, **kwargs: Any) -> Any:
        with using_threads(threads):
            return function(*args, **kwargs)

    return cast(Decorator, some(records.PlanOptions, "threads")(kept))


def _score(text: str) -> str:
    asked(text)
    return text


score_option = option(
    "--score", callback=_parsed(_score), metavar="NAME[+NAME..][,OPTION=VALUE..]", section=CHANNELS,
    help=f"Importance of a channel: {', '.join(SCORE_NAMES)}; joined by '+': their ranks, averaged. Options of a score: "
    "docs/choosing-a-score.md.  [default: obs where a repair follows, contribution with data, else magnitude]")  # fmt: skip


def scoring(values: Mapping[str, Any]) -> dict[str, Any]:
    """Score, its options and the repair, as arguments of a stage."""
    name, options = asked(values["score"], values["seed"], values["memory"])
    chosen = {"score_name": name, "score_options": options}
    return {**chosen, "repair": build(RepairOptions, values)} if "fit" in values else chosen


def reading(values: Mapping[str, Any]) -> dict[str, Any]:
    """Which data there are, and how they and the model are read, as arguments of a stage."""
    read = {name: values[name] for name in ("data", "eval_data", "test_data") if name in values}
    if not any(value is not None for value in read.values()):
        values = {name: value for name, value in values.items() if name not in READING | MEANING or not _configured(name)}
    read["data_options"] = build(DataOptions, values)
    if "task" in values:
        read["measure_options"] = build(MeasureOptions, values)
    return {**read, "inspect_options": build(InspectOptions, values)} if "input_shapes" in values else read


def _configured(name: str) -> bool:
    """Whether only a configuration says it, which is for commands with data and without."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.DEFAULT_MAP


THIS_DATA = {"labels", "samples", "seed"}  # options that are about --data alone
READING = {*vars(DataOptions()), "data"}
TRACING = {*vars(InspectOptions())}
MEANING = {*vars(MeasureOptions())}


def retyped(names: Set[str]) -> str:
    """Options of the running command that were given, or that its configuration holds, as they would be typed again behind others."""
    context = click.get_current_context()
    words = [""]
    for parameter in context.command.params:
        name = str(parameter.name)
        if name in names and context.get_parameter_source(name) in (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP):
            words += _typed(parameter, context.params[name])
    return " ".join(words)


def _typed(parameter: click.Parameter, value: Any) -> list[str]:
    """An option with its value as words of a command line."""
    flag = parameter.opts[-1]
    if isinstance(value, bool):
        return [flag if value else parameter.secondary_opts[-1]] if value or parameter.secondary_opts else []
    if isinstance(value, Mapping):
        return [word for name, shape in value.items() for word in (flag, quoted(f"{name}={','.join(map(str, shape))}"))]
    if parameter.multiple:
        return [word for item in value for word in (flag, quoted(item))]
    if isinstance(value, tuple):
        return [flag, quoted(",".join(f"{item:g}" for item in value))]
    return [] if value is None else [flag, quoted(f"{value:g}" if isinstance(value, float) else value)]


def following(command: str, *words: Path | str, names: Set[str] = frozenset(), missing: str = "") -> None:
    """Say what to type next: a command with paths and options, and what was typed of ``names`` before; ``missing`` stands for data that
    were not given."""
    again = retyped(names)
    say(f"Next: sfp-onnx {command} {quoted(*words)}{f' {missing}' if missing and '--data ' not in again else ''}{again}")


def quoted(*paths: Path | str) -> str:
    """Paths as they are typed."""
    return " ".join(shlex.quote(str(path)) for path in paths)


# ---- what a build pipeline reads: JUnit XML, annotations of GitHub Actions, and exit code 3 if a check failed ----------


def junit(suite: str, checks: Sequence[Verdict]) -> str:
    """Checks as JUnit XML."""
    failed = sum(not verdict.passed for verdict in checks)
    head = f"name={quoteattr(suite)} tests={quoteattr(str(len(checks)))} failures={quoteattr(str(failed))}"
    lines = ['<?xml version="1.0" encoding="UTF-8"?>', f"<testsuites><testsuite {head}>"]
    for verdict in checks:
        text = "".join(letter for letter in verdict.text if letter.isprintable() or letter in "\n\t")
        inner = f"<system-out>{escape(text)}</system-out>" if verdict.passed else f"<failure message={quoteattr(text)}/>"
        lines.append(f"<testcase classname={quoteattr(suite)} name={quoteattr(verdict.name)}>{inner}</testcase>")
    return "\n".join([*lines, "</testsuite></testsuites>"]) + "\n"


def annotation(verdict: Verdict) -> str:
    """A workflow command of GitHub Actions."""
    name, text = (part.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A") for part in (verdict.name, verdict.text))
    title = f"sfp-onnx {name}".replace(":", "%3A").replace(",", "%2C")
    return f"::{'notice' if verdict.passed else 'error'} title={title}::{text}"


def gated(function: Callable[..., Any]) -> Callable[..., None]:
    """Give a command, which returns what it checked, --junit and --github; end it with exit code 3 if a check failed."""

    @wraps(function)
    def wrapper(*args: Any, junit_file: Path | None, github: bool, **kwargs: Any) -> None:
        try:
            verdicts = function(*args, **kwargs) or [Verdict("done", True, "all checks passed")]
        except SfpError as error:
            _report([Verdict(type(error).__name__.removesuffix("Error").lower(), False, str(error))], junit_file, github)
            raise
        _report(verdicts, junit_file, github)
        failed = [verdict for verdict in verdicts if not verdict.passed]
        if failed:
            raise TargetError("; ".join(f"{verdict.name}: {verdict.text}" for verdict in failed))

    note = "Print annotations of GitHub Actions on standard error."
    with_github = option("--github", is_flag=True, help=note, section=RUN, advanced=True)(wrapper)
    junit_option = file_option("--junit", "junit_file", help="Write the checks as JUnit XML.", section=RUN, advanced=True)
    return junit_option(with_github)


def _report(checks: Sequence[Verdict], path: Path | None, github: bool) -> None:
    if path is not None:
        write_text(path, junit(f"sfp-onnx {click.get_current_context().info_name}", checks))
    for verdict in checks if github else ():
        click.echo(annotation(verdict), err=True)
