"""Which layers become two, and with how many channels between: chosen together with the widths, by the same error and the same cost.

The error of rank r is what the best weight of that rank leaves of what the layer makes, its inputs given (reduced-rank regression). To
narrow outputs, with S the covariance of what is made, of the outputs that stay (`ridge.evened` where they are read alone),

    error(r) = sum of the eigenvalues of S after the first r.

To narrow inputs, the taps of a window are taken as independent: with K the covariance of what is read, summed over taps, k the channels
that stay, and X the weights (channels, taps x outputs) of those that stay, the eigenvalues are those of

    K_kk^-1/2 K_k. X X' K_.k K_kk^-1/2,        all times one factor, by which S is known to differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from ..core.types import INPUTS, OUTPUTS, SIDES, Align, BoolArray, Factor, FloatArray, Group, IntArray, Spectrum
from ..coupling.analysis import Analysis
from ..coupling.cost import Whole
from ..graph import Constants
from . import Halves
from .precision import Storable, codes_for
from .widths import Problem, Tie, choices

MOST_RANKS = 10  # of each side of a layer
LOOKS = 4  # widths of the outputs at which errors are known; between them they are interpolated
ROUNDS = 2  # of errors at the widths of the last solution
WORTH = 0.98  # of the error without factors: less than this is worth them
TINY = 1e-12


@dataclass(frozen=True)
class Axis:
    """The choice of one layer: it stays whole (the first option), or becomes two, in one of the ``options``."""

    whole: Whole
    spectrum: Spectrum
    options: tuple[Factor, ...]

    @property
    def looks(self) -> bool:
        """Whether its inputs may be narrowed."""
        return any(factor.narrow == INPUTS for factor in self.options)

    def errors(self, kept: BoolArray, made: BoolArray, weight: FloatArray) -> FloatArray:
        """Of all options where these channels are ``kept``, and these outputs ``made``, with the ``weight`` (taps x channels, outputs)."""
        spectrum, taps = self.spectrum, self.whole.taps
        own = np.linalg.eigvalsh(spectrum.made[np.ix_(made, made)].astype(np.float64))
        tails = {OUTPUTS: _tails(own)}
        if self.looks:
            values = _of_inputs(spectrum.read.astype(np.float64), kept, (weight * spectrum.scale)[:, made].reshape(taps, len(kept), -1))
            tails[INPUTS] = _tails(values * (own.sum() / max(values.sum(), TINY)))
        return np.asarray([0.0, *(tails[factor.narrow][min(factor.rank, len(tails[factor.narrow]) - 1)] for factor in self.options)])


def _tails(values: FloatArray) -> FloatArray:
    """What is left after the first 0, 1, ... eigenvalues."""
    falling = np.maximum(values[::-1], 0)
    return np.asarray(np.append(np.cumsum(falling[::-1])[::-1], 0.0))


def _of_inputs(read: FloatArray, kept: BoolArray, weight: FloatArray) -> FloatArray:
    """Eigenvalues, as above, from X as (taps, channels, outputs)."""
    values, vectors = np.linalg.eigh(read[np.ix_(kept, kept)])
    root = 1 / np.sqrt(np.maximum(values, max(values.max(initial=0.0), TINY) * 1e-6))
    seen = (root[:, None] * (vectors.T @ read[kept])) @ weight
    return np.asarray(np.linalg.eigvalsh((seen @ seen.transpose(0, 2, 1)).sum(0)))


@dataclass(frozen=True)
class Ranks:
    """All layers that may become two, and what is needed to price them. Codes of the ``storable`` weights stand behind the widths of
    groups; both halves of a layer are stored as its weight, so its rounding counts twice."""

    analysis: Analysis
    groups: Sequence[Group]
    scores: FloatArray
    axes: Sequence[Axis]
    storable: Sequence[Storable] = ()
    known: dict[tuple[int, bytes, bytes], FloatArray] = field(default_factory=dict)

    @classmethod
    def of(
        cls, analysis: Analysis, scores: FloatArray, spectra: Mapping[str, Spectrum], align: Align | int | str | None,
        storable: Sequence[Storable] = (),
    ) -> Ranks:  # fmt: skip
        """Ranks that an alignment allows, and that can pay at all, of the layers of which spectra are given."""
        axes, steps = [], Align.parse(align)
        for name, whole in analysis.wholes.items():
            if name in spectra:
                options = _options(whole, analysis, steps)
                axes += [Axis(whole, spectra[name], options)] if options else []
        return cls(analysis, analysis.coupling.groups, scores, axes, storable)

    @property
    def first(self) -> int:
        """Where the choices of layers begin in a candidate, behind widths and codes."""
        return len(self.groups) + len(self.storable)

    @cached_property
    def _owners(self) -> list[int]:
        """The group that most outputs of each layer belong to; -1: none."""
        counts = [[int(np.isin(axis.whole.layer.writes, group.units).sum()) for group in self.groups] for axis in self.axes]
        return [int(np.argmax(row)) if any(row) else -1 for row in counts]

    @cached_property
    def _table(self) -> tuple[FloatArray, BoolArray]:
        """Ranks of all options (layers, options), and which narrow inputs."""
        ranks = np.zeros((len(self.axes), max(len(axis.options) for axis in self.axes) + 1))
        narrows = np.zeros(ranks.shape, bool)
        for row, axis in enumerate(self.axes):
            ranks[row, 1 : len(axis.options) + 1] = [factor.rank for factor in axis.options]
            narrows[row, 1 : len(axis.options) + 1] = [factor.narrow == INPUTS for factor in axis.options]
        return ranks, narrows

    @cached_property
    def _weights(self) -> list[FloatArray]:
        constants = Constants(self.analysis.prepared.model)
        return [axis.whole.form.matrix(constants[axis.whole.weight], 1)[0].astype(np.float64) for axis in self.axes]

    def tie(self, number: int, removed: BoolArray, widths: Sequence[Sequence[int]]) -> Tie:
        """Errors of one layer's options, at all widths of the group that owns its outputs, near the solution ``removed``."""
        owner, weight = self._owners[number], self.axes[number].whole.weight
        again = next((len(self.groups) + at for at, item in enumerate(self.storable) if item.weight == weight), -1)
        if owner < 0:
            return Tie(-1, self._errors(number, removed, removed)[None], again)
        group, offers = self.groups[owner], [width for width in widths[owner] if width > 0]
        looks = np.unique(np.linspace(0, len(offers) - 1, LOOKS).round().astype(int))
        order, rows = group.units[group.order(self.scores[group.units])], []
        for at in looks:
            flags = removed.copy()
            flags[group.units] = False
            flags[order[: group.width - offers[at]]] = True
            rows.append(self._errors(number, removed, flags))
        known = np.asarray([offers[at] for at in looks], float)[::-1]
        columns = np.stack(rows)[::-1].T
        return Tie(owner, np.stack([np.interp(widths[owner], known, column) for column in columns], 1), again)

    def _errors(self, number: int, removed: BoolArray, flags: BoolArray) -> FloatArray:
        """Those of `Axis.errors`, once; ``flags``: what is removed of its outputs."""
        axis = self.axes[number]
        made = axis.whole.masks(flags)[axis.whole.makes]
        kept = axis.whole.masks(removed)[axis.whole.reads] & axis.looks  # what narrows outputs does not look at inputs
        key = number, kept.tobytes(), made.tobytes()
        if key not in self.known:
            self.known[key] = axis.errors(kept, made, self._weights[number])
        return self.known[key]

    def halves(self, lengths: Callable[[IntArray], Halves], kept: IntArray) -> Halves:
        """What the layers are at candidates (..., groups + storable + layers)."""
        groups, places = len(self.groups), np.arange(len(self.axes))
        chosen, (ranks, narrows) = kept[..., self.first :], self._table
        codes = codes_for(self.storable, [axis.whole.weight for axis in self.axes], kept[..., groups : self.first])
        return replace(lengths(kept[..., :groups]), rank=ranks[places, chosen], inputs=narrows[places, chosen], codes=codes)

    def joined(self, problem: Problem, saved: Sequence[Callable[[IntArray], FloatArray]], removed: BoolArray) -> Problem:
        """A problem of widths and codes with the choices of all layers beside them; ``saved``: what of each cost these save."""
        first = self.first
        widths = [*problem.widths, *(range(len(axis.options) + 1) for axis in self.axes)]
        errors = [*problem.errors, *([0.0] * (len(axis.options) + 1) for axis in self.axes)]
        ties = {first + number: self.tie(number, removed, problem.widths) for number in range(len(self.axes))}

        def less(cost: Callable[[IntArray], FloatArray], saving: Callable[[IntArray], FloatArray]) -> Callable[[IntArray], FloatArray]:
            return lambda kept: np.asarray(cost(kept[..., :first]) - saving(kept))

        return Problem(widths, errors, [less(*pair) for pair in zip(problem.costs, saved, strict=True)], problem.bounds, ties)

    def factors(self, kept: IntArray, removed: BoolArray) -> tuple[Factor, ...]:
        """What a solution chose, without what its widths leave no room for."""
        chosen = [(axis, int(at)) for axis, at in zip(self.axes, kept[self.first :], strict=True) if at]
        found = [(axis.whole, axis.options[at - 1]) for axis, at in chosen]
        return tuple(factor for whole, factor in found if factor.rank < min(whole.sizes(removed, factor.narrow)))


def _options(whole: Whole, analysis: Analysis, align: Align) -> tuple[Factor, ...]:
    none, name = np.zeros(analysis.coupling.units, bool), whole.layer.node.name
    options = []
    for side in SIDES[: len(whole.sides)]:
        rows, columns = whole.sizes(none, side)
        most = int(1 / whole.share(none, Factor(name, 1, side))[0])  # with so many it multiplies as much as whole
        most = min(most, rows - 1, columns - 1)
        options += [Factor(name, rank, side) for rank in choices(most, align, 1, most=MOST_RANKS + 1)[1:]] if most > 1 else []
    return tuple(options)
