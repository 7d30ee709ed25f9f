"""Half precision, integers, onnxruntime's format: in this order, each measured and checked before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np

from .. import graph, runtime
from ..answers import is_classifier
from ..data import Dataset
from ..errors import OptionError, VerificationError
from ..evaluate import Answers, add
from ..graph import Model
from ..packaging import QUANTIZERS, OrtFile, halved, ort_file, quantized
from ..records import Array
from ..runtime import Session
from .analysis import Analysis

CALIBRATED = 512  # samples that ranges are taken from
REPEATS = 30
# Largest relative error (root mean square) to what the step started from; integers are judged by the user, by the table.
TOLERANCES = {"half": 1e-2, "ort": 1e-2}


@dataclass(frozen=True)
class PackagingOptions:
    """Which forms are wanted: ``half`` weights, ``quantize`` ("int8" or None), onnxruntime's format ``ort``."""

    half: bool = False
    quantize: str | None = None
    ort: bool = False

    @property
    def given(self) -> bool:
        """Whether anything is to be done."""
        return self.half or self.quantize is not None or self.ort


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

    @property
    def figures(self) -> list[dict[str, Any]]:
        """For the manifest."""
        return [asdict(step) for step in self.steps]


def package(
    analysis: Analysis, pruned: Model, options: PackagingOptions, data: Dataset | None = None, judge: Dataset | None = None
) -> Packaged:
    """Make the wanted forms of a pruned model and measure them.

    Args:
        data: calibration data, for the ranges of static quantisation (without them it is dynamic).
        judge: data to measure on (default: ``data``, else the random inputs of the analysis).

    Raises:
        OptionError: unknown quantiser, or no weights to halve. ModelError: onnxruntime cannot make a form.
        VerificationError: a form is not finite or too far from what it was made of.
    """
    if options.quantize not in (None, *QUANTIZERS):
        raise OptionError(f"unknown quantiser '{options.quantize}'. Known: {', '.join(QUANTIZERS)}")
    models = {"original": analysis.model, "pruned": pruned}
    plain, last, notes = pruned, pruned, []
    if options.half:
        last, plain, said = halved(pruned)
        models["half"] = last
        notes.append(said)
    if options.quantize:
        last = models[options.quantize] = quantized(plain, None if data is None else _feeds(data))
        ranges = "dynamic, without data" if data is None else f"static, ranges from {min(data.samples, CALIBRATED)} calibration samples"
        rounded = "; made from the weights rounded to float16" if options.half else ""
        notes.append(f"int8: {ranges}{rounded}. Processors without VNNI or an equivalent may saturate: measure there")
    made = ort_file(last) if options.ort else None
    if made and options.half and not options.quantize:
        notes.append("ort: onnxruntime folds constants when it converts, so the weights in the .ort file are float32 again (rounded)")
    sessions = [runtime.open_session(graph.serialized(own), own.weights, own.name) for own in models.values()]
    sizes = [graph.file_bytes(own) for own in models.values()]
    names = list(models)
    if made:
        sessions.append(runtime.open_session(made.data, {}, "the .ort file"))
        sizes.append(len(made.data))
        names.append("ort")
    used = judge or data
    steps = _measured(analysis, list(zip(names, sizes, strict=True)), sessions, used)
    where = f"{used.samples} {'held-out' if judge else 'calibration'} samples" if used else "random inputs (no data given)"
    notes.append(f"measured on {where}; agreement and error are to the pruned float model, latency to the original")
    return Packaged(last, made, steps, tuple(notes))


def _feeds(data: Dataset) -> Iterator[Mapping[str, Array]]:
    """Whole batches of at most `CALIBRATED` samples."""
    batches = islice(data.batches(), max(1, -(-CALIBRATED // data.batch)))
    return (feeds for feeds, _ in batches)


def _measured(
    analysis: Analysis, forms: Sequence[tuple[str, int]], sessions: Sequence[Session], data: Dataset | None
) -> tuple[Step, ...]:
    batches: Iterable[tuple[Mapping[str, Array], int]]
    batches = data.batches() if data else [(analysis.prepared.feeds, analysis.samples)]
    labels = data.labels if data else None
    names = [port.name for port in graph.outputs(analysis.model)]
    answers, parents = [Answers() for _ in forms], [Answers() for _ in forms]
    first: Mapping[str, Array] = {}
    start, classifier = 0, False
    for feeds, count in batches:
        found = [session.run(feeds, names) for session in sessions]
        if not first:
            first, classifier = feeds, is_classifier(found[0][0][:count], count)
        own_labels = None if labels is None else labels[start : start + count]
        rows = len(next(iter(feeds.values())))
        for index, result in enumerate(found):
            add(answers[index], result, found[1], own_labels, count, rows)
            add(parents[index], result, found[max(index - 1, 0)], None, count, rows)
        start += count
    for (name, _), parent in zip(forms[2:], parents[2:], strict=True):
        _check(name, _error(parent))
    times = [min(own) * 1e3 for own in runtime.latencies(sessions, first, REPEATS)]
    return tuple(
        Step(
            name, size, own.samples, own.right / own.samples if classifier and labels is not None else None,
            own.agree / own.samples if classifier else None, _error(own), time, time / times[0],
        )
        for (name, size), own, time in zip(forms, answers, times, strict=True)
    )  # fmt: skip


def _error(answers: Answers) -> float | None:
    return float(np.sqrt(answers.squared_error / answers.squared_reference)) if answers.squared_reference else None


def _check(name: str, error: float | None) -> None:
    """Refuse a form that is not finite or too far from what it was made of."""
    allowed = TOLERANCES.get(name, float("inf"))
    if error is not None and not (np.isfinite(error) and error <= allowed):
        raise VerificationError(
            f"step '{name}': relative error {error:.3g} to the model that it was made from, allowed {allowed:g}. Nothing was written. "
            f"Leave this step out."
        )
