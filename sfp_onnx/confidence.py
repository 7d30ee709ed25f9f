"""How sure a measured drop is: one-sided upper bounds from samples."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, sqrt
from statistics import NormalDist

import numpy as np

from .records import BoolArray, IntArray

PARTS = 20  # of the samples, left out in turn


def matched(before: BoolArray, after: BoolArray, confidence: float) -> tuple[float, float]:
    """The drop of a share of right answers to the same samples, and what it is at most with a confidence.

    With b samples that were right before only, c after only, and z the normal quantile of the confidence,

        bound = (b - c) / (n + 2) + z sqrt(b + c + 1 - (b - c)^2 / (n + 2)) / (n + 2)

    Agresti, Min: Simple improved confidence intervals for comparing matched proportions, Statistics in Medicine 24, 2005. It is above zero
    even if no answer changed: few samples prove little.
    """
    count = len(before)
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    drop, size = lost - won, count + 2
    spread = sqrt(lost + won + 1 - drop**2 / size) / size
    return drop / count, max(drop / size + NormalDist().inv_cdf(confidence) * spread, drop / count)


def needed(limit: float, confidence: float) -> int:
    """The fewest samples on which `matched` can show that a drop is at most ``limit``: none changes its answer."""
    return max(1, ceil(NormalDist().inv_cdf(confidence) / limit - 2)) if limit > 0 else 0


def jackknifed(value: Callable[[IntArray], float], samples: int, confidence: float, seed: int = 0) -> tuple[float, float]:
    """Any figure of samples (such as the drop of a metric), and what it is at most with a confidence, from its values without one part of
    the samples after the other.

        variance = (k - 1) / k sum over parts i of (value without i - their mean)^2

    Args:
        value: the figure of some samples, by their positions.
    """
    everything = np.arange(samples)
    parts = np.array_split(np.random.default_rng(seed).permutation(samples), min(PARTS, samples))
    without = np.asarray([value(np.setdiff1d(everything, part)) for part in parts]) if len(parts) > 1 else np.zeros(1)
    spread = sqrt((len(parts) - 1) / len(parts) * float(((without - without.mean()) ** 2).sum()))
    whole = value(everything)
    return whole, whole + max(0.0, NormalDist().inv_cdf(confidence)) * spread


def parse_confidence(text: str) -> float | None:
    """Read ``95%`` or ``0.95``; None if it is not a number from 0.5 up to, but not including, 1."""
    try:
        value = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        return None
    return value if 0.5 <= value < 1 else None
