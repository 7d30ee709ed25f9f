"""What each kernel is worth where the rest of its filter is re-fitted without it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import closing

import numpy as np

from ..graph import Prepared
from ..records import Array, Coupling, FloatArray, RepairOptions
from .selection import Inputs, Look

RIDGE = 1e-2


def kernel_losses(
    prepared: Prepared,
    coupling: Coupling,
    names: Collection[str],
    batches: Iterable[Mapping[str, Array]],
    options: RepairOptions,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, FloatArray]:
    """Root mean square error of a filter's output without each of its kernels, after the re-fit of the others, (O, I) by name of the node.

    Layers whose covariance would not fit into memory, or that have too many groups, are left out.

    Raises:
        ModelError: the model cannot be run in segments.
    """
    found = {}
    look = Look.at(prepared, coupling, lambda layer: layer.node.name in names, options, RIDGE)
    with closing(look.store()) as store:
        for layer, step, blocks in look.observed(store, batches, progress):
            losses = [block_losses(own, inverse) for own, inverse in blocks]
            if losses and layer.weight is not None:
                joined = 0 if step.linear.form.out_axis == 0 or layer.weight.out_axis == 0 else 1
                found[layer.node.name] = np.concatenate(losses, joined)
    return found


def block_losses(inputs: Inputs, inverse: FloatArray) -> FloatArray:
    """q[o, i] = sqrt(w' [(C + r I)^-1]_ii^-1 w) with w = W[o, i] and the rows and columns ii of channel i, (O, I).

    The optimal brain surgeon, a kernel at a time: Hassibi and Stork, NeurIPS 1992; Frantar and Alistarh, NeurIPS 2022.
    """
    rows = np.argsort(inputs.channels, kind="stable").reshape(int(inputs.channels.max()) + 1, -1)
    own = inverse[rows[:, :, None], rows[:, None, :]]
    weights = inputs.weights.astype(np.float64)[rows]  # (I, K, O)
    squares = (weights * np.linalg.solve(own, weights)).sum(1).T
    found: FloatArray = np.sqrt(np.maximum(squares, 0.0))
    return found
