"""Re-estimate the statistics of BatchNormalization on calibration data, one after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from .. import graph
from ..graph import Model, Prepared
from ..records import Array, BoolArray, Coupling, FloatArray
from .steps import tainted
from .store import Store
from .walk import Walk


def reestimate(
    prepared: Prepared, coupling: Coupling, removed: BoolArray, changed: Model, batches: Iterable[Mapping[str, Array]], memory: int
) -> tuple[Model, list[str]]:
    """Mean and variance of every BatchNormalization behind a changed tensor, as its input in the changed network has them.

    Returns:
        The model, and the names of the nodes.
    """
    affected = tainted(prepared.nodes, coupling, removed, ())
    editor, nodes = graph.Editor(changed), {node.outputs[0]: node for node in graph.nodes(changed)}
    uses = Counter(name for node in nodes.values() for name in (*node.inputs, *node.captures))
    values, wanted = graph.Constants(changed), []
    for affine in coupling.affines:
        node = nodes.get(affine.node.outputs[0])
        if node is not None and affine.tensor in affected:
            for position in affine.moments:
                name = node.inputs[position]
                if uses[name] > 1:  # exporters may share equal vectors
                    editor.set_input(node.index, position, editor.constant(name, values[name]))
            wanted.append((affine, node.outputs[0]))
    changed = editor.finish()
    nodes = {node.outputs[0]: node for node in graph.nodes(changed)}
    store = Store(memory)
    try:
        walk = Walk(changed, store)
        for feeds in batches:
            walk.feed(feeds)
        for affine, output in sorted(wanted, key=lambda item: nodes[item[1]].index):
            node = nodes[output]
            names = [node.inputs[position] for position in affine.moments]
            for name, value in zip(names, _moments(walk, node.inputs[0]), strict=True):
                walk.overrides[name] = value.astype(walk.constant(name).dtype)
    finally:
        store.close()
    return graph.with_constants(changed, walk.overrides), [affine.node.name for affine, _ in wanted]


def _moments(walk: Walk, tensor: str) -> tuple[FloatArray, FloatArray]:
    """Mean and variance per channel (axis 1) over all samples and positions."""
    segment = walk.advance([tensor])
    total: FloatArray = np.zeros(1)
    squares: FloatArray = np.zeros(1)
    count = 0.0
    for batch in range(walk.batches):
        array = segment.run(batch)[tensor]
        axes = tuple(axis for axis in range(array.ndim) if axis != 1)
        total = total + array.sum(axes, dtype=np.float64)
        squares = squares + np.square(array.astype(np.float32)).sum(axes, dtype=np.float64)
        count += array.size / array.shape[1]
    walk.finish()
    mean = total / count
    return mean, np.maximum(squares / count - mean**2, 0.0)
