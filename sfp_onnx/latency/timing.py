"""How long whole models take: interleaved runs, at one batch size and number of threads for all that is shown of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import graph
from ..core.errors import ModelError, OptionError
from ..core.types import Array
from ..coupling.analysis import Analysis
from ..data.layout import may_be_single, sample_axes, traced_samples, with_samples
from ..runtime import Session, Setup, interleaved, open_model, open_timed, steady_clock

REPEATS, MOST_REPEATS, TIMING_SECONDS = 50, 600, 3.0


def latencies_of(models: Sequence[graph.Model], analysis: Analysis, setup: Setup, batch: int) -> list[float]:
    """Seconds of each model, as minima of interleaved runs (at least 50); processor time with one thread, else wall time."""
    return [min(seconds) for seconds in runs_of([open_timed(model, setup) for model in models], analysis, setup, batch)]


def runs_of(sessions: Sequence[Session], analysis: Analysis, setup: Setup, batch: int) -> list[list[float]]:
    """Seconds of interleaved runs (at least 50) of each session."""
    feeds, clock = timing_feeds(analysis, batch), steady_clock(setup)
    first = interleaved(sessions, [feeds] * len(sessions), 3, clock)
    repeats = int(np.clip(TIMING_SECONDS / max(sum(map(min, first)), 1e-6), REPEATS, MOST_REPEATS))
    return interleaved(sessions, [feeds] * len(sessions), repeats, clock)


@dataclass(frozen=True)
class Latency:
    """How models are timed: one way for all that is shown of a run."""

    setup: Setup
    batch: int = 1

    @staticmethod
    def of(options: Mapping[str, Any]) -> Latency:
        """As the options of a plan say, or its defaults."""
        return Latency(Setup(options.get("threads", 0), options.get("provider", "cpu")), options.get("batch", 1))

    @property
    def threads(self) -> int:
        """Threads of onnxruntime."""
        return self.setup.threads

    def words(self, analysis: Analysis) -> str:
        """For people; with the batch size of the model, if that is fixed."""
        feeds = timing_feeds(analysis, self.batch)
        return self.setup.words(traced_samples(graph.inputs(analysis.model), {name: array.shape for name, array in feeds.items()}))

    def of_models(self, models: Sequence[graph.Model], analysis: Analysis) -> list[dict[str, Any]]:
        """What is told of the latency of each model; the first is the one that was analysed."""
        return self.of_sessions([open_timed(model, self.setup) for model in models], analysis)

    def of_sessions(self, sessions: Sequence[Session], analysis: Analysis) -> list[dict[str, Any]]:
        """As `of_models`, of what is open."""
        runs, words = runs_of(sessions, analysis, self.setup, self.batch), self.words(analysis)
        return [
            {"latency_min_ms": min(seconds) * 1e3, "latency_median_ms": float(np.median(seconds)) * 1e3,
             "latency_ratio": min(seconds) / min(runs[0]), "timing": words}
            for seconds in runs
        ]  # fmt: skip


AS_DEFAULT = Latency.of({})


def timing_feeds(analysis: Analysis, batch: int) -> dict[str, Array]:
    """Inputs to time with: the traced ones, with another batch size where the model leaves it open.

    Raises:
        OptionError: the model's batch size is fixed to another number.
    """
    ports, traced = graph.inputs(analysis.model), analysis.prepared.feeds
    feeds = with_samples(ports, traced, batch)
    count = traced_samples(ports, {name: array.shape for name, array in feeds.items()})
    if batch not in (1, count):
        raise OptionError(f"--batch {batch}: the model has the fixed batch size {count}")
    axes = sample_axes(ports, [{name: array.shape for name, array in traced.items()}])
    if batch > 1 and (single := may_be_single(ports, axes)):
        try:
            open_model(analysis.model).run(feeds)
        except ModelError as error:
            named = " and ".join(f"'{port.name}'" for port in single)
            raise OptionError(f"--batch {batch}: {named} has the fixed batch size 1, and the model takes no other with it") from error
    return feeds
