"""prune --locked: the run of a manifest again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .. import graph, pipeline
from ..data import Dataset
from ..errors import TargetError
from ..records import Plan
from .common import say

QUIET = ("junit_file", "github")  # options that only report


def command() -> dict[str, Any]:
    """The running command and its options, for the manifest."""
    context = click.get_current_context()
    options = {key: value for key, value in context.params.items() if key not in QUIET}
    return {"name": context.command.name, "options": pipeline.plain_options(options)}


class Lock:
    """A manifest that the running command must reproduce."""

    def __init__(self, path: Path) -> None:
        """Read the manifest.

        Raises:
            OptionError: unreadable, or no manifest.
        """
        self.path, self.manifest = path, pipeline.read_manifest(path)
        self.versions = pipeline.version_differences(self.manifest)

    def plan(self, model: graph.Model, data: Dataset | None, options: dict[str, Any]) -> Plan | None:
        """Check that the run is the same so far; the manifest's plan, if it was made with a clock and cannot be made again.

        Raises:
            TargetError: options, model or data differ; which.
        """
        found = pipeline.differences(self.manifest, command()["options"], model, data)
        if found:
            raise TargetError(f"{self.path}: this is another run: {'; '.join([*found, *self.versions])}. Nothing was written.")
        for text in self.versions:
            say(f"Note: --locked: {text}")
        if pipeline.clocked(options):
            say("Note: --locked: the plan is that of the manifest, since it was made with measured times")
            return pipeline.locked_plan(self.manifest)
        return None

    def check(self, result: pipeline.Pruned, output: Path, external: bool | None) -> None:
        """Check that the result is the manifest's, byte for byte.

        Raises:
            TargetError: it is not; with the versions that differ.
        """
        name = Path(self.manifest["output"]["path"] or output.name).name
        found, expected = graph.fingerprint(result.model, output.with_name(name), external)[0], self.manifest["output"]["sha256"]
        if found != expected:
            why = "; ".join(self.versions) or "all versions are the same; the processor or its number of threads may differ"
            raise TargetError(
                f"{self.path}: the result is another one: SHA-256 {expected[:16]} then, {found[:16]} now ({why}). Nothing was written."
            )
        say(f"--locked: the same byte for byte as in {self.path}")
