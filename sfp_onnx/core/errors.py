"""Every error that sfp_onnx raises on purpose, with the exit code that the command line gives it.

A message says what is wrong, where (file, node, tensor, axis), what was expected, what was found, and what to do.
"""

from __future__ import annotations

import re

FROM_PYTHON: dict[str, str] = {}
"""What options of the command line are called from Python; `options` fills it."""


class SfpError(Exception):
    """Root of all errors of this package. Options in a message are named as on the command line; what they are called from Python stands
    in a note below the traceback (Python 3.11)."""

    exit_code = 1

    def __init__(self, *told: object) -> None:
        """Keep the message, and note the options in it."""
        super().__init__(*told)
        flags = dict.fromkeys(re.findall(r"--[a-z][a-z0-9-]*", str(self)))
        known = [f"{flag} is {FROM_PYTHON[flag]}" for flag in flags if flag in FROM_PYTHON]
        if known and hasattr(self, "add_note"):
            self.add_note(f"From Python: {', '.join(known)}")


class ModelError(SfpError):
    """The model cannot be read, checked, or run by onnxruntime."""

    exit_code = 4


class DataError(SfpError):
    """The calibration or test data do not fit the model."""

    exit_code = 4


class PlanError(SfpError):
    """A plan is damaged, belongs to another model, or asks for an illegal cut."""

    exit_code = 4


class ProfileError(SfpError):
    """A device profile is damaged or belongs to another model."""

    exit_code = 4


class BoardError(SfpError):
    """A board cannot be reached, or cannot time models."""

    exit_code = 4


class OutputError(SfpError):
    """The result cannot be written where the user asked for it."""

    exit_code = 4


class OptionError(SfpError):
    """Options that contradict each other or cannot be read."""

    exit_code = 2


class TargetError(SfpError):
    """A target cannot be met, or nothing in the model can be pruned; nothing is written."""

    exit_code = 3


class VerificationError(SfpError):
    """The pruned model is not the model that was planned; nothing is written."""

    exit_code = 3
