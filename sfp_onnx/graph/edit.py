"""Editing models through onnx-graphsurgeon, keeping what its round trip would drop.

onnx-graphsurgeon holds the graph while it is edited (nodes, consumers, dead-node removal). Its export loses doc strings,
metadata, model version and domain, initializers that are also inputs, and quantisation annotations; `Editor.finish` carries
them over from the original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto, helper

from ..core.errors import ModelError
from ..core.types import Array
from . import ONNX_DOMAINS, Constants, Model, annotate, graphs, live, make_initializer, nodes, replace_items

gs.logger.G_LOGGER.severity = gs.logger.G_LOGGER.ERROR
EXPORTED_TYPES = ("tensor_type", "sequence_type", "sparse_tensor_type")


class Editor:
    """A copy of a model that can be changed; nodes are addressed by their index in the original."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.graph = gs.import_onnx(model.copied())
        self.nodes = list(self.graph.nodes)
        self._places = {id(node): index for index, node in enumerate(self.nodes)}
        self.tensors = self.graph.tensors()
        for tensor in self.tensors.values():
            if isinstance(tensor, gs.Variable) and tensor.type not in EXPORTED_TYPES:
                tensor.dtype = None  # it cannot be exported; `finish` carries the original over
        self.weights = dict(model.weights)
        self._after: dict[int, list[gs.Node]] = {}
        self._last: list[gs.Node] = []
        self._followed = set[str]()
        self._names = {*self.tensors, *(tensor.name for tensor in model.proto.graph.initializer)}
        self._outputs = {id(tensor) for tensor in self.graph.outputs}

    # ---- building ----------------------------------------------------------------------------------------------------

    def unique(self, name: str) -> str:
        """A name that nothing has yet, and that is taken with this."""
        candidate, number = name, 1
        while candidate in self._names:
            number += 1
            candidate = f"{name}_{number}"
        self._names.add(candidate)
        return candidate

    def constant(self, name: str, array: Array) -> Any:
        """A new constant tensor; the name gets a number if it is taken."""
        name = self.unique(name)
        tensor = make_initializer(name, np.asarray(array), self.weights)
        return gs.Constant(name, values=gs.ir.tensor.LazyValues(tensor), data_location=_location(tensor))

    def tensor(self, name: str) -> Any:
        """An existing tensor by name."""
        return self.tensors[name]

    def variable(self, name: str) -> Any:
        """A new tensor that nothing makes, to become an input of a part of the result (`extract.segment`)."""
        return gs.Variable(self.unique(name))

    def append(self, op: str, inputs: Sequence[Any], attributes: Mapping[str, Any] | None = None, name: str = "tap") -> Any:
        """Add a node at the end of the graph; returns its output tensor."""
        output = gs.Variable(self.unique(name))
        self._last.append(gs.Node(op, name=f"{output.name}/{op}", attrs=dict(attributes or {}), inputs=list(inputs), outputs=[output]))
        return output

    def mean(self, tensor: Any, rank: int, axes: Sequence[int], name: str) -> Any:
        """Append the mean over ``axes``, which are not kept unless they are all the spatial ones of N x C x ... .

        Those go through GlobalAveragePool, which onnxruntime runs in its blocked layout without converting the tensor back.
        """
        if not axes:
            return tensor
        if rank > 2 and list(axes) == list(range(2, rank)):
            return self.append("GlobalAveragePool", [tensor], name=name)
        if self.model.opset >= 18:
            return self.append("ReduceMean", [tensor, self.constant(f"{name}/axes", np.asarray(axes, np.int64))], {"keepdims": 0}, name)
        return self.append("ReduceMean", [tensor], {"keepdims": 0, "axes": list(axes)}, name)

    def put_last(self, node: Any) -> None:
        """Add a node behind all others."""
        self._last.append(node)

    def add_output(self, tensor: Any) -> str:
        """Make a tensor an output of the graph (once)."""
        if id(tensor) not in self._outputs:
            self._outputs.add(id(tensor))
            self.graph.outputs.append(tensor)
        return str(tensor.name)

    def insert_after(self, tensor: Any, op: str, operands: Sequence[Any] = (), first: int = 0, **attributes: Any) -> str:
        """Put a node between a tensor and all that read it: readers see ``op(*operands)`` with the tensor at place ``first``.
        Returns the name of what they read now."""
        output = gs.Variable(self.unique(f"{tensor.name}/{op}"))
        self._followed.add(str(tensor.name))
        _redirect(tensor, output)
        inputs = [*operands[:first], tensor, *operands[first:]]
        node = gs.Node(op, name=output.name, attrs=attributes, inputs=inputs, outputs=[output])
        producer = tensor.inputs[0] if tensor.inputs else None
        self._after.setdefault(self._places.get(id(producer), -1), []).insert(0, node)
        return str(output.name)

    def insert_before(self, node: int, op: str, inputs: Sequence[Any], attributes: Mapping[str, Any] | None = None) -> Any:
        """Put a new node right before a node of the original; returns its output tensor."""
        output = gs.Variable(self.unique(f"{self.nodes[node].outputs[0].name}/{op}"))
        fresh = gs.Node(op, name=output.name, attrs=dict(attributes or {}), inputs=list(inputs), outputs=[output])
        self._after.setdefault(node - 1, []).append(fresh)
        return output

    def put_first(self, op: str, inputs: Sequence[Any], attributes: Mapping[str, Any], name: str) -> Any:
        """Put a new node without a name of its own (names take room) in front of all others; returns its output tensor."""
        output = gs.Variable(self.unique(name))
        self._after.setdefault(-1, []).append(gs.Node(op, attrs=dict(attributes), inputs=list(inputs), outputs=[output]))
        return output

    # ---- changing ----------------------------------------------------------------------------------------------------

    def set_constant(self, name: str, array: Array) -> None:
        """Give an existing constant another value, for all that read it."""
        self.weights.pop(name, None)
        tensor = make_initializer(name, np.asarray(array), self.weights)
        self.tensors[name].values = gs.ir.tensor.LazyValues(tensor)
        self.tensors[name].data_location = _location(tensor)

    def input(self, node: int, position: int) -> Any:
        """What an input of a node is now."""
        return self.nodes[node].inputs[position]

    def set_input(self, node: int, position: int, tensor: Any | None) -> None:
        """Replace an input of a node, or leave it out."""
        inputs = list(self.nodes[node].inputs)
        inputs += [gs.Variable.empty() for _ in range(position + 1 - len(inputs))]
        inputs[position] = gs.Variable.empty() if tensor is None else tensor
        while inputs and inputs[-1].name == "":
            inputs.pop()
        self.nodes[node].inputs = inputs

    def set_operator(self, node: int, op: str, inputs: Sequence[Any]) -> None:
        """Make a node another operator without attributes; its outputs keep their names."""
        self.nodes[node].op = op
        self.nodes[node].attrs.clear()
        self.nodes[node].inputs = list(inputs)

    def set_attribute(self, node: int, name: str, value: Any) -> None:
        """Replace an attribute of a node (None removes it)."""
        if value is None:
            self.nodes[node].attrs.pop(name, None)
        else:
            self.nodes[node].attrs[name] = value

    def take_attributes(self, node: int) -> dict[str, Any]:
        """The attributes of a node, which it has no more."""
        taken = dict(self.nodes[node].attrs)
        self.nodes[node].attrs.clear()
        return taken

    def replace_tensor(self, name: str, array: Array, stored: Any = None) -> None:
        """Replace a computed tensor by a constant of the same name, for all its readers; ``stored``: by a cast of one of that type."""
        tensor = self.tensors[name]
        tensor.name = self.unique(f"{name}/computed")
        self._names.discard(name)
        if stored is None:
            _redirect(tensor, self.constant(name, array))
            return
        held, output = self.constant(f"{name}/stored", array.astype(stored)), self.variable(name)
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        self._after.setdefault(-1, []).append(gs.Node("Cast", name=output.name, attrs={"to": kind}, inputs=[held], outputs=[output]))
        _redirect(tensor, output)

    # ---- done --------------------------------------------------------------------------------------------------------

    def finish(self, sizes: Mapping[str, Mapping[int, int | None]] | None = None) -> Model:
        """The edited model without dead nodes. ``sizes`` gives new sizes per tensor and axis, for the recorded shapes (a tensor that a node
        was put behind may not have its new size yet: none is recorded)."""
        known = {name: dict.fromkeys(axes) if name in self._followed else axes for name, axes in (sizes or {}).items()}
        inner = (fresh for index, node in enumerate(self.nodes) for fresh in (node, *self._after.get(index, ())))
        self.graph.nodes[:] = [*self._after.get(-1, ()), *inner, *self._last]
        self.graph.cleanup(remove_unused_node_outputs=False, recurse_subgraphs=False, remove_unused_graph_inputs=False)
        try:
            proto = gs.export_onnx(self.graph, do_type_check=False)
        except Exception as error:  # sub-graphs with optional outputs, for one
            raise ModelError(f"{self.model.name}: onnx-graphsurgeon cannot write this graph: {type(error).__name__}: {error}") from error
        proto = _carry_over(self.model.proto, proto, known)
        held = {tensor.name for tensor in proto.graph.initializer}
        weights = {name: array for name, array in self.weights.items() if name in held}
        return replace(self.model, proto=proto, weights=weights, edited=True)


def without_dead(model: Model) -> Model:
    """The model without the nodes that no output needs, and what only they read; itself if there are none."""
    return Editor(model).finish() if len(live(model)) < len(model.proto.graph.node) else model


def with_full_weights(model: Model) -> Model:
    """The model with weights that are stored in 16 bits behind a Cast as what they are cast to."""
    editor, held = None, Constants(model)
    for node in nodes(model):
        if node.op == "Cast" and node.inputs[0] in held and held[node.inputs[0]].dtype.itemsize == 2:
            editor = editor or Editor(model)
            editor.replace_tensor(node.outputs[0], held[node.inputs[0]].astype(helper.tensor_dtype_to_np_dtype(node.attributes["to"])))
    return model if editor is None else editor.finish()


def _redirect(tensor: Any, target: Any) -> None:
    """Let all that read a tensor read another (onnx-graphsurgeon compares nodes by content: they are told apart by identity)."""
    for reader in {id(node): node for node in tensor.outputs}.values():
        reader.inputs = [target if item is tensor else item for item in reader.inputs]


def _location(tensor: TensorProto) -> int | None:
    return int(tensor.data_location) if tensor.HasField("data_location") else None


def _carry_over(old: ModelProto, new: ModelProto, sizes: Mapping[str, Mapping[int, int | None]]) -> ModelProto:
    """Restore from ``old`` whatever the round trip lost or changed beyond the edit."""
    result = ModelProto()
    result.CopyFrom(old)
    graph = result.graph
    for field in ("node", "initializer", "sparse_initializer", "input", "output", "value_info", "quantization_annotation"):
        graph.ClearField(field)
    domains = {item.domain for item in result.opset_import}
    result.opset_import.extend(item for item in new.opset_import if item.domain not in domains and item.domain not in ONNX_DOMAINS)
    _carry_nodes(old.graph, new.graph)
    _raise_constants(old.graph, new.graph)
    graph.node.extend(new.graph.node)
    graph.initializer.extend(new.graph.initializer)
    tensors = {tensor.name: tensor for tensor in old.graph.initializer}
    for tensor in graph.initializer:
        if tensor.name in tensors:
            annotate(tensor, tensors[tensor.name])
    graph.sparse_initializer.extend(new.graph.sparse_initializer)
    graph.input.extend(_inputs(old, new))
    originals = {item.name: item for item in old.graph.output}
    graph.output.extend(originals.get(item.name, item) for item in new.graph.output)
    held = {tensor.name: dict(enumerate(tensor.dims)) for tensor in graph.initializer}
    present = {name for node in graph.node for name in [*node.input, *node.output]}
    for item in old.graph.value_info:
        if item.name in present:
            graph.value_info.append(_resized(item, held.get(item.name, sizes.get(item.name, {}))))
    graph.quantization_annotation.extend(item for item in old.graph.quantization_annotation if item.tensor_name in present)
    return result


def _raise_constants(old: GraphProto, new: GraphProto) -> None:
    """Constants of the main graph that sub-graphs read were written into each of these; they stand in the main graph, once."""
    inner = {tensor.name for graph in [*graphs(old)][1:] for tensor in graph.initializer}
    held = {tensor.name for tensor in new.initializer}
    for graph in [*graphs(new)][1:]:
        moved = [tensor for tensor in graph.initializer if tensor.name not in inner]
        new.initializer.extend(tensor for tensor in moved if tensor.name not in held)
        held |= {tensor.name for tensor in moved}
        if moved:
            replace_items(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in inner])


def _carry_nodes(old: GraphProto, new: GraphProto) -> None:
    originals = {next(iter(filter(None, node.output)), ""): node for node in old.node}
    for node in new.node:
        original = originals.get(next(iter(filter(None, node.output)), ""))
        if original is not None:
            if original.doc_string:  # an empty one, once set, would take bytes
                node.doc_string = original.doc_string
            node.metadata_props.extend(original.metadata_props)
            if original.HasField("overload"):
                node.overload = original.overload


def _inputs(old: ModelProto, new: ModelProto) -> list[ValueInfoProto]:
    """Inputs in their old order; initializers that were inputs too stay so (IR versions under 4 demand it of all)."""
    initializers = {tensor.name: tensor for tensor in new.graph.initializer}
    inputs = []
    for item in old.graph.input:
        tensor = initializers.pop(item.name, None)
        if tensor is not None:
            inputs.append(_resized(item, dict(enumerate(tensor.dims))))
        elif item.name in {port.name for port in new.graph.input}:
            inputs.append(item)
    if old.ir_version < 4:
        inputs += [helper.make_tensor_value_info(name, item.data_type, item.dims) for name, item in initializers.items()]
    return inputs


def _resized(item: ValueInfoProto, sizes: Mapping[int, int | None]) -> ValueInfoProto:
    copy = ValueInfoProto()
    copy.CopyFrom(item)
    dims = copy.type.tensor_type.shape.dim
    for axis, size in sizes.items():
        if axis < len(dims) and size is None:
            dims[axis].Clear()
        elif axis < len(dims):
            dims[axis].dim_value = size
    return copy


# ---- projections in front of outputs ---------------------------------------------------------------------------------


def with_projections(model: Model, axes: Mapping[str, int], like: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> Model:
    """The model with an identity in front of some outputs (of the types ``like``), a MatMul over the last axis or a 1 x 1 convolution over
    axis 1: channels in front of it may leave, and what is left of it can be fitted to give the output all its channels."""
    editor = Editor(model)
    for name, axis in axes.items():
        rank, identity, inner = len(shapes[name]), np.eye(shapes[name][axis], dtype=like[name]), editor.tensor(name)
        inner.name = editor.unique(f"{name}/kept")
        output = gs.Variable(name, inner.dtype, inner.shape)
        over_last = axis == rank - 1
        weight = editor.constant(f"{name}/projection", identity if over_last else identity.reshape(*identity.shape, *[1] * (rank - 2)))
        editor.put_last(gs.Node("MatMul" if over_last else "Conv", f"{name}/projection", inputs=[inner, weight], outputs=[output]))
        editor.graph.outputs = [output if item is inner else item for item in editor.graph.outputs]
    return editor.finish()


def without_projections(model: Model, names: Iterable[str]) -> Model:
    """The model in which those of these projections that are still square do nothing."""
    editor, constants = Editor(model), Constants(model)
    for index, node in enumerate(editor.nodes):
        if node.outputs[0].name in names and len(weight := constants[node.inputs[1].name]) == weight.shape[1]:
            editor.set_operator(index, "Identity", node.inputs[:1])
    return editor.finish()


# ---- putting a 0/1 mask behind a tensor ------------------------------------------------------------------------------

FIRST_WHERE = 9  # opset
WITH_WHERE = ("float32", "float64", "int32", "int64")  # other types have no Where in onnxruntime
QUANTIZED = ("int4", "uint4", "int8", "uint8", "int16", "uint16")


def insert_mask(
    editor: Editor, name: str, dtype: np.dtype[Any], mask: Callable[[Any], Any], zero: Array | str | None = None, select: bool = False
) -> None:
    """Let all readers of tensor ``name`` see 0 (in a quantised tensor: its zero point) where a mask is 0.

    Args:
        dtype: type of the tensor.
        mask: gives the operand for the mask in the type asked for (bool, or ``dtype``).
        zero: zero point of a quantised tensor (see `zero_of`).
        select: zero even what is infinite or NaN, where onnxruntime can (slower than a product).
    """
    tensor = editor.tensor(name)
    if isinstance(zero, np.ndarray):  # through int32: not every onnxruntime has a Where for int8
        point = editor.constant(f"{name}/zero", zero)
        editor.insert_after(tensor, "Cast", to=dtype.type)
        editor.insert_after(tensor, "Where", [mask(bool), point], first=1)
        editor.insert_after(tensor, "Cast", to=np.int32)
    elif zero is not None:
        editor.insert_after(tensor, "Where", [mask(bool), editor.tensor(zero)], first=1)
    elif not select or editor.model.opset < FIRST_WHERE or dtype.name not in WITH_WHERE:
        editor.insert_after(tensor, "And" if dtype.kind == "b" else "Mul", [mask(dtype)])
    else:
        editor.insert_after(tensor, "Where", [mask(bool), editor.constant(f"{name}/zero", np.zeros((), dtype))], first=1)


def zero_of(constants: Constants, zero_point: str | None, shape: Sequence[int]) -> Array | str | None:
    """The zero point of a quantised tensor: its value in int32 where it is a constant (one per channel takes ``shape``), else its name."""
    if zero_point is None or zero_point not in constants:
        return zero_point
    value = constants[zero_point].astype(np.int32)
    if value.size == np.prod(shape):
        return value.reshape(shape)
    return np.asarray(value.flat[0] if np.ptp(value) == 0 else value)
