"""Concrete shapes and constants from real runs on sample inputs.

Symbolic shape inference gives up on many exports; one run of onnxruntime does not. A second run with other sizes of the
dynamic dimensions tells which sizes and shape constants depend on them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, permutations, product
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np

from .. import graph
from ..core.errors import DataError, ModelError
from ..core.system import log
from ..core.types import Array, BoolArray, Node, Port, Trace
from ..data.layout import traced_samples, with_samples
from ..graph.edit import Editor, without_dead
from ..graph.extract import segment
from ..graph.load import decided, flattened
from ..rules.foreign import advice
from ..rules.registry import Trait, has
from ..runtime import Optimize, open_model, tensor_types

BATCHES = (2, 1)
SIDES = (64, 224, 32, 128, 320, 640, 16, 512)
LENGTHS = (16, 64, 128, 8, 512)
LONGER = (4096, 16384)  # of sound
TEXT = "a"
INTEGERS = (1, 0)  # ones first: an attention mask of zeros attends to nothing, and zero divides badly
FOLD_BYTES = 1 << 16
NARROW = ("float16", "bfloat16")  # types in which weights are stored for others to compute with
WHOLE = graph.Initializer((), np.int64)
LARGEST_INPUT = 1 << 28  # numbers
MOST_NAMES = 5  # of dynamic dimensions that may be sums of each other
SIZES_NAMED = re.compile(r"\b(\d+) by (\d+)\b|Expected: (\d+)\b")  # in what onnxruntime says of inputs that do not fit
Shapes = Mapping[str, Sequence[int]]
Observation = tuple[dict[str, tuple[int, ...]], dict[str, Array]]
"""Shapes of all tensors, values of those that do not depend on data."""
Observer = Callable[[Mapping[str, Array]], Observation]


def prepare(model: graph.Model, shapes: Shapes | None = None, data: Mapping[str, Array] | None = None) -> graph.Prepared:
    """Trace a model, fold what does not depend on data or dynamic dimensions, write gathers that only reshape as what they are, and trace
    the result.

    ``shapes`` overrides shapes of inputs by name; ``data`` is a batch of real inputs to run on (those that have such a shape).

    Raises:
        ModelError: onnxruntime cannot run the model on any sample shape that was tried.
        DataError: an override names no input or has the wrong rank.
    """
    model = without_dead(model)  # what no output needs is neither cut nor counted
    types = tensor_types(model)
    try:
        return _prepared(model, types, shapes or {}, data)
    except ModelError as error:
        said = f" onnx.checker says: {model.complaint}" if model.complaint else ""
        known = advice(model, str(error))
        raise ModelError(f"{error}{said}".rstrip(".") + f".{known}" if known else f"{error}{said}") from error


def observed(model: graph.Model, feeds: Mapping[str, Array]) -> graph.Prepared:
    """A model as it is, nothing folded, with what one run on these inputs shows.

    Raises:
        ModelError: onnxruntime cannot run it.
    """
    types, nodes = tensor_types(model), tuple(graph.nodes(model))
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
        if dtype.kind == "O":
            feeds[port.name] = np.full(shape, TEXT)
        elif dtype.kind == "f":
            feeds[port.name] = generator.standard_normal(shape).astype(dtype)
        else:
            feeds[port.name] = np.full(shape, True if dtype.kind == "b" else whole, dtype)
    return feeds


def random_feeds(ports: Iterable[Port], like: Mapping[str, Array], seed: int) -> dict[str, Array]:
    """Other random inputs of the same shapes; integer inputs are kept as they are."""
    random = _feed(ports, {name: array.shape for name, array in like.items()}, seed, 1)
    return {name: random[name] if like[name].dtype.kind == "f" else like[name] for name in like}


def _candidates(
    ports: Sequence[Port], shapes: Shapes, data: Mapping[str, Array] | None, failures: Sequence[ModelError] = ()
) -> Iterable[dict[str, Array]]:  # fmt: skip
    """Sample inputs to try in turn; ``failures`` are those of what was tried so far."""
    if data is not None and not shapes:
        yield dict(data)
        return
    for name, shape in shapes.items():
        port = next((port for port in ports if port.name == name), None)
        if port is None or (port.shape is not None and len(port.shape) != len(shape)):
            known = ", ".join(f"{port.name} {list(port.shape or ())}" for port in ports)
            raise DataError(f"input shape for '{name}' {list(shape)} fits no input of the model: {known}")
    integers = INTEGERS if any(port.dtype is None or np.dtype(port.dtype).kind in "iu" for port in ports) else INTEGERS[:1]
    tried = set()
    *named, nameless = _readings(ports)
    sound = len(integers) == 1 and all(len(port.shape or ()) == 2 for port in ports)
    lengths = LENGTHS + LONGER if sound else LENGTHS
    sizes_first = product(BATCHES, SIDES, lengths, integers, named)  # small ones: long sequences may not fit into memory
    nameless_then = product(BATCHES, SIDES, lengths, integers, [nameless])
    for *sizes, whole, known in chain(sizes_first, nameless_then, _asked(failures, integers, ports)):
        guesses = {port.name: [_meant(axis, len(port.shape or ()), sizes) for axis in range(len(port.shape or ()))] for port in ports}
        wanted = _shapes(known, guesses, shapes)
        key = (whole, *map(tuple, wanted.values()))
        if key not in tried:
            tried.add(key)
            yield _like(_feed(ports, wanted, 0, whole), data or {})


def _asked(failures: Sequence[ModelError], integers: Sequence[int], ports: Sequence[Port]) -> Iterable[Sequence[Any]]:
    """Sizes that onnxruntime named where all guesses failed ("12 by 16"): an axis may be declared as dynamic and have one size inside."""
    found = dict.fromkeys(int(text) for failure in failures for pair in SIZES_NAMED.findall(str(failure)) for text in pair if text)
    sizes = [size for size in found if size > 1][:MOST_NAMES]
    yield from product(BATCHES, [*sizes, SIDES[0]], [*sizes, LENGTHS[0]], integers, [ports]) if sizes else ()


def _like(feeds: Mapping[str, Array], real: Mapping[str, Array]) -> dict[str, Array]:
    """Inputs, those replaced by real ones that have the same shape (scalars, say, that a model works with few values of)."""
    return {name: real[name] if name in real and real[name].shape == array.shape else array for name, array in feeds.items()}


def _grown(size: int, step: float) -> int:
    return size + (round(step * size) if isinstance(step, float) else step)


def _variants(ports: Sequence[Port], feeds: Mapping[str, Array]) -> Iterable[dict[str, Array]]:
    """The same inputs with other sizes of the dynamic dimensions: all changed in two ways, the batch alone, and less than now (a table of
    positions may have no more).

    The changes are large: behind strides, a small one leaves inner sizes as they are.
    """
    whole = next((int(array.flat[0]) for array in feeds.values() if array.dtype.kind in "iu" and array.size), INTEGERS[0])
    now = {name: array.shape for name, array in feeds.items()}
    named = next(known for known in _readings(ports) if _shapes(known, now) == {name: list(shape) for name, shape in now.items()})
    for grow in ((1, 96, 29), (2, 1.0, 1.0), (1, 0, 0), (), (1, -0.5, -0.5)):
        if not grow:
            yield with_samples(ports, feeds, traced_samples(ports, now) + 1)
            continue
        grown = {name: [_grown(size, _meant(axis, len(shape), grow)) for axis, size in enumerate(shape)] for name, shape in now.items()}
        yield _like(_feed(ports, _shapes(named, grown), 0, whole), feeds)


def _prepared(
    model: graph.Model, types: Mapping[str, Any], shapes: Shapes, data: Mapping[str, Array] | None, ways: tuple[str, ...] = ()
) -> graph.Prepared:  # fmt: skip
    """The model with the constant parts folded, and its trace; ``ways``: branches that were chosen on the way (nested ones later)."""
    ports = graph.inputs(model)
    observe = _observer(model, types)
    pure = data_free(graph.nodes(model), graph.initializers(model), shapes_too=False)
    tried: list[list[list[int]]] = []
    failures: list[ModelError] = []
    for feeds in _candidates(ports, shapes, data, failures):
        tried.append([list(array.shape) for array in feeds.values()])
        try:
            first = observe(feeds)
        except ModelError as error:
            failures.append(error)
            continue
        others, variant, complete = _vary(observe, feeds, ports)
        trusted = set(first[1]) if complete else pure
        trace = _compare(first, others, trusted)
        chosen = _decided(model, trace)
        if chosen:
            ways += tuple(f"{graph.nodes(model)[index].name} ({'then' if way else 'else'})" for index, way in chosen.items())
            model = decided(model, chosen)
            return _prepared(model, tensor_types(model), shapes, data, ways)
        if ways:
            shown = ", ".join(ways[:SHOWN]) + (", ..." if ways[SHOWN:] else "")
            log.info(f"Note: declared shapes or constants choose one branch for all inputs, and the other one goes: {shown}")
        if (flat := _flat(model, shapes, data)) is not None:
            return flat
        final = _reshaped(_fold(model, trace), _straight(model, [first, *others], trusted), trace)
        nodes = tuple(graph.nodes(final))
        return graph.Prepared(final, nodes, _current(trace, final, nodes), feeds, variant, types, model)
    hint = "give the right one with --input-shape, or real inputs with --data" if data is None else "do the data fit the model?"
    raise ModelError(f"{failures[0] if failures else None} Tried sample inputs of shapes {tried[:4]}; {hint}.")


def _flat(model: graph.Model, shapes: Shapes, data: Mapping[str, Array] | None) -> graph.Prepared | None:
    """The model with the branches of nodes that choose as parts of its graph: of all of them, or of those where both branches run on all
    inputs and give the same shapes. None where there are none."""
    asked = [node for node in graph.nodes(model) if has(node, Trait.CHOOSES) and node.outputs[0] not in model.lazy]
    for some in (asked, *([node] for node in asked if len(asked) > 1)):
        prepared = _flattened(model, some, shapes, data)
        if prepared is not None:
            return prepared
        if len(some) == 1:
            model = replace(model, lazy=model.lazy | {some[0].outputs[0]})
    return None


def _flattened(model: graph.Model, asked: Sequence[Node], shapes: Shapes, data: Mapping[str, Array] | None) -> graph.Prepared | None:
    """The model with the branches of these nodes as parts of its graph; None where they do not run on all inputs (or
    make no numbers of them), or give other shapes."""
    flat, joined = flattened(model, [node.index for node in asked])
    if not joined:
        return None
    try:
        prepared = _prepared(flat, tensor_types(flat), shapes, data)
    except ModelError:
        return None
    trace, makers = prepared.trace, prepared.index.makers
    for name in joined:
        sides = [name, *makers[name].inputs[1:]] if name in makers else []
        wanted = (trace.shapes[name], trace.dynamic_axes[name])
        if any((trace.shapes.get(side), trace.dynamic_axes.get(side, ())) != wanted for side in sides):
            return None
    known = graph.GraphIndex(graph.nodes(model)).makers
    if not _finite(prepared, [name for name in makers if name not in known]):
        return None
    names = [node.name for node in asked if not set(joined).isdisjoint(node.outputs)]
    shown = ", ".join(names[:SHOWN]) + (", ..." if names[SHOWN:] else "")
    log.info(f"Note: what is inside of both branches is counted, and pruned like the rest: {shown}")
    return replace(prepared, nest=(*prepared.nest, model))


def _finite(prepared: graph.Prepared, names: Iterable[str]) -> bool:
    """Whether all floating ones of these tensors that depend on data are finite on the sample."""
    kinds = {name: prepared.types.get(name) or np.int64 for name in names if name not in prepared.trace.data_free}
    wanted = {name: dtype for name, dtype in kinds.items() if np.dtype(dtype).kind == "f"}
    if not wanted:
        return True
    part = segment(prepared.model, [], wanted, prepared.index)
    read = {port.name for port in graph.inputs(part)}
    feeds = {name: array for name, array in prepared.feeds.items() if name in read}
    return all(np.isfinite(value).all() for value in open_model(part, Optimize.NONE).run(feeds, list(wanted)))


def _vary(observe: Observer, feeds: Mapping[str, Array], ports: Sequence[Port]) -> tuple[list[Observation], dict[str, Array] | None, bool]:
    """Observations with other dynamic sizes, inputs of one of them, and whether all dynamic dimensions were changed in some."""
    open_axes = {(port.name, axis) for port in ports for axis, dim in enumerate(port.shape or ()) if not isinstance(dim, int)}
    if not open_axes:
        return [], None, True
    unchanged, used = set(open_axes), None
    observations: list[Observation] = []
    for variant in _variants(ports, feeds):
        changed = {(name, axis) for name, axis in open_axes if variant[name].shape[axis] != feeds[name].shape[axis]}
        spare = all(axis == 0 for _, axis in changed) or any(variant[name].size < array.size for name, array in feeds.items())
        if not changed or (observations and spare and not changed & unchanged):
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


# ---- what shapes and constants decide --------------------------------------------------------------------------------

SHOWN = 3  # names in a sentence
TRIED_SIZES = (1, 2, 3, 7, 1024)  # of dimensions that may have any


def _decided(model: graph.Model, trace: Trace) -> dict[int, bool]:
    """Which way nodes go that choose between two sub-graphs by constants and sizes that are the same whatever is fed, by their index."""
    nodes, constants = graph.nodes(model), graph.Constants(model)
    index, chosen = graph.GraphIndex(nodes), {}
    asked = [node.outputs[0] for node in nodes if has(node, Trait.SIZES) and node.outputs[0] in trace.values]
    for node in nodes:
        if has(node, Trait.CHOOSES) and (node.inputs[0] in constants or node.inputs[0] in trace.values):
            ways = {bool(constants[node.inputs[0]])} if node.inputs[0] in constants else _ways(model, index, node.inputs[0], asked, trace)
            if len(ways) == 1:
                chosen[node.index] = ways.pop()
    return chosen


def _ways(model: graph.Model, index: graph.GraphIndex, name: str, asked: Sequence[str], trace: Trace) -> set[bool]:
    """The value of a condition, if no number that is compared for it depends on a dynamic size: all are set to others, one by one and
    together. None if one does, or it cannot be computed."""
    ports = [Port(size, trace.values[size].dtype, trace.values[size].shape) for size in asked]
    made = [output for node in index.needed([name], asked) for output in node.outputs if output]
    program = segment(model, ports, dict.fromkeys(made), index)
    read = {port.name: trace.values[port.name] for port in graph.inputs(program) if port.name in trace.values}
    open_places = [(size, at) for size in read for at in np.argwhere(trace.dynamic_values[size]).tolist()]
    if len(read) < len(graph.inputs(program)):
        return set()
    session, runs = open_model(program, Optimize.NONE), []
    for places, size in product([[], open_places, *([place] for place in open_places)], TRIED_SIZES):
        feeds = {key: value.copy() for key, value in read.items()}
        for key, at in places:
            feeds[key][tuple(at)] = size
        try:
            runs.append({**feeds, **dict(zip(made, session.run(feeds, made), strict=True))})
        except ModelError:
            continue  # these sizes do not go together
    if not runs:
        return set()
    compared = {item for node in index.needed([name], asked) if runs[0][node.outputs[0]].dtype == bool for item in node.inputs} & {*runs[0]}
    steady = all(np.array_equal(run[item], runs[0][item]) for run in runs for item in compared)
    return {bool(runs[0][name])} if steady else set()


# ---- folding ---------------------------------------------------------------------------------------------------------


def _fold(model: graph.Model, trace: Trace) -> graph.Model:
    """Replace static data-free tensors that other nodes read by constants (unless that would grow the file). What is computed from 16-bit
    numbers and is one of them is stored as that."""
    nodes, held = graph.nodes(model), graph.initializers(model)
    free = data_free(nodes, held)
    kept = {*held, *(port.name for port in graph.outputs(model)), *(name for node in nodes for name in node.captures), *model.conditions}
    kept |= {node.inputs[0] for node in nodes if has(node, Trait.CHOOSES)}
    roots = {name: prod(shape) * int(np.dtype(dtype).itemsize) for name, (shape, dtype) in held.items()}
    narrow = {name: np.dtype(dtype) for name, (_, dtype) in held.items() if np.dtype(dtype).name in NARROW}
    wanted: dict[str, tuple[Array, Any]] = {}
    for node in nodes:
        kinds = {narrow.get(item) for item in node.inputs if item in narrow or np.dtype(held.get(item, WHOLE).dtype).kind == "f"}
        for name in node.outputs:
            roots[name] = sum(roots.get(item, 0) for item in set(node.inputs))
            if len(kinds) == 1 and None not in kinds:
                narrow[name] = next(filter(None, kinds))
        if set(node.outputs) & free:
            continue
        for name in node.inputs:
            value = trace.values.get(name) if name not in kept else None
            if value is None or trace.dynamic_values[name].any():
                continue
            stored = narrow.get(name) if value.dtype == np.float32 else None
            stored = stored if stored is not None and np.array_equal(value.astype(stored).astype(np.float32), value) else None
            if value.nbytes <= max(FOLD_BYTES, roots[name]) * (2 if stored else 1):
                wanted[name] = value, stored
    makers = graph.GraphIndex(nodes).makers
    wanted = {name: item for name, item in wanted.items() if item[1] is None or makers[name].inputs[0] not in held}
    if not wanted:
        return model
    editor = Editor(model)
    for name, (value, stored) in wanted.items():
        editor.replace_tensor(name, value, stored)
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
