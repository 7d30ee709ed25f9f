"""Steps of a bandit search: which arm sees which images, how a policy is brought back, how fast pulls are."""

from __future__ import annotations

import time

import numpy as np

from .. import bandits
from ..data import Dataset
from ..errors import OptionError
from ..pulls import Block, Pulls
from ..records import Array, IntArray
from .bandit_state import Log

TIMED_GROUPS = 3


def order(policy: bandits.Policy, most: int, blocks: int) -> tuple[IntArray, IntArray]:
    """The arms that a policy selects, in the order in which they are pulled, and the block that each is pulled on: the j-th pull of
    any arm looks at block j, so that arms are compared on the same images."""
    arms = policy.select()[:most]
    places = policy.pulls[arms] % blocks
    order = np.argsort(places, kind="stable")
    return arms[order], places[order]


def replay(policy: bandits.Policy, log: Log, horizon: int, blocks: int, partial: bool = True) -> int:
    """Bring a fresh policy to where a log ends; returns the pulls of all its whole selections. ``partial``: learn the
    rest too.

    Raises:
        OptionError: the policy would have pulled other arms.
    """
    done = 0
    while done < len(log):
        before = policy.random.bit_generator.state
        arms, _ = order(policy, horizon - done, blocks)
        known = min(len(arms), len(log) - done)
        if not known or arms[:known].tolist() != log.arms(done, done + known):
            raise OptionError("the state does not fit this search: it holds other pulls. Delete the file to start again.")
        if known < len(arms) and not partial:
            policy.random.bit_generator.state = before  # it selects the same again
            return done
        policy.update(arms[:known], log.means(done, done + known))
        done += known
    return done


def rate(engine: Pulls) -> float:
    """Pulls per second, from one timed run of some groups, weighted by their arms."""
    groups = np.unique(np.linspace(0, engine.owner.max(), TIMED_GROUPS).astype(np.int64))
    seconds = pulled = 0.0
    for group in groups:
        arms = np.flatnonzero(engine.owner == group)
        run = engine.runs(arms)[0]
        start = time.perf_counter()
        engine.outputs(run, 0)
        seconds += (time.perf_counter() - start) / len(run) * len(arms)
        pulled += len(arms)
    return pulled / max(seconds, 1e-9)


def gather(data: Dataset, order: IntArray, batch: int) -> list[Block]:
    """The samples ``order`` in blocks of ``batch``; padded to the batch of the model where that is fixed."""
    place = np.full(data.samples, -1, np.int64)
    place[order] = np.arange(len(order))
    held: dict[str, Array] = {}
    start = 0
    for feeds, count in data.batches():
        target = place[start : start + count]
        for name, array in feeds.items():
            rows = held.setdefault(name, np.empty((len(order), *array.shape[1:]), array.dtype))
            rows[target[target >= 0]] = array[:count][target >= 0]
        start += count
    blocks = []
    for first in range(0, len(order), batch):
        own = {name: rows[first : first + batch] for name, rows in held.items()}
        labels = None if data.labels is None else data.labels[order[first : first + batch]]
        if data.fixed and batch < data.batch:
            own = {name: np.concatenate([rows, np.repeat(rows[-1:], data.batch - batch, axis=0)]) for name, rows in own.items()}
        blocks.append(Block(own, batch, labels))
    return blocks
