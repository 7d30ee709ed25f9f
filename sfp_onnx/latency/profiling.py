"""Measure what a model's nodes cost on this machine, in variants of the model with other widths."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .. import graph
from ..core.errors import ProfileError, SfpError
from ..core.types import Array, BoolArray, FloatArray, IntArray
from ..coupling.analysis import Analysis, Progress, silent
from ..coupling.cost import emptied
from ..cut import cut
from ..graph import GraphIndex, Model
from ..planning.solver import choices
from ..planning.widths import Grid, steps_of
from ..planning.work import node_terms
from ..runtime import Setup
from . import Clock, DeviceProfile, clock, from_json, measure, to_json
from .measure import FINE, Timing, Variant, device, fit, read_cache, time_variants, timing_feeds, write_cache

FITTED, CHECKED = 12, 3
HEAVY = 3e8  # multiply-accumulates
TOGETHER = 4  # variants that are open at once
SECONDS = 24.0  # of running, at most
EASY_SECONDS = 6.0
BUDGET = 60.0  # of wall time for everything
FEWEST = 8  # variants that are timed whatever the budget


def names_of(analysis: Analysis) -> list[str]:
    """First output of every node, by which profiles know it."""
    return [next(filter(None, node.outputs), node.name) for node in analysis.prepared.nodes]


def clock_of(analysis: Analysis, profile: DeviceProfile) -> Clock:
    """A predictor of seconds for an analysed model.

    Raises:
        ProfileError: the profile belongs to another model.
    """
    terms = node_terms(analysis.coupling, analysis.prepared.nodes, analysis.prepared.trace)
    return clock(profile, terms, names_of(analysis))


def measure_profile(
    analysis: Analysis, setup: Setup, batch: int = 1, progress: Progress = silent, fresh: bool = False, budget: float = BUDGET
) -> DeviceProfile:
    """The profile of a model on this machine, measured or from the user's cache.

    Args:
        budget: seconds of wall time; where they do not suffice, fewer widths are timed, and less often. A profile in the cache that
            another budget cut short counts if that was no smaller.

    Raises:
        OptionError: unknown provider or batch size. ModelError: onnxruntime cannot run the model so.
    """
    feeds = timing_feeds(analysis, batch)
    shapes = {name: list(array.shape) for name, array in feeds.items()}
    key = {"what": "profile", "model": analysis.model.sha256, "shapes": shapes, **device(setup)}
    held = None if fresh else read_cache("profile", key)
    if held is not None:
        try:
            known = from_json(held, analysis.model.sha256)
            if not 0 < known.cut_short < budget:
                return known
        except ProfileError:
            pass  # measured again below
    candidates = _candidates(analysis, measure.block(setup).width)
    found = _measure(analysis, (setup, batch), feeds, candidates, budget, progress)
    write_cache("profile", key, to_json(found))
    return found


def profile_around(analysis: Analysis, setup: Setup, batch: int, kept: IntArray) -> DeviceProfile:
    """A profile that is most exact near ``kept`` units per group: half of the models that are timed have widths beside these.

    Raises:
        As `measure_profile`.
    """
    candidates = _candidates(analysis, measure.block(setup).width, kept)
    return _measure(analysis, (setup, batch), timing_feeds(analysis, batch), candidates, BUDGET, silent)


def _measure(
    analysis: Analysis, how: tuple[Setup, int], feeds: Mapping[str, Array], candidates: Sequence[IntArray], budget: float,
    progress: Progress,
) -> DeviceProfile:  # fmt: skip
    """Time variants with these kept units per group (the first: all), as many as the budget allows, and fit the profile."""
    setup, batch = how
    block, nodes = measure.block(setup), analysis.prepared.nodes
    terms = node_terms(analysis.coupling, nodes, analysis.prepared.trace)
    kept: list[IntArray] = []
    timings: list[Timing] = []
    longest, start = 0.0, time.perf_counter()
    with progress("timing layers", len(candidates)) as advance:
        while len(kept) < len(candidates):
            spent = time.perf_counter() - start
            if len(kept) >= FEWEST and spent + longest > budget:
                break
            own = [_variant(analysis, row) for row in candidates[len(kept) : len(kept) + TOGETHER]]
            share = len(own) / len(candidates)
            seconds = share * (SECONDS if analysis.size().macs > HEAVY else EASY_SECONDS)
            wall = max(0.0, budget - spent) * len(own) / (len(candidates) - len(kept))
            models = [Variant(model, np.zeros((0, 0))) for model, _ in own]
            timings += time_variants(models, nodes, feeds, setup, seconds, wall)
            kept += [row for _, row in own]
            longest = max(longest, time.perf_counter() - start - spent)
            advance(len(own))
    work = terms.per_owner(terms.lengths(np.stack(kept)), len(nodes), block.width, block.slow)
    variants = [Variant(analysis.prepared.model, rows) for rows in work]
    found = fit(variants, timings, nodes, (analysis.model.sha256, batch), (setup, block))
    return replace(found, cut_short=budget if len(kept) < len(candidates) else 0.0)


def _candidates(analysis: Analysis, block: int, around: IntArray | None = None) -> list[IntArray]:
    """Kept units per group: all, the fewest (or ``around``), and random widths on the staircase (seeded); with ``around``, every other
    one has widths at most one step away from it."""
    groups = analysis.coupling.groups
    vanish = [group.name in analysis.coupling.branches for group in groups]
    grid = Grid(block, min(block, FINE), block)
    offered = [choices(group.width, steps_of(analysis.coupling, group, grid), 1, own) for group, own in zip(groups, vanish, strict=True)]
    full = np.asarray([group.width for group in groups], np.int64)
    random = np.random.default_rng(0)
    rows = [full, np.asarray([own[-1] for own in offered], np.int64)]
    rows += [np.asarray([random.choice(own) for own in offered], np.int64) for _ in range(FITTED + CHECKED - 2)]
    if around is not None:
        rows[1] = around
        arrays = [np.asarray(own) for own in offered]
        beside = [own[np.argsort(np.abs(own - at), kind="stable")[:3]] for own, at in zip(arrays, around, strict=True)]
        rows[3::2] = [np.asarray([random.choice(own) for own in beside], np.int64) for _ in rows[3::2]]
    return rows if len(groups) else [full]


def removal_of_widths(analysis: Analysis, kept: IntArray) -> BoolArray:
    """Flags of the last units of every group, so that ``kept`` units stay (one more where a tensor would be emptied)."""
    removed = np.zeros(analysis.coupling.units, bool)
    for group, count in zip(analysis.coupling.groups, kept, strict=True):
        removed[group.units[int(count) :]] = True
    for _, units in emptied(analysis.coupling, removed):
        removed[units[0]] = False
    return removed


def _variant(analysis: Analysis, kept: IntArray) -> tuple[Model, IntArray]:
    """The model with these widths, and the widths that it really has."""
    removed = removal_of_widths(analysis, kept)
    real = np.asarray([int((~removed[group.units]).sum()) for group in analysis.coupling.groups], np.int64)
    model = cut(analysis.prepared, analysis.coupling, removed) if removed.any() else analysis.prepared.model
    return model, real


def read_profile(path: str | Path, sha256: str | None = None) -> DeviceProfile:
    """Read a profile from a JSON file.

    Raises:
        ProfileError: no such file, not JSON, damaged, or made for another model.
    """
    try:
        return from_json(json.loads(Path(path).read_text()), sha256)
    except (OSError, ValueError, RecursionError) as error:
        raise ProfileError(f"{path}: cannot read the device profile: {error}") from error
    except ProfileError as error:
        raise ProfileError(f"{path}: {error}") from error


def profile_rows(analysis: Analysis, profile: DeviceProfile) -> list[tuple[str, float]]:
    """Predicted seconds of every mixing layer's node in the original, largest first. What is fused behind a layer counts with it."""
    terms = node_terms(analysis.coupling, analysis.prepared.nodes, analysis.prepared.trace)
    full = np.asarray([group.width for group in analysis.coupling.groups], np.int64)
    work = terms.per_owner(terms.lengths(full), len(analysis.prepared.nodes), profile.block.width, profile.block.slow)
    names = names_of(analysis)
    rows = [(name, float(np.dot(own, profile.nodes.get(name, (0.0,) * own.size)))) for name, own in zip(names, work, strict=True)]
    return sorted(rows, key=lambda row: -row[1])


# ---- where the time of a model goes ----------------------------------------------------------------------------------

LAYER_SECONDS = 2.0  # of running, about
NOTHING = np.zeros((0, 0))


@dataclass(frozen=True)
class LayerTimes:
    """Milliseconds of every mixing layer in network order, and of all other kernels together (last), before and after.

    From onnxruntime's own records of its kernels, less the cost of recording, so that each column adds up to a whole run. What
    onnxruntime fuses into a layer counts with it. ``batch`` is the number of samples in a run.
    """

    names: tuple[str, ...]
    before: FloatArray
    after: FloatArray
    batch: int


def layer_times(
    analysis: Analysis, model: Model, setup: Setup | None = None, batch: int = 1, progress: Progress = silent
) -> LayerTimes | None:
    """Time both models' kernels, interleaved; None if the second has other tensors than the first, or one does not run so."""
    nodes = analysis.prepared.nodes
    made = GraphIndex(graph.nodes(model)).makers.keys()
    layers = [layer.node for layer in analysis.coupling.layers]
    if not layers or not made & {layer.outputs[0] for layer in layers}:
        return None
    models = [analysis.prepared.model, model]
    try:
        with progress("timing layers", 1) as advance:
            feeds = timing_feeds(analysis, batch)
            found = time_variants([Variant(own, NOTHING) for own in models], nodes, feeds, setup or Setup(), LAYER_SECONDS)
            advance(1)
    except SfpError:
        return None  # a report can do without
    indices = [layer.index for layer in layers]
    mixing = np.isin(np.arange(len(nodes)), indices)
    before, after = (_column(own, measure.classes(nodes, [own], mixing), indices) for own in found)
    samples = next((array.shape[0] for array in feeds.values() if array.ndim), 1)
    return LayerTimes((*(layer.name for layer in layers), "all else"), before, after, samples)


def _column(timing: Timing, classes: Sequence[int], layers: Sequence[int]) -> FloatArray:
    """Milliseconds per layer and of the rest. overhead = (sum of all records - a run without recording) / number of kernels.

    ``classes`` are those of nodes that share a kernel; several layers in one of them share its time.
    """
    overhead = (timing.nodes.sum() - timing.whole) / max(timing.kernels.sum(), 1.0)
    net = np.maximum(timing.nodes - overhead * timing.kernels, 0.0)
    sums = np.bincount(classes, net, minlength=len(net))
    owners = np.asarray(classes)[list(layers)]
    own = np.where(timing.there[list(layers)], sums[owners], 0.0) / np.bincount(owners, minlength=len(net))[owners]
    column: FloatArray = 1e3 * np.append(own, max(net.sum() - own.sum(), 0.0))
    return column
