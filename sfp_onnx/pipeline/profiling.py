"""Which class profiles stand at the two ends of a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..data import Dataset
from ..dilute import Ends, Target
from .analysis import Analysis, Progress


def ends_of(
    analysis: Analysis, data: Dataset, found: Sequence[Target], seed: int, progress: Progress
) -> tuple[Mapping[str, Ends | str], list[str]]:
    """Profiles of what each target reads and makes, or why there are none; and what to tell the user."""
    return {target.name: "no profiles yet" for target in found}, []
