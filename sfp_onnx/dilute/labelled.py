"""Methods that compare what the two ends of a connection stand for: AFCC and its relatives."""

from __future__ import annotations

import numpy as np

from ..errors import DataError
from ..masks import KERNEL, even_labels, intersect, tile_sums
from ..records import Array, BoolArray, FloatArray
from .registry import method
from .view import Ends, KernelView, MethodOptions, Profile
from .weights import named_generator, obs


def _ends(view: KernelView) -> Ends:
    if view.ends is None:
        raise DataError(f"layer '{view.layer}': no class profiles were measured")
    return view.ends


def _pairs(values: Array, view: KernelView) -> Array:
    """From (filters, channels) to (O, I, 1): the value of each kernel's own pair."""
    return np.asarray(values[view.filter, view.channel][:, :, None])


@method(
    "afcc", "kernels between filters without a common label", "Tzach et al., Phys. Rev. E 111, 065307 (2025)",
    needs=("profiles",), kind="fixed gated",
)  # fmt: skip
def afcc(view: KernelView, options: MethodOptions) -> Array:
    """keep[o, i] = labels of o and labels of i intersect (for a classifier: label o is in a cluster of i)."""
    ends = _ends(view)
    return _pairs(intersect(ends.writes.labels, ends.reads.labels), view)


@method(
    "random-afcc", "AFCC with random label sets of the same sizes (its control)", "Tzach et al., Phys. Rev. E 111, 065307 (2025)",
    needs=("profiles",), kind="fixed gated",
)  # fmt: skip
def random_afcc(view: KernelView, options: MethodOptions) -> Array:
    """AFCC on sets drawn per tensor, so that all layers that meet there see the same ones; class scores keep their labels."""
    ends = _ends(view)
    return _pairs(intersect(_shuffled(ends.writes, options.seed), _shuffled(ends.reads, options.seed)), view)


def _shuffled(profile: Profile, seed: int) -> BoolArray:
    if not np.isfinite(profile.snr):
        return profile.labels
    return even_labels(profile.labels.sum(1), profile.labels.shape[1], named_generator(seed, profile.name))


@method(
    "soft-afcc", "as obs, and of related filters kernels that inhibit the like-minded or excite the opposed",
    "ours, after Tzach et al. (2025)", needs=("activations", "losses", "profiles"),
)  # fmt: skip
def soft_afcc(view: KernelView, options: MethodOptions) -> Array:
    """s[o, i] = obs[o, i] (1 + sign(sum_k W[o, i, k]) rho[o, i] / 8), rho: `correlation` of the profiles' evidence.

    Chosen with the re-fit on held-out training images: larger shares of rho, or its size without the sign, help masks that are not
    re-fitted and harm those that are (benchmarks/dilution.md).
    """
    ends = _ends(view)
    rho = _pairs(correlation(ends.writes.evidence, ends.reads.evidence), view)
    agreement = np.sign(tile_sums(view.values, KERNEL)) * rho
    return np.asarray(obs(view, options) * (1 + agreement / 8))


def correlation(writes: FloatArray, reads: FloatArray) -> FloatArray:
    """Correlation over labels of each pair of profiles (O, L) and (I, L): (O, I); 0 for constant profiles."""

    def standard(profiles: FloatArray) -> FloatArray:
        centred = profiles - profiles.mean(1, keepdims=True)
        norms = np.linalg.norm(centred, axis=1, keepdims=True)
        return np.asarray(centred / np.where(norms > 0, norms, 1))

    return np.asarray(standard(writes) @ standard(reads).T)
