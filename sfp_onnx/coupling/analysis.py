"""Load a model and its data, and find out what can be pruned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..core.errors import DataError, ModelError
from ..core.system import log, quiet
from ..core.types import Array, BoolArray, Branch, Coupling, Factor, Group, IntArray, Layer, Node, Pinned, Shown, Size, number
from ..data.dataset import Dataset, Source, one_by_one, open_data
from ..data.layout import traced_samples
from ..graph import Model, Prepared, initializers, inputs, nodes, outputs
from ..graph.edit import with_projections
from ..graph.extract import body
from ..graph.load import ModelSource as ModelSource, load as load
from ..rules.foreign import bodies, sentences
from ..rules.labels import Facts, LayerFact, Reads, Writes, varying
from ..rules.registry import Trait, has
from ..runtime import Batch, Feeds, open_model
from . import GRAPH_OUTPUT, cost, resolve, state, written
from .fourier import with_transforms
from .tokens import tokens_of
from .trace import INTEGERS, Shapes, observed, prepare

DataSource = Source | Dataset
Progress = Callable[[str, int], AbstractContextManager[Callable[..., None]]]
"""``with progress(title, total) as advance: advance(steps)``, or ``advance(steps, text)`` with a word on how things stand."""


def silent(title: str, total: int) -> AbstractContextManager[Callable[..., None]]:
    """Progress that shows nothing."""
    return nullcontext(lambda steps, text=None: None)


@dataclass(frozen=True, repr=False)
class Analysis(Shown):
    """A model with its channel labels resolved: what can be pruned and what not. ``guessed``: inputs of which nothing told the shape.
    ``expanded``: operators that need all channels may be given them again; ``projected``: outputs with a projection in front of them,
    which only what was prepared has (see `inspect`)."""

    model: Model
    prepared: Prepared
    coupling: Coupling
    parameters: tuple[cost.Parameter, ...]
    samples: int
    expanded: bool = False
    guessed: frozenset[str] = frozenset()
    projected: tuple[str, ...] = ()

    @property
    def traced(self) -> dict[str, dict[str, Any]]:
        """Sample shapes of the inputs that leave more open than the batch, and whether these were guessed."""
        open_ = [port.name for port in inputs(self.model) if any(not isinstance(dim, int) for dim in (port.shape or ())[1:])]
        feeds = self.prepared.feeds
        return {name: {"shape": list(feeds[name].shape), "guessed": name in self.guessed} for name in open_ if name in feeds}

    def summary(self) -> str:
        """What of it can be pruned, and why not the rest."""
        size = self.size()
        counts = f"{number(size.macs)} MACs per sample, {number(size.params)} parameters"
        return f"{self.model.name}, {counts}; {self.coupling.summary()}\n{reasons(self.coupling)}"

    @cached_property
    def wholes(self) -> dict[str, cost.Whole]:
        """The layers that may become two, by name."""
        found = cost.wholes(self.prepared, self.coupling)
        return {name: whole for name, whole in found.items() if whole.layer.node.outputs[0] not in self.projected}

    @property
    def expanding(self) -> frozenset[str]:
        """The groups that can only shrink if something is expanded, or an output projected."""
        return self.coupling.expanding

    def expansions(self, removed: BoolArray) -> dict[str, int]:
        """What a removal has expanded: at how many places, by operator, and outputs that it has projected."""
        every = _expandable_axes(self.prepared, self.coupling)
        places = {node.index: node.op for node, units in every if not cost.keep_mask(units, removed).all()}
        outputs = ("output" for layer in self.projections if not cost.keep_mask(layer.reads, removed).all())
        return dict(Counter([*places.values(), *outputs]))

    @cached_property
    def projections(self) -> list[Layer]:
        """The layers that give outputs all their channels again."""
        return _projections(self.coupling, self.projected)

    def size(self, removed: BoolArray | None = None, factors: Sequence[Factor] = ()) -> Size:
        """MACs for one sample and parameters after a removal (default: of the original), and with factors."""
        if removed is None:
            return self._whole
        layers, parameters = self.left(removed)
        saved = [self.wholes[factor.layer].saved(removed, factor) for factor in factors]
        macs = cost.macs(layers, removed, self.samples) - sum(macs for macs, _ in saved) / self.samples
        return Size(macs, cost.params(parameters, removed) - sum(weights for _, weights in saved))

    @cached_property
    def _whole(self) -> Size:
        if self.projected:  # the original has no projections
            return counted(self.model, self.prepared.feeds, self.samples)
        none, held = np.zeros(self.coupling.units, bool), self.prepared.base if self.prepared.nest else None
        return Size(cost.macs(self.coupling.layers, none, self.samples), cost.params_of(held or self.model))

    def left(self, removed: BoolArray) -> tuple[Sequence[Layer], Sequence[cost.Parameter]]:
        """Layers and parameters without those that only branches which vanish needed, and projections that do nothing."""
        gone = cost.vanishing(self.coupling, removed)
        idle = [layer for layer in self.projections if cost.keep_mask(layer.reads, removed).all()]
        if not gone and not idle:
            return self.coupling.layers, self.parameters
        constants = {name for branch in gone for name in branch.constant}
        needed = self.prepared.index.needed([port.name for port in outputs(self.prepared.model)], constants)
        unused = {layer.node.index for layer in idle}
        needed = [node for node in needed if node.index not in unused]
        indices, read = {node.index for node in needed}, {name for node in needed for name in node.reads}
        layers = [layer for layer in self.coupling.layers if layer.node.index in indices]
        return layers, [parameter for parameter in self.parameters if parameter.name in read]


def counted(model: Model, feeds: Feeds, samples: int) -> Size:
    """MACs for one sample and parameters of a model as it is, whatever made it, from one run on inputs that hold so many samples. Nodes
    that no output needs do not count; branches that declared shapes choose do.

    Raises:
        ModelError: onnxruntime cannot run it.
    """
    whole = model
    if any(has(node, Trait.CHOOSES) for node in nodes(model)):
        with quiet():  # what is chosen was said when the model was inspected
            known = prepare(model, None, feeds)
        whole = known.base or model
        model = whole if known.nest else model  # weights of branches count
    prepared = observed(whole, feeds)
    live = {node.index for node in prepared.index.needed([port.name for port in outputs(model)])}
    layers = (layer for layer in stated(prepared).layers if layer.node.index in live)
    return Size(sum(layer.macs for layer in layers) / samples, cost.params_of(model))


def stated(prepared: Prepared, expand: bool = False) -> Facts:
    """The facts of every node, with what those cost that run graphs of their own."""
    facts = state(prepared, expand)
    for node in prepared.nodes:
        if has(node, Trait.RUNS) and (macs := inside(prepared, node)):
            facts.layers.append(LayerFact(node, macs, (), False, Reads(0, 0, 0, None), Writes(0, 0, None)))
    return facts


def inside(prepared: Prepared, node: Node) -> float:
    """Multiply-accumulates of the graphs that a node runs, of one run of the model; of several that may run, those of the dearest. What
    cannot be run by itself counts nothing."""
    trace, found = prepared.known, [0.0]
    for run in bodies(node, trace):
        model, own = body(prepared.model, node, run.attribute, prepared.types)
        known = {**trace.shapes, **trace.values, **dict(zip(own, run.fed, strict=False))}
        read = [port for port in inputs(model) if known.get(port.name) is not None]
        for whole in INTEGERS:
            feeds = {port.name: _filled(known[port.name], whole, port.dtype) for port in read}
            with suppress(ModelError):
                found.append(run.times * sum(layer.macs for layer in stated(observed(model, feeds)).layers))
                break
    return max(found)


def _filled(known: Any, whole: int, dtype: Any) -> Array:
    return known if isinstance(known, np.ndarray) else np.full(known, whole, dtype)


def couple(prepared: Prepared, expand: bool = False) -> Coupling:
    """Label every tensor, resolve the labels to units, and form groups.

    Args:
        expand: let channels leave that an operator needs: it gets them again, as zeros.

    Raises:
        ModelError: a rule stated labels that contradict the traced shapes (an error in the rule; the node is named).
    """
    coupling = resolve(stated(prepared, expand), prepared)
    return with_transforms(replace(coupling, branches=branches(coupling, prepared)), prepared)


def data_for(model: Model, source: DataSource | None, **options: Any) -> Dataset | None:
    """Open data for a model; see `sfp_onnx.open_data` for the options."""
    if source is None or isinstance(source, Dataset):
        return source
    return one_by_one(model, open_data(source, inputs(model), **options))


def inspect(
    source: ModelSource, input_shapes: Shapes | None = None, data: Dataset | None = None, cut_layernorm: bool = False,
    expand_outputs: bool = False, *, expand: str = "none",
) -> Analysis:  # fmt: skip
    """Find out what can be pruned, and why the rest cannot.

    Args:
        input_shapes: concrete shapes by input name, where dynamic dimensions cannot be guessed.
        data: real inputs to trace on (default: random ones).
        expand: "all": let channels leave that an operator needs (a normalisation over them, one without a rule, an output that several
            layers add to). It gets them again, as zeros, and behind it they are left out, exactly, at some cost in time; an output
            gets them from a projection, which the repair fits. "none" (and "auto", where nothing is planned): as it stands.
        cut_layernorm, expand_outputs: older names, of what is inside the model, and of its outputs.

    Raises:
        ModelError: the model cannot be loaded or run. DataError: shapes or labels do not fit it.
    """
    model = load(source)
    real = None if data is None else _traced_on(data)
    inside, outside = cut_layernorm or expand == "all", expand_outputs or expand == "all"
    found = _inspected(model, input_shapes, real, inside, outside)
    failure = "" if data is None else _failing(found.prepared, data)
    if not failure:
        return found
    log.info(f"Note: branches stay as they are: on the data, one fails where the other one is taken: {failure}")
    lazy = {node.outputs[0] for flat in found.prepared.nest for node in nodes(flat) if has(node, Trait.CHOOSES)}
    return _inspected(replace(model, lazy=frozenset(lazy)), input_shapes, real, inside, outside)


def _failing(prepared: Prepared, data: Dataset) -> str:
    """What onnxruntime says where both branches of a model run on all data; nothing if they do, or it has none."""
    if not prepared.nest:
        return ""
    session, names = open_model(prepared.model), [port.name for port in outputs(prepared.model)]
    try:
        for feeds, _ in data.batches():
            session.run(feeds, names)
    except ModelError as error:
        return str(error)
    return ""


def _traced_on(data: Dataset) -> Feeds:
    """The first two samples; where samples have shapes of their own, those of the first ones that have fewest axes of length 1, which say
    nothing of what lies along them."""
    starts = range(0, 1 if data.groups is None else min(LOOKED_AT, data.samples), 2)
    found = [next(data.part(np.arange(start, min(start + 2, data.samples))).batches())[0] for start in starts]
    return min(found, key=lambda feeds: sum(size == 1 for array in feeds.values() for size in np.shape(array)[1:]))


def _inspected(model: Model, input_shapes: Shapes | None, real: Feeds | None, inside: bool, outside: bool) -> Analysis:
    prepared = prepare(model, input_shapes, real)
    axes = _expandable(prepared, inside) if outside else {}
    if axes:
        start = prepared.nest[-1] if prepared.nest else prepared.base or model  # with the branches where they were
        projected = with_projections(start, axes, prepared.types, prepared.trace.shapes)
        shapes = None if real is not None else {name: array.shape for name, array in prepared.feeds.items()}
        again = prepare(projected, shapes, real)
        prepared = replace(again, base=again.base or projected)
    prepared = replace(prepared, tokens=tokens_of(prepared))
    coupling = _with_expanding(couple(prepared, inside), prepared, axes)
    read = {name for node in prepared.nodes for name in node.reads}
    weights = {name: held for name, held in cost.weights_of(prepared.model).items() if name in read}
    parameters = cost.parameters(weights, prepared.index, coupling)
    samples = traced_samples(inputs(model), {name: array.shape for name, array in prepared.feeds.items()})
    guessed = frozenset(prepared.feeds) - {*(input_shapes or {}), *(real or ())}
    return Analysis(model, prepared, coupling, tuple(parameters), samples, inside, guessed, tuple(axes))


def _projections(coupling: Coupling, names: Container[str]) -> list[Layer]:
    return [layer for layer in coupling.layers if layer.node.outputs[0] in names]


def _expandable_axes(prepared: Prepared, coupling: Coupling) -> list[tuple[Node, IntArray]]:
    """The units along each axis that an operator may be given again."""
    nodes, found = {node.index: node for node in prepared.nodes}, list[tuple[Node, IntArray]]()
    for index, position, axis in sorted(coupling.expanded):
        carried = coupling.constants.get((index, position), coupling.tensors.get(nodes[index].inputs[position], ()))
        found += [(nodes[index], one.units) for one in carried if one.axis == axis]
    return found


def _with_expanding(coupling: Coupling, prepared: Prepared, projected: Container[str]) -> Coupling:
    """The same, knowing what shrinks only because of an expansion."""
    axes = [*(units for _, units in _expandable_axes(prepared, coupling)), *(item.reads for item in _projections(coupling, projected))]
    units = set(np.concatenate([np.zeros(0, np.int64), *axes]).tolist())
    groups = (group for group in coupling.groups if units.intersection(group.units.tolist()))
    return replace(coupling, expanding=frozenset(group.name for group in groups))


def _expandable(prepared: Prepared, expand: bool) -> dict[str, int]:
    """The channel axes of floating outputs that pin what several layers make: those of one layer gain nothing."""
    facts = state(prepared, expand)
    pins = resolve(facts, prepared).pinned
    axes: dict[str, int] = {}
    for name in [pin.node for pin in pins if pin.reason == GRAPH_OUTPUT and len(pin.layers) > 1]:
        shape = prepared.trace.shapes[name]
        made = written(facts)
        found = {axis for array in facts.tensors.get(name, ()) if made[array].any() for axis in varying(array)}
        axis = found.pop() if len(found) == 1 else 0
        if np.dtype(prepared.types.get(name) or object) == np.float32 and (axis == len(shape) - 1 > 0 or (axis == 1 and len(shape) > 2)):
            axes[name] = axis
    return axes


def expandable(analysis: Analysis) -> bool:
    """Whether anything is pinned but outputs of one layer each, of which an expansion frees nothing. Costs no run of the model."""
    return any(pin.reason != GRAPH_OUTPUT or len(pin.layers) > 1 for pin in analysis.coupling.pinned)


def wider(analysis: Analysis, outside: bool = True) -> Analysis | None:
    """The same, traced on the same inputs, with all that may be expanded (``outside``: outputs too); None if that frees no channel."""
    if analysis.expanded or analysis.projected:
        return None
    with quiet():  # what branches are pruned was said
        whole = _inspected(analysis.model, None, analysis.prepared.feeds, True, outside)
    return replace(whole, guessed=analysis.guessed) if whole.coupling.channels_prunable > analysis.coupling.channels_prunable else None


def standing(analysis: Analysis) -> Analysis:
    """The same, traced on the same inputs, with nothing expanded."""
    with quiet():
        return replace(_inspected(analysis.model, None, analysis.prepared.feeds, False, False), guessed=analysis.guessed)


def left_out(analysis: Analysis, data: Dataset) -> tuple[str, ...]:
    """A word on the tokens of data that a mask switches off, if there are any, and on the layers of which all rows count all the same.

    Raises:
        DataError: all tokens are off.
    """
    tokens = analysis.prepared.tokens
    if tokens is None:
        return ()
    ports = tuple(port for port in data.ports if port.name == tokens.mask)
    there = [tokens.on(feeds)[:count] for feeds, count in replace(data, ports=ports).batches()]
    off, whole = sum(int((~on).sum()) for on in there), sum(on.size for on in there)
    if not off:
        return ()
    if off == whole:
        means = f"{'anything but 0 switches' if tokens.inverted else '0 switches'} a token off"
        raise DataError(f"{data.name}: '{tokens.mask}' switches off all {off:,} tokens ({means}). Give data with tokens that are on")
    empty = sum(int((~on.any(1)).sum()) for on in there)
    none = f"; {empty} samples have no others, and say nothing" if empty else ""
    others = [layer for layer in analysis.coupling.layers if layer.linear is not None and layer.node.outputs[0] not in tokens]
    but = f"; all rows count of {len(others)} layers that do not have such tokens on their first axes" if others else ""
    return (f"rows of {off:,} tokens that '{tokens.mask}' switches off ({off / whole:.0%}) are left out{none}{but}",)


def free_share(analysis: Analysis) -> float:
    """The share of the MACs that goes if half of every group does."""
    removed = np.zeros(analysis.coupling.units, bool)
    for group in analysis.coupling.groups:
        half = group.order(np.zeros(group.width))[: group.width // group.blocks // 2 * group.blocks]
        removed[group.units[half]] = not group.inside and not analysis.coupling.transforms.intersection(group.producers)
    before = analysis.size().macs
    return 1 - analysis.size(removed).macs / before if before else 0.0


def tables(analysis: Analysis) -> dict[str, int]:
    """Parameters of tables in which rows are looked up (embeddings) and of which nothing can leave, by name."""
    sizes = {parameter.name: int(np.prod(parameter.shape)) for parameter in analysis.parameters if not any(parameter.uses)}
    lookups = (node for node in analysis.prepared.nodes if has(node, Trait.TAKES) and node.inputs[0] in sizes)
    return {node.inputs[0]: sizes[node.inputs[0]] for node in lookups if node.inputs[1] not in analysis.prepared.trace.values}


def channels_by_reason(pinned: Sequence[Pinned]) -> dict[str, int]:
    """How many channels are pinned for each reason."""
    counts: dict[str, int] = {}
    for pin in pinned:
        counts[pin.reason] = counts.get(pin.reason, 0) + pin.channels
    return counts


def reasons(coupling: Coupling) -> str:
    """Why channels are pinned, in one line."""
    said = [f"{text}." for text in sentences(coupling.unruled)]
    if not coupling.pinned and not said:
        return "The model has no layer that mixes channels (Conv, ConvTranspose, Gemm, MatMul with a constant weight)."
    counts = sorted(channels_by_reason(coupling.pinned).items(), key=lambda item: -item[1])
    pinned = ["Pinned: " + "; ".join(f"{reason} ({count})" for reason, count in counts) + "."] if counts else []
    return " ".join([*pinned, *said])


def describe(data: Dataset) -> dict[str, Any]:
    """Which data were used, for plans and manifests."""
    labels = "given" if data.labels is not None else "none"
    return {"name": data.name, "sha256": data.sha256, "samples": data.samples, "labels": labels, **asdict(data.preprocessing)}


# ---- calibration data in batches that the memory can hold ------------------------------------------------------------

ACTIVATION_BYTES = 512 * 2**20
BATCH, LEAST_BATCHES = 64, 8
LOOKED_AT = 16  # samples that one to trace on is chosen from
PASS_BATCH = 32


def pass_batches(analysis: Analysis, data: Dataset) -> Iterator[Batch]:
    """Inputs for the pass that collects class profiles, in batches whose feature maps are still in the caches when they are pooled."""
    most = data.batch if data.fixed else PASS_BATCH
    return replace(data, batch=min(most, batch_size(analysis, data))).batches()


def feeds_of(analysis: Analysis, data: Dataset) -> Iterator[Feeds]:
    """Inputs in batches that are small enough to hold their activations, and (if possible) at least eight."""
    return (feeds for feeds, _ in batched(analysis, data).batches())


def batched(analysis: Analysis, data: Dataset) -> Dataset:
    """The data in the batches of `feeds_of`."""
    if data.fixed:
        return data
    return replace(data, batch=max(1, min(BATCH, batch_size(analysis, data), data.samples // LEAST_BATCHES)))


def batch_size(analysis: Analysis, data: Dataset) -> int:
    """The data's batch size, less if all activations of one batch would take more than `ACTIVATION_BYTES`."""
    if data.fixed:
        return data.batch
    held = initializers(analysis.prepared.model)
    total = sum(float(np.prod(shape)) for name, shape in analysis.prepared.trace.shapes.items() if name not in held) * 4 / analysis.samples
    return max(1, min(data.batch, int(ACTIVATION_BYTES / max(total, 1))))


# ---- which groups may leave altogether, so that a branch beside a residual vanishes ----------------------------------


def branches(coupling: Coupling, prepared: Prepared) -> dict[str, Branch]:
    """Branches by the name of the group that must leave for them to vanish. Any of them may vanish together."""
    final = {port.name for port in outputs(prepared.model)}
    vanishing: dict[str, Branch] = {}
    constant: set[str] = set()
    carriers: set[str] = set()
    layers = {layer.node.index: layer for layer in coupling.layers}
    chosen = {name for model in prepared.nest for node in nodes(model) if has(node, Trait.CHOOSES) for name in node.outputs}
    for group, dead in zip(coupling.groups, _dead(coupling), strict=True):
        walk = _Walk()
        branch = _branch(group, _Around(coupling, prepared, final, layers, dead, chosen), walk)
        if branch is None or walk.carriers & {*constant, *walk.constant} or carriers & set(walk.constant):
            continue  # there is none, or two constants would meet
        constant.update(walk.constant)
        carriers |= walk.carriers
        vanishing[group.name] = branch
    return vanishing


@dataclass
class _Walk:
    """What one group's end makes constant, while it is followed."""

    constant: dict[str, None] = field(default_factory=dict)
    ends: dict[str, None] = field(default_factory=dict)
    carriers: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Around:
    """What a branch is followed in: ``outputs`` of the model, ``layers`` by the index of their node, and the ``dead`` tensors of a group,
    which lose all channels along an axis. ``chosen``: what one of two branches gives, whole, since nothing spreads it."""

    coupling: Coupling
    prepared: Prepared
    outputs: set[str]
    layers: Mapping[int, Layer]
    dead: set[str]
    chosen: set[str]

    def goes(self, node: Node) -> bool:
        """Whether all that a node makes is dead."""
        return all(output in self.dead for output in node.outputs if output)


def _dead(coupling: Coupling) -> list[set[str]]:
    """Tensors that lose all channels along an axis, for each group that leaves alone."""
    group_of = np.full(coupling.units + 1, -1)  # the last place stands for -1
    for place, group in enumerate(coupling.groups):
        group_of[group.units] = place
    dead: list[set[str]] = [set() for _ in coupling.groups]
    for name, channels in coupling.tensors.items():
        for carried in channels:
            first = group_of[carried.units[0]]
            if first >= 0 and (group_of[carried.units] == first).all():
                dead[first].add(name)
    return dead


def _branch(group: Group, around: _Around, walk: _Walk) -> Branch | None:
    inside = np.zeros(around.coupling.units + 1, bool)
    inside[group.units] = True  # the last place stands for -1
    sources: dict[str, None] = {}
    for name in sorted(around.dead):
        if name in around.outputs:
            return None
        for node in around.prepared.index.reading(name):
            if around.goes(node):
                continue
            layer = around.layers.get(node.index)
            if layer is None or layer.weight is None or layer.data_name != name or not inside[layer.reads].all() or not len(layer.reads):
                return None
            if not all(other == name or other in around.prepared.held for other in node.inputs if other):
                return None
            sources[name] = None
            if not all(_follow(output, around, walk) for output in node.outputs if output):
                return None
    return Branch(tuple(sorted(around.dead)), tuple(sources), tuple(walk.ends), tuple(walk.constant)) if walk.ends else None


def _follow(name: str, around: _Around, walk: _Walk) -> bool:
    """Whether a constant tensor only meets tensors that carry on; collects where."""
    walk.constant[name] = None
    if name in around.outputs:
        return False
    shapes = around.prepared.trace.shapes
    for node in around.prepared.index.reading(name):
        written = [output for output in node.outputs if output]
        if around.goes(node):
            continue
        if not has(node, Trait.SPREADS) or node.captures or not around.chosen.isdisjoint(written):
            return False
        others = [other for other in node.inputs if other and other != name and other not in around.prepared.held]
        full = [other for other in others if shapes.get(other) == shapes.get(written[0])]
        if others and not full:
            return False
        if full:
            walk.ends[name] = None
            walk.carriers.update(full)
        elif not all(_follow(output, around, walk) for output in written):
            return False
    return True
