"""Options of the scores ``bandit:*``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ..pipeline import MASKS, ROUND_REPAIRS
from ..records import BanditOptions
from .quantities import byte_size, seconds

F = TypeVar("F", bound=Callable[..., Any])
NAMES = tuple(vars(BanditOptions()))


_OPTIONS = (
    click.option("--pulls", type=click.IntRange(min=1), help="bandit: pulls per arm and round.  [default: 5]"),
    click.option("--budget", callback=seconds, metavar="60s", help="bandit: time for pulling (5m, 1h), instead of --pulls."),
    click.option("--pull-batch", "pull_batch", type=click.IntRange(min=1), default=8, show_default=True,
                 help="bandit: images in one pull."),
    click.option("--epsilon", type=click.FloatRange(0, 1), default=0.1, show_default=True, help="Exploration of bandit:epsilon-greedy."),
    click.option("--temperature", type=click.FloatRange(min=0, min_open=True), default=0.05, show_default=True,
                 help="Temperature of bandit:softmax."),
    click.option("--reward", metavar="NAME|MODULE:FUNCTION",
                 help="bandit: divergence, relative-error, loss (needs labels), or your own function.  [default: divergence for "
                      "classifiers, else relative-error]"),
    click.option("--masked-by", type=click.Choice(MASKS), default="zero", show_default=True,
                 help="bandit: what stands for a masked channel; mean: as if a repair had folded it into biases."),
    click.option("--rounds", type=click.IntRange(min=1), default=1, show_default=True,
                 help="bandit: remove a share, and pull again on the pruned network."),
    click.option("--round-repair", type=click.Choice(ROUND_REPAIRS), default="none", show_default=True,
                 help="bandit: repair between rounds."),
    click.option("--pull-memory", callback=byte_size, default="1GiB", show_default=True, help="bandit: bound on kept activations."),
    click.option("--state", type=click.Path(), help="bandit: file to resume from, written while pulling."),
    click.option("--traces", type=click.Path(), help="bandit: write scores, pulls, means and 95 % intervals per arm as JSON."),
)  # fmt: skip


def bandit_options(function: F) -> F:
    """The options, on a command."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def chosen_bandit(options: dict[str, Any]) -> BanditOptions | None:
    """The options of the search; None if the score is no bandit.

    Raises:
        UsageError: options of a search without one, or both --pulls and --budget.
    """
    if not (options["score"] or "").startswith("bandit:"):
        defaults = BanditOptions()
        given = [name for name in NAMES if options[name] != getattr(defaults, name)]
        if given:
            raise click.UsageError(f"--{given[0].replace('_', '-')} belongs to the scores bandit:*; add --score bandit:sar.")
        return None
    if options["pulls"] is not None and options["budget"] is not None:
        raise click.UsageError("Give either --pulls or --budget.")
    if ":" in (options["reward"] or "") and "" not in sys.path:
        sys.path.insert(0, "")  # the user's function may lie in the working directory
    return BanditOptions(**{name: options[name] for name in NAMES})


def bandit_files(options: dict[str, Any]) -> list[Path]:
    """Files that the search writes."""
    return [Path(options[name]) for name in ("state", "traces") if options[name] is not None]
