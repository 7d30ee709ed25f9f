"""Fine-tuning from beginning to end: what was cut, data, the held-out guard, and what is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ... import graph
from ...core.errors import DataError, ModelError, OptionError
from ...core.options import DataOptions, MeasureOptions
from ...core.system import log, versions
from ...core.types import Array, Cut, Tokens
from ...coupling.analysis import DataSource, Progress, describe, inspect, silent
from ...data import Memory, Preprocessing
from ...data.checks import opened
from ...data.dataset import Dataset
from ...evaluation import Evaluation, evaluate, measure, reading_of
from ...evaluation.meaning import Kind, Meaning
from ...evaluation.measures import MEASURES
from ...graph.load import ModelSource, load
from ...graph.save import check_output, fingerprint, together
from ...repair import HELD_OUT, held_out
from ...report.manifest import write_json
from ...runtime import observe
from . import TrainOptions
from .bridge import Network, as_tensor, write
from .engine import Checkpoint, Schedule, Stopped, Tell, ended, settle
from .functions import Tensor
from .reconstruct import Kept, Reconstruction, Samples, blocks, comparable, diluted, features

FEWEST = 16  # held out, at the least
RATES = {"blocks": 1e-3, "features": 3e-4, "logits": 1e-4, "labels": 3e-4}
ALIKE = 0.8  # share of mirrored images that the original answers as it does the images, from which on they are trained on
FEW_BLOCKS = 2


@dataclass(frozen=True)
class Finetuned:
    """The result of `finetune`: the tuned model, or the given one where that was no worse (``kept`` False). ``measure`` is the figure that
    decided on the ``held_out`` samples, ``before`` and ``after`` its values; ``stopped``: by Ctrl-C."""

    model: graph.Model
    original: graph.Model
    kept: bool
    measure: str
    before: float
    after: float
    held_out: int
    tasks: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]
    stopped: bool
    evaluation: tuple[Evaluation, ...] = ()
    manifest: Mapping[str, Any] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, Any]:
        """For a manifest."""
        shown = {name: getattr(self, name) for name in ("kept", "measure", "before", "after", "held_out", "stopped")}
        return {**shown, "tasks": [dict(item) for item in self.tasks]}


# ---- what was cut ----------------------------------------------------------------------------------------------------


def kept_channels(cuts: Sequence[Cut | Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Of every tensor that lost channels: its axes, and the indices that are left."""
    kept: dict[str, list[Any]] = {}
    for item in cuts:
        cut = asdict(item) if isinstance(item, Cut) else item
        left = np.setdiff1d(np.arange(int(cut["size"])), np.asarray(cut["removed"], np.int64))
        kept.setdefault(str(cut["tensor"]), []).append((int(cut["axis"]), left))
    return kept


def read_manifest(model: graph.Model, given: Path | None) -> dict[str, Any] | None:
    """The manifest of the cut: the given file, else the one beside the model that was written with it (None: there is none).

    Raises:
        OptionError: the given file is no manifest.
    """
    source = model.source
    beside = [] if source is None else [source.with_suffix(".json"), Path(f"{source}.json"), source.with_suffix(".manifest.json")]
    for path in beside if given is None else [given]:
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            if held["format"] == "sfp_onnx manifest" and (given is not None or held["output"]["sha256"] == model.sha256):
                return dict(held)
            if given is not None:
                raise ValueError("it is no manifest of `prune` or `apply`")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            if given is not None:
                raise OptionError(f"{path}: cannot read the manifest: {error}. Expected what `prune --manifest` writes.") from error
    return None


def _teacher(student: graph.Model, teacher: ModelSource | None, manifest: Mapping[str, Any] | None) -> tuple[graph.Model, Kept, list[str]]:
    """The original, the channels of it that are left, and what to say of them."""
    if teacher is None and manifest is None:
        raise OptionError("give the original with --teacher (or the manifest of the cut with --cuts)")
    original = load(teacher if teacher is not None else Path(str((manifest or {})["model"]["path"])))
    if manifest is None:
        words = "no manifest of the cut at hand (--cuts), so only tensors of the same shape in both models are compared"
        return original, {}, [words] if original.sha256 != student.sha256 else []
    if manifest["model"]["sha256"] != original.sha256:
        raise OptionError(f"{original.name}: it is not the model that the manifest says was cut ({manifest['model']['path']})")
    return original, kept_channels(manifest["cuts"]), []


# ---- data ------------------------------------------------------------------------------------------------------------


def apart(data: Dataset, seed: int) -> tuple[Dataset, Dataset]:
    """Samples to train on, and those that judge.

    Raises:
        DataError: too few, or they are no equal rows.
    """
    if not data.plain:
        raise DataError(f"{data.name}: training takes samples of one size, along the first axis of every input. Give rows of equal length.")
    count = held_out(data.samples)
    if count < FEWEST:
        least = f"expected at least {int(FEWEST / HELD_OUT)} samples, found {data.samples}"
        raise DataError(f"{data.name}: an eighth of the data is held out to judge on; {least}")
    return data.split(count, [seed, data.samples])


def _arrays(data: Dataset) -> dict[str, Array]:
    """All inputs, one row a sample."""
    parts: dict[str, list[Array]] = {}
    for feeds, count in data.batches():
        for name, array in feeds.items():
            parts.setdefault(name, []).append(array[:count])
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _mirrors(teacher: graph.Model, held: Dataset) -> bool:
    """Whether the data are images whose mirror images the original answers alike."""
    shapes = [port.shape for port in held.ports]
    if len(shapes) != 1 or shapes[0] is None or len(shapes[0]) != 4 or np.dtype(held.ports[0].dtype).kind != "f":
        return False
    reading = reading_of(teacher, held, MeasureOptions()).judged
    if reading.kind is not Kind.CLASSES:
        return False
    name, same, count = held.ports[0].name, 0, 0
    batches = list(held.batches())
    turned = [({name: np.ascontiguousarray(np.flip(feeds[name], columns(held)))}, number) for feeds, number in batches]
    for one, other in zip(observe(teacher, batches, reading.outputs), observe(teacher, turned, reading.outputs), strict=True):
        equal = (reading.answers(one.outputs[0]) == reading.answers(other.outputs[0]))[: one.count]
        same, count = same + int(equal.sum()), count + equal.size
    return same >= ALIKE * count


def columns(data: Dataset) -> int:
    """The axis along which images are mirrored: their width, whatever the layout."""
    return 3 if data.axis == 1 else 2


def mixable(data: Dataset) -> bool:
    """Whether all inputs hold real numbers: what lies between two words means nothing."""
    return all(np.dtype(port.dtype).kind == "f" for port in data.ports)


def varied(data: Dataset, mirror: bool, mixed: bool, seed: int) -> Dataset:
    """The samples and, if wanted, as many more: their mirror images, or mixtures, without labels, of a share of each, drawn evenly, and the
    rest of (the mirror image of) another (mixup: Zhang et al., ICLR 2018)."""
    if not (mirror or mixed):
        return data
    arrays, random, count = _arrays(data), np.random.default_rng([seed, data.samples]), data.samples
    more = {name: np.flip(array, columns(data)) for name, array in arrays.items()} if mirror else arrays
    if mixed:
        others, shares = random.permutation(count), random.random(count)
        more = {name: _between(array, more[name][others], shares) for name, array in arrays.items()}
    labels = None if mixed or data.labels is None else np.concatenate([data.labels] * 2)
    readers = {name: Memory(np.concatenate([array, more[name]])) for name, array in arrays.items()}
    return replace(data, readers=readers, indices=np.arange(2 * count), labels=labels, preprocessing=Preprocessing())


def _between(one: Array, other: Array, shares: Array) -> Array:
    """Row by row a share of one and the rest of the other."""
    share = shares.astype(one.dtype).reshape(-1, *[1] * (one.ndim - 1))
    return np.asarray(share * one + (1 - share) * other)


def stacked(fitted: Dataset, held: Dataset, batch: int, tokens: Tokens | None = None) -> Samples:
    """All inputs of both; ``tokens`` that an input switches off are no data."""
    arrays, judged = _arrays(fitted), _arrays(held)
    values = {name: torch.from_numpy(np.concatenate([array, judged[name]])) for name, array in arrays.items()}
    return Samples(values, fitted.samples, fitted.batch if fitted.fixed else batch, fitted.fixed, tokens)


def classes_of(original: graph.Model, fitted: Dataset, held: Dataset, device: str) -> Tensor:
    """The class number of every row of `stacked`.

    Raises:
        DataError: there are none, or the model has no such classes.
    """
    kind = reading_of(original, held, MeasureOptions()).judged.kind
    if fitted.classes is None or held.classes is None or kind is not Kind.CLASSES:
        raise DataError(f"{fitted.name}: --recipe labels takes a classifier, and data with a class number per sample")
    return as_tensor(np.concatenate([fitted.classes, held.classes]), device)


# ---- the guard -------------------------------------------------------------------------------------------------------


def judged(models: Sequence[graph.Model], held: Dataset, tokens: Tokens | None = None) -> list[tuple[str, float, float]]:
    """Of every model but the first, the original: the measure of the task, its value, and what decides where that is equal (larger is
    better), as onnxruntime runs it."""
    reading = reading_of(models[0], held, MeasureOptions(), tokens=tokens)
    found = []
    for compared in measure(models, held.batches(), held.labels, reading)[0][1:]:
        chosen, distance = compared.metric[0], compared.distance
        value, sign = getattr(compared.tally(chosen.name), "value", None), 1 if chosen.larger else -1
        near = 0.0 if distance is None else float(distance.measure.loss(distance.rows)[1])
        found.append((chosen.name, sign * float(value[1]) if value else float("-inf"), -near))
    return found


# ---- fine-tuning -----------------------------------------------------------------------------------------------------


def tuned(
    pruned: graph.Model, original: graph.Model, kept: Kept, data: Dataset, options: TrainOptions, tell: Tell = lambda said: None
) -> Finetuned:
    """Fit a pruned model to its original; keep that only if it answers held-out samples better.

    Raises:
        OptionError, DataError, ModelError: options, data or model do not allow it.
    """
    settle(options.device)
    fitted, held = apart(data, options.seed)
    mirror = _mirrors(original, held) if options.mirror is None else options.mirror
    tokens, meaning = inspect(original, data=held).prepared.tokens, reading_of(original, held, MeasureOptions()).judged
    embeds = meaning.kind is Kind.EMBEDDING
    notes = ["its answers are embeddings, so they are fitted with all blocks, end to end"] if embeds and not options.recipe else []
    recipe, batch = options.recipe or ("features" if embeds else "blocks"), options.train_batch or (32 if embeds else 128)
    options = replace(options, recipe=recipe, train_batch=batch)
    mixed = recipe == "blocks" and tokens is None and mixable(data)
    fitted, judge = varied(fitted, mirror, mixed, options.seed), varied(held, False, mixed, options.seed)
    samples = stacked(fitted, judge, batch, tokens)
    student, teacher = Network(pruned, options.device), Network(original, options.device)
    said = {name: value for name, value in asdict(options).items() if name not in ("resume", "memory")}
    told = [fingerprint(pruned, "model.onnx")[0], original.sha256, data.sha256, data.samples, said, mirror]
    keep = Checkpoint(None if options.resume is None else Path(options.resume), hashlib.sha256(repr(told).encode()).hexdigest())
    rate = options.lr or RATES[recipe]
    scaled = recipe == "blocks"
    schedule = Schedule(options.epochs, rate, batch, samples.batch, samples.whole, options.seed, options.budget, scaled=scaled)
    labels = classes_of(original, fitted, held, options.device) if recipe == "labels" else None
    run = Reconstruction(student, teacher, kept, samples, schedule, keep, tell, options.memory, labels)
    notes += [f"zeros of {len(sparse)} diluted weights stay zero"] if (sparse := diluted(student.parameters)) else []
    stopped = False
    try:
        notes += _run(run, recipe, meaning)
    except Stopped:
        stopped, notes = True, [*notes, "stopped; what was best so far was judged"]
    notes += [ended([item["epochs"] for item in run.figures])] if options.budget is not None and run.figures else []
    notes += [f"{what} were trained on, too" for what, true in (("mirrored images", mirror), ("mixtures of samples", mixed)) if true]
    after = student.written()
    seen = mixed and held.labels is None  # a repair has most often fitted the held-out samples, and no mixture of them
    (name, first, tie), (_, last, other) = judged([original, pruned, after], judge if seen else held, tokens)
    better = (last, other) > (first, tie)
    first, last = (value if MEASURES[name].larger else -value for value in (first, last))
    words = f"{name} on {held.samples} held-out samples{' and mixtures of them' * seen} {first:.4g} -> {last:.4g}"
    notes.insert(0, f"fine-tuning ({recipe}, {samples.train} samples): {words}")
    if not better:
        notes.append("the fine-tuned model is no better there, so the model is left as it was")
        log.warning(notes[-1])
    made = after if better else pruned
    return Finetuned(made, original, better, name, first, last, held.samples, tuple(run.figures), tuple(notes), stopped)


def _run(run: Reconstruction, recipe: str, meaning: Meaning) -> list[str]:
    """Train by the recipe; what to say of it. Answers that are no class scores are fitted by their squared error.

    Raises:
        Stopped: Ctrl-C. ModelError: there is nothing to fit.
    """
    probe = run.samples.rows(np.arange(run.samples.batch if run.samples.whole else min(3, run.samples.count)))
    parts = blocks(run.student, run.teacher, run.kept, probe) if recipe in ("blocks", "features") else []
    names = [port.name for port in graph.outputs(run.student.model)]
    answers = sorted(comparable(run.student, run.teacher, names, run.kept, probe), key=lambda name: name not in meaning.outputs)
    if not answers:
        raise ModelError(f"{run.student.model.name}: no output is floating with one row a sample, so there is nothing to fit")
    few = len(parts) < FEW_BLOCKS
    if recipe == "blocks" and not few:
        run.by_blocks(parts)
        return [f"{len(parts)} blocks"]
    end = recipe in ("logits", "labels")
    inner = [] if end else features(run.student) if few else [name for part in parts for name in part.ends if name not in answers]
    inner = comparable(run.student, run.teacher, inner, run.kept, probe) if inner else []
    score = end and meaning.kind is Kind.CLASSES and run.student.run(probe, answers[:1])[0].ndim == 2
    if run.labels is not None and not score:
        raise ModelError(f"{run.student.model.name}: its first output holds no row of class scores per sample for --recipe labels")
    run.end_to_end(answers, [name for name in inner if name not in answers], score)
    return ["too few tensors separate the graph, so its features were fitted end to end"] if recipe == "blocks" else []


def finetune(
    source: ModelSource, options: TrainOptions, data: DataSource, teacher: ModelSource | None = None, *, cuts: Path | None = None,
    test_data: DataSource | None = None, data_options: DataOptions = DataOptions(), output: Path | None = None,
    manifest: Path | None = None, tell: Tell = lambda said: None, progress: Progress = silent,
) -> Finetuned:  # fmt: skip
    """Fine-tune a pruned model, measure, and write what is asked for.

    Args:
        source: the pruned model.
        teacher: the original (default: the one that the manifest of the cut names).
        cuts: the manifest of the cut (default: NAME.json or NAME.onnx.json beside the pruned model).
        tell: gets the figures of every epoch.

    Raises:
        OptionError, DataError, ModelError, OutputError: options, data, model or paths do not allow it.
    """
    pruned = load(source)
    read = read_manifest(pruned, cuts)
    original, kept, notes = _teacher(pruned, teacher, read)
    paths = [*pruned.paths, *original.paths, *(Path(item) for item in (data, cuts, test_data) if isinstance(item, (str, Path)))]
    for path in (output, manifest, options.resume):
        if path is not None:
            check_output(Path(path), paths)
    for text in notes:
        log.warning(text)
    used = opened(original, data, data_options)
    assert used is not None
    result = tuned(pruned, original, kept, used, options, tell)
    result = replace(result, notes=(*result.notes, *notes))
    test = opened(original, test_data, replace(data_options, labels=None, samples=None))
    if test is not None:
        result = replace(result, evaluation=tuple(evaluate([original, pruned, result.model], test, None, progress)))
    recorded = _manifest(result, pruned, read, options, used, output)
    with together():
        if output is not None:
            write(result.model, output)
        if manifest is not None:
            write_json(manifest, recorded, [*paths, *([output] if output is not None else [])])
    return replace(result, manifest=recorded)


def _manifest(
    result: Finetuned, pruned: graph.Model, cut: Mapping[str, Any] | None, options: TrainOptions, data: Dataset, output: Path | None
) -> dict[str, Any]:
    digest, size = fingerprint(result.model, output) if output else (None, None)
    return {
        "format": "sfp_onnx fine-tuning manifest", "version": 1, "versions": {**versions(), "torch": str(torch.__version__)},
        "model": {"path": str(pruned.source), "sha256": pruned.sha256},
        "teacher": {"path": str(result.original.source), "sha256": result.original.sha256},
        "output": {"path": str(output) if output else None, "sha256": digest, "bytes": size},
        "options": json.loads(json.dumps(asdict(options), default=str)), "data": describe(data), "cut": (cut or {}).get("output"),
        **result.figures, "notes": list(result.notes),
        "evaluation": [asdict(item) for item in result.evaluation] or None,
    }  # fmt: skip
