"""The command line: a thin layer over `sfp_onnx.pipeline`, one file per command: its options, one call, and what is printed.

Exit codes: 0 done, 1 internal error, 2 wrong usage, 3 a target or check could not be met, 4 bad model, data or path.
Results go to standard output, messages and progress to standard error.
"""

from __future__ import annotations

import click

from ..core.system import bound, version_of
from .common import EPILOG, Program, guarded_run, loudness

FIRST = """sfp-onnx makes ONNX models smaller and faster by removing channels, and proves the result.

  1. sfp-onnx doctor                                   does this installation work?
  2. sfp-onnx inspect model.onnx                       what can be removed, and why not more?
  3. sfp-onnx prune model.onnx -o smaller.onnx --target macs=50% --data FOLDER_OR_NPZ
                                                       remove half of the computation, repair, verify
  4. sfp-onnx evaluate model.onnx smaller.onnx --data TEST
                                                       accuracy, agreement, size and latency of both

Images in a folder: add --preset imagenet (or cifar10, yolo). All commands: sfp-onnx --help"""


@click.group(
    cls=Program, invoke_without_command=True, epilog=EPILOG,
    params=loudness(click.Option), context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})  # fmt: skip
@click.option("--version", is_flag=True, help="Show the version and exit.")
def main(version: bool) -> None:
    """Make ONNX models smaller and faster by removing channels, and prove the result.

    Example: sfp-onnx prune model.onnx -o smaller.onnx --ratio 0.5
    """
    context = click.get_current_context()
    if version:
        _version()
        context.exit()
    elif context.invoked_subcommand is None:
        click.echo(FIRST)


def _version() -> None:
    click.echo(f"sfp-onnx, version {version_of('sfp_onnx')}")


@main.command("help")
@click.argument("name", metavar="[COMMAND]", required=False)
def _help(name: str | None) -> None:
    root = click.get_current_context().find_root()
    known, command, _ = ("", main, []) if name is None else main.resolve_command(root, [name])
    context = root if command is main else click.Context(command or main, root, known)
    click.echo(context.get_help())


main.texts = {
    "inspect": "Show what can be pruned, and why the rest cannot.",
    "plan": "Decide which channels leave; cut nothing.",
    "apply": "Cut a model as a plan says.",
    "prune": "Plan, cut, verify and write in one.",
    "sweep": "Plan for many targets with one calibration; show accuracy, size and latency of each.",
    "finetune": "Train a pruned model with the original as its teacher (extra `train`).",
    "ticket": "Find a lottery ticket in a trained network (extra `train`).",
    "sparsify": "Train until channels or weights are zero (extra `train`).",
    "dilute": "Zero connections (kernels, weights) without changing a shape.",
    "score": "Score all channels that can be pruned; change nothing.",
    "evaluate": "Measure models on data; the first is the reference.",
    "profile": "Measure the model's nodes at many widths on this machine; plan with it anywhere.",
    "init": "Write a commented configuration for a model; change nothing else.",
    "doctor": "Check the installation: versions, providers, folders, a tiny prune end to end.",
    "help": "Show the help of a command.",
    "version": "Show the version.",
}
main.add_command(click.Command("version", callback=_version, help="Show the version."))


def program() -> None:
    """The program: the command line in a process of its own, whose memory is bounded."""
    guarded_run(_run)


def _run() -> None:
    bound()
    main(prog_name="sfp-onnx")
