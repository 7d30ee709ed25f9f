"""Figures that are counted, and the ruler that holds all figures of one model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..core.options import BYTES, PlanOptions
from ..core.types import BoolArray, FloatArray, IntArray
from ..coupling import cost
from ..coupling.analysis import Analysis, Progress, silent
from ..cut import cut
from ..graph.save import file_bytes
from ..runtime import Setup
from . import COUNTS, FIGURES, Gauge, figure, parse_target
from .work import liveness, macs_terms, weight_terms


@dataclass(frozen=True)
class Scene:
    """What figures are made from: the model, and how it is run and measured."""

    analysis: Analysis
    options: PlanOptions
    progress: Progress = silent

    @property
    def setup(self) -> Setup:
        """How onnxruntime runs it."""
        return Setup(self.options.threads, self.options.provider)


# ---- what is counted -------------------------------------------------------------------------------------------------


@figure("macs", COUNTS, "macs=50%")
def macs(scene: Scene) -> Gauge:
    """Multiply-accumulates for one sample, exact."""
    coupling, samples = scene.analysis.coupling, scene.analysis.samples
    return Gauge(lambda removed: cost.macs(coupling, removed, samples), macs_terms(coupling, samples).total)


@figure("params", COUNTS, "params=120k")
def params(scene: Scene) -> Gauge:
    """Number of weights, exact."""
    coupling, parameters = scene.analysis.coupling, scene.analysis.parameters
    return Gauge(lambda removed: float(cost.params(parameters, removed)), weight_terms(coupling, parameters).total)


@figure("size", BYTES, "size=2MB", shown="{:,.0f} bytes".format)
def size(scene: Scene) -> Gauge:
    """Bytes of the file: whole file - 4 bytes times the weights that leave; counted on built models."""
    analysis = scene.analysis
    weights = weight_terms(analysis.coupling, analysis.parameters, 4.0)
    whole, full = float(file_bytes(analysis.model)), weights.values(weights.full).sum()
    return Gauge(
        predicted=lambda removed: float(whole - (full - weights.values(weights.lengths_after(removed)).sum(-1))),
        cost=lambda kept: whole - full + weights.total(kept),
        measured=lambda model: float(file_bytes(model)),
    )


@figure("memory", BYTES, "memory=1.5MiB", shown="{:,.0f} bytes".format, solved=True)
def memory(scene: Scene) -> Gauge:
    """Bytes of the activations that are alive together, at most, exact."""
    coupling, batch = scene.analysis.coupling, scene.options.batch
    whole = liveness(scene.analysis, batch)

    def predicted(removed: BoolArray) -> float:
        constants = {name for branch in cost.vanishing(coupling, removed) for name in branch.constant}
        live = liveness(scene.analysis, batch, constants) if constants else whole  # without a branch, what only it read goes, too
        return float(live.peak(live.terms.lengths_after(removed)))

    return Gauge(predicted, lambda kept: whole.peak(whole.terms.lengths(kept)))


# ---- all figures of a model ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ruler:
    """Figures of a model after a removal. ``names`` are those that count, out of the ``gauges`` that there are."""

    analysis: Analysis
    gauges: Mapping[str, Gauge]
    names: tuple[str, ...]

    @cached_property
    def before(self) -> dict[str, float]:
        """Figures of the original."""
        figures = self.predicted(np.zeros(self.analysis.coupling.units, bool))
        return {name: value if (before := self.gauges[name].before) is None else before for name, value in figures.items()}

    @property
    def timed(self) -> tuple[str, ...]:
        """Names of what is timed on this machine."""
        return tuple(name for name in self.names if FIGURES[name].timed and self.gauges[name].measured)

    def predicted(self, removed: BoolArray) -> dict[str, float]:
        """Figures after a removal without building it."""
        return {name: self.gauges[name].predicted(removed) for name in self.names}

    def cost(self, name: str) -> Callable[[IntArray], FloatArray]:
        """A figure of candidates (..., groups) for the solver."""
        return self.gauges[name].cost

    def actual(self, removed: BoolArray) -> dict[str, float]:
        """Figures of the built model, as far as they are measured; else as predicted."""
        figures = self.predicted(removed)
        measures = {name: measure for name in self.names if (measure := self.gauges[name].measured) is not None}
        if not measures:
            return figures
        model = cut(self.analysis.prepared, self.analysis.coupling, removed) if removed.any() else self.analysis.model
        return figures | {name: measure(model) for name, measure in measures.items()}

    def again(self, removed: BoolArray) -> Ruler:
        """The ruler after everything that is timed was measured anew, around the widths after a removal."""
        anew = {name: again(removed) for name in self.names if (again := self.gauges[name].again) is not None}
        return replace(self, gauges={**self.gauges, **anew})


def ruler_for(analysis: Analysis, options: PlanOptions, progress: Progress = silent) -> Ruler:
    """The ruler for the options' targets.

    Raises:
        OptionError, ProfileError: unknown target, provider or batch size; a device profile that does not fit.
    """
    names = tuple(dict.fromkeys(["macs", "params", *(parse_target(text).what for text in options.targets)]))
    scene = Scene(analysis, options, progress)
    return Ruler(analysis, {name: FIGURES[name].gauge(scene) for name in names}, names)
