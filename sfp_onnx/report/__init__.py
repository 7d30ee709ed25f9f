"""What a report is made of: charts drawn from values, PNG files from arrays, and the page as text."""

from __future__ import annotations

import struct
import zlib
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import chain, pairwise
from math import ceil, floor, log10
from typing import Any

import numpy as np

from ..core.system import need
from ..core.types import Array, BoolArray, FloatArray, number as number

PLUGIN_SECTIONS: list[Callable[..., list[Any]]] = []
"""What plug-ins add to the pages: (candidates, data, progress) -> sections."""


@dataclass(frozen=True)
class Mark:
    """One thing drawn in a chart: ``shape`` is "rect" (numbers x, y, width, height), "line" (x1, y1, x2, y2), "dot" (x, y, radius),
    "text" (x, y, degrees) or "image" (x, y, width, height). ``kind`` is its style class; ``text`` a tooltip, words or the address of
    an image; ``anchor`` where a text hangs: start, middle or end."""

    shape: str
    numbers: tuple[float, ...]
    kind: str = ""
    text: str = ""
    anchor: str = "start"


@dataclass(frozen=True)
class Chart:
    """A drawing. ``title`` describes it to those who cannot see it; ``legend`` are (style class, words)."""

    title: str
    width: float
    height: float
    marks: tuple[Mark, ...]
    legend: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Table:
    """Rows of words; ``summary`` is what to click on to open it (empty: always open)."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    summary: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG file with lines of words below it."""

    png: bytes
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """One part of a page."""

    title: str
    words: tuple[str, ...] = ()
    charts: tuple[Chart, ...] = ()
    table: Table | None = None
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Card:
    """One figure of the headline; ``note`` stands below it."""

    name: str
    before: str
    after: str
    note: str = ""


@dataclass(frozen=True)
class Page:
    """A whole report. ``verdict`` is the headline's sentence, ``tone`` its style class: good, bad, or neither; ``facts`` are (name, value)
    needed to repeat the run besides the ``command``."""

    title: str
    words: tuple[str, ...]
    cards: tuple[Card, ...]
    sections: tuple[Section, ...]
    command: str
    facts: tuple[tuple[str, str], ...]
    verdict: str = ""
    tone: str = ""


# ---- charts from values ----------------------------------------------------------------------------------------------


WIDTH = 720

LEFT, TOP, PLOT = 52, 12, 180

ROW, NAMES = 15, 190

LONGEST = 26

MOST_NAMED = 110

SIDE = 300

WORDS = ("before", "after")

ACROSS = 440  # two of them fit beside each other


def short_names(names: Sequence[str]) -> list[str]:
    """Names of nodes as people say them: ``/layer1/layer1.0/conv1/Conv`` -> ``layer1.0/conv1``."""
    for depth in (2, 3, 4):
        short = []
        for name in names:
            parts = [part for part in name.split("/") if part]
            parts = parts[:-1] if len(parts) > 2 else parts
            short.append("/".join(parts[-depth:])[-LONGEST:] or name)
        if len(set(short)) == len(set(names)):
            return short
    return [name[-LONGEST:] for name in names]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from at most ``low`` to at least ``high``."""
    span = high - low or abs(high) or 1.0
    rough = span / count
    power = 10.0 ** floor(log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def _level(y: float, right: float, value: float) -> list[Mark]:
    """The line of one value of the upright axis."""
    return [Mark("line", (LEFT, y, right, y), "grid"), Mark("text", (LEFT - 6, y + 4, 0), "tick", number(value), "end")]


def pair_bars(title: str, names: Sequence[str], before: Sequence[float], after: Sequence[float], words: Sequence[str] = WORDS) -> Chart:
    """Two bars in one place for each of ``names``: ``before`` pale and wide, ``after`` strong and narrower in front of it."""
    count = max(len(names), 1)
    step = min(max((WIDTH - LEFT) / count, 12 if count <= MOST_NAMED else 4), 60)
    scale = ticks(0, max([*before, *after, 0]) or 1)
    width = max(LEFT + step * count + 8, 420)

    def y(value: float) -> float:
        return TOP + PLOT * (1 - value / scale[-1])

    marks = [mark for value in scale for mark in _level(y(value), width - 4, value)]
    for index, (name, old, new) in enumerate(zip(names, before, after, strict=True)):
        x = LEFT + step * index
        tip = f"{name}: {number(old)} \u2192 {number(new)}"
        marks.append(Mark("rect", (x + step * 0.06, y(old), step * 0.88, TOP + PLOT - y(old)), "before", tip))
        marks.append(Mark("rect", (x + step * 0.22, y(new), step * 0.56, TOP + PLOT - y(new)), "after", tip))
    room = 10.0
    if count <= MOST_NAMED:
        shown = short_names(names)
        room = 12 + 5.6 * max(map(len, shown), default=0)
        for index, name in enumerate(shown):
            marks.append(Mark("text", (LEFT + step * (index + 0.5) + 3, TOP + PLOT + 8, -90), "name", name, "end"))
    return Chart(title, width, TOP + PLOT + room, tuple(marks), (("before", words[0]), ("after", words[1])))


@dataclass(frozen=True)
class Strip:
    """The scores of a group, and which of its channels leave."""

    name: str
    scores: FloatArray
    removed: BoolArray

    @property
    def cut(self) -> bool:
        """Whether some leave and some stay."""
        return bool(self.removed.any() and not self.removed.all())

    @property
    def tangled(self) -> bool:
        """Whether no score separates those from these."""
        return self.cut and bool(self.scores[self.removed].max() > self.scores[~self.removed].min())


def strips(title: str, groups: Sequence[Strip]) -> Chart:
    """The scores of each group as dots on a line of its own, from the group's least to its largest,
    square-root spaced so that the small ones, where the cut is, do not lie on each other; with a line where the cut is if one score
    separates what leaves from what stays."""
    marks = []
    shown = short_names([group.name for group in groups])
    right = WIDTH - 14.0
    for index, group in enumerate(groups):
        scores, removed = group.scores, group.removed
        y = TOP + ROW * (index + 0.5)
        low, high = min(float(scores.min()), 0.0), float(scores.max())
        places = NAMES + (right - NAMES) * np.sqrt(np.clip((scores - low) / ((high - low) or 1.0), 0, 1))
        marks.append(Mark("text", (NAMES - 8, y + 3.5, 0), "name", shown[index], "end"))
        marks.append(Mark("line", (NAMES, y, right, y), "grid"))
        for word, which in (("stays", ~removed), ("leaves", removed)):
            dots = zip(places[which], scores[which], strict=True)
            marks += [Mark("dot", (float(x), y, 3), word, f"{group.name}: {value:.4g} {word}") for x, value in dots]
        if group.cut and not group.tangled:
            x = float(places[removed].max() + places[~removed].min()) / 2
            marks.append(Mark("line", (x, y - ROW * 0.48, x, y + ROW * 0.48), "cut"))
    cut = any(group.removed.any() for group in groups)
    legend = (("stays", "stays"), ("leaves", "leaves"), ("cut", "cut")) if cut else ()
    return Chart(title, WIDTH, TOP + ROW * len(groups) + 6, tuple(marks), legend)


def _axes(names: tuple[str, str], across: float, height: float, up: float) -> list[Mark]:
    """What the axes are: below the chart, and at its left."""
    return [Mark("text", (across, height - 6, 0), "axis", names[0], "middle"), Mark("text", (11, up, -90), "axis", names[1], "middle")]


@dataclass(frozen=True)
class Dot:
    """A named point, and whether it is on the front."""

    x: float
    y: float
    name: str
    front: bool


def scatter(title: str, points: Sequence[Dot], axes: tuple[str, str]) -> Chart:
    """Points; those on the front are joined in the order of x."""
    height = 300.0
    bottom = height - 44
    columns = ticks(min(dot.x for dot in points), max(dot.x for dot in points), 5)
    rows = ticks(min(dot.y for dot in points), max(dot.y for dot in points))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - columns[0]) / (columns[-1] - columns[0])
        up = (y - rows[0]) / (rows[-1] - rows[0])
        return LEFT + 14 + (ACROSS - LEFT - 40) * across, bottom - (bottom - TOP) * up

    marks = [mark for value in rows for mark in _level(place(columns[0], value)[1], ACROSS - 8, value)]
    for value in columns:
        x = place(value, rows[0])[0]
        marks += [Mark("line", (x, TOP, x, bottom), "grid"), Mark("text", (x, bottom + 15, 0), "tick", number(value), "middle")]
    marks += _axes(axes, ACROSS / 2, height, (TOP + bottom) / 2)
    front = sorted(place(dot.x, dot.y) for dot in points if dot.front)
    marks += [Mark("line", (*one, *two), "front") for one, two in pairwise(front)]
    named: list[tuple[float, float]] = []
    for dot in sorted(points, key=lambda dot: (dot.x, dot.y)):
        across, up = place(dot.x, dot.y)
        tip = f"{dot.name}: {axes[0]} {number(dot.x)}, {axes[1]} {number(dot.y)}"
        marks.append(Mark("dot", (across, up, 5), "best" if dot.front else "other", tip))
        crowded = any(abs(across - other) < 90 and abs(up - level) < 12 for other, level in named)
        near_edge = across > ACROSS - 90
        beside = (across + (-9 if near_edge else 9), up + 4, 0)
        anchor = "middle" if crowded else "end" if near_edge else "start"
        marks.append(Mark("text", (across, up - 9, 0) if crowded else beside, "name", dot.name, anchor))
        named.append((across, up))
    return Chart(title, ACROSS, height, tuple(marks), (("best", "on the Pareto front"), ("other", "not")))


def named(label: int, names: Sequence[str]) -> str:
    """A class by its name, where names are known."""
    return f"{names[label]} ({label})" if 0 <= label < len(names) else str(label)


def heat_map(title: str, matrix: Array, clusters: Sequence[Sequence[int]], names: Sequence[str] = ()) -> Chart:
    """A matrix (L, L) as colours (red above zero, blue below), its labels reordered so that every cluster is a framed block."""
    order = list(dict.fromkeys([*chain.from_iterable(clusters), *range(len(matrix))]))
    values = np.asarray(matrix, np.float64)[np.ix_(order, order)]
    share = values / (np.abs(values).max() or 1.0)
    ends = np.array([[33, 102, 172], [247, 247, 247], [178, 24, 43]], np.float64)  # ColorBrewer RdBu
    towards = np.where(share[..., None] < 0, ends[0], ends[2])
    small = png(np.round(ends[1] + (towards - ends[1]) * np.abs(share[..., None])).astype(np.uint8))
    cell = (SIDE - 40) / len(order)
    marks = [Mark("image", (34, 6, SIDE - 40, SIDE - 40), "pixels", "data:image/png;base64," + b64encode(small).decode())]
    start, framed = 0, set[int]()
    for cluster in clusters:
        size = len(set(cluster) - framed)
        if size == len(cluster):
            box = (34 + cell * start, 6 + cell * start, cell * size, cell * size)
            told = ", ".join(named(label, names) for label in sorted(cluster))
            marks.append(Mark("rect", box, "frame", f"cluster of labels {told}"))
        start, framed = start + size, framed | set(cluster)
    if len(order) <= 20:
        for index, label in enumerate(order):
            middle = 6 + cell * (index + 0.5)
            marks.append(Mark("text", (30, middle + 3.5, 0), "name", str(label), "end"))
            marks.append(Mark("text", (middle + 28, SIDE - 22, 0), "name", str(label), "middle"))
    marks += _axes(("output of the probe", "label of the sample"), 34 + (SIDE - 40) / 2, SIDE, 6 + (SIDE - 40) / 2)
    return Chart(title, SIDE, SIDE, tuple(marks))


# ---- PNG files from arrays -------------------------------------------------------------------------------------------


COLOUR_TYPES = {1: 0, 3: 2}  # channels: grey, RGB (PNG specification, 11.2.2)


def png(pixels: Array) -> bytes:
    """A PNG file of uint8 pixels (H, W), (H, W, 1) or (H, W, 3); equal pixels give equal bytes.

    Raises:
        ValueError: another shape or type.
    """
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.shape[2] not in COLOUR_TYPES or pixels.dtype.name != "uint8" or not pixels.size:
        raise ValueError(f"expected uint8 pixels (H, W, 1 or 3), got {pixels.dtype} of shape {list(pixels.shape)}")
    height, width, channels = pixels.shape
    lines = b"".join(b"\0" + row.tobytes() for row in pixels)  # filter 0: none
    header = struct.pack(">IIBBBBB", width, height, 8, COLOUR_TYPES[channels], 0, 0, 0)
    parts = (b"IHDR" + header, b"IDAT" + zlib.compress(lines, 9), b"IEND")
    chunks = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


# ---- the page as text ------------------------------------------------------------------------------------------------


def require() -> Any:
    """Jinja2, which comes with the extra ``report``.

    Raises:
        OptionError: it is not installed.
    """
    return need("jinja2", "report", "--report")


def render(page: Page) -> str:
    """The page as one HTML file. Equal pages give equal text.

    Raises:
        OptionError: Jinja2 is not installed.
    """
    jinja2 = require()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data_uri"] = lambda data: "data:image/png;base64," + b64encode(data).decode()
    environment.filters["n"] = lambda value: f"{value:.2f}".rstrip("0").rstrip(".")
    template = resources.files(__package__).joinpath("page.html.j2").read_text("utf-8")
    return str(environment.from_string(template).render(page=page)).lstrip()
