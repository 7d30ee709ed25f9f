"""Physical removal: slice every constant, let sizes follow, drop what is dead."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import graph
from .graph import Model, Prepared
from .records import AxisUnits, BoolArray, Channels, Coupling, Edit, InsertBefore, Node, SetAttribute, SetInput
from .units import keep_mask


def cut(prepared: Prepared, coupling: Coupling, removed: BoolArray) -> Model:
    """The model without the removed units.

    Args:
        removed: one flag per unit of ``coupling``.
    """
    editor = graph.Editor(prepared.model)
    _slice_constants(editor, prepared, coupling, removed)
    for follow in coupling.follows:
        node = prepared.nodes[follow.node]
        after = _After(node, prepared, coupling, removed)
        if after.changed():
            for edit in follow.edits(after):
                _apply(editor, prepared, node, edit)
    return editor.finish(_sizes(coupling, removed))


def _sizes(coupling: Coupling, removed: BoolArray) -> dict[str, dict[int, int]]:
    return {
        name: {own.axis: int(keep_mask(own.units, removed).sum()) for own in channels}
        for name, channels in coupling.tensors.items()
    }


# ---- constants -------------------------------------------------------------------------------------------------------


def _slice_constants(editor: graph.Editor, prepared: Prepared, coupling: Coupling, removed: BoolArray) -> None:
    """Slice constants per use. Uses that stay equal share one initializer; the first variant keeps the name."""
    held = graph.initializers(prepared.model)
    captured = {name for node in prepared.nodes for name in node.captures}
    outputs = {port.name for port in graph.outputs(prepared.model)}
    variants: dict[str, dict[tuple[tuple[int, bytes], ...], list[tuple[int, int]]]] = {}
    for node in prepared.nodes:
        for position, name in enumerate(node.inputs):
            if name in held:
                masks = ((own.axis, keep_mask(own.units, removed)) for own in coupling.constants.get((node.index, position), ()))
                key = tuple((axis, mask.tobytes()) for axis, mask in masks if not mask.all())
                variants.setdefault(name, {}).setdefault(key, []).append((node.index, position))
    for name, uses in variants.items():
        if set(uses) == {()}:
            continue
        value = graph.constant(prepared.model, name)
        keeps_name = () if () in uses or name in captured or name in outputs else next(iter(uses))
        for key, places in uses.items():
            if key == ():
                continue
            array = value
            for axis, mask in key:
                array = np.compress(np.frombuffer(mask, bool), array, axis)
            if key == keeps_name:
                editor.set_constant(name, array)
                continue
            tensor = editor.constant(name, array)
            for index, position in places:
                editor.set_input(index, position, tensor)


# ---- follows ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _After:
    """Sizes around one node after the cut (records.After)."""

    node: Node
    prepared: Prepared
    coupling: Coupling
    removed: BoolArray

    def _channels(self, position: int | None, name: str) -> Channels:
        if position is not None and (self.node.index, position) in self.coupling.constants:
            return self.coupling.constants[self.node.index, position]
        return self.coupling.tensors.get(name, ())

    def _shape(self, name: str, channels: Channels) -> tuple[int, ...]:
        shape = list(self.prepared.trace.shapes[name])
        for own in channels:
            shape[own.axis] = int(keep_mask(own.units, self.removed).sum())
        return tuple(shape)

    def _keep(self, name: str, channels: Channels, axis: int) -> BoolArray:
        shape = self.prepared.trace.shapes[name]
        own = next((own for own in channels if own.axis == axis % len(shape)), None)
        return np.ones(shape[axis], bool) if own is None else keep_mask(own.units, self.removed)

    def input_shape(self, position: int) -> tuple[int, ...]:
        name = self.node.inputs[position]
        return self._shape(name, self._channels(position, name))

    def output_shape(self, position: int) -> tuple[int, ...]:
        name = self.node.outputs[position]
        return self._shape(name, self._channels(None, name))

    def input_keep(self, position: int, axis: int) -> BoolArray:
        name = self.node.inputs[position]
        return self._keep(name, self._channels(position, name), axis)

    def output_keep(self, position: int, axis: int) -> BoolArray:
        name = self.node.outputs[position]
        return self._keep(name, self._channels(None, name), axis)

    def changed(self) -> bool:
        """Whether any tensor of the node loses channels."""
        channels = [self._channels(position, name) for position, name in enumerate(self.node.inputs) if name]
        channels += [self._channels(None, name) for name in self.node.outputs if name]
        return any(_loses(own, self.removed) for item in channels for own in item)


def _loses(own: AxisUnits, removed: BoolArray) -> bool:
    return not bool(keep_mask(own.units, removed).all())


def _apply(editor: graph.Editor, prepared: Prepared, node: Node, edit: Edit) -> None:
    if isinstance(edit, SetAttribute):
        editor.set_attribute(node.index, edit.name, edit.value)
    elif isinstance(edit, SetInput):
        _set_input(editor, prepared, node, edit)
    elif isinstance(edit, InsertBefore):
        name = node.inputs[edit.position]
        operands = [editor.input(node.index, edit.position), *(editor.constant(f"{name}/{edit.op}", array) for array in edit.constants)]
        editor.set_input(node.index, edit.position, editor.insert_before(node.index, edit.op, operands))
    else:
        name = node.outputs[0]
        dtype = graph.tensor_types(prepared.model).get(name) or np.float32
        arrays = [array.astype(dtype) if array.dtype.kind == "f" else array for array in edit.constants]
        editor.insert_after(editor.tensor(name), edit.op, [editor.constant(f"{name}/{edit.op}", array) for array in arrays])


def _set_input(editor: graph.Editor, prepared: Prepared, node: Node, edit: SetInput) -> None:
    """Replace a shape operand. Elements that depend on dynamic dimensions and need no change are kept as they are computed."""
    name = node.inputs[edit.position] if edit.position < len(node.inputs) else ""
    if edit.value is None:
        editor.set_input(node.index, edit.position, None)
        return
    old = prepared.trace.values.get(name)
    dynamic = prepared.trace.dynamic_values.get(name)
    constant = editor.constant(name or f"{node.name}/input{edit.position}", edit.value)
    if old is None or dynamic is None or old.shape != edit.value.shape or not (dynamic & (old == edit.value)).any():
        editor.set_input(node.index, edit.position, constant)
        return
    computed = dynamic & (old == edit.value)
    mask = editor.constant(f"{name}/computed", computed)
    editor.set_input(node.index, edit.position, editor.insert_before(node.index, "Where", [mask, editor.tensor(name), constant]))
