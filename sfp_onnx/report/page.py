"""What a report shows of a run. Everything is taken from results that are there; what has to be run for it runs only here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from .. import report
from ..core.system import command_line
from ..core.types import Array, BoolArray, Pinned, Size
from ..coupling.analysis import Analysis, Progress, channels_by_reason, silent
from ..coupling.cost import keep_mask, layer_macs
from ..data.dataset import Dataset
from ..evaluation import Evaluation, evaluate, is_classifier, log_probabilities
from ..graph import Model, outputs
from ..graph.save import file_bytes, fingerprint, write_text
from ..latency.profiling import layer_times
from ..planning import removal_of
from ..runtime import Setup, open_model, side_by_side
from .manifest import versions
from .text import figures_section, number, packaging_section, times_section

if TYPE_CHECKING:  # results that are only shown
    from ..export import Packaged
    from ..latency.profiling import LayerTimes
    from ..planning.search import Candidates
    from .manifest import Pruned
    from .points import Point

MOST_PICTURES, MOST_ROWS = 12, 400
CHANNELS = (1, 3)


class Used(Protocol):
    """The data of a run: what was calibrated with, and what the result is measured on."""

    @property
    def data(self) -> Dataset | None:
        """Calibration data."""

    @property
    def test_data(self) -> Dataset | None:
        """Held-out data."""


@dataclass(frozen=True)
class Widths:
    """One mixing layer: its output channels and multiply-accumulates for one sample."""

    name: str
    width: int
    macs: float


def widths_of(analysis: Analysis, removed: BoolArray | None = None) -> list[Widths]:
    """All layers in network order, after a removal (default: none)."""
    gone = np.zeros(analysis.coupling.units, bool) if removed is None else removed
    return [
        Widths(layer.node.name, int(keep_mask(layer.writes, gone).sum()), layer_macs(layer, gone) / analysis.samples)
        for layer in analysis.coupling.layers
    ]


# ---- pages -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Context:
    """What a page is told besides results: the data it was measured on, and what else was measured."""

    data: Dataset | None = None
    unseen: bool = True
    packaged: Packaged | None = None
    times: LayerTimes | None = None

    @property
    def place(self) -> str:
        """What the data are, in words."""
        if self.data is None:
            return ""
        return f"{self.data.samples} {'held-out samples' if self.unseen else 'calibration samples, which the pruning has seen'}"


def prune_page(result: Pruned, scored: Candidates, data: Used, setup: Setup, batch: int, progress: Progress = silent) -> report.Page:
    """The page of one pruned model; measured on test data if there are any, else on the calibration data. ``setup`` and ``batch`` say how
    layers are timed."""
    analysis = scored.analysis
    measured: Sequence[Evaluation] = result.evaluation
    if not measured and data.data is not None:
        measured = evaluate([result.original, result.model], data.data, progress=progress)
    times = layer_times(analysis, result.model, setup, batch, progress)
    context = Context(data.test_data or data.data, data.test_data is not None, result.packaged, times)
    removed = removal_of(result.plan, analysis.coupling, analysis.model.sha256)
    before, after = widths_of(analysis), widths_of(analysis, removed)
    sections = [
        _widths(before, after),
        _macs(before, after),
        *times_section(context.times),
        _scores(scored, removed),
        *_of_plugins(scored, data.data, progress),
        *_repair(result),
        *packaging_section(context.packaged),
        *_differences((result.original, result.model), context),
        *_pinned(analysis.coupling.pinned),
        *([report.Section("Notes", tuple(result.notes))] if result.notes else []),
    ]
    words = [_verified(result)]
    if result.plan.figures:
        words.append("Targets: " + ", ".join(str(target) for target in result.plan.options.get("targets", ())))
    bytes_after = fingerprint(result.model, "model.onnx")[1]
    sized = (replace(result.plan.before, bytes=file_bytes(result.original)), replace(result.plan.after, bytes=bytes_after))
    title = f"{_name(analysis)}, pruned"
    cards, facts = _cards(sized, measured, context), _facts(analysis, result.data)
    return report.Page(title, tuple(words), cards, tuple(sections), command_line.get(), facts)


def evaluate_page(analyses: Sequence[Analysis], measured: Sequence[Evaluation], context: Context) -> report.Page:
    """The page of measured models; the first is the reference, the headline is that of the last."""
    before, after = (widths_of(analysis) for analysis in (analyses[0], analyses[-1]))
    known = {row.name: row for row in after}
    shared = [row for row in before if row.name in known]
    sections = []
    if len(analyses) > 1 and shared:
        sections += [_widths(shared, [known[row.name] for row in shared]), _macs(shared, [known[row.name] for row in shared])]
    sections += times_section(context.times)
    sections.append(figures_section(measured))
    if len(analyses) > 1:
        sections += _differences((analyses[0].model, analyses[-1].model), context)
    sections += _pinned(analyses[0].coupling.pinned)
    title = " and ".join(dict.fromkeys(_name(analysis) for analysis in (analyses[0], analyses[-1])))
    cards = _cards((measured[0].size, measured[-1].size), (measured[0], measured[-1]), context)
    data = {} if context.data is None else {"name": context.data.name, "sha256": context.data.sha256}
    return report.Page(f"{title}, measured", (), cards, tuple(sections), command_line.get(), _facts(analyses[0], data))


def sweep_page(points: Sequence[Point], scored: Candidates, data: Used, progress: Progress = silent) -> report.Page:
    """The page of a sweep."""
    context = Context(data.test_data)
    held = [point for point in points if not point.failure and point.size is not None]
    loss, axis = _accuracies(held)
    judged = any(value != loss[0] for value in loss) or context.data is not None
    rows = [report.Dot(point.latency_ratio or 0.0, value, point.target, point.front) for point, value in zip(held, loss, strict=True)]
    megabytes = [(point.size.bytes or 0) / 1e6 if point.size else 0.0 for point in held]
    small = [report.Dot(size, value, point.target, point.front) for size, point, value in zip(megabytes, held, loss, strict=True)]
    charts = [report.scatter(f"{axis} by latency", rows, ("latency, share of the original", axis))]
    charts.append(report.scatter(f"{axis} by size of the file", small, ("megabytes", axis)))
    word = "On the front: no other point is at least as good in accuracy, size and latency, and better in one."
    words = (word,) if judged else (word, "Without data nothing is known of the accuracy.")
    sections = [report.Section("Pareto front", words, tuple(charts) if judged else (), _points_table(points))]
    sections += [_scores(scored, np.zeros(scored.analysis.coupling.units, bool)), *_of_plugins(scored, data.data, progress)]
    sections += _pinned(scored.analysis.coupling.pinned)
    best = _choice(held, loss)
    cards = _cards((held[0].size, best.size), (_evaluation(held[0]), _evaluation(best)), context) if best else ()
    told = (f"The headline is that of {best.target}: the fewest MACs on the front within one point of the original.",) if best else ()
    analysis = scored.analysis
    facts = _facts(analysis, scored.recorded.get("data") or {})
    return report.Page(f"{_name(analysis)}, many targets", told, cards, tuple(sections), command_line.get(), facts)


def write_page(path: Path, page: report.Page, inputs: Sequence[Path] = ()) -> None:
    """Write a page atomically.

    Raises:
        OptionError: Jinja2 is not installed. OutputError: the path cannot be written.
    """
    write_text(path, report.render(page), inputs)


# ---- headline --------------------------------------------------------------------------------------------------------


def _name(analysis: Analysis) -> str:
    return analysis.model.source.name if analysis.model.source else "the model"


def _verified(result: Pruned) -> str:
    if result.verification is None:
        return "Not verified (--no-verify)."
    worst = max(result.verification.errors.values(), default=0.0)
    return (
        f"Verified before any repair: equal to the original with the removed channels masked (largest relative difference {worst:.1e}, "
        f"allowed {result.verification.tolerance:g})."
    )


def _cards(sizes: tuple[Size | None, Size | None], measured: Sequence[Evaluation], context: Context) -> tuple[report.Card, ...]:
    cards = []
    if len(measured) == 2:
        first, last = measured
        if first.top1 is not None and last.top1 is not None:
            change = f"{100 * (last.top1 - first.top1):+.2f} points on {context.place}"
            cards.append(report.Card("Accuracy (top-1)", f"{first.top1:.2%}", f"{last.top1:.2%}", change))
        if last.agreement is not None:
            cards.append(report.Card("Same answer as the original", "", f"{last.agreement:.2%}", f"on {context.place}"))
        elif last.relative_error is not None:
            cards.append(report.Card("Relative error to the original", "", f"{last.relative_error:.3g}", f"on {context.place}"))
    before, after = sizes
    if before is not None and after is not None:
        pairs = ((before.macs, after.macs), (before.params, after.params), (before.bytes, after.bytes))
        for name, (old, new) in zip(("MACs per sample", "Parameters", "File"), pairs, strict=True):
            if old and new is not None:
                unit = "B" if name == "File" else ""
                cards.append(report.Card(name, number(old) + unit, number(new) + unit, f"{new / old:.1%} of the original"))
    if len(measured) == 2 and measured[1].latency_min_ms is not None:
        share = f"{measured[1].latency_ratio:.2f} of the original; per batch, least of interleaved runs on this machine"
        before_ms = f"{measured[0].latency_min_ms:.3g} ms"
        cards.append(report.Card("Latency", before_ms, f"{measured[1].latency_min_ms:.3g} ms", share))
    return tuple(cards)


def _facts(analysis: Analysis, data: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    facts = [("model", str(analysis.model.source)), ("its SHA-256", analysis.model.sha256)]
    if data:
        facts += [("data", str(data.get("name"))), ("their SHA-256", str(data.get("sha256")))]
    return (*facts, *versions().items())


# ---- sections --------------------------------------------------------------------------------------------------------


def _pair(title: str, names: Sequence[str], values: tuple[Sequence[float], Sequence[float]]) -> report.Chart:
    return report.pair_bars(title, names, *values, ("before", "after"))


def _widths(before: Sequence[Widths], after: Sequence[Widths]) -> report.Section:
    names = [row.name for row in before]
    chart = _pair("Output channels of every layer, in network order", names, ([r.width for r in before], [r.width for r in after]))
    rows = [
        (old.name, str(old.width), str(new.width), number(old.macs), number(new.macs), f"{new.macs / old.macs:.0%}" if old.macs else "-")
        for old, new in zip(before, after, strict=True)
    ]
    cut = sum(old.width != new.width for old, new in zip(before, after, strict=True))
    table = report.Table(("layer", "width", "after", "MACs", "after", "left"), tuple(rows), "The numbers")
    return report.Section("Widths", (f"{cut} of {len(before)} layers became narrower.",), (chart,), table)


def _macs(before: Sequence[Widths], after: Sequence[Widths]) -> report.Section:
    chart = _pair(
        "Multiply-accumulates of every layer for one sample", [r.name for r in before], ([r.macs for r in before], [r.macs for r in after])
    )
    lost = sorted(zip(before, after, strict=True), key=lambda pair: pair[1].macs - pair[0].macs)[:3]
    total = sum(old.macs - new.macs for old, new in zip(before, after, strict=True))
    names = report.short_names([old.name for old, _ in lost])
    shares = ", ".join(f"{name} {(old.macs - new.macs) / total:.1%}" for name, (old, new) in zip(names, lost, strict=True)) if total else ""
    return report.Section("Where the MACs went", (f"Largest parts of what left: {shares}.",) if total else (), (chart,))


def _scores(scored: Candidates, removed: BoolArray) -> report.Section:
    rows = [report.Strip(group.name, scored.scores[group.units], removed[group.units]) for group in scored.groups]
    where = "from the least of each group to its largest, square-root spaced"
    words = f"Score {scored.recorded.get('score')}: one dot for each channel that can leave, {where}."
    cut = [(row.scores, row.removed) for row in rows if row.removed.any() and not row.removed.all()]
    tangled = sum(bool(values[gone].max() > values[~gone].min()) for values, gone in cut)
    lines = [words]
    if tangled:
        lines.append(f"In {tangled} groups no score separates what leaves from what stays (the plan weighs more than it); no line there.")
    title = "Scores and the cut" if removed.any() else "Scores"
    return report.Section(title, tuple(lines), (report.strips("Scores of the channels of every group", rows),) if rows else ())


def _of_plugins(scored: Candidates, data: Dataset | None, progress: Progress) -> list[report.Section]:
    return [section for make in report.PLUGIN_SECTIONS for section in make(scored, data, progress)]


def _repair(result: Pruned) -> list[report.Section]:
    done = result.repaired
    if done is None:
        return []
    place = "held-out samples" if done.held_out else "samples of the calibration data (too few to hold any out)"
    figures = f"{done.before:.4g} before the repair, {done.after:.4g} after it."
    words = f"Distance from the original ({done.measure}) on {done.checked} {place}: {figures}"
    kept = [fit.layer for fit in done.fits if fit.kind == "kept"]
    words += f" These cannot be re-fitted and keep their weights: {', '.join(kept)}." if kept else ""
    fits = [fit for fit in done.fits if fit.kind != "kept" and np.isfinite([fit.error_before, fit.error_after]).all()]
    charts: tuple[report.Chart, ...] = ()
    table = None
    if fits:
        errors = ([fit.error_before for fit in fits], [fit.error_after for fit in fits])
        title = "Error of what each layer makes, before and after its repair, relative to the variance of its target (held-out rows)"
        charts = (_pair(title, [fit.layer for fit in fits], errors),)
        rows = [(f.layer, f.kind, f"{f.ridge:g}", str(f.rows), f"{f.error_before:.4f}", f"{f.error_after:.4f}") for f in fits]
        table = report.Table(("layer", "re-fitted", "ridge", "rows", "error", "after"), tuple(rows), "The numbers")
    return [report.Section(f"Repair ({done.kind})", (words,), charts, table)]


def _pinned(pinned: Sequence[Pinned]) -> list[report.Section]:
    if not pinned:
        return [report.Section("What could not shrink", ("Nothing: every channel of every layer could leave.",))]
    ordered = sorted(channels_by_reason(pinned).items(), key=lambda item: (-item[1], item[0]))
    words = "; ".join(f"{reason}: {count} channels" for reason, count in ordered) + "."
    rows = [(pin.reason, str(pin.channels), pin.node, ", ".join(pin.layers[:3])) for pin in pinned[:MOST_ROWS]]
    table = report.Table(("because", "channels", "at node", "layers"), tuple(rows), "At which nodes")
    return [report.Section("What could not shrink", (words,), (), table)]


# ---- sweeps ----------------------------------------------------------------------------------------------------------


def _accuracies(points: Sequence[Point]) -> tuple[list[float], str]:
    """What the points are judged by (larger is better), and its name."""
    for name, words in (("top1", "top-1 %"), ("agreement", "agreement with the original %")):
        values = [getattr(point, name) for point in points]
        if all(value is not None for value in values):
            return [100 * value for value in values], words
    return [100 * (1 - (point.relative_error or 0.0)) for point in points], "100 % less relative error"


def _choice(points: Sequence[Point], values: Sequence[float]) -> Point | None:
    close = [point for point, value in zip(points, values, strict=True) if point.front and point.size and value >= values[0] - 1]
    return min(close, key=lambda point: point.size.macs if point.size else 0.0, default=None)


def _evaluation(point: Point) -> Evaluation:
    assert point.size is not None
    accuracies = (point.top1, point.agreement, point.kl, point.relative_error)
    return Evaluation(point.target, 0, *accuracies, point.size, point.latency_ms, None, point.latency_ratio)


def _points_table(points: Sequence[Point]) -> report.Table:
    rows = []
    for point in points:
        if point.failure or point.size is None:
            rows.append((point.target, *["-"] * 6, point.failure[:80]))
            continue
        accuracy = point.top1 if point.top1 is not None else point.agreement
        error = "-" if point.relative_error is None else f"error {point.relative_error:.4f}"
        shown = error if accuracy is None else f"{accuracy:.2%}"
        sizes = (number(point.size.macs), number(point.size.params), number(point.size.bytes or 0))
        times = (f"{point.latency_ms or 0:.3f}", f"{point.latency_ratio or 0:.2f}")
        rows.append((point.target, shown, *sizes, *times, "yes" if point.front else ""))
    return report.Table(("target", "accuracy", "MACs", "params", "bytes", "min ms", "ratio", "front"), tuple(rows))


# ---- pictures --------------------------------------------------------------------------------------------------------


def _differences(models: tuple[Model, Model], context: Context) -> list[report.Section]:
    """Samples that two classifiers of images answer differently."""
    data = context.data
    if data is None or not _are_images(data):
        return []
    pictures, count = [], 0
    for picture, so_far in _differing(models, data):
        count = so_far
        pictures += [picture] if picture else []
        if len(pictures) == MOST_PICTURES:
            break
    if not count:
        return []
    words = f"The first {len(pictures)}, found among {count} samples." if pictures else f"Nowhere, on {count} samples."
    return [report.Section("Where the two models answer differently", (words,), (), None, tuple(pictures))]


def _are_images(data: Dataset) -> bool:
    port = data.ports[0]
    return len(data.ports) == 1 and np.dtype(port.dtype).kind == "f" and port.shape is not None and len(port.shape) == 4


def _differing(models: tuple[Model, Model], data: Dataset) -> Iterator[tuple[report.Picture | None, int]]:
    """Pictures where the answers differ, each with the number of samples seen so far; None at the end of a batch."""
    name = outputs(models[0])[0].name
    for batch in side_by_side([open_model(model) for model in models], data.batches(), [name]):
        images, count, start = next(iter(batch[0].feeds.values())), batch[0].count, batch[0].first
        first, second = (observed.samples(name) for observed in batch)
        if images.ndim != 4 or images.shape[1] not in CHANNELS or not is_classifier(first, count):
            return
        answers = [output.argmax(1) for output in (first, second)]
        shares = [np.exp(log_probabilities(output)) for output in (first, second)]
        for row in np.flatnonzero(answers[0] != answers[1]):
            both = zip(("before", "after"), answers, shares, strict=True)
            told = [f"{word}: {classes[row]} ({share[row].max():.0%})" for word, classes, share in both]
            if data.labels is not None:
                told.insert(0, f"label {data.labels[start + row]}")
            yield report.Picture(report.png(_pixels(images[row], data)), tuple(told)), start + int(row) + 1
        yield None, start + count


def _pixels(sample: Array, data: Dataset) -> Array:
    """A sample (C, H, W) as it was before preprocessing, uint8 (H, W, C); stretched to the whole range if that is not known."""
    steps = data.preprocessing
    values = sample.astype(np.float64)
    values = values * np.reshape(steps.std or (1.0,), (-1, 1, 1)) + np.reshape(steps.mean or (0.0,), (-1, 1, 1))
    if steps.scale is None:
        low, high = values.min(), values.max()
        values = (values - low) / ((high - low) or 1.0)
    return np.asarray(np.moveaxis(np.round(np.clip(values, 0, 1) * 255), 0, -1).astype(np.uint8))
