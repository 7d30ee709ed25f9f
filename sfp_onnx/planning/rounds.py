"""A cut in rounds: how far each of them goes, and what leaves the present network in units of the original.

Every round ranks the channels of the network as it is by then. What it removes is looked up in the original by the tensors that both have,
so that each result is a cut of the original, with its numbering and its proof.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..core.errors import OptionError, TargetError
from ..core.types import Array, BoolArray, IntArray
from ..coupling.analysis import Analysis
from ..coupling.cost import kept_masks
from ..graph import Constants, Model, initializers
from ..graph.extract import with_constants
from ..graph.load import from_bytes
from ..graph.save import atomic, check_output, to_proto, writing
from . import FIGURES, bounds, parse_target


def check(texts: Sequence[str]) -> None:
    """Refuse targets that are not counted.

    Raises:
        OptionError: one is timed.
    """
    timed = [text for text in texts if parse_target(text).figure.timed or "" not in parse_target(text).figure.units]
    if timed:
        known = ", ".join(name for name, figure in FIGURES.items() if not figure.timed and "" in figure.units)
        raise OptionError(f"--rounds takes targets that are counted ({known}), not {', '.join(timed)}")


def targets_of(texts: Sequence[str], before: Mapping[str, float], share: float) -> tuple[str, ...]:
    """The targets of a round after which the ``share`` of all rounds is done: before (bound / before)^share, as numbers."""
    limits = bounds([parse_target(text) for text in texts], before)
    return tuple(f"{name}={before[name] * (limit / before[name]) ** share:.3f}" for name, limit in limits.items())


def composed(original: Analysis, removed: BoolArray, present: Analysis, more: BoolArray) -> BoolArray:
    """``removed`` of the original together with what ``more`` removes of the present network, which is the original without ``removed``.

    Raises:
        TargetError: the two networks have no tensors in common that tell.
    """
    total, found = np.array(removed), np.zeros(len(more), bool)
    for name, channels in present.coupling.tensors.items():
        twins = original.coupling.tensors.get(name, ())
        for axis, mask in kept_masks(twins, removed).items():
            theirs, ours = ([item.units for item in some if item.axis == axis] for some in (twins, channels))
            alike = len(theirs) == len(ours)  # heads with heads, dimensions with dimensions
            for pair in zip(theirs, ours, strict=True) if alike else ():
                _add(total, found, pair[0][mask], pair[1], more)
    if not found[more].all():
        unknown = int((more & ~found).sum())
        raise TargetError(f"--rounds: {unknown} channels of the network after a round are none of the original. Use one round.")
    return total


def _add(total: BoolArray, found: BoolArray, theirs: IntArray, ours: IntArray, more: BoolArray) -> None:
    """Mark in ``total`` the units of the original that stand where units of the present network leave."""
    if len(theirs) != len(ours):
        return
    known = (theirs >= 0) & (ours >= 0)
    found[ours[known]] = True
    total[theirs[known][more[ours[known]]]] = True


def carried(model: Model, weights: Mapping[str, Array]) -> Model:
    """The model with those of the floating weights that it has, too, under the same name and in the same shape."""
    held = initializers(model)
    found = {name: weights[name] for name in held if name in weights}
    alike = [name for name, array in found.items() if (array.shape, array.dtype) == (tuple(held[name].shape), held[name].dtype)]
    return with_constants(model, {name: found[name] for name in alike})


def weights_of(model: Model) -> dict[str, Array]:
    """All floating constants of a model."""
    constants = Constants(model)
    return {name: constants[name] for name, held in initializers(model).items() if np.dtype(held.dtype).kind == "f"}


@dataclass(frozen=True)
class Standing:
    """Where a run in rounds stands: ``number`` of them are done, ``removed`` are units of the original, ``model`` is what is left."""

    number: int
    removed: BoolArray
    model: Model


@dataclass(frozen=True)
class File:
    """Where it is kept how a run stands; ``key`` says which run it is."""

    path: Path
    key: str

    def write(self, stands: Standing) -> None:
        """Write it, whole or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        held = np.frombuffer(to_proto(stands.model).SerializeToString(deterministic=True), np.uint8)
        with writing(self.path), atomic(self.path) as (stream,):
            np.savez(stream, key=self.key, number=stands.number, removed=stands.removed, model=held)

    def read(self, custom_ops: Sequence[str] = ()) -> Standing | None:
        """How the run stands; None: there is no file yet.

        Raises:
            OptionError: it is the file of another run, or of none. OutputError: it could not be written.
        """
        check_output(self.path)
        if not self.path.exists():
            return None
        try:
            with np.load(self.path, allow_pickle=False) as held:
                found, number, removed, model = (held[name] for name in ("key", "number", "removed", "model"))
            stands = Standing(int(number), removed.astype(bool), from_bytes(model.tobytes(), custom_ops))
        except Exception as error:  # numpy and protobuf raise whatever they meet
            raise OptionError(f"--resume {self.path}: cannot read it: {error}. Expected what --resume wrote, or no file.") from error
        if str(found) != self.key:
            raise OptionError(f"--resume {self.path}: it is of a run with another model, other data or options. Give another file.")
        return stands
