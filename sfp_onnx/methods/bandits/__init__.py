"""Multi-armed bandits that look for the units that can leave: policies and rewards, on values only.

An arm is a unit; a pull masks it and measures, on a few images, how little the outputs change. What Ameen & Vadera (arXiv:2606.07615)
fix: arms, pulls and the change of the loss as what is measured, and the policies epsilon-greedy, softmax, UCB1, Thompson sampling,
Hedge and EXP3. What is ours: the label-free reward, the same images for all arms, one pull of every arm before a policy starts
to choose (except `hedge` and `exp3`), the ranking by mean reward, `sar`, and the two references.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ...core.errors import DataError, OptionError
from ...core.types import Array, FloatArray, IntArray
from ...evaluation import is_classifier, log_probabilities
from .policies import POLICIES

PREFIX = "bandit:"
BANDIT_SCORES = tuple(PREFIX + name for name in POLICIES)


# ---- how little the outputs changed ----------------------------------------------------------------------------------

Outputs = Sequence[Array]
Reward = Callable[[Outputs, Outputs, IntArray | None], FloatArray]
TEMPERATURE = 4.0  # softens the outputs: the ranking is the same from 5 to 30 times fewer images than at 1
REWARDS = ("divergence", "relative-error", "loss")


def make_reward(name: str | None, references: Sequence[Outputs], labels: IntArray | None) -> Reward:
    """The built-in reward of that name; None: `divergence` for classifiers, else `relative-error`.

    Args:
        references: the model's outputs on all blocks of images.

    Raises:
        DataError: the reward needs labels, class scores or floating outputs, and there are none.
        OptionError: unknown name.
    """
    first = references[0]
    classes = is_classifier(first[0], len(first[0]))
    name = name or ("divergence" if classes else "relative-error")
    if name == "divergence":
        if not classes:
            raise DataError("reward 'divergence' needs class scores (one row of at least two per image); use relative-error")
        return divergence
    if name == "relative-error":
        return _relative_error(references)
    if name != "loss":
        raise OptionError(f"unknown reward '{name}'. Known: {', '.join(REWARDS)}, or module:function")
    if labels is None:
        raise DataError("reward 'loss' needs labels (--labels, or an array 'labels' in the data); the default reward needs none")
    if classes:
        return cross_entropy
    if first[0].size != len(first[0]):
        raise DataError(f"reward 'loss' needs class scores or one number per image; the output has shape {list(first[0].shape)}")
    spread = float(np.var(labels.astype(np.float64)))
    return _squared_error(spread if spread > 0 else 1.0)


def divergence(reference: Outputs, outputs: Outputs, labels: IntArray | None = None) -> FloatArray:
    """r = 1 - min(1, sqrt(KL(softmax(z0 / T) || softmax(z / T)) / 2)), T = 4.

    By Pinsker's inequality a lower bound of 1 - the total variation between the softened outputs.
    """
    p, q = log_probabilities(reference[0], TEMPERATURE), log_probabilities(outputs[0], TEMPERATURE)
    kl = (np.exp(p) * (p - q)).sum(-1)
    return _bounded(1 - np.sqrt(np.maximum(kl, 0) / 2))


def _relative_error(references: Sequence[Outputs]) -> Reward:
    """r = 1 - min(1, ||z - z0|| / s), s^2 = mean over images of ||z0 - mean z0||^2: s is fixed by the unmasked model before the search.

    All floating outputs count. Where the model gives the same for all images, s is ||z0|| (or 1).
    """
    kept = [index for index, array in enumerate(references[0]) if array.dtype.kind == "f"]
    if not kept:
        raise DataError("the model has no floating output to compare; give --reward module:function")
    blocks = [[block[index] for index in kept] for block in references]
    count = sum(len(block[0]) for block in blocks)
    centre = sum(_flat(block).sum(0) for block in blocks) / count
    scale = (sum(float(((_flat(block) - centre) ** 2).sum()) for block in blocks) / count) ** 0.5
    scale = scale or float((centre**2).sum()) ** 0.5 or 1.0

    def relative_error(reference: Outputs, outputs: Outputs, labels: IntArray | None = None) -> FloatArray:
        change = _flat([outputs[index] for index in kept]) - _flat([reference[index] for index in kept])
        return _bounded(1 - np.sqrt((change**2).sum(1)) / scale)

    return relative_error


def cross_entropy(reference: Outputs, outputs: Outputs, labels: IntArray | None) -> FloatArray:
    """d = CE(z) - CE(z0), the change of the loss that the paper measures; r = 1 / (1 + exp(d)) = p(y) / (p(y) + p0(y)), 1/2 where
    nothing changed."""
    assert labels is not None
    rows = np.arange(len(labels))
    change = log_probabilities(reference[0])[rows, labels] - log_probabilities(outputs[0])[rows, labels]
    return _logistic(change)


def _squared_error(spread: float) -> Reward:
    def squared_error(reference: Outputs, outputs: Outputs, labels: IntArray | None) -> FloatArray:
        """d = ((z - y)^2 - (z0 - y)^2) / var(y); r = 1 / (1 + exp(d))."""
        assert labels is not None
        found, before = (item[0].astype(np.float64).reshape(-1) for item in (outputs, reference))
        return _logistic(((found - labels) ** 2 - (before - labels) ** 2) / spread)

    return squared_error


def _logistic(change: FloatArray) -> FloatArray:
    return _bounded(1 / (1 + np.exp(np.clip(change, -700, 700))))


def _flat(arrays: Sequence[Array]) -> FloatArray:
    return np.concatenate([array.reshape(len(array), -1).astype(np.float64) for array in arrays], axis=1)


def _bounded(rewards: FloatArray) -> FloatArray:
    """Into [0, 1]; outputs that are not numbers any more are the worst."""
    return np.clip(np.nan_to_num(rewards, nan=0.0), 0.0, 1.0)


def checked(reward: Reward, name: str) -> Reward:
    """A user's reward whose values are checked at every pull.

    Raises:
        OptionError: it fails, or does not give one number in [0, 1] per image.
    """

    def call(reference: Outputs, outputs: Outputs, labels: IntArray | None) -> FloatArray:
        images = len(reference[0])
        try:
            found = np.asarray(reward(reference, outputs, labels), np.float64)
        except Exception as error:
            raise OptionError(f"--reward {name} failed: {type(error).__name__}: {error}") from error
        if found.shape != (images,) or not ((found >= 0) & (found <= 1)).all():
            raise OptionError(
                f"--reward {name}: expected {images} numbers in [0, 1], one per image; found shape {list(found.shape)}"
                + (f" with values from {found.min():.3g} to {found.max():.3g}" if found.size else "")
            )
        return found

    return call
