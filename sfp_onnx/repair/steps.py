"""Which layers are re-fitted, in which order, and what each aims at."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import graph
from ..graph import Model
from ..records import Additive, Array, BoolArray, Coupling, Layer, Linear, Node
from ..units import keep_mask


@dataclass(frozen=True)
class Step:
    """One layer of the changed model.

    ``output`` is what it makes, ``target`` the tensor behind it that is compared with ``reference`` of the original (the same, or
    the sum that the output goes into); ``bias`` is the initializer of its bias, which is added inside the layer if ``inside``, else by the
    node behind it. ``mask`` (the weight's shape) tells which weights may be other than zero; None: all.
    """

    layer: str
    linear: Linear
    data: str
    output: str
    target: str
    reference: str
    weight: str
    bias: str | None
    inside: bool
    mask: BoolArray | None = None


def tainted(original: Sequence[Node], coupling: Coupling, removed: BoolArray, masked: Collection[str]) -> set[str]:
    """Tensors of the original that may differ in the changed model: behind nodes that read a cut tensor or a masked weight."""
    cut = {name for name, channels in coupling.tensors.items() if any(not keep_mask(own.units, removed).all() for own in channels)}
    found: set[str] = set()
    for node in original:
        if any(name in found or name in cut or name in masked for name in (*node.inputs, *node.captures)):
            found.update(node.outputs)
    return found


def _readers(nodes: Sequence[Node]) -> dict[str, list[tuple[Node, int]]]:
    found: dict[str, list[tuple[Node, int]]] = {}
    for node in nodes:
        for position, name in enumerate(node.inputs):
            found.setdefault(name, []).append((node, position))
        for name in node.captures:
            found.setdefault(name, []).append((node, -1))
    return found


@dataclass(frozen=True)
class Scene:
    """The changed model beside what is known of the original; ``added`` are nodes that the original does not have, by output."""

    model: Model
    coupling: Coupling
    original: Sequence[Node]
    shapes: Mapping[str, tuple[int, ...]]
    added: Mapping[str, Additive] = field(default_factory=dict)

    def __post_init__(self) -> None:
        nodes = graph.nodes(self.model)
        object.__setattr__(self, "by_output", {node.outputs[0]: node for node in nodes})
        object.__setattr__(self, "readers", _readers(nodes))
        object.__setattr__(self, "constants", graph.initializers(self.model))
        object.__setattr__(self, "values", graph.Constants(self.model))
        known = {self.original[index].outputs[0]: additive for index, additive in self.coupling.additive.items()}
        object.__setattr__(self, "additive", {**known, **self.added})
        object.__setattr__(self, "outputs", {port.name for port in graph.outputs(self.model)})

    by_output: Mapping[str, Node] = field(init=False)
    readers: Mapping[str, list[tuple[Node, int]]] = field(init=False)
    constants: Mapping[str, tuple[tuple[int, ...], Any]] = field(init=False)
    values: Mapping[str, Array] = field(init=False)
    additive: Mapping[str, Additive] = field(init=False)
    outputs: set[str] = field(init=False)

    def only_reader(self, name: str) -> tuple[Node, int] | None:
        """The one node that reads a tensor which is no output of the model."""
        found = self.readers.get(name, ())
        return found[0] if len(found) == 1 and name not in self.outputs else None


@dataclass(frozen=True)
class BiasPlace:
    """Where the bias of a layer is or can be: an input of ``node``, which is the layer itself (``inside``) or adds it behind."""

    node: Node
    position: int
    inside: bool


def bias_place(scene: Scene, layer: Layer, node: Node) -> BiasPlace | None:
    """The place of a layer's bias; None if there is none yet."""
    assert layer.linear is not None
    if layer.linear.bias is not None and layer.linear.bias_scale:
        return BiasPlace(node, layer.linear.bias, True)
    found = scene.only_reader(node.outputs[0])
    added = scene.additive.get(found[0].outputs[0]) if found else None
    if found is None or added is None or added.shift is None or found[0].inputs[added.shift] not in scene.constants:
        return None
    return BiasPlace(found[0], added.shift, False)


def give_biases(scene: Scene, layers: Sequence[Layer]) -> Scene:
    """The model in which each of these layers has a bias of its own: shared ones are copied, missing ones are created as zeros."""
    editor, added = graph.Editor(scene.model), {}
    for layer in layers:
        node = scene.by_output[layer.node.outputs[0]]
        place = bias_place(scene, layer, node)
        name = "" if place is None or place.position >= len(place.node.inputs) else place.node.inputs[place.position]
        if place is not None and name:
            if name in scene.constants and len(scene.readers[name]) > 1:
                editor.set_input(place.node.index, place.position, editor.constant(name, scene.values[name]))
            continue
        zeros = _zeros(scene, layer, node, len(scene.shapes[node.outputs[0]]) if place is None else 1)
        if place is not None:
            editor.set_input(node.index, place.position, editor.constant(f"{node.name}/bias", zeros))
        elif scene.only_reader(node.outputs[0]):
            sum_ = editor.insert_after(editor.tensor(node.outputs[0]), "Add", [editor.constant(f"{node.name}/bias", zeros)], first=0)
            added[sum_] = Additive((0,), 1)
    return Scene(editor.finish(), scene.coupling, scene.original, scene.shapes, added)


def _zeros(scene: Scene, layer: Layer, node: Node, rank: int) -> Array:
    """A zero bias, shaped to be added to a tensor of ``rank`` (1: the vector that the operator takes)."""
    assert layer.weight is not None and layer.linear is not None
    shape, dtype = scene.constants[node.inputs[layer.weight.position]]
    groups = int(node.attributes.get("group", 1)) if layer.weight.out_axis else 1
    axis = layer.linear.form.out_axis
    return np.zeros((shape[layer.weight.out_axis] * groups, *[1] * (rank - 1 - axis if rank > 1 else 0)), dtype)


def candidates(scene: Scene, affected: Collection[str], masks: Mapping[str, BoolArray]) -> list[Layer]:
    """Layers that can be re-fitted and have a reason to: they read something that may have changed, or their weight is masked."""
    found = []
    for layer in scene.coupling.layers:
        node = scene.by_output.get(layer.node.outputs[0])
        if node is None or layer.linear is None or layer.weight is None:
            continue
        weight = node.inputs[layer.weight.position]
        own = weight in scene.constants and len(scene.readers[weight]) == 1
        if own and (layer.node.outputs[0] in affected or weight in masks) and _adds_a_vector(scene, layer, node):
            found.append(layer)
    return sorted(found, key=lambda layer: scene.by_output[layer.node.outputs[0]].index)


def plan_steps(scene: Scene, layers: Sequence[Layer], masks: Mapping[str, BoolArray]) -> list[Step]:
    """The layers in topological order, each with its target."""
    pending = {layer.node.outputs[0] for layer in layers}
    steps = []
    for layer in layers:
        node = scene.by_output[layer.node.outputs[0]]
        assert layer.weight is not None and layer.linear is not None
        place = bias_place(scene, layer, node)
        bias = place.node.inputs[place.position] if place and place.position < len(place.node.inputs) else ""
        if place is None or bias not in scene.constants or not _is_vector(scene, layer, place, bias):
            bias = ""
        weight = node.inputs[layer.weight.position]
        chain = _chain(scene, node.outputs[0], layer.linear.form.out_axis, pending)
        reference = next(name for name in reversed(chain) if name not in scene.added)
        inside = place is None or place.inside
        names = (layer.data_name, node.outputs[0], chain[-1], reference, weight)
        steps.append(Step(node.name, layer.linear, *names, bias or None, inside, masks.get(weight)))
        pending.discard(node.outputs[0])
    return steps


def _adds_a_vector(scene: Scene, layer: Layer, node: Node) -> bool:
    """Whether a layer adds one value per output channel, or nothing; what else it may add (a scalar, a map, an activation) is unknown
    to its linear form."""
    place = bias_place(scene, layer, node)
    if place is None or not place.inside or place.position >= len(node.inputs) or not node.inputs[place.position]:
        return True
    name = node.inputs[place.position]
    return name in scene.constants and _is_vector(scene, layer, place, name)


def _is_vector(scene: Scene, layer: Layer, place: BiasPlace, bias: str) -> bool:
    """Whether a constant that is added to the output holds one value per output channel of the layer."""
    assert layer.weight is not None and layer.linear is not None
    output = layer.node.outputs[0]
    node = scene.by_output[output]
    groups = int(node.attributes.get("group", 1)) if layer.weight.out_axis else 1
    width = scene.constants[node.inputs[layer.weight.position]][0][layer.weight.out_axis] * groups
    shape = scene.constants[bias][0]
    if place.inside and len(shape) == 1:
        return shape[0] == width
    axis = layer.linear.form.out_axis - len(scene.shapes[output])  # from the end, where broadcasting aligns
    return len(shape) >= -axis and shape[axis] == width == int(np.prod(shape))


def _chain(scene: Scene, output: str, axis: int, pending: Collection[str]) -> list[str]:
    """An output, followed through nodes that are affine in it with factors that vary along its channel axis at most, as long as
    nothing else reads it and the other operands are final: they depend on no layer that is still to be re-fitted."""
    chain, name = [output], output
    while True:
        found = scene.only_reader(name)
        added = scene.additive.get(found[0].outputs[0]) if found else None
        if found is None or added is None or found[1] not in added.positions or not {*added.varies} <= {axis}:
            return chain
        node = found[0]
        others = [other for position, other in enumerate(node.inputs) if other and position != found[1]]
        if any(_depends(scene, other, pending) for other in others):
            return chain
        name = node.outputs[0]
        if scene.shapes.get(name, scene.shapes.get(output)) != scene.shapes.get(output):
            return chain
        chain.append(name)


def _depends(scene: Scene, name: str, pending: Collection[str]) -> bool:
    """Whether a tensor is computed from the output of a pending layer."""
    stack, seen = [name], {name}
    while stack:
        current = stack.pop()
        if current in pending:
            return True
        node = scene.by_output.get(current)
        for other in (*node.inputs, *node.captures) if node else ():
            if other and other not in seen and other not in scene.constants:
                seen.add(other)
                stack.append(other)
    return False
