"""Methods that look at weights and activations."""

from __future__ import annotations

import numpy as np

from ..masks import KERNEL, WEIGHT, Tile, n_of_m, tile_sums
from ..records import Array
from .registry import method
from .view import KernelView, MethodOptions


def _norms(view: KernelView) -> Array:
    """||W[o, i]||_2 as (O, I, 1), float64."""
    return np.sqrt(tile_sums(view.values.astype(np.float64) ** 2, KERNEL))


@method("l1", "kernels of the smallest L1 norm", "Li et al., ICLR 2017, for kernels")
def l1(view: KernelView, options: MethodOptions) -> Array:
    """s[o, i] = sum_k |W[o, i, k]|."""
    return tile_sums(np.abs(view.values), KERNEL)


@method("wanda", "kernels of the smallest weight norm times activation RMS", "Sun et al., ICLR 2024", needs=("activations",))
def wanda(view: KernelView, options: MethodOptions) -> Array:
    """s[o, i] = ||W[o, i]||_2 rms_i. (The paper ranks the weights of one output; here that is --scope filter.)"""
    return np.asarray(_norms(view) * view.read_rms[:, :, None])


@method(
    "obs", "kernels that are missed least once the others are re-fitted", "after Hassibi and Stork, NeurIPS 1992",
    needs=("activations", "losses"),
)  # fmt: skip
def obs(view: KernelView, options: MethodOptions) -> Array:
    """s[o, i] = sqrt(q[o, i] sum_k |W[o, i, k]|), q[o, i] the error without the kernel after a re-fit of the others of its filter.

    The others leave, too, and cannot stand in for it then; the norm tempers q for that (benchmarks/dilution.md). Layers whose q was
    not measured take `wanda`.
    """
    if view.losses is None:
        return wanda(view, options)
    return np.asarray(np.sqrt(view.losses[:, :, None] * l1(view, options)))


@method("magnitude", "single weights of the smallest magnitude", "Han et al., NeurIPS 2015", tile=lambda options: WEIGHT)
def magnitude(view: KernelView, options: MethodOptions) -> Array:
    """s[o, i, k] = |W[o, i, k]|."""
    return np.abs(view.values.astype(np.float64))


@method(
    "nm", "N of every M consecutive input channels stay", "Mishra et al., arXiv:2104.08378 (2021)",
    tile=lambda options: WEIGHT, kind="fixed", pattern="nm:N:M",
)  # fmt: skip
def semi_structured(view: KernelView, options: MethodOptions) -> Array:
    """The N largest |W[o, i, k]| of i = cM .. cM + M - 1."""
    return n_of_m(view.values, options.numbers[0], options.numbers[1])


@method(
    "block", "blocks of A filters x B input channels of the smallest L1 norm", "Narang et al., arXiv:1711.02782 (2017)",
    tile=lambda options: Tile(options.numbers[0], options.numbers[1]), pattern="block:AxB",
)  # fmt: skip
def block(view: KernelView, options: MethodOptions) -> Array:
    """Sum of |W| over the block, at each kernel position; smaller blocks at the border count their mean as a whole block's."""
    tile = Tile(options.numbers[0], options.numbers[1])
    counts = tile_sums(np.ones(view.values.shape), tile)
    return np.asarray(tile_sums(np.abs(view.values), tile) / counts)


@method("random", "random kernels (a control)", "-")
def random(view: KernelView, options: MethodOptions) -> Array:
    """Uniform numbers from the seed and the layer's name."""
    return named_generator(options.seed, view.layer).random((*view.channel.shape, 1))


def named_generator(seed: int, name: str) -> np.random.Generator:
    """The same numbers for a seed and a name, whatever else is drawn."""
    return np.random.default_rng([seed, *name.encode()])
