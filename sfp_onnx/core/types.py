"""The frozen records that pass between the stages: arrays, the graph and its coupled channels, plans and what comes of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import OptionError

Array = NDArray[Any]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]


# ---- results as people see them --------------------------------------------------------------------------------------


class Shown:
    """A record that shows itself in a line, and in notebooks as its summary, whatever it holds."""

    def summary(self) -> str:
        """What it is, for people; the first line stands for it."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.summary().partition(chr(10))[0]}>"

    def _repr_html_(self) -> str:
        return f"<pre>{escape(self.summary())}</pre>"


def number(value: float) -> str:
    """A count for people: 1234567 -> 1.23M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


# ---- what is known of a graph ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """One operator of the graph. ``name`` is never empty (unnamed nodes get ``Conv_12``); ``captures`` are the outer
    tensors that its sub-graphs read."""

    index: int
    name: str
    op: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    captures: tuple[str, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        """All tensors that the node reads, those that its sub-graphs capture last."""
        return tuple(name for name in (*self.inputs, *self.captures) if name)

    @property
    def operator(self) -> str:
        """Operator with its domain, e.g. ``Conv`` or ``com.microsoft.FusedConv``."""
        return f"{self.domain}.{self.op}" if self.domain else self.op


@dataclass(frozen=True)
class Port:
    """An input or output of the model. ``shape`` holds ints, names of dynamic dimensions, or None (unknown);
    it is None as a whole if the file does not even give a rank."""

    name: str
    dtype: Any
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class Trace:
    """What one real run on a sample input showed: shape of every tensor, and the values of tensors that do not depend
    on the input data. ``dynamic`` marks values and sizes that changed when the dynamic dimensions were changed. ``data_free``
    names all tensors that do not depend on the data, also those whose value nothing but other such tensors needs."""

    shapes: Mapping[str, tuple[int, ...]]
    values: Mapping[str, Array]
    dynamic_values: Mapping[str, BoolArray]
    dynamic_axes: Mapping[str, tuple[int, ...]]
    data_free: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Tokens:
    """Rows of tensors that an input can switch off: ``mask`` (batch, positions) is 0 where they are off, or, ``inverted``, where they are
    on. Tensors that are ``laid`` have (batch, positions) as their first axes, ``flat`` ones both as one."""

    mask: str
    laid: frozenset[str]
    flat: frozenset[str]
    inverted: bool = False

    def __contains__(self, name: str) -> bool:
        return name in self.laid or name in self.flat

    def on(self, feeds: Mapping[str, Array]) -> BoolArray:
        """Which tokens of a batch are there, (batch, positions)."""
        return np.asarray((feeds[self.mask] != 0) != self.inverted)

    def rows(self, name: str, lead: Sequence[int], on: BoolArray | None) -> BoolArray | None:
        """Which rows of a tensor are there, in the shape ``lead`` of its axes but that of the channels; None: all."""
        if on is None or name not in self or on.all():
            return None
        shape = on.shape if name in self.laid else (on.size,)
        if tuple(lead[: len(shape)]) != shape:
            return None
        return np.broadcast_to(on.reshape(*shape, *[1] * (len(lead) - len(shape))), lead)

    def there(self, name: str, array: Array, on: BoolArray) -> Array:
        """A tensor with a row for every token that is there; others as they are."""
        shape = on.shape if name in self.laid else (on.size,)
        return array[on.reshape(shape)] if name in self and array.shape[: len(shape)] == shape else array


@dataclass(frozen=True)
class AxisUnits:
    """Which unit each index of one axis belongs to; -1 where the index cannot be removed. ``units`` may be (blocks, size): the indices of
    this axis in each of so many equal blocks of the first axis, which keep as many each (the weight of a convolution in groups)."""

    axis: int
    units: IntArray


Channels = tuple[AxisUnits, ...]
"""All axes of one tensor that carry units; an axis that carries units of two kinds (heads, and dimensions of all heads) stands there
twice, and an index of it stays if both its units do."""


class After(Protocol):
    """What a follow fact may ask about its node in the pruned graph, on the sample input."""

    def input_shape(self, position: int) -> tuple[int, ...]:
        """Shape of an input after the cut."""

    def output_shape(self, position: int) -> tuple[int, ...]:
        """Shape of an output after the cut."""

    def input_keep(self, position: int, axis: int) -> BoolArray:
        """Which indices of an axis of an input stay, in the original numbering."""

    def output_keep(self, position: int, axis: int) -> BoolArray:
        """Which indices of an axis of an output stay, in the original numbering."""


@dataclass(frozen=True)
class SetInput:
    """Replace input ``position`` of a node by a constant (None: remove the input)."""

    position: int
    value: Array | None


@dataclass(frozen=True)
class SetAttribute:
    """Replace an attribute of a node (None: remove it)."""

    name: str
    value: Any


@dataclass(frozen=True)
class InsertBefore:
    """Feed input ``position`` of the node through ``op(input, *constants)``; ``selects``: that takes the kept indices, the first constant,
    along the attribute ``axis``."""

    position: int
    op: str
    constants: tuple[Array, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    selects: bool = False


@dataclass(frozen=True)
class InsertAfter:
    """Put ``op(output, *constants)`` right behind the node; floating constants take the type of the output."""

    op: str
    constants: tuple[Array, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    output: int = 0


Edit = SetInput | SetAttribute | InsertBefore | InsertAfter


@dataclass(frozen=True)
class Follow:
    """A node whose shape constants or attributes are recomputed from the new sizes. ``raw``: from those of its inputs as they come, before
    removed channels are put back."""

    node: int
    edits: Callable[[After], Sequence[Edit]]
    raw: bool = False


class Form(Protocol):
    """How a mixing layer is linear in its weight: outputs at chosen positions are rows times a matrix, in ``blocks`` blocks
    (groups of a convolution). ``chosen`` is (samples, positions per sample). ``out_axis`` is the output's channel axis."""

    @property
    def out_axis(self) -> int:
        """The channel axis of the output."""

    @property
    def padded(self) -> bool:
        """Whether outputs at the border read zeros beside the data, so that a constant input does not give constant outputs."""

    @property
    def scale(self) -> float:
        """Factor of the product of data and weight."""

    @property
    def kernel(self) -> tuple[int, ...]:
        """Taps along each spatial axis; empty for a product."""

    @property
    def front(self) -> str:
        """Operator of a layer in front that mixes the channels of the data alone; empty: there is none, and the layer cannot be split."""

    def blocks(self, data: Sequence[int], weight: Sequence[int], output: Sequence[int]) -> int:
        """Number of blocks, from the three shapes."""

    def positions(self, output: Sequence[int]) -> tuple[int, int]:
        """Samples, and output positions of each."""

    def rows(self, data: Array, output: Sequence[int], chosen: IntArray, blocks: int) -> Array:
        """Inputs that the chosen positions read: float32 (blocks, positions, inputs)."""

    def answers(self, output: Array, chosen: IntArray, blocks: int) -> Array:
        """The output at the chosen positions: (blocks, positions, outputs)."""

    def matrix(self, weight: Array, blocks: int) -> Array:
        """The weight as (blocks, inputs, outputs)."""

    def weight(self, matrix: Array, like: Sequence[int]) -> Array:
        """The inverse of `matrix`, for a weight of shape ``like``."""

    def inputs_of(self, weight: Sequence[int], blocks: int) -> IntArray:
        """Which input channel of its block each row of the matrix reads."""


@dataclass(frozen=True)
class Linear:
    """``form`` of a layer, and where its bias (one value per output channel) is: ``bias`` is the input position that holds it or
    may hold it, None if the operator has no bias; the layer adds ``bias_scale`` times it."""

    form: Form
    bias: int | None
    bias_scale: float = 1.0


@dataclass(frozen=True)
class Additive:
    """A node that is affine, element by element, in the inputs at ``positions``, whatever the others are; ``shift`` is the input
    (if any) that is simply added and is a constant. ``varies``: axes of the output along which the factor of the inputs varies."""

    positions: tuple[int, ...]
    shift: int | None = None
    varies: tuple[int, ...] = ()


@dataclass(frozen=True)
class Weight:
    """The constant operand of a mixing layer: which of its axes carries output and input channels."""

    position: int
    out_axis: int
    in_axis: int


@dataclass(frozen=True)
class Layer:
    """A mixing layer (Conv, ConvTranspose, Gemm, MatMul, ...): it reads channels and makes new ones.

    ``extents`` are unit arrays of all axes that the multiply-accumulate count is proportional to; ``macs`` is the count
    for one sample of the traced shape. ``linear`` is None where the weight cannot be re-fitted. ``reads``/``writes``
    give the unit of each index of the weight's input and output
    axis, ``source`` the unit of each channel of input ``data`` along ``data_axis``; ``columns`` is a second unit of each index of the
    output axis (empty: there is none): its dimension in all heads, where ``writes`` has its head, or itself, where that has the whole group
    of a convolution; ``second`` is the same of each channel that it reads. ``grouped`` is the attribute that holds the number of groups of
    a convolution; empty for layers without groups.
    """

    node: Node
    macs: float
    extents: tuple[IntArray, ...]
    weight: Weight | None
    reads: IntArray
    writes: IntArray
    data: int
    data_axis: int
    source: IntArray
    linear: Linear | None = None
    grouped: str = ""
    columns: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    second: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def sources(self) -> tuple[IntArray, ...]:
        """The units of the channels that it reads, of both kinds."""
        return tuple(units for units in (self.source, self.second) if len(units))

    @property
    def made(self) -> Channels:
        """The units of the channels that it makes, of both kinds."""
        return tuple(AxisUnits(0, units) for units in (self.writes, self.columns) if len(units))

    @property
    def free(self) -> int:
        """How many of the channels that it makes can leave."""
        return int(np.any([carried.units >= 0 for carried in self.made], axis=0).sum())

    @property
    def data_name(self) -> str:
        """The tensor that the layer reads."""
        return self.node.inputs[self.data]

    def groups(self, node: Node | None = None) -> int:
        """Number of groups; of the layer as it is in a changed graph, if that ``node`` is given."""
        return int((node or self.node).attributes.get(self.grouped, 1))


@dataclass(frozen=True)
class Affine:
    """A per-channel scale applied to ``tensor`` (BatchNormalization): scale[c] = gamma / sqrt(var + eps). ``moments`` are the input
    positions of mean and variance."""

    node: Node
    tensor: str
    gamma: FloatArray
    scale: FloatArray
    units: IntArray
    moments: tuple[int, int]


@dataclass(frozen=True, repr=False)
class Group(Shown):
    """Units that touch the same tensors and axes; the thing a ratio applies to. Unit i of the group is ``units[i]``. ``dimensions``: a unit
    is a dimension of queries and keys in all heads, which a score must know how to judge. The units stand in so many equal ``blocks``, one
    behind the other, of which every one loses as many (those of a convolution in groups); ``inside`` names the groups in which they may
    leave whole."""

    name: str
    units: IntArray
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    dimensions: bool = False
    blocks: int = 1
    inside: tuple[str, ...] = ()

    def order(self, scores: FloatArray) -> IntArray:
        """Positions from least to most important, by one score of each: first the least important of every block, then the next ones; ties
        leave in the order of the channels."""
        inner = np.argsort(scores.reshape(self.blocks, -1), axis=1, kind="stable")
        return np.asarray((inner + np.arange(self.blocks)[:, None] * inner.shape[1]).T.reshape(-1), np.int64)

    def summary(self) -> str:
        """Its name and width, and how many layers make and read it."""
        return f"{self.name}, {self.width} wide, made by {len(self.producers)} and read by {len(self.consumers)} layers"

    @property
    def width(self) -> int:
        """Number of units."""
        return len(self.units)


@dataclass(frozen=True)
class Pinned:
    """Why some channels cannot leave: one entry per reason and node."""

    reason: str
    node: str
    channels: int
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Branch:
    """A part of the graph that vanishes if a whole group leaves: its ``dead`` tensors, those of them that mixing layers read
    (``sources``), the tensors that become ``constant``, and those of them that are read beside a residual (``ends``)."""

    dead: tuple[str, ...]
    sources: tuple[str, ...]
    ends: tuple[str, ...]
    constant: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False)
class Coupling(Shown):
    """Everything that later stages need to know about who leaves with whom.

    ``zero_points`` maps quantised tensors to the tensor that holds their zero point.
    ``additive`` maps node indices to what is known of nodes that are affine in an input (Add, Identity, ...).
    ``masked_inputs`` are constants through which a node reads removed channels again (recurrence).
    ``branches`` maps groups that may leave altogether to what vanishes with them.
    ``unruled`` maps operators without a rule to the names of those of their nodes that hold weights; ``transforms`` are layers that
    nobody trained, and those that only leave together with them: they stay unless they are named.
    ``expanded`` are inputs that get removed channels again: index of the node, position, axis; ``expanding`` groups can shrink only
    because of that, or because an output is projected.
    ``tensors`` maps activation tensors, ``constants`` maps (node index, input position) of constant operands to their
    unit-carrying axes. Units are numbered 0 .. ``units`` - 1.
    """

    units: int
    groups: tuple[Group, ...]
    tensors: Mapping[str, Channels]
    constants: Mapping[tuple[int, int], Channels]
    layers: tuple[Layer, ...]
    affines: tuple[Affine, ...]
    follows: tuple[Follow, ...]
    pinned: tuple[Pinned, ...]
    masked_inputs: Mapping[str, Channels]
    zero_points: Mapping[str, str]
    additive: Mapping[int, Additive]
    channels_total: int
    channels_prunable: int
    branches: Mapping[str, Branch] = field(default_factory=dict)
    unruled: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    transforms: frozenset[str] = frozenset()
    expanded: frozenset[tuple[int, int, int]] = frozenset()
    expanding: frozenset[str] = frozenset()

    def summary(self) -> str:
        """How much can be removed."""
        return f"{self.channels_prunable} of {self.channels_total} channels can be removed, {len(self.groups)} groups of them"


# ---- widths ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Align:
    """Widths that a weight axis may end up with: multiples of ``block``, but below ``start`` multiples of ``fine``. ``written`` is what
    the user wrote, and what plans record; "auto" and "default" leave any width until a plan settles them."""

    block: int = 1
    fine: int = 1
    start: int = 1
    written: int | str | None = None

    @staticmethod
    def parse(value: Align | int | str | None) -> Align:
        """Read ``None`` or "none" (any width), 8 or "8" (multiples), "16:4" (multiples of 16, below 16 of 4), "4:1:12" (multiples of 4,
        below 12 any width), "auto", "default".

        Raises:
            OptionError: not of that form.
        """
        if isinstance(value, Align):
            return value
        if value in (None, "none", "auto", "default"):
            return Align(written=None if value == "none" else value)
        match = re.fullmatch(r"([1-9]\d{0,5})(?::([1-9]\d{0,5}))?(?::([1-9]\d{0,5}))?", str(value), re.ASCII)
        if match is None:
            several = "several, such as 16:4 or 4:1:12, 'auto' or 'none'"
            raise OptionError(f"alignment '{value}': expected a positive number, such as 8, {several}")
        return Align(int(match[1]), int(match[2] or match[1]), int(match[3] or match[1]), value)

    @property
    def symbolic(self) -> bool:
        """Whether it still has to be settled."""
        return self.written in ("auto", "default")

    def __str__(self) -> str:
        """As it is written."""
        return "none" if self.written is None else str(self.written)


# ---- what stages find out --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """Size of a model. ``macs`` are multiply-accumulates for one sample; ``bytes`` is the size of the saved model."""

    macs: float
    params: int
    bytes: int | None = None


def traced_text(traced: Mapping[str, Mapping[str, Any]]) -> str:
    """For which sizes of its dynamic inputs a model was counted, and whether they were guessed; empty if it has none."""
    shapes = {name: " x ".join(map(str, known["shape"][1:])) for name, known in traced.items()}
    text = ", ".join(f"{name} of {shape}" for name, shape in shapes.items())
    guessed = [name for name, known in traced.items() if known["guessed"]]
    if not guessed:
        return text and f"counted for {text}"
    what = "which is a guess" if len(guessed) == len(shapes) else f"where that of {', '.join(guessed)} is a guess"
    real = ",".join(["1", *map(str, traced[guessed[0]]["shape"][1:])])
    words = f"counted for {text}, {what}: other sizes shift the work between layers"
    return f"{words}. Say the real one: --input-shape {guessed[0]}={real} or --data"


def sizes_text(before: Size, after: Size) -> str:
    """MACs and parameters before and after."""
    shares = [new / old if old else 1.0 for old, new in ((before.macs, after.macs), (before.params, after.params))]
    return (
        f"MACs {number(before.macs)} -> {number(after.macs)} ({shares[0]:.1%} of the original), "
        f"parameters {number(before.params)} -> {number(after.params)} ({shares[1]:.1%})"
    )


@dataclass(frozen=True)
class GroupPlan:
    """What leaves one group: ``remove`` are positions 0 .. width - 1 in the group."""

    group: str
    producers: tuple[str, ...]
    width: int
    remove: tuple[int, ...]
    macs_before: float
    macs_after: float


SIDES = OUTPUTS, INPUTS = ("outputs", "inputs")


@dataclass(frozen=True)
class Factor:
    """A ``layer`` (the name of its node) that becomes two, with ``rank`` channels between them: its weight becomes a product of two. A
    convolution reads its window into so few channels and makes the ``outputs`` of them one by one, or makes so few channels of its
    ``inputs`` one by one and reads the window of these (``narrow``)."""

    layer: str
    rank: int
    narrow: str = OUTPUTS


@dataclass(frozen=True)
class Spectrum:
    """What tells the error of a layer that becomes two: the covariance (outputs, outputs) of what it ``made``, in units of errors; that
    (channels, channels) of what it ``read`` through its taps, their sum; and the ``scale`` (outputs) of its weight in units of errors."""

    made: Array
    read: Array
    scale: Array


@dataclass(frozen=True)
class Precision:
    """As what the weight of a layer is stored (see `graph.stored`; "int8": its activations are rounded, too, and its kernel takes
    integers), what of the outputs' variance its rounding alone was estimated to cost, and why that was chosen; ``weight``: its name
    (recurrent layers have several)."""

    layer: str
    stored: str
    error: float
    reason: str = ""
    weight: str = ""


def become_two(count: int) -> str:
    """How many layers do."""
    return "1 layer becomes two" if count == 1 else f"{count} layers become two"


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """Which units leave, decided before anything is cut, which layers become two (``factors``), and as what the weights that stay are
    stored (``precisions``; empty: as they were). ``figures`` gives, for each target's figure, ``before``, ``bound``, ``predicted`` and
    ``actual`` (macs, params: counts; size, memory: bytes; latency: seconds)."""

    model_sha256: str
    groups: tuple[GroupPlan, ...]
    options: Mapping[str, Any]
    before: Size
    after: Size
    notes: tuple[str, ...] = ()
    figures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    factors: tuple[Factor, ...] = ()
    precisions: tuple[Precision, ...] = ()

    def summary(self) -> str:
        """Sizes before and after, how many groups shrink, how many layers become two, and as what weights are stored."""
        shrink = sum(bool(item.remove) for item in self.groups)
        split = f", {become_two(len(self.factors))}" if self.factors else ""
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(item.stored for item in self.precisions).items())
        stored = f"; weights stored as {kinds}" if kinds else ""
        return f"{sizes_text(self.before, self.after)}\n{shrink} of {len(self.groups)} groups lose channels{split}{stored}"


@dataclass(frozen=True, repr=False)
class Cut(Shown):
    """One axis of an activation tensor of the original graph that lost channels (or of a recurrence weight, whose input axis
    is where the removed hidden units are read again). In a quantised tensor a removed channel stands at the value of the tensor
    ``zero_point``, otherwise at 0."""

    tensor: str
    axis: int
    size: int
    rank: int
    removed: tuple[int, ...]
    zero_point: str | None = None

    def summary(self) -> str:
        """Which axis lost how much."""
        return f"{self.tensor}, axis {self.axis}: {len(self.removed)} of {self.size} removed"


@dataclass(frozen=True)
class Moments:
    """Per-channel sums of one tensor over all samples and positions (float64), mergeable by addition.

    ``sums`` are (channels,), by the statistic's name; ``count`` is the number of positions that each sum runs over.
    """

    sums: Mapping[str, FloatArray]
    count: float

    @property
    def squares(self) -> FloatArray:
        """Sums of squares."""
        return self.sums["squares"]

    @property
    def zeros(self) -> FloatArray:
        """Numbers of zeros."""
        return self.sums["zeros"]


@dataclass(frozen=True)
class WeightSlices:
    """The weight of one layer, seen along the axis that makes or reads the units of a group.

    ``values`` is (k, m), one row per channel of that axis of the layer; ``unit`` (k,) is the position in the group or -1;
    ``role`` is "out" (rows make channels), "in" (rows read them) or "through" (depthwise: both). ``activation`` has (k,) statistics of the
    activation that each row reads, by name ("squares": its root mean square, "zeros": its share of zeros), where it was calibrated.
    """

    layer: str
    role: str
    unit: IntArray
    values: NDArray[np.floating[Any]]
    activation: Mapping[str, FloatArray] = field(default_factory=dict)


@dataclass(frozen=True)
class GroupView:
    """All that a score may look at for one group of ``width`` units. ``gammas`` are (unit, |gamma|) of every
    BatchNormalization on the group; ``index`` is the position of the group in the model."""

    name: str
    index: int
    width: int
    weights: tuple[WeightSlices, ...]
    gammas: tuple[tuple[IntArray, FloatArray], ...]
