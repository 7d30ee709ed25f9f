"""Energy of whole models: measured by the counters of the processor where they can be read, else estimated from what is computed and moved.

The counters are those of RAPL (running average power limit), as Linux shows them:
https://docs.kernel.org/power/powercap/powercap.html. The costs of the estimate are those of a 45 nm process at 0.9 V: M. Horowitz,
"Computing's energy problem (and what we can do about it)", ISSCC 2014, figure 1.1.9.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from .. import graph
from ..core.types import Size
from ..coupling.analysis import Analysis
from ..coupling.trace import observed
from ..planning.figures import activations
from ..runtime import Clock, open_timed
from .timing import Latency, timing_feeds

POWERCAP = Path("/sys/class/powercap")
MAC_PJ, WORD_PJ, WORD = 3.7 + 0.9, 640.0, 4  # a 32-bit float multiply and add; 32 bits from or to DRAM; bytes of these
ROUNDS, WINDOW = 6, 0.5  # windows of each model and of rest, and seconds of one: the counters move about every millisecond

Run = Callable[[], Any]


@dataclass(frozen=True)
class Counter:
    """The energy counter of a processor package, in microjoules; at ``most`` it begins again."""

    path: Path
    most: int

    def read(self) -> int:
        """Microjoules since some time."""
        return int(self.path.read_text())

    def since(self, before: int) -> float:
        """Joules since the counter stood at ``before``, less than one turn ago."""
        passed = self.read() - before
        return (passed + self.most if passed < 0 else passed) * 1e-6


def counters(root: Path) -> tuple[list[Counter], str]:
    """The counters of all packages (what lies inside a package, or holds all, would count twice); without any: why."""
    found = []
    try:
        for zone in sorted(root.glob("intel-rapl:*")):
            if (zone / "name").read_text().startswith("package"):
                counter = Counter(zone / "energy_uj", int((zone / "max_energy_range_uj").read_text()))
                counter.read()
                found.append(counter)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        return [], f"the counters in {root} cannot be read: {reason}"
    return found, "" if found else f"there are no counters of processor packages in {root}"


def above_rest(
    runs: Sequence[Run], meters: Sequence[Counter], clock: Clock = time.perf_counter, rest: Callable[[float], object] = time.sleep
) -> list[float]:
    """Joules of one run of each, above those of a machine at rest in the same time: medians of interleaved windows."""

    def window(work: Callable[[], object]) -> tuple[int, float, float]:
        """Runs, seconds and joules of at least a window."""
        before, start, count = [meter.read() for meter in meters], clock(), 0
        while not count or clock() - start < WINDOW:
            work()
            count += 1
        seconds = clock() - start
        return count, seconds, sum(meter.since(own) for meter, own in zip(meters, before, strict=True))

    for run in runs:
        run()
    found: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        _, idle_seconds, idle_joules = window(lambda: rest(WINDOW))
        for own, run in zip(found, runs, strict=True):
            count, seconds, joules = window(run)
            own.append((joules - seconds * idle_joules / idle_seconds) / count)
    return [median(own) for own in found]


def estimated(model: graph.Model, analysis: Analysis, size: Size, batch: int) -> float:
    """Joules of one run, if every weight is read once, and every activation written once and read once, all from or to DRAM."""
    held = activations(observed(model, analysis.prepared.feeds), analysis.samples, batch)[0]
    moved = float(size.bytes or 0) + 2 * sum(map(float, held.values()))
    return (size.macs * batch * MAC_PJ + moved / WORD * WORD_PJ) * 1e-12


def energies(models: Sequence[graph.Model], analysis: Analysis, sizes: Sequence[Size], how: Latency) -> list[dict[str, Any]]:
    """What is told of the energy of one run of each model; the first is the one that was analysed."""
    meters, why = counters(POWERCAP)
    if meters:
        feeds = timing_feeds(analysis, how.batch)
        sessions = [open_timed(model, how.setup) for model in models]
        joules = above_rest([lambda session=session: session.run(feeds) for session in sessions], meters)  # type: ignore[misc]
        if min(joules) > 0:
            words = f"measured (RAPL, processor packages, above the machine at rest; {how.words(analysis)})"
            return [{"energy_mj": own * 1e3, "energy": words} for own in joules]
        why = "a run took no more than the machine at rest: other programs disturbed the measurement"
    costs = f"{MAC_PJ:g} pJ a MAC, {WORD_PJ:g} pJ for {WORD} bytes moved (Horowitz, ISSCC 2014)"
    words = f"an estimate, not measured ({why}): {costs}; batch {how.batch}"
    joules = [estimated(model, analysis, size, how.batch) for model, size in zip(models, sizes, strict=True)]
    return [{"energy_mj": own * 1e3, "energy": words} for own in joules]
