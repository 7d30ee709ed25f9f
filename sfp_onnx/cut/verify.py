"""Proof that the cut did what the plan says: pruned(x) == original(x) with the planned channels masked to zero."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..core.errors import ModelError, VerificationError
from ..core.types import Array, Cut, Node, Port
from ..coupling.trace import data_free
from ..graph import Constants, GraphIndex, Model, inputs as input_ports, nodes, outputs, same_node
from ..graph.edit import QUANTIZED, Editor, insert_mask, zero_of
from ..graph.extract import segment, with_constants
from ..rules.registry import Trait, has
from ..runtime import Feeds, Optimize, open_model

ROUNDING_STEP = 2e-2  # a last-bit difference before a QuantizeLinear may flip one of its 2^8 steps
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2}


@dataclass(frozen=True)
class Verification:
    """Largest relative difference between the pruned model and the masked original, per kind of input; ``notes`` say where they were
    compared if not at an output."""

    errors: Mapping[str, float]
    tolerance: float
    notes: tuple[str, ...] = ()


def masked(model: Model, types: Mapping[str, Any], cuts: Iterable[Cut]) -> Model:
    """The original model with the removed channels of every listed tensor set to zero (also where they are infinite)."""
    editor, constants = Editor(model), Constants(model)
    for cut in cuts:
        dtype = np.dtype(types.get(cut.tensor) or types.get(cut.zero_point or "") or np.float32)
        shape = [1] * cut.rank
        shape[cut.axis] = cut.size
        mask = np.ones(cut.size, bool)
        mask[list(cut.removed)] = False
        put = _constant(editor, f"{cut.tensor}/mask", mask.reshape(shape))
        insert_mask(editor, cut.tensor, dtype, put, zero_of(constants, cut.zero_point, shape), select=True)
    return editor.finish()


def _constant(editor: Editor, name: str, mask: Array) -> Callable[[Any], Any]:
    return lambda dtype: editor.constant(name, mask.astype(dtype))


def maskable(types: Mapping[str, Any], cuts: Iterable[Cut], zero_points: Mapping[str, str]) -> list[Cut]:
    """Cuts with the zero point of quantised tensors; those whose zero point is unknown are left out."""
    listed = []
    for cut in cuts:
        point = zero_points.get(cut.tensor)
        dtype = np.dtype(types.get(cut.tensor) or types.get(point or "") or np.float32)
        if dtype.name not in QUANTIZED:
            listed.append(cut)
        elif point is not None:
            listed.append(replace(cut, zero_point=point))
    return listed


def relative_error(output: Any, expected: Any) -> float:
    """max |output - expected| / max |expected| (equal non-finite values agree; all but floating arrays must be equal).

    Infinity for other shapes or types.
    """
    if not isinstance(expected, np.ndarray):
        return 0.0 if str(output) == str(expected) else float("inf")
    if output.shape != expected.shape or output.dtype != expected.dtype:
        return float("inf")
    if not expected.size:
        return 0.0
    if expected.dtype.kind != "f":
        return 0.0 if (output == expected).all() else float("inf")
    a, b = output.astype(np.float64), expected.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if not np.isfinite(a[~same]).all() or not np.isfinite(b[~same]).all():
        return float("inf")
    scale = np.abs(b[np.isfinite(b)]).max(initial=0.0)
    difference = np.abs(a[~same] - b[~same]).max(initial=0.0)
    return float(difference / scale) if scale else float(difference)


def compare(original: Model, pruned: Model, types: Mapping[str, Any], cuts: Sequence[Cut], feeds: Mapping[str, Feeds]) -> Verification:
    """Run the pruned model and the masked original on each of ``feeds`` (name -> inputs), without onnxruntime's optimisations. An output
    that differs is compared where rounding has not been magnified yet (see `Inside`), or may differ as much as rounding makes it. Models
    with 8-bit weights that differ even so are compared with products that do not saturate: which do, depends on what stands beside them.

    Raises:
        VerificationError: an output differs by more than the tolerance of its type (1e-4 for float32), there too.
    """
    try:
        return _compared(original, pruned, types, cuts, feeds, Optimize.NONE)
    except VerificationError:
        if not any(array.dtype == np.int8 for array in Constants(original).values()):
            raise
    return _compared(original, pruned, types, cuts, feeds, Optimize.EXACT_INTEGERS)


def _compared(
    original: Model, pruned: Model, types: Mapping[str, Any], cuts: Sequence[Cut], feeds: Mapping[str, Feeds], optimize: Optimize
) -> Verification:
    reference = masked(original, types, cuts)
    sessions = [open_model(model, optimize) for model in (pruned, reference)]
    names = [port.name for port in outputs(original)]
    floor = _coarsest(original, types, cuts)
    errors: dict[str, float] = {}
    limit = 0.0
    notes: dict[str, None] = {}
    for kind, inputs in feeds.items():
        pruned_outputs, expected = (session.run(inputs, names) for session in sessions)
        inside: Inside | None = None
        for name, output, other in zip(names, pruned_outputs, expected, strict=True):
            error, tolerance = relative_error(output, other), max(floor, TOLERANCE.get(str(getattr(other, "dtype", "")), 0.0))
            far = not error <= tolerance
            if far or getattr(getattr(other, "dtype", None), "kind", "f") in "iub":  # few integers agree by chance
                tolerance = tolerance or TOLERANCE["float32"]
                inside = inside or Inside.of(_Ends(original, pruned, cuts, optimize), reference, types, inputs, tolerance)
                closer = inside.error(name)
                noise = min(NOISES * _noise(reference, inputs, name), MOST_NOISE) if not closer <= tolerance else 0.0
                if not (closer <= tolerance or error <= noise > 0):
                    worse = max(error, closer)
                    differs = f"differs from the masked original by {worse:.3g} (relative, {kind} input; allowed {tolerance:g})"
                    way = f"Please report this model; --keep on the layers near '{cuts[0].tensor if cuts else name}' may work around it."
                    raise VerificationError(f"{original.name}: output '{name}' of the pruned model {differs}. Nothing was written. {way}")
                if noise:
                    notes[f"output '{name}' differs from the masked original, by no more than rounding alone makes of it"] = None
                elif far:
                    place = f"at {inside.where(name)}, behind which rounding shows"
                    notes[f"output '{name}' was compared with the masked original {place}"] = None
                error, tolerance = (error, noise) if noise else (closer, tolerance)
            errors[kind] = max(errors.get(kind, 0.0), error)
            limit = max(limit, tolerance)
    return Verification(errors, limit, tuple(notes))


NOISES, MOST_NOISE = 8, 1e-2  # times what a last bit of the weights changes; no difference above this is rounding


def _noise(model: Model, inputs: Feeds, output: str) -> float:
    """How much an output changes if every weight and input is changed by up to its last bit."""
    generator = np.random.default_rng(0)

    def jittered(arrays: Mapping[str, Array]) -> dict[str, Array]:
        floats = {name: array for name, array in arrays.items() if array.dtype.kind == "f"}
        steps = {name: np.finfo(array.dtype).eps * generator.uniform(-1, 1, array.shape) for name, array in floats.items()}
        return {name: (array * (1 + steps[name])).astype(array.dtype) for name, array in floats.items()}

    runs = ((model, inputs), (with_constants(model, jittered(Constants(model))), {**inputs, **jittered(inputs)}))
    (before,), (after,) = (open_model(one, Optimize.NONE).run(feeds, [output]) for one, feeds in runs)
    error = relative_error(after, before)
    return error if np.isfinite(error) else 0.0


# ---- where an output differs by rounding alone -----------------------------------------------------------------------

GRAINS = 32  # differences of so many last bits of the largest number are rounding, however little the others spread


@dataclass(frozen=True)
class Inside:
    """Where the pruned model has to agree with the original (masked, without the removed channels) for its outputs to be right: ``errors``
    by tensor, relative to how much the values spread there.

    What nodes make of which something was cut has to agree. What both models make by the same node from tensors that are right is right:
    a Sigmoid near 0 or a division by little may magnify rounding. What steps at a threshold (a rank, a comparison) or is
    random is read by the pruned model as the original gives it, and has to be made from what is right.
    """

    errors: Mapping[str, float]
    ends: _Ends
    stepping: tuple[str, ...]

    @classmethod
    def of(cls, ends: _Ends, reference: Model, types: Mapping[str, Any], inputs: Feeds, tolerance: float) -> Inside:
        """Run both models on ``inputs``."""
        pruned, cuts = ends.pruned, ends.cuts
        steps = ends.steps(types)
        stepping = tuple(name for node in steps for name in node.reads)
        places = ends.behind([*ends.outputs, *stepping])
        given = list(dict.fromkeys(name for node in steps for name in node.outputs if name))
        asked = {name: types.get(name) for name in dict.fromkeys([*places, *given]) if name not in ends.before}
        found = _run(segment(reference, [], asked), inputs, list(asked), ends.optimize)
        expected = {name: _without(value, name, cuts) for name, value in {**ends.before, **found}.items()}
        wanted = {name: asked.get(name) for name in places if name not in ends.constants and name not in given}
        part = segment(pruned, [Port(name, expected[name].dtype, None) for name in given], wanted)
        steady = {name: expected[name] for name in given}
        known = {name: _as_large(value, expected.get(name)) for name, value in ends.constants.items()}  # those of vanished branches, too
        got: dict[str, Any] = {**known, **steady}
        with suppress(ModelError):  # a step of the original does not fit: nothing is known of the pruned model then
            got |= _run(part, {**inputs, **steady}, list(wanted), ends.optimize)
        return cls({name: _difference(got.get(name), expected.get(name), tolerance) for name in places}, ends, stepping)

    def error(self, output: str) -> float:
        """The largest that concerns an output: what it is made from, and every step."""
        return max((self.errors[name] for name in self.ends.behind([output, *self.stepping])), default=0.0)

    def where(self, output: str) -> str:
        """The tensors that were compared for an output, in words."""
        names = self.ends.behind([output])
        return ", ".join(f"'{name}'" for name in names[:SHOWN]) + (", ..." if names[SHOWN:] else "")


SHOWN = 3


@dataclass(frozen=True)
class _Ends:
    """Two models that were the same before a cut."""

    original: Model
    pruned: Model
    cuts: Sequence[Cut]
    optimize: Optimize

    @cached_property
    def outputs(self) -> list[str]:
        return [port.name for port in outputs(self.original)]

    @cached_property
    def makers(self) -> tuple[Mapping[str, Node], Mapping[str, Node]]:
        return GraphIndex(nodes(self.original)).makers, GraphIndex(nodes(self.pruned)).makers

    @cached_property
    def before(self) -> Mapping[str, Array]:
        return Constants(self.original)

    @cached_property
    def constants(self) -> Mapping[str, Array]:
        return Constants(self.pruned)

    def steps(self, types: Mapping[str, Any]) -> list[Node]:
        """Nodes of which the last bit of an input, or chance, may change an output by a whole step: floats become integers, say."""
        free = data_free(nodes(self.pruned), self.constants)

        def kinds(names: Iterable[str]) -> set[str]:
            return {"?" if types.get(name) is None else "f" if "float" in np.dtype(types[name]).name else "i" for name in names if name}

        return [
            node for node in nodes(self.pruned)
            if all(name in self.makers[0] and name not in free for name in node.outputs if name) and "?" not in kinds(node.outputs)
            and not node.captures and not has(node, Trait.SIZES)
            and (has(node, Trait.STEPS) or ("f" in kinds(node.inputs) and "i" in kinds(node.outputs)))
        ]  # fmt: skip

    def behind(self, names: Iterable[str]) -> list[str]:
        """What has to agree for these tensors to be right: going up from them, the first that are not made alike."""
        waiting, met, found = list(names), set[str](), []
        while waiting:
            name = waiting.pop()
            if name in met:
                continue
            met.add(name)
            one, other = (makers.get(name) for makers in self.makers)
            if one is not None and other is not None and one.reads and self._alike(one, other):
                waiting += one.reads
            elif one is not None or other is not None or not self._equal(name):
                found.append(name)
        return found

    def _alike(self, one: Node, other: Node) -> bool:
        """Whether two nodes do the same to the same tensors, of which nothing was cut."""
        cut = {item.tensor for item in self.cuts}
        return same_node(one, other) and all(map(self._equal, one.reads)) and cut.isdisjoint((*one.reads, *one.outputs))

    def _equal(self, name: str) -> bool:
        """Whether a tensor is no constant, or the same in both models (or was computed from constants once)."""
        if name not in self.constants or name in self.makers[0]:
            return True
        return name in self.before and relative_error(self.constants[name], self.before[name]) == 0


def _as_large(value: Array, like: Any) -> Array:
    """A constant that stands for a tensor, as large as that."""
    sizes = zip(value.shape, np.shape(like), strict=False)
    fits = value.ndim == np.ndim(like) and all(own in (1, size) for own, size in sizes)
    return np.broadcast_to(value, np.shape(like)) if fits else value


def _run(model: Model, values: Feeds, names: Sequence[str], optimize: Optimize) -> dict[str, Any]:
    """Tensors of a part of a model, which reads some of the values."""
    read = {port.name for port in input_ports(model)}
    feeds = {name: value for name, value in values.items() if name in read}
    return dict(zip(names, open_model(model, optimize).run(feeds, names), strict=True))


def _difference(got: Any, expected: Any, tolerance: float) -> float:
    """The relative error, but of the spread of the values instead of the largest, down to some last bits of that."""
    if not isinstance(got, np.ndarray) or not isinstance(expected, np.ndarray):
        return float("inf")
    if tolerance >= ROUNDING_STEP and expected.dtype.kind in "iu":
        got, expected = got.astype(np.float32), expected.astype(np.float32)
    error = relative_error(got, expected)
    if not error or not np.isfinite(error) or not np.isfinite(expected).all():
        return error
    values = expected.astype(np.float64)
    scale, spread = np.abs(values).max(), np.abs(values - values.mean()).max()
    return float(error * scale / max(spread, GRAINS * np.finfo(expected.dtype).eps / tolerance * scale))


def _without(value: Any, name: str, cuts: Sequence[Cut]) -> Any:
    """A tensor of the original without its removed channels."""
    for cut in cuts:
        if cut.tensor == name and isinstance(value, np.ndarray) and value.ndim == cut.rank and value.shape[cut.axis] == cut.size:
            value = np.delete(value, list(cut.removed), cut.axis)
    return value


def _coarsest(model: Model, types: Mapping[str, Any], cuts: Sequence[Cut]) -> float:
    """Tolerance of the coarsest arithmetic inside: half precision (not of constants alone), or the rounding of quantised tensors."""
    made = (types.get(name) for node in nodes(model) for name in node.outputs)
    half = any(dtype == np.float16 for dtype in made if dtype is not None)
    steps = any(cut.zero_point is not None for cut in cuts)
    return max(TOLERANCE["float16"] if half else 0.0, ROUNDING_STEP if steps else 0.0)


def _shape(value: Any) -> Any:
    """Shape of an output, of a sequence that of every item."""
    return [np.shape(item) for item in value] if isinstance(value, list) else np.shape(value)


def runs_at(original: Model, pruned: Model, inputs: Feeds, shapes: bool) -> None:
    """Run both models on inputs of other dynamic sizes, with constant folding, which believes the shapes recorded in the file.

    ``shapes``: compare the shapes of the outputs too (some depend on values, so this is for want of a comparison of those).

    Raises:
        VerificationError: the pruned model does not run there, or gives other shapes.
    """
    sessions = [open_model(model, Optimize.BASIC) for model in (original, pruned)]
    names = [port.name for port in outputs(original)]
    expected = [_shape(value) for value in sessions[0].run(inputs, names)]
    sizes = {name: list(array.shape) for name, array in inputs.items()}
    try:
        shapes_after = [_shape(value) for value in sessions[1].run(inputs, names)]
    except ModelError as error:
        raise VerificationError(f"{original.name}: the pruned model fails on inputs of shape {sizes}: {error}") from error
    if shapes and shapes_after != expected:
        differ = f"the pruned model gives outputs of shape {shapes_after}, the original {expected}"
        raise VerificationError(f"{original.name}: on inputs of shape {sizes} {differ}. Nothing was written. Please report this model.")
