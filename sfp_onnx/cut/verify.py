"""Proof that the cut did what the plan says: pruned(x) == original(x) with the planned channels masked to zero."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..core.errors import ModelError, VerificationError
from ..core.types import Array, Cut, Node, Port
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
    that differs is compared where rounding has not been magnified yet (see `Inside`), or may differ as much as rounding makes it.

    Raises:
        VerificationError: an output differs by more than the tolerance of its type (1e-4 for float32), there too.
    """
    reference = masked(original, types, cuts)
    sessions = [open_model(model, Optimize.NONE) for model in (pruned, reference)]
    names = [port.name for port in outputs(original)]
    floor = _coarsest(types, cuts)
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
                tolerance = max(tolerance, floor or TOLERANCE["float32"])
                inside = inside or Inside.of((original, reference, pruned), types, cuts, inputs, tolerance)
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
                    place = f"in front of {inside.where(name)}, behind which rounding shows"
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
    """Every tensor that the original (masked: ``expected``, without the removed channels) and the pruned model (``got``) have in common,
    and who makes it in the one and in the other.

    What nodes make of which something was cut has to agree. What both models make by the same node from tensors that are right is right:
    a Sigmoid near 0 or a division by little may magnify rounding. What steps at a threshold (a rank, a comparison) or is
    random is read by the pruned model as the original gives it, and has to be made from what is right.
    """

    expected: Mapping[str, Any]
    got: Mapping[str, Any]
    makers: Sequence[Mapping[str, Node]]
    steps: tuple[Node, ...]
    cut: frozenset[str]
    tolerance: float
    known: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, models: tuple[Model, Model, Model], types: Mapping[str, Any], cuts: Sequence[Cut], inputs: Feeds, tolerance: float
    ) -> Inside:
        """Run both models, the original and its masked form behind one another in ``models``, on ``inputs``."""
        original, reference, pruned = models
        makers = [GraphIndex(nodes(model)).makers for model in (original, pruned)]
        constants = Constants(pruned)
        common = {name: types.get(name) for name in (*makers[1], *constants) if name in makers[0] and types.get(name, 0) is not None}
        values = dict(zip(common, open_model(segment(reference, [], common), Optimize.NONE).run(inputs, list(common)), strict=True))
        expected = {**Constants(original), **{name: _without(value, name, cuts) for name, value in values.items()}, **inputs}
        steps = tuple(node for node in nodes(pruned) if _steps(node, expected) and node.outputs[0] in makers[0])
        given = {name: expected[name] for node in steps for name in node.outputs if name}
        wanted = {name: dtype for name, dtype in common.items() if name not in constants and name not in given}
        part = segment(pruned, [Port(name, value.dtype, None) for name, value in given.items()], wanted)
        read = {port.name for port in input_ports(part)}
        fed = {name: value for name, value in {**inputs, **given}.items() if name in read}
        run: dict[str, Any] = {}
        with suppress(ModelError):  # a step of the original does not fit: nothing is known of the pruned model then
            run = dict(zip(wanted, open_model(part, Optimize.NONE).run(fed, list(wanted)), strict=True))
        return cls(expected, {**constants, **run, **given, **inputs}, makers, steps, frozenset(cut.tensor for cut in cuts), tolerance)

    def error(self, output: str) -> float:
        """The largest difference of what has to agree, relative to how much the values spread there."""
        return max([self._error(output), *(self._error(name) for node in self.steps for name in node.reads)])

    def _error(self, name: str) -> float:
        if name not in self.known:
            one, other = (makers.get(name) for makers in self.makers)
            same = one is not None and other is not None and bool(one.reads) and self._alike(one, other)
            self.known[name] = max(map(self._error, one.reads)) if one and same else self._difference(name)
        return self.known[name]

    def _alike(self, one: Node, other: Node) -> bool:
        """Whether two nodes do the same to the same tensors, of which nothing was cut."""
        whole = all(name not in self.makers[1] and not self._difference(name) for name in one.reads if name not in self.makers[0])
        return same_node(one, other) and whole and not {*one.reads, *one.outputs} & self.cut

    def _difference(self, name: str) -> float:
        got, expected = self.got.get(name), self.expected.get(name)
        if not isinstance(got, np.ndarray) or not isinstance(expected, np.ndarray):
            return float("inf")
        if self.tolerance >= ROUNDING_STEP and expected.dtype.kind in "iu":
            got, expected = got.astype(np.float32), expected.astype(np.float32)
        error = relative_error(got, expected)
        if not error or not np.isfinite(error) or not np.isfinite(expected).all():
            return error
        values = expected.astype(np.float64)
        scale, spread = np.abs(values).max(), np.abs(values - values.mean()).max()
        least = GRAINS * np.finfo(expected.dtype).eps / self.tolerance * scale
        return float(error * scale / max(spread, least))

    def where(self, output: str) -> str:
        """The first node on the way to an output behind which the models differ by more than they do in front of it."""
        names, met = [output], set()
        last = output
        while names:
            name = names.pop()
            node = self.makers[1].get(name)
            if name in met or node is None or self._difference(name) <= self.tolerance:
                continue
            met.add(name)
            last = name
            names += node.reads
        return f"'{self.makers[1][last].name}' ({self.makers[1][last].op})"


def _without(value: Any, name: str, cuts: Sequence[Cut]) -> Any:
    """A tensor of the original without its removed channels."""
    for cut in cuts:
        if cut.tensor == name and isinstance(value, np.ndarray) and value.ndim == cut.rank and value.shape[cut.axis] == cut.size:
            value = np.delete(value, list(cut.removed), cut.axis)
    return value


def _steps(node: Node, values: Mapping[str, Any]) -> bool:
    """Whether a last bit of an input, or chance, may change an output by a whole step: floats become integers, say."""
    outputs, read = ([values.get(name) for name in names if name] for names in (node.outputs, node.inputs))
    if any(value is None for value in outputs):
        return False
    kinds = [[getattr(getattr(value, "dtype", None), "kind", "") for value in values] for values in (outputs, read)]
    return has(node, Trait.STEPS) or ("f" in kinds[1] and bool({*kinds[0]} & {*"iub"}) and not has(node, Trait.SIZES))


def _coarsest(types: Mapping[str, Any], cuts: Sequence[Cut]) -> float:
    """Tolerance of the coarsest arithmetic inside: half precision, or the rounding of quantised tensors."""
    half = any(dtype == np.float16 for dtype in types.values() if dtype is not None)
    steps = any(cut.zero_point is not None for cut in cuts)
    return max(TOLERANCE["float16"] if half else 0.0, ROUNDING_STEP if steps else 0.0)


def runs_at(original: Model, pruned: Model, inputs: Feeds, shapes: bool) -> None:
    """Run both models on inputs of other dynamic sizes, with constant folding, which believes the shapes recorded in the file.

    ``shapes``: compare the shapes of the outputs too (some depend on values, so this is for want of a comparison of those).

    Raises:
        VerificationError: the pruned model does not run there, or gives other shapes.
    """
    sessions = [open_model(model, Optimize.BASIC) for model in (original, pruned)]
    names = [port.name for port in outputs(original)]
    expected = [np.shape(value) for value in sessions[0].run(inputs, names)]
    sizes = {name: list(array.shape) for name, array in inputs.items()}
    try:
        shapes_after = [np.shape(value) for value in sessions[1].run(inputs, names)]
    except ModelError as error:
        raise VerificationError(f"{original.name}: the pruned model fails on inputs of shape {sizes}: {error}") from error
    if shapes and shapes_after != expected:
        differ = f"the pruned model gives outputs of shape {shapes_after}, the original {expected}"
        raise VerificationError(f"{original.name}: on inputs of shape {sizes} {differ}. Nothing was written. Please report this model.")
