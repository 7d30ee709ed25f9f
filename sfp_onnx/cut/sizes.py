"""Shape operands that the graph computes from dynamic dimensions: what they become after a cut, and how to correct them.

Static ones were folded to constants before. The rest (a Reshape target with the batch size in it, say) mixes sizes that adapt
by themselves, because they come from Shape, with numbers that do not. The part of the graph that computes them is run alone,
on the sizes after the cut, and its results are compared with what is wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from .. import graph, runtime
from ..graph import Prepared
from ..records import Array, Coupling, Node


def computed_operands(prepared: Prepared, coupling: Coupling) -> list[tuple[Node, int]]:
    """(node, input position) of every operand that is computed from shapes alone, where it leaves that computation: its reader
    depends on data, or makes a tensor with channels (an initial state). Tensors that channels have entered are no sizes."""
    values, free = prepared.trace.values, prepared.trace.data_free
    entered = set(coupling.tensors)
    found = []
    for node in prepared.nodes:
        positions = range(len(node.inputs))
        reads = any(node.inputs[at] in entered or (node.index, at) in coupling.constants for at in positions)
        if reads and not graph.asks_shape(node):
            entered.update(node.outputs)
        if any(name and (name not in free or name in entered) for name in node.outputs):
            found += [(node, at) for at in positions if node.inputs[at] in values and node.inputs[at] not in entered]
    return found


def run_alone(prepared: Prepared, names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """Values of computed tensors if the tensors whose shape is asked for had these ``shapes``."""
    wanted = list(dict.fromkeys(names))
    if not wanted:
        return {}
    program, feeds = graph.shape_program(prepared, wanted, shapes)
    session = runtime.open_session(graph.serialized(program), program.weights, prepared.model.name, optimize=runtime.Optimize.NONE)
    return dict(zip(wanted, session.run(feeds, wanted), strict=True))


def correction(wanted: Array, found: Array, dynamic: Array) -> tuple[Array, Array] | Array | None:
    """How to turn ``found`` (computed) into ``wanted``, both as seen on the sample.

    None: it is right already. One array: a constant will do, since no element that stays computed is dynamic. Two arrays
    (a, b): a * computed / b, element by element, which holds for other sizes of the dynamic dimensions as well.
    """
    if wanted.shape == found.shape and np.array_equal(wanted, found):
        return None
    if wanted.shape != found.shape or not (dynamic & (wanted != -1)).any():
        return wanted
    if wanted.dtype.kind == "f":
        return np.where(found == 0, 1, wanted / np.where(found == 0, 1, found)).astype(wanted.dtype), np.ones_like(wanted)
    if ((found == 0) & (wanted != 0)).any():
        return wanted
    divisor = np.where(found == 0, 1, np.gcd(wanted, found))
    return wanted // divisor, np.where(found == 0, 1, found // divisor)
