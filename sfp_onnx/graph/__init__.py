"""The only door to onnx and onnx-graphsurgeon: the loaded model, a protobuf with stubs and the large weights beside it. So every copy
and every edit of the graph is cheap, whatever the size of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import onnx
from onnx import checker, helper, numpy_helper, shape_inference

from ..core.errors import ModelError
from ..core.system import version_of
from ..core.types import Array, Node, Port, Shown, Tokens, Trace

# Tensors up to this size stay in the protobuf: shape constants must be visible to onnxruntime's and onnx's inference.
INLINE_BYTES = 1024
INLINE_VECTOR_BYTES = 1 << 16  # of integers, which may be sizes

STUB_LOCATION = "weights-held-in-memory"

ONNX_DOMAINS = ("", "ai.onnx")
FLOATING = tuple(onnx.TensorProto.DataType.Value(name) for name in ("FLOAT", "FLOAT16", "DOUBLE", "BFLOAT16"))


@dataclass(frozen=True, repr=False)
class Model(Shown):
    """A loaded model. ``proto`` has no local functions and no Constant nodes; ``weights`` holds tensors over 1 KiB by name;
    ``source`` is the file, ``files`` those with its external data, ``sha256`` the hash of all of them;
    ``edited`` says that the model is no longer what these files hold; ``complaint`` is what onnx.checker said of the original,
    if it does not know or no longer allows an operator (onnxruntime may run it all the same); ``libraries`` hold custom operators.
    ``lazy``: first outputs of nodes that choose between branches of which one must not run where the other one is taken;
    ``conditions``: what chooses between branches that were flattened, and is computed in each run, whatever some runs gave."""

    proto: onnx.ModelProto
    weights: Mapping[str, Array]
    sha256: str
    source: Path | None = None
    files: tuple[Path, ...] = ()
    edited: bool = False
    complaint: str = ""
    libraries: tuple[str, ...] = ()
    lazy: frozenset[str] = frozenset()
    conditions: frozenset[str] = frozenset()

    def summary(self) -> str:
        """Its name, opset, number of nodes, inputs and outputs."""
        ports = [", ".join(f"{port.name} {list(port.shape or ())}" for port in ends(self)) for ends in (inputs, outputs)]
        return f"{self.name}, opset {self.opset}, {len(self.proto.graph.node)} nodes, {ports[0]} -> {ports[1]}"

    @property
    def opset(self) -> int:
        """Version of ONNX's own operator set."""
        return next((item.version for item in self.proto.opset_import if item.domain in ONNX_DOMAINS), 1)

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files that the model was read from."""
        return (self.source, *self.files) if self.source else ()

    @property
    def name(self) -> str:
        """What messages call the model."""
        return str(self.source) if self.source else "the model"

    def copied(self) -> onnx.ModelProto:
        """A copy of the protobuf, which may be changed."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        return proto


VERSION, SOURCE, FIRST = "sfp_onnx.version", "sfp_onnx.source_sha256", "sfp_onnx.first_source_sha256"


def stamped(model: Model) -> Model:
    """A changed model whose metadata say what made it, and of which file (and of which file that was made, if it was made so itself)."""
    proto = model.copied()
    known = {item.key: item.value for item in proto.metadata_props}
    if SOURCE in known and known[SOURCE] != model.sha256:
        known.setdefault(FIRST, known[SOURCE])
    helper.set_model_props(proto, {**known, VERSION: version_of("sfp_onnx"), SOURCE: model.sha256})
    return replace(model, proto=proto, edited=True)


def same_node(one: Node, other: Node) -> bool:
    """Whether two nodes are one operator with the same attributes that reads tensors of the same names."""
    if (one.operator, one.reads, set(one.attributes)) != (other.operator, other.reads, set(other.attributes)):
        return False
    return all(np.array_equal(value, other.attributes[name]) for name, value in one.attributes.items())


CAPTURED = -1
"""The position at which a sub-graph of a node reads an outer tensor."""


@dataclass(frozen=True)
class GraphIndex:
    """Makers and readers of all tensors of ``nodes``; built in linear time, and only when they are asked for."""

    nodes: Sequence[Node]

    @cached_property
    def makers(self) -> Mapping[str, Node]:
        """The node that makes each tensor; inputs and constants have none."""
        return {name: node for node in self.nodes for name in node.outputs if name}

    @cached_property
    def _readers(self) -> Mapping[str, list[tuple[Node, int]]]:
        readers: dict[str, list[tuple[Node, int]]] = {}
        for node in self.nodes:
            for place in (*enumerate(node.inputs), *((CAPTURED, name) for name in node.captures)):
                if place[1]:
                    readers.setdefault(place[1], []).append((node, place[0]))
        return readers

    def maker(self, name: str) -> Node | None:
        """The node that makes a tensor."""
        return self.makers.get(name)

    def readers(self, name: str) -> Sequence[tuple[Node, int]]:
        """(node, input position) of everything that reads a tensor, in the order of the nodes; sub-graphs at position `CAPTURED`."""
        return self._readers.get(name, ())

    def operands(self, name: str) -> list[tuple[Node, int]]:
        """The readers of a tensor without sub-graphs."""
        return [(node, position) for node, position in self.readers(name) if position != CAPTURED]

    def reading(self, name: str) -> list[Node]:
        """The nodes that read a tensor, each once."""
        return list({node.index: node for node, _ in self.readers(name)}.values())

    def needed(self, outputs: Iterable[str], stop: Container[str] = ()) -> list[Node]:
        """The nodes, in their order, that compute ``outputs``, as far up as the tensors of ``stop``, which are given."""
        makers = self.makers
        return _met(outputs, lambda name: [makers[name]] if name in makers and name not in stop else (), lambda node: node.reads)

    def reached(self, names: Iterable[str]) -> list[Node]:
        """The nodes, in their order, that depend on any of these tensors."""
        return _met(names, self.reading, lambda node: node.outputs)


def _met(names: Iterable[str], beside: Callable[[str], Iterable[Node]], onward: Callable[[Node], Iterable[str]]) -> list[Node]:
    """The nodes, in their order, that are met on a walk from tensors to the nodes beside them, and onward to other tensors."""
    met: dict[int, Node] = {}
    waiting = list(names)
    while waiting:
        for node in beside(waiting.pop()):
            if node.index not in met:
                met[node.index] = node
                waiting += onward(node)
    return [met[index] for index in sorted(met)]


@dataclass(frozen=True)
class Prepared:
    """A model with constants folded, its nodes, the trace, the sample inputs it was traced on, other inputs with which the
    dynamic dimensions differ (None: there are none, or no other sizes run), and the inferred types (see `tensor_types`); ``base`` is
    the loaded model, in which what its declared shapes decide is decided; ``tokens``: rows that an input switches off (None: not known).
    ``nest`` is the model as it was each time before branches were flattened, the last first: as these all that is written is `nested`."""

    model: Model
    nodes: tuple[Node, ...]
    trace: Trace
    feeds: Mapping[str, Array]
    variant: Mapping[str, Array] | None = None
    types: Mapping[str, Any] = field(default_factory=dict)
    base: Model | None = None
    tokens: Tokens | None = None
    nest: tuple[Model, ...] = ()

    @cached_property
    def held(self) -> frozenset[str]:
        """Names of the initializers."""
        return frozenset(tensor.name for tensor in self.model.proto.graph.initializer)

    @cached_property
    def known(self) -> Trace:
        """The trace, with the constants of the model among its values."""
        return replace(self.trace, values={**Constants(self.model), **self.trace.values})

    @cached_property
    def index(self) -> GraphIndex:
        """Who makes and who reads the tensors."""
        return GraphIndex(self.nodes)


def annotate(tensor: onnx.TensorProto, like: onnx.TensorProto) -> None:
    """Give a tensor the doc string and metadata of another."""
    if like.doc_string:
        tensor.doc_string = like.doc_string
    del tensor.metadata_props[:]
    tensor.metadata_props.extend(like.metadata_props)


def set_value(tensor: onnx.TensorProto, array: Array) -> None:
    """Give an initializer another value, inline; its name, doc string and metadata stay."""
    fresh = numpy_helper.from_array(np.asarray(array, order="C"), tensor.name)
    annotate(fresh, tensor)
    tensor.CopyFrom(fresh)


def replace_items(held: Any, items: Iterable[Any]) -> None:
    """Let a repeated field of a protobuf hold other messages, which may be some of those that it holds."""
    fresh = [type(item).FromString(item.SerializeToString()) for item in items]
    del held[:]
    held.extend(fresh)


def make_stub(name: str, array: Array) -> onnx.TensorProto:
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    stub = onnx.TensorProto(name=name, data_type=kind, dims=array.shape, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", STUB_LOCATION), ("offset", "0"), ("length", str(array.nbytes))):
        stub.external_data.add(key=key, value=value)
    return stub


def inline(size: int, dtype: np.dtype[Any], rank: int) -> bool:
    """Whether a tensor of so many bytes stays in the protobuf, as do strings and types that numpy itself does not know (int4)."""
    return dtype.isbuiltin != 1 or dtype.kind in "OSU" or size <= (INLINE_VECTOR_BYTES if rank < 2 and dtype.kind in "iu" else INLINE_BYTES)


def serialized(name: str, array: Array) -> bytes:
    """A TensorProto of its own, as in files of test data."""
    return bytes(numpy_helper.from_array(np.asarray(array, order="C"), name).SerializeToString())


def make_initializer(name: str, array: Array, weights: dict[str, Array]) -> onnx.TensorProto:
    """A TensorProto for ``array``: inline if small, else a stub with the array in ``weights``."""
    if inline(array.nbytes, array.dtype, array.ndim):
        return numpy_helper.from_array(np.asarray(array, order="C"), name)
    weights[name] = array
    return make_stub(name, array)


def check(model: Model) -> None:
    """Run onnx.checker on a pruned graph, if the original passed.

    Raises:
        ModelError: with the checker's words.
    """
    if not model.complaint and (problem := complaint(model)):
        raise ModelError(f"{model.name}: internal error: onnx.checker rejects the pruned model: {problem}. Please report it.")


def complaint(model: Model) -> str:
    """What onnx.checker has against the graph (weights stand in as inputs); empty if it passes."""
    proto = model.copied()
    inputs = {item.name for item in proto.graph.input}
    for name, array in model.weights.items():
        if name not in inputs:
            proto.graph.input.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape))
    replace_items(proto.graph.initializer, [tensor for tensor in proto.graph.initializer if tensor.name not in model.weights])
    return rejection(proto)


FIRST_OPSET = 7


def too_old(model: Model) -> str:
    """What to do about a model whose operator set onnxruntime does not promise to run; else empty."""
    words = "onnxruntime runs 7 and newer: export it again with opset 13, or convert it (onnx.version_converter.convert_version)"
    return f" The model has operator set {model.opset}, {words}." if model.opset < FIRST_OPSET else ""


def rejection(proto: onnx.ModelProto) -> str:
    """The first line of what onnx.checker says of a protobuf; empty if it passes."""
    try:
        checker.check_model(proto)
    except (checker.ValidationError, ValueError) as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return ""


# ---- looking at models -----------------------------------------------------------------------------------------------


class Initializer(NamedTuple):
    """What a constant of the graph is like."""

    shape: tuple[int, ...]
    dtype: Any


def initializers(model: Model) -> dict[str, Initializer]:
    """Shape and dtype of every initializer."""
    tensors = model.proto.graph.initializer
    return {item.name: Initializer(tuple(item.dims), helper.tensor_dtype_to_np_dtype(item.data_type)) for item in tensors}


class Constants(dict[str, Array]):
    """Values of initializers by name: small ones decoded once, large ones as they are held."""

    def __init__(self, model: Model) -> None:
        small = (tensor for tensor in model.proto.graph.initializer if tensor.name not in model.weights)
        super().__init__({tensor.name: numpy_helper.to_array(tensor) for tensor in small} | dict(model.weights))


def nodes(model: Model) -> list[Node]:
    """The nodes in their (topological) order."""
    listed = []
    taken = {node.name for node in model.proto.graph.node}
    for index, node in enumerate(model.proto.graph.node):
        domain = "" if node.domain in ONNX_DOMAINS else node.domain
        attributes = {attribute.name: _attribute(attribute, node, model.name) for attribute in node.attribute}
        captures = tuple(dict.fromkeys(captured(node)))
        name = node.name or f"{node.op_type}_{index}"
        while not node.name and name in taken:
            name += "_"
        listed.append(Node(index, name, node.op_type, domain, tuple(node.input), tuple(node.output), attributes, captures))
    return listed


def _attribute(attribute: onnx.AttributeProto, node: onnx.NodeProto, name: str) -> Any:
    try:
        value = helper.get_attribute_value(attribute)
        if isinstance(value, onnx.TensorProto):
            return numpy_helper.to_array(value)
    except (ValueError, TypeError) as error:
        where = f"attribute '{attribute.name}' of node '{node.name}' ({node.op_type})"
        raise ModelError(f"{name}: {where} is damaged: {error} Export the model again.") from error
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def with_node_names(model: Model) -> Model:
    """The model with a name for every node, as `nodes` gives it."""
    proto = model.copied()
    for node, known in zip(proto.graph.node, nodes(model), strict=True):
        node.name = known.name
    return replace(model, proto=proto)


def live(model: Model) -> list[Node]:
    """The nodes that the outputs need; onnxruntime runs no others."""
    return GraphIndex(nodes(model)).needed([port.name for port in outputs(model)])


def sub_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs in a node's attributes."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph, and all in the attributes of its nodes and theirs."""
    yield graph
    for inner in (inner for node in graph.node for inner in sub_graphs(node)):
        yield from graphs(inner)


def holds_weights(value: Any) -> bool:
    """Whether an attribute is a graph (or several) with constants of more than one number."""
    given = value if isinstance(value, list) else [value]
    inner = [each for graph in given if isinstance(graph, onnx.GraphProto) for each in graphs(graph)]
    tensors = [tensor for graph in inner for tensor in graph.initializer]
    tensors += [attribute.t for graph in inner for node in graph.node for attribute in node.attribute if attribute.HasField("t")]
    return any(max(tensor.dims, default=1) > 1 and tensor.data_type in FLOATING for tensor in tensors)


def captured(node: onnx.NodeProto) -> Iterator[str]:
    """Names that the sub-graphs of a node read from outside."""
    for graph in sub_graphs(node):
        yield from outside(graph)


def outside(graph: onnx.GraphProto) -> Iterator[str]:
    """Names that a sub-graph reads from outside."""
    inner_names = {item.name for item in [*graph.input, *graph.initializer]}
    for inner in graph.node:
        yield from (name for name in (*inner.input, *captured(inner)) if name and name not in inner_names)
        inner_names.update(inner.output)
    yield from (item.name for item in graph.output if item.name not in inner_names)


def inputs(model: Model) -> list[Port]:
    """Inputs that the user feeds (initializers that are listed as inputs too are constants here)."""
    held = {tensor.name for tensor in model.proto.graph.initializer}
    return [_port(item) for item in model.proto.graph.input if item.name not in held]


def outputs(model: Model) -> list[Port]:
    """Outputs in their order."""
    return [_port(item) for item in model.proto.graph.output]


def _port(item: onnx.ValueInfoProto) -> Port:
    tensor = item.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type) if tensor.elem_type else None
    fixed = ((dim, dim.HasField("dim_value") and dim.dim_value >= 0) for dim in tensor.shape.dim)  # some exporters write -1 for "any"
    shape = tuple(dim.dim_value if known else dim.dim_param or None for dim, known in fixed)
    return Port(item.name, dtype, shape if tensor.HasField("shape") else None)


def dtype_called(name: str) -> Any:
    """Dtype of what onnxruntime calls ``tensor(float)``; None if it is no tensor."""
    kind = name.removeprefix("tensor(").removesuffix(")").upper()
    known = dict(onnx.TensorProto.DataType.items())
    return helper.tensor_dtype_to_np_dtype(known[kind]) if kind in known else None


def tensor_types(model: Model) -> dict[str, Any]:
    """Dtype of every tensor that onnx's type inference knows; None for sequences, maps, optionals (`runtime.tensor_types` knows more)."""
    try:
        inferred = shape_inference.infer_shapes(model.proto)
    except Exception:  # inference is advice; onnxruntime has the last word on whether the model is valid
        inferred = model.proto
    types: dict[str, Any] = {name: dtype for name, (_, dtype) in initializers(model).items()}
    for item in [*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output]:
        if item.type.HasField("tensor_type"):
            if item.type.tensor_type.elem_type:
                types[item.name] = helper.tensor_dtype_to_np_dtype(item.type.tensor_type.elem_type)
        elif item.type.WhichOneof("value"):
            types[item.name] = None
    return types


def handed_over(model: Model) -> dict[str, Array]:
    """The weights that onnxruntime can take from memory: those that only nodes of the main graph read. It looks for what sub-graphs read
    before it takes them, and has thrown out by then what no node reads."""
    read = {name for node in model.proto.graph.node for name in node.input}
    read -= {name for node in model.proto.graph.node for name in captured(node)}
    return {name: array for name, array in model.weights.items() if name in read}


def without_weights(model: Model, names: Container[str]) -> Model:
    """The model with some of its large weights as inputs."""
    proto = model.copied()
    taken = [tensor for tensor in proto.graph.initializer if tensor.name in names]
    listed = {item.name for item in proto.graph.input}
    proto.graph.input.extend(
        helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in taken if tensor.name not in listed
    )
    replace_items(proto.graph.initializer, [tensor for tensor in proto.graph.initializer if tensor.name not in names])
    kept = {name: array for name, array in model.weights.items() if name not in names}
    return replace(model, proto=proto, weights=kept, edited=True)


@cache
def _seed_type(operator: str, opset: int) -> Any:
    """Type of the seed that an operator of ONNX can be given; None if it takes none."""
    try:
        seed = onnx.defs.get_schema(operator, opset).attributes.get("seed")
    except onnx.defs.SchemaError:
        return None
    return None if seed is None else int if seed.type == onnx.defs.OpSchema.AttrType.INT else float


def seeded(model: Model) -> Model:
    """The model with a seed for every node that draws random numbers and has none, the same for nodes of the same outputs: so models,
    and parts of them, that are compared draw the same numbers."""
    missing = [
        (number, index, kind)
        for number, graph in enumerate(graphs(model.proto.graph))
        for index, node in enumerate(graph.node)
        if node.domain in ONNX_DOMAINS and (kind := _seed_type(node.op_type, model.opset)) is not None
        and all(attribute.name != "seed" for attribute in node.attribute)
    ]  # fmt: skip
    if not missing:
        return model
    copy = model.copied()
    below = list(graphs(copy.graph))
    for number, index, kind in missing:
        node = below[number].node[index]
        node.attribute.append(helper.make_attribute("seed", kind(crc32(node.output[0].encode()) % 2**20)))
    return replace(model, proto=copy)


def filled(model: Model, leave: Container[str] = ()) -> onnx.ModelProto:
    """The protobuf with its weights inside, but those that are to be left outside."""
    if all(name in leave for name in model.weights):
        return model.proto
    proto = model.copied()
    for tensor in proto.graph.initializer:
        if tensor.name in model.weights and tensor.name not in leave:
            set_value(tensor, model.weights[tensor.name])
    return proto
