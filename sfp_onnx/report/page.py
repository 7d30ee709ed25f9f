"""What a report shows of a run. Everything is taken from results that are there; what has to be run for it runs only here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from .. import report
from ..core.options import MeasureOptions
from ..core.system import command_line, versions
from ..core.types import Array, BoolArray, FloatArray, Pinned, Size
from ..coupling.analysis import Analysis, Progress, channels_by_reason, silent
from ..coupling.cost import kept_masks, layer_macs, length
from ..data.dataset import Dataset
from ..evaluation import Evaluation, evaluate, loss_of
from ..evaluation.meaning import Kind, log_probabilities, read
from ..export import Packaged
from ..graph import Model, outputs
from ..graph.save import file_bytes, fingerprint
from ..latency.profiling import LayerTimes, layer_times
from ..latency.timing import Latency
from ..planning import removal_of
from ..runtime import open_model, side_by_side
from ..runtime.on_board import cpu_name
from . import number, text
from .manifest import Pruned
from .verdict import Conclusion, of_models, of_run

if TYPE_CHECKING:  # what is only shown
    from ..planning.search import Candidates
    from .points import Point

MOST_PICTURES, MOST_ROWS = 12, 400
CHANNELS = (1, 3)


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
        Widths(layer.node.name, sum(map(length, kept_masks(layer.made, gone).values())), layer_macs(layer, gone) / analysis.samples)
        for layer in analysis.coupling.layers
    ]


# ---- pages -----------------------------------------------------------------------------------------------------------


def prune_page(
    result: Pruned, scored: Candidates, data: Dataset | None, test_data: Dataset | None, latency: Latency, progress: Progress
) -> report.Page:
    """The page of one pruned model; measured on test data if there are any, else on the calibration data. ``latency`` says how all
    is timed."""
    analysis = scored.analysis
    measured: Sequence[Evaluation] = result.evaluation
    if not measured and data is not None:
        measured = evaluate([result.original, result.model], data, latency, progress, scored.measures)
    removed = removal_of(result.plan, analysis.coupling, analysis.model.sha256)
    sections = [
        *_layers(widths_of(analysis), widths_of(analysis, removed)),
        *_factors(result), *_times(layer_times(analysis, result.model, latency.setup, latency.batch, progress)),
        _scores(scored, removed), *_of_plugins(scored, data, progress), *_repair(result), *_packaging(result.packaged),
        *_differences(result.original, result.model, test_data or data, scored.measures), _pinned(analysis.coupling.pinned),
    ]  # fmt: skip
    if result.notes:
        sections.append(report.Section("Notes", tuple(result.notes)))
    words = [_verified(result)]
    if result.plan.figures:
        words.append("Targets: " + ", ".join(str(target) for target in result.plan.options.get("targets", ())))
    bytes_after = fingerprint(result.model, "model.onnx")[1]
    sizes = (replace(result.plan.before, bytes=file_bytes(result.original)), replace(result.plan.after, bytes=bytes_after))
    cards = _cards(sizes, measured, _place(test_data) if test_data else _place(data, unseen=False))
    said = of_run(result, (file_bytes(result.original), bytes_after))
    return _page(f"{_name(analysis)}, pruned", words, cards, sections, analysis, result.data, said)


def evaluate_page(
    analyses: Sequence[Analysis], measured: Sequence[Evaluation], data: Dataset, times: LayerTimes | None,
    how: MeasureOptions = MeasureOptions(),
) -> report.Page:  # fmt: skip
    """The page of measured models; the first is the reference, the headline is that of the last."""
    first, last = analyses[0], analyses[-1]
    before, known = widths_of(first), {row.name: row for row in widths_of(last)}
    shared = [row for row in before if row.name in known]
    sections = []
    if len(analyses) > 1 and shared:
        sections += _layers(shared, [known[row.name] for row in shared])
    left_out = {"median ms"} if measured[0].energy_mj is not None else {"median ms", "mJ"}
    columns = [head for head in text.COLUMNS if head not in left_out]
    rows = tuple((result.model, *text.figures(result, columns)) for result in measured)
    sections += [*_times(times), report.Section("All figures", table=report.Table(("model", *columns), rows))]
    if len(analyses) > 1:
        sections += _differences(first.model, last.model, data, how)
    sections.append(_pinned(first.coupling.pinned))
    title = " and ".join(dict.fromkeys(_name(analysis) for analysis in (first, last)))
    cards = _cards((measured[0].size, measured[-1].size), (measured[0], measured[-1]), _place(data))
    seen = {"name": data.name, "sha256": data.sha256}
    return _page(f"{title}, measured", (), cards, sections, first, seen, of_models(measured))


def sweep_page(
    points: Sequence[Point], scored: Candidates, data: Dataset | None, test_data: Dataset | None, progress: Progress = silent
) -> report.Page:
    """The page of a sweep."""
    analysis = scored.analysis
    held = [point for point in points if not point.failure]
    loss, axis = _accuracies(held)
    words = ["On the front: no other point is at least as good in accuracy, size and latency, and better in one."]
    charts: list[report.Chart] = []
    if test_data is not None or any(value != loss[0] for value in loss):
        for title, across, values in (
            ("latency", "latency, share of the original", [point.latency_ratio or 0.0 for point in held]),
            ("size of the file", "megabytes", [(point.size.bytes or 0) / 1e6 if point.size else 0.0 for point in held]),
        ):
            dots = [report.Dot(x, y, point.target, point.front) for x, y, point in zip(values, loss, held, strict=True)]
            charts.append(report.scatter(f"{axis} by {title}", dots, (across, axis)))
    else:
        words.append("Without data nothing is known of the accuracy.")
    sections = [
        report.Section("Pareto front", tuple(words), tuple(charts), _points_table(points)),
        _scores(scored, np.zeros(analysis.coupling.units, bool)), *_of_plugins(scored, data, progress), _pinned(analysis.coupling.pinned),
    ]  # fmt: skip
    best = _choice(held, loss)
    cards = _cards((held[0].size, best.size), (_evaluation(held[0]), _evaluation(best)), _place(test_data)) if best else ()
    told = (f"The headline is that of {best.target}: the fewest MACs on the front within one point of the original.",) if best else ()
    return _page(f"{_name(analysis)}, many targets", told, cards, sections, analysis, scored.recorded.get("data") or {})


def _page(
    title: str, words: Sequence[str], cards: Sequence[report.Card], sections: Sequence[report.Section], analysis: Analysis,
    data: Mapping[str, object], said: Conclusion | None = None,
) -> report.Page:  # fmt: skip
    facts = {"model": str(analysis.model.source), "its SHA-256": analysis.model.sha256, "processor": cpu_name()}
    if data:
        facts |= {"data": str(data.get("name")), "their SHA-256": str(data.get("sha256"))}
    told = tuple({**facts, **versions()}.items())
    page = report.Page(title, tuple(words), tuple(cards), tuple(sections), command_line.get(), told)
    return page if said is None else replace(page, verdict=f"{said.text[0].upper()}{said.text[1:]}.", tone=TONES[said.good])


# ---- headline --------------------------------------------------------------------------------------------------------


TONES = {True: "good", False: "bad", None: ""}


def _name(analysis: Analysis) -> str:
    return analysis.model.source.name if analysis.model.source else "the model"


def _place(data: Dataset | None, unseen: bool = True) -> str:
    """What data are, in words."""
    return f"{data.samples} {'held-out samples' if unseen else 'calibration samples, which the pruning has seen'}" if data else ""


def _verified(result: Pruned) -> str:
    if result.verification is None:
        return "Not verified (--no-verify)."
    worst = max(result.verification.errors.values(), default=0.0)
    return (
        f"Verified before any repair: equal to the original with the removed channels masked (largest relative difference {worst:.1e}, "
        f"allowed {result.verification.tolerance:g})."
    )


def _cards(sizes: tuple[Size | None, Size | None], measured: Sequence[Evaluation], place: str) -> list[report.Card]:
    cards = []
    if len(measured) == 2:
        first, last = measured
        if first.top1 is not None and last.top1 is not None:
            change = f"{100 * (last.top1 - first.top1):+.2f} points on {place}"
            cards.append(report.Card("Accuracy (top-1)", f"{first.top1:.2%}", f"{last.top1:.2%}", change))
        if last.agreement is not None:
            cards.append(report.Card("Same answer as the original", "", f"{last.agreement:.2%}", f"on {place}"))
        elif last.value is not None:
            before, after = (text.text_of(one.metric, one.value) for one in measured)
            cards.append(report.Card(last.metric.capitalize(), before, after, f"on {place}"))
    for name, figure, unit in (("MACs per sample", "macs", ""), ("Parameters", "params", ""), ("File", "bytes", "B")):
        old, new = (getattr(size, figure, None) for size in sizes)
        if old and new is not None:
            cards.append(report.Card(name, number(old) + unit, number(new) + unit, f"{new / old:.1%} of the original"))
    if len(measured) == 2 and last.latency_min_ms is not None:
        share = f"{last.latency_ratio:.2f} of the original; {last.timing}, least of interleaved runs"
        cards.append(report.Card("Latency", f"{first.latency_min_ms:.3g} ms", f"{last.latency_min_ms:.3g} ms", share))
    if len(measured) == 2 and last.energy_mj is not None and first.energy_mj:
        share = f"{last.energy_mj / first.energy_mj:.2f} of the original; {last.energy}"
        cards.append(report.Card("Energy of a run", f"{first.energy_mj:.4g} mJ", f"{last.energy_mj:.4g} mJ", share))
    return cards


# ---- sections --------------------------------------------------------------------------------------------------------


def _layers(before: Sequence[Widths], after: Sequence[Widths]) -> list[report.Section]:
    """The same layers before and after: widths, and multiply-accumulates."""
    names, pairs = [row.name for row in before], list(zip(before, after, strict=True))
    width = ([row.width for row in before], [row.width for row in after])
    chart = report.pair_bars("Output channels of every layer, in network order", names, *width)
    rows = tuple((a.name, str(a.width), str(b.width), number(a.macs), number(b.macs), _left(a.macs, b.macs)) for a, b in pairs)
    cut = sum(old.width != new.width for old, new in pairs)
    table = report.Table(("layer", "width", "after", "MACs", "after", "left"), rows, "The numbers")
    widths = report.Section("Widths", (f"{cut} of {len(before)} layers became narrower.",), (chart,), table)
    left = [np.array([row.macs for row in layers]) for layers in (before, after)]
    chart = report.pair_bars("Multiply-accumulates of every layer for one sample", names, *(macs.tolist() for macs in left))
    return [widths, report.Section("Where the MACs went", _largest("left", names, left[0] - left[1]), (chart,))]


def _left(before: float, after: float) -> str:
    return f"{after / before:.0%}" if before else "-"


def _largest(verb: str, names: Sequence[str], won: FloatArray) -> tuple[str, ...]:
    """Which layers won most."""
    if won.sum() <= 0:
        return ()
    largest = np.argsort(-won, kind="stable")[:3]
    shares = zip(report.short_names([names[index] for index in largest]), won[largest] / won.sum(), strict=True)
    return (f"Largest parts of what {verb}: {', '.join(f'{name} {share:.1%}' for name, share in shares)}.",)


def _times(times: LayerTimes | None) -> list[report.Section]:
    """Where the milliseconds went."""
    if times is None:
        return []
    before, after = times.before.tolist(), times.after.tolist()
    words = (
        f"One run ({times.timing}): {times.before.sum():.3g} ms before, {times.after.sum():.3g} ms after. "
        "From onnxruntime's records of its kernels, the cost of recording taken off; what is fused into a layer counts with it."
    )
    won = _largest("was won", times.names, times.before - times.after)
    chart = report.pair_bars("Milliseconds of every layer, in network order", times.names, before, after)
    rows = [(name, f"{old:.4f}", f"{new:.4f}", _left(old, new)) for name, old, new in zip(times.names, before, after, strict=True)]
    table = report.Table(("layer", "ms", "after", "left"), tuple(rows), "The numbers")
    return [report.Section("Where the milliseconds went", (words, *won), (chart,), table)]


def _packaging(packaged: Packaged | None) -> list[report.Section]:
    """What half precision, integers and onnxruntime's format gave."""
    if packaged is None:
        return []
    steps = packaged.steps
    sizes = ([steps[0].bytes] * len(steps), [step.bytes for step in steps])
    title = "Bytes of the original (pale) and of every form"
    bars = report.pair_bars(title, [step.name for step in steps], *sizes, ("original", "this form"))
    words = "Each step starts from the one before. Agreement and error are to the pruned float model, the ratio of times to the original."
    rows = tuple((name, size + "B", *others) for name, size, *others in text.step_rows(steps))
    return [report.Section("Packaging", (words,), (bars,), report.Table(("step", "file", *text.STEP[1:]), rows))]


def _scores(scored: Candidates, removed: BoolArray) -> report.Section:
    rows = [report.Strip(group.name, scored.scores[group.units], removed[group.units]) for group in scored.groups]
    where = "from the least of each group to its largest, square-root spaced"
    lines = [f"Score {scored.recorded.get('score')}: one dot for each channel that can leave, {where}."]
    if tangled := sum(row.tangled for row in rows):
        lines.append(f"In {tangled} groups no score separates what leaves from what stays (the plan weighs more than it); no line there.")
    title = "Scores and the cut" if removed.any() else "Scores"
    return report.Section(title, tuple(lines), (report.strips("Scores of the channels of every group", rows),) if rows else ())


def _of_plugins(scored: Candidates, data: Dataset | None, progress: Progress) -> list[report.Section]:
    return [section for make in report.PLUGIN_SECTIONS for section in make(scored, data, progress)]


def _factors(result: Pruned) -> list[report.Section]:
    """The layers that became two."""
    rows = tuple((factor.layer, str(factor.rank), factor.narrow) for factor in result.plan.factors)
    words = "Each is a product of lower rank now: a layer in front of another, with so few channels between them."
    return [report.Section("Layers that became two", (words,), table=report.Table(text.FACTOR_COLUMNS, rows))] if rows else []


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
    if not fits:
        return [report.Section(f"Repair ({done.kind})", (words,))]
    errors = ([fit.error_before for fit in fits], [fit.error_after for fit in fits])
    title = "Error of what each layer makes, before and after its repair, relative to the variance of its target (held-out rows)"
    chart = report.pair_bars(title, [fit.layer for fit in fits], *errors)
    rows = [(f.layer, f.kind, f"{f.ridge:g}", str(f.rows), f"{f.error_before:.4f}", f"{f.error_after:.4f}") for f in fits]
    table = report.Table(("layer", "re-fitted", "ridge", "rows", "error", "after"), tuple(rows), "The numbers")
    return [report.Section(f"Repair ({done.kind})", (words,), (chart,), table)]


def _pinned(pinned: Sequence[Pinned]) -> report.Section:
    if not pinned:
        return report.Section("What could not shrink", ("Nothing: every channel of every layer could leave.",))
    ordered = sorted(channels_by_reason(pinned).items(), key=lambda item: (-item[1], item[0]))
    words = "; ".join(f"{reason}: {count} channels" for reason, count in ordered) + "."
    rows = [(pin.reason, str(pin.channels), pin.node, ", ".join(pin.layers[:3])) for pin in pinned[:MOST_ROWS]]
    table = report.Table(("because", "channels", "at node", "layers"), tuple(rows), "At which nodes")
    return report.Section("What could not shrink", (words,), (), table)


# ---- sweeps ----------------------------------------------------------------------------------------------------------


def _accuracies(points: Sequence[Point]) -> tuple[list[float], str]:
    """What the points are judged by (larger is better), and its name."""
    metric = points[-1].metric
    whole = 1.0 if metric == "centred error" else 0.0
    words = {"top-1": "top-1 %", "agreement": "agreement with the original %", "centred error": "100 % less centred error"}
    return [100 * (whole - loss_of(metric, point.value)) for point in points], words.get(metric, f"{metric} %")


def _choice(points: Sequence[Point], values: Sequence[float]) -> Point | None:
    close = [point for point, value in zip(points, values, strict=True) if point.front and point.size and value >= values[0] - 1]
    return min(close, key=lambda point: point.size.macs if point.size else 0.0, default=None)


def _evaluation(point: Point) -> Evaluation:
    assert point.size is not None
    accuracies = (point.top1, point.agreement, point.kl, point.relative_error)
    return Evaluation(point.target, 0, *accuracies, point.size, point.latency_ms, None, point.latency_ratio, point.metric, point.value)


def _points_table(points: Sequence[Point]) -> report.Table:
    rows = []
    for point, (target, top1, agreement, error, *others) in zip(points, text.point_rows(points), strict=True):
        accuracy = next((cell for cell in (top1, agreement) if cell != "-"), "-" if error == "-" else f"error {error}")
        rows.append((target, accuracy, *others[:-1], point.failure[:80] or others[-1]))
    return report.Table(("target", "accuracy", "MACs", "params", "bytes", "min ms", "ratio", "front"), tuple(rows))


# ---- pictures --------------------------------------------------------------------------------------------------------


def _differences(before: Model, after: Model, data: Dataset | None, how: MeasureOptions) -> list[report.Section]:
    """Samples that two classifiers of images answer differently."""
    if data is None or not _are_images(data):
        return []
    names = [port.name for port in outputs(before)]
    pictures: list[report.Picture] = []
    count = 0
    for batch in side_by_side([open_model(model) for model in (before, after)], data.batches(), names):
        images, start = next(iter(batch[0].feeds.values())), batch[0].first
        if count == 0:
            judged = read(before, batch[0], data.labels, how).judged
        if images.ndim != 4 or images.shape[1] not in CHANNELS or judged.kind is not Kind.CLASSES or judged.axis is None:
            break
        answers = [judged.scores(observed.samples(judged.outputs[0])) for observed in batch]
        classes, shares = [output.argmax(1) for output in answers], [np.exp(log_probabilities(output)) for output in answers]
        for row in np.flatnonzero(classes[0] != classes[1])[: MOST_PICTURES - len(pictures)]:
            lines = [] if data.classes is None else [f"label {report.named(int(data.classes[start + row]), data.class_names)}"]
            both = zip(report.WORDS, classes, shares, strict=True)
            lines += [f"{word}: {report.named(int(own[row]), data.class_names)}, {part[row].max():.0%}" for word, own, part in both]
            pictures.append(report.Picture(report.png(_pixels(images[row], data)), tuple(lines)))
            count = start + int(row) + 1
        if len(pictures) == MOST_PICTURES:
            break
        count = start + batch[0].count
    if not count:
        return []
    words = f"The first {len(pictures)}, found among {count} samples." if pictures else f"Nowhere, on {count} samples."
    return [report.Section("Where the two models answer differently", (words,), pictures=tuple(pictures))]


def _are_images(data: Dataset) -> bool:
    port = data.ports[0]
    return len(data.ports) == 1 and np.dtype(port.dtype).kind == "f" and port.shape is not None and len(port.shape) == 4


def _pixels(sample: Array, data: Dataset) -> Array:
    """A sample (C, H, W) as it was before preprocessing, uint8 (H, W, C); stretched to the whole range if that is not known."""
    steps = data.preprocessing
    values = sample.astype(np.float64) * np.reshape(steps.std or (1.0,), (-1, 1, 1)) + np.reshape(steps.mean or (0.0,), (-1, 1, 1))
    if steps.scale is None:
        low, high = values.min(), values.max()
        values = (values - low) / ((high - low) or 1.0)
    return np.asarray(np.moveaxis(np.round(np.clip(values, 0, 1) * 255), 0, -1).astype(np.uint8))
