"""Figures of a model after a removal, predicted and measured; and widths chosen so that bounds on them hold."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import graph
from ..core.errors import ModelError, OptionError
from ..core.types import Array, BoolArray, FloatArray, Node
from ..coupling.analysis import Analysis
from ..graph import GraphIndex, Model, inputs, serialized
from ..graph.extract import conv_chain, named_by_output
from ..planning.work import Kind
from ..runtime import Session, Setup, full_provider, interleaved, kernel_times, open_timed, steady_clock, version
from . import Block, DeviceProfile, nonnegative_fit

REPEATS, MOST_REPEATS, TIMING_SECONDS = 50, 600, 3.0


def latencies_of(models: Sequence[Model], analysis: Analysis, setup: Setup, batch: int) -> list[float]:
    """Seconds of each model, as minima of interleaved runs (at least 50); processor time with one thread, else wall time."""
    feeds, clock = timing_feeds(analysis, batch), steady_clock(setup)
    sessions = [open_timed(serialized(own), own.weights, own.name, setup) for own in models]
    first = interleaved(sessions, [feeds] * len(sessions), 3, clock)
    repeats = int(np.clip(TIMING_SECONDS / max(sum(map(min, first)), 1e-6), REPEATS, MOST_REPEATS))
    return [min(own) for own in interleaved(sessions, [feeds] * len(sessions), repeats, clock)]


def latency_ratio(analysis: Analysis, model: Model, setup: Setup, batch: int) -> float:
    """Latency of a model over that of the original, measured together."""
    original, other = latencies_of([analysis.model, model], analysis, setup, batch)
    return other / original


# ---- the latency model of the machine it runs on ---------------------------------------------------------------------

CACHE_VARIABLE = "SFP_ONNX_CACHE"
CACHE_VERSION = 1
WIDEST = 64
PROBES = (64, 63, 62, 60, 56, 52, 48, 32)
FINE = 4  # below one block, every so many channels count; other widths leave the blocked layout
LEAST_RUNS, FEWEST_RUNS, MOST_RUNS = 5, 10, 150  # of each variant: without any time left, and otherwise
FLAT = 0.93  # a width costs as much as a wider one from this ratio of times on


# ---- which machine ---------------------------------------------------------------------------------------------------


def device(setup: Setup) -> dict[str, Any]:
    """What a measurement depends on, besides the model."""
    provider = full_provider(setup.provider)
    return {"cpu": cpu_name(), "onnxruntime": version(), "threads": setup.threads, "provider": provider}


def cpu_name() -> str:
    """Name of the CPU, with what tells apart machines that give it the same name."""
    found = platform.processor() or platform.machine()
    try:
        if sys.platform.startswith("linux"):
            fields = _cpu_fields(Path("/proc/cpuinfo").read_text())
            flags = (fields.get("flags") or fields.get("Features", "")).split()
            known = [fields[key] for key in ("model name", "CPU implementer", "CPU part", "cpu family", "model") if key in fields]
            found = " ".join([*known, *(flag for flag in ("avx512f", "avx2", "asimd", "sve") if flag in flags)]) or found
        elif sys.platform == "darwin":
            asked = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            found = subprocess.run(asked, capture_output=True, text=True).stdout.strip() or found
    except (OSError, ValueError):
        pass
    return f"{found} ({platform.machine()}, {os.cpu_count()} cores)"


def _cpu_fields(text: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), value.strip())
    return fields


# ---- cache -----------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """The user's cache folder for this program; the environment variable SFP_ONNX_CACHE overrides it."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE])
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "sfp_onnx"


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
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w") as stream:
            json.dump({"cache_version": CACHE_VERSION, "key": dict(key), "value": value}, stream)
        os.replace(temporary, path)
    except OSError:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


# ---- the block -------------------------------------------------------------------------------------------------------


def block(setup: Setup) -> Block:
    """The channel block of onnxruntime's convolutions on this machine, measured (about a second) or from the cache."""
    key = {"what": "block", **device(setup)}
    held = read_cache("block", key)
    if isinstance(held, dict) and set(held) == {"width", "slow", "curve"} and held["width"] in (1, 4, 8, 16, 32):
        return Block(int(held["width"]), float(held["slow"]), held["curve"])
    found = judge(_probe(setup))
    write_cache("block", key, asdict(found))
    return found


def _probe(setup: Setup) -> dict[int, float]:
    """Seconds of a chain of convolutions per width."""
    chains = [(width, conv_chain(width)) for width in PROBES]
    sessions = [open_timed(serialized(model), model.weights, "probe", setup) for _, model in chains]
    feeds = [{"x": np.ones((1, width, 14, 14), np.float32)} for width, _ in chains]
    times = interleaved(sessions, feeds, 40, steady_clock(setup))
    return {width: min(own) for (width, _), own in zip(chains, times, strict=True)}


def judge(seconds: Mapping[int, float]) -> Block:
    """The block from times per width: the first step down from the widest, if widths that are no multiple of 4 or the lower half of a
    block cost as much as a whole one."""
    ratio = {width: own / seconds[WIDEST] for width, own in seconds.items()}
    curve = {str(width): round(ratio[width], 4) for width in sorted(ratio, reverse=True)}
    slow = max(1.0, ratio[63], ratio[62])
    if ratio[32] >= FLAT:
        return Block(1, 1.0, curve)  # no step at all: time does not depend on channels here
    steps = [width for width in (60, 56, 48) if ratio[width] < FLAT]
    width = WIDEST - steps[0] if steps else 32
    return Block(4 if width == 4 and slow > 1.03 else 1 if width == 4 else width, round(slow, 4), curve)


# ---- kernels ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A model with some channels cut and the work (nodes, kinds) of each node of the original in it."""

    model: Model
    work: FloatArray


@dataclass(frozen=True)
class Timing:
    """What one variant took: seconds per node (0 for nodes without a kernel of their own), kernels per node, which nodes of the original
    are still ``there``, and the whole."""

    nodes: FloatArray
    kernels: FloatArray
    there: BoolArray
    whole: float


def time_variants(
    variants: Sequence[Variant], nodes: Sequence[Node], feeds: Mapping[str, Array], setup: Setup, seconds: float, wall: float = np.inf
) -> list[Timing]:
    """Time the kernels of a few variants, and the variants as a whole, interleaved, in about ``seconds`` by the clock that times (and
    ``wall`` of wall time, if so many runs as are needed at the least fit in)."""
    plain: list[Session] = []
    recorded: list[Session] = []
    for variant in variants:
        model = named_by_output(variant.model)
        for sessions, events in ((plain, False), (recorded, True)):
            sessions.append(open_timed(serialized(model), model.weights, variant.model.name, setup, events))
    both = [*plain, *recorded]
    clock = steady_clock(setup)
    start = time.perf_counter()
    warm = interleaved(both, [feeds] * len(both), 2, clock)
    each = (time.perf_counter() - start) / 3
    repeats = int(np.clip(seconds / max(sum(min(own) for own in warm), 1e-6), FEWEST_RUNS, MOST_RUNS))
    repeats = int(np.clip(wall / each, LEAST_RUNS, repeats))
    times = interleaved(both, [feeds] * len(both), repeats, clock)
    runs = 3 + 1 + repeats  # interleaved() warms up once per call
    owners = {name: node.index for name, node in GraphIndex(nodes).makers.items()}
    found = []
    for index, (session, variant) in enumerate(zip(recorded, variants, strict=True)):
        made = GraphIndex(graph.nodes(variant.model)).makers.keys()
        own = kernel_times(session)
        seconds_of, kernels = np.zeros(len(nodes)), np.zeros(len(nodes))
        current = 0
        for name, every in own.items():
            current = _owner(name, owners, current)
            count = max(1, round(len(every) / runs))
            seconds_of[current] += _typical(every) * count
            kernels[current] += count
        there = np.asarray([bool(made & set(node.outputs)) for node in nodes])
        found.append(Timing(seconds_of, kernels, there, min(times[index])))
    return found


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
    parent = list(range(len(nodes)))

    def root(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    index = GraphIndex(nodes)
    for timing in timings:
        served = timing.kernels > 0
        for node in nodes:
            if served[node.index] or not timing.there[node.index]:
                continue
            sources = () if mixing[node.index] else node.inputs
            makers = (maker.index for maker in map(index.maker, sources) if maker is not None)
            before = max((maker for maker in makers if served[maker]), default=None)
            served[node.index] = before is not None
            readers = (reader.index for name in node.outputs for reader, _ in index.operands(name)[:1])
            other = before if before is not None else next(readers, None)
            if other is not None:
                first, second = sorted((root(node.index), root(other)))
                parent[second] = first
    return [root(index) for index in range(len(nodes))]


def fit(
    variants: Sequence[Variant], timings: Sequence[Timing], nodes: Sequence[Node], known: tuple[str, int], measured: tuple[Setup, Block]
) -> DeviceProfile:
    """Costs per node from timed variants; the first is the original, the last fifth is kept to check.

    For each class of nodes, seconds = constant + sum over kinds of cost * work, with costs >= 0 (least squares).

    Args:
        known: the model's SHA-256 and the batch size.
        measured: how the variants were run, and the block.
    """
    checked = len(timings) // 5
    used = len(timings) - checked
    overhead = float(np.median([(own.nodes.sum() - own.whole) / max(own.kernels.sum(), 1) for own in timings]))
    class_of = np.asarray(classes(nodes, timings, variants[0].work[:, Kind.MACS] > 0))
    costs, constant = np.zeros((len(nodes), len(Kind))), 0.0
    for members in (np.flatnonzero(class_of == own) for own in np.unique(class_of)):
        seconds = np.asarray([(own.nodes[members] - overhead * own.kernels[members]).sum() for own in timings[:used]])
        work = np.stack([own.work[members].sum(0) for own in variants[:used]])
        moving = np.ptp(work, axis=0) > 0
        found = nonnegative_fit(np.column_stack([np.ones(used), np.where(moving, work, 0)]), seconds)
        costs[members] = found[1:]
        constant += found[0]
    predicted = np.asarray([constant + (own.work * costs).sum() for own in variants])
    whole = np.asarray([own.whole for own in timings])
    if not (predicted[:used] > 0).all():
        raise ModelError("internal error: the latency model predicts no time at all. Please report it.")
    factor = float(np.median(whole[:used] / predicted[:used]))  # a mean would follow the variant in which all branches vanish
    errors = np.abs(factor * predicted[used:] / whole[used:] - 1)
    names = [next(filter(None, node.outputs), node.name) for node in nodes]
    return DeviceProfile(
        device=device(measured[0]), model_sha256=known[0], batch=known[1], seconds=float(whole[0]), block=measured[1],
        constant=factor * constant, nodes={name: tuple((factor * row).tolist()) for name, row in zip(names, costs, strict=True)},
        factor=factor, error=float(errors.mean()) if checked else 0.0, checked=checked,
    )  # fmt: skip


# ---- measure what a model's nodes cost on this machine ---------------------------------------------------------------

def timing_feeds(analysis: Analysis, batch: int) -> dict[str, Array]:
    """Inputs to time with: the traced ones, with another batch size where the model leaves it open.

    Raises:
        OptionError: the model's batch size is fixed to another number.
    """
    feeds = {}
    for port in inputs(analysis.model):
        array = analysis.prepared.feeds[port.name]
        if array.ndim and port.shape is not None and port.shape and array.shape[0] == analysis.samples:
            if isinstance(port.shape[0], int):
                if batch != array.shape[0] and batch != 1:
                    raise OptionError(f"--batch {batch}: input '{port.name}' has the fixed batch size {array.shape[0]}")
            else:
                array = np.ascontiguousarray(np.resize(array, (batch, *array.shape[1:])))
        feeds[port.name] = array
    return feeds
