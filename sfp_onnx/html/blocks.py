"""What a page is made of. All lengths are in SVG's user units (pixels at full size)."""

from __future__ import annotations

from dataclasses import dataclass


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
    """A whole report. ``facts`` are (name, value) needed to repeat the run besides the ``command``."""

    title: str
    words: tuple[str, ...]
    cards: tuple[Card, ...]
    sections: tuple[Section, ...]
    command: str
    facts: tuple[tuple[str, str], ...]
