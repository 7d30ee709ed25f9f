"""The only door to onnxruntime: open sessions, run them, time them; quantise models, and write its own format."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cache, partial, wraps
from inspect import signature
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, TypeVar, cast
from unittest.mock import patch

import numpy as np

from .. import graph
from ..core.errors import ModelError, OptionError, SfpError
from ..core.system import folder, is_full, no_room, numpy_threads, temporary
from ..core.types import Array
from ..graph import extract
from ..graph.save import PROTOBUF_LIMIT, full_size, save
from . import on_board
from .boards import Board as Board, Job as Job, device_of as device_of

Feeds = Mapping[str, Array]
PROVIDERS = ("CPUExecutionProvider",)
Clock = Callable[[], float]


@cache
def _ort() -> Any:
    """onnxruntime, loaded when it is first needed: it starts a thread, which the fork of the program would lose."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    return onnxruntime


@dataclass(frozen=True)
class Setup:
    """How models are run to be timed. ``threads`` 0: all cores; ``provider`` as onnxruntime calls it, with or without its ending;
    ``board``: where (None: here)."""

    threads: int = 0
    provider: str = PROVIDERS[0]
    board: Board | None = None

    @staticmethod
    def of(options: Any) -> Setup:
        """As the options of a plan say."""
        return Setup(options.threads, options.provider, Board.of(vars(options)))

    def words(self, batch: int) -> str:
        """For people: ``batch 1, 2 threads``."""
        count = _threads(self.threads)
        threads = "all threads" if not count else "1 thread" if count == 1 else f"{count} threads"
        name = full_provider(self.provider)
        return f"batch {batch}, {threads}{'' if name in PROVIDERS else ', ' + name}"


@dataclass(frozen=True)
class Session:
    """An open onnxruntime session. ``name`` is what messages call the model; ``fed``: weights that it takes with every run; ``held``: those
    that it reads where they lie, which must stay there as long."""

    handle: Any
    name: str
    fed: Mapping[str, Any] = field(default_factory=dict)
    held: Mapping[str, Any] = field(default_factory=dict)

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> list[Any]:
        """Run once.

        Raises:
            ModelError: onnxruntime's words.
        """
        if outputs is not None and not outputs:
            return []  # onnxruntime takes an empty list for all outputs
        try:
            return list(self.handle.run(None if outputs is None else list(outputs), {**self.fed, **feeds}))
        except Exception as error:  # onnxruntime's exception classes share no base but Exception
            raise ModelError(f"{self.name}: onnxruntime cannot run the model: {_words(error)}") from error


def _words(error: Exception) -> str:
    """onnxruntime's message without its prefix of codes and source locations, on one line."""
    text = " ".join(str(error).split())
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ", "", text)
    text = re.sub(r"/\S*onnxruntime\S*\.(cc|h):\d+ .*?\) (?=[A-Z])", "", text)
    return text[:600]


class Optimize(Enum):
    """How much onnxruntime rewrites the graph: nothing (its plain meaning), constant folding and the like, what makes 8-bit products exact
    (on processors without VNNI pairs of them saturate otherwise), or all."""

    NONE = "ORT_DISABLE_ALL"
    BASIC = "ORT_ENABLE_BASIC"
    EXACT_INTEGERS = "ORT_ENABLE_EXTENDED"
    ALL = "ORT_ENABLE_ALL"


def open_model(model: graph.Model, optimize: Optimize = Optimize.ALL, threads: int = 0) -> Session:
    """A session on a model. Large weights are handed over from memory, as far as onnxruntime takes them so.

    Raises:
        ModelError: onnxruntime cannot load the model (unknown operator, no kernel for a type, ...).
    """
    options = _options(threads)
    options.graph_optimization_level = getattr(_ort().GraphOptimizationLevel, optimize.value)
    options.enable_mem_pattern = False  # planning memory makes the first two runs slow, and most sessions here live for a few runs
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # numpy's threads take turns with onnxruntime's
    if optimize is Optimize.NONE:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if optimize is Optimize.EXACT_INTEGERS:
        options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        fed = _fed(model) if optimize in (Optimize.NONE, Optimize.BASIC) else {}  # for few runs, and no kernels of their own for constants
        return _open(model, options, PROVIDERS, fed)
    except ModelError:
        if optimize is not Optimize.ALL:
            raise
    return open_model(model, Optimize.BASIC, threads)  # some of its rewrites fail on what it runs without them


_THREADS: ContextVar[int] = ContextVar("sfp_onnx.threads", default=0)
"""Threads of every session that is not told otherwise; 0: all cores."""


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Keep to so many threads inside, onnxruntime and numpy (0: as before)."""
    before = _THREADS.set(count or _THREADS.get())
    try:
        with numpy_threads(count) if count else nullcontext():
            yield
    finally:
        _THREADS.reset(before)


Stage = TypeVar("Stage", bound=Callable[..., Any])


def threaded(stage: Stage) -> Stage:
    """A stage that keeps, as a whole, to the ``threads`` of its options or arguments."""
    names = signature(stage)

    @wraps(stage)
    def kept(*arguments: Any, **named: Any) -> Any:
        given = names.bind_partial(*arguments, **named).arguments
        records = (getattr(given.get(name), "threads", 0) for name in ("options", "latency"))
        with using_threads(given.get("threads") or next(filter(None, records), 0)):
            return stage(*arguments, **named)

    return cast(Stage, kept)


def cores() -> int:
    """How many this program may use; 0 where the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0


def _threads(threads: int) -> int:
    """All cores for 0, where the system tells how many this program may use."""
    return threads or _THREADS.get() or cores()


def _options(threads: int) -> Any:
    options = _ort().SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = _threads(threads)
    options.inter_op_num_threads = 1
    return options


FED_BYTES = 1 << 16


def _fed(model: graph.Model) -> dict[str, Array]:
    """Large weights that only nodes of ONNX's own operators read, and which can be inputs of the graph as well: onnxruntime copies what it
    is given as constants, and reads inputs where they are."""
    ends = {port.name for port in (*graph.inputs(model), *graph.outputs(model))}
    foreign = {name for node in model.proto.graph.node if node.domain not in graph.ONNX_DOMAINS for name in node.input}
    large = {name: array for name, array in graph.handed_over(model).items() if array.nbytes >= FED_BYTES}
    return {name: array for name, array in large.items() if name not in ends and name not in foreign}


def _open(model: graph.Model, options: Any, providers: Sequence[str], fed: Mapping[str, Array] = MappingProxyType({})) -> Session:
    """A session; of the weights, those of ``fed`` become inputs."""
    model = graph.seeded(model)
    for library in model.libraries:
        _register(options, library)
    if fed:
        model = graph.without_weights(model, fed)
    weights = graph.handed_over(model)
    if full_size(model) - sum(array.nbytes for array in weights.values()) > PROTOBUF_LIMIT:
        with temporary("the model's weights") as place:
            path = save(replace(model, source=None, files=()), place / "model.onnx", external=True)
            return replace(_loaded(str(path), model.name, options, providers), fed=_held(fed))
    held = _held(weights)
    if held:
        options.add_external_initializers(list(held), list(held.values()))
    session = _loaded(graph.filled(model, weights).SerializeToString(), model.name, options, providers)
    return replace(session, fed=_held(fed), held=held)


def _held(weights: Mapping[str, Array]) -> dict[str, Any]:
    """Weights as onnxruntime's values, which share the memory of the arrays."""
    return {name: _ort().OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for name, array in weights.items()}


def _register(options: Any, library: str) -> None:
    try:
        options.register_custom_ops_library(library)
    except Exception as error:  # onnxruntime's exception classes share no base but Exception
        expected = "Expected a shared library that exports RegisterCustomOps, built for this onnxruntime"
        raise OptionError(f"--custom-ops {library}: onnxruntime cannot load it: {_words(error)}. {expected} ({version()}).") from error


def tensor_types(model: graph.Model) -> dict[str, Any]:
    """Dtype of every tensor (None for sequences, maps and optionals). onnxruntime is asked where onnx's inference does not know."""
    types = graph.tensor_types(model)
    unknown = [name for node in graph.nodes(model) for name in node.outputs if name and name not in types]
    if unknown:
        with suppress(ModelError):  # who runs the model says so
            session = open_model(extract.segment(model, [], dict.fromkeys(unknown)), Optimize.NONE)
            types |= {item.name: graph.dtype_called(item.type) for item in session.handle.get_outputs()}
    return types


def _loaded(source: str | bytes, name: str, options: Any, providers: Sequence[str] = PROVIDERS) -> Session:
    try:
        return Session(_ort().InferenceSession(source, options, providers=list(providers)), name)
    except Exception as error:  # onnxruntime's exception classes share no base but Exception
        raise ModelError(f"{name}: onnxruntime cannot load the model: {_words(error)}") from error


def open_ort(data: bytes, name: str, setup: Setup = Setup()) -> Session:
    """A session on a model in onnxruntime's own format.

    Raises:
        ModelError: onnxruntime cannot load it.
    """
    return _loaded(data, name, _options(setup.threads))


def full_provider(name: str) -> str:
    """onnxruntime's name of an execution provider that is available here: ``cpu`` and ``CPUExecutionProvider`` mean the same.

    Raises:
        OptionError: there is none of that name.
    """
    ending = "executionprovider"
    known: dict[str, str] = {provider.lower().removesuffix(ending): provider for provider in _ort().get_available_providers()}
    full = known.get(name.lower().removesuffix(ending))
    if full is None:
        raise OptionError(f"provider '{name}' is not in this onnxruntime {version()}. Available: {', '.join(sorted(known))}")
    return full


def open_timed(model: graph.Model, setup: Setup, events: bool = False) -> Session:
    """Open a session as an application would (onnxruntime's defaults) in order to time it; ``events``: record the time of each kernel.

    Raises:
        OptionError: unknown provider. ModelError: onnxruntime cannot load the model.
    """
    provider = full_provider(setup.provider)
    options = _options(setup.threads)
    if events:
        options.enable_profiling = True
        options.profile_file_prefix = str(folder() / f"events_{time.monotonic_ns()}")
    return _open(model, options, list(dict.fromkeys((provider, *PROVIDERS))))


def kernel_times(session: Session) -> dict[str, list[float]]:
    """Seconds of every run of each kernel, by kernel name in the order of execution, of a session that was opened with ``events``.

    Closes the recording. A kernel that runs several times per run has that many more entries.
    """
    path = Path(session.handle.end_profiling())
    try:
        return on_board.kernels_in(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise no_room("onnxruntime's recording of kernels", error) from error
    finally:
        path.unlink(missing_ok=True)


def steady_clock(setup: Setup) -> Clock:
    """What to time with: see `on_board.clock_of`."""
    return on_board.clock_of(setup.threads, full_provider(setup.provider) == PROVIDERS[0])


def interleaved(sessions: Sequence[Session], feeds: Sequence[Feeds], repeats: int, clock: Clock = time.perf_counter) -> list[list[float]]:
    """Seconds of ``repeats`` runs of each session on inputs of its own: see `on_board.interleaved`."""
    return on_board.interleaved([partial(session.run, own) for session, own in zip(sessions, feeds, strict=True)], repeats, clock)


def version() -> str:
    """onnxruntime's version."""
    return str(_ort().__version__)


def providers() -> list[str]:
    """Execution providers of this onnxruntime."""
    return list(map(str, _ort().get_available_providers()))


# ---- other forms of a model ------------------------------------------------------------------------------------------


@cache
def saturates() -> bool:
    """Whether 8-bit products are wrong on this processor: without VNNI or an equivalent onnxruntime sums pairs of them in 16 bits."""
    x = np.full((1, 64), 255, np.uint8)
    product, = open_model(extract.integer_product(x.size), threads=1).run({"x": x}, ["y"])
    return bool(product.item() != 255 * 127 * x.size)


def quantize(source: Path, target: Path, batches: Iterable[Mapping[str, Array]] | None, name: str, **facts: Any) -> None:
    """Quantise a model file to 8-bit integers with onnxruntime's own tool: static with data, else dynamic.

    Weights are signed, one scale per output channel (static: of 7 bits where products of 8 `saturates`); activations unsigned, from their
    least to their largest value on the data. ``facts`` say otherwise: ``per_channel``, ``nodes_to_quantize`` or ``nodes_to_exclude``
    (lists of names), ``ranges`` (least and largest value of each tensor; nothing is run then).

    Raises:
        ModelError: the tool cannot do it.
    """
    try:
        with _quiet():
            _quantize(source, target, batches, {"per_channel": True, **facts})
    except SfpError:
        raise
    except Exception as error:  # the tool raises whatever it meets
        if is_full(error):
            raise no_room("the quantised model", error) from error
        raise ModelError(f"{name}: onnxruntime's quantiser cannot handle the model: {type(error).__name__}: {_words(error)}") from error


def _quantize(source: Path, target: Path, batches: Iterable[Feeds] | None, facts: Mapping[str, Any]) -> None:
    from onnxruntime import quantization as tool  # imports slowly, and is seldom needed
    from onnxruntime.quantization import quant_utils

    if "ranges" in facts:
        with patch.object(sys.modules[tool.quantize_static.__module__], "create_calibrator", _calibrated(tool, facts["ranges"])):
            return _run_tool(tool, source, target, (), {name: fact for name, fact in facts.items() if name != "ranges"})

    class Kept(_ort().SessionOptions):  # type: ignore[misc]
        """Options of the sessions that the tool opens, which takes none from its callers."""

        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads = _threads(0)

    with patch.object(_ort(), "SessionOptions", Kept), patch.object(quant_utils, "SessionOptions", Kept):
        _run_tool(tool, source, target, batches, facts)


def _calibrated(tool: Any, ranges: Mapping[str, Array]) -> Callable[..., Any]:
    """In place of what makes the tool's calibrator: one that knows the ranges."""
    known = {name: tuple(np.asarray(value, np.float32)) for name, value in ranges.items()}
    calibrator = SimpleNamespace(
        collect_data=lambda reader: None, compute_data=lambda: tool.calibrate.TensorsData(tool.CalibrationMethod.MinMax, dict(known))
    )
    return lambda *given, **named: calibrator


def _run_tool(tool: Any, source: Path, target: Path, batches: Iterable[Feeds] | None, facts: Mapping[str, Any]) -> None:
    if batches is None:
        tool.quantize_dynamic(source, target, weight_type=tool.QuantType.QUInt8, **facts)
        return
    given = iter(batches)

    class Reader(tool.CalibrationDataReader):  # type: ignore[misc]
        """The batches, as the tool wants them."""

        def get_next(self) -> Mapping[str, Array] | None:
            """The next batch, or None."""
            return next(given, None)

    kinds = {"activation_type": tool.QuantType.QUInt8, "weight_type": tool.QuantType.QInt8, "reduce_range": saturates()}
    tool.quantize_static(source, target, Reader(), quant_format=tool.QuantFormat.QDQ, **kinds, **facts)


@contextmanager
def _quiet() -> Iterator[None]:
    """onnxruntime's tools log to, and set up, the root logger; here it stays as the application has it. They leave files open, too,
    and put whole models into the temporary folder, here one that is removed however the program ends."""
    temporary, root = tempfile.tempdir, logging.getLogger()
    handlers, level, disabled = list(root.handlers), root.level, root.manager.disable
    logging.disable(logging.CRITICAL)
    tempfile.tempdir = str(folder())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            yield
            gc.collect()
    finally:
        tempfile.tempdir = temporary
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)


def save_ort(serialized: bytes, path: Path, name: str, libraries: Sequence[str] = ()) -> str:
    """Write a model in onnxruntime's format. Returns its required operators and types, as reduced builds of onnxruntime take them.

    Raises:
        ModelError: onnxruntime cannot convert it.
    """
    options = _options(1)
    options.graph_optimization_level = _ort().GraphOptimizationLevel.ORT_ENABLE_EXTENDED  # layouts would tie it to this processor
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.save_model_format", "ORT")
    for library in libraries:
        _register(options, library)
    _loaded(serialized, name, options)
    listed = path.with_suffix(".config")
    try:
        with _quiet():
            from onnxruntime.tools.ort_format_model import create_config_from_models

            create_config_from_models([path], listed, True)
    except Exception as error:  # the tool raises whatever it meets
        raise ModelError(f"{name}: cannot list the operators of the .ort file: {type(error).__name__}: {_words(error)}") from error
    lines = listed.read_text().splitlines()
    return "\n".join(line for line in lines if not line.startswith("#")) + "\n"  # comments name a temporary path


# ---- run models over batches -----------------------------------------------------------------------------------------


class Batch(tuple[Feeds, int]):
    """Inputs for one run, and how many samples they hold; ``padding`` rows to a fixed batch are behind those."""

    padding: int = 0

    @classmethod
    def padded(cls, feeds: Feeds, count: int, padding: int) -> Batch:
        """A batch with rows of padding."""
        batch = cls((feeds, count))
        batch.padding = padding
        return batch


Batches = Iterable[tuple[Feeds, int]]
"""Inputs, and how many samples they hold: pairs, and those with padding as `Batch`."""


@dataclass(frozen=True)
class Observed:
    """One batch: its inputs, what a model gave by name of the tensor, its ``count`` samples, of which ``first`` is the number
    of the first, and the rows of ``padding`` behind them."""

    feeds: Feeds
    values: Mapping[str, Array]
    first: int
    count: int
    padding: int = 0

    @property
    def rows(self) -> int:
        """Samples and padding."""
        return self.count + self.padding

    @property
    def outputs(self) -> list[Array]:
        """All values, in the order in which they were asked for."""
        return list(self.values.values())

    def samples(self, name: str) -> Array:
        """A value without the rows that are padding."""
        value = self.values[name]
        return value[: self.count] if self.padding and np.ndim(value) and len(value) == self.rows else value

    def own(self, labels: Array | None) -> Array | None:
        """Of labels of all samples those of this batch."""
        return None if labels is None else labels[self.first : self.first + self.count]


def observe(model: graph.Model, batches: Batches, outputs: Sequence[str] | None = None) -> Iterator[Observed]:
    """Run a model over batches; ``outputs``: what is wanted of it (default: all of its outputs).

    Raises:
        ModelError: onnxruntime cannot run it.
    """
    names = [port.name for port in graph.outputs(model)] if outputs is None else outputs
    return (observed for (observed,) in side_by_side([open_model(model)], batches, names))


def side_by_side(sessions: Sequence[Session], batches: Batches, outputs: Sequence[str]) -> Iterator[list[Observed]]:
    """Run several models over the same batches: for every batch what each of them gives for ``outputs``.

    Raises:
        ModelError: onnxruntime cannot run one of them.
    """
    first = 0
    for batch in batches:
        (feeds, count), padding = batch, getattr(batch, "padding", 0)
        results = (session.run(feeds, outputs) for session in sessions)
        yield [Observed(feeds, dict(zip(outputs, values, strict=True)), first, count, padding) for values in results]
        first += count


def unpadded(batches: Iterable[Feeds]) -> Iterator[tuple[Feeds, int]]:
    """Batches of which every row is a sample."""
    for feeds in batches:
        yield feeds, next((len(array) for array in feeds.values() if array.ndim), 0)
