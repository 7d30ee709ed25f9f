"""What the user may set: typed records, from which the command line, configuration files and the documentation are made.

A field that is made with `option` is an option of the commands that take its record; other fields can be set from Python only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from decimal import Decimal
from difflib import get_close_matches
from numbers import Integral, Real
from os import PathLike
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from .errors import FROM_PYTHON, OptionError
from .types import Align, Array

# Sections of `--help`, in this order.
OUTPUT, DATA, AMOUNT, CHANNELS = "Output", "Data", "How much leaves", "Which channels leave"
REPAIR, LATENCY, FORMS, RUN = "Repair", "Latency", "Other forms of the result", "This run"
BYTES = {"": 1.0, "b": 1.0, **{f"{unit}{b}": 10.0**power for unit, power in (("k", 3), ("m", 6), ("g", 9)) for b in ("", "b")},
         "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}  # fmt: skip
SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class OptionFacts:
    """What is known of an option besides its type: ``flag`` its long name (default: the field's), ``parse`` from text to the value (raises
    OptionError), ``low`` and ``high`` bounds of a number (excluded if open), ``path`` whether it names a file, ``example`` a value that
    works in any configuration, ``alone`` the value of an option that is given without one, ``advanced`` whether it is shown by --help-all
    only, ``alias`` an older name."""

    help: str
    section: str
    flag: str = ""
    metavar: str | None = None
    parse: Callable[[str], Any] | None = None
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    low_open: bool = False
    high_open: bool = False
    example: str = ""
    advanced: bool = False
    path: bool = False
    alone: str = ""
    alias: str = ""

    @property
    def bounds(self) -> str:
        """What a number must be."""
        low = "" if self.low is None else f"{'more than' if self.low_open else 'at least'} {self.low:g}"
        high = "" if self.high is None else f"{'less than' if self.high_open else 'at most'} {self.high:g}"
        return " and ".join(filter(None, (low, high)))

    def holds(self, value: Any) -> bool:
        """Whether a value is within the bounds (a number that is none never is)."""
        above = self.low is None or (value > self.low if self.low_open else value >= self.low)
        return above and (self.high is None or (value < self.high if self.high_open else value <= self.high))

    def check(self, value: Any, where: str) -> None:
        """Refuse what is no choice, or not within the bounds; ``where`` begins the message.

        Raises:
            OptionError: what was expected.
        """
        if self.choices and value not in self.choices:
            close = "".join(f" (did you mean '{word}'?)" for word in get_close_matches(str(value), self.choices, 1))
            raise OptionError(f"{where}expected one of {', '.join(self.choices)}{close}")
        if not self.holds(value):
            raise OptionError(f"{where}expected {self.bounds}")

    def text(self, value: Any) -> str:
        """The inverse of ``parse``."""
        written = format(Decimal(repr(value)), "f").removesuffix(".0") if isinstance(value, float) else str(value)
        return f"{written}s" if self.parse is seconds else written


BESIDE = {"seed": OptionFacts("", "", low=0), "path": OptionFacts("", "", path=True)}  # what is known of fields that are no options


def option(default: Any, help: str, section: str, **facts: Any) -> Any:
    """A field that is an option of the command line."""
    return field(default=default, metadata={"option": OptionFacts(help, section, **facts)})


def rare(default: Any, help: str, section: str, **facts: Any) -> Any:
    """An `option` that only --help-all shows."""
    return option(default, help, section, advanced=True, **facts)


# ---- values as Python gives them -------------------------------------------------------------------------------------

NUMBERS: dict[Any, type] = {int: Integral, float: Real}
PLACE = str | PathLike | Array | None  # type: ignore[type-arg]


def expect(kind: Any, **values: Any) -> None:
    """Refuse values that are not of a kind.

    Raises:
        OptionError: the name, the value, and what was expected.
    """
    for name, value in values.items():
        if not _is(value, kind):
            raise OptionError(f"{name}={repr(value)[:100]}: expected {kind if get_args(kind) else kind.__name__}")


def _is(value: Any, kind: Any) -> bool:
    plain, parts = get_origin(kind) or kind, get_args(kind)
    if isinstance(kind, UnionType):
        return any(_is(value, part) for part in parts)
    if plain in (tuple, list):
        return isinstance(value, (tuple, list)) and all(_is(item, parts[0]) for item in value)
    if plain is Mapping:
        return isinstance(value, Mapping) and all(_is(item, parts[1]) for item in value.values())
    return kind is Any or (isinstance(value, NUMBERS.get(plain, plain)) and not (plain in NUMBERS and isinstance(value, bool)))


class Checked:
    """A record whose values are of the kinds that its fields say, and within what is known of them as options."""

    def __post_init__(self) -> None:
        """Check all values.

        Raises:
            OptionError: the first that is wrong.
        """
        kinds = get_type_hints(type(self))
        for item in fields(self):  # type: ignore[arg-type]
            if kinds[item.name] == tuple[str, ...] and isinstance(getattr(self, item.name), str):  # one is a list of one
                object.__setattr__(self, item.name, (getattr(self, item.name),))
            value, facts = getattr(self, item.name), item.metadata.get("option", BESIDE.get(item.name))
            expect(PLACE if facts and facts.path else kinds[item.name], **{item.name: value})
            if facts and value is not None:
                facts.check(value, f"{item.name}={value!r}: ")


# ---- values as text --------------------------------------------------------------------------------------------------


def quantity(text: str, units: Mapping[str, float], expected: str) -> float:
    """A positive amount with a unit: ``500MB``, ``5m``, ``12k``.

    Raises:
        OptionError: not of that form.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in units or not float(match[1]):
        raise OptionError(f"'{text}': expected {expected}")
    return float(match[1]) * units[match[2]]


def seconds(text: str) -> float:
    """``60s``, ``5m``, ``1h``, or a number of seconds."""
    return quantity(text, SECONDS, "a positive time such as 60s, 5m or 1h")


def byte_size(text: str) -> int:
    """``500MB`` (decimal), ``2GiB`` (binary), ``12k``, or a number of bytes."""
    count = int(quantity(text, BYTES, expected := "bytes such as 500MB, 2GB (10^9 bytes) or 2GiB (2^30)"))
    if count < 1:
        raise OptionError(f"'{text}': expected {expected}")
    return count


def numbers(text: str) -> tuple[float, ...]:
    """``0.485,0.456,0.406``."""
    try:
        return tuple(float(item) for item in re.split(r"[,\s]+", text.strip("[]() ")))
    except ValueError as error:
        raise OptionError(f"'{text}': expected numbers separated by commas, such as 0.485,0.456,0.406") from error


def pixels(text: str) -> tuple[int, ...]:
    """``224`` or ``224x320`` (height x width)."""
    if not re.fullmatch(r"[0-9]+(?:[x,][0-9]+)?", text.strip()):
        raise OptionError(f"'{text}': expected pixels, such as 224 or 224x320 (height x width)")
    return tuple(int(item) for item in re.split("[x,]", text.strip()))


def parse_part(text: str) -> tuple[int, int]:
    """``3/16``: the number of a part, and how many there are.

    Raises:
        OptionError: not of that form.
    """
    match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise OptionError(f"--part {text}: expected number/parts from 1 on, such as 3/16")
    return int(match[1]), int(match[2])


def confidence(text: str) -> float:
    """``95%``, or the share itself: from 0.5 to below 1."""
    match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*(%?)\s*", text)
    value = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    if not 0.5 <= value < 1:
        raise OptionError(f"'{text}': expected from 50% to below 100%")
    return value


CUT, FACTOR = MOVES = ("cut", "factor")


def moves(text: str) -> tuple[str, ...]:
    """``cut`` or ``cut,factor``."""
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not set(found) <= set(MOVES) or CUT not in found:
        raise OptionError(f"'{text}': expected {CUT}, or {','.join(MOVES)}")
    return tuple(move for move in MOVES if move in found)


# ---- the records -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoreOptions(Checked):
    """What all scores may be told: the ``seed`` of everything random, and ``memory``, bytes that `obs` holds (it changes no result). What
    a single score may be told stands behind its name: ``sfp,probe=ridge``."""

    seed: int = 0
    memory: int = 2 * 10**9


BOARD = ("host", "adb", "board_python", "perf_test")  # where is timed
PLANNED = ("library", "save_library")  # where what planning measures is kept, which changes no plan


@dataclass(frozen=True)
class PlanOptions(Checked):
    """How to choose what leaves.

    At least one of ``ratio`` (share of every group, 0 .. 1), ``targets`` ("macs=50%", "latency=5ms") and ``max_drop`` is given; ratio
    excludes the others. ``allocation`` is "uniform" (the same share of every group), "global" (one ranking over all groups), "solve"
    (least estimated error under all targets) or "default" (solve with a latency, memory or ``max_drop``, or the score `obs`; else
    uniform). ``keep`` and ``only`` are regular expressions on names of nodes or of their weights: layers that match ``keep`` keep all
    outputs; with ``only``, a group may shrink only if all layers that make it match. ``align``: kept widths are multiples of it; "16:4":
    of 16, and below 16 of 4; "16:1:12": of 16, and below 12 any; None: any. "auto" is the staircase of the device's convolutions,
    "default" is "auto" with a latency target and else "16:1:12" (solved) or "4:1:12", so that plans for counted targets do not depend on
    the machine. ``threads``, ``batch``, ``provider`` say how latency is measured; ``device_profile`` is a file with a profile measured
    elsewhere. ``max_drop`` ("1%") is how much the measure of the task (``metric`` is that of `MeasureOptions`) may fall on data to judge
    on, or else calibration data that are held out from scoring; alone, it asks for the smallest model that holds it. The drop must hold
    with a ``confidence`` (one-sided; 0.5: as measured). ``precision`` is as what weights are stored ("float32": as they are; "auto": the
    solver chooses for each layer, beside its width, and with a latency target whether its kernel takes 8-bit integers). ``moves``: what
    may happen to a layer, "cut" and "factor". ``profile_budget``:
    seconds of wall time in which the model's layers are timed.
    ``host`` or ``adb``: the board on which is timed, with its ``board_python``, or ``perf_test``, a program that is sent.
    ``library`` is a file that ``save_library`` of an earlier run wrote: what was measured then is not measured again.
    """

    ratio: float | None = option(None, "Remove this fraction of every prunable group.", AMOUNT, low=0, high=1, high_open=True)
    targets: tuple[str, ...] = option(
        (), "Upper bound on the result: macs=50%, params=120k, size=2MB, latency=60%, latency=5ms, memory=1MiB. Repeatable; all are held "
        "at once.", AMOUNT, flag="target", metavar="macs=50%", example="macs=50%")  # fmt: skip
    allocation: str = rare(
        "default", "The same share of every group, one ranking over all groups, or the least estimated error under all targets.  "
        "[default: solve with --max-drop, a latency or memory target, or --score obs; else uniform]", CHANNELS,
        choices=("default", "uniform", "global", "solve"))  # fmt: skip
    keep: str | None = option(None, "Layers (node or weight names) that keep all their output channels.", CHANNELS, metavar="REGEX")
    only: str | None = option(None, "Shrink only groups that are made by matching layers alone.", CHANNELS, metavar="REGEX", example=".")
    min_channels: int = option(1, "Keep at least so many per group.", CHANNELS, low=1)
    align: Align | int | str | None = option(
        "default", "Kept widths are multiples of N, and below N of M; auto: the measured staircase.  [default: auto with a latency target; "
        "else of 16 (solved) or 4, below 12 any (16:1:12, 4:1:12)]", CHANNELS, metavar="auto|N|N:M|none", parse=Align.parse,
        example="default")  # fmt: skip
    threads: int = option(0, "Threads of onnxruntime (0: all cores).", LATENCY, low=0)
    batch: int = rare(1, "Batch size to time with.", LATENCY, low=1)
    provider: str = rare("cpu", "Execution provider of onnxruntime.", LATENCY)
    device_profile: str | None = option(None, "Latency from a profile measured elsewhere (`sfp-onnx profile`).", LATENCY, path=True)
    max_drop: str | None = option(
        None, "The measure of the task (top-1; without labels agreement with the original) falls by no more, on --max-drop-data or else a "
        "third of --data that is not scored with; alone: the smallest model that holds it.", AMOUNT, metavar="1%")  # fmt: skip
    metric: str | None = None
    precision: str = rare(
        "float32", "As what weights are stored: float32, float16, or 8-bit integers with a scale per channel; arithmetic stays float32. "
        "auto: of each layer what holds the targets at the least estimated error, with the widths; with a latency target integer kernels, "
        "too, where they are measured to be faster.", AMOUNT,
        choices=("float32", "float16", "int8-weights", "auto"))  # fmt: skip
    confidence: float = rare(
        0.95, "How sure --max-drop must be held, given how few samples it is judged on; 50%: take the measured drop as it is.", AMOUNT,
        parse=confidence, metavar="95%", example="95%", low=0.5, high=1, high_open=True)  # fmt: skip
    moves: tuple[str, ...] = rare(
        MOVES, "How the model may shrink: channels leave (cut), and layers become two of lower rank (factor), where that is estimated to "
        "be better at the same cost.", AMOUNT, parse=moves, metavar="cut,factor", example="cut,factor")  # fmt: skip
    profile_budget: float = rare(
        60.0,
        "Wall time for timing layers; where it does not suffice, fewer widths are timed.",
        LATENCY,
        low=0,
        low_open=True,
        metavar="SECONDS",
    )
    library: Any = rare(
        None, "Plan from what an earlier run measured and kept with --save-library: any target in about a second, without data.",
        CHANNELS, path=True)  # fmt: skip
    save_library: Any = rare(None, "Keep what planning measures (scores, errors, latency tables) for --library.", OUTPUT, path=True)

    host: str | None = rare(
        None, "Time on this board, over ssh (which needs Python and onnxruntime there).", LATENCY, metavar="USER@BOARD", example="board")
    adb: str | None = rare(None, "Time on this Android device, over adb.", LATENCY, metavar="SERIAL", example="board")  # fmt: skip
    board_python: str = rare("python3", "Python of the board.", LATENCY, metavar="PATH")
    perf_test: Any = rare(
        None, "onnxruntime_perf_test for the board, sent there in place of Python.", LATENCY, metavar="PATH", path=True)  # fmt: skip

    def __post_init__(self) -> None:
        """Read the alignment, and check the rest."""
        object.__setattr__(self, "align", Align.parse(self.align))
        super().__post_init__()

    @property
    def told(self) -> dict[str, Any]:
        """What a plan tells of its options."""
        unsaid = {*PLANNED, *(BOARD if self.host is None and self.adb is None else ())}
        return {name: value for name, value in vars(self).items() if name not in unsaid}


@dataclass(frozen=True)
class MeasureOptions(Checked):
    """What the outputs mean and what they are measured by, where graph, names, values and labels do not tell: the output that is judged
    (``output_name``), its ``task``, and a ``metric`` (the name of a measure, or "module:function": function(outputs, labels) -> float,
    larger is better)."""

    task: str | None = rare(
        None, "What the judged output is for.  [default: from the graph, names, values and labels]", DATA,
        choices=("classify", "multilabel", "segment", "detect", "embed", "regress"))  # fmt: skip
    output_name: str | None = rare(None, "The output that is judged.  [default: the first whose meaning is known]", DATA, metavar="NAME")
    metric: str | None = rare(
        None, "What is judged by: top-1, mean IoU, mAP, cosine, centred error ..., or function(outputs, labels) -> float, larger is "
        "better.  [default: by the task]", DATA, metavar="NAME|MODULE:FUNCTION")  # fmt: skip


REPAIRS = ("none", "bias", "bn", "lstsq")


@dataclass(frozen=True)
class RepairOptions(Checked):
    """How the remaining weights are re-fitted.

    ``fit``: "lstsq" (weights and biases), "bias", "bn" (statistics of BatchNormalization), "none", or "default": what the plan was made
    for, else lstsq with data and none without. ``rows_per_input``: rows of the least-squares problem per input of a layer;
    ``least_positions``: at least so many positions of each sample; ``ridges``: strengths tried, relative to the mean variance of the
    inputs; ``memory``: bytes of activations and of the widest layer's matrices held in memory; the rest goes to a temporary file.
    ``force``: keep a repair that took the model away from the original on held-out samples. ``finetune``: epochs of training after it.
    """

    fit: str = option(
        "default", "Re-fit what is left so that the model answers like the original: weights and biases (lstsq), biases alone, or the "
        "statistics of BatchNormalization (bn).  [default: lstsq with --data, else none]", REPAIR, flag="repair",
        choices=("default", *REPAIRS))  # fmt: skip
    force: bool = rare(False, "Write the model even if the repair took it away from the original.", REPAIR)
    finetune: int = rare(
        0, "Afterwards train so many epochs with the original as teacher (4 if none are given; extra `train`).", REPAIR, low=0, alone="4",
        metavar="[EPOCHS]")  # fmt: skip
    seed: int = 0
    rows_per_input: float = 128.0
    least_positions: int = 4
    ridges: tuple[float, ...] = (1e-6, 1e-3, 1e-2, 1e-1, 0.3, 1.0)
    memory: int = rare(
        2 * 10**9, "What the repair and the score `obs` hold in memory (GB: 10^9, GiB: 2^30 bytes); the rest goes to a file.", REPAIR,
        parse=byte_size, metavar="2GB", example="2GB")  # fmt: skip

    def __post_init__(self) -> None:
        """Check the values, and that there is a ridge to try.

        Raises:
            OptionError: what is wrong.
        """
        super().__post_init__()
        if not self.ridges or min(self.ridges) < 0:
            raise OptionError(f"ridges={self.ridges}: expected one or more numbers of at least 0, such as (1e-3, 1e-2)")

    @property
    def kind(self) -> str:
        """What is fitted where there is a repair."""
        return "lstsq" if self.fit == "default" else self.fit


@dataclass(frozen=True)
class DataOptions(Checked):
    """How data are read: their ``labels`` if these lie elsewhere, names of ``classes``, the preprocessing (a ``preset``, and what is given
    beside it), how many ``samples`` are drawn with the ``seed``. ``steps``: a `Preprocessing` that stands for all of the preprocessing."""

    labels: Any = option(None, "Labels, if they are not in the data: .npy, .npz, or for images .csv of filename,label.", DATA, path=True)
    classes: Any = rare(
        None, "Names of the classes or of their folders, in the order of the model's outputs, one a line.  [default: ImageNet's, "
        "for folders named n01440764 ...]", DATA, path=True)  # fmt: skip
    preset: str | None = option(
        None, "Usual preprocessing; options given beside it win.", DATA, choices=("imagenet", "cifar10", "inception", "tf", "yolo")
    )
    mean: tuple[float, ...] | None = option(None, "Subtracted per channel, after --scale.", DATA, parse=numbers, metavar="M1,M2,..")
    std: tuple[float, ...] | None = option(None, "Divided by per channel, after --mean.", DATA, parse=numbers, metavar="S1,S2,..")
    scale: float | None = option(None, "Value range of the raw data: 255 for 8-bit images.", DATA, low=0, low_open=True)
    layout: str = option("nchw", "Layout of the data.", DATA, choices=("nchw", "nhwc"))
    resize: tuple[int, ...] | None = rare(
        None, "Images: the shorter side, or height x width.  [default: model's]", DATA, parse=pixels, metavar="S|HxW"
    )
    center_crop: tuple[int, ...] | None = rare(None, "Images: the middle, after --resize.", DATA, parse=pixels, metavar="S|HxW")
    color: str | None = rare(None, "Images: order of the model's colour channels.  [default: rgb]", DATA, choices=("rgb", "bgr"))
    resample: str | None = rare(
        None, "Images: how --resize interpolates.  [default: bilinear]", DATA,
        choices=("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"))  # fmt: skip
    samples: int | None = rare(None, "Use only so many samples of --data, drawn with --seed.", DATA, low=1)
    seed: int = rare(0, "Seed of everything random.", DATA, low=0)
    steps: Any = None

    @property
    def given(self) -> list[str]:
        """Names of what says something about the data."""
        unsaid = {"seed": self.seed, "layout": "nchw"}
        return [name for name, value in vars(self).items() if value is not None and not (name in unsaid and value == unsaid[name])]


EXPANSIONS = ("expand", "cut_layernorm", "expand_outputs")


@dataclass(frozen=True)
class InspectOptions(Checked):
    """How a model is traced: concrete ``input_shapes`` by input name, where dynamic dimensions cannot be guessed; ``custom_ops``: libraries
    of operators that onnxruntime loads with it; ``expand``: whether channels may leave that an operator or an output needs, which gets
    them again ("auto": where a plan is better for it, or needs that). ``cut_layernorm`` and ``expand_outputs`` are older names of its
    two halves."""

    input_shapes: Mapping[str, list[int]] | None = rare(
        None, "Concrete shape to trace an input with; needed only where dynamic dimensions cannot be guessed.", RUN, flag="input-shape",
        metavar="NAME=1,3,224,224")  # fmt: skip
    custom_ops: tuple[str, ...] = rare(
        (), "Library of custom operators that onnxruntime loads with the model. Repeatable.", RUN, metavar="LIB"
    )
    expand: str = rare(
        "auto", "Let channels leave that an operator needs (a normalisation over them, an output that several layers add to): it gets "
        "them again, exactly, at some cost in time. auto: where the target has less error so, or needs it.", CHANNELS,
        choices=("auto", "none", "all"))  # fmt: skip
    cut_layernorm: bool = rare(False, "Older name of --expand all, without outputs.", CHANNELS)
    expand_outputs: bool = rare(False, "Older name of --expand all, for outputs alone.", CHANNELS)

    @property
    def expansion(self) -> dict[str, Any]:
        """Arguments of `inspect`."""
        return {"cut_layernorm": self.cut_layernorm, "expand_outputs": self.expand_outputs, "expand": self.expand}


ENERGY = "Tell the energy of a run: measured (RAPL) where the processor's counters can be read, else a rough estimate, named so."


@dataclass(frozen=True)
class OutputOptions(Checked):
    """Where results go and in which form. ``path``: the model; ``manifest``, ``report``, ``card``: files beside it. ``external``: weights
    in ``<path>.data`` (default: only over 2 GB). ``fp16`` weights (``half``: its older name), ``quantize`` ("int8"), ``save_ort`` (the
    format of onnxruntime) make further forms of the model. ``locked``: a manifest whose run must come out again byte for byte.
    ``energy``: that of a run is told, with test data. ``rows``: what ``vocabulary`` means for this model and these data
    (`export.rows_kept`), by input."""

    path: Any = None
    manifest: Any = option(None, "Write versions, hashes, options, plan and cuts as JSON.", OUTPUT, path=True)
    report: Any = option(None, "Write one HTML file with charts about the run (extra `report`).", OUTPUT, path=True)
    external: bool | None = rare(
        None, "Weights in OUT.data, or in one file.  [default: one file up to 2 GB]", OUTPUT, flag="external-data/--single-file"
    )
    fp16: bool = option(False, "Store weights as float16; inputs, outputs and arithmetic stay float32.", FORMS, alias="half")
    quantize: str | None = option(None, "8-bit integers, by onnxruntime's quantiser; static with --data.", FORMS, choices=("int8",))
    vocabulary: str | None = rare(
        None, "Of tables that are looked up (words) keep these rows: a file, a number a line, or those that --data hold; others share one.",
        FORMS, metavar="FILE|from-data",
    )  # fmt: skip
    unknown_token: int | None = rare(None, "The number whose row all others share.  [default: a new one, their mean]", FORMS, low=0)
    save_ort: Any = rare(None, "Also write onnxruntime's .ort format, with the operators that a reduced build needs.", FORMS, path=True)
    card: Any = rare(None, "Write a model card (Markdown): verdict, figures, data, how it was made, limits.", OUTPUT, path=True)
    locked: Any = rare(
        None, "Reproduce the run of a manifest byte for byte, or say what differs (exit code 3).", RUN, metavar="MANIFEST", path=True
    )
    energy: bool = rare(False, ENERGY + " Needs --test-data.", RUN)
    half: bool = False
    rows: Any = None

    def __post_init__(self) -> None:
        """Check all values; both names say the same."""
        super().__post_init__()
        if self.unknown_token is not None and self.vocabulary is None:
            raise OptionError("--unknown-token needs --vocabulary")
        for name in ("fp16", "half"):
            object.__setattr__(self, name, self.fp16 or self.half)

    @property
    def packaged(self) -> bool:
        """Whether further forms are asked for."""
        return self.fp16 or self.quantize is not None or self.save_ort is not None or self.vocabulary is not None


# ---- what options are called from Python, for messages ---------------------------------------------------------------

FROM_PYTHON |= {"--data": "data=...", "--test-data": "test_data=...", "--eval-data": "eval_data=...", "--score": "score_name=..."}
for _record in (PlanOptions, MeasureOptions, RepairOptions, DataOptions, InspectOptions, OutputOptions):
    for _field in fields(_record):
        if "option" in _field.metadata:
            _flag = (_field.metadata["option"].flag or _field.name.replace("_", "-")).partition("/")[0]
            FROM_PYTHON.setdefault(f"--{_flag}", f"{_record.__name__}({_field.name}=...)")
