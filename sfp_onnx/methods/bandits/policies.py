"""Which arm to pull next. Every policy is its textbook update; rewards are in [0, 1] and large where a unit can leave.

K arms; n_i pulls of arm i so far, with mean reward m_i; t pulls in all. Ties go to the lowest arm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ...core.types import Array, BoolArray, FloatArray, IntArray

Quota = Callable[[FloatArray], tuple[IntArray, IntArray]]
"""From mean rewards: the bandit that each arm belongs to (0 .. B - 1), and how many arms each bandit is to give up."""


def half(means: FloatArray) -> tuple[IntArray, IntArray]:
    """One bandit that gives up half of its arms."""
    return np.zeros(len(means), np.int64), np.array([len(means) // 2])


@dataclass(frozen=True)
class Setting:
    """What a policy needs to know: ``arms`` K >= 1, ``horizon`` (pulls in all, T), and the parameters that the user may set."""

    arms: int
    horizon: int
    seed: int = 0
    epsilon: float = 0.1
    temperature: float = 0.05
    quota: Quota = half


class Policy:
    """``select`` arms, pull each once, ``update`` with their rewards, until nothing is selected or the horizon is reached.

    The base pulls every arm once, and then one at a time as ``choose`` says.
    """

    needs_horizon = False

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.random = np.random.default_rng(setting.seed)
        self.pulls = np.zeros(setting.arms, np.int64)
        self.sums = np.zeros(setting.arms)

    @property
    def means(self) -> FloatArray:
        """m_i; arms that were never pulled stand at the mean of the others (nothing is known of them)."""
        means, known = self.sums / np.maximum(self.pulls, 1), self.pulls > 0
        return np.where(known, means, means[known].mean() if known.any() else 0.0)

    def select(self) -> IntArray:
        """Arms to pull next, each once, in ascending order."""
        fresh = np.flatnonzero(self.pulls == 0)
        return fresh if len(fresh) else np.array([self.choose()])

    def choose(self) -> int:
        """The one arm to pull next."""
        raise NotImplementedError

    def update(self, arms: IntArray, rewards: FloatArray) -> None:
        """Learn the rewards of ``arms`` (distinct)."""
        self.pulls[arms] += 1
        self.sums[arms] += rewards

    def standing(self) -> FloatArray:
        """What arms are ranked by in the end, larger = leaves earlier: the mean reward."""
        return self.means


class RoundRobin(Policy):
    """All arms in turn: the reference that spends its ablations evenly (and, over all data, leave-one-out)."""

    def select(self) -> IntArray:
        return np.arange(self.setting.arms)


class EpsilonGreedy(Policy):
    """Sutton & Barto, Reinforcement Learning, 2nd ed. (2018), 2.4."""

    def choose(self) -> int:
        """With probability epsilon any arm, else argmax_i m_i."""
        if self.random.random() < self.setting.epsilon:
            return int(self.random.integers(self.setting.arms))
        return int(np.argmax(self.means))


class Softmax(Policy):
    """Boltzmann exploration: Kuleshov & Precup, arXiv:1402.6028 (2014)."""

    def probabilities(self) -> FloatArray:
        """p_i = exp(m_i / tau) / sum_j exp(m_j / tau), tau the temperature."""
        return _normalised(self.means / self.setting.temperature)

    def choose(self) -> int:
        return _draw(self.random, self.probabilities())


class UCB1(Policy):
    """Auer, Cesa-Bianchi & Fischer, Machine Learning 47 (2002)."""

    def index(self) -> FloatArray:
        """m_i + sqrt(2 ln t / n_i)."""
        return np.asarray(self.means + np.sqrt(2 * np.log(self.pulls.sum()) / self.pulls))

    def choose(self) -> int:
        return int(np.argmax(self.index()))


class Thompson(Policy):
    """Thompson sampling for rewards in [0, 1]: Agrawal & Goyal, COLT 2012, algorithm 2."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.successes, self.failures = np.zeros((2, setting.arms), np.int64)

    def choose(self) -> int:
        """argmax_i theta_i, theta_i ~ Beta(S_i + 1, F_i + 1)."""
        return int(np.argmax(self.random.beta(self.successes + 1, self.failures + 1)))

    def update(self, arms: IntArray, rewards: FloatArray) -> None:
        """A Bernoulli trial with success probability r adds 1 to S_i or to F_i."""
        super().update(arms, rewards)
        won = self.random.random(len(arms)) < rewards
        self.successes[arms] += won
        self.failures[arms] += ~won


class Hedge(RoundRobin):
    """Multiplicative weights with full information: Freund & Schapire, JCSS 55 (1997); the rate is that of Cesa-Bianchi & Lugosi,
    Prediction, Learning, and Games (2006), theorem 2.2.

    Every round ablates every arm. The weights grow with the summed reward, so that their ranking is the one by mean reward.
    """

    needs_horizon = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.logs = np.zeros(setting.arms)
        self.rate = np.sqrt(8 * np.log(max(setting.arms, 2)) / max(1, setting.horizon // setting.arms))

    def probabilities(self) -> FloatArray:
        """p_i = w_i / sum_j w_j."""
        return _normalised(self.logs)

    def update(self, arms: IntArray, rewards: FloatArray) -> None:
        """w_i <- w_i exp(eta r_i), eta = sqrt(8 ln K / rounds)."""
        super().update(arms, rewards)
        self.logs[arms] += self.rate * rewards


class EXP3(Policy):
    """Auer, Cesa-Bianchi, Freund & Schapire, SIAM J. Computing 32 (2002); gamma as in corollary 3.2 with g = T."""

    needs_horizon = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.logs, arms = np.zeros(setting.arms), setting.arms
        self.gamma = min(1.0, float(np.sqrt(arms * np.log(max(arms, 2)) / ((np.e - 1) * max(1, setting.horizon)))))

    def probabilities(self) -> FloatArray:
        """p_i = (1 - gamma) w_i / sum_j w_j + gamma / K."""
        return (1 - self.gamma) * _normalised(self.logs) + self.gamma / self.setting.arms

    def select(self) -> IntArray:
        return np.array([_draw(self.random, self.probabilities())])

    def update(self, arms: IntArray, rewards: FloatArray) -> None:
        """w_i <- w_i exp(gamma (r_i / p_i) / K) for the arm that was pulled."""
        estimate = rewards / self.probabilities()[arms]
        super().update(arms, rewards)
        self.logs[arms] += self.gamma * estimate / self.setting.arms


class SAR(Policy):
    """Successive accepts and rejects: Bubeck, Wang & Viswanathan, ICML 2013, in its form for several bandits at once (the groups,
    if every group gives up its own share).

    K - 1 phases. After phase k every undecided arm has been pulled
        n_k = ceil((T - K) / (L (K + 1 - k))),  L = 1/2 + sum_{i=2..K} 1/i
    times (at least once). Then the arm with the largest gap is decided: within its bandit, which still has to find m arms and orders
    its undecided means as m_(1) >= m_(2) >= ..., the gap of an arm among the first m is m_i - m_(m+1) (it is accepted), of the others
    m_(m) - m_i (rejected). Where all or none of a bandit's arms are wanted, the gap is infinite.
    """

    needs_horizon = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        arms = setting.arms
        self.scale = 0.5 + (1 / np.arange(2, arms + 1)).sum()
        self.phase, self.judged = 1, 0
        self.open: BoolArray = np.ones(arms, bool)
        self.decided = np.zeros(arms)
        self.best: list[tuple[float, int, bool]] = []
        self.owner, self.wanted = np.zeros(arms, np.int64), np.zeros(0, np.int64)

    def goal(self, phase: int) -> int:
        """n_k."""
        arms, spare = self.setting.arms, self.setting.horizon - self.setting.arms
        return max(1, int(np.ceil(spare / (self.scale * (arms + 1 - phase)) - 1e-9)))

    def select(self) -> IntArray:
        while self.phase < self.setting.arms:
            waiting = np.flatnonzero(self.open & (self.pulls < self.goal(self.phase)))
            if len(waiting):
                return waiting
            self._decide()
            self.phase += 1
        return np.flatnonzero(self.pulls == 0)  # a single arm has no phases

    def _decide(self) -> None:
        if not len(self.wanted):
            self.owner, wanted = self.setting.quota(self.means)
            self.wanted = wanted.copy()
        if self.judged != (pulls := int(self.pulls.sum())):
            self.best, self.judged = [self._largest_gap(bandit) for bandit in range(len(self.wanted))], pulls
        bandit = max(range(len(self.best)), key=lambda number: (self.best[number][0], -self.best[number][1]))
        _, arm, accept = self.best[bandit]
        self.open[arm] = False
        self.decided[arm] = 1 if accept else -1
        self.wanted[bandit] -= accept
        self.best[bandit] = self._largest_gap(bandit)

    def _largest_gap(self, bandit: int) -> tuple[float, int, bool]:
        """(gap, arm, whether it is accepted) of the undecided arm that is decided next."""
        arms = np.flatnonzero(self.open & (self.owner == bandit))
        wanted = int(self.wanted[bandit])
        if not len(arms):
            return -np.inf, 0, False
        if wanted <= 0 or wanted >= len(arms):
            return np.inf, int(arms[0]), wanted > 0
        means = self.sums[arms] / self.pulls[arms]
        order = np.argsort(-means, kind="stable")
        top, bottom = order[0], order[-1]
        accept, reject = means[top] - means[order[wanted]], means[order[wanted - 1]] - means[bottom]
        return (float(accept), int(arms[top]), True) if accept >= reject else (float(reject), int(arms[bottom]), False)

    def standing(self) -> FloatArray:
        """Accepted arms first, rejected arms last, by mean reward within each kind."""
        return (self.means + self.decided + 1) / 3


POLICIES: dict[str, type[Policy]] = {
    "epsilon-greedy": EpsilonGreedy, "exp3": EXP3, "hedge": Hedge, "leave-one-out": RoundRobin, "round-robin": RoundRobin, "sar": SAR,
    "softmax": Softmax, "thompson": Thompson, "ucb1": UCB1,
}  # fmt: skip


def _normalised(logs: FloatArray) -> FloatArray:
    weights = np.exp(logs - logs.max())
    return np.asarray(weights / weights.sum())


def _draw(random: np.random.Generator, probabilities: FloatArray) -> int:
    total = np.cumsum(probabilities)
    return int(min(np.searchsorted(total, random.random() * total[-1], side="right"), len(total) - 1))


# ---- playing ---------------------------------------------------------------------------------------------------------

Pull = tuple[int, float, float]
"""Arm, and the mean reward and mean squared reward over the images."""


def order(policy: Policy, most: int, blocks: int) -> tuple[IntArray, IntArray]:
    """The arms that a policy selects, in the order in which they are pulled, and the block that each is pulled on: the j-th pull of
    any arm looks at block j, so that arms are compared on the same images."""
    arms = policy.select()[:most]
    places = policy.pulls[arms] % blocks
    by_place = np.argsort(places, kind="stable")
    return arms[by_place], places[by_place]


def summarise(arms: int, log: Sequence[Pull], images: int) -> dict[str, Array]:
    """Per arm: pulls (of so many ``images`` each), mean reward, and the half width of its 95 % interval from the spread over images
    (NaN-free: 0 for no pulls)."""
    pulled, means, squares = zip(*log, strict=True)
    count = np.bincount(pulled, minlength=arms)
    mean = np.bincount(pulled, means, arms) / np.maximum(count, 1)
    square = np.bincount(pulled, squares, arms) / np.maximum(count, 1)
    width = 1.96 * np.sqrt(np.maximum(square - mean**2, 0) / np.maximum(count * images, 1))
    return {"pulls": count, "mean": mean, "half_width": width}
