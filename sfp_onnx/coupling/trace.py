"""Concrete shapes and constants from real runs on sample inputs.

Symbolic shape inference gives up on many exports; one run of onnxruntime does not. A second run with other sizes of the
dynamic dimensions tells which sizes and shape constants depend on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, permutations, product
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np

from .. import graph
from ..core.errors import DataError, ModelError
from ..core.types import Array, BoolArray, Node, Port, Trace
from ..graph.edit import Editor
from ..rules.registry import Trait, has
from ..runtime import Optimize, open_model

BATCHES = (2, 1)
SIDES = (64, 224, 32, 128, 320, 640, 16, 512)
LENGTHS = (16, 64, 128, 8, 512, 16000)
INTEGERS = (1, 0)  # ones first: an attention mask of zeros attends to nothing, and zero divides badly
FOLD_BYTES = 1 << 16
LARGEST_INPUT = 1 << 28  # numbers
MOST_NAMES = 5  # of dynamic dimensions that may be sums of each other
Shapes = Mapping[str, Sequence[int]]
Observation = tuple[dict[str, tuple[int, ...]], dict[str, Array]]
"""Shapes of all tensors, values of those that do not depend on data."""
Observer = Callable[[Mapping[str, Array]], Observation]


def prepare(model: graph.Model, shapes: Shapes | None = None, data: Mapping[str, Array] | None = None) -> graph.Prepared:
    """Trace a model, fold what does not depend on data or dynamic dimensions, write gathers that only reshape as what they are, and trace
    the result.

    ``shapes`` overrides shapes of inputs by name; ``data`` is a batch of real inputs to run on.

    Raises:
        ModelError: onnxruntime cannot run the model on any sample shape that was tried.
        DataError: an override names no input or has the wrong rank.
    """
    if len(graph.live(model)) < len(model.proto.graph.node):
        model = Editor(model).finish()  # what no output needs is neither cut nor counted
    types = graph.tensor_types(model)
    try:
        return _prepared(model, types, shapes or {}, data)
    except ModelError as error:
        if model.complaint:
            raise ModelError(f"{error} onnx.checker says: {model.complaint}") from error
        raise


def observed(model: graph.Model, feeds: Mapping[str, Array]) -> graph.Prepared:
    """A model as it is, nothing folded, with what one run on these inputs shows.

    Raises:
        ModelError: onnxruntime cannot run it.
    """
    types, nodes = graph.tensor_types(model), tuple(graph.nodes(model))
    first = _observer(model, types)(feeds)
    return graph.Prepared(model, nodes, _current(_compare(first, [], set(first[1])), model, nodes), feeds, None, types)


def _current(trace: Trace, model: graph.Model, nodes: Sequence[Node]) -> Trace:
    """The trace without the tensors that the model no longer has, and what does not depend on data now."""
    makers = graph.GraphIndex(nodes).makers
    held = {*makers, *graph.initializers(model), *(port.name for port in graph.inputs(model))}
    known = {name: shape for name, (shape, _) in graph.initializers(model).items()}
    shapes_now = {name: shape for name, shape in {**known, **trace.shapes}.items() if name in held}
    values = {name: value for name, value in trace.values.items() if name in makers}
    free = frozenset(data_free(nodes, known))
    return Trace(shapes_now, values, trace.dynamic_values, trace.dynamic_axes, free)


# ---- sample inputs ---------------------------------------------------------------------------------------------------


def _meant(axis: int, rank: int, sizes: Sequence[Any]) -> Any:
    """Of what is given for the batch, for sides of images and for lengths, that for a dynamic axis."""
    return sizes[0] if axis == 0 else sizes[1] if rank >= 4 and axis >= rank - 2 else sizes[2]


def _shapes(ports: Sequence[Port], guesses: Shapes, given: Shapes = MappingProxyType({})) -> dict[str, Sequence[int]]:
    """Shapes of all inputs: as given, as declared, else as guessed. A dimension of one name has one size: that which is given for a use of
    it, else the guess for the first axis that it is on (a batch may be axis 0 of one input and axis 1 of another)."""
    known: dict[str, int] = {}
    for shapes in (guesses, given):
        uses = [(axis, port.name, dim) for port in ports for axis, dim in enumerate(port.shape or ()) if isinstance(dim, str)]
        known |= {dim: shapes[name][axis] for axis, name, dim in sorted(uses, reverse=True) if name in shapes}

    def size(dim: int | str | None, guess: int) -> int:
        if isinstance(dim, int) or dim is None:
            return guess if dim is None else dim
        parts = [int(part) if part.strip().isdigit() else known.get(part.strip()) for part in dim.split("+")]  # "past + 1"
        return known[dim] if len(parts) == 1 or None in parts else sum(filter(None, parts))

    return {port.name: given.get(port.name) or list(map(size, port.shape or (), guesses[port.name])) for port in ports}


def _nameless(ports: Iterable[Port]) -> list[Port]:
    """Ports whose dynamic dimensions have no names, for models that give one name to different things."""
    return [replace(port, shape=port.shape and tuple(dim if isinstance(dim, int) else None for dim in port.shape)) for port in ports]


def _readings(ports: Sequence[Port]) -> list[Sequence[Port]]:
    """What the names of dynamic dimensions may mean, in the order in which it is tried: each a size of its own, one the sum of two others
    (an attention mask over what was before and what is new), or nothing."""
    names = dict.fromkeys(dim for port in ports for axis, dim in enumerate(port.shape or ()) if axis and isinstance(dim, str))
    sums = []
    for total, *parts in permutations(names, 3) if len(names) <= MOST_NAMES else ():
        if parts == sorted(parts):
            swap = {total: "+".join(parts)}
            sums.append([replace(port, shape=port.shape and tuple(swap.get(str(dim), dim) for dim in port.shape)) for port in ports])
    return [ports, *sums, _nameless(ports)]


def _feed(ports: Iterable[Port], shapes: Shapes, seed: int, whole: int) -> dict[str, Array]:
    """Random normal numbers for floats, ``whole`` for integers, true for booleans."""
    generator = np.random.default_rng(seed)
    feeds = {}
    for port in ports:
        shape = shapes[port.name]
        if prod(map(int, shape)) > LARGEST_INPUT:
            raise ModelError(f"input '{port.name}' of shape {list(shape)} does not fit into memory. Is the model damaged?")
        dtype = np.dtype(port.dtype if port.dtype is not None else np.float32)
        if dtype.kind == "f":
            feeds[port.name] = generator.standard_normal(shape).astype(dtype)
        else:
            feeds[port.name] = np.full(shape, True if dtype.kind == "b" else whole, dtype)
    return feeds


def random_feeds(ports: Iterable[Port], like: Mapping[str, Array], seed: int) -> dict[str, Array]:
    """Other random inputs of the same shapes; integer inputs are kept as they are."""
    random = _feed(ports, {name: array.shape for name, array in like.items()}, seed, 1)
    return {name: random[name] if like[name].dtype.kind == "f" else like[name] for name in like}


def _candidates(ports: Sequence[Port], shapes: Shapes, data: Mapping[str, Array] | None) -> Iterable[dict[str, Array]]:
    """Sample inputs to try in turn."""
    if data is not None:
        yield {name: array[:2] if array.ndim else array for name, array in data.items()}
        return
    for name, shape in shapes.items():
        port = next((port for port in ports if port.name == name), None)
        if port is None or (port.shape is not None and len(port.shape) != len(shape)):
            known = ", ".join(f"{port.name} {list(port.shape or ())}" for port in ports)
            raise DataError(f"input shape for '{name}' {list(shape)} fits no input of the model: {known}")
    integers = INTEGERS if any(port.dtype is None or np.dtype(port.dtype).kind in "iu" for port in ports) else INTEGERS[:1]
    tried = set()
    *named, nameless = _readings(ports)
    sizes_first = product(BATCHES, SIDES, LENGTHS, integers, named)  # small ones: long sequences may not fit into memory
    for *sizes, whole, known in chain(sizes_first, product(BATCHES, SIDES, LENGTHS, integers, [nameless])):
        guesses = {port.name: [_meant(axis, len(port.shape or ()), sizes) for axis in range(len(port.shape or ()))] for port in ports}
        wanted = _shapes(known, guesses, shapes)
        key = (whole, *map(tuple, wanted.values()))
        if key not in tried:
            tried.add(key)
            yield _feed(ports, wanted, 0, whole)


def _grown(size: int, step: float) -> int:
    return size + (round(step * size) if isinstance(step, float) else step)


def _variants(ports: Sequence[Port], feeds: Mapping[str, Array]) -> Iterable[dict[str, Array]]:
    """The same inputs with other sizes of the dynamic dimensions: all changed in two ways, and the batch alone.

    The changes are large: behind strides, a small one leaves inner sizes as they are.
    """
    whole = next((int(array.flat[0]) for array in feeds.values() if array.dtype.kind in "iu" and array.size), INTEGERS[0])
    now = {name: array.shape for name, array in feeds.items()}
    named = next(known for known in _readings(ports) if _shapes(known, now) == {name: list(shape) for name, shape in now.items()})
    for grow in ((1, 96, 29), (2, 1.0, 1.0), (1, 0, 0)):
        grown = {name: [_grown(size, _meant(axis, len(shape), grow)) for axis, size in enumerate(shape)] for name, shape in now.items()}
        yield _feed(ports, _shapes(named, grown), 0, whole)
    yield {name: np.concatenate([array, array[:1]]) if array.ndim else array for name, array in feeds.items()}


def _prepared(model: graph.Model, types: Mapping[str, Any], shapes: Shapes, data: Mapping[str, Array] | None) -> graph.Prepared:
    ports = graph.inputs(model)
    observe = _observer(model, types)
    pure = data_free(graph.nodes(model), graph.initializers(model), shapes_too=False)
    tried: list[list[list[int]]] = []
    failure: ModelError | None = None
    for feeds in _candidates(ports, shapes, data):
        tried.append([list(array.shape) for array in feeds.values()])
        try:
            first = observe(feeds)
        except ModelError as error:
            failure = failure or error
            continue
        others, variant, complete = _vary(observe, feeds, ports)
        trusted = set(first[1]) if complete else pure
        trace = _compare(first, others, trusted)
        final = _reshaped(_fold(model, trace), _straight(model, [first, *others], trusted), trace)
        nodes = tuple(graph.nodes(final))
        return graph.Prepared(final, nodes, _current(trace, final, nodes), feeds, variant, types)
    raise ModelError(f"{failure} Tried sample inputs of shapes {tried[:4]}; give the right one with --input-shape.")


def _vary(observe: Observer, feeds: Mapping[str, Array], ports: Sequence[Port]) -> tuple[list[Observation], dict[str, Array] | None, bool]:
    """Observations with other dynamic sizes, inputs of one of them, and whether all dynamic dimensions were changed in some."""
    open_axes = {(port.name, axis) for port in ports for axis, dim in enumerate(port.shape or ()) if not isinstance(dim, int)}
    if not open_axes:
        return [], None, True
    unchanged, used = set(open_axes), None
    observations: list[Observation] = []
    for variant in _variants(ports, feeds):
        changed = {(name, axis) for name, axis in open_axes if variant[name].shape[axis] != feeds[name].shape[axis]}
        only_batch = all(axis == 0 for _, axis in changed)
        if not changed or (observations and only_batch and not changed & unchanged):
            continue
        try:
            observations.append(observe(variant))
        except ModelError:
            continue
        unchanged -= changed
        used = used or variant
    return observations, used, not unchanged


# ---- observing -------------------------------------------------------------------------------------------------------


def data_free(nodes: Sequence[Node], constants: Iterable[str], shapes_too: bool = True) -> set[str]:
    """Tensors that do not depend on the values of the inputs (``shapes_too``: though they may depend on their shapes)."""
    free = set(constants)
    for node in nodes:
        if has(node, Trait.UNSTEADY | Trait.ROUNDS) or node.captures:
            continue
        if (shapes_too and has(node, Trait.SIZES)) or (all(name in free for name in node.inputs if name) and not node.domain):
            free.update(name for name in node.outputs if name)
    return free


def _observer(model: graph.Model, types: Mapping[str, Any]) -> Observer:
    """What runs the model with a Shape node on every tensor, and values of data-free tensors as outputs."""
    nodes = graph.nodes(model)
    constants = graph.initializers(model)
    free = data_free(nodes, constants)
    needed = {name for node in nodes if not set(node.outputs) & free for name in node.reads}
    editor = Editor(model)
    names, fetched = {}, []
    for node in nodes:
        for name in node.outputs:
            if not name or types.get(name, np.float32) is None:
                continue
            tensor = editor.tensor(name)
            names[name] = editor.add_output(editor.append("Shape", [tensor], name=f"{name}/shape"))
            if name in free and (name in needed or np.dtype(types.get(name, np.int64)).kind in "iub"):
                editor.add_output(tensor)
                fetched.append(name)
    session = open_model(editor.finish(), Optimize.NONE)

    def observe(feeds: Mapping[str, Array]) -> Observation:
        results = session.run(feeds, [*names.values(), *fetched])
        shapes = {name: tuple(int(size) for size in shape) for name, shape in zip(names, results[: len(names)], strict=True)}
        shapes.update({name: array.shape for name, array in feeds.items()})
        return shapes, dict(zip(fetched, results[len(names) :], strict=True))

    return observe


def _compare(first: Observation, others: Sequence[Observation], trusted: set[str]) -> Trace:
    """Mark what differs from any other observation; values that are not ``trusted`` count as dynamic in any case."""
    shapes, values = first
    dynamic_values: dict[str, BoolArray] = {}
    for name, value in values.items():
        dynamic_values[name] = np.full(value.shape, name not in trusted)
        for _, other in others:
            dynamic_values[name] |= _differs(value, other[name])
    dynamic_axes = {}
    for name, shape in shapes.items():
        dynamic_axes[name] = tuple(axis for axis, size in enumerate(shape) if any(other[name][axis] != size for other, _ in others))
    return Trace(shapes, values, dynamic_values, dynamic_axes)


def _differs(value: Array, other: Array) -> BoolArray:
    if other.shape != value.shape:
        return np.ones(value.shape, bool)
    same = other == value
    return ~np.asarray(same | (np.isnan(value) & np.isnan(other)) if value.dtype.kind == "f" else same)


# ---- folding ---------------------------------------------------------------------------------------------------------


def _fold(model: graph.Model, trace: Trace) -> graph.Model:
    """Replace static data-free tensors that other nodes read by constants (unless that would grow the file)."""
    nodes, held = graph.nodes(model), graph.initializers(model)
    free = data_free(nodes, held)
    kept = {*held, *(port.name for port in graph.outputs(model)), *(name for node in nodes for name in node.captures)}
    roots = {name: prod(shape) * int(np.dtype(dtype).itemsize) for name, (shape, dtype) in held.items()}
    wanted: dict[str, Any] = {}
    for node in nodes:
        for name in node.outputs:
            roots[name] = sum(roots.get(item, 0) for item in set(node.inputs))
        if set(node.outputs) & free:
            continue
        for name in node.inputs:
            value = trace.values.get(name) if name not in kept else None
            if value is not None and not trace.dynamic_values[name].any() and value.nbytes <= max(FOLD_BYTES, roots[name]):
                wanted[name] = value
    if not wanted:
        return model
    editor = Editor(model)
    for name, value in wanted.items():
        editor.replace_tensor(name, value)
    return editor.finish()


# ---- gathers that only reshape ---------------------------------------------------------------------------------------


def _straight(model: graph.Model, observations: Sequence[Observation], trusted: set[str]) -> frozenset[str]:
    """Outputs of nodes that take all of a vector in its order, at all sizes that were tried: they only give it another shape (which is
    how some exporters write ``as_strided``, with indices computed from the batch size)."""
    taking = [node for node in graph.nodes(model) if has(node, Trait.TAKES)]
    constants, straight = graph.Constants(model) if taking else {}, set()
    for node in taking:
        data, index = node.inputs
        known = data not in constants and (index in constants or index in trusted)
        if known and all(_counts(values.get(index, constants.get(index)), shapes.get(data)) for shapes, values in observations):
            straight.add(node.outputs[0])
    return frozenset(straight)


def _counts(index: Array | None, shape: tuple[int, ...] | None) -> bool:
    return index is not None and shape == (index.size,) and np.array_equal(index.reshape(-1), np.arange(index.size))


def _reshaped(model: graph.Model, straight: frozenset[str], trace: Trace) -> graph.Model:
    """Those nodes as Reshape, past the one that made the vector; unless two of their sizes are dynamic."""
    if not straight:
        return model
    editor = Editor(model)
    nodes = graph.nodes(model)
    index = graph.GraphIndex(nodes)
    for node in nodes:
        name = node.outputs[0]
        dynamic = trace.dynamic_axes.get(name, ())
        if name not in straight or len(dynamic) > 1:
            continue
        shape = np.asarray(trace.shapes[name], np.int64)
        shape[list(dynamic)] = -1
        source = index.maker(node.inputs[0])
        data = source.inputs[0] if source is not None and has(source, Trait.RESHAPES) else node.inputs[0]
        editor.set_operator(node.index, "Reshape", [editor.tensor(data), editor.constant(f"{name}/shape", shape)])
    return editor.finish()
