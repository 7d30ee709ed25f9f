"""doctor: does this installation work?"""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from .. import pipeline
from ..errors import TargetError
from . import options as take
from .common import EPILOG, guarded, say

MARKS = {True: "ok", False: "BROKEN", None: "-"}


@click.command("doctor", epilog=EPILOG)
@take.json_option
@guarded
def doctor_command(as_json: bool) -> None:
    """Check the installation: versions, providers, folders, a tiny prune end to end.

    Example: sfp-onnx doctor
    """
    found = pipeline.examine()
    if as_json:
        click.echo(json.dumps([asdict(own) for own in found], indent=1))
    else:
        for own in found:
            click.echo(f"{MARKS[own.good]:7} {own.name}: {own.text}")
    broken = [own.name for own in found if own.good is False]
    if broken:
        raise TargetError(f"this installation does not work: {', '.join(broken)} (see above)")
    say("All good. Next: sfp-onnx inspect model.onnx")
