"""The command line: a thin layer over `sfp_onnx.pipeline`, one file per command: its options, one call, and what is printed.

Exit codes: 0 done, 1 internal error, 2 wrong usage, 3 a target or check could not be met, 4 bad model, data or path.
Results go to standard output, messages and progress to standard error.
"""

from __future__ import annotations

import click

from ..core.system import bound
from .common import EPILOG, Program, guarded_run

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
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})  # fmt: skip
@click.option("-v", "--verbose", count=True, help="Say more.")
@click.option("-q", "--quiet", count=True, help="Say only errors.")
@click.version_option(package_name="sfp_onnx")
def main(verbose: int, quiet: int) -> None:
    """Make ONNX models smaller and faster by removing channels, and prove the result.

    Example: sfp-onnx prune model.onnx -o smaller.onnx --ratio 0.5
    """
    if click.get_current_context().invoked_subcommand is None:
        click.echo(FIRST)


main.texts = {
    "inspect": "Show what can be pruned, and why the rest cannot.",
    "plan": "Decide which channels leave; cut nothing.",
    "apply": "Cut a model as a plan says.",
    "prune": "Plan, cut, verify and write in one.",
    "sweep": "Plan for many targets with one calibration; show accuracy, size and latency of each.",
    "dilute": "Zero connections (kernels, weights) without changing a shape.",
    "score": "Score all channels that can be pruned; change nothing.",
    "evaluate": "Measure models on data; the first is the reference.",
    "profile": "Measure the model's nodes at many widths on this machine; plan with it anywhere.",
    "init": "Write a commented configuration for a model; change nothing else.",
    "doctor": "Check the installation: versions, providers, folders, a tiny prune end to end.",
}


def program() -> None:
    """The program: the command line in a process of its own, whose memory is bounded."""
    guarded_run(_run)


def _run() -> None:
    bound()
    main(prog_name="sfp-onnx")
