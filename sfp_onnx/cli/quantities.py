"""Amounts with units on the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping

import click

from ..targets import BYTES

SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def seconds(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """``60s``, ``5m``, ``1h``, or a number of seconds, as a callback of an option."""
    return None if value is None else _quantity(value, SECONDS, "a positive time such as 60s, 5m or 1h")


def byte_size(context: click.Context, parameter: click.Parameter, value: str) -> int:
    """``500MB`` (decimal), ``2GiB`` (binary), ``12k``, or a number of bytes, as a callback of an option."""
    found = int(_quantity(value, BYTES, expected := "bytes such as 500MB, 2GB (10^9 bytes) or 2GiB (2^30)"))
    if found < 1:
        raise click.BadParameter(f"'{value}': expected {expected}")
    return found


def _quantity(text: str, units: Mapping[str, float], expected: str) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in units or not float(match[1]):
        raise click.BadParameter(f"'{text}': expected {expected}")
    return float(match[1]) * units[match[2]]
