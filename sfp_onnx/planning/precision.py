"""As what the weights of a model may be stored, what their rounding does to its outputs, and what the solver chose."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..core.errors import PlanError
from ..core.types import BoolArray, Coupling, FloatArray, IntArray, Layer, Node, Precision
from ..graph import Prepared
from ..graph.stored import KERNELS, STORED, Store, replaceable

Codes = Sequence[int] | IntArray
LEAST_BYTES = 1024  # smaller weights stay as they are: what a Cast and a scale take would be more
LEAST = 1  # the code of the fewest bits that float32 is computed with
INTEGER = STORED[KERNELS]


@dataclass(frozen=True)
class Storable:
    """A weight that may be stored in fewer bits, and the layers that read it. ``errors``: what the rounding of it alone does, as a share of
    the variance of the outputs, by code (see `graph.stored.STORED`); infinite where it cannot be stored so. ``slower``: integer kernels
    are no faster, where it is timed: it is then made integers only together with all others."""

    weight: str
    layers: tuple[Layer, ...]
    channels: int
    errors: Mapping[int, float]
    slower: bool = False

    @property
    def first(self) -> Layer:
        """The layer by which it is known."""
        return self.layers[0]

    @property
    def whole(self) -> bool:
        """Whether the layers may become integers, were all others to."""
        return bool(np.isfinite(self.errors[INTEGER]))


def storables(prepared: Prepared, coupling: Coupling) -> tuple[Storable, ...]:
    """All float32 weights that mixing layers alone read, each in the same way; errors are unknown yet (0)."""
    held, readers = replaceable(prepared.model), dict[str, list[Layer]]()
    for layer in coupling.layers:
        if read_by(layer) in held:
            readers.setdefault(read_by(layer), []).append(layer)
    found = []
    for name, layers in readers.items():
        shape = held[name]
        alike = len({layer.weight for layer in layers}) == 1 and len(layers) == len(prepared.index.readers(name))
        if alike and 4 * np.prod(shape) >= LEAST_BYTES:
            axis = layers[0].weight.out_axis if layers[0].weight else 0
            errors = {code: np.inf if code == INTEGER else 0.0 for code in STORED.values()}
            found.append(Storable(name, tuple(layers), shape[axis], errors))
    return tuple(found)


def leaders(nodes: Sequence[Node], layers: Collection[str]) -> dict[str, str]:
    """The layer (of these first outputs) that each tensor comes from without another between; of several, the last in the graph."""
    place, lead = dict[str, int](), dict[str, str]()
    for node in nodes:
        own = node.outputs[0] if node.outputs else ""
        if own in layers:
            place[own] = len(place)
        found = [own] if own in layers else [lead[name] for name in node.reads if name in lead]
        if found:
            lead |= dict.fromkeys(node.outputs, max(found, key=lambda name: place[name]))
    return lead


def led(weights: Sequence[Storable], nodes: Sequence[Node], coupling: Coupling) -> IntArray:
    """Which of the weights the layer reads that each node follows (nodes,); -1: none."""
    of = {layer.node.outputs[0]: at for at, item in enumerate(weights) for layer in item.layers}
    lead = leaders(nodes, {layer.node.outputs[0] for layer in coupling.layers})
    return np.asarray([of.get(lead.get(node.outputs[0] if node.outputs else "", ""), -1) for node in nodes], np.int64)


def integer(codes: Codes, which: IntArray) -> BoolArray:
    """Whether weights at these places (...; -1: none) are of layers on integers, of candidates (..., weights)."""
    on = np.asarray(codes) == INTEGER
    return np.asarray(np.concatenate([on, np.zeros((*on.shape[:-1], 1), bool)], -1)[..., which])


def without(weights: Sequence[Storable], slower: Collection[int]) -> tuple[Storable, ...]:
    """The weights, some of which (by their places) are of layers that integers would not make faster."""
    return tuple(replace(item, slower=True) if at in slower else item for at, item in enumerate(weights))


def joined(weights: Sequence[Storable]) -> tuple[Storable, ...]:
    """The weights; those of layers that may become integers have no other choice."""
    others = dict.fromkeys((code for code in STORED.values() if code != INTEGER), np.inf)
    return tuple(replace(item, errors={**item.errors, **others}, slower=False) if item.whole else item for item in weights)


def on_integers(stores: Iterable[Store]) -> set[str]:
    """Layers whose kernels take integers, by their first outputs."""
    return {store.layer for store in stores if store.kind == KERNELS}


def as_float(weights: Sequence[Storable]) -> tuple[int, ...]:
    """The codes of weights that stay as they are."""
    return (4,) * len(weights)


def stores(weights: Sequence[Storable], codes: Sequence[int]) -> list[Store]:
    """What `graph.stored.stored` is told: how every weight is stored, by code."""
    kinds = {code: kind for kind, code in STORED.items()}
    return [
        Store(layer.node.outputs[0], layer.weight.position, kinds[code], layer.weight.out_axis)
        for item, code in zip(weights, codes, strict=True) for layer in item.layers if layer.weight
    ]  # fmt: skip


def of_plan(precisions: Sequence[Precision], coupling: Coupling) -> list[Store]:
    """The same from a plan.

    Raises:
        PlanError: a layer that the model does not have, or one without a weight.
    """
    layers = {(layer.node.name, name): layer for layer in reversed(coupling.layers) for name in ("", read_by(layer))}  # "": the first
    found = list[Store]()
    for item in precisions:
        layer = layers.get((item.layer, item.weight))
        if layer is None or layer.weight is None:
            which = f"weight {item.weight} of layer '{item.layer}'"
            raise PlanError(f"the plan stores {which}, which the model does not have. `inspect` lists them.")
        found.append(Store(layer.node.outputs[0], layer.weight.position, item.stored, layer.weight.out_axis))
    return found


def read_by(layer: Layer) -> str:
    """The name of a layer's weight."""
    return layer.node.inputs[layer.weight.position] if layer.weight else ""


def chosen(weights: Sequence[Storable], codes: Sequence[int], forced: bool) -> tuple[Precision, ...]:
    """The choice for a plan, with reasons."""
    kinds = {code: kind for kind, code in STORED.items()}
    least = INTEGER if any(item.whole and not item.slower for item in weights) else LEAST
    costs = [item.errors[least] for item in weights]
    finite = [cost for cost in costs if np.isfinite(cost)]
    middle = float(np.median(finite)) if finite else 0.0
    found = []
    for item, code, cost in zip(weights, codes, costs, strict=True):
        times = f", {cost / middle:.3g} times the median of all layers" if middle > 0 else ""
        why = f"rounded to {kinds[least]} it alone takes {cost:.2g} of the outputs' variance{times}"
        why = f"{why}; the targets hold without" if np.isfinite(cost) else f"{kinds[least]} is no choice for it"
        why = "kernels on 8-bit integers are no faster here, or could not be timed (see the notes)" if item.slower else why
        reason = "as asked" if forced else "" if code == least else why
        error = item.errors[code] if np.isfinite(item.errors[code]) else item.errors[LEAST]  # drawn in by those around it
        found += [Precision(layer.node.name, kinds[code], error, reason, item.weight) for layer in item.layers]
    return tuple(found)


def codes_of(weights: Sequence[Storable], precisions: Sequence[Precision]) -> tuple[int, ...]:
    """The codes of a choice."""
    known = {item.weight: STORED[item.stored] for item in precisions}
    return tuple(known.get(item.weight, 4) for item in weights)


def codes_for(weights: Sequence[Storable], names: Sequence[str], codes: Codes) -> IntArray:
    """Codes (..., weights) by the names of weights (..., names); of others that of float32."""
    place = {item.weight: at for at, item in enumerate(weights)}
    plain = np.full((*np.shape(codes)[:-1], 1), 4)  # the last stands for those
    return np.asarray(np.concatenate([codes, plain], -1)[..., [place.get(name, -1) for name in names]], np.int64)


def shares(weights: Sequence[Storable], names: Sequence[str], codes: Codes) -> FloatArray:
    """Bytes of an element over those of float32 (..., parameters) of candidates (..., weights), for parameters by name."""
    return np.asarray(np.maximum(codes_for(weights, names, codes), 1) / 4)


def overhead(channels: IntArray | FloatArray, codes: Codes, each: Mapping[int, float]) -> FloatArray:
    """Bytes (...) of scales and nodes of candidates (..., weights) of so many ``channels``, about; ``each``: of the nodes and names that
    unpack a weight, or quantise, by code."""
    nodes = np.select([np.asarray(codes) == code for code in each], list(each.values()), 0.0)
    return np.asarray(nodes + np.where(np.asarray(codes) <= LEAST, 4.0 * channels, 0), float)
