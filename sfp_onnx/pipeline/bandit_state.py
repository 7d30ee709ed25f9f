"""What a bandit search has seen, as a file: the pulls in their order. A policy is brought back by replaying them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import OptionError
from ..graph import write_text
from ..records import FloatArray, IntArray

FORMAT = "sfp_onnx bandit state"


class Log:
    """Pulls of one round: arm, mean reward and mean squared reward over the images. ``horizon`` if it had to be measured;
    ``seconds`` were spent on pulling."""

    def __init__(self, rows: Sequence[Sequence[float]] = (), horizon: int | None = None, seconds: float = 0.0) -> None:
        self.rows = [(int(arm), float(mean), float(square)) for arm, mean, square in rows]
        self.horizon, self.seconds = horizon, seconds

    def add(self, rows: Sequence[tuple[int, float, float]]) -> None:
        """Append pulls (at once, so that an interruption leaves whole rows)."""
        self.rows.extend(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def arms(self, start: int, stop: int) -> list[int]:
        """The arms of some pulls."""
        return [row[0] for row in self.rows[start:stop]]

    def means(self, start: int, stop: int) -> FloatArray:
        """Mean rewards of some pulls."""
        return np.array([row[1] for row in self.rows[start:stop]])

    def columns(self) -> tuple[IntArray, FloatArray, FloatArray]:
        """Arms, means and squares."""
        table = np.array(self.rows, np.float64).reshape(-1, 3)
        return table[:, 0].astype(np.int64), table[:, 1], table[:, 2]


class State:
    """Logs by round, kept in a file if there is a path."""

    def __init__(self, path: str | None, key: Mapping[str, Any], inputs: Sequence[Path]) -> None:
        """Read the file if it exists.

        Raises:
            OptionError: it is damaged, or belongs to another search.
        """
        self.path, self.key, self.inputs = path, json.loads(json.dumps(key)), tuple(inputs)
        self.logs: dict[int, Log] = {}
        if path is not None and Path(path).exists():
            self._read(Path(path))

    def _read(self, path: Path) -> None:
        try:
            data = json.loads(path.read_text())
            if data["format"] != FORMAT:
                raise ValueError("not a bandit state")
            found = data["search"]
            self.logs = {int(number): Log(own["pulls"], own["horizon"], float(own["seconds"])) for number, own in data["rounds"].items()}
            if not all(arm >= 0 and 0 <= mean <= 1 for log in self.logs.values() for arm, mean, _ in log.rows):
                raise ValueError("rewards outside [0, 1]")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise OptionError(f"{path}: cannot read the state: {error}. Delete the file to start again.") from error
        other = [name for name in self.key if found.get(name) != self.key[name]]
        if other:
            raise OptionError(
                f"{path}: the state belongs to another search: {', '.join(other)} differ. Use the same options, or another --state."
            )

    def log(self, number: int) -> Log:
        """The log of a round."""
        return self.logs.setdefault(number, Log())

    def save(self) -> None:
        """Write the file, if there is one."""
        if self.path is not None:
            rounds = {str(number): {"horizon": log.horizon, "seconds": log.seconds, "pulls": log.rows} for number, log in self.logs.items()}
            data = {"format": FORMAT, "version": 1, "search": self.key, "rounds": rounds}
            write_text(self.path, json.dumps(data), self.inputs)
