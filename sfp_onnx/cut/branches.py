"""What is left of a branch without channels: the constant that its last layers give for zeros."""

from __future__ import annotations

import numpy as np

from .. import graph, runtime
from ..errors import ModelError
from ..graph import Prepared
from ..records import Array, Branch


def constant_ends(prepared: Prepared, branch: Branch) -> dict[str, Array]:
    """Values of the branch's ends, of size 1 along every axis on which they are constant, for sources that are zero.

    Raises:
        ModelError: they depend on the batch (an internal error).
    """
    types, shapes = prepared.types, prepared.trace.shapes
    dtypes = {name: np.dtype(types.get(name) or np.float32) for name in (*branch.sources, *branch.ends)}
    inputs = {name: (dtypes[name], shapes[name]) for name in branch.sources}
    part = graph.segment(prepared.model, inputs, {name: dtypes[name] for name in branch.ends})
    session = runtime.open_session(graph.serialized(part), part.weights, prepared.model.name, optimize=runtime.Optimize.NONE)
    read = {port.name for port in graph.inputs(part)}
    zeros = {name: np.zeros(shapes[name], dtypes[name]) for name in branch.sources if name in read}
    found = {}
    for name, value in zip(branch.ends, session.run(zeros, list(branch.ends)), strict=True):
        for axis in range(value.ndim):
            first = value.take([0], axis)
            if (value == first).all():
                value = first
            elif axis in prepared.trace.dynamic_axes.get(name, ()):
                raise ModelError(f"internal error: '{name}' of a vanishing branch varies along its dynamic axis {axis}. Please report it.")
        found[name] = value
    return found
