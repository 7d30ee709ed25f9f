"""Arrays by name in a file, with facts as JSON: written whole or not at all, the same bytes for the same contents, read one at a time."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..core.errors import DataError
from ..core.types import Array
from .save import atomic, check_output, writing

FACTS = "facts"


class Named(NamedTuple):
    """An array with its name."""

    name: str
    array: Array


def write_arrays(path: Path, arrays: Iterable[Named], inputs: Iterable[Path] = (), facts: Mapping[str, Any] | None = None) -> None:
    """Write arrays as .npz, atomically, one at a time; equal ones give equal bytes. ``facts`` are a member of their own; with them,
    nothing is compressed (sums of floating numbers hardly are).

    Raises:
        OutputError: the path cannot be written, or is one of the ``inputs``.
    """
    kind = zipfile.ZIP_DEFLATED if facts is None else zipfile.ZIP_STORED
    check_output(path, inputs)
    with writing(path), atomic(path) as (stream,), zipfile.ZipFile(stream, "w", kind) as archive:
        if facts is not None:
            archive.writestr(zipfile.ZipInfo(f"{FACTS}.json"), json.dumps(facts, indent=1))
        for name, array in arrays:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:  # of a fixed time, unlike `ZipFile.write`
                np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)


class Arrays:
    """What `write_arrays` wrote of one ``format`` (a fact): its ``facts``, and its arrays by name, read when they are asked for."""

    def __init__(self, path: str | Path, format: str, version: int, made_by: str) -> None:
        """Read the facts.

        Raises:
            DataError: no such file, or another one; ``made_by`` says what makes it.
        """
        self.path, self._other = Path(path), f"{path}: no {format}, or damaged. Expected what {made_by} writes."
        try:
            self._archive = zipfile.ZipFile(self.path)
            self.facts: dict[str, Any] = json.loads(self._archive.read(f"{FACTS}.json"))
            if self.facts["format"] != format:
                raise ValueError(format)
        except FileNotFoundError as error:
            raise DataError(f"{path}: no such file. Expected what {made_by} writes.") from error
        except (OSError, ValueError, KeyError, TypeError, RecursionError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise DataError(self._other) from error
        if self.facts.get("version") != version:
            raise DataError(f"{path}: version {self.facts.get('version')} of its format; this program reads {version}. Make it again.")

    def names(self) -> list[str]:
        """Of all arrays, in the order in which they were written."""
        return [name.removesuffix(".npy") for name in self._archive.namelist() if name.endswith(".npy")]

    def __getitem__(self, name: str) -> Array:
        """An array.

        Raises:
            DataError: it is missing or damaged.
        """
        try:
            with self._archive.open(f"{name}.npy") as member:
                return np.asarray(np.lib.format.read_array(member, allow_pickle=False))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise DataError(self._other) from error

    def fact(self, name: str, kind: Any) -> Any:
        """A fact of a kind.

        Raises:
            DataError: it is missing or another.
        """
        if not isinstance(self.facts.get(name), kind):
            raise DataError(self._other)
        return self.facts[name]

    def close(self) -> None:
        """Close the file."""
        self._archive.close()
