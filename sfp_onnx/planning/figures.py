"""Figures of a model after a removal, predicted and measured; and widths chosen so that bounds on them hold."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from ..core.options import PlanOptions
from ..core.types import BoolArray, FloatArray
from ..coupling.analysis import Analysis, Progress, silent
from ..coupling.cost import vanishing
from ..cut import cut
from ..graph import initializers, inputs, outputs
from ..graph.save import file_bytes
from ..latency import Clock, DeviceProfile, scaled
from ..latency.measure import FINE, block, device, latencies_of, latency_ratio
from ..latency.profiling import clock_of, measure_profile, read_profile
from ..runtime import Setup
from . import UNITS, parse_target
from .solver import Cost
from .work import Liveness, Terms, liveness, macs_terms, node_terms, weight_terms

BLOCKS = "16:1:12"  # channels are made in blocks of 16 (AVX-512) or 8 (AVX2), and fewer than 12 read one by one (measured, AVX-512)
LIGHT = "4:1:12"  # other widths are slower than the next wider multiple of 4


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
    names: tuple[str, ...] = field(default=tuple(UNITS))

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
        ends = ([port.name for port in inputs(model)], [port.name for port in outputs(model)])
        scale = self.batch / self.analysis.samples
        nodes = prepared.index.needed(ends[1], constants)
        held = {*initializers(model), *constants}
        return liveness(self.analysis.coupling, nodes, prepared.trace, held, ends, sizes, scale)

    @cached_property
    def weights(self) -> Terms:
        """Bytes of weights."""
        return weight_terms(self.analysis.coupling, self.analysis.parameters, [4.0] * len(self.analysis.parameters))

    @cached_property
    def whole_bytes(self) -> float:
        """Bytes of the file."""
        return float(file_bytes(self.analysis.model))

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
            found["size"] = float(file_bytes(model))
        if timed:
            found["latency"] = self.before["latency"] * latency_ratio(self.analysis, model, self.setup, self.batch)
        return found


def ruler_for(analysis: Analysis, options: PlanOptions, progress: Progress = silent) -> Ruler:
    """The ruler for the options' targets; measures the device profile if a latency is asked and no profile is given.

    Raises:
        OptionError, ProfileError: unknown target, provider or batch size; a profile that does not fit.
    """
    asked = [parse_target(text) for text in options.targets]
    setup = Setup(options.threads, options.provider)
    names = tuple(dict.fromkeys(["macs", "params", *(target.what for target in asked)]))
    ruler = Ruler(analysis, setup, options.batch, names=names)
    if "latency" not in names:
        return ruler
    if options.device_profile is not None:
        profile = read_profile(options.device_profile, analysis.model.sha256)
        return replace(ruler, profile=profile, here=profile.device == device(setup) and profile.batch == options.batch)
    profile = measure_profile(analysis, setup, options.batch, progress, budget=options.profile_budget)
    return replace(ruler, profile=scaled(profile, latencies_of([analysis.model], analysis, setup, options.batch)[0]))


def align_of(options: PlanOptions, profile: DeviceProfile | None) -> int | str | None:
    """The widths that may be kept, as `plan.grid_of` reads them: as asked; or the staircase of the device (``auto``, and the default with
    a latency target); or (the default otherwise) one that needs no measurement, so that such plans do not depend on the machine: `BLOCKS`
    where the solver can give elsewhere what a coarse step takes (see `deciding.plan_for`), `LIGHT` where all groups are cut by one number.
    """
    if options.align not in ("auto", "default"):
        return None if options.align == "none" else options.align
    asked = any(parse_target(text).what == "latency" for text in options.targets)
    if options.align == "default" and not asked:
        return BLOCKS if options.allocation == "solve" else LIGHT
    found = profile.block if profile else block(Setup(options.threads, options.provider))
    if found.width <= FINE:
        return found.width if found.width > 1 else None
    return f"{found.width}:{FINE}"
