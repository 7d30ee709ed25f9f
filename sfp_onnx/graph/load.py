"""Reading models: files, external data, local functions, Constant nodes; damage is noticed before anything is made of it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from io import SEEK_END, BytesIO
from math import prod
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import IO, Any

import numpy as np
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, helper, inliner, numpy_helper, version_converter

from ..core.errors import DataError, ModelError
from ..core.types import Array
from . import ONNX_DOMAINS, Model, annotate, captured, complaint, filled, graphs, inline, make_stub, replace_items, sub_graphs, too_old
from .wire import hollow

# What onnx.checker says of operators that it does not know or no longer allows; onnxruntime may run them all the same.
RUNTIME_DECIDES = ("No Op registered for", "deprecated", "No opset import for domain", "No schema", "Field 'shape' of 'type'")

ModelSource = str | Path | ModelProto | Model
NUMBERS = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}  # of Constant nodes


def load(source: ModelSource, custom_ops: Sequence[str] = ()) -> Model:
    """Read a model from a file or a ModelProto (which is copied, not touched); a loaded one stays as it is.

    External data are memory-mapped, never read as a whole. Local functions are inlined, Constant nodes become
    initializers, sparse initializers dense ones.

    Args:
        custom_ops: shared libraries with operators of their own, which onnxruntime loads with the model.

    Raises:
        ModelError: not an ONNX file, truncated, invalid, or external data missing.
    """
    if isinstance(source, Model):
        return replace(source, libraries=(*source.libraries, *custom_ops)) if custom_ops else source
    if isinstance(source, ModelProto):
        data, path = source.SerializeToString(deterministic=True), None
        proto, digest = ModelProto.FromString(hollow(data, LIFTED, inline)), hashlib.sha256(data)
        inside = _lifted(proto.graph, lambda offset, target: target.__setitem__(slice(None), data[offset : offset + len(target)]))
        del data
    else:
        if not isinstance(source, (str, Path)):
            raise ModelError(f"model {repr(source)[:80]}: expected a path, a ModelProto or a loaded model")
        path = Path(source)
        proto, digest, inside = _parse(path)
    name = str(path) if path else "the model"
    if proto.functions:
        try:
            proto = inliner.inline_local_functions(proto)
        except Exception as error:  # onnx raises whatever its C++ does
            raise ModelError(f"{name}: its local functions are damaged: {error}. Export the model again.") from error
    graph = proto.graph
    check_sound(graph, name)
    graph.initializer.extend(numpy_helper.from_array(to_dense(sparse, name), sparse.values.name) for sparse in graph.sparse_initializer)
    del graph.sparse_initializer[:]
    _constants_to_initializers(proto)
    _bypass_identities(graph)
    _name_apart(graph)
    _drop_unread(graph)
    kept = (tensor for tensor in graph.initializer if tensor.name not in inside)
    external = [tensor for tensor in (*kept, *_inner_tensors(graph)) if tensor.data_location == TensorProto.EXTERNAL]
    files = tuple(dict.fromkeys(_external_path(tensor, path, name) for tensor in external))
    hash_files(files, digest)
    weights: dict[str, Array] = {}
    _sort_nodes(graph)
    for tensor in graph.initializer:
        if tensor.name in inside:
            weights[tensor.name] = inside[tensor.name]
        else:
            _detach(tensor, weights, path, name)
    for tensor in _inner_tensors(graph):
        if tensor.data_location == TensorProto.EXTERNAL:
            _attach(tensor, _map_external(tensor, path, name))
    proto = ModelProto.FromString(proto.SerializeToString())  # a fresh arena: the old one still holds the detached weights
    model = Model(proto, weights, digest.hexdigest(), path, files, libraries=tuple(map(str, custom_ops)))
    problem = complaint(model)
    if problem and not any(words in problem for words in RUNTIME_DECIDES):
        raise ModelError(f"{name}: onnx.checker rejects the model: {problem.rstrip('.')}.{too_old(model)}")
    return replace(model, complaint=problem)


def from_bytes(data: bytes, custom_ops: Sequence[str] = ()) -> Model:
    """A model from the bytes of a self-contained file; as `load`."""
    return load(ModelProto.FromString(data), custom_ops)


LIFTED = "\0inside"  # no name of a file
Reading = Callable[[int, memoryview], Any]
"""Fills memory with the bytes from an offset on."""


def _parse(path: Path) -> tuple[ModelProto, Any, dict[str, Array]]:
    """The protobuf with stubs for its large weights, the hash of the file, and these weights, each read into memory of its own."""
    try:
        with path.open("rb") if path.is_file() else BytesIO(path.read_bytes()) as stream:
            size = stream.seek(0, SEEK_END)
            stream.seek(0)
            _refuse_others(path, stream.read(8))
            whole = stream.getvalue() if isinstance(stream, BytesIO) else b""
            with mmap(stream.fileno(), 0, access=ACCESS_READ) if size > len(whole) else nullcontext(whole) as data:
                proto = ModelProto.FromString(hollow(data, LIFTED, inline))
            inside = _lifted(proto.graph, lambda offset, target: (stream.seek(offset), stream.readinto(target)))
            digest = hashlib.sha256()
            stream.seek(0)
            _hash_stream(stream, digest)
    except OSError as error:
        raise ModelError(f"{path}: cannot read the model: {error.strerror or error}") from error
    except (DecodeError, ValueError) as error:
        raise ModelError(f"{path}: not an ONNX file, or a truncated one ({size} bytes do not parse). Export it again.") from error
    if not proto.ir_version or not proto.graph.output:
        raise ModelError(f"{path}: not an ONNX file: it parses, but holds no graph with outputs. Expected an exported .onnx model.")
    return proto, digest, inside


def _refuse_others(path: Path, start: bytes) -> None:
    """Files of other formats, by their first bytes."""
    if start.startswith(b"PK\x03\x04"):
        raise ModelError(f"{path}: not an ONNX file but a zip archive (NumPy's .npz? a PyTorch checkpoint? export that to ONNX first).")
    if start[4:8] == b"ORTM":
        raise ModelError(f"{path}: onnxruntime's own format (.ort), which is no ONNX. Give the .onnx file that it was made from.")


def _lifted(graph: GraphProto, read: Reading) -> dict[str, Array]:
    """The weights that `hollow` left where they stand; their tensors become stubs."""
    weights = {}
    for tensor in graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if tensor.data_location == TensorProto.EXTERNAL and entries.get("location") == LIFTED:
            array = np.empty(tuple(tensor.dims), helper.tensor_dtype_to_np_dtype(tensor.data_type))
            read(int(entries["offset"]), array.reshape(-1).data.cast("B"))
            array.flags.writeable = False
            weights[tensor.name] = array
            stub = make_stub(tensor.name, array)
            annotate(stub, tensor)
            tensor.CopyFrom(stub)
    return weights


def hash_files(files: Iterable[Path], digest: Any) -> None:
    """Add the contents of files to a hash."""
    for file in files:
        with file.open("rb") as stream:
            _hash_stream(stream, digest)


def _hash_stream(stream: IO[bytes], digest: Any) -> None:
    while block := stream.read(1 << 20):
        digest.update(block)


def _inner_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Tensors in attributes, and all in sub-graphs."""
    for node in graph.node:
        for attribute in node.attribute:
            yield from ([attribute.t] if attribute.HasField("t") else [])
            yield from attribute.tensors
        for inner in sub_graphs(node):
            yield from inner.initializer
            yield from _inner_tensors(inner)


def _external_path(tensor: TensorProto, path: Path | None, name: str) -> Path:
    """The file with the data of a tensor, checked to exist inside the model's folder."""
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    if path is None:
        raise ModelError(f"tensor '{tensor.name}' keeps its data in the file '{location}', but a ModelProto has no folder: pass the path")
    folder = path.resolve().parent
    file = (folder / location).resolve()
    if not file.is_relative_to(folder):
        raise ModelError(f"{name}: tensor '{tensor.name}' points to external data outside the model's folder: '{location}'. Refused.")
    if not file.is_file():
        raise ModelError(f"{name}: external data file '{location}' of tensor '{tensor.name}' is missing. Put it next to the model.")
    return file


def _detach(tensor: TensorProto, weights: dict[str, Array], path: Path | None, name: str) -> None:
    """Move a large tensor out of the protobuf, where a stub with its type and shape stays; move a small external one in."""
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    stays = inline(_bytes(tensor), dtype, len(tensor.dims))
    if tensor.data_location == TensorProto.EXTERNAL:
        array = _map_external(tensor, path, name)
        if stays:
            _attach(tensor, array)
            return
        array = array.view(dtype).reshape(tuple(tensor.dims))
    elif stays:
        return
    else:
        array = numpy_helper.to_array(tensor)
    weights[tensor.name] = array
    stub = make_stub(tensor.name, array)
    annotate(stub, tensor)
    tensor.CopyFrom(stub)


def _plain(tensor: TensorProto) -> bool:
    """Whether numpy itself knows the type, so that onnxruntime takes the array as it is (not bfloat16, int4, strings)."""
    return tensor.data_type != TensorProto.STRING and helper.tensor_dtype_to_np_dtype(tensor.data_type).isbuiltin == 1


def _bytes(tensor: TensorProto) -> int:
    return int(np.prod(tensor.dims, dtype=np.float64)) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _attach(tensor: TensorProto, raw: Array) -> None:
    tensor.raw_data = raw.tobytes()
    del tensor.external_data[:]
    tensor.ClearField("data_location")


def _map_external(tensor: TensorProto, path: Path | None, name: str) -> Array:
    """The bytes of an external tensor, memory-mapped."""
    file = _external_path(tensor, path, name)
    entries = {entry.key: entry.value for entry in tensor.external_data}
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", _bytes(tensor)))
    except ValueError as error:
        raise ModelError(f"{name}: external data of tensor '{tensor.name}' have no valid offset and length: {error}") from error
    if offset < 0 or length < 0 or offset + length > file.stat().st_size:
        wanted = f"tensor '{tensor.name}' needs {length} bytes at {offset}, the file has {file.stat().st_size}"
        raise ModelError(f"{name}: external data file '{file.name}' is truncated: {wanted}")
    if _plain(tensor) and length != _bytes(tensor):
        wanted = f"of shape {list(tensor.dims)} needs {_bytes(tensor)} bytes of external data, its entry says {length}"
        raise ModelError(f"{name}: tensor '{tensor.name}' {wanted}")
    return np.memmap(file, dtype=np.uint8, mode="r", offset=offset, shape=(length,)) if length else np.zeros(0, np.uint8)


# ---- branches in place of a node that chooses between two ------------------------------------------------------------

BRANCHES = "then_branch", "else_branch"


def decided(model: Model, chosen: Mapping[int, bool]) -> Model:
    """The model with the nodes of one branch in place of each of these nodes (by index) with a ``then_branch`` and an ``else_branch``."""
    unpacked = _Unpacked(model)
    placed: list[NodeProto] = []
    for index, node in enumerate(model.proto.graph.node):
        if index not in chosen:
            placed.append(node)
            continue
        ends = unpacked.ends(node, index, BRANCHES[0 if chosen[index] else 1], placed)
        pairs = zip(node.output, ends, strict=False)
        placed += [helper.make_node("Identity", [end], [name]) for name, end in pairs if name]
    return unpacked.finish(placed)


def flattened(model: Model, asked: Collection[int]) -> tuple[Model, list[str]]:
    """The model with the nodes of both branches in place of each of these nodes (by index), as far as the only graphs in them are branches
    again, and behind them nodes that take either output by the condition; and the names of these outputs. `nested` is the inverse."""
    unpacked, joined, conditions = _Unpacked(model), list[str](), set[str]()
    placed: list[NodeProto] = []
    for index, node in enumerate(model.proto.graph.node):
        below = [inner for graph in sub_graphs(node) for inner in graph.node if any(part.node for part in sub_graphs(inner))]
        if index not in asked or not all(map(_branching, below)):
            placed.append(node)
            continue
        sides = [unpacked.ends(node, index, branch, placed) for branch in BRANCHES]
        way, size = (_fresh(f"{node.name or index}/{name}", unpacked.taken) for name in ("condition", "scalar"))
        unpacked.proto.graph.initializer.append(numpy_helper.from_array(np.zeros(0, np.int64), size))
        placed.append(helper.make_node("Reshape", [node.input[0], size], [way]))
        conditions.add(way)
        for name, *ends in zip(node.output, *sides, strict=False):
            placed += [helper.make_node("Where", [way, *ends], [name])] if name else []
            joined += [name] if name else []
    if not joined:
        return model, []
    return replace(unpacked.finish(placed), conditions=model.conditions | conditions), joined


def _branching(node: NodeProto) -> bool:
    return {attribute.name for attribute in node.attribute} >= {*BRANCHES}


class _Unpacked:
    """A copy of a model into whose graph branches are put, with names that are ``taken`` there. What was flat before, and is
    ``made`` in one place, has its name again."""

    def __init__(self, model: Model) -> None:
        self.model, self.proto = model, model.copied()
        self.made = Counter(name for each in graphs(self.proto.graph) for node in each.node for name in node.output)
        self.taken = {name for each in graphs(self.proto.graph) for node in each.node for name in (*node.input, *node.output, node.name)}

    def ends(self, node: NodeProto, index: int, branch: str, placed: list[NodeProto]) -> list[str]:
        """Put the nodes of a branch behind those that are ``placed``; returns the names of what it gives."""
        graph, inner = self.proto.graph, next(attribute.g for attribute in node.attribute if attribute.name == branch)
        made = [name for below in inner.node for name in below.output if name] + [tensor.name for tensor in inner.initializer]
        own = f"{node.name or index}/"
        names = {name: name if name.startswith(own) and self.made[name] == 1 else _fresh(own + name, self.taken) for name in made}
        for sparse in inner.sparse_initializer:
            tensor = numpy_helper.from_array(to_dense(sparse, self.model.name), _fresh(sparse.values.name, self.taken))
            names[sparse.values.name] = tensor.name
            graph.initializer.append(tensor)
        for tensor in inner.initializer:
            graph.initializer.append(tensor)
            graph.initializer[-1].name = names[tensor.name]
        placed += [_renamed(below, names) for below in inner.node]
        return [names.get(end.name, end.name) for end in inner.output]

    def finish(self, placed: Sequence[NodeProto]) -> Model:
        """The model with these nodes, whose constants are held as those of all models are."""
        graph, model = self.proto.graph, self.model
        replace_items(graph.node, placed)
        _constants_to_initializers(self.proto)
        _name_apart(graph)
        _drop_unread(graph)
        held = {tensor.name for tensor in graph.initializer}
        weights = {name: array for name, array in model.weights.items() if name in held}
        for tensor in graph.initializer:
            if tensor.name not in weights:
                _detach(tensor, weights, None, model.name)
        return replace(model, proto=self.proto, weights=weights, edited=True)


def nested(model: Model, originals: Sequence[Model]) -> Model:
    """A model that was made from one that was flattened, with everything that only one branch needs back in there; ``originals``: what it
    was before each time, the last first. Constants stay outside."""
    for original in originals:
        model = _nested(model, original)
    return model


def _nested(model: Model, original: Model) -> Model:
    proto = model.copied()
    outer = {name for node in original.proto.graph.node for name in node.output} | {item.name for item in proto.graph.output}
    for node in original.proto.graph.node:
        joins = [join for join in proto.graph.node if join.op_type == "Where" and join.output[0] in node.output]
        if joins and _branching(node):
            _nest(proto.graph, node, joins, outer)
    _sort_nodes(proto.graph)
    made = {name for node in proto.graph.node for name in node.output}
    replace_items(proto.graph.value_info, [item for item in proto.graph.value_info if item.name in made])
    _drop_unread(proto.graph)
    held = {tensor.name for tensor in proto.graph.initializer}
    return replace(model, proto=proto, weights={name: array for name, array in model.weights.items() if name in held}, edited=True)


def _nest(graph: GraphProto, node: NodeProto, joins: Sequence[NodeProto], outer: Collection[str]) -> None:
    """One node that chooses, in place of those that took either of its outputs."""
    way = next((made for made in graph.node if joins[0].input[0] in made.output), None)
    chooses = NodeProto(op_type=node.op_type, domain=node.domain, name=node.name, doc_string=node.doc_string)
    chooses.input.append(way.input[0] if way is not None else node.input[0])
    chooses.output.extend(join.output[0] for join in joins)
    gone = {join.output[0] for join in joins} | {joins[0].input[0]}
    for position, branch in enumerate(BRANCHES, 1):
        inner = next(attribute.g for attribute in node.attribute if attribute.name == branch)
        members = _only_for(graph, joins, position, outer)
        made, ends = {name for member in members for name in member.output}, list[str]()
        gone |= made
        for join in joins:
            name = join.input[position]
            if name not in made or name in ends:  # what a branch gives must be made in it
                members.append(helper.make_node("Identity", [name], [f"{join.output[0]}/{branch}"]))
                name = members[-1].output[0]
            ends.append(name)
        outputs = [inner.output[list(node.output).index(join.output[0])] for join in joins]
        body = helper.make_graph(members, inner.name or branch, [], outputs)
        for item, name in zip(body.output, ends, strict=True):
            item.name = name
            for size in item.type.tensor_type.shape.dim:
                size.Clear()
        chooses.attribute.append(helper.make_attribute(branch, body))
    replace_items(graph.node, [*(item for item in graph.node if gone.isdisjoint(filter(None, item.output))), chooses])


def _only_for(graph: GraphProto, joins: Sequence[NodeProto], position: int, outer: Collection[str]) -> list[NodeProto]:
    """The nodes that nothing needs but one branch, in their order."""
    readers: dict[str, list[int]] = {}
    for index, node in enumerate(graph.node):
        for name in _read_names(node):
            readers.setdefault(name, []).append(index)
    ends = {join.output[0] for join in joins}
    shared = {*outer, *(name for join in joins for name in (join.input[0], join.input[3 - position]))}
    inside, found = {index for index, node in enumerate(graph.node) if node.output[0] in ends}, list[NodeProto]()
    for index in range(len(graph.node) - 1, -1, -1):
        node = graph.node[index]
        reading = [reader for name in node.output for reader in readers.get(name, ())]
        if reading and shared.isdisjoint(node.output) and inside.issuperset(reading):
            inside.add(index)
            found.append(node)
    return found[::-1]


def _fresh(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _renamed(node: NodeProto, names: Mapping[str, str]) -> NodeProto:
    """A copy of a node that reads and makes tensors of other names, also in its sub-graphs."""
    copy = NodeProto()
    copy.CopyFrom(node)
    for fields in (copy.input, copy.output):
        fields[:] = [names.get(name, name) for name in fields]
    for graph in sub_graphs(copy):
        for item in graph.output:
            item.name = names.get(item.name, item.name)
        if graph.node:
            replace_items(graph.node, [_renamed(inner, names) for inner in graph.node])
    return copy


def _drop_unread(graph: GraphProto) -> None:
    """Leave out initializers that nothing reads, also where they are listed as inputs (as all are under IR version 4)."""
    kept = {name for node in graph.node for name in (*node.input, *captured(node))} | {item.name for item in graph.output}
    unread = {tensor.name for tensor in graph.initializer} - kept
    if unread:
        for held in (graph.initializer, graph.input):
            replace_items(held, [item for item in held if item.name not in unread])


def _name_apart(graph: GraphProto) -> None:
    """Number the nodes that share a name: onnxruntime refuses them, onnx does not."""
    taken = {node.name for node in graph.node}
    used: set[str] = set()
    for node in graph.node:
        base, number = node.name, 1
        while node.name and node.name in used:
            number += 1
            node.name = f"{base}_{number}" if f"{base}_{number}" not in taken else node.name
        used.add(node.name)


def _sort_nodes(graph: GraphProto) -> None:
    """Put nodes behind those that they read, if they are not (some converters append casts at the end); else leave the order."""
    computed = {name for node in graph.node for name in node.output if name}
    known: set[str] = set()
    ordered: list[NodeProto] = []
    waiting = list(graph.node)
    while waiting:
        blocked = []
        for node in waiting:
            if all(name not in computed or name in known for name in _read_names(node)):
                ordered.append(node)
                known.update(node.output)
            else:
                blocked.append(node)
        if len(blocked) == len(waiting):
            return  # a cycle: onnx.checker says so
        waiting = blocked
    if any(a is not b for a, b in zip(ordered, graph.node, strict=True)):
        replace_items(graph.node, ordered)


def _read_names(node: NodeProto) -> list[str]:
    """Inputs of a node and of the nodes in its sub-graphs."""
    return [*filter(None, node.input), *(name for graph in sub_graphs(node) for below in graph.node for name in _read_names(below))]


def _constants_to_initializers(proto: ModelProto) -> None:
    """Turn Constant nodes of the main graph into initializers (IR versions under 4 list them as inputs, too)."""
    graph = proto.graph
    kept = []
    for node in graph.node:
        tensor = _constant_tensor(node) if node.op_type == "Constant" and node.domain in ONNX_DOMAINS else None
        if tensor is None:
            kept.append(node)
        else:
            graph.initializer.append(tensor)
            if proto.ir_version < 4:
                graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    if len(kept) != len(graph.node):
        replace_items(graph.node, kept)


def _bypass_identities(graph: GraphProto) -> None:
    """Let nodes read an initializer itself instead of an Identity of it: exporters put one at every further use of a shared weight."""
    held = {tensor.name for tensor in graph.initializer}
    needed = {item.name for item in graph.output} | {name for node in graph.node for name in _read_names(node)[len(node.input) :]}
    source: dict[str, str] = {}
    kept = []
    for node in graph.node:
        name = source.get(node.input[0], node.input[0]) if node.input else ""
        if node.op_type == "Identity" and node.domain in ONNX_DOMAINS and name in held and node.output[0] not in needed:
            source[node.output[0]] = name
        else:
            kept.append(node)
    if source:
        for node in kept:
            for position, name in enumerate(node.input):
                node.input[position] = source.get(name, name)
        replace_items(graph.node, kept)


def _constant_tensor(node: NodeProto) -> TensorProto | None:
    if not node.attribute:
        return None
    attribute = node.attribute[0]
    tensor = TensorProto()
    if attribute.name == "value":
        tensor.CopyFrom(attribute.t)
    elif attribute.name == "sparse_value":
        tensor = numpy_helper.from_array(to_dense(attribute.sparse_tensor, "the model"))
    elif attribute.name in NUMBERS:
        tensor = numpy_helper.from_array(np.asarray(helper.get_attribute_value(attribute), NUMBERS[attribute.name]))
    else:
        return None
    tensor.name = node.output[0]
    return tensor


# ---- damage that would make others stumble later ---------------------------------------------------------------------

KINDS = helper.get_all_tensor_dtypes()
# Fields that hold the values of a tensor if it has no raw_data, and how many of their items one element takes.
FIELDS: dict[int, tuple[str, int]] = {
    TensorProto.FLOAT: ("float_data", 1), TensorProto.COMPLEX64: ("float_data", 2), TensorProto.DOUBLE: ("double_data", 1),
    TensorProto.COMPLEX128: ("double_data", 2), TensorProto.INT64: ("int64_data", 1), TensorProto.UINT32: ("uint64_data", 1),
    TensorProto.UINT64: ("uint64_data", 1), TensorProto.STRING: ("string_data", 1),
}  # fmt: skip
NARROW = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}  # bits
PACKED: dict[int, int] = {kind: NARROW[name] for name, kind in TensorProto.DataType.items() if name in NARROW}


def check_sound(main: GraphProto, name: str) -> None:
    """Look at every tensor and every declared type, before anything is made of them.

    Raises:
        ModelError: the tensor or value that is damaged, and how.
    """
    for graph in graphs(main):
        for item in (*graph.input, *graph.output, *graph.value_info):
            kind = item.type.tensor_type.elem_type if item.type.HasField("tensor_type") else 0
            if kind and kind not in KINDS:
                raise ModelError(f"{name}: tensor '{item.name}' has the unknown element type {kind}. The file is damaged: export it again.")
        for node in graph.node:
            for attribute in node.attribute:
                if any(text != text.decode(errors="ignore").encode() for text in (attribute.s, *attribute.strings)):
                    raise ModelError(f"{name}: node '{node.name}': attribute '{attribute.name}' is no UTF-8 text. Export the model again.")
    for tensor in (*main.initializer, *_inner_tensors(main)):
        if problem := _complaint(tensor):
            raise ModelError(f"{name}: tensor '{tensor.name}' is damaged: {problem}. Export the model again.")


def _complaint(tensor: TensorProto) -> str:
    if tensor.data_type not in KINDS:
        return f"its element type {tensor.data_type} is unknown"
    if any(size < 0 for size in tensor.dims):
        return f"its shape {list(tensor.dims)} has a negative size"
    if tensor.data_location == TensorProto.EXTERNAL:
        return ""  # compared with the file when it is mapped
    count = prod(tensor.dims)
    bits = PACKED.get(tensor.data_type) or 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    packed = (count * bits + 7) // 8
    if tensor.HasField("raw_data"):
        if tensor.data_type == TensorProto.STRING:
            return "strings cannot stand in raw_data"
        wanted, present, what = packed, len(tensor.raw_data), "bytes"
    else:
        field, each = FIELDS.get(tensor.data_type, ("int32_data", 1))
        wanted, present, what = count * each, len(getattr(tensor, field)), f"numbers in {field}"
        wanted = packed if tensor.data_type in PACKED else wanted
    return "" if wanted == present else f"shape {list(tensor.dims)} needs {wanted} {what}, it has {present}"


# ---- values of tensors -----------------------------------------------------------------------------------------------


def to_dense(sparse: SparseTensorProto, name: str) -> Array:
    """The value of a sparse tensor (coordinates, or positions in row-major order).

    Raises:
        ModelError: indices that do not fit the shape.
    """
    shape = tuple(sparse.dims)
    try:
        values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices).astype(np.int64)
        if indices.ndim == 2:
            indices = np.ravel_multi_index(tuple(indices.T), shape)
        if indices.shape != values.shape or indices.min(initial=0) < 0:
            raise ValueError(f"{values.shape} values at {indices.shape} indices from {indices.min(initial=0)} on")
        dense = np.zeros(int(np.prod(shape)), values.dtype)
        dense[indices] = values
    except (ValueError, IndexError, TypeError) as error:
        raise ModelError(f"{name}: sparse initializer '{sparse.values.name}' of shape {list(shape)} is damaged: {error}") from error
    return dense.reshape(shape)


def load_tensor(path: Path) -> tuple[str, Array]:
    """Name and value of a serialized TensorProto (``input_0.pb``).

    Raises:
        DataError: not a tensor.
    """
    try:
        tensor = TensorProto.FromString(path.read_bytes())
        return tensor.name, numpy_helper.to_array(tensor)
    except (DecodeError, ValueError, TypeError, OSError) as error:
        raise DataError(f"{path}: not a serialized ONNX tensor: {error}") from error


# ---- raising the opset, where the form that a model is written in needs a newer one ------------------------------------

IR_VERSION = 8  # initializers need not be inputs of the graph


def raised(model: Model, opset: int) -> Model:
    """The model in this opset, or as it is if it has a newer one.

    Raises:
        ModelError: onnx's converter cannot do it, with its words.
    """
    if model.opset >= opset:
        return model
    proto = ModelProto()
    proto.CopyFrom(filled(model))
    held = {tensor.name for tensor in proto.graph.initializer}
    replace_items(proto.graph.input, [item for item in proto.graph.input if item.name not in held])
    proto.ir_version = max(proto.ir_version, IR_VERSION)
    try:
        converted = version_converter.convert_version(proto, opset)
        result = ModelProto()
        result.CopyFrom(proto)  # the converter loses what stands beside the graph
        result.graph.CopyFrom(converted.graph)
        for item in result.opset_import:
            item.version = opset if item.domain in ONNX_DOMAINS else item.version
        fresh = load(result)
    except Exception as error:  # the converter raises whatever its C++ does
        words = " ".join(str(error).split())[:200]
        raise ModelError(f"{model.name}: onnx cannot raise opset {model.opset} to {opset}: {words}") from error
    return replace(fresh, sha256=model.sha256, source=model.source, files=model.files, edited=True, complaint=model.complaint)
