"""What the user asks of the result, upper bounds on figures of the model, all in one registry; and what comes of it: plans as records."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import OptionError, PlanError
from ..core.types import OUTPUTS, BoolArray, Coupling, Factor, FloatArray, Group, GroupPlan, IntArray, Plan, Precision, Size
from ..coupling.cost import Whole, emptied, layer_macs, removal, uneven
from ..graph import Model
from ..graph.stored import STORED

if TYPE_CHECKING:
    from ..coupling.analysis import Analysis

TIMED_NOISE = 0.005  # of what is timed, relative to a bound: it counts as held up to it
VERSIONS = (1, 2)  # of plans
COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}


@dataclass(frozen=True)
class Halves:
    """What layers that may become two are at candidates, (..., layers): how many channels they ``read`` and have ``made``, their ``rank``
    (0: whole), whether their ``inputs`` are narrowed, and the ``codes`` of how both halves are stored. Of each (layers,): ``positions``
    that it makes of one sample, ``taps`` of its window, how many times as many positions it reads (``stretch``), bytes of a weight that is
    stored as it is (``each``), and the index of its ``node``."""

    read: FloatArray
    made: FloatArray
    rank: FloatArray
    inputs: BoolArray
    positions: FloatArray
    taps: FloatArray
    stretch: FloatArray
    each: FloatArray
    node: IntArray
    codes: IntArray

    @property
    def whole(self) -> FloatArray:
        """Weights of the whole."""
        return np.asarray(self.taps * self.read * self.made)

    @property
    def sides(self) -> tuple[FloatArray, FloatArray]:
        """Weights per channel between both, of the half that reads the window and of the other; the latter is in front of narrow inputs."""
        return np.asarray(self.taps * np.where(self.inputs, self.made, self.read)), np.asarray(np.where(self.inputs, self.read, self.made))

    @property
    def weights(self) -> FloatArray:
        """Weights that are saved (negative: they are more)."""
        return np.asarray(np.where(self.rank > 0, self.whole - self.rank * sum(self.sides), 0.0))

    @property
    def macs(self) -> FloatArray:
        """Multiply-accumulates of one sample that are saved."""
        window, other = self.sides
        half = window + np.where(self.inputs, self.stretch, 1.0) * other
        return np.asarray(np.where(self.rank > 0, self.positions * (self.whole - self.rank * half), 0.0))


@dataclass(frozen=True)
class Gauge:
    """One figure of one model.

    ``predicted`` is the figure after a removal that is not built; ``cost`` that (...) of candidates (..., groups) of kept units, for the
    solver (where it depends on how weights are stored, with their codes behind the groups, and ``at`` is this gauge for models of such
    codes); ``measured`` that of a built model (None: nothing is known better than the prediction). ``before`` is that of the original
    (None: as predicted for no removal).

    ``saved`` is what of it (...) layers save that become two (None: unknown, so that none does).

    For what is timed: ``again`` is this gauge after a new measurement around the widths after a removal, ``block`` the channels in which
    the device makes convolutions, ``how`` the figure is known (for messages), ``notes`` what the user should know of it, ``slower`` the
    storable weights whose layers integers would not make faster.
    """

    predicted: Callable[[BoolArray], float]
    cost: Callable[[IntArray], FloatArray]
    measured: Callable[[Model], float] | None = None
    before: float | None = None
    again: Callable[[BoolArray], Gauge] | None = None
    block: int | None = None
    how: str = ""
    notes: tuple[str, ...] = ()
    saved: Callable[[Halves], FloatArray] | None = None
    at: Callable[[Sequence[int]], Gauge] | None = None
    slower: tuple[int, ...] = ()


@dataclass(frozen=True)
class Figure:
    """A kind of target.

    ``units`` gives the factor of each unit in lower case; ``examples`` are targets as users write them; ``shown`` is a figure for people;
    ``gauge`` makes the `Gauge` of a model from a `figures.Scene`. ``timed``: it depends on a machine, and has noise; else it is counted.
    ``solved``: by default the solver chooses widths for it, since the same share of every group is a poor way to hold it.
    ``shaped``: it depends on the sizes of dynamic inputs.
    """

    name: str
    units: Mapping[str, float]
    examples: tuple[str, ...]
    gauge: Callable[..., Gauge]
    shown: Callable[[float], str] = "{:,.0f}".format
    timed: bool = False
    solved: bool = False
    shaped: bool = True


FIGURES: dict[str, Figure] = {}
Maker = Callable[..., Gauge]


def figure(name: str, units: Mapping[str, float], *examples: str, **facts: Any) -> Callable[[Maker], Maker]:
    """Register a function that makes gauges as a figure that targets may name; ``facts`` are further fields of `Figure`."""

    def register(gauge: Maker) -> Maker:
        FIGURES[name] = Figure(name, units, examples, gauge, **facts)
        return gauge

    return register


@dataclass(frozen=True)
class Target:
    """An upper bound on a figure of the result, as a share of the original or an absolute number (bytes, seconds)."""

    what: str
    value: float
    relative: bool

    @property
    def figure(self) -> Figure:
        """What is bounded."""
        return FIGURES[self.what]

    def bound(self, before: Mapping[str, float]) -> float:
        """The bound as an absolute number, from the figures of the original."""
        return self.value * before[self.what] if self.relative else self.value


ALIASES = {"flops": "macs"}  # in shares: a multiply-accumulate is two operations, before as after


def parse_target(text: str) -> Target:
    """Read ``macs=50%``, ``params=120k``, ``size=2MB``, ``latency=5ms``, ``latency=2x`` (twice as fast: half of the original), ...

    Raises:
        OptionError: not of that form, or out of range.
    """
    match = re.fullmatch(r"\s*([a-z]+)\s*=\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*(%|[a-zµ]*)\s*", text, re.IGNORECASE)
    name, unit = (match[1].lower(), match[3].lower()) if match else ("", "")
    what, value = ALIASES.get(name, name), float(match[2]) if match else 0.0
    shares = {"%": 0.01, "x": 0.0}
    units = {**shares, **({} if name in ALIASES else FIGURES[what].units)} if what in FIGURES else {}
    if unit not in units or not value > 0:
        *most, last = (example for known in FIGURES.values() for example in known.examples)
        hint = f"; units of {name}: {', '.join(filter(None, units))}" if units else ""
        raise OptionError(f"target '{text}': expected {', '.join(most)} or {last}{hint}")
    share = 1 / value if unit == "x" else value / 100
    if unit in shares and share > 1:
        raise OptionError(f"target '{text}': more than the original has; expected macs=50% of it, or latency=2x: twice as fast")
    if value < 1 and not unit:
        raise OptionError(f"target '{text}': less than one of them; for a share write {what}={100 * value:g}%")
    return Target(what, share, True) if unit in shares else Target(what, value * units[unit], False)


def mistaken(targets: Sequence[str]) -> str:
    """What to say of targets like ``macs=50``, which are numbers and were perhaps meant as shares."""
    plain = (text.strip() for text in targets if re.fullmatch(r"\s*[a-z]+\s*=\s*([0-9]{1,2}|100)\s*", text, re.IGNORECASE))
    return "".join(f" {text} is a number; a share is written {text}%." for text in plain)


def bounds(targets: Sequence[Target], before: Mapping[str, float]) -> dict[str, float]:
    """The tightest bound per figure, in the order in which figures were first named."""
    tightest: dict[str, float] = {}
    for target in targets:
        bound = target.bound(before)
        tightest[target.what] = min(bound, tightest.get(target.what, bound))
    return tightest


def show(what: str, value: float) -> str:
    """A figure for people."""
    return FIGURES[what].shown(value)


# ---- plans as records ------------------------------------------------------------------------------------------------


def make_plan(analysis: Analysis, removed: BoolArray, options: Mapping[str, object], factors: Sequence[Factor] = ()) -> Plan:
    """The plan for a removal and factors; every group is listed, also those that keep all units."""
    layers, samples = {layer.node.name: layer for layer in analysis.coupling.layers}, analysis.samples
    saved = {factor.layer: analysis.wholes[factor.layer].saved(removed, factor)[0] for factor in factors}
    plans, none = [], np.zeros(len(removed), bool)
    for group in analysis.coupling.groups:
        before = sum(layer_macs(layers[name], none) for name in group.producers) / samples
        after = sum(layer_macs(layers[name], removed) - saved.get(name, 0.0) for name in group.producers) / samples
        gone = tuple(int(index) for index in np.flatnonzero(removed[group.units]))
        plans.append(GroupPlan(group.name, group.producers, group.width, gone, before, after))
    sizes = analysis.size(), analysis.size(removed, factors)
    return Plan(analysis.model.sha256, tuple(plans), options, *sizes, factors=tuple(factors))


def to_json(plan: Plan) -> dict[str, object]:
    """A plan as plain data, for ``json.dump``. One with factors has another version, since programs that do not know these would make
    another model of it."""
    data = {"format": "sfp_onnx plan", "version": 2 if plan.factors else 1, **asdict(plan)}
    return data if plan.factors else {name: value for name, value in data.items() if name != "factors"}


def from_json(data: object) -> Plan:
    """Read a plan from plain data.

    Raises:
        PlanError: fields are missing or of the wrong type.
    """
    if not isinstance(data, dict) or data.get("format") != "sfp_onnx plan":
        raise PlanError("this JSON file is not an sfp_onnx plan (no \"format\": \"sfp_onnx plan\"). Make one with `sfp-onnx plan`.")
    if data.get("version") not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        raise PlanError(f"the plan has version {data.get('version')}; this program reads {known}. Make it again with `sfp-onnx plan`.")
    groups = tuple(_group(item) for item in _field(data, "groups", list))
    sizes = (_field(data, key, dict) for key in ("before", "after"))
    before, after = (Size(float(_field(size, "macs", (int, float))), _field(size, "params", int)) for size in sizes)
    notes = tuple(str(note) for note in data.get("notes") or ())
    stored = tuple(_precision(item) for item in _of_kind(data.get("precisions") or [], "field 'precisions'", list))
    figures = _of_kind(data.get("figures") or {}, "field 'figures'", dict)
    factors = tuple(_factor(item) for item in _of_kind(data.get("factors") or [], "field 'factors'", list))
    rest = before, after, notes, figures, factors, stored
    return Plan(_field(data, "model_sha256", str), groups, _field(data, "options", dict), *rest)


KINDS: Mapping[Any, str] = {str: "a text", int: "an integer", list: "a list", dict: "an object", (int, float): "a number"}


def _field(data: object, name: str, kind: Any) -> Any:
    """A field of a JSON object, of the wanted kind."""
    if not isinstance(data, dict) or name not in data:
        raise PlanError(f"the plan is damaged: field '{name}' is missing. Make it again with `sfp-onnx plan`.")
    return _of_kind(data[name], f"field '{name}'", kind)


def _of_kind(value: object, what: str, kind: Any) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise PlanError(f"the plan is damaged: {what} must be {KINDS[kind]}, found {value!r:.60}. Make it again with `sfp-onnx plan`.")
    return value


def _group(data: object) -> GroupPlan:
    name = _field(data, "group", str)
    remove = tuple(_of_kind(at, f"a channel of group '{name}'", int) for at in _field(data, "remove", list))
    producers = tuple(_of_kind(item, f"a producer of group '{name}'", str) for item in _field(data, "producers", list))
    before, after = (float(_field(data, key, (int, float))) for key in ("macs_before", "macs_after"))
    return GroupPlan(name, producers, _field(data, "width", int), remove, before, after)


def _factor(data: object) -> Factor:
    narrow = _of_kind(data.get("narrow", OUTPUTS), "field 'narrow'", str) if isinstance(data, dict) else ""
    return Factor(_field(data, "layer", str), _field(data, "rank", int), narrow)


def _precision(data: object) -> Precision:
    stored, error = _field(data, "stored", str), float(_field(data, "error", (int, float)))
    if stored not in STORED:
        raise PlanError(f"the plan stores a layer as '{stored}'; expected one of {', '.join(STORED)}.")
    weight = _of_kind(data.get("weight", ""), "field 'weight'", str) if isinstance(data, dict) else ""
    return Precision(_field(data, "layer", str), stored, error, str(_field(data, "reason", str)), weight)


def standing(plan: Plan, coupling: Coupling) -> Plan | None:
    """A plan that was made with what may be expanded, as one for the model as it stands, of which this is the coupling; None if something
    has to be expanded for it."""
    widths = {group.name: group.width for group in coupling.groups}
    if any(item.remove if item.group not in widths else item.width != widths[item.group] for item in plan.groups):
        return None
    layers = {layer.node.name for layer in coupling.layers}
    options = {name: value for name, value in plan.options.items() if name != "expand_outputs"}
    return replace(
        plan, groups=tuple(item for item in plan.groups if item.group in widths), options={**options, "cut_layernorm": False},
        precisions=tuple(item for item in plan.precisions if item.layer in layers),
    )  # fmt: skip


def sample_shapes(plan: Plan) -> dict[str, list[int]] | None:
    """Input shapes that the plan was made on, by name.

    Raises:
        PlanError: they are no such table.
    """
    shapes = plan.options.get("sample_shapes")
    if shapes is None:
        return None
    for name, shape in _of_kind(shapes, "options.sample_shapes", dict).items():
        for length in _of_kind(shape, f"options.sample_shapes of '{name}'", list):
            if _of_kind(length, f"a size in options.sample_shapes of '{name}'", int) < 1:
                raise PlanError(f"the plan is damaged: options.sample_shapes of '{name}' holds {length}; sizes start at 1.")
    return dict(shapes)


def removal_of(plan: Plan, coupling: Coupling, sha256: str) -> BoolArray:
    """Flags per unit of a plan, checked against the model.

    Raises:
        PlanError: made for another model, unknown group, duplicate or out-of-range channel, or a whole group.
    """
    if plan.model_sha256 != sha256:
        both = f"its SHA-256 is {plan.model_sha256[:12]}..., the model's is {sha256[:12]}..."
        raise PlanError(f"the plan was made for another model: {both}. Make the plan again for this model.")
    groups = {group.name: group for group in coupling.groups}
    listed: set[str] = set()
    for item in plan.groups:
        if item.group not in groups:
            raise PlanError(f"the plan names group '{item.group}', which the model does not have. `sfp-onnx inspect` lists them.")
        if item.group in listed:
            raise PlanError(f"the plan lists group '{item.group}' twice.")
        listed.add(item.group)
        _check(item, groups[item.group], item.group in coupling.branches)
    removed = removal(coupling, {item.group: item.remove for item in plan.groups})
    for group in uneven(coupling, removed):
        raise PlanError(
            f"group '{group.name}': the {group.blocks} groups of channels of its convolutions must keep as many each, and the plan leaves "
            f"{(~removed[group.units]).reshape(group.blocks, -1).sum(1).tolist()}. Remove as many from each, or none."
        )
    empty = emptied(coupling, removed)
    if empty:
        raise PlanError(f"the plan removes all {len(empty[0][1])} channels of tensor '{empty[0][0]}'; at least one must stay.")
    return removed


def layers_of(factors: Sequence[Factor], analysis: Analysis, removed: BoolArray) -> dict[str, Whole]:
    """The layers that the factors of a plan name, checked against the model after its removal.

    Raises:
        PlanError: a layer is not there, cannot become two or is listed twice, or a rank is out of range.
    """
    left = {layer.node.name for layer in analysis.left(removed)[0]} if factors else set()
    known, found = [name for name in analysis.wholes if name in left] if factors else [], dict[str, Whole]()
    for factor in factors:
        where = f"the plan's factor of layer '{factor.layer}'"
        if factor.layer not in known or factor.layer in found:
            why = "it is listed twice" if factor.layer in found else f"expected one of {', '.join(known) or 'none'}"
            raise PlanError(f"{where} fits no layer that can become two: {why}.")
        whole = found[factor.layer] = analysis.wholes[factor.layer]
        if factor.narrow not in whole.sides:
            raise PlanError(f"{where} narrows '{factor.narrow}'; expected {' or '.join(whole.sides)}.")
        most = min(whole.sizes(removed, factor.narrow)) - 1
        if not 1 <= factor.rank <= most:
            ranks = f"expected 1 to {most}, fewer channels than it reads and makes" if most > 0 else "the layer is too narrow to become two"
            raise PlanError(f"{where} has rank {factor.rank}: {ranks}.")
    return found


def _check(item: GroupPlan, group: Group, vanishes: bool) -> None:
    """Refuse what does not fit a group, of which all channels may leave if its branch ``vanishes``."""
    if item.width != group.width:
        raise PlanError(f"the plan gives group '{item.group}' {item.width} channels, the model has {group.width}.")
    outside = [at for at in item.remove if not 0 <= at < group.width]
    if outside:
        raise PlanError(f"group '{item.group}': channel {outside[0]} is out of range; expected 0 to {group.width - 1}.")
    if len(set(item.remove)) != len(item.remove):
        twice = next(at for at in item.remove if item.remove.count(at) > 1)
        raise PlanError(f"group '{item.group}': channel {twice} is listed twice.")
    if len(item.remove) >= group.width and not vanishes:
        raise PlanError(f"group '{item.group}': the plan removes all {group.width} channels; at least one must stay.")
