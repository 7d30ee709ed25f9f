"""Class folders, and class names in files of labels, as numbers of the model's outputs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..core.errors import DataError
from ..core.types import Array

WNID = re.compile(r"n\d{8}")
BACKGROUND = 1001  # outputs of TensorFlow's ImageNet classifiers, the first of which is the background
SHOWN = 3


@dataclass(frozen=True)
class Numbering:
    """The number of each of the names that were found (None: unknown), names of all classes by number (empty: unknown), and what to
    tell the user."""

    numbers: tuple[int, ...] | None
    classes: tuple[str, ...] = ()
    note: str = ""


@cache
def imagenet() -> dict[str, str]:
    """Names of the 1000 classes of ILSVRC-2012 by WordNet number, in the order of the outputs, which is that of the numbers."""
    lines = Path(__file__).with_name("imagenet.txt").read_text(encoding="utf-8").splitlines()
    return {line[:9]: line[10:] for line in lines}


def read_classes(source: str | Path | Array) -> tuple[str, ...]:
    """Names of classes in the order of the outputs: lines of a file, or an array of texts.

    Raises:
        DataError: unreadable or empty.
    """
    try:
        given = Path(source).read_text(encoding="utf-8-sig").splitlines() if isinstance(source, (str, Path)) else map(str, source)
    except (OSError, ValueError) as error:
        raise DataError(f"{source}: cannot read class names: {getattr(error, 'strerror', None) or error}") from error
    names = [line.strip() for line in given]
    while names and not names[-1]:
        names.pop()
    if not names:
        raise DataError(f"{source}: there are no class names in it. Expected one a line, in the order of the model's outputs.")
    return tuple(names)


def numbered(found: Sequence[str], given: Sequence[str] | None, outputs: int | None, what: str) -> Numbering:
    """Which class each of the names is (``found``, sorted): by the list that was ``given``, ImageNet's own if all are its numbers, their
    values if they are numbers, else their places if the model has as many outputs (None: that is not known). ``what`` they are.

    Raises:
        DataError: a name is not in the list, or the list has other names than the model outputs.
    """
    known, background = imagenet(), int(outputs == BACKGROUND)
    if given is not None:
        if outputs is not None and len(given) != outputs:
            hint = " Is the first output the background? Then begin the file with a line 'background'." if len(given) + 1 == outputs else ""
            raise DataError(f"--classes: {len(given)} names, but the model has {outputs} outputs. Give one a line, in their order.{hint}")
        return Numbering(_looked_up(found, given, what), tuple(known.get(name, name) for name in given))
    if outputs in (len(known), BACKGROUND) and all(name in known for name in found):
        order = list(known)
        names = (*["background"] * background, *known.values())
        words = f"{len(found)} {what}, numbered as ImageNet's classes ({found[0]} = {order.index(found[0]) + background}, ...)"
        return Numbering(tuple(order.index(name) + background for name in found), names, words)
    if outputs is None or len(found) >= outputs:
        note = f"{len(found)} {what}, numbered by name: {_listed(found)}"
        if all(name.isdecimal() for name in found) and [int(name) for name in found] != list(range(len(found))):
            note += ". These are numbers, but the labels are their places when sorted by name; else give --labels labels.csv or --classes"
        return Numbering(tuple(range(len(found))), tuple(found), note)
    if all(name.isdecimal() and int(name) < outputs for name in found):
        return Numbering(tuple(map(int, found)), (), f"{len(found)} {what}, whose names are taken for numbers of the {outputs} outputs")
    why = f"{len(found)} {what}, but the model has {outputs} outputs: which is which is not known, so they are not used as labels"
    return Numbering(None, (), f"{why}. Give --classes FILE: all names in the order of the outputs, one a line")


def _looked_up(found: Sequence[str], given: Sequence[str], what: str) -> tuple[int, ...]:
    """Places of names in a list; a line may hold a WordNet number before the name, and several names."""
    places: dict[str, int] = {}
    for place, line in enumerate(given):
        first = line.split()[0] if line else ""
        whole = [line, imagenet().get(line, line), *([first, line[len(first) :]] if WNID.fullmatch(first) else [])]
        for name in {_plain(part) for text in whole for part in (text, *text.split(","))}:
            places[name] = place if places.get(name, place) == place else -1
    numbers = {name: max(places.get(_plain(key), -1) for key in (name, imagenet().get(name, name))) for name in found}
    missing = [name for name, number in numbers.items() if number < 0]
    if missing:
        shown = ", ".join(f"'{name}'" for name in missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
        words = f"{shown} (of {len(found)} {what}) stand nowhere in the list, or on several lines"
        raise DataError(f"--classes: {words}. It begins with '{given[0]}'.")
    return tuple(numbers.values())


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def _listed(names: Sequence[str]) -> str:
    shown = [f"{index} {name}" for index, name in enumerate(names)]
    return ", ".join(shown if len(shown) <= 4 else [*shown[:2], "..", shown[-1]])
