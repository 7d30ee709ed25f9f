"""Slice every constant per use, and let attributes, shape constants and computed sizes follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .. import graph
from ..core.errors import ModelError
from ..core.types import Array, BoolArray, Branch, Channels, Coupling, Edit, InsertBefore, Node, Port, SetAttribute, SetInput
from ..coupling.cost import kept_masks, length, vanishing, without
from ..graph.edit import Editor
from ..graph.extract import segment, shape_program
from ..rules.channelwise import size_of
from ..rules.registry import Trait, has
from ..runtime import Optimize, open_model

Operands = dict[tuple[int, int], Array]
"""Values by index of the node and input position."""


def cut(prepared: graph.Prepared, coupling: Coupling, removed: BoolArray) -> graph.Model:
    """The model without the removed units.

    Args:
        removed: one flag per unit of ``coupling``.
    """
    editor = Editor(prepared.model)
    _slice_constants(editor, prepared, coupling, removed)
    operands, gathered = Operands(), dict[tuple[int, int], list[InsertBefore]]()
    vanished = vanishing(coupling, removed)
    dead = {name for branch in vanished for name in branch.dead}
    for follow in coupling.follows:
        node = prepared.nodes[follow.node]
        if dead and any(name in dead for name in (*node.inputs, *node.outputs)):
            continue  # without channels it has no sizes, and it goes
        after = _After(node, prepared, coupling, removed, follow.raw)
        if after.changed():
            for edit in follow.edits(after):
                if isinstance(edit, SetInput) and edit.value is not None and _is_computed(prepared, node, edit.position):
                    operands[node.index, edit.position] = edit.value
                elif isinstance(edit, InsertBefore) and edit.selects and _is_computed(prepared, node, edit.position):
                    gathered.setdefault((node.index, edit.position), []).append(edit)
                else:
                    _apply(editor, prepared, node, edit)
    following = _correct_computed(editor, prepared, coupling, removed, operands, gathered)
    for (index, position), edits in gathered.items():
        for edit in edits if (index, position) not in following else ():
            _apply(editor, prepared, prepared.nodes[index], edit)
    for branch in vanished:
        for name, value in constant_ends(prepared, branch).items():
            for axis, mask in kept_masks(coupling.tensors.get(name, ()), removed).items():
                if value.shape[axis] > 1:
                    value = np.compress(mask, value, axis)
            editor.replace_tensor(name, value)
    sizes: dict[str, dict[int, int | None]] = {}
    for name, axes in _sizes(coupling, removed).items():  # what is merged with a dynamic dimension has none
        dynamic = prepared.trace.dynamic_axes.get(name, ())
        sizes[name] = {axis: None if axis in dynamic else size for axis, size in axes.items()}
    return graph.stamped(editor.finish(sizes))


def _is_computed(prepared: graph.Prepared, node: Node, position: int) -> bool:
    return position < len(node.inputs) and node.inputs[position] in prepared.trace.values


def _correct_computed(
    editor: Editor, prepared: graph.Prepared, coupling: Coupling, removed: BoolArray, wanted: Operands,
    gathered: Mapping[tuple[int, int], Sequence[InsertBefore]],
) -> set[tuple[int, int]]:  # fmt: skip
    """Give every operand that is computed from shapes its wanted value, or the one that it had. Returns those that were to be ``gathered``
    to the kept channels and have just these by themselves: their sizes are computed from what is cut."""
    following = set[tuple[int, int]]()
    shapes = dict(prepared.trace.shapes)
    for name, axes in _sizes(coupling, removed).items():
        shapes[name] = tuple(axes.get(axis, size) for axis, size in enumerate(shapes[name]))
    operands = computed_operands(prepared, coupling)
    computed = run_alone(prepared, (node.inputs[position] for node, position in operands), shapes)
    for node, position in operands:
        name, edits = node.inputs[position], gathered.get((node.index, position), ())
        value = np.asarray(wanted.get((node.index, position), prepared.trace.values[name])).astype(computed[name].dtype)
        taken = value
        for edit in edits:
            taken = np.take(taken, edit.constants[0], edit.attributes["axis"])
        if edits and np.array_equal(taken, computed[name]):
            following.add((node.index, position))
            continue
        fix = correction(value, computed[name], prepared.trace.dynamic_values[name])
        if fix is None:
            continue
        if isinstance(fix, tuple):
            tensor = editor.tensor(name)
            for op, factor in zip(("Mul", "Div"), fix, strict=True):
                if (factor != 1).any():
                    tensor = editor.insert_before(node.index, op, [tensor, editor.constant(f"{name}/{op}", factor)])
        else:
            tensor = editor.constant(name, fix)
        editor.set_input(node.index, position, tensor)
    return following


def _sizes(coupling: Coupling, removed: BoolArray) -> dict[str, dict[int, int]]:
    masks = ((name, kept_masks(channels, removed)) for name, channels in coupling.tensors.items())
    return {name: {axis: int(mask.sum()) for axis, mask in axes.items()} for name, axes in masks}


# ---- constants -------------------------------------------------------------------------------------------------------


def _slice_constants(editor: Editor, prepared: graph.Prepared, coupling: Coupling, removed: BoolArray) -> None:
    """Slice constants per use. Uses that stay equal share one initializer; the first variant keeps the name."""
    constants = graph.Constants(prepared.model)
    captured = {name for node in prepared.nodes for name in node.captures}
    outputs = {port.name for port in graph.outputs(prepared.model)}
    variants: dict[str, dict[tuple[tuple[int, tuple[int, ...], bytes], ...], list[tuple[int, int]]]] = {}
    for node in prepared.nodes:
        for position, name in enumerate(node.inputs):
            if name in constants:
                channels = coupling.constants.get((node.index, position), ())
                masks = kept_masks(channels, removed).items()
                blocked = sorted(masks, key=lambda item: -item[1].ndim)  # blocks are those of the whole first axis
                key = tuple((axis, mask.shape, mask.tobytes()) for axis, mask in blocked if not mask.all())
                variants.setdefault(name, {}).setdefault(key, []).append((node.index, position))
    for name, uses in variants.items():
        keeps_name = () if () in uses or name in captured or name in outputs else next(iter(uses))
        for key, places in uses.items():
            if key == ():
                continue
            array = constants[name]
            for axis, shape, mask in key:
                array = without(array, axis, np.frombuffer(mask, bool).reshape(shape))
            if key == keeps_name:
                editor.set_constant(name, array)
                continue
            tensor = editor.constant(name, array)
            for index, position in places:
                editor.set_input(index, position, tensor)


# ---- follows ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _After:
    """Sizes around one node after the cut (`core.types.After`); ``raw``: before removed channels are put back."""

    node: Node
    prepared: graph.Prepared
    coupling: Coupling
    removed: BoolArray
    raw: bool

    def _channels(self, name: str, position: int | None) -> Channels:
        """Those of an output, or of the input at a position."""
        tensors = self.coupling.tensors.get(name, ())
        if position is None:
            return tensors
        carried = self.coupling.constants.get((self.node.index, position), tensors)
        return tuple(one for one in carried if self.raw or (self.node.index, position, one.axis) not in self.coupling.expanded)

    def _shape(self, name: str, position: int | None = None) -> tuple[int, ...]:
        shape = list(self.prepared.trace.shapes[name])
        for axis, mask in kept_masks(self._channels(name, position), self.removed).items():
            shape[axis] = length(mask)
        return tuple(shape)

    def _keep(self, name: str, axis: int, position: int | None = None) -> BoolArray:
        shape = self.prepared.trace.shapes[name]
        mask = kept_masks(self._channels(name, position), self.removed).get(axis % len(shape))
        return np.ones(shape[axis], bool) if mask is None else mask

    def input_shape(self, position: int) -> tuple[int, ...]:
        return self._shape(self.node.inputs[position], position)

    def output_shape(self, position: int) -> tuple[int, ...]:
        return self._shape(self.node.outputs[position])

    def input_keep(self, position: int, axis: int) -> BoolArray:
        return self._keep(self.node.inputs[position], axis, position)

    def output_keep(self, position: int, axis: int) -> BoolArray:
        return self._keep(self.node.outputs[position], axis)

    def changed(self) -> bool:
        """Whether any tensor of the node loses channels."""
        channels = [self._channels(name, position) for position, name in enumerate(self.node.inputs) if name]
        channels += [self._channels(name, None) for name in self.node.outputs if name]
        return not all(mask.all() for item in channels for mask in kept_masks(item, self.removed).values())


def _apply(editor: Editor, prepared: graph.Prepared, node: Node, edit: Edit) -> None:
    if isinstance(edit, SetAttribute):
        editor.set_attribute(node.index, edit.name, edit.value)
    elif isinstance(edit, SetInput):
        name = node.inputs[edit.position] if edit.position < len(node.inputs) else f"{node.name}/input{edit.position}"
        editor.set_input(node.index, edit.position, None if edit.value is None else editor.constant(name, edit.value))
    elif isinstance(edit, InsertBefore):
        name = node.inputs[edit.position]
        operands = [editor.input(node.index, edit.position), *(editor.constant(f"{name}/{edit.op}", array) for array in edit.constants)]
        editor.set_input(node.index, edit.position, editor.insert_before(node.index, edit.op, operands, edit.attributes))
    else:
        name = node.outputs[edit.output]
        dtype = prepared.types.get(name) or np.float32
        arrays = [array.astype(dtype) if array.dtype.kind == "f" else array for array in edit.constants]
        operands = [editor.constant(f"{name}/{edit.op}", array) for array in arrays]
        editor.insert_after(editor.tensor(name), edit.op, operands, **edit.attributes)


# ---- what is left of a branch without channels -----------------------------------------------------------------------


def constant_ends(prepared: graph.Prepared, branch: Branch) -> dict[str, Array]:
    """Values of the branch's ends, of size 1 along every axis on which they are constant, for sources that are zero.

    Raises:
        ModelError: they depend on the batch (an internal error).
    """
    types, shapes = prepared.types, prepared.trace.shapes
    dtypes = {name: np.dtype(types.get(name) or np.float32) for name in (*branch.sources, *branch.ends)}
    inputs = [Port(name, dtypes[name], shapes[name]) for name in branch.sources]
    part = segment(prepared.model, inputs, {name: dtypes[name] for name in branch.ends})
    session = open_model(part, Optimize.NONE)
    read = {port.name for port in graph.inputs(part)}
    zeros = {name: np.zeros(shapes[name], dtypes[name]) for name in branch.sources if name in read}
    values = {}
    for name, value in zip(branch.ends, session.run(zeros, list(branch.ends)), strict=True):
        for axis in range(value.ndim):
            first = value.take([0], axis)
            if (value == first).all():
                value = first
            elif axis in prepared.trace.dynamic_axes.get(name, ()):
                raise ModelError(f"internal error: '{name}' of a vanishing branch varies along its dynamic axis {axis}. Please report it.")
        values[name] = value
    return values


# ---- shape operands that the graph computes from dynamic dimensions --------------------------------------------------


def computed_operands(prepared: graph.Prepared, coupling: Coupling) -> list[tuple[Node, int]]:
    """(node, input position) of every operand that is computed from shapes alone, where it leaves that computation: its reader
    depends on data, makes a tensor with channels (an initial state) or takes a part of a constant by it, which it shall go on to take (and
    what is made of that part, too). What channels have entered are no sizes."""
    values, free, whole = prepared.trace.values, prepared.trace.data_free, indices(prepared)
    held = graph.initializers(prepared.model).items()
    entered, parts = set(coupling.tensors), {name for name, (shape, dtype) in held if max(shape, default=1) > 1 and dtype.kind == "f"}
    operands = []
    for node in prepared.nodes:
        positions = range(len(node.inputs))
        reads = any(node.inputs[at] in entered or (node.index, at) in coupling.constants for at in positions)
        if reads and not has(node, Trait.SIZES):
            entered.update(node.outputs)
        leaves = any(name and (name not in free or name in entered) for name in node.outputs)
        part = not leaves and not parts.isdisjoint(node.inputs) and whole.isdisjoint(node.outputs)
        if leaves or part:
            operands += [(node, at) for at in positions if node.inputs[at] in values and node.inputs[at] not in {*entered, *parts}]
        parts.update(node.outputs if part else ())
    return operands


def indices(prepared: graph.Prepared) -> set[str]:
    """Integers that are computed from sizes alone."""
    trace = prepared.trace
    return {name for name, value in trace.values.items() if value.dtype.kind in "iub" and name in trace.data_free}


def run_alone(prepared: graph.Prepared, names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """Values of computed tensors if the tensors whose shape is asked for had these ``shapes``."""
    wanted = list(dict.fromkeys(names))
    if not wanted:
        return {}
    whole = indices(prepared)  # have the sizes that the program gives them
    asking = (node for node in prepared.nodes if has(node, Trait.SIZES) and node.inputs[0] not in whole)
    sizes = {node.outputs[0]: size_of(node, shapes[node.inputs[0]]) for node in asking if node.inputs[0] in shapes}
    program, feeds = shape_program(prepared, wanted, sizes)
    session = open_model(program, Optimize.NONE)
    return dict(zip(wanted, session.run(feeds, wanted), strict=True))


def correction(wanted: Array, computed: Array, dynamic: Array) -> tuple[Array, Array] | Array | None:
    """How to turn ``computed`` into ``wanted``, both as seen on the sample.

    None: it is right already. One array: a constant will do, since no element that stays computed is dynamic. Two arrays
    (a, b): a * computed / b, element by element, which holds for other sizes of the dynamic dimensions as well.
    """
    if np.array_equal(wanted, computed):
        return None
    if wanted.shape != computed.shape or not (dynamic & (wanted != -1)).any():
        return wanted
    if wanted.dtype.kind == "f":
        return np.where(computed == 0, 1, wanted / np.where(computed == 0, 1, computed)).astype(wanted.dtype), np.ones_like(wanted)
    if ((computed == 0) & (wanted != 0)).any():
        return wanted
    divisor = np.where(computed == 0, 1, np.gcd(wanted, computed))
    return wanted // divisor, np.where(computed == 0, 1, computed // divisor)
