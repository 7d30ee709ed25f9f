"""What the dimensions of queries and keys are worth: the error of the products q k' when the heads keep r of them each.

Where a head's coordinates are free, that is the share of the squared singular values that is lost, as the repair chooses them
(`repair.heads`). Elsewhere (rotary embeddings) dimensions leave as they are, and the products of what is removed are lost, for queries and
keys that do not know of each other: sum over i, j of E q_i q_j E k_i k_j.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..core.types import FloatArray
from ..coupling.analysis import Analysis
from ..graph import Constants
from ..repair import heads
from .sensitivity import Change, Cut


@dataclass(frozen=True)
class Worth:
    """Of every group of dimensions that is known: what each adds (``added``), the errors by the number kept (0 .. width), and cuts that
    tell what reaches the outputs."""

    added: dict[str, FloatArray] = field(default_factory=dict)
    errors: dict[str, FloatArray] = field(default_factory=dict)
    cuts: dict[str, Sequence[Cut]] = field(default_factory=dict)


Gather = Callable[[Sequence[heads.Pair]], Mapping[str, FloatArray]]
"""Second moments of queries and keys, by group (see `repair.heads.moments`)."""


def judged(analysis: Analysis) -> list[heads.Pair]:
    """The queries and keys whose dimensions can be judged: those in any coordinates."""
    return [pair for pair in heads.pairs(analysis.prepared, analysis.coupling) if pair.free]


def worth(analysis: Analysis, shares: Sequence[float], gather: Gather) -> Worth:
    """Errors of all groups of dimensions, with a cut at each of the shares of dimensions left."""
    prepared, result = analysis.prepared, Worth()
    found = judged(analysis)
    moments = gather(found) if found else {}
    values = Constants(prepared.model)
    for pair in found:
        name, moment = pair.group.name, moments[pair.group.name].astype(np.float32).astype(np.float64)  # however it was added up
        turns, singular = heads.coordinates(moment)
        lost = np.square(singular).sum(0)
        added = np.maximum(lost / max(lost.sum(), np.finfo(np.float64).tiny), 0.0)
        result.errors[name] = np.append(np.cumsum(added[::-1])[::-1], 0.0)
        alone = np.einsum("hdd,hdd->d", *moment)
        result.added[name] = alone / max(alone.sum(), np.finfo(np.float64).tiny)
        result.cuts[name] = [
            Cut(kept, float(result.errors[name][kept]), [_change(pair, turns[..., :kept], values)])
            for kept in sorted({int(np.ceil(share * pair.group.width)) for share in shares}) if result.errors[name][kept] > 0
        ]
    return result


def _change(pair: heads.Pair, turns: FloatArray, values: Constants) -> Change:
    """Queries q A B' stand for the products of queries and keys with r dimensions, and leave the shapes as they are."""
    side = pair.sides[0]
    width = len(side.layer.writes)
    mixed = np.zeros((width, width))
    for places, first, second in zip(side.places, *turns, strict=True):
        mixed[np.ix_(places, places)] = first @ second.T - np.eye(len(places))
    matrix = side.step.linear.form.matrix(side.step.weight.value(lambda name: values[name]), 1).astype(np.float64)
    bias = np.zeros((1, width))
    if side.step.bias is not None:
        bias += side.step.bias.value(lambda name: values[name]).reshape(-1).astype(np.float64) @ mixed * (
            side.step.linear.bias_scale if side.step.inside else 1.0
        )
    return Change(side.layer, (matrix @ mixed).astype(np.float32), bias, np.ones(1))
