"""The registry of dilution methods: plain functions from the view of one layer to scores or to a mask."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import OptionError
from ..masks import KERNEL, Tile
from ..records import Array
from .view import KernelView, MethodOptions

MethodFunction = Callable[[KernelView, MethodOptions], Array]
TileFunction = Callable[[MethodOptions], Tile]
NEEDS = ("activations", "losses", "profiles")


@dataclass(frozen=True)
class Method:
    """A way to choose connections.

    ``function`` gives scores per tile (larger = keep; shape as `masks.tile_sums`), or, if the rate is ``fixed`` by the method, a mask per
    tile. ``needs`` is a subset of `NEEDS`; ``pattern`` shows the numbers that the name takes (``nm:N:M``);
    ``gated``: the layer is skipped where its labels carry too little signal.
    """

    name: str
    function: MethodFunction
    tile: TileFunction
    summary: str
    source: str
    needs: frozenset[str]
    fixed: bool
    pattern: str
    gated: bool

    @property
    def numbers(self) -> int:
        """How many numbers follow the name."""
        return len(re.findall("[A-Z]", self.pattern))


METHODS: dict[str, Method] = {}


def whole_kernels(options: MethodOptions) -> Tile:
    """The unit of most methods: one 2-D kernel (one weight of a matrix)."""
    return KERNEL


def method(
    name: str, summary: str, source: str, *, tile: TileFunction = whole_kernels, needs: tuple[str, ...] = (), kind: str = "",
    pattern: str = "",
) -> Callable[[MethodFunction], MethodFunction]:  # fmt: skip
    """Register a method; ``kind`` may hold the words "fixed" (the method sets the rate) and "gated"."""

    def register(function: MethodFunction) -> MethodFunction:
        METHODS[name] = Method(
            name, function, tile, summary, source, frozenset(needs), "fixed" in kind, pattern, "gated" in kind
        )
        return function

    return register


def find_method(text: str, seed: int = 0) -> tuple[Method, MethodOptions]:
    """Read ``l1``, ``nm:2:4``, ``block:1x4``.

    Raises:
        OptionError: no such method, or its numbers are missing or out of range.
    """
    name, *rest = re.split("[:x]", text.strip()) if ":" in text else [text.strip()]
    if name not in METHODS:
        raise OptionError(f"unknown dilution method '{text}'. Known: {', '.join(own.pattern or own.name for own in METHODS.values())}")
    chosen = METHODS[name]
    if len(rest) != chosen.numbers or not all(item.isdigit() and int(item) > 0 for item in rest):
        raise OptionError(f"method '{text}': expected {chosen.pattern or chosen.name}" + (" with whole numbers" if chosen.pattern else ""))
    numbers = tuple(int(item) for item in rest)
    if name == "nm" and numbers[0] >= numbers[1]:
        raise OptionError(f"method '{text}': expected nm:N:M with N smaller than M (N of M weights stay)")
    return chosen, MethodOptions(numbers, seed)
