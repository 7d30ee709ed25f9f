"""Figures of a model after a removal, predicted and measured; and widths chosen so that bounds on them hold."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from .. import allocate, graph, latency, runtime, targets
from .. import plan as plans
from ..allocate import Allocation, Cost, Problem
from ..cut import cut
from ..device import Clock, DeviceProfile, scaled
from ..graph import Model
from ..records import BoolArray, Coupling, FloatArray, Group, PlanOptions
from ..runtime import Setup
from ..units import vanishing
from ..work import Liveness, Terms, liveness, macs_terms, needed, node_terms, weight_terms
from .analysis import Analysis, Progress, silent
from .profiling import clock_of, measure_profile, read_profile, timing_feeds

BLOCKS = "16:1:12"  # channels are made in blocks of 16 (AVX-512) or 8 (AVX2), and fewer than 12 read one by one (measured, AVX-512)
LIGHT = "4:1:12"  # other widths are slower than the next wider multiple of 4
REPEATS, MOST_REPEATS, TIMING_SECONDS = 50, 600, 3.0


@dataclass(frozen=True)
class Reached:
    """A removal with its figures: predicted when it was chosen, and actual (counted, built or measured), by name."""

    removed: BoolArray
    predicted: Mapping[str, float]
    actual: Mapping[str, float]
    rounds: int = 1
    notes: tuple[str, ...] = ()
    before: Mapping[str, float] = field(default_factory=dict)
    bounds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Ruler:
    """Figures of a model after a removal. ``profile`` is needed for latency; ``here``: it was measured on this machine."""

    analysis: Analysis
    setup: Setup
    batch: int = 1
    profile: DeviceProfile | None = None
    here: bool = True
    names: tuple[str, ...] = field(default=tuple(targets.UNITS))

    @cached_property
    def terms(self) -> Terms:
        """Work of every node."""
        return node_terms(self.analysis.coupling, self.analysis.prepared.nodes, self.analysis.prepared.trace)

    @cached_property
    def clock(self) -> Clock:
        """Predicts latency."""
        assert self.profile is not None
        return clock_of(self.analysis, self.profile)

    @cached_property
    def live(self) -> Liveness:
        """Activations that are alive together."""
        return self._live(())

    def _live(self, constants: Collection[str]) -> Liveness:
        model, prepared = self.analysis.prepared.model, self.analysis.prepared
        types = prepared.types
        sizes = {name: np.dtype(dtype).itemsize for name, dtype in types.items() if dtype is not None and np.dtype(dtype).kind not in "OSU"}
        ends = ([port.name for port in graph.inputs(model)], [port.name for port in graph.outputs(model)])
        scale = self.batch / self.analysis.samples
        nodes = needed(prepared.nodes, ends[1], constants)
        held = {*graph.initializers(model), *constants}
        return liveness(self.analysis.coupling, nodes, prepared.trace, held, ends, sizes, scale)

    @cached_property
    def weights(self) -> Terms:
        """Bytes of weights."""
        return weight_terms(self.analysis.coupling, self.analysis.parameters, [4.0] * len(self.analysis.parameters))

    @cached_property
    def whole_bytes(self) -> float:
        """Bytes of the file."""
        return float(graph.file_bytes(self.analysis.model))

    @cached_property
    def before(self) -> dict[str, float]:
        """Figures of the original."""
        found = self.predicted(np.zeros(self.analysis.coupling.units, bool))
        if self.profile is not None and "latency" in found:
            found["latency"] = self.profile.seconds
        return found

    def predicted(self, removed: BoolArray) -> dict[str, float]:
        """Figures after a removal without building it: MACs, parameters and memory exact, size and latency estimated."""
        size = self.analysis.size(removed)
        found = {"macs": size.macs, "params": float(size.params)}
        if "size" in self.names:
            found["size"] = self._size(self.weights.lengths_after(removed))
        if "memory" in self.names:
            found["memory"] = self._memory(removed)
        if "latency" in self.names:
            found["latency"] = float(self.clock(self.terms.lengths_after(removed)))
        return found

    def _memory(self, removed: BoolArray) -> float:
        constants = {name for branch in vanishing(self.analysis.coupling, removed) for name in branch.constant}
        live = self._live(constants) if constants else self.live  # without a branch, what only it read goes, too
        return float(live.peak(live.terms.lengths_after(removed)))

    def _size(self, lengths: FloatArray) -> float:
        full = self.weights.values(self.weights.full).sum()
        return float(self.whole_bytes - (full - self.weights.values(lengths).sum(-1)))

    def cost(self, name: str) -> Cost:
        """A figure of candidates (..., groups) for the solver."""
        if name == "macs":
            return macs_terms(self.analysis.coupling, self.analysis.samples).total
        if name == "params":
            return weight_terms(self.analysis.coupling, self.analysis.parameters).total
        if name == "size":
            full = self.weights.values(self.weights.full).sum()
            return lambda kept: self.whole_bytes - full + self.weights.total(kept)
        if name == "memory":
            return lambda kept: self.live.peak(self.live.terms.lengths(kept))
        return lambda kept: self.clock(self.terms.lengths(kept))

    def actual(self, removed: BoolArray) -> dict[str, float]:
        """Figures of the built model; latency as the ratio of interleaved minima times the original's latency."""
        found = self.predicted(removed)
        timed = "latency" in self.names and self.here
        if not timed and "size" not in self.names:
            return found
        model = cut(self.analysis.prepared, self.analysis.coupling, removed) if removed.any() else self.analysis.model
        if "size" in self.names:
            found["size"] = float(graph.file_bytes(model))
        if timed:
            found["latency"] = self.before["latency"] * latency_ratio(self.analysis, model, self.setup, self.batch)
        return found


def latencies_of(models: Sequence[Model], analysis: Analysis, setup: Setup, batch: int) -> list[float]:
    """Seconds of each model, as minima of interleaved runs (at least 50); processor time with one thread, else wall time."""
    feeds, clock = timing_feeds(analysis, batch), runtime.steady_clock(setup)
    sessions = [runtime.open_timed(graph.serialized(own), own.weights, own.name, setup) for own in models]
    first = runtime.interleaved(sessions, [feeds] * len(sessions), 3, clock)
    repeats = int(np.clip(TIMING_SECONDS / max(sum(map(min, first)), 1e-6), REPEATS, MOST_REPEATS))
    return [min(own) for own in runtime.interleaved(sessions, [feeds] * len(sessions), repeats, clock)]


def latency_ratio(analysis: Analysis, model: Model, setup: Setup, batch: int) -> float:
    """Latency of a model over that of the original, measured together."""
    original, other = latencies_of([analysis.model, model], analysis, setup, batch)
    return other / original


def ruler_for(analysis: Analysis, options: PlanOptions, progress: Progress = silent) -> Ruler:
    """The ruler for the options' targets; measures the device profile if a latency is asked and no profile is given.

    Raises:
        OptionError, ProfileError: unknown target, provider or batch size; a profile that does not fit.
    """
    asked = [targets.parse_target(text) for text in options.targets]
    setup = Setup(options.threads, options.provider)
    names = tuple(dict.fromkeys(["macs", "params", *(target.what for target in asked)]))
    ruler = Ruler(analysis, setup, options.batch, names=names)
    if "latency" not in names:
        return ruler
    if options.device_profile is not None:
        profile = read_profile(options.device_profile, analysis.model.sha256)
        return replace(ruler, profile=profile, here=profile.device == latency.device(setup) and profile.batch == options.batch)
    profile = measure_profile(analysis, setup, options.batch, progress, budget=options.profile_budget)
    return replace(ruler, profile=scaled(profile, latencies_of([analysis.model], analysis, setup, options.batch)[0]))


def align_of(options: PlanOptions, profile: DeviceProfile | None) -> int | str | None:
    """The widths that may be kept, as `plan.grid_of` reads them: as asked; or the staircase of the device (``auto``, and the default with
    a latency target); or (the default otherwise) one that needs no measurement, so that such plans do not depend on the machine: `BLOCKS`
    where the solver can give elsewhere what a coarse step takes (see `deciding.plan_for`), `LIGHT` where all groups are cut by one number.
    """
    if options.align not in ("auto", "default"):
        return None if options.align == "none" else options.align
    asked = any(targets.parse_target(text).what == "latency" for text in options.targets)
    if options.align == "default" and not asked:
        return BLOCKS if options.allocation == "solve" else LIGHT
    found = profile.block if profile else latency.block(Setup(options.threads, options.provider))
    if found.width <= latency.FINE:
        return found.width if found.width > 1 else None
    return f"{found.width}:{latency.FINE}"


# ---- choosing --------------------------------------------------------------------------------------------------------

Choice = Callable[[Mapping[str, float]], "tuple[BoolArray, str] | None"]
"""The removal that holds these bounds on predicted figures, and a word on how it was found; None if there is none."""


def errors_of_scores(groups: Sequence[Group], scores: FloatArray) -> list[FloatArray]:
    """Error of each group by the number of units it keeps, 0 .. width: share of the squared scores that leaves, summed over the layers
    that read it (as the errors of `obs` are: a residual stream is worth more than what one layer reads)."""
    found = []
    for group in groups:
        squares = np.sort(np.maximum(scores[group.units], 0)) ** 2
        total = squares.sum()
        lost = np.concatenate([[0.0], np.cumsum(squares)])[::-1]
        found.append(max(1, len(group.consumers)) * (lost / total if total > 0 else np.linspace(1, 0, group.width + 1)))
    return found


def solver(
    ruler: Ruler, groups: Sequence[Group], scores: FloatArray, options: PlanOptions, errors: Mapping[str, FloatArray] | None = None
) -> Choice:
    """Widths by `allocate.solve`, from errors per group by kept units (default: from scores)."""
    coupling = ruler.analysis.coupling
    table = dict(zip((group.name for group in groups), errors_of_scores(groups, scores), strict=True)) | dict(errors or {})
    widths = offered(coupling, groups, options)
    losses = [
        np.maximum.accumulate([table[group.name][width] for width in own]).tolist() if len(own) > 1 else [0.0]
        for group, own in zip(coupling.groups, widths, strict=True)
    ]
    costs = {name: ruler.cost(name) for name in ruler.names}

    def choose(bounds: Mapping[str, float]) -> tuple[BoolArray, str] | None:
        problem = Problem(widths, losses, [costs[name] for name in bounds], list(bounds.values()))
        found = allocate.solve(problem)
        if found is None:
            return None
        return plans.of_widths(coupling, scores, found.kept.tolist()), compared(found)

    return choose


def offered(coupling: Coupling, groups: Sequence[Group], options: PlanOptions) -> list[list[int]]:
    """Widths that every group of the model may have; only ``groups`` have a choice."""
    grid = plans.grid_of(options.align)
    chosen = {group.name for group in groups}
    found = []
    for group in coupling.groups:
        vanish = group.name in coupling.branches and options.min_channels == 1
        own = allocate.choices(group.width, plans.steps_of(coupling, group, grid), options.min_channels, vanish)
        found.append(own if group.name in chosen else [group.width])
    return found


def narrowest(coupling: Coupling, groups: Sequence[Group], scores: FloatArray, options: PlanOptions) -> BoolArray:
    """The largest removal that the options allow."""
    if options.allocation == "solve":
        return plans.of_widths(coupling, scores, [own[-1] for own in offered(coupling, groups, options)])
    return plans.least(coupling, groups, scores, options)


def compared(found: Allocation) -> str:
    """Which method of the solver was better, and by how much."""
    if len(found.errors) < 2:
        return f"allocation: {found.method} only"
    worse = max(found.errors, key=lambda name: (found.errors[name], name != found.method))
    if found.errors[worse] == found.error:
        return f"allocation: greedy and Lagrangian sweep reach the same error ({found.error:.4g})"
    return f"allocation: {found.method} ({found.error:.4g}) better than {worse} ({found.errors[worse]:.4g}) by estimated error"


def ranking(ruler: Ruler, groups: Sequence[Group], scores: FloatArray, options: PlanOptions) -> Choice:
    """One number says how much leaves everywhere: the baselines `uniform` and `global`."""

    def choose(bounds: Mapping[str, float]) -> tuple[BoolArray, str] | None:
        removed = plans.choose(ruler.analysis.coupling, groups, scores, options, ruler.predicted, bounds)
        return None if removed is None else (removed, f"allocation: {options.allocation}")

    return choose
