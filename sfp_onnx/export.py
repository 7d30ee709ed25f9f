"""A finished model in the forms that small devices take: half-precision weights, 8-bit integers, onnxruntime's own format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .core import system
from .core.errors import OptionError, VerificationError
from .core.options import MeasureOptions, OutputOptions
from .core.types import Array
from .coupling.analysis import Analysis
from .data.dataset import Dataset
from .evaluation import tally
from .evaluation.meaning import read
from .graph import Model, outputs
from .graph.load import load
from .graph.save import atomic, check_output, file_bytes, half_weights, save, to_proto, writing
from .runtime import Batches, Session, latencies, open_model, open_ort, quantize, save_ort


@dataclass(frozen=True)
class OrtFile:
    """A model in onnxruntime's format, and the operators and types that a reduced build of onnxruntime needs for it.

    Unlike everything else here, ``data`` may differ from run to run: onnxruntime writes some of its tables in an order left to chance.
    """

    data: bytes
    operators: str

    def save(self, path: Path, inputs: Iterable[Path] = ()) -> tuple[Path, Path]:
        """Write ``path`` and, beside it, its configuration of operators, atomically.

        Raises:
            OutputError: a path cannot be written.
        """
        paths = (path, operators_path(path))
        for file in paths:
            check_output(file, inputs)
        with writing(path), atomic(*paths) as streams:
            for stream, content in zip(streams, (self.data, self.operators.encode()), strict=True):
                stream.write(content)
        return paths


def operators_path(path: Path) -> Path:
    """Where the configuration of operators goes, by onnxruntime's convention."""
    return path.with_suffix(".required_operators_and_types.config")


def written_by(options: OutputOptions) -> tuple[Path, ...]:
    """The files that ``save_ort`` writes."""
    return () if options.save_ort is None else (Path(options.save_ort), operators_path(Path(options.save_ort)))


def halved(model: Model) -> tuple[Model, Model, str]:
    """The model with float16 weights, the same with the rounded weights as float32, and what to tell the user.

    Raises:
        OptionError: no weight can be stored so.
    """
    small, rounded, left = half_weights(model)
    if len(small.weights) == len(left) or small.proto == model.proto:
        raise OptionError("--half: the model has no float32 weights of more than 1 KiB that float16 can hold")
    words = f"; {len(left)} weights are too large for float16 and stay float32" if left else ""
    return small, rounded, f"half: weights are stored as float16 and computed with as float32{words}"


def quantized(model: Model, batches: Iterable[Mapping[str, Array]] | None) -> Model:
    """The model on 8-bit integers: static (QuantizeLinear/DequantizeLinear, ranges from ``batches``) or, without data, dynamic.

    Raises:
        ModelError: onnxruntime cannot quantise it.
    """
    with system.temporary("the quantised model") as folder:
        source, target = folder / "float.onnx", folder / "int8.onnx"
        save(replace(model, source=None, files=()), source)
        quantize(source, target, batches, model.name)
        converted = load(target)
        weights = {name: array.copy() for name, array in converted.weights.items()}  # the files go
    return replace(converted, weights=weights, source=model.source, files=model.files, edited=True)


def ort_file(model: Model) -> OrtFile:
    """The model in onnxruntime's format, optimised for any processor.

    Raises:
        ModelError: over 2 GB, or onnxruntime cannot convert it.
    """
    proto = to_proto(model)
    with system.temporary("the .ort file") as folder:
        path = folder / "model.ort"
        operators = save_ort(proto.SerializeToString(deterministic=True), path, model.name)
        return OrtFile(path.read_bytes(), operators)


# ---- all forms, one after the other ----------------------------------------------------------------------------------

CALIBRATED = 512  # samples that ranges are taken from
REPEATS = 30
# Largest relative error (root mean square) to what the step started from; integers are judged by the user, by the table.
TOLERANCES = {"half": 1e-2, "ort": 1e-2}


@dataclass(frozen=True)
class Step:
    """One form of the model. ``agreement`` and ``relative_error`` are to the pruned model, ``latency_ratio`` to the original, from
    minima of interleaved runs."""

    name: str
    bytes: int
    samples: int
    top1: float | None
    agreement: float | None
    relative_error: float | None
    latency_ms: float
    latency_ratio: float


@dataclass(frozen=True)
class Packaged:
    """The last ONNX form of the model, its form for onnxruntime (if asked for), and what every step gave."""

    model: Model
    ort: OrtFile | None
    steps: tuple[Step, ...]
    notes: tuple[str, ...]


def package(
    analysis: Analysis, pruned: Model, options: OutputOptions, data: Dataset | None, judge: Dataset | None = None,
    how: MeasureOptions = MeasureOptions(),
) -> Packaged:  # fmt: skip
    """Make the wanted forms of a pruned model and measure them.

    Args:
        data: calibration data, for the ranges of static quantisation (without them it is dynamic).
        judge: data to measure on (default: ``data``, else the random inputs of the analysis).
        how: what the outputs mean.

    Raises:
        OptionError: unknown quantiser, or no weights to halve. ModelError: onnxruntime cannot make a form.
        VerificationError: a form is not finite or too far from what it was made of.
    """
    models = {"original": analysis.model, "pruned": pruned}
    plain, last, notes = pruned, pruned, []
    if options.half:
        last, plain, words = halved(pruned)
        models["half"] = last
        notes.append(words)
    if options.quantize:
        batches = None if data is None else (feeds for feeds, _ in data.part(np.arange(min(CALIBRATED, data.samples))).batches())
        last = models[options.quantize] = quantized(plain, batches)
        ranges = "dynamic, without data" if data is None else f"static, ranges from {min(data.samples, CALIBRATED)} calibration samples"
        rounded = "; made from the weights rounded to float16" if options.half else ""
        notes.append(f"int8: {ranges}{rounded}. Processors without VNNI or an equivalent may saturate: measure there")
    ort = ort_file(last) if options.save_ort is not None else None
    if ort and options.half and not options.quantize:
        notes.append("ort: onnxruntime folds constants when it converts, so the weights in the .ort file are float32 again (rounded)")
    sizes = {name: file_bytes(model) for name, model in models.items()}
    sessions = {name: open_model(model) for name, model in models.items()}
    if ort:
        sizes["ort"], sessions["ort"] = len(ort.data), open_ort(ort.data, "the .ort file")
    used = judge or data
    steps = _measured(analysis, sizes, list(sessions.values()), used, how)
    where = f"{used.samples} {'held-out' if judge else 'calibration'} samples" if used else "random inputs (no data given)"
    notes.append(f"measured on {where}; agreement and error are to the pruned float model, latency to the original")
    return Packaged(last, ort, steps, tuple(notes))


def _measured(
    analysis: Analysis, sizes: Mapping[str, int], sessions: Sequence[Session], data: Dataset | None, how: MeasureOptions
) -> tuple[Step, ...]:
    """Every form, of the named bytes, against the pruned model (the second) and against the one that it was made of (the one before).

    Raises:
        VerificationError: a form is not finite or too far from what it was made of.
    """
    batches: Batches = data.batches() if data else [(analysis.prepared.feeds, analysis.samples)]
    labels, names = data.labels if data else None, [port.name for port in outputs(analysis.model)]
    numbers = range(len(sessions))
    pairs = [*((number, 1) for number in numbers), *((number, max(number - 1, 0)) for number in numbers)]
    answers, first = tally(sessions, names, batches, labels, pairs, lambda batch: read(analysis.model, batch, labels, how))
    for name, sums in [*zip(sizes, answers[len(sizes) :], strict=True)][2:]:
        error, allowed = sums.relative_error, TOLERANCES.get(name, float("inf"))
        if error is not None and not (np.isfinite(error) and error <= allowed):
            far = f"relative error {error:.3g} to the model that it was made from, allowed {allowed:g}"
            raise VerificationError(f"step '{name}': {far}. Nothing was written. Leave this step out.")
    times = [min(seconds) * 1e3 for seconds in latencies(sessions, first, REPEATS)]
    steps = []
    for (name, size), sums, time in zip(sizes.items(), answers[: len(sizes)], times, strict=True):
        shares = sums.shares
        figures = (shares["top1"], shares["agreement"], sums.relative_error, time, time / times[0])
        steps.append(Step(name, size, sums.samples, *figures))
    return tuple(steps)
