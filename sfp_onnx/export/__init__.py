"""A finished model in the forms that small devices take: half-precision weights, 8-bit integers, onnxruntime's own format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..core import system
from ..core.errors import OptionError, VerificationError
from ..core.options import MeasureOptions, OutputOptions
from ..core.types import IntArray, Node
from ..coupling.analysis import Analysis
from ..data.dataset import Dataset
from ..evaluation import tally
from ..evaluation.meaning import read
from ..graph import GraphIndex, Model, graphs, initializers, nodes, outputs, vocabulary
from ..graph.edit import with_full_weights, without_dead
from ..graph.save import atomic, check_output, file_bytes, half_weights, to_proto, writing
from ..latency.timing import AS_DEFAULT, Latency
from ..rules.scales import on_integers
from ..runtime import Batches, Session, open_ort, open_timed, save_ort
from .integers import Feeding, nearest, quantized


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
    if small.proto == model.proto:
        raise OptionError("--fp16: the model has no float32 weights of more than 1 KiB that float16 can hold")
    words = f"; {len(left)} weights are too large for float16 and stay float32" if left else ""
    return small, rounded, f"fp16: weights are stored as float16 and computed with as float32{words}"


def refuse(analysis: Analysis, options: OutputOptions) -> None:
    """Refuse, before any work, what packaging could do nothing to.

    Raises:
        OptionError: quantised already, or of weights that cannot be quantised.
    """
    if not options.quantize:
        return
    integer = [node.name for node in analysis.prepared.nodes if on_integers(node)]
    if integer:
        shown = f"{len(integer)} nodes work on integers, such as '{integer[0]}'"
        raise OptionError(f"--quantize int8: the model is quantised already: {shown}. Leave the option out, or give the float model.")
    held = initializers(analysis.prepared.model)
    kinds = {str(held[name].dtype) for _, name in _weighed(analysis, analysis.prepared.model)}
    if kinds and not kinds & {"float32", "float16"}:
        known = f"the weights are {', '.join(sorted(kinds))}, and onnxruntime's quantiser takes float32"
        raise OptionError(f"--quantize int8: nothing would be quantised: {known}. Leave the option out, or export the model in float32.")


def kept_float(analysis: Analysis, model: Model, result: Model) -> list[str]:
    """Layers of a model whose weights are still floating after it was quantised: those inside of branches, too.

    Raises:
        OptionError: all of them.
    """
    weighed, integers = _weighed(analysis, model), {name for name, held in initializers(result).items() if held.dtype.itemsize == 1}
    left = [node for node, name in weighed if not {f"{name}_quantized", f"{name}_Transposed_quantized"} & integers]
    if len(left) == len(weighed):
        operators = ", ".join(sorted({node.operator for node in left})) or "every layer"
        known = f"onnxruntime's quantiser leaves {operators} as it is"
        raise OptionError(f"--quantize int8: nothing was quantised: {known}. Nothing was written. Leave the option out.")
    made = {name for each in graphs(model.proto.graph) for node in each.node for name in node.output}
    below = made - GraphIndex(nodes(model)).makers.keys()
    inside = [layer.node for layer in analysis.coupling.layers if layer.weight and layer.node.outputs[0] in below]
    return [node.name for node in (*left, *inside)]


def _weighed(analysis: Analysis, model: Model) -> list[tuple[Node, str]]:
    """Layers of the original that a model still has, and the initializers with their weights there."""
    index, held = GraphIndex(nodes(model)), initializers(model)
    found = [(layer.node, index.maker(layer.node.outputs[0]), layer.weight.position) for layer in analysis.coupling.layers if layer.weight]
    return [(own, node.inputs[position]) for own, node, position in found if node is not None and node.inputs[position] in held]


def ort_file(model: Model) -> OrtFile:
    """The model in onnxruntime's format, optimised for any processor.

    Raises:
        ModelError: over 2 GB, or onnxruntime cannot convert it.
    """
    proto = to_proto(model)
    with system.temporary("the .ort file") as folder:
        path = folder / "model.ort"
        operators = save_ort(proto.SerializeToString(deterministic=True), path, model.name, model.libraries)
        return OrtFile(path.read_bytes(), operators)


# ---- vocabularies ----------------------------------------------------------------------------------------------------

FROM_DATA = "from-data"
DIGITS = 18  # of a whole number of 64 bits, at the most


def rows_kept(analysis: Analysis, options: OutputOptions, data: Dataset | None) -> OutputOptions:
    """The options with the rows of tables that are kept, by the input whose numbers look them up.

    Raises:
        OptionError: no table would be smaller, no data, or a file that holds no numbers.
    """
    if options.vocabulary is None:
        return options
    known = vocabulary.tables(analysis.model)
    if not known:
        raise OptionError("--vocabulary: no table of the model is looked up by an input of whole numbers as they come. Leave it out")
    most, words = max(table.shape[0] for table in known), f"--vocabulary {options.vocabulary}"
    if (options.unknown_token or 0) >= most:
        raise OptionError(f"--unknown-token {options.unknown_token} is no row of {most}")
    if options.vocabulary == FROM_DATA:
        if data is None:
            raise OptionError(f"--vocabulary {FROM_DATA} needs --data")
        read = replace(data, ports=tuple(port for port in data.ports if any(port.name in table.numbers for table in known)))
        batches = [feeds for feeds, _ in read.batches()]
        rows = {port.name: vocabulary.numbers_in(feeds[port.name] for feeds in batches) for port in read.ports}
    else:
        kept, readers = _numbers_of(Path(options.vocabulary)), {table.numbers for table in known if table.shape[0] == most}
        if kept[-1] >= most:
            raise OptionError(f"{words}: {kept[-1]} is no row of {most}")
        if len(readers) > 1:
            shown = ", ".join(" and ".join(names) for names in sorted(readers))
            raise OptionError(f"--vocabulary FILE: several inputs look up tables of {most} rows ({shown}); give {FROM_DATA}")
        rows = dict.fromkeys(readers.pop(), kept)
    if not any(table.shrinks(rows) for table in known):
        asked = [table for table in known if table.asked(rows)]
        counts = ", ".join(f"{len(table.kept(rows))} of {table.shape[0]} rows of '{table.name}'" for table in asked)
        raise OptionError(f"{words}: nothing would be saved ({counts}). Leave it out, or keep fewer")
    return replace(options, rows=rows)


def shares_kept(analysis: Analysis, options: OutputOptions) -> dict[str, float]:
    """How much is left of each table that becomes smaller, whatever channels leave."""
    found = [] if options.rows is None else vocabulary.shrinking(analysis.prepared.model, options.rows)
    return {table.name: (1 + len(table.kept(options.rows))) / table.shape[0] for table in found}


def _numbers_of(path: Path) -> IntArray:
    """The whole numbers of a file, one a line, in order."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--vocabulary {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    found = list[int]()
    for number, line in enumerate(lines, 1):
        if line.strip():
            if not line.strip().isdecimal() or len(line.strip()) > DIGITS:
                raise OptionError(f"--vocabulary {path}, line {number}: expected the number of a row, got '{line.strip()[:40]}'")
            found.append(int(line))
    if not found:
        raise OptionError(f"--vocabulary {path}: expected the number of a row on each line, the file is empty")
    return np.unique(np.asarray(found, np.int64))


def _told_of_rows(model: Model, options: OutputOptions, judge: Dataset | None) -> list[str]:
    """What the rows are that are kept, and how often others are asked for on held-out data."""
    words = []
    for table in filter(lambda table: table.asked(options.rows), vocabulary.tables(model)):
        kept, size, unknown = table.kept(options.rows), table.shape[0], options.unknown_token
        if not table.shrinks(options.rows):
            words.append(f"vocabulary: '{table.name}' keeps all {size} rows: a map would take more bytes than it saves")
            continue
        others = f"that of {unknown}" if unknown is not None and unknown < size else "the mean of the others"
        said = f"vocabulary: {len(kept)} of {size} rows of '{table.name}' are kept; all others share one, {others}"
        if judge is not None:
            asked = np.concatenate([feeds[name].reshape(-1).astype(np.int64) for feeds, _ in judge.batches() for name in table.numbers])
            said += f". Of the held-out numbers {1 - np.isin(np.where(asked < 0, asked + size, asked), kept).mean():.2%} are such"
        words.append(said)
    return words


def packaged(model: Model, options: OutputOptions, batches: Feeding | None) -> Model:
    """The last ONNX form that is asked for."""
    model = without_dead(model) if options.fp16 or options.quantize else model
    model = model if options.rows is None else vocabulary.with_rows(model, options.rows, options.unknown_token)
    if options.quantize:
        return quantized(half_weights(model)[1] if options.fp16 else with_full_weights(model), batches)
    return half_weights(model)[0] if options.fp16 else model


# ---- all forms, one after the other ----------------------------------------------------------------------------------

SHOWN = 5  # names in a sentence
TOLERANCES = {"fp16": 1e-2, "ort": 1e-2}  # largest relative error (root mean square) to what the step started from


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
    timing: str = ""


@dataclass(frozen=True)
class Packaged:
    """The last ONNX form of the model, its form for onnxruntime (if asked for), and what every step gave."""

    model: Model
    ort: OrtFile | None
    steps: tuple[Step, ...]
    notes: tuple[str, ...]


def package(
    analysis: Analysis, pruned: Model, options: OutputOptions, data: Dataset | None, judge: Dataset | None = None,
    how: MeasureOptions = MeasureOptions(), latency: Latency = AS_DEFAULT,
) -> Packaged:  # fmt: skip
    """Make the wanted forms of a pruned model and measure them, timed as ``latency`` says.

    Args:
        data: calibration data, for the ranges of static quantisation (without them it is dynamic).
        judge: data to measure on (default: ``data``, else the random inputs of the analysis).
        how: what the outputs mean.

    Raises:
        OptionError: unknown quantiser, or no weights to halve. ModelError: onnxruntime cannot make a form.
        VerificationError: a form is not finite or too far from what it was made of.
    """
    models = {"original": analysis.model, "pruned": pruned}
    live = without_dead(pruned)
    plain, last, notes = live, pruned, list[str]()
    if options.rows is not None:
        notes += _told_of_rows(live, options, judge)
        plain = last = live = models["vocabulary"] = vocabulary.with_rows(live, options.rows, options.unknown_token)
    if options.fp16:
        last, plain, words = halved(live)
        models["fp16"] = last
        notes.append(words)
    if options.quantize:
        plain = with_full_weights(plain)
        last, words = _on_integers(analysis, plain, data, how)
        models[options.quantize] = last
        left = kept_float(analysis, plain, last)
        if last.opset > plain.opset:
            notes.append(f"int8: opset {plain.opset} is raised to {last.opset}, as scales per channel need it")
        if left:
            shown = ", ".join(left[:SHOWN]) + (", ..." if len(left) > SHOWN else "")
            notes.append(f"int8: {len(left)} layers stay floating, since onnxruntime's quantiser cannot take them: {shown}")
        notes.append(f"int8: {words}{'; made from the weights rounded to float16' if options.fp16 else ''}")
    ort = ort_file(last) if options.save_ort is not None else None
    if ort and options.fp16 and not options.quantize:
        notes.append("ort: onnxruntime folds constants when it converts, so the weights in the .ort file are float32 again (rounded)")
    sizes = {name: file_bytes(model) for name, model in models.items()}
    sessions = [open_timed(model, latency.setup) for model in models.values()]
    if ort:
        sizes["ort"] = len(ort.data)
        sessions.append(open_ort(ort.data, "the .ort file", latency.setup))
    used = judge or data
    steps = _measured(analysis, sizes, sessions, used, how, latency)
    where = f"{used.samples} {'held-out' if judge else 'calibration'} samples" if used else "random inputs (no data given)"
    notes += [f"{own.name}: {own.bytes} bytes, more than the {before.bytes} of {before.name}: leave this step out for a small file"
              for before, own in pairwise(steps[1:]) if own.bytes > before.bytes and own.name != "ort"]  # fmt: skip
    notes.append(f"measured on {where}; agreement and error are to the pruned float model, latency to the original")
    return Packaged(last, ort, steps, tuple(notes))


def _on_integers(analysis: Analysis, model: Model, data: Dataset | None, how: MeasureOptions) -> tuple[Model, str]:
    """All layers of a model on integers, and words on their ranges."""
    if data is None:
        return quantized(model, None), "dynamic, without data"
    made, words = nearest(analysis, model, lambda ranges: quantized(model, list, ranges=ranges), data, how=how)
    return made, f"static; {words}"


def _measured(
    analysis: Analysis, sizes: Mapping[str, int], sessions: Sequence[Session], data: Dataset | None, how: MeasureOptions, latency: Latency
) -> tuple[Step, ...]:
    """Every form, of the named bytes, against the pruned model (the second) and against the one that it was made of (the one before).

    Raises:
        VerificationError: a form is not finite or too far from what it was made of.
    """
    batches: Batches = data.batches() if data else [(analysis.prepared.feeds, analysis.samples)]
    labels, names = data.labels if data else None, [port.name for port in outputs(analysis.model)]
    numbers = range(len(sessions))
    pairs = [*((number, 1) for number in numbers), *((number, max(number - 1, 0)) for number in numbers)]
    answers, _ = tally(sessions, names, batches, labels, pairs, lambda batch: read(analysis.model, batch, labels, how))
    for name, sums in [*zip(sizes, answers[len(sizes) :], strict=True)][2:]:
        error, allowed = sums.relative_error, TOLERANCES.get(name, float("inf"))
        if error is not None and not (np.isfinite(error) and error <= allowed):
            far = f"relative error {error:.3g} to the model that it was made from, allowed {allowed:g}"
            raise VerificationError(f"step '{name}': {far}. Nothing was written. Leave this step out.")
        if sums.lost:
            advice = "Keep more rows, or leave this step out." if name == "vocabulary" else "Leave this step out."
            raise VerificationError(f"step '{name}': {sums.lost} of the float model. Nothing was written. {advice}")
    steps, times = [], latency.of_sessions(sessions, analysis)
    for (name, size), sums, time in zip(sizes.items(), answers[: len(sizes)], times, strict=True):
        shares = sums.shares
        figures = (shares["top1"], shares["agreement"], sums.relative_error, time["latency_min_ms"], time["latency_ratio"], time["timing"])
        steps.append(Step(name, size, sums.samples, *figures))
    return tuple(steps)
