"""Which layers are re-fitted, in which order, and what each aims at."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from types import MappingProxyType

import numpy as np

from ..core.types import Additive, Array, BoolArray, Coupling, Factor, Layer, Node
from ..coupling.cost import keep_mask, vanishing
from ..graph import Constants, GraphIndex, Initializer, Model, edit, initializers, nodes, outputs
from ..rules.registry import Trait, has
from ..rules.scales import Around, around, coded
from .walk import End, Held, Step, Task


def tainted(original: Sequence[Node], coupling: Coupling, removed: BoolArray, masked: Collection[str]) -> set[str]:
    """Tensors of the original whose kept channels may differ in the changed model: behind nodes that read a masked weight or a removed
    channel. What works channel by channel (BatchNormalization, Relu) passes removed channels on without mixing them with others."""
    gone: dict[str, set[int]] = {}
    for name, channels in coupling.tensors.items():
        gone[name] = {unit for carried in channels for unit in carried.units[~keep_mask(carried.units, removed)].tolist()}
    changed: set[str] = set()
    for node in original:
        passed = gone.get(node.outputs[0], set()) if has(node, Trait.SPREADS) else set()
        if any(name in changed or name in masked or not gone.get(name, passed) <= passed for name in node.reads):
            changed.update(node.outputs)
    return changed


@dataclass(frozen=True)
class Scene:
    """The changed model beside what is known of the original; ``added`` are nodes that the original does not have, by output."""

    model: Model
    coupling: Coupling
    original: Sequence[Node]
    shapes: Mapping[str, tuple[int, ...]]
    added: Mapping[str, Additive] = field(default_factory=dict)

    @cached_property
    def index(self) -> GraphIndex:
        """Who makes and who reads the tensors of the changed model."""
        return GraphIndex(nodes(self.model))

    @cached_property
    def constants(self) -> Mapping[str, Initializer]:
        """Shape and dtype of its initializers."""
        return initializers(self.model)

    @cached_property
    def values(self) -> Mapping[str, Array]:
        """Values of its initializers."""
        return Constants(self.model)

    @cached_property
    def additive(self) -> Mapping[str, Additive]:
        """What is known of nodes that are affine in an input, by output."""
        known = {self.original[index].outputs[0]: additive for index, additive in self.coupling.additive.items()}
        return {**known, **self.added}

    @cached_property
    def outputs(self) -> frozenset[str]:
        """Names of its outputs."""
        return frozenset(port.name for port in outputs(self.model))

    @cached_property
    def layers(self) -> Mapping[str, Layer]:
        """The layers, by their first output."""
        return {layer.node.outputs[0]: layer for layer in self.coupling.layers}

    def node(self, layer: Layer) -> Node:
        """A layer as it is in the changed model."""
        return self.index.makers[layer.node.outputs[0]]

    def around(self, layer: Layer) -> Around | None:
        """The floats around a layer that multiplies integers."""
        node = self.index.maker(layer.node.outputs[0])
        return around(node, self.index, self.constants) if node else None

    def data(self, layer: Layer) -> str:
        """What a layer reads in the changed model: a rewritten normalisation leaves its own output to a slice of it."""
        floats = self.around(layer)
        return floats.data if floats else self.node(layer).inputs[layer.data]

    def made(self, layer: Layer) -> str:
        """What a layer makes: its weight times what it reads."""
        floats = self.around(layer)
        return floats.output if floats else layer.node.outputs[0]

    def held(self, name: str) -> Held | None:
        """A constant that can be given another value: an initializer, or one that only this tensor is dequantised or cast from."""
        if name in self.constants:
            return Held(name, self.constants[name].shape)
        known = coded(name, self.index, self.constants)
        if known is None or len(self.index.readers(known.values)) > 1:
            return None
        shape = self.constants[known.values].shape
        if not known.scale:
            return Held(known.values, shape, cast=True)
        return Held(known.values, shape, known.scale, known.zero_point, known.axis, len(self.index.readers(known.scale)) == 1)

    def only_reader(self, name: str) -> tuple[Node, int] | None:
        """The one node that reads a tensor which is no output of the model."""
        readers = self.index.readers(name)
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def weight(self, layer: Layer) -> Held | None:
        """The weight of a layer that is linear in it, where it can be given another value."""
        node = self.index.maker(layer.node.outputs[0])
        if node is None or layer.linear is None or layer.weight is None:
            return None
        name, floats = node.inputs[layer.weight.position], self.around(layer)
        if floats is None:
            return None if self.constants.get(name, FLOATING).dtype.kind in "iu" else self.held(name)
        if name not in self.constants:
            return None
        shape, axis, alone = self.constants[name].shape, layer.weight.out_axis, len(self.index.readers(floats.scale)) == 1
        fits = prod(self.constants[floats.scale].shape) in (1, shape[axis])
        return Held(name, shape, floats.scale, floats.zero_point, axis, alone) if fits else None


FLOATING = Initializer((), np.dtype(np.float32))
GIVEN = "/bias"  # part of the name of a bias that a repair gives
BIAS = Additive((0,), 1)  # a node that adds one to what a layer makes


@dataclass(frozen=True)
class BiasPlace:
    """Where the bias of a layer is or can be: an input of ``node``, which is the layer itself (``inside``) or adds it behind."""

    node: Node
    position: int
    inside: bool

    @property
    def name(self) -> str:
        """The tensor that is there; empty if there is none."""
        return self.node.inputs[self.position] if self.position < len(self.node.inputs) else ""


def bias_place(scene: Scene, layer: Layer) -> BiasPlace | None:
    """The place of a layer's bias; None if there is none yet."""
    assert layer.linear is not None
    node = scene.node(layer)
    if layer.linear.bias is not None and layer.linear.bias_scale:
        return BiasPlace(node, layer.linear.bias, True)
    reader = scene.only_reader(scene.made(layer))
    added = scene.additive.get(reader[0].outputs[0]) if reader else None
    if reader is None or added is None or added.shift is None or reader[0].inputs[added.shift] not in scene.constants:
        return None
    return BiasPlace(reader[0], added.shift, False)


def give_biases(scene: Scene, layers: Sequence[Layer]) -> Scene:
    """The model in which each of these layers has a bias of its own: shared ones are copied, missing ones are created as zeros."""
    editor, added = edit.Editor(scene.model), {}
    for layer in layers:
        node, place = scene.node(layer), bias_place(scene, layer)
        if place is not None and place.name:
            if place.name in scene.constants and len(scene.index.readers(place.name)) > 1:
                editor.set_input(place.node.index, place.position, editor.constant(place.name, scene.values[place.name]))
        elif place is not None:
            editor.set_input(node.index, place.position, editor.constant(node.name + GIVEN, _zeros(scene, layer, 1)))
        elif scene.only_reader(made := scene.made(layer)):
            zeros = editor.constant(node.name + GIVEN, _zeros(scene, layer, len(scene.shapes[made])))
            added[editor.insert_after(editor.tensor(made), "Add", [zeros], first=0)] = BIAS
    return Scene(editor.finish(), scene.coupling, scene.original, scene.shapes, {**scene.added, **added})


def given_before(model: Model, original: Sequence[Node]) -> dict[str, Additive]:
    """The nodes of a changed model that add biases which an earlier repair gave it, by output."""
    known = {name for node in original for name in node.outputs}
    fresh = (node for node in nodes(model) if known.isdisjoint(node.outputs) and len(node.inputs) == 2)
    return {node.outputs[0]: BIAS for node in fresh if GIVEN in node.inputs[1] and node.inputs[1] in initializers(model)}


def _zeros(scene: Scene, layer: Layer, rank: int) -> Array:
    """A zero bias, shaped to be added to a tensor of ``rank`` (1: the vector that the operator takes)."""
    weight = scene.weight(layer)
    assert layer.linear is not None and weight is not None
    dtype = np.float32 if weight.cast else scene.constants[weight.scale or weight.name].dtype
    return np.zeros((_width(scene, layer), *[1] * (rank - 1 - layer.linear.form.out_axis if rank > 1 else 0)), dtype)


def _width(scene: Scene, layer: Layer) -> int:
    """Output channels."""
    weight = scene.weight(layer)
    assert layer.weight is not None and weight is not None
    return weight.shape[layer.weight.out_axis] * (layer.groups(scene.node(layer)) if layer.weight.out_axis else 1)


def candidates(scene: Scene, affected: Collection[str], changed: Collection[str]) -> tuple[list[list[Layer]], list[str]]:
    """Layers that can be re-fitted and have a reason to: they read something that may have changed, or their weight was.

    Returns:
        The layers in topological order, those that share a weight together; and the names of layers that have a reason but cannot be:
        recurrent and integer ones, weights that are computed or that something else reads too.
    """
    users: dict[str, list[Layer]] = {}
    left = []
    for layer in scene.coupling.layers:
        node = scene.index.maker(layer.node.outputs[0])
        if node is None or layer.weight is None or layer.weight.position >= len(node.inputs):  # it vanished, or does nothing any more
            continue
        if scene.weight(layer) and _adds_a_vector(scene, layer):
            users.setdefault(node.inputs[layer.weight.position], []).append(layer)
        elif layer.node.outputs[0] in affected:
            left.append(layer.node.name)
    tasks = []
    for weight, layers in users.items():
        if weight not in changed and not any(layer.node.outputs[0] in affected for layer in layers):
            continue
        if len(layers) == len(scene.index.readers(weight)) and _alike(scene, layers):
            tasks.append(layers)
        else:
            left += [layer.node.name for layer in layers]
    ordered = _ordered(scene, sorted(tasks, key=lambda layers: scene.node(layers[0]).index))
    taken = {id(layer) for sharing in ordered for layer in sharing}
    left += [layer.node.name for sharing in tasks for layer in sharing if id(layer) not in taken]
    return ordered, list(dict.fromkeys(left))


def _alike(scene: Scene, layers: Sequence[Layer]) -> bool:
    """Whether layers read their common weight as the same matrix."""
    uses = [(type(layer.linear.form), layer.weight, layer.groups(scene.node(layer))) for layer in layers if layer.linear]
    return len(set(uses)) == 1


def _ordered(scene: Scene, tasks: Sequence[list[Layer]]) -> list[list[Layer]]:
    """Tasks after those that they read from. Layers that share a weight and feed each other, however indirectly, are left out."""
    owner = {layer.node.outputs[0]: number for number, layers in enumerate(tasks) for layer in layers}
    needs = [set().union(*(_sources(scene, layer, owner) for layer in layers)) for layers in tasks]
    waiting = [number for number in range(len(tasks)) if len(tasks[number]) == 1 or number not in needs[number]]
    done = set(range(len(tasks))) - set(waiting)
    ordered = []
    while waiting:
        ready = next((number for number in waiting if needs[number] <= done), None)
        if ready is None:  # a circle, which must hold a shared weight
            done.add(next(number for number in waiting if len(tasks[number]) > 1))
        else:
            ordered.append(tasks[ready])
            done.add(ready)
        waiting = [number for number in waiting if number not in done]
    return ordered


def _sources(scene: Scene, layer: Layer, owner: Mapping[str, int]) -> set[int]:
    """Tasks that make what a layer reads, without those in front of them."""
    data = scene.data(layer)
    between = scene.index.needed([data], owner)
    return {owner[name] for name in (data, *(name for node in between for name in node.reads)) if name in owner}


def ends(scene: Scene, removed: BoolArray) -> list[str]:
    """Constants that stand for vanished branches, and are read once."""
    names = [name for branch in vanishing(scene.coupling, removed) for name in branch.ends]
    return [name for name in names if name in scene.constants and scene.only_reader(name) is not None]


def plan_steps(
    scene: Scene, tasks: Sequence[Sequence[Layer]], masks: Mapping[str, BoolArray], ended: Sequence[str] = (),
    factors: Mapping[str, Factor] = MappingProxyType({}),
) -> list[Task]:  # fmt: skip
    """What is to be fitted in topological order, each with its target. ``ended``: constants that stand for branches; each is fitted as soon
    as what it meets is final. ``masks`` and ``factors`` tell, by initializer, what weights are bound to."""
    pending = {layer.node.outputs[0] for layers in tasks for layer in layers}
    waiting = list(ended)
    planned: list[Task] = []

    def meet() -> None:
        for name in list(waiting):
            reader = scene.only_reader(name)
            if reader is not None and not _depends(scene, [other for other in reader[0].inputs if other != name], pending):
                waiting.remove(name)
                planned.extend(_end(scene, name, pending))

    for layers in tasks:
        meet()
        steps = tuple(_step(scene, layer, pending, masks, factors) for layer in layers)
        planned.append(steps)
        pending -= {layer.node.outputs[0] for layer in layers}
    meet()
    return planned


def _step(scene: Scene, layer: Layer, pending: Collection[str], masks: Mapping[str, BoolArray], factors: Mapping[str, Factor]) -> Step:
    node, weight, place = scene.node(layer), scene.weight(layer), bias_place(scene, layer)
    assert layer.weight is not None and layer.linear is not None and weight is not None
    bias = scene.held(place.name) if place else None
    if place is None or bias is None or not _is_vector(scene, layer, place, bias) or len(scene.index.readers(place.name)) > 1:
        bias = None
    made = scene.made(layer)
    target, reference = _target(scene, made, layer.linear.form.out_axis, pending)
    inside, name = place is None or place.inside, node.inputs[layer.weight.position]
    bound = masks.get(name), factors.get(name), _read_alone(scene, made)
    return Step(node.name, made, target, reference, layer.linear, scene.data(layer), weight, bias, inside, *bound)


def _read_alone(scene: Scene, name: str) -> bool:
    """Whether the next layers behind a tensor, or some of them, are convolutions of one channel each."""
    met, waiting = {name}, [name]
    while waiting:
        for node in scene.index.reading(waiting.pop()):
            layer = scene.layers.get(node.outputs[0])
            if layer is None:
                waiting += sorted({output for output in node.outputs if output} - met)
                met.update(node.outputs)
            elif layer.weight is not None and layer.weight.in_axis == layer.weight.out_axis:
                return True
    return False


def _end(scene: Scene, name: str, pending: Collection[str]) -> list[End]:
    """A constant's aim; none if it varies along several axes or nothing behind it is affine in it."""
    varying = [axis for axis, size in enumerate(scene.constants[name].shape) if size > 1]
    if len(varying) > 1 or len(scene.constants[name].shape) != len(scene.shapes[name]):
        return []
    axis = varying[0] if varying else 1
    target, reference = _target(scene, name, axis, pending)
    return [End(f"{name} (constant of a vanished branch)", name, target, reference, axis)] if target != name else []


def _adds_a_vector(scene: Scene, layer: Layer) -> bool:
    """Whether a layer adds one value per output channel, or nothing; what else it may add (a scalar, a map, an activation) is unknown
    to its linear form."""
    place = bias_place(scene, layer)
    if place is None or not place.inside or not place.name:
        return True
    held = scene.held(place.name)
    return held is not None and _is_vector(scene, layer, place, held)


def _is_vector(scene: Scene, layer: Layer, place: BiasPlace, bias: Held) -> bool:
    """Whether a constant that is added to the output holds one value per output channel of the layer."""
    assert layer.linear is not None
    width, shape = _width(scene, layer), bias.shape
    if place.inside and len(shape) == 1:
        return shape[0] == width
    axis = layer.linear.form.out_axis - len(scene.shapes[layer.node.outputs[0]])  # from the end, where broadcasting aligns
    return len(shape) >= -axis and shape[axis] == width == int(np.prod(shape))


def _target(scene: Scene, output: str, axis: int, pending: Collection[str]) -> tuple[str, str]:
    """An output, followed through nodes that are affine in it with factors that vary along its channel axis at most, as long as
    nothing else reads it and the other operands are final: they depend on no layer that is still to be re-fitted. And the last tensor on
    this way that the original has."""
    target, reference, shape = output, output, scene.shapes.get(output)
    while True:
        reader = scene.only_reader(target)
        added = scene.additive.get(reader[0].outputs[0]) if reader else None
        if reader is None or added is None or reader[1] not in added.positions or not {*added.varies} <= {axis}:
            return target, reference
        name, others = reader[0].outputs[0], [other for position, other in enumerate(reader[0].inputs) if position != reader[1]]
        if scene.shapes.get(name, shape) != shape or _depends(scene, others, pending):
            return target, reference
        target, reference = name, reference if name in scene.added else name


def _depends(scene: Scene, names: Sequence[str], pending: Collection[str]) -> bool:
    """Whether any of these tensors is computed from the output of a pending layer."""
    return any(node.outputs[0] in pending for node in scene.index.needed(names))
