"""Measure what a model's nodes cost on this machine, in variants of the model with other widths."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from .. import device as devices
from .. import graph, latency
from ..allocate import choices
from ..cut import cut
from ..device import Clock, DeviceProfile
from ..errors import OptionError, ProfileError
from ..latency import FINE, Variant
from ..plan import Grid, steps_of
from ..records import Array, BoolArray, IntArray
from ..runtime import Setup
from ..units import emptied
from ..work import node_terms
from .analysis import Analysis, Progress, silent

FITTED, CHECKED = 12, 3
HEAVY = 3e8  # multiply-accumulates
TOGETHER = 4  # variants that are open at once
SECONDS = 24.0  # of running, at most
EASY_SECONDS = 6.0
BUDGET = 60.0  # of wall time for everything
FEWEST = 8  # variants that are timed whatever the budget


def timing_feeds(analysis: Analysis, batch: int) -> dict[str, Array]:
    """Inputs to time with: the traced ones, with another batch size where the model leaves it open.

    Raises:
        OptionError: the model's batch size is fixed to another number.
    """
    feeds = {}
    for port in graph.inputs(analysis.model):
        array = analysis.prepared.feeds[port.name]
        if array.ndim and port.shape is not None and port.shape and array.shape[0] == analysis.samples:
            if isinstance(port.shape[0], int):
                if batch != array.shape[0] and batch != 1:
                    raise OptionError(f"--batch {batch}: input '{port.name}' has the fixed batch size {array.shape[0]}")
            else:
                array = np.ascontiguousarray(np.resize(array, (batch, *array.shape[1:])))
        feeds[port.name] = array
    return feeds


def names_of(analysis: Analysis) -> list[str]:
    """First output of every node, by which profiles know it."""
    return [next(filter(None, node.outputs), node.name) for node in analysis.prepared.nodes]


def clock_of(analysis: Analysis, profile: DeviceProfile) -> Clock:
    """A predictor of seconds for an analysed model.

    Raises:
        ProfileError: the profile belongs to another model.
    """
    terms = node_terms(analysis.coupling, analysis.prepared.nodes, analysis.prepared.trace)
    return devices.clock(profile, terms, names_of(analysis))


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
    key = {"what": "profile", "model": analysis.model.sha256, "shapes": shapes, **latency.device(setup)}
    held = None if fresh else latency.read_cache("profile", key)
    if held is not None:
        try:
            known = devices.from_json(held, analysis.model.sha256)
            if not 0 < known.cut_short < budget:
                return known
        except ProfileError:
            pass  # measured again below
    candidates = _candidates(analysis, latency.block(setup).width)
    found = _measure(analysis, (setup, batch), feeds, candidates, budget, progress)
    latency.write_cache("profile", key, devices.to_json(found))
    return found


def profile_around(analysis: Analysis, setup: Setup, batch: int, kept: IntArray) -> DeviceProfile:
    """A profile that is most exact near ``kept`` units per group: half of the models that are timed have widths beside these.

    Raises:
        As `measure_profile`.
    """
    candidates = _candidates(analysis, latency.block(setup).width, kept)
    return _measure(analysis, (setup, batch), timing_feeds(analysis, batch), candidates, BUDGET, silent)


def _measure(
    analysis: Analysis, how: tuple[Setup, int], feeds: Mapping[str, Array], candidates: Sequence[IntArray], budget: float,
    progress: Progress,
) -> DeviceProfile:  # fmt: skip
    """Time variants with these kept units per group (the first: all), as many as the budget allows, and fit the profile."""
    setup, batch = how
    block, nodes = latency.block(setup), analysis.prepared.nodes
    terms = node_terms(analysis.coupling, nodes, analysis.prepared.trace)
    kept: list[IntArray] = []
    timings: list[latency.Timing] = []
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
            timings += latency.time_variants(models, nodes, feeds, setup, seconds, wall)
            kept += [row for _, row in own]
            longest = max(longest, time.perf_counter() - start - spent)
            advance(len(own))
    work = terms.per_owner(terms.lengths(np.stack(kept)), len(nodes), block.width, block.slow)
    variants = [Variant(analysis.prepared.model, rows) for rows in work]
    found = latency.fit(variants, timings, nodes, (analysis.model.sha256, batch), (setup, block))
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


def _variant(analysis: Analysis, kept: IntArray) -> tuple[graph.Model, IntArray]:
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
        return devices.from_json(json.loads(Path(path).read_text()), sha256)
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

