"""Results for people and programs: tables, plain data, and the sections of a page about what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.types import Coupling, Plan, Size
from ..coupling.cost import layer_macs
from ..planning import show
from . import Section, Table, pair_bars, short_names

if TYPE_CHECKING:  # what is shown comes from rooms that this one need not load
    from ..evaluation import Evaluation
    from ..export import Packaged, Step
    from ..latency.profiling import LayerTimes
    from ..scores.registry import Scored


def number(value: float) -> str:
    """A count for people: 1234567 -> 1.23M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces; the first is left-aligned, the others right."""
    widths = [max(len(str(row[column])) for row in (header, *rows)) for column in range(len(header))]
    lines = []
    for row in (header, ["-" * width for width in widths], *rows):
        first, *others = (str(cell).rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([first.strip().ljust(widths[0]), *others]).rstrip())
    return "\n".join(lines)


def _short(names: Sequence[str], limit: int = 2) -> str:
    shown = ", ".join(names[:limit])
    return f"{shown} (+{len(names) - limit})" if len(names) > limit else shown


# ---- inspect ---------------------------------------------------------------------------------------------------------


def inspection(coupling: Coupling, size: Size, samples: int, name: str) -> dict[str, Any]:
    """What `inspect --json` prints."""
    none = np.zeros(coupling.units, bool)
    macs = {layer.node.name: layer_macs(layer, none) / samples for layer in coupling.layers}
    groups = [
        {
            "group": group.name,
            "width": group.width,
            "producers": list(group.producers),
            "consumers": list(group.consumers),
            "macs_share": sum(macs[producer] for producer in group.producers) / size.macs if size.macs else 0.0,
        }
        for group in coupling.groups
    ]
    share = coupling.channels_prunable / coupling.channels_total if coupling.channels_total else 0.0
    return {
        "model": name,
        "macs": size.macs,
        "params": size.params,
        "groups": groups,
        "channels": coupling.channels_total,
        "channels_prunable": coupling.channels_prunable,
        "prunable_share": share,
        "pinned": [asdict(pin) for pin in coupling.pinned],
    }


def inspection_text(data: dict[str, Any]) -> str:
    """The same for people; ends with the share of prunable channels and the counts per reason."""
    rows = [
        [group["group"], str(group["width"]), f"{group['macs_share']:.1%}", _short(group["producers"]), _short(group["consumers"])]
        for group in data["groups"]
    ]
    lines = [f"{data['model']}: {number(data['macs'])} MACs per sample, {number(data['params'])} parameters", ""]
    if rows:
        lines += [table(["group", "width", "MACs", "made by", "read by"], rows), ""]
    pinned = [[pin["reason"], str(pin["channels"]), pin["node"], _short(pin["layers"])] for pin in data["pinned"]]
    if pinned:
        lines += [table(["cannot shrink because", "channels", "at node", "layers"], pinned), ""]
    lines.append(summary(data))
    return "\n".join(lines)


def summary(data: dict[str, Any]) -> str:
    """``NN % of channels prunable; pinned: ...`` with counts per reason."""
    counts: dict[str, int] = {}
    for pin in data["pinned"]:
        counts[pin["reason"]] = counts.get(pin["reason"], 0) + pin["channels"]
    parts = [f"{reason} {count}" for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    return f"{data['prunable_share']:.0%} of channels prunable; pinned: {', '.join(parts) or 'none'}"


# ---- plan ------------------------------------------------------------------------------------------------------------


def plan_text(plan: Plan) -> str:
    """The plan as a table, with totals."""
    rows = []
    for item in plan.groups:
        widths = (str(item.width), str(item.width - len(item.remove)))
        rows.append([item.group, _short(item.producers), *widths, number(item.macs_before), number(item.macs_after)])
    kept = sum(not item.remove for item in plan.groups)
    lines = [table(["group", "made by", "width", "kept", "MACs", "after"], rows), ""]
    if kept:
        lines.append(f"{kept} of {len(plan.groups)} groups keep all channels.")
    lines.append(sizes_text(plan.before, plan.after))
    return "\n".join(lines)


def sizes_text(before: Size, after: Size) -> str:
    """MACs and parameters before and after."""
    shares = [new / old if old else 1.0 for old, new in ((before.macs, after.macs), (before.params, after.params))]
    return (
        f"MACs {number(before.macs)} -> {number(after.macs)} ({shares[0]:.1%} of the original), "
        f"parameters {number(before.params)} -> {number(after.params)} ({shares[1]:.1%})"
    )


def figures_text(plan: Plan) -> str:
    """Asked, predicted and actual figures of a plan for targets; empty without targets."""
    rows = []
    for name, figures in plan.figures.items():
        before = figures["before"]
        cells = [f"{show(name, figures[key])} ({figures[key] / before:.1%})" for key in ("bound", "predicted", "actual")]
        rows.append([name, show(name, before), *cells])
    return table(["target", "original", "at most", "predicted", "reached"], rows) if rows else ""


# ---- evaluate --------------------------------------------------------------------------------------------------------


def _cell(value: float | None, form: str) -> str:
    """A figure for people; "-" where it does not apply."""
    return "-" if value is None else format(value, form)


FIGURES = ("model", "top-1", "agreement", "KL", "rel. error", "MACs", "params", "bytes", "min ms", "median ms", "ratio")


def _figures(measured: Evaluation) -> list[str]:
    """Cells of a row under `FIGURES`."""
    shares = (_cell(measured.top1, ".2%"), _cell(measured.agreement, ".2%"))
    errors = (_cell(measured.kl, ".4f"), _cell(measured.relative_error, ".4f"))
    sizes = (number(measured.size.macs), number(measured.size.params), number(measured.size.bytes or 0))
    times = (_cell(measured.latency_min_ms, ".3f"), _cell(measured.latency_median_ms, ".3f"), _cell(measured.latency_ratio, ".2f"))
    return [measured.model, *shares, *errors, *sizes, *times]


def evaluation_text(results: Sequence[Evaluation]) -> str:
    """Measured figures as a table; the first model is the reference."""
    return table(FIGURES, [_figures(measured) for measured in results])


# ---- scores ----------------------------------------------------------------------------------------------------------


def scores(coupling: Coupling, scored: Scored) -> dict[str, Any]:
    """Scores per group, and what their plug-in tells, as plain data."""
    groups = [{"group": group.name, "width": group.width, "scores": scored.values[group.units].tolist()} for group in coupling.groups]
    return {"score": scored.name, "groups": groups, **(scored.details.data() if scored.details else {})}


def scores_text(coupling: Coupling, scored: Scored) -> str:
    """The same for people: what the plug-in tells, else the range of the scores of each group."""
    if scored.details:
        return scored.details.text()
    every = [(group, scored.values[group.units]) for group in coupling.groups]
    figures = [(values.min(), values.mean(), values.max()) for _, values in every]
    rows = [[group.name, str(group.width), *(f"{value:.4g}" for value in row)] for (group, _), row in zip(every, figures, strict=True)]
    return table(["group", "width", f"least {scored.name}", "mean", "largest"], rows)


# ---- results of commands ---------------------------------------------------------------------------------------------


def accuracy_text(results: Sequence[Evaluation]) -> str:
    """The original against the result on held-out data, in a line or two."""
    before, after = results
    lines = []
    if before.top1 is not None and after.top1 is not None:
        lines.append(f"top-1 on {before.samples} held-out samples: {before.top1:.2%} -> {after.top1:.2%}")
    elif after.agreement is not None:
        lines.append(f"agreement with the original on {after.samples} held-out samples: {after.agreement:.2%}")
    elif after.relative_error is not None:
        lines.append(f"relative error to the original on {after.samples} held-out samples: {after.relative_error:.4f}")
    if after.latency_ratio is not None:
        times = f"{before.latency_min_ms:.3f} ms -> {after.latency_min_ms:.3f} ms"
        lines.append(f"latency {times} per batch ({after.latency_ratio:.2f} of the original)")
    return "\n".join(lines)


STEPS = ("step", "bytes", "top-1", "agreement", "rel. error", "min ms", "ratio")


def _step(step: Step, unit: str = "") -> tuple[str, ...]:
    """Cells of a row under `STEPS`."""
    shares = (_cell(step.top1, ".2%"), _cell(step.agreement, ".2%"), _cell(step.relative_error, ".4f"))
    return step.name, number(step.bytes) + unit, *shares, f"{step.latency_ms:.3f}", f"{step.latency_ratio:.2f}"


def steps_text(steps: Sequence[Step]) -> str:
    """What every step gave, as a table."""
    return table(STEPS, [_step(step) for step in steps])


def points_text(points: Sequence[Any]) -> str:
    """All points of a sweep, as a table."""
    rows = []
    for point in points:
        if point.size is None or point.failure:
            rows.append([point.target, *["-"] * 8, "not reached"])
            continue
        shares = [_cell(point.top1, ".2%"), _cell(point.agreement, ".2%"), _cell(point.relative_error, ".4f")]
        sizes = [number(point.size.macs), number(point.size.params), number(point.size.bytes or 0)]
        times = [f"{point.latency_ms:.3f}", f"{point.latency_ratio:.2f}"]
        rows.append([point.target, *shares, *sizes, *times, "yes" if point.front else ""])
    heads = ["target", "top-1", "agreement", "rel. error", "MACs", "params", "bytes", "min ms", "ratio", "front"]
    return table(heads, rows)


# ---- sections of a page about what was measured ----------------------------------------------------------------------


WORDS = ("before", "after")


def times_section(times: LayerTimes | None) -> list[Section]:
    """Where the milliseconds went."""
    if times is None:
        return []
    before, after = times.before, times.after
    words = [
        f"One run with a batch of {times.batch} on this machine: {before.sum():.3g} ms before, {after.sum():.3g} ms after. From "
        "onnxruntime's records of its kernels, the cost of recording taken off; what is fused into a layer counts with it."
    ]
    won = before - after
    largest = sorted(range(len(won)), key=lambda index: (-won[index], index))[:3]
    names = short_names([times.names[index] for index in largest])
    if won.sum() > 0:
        told = ", ".join(f"{name} {won[index] / won.sum():.1%}" for name, index in zip(names, largest, strict=True))
        words.append(f"Largest parts of what was won: {told}.")
    chart = pair_bars("Milliseconds of every layer, in network order", times.names, before.tolist(), after.tolist(), WORDS)
    rows = [
        (name, f"{old:.4f}", f"{new:.4f}", f"{new / old:.0%}" if old else "-")
        for name, old, new in zip(times.names, before, after, strict=True)
    ]
    table = Table(("layer", "ms", "after", "left"), tuple(rows), "The numbers")
    return [Section("Where the milliseconds went", tuple(words), (chart,), table)]


def packaging_section(packaged: Packaged | None) -> list[Section]:
    """What half precision, integers and onnxruntime's format gave."""
    if packaged is None:
        return []
    steps = packaged.steps
    bars = pair_bars(
        "Bytes of the original (pale) and of every form", [step.name for step in steps],
        [steps[0].bytes] * len(steps), [step.bytes for step in steps], ("original", "this form"),
    )  # fmt: skip
    words = "Each step starts from the one before. Agreement and error are to the pruned float model, the ratio of times to the original."
    rows = tuple(_step(step, "B") for step in steps)
    return [Section("Packaging", (words,), (bars,), Table((STEPS[0], "file", *STEPS[2:]), rows))]


def figures_section(measured: Sequence[Evaluation]) -> Section:
    """All that was measured of every model, but the median of the times."""
    median = FIGURES.index("median ms")
    rows = [(*FIGURES[:median], *FIGURES[median + 1 :])]
    rows += [(*cells[:median], *cells[median + 1 :]) for cells in map(_figures, measured)]
    return Section("All figures", (), (), Table(rows[0], tuple(rows[1:])))
