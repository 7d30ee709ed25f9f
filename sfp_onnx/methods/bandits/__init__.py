"""Scores by trial: multi-armed bandits that look for the coupled channels that can leave.

An arm is a set of coupled channels (a unit); to pull it is an ablation: mask it and measure, on a few images, how little the outputs
change. What Ameen & Vadera (arXiv:2606.07615) fix: arms, pulls and the change of the loss as what is measured, and the policies
epsilon-greedy, softmax, UCB1, Thompson sampling, Hedge and EXP3. What is ours: the label-free reward, the same images for all arms, one
ablation of every arm before a policy starts to choose (except `hedge` and `exp3`), the ranking by mean reward, `sar`, and the two
references.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...core.errors import OptionError
from ...core.options import CHANNELS, byte_size, option, seconds
from ...scores.scoring import Scored, Setting, prepared
from .policies import POLICIES

PREFIX = "bandit:"
REWARDS = ("divergence", "angle", "relative-error", "loss")


@dataclass(frozen=True)
class BanditOptions:
    """What a bandit score may be told: ``pulls``, ablations per unit (5 if neither is given), or ``budget`` in seconds; ``batch`` images
    per ablation; ``memory``: bytes of activations to keep; ``traces``: file for ablations, means and intervals per unit."""

    pulls: int | None = option(None, "Ablations per set of coupled channels.", CHANNELS, low=1)
    budget: float | None = option(None, "Time for all ablations.", CHANNELS, parse=seconds)
    batch: int = option(8, "Images per ablation.", CHANNELS, low=1)
    epsilon: float = option(0.1, "How often epsilon-greedy explores.", CHANNELS, low=0, high=1)
    temperature: float = option(0.05, "Temperature of softmax.", CHANNELS, low=0, low_open=True, high=float("inf"), high_open=True)
    reward: str | None = option(None, f"{', '.join(REWARDS)}, or module:function. [default: by what the output means]", CHANNELS)
    memory: int = option(2**30, "Bytes of activations to keep.", CHANNELS, parse=byte_size)
    traces: str | None = option(None, "Write ablations, means and intervals of all coupled channels as JSON.", CHANNELS, path=True)

    def __post_init__(self) -> None:
        """Check what no single value shows.

        Raises:
            OptionError: both pulls and a budget.
        """
        if self.pulls is not None and self.budget is not None:
            raise OptionError("give either pulls or budget")


def _register(policy: str) -> None:
    """A score for each policy."""
    source = " ".join((POLICIES[policy].__doc__ or "").split("\n\n")[0].split())

    @prepared(PREFIX + policy, f"ablations of one set of coupled channels at a time, chosen by {policy}", source, BanditOptions)
    def prepare(analysis: Any, data: Any, setting: Setting) -> Scored:
        from .bandit_search import search

        return search(policy, analysis, data, setting)


for name in POLICIES:
    _register(name)
