"""Multi-armed bandits that look for the units that can leave: policies and rewards, on values only.

An arm is a unit; a pull masks it and measures, on a few images, how little the outputs change. What Ameen & Vadera (arXiv:2606.07615)
fix: arms, pulls and the change of the loss as what is measured, and the policies epsilon-greedy, softmax, UCB1, Thompson sampling,
Hedge and EXP3. What is ours: the label-free reward, the same images for all arms, one pull of every arm before a policy starts
to choose (except `hedge` and `exp3`), the ranking by mean reward, `sar`, and the two references.
"""

from .policies import POLICIES, Policy, Setting, summarise
from .rewards import REWARDS, Reward, checked, make_reward

PREFIX = "bandit:"
BANDIT_SCORES = tuple(PREFIX + name for name in POLICIES)

__all__ = ["BANDIT_SCORES", "POLICIES", "PREFIX", "REWARDS", "Policy", "Reward", "Setting", "checked", "make_reward", "summarise"]
