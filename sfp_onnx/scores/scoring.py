"""The registry of scores: what a score is asked for, what it gives, and the text that names it with its options.

A score is ``prepare(analysis, data, setting) -> Scored``. Most are plain functions of one group's view (`score`); those that need more
of a model than views register their own ``prepare`` (`prepared`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, get_args, get_type_hints

import numpy as np

from ..core.errors import DataError, OptionError
from ..core.options import MeasureOptions, OptionFacts, PlanOptions, RepairOptions, ScoreOptions, expect
from ..core.types import Array, FloatArray, Group, GroupView, Shown, Spectrum

if TYPE_CHECKING:  # to register a score must cost nothing
    from ..coupling.analysis import Analysis, Progress
    from ..data.dataset import Dataset
    from ..graph.edit import Editor


@dataclass(frozen=True)
class Setting:
    """What a score is asked for.

    ``options`` are the score's own parameters (None: it has none). ``plan`` and ``groups`` are for searches: what the plan asks for, and
    the groups that may shrink (None: no plan). ``measures``: what is known of the outputs. ``names`` are all scores that are asked
    for together, and ``shared`` is what they measured, so that it is measured once.
    """

    progress: Progress
    seed: int = 0
    memory: int = ScoreOptions.memory
    options: Any = None
    plan: PlanOptions | None = None
    groups: Sequence[Group] | None = None
    names: tuple[str, ...] = ()
    measures: MeasureOptions = MeasureOptions()
    shared: dict[str, Any] = field(default_factory=dict)

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """What is shared under ``key``; made where it is not there yet."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]


class Details(Protocol):
    """What a plug-in tells of its scores, beyond the values."""

    def data(self) -> dict[str, Any]:
        """As plain data, for `score --json`."""

    def text(self) -> str:
        """For people."""

    def brief(self) -> Any:
        """The little of it that the plug-in's section of a report shows."""


@dataclass(frozen=True, repr=False)
class Scored(Shown):
    """Importance per unit of a model (``values``, (units,), larger = keep).

    ``errors``: of each group by the number of units that it keeps (0 .. width), for solved allocation, where the score knows them;
    ``spectra``: of layers, what tells the error if they become two; ``notes``: what the user should know; ``arrays``: makes what
    `save_scores` writes besides, by name; ``details``: what the plug-in tells in reports; ``reach``: the share of the outputs' variance
    that an error of 1 means there (0: unknown).
    """

    name: str
    values: FloatArray
    errors: Mapping[str, FloatArray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    arrays: Callable[[], Iterable[tuple[str, Array]]] = tuple  # none
    details: Details | None = None
    spectra: Mapping[str, Spectrum] = field(default_factory=dict)
    reach: float = 0.0

    def summary(self) -> str:
        """The score's name, how much it scored, and the range."""
        low, high = (self.values.min(), self.values.max()) if self.values.size else (0.0, 0.0)
        return f"{self.name} of {self.values.size} channels that can leave (or sets of coupled ones), from {low:.4g} to {high:.4g}"

    @property
    def brief(self) -> Any:
        """What a report needs of the details; None where there are none."""
        return self.details.brief() if self.details else None


Prepare = Callable[["Analysis", "Dataset | None", Setting], Scored]


@dataclass(frozen=True)
class Score:
    """A score. ``source`` is the paper; ``options`` the frozen dataclass of its own parameters, or None. ``prepare`` raises DataError where
    the data do not do, ModelError where the model does not."""

    name: str
    summary: str
    source: str
    needs_data: bool
    options: type | None
    prepare: Prepare


SCORES: dict[str, Score] = {}
SCORE_NAMES = SCORES.keys()


# ---- registration ----------------------------------------------------------------------------------------------------

GroupScore = Callable[[GroupView, Setting], FloatArray]


@dataclass(frozen=True)
class OfGroups:
    """``prepare`` of a plain score: ``function`` of the view of every group; ``needs`` are names of statistics of what layers read."""

    name: str
    function: GroupScore
    needs: frozenset[str] = frozenset()

    def __call__(self, analysis: Analysis, data: Dataset | None, setting: Setting) -> Scored:
        from .statistics import moments_of, views

        together = (SCORES[name].prepare for name in setting.names)
        needs = self.needs.union(*(prepare.needs for prepare in together if isinstance(prepare, OfGroups)))
        moments = {}
        if needs and (data is not None or setting.shared):
            moments = setting.once("moments", lambda: moments_of(analysis, data, needs, setting.progress) if data else {})
        values = np.zeros(analysis.coupling.units)
        every = views(analysis.prepared, analysis.coupling, moments)
        for group, view in zip(analysis.coupling.groups, every, strict=True):
            values[group.units] = self.function(view, setting)
        return Scored(self.name, values)


def score(
    name: str, summary: str, source: str, needs: Iterable[str] = (), options: type | None = None
) -> Callable[[GroupScore], GroupScore]:
    """Register a function of one group's view as a score; ``needs``: the statistics that it reads (`STATISTICS`)."""

    def register(function: GroupScore) -> GroupScore:
        wanted = frozenset(needs)
        SCORES[name] = Score(name, summary, source, bool(wanted), options, OfGroups(name, function, wanted))
        return function

    return register


def prepared(name: str, summary: str, source: str, options: type | None = None) -> Callable[[Prepare], Prepare]:
    """Register a score that needs data and makes its values itself."""

    def register(prepare: Prepare) -> Prepare:
        SCORES[name] = Score(name, summary, source, True, options, prepare)
        return prepare

    return register


# ---- statistics of activations ---------------------------------------------------------------------------------------

Tap = Callable[["Editor", Any, str], Any]
"""(editor, tensor, name for what it adds) -> a float32 tensor of the same shape, whose mean per channel is the statistic."""


@dataclass(frozen=True)
class Statistic:
    """What is averaged of an activation: ``tap`` adds it to the graph, ``finish`` is applied to the mean per channel."""

    tap: Tap
    finish: Callable[[FloatArray], FloatArray]


STATISTICS: dict[str, Statistic] = {}


def statistic(name: str, finish: Callable[[FloatArray], FloatArray] = lambda mean: mean) -> Callable[[Tap], Tap]:
    """Register a statistic that scores may need."""

    def register(tap: Tap) -> Tap:
        STATISTICS[name] = Statistic(tap, finish)
        return tap

    return register


# ---- the text of a score ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """Scores that are asked for together, each with its own parameters."""

    scores: tuple[Score, ...]
    options: tuple[Any, ...]

    @property
    def text(self) -> str:
        """The canonical text: options that are not at their default, each once."""
        given = {name: value for record in self.options if record is not None for name, value in _given(record)}
        return ",".join(["+".join(single.name for single in self.scores), *(f"{name}={value}" for name, value in given.items())])


def parse(text: str) -> Request:
    """Read ``NAME[+NAME..][,option=value..]``. An option holds for every score that has it.

    Raises:
        OptionError: unknown score or option, or a bad value.
    """
    expect(str, score_name=text)
    names, *items = (item.strip() for item in text.split(","))
    chosen = [_named(name.strip()) for name in names.split("+")]
    given: dict[str, str] = {}
    for item in items:
        name, sign, value = item.partition("=")
        if not sign:
            raise OptionError(f"score '{text}': '{item}': expected option=value")
        given[name.strip()] = value.strip()
    known = {name: None for single in chosen if single.options for name in _facts(single.options)}
    for name in given:
        if name not in known:
            has = f"Known: {', '.join(known)}" if known else "It has none"
            raise OptionError(f"score '{names}': unknown option '{name}'{_meant(name, known)}. {has}")
    return Request(tuple(chosen), tuple(_record(single, given) for single in chosen))


def _named(name: str) -> Score:
    if name not in SCORES:
        raise OptionError(f"unknown score '{name}'{_meant(name, SCORES)}. Known: {', '.join(SCORES)}, and several joined by '+'")
    return SCORES[name]


def _meant(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, list(known), 1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def _facts(record: type) -> dict[str, OptionFacts]:
    return {item.name: item.metadata["option"] for item in fields(record) if "option" in item.metadata}


def _record(single: Score, given: Mapping[str, str]) -> Any:
    """The score's own parameters."""
    if single.options is None:
        return None
    kinds, facts = get_type_hints(single.options), _facts(single.options)
    return single.options(**{name: _value(single.name, name, given[name], kinds[name], facts[name]) for name in facts if name in given})


def _value(score: str, name: str, text: str, kind: Any, facts: OptionFacts) -> Any:
    """One value of an option, from its text."""
    where = f"score '{score}': {name}={text}: "
    plain = next(one for one in (get_args(kind) or (kind,)) if one is not type(None))
    try:
        value = facts.parse(text) if facts.parse else plain(text)
    except OptionError as error:
        raise OptionError(f"{where}{error}") from error
    except ValueError as error:
        raise OptionError(f"{where}expected {'a whole number' if plain is int else 'a number'}") from error
    facts.check(value, where)
    return value


def _given(options: Any) -> Iterator[tuple[str, str]]:
    """Names and texts of the parameters that are not at their default."""
    for item in fields(options):
        value = getattr(options, item.name)
        if "option" in item.metadata and value != item.default:
            yield item.name, item.metadata["option"].text(value)


def asked(text: str | None, seed: int = 0, memory: int = ScoreOptions.memory) -> tuple[str | None, ScoreOptions]:
    """The canonical text of a score (None: the default), and what all scores may be told.

    Raises:
        OptionError: see `parse`.
    """
    return None if text is None else parse(text).text, ScoreOptions(seed, memory)


def default_score(data: Dataset | None, repair: RepairOptions | None = None) -> str:
    """The score that is used if none is named: `obs` knows the least-squares repair that follows."""
    if data is None:
        return "magnitude"
    return "obs" if repair is not None and repair.fit == "lstsq" else "contribution"


def meaning(text: str) -> str:
    """The summary of a score, behind a colon; empty where several are joined."""
    scores = parse(text).scores
    return f": {scores[0].summary}" if len(scores) == 1 else ""


# ---- scoring ---------------------------------------------------------------------------------------------------------


def scored(
    analysis: Analysis, text: str, data: Dataset | None = None, options: ScoreOptions | None = None, progress: Progress | None = None,
    plan: PlanOptions | None = None, groups: Sequence[Group] | None = None, measures: MeasureOptions = MeasureOptions(),
    shared: Mapping[str, Any] | None = None,
) -> Scored:  # fmt: skip
    """Importance per unit of a model; scores joined by ``+`` mean the average of their ranks within each group.

    Args:
        text: ``NAME[+NAME..][,option=value..]``.
        plan, groups: what a plan asks for and the groups that may shrink, for scores that search. measures: what is known of the outputs.
        shared: what was measured of the data before (`parts.shared_by`), in place of data.

    Raises:
        OptionError: unknown score, unknown option, bad value.
        DataError: the score needs data and there are none, or they do not do. ModelError: the score needs another kind of model.
    """
    from ..coupling.analysis import silent

    request, options = parse(text), options or ScoreOptions()
    for single in request.scores:
        if single.needs_data and data is None and not shared:
            free = ", ".join(sorted(other.name for other in SCORES.values() if not other.needs_data))
            raise DataError(f"score '{single.name}' needs calibration data: give --data, or use a score that needs none: {free}")
    names = tuple(single.name for single in request.scores)
    setting = Setting(progress or silent, options.seed, options.memory, None, plan, groups, names, measures, dict(shared or {}))
    pairs = zip(request.scores, request.options, strict=True)
    results = [single.prepare(analysis, data, replace(setting, options=chosen)) for single, chosen in pairs]
    if len(results) == 1:
        return replace(results[0], name=request.text)
    return _joined(analysis, request.text, results)


def _joined(analysis: Analysis, name: str, results: Sequence[Scored]) -> Scored:
    """Several scores as one; what they say besides is put together, but for errors, which are those of no single ranking."""
    values = np.zeros(analysis.coupling.units)
    for group in analysis.coupling.groups:
        values[group.units] = combined([result.values[group.units] for result in results])
    notes = tuple(dict.fromkeys(note for result in results for note in result.notes))
    details = next((result.details for result in results if result.details is not None), None)
    return Scored(name, values, {}, notes, lambda: {key: array for result in results for key, array in result.arrays()}.items(), details)


def combined(values: Sequence[FloatArray]) -> FloatArray:
    """Several scores of one group as one: the mean of their ranks, as shares of the group (ties share their mean rank)."""
    if len(values) == 1:
        return values[0]
    total = np.zeros(len(values[0]))
    for single in values:
        _, inverse, counts = np.unique(single, return_inverse=True, return_counts=True)
        total += (np.cumsum(counts) - (counts - 1) / 2)[inverse] / len(single)
    return total / len(values)


def save_scores(path: Path, analysis: Analysis, result: Scored, inputs: Iterable[Path] = ()) -> None:
    """Write scores as .npz, atomically; equal results give equal bytes.

    ``groups`` (G,) names, ``scores`` of all groups one after the other, those of group g at ``offsets[g]:offsets[g + 1]``; then the
    arrays of the score, as its plug-in says (`Scored.arrays`).

    Raises:
        OutputError: the path cannot be written.
    """
    from ..graph.arrays import Named, write_arrays

    groups = analysis.coupling.groups
    arrays: list[tuple[str, Array]] = [
        ("groups", np.array([group.name for group in groups], np.str_)),
        ("offsets", np.cumsum([0, *(group.width for group in groups)])),
        ("scores", result.values[np.concatenate([group.units for group in groups])] if groups else np.zeros(0)),
    ]
    write_arrays(path, (Named(*item) for part in (arrays, result.arrays()) for item in part), inputs)
