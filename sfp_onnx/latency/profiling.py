"""Measure what a model's nodes cost on this machine, in variants of the model with other widths."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .. import graph
from ..core.errors import ProfileError, SfpError
from ..core.types import Align, BoolArray, FloatArray, IntArray
from ..coupling.analysis import Analysis, Progress, silent
from ..cut import cut
from ..planning import SECONDS, Gauge, Halves, figure
from ..planning.figures import BLOCKED_RANK, Edges, Kind, Scene, Terms, edges, node_terms
from ..planning.library import read_library
from ..planning.precision import INTEGER, LEAST, Codes, as_float, integer, led, on_integers, stores
from ..planning.widths import choices, of_widths, steps_of
from ..runtime import Setup
from . import Clock, DeviceProfile, from_json, measure, scaled, to_json
from .timing import Latency

Changed = Callable[[graph.Model], graph.Model]
FITTED, CHECKED = 12, 3
HEAVY = 3e8  # multiply-accumulates
TOGETHER = 4  # variants that are open at once
SECONDS_HEAVY, SECONDS_EASY = 24.0, 6.0  # of running, at most
BUDGET = 60.0  # of wall time for everything
FEWEST = 8  # variants that are timed whatever the budget


def names_of(analysis: Analysis) -> list[str]:
    """Name of every node in device profiles."""
    return [measure.name_of(node) for node in analysis.prepared.nodes]


def terms_of(analysis: Analysis) -> Terms:
    """Work of every node."""
    return node_terms(analysis.coupling, analysis.prepared.nodes, analysis.prepared.trace)


def clock_of(analysis: Analysis, device_profile: DeviceProfile) -> Clock:
    """A predictor of seconds for an analysed model.

    Raises:
        ProfileError: the device profile lacks most of the model's nodes.
    """
    names, known, terms = names_of(analysis), device_profile.nodes, terms_of(analysis)
    missing = [name for name in names if name not in known]
    if len(missing) > len(names) / 2:
        share = f"{len(missing)} of {len(names)} nodes, such as '{missing[0]}'"
        raise ProfileError(f"the device profile has no entry for {share}. Make it again.")
    table = np.asarray([known.get(name, (0.0,) * len(Kind)) for name in names]).reshape(-1, len(Kind))
    return Clock(terms, table[terms.owner, terms.kind], device_profile.constant, device_profile.block)


# ---- the figure that targets name ------------------------------------------------------------------------------------


@figure("latency", SECONDS, "latency=60%", "latency=5ms", shown=lambda seconds: f"{seconds * 1e3:.3f} ms", timed=True, solved=True)
def latency(scene: Scene) -> Gauge:
    """Seconds of one run, predicted from the options' device profile, else from one that is measured here; of built models measured, if
    this is the machine of the device profile."""
    analysis, options = scene.analysis, scene.options
    if options.device_profile is not None:
        device_profile = read_device_profile(options.device_profile, analysis.model.sha256)
        here = device_profile.device == measure.device(scene.setup) and device_profile.batch == options.batch
        return _gauge(scene, device_profile, here)
    device_profile = measure_device_profile(analysis, scene.setup, options.batch, scene.progress, budget=options.profile_budget)
    return _gauge(scene, scaled(device_profile, measure.latencies_of([analysis.model], analysis, scene.setup, options.batch)[0]), True)


@dataclass(frozen=True)
class OnIntegers:
    """What was measured of a model with layers on integers: the device profile with ``all`` of them, and the ``seconds`` with those of
    which the ``codes`` (models, weights) say so."""

    all: DeviceProfile
    codes: IntArray
    seconds: FloatArray


def integers_measured(scene: Scene, floating: DeviceProfile) -> OnIntegers | None:
    """On the machine in the mood in which it ``floating`` was measured; None where nothing makes layers integers. Of two models every other
    layer is one, which tells what the steps between cost."""
    analysis, setup, batch, make = scene.analysis, scene.setup, scene.options.batch, scene.form.integers
    if make is None:
        return None
    layers = {layer.node.outputs[0] for layer in analysis.coupling.layers}

    def every(model: graph.Model) -> graph.Model:
        return make(model, layers, layers)

    known = measure_device_profile(analysis, setup, batch, scene.progress, budget=scene.options.profile_budget, changed=every)
    storable = scene.form.storable
    odd = np.arange(len(storable)) % 2 == [[0], [1]]
    codes = np.where(odd & [np.isfinite(item.errors[INTEGER]) for item in storable], INTEGER, as_float(storable))
    mixed = [make(analysis.prepared.model, on_integers(stores(storable, row)), layers) for row in codes.tolist()]
    times = measure.latencies_of([analysis.model, every(analysis.prepared.model), *mixed], analysis, setup, batch)
    _, now, *others = floating.seconds * np.asarray(times) / times[0]
    return OnIntegers(scaled(known, float(now)), codes, np.asarray(others))


@dataclass(frozen=True)
class Kernels:
    """Seconds of models of which some layers are computed in integers: what follows a layer counts with it (``led``: as
    `planning.precision.led`), and of what is no node's the share of such layers. Each element that goes from such a node to another, or
    back, takes a ``step``."""

    floating: Clock
    integers: Clock
    led: IntArray
    edges: Edges
    step: float = 0.0

    def __call__(self, lengths: FloatArray, between: FloatArray, codes: Codes) -> FloatArray:
        """Seconds (...) at lengths (..., axes) of nodes and ``between`` them, with codes (..., weights)."""
        clock = self.floating
        on = integer(codes, self.led[clock.terms.owner])
        share = integer(codes, np.arange(np.shape(codes)[-1])).mean(-1)
        values = clock.terms.values(lengths, clock.block.width, clock.block.slow)
        constant = clock.constant + share * (self.integers.constant - clock.constant)
        seconds = constant + (values * np.where(on, self.integers.costs, clock.costs)).sum(-1)
        return np.asarray(seconds + self.step * self.crossing(between, codes))

    def crossing(self, between: FloatArray, codes: Codes) -> FloatArray:
        """Elements (...) that go from nodes on integers to others, or back; inputs of the model are floating."""
        ends = (integer(codes, np.where(nodes < 0, -1, self.led[nodes])) for nodes in (self.edges.makers, self.edges.readers))
        return np.asarray((self.edges.terms.values(between) * np.not_equal(*ends)).sum(-1))

    def fitted(self, measured: OnIntegers) -> Kernels:
        """With the step that models of which some layers are integers took."""
        full, between = self.floating.terms.full, self.edges.terms.full
        late, elements = measured.seconds - self(full, between, measured.codes), self.crossing(between, measured.codes)
        return replace(self, step=max(0.0, float(late @ elements) / max(float(elements @ elements), 1.0)))

    def slower(self, count: int) -> tuple[int, ...]:
        """Which of so many weights are of layers that would take no less time on integers, with all channels: neither alone nor with all
        others."""
        ends, own = self.floating.terms.full, np.eye(count, dtype=bool)
        alone, none = np.where(own, INTEGER, LEAST), np.full(count, LEAST)
        others, every = np.where(own, LEAST, INTEGER), np.full(count, INTEGER)
        times = [self(ends, self.edges.terms.full, codes) for codes in (alone, none, every, others)]
        return tuple(np.flatnonzero((times[0] >= times[1]) & (times[2] >= times[3])).tolist())


def _gauge(scene: Scene, device_profile: DeviceProfile, here: bool, known: OnIntegers | None = None) -> Gauge:
    """``known``: what was measured of integers already."""
    measured = known or (integers_measured(scene, device_profile) if here else None)
    plain = _plain_gauge(scene, device_profile, here, measured)
    if measured is None:
        return plain
    analysis, storable, prepared = scene.analysis, scene.form.storable, scene.analysis.prepared
    between = edges(analysis.coupling, prepared.nodes, prepared.trace)
    floating, integers = clock_of(analysis, device_profile), clock_of(analysis, measured.all)
    kernels = Kernels(floating, integers, led(storable, prepared.nodes, analysis.coupling), between).fitted(measured)
    own, groups = floating.terms, len(analysis.coupling.groups)
    slower = kernels.slower(len(storable))
    words = f"{len(slower)} of {len(storable)} layers would be no faster in 8-bit integers, and stay as they are"

    def cost(kept: IntArray) -> FloatArray:
        units = kept[..., :groups]
        return kernels(own.lengths(units), between.terms.lengths(units), kept[..., groups:])

    def at(codes: Sequence[int]) -> Gauge:
        def predicted(removed: BoolArray) -> float:
            return float(kernels(own.lengths_after(removed), between.terms.lengths_after(removed), codes))

        notes = (*plain.notes, *([words] if slower else []))
        return replace(plain, predicted=predicted, cost=cost, at=at, slower=slower, notes=notes, saved=saved)

    def saved(halves: Halves) -> FloatArray:
        return _saved(halves, (floating, integers), analysis)

    return at(as_float(storable))


def _plain_gauge(scene: Scene, device_profile: DeviceProfile, here: bool, integers: OnIntegers | None) -> Gauge:
    analysis, batch, seconds = scene.analysis, scene.options.batch, device_profile.seconds
    seconds_of, short = clock_of(analysis, device_profile), device_profile.cut_short

    def saved(halves: Halves) -> FloatArray:
        return _saved(halves, (seconds_of, seconds_of), analysis)

    def again(removed: BoolArray) -> Gauge:
        anew = device_profile_around(analysis, scene.setup, batch, kept_of(analysis, removed))
        return _gauge(scene, scaled(anew, seconds), here, integers)

    def measured(model: graph.Model) -> float:
        """The ratio of interleaved minima times the original's latency."""
        return seconds * measure.latency_ratio(analysis, model, scene.setup, batch)

    note = f"fewer widths than usual were timed, since the budget of {short:g} s for the profile was spent"
    return Gauge(
        lambda removed: float(seconds_of(seconds_of.terms.lengths_after(removed))),
        lambda kept: seconds_of(seconds_of.terms.lengths(kept)),
        measured if here else None, seconds, again, device_profile.block.width,
        "latency measured on this machine" if here else "latency predicted from the device profile",
        (note,) if short else (), saved,
    )  # fmt: skip


PAIR = 1.15  # what a layer that became two takes, over what its multiply-accumulates would take in one (measured: 1.06 to 1.15)


def _saved(halves: Halves, clocks: tuple[Clock, Clock], analysis: Analysis) -> FloatArray:
    """Seconds (...) that layers save which become two: of their multiply-accumulates, in whole blocks where convolutions are made so, less
    what the channels between take to be written; by the clock of floating layers or of those on integers, as each is."""
    costs = np.zeros((2, len(analysis.prepared.nodes), len(Kind)))
    for table, clock in zip(costs, clocks, strict=True):
        table[clock.terms.owner, clock.terms.kind] = clock.costs
    each = costs[(halves.codes == INTEGER).astype(np.int64), halves.node]
    shapes, nodes = analysis.prepared.trace.shapes, analysis.prepared.nodes
    block = np.asarray([clocks[0].block.width if len(shapes[nodes[at].outputs[0]]) == BLOCKED_RANK else 1 for at in halves.node])

    def made(channels: FloatArray) -> FloatArray:
        return np.asarray(np.ceil(channels / block) * block)

    def read(channels: FloatArray) -> FloatArray:
        return np.asarray(np.where(channels > block, made(channels), channels))

    window, other = (np.where(halves.inputs, *sides) for sides in ((halves.rank, halves.read), (halves.made, halves.rank)))
    first = halves.taps * read(window) * made(other)
    beside = np.where(halves.inputs, halves.stretch * read(halves.read) * made(halves.rank), read(halves.rank) * made(halves.made))
    positions = halves.positions * analysis.samples
    whole = halves.taps * read(halves.read) * made(halves.made)
    work = each[..., Kind.MACS] * positions * (whole - PAIR * (first + beside))
    between = each[..., Kind.WRITTEN] * positions * np.where(halves.inputs, halves.stretch, 1.0) * made(halves.rank)
    return np.asarray(np.where(halves.rank > 0, work - between, 0.0).sum(-1))


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure_device_profile(
    analysis: Analysis, setup: Setup, batch: int = 1, progress: Progress = silent, fresh: bool = False, budget: float = BUDGET,
    changed: Changed | None = None,
) -> DeviceProfile:  # fmt: skip
    """The device profile of a model on this machine, measured or from the user's cache.

    Args:
        changed: what the model, and every variant of it, becomes before it is timed: all its layers on integers.
        budget: seconds of wall time; where they do not suffice, fewer widths are timed, and less often. A device profile in the cache
            that another budget cut short counts if that was no smaller.

    Raises:
        OptionError: unknown provider or batch size. ModelError: onnxruntime cannot run the model so.
    """
    bench = measure.Bench(analysis, setup, batch)
    shapes = {name: list(array.shape) for name, array in bench.feeds.items()}
    what = "profile of integers" if changed else "profile"
    key = {"what": what, "model": analysis.model.sha256, "shapes": shapes, **measure.device(setup)}
    with suppress(ProfileError):  # there is none, or none that can be read
        known = from_json(None if fresh else measure.read_cache("profile", key), analysis.model.sha256)
        if not 0 < known.cut_short < budget:
            return known
    device_profile = _measure(bench, None, budget, progress, changed)
    measure.write_cache("profile", key, to_json(device_profile))
    return device_profile


def device_profile_around(analysis: Analysis, setup: Setup, batch: int, kept: IntArray) -> DeviceProfile:
    """A device profile that is most exact near ``kept`` units per group: half of the models that are timed have widths beside these.

    Raises:
        As `measure_device_profile`.
    """
    return _measure(measure.Bench(analysis, setup, batch), kept, BUDGET, silent)


def _measure(
    bench: measure.Bench, around: IntArray | None, budget: float, progress: Progress, changed: Changed | None = None
) -> DeviceProfile:
    """Time variants of several widths, as many as the budget allows, and fit the device profile."""
    analysis, block = bench.analysis, measure.block(bench.setup)
    candidates, last_first = _candidates(analysis, block.width, around), -np.arange(analysis.coupling.units, dtype=float)
    total = SECONDS_HEAVY if analysis.size().macs > HEAVY else SECONDS_EASY
    kept: list[IntArray] = []
    timings: list[measure.Timing] = []
    longest, start = 0.0, time.perf_counter()
    with progress("timing layers", len(candidates)) as advance:
        while len(kept) < len(candidates):
            spent = time.perf_counter() - start
            if len(kept) >= FEWEST and spent + longest > budget:
                break
            removals = [of_widths(analysis.coupling, last_first, row.tolist()) for row in candidates[len(kept) : len(kept) + TOGETHER]]
            models = [cut(analysis.prepared, analysis.coupling, flags) if flags.any() else analysis.prepared.model for flags in removals]
            models = [changed(model) for model in models] if changed else models
            wall = max(0.0, budget - spent) * len(models) / (len(candidates) - len(kept))
            timings += bench.time(models, len(models) / len(candidates) * total, wall)
            kept += [kept_of(analysis, removed) for removed in removals]
            longest = max(longest, time.perf_counter() - start - spent)
            advance(len(models))
    terms = terms_of(analysis)
    work = terms.per_owner(terms.lengths(np.stack(kept)), len(analysis.prepared.nodes), block.width, block.slow)
    fitted = measure.fit(work, timings, bench, block)
    return replace(fitted, cut_short=budget if len(kept) < len(candidates) else 0.0)


def kept_of(analysis: Analysis, removed: BoolArray) -> IntArray:
    """How many units each group keeps."""
    return np.asarray([int((~removed[group.units]).sum()) for group in analysis.coupling.groups], np.int64)


def _candidates(analysis: Analysis, block: int, around: IntArray | None = None) -> list[IntArray]:
    """Kept units per group: all, the fewest (or ``around``), and random widths on the staircase (seeded); with ``around``, every other
    one has widths at most one step away from it."""
    coupling, align = analysis.coupling, Align(block, min(block, measure.FINE), block)
    offers = [
        np.asarray(choices(group.width, steps_of(coupling, group, align), 1, group.name in coupling.branches)) for group in coupling.groups
    ]
    random = np.random.default_rng(0)

    def drawn(choices_of: Sequence[IntArray]) -> IntArray:
        return np.asarray([random.choice(choice) for choice in choices_of], np.int64)

    rows = [np.asarray([offer[at] for offer in offers], np.int64) for at in (0, -1)]
    rows += [drawn(offers) for _ in range(FITTED + CHECKED - 2)]
    if around is not None:
        rows[1] = around
        beside = [offer[np.argsort(np.abs(offer - at), kind="stable")[:3]] for offer, at in zip(offers, around, strict=True)]
        rows[3::2] = [drawn(beside) for _ in rows[3::2]]
    return rows if coupling.groups else rows[:1]


def read_device_profile(path: str | Path, sha256: str | None = None) -> DeviceProfile:
    """Read a device profile from a JSON file.

    Raises:
        ProfileError: no such file, not JSON, damaged, or made for another model.
    """
    try:
        if Path(path).suffix == ".npz":  # what a plan library holds
            return from_json(read_library(path).profile, sha256)
        return from_json(json.loads(Path(path).read_text()), sha256)
    except (OSError, ValueError, RecursionError) as error:
        raise ProfileError(f"{path}: cannot read the device profile: {error}") from error
    except ProfileError as error:
        raise ProfileError(f"{path}: {error}") from error


def seconds_of_nodes(analysis: Analysis, device_profile: DeviceProfile) -> list[tuple[str, float]]:
    """Predicted seconds of every mixing layer's node in the original, largest first. What is fused behind a layer counts with it."""
    clock = clock_of(analysis, device_profile)
    seconds = clock.terms.values(clock.terms.full, clock.block.width, clock.block.slow) * clock.costs
    rows = zip(names_of(analysis), np.bincount(clock.terms.owner, seconds, len(analysis.prepared.nodes)).tolist(), strict=True)
    return sorted(rows, key=lambda row: -row[1])


# ---- where the time of a model goes ----------------------------------------------------------------------------------

LAYER_SECONDS = 2.0  # of running, about


@dataclass(frozen=True)
class LayerTimes:
    """Milliseconds of every mixing layer in network order, and of all other kernels together (last), before and after.

    From onnxruntime's own records of its kernels, less the cost of recording, so that each column adds up to a whole run. What
    onnxruntime fuses into a layer counts with it. ``timing`` says how they were timed.
    """

    names: tuple[str, ...]
    before: FloatArray
    after: FloatArray
    timing: str


def layer_times(
    analysis: Analysis, model: graph.Model, setup: Setup | None = None, batch: int = 1, progress: Progress = silent
) -> LayerTimes | None:
    """Time both models' kernels, interleaved; None if the second has other tensors than the first, or one does not run so."""
    nodes = analysis.prepared.nodes
    tensors = graph.GraphIndex(graph.nodes(model)).makers.keys()
    layers = [layer.node for layer in analysis.coupling.layers]
    if not layers or not tensors & {layer.outputs[0] for layer in layers}:
        return None
    try:
        with progress("timing layers", 1) as advance:
            setup = setup or Setup()
            bench = measure.Bench(analysis, setup, batch)
            timings = bench.time([analysis.prepared.model, model], LAYER_SECONDS)
            advance(1)
    except SfpError:
        return None  # a report can do without
    indices = [layer.index for layer in layers]
    mixing = np.isin(np.arange(len(nodes)), indices)
    before, after = (_column(timing, measure.classes(nodes, [timing], mixing), indices) for timing in timings)
    return LayerTimes((*(layer.name for layer in layers), "all else"), before, after, Latency(setup, batch).words(analysis))


def _column(timing: measure.Timing, classes: Sequence[int], layers: Sequence[int]) -> FloatArray:
    """Milliseconds per layer and of the rest. overhead = (sum of all records - a run without recording) / number of kernels.

    ``classes`` are those of nodes that share a kernel; several layers in one of them share its time.
    """
    overhead = measure.overhead_of([timing])
    net = np.maximum(timing.nodes - overhead * timing.kernels, 0.0)
    sums = np.bincount(classes, net, minlength=len(net))
    owners = np.asarray(classes)[layers]
    times = np.where(timing.there[layers], sums[owners], 0.0) / np.bincount(owners, minlength=len(net))[owners]
    column: FloatArray = 1e3 * np.append(times, max(net.sum() - times.sum(), 0.0))
    return column
