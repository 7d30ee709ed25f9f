"""From scores to a plan: choose widths for the targets, build, measure, correct; with the alignments that are worth a try."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import numpy as np

from ..core.errors import OptionError, TargetError
from ..core.options import FACTOR, MeasureOptions, OutputOptions, PlanOptions, RepairOptions
from ..core.types import Align, BoolArray, Coupling, Factor, FloatArray, Group, IntArray, Plan, Spectrum, become_two
from ..coupling.analysis import Analysis, Progress, silent
from ..coupling.cost import Parameter
from ..cut.factor import both, by_weight, split
from ..data.dataset import Dataset
from ..export import packaged, shares_kept
from ..export.integers import Integers
from ..graph import INLINE_BYTES, Model
from ..graph.save import saved_bytes
from ..graph.stored import STORED
from ..latency import measure
from ..repair import distances, rebuilt
from ..repair.lockstep import prepared_for
from ..repair.steps import bias_place
from ..rules.registry import Trait, has
from ..runtime import Setup
from . import FIGURES, TIMED_NOISE as NOISE, Gauge, Halves, bounds, make_plan, mistaken, parse_target, show, widths
from .figures import AS_CUT, Form, Ruler, ruler_for
from .precision import INTEGER, Storable, chosen, joined, on_integers, stores, without
from .ranks import ROUNDS as RANK_ROUNDS, WORTH, Ranks

# ---- the controller's constants; shares are of a figure of the original, unless another is named ---------------------

ROUNDS = 5  # plans that are built, for each alignment
MARGIN = 0.985  # of each bound to aim at, after a plan that broke one
CLOSE = 0.015  # what is timed and this far below its bound is raised again, if rounds are left ...
LIMITED = 0.99  # ... and no other figure uses this much of its bound
SURPRISE = 0.05  # prediction and measurement this far apart: measure again, then time the layers again
REPEATS = 2  # further measurements after a surprise; the median counts
FULL = 0.95  # of a bound: less than this used, finer steps are worth more than whole blocks
HELD_OUT = 1 / 4  # of the data, to compare two alignments on
FEWEST = 16  # samples to compare on
EXPANDED = 0.95  # of the error as it stands: less than this is worth what is expanded
BLOCKS = "16:1:12"  # channels are made in blocks of 16 (AVX-512) or 8 (AVX2), and fewer than 12 read one by one (measured, AVX-512)
LIGHT = "4:1:12"  # other widths are slower than the next wider multiple of 4


@dataclass(frozen=True)
class Candidates:
    """A model that is ready to be planned for.

    ``groups`` may shrink; ``scores`` has one value per unit; ``recorded`` goes into the options of plans; ``errors`` is the error of a
    group by the number of units that it keeps (0 .. width), for the allocation "solve" (default: from the scores). Where models are
    built to be measured, they are repaired with ``repair`` on ``data``, and judged by what ``measures`` say of the outputs.
    ``details`` is what the score's plug-in shows in reports; ``form`` that in which the result is written. ``spectra`` tell the error of
    layers that become two; ``reach`` is the share of the outputs' variance that an error of 1 means (0: unknown). Groups that are
    ``expanding`` shrink only if that is worth what has to be expanded for it; the plan says which is better.
    """

    analysis: Analysis
    groups: Sequence[Group]
    scores: FloatArray
    recorded: Mapping[str, Any]
    errors: Mapping[str, FloatArray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    data: Dataset | None = None
    repair: RepairOptions | None = None
    details: Any = None
    measures: MeasureOptions = MeasureOptions()
    form: Form = AS_CUT
    spectra: Mapping[str, Spectrum] = field(default_factory=dict)
    reach: float = 0.0
    expanding: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Trial:
    """A removal, ``factors`` and ``codes`` of the storable weights, and the options, with everything settled, that they were chosen for;
    ``notes`` on how they were found, ``error`` that which the solver expects; the bounds (``limits``) that they shall hold, and their
    figures by name: predicted when they were chosen, and actual (counted, built or measured)."""

    options: PlanOptions
    removed: BoolArray
    notes: tuple[str, ...] = ()
    limits: Mapping[str, float] = field(default_factory=dict)
    predicted: Mapping[str, float] = field(default_factory=dict)
    actual: Mapping[str, float] = field(default_factory=dict)
    factors: tuple[Factor, ...] = ()
    codes: tuple[int, ...] = ()
    error: float = np.inf

    def same(self, other: Trial) -> bool:
        """Whether both are one model."""
        return np.array_equal(self.removed, other.removed) and (self.factors, self.codes) == (other.factors, other.codes)

    @property
    def changes(self) -> bool:
        """Whether it is another model than the original."""
        return bool(self.removed.any() or self.factors or any(code != 4 for code in self.codes))

    @property
    def used(self) -> float:
        """How much of the tightest bound is used; coarse steps leave a lot unused where there are few groups to choose from."""
        return max((self.actual[name] / limit for name, limit in self.limits.items()), default=1.0)

    @property
    def excess(self) -> float:
        """How far the worst figure is above its bound, relatively; counted figures have no noise."""
        over = {name: self.actual[name] / limit - 1 for name, limit in self.limits.items()}
        return max(value if FIGURES[name].timed or value <= 1e-12 else value + NOISE for name, value in over.items())

    def surprise(self, ruler: Ruler) -> float:
        """The largest distance of a measured from its predicted figure, as a share of that of the original."""
        gaps = [(self.actual[name] - self.predicted[name]) / ruler.before[name] for name in ruler.timed]
        return max(gaps, key=abs, default=0.0)

    def settled(self, ruler: Ruler) -> bool:
        """Whether no other round may help: every bound is held, and nothing that is timed, or lighter than it was predicted, is the only
        limit and far below it."""
        if self.excess > NOISE:
            return False
        moves = {*ruler.timed, *(name for name in self.limits if self.actual[name] < (1 - CLOSE) * self.predicted[name])}
        slack = [(limit - self.actual[name]) / ruler.before[name] for name, limit in self.limits.items() if name in moves]
        limited = any(self.actual[name] > LIMITED * limit for name, limit in self.limits.items() if not FIGURES[name].timed)
        return limited or min(slack, default=0.0) <= CLOSE


# ---- in which form a result is written: targets bound that, not what was just cut ---------------------------------------

FITS = ("lstsq", "bias")  # repairs that give layers biases


def form_for(
    analysis: Analysis, repair: RepairOptions | None, output: OutputOptions, with_data: bool, storable: tuple[Storable, ...] = (),
    integers: Integers | None = None,
) -> Form:  # fmt: skip
    """The form of results of this repair and these options; ranges of activations, on which no size depends, are those of the sample.
    Where weights are ``storable``, all layers are re-fitted, and some made ``integers``."""
    batches = (lambda: [analysis.prepared.feeds]) if with_data else None
    fitted = repair is not None and repair.kind in FITS
    packs = output.fp16 or output.quantize is not None or output.rows is not None
    form = replace(AS_CUT, bytes=lambda model: saved_bytes(model, output.path, output.external), storable=storable)
    form = replace(form, integers=integers, between=integers.between) if integers else form
    if not fitted and not packs and not storable:
        return form
    weighed = {layer.node.inputs[layer.weight.position] for layer in analysis.coupling.layers if layer.weight}
    weighed |= {node.inputs[0] for node in analysis.prepared.nodes if has(node, Trait.TAKES)}  # the quantiser takes tables, too
    weighed |= {name for cast in map(analysis.prepared.index.maker, weighed) if cast is not None for name in cast.inputs}  # stored so

    def finished(model: Model, removed: BoolArray, factors: Sequence[Factor]) -> Model:
        if fitted and (removed.any() or factors or storable):
            bound = by_weight(analysis.wholes, factors)
            model = prepared_for(analysis.prepared, analysis.coupling, removed, model, bound, every=bool(storable))[0].model
        return packaged(split(model, analysis.wholes, factors), output, batches)

    def each(parameter: Parameter) -> float:
        if output.quantize and parameter.name in weighed and parameter.itemsize in (2, 4):
            return kept.share(parameter)
        large = parameter.itemsize == 4 and kept.share(parameter) * np.prod(parameter.shape) * 4 > INLINE_BYTES
        return kept.share(parameter) * (2.0 if output.fp16 and not output.quantize and large else parameter.itemsize)

    kept = replace(form, shares=shares_kept(analysis, output))
    return replace(kept, finished=finished, each=each, biases=cache(lambda: _biases(analysis)) if fitted else tuple)


def _biases(analysis: Analysis) -> tuple[Parameter, ...]:
    """The biases that a repair would add, at the most."""
    everything = np.ones(analysis.coupling.units, bool)
    scene, layers = prepared_for(analysis.prepared, analysis.coupling, everything, analysis.prepared.model)[:2]
    fresh = scene.constants.keys() - {parameter.name for parameter in analysis.parameters}
    biases = []
    for layer in (layer for sharing in layers for layer in sharing):
        place = bias_place(scene, layer)
        if place is not None and place.name in fresh:
            width = int(np.prod(scene.constants[place.name].shape))
            biases.append(Parameter(place.name, (width,), 4, (tuple(made for made in layer.made if len(made.units) == width),)))
    return tuple(biases)


# ---- choosing --------------------------------------------------------------------------------------------------------


def errors_of_scores(groups: Sequence[Group], scores: FloatArray) -> list[FloatArray]:
    """Error of each group by the number of units it keeps, 0 .. width: share of the squared scores that leaves, summed over the layers
    that read it (as the errors of `obs` are: a residual stream is worth more than what one layer reads)."""
    errors = []
    for group in groups:
        squares = np.maximum(scores[group.units][group.order(scores[group.units])], 0) ** 2
        total = squares.sum()
        lost = np.concatenate([[0.0], np.cumsum(squares)])[::-1]
        errors.append(max(1, len(group.consumers)) * (lost / total if total > 0 else np.linspace(1, 0, group.width + 1)))
    return errors


def choice_for(
    candidates: Candidates, options: PlanOptions, ruler: Ruler, limits: Mapping[str, float], ranks: Ranks | None = None
) -> Trial | None:
    """What holds these bounds on predicted figures, solved (with ``ranks``, layers may become two) or by one number for all groups; None if
    there is nothing."""
    coupling, groups, scores = ruler.analysis.coupling, candidates.groups, candidates.scores
    if options.allocation != "solve":
        fixed = tuple(offer[0] for offer in offered_codes(candidates.form.storable, options))
        removed = widths.choose(coupling, groups, scores, options, ruler.at(fixed).predicted, limits)
        return None if removed is None else Trial(options, removed, (f"allocation: {options.allocation}",), codes=fixed)
    errors = {group.name: row for group, row in zip(groups, errors_of_scores(groups, scores), strict=True)} | dict(candidates.errors)
    offers = offered(coupling, groups, options)
    losses = [
        np.maximum.accumulate([errors[group.name][width] for width in offer]).tolist() if len(offer) > 1 else [0.0]
        for group, offer in zip(coupling.groups, offers, strict=True)
    ]
    codes, rounding = offered_codes(candidates.form.storable, options), _rounding(candidates, options)
    costs = [ruler.cost(name) for name in limits]
    problem = widths.Problem([*offers, *codes], [*losses, *rounding], costs, list(limits.values()))
    solution = _solved(problem, range(len(offers), len(problem.widths)))
    trial = None
    if solution is not None:
        kept, chosen = solution.kept[: len(offers)].tolist(), tuple(solution.kept[len(offers) :].tolist())
        trial = Trial(options, widths.of_widths(coupling, scores, kept), (widths.compared(solution),), codes=chosen, error=solution.error)
    least = np.inf if solution is None else solution.error
    return trial if ranks is None else _factored(candidates, Aim(options, ruler, tuple(limits), problem), ranks, trial, least)


def _solved(problem: widths.Problem, codes: range) -> widths.Allocation | None:
    """The better of what the solver finds from floating layers on and, since the first of them may not pay alone, from integers on;
    ``codes``: the rows that are such."""
    solution, rows, tables = widths.solve(problem), [*problem.widths], [*problem.errors]
    for at in (at for at in codes if rows[at][-1] == INTEGER):
        rows[at], tables[at] = [INTEGER], tables[at][-1:]
    if rows == [*problem.widths]:
        return solution
    other = widths.solve(replace(problem, widths=rows, errors=tables))
    other = other and widths.widened(problem, other)
    return solution if other is None or (solution is not None and solution.error <= other.error) else other


def offered_codes(storable: Sequence[Storable], options: PlanOptions) -> list[list[int]]:
    """The codes that each storable weight may have, most bits first."""
    every = list(STORED.values()) if options.precision == "auto" else [STORED[options.precision]]
    return [
        [code for code in every if np.isfinite(item.errors[code]) and not (item.slower and code == INTEGER)] or [max(STORED.values())]
        for item in storable
    ]


def _rounding(candidates: Candidates, options: PlanOptions) -> list[list[float]]:
    """The error of each of these codes, in the unit of the errors of groups."""
    unit, storable = 1 / candidates.reach if candidates.reach else 1.0, candidates.form.storable
    return [[unit * item.errors[code] for code in offer] for item, offer in zip(storable, offered_codes(storable, options), strict=True)]


@dataclass(frozen=True)
class Aim:
    """A problem of widths, the options and the ruler that it is from, and the figures that are bounded."""

    options: PlanOptions
    ruler: Ruler
    names: tuple[str, ...]
    problem: widths.Problem


def ranks_for(candidates: Candidates, options: PlanOptions, ruler: Ruler, names: Iterable[str]) -> Ranks | None:
    """The choices of layers that may become two; None where none may, or where it is unknown what that saves."""
    if FACTOR not in options.moves or not candidates.spectra or options.allocation != "solve":
        return None
    if any(ruler.gauges[name].saved is None for name in names):
        return None
    wholes, spectra = candidates.analysis.wholes, candidates.spectra
    allowed = widths.allowed(options, {name: whole.weight for name, whole in wholes.items()}, candidates.analysis.coupling.transforms)
    known = {name: spectra[name] for name in allowed & spectra.keys()}
    ranks = Ranks.of(candidates.analysis, candidates.scores, known, options.align, candidates.form.storable)
    return ranks if ranks.axes else None


def _factored(candidates: Candidates, aim: Aim, ranks: Ranks, trial: Trial | None, least: float) -> Trial | None:
    """The ``trial`` whose error is ``least``, or what layers that become two allow at the same cost where that is clearly better. (They are
    solved from floating layers on; with all layers on integers another attempt is made.)"""
    coupling, scores, ruler = candidates.analysis.coupling, candidates.scores, aim.ruler
    lengths = ruler.lengths([axis.whole for axis in ranks.axes])
    savings = [partial(_saving, ruler.gauges[name], ranks, lengths) for name in aim.names]
    best, removed = trial, (trial or narrowest(candidates, aim.options)).removed
    for _ in range(RANK_ROUNDS):
        solution = widths.solve(ranks.joined(aim.problem, savings, removed))
        if solution is None:
            break
        kept = solution.kept.tolist()
        known, codes = removed, kept[len(coupling.groups) : ranks.first]
        removed = widths.of_widths(coupling, scores, kept[: len(coupling.groups)])
        factors = ranks.factors(solution.kept, removed)
        if factors and solution.error < WORTH * least:
            words = f"{become_two(len(factors))}: estimated error {least:.4g} -> {solution.error:.4g}"
            best = Trial(aim.options, removed, (words,), factors=factors, codes=tuple(codes), error=solution.error)
        if np.array_equal(known, removed):  # errors were those at these widths
            break
    return best


def _saving(gauge: Gauge, ranks: Ranks, lengths: Callable[[IntArray], Halves], kept: IntArray) -> FloatArray:
    assert gauge.saved is not None
    return gauge.saved(ranks.halves(lengths, kept))


def offered(coupling: Coupling, groups: Sequence[Group], options: PlanOptions) -> list[list[int]]:
    """Widths that every group of the model may have; only ``groups`` have a choice."""
    align, chosen = Align.parse(options.align), {group.name for group in groups}
    branches = coupling.branches if options.min_channels == 1 else ()
    return [
        widths.choices(group.width, widths.steps_of(coupling, group, align), options.min_channels, group.name in branches)
        if group.name in chosen else [group.width]
        for group in coupling.groups
    ]  # fmt: skip


def narrowest(candidates: Candidates, options: PlanOptions) -> Trial:
    """The largest removal that the options allow."""
    coupling, groups, scores = candidates.analysis.coupling, candidates.groups, candidates.scores
    solved = options.allocation == "solve"
    narrow = [offer[-1] for offer in offered(coupling, groups, options)] if solved else []
    removed = widths.of_widths(coupling, scores, narrow) if solved else widths.least(coupling, groups, scores, options)
    codes = tuple(offer[-1] for offer in offered_codes(candidates.form.storable, options))
    return Trial(options, removed, ("allocation: the narrowest widths",), codes=codes)


# ---- the loop for one alignment: choose, build, measure, correct -----------------------------------------------------


@dataclass
class History:
    """What was tried for some bounds, in order. Layers were timed again for the ``retimed``-th trial."""

    ruler: Ruler
    trials: list[Trial] = field(default_factory=list)
    retimed: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def held(self) -> Trial | None:
        """The trial that holds all bounds and removes least, the last of several; where weights are stored in fewer bits, too, the one with
        the least estimated error."""
        holding = [trial for trial in reversed(self.trials) if trial.excess <= NOISE]
        return max(holding, key=lambda trial: (-trial.error if trial.codes else 0.0, trial.actual["macs"]), default=None)

    def aims(self, limits: Mapping[str, float], misses: int = 0) -> dict[str, float]:
        """Bounds for what widths are chosen by: corrected by what that was wrong by last, and lower with every round that led to no plan
        that holds them."""
        if not self.trials:
            return dict(limits)
        last, aim = self.trials[-1], MARGIN**misses if self.held is None else 1.0
        known = {**last.predicted, **self._solved(last, [name for name in limits if name not in self.ruler.timed])}
        return {name: aim * limit / (last.actual[name] / known[name]) for name, limit in limits.items()}

    def _solved(self, trial: Trial, names: Sequence[str]) -> dict[str, float]:
        """Figures by which the solver chose widths: those of a group of which every unit holds the same share of an axis."""
        if trial.options.allocation != "solve" or trial.factors:
            return {}
        counts = [np.count_nonzero(~trial.removed[group.units]) for group in self.ruler.analysis.coupling.groups]
        kept = np.asarray([*counts, *trial.codes])
        return {name: cost for name in names if (cost := float(self.ruler.cost(name)(kept))) > 0}

    def known(self, choice: Trial) -> bool:
        """Whether a choice leads nowhere new. One that broke a bound may be tried twice after layers were timed again."""
        tried = any(choice.same(trial) for trial in self.trials[self.retimed or 0 :])
        return tried and (self.held is not None or self.retimed is None)

    def measured(self, trial: Trial) -> Trial:
        """Build and measure. A surprise is measured again, and the median believed; if it still surprises, layers are timed again around
        these widths (once)."""
        change, ruler = (trial.removed, trial.factors), self.ruler.at(trial.codes)
        trial = replace(trial, predicted=ruler.predicted(*change), actual=ruler.actual(*change))
        if abs(trial.surprise(ruler)) <= SURPRISE:
            return trial
        actuals = [trial.actual, *(ruler.actual(*change) for _ in range(REPEATS))]
        trial = replace(trial, actual={**trial.actual, **{name: float(np.median([row[name] for row in actuals])) for name in ruler.timed}})
        gap = trial.surprise(ruler)
        if abs(gap) <= SURPRISE or self.retimed is not None:
            return trial
        self.ruler, self.retimed = ruler.again(trial.removed), len(self.trials)
        surprise = f"the measured {' and '.join(ruler.timed)} was {100 * gap:+.0f} points from the predicted one"
        self.notes = (f"{surprise}: layers timed again around the plan's widths",)
        return replace(trial, predicted=self.ruler.at(trial.codes).predicted(*change))


def reach(candidates: Candidates, options: PlanOptions, ruler: Ruler, limits: Mapping[str, float]) -> Trial:
    """Choose, build, measure and correct; the result holds every bound as built and measured.

    Raises:
        TargetError: the bounds cannot be held; with the best reachable figures.
    """
    history, most, misses = History(ruler), narrowest(candidates, options), 0
    ranks = ranks_for(candidates, options, ruler, limits)
    for _ in range(ROUNDS):
        aims = history.aims(limits, misses)
        choice, misses = choice_for(candidates, options, history.ruler, aims, ranks) or (None if history.held else most), misses + 1
        if choice is None or (history.known(choice) and (history.held or choice is most)):
            break
        if history.known(choice):
            continue  # the same widths again: aim lower
        trial = history.measured(replace(choice, limits=limits))
        history.trials.append(trial)
        if trial.settled(history.ruler) or (choice is most and history.held is None):
            break
    if history.held is None:
        best = ruler.at(most.codes).actual(most.removed)
        parts = [
            f"{name} of at most {show(name, limit)} asked, best reachable is {show(name, best[name])} "
            f"({best[name] / ruler.before[name]:.1%} of the original)"
            for name, limit in limits.items()
        ]
        how = "".join(f" ({ruler.gauges[name].how})" for name in limits if ruler.gauges[name].how)
        advice = f"Nothing was written.{mistaken(options.targets)} Loosen --target, --min-channels, --align, --keep or --only."
        raise TargetError(f"the target cannot be met: {'; '.join(parts)}{how}. {advice}")
    return replace(history.held, notes=(*history.held.notes, *history.notes))


# ---- alignments ------------------------------------------------------------------------------------------------------


def _timed(options: PlanOptions) -> bool:
    return any(parse_target(text).figure.timed for text in options.targets)


def settled(options: PlanOptions, ruler: Ruler) -> Align:
    """The widths that may be kept: as asked; or the staircase of the device (``auto``, and the default for what is timed); or (the
    default otherwise) one that needs no measurement, so that such plans do not depend on the machine: `BLOCKS` where the solver can give
    elsewhere what a coarse step takes, `LIGHT` where all groups are cut by one number."""
    align = Align.parse(options.align)
    if not align.symbolic:
        return align
    if align.written == "default" and not _timed(options):
        return Align.parse(BLOCKS if options.allocation == "solve" else LIGHT)
    known = next((gauge.block for gauge in ruler.gauges.values() if gauge.block), None)
    block = known or measure.block(Setup.of(options)).width
    if block <= measure.FINE:
        return Align.parse(block if block > 1 else None)
    return Align.parse(f"{block}:{measure.FINE}")


def nearer(candidates: Candidates, best: Trial, asked: PlanOptions, ruler: Ruler, progress: Progress) -> Trial:
    """Of a trial and what other options lead to, both within the targets, the one whose repaired model is nearer to the original."""
    assert candidates.data is not None and candidates.repair is not None
    try:
        other = attempt(candidates, asked, ruler, progress)
    except TargetError:
        return best
    if not other.changes or best.same(other):
        return best
    trials = {f"--align {trial.options.align}": trial for trial in (best, other)}
    name, note = nearest(candidates, trials, progress)
    return replace(trials[name], notes=(*trials[name].notes, note))


def nearest(candidates: Candidates, trials: Mapping[str, Trial], progress: Progress = silent) -> tuple[str, str]:
    """The name of the trial whose repaired model is nearest to the original on a quarter of the data, which the repairs do not see, and
    a word on each."""
    analysis, data, repair = candidates.analysis, candidates.data, candidates.repair
    assert data is not None and repair is not None
    count = int(data.samples * HELD_OUT)
    repaired_on, judge = data.split(count, [repair.seed, data.samples])
    models = []
    with progress("comparing widths", len(trials)) as advance:
        for trial in trials.values():
            kinds = stores(candidates.form.storable, trial.codes) if any(code != 4 for code in trial.codes) else ()
            models.append(rebuilt(analysis, trial.removed, repaired_on, repair, candidates.measures, trial.factors, kinds))
            advance(1)
    found = distances(analysis, models, judge, candidates.measures)
    left = dict(zip(trials, found.values, strict=True))
    best = min(left, key=lambda name: left[name])
    shown = ", ".join(f"{value:.4g} with {name}" for name, value in left.items())
    words = f"distance from the original after the repair ({found.measure}), on {count} samples held out for this"
    return best, f"{words}: {shown}; taken: {best}"


# ---- the plan --------------------------------------------------------------------------------------------------------


def plan_for(candidates: Candidates, options: PlanOptions, progress: Progress = silent, ruler: Ruler | None = None) -> Plan:
    """Decide which units leave, with the alignment that is asked for or the better of two.

    By default, solved widths are whole blocks; finer steps are tried where those leave much of a counted target unused. What is timed may
    have widths below one block of the device; whole blocks are tried where a repair and enough data can tell which is better.

    Raises:
        OptionError: bad options. TargetError: a target cannot be held.
    """
    ruler = ruler or ruler_for(candidates.analysis, options, progress, candidates.form)
    slower = {at for gauge in ruler.gauges.values() for at in gauge.slower}
    candidates = replace(candidates, form=replace(candidates.form, storable=without(candidates.form.storable, slower)))
    asked = replace(options, allocation=allocation_of(candidates, options))
    known = candidates.errors if asked.allocation == "solve" else {}  # a share of the dimensions of all heads is nothing one asks for
    best = of_kinds(candidates, _judged(candidates, known, asked), asked, ruler, progress)
    recorded = {**best.options.told, "align": Align.parse(best.options.align).written, "targets": list(best.options.targets)}
    plan = make_plan(candidates.analysis, best.removed, {**recorded, **candidates.recorded}, best.factors)
    figures = {
        name: {"before": ruler.before[name], "bound": limit, "predicted": best.predicted[name], "actual": best.actual[name]}
        for name, limit in best.limits.items()
    }
    stored = chosen(candidates.form.storable, _with_those_between(candidates, best), asked.precision != "auto")
    return replace(plan, notes=(*candidates.notes, *best.notes), figures=figures, precisions=stored)


def _with_those_between(candidates: Candidates, trial: Trial) -> tuple[int, ...]:
    """The codes of weights, integers among which have drawn in the layers between them."""
    analysis, form = candidates.analysis, candidates.form
    if form.between is None or INTEGER not in trial.codes:
        return trial.codes
    model = split(analysis.prepared.model, analysis.wholes, trial.factors)
    kinds = both(model, analysis.wholes, trial.factors, stores(form.storable, trial.codes))
    more = form.between(model, on_integers(kinds), {store.layer for store in kinds})
    drawn = [any(layer.node.outputs[0] in more for layer in item.layers) for item in form.storable]
    return tuple(INTEGER if inside else code for inside, code in zip(drawn, trial.codes, strict=True))


def _with_or_without_integers(candidates: Candidates, options: PlanOptions, ruler: Ruler, progress: Progress) -> Trial:
    """A trial; where layers may become integers, and that was not enough alone, the best of three: one has none, and one all of them, with
    all channels where that is enough. Where data can tell, that is the nearest to the original, else the one of the least estimated error.

    Raises:
        TargetError: none holds the targets.
    """
    storable, trials, failure = candidates.form.storable, dict[str, Trial](), None
    if not any(item.whole and not item.slower for item in storable):
        return attempt(candidates, options, ruler, progress)
    floating = replace(candidates, form=replace(candidates.form, storable=without(storable, range(len(storable)))))
    for name, known in (("layers on integers as solved", candidates), ("none on integers", floating)):
        try:
            trials[name] = attempt(known, options, ruler, progress)
        except TargetError as error:
            failure = failure or error
        if trials and not any(trial.removed.any() or trial.factors for trial in trials.values()):
            return trials[name]
    if not trials:
        assert failure is not None
        raise failure
    first = next(iter(trials.values()))
    whole = _all_on_integers(candidates, options, ruler, first)
    if whole.excess > NOISE:
        with suppress(TargetError):
            whole = attempt(replace(candidates, form=replace(candidates.form, storable=joined(storable))), options, ruler, progress)
    held = dict[str, Trial]()
    for name, trial in {**trials, "all on integers": whole}.items():
        if trial.excess <= NOISE and not any(trial.same(other) for other in held.values()):
            held[name] = trial
    if len(held) > 1 and _told_apart(candidates):
        name, note = nearest(candidates, held, progress)
        return replace(held[name], notes=(*held[name].notes, note))
    return min(held.values(), key=lambda trial: trial.error, default=first)


def _told_apart(candidates: Candidates) -> bool:
    """Whether there are a repair and data enough to compare plans by what they leave."""
    return candidates.repair is not None and candidates.data is not None and candidates.data.samples * HELD_OUT >= FEWEST


def _all_on_integers(candidates: Candidates, options: PlanOptions, ruler: Ruler, like: Trial) -> Trial:
    """All layers on integers that may become so, with all channels, measured against the bounds of another trial. Those among them that are
    slower alone save the steps from integers to numbers and back."""
    storable, unit = candidates.form.storable, 1 / candidates.reach if candidates.reach else 1.0
    codes = tuple(INTEGER if item.whole else offer[0] for item, offer in zip(storable, offered_codes(storable, options), strict=True))
    error = sum(unit * item.errors[code] for item, code in zip(storable, codes, strict=True))
    removed, there, words = np.zeros_like(like.removed), ruler.at(codes), ("allocation: all layers on integers", *like.notes[1:])
    figures = there.predicted(removed), there.actual(removed)
    return Trial(like.options, removed, words, like.limits, *figures, codes=codes, error=error)


def worthwhile(candidates: Candidates, asked: PlanOptions, ruler: Ruler, progress: Progress) -> Trial:
    """The better of what all groups allow and of what those do that shrink as the model stands, by the error that the solver expects, with
    a word on it.

    Raises:
        TargetError: not even all groups allow a target.
    """
    plain = [group for group in candidates.groups if group.name not in candidates.expanding]
    if len(plain) == len(candidates.groups):
        return better_aligned(candidates, asked, ruler, progress)
    standing = None
    with suppress(TargetError):
        standing = better_aligned(replace(candidates, groups=plain), asked, ruler, progress) if plain else None
    if standing is not None and (asked.allocation != "solve" or not candidates.errors):  # nothing to weigh by
        return standing
    wide = better_aligned(candidates, asked, ruler, progress)
    found = candidates.analysis.expansions(wide.removed)
    what = ", ".join(f"{name} at {count} place{'s' if count > 1 else ''}" for name, count in found.items())
    if standing is None:
        why = "the target cannot be met" if plain else "nothing can be pruned"
        best, words = wide, f"expanded: {what}, since {why} as it stands"
    elif found and wide.error < EXPANDED * standing.error:
        best, words = wide, f"expanded: {what}: estimated error {wide.error:.3g} against {standing.error:.3g} as it stands"
    elif found:
        best, words = standing, f"not expanded: estimated error {standing.error:.3g} as it stands, {wide.error:.3g} with {what}"
    else:
        best, words = standing, f"not expanded: no better plan was found with that (estimated error {standing.error:.3g} as it stands)"
    return replace(best, notes=(words, *best.notes))


def better_aligned(candidates: Candidates, asked: PlanOptions, ruler: Ruler, progress: Progress) -> Trial:
    """Which units leave, with the alignment that is asked for or the better of two.

    Raises:
        as `plan_for`.
    """
    align, first = Align.parse(asked.align), settled(asked, ruler)
    best = _with_or_without_integers(candidates, replace(asked, align=first), ruler, progress)
    if align.written == "default" and str(first) == BLOCKS:
        if best.used < FULL:
            best = attempt(candidates, replace(asked, align=LIGHT), ruler, progress)
    elif _told_apart(candidates) and align.symbolic and _timed(asked) and first.fine < first.block and best.changes:
        best = nearer(candidates, best, replace(asked, align=str(first.block)), ruler, progress)
    return best


def of_kinds(
    candidates: Candidates, kinds: Sequence[Sequence[Group]], asked: PlanOptions, ruler: Ruler, progress: Progress
) -> Trial:
    """Of the trials that these groups, or those, allow the one that loses least of the scores.

    Raises:
        TargetError: none allow a target.
    """
    found, failure = list[Trial](), None
    for groups in kinds:
        try:
            found.append(worthwhile(replace(candidates, groups=groups), asked, ruler, progress))
        except TargetError as error:
            failure = error
    if failure is not None and not found:
        raise failure
    every = candidates.analysis.coupling.groups
    rows = errors_of_scores(every, candidates.scores) if found[1:] else []

    def loss(trial: Trial) -> float:
        return sum(float(row[np.count_nonzero(~trial.removed[group.units])]) for group, row in zip(every, rows, strict=True))

    return min(found, key=loss) if found[1:] else found[0]


def _judged(candidates: Candidates, known: Container[str], asked: PlanOptions) -> list[list[Group]]:
    """The groups that may shrink: not dimensions whose errors are not ``known``; and of whole groups of a convolution and what is inside of
    them both, where a solver weighs them against each other by what is known of both; else these or those, where targets tell which is
    better, or those that leave in finer steps."""
    left = [group for group in candidates.groups if not group.dimensions or group.name in known]
    if asked.allocation == "solve" and candidates.errors:
        return [[group for group in left if not group.inside or group.name in known]]
    scored = {group.name for group in left if candidates.scores[group.units].any()}
    if asked.allocation == "solve":
        return [[group for group in left if not group.inside or group.name in scored]]
    names = {name for group in left if group.name in scored for name in group.inside}
    if names and asked.ratio is None:
        return [[group for group in left if group.name not in names], [group for group in left if not group.inside]]
    parts = {name: [group for group in left if name in group.inside] for group in left for name in group.inside}
    steps = {name: min(part.width // part.blocks if part.name in scored else 0 for part in some) for name, some in parts.items()}
    whole = {group.name for group in left if group.width > steps.get(group.name, group.width)}
    return [[group for group in left if whole.isdisjoint(group.inside) and (group.name not in parts or group.name in whole)]]


def allocation_of(candidates: Candidates, options: PlanOptions) -> str:
    """How widths are chosen: as asked, or by the solver where that is better; a ratio is the same share of every group."""
    targets = [parse_target(text) for text in options.targets]
    allocation = options.allocation
    if options.precision == "auto" and (options.ratio is not None or allocation not in ("default", "solve")):
        raise OptionError("--precision auto: the solver chooses it, for a --target or --max-drop, with no --allocation but solve")
    if allocation == "default":
        solved = any(target.figure.solved for target in targets) or options.max_drop is not None or bool(candidates.errors)
        solved = solved or options.precision == "auto"
        allocation = "solve" if solved else "uniform"
    return "uniform" if allocation == "solve" and (options.ratio is not None or not targets) else allocation


def attempt(candidates: Candidates, options: PlanOptions, ruler: Ruler, progress: Progress) -> Trial:
    """Which units leave with one alignment.

    Raises:
        OptionError: neither or both of ratio and targets. TargetError: the targets cannot be held.
    """
    if options.ratio is not None or not options.targets:
        coupling = candidates.analysis.coupling
        removed = widths.choose(coupling, candidates.groups, candidates.scores, options, ruler.predicted)
        assert removed is not None
        return Trial(options, removed, codes=tuple(offer[0] for offer in offered_codes(candidates.form.storable, options)))
    limits = bounds([parse_target(text) for text in options.targets], ruler.before)
    with progress("planning", 1) as advance:
        trial = reach(candidates, options, ruler, limits)
        advance(1)
    return replace(trial, notes=(*trial.notes, *(note for gauge in ruler.gauges.values() for note in gauge.notes)))
