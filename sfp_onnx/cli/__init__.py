"""The command line: a thin layer over `sfp_onnx.pipeline`, one file per family of commands.

Exit codes: 0 done, 1 internal error, 2 wrong usage, 3 a target or check could not be met, 4 bad model, data or path.
Results go to standard output, messages and progress to standard error.
"""

from __future__ import annotations

import click

from ..core.system import bound
from .common import EPILOG, Recorded, guarded_run
from .dilute import dilute_command
from .doctor import doctor_command
from .evaluate import evaluate_command
from .init import init_command
from .inspect import inspect_command
from .profile import profile_command
from .prune import apply_command, plan_command, prune_command
from .score import score_command
from .sweep import sweep_command

COMMANDS = (
    inspect_command, plan_command, apply_command, prune_command, sweep_command, dilute_command, score_command, evaluate_command,
    profile_command, init_command, doctor_command,
)  # fmt: skip
FIRST = """sfp-onnx makes ONNX models smaller and faster by removing channels, and proves the result.

  1. sfp-onnx doctor                                   does this installation work?
  2. sfp-onnx inspect model.onnx                       what can be removed, and why not more?
  3. sfp-onnx prune model.onnx -o smaller.onnx --target macs=50% --data FOLDER_OR_NPZ
                                                       remove half of the computation, repair, verify
  4. sfp-onnx evaluate model.onnx smaller.onnx --data TEST
                                                       accuracy, agreement, size and latency of both

Images in a folder: add --preset imagenet (or cifar10, yolo). All commands: sfp-onnx --help"""


@click.group(
    cls=Recorded, invoke_without_command=True, epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)  # fmt: skip
@click.option("-v", "--verbose", count=True, help="Say more.")
@click.option("-q", "--quiet", count=True, help="Say only errors.")
@click.version_option(package_name="sfp_onnx")
def main(verbose: int, quiet: int) -> None:
    """Make ONNX models smaller and faster by removing channels, and prove the result.

    Example: sfp-onnx prune model.onnx -o smaller.onnx --ratio 0.5
    """
    if click.get_current_context().invoked_subcommand is None:
        click.echo(FIRST)


for command in COMMANDS:
    main.add_command(command)


def program() -> None:
    """The program: the command line in a process of its own, whose memory is bounded."""
    guarded_run(_run)


def _run() -> None:
    bound()
    main(prog_name="sfp-onnx")
