"""What this machine is, and how long models and their nodes take on it."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .. import graph
from ..core.errors import ModelError, OutputError
from ..core.types import Array, BoolArray, FloatArray, IntArray, Node
from ..coupling.analysis import Analysis
from ..graph import extract, save
from ..planning.figures import Kind
from ..runtime import Job, Setup, device_of, full_provider, interleaved, kernel_times, open_timed, steady_clock, version
from ..runtime.on_board import cpu_name
from . import Block, DeviceProfile, nonnegative_fit
from .timing import latencies_of as latencies_of, timing_feeds


def latency_ratio(analysis: Analysis, model: graph.Model, setup: Setup, batch: int) -> float:
    """Latency of a model over that of the original, measured together."""
    original, other = latencies_of([analysis.model, model], analysis, setup, batch)
    return other / original


# ---- the latency model of the machine it runs on ---------------------------------------------------------------------

CACHE_VARIABLE, CACHE_VERSION = "SFP_ONNX_CACHE", 1
WIDEST = 64
PROBES = (64, 63, 62, 60, 56, 52, 48, 32)
FINE = 4  # below one block, every so many channels count; other widths leave the blocked layout
LEAST_RUNS, FEWEST_RUNS, MOST_RUNS = 5, 10, 150  # of each variant: without any time left, and otherwise
FLAT = 0.93  # a width costs as much as a wider one from this ratio of times on


# ---- which machine ---------------------------------------------------------------------------------------------------


def device(setup: Setup) -> dict[str, Any]:
    """What a measurement depends on, besides the model."""
    if setup.board is not None:
        return device_of(setup.board, setup.threads, setup.provider)
    return {"cpu": cpu_name(), "onnxruntime": version(), "threads": setup.threads, "provider": full_provider(setup.provider)}


# ---- cache -----------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """The user's cache folder for this program; the environment variable SFP_ONNX_CACHE overrides it."""
    home = Path.home()
    bases = {"win32": os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local", "darwin": home / "Library" / "Caches"}
    base = bases.get(sys.platform) or os.environ.get("XDG_CACHE_HOME") or home / ".cache"
    return Path(os.environ.get(CACHE_VARIABLE) or Path(base) / "sfp_onnx")


def _cache_file(kind: str, key: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return cache_folder() / f"{kind}-{digest}.json"


def read_cache(kind: str, key: Mapping[str, Any]) -> Any:
    """What was stored under a key; None if there is nothing, or nothing that can be read."""
    try:
        data = json.loads(_cache_file(kind, key).read_text())
        return data["value"] if data["cache_version"] == CACHE_VERSION and data["key"] == dict(key) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def write_cache(kind: str, key: Mapping[str, Any], value: Any) -> None:
    """Store a value atomically; a folder that cannot be written is no error, since the cache only saves time."""
    path = _cache_file(kind, key)
    with suppress(OSError, OutputError):
        path.parent.mkdir(parents=True, exist_ok=True)
        save.write_text(path, json.dumps({"cache_version": CACHE_VERSION, "key": dict(key), "value": value}))


# ---- the block -------------------------------------------------------------------------------------------------------


def block(setup: Setup) -> Block:
    """The channel block of onnxruntime's convolutions on this machine, measured (about a second) or from the cache."""
    key = {"what": "block", **device(setup)}
    held = read_cache("block", key)
    if isinstance(held, dict) and set(held) == {"width", "slow", "curve"} and held["width"] in (1, 4, 8, 16, 32):
        return Block(int(held["width"]), float(held["slow"]), held["curve"])
    measured = judge(_probe(setup))
    write_cache("block", key, asdict(measured))
    return measured


def _probe(setup: Setup) -> dict[int, float]:
    """Seconds of a chain of convolutions per width."""
    chains = [(width, extract.conv_chain(width)) for width in PROBES]
    feeds = [{"x": np.ones((1, width, 14, 14), np.float32)} for width, _ in chains]
    times: Sequence[Sequence[float]]
    if setup.board is not None:
        times = setup.board.time([model for _, model in chains], feeds, setup.threads, setup.provider, Job(1.0, 40, 40)).seconds
    else:
        times = interleaved([open_timed(model, setup) for _, model in chains], feeds, 40, steady_clock(setup))
    return {width: min(seconds) for (width, _), seconds in zip(chains, times, strict=True)}


def judge(seconds: Mapping[int, float]) -> Block:
    """The block from times per width: the first step down from the widest, if widths that are no multiple of 4 or the lower half of a
    block cost as much as a whole one."""
    ratio = {width: value / seconds[WIDEST] for width, value in seconds.items()}
    curve = {str(width): round(ratio[width], 4) for width in sorted(ratio, reverse=True)}
    slow = max(1.0, ratio[63], ratio[62])
    if ratio[32] >= FLAT:
        return Block(1, 1.0, curve)  # no step at all: time does not depend on channels here
    steps = [width for width in (60, 56, 48) if ratio[width] < FLAT]
    width = WIDEST - steps[0] if steps else 32
    return Block(4 if width == 4 and slow > 1.03 else 1 if width == 4 else width, round(slow, 4), curve)


# ---- kernels ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """What one variant took: seconds per node (0 for nodes without a kernel of their own), kernels per node, which nodes of the original
    are still ``there``, and the whole."""

    nodes: FloatArray
    kernels: FloatArray
    there: BoolArray
    whole: float


@dataclass(frozen=True)
class Bench:
    """A model whose variants are timed, and how."""

    analysis: Analysis
    setup: Setup
    batch: int

    @cached_property
    def feeds(self) -> dict[str, Array]:
        """What the variants are run on."""
        return timing_feeds(self.analysis, self.batch)

    def time(self, variants: Sequence[graph.Model], seconds: float, wall: float = np.inf) -> list[Timing]:
        """Time the kernels of a few variants, and the variants as a whole, interleaved, in about ``seconds`` by the clock that times (and
        ``wall`` of wall time, if so many runs as are needed at the least fit in)."""
        named = [extract.named_by_output(model) for model in variants]
        if self.setup.board is not None:
            job = Job(seconds, FEWEST_RUNS, MOST_RUNS, 2, None if np.isinf(wall) else wall, LEAST_RUNS, True)
            timed = self.setup.board.time(named, [self.feeds] * len(named), self.setup.threads, self.setup.provider, job)
            rows = zip(variants, timed.kernels, map(min, timed.seconds), strict=True)
            return [self._timing(*row, timed.runs) for row in rows]
        plain, recorded = ([open_timed(model, self.setup, events) for model in named] for events in (False, True))
        sessions, clock = [*plain, *recorded], steady_clock(self.setup)
        feeds, start = [self.feeds] * len(sessions), time.perf_counter()
        warm = interleaved(sessions, feeds, 2, clock)
        each = (time.perf_counter() - start) / 3
        repeats = int(np.clip(seconds / max(sum(map(min, warm)), 1e-6), FEWEST_RUNS, MOST_RUNS))
        repeats = int(np.clip(wall / each, LEAST_RUNS, repeats))
        times = interleaved(sessions, feeds, repeats, clock)
        runs = 3 + 1 + repeats  # interleaved() warms up once per call
        kernels = [kernel_times(session) for session in recorded]
        return [self._timing(*row, runs) for row in zip(variants, kernels, map(min, times), strict=False)]

    def _timing(self, model: graph.Model, kernels_of: Mapping[str, Sequence[float]], whole: float, runs: int) -> Timing:
        """Times of kernels, by name in the order in which they ran, given to the nodes of the original."""
        nodes = self.analysis.prepared.nodes
        owners = {name: node.index for name, node in graph.GraphIndex(nodes).makers.items()}
        tensors = graph.GraphIndex(graph.nodes(model)).makers.keys()
        seconds, kernels, current = np.zeros(len(nodes)), np.zeros(len(nodes)), 0
        for name, every in kernels_of.items():
            current = _owner(name, owners, current)
            count = max(1, round(len(every) / runs))
            seconds[current] += _typical(every) * count
            kernels[current] += count
        return Timing(seconds, kernels, np.asarray([bool(tensors & set(node.outputs)) for node in nodes]), whole)


def _owner(kernel: str, owners: Mapping[str, int], previous: int) -> int:
    """The node that a kernel belongs to: named after the node or what it makes, with endings; conversions go to the kernel before."""
    for end in range(len(kernel), 0, -1):
        if kernel[:end] in owners and (end == len(kernel) or kernel[end] in "_/"):
            return owners[kernel[:end]]
    return previous


def _typical(times: Sequence[float]) -> float:
    """Mean without outliers: records are whole microseconds, so that a minimum would lose the fractions."""
    values = np.asarray(times)
    least = np.quantile(values, 0.1)
    return float(values[values <= least * 1.1 + 1.5e-6].mean())


def classes(nodes: Sequence[Node], timings: Sequence[Timing], mixing: BoolArray) -> list[int]:
    """Class of every node: nodes that share a kernel in any variant.

    A node without a kernel goes with what it reads, if that has a kernel (a convolution named after itself, with what is fused behind
    it), else with the first that reads it (one that is named after the last tensor of what is fused). Nodes that multiply (``mixing``)
    are never fused behind others.
    """
    class_of = np.arange(len(nodes))
    for timing in timings:
        for pair in _without_kernel(nodes, timing, mixing):
            first, second = np.sort(class_of[list(pair)])
            class_of[class_of == second] = first
    return list(class_of.tolist())


def _without_kernel(nodes: Sequence[Node], timing: Timing, mixing: BoolArray) -> Iterator[tuple[int, int]]:
    """Nodes without a kernel of their own, each with the node that it goes with (see `classes`)."""
    maker = {name: node.index for node in nodes for name in node.outputs}
    reader = {name: node.index for node in reversed(nodes) for name in node.inputs}  # the first
    served = timing.kernels > 0
    for node in nodes:
        if served[node.index] or not timing.there[node.index]:
            continue
        sources = () if mixing[node.index] else node.inputs
        before = max((maker[name] for name in sources if name in maker and served[maker[name]]), default=None)
        served[node.index] = before is not None
        other = before if before is not None else next((reader[name] for name in node.outputs if name in reader), None)
        if other is not None:
            yield node.index, other


def fit(work: FloatArray, timings: Sequence[Timing], bench: Bench, block: Block) -> DeviceProfile:
    """Costs per node from timed variants; the first is the original, the last fifth is kept to check.

    Args:
        work: (variants, nodes, kinds) of each node of the original in every variant.
        block: that of the machine, in which ``work`` is counted.
    """
    nodes, checked = bench.analysis.prepared.nodes, len(timings) // 5
    used = len(timings) - checked
    class_of = np.asarray(classes(nodes, timings, work[0, :, Kind.MACS] > 0))
    costs = _costs(work[:used], timings[:used], class_of, overhead_of(timings))
    constant, whole = costs[:, 0].sum(), np.asarray([timing.whole for timing in timings])
    predicted = np.asarray([constant + (rows * costs[:, 1:]).sum() for rows in work])
    if not (predicted[:used] > 0).all():
        raise ModelError("internal error: the latency model predicts no time at all. Please report it.")
    factor = float(np.median(whole[:used] / predicted[:used]))  # a mean would follow the variant in which all branches vanish
    errors = np.abs(factor * predicted[used:] / whole[used:] - 1)
    return DeviceProfile(
        device=device(bench.setup), model_sha256=bench.analysis.model.sha256, batch=bench.batch, seconds=float(whole[0]), block=block,
        constant=float(factor * constant),
        nodes={name_of(node): tuple((factor * row[1:]).tolist()) for node, row in zip(nodes, costs, strict=True)},
        factor=factor, error=float(errors.mean()) if checked else 0.0, checked=checked,
    )  # fmt: skip


def name_of(node: Node) -> str:
    """The first output of a node, by which device profiles know it."""
    return next(filter(None, node.outputs), node.name)


def overhead_of(timings: Sequence[Timing]) -> float:
    """Seconds that recording costs per kernel."""
    return float(np.median([(timing.nodes.sum() - timing.whole) / max(timing.kernels.sum(), 1) for timing in timings]))


def _costs(work: FloatArray, timings: Sequence[Timing], class_of: IntArray, overhead: float) -> FloatArray:
    """Seconds (nodes, 1 + kinds) of each node in any case (of a class, at its first node), and per unit of work. For each class,

    seconds = constant + sum over kinds of cost * work, with costs >= 0 (least squares).
    """
    costs = np.zeros((len(class_of), 1 + len(Kind)))
    for members in (np.flatnonzero(class_of == index) for index in np.unique(class_of)):
        seconds = np.asarray([(timing.nodes[members] - overhead * timing.kernels[members]).sum() for timing in timings])
        summed = work[:, members].sum(1)
        moving = np.where(np.ptp(summed, axis=0) > 0, summed, 0)
        fitted = nonnegative_fit(np.column_stack([np.ones(len(timings)), moving]), seconds)
        costs[members, 1:], costs[members[0], 0] = fitted[1:], fitted[0]
    return costs
