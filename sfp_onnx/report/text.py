"""Results for people and programs: tables and plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.types import Coupling, Plan, number, sizes_text as sizes_text, traced_text as traced_text
from ..coupling.analysis import Analysis, free_share, tables, wider
from ..coupling.cost import layer_macs
from ..latency.timing import Latency
from ..planning import FIGURES, show
from ..rules.foreign import sentences
from ..rules.registry import Trait, has

if TYPE_CHECKING:  # what is shown comes from rooms that this one need not load
    from ..evaluation import Evaluation
    from ..export import Step
    from ..scores.scoring import Scored
    from .points import Point


WIDTH, LEAST, MANY = 100, 14, 140  # characters of a line where there is no terminal, of a name at least, of a line for two names a cell
FIRST = 0.6  # the first column is shortened less than the others


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces, the first to the left, the others to the right, as wide as the terminal (or COLUMNS): the longest
    cells are shortened in the middle, and a table that is too wide even so is turned, a line for each column. Columns in which nothing
    applies ("-") are left out."""
    room = get_terminal_size((WIDTH, 0)).columns
    used = [column for column in range(len(header)) if not rows or not column or any(row[column] != "-" for row in rows)]
    lines = [[str(row[column]) for column in used] for row in (header, *rows)]
    if _needed(lines) > room and len(lines) < len(used):
        lines = [list(column) for column in zip(*lines, strict=True)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    while sum(widths) + 2 * len(widths) - 2 > room and max(widths) > LEAST:
        widest = max(range(len(widths)), key=lambda column: widths[column] * (1 if column else FIRST))
        widths[widest] -= 1
    lines.insert(1, ["-" * width for width in widths])
    fitted = [[_middle(cell, width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    starts = [line[0].ljust(widths[0]) for line in fitted]
    rests = [[cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)] for line in fitted]
    return "\n".join("  ".join([start, *rest]).rstrip() for start, rest in zip(starts, rests, strict=True))


def _needed(lines: Sequence[Sequence[str]]) -> int:
    """Characters of a line if names are as short as they may become."""
    return sum(min(LEAST, max(map(len, column))) + 2 for column in zip(*lines, strict=True)) - 2


def _middle(text: str, width: int) -> str:
    """A text without its middle, if it is too long; names of nodes differ most at their ends."""
    return text if len(text) <= width else text[: width // 3] + ".." + text[len(text) - width + width // 3 + 2 :]


def _short(names: Sequence[str]) -> str:
    limit = 2 if get_terminal_size((WIDTH, 0)).columns >= MANY else 1
    shown = ", ".join(names[:limit])
    return f"{shown} (+{len(names) - limit})" if len(names) > limit else shown


# ---- inspect ---------------------------------------------------------------------------------------------------------


def inspection(analysis: Analysis, name: str) -> dict[str, Any]:
    """What `inspect --json` prints."""
    coupling, size, samples = analysis.coupling, analysis.size(), analysis.samples
    none = np.zeros(coupling.units, bool)
    macs = {layer.node.name: layer_macs(layer, none) / samples for layer in coupling.layers}
    groups = [
        {"group": group.name, "width": group.width, "producers": list(group.producers), "consumers": list(group.consumers),
         "macs_share": sum(macs[producer] for producer in group.producers) / size.macs if size.macs else 0.0}
        for group in coupling.groups
    ]  # fmt: skip
    share = coupling.channels_prunable / coupling.channels_total if coupling.channels_total else 0.0
    around = {name for group in coupling.groups for name in (*group.producers, *group.consumers)}
    whole = wider(analysis) if coupling.pinned else None
    most = whole.coupling if whole else coupling
    return {
        "prunable_share_expanded": most.channels_prunable / max(1, most.channels_total),
        "macs_free": free_share(analysis), "macs_free_expanded": free_share(whole or analysis),
        "model": name, "macs": size.macs, "params": size.params, "traced": analysis.traced, "groups": groups,
        "tables": tables(analysis), "macs_around": sum(macs.get(layer, 0.0) for layer in around) / size.macs if size.macs else 0.0,
        "channels": coupling.channels_total, "channels_prunable": coupling.channels_prunable, "prunable_share": share,
        "inside": {layer.node.name: macs[layer.node.name] / size.macs for layer in coupling.layers if has(layer.node, Trait.RUNS)},
        "can_become_two": list(analysis.wholes), "pinned": [asdict(pin) for pin in coupling.pinned],
        "without_rule": {operator: list(names) for operator, names in coupling.unruled.items()},
    }  # fmt: skip


def inspection_text(data: dict[str, Any]) -> str:
    """The same for people; ends with the share of prunable channels and the counts per reason."""
    rows = [
        [group["group"], str(group["width"]), f"{group['macs_share']:.1%}", _short(group["producers"]), _short(group["consumers"])]
        for group in data["groups"]
    ]
    lines = [f"{data['model']}: {number(data['macs'])} MACs per sample, {number(data['params'])} parameters"]
    lines += [f"({traced})", ""] if (traced := traced_text(data["traced"])) else [""]
    if rows:
        lines += [table(["group", "width", "MACs", "made by", "read by"], rows)]
        lines += [f"(MACs: of the layers that make a group; all that make or read one have {data['macs_around']:.1%})", ""]
    if data["tables"]:
        held = sum(data["tables"].values())
        share = f"{number(held)} of {number(data['params'])} parameters ({held / data['params']:.0%})"
        lines += [f"{share} are in tables that are looked up ({_short(list(data['tables']))}): these keep all rows (or --vocabulary)", ""]
    pinned = [[pin["reason"], str(pin["channels"]), pin["node"], _short(pin["layers"])] for pin in data["pinned"]]
    if pinned:
        lines += [table(["cannot shrink because", "channels", "at node", "layers"], pinned), ""]
    counts: Counter[str] = Counter()
    lines += [f"{text}." for text in sentences(data["without_rule"])]
    if data["inside"]:
        lines += [f"{sum(data['inside'].values()):.1%} of the MACs are inside of sub-graphs, which stay: {_short(list(data['inside']))}."]
    for pin in data["pinned"]:
        counts[pin["reason"]] += pin["channels"]
    parts = [f"{reason} {count}" for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    lines.append(f"{data['prunable_share']:.0%} of channels prunable; pinned: {', '.join(parts) or 'none'}")
    free = f"half of every group takes {data['macs_free']:.1%} of the MACs"
    more = f"; with --expand all: {data['prunable_share_expanded']:.0%} of channels, {data['macs_free_expanded']:.1%} of the MACs"
    lines.append(free + (more if data["prunable_share_expanded"] > data["prunable_share"] else ""))
    return "\n".join(lines)


# ---- plan ------------------------------------------------------------------------------------------------------------


FACTOR_COLUMNS = ("layer that becomes two", "channels between", "narrows its")


def plan_text(plan: Plan) -> str:
    """The plan as a table, with totals."""
    rows = []
    for item in plan.groups:
        widths = (str(item.width), str(item.width - len(item.remove)))
        rows.append([item.group, _short(item.producers), *widths, number(item.macs_before), number(item.macs_after)])
    kept = sum(not item.remove for item in plan.groups)
    lines = [table(["group", "made by", "width", "kept", "MACs", "after"], rows), ""]
    if plan.factors:
        factors = [[factor.layer, str(factor.rank), factor.narrow] for factor in plan.factors]
        lines += [table(FACTOR_COLUMNS, factors), ""]
    if kept:
        lines.append(f"{kept} of {len(plan.groups)} groups keep all channels.")
    lines.append(sizes_text(plan.before, plan.after))
    if traced := traced_text(plan.options.get("traced", {})):
        lines.append(f"({traced})")
    return "\n".join(lines)


def figures_text(plan: Plan) -> str:
    """Asked, predicted and actual figures of a plan for targets; empty without targets."""
    rows = []
    for name, figures in plan.figures.items():
        before = figures["before"]
        cells = [f"{show(name, figures[key])} ({figures[key] / before:.1%})" for key in ("bound", "predicted", "actual")]
        how = Latency.of(plan.options).setup.words(plan.options.get("batch", 1))
        rows.append([f"{name} ({how})" if FIGURES[name].timed else name, show(name, before), *cells])
    return table(["target", "original", "at most", "predicted", "reached"], rows) if rows else ""


# ---- evaluate --------------------------------------------------------------------------------------------------------


COLUMNS = {  # the figure that a column shows, and its form; counts have none
    "top-1": ("top1", ".2%"), "agreement": ("agreement", ".2%"), "KL": ("kl", ".4f"), "rel. error": ("relative_error", ".4f"),
    "MACs": ("macs", ""), "params": ("params", ""), "bytes": ("bytes", ""),
    "min ms": ("latency_min_ms", ".3f"), "median ms": ("latency_median_ms", ".3f"), "ratio": ("latency_ratio", ".2f"),
    "mJ": ("energy_mj", ".4g"),
}  # fmt: skip
KNOWN = ("KL divergence",)  # measures that have a column under another name
PLAIN = ("KL divergence", "cosine", "rank correlation")  # measures that are no shares
STEP = ("bytes", "top-1", "agreement", "rel. error", "min ms", "ratio")
POINT = ("top-1", "agreement", "rel. error", "MACs", "params", "bytes", "min ms", "ratio")


def figures(measured: Evaluation | Step | Point, columns: Iterable[str] = COLUMNS) -> list[str]:
    """Figures for people, by column; "-" where one does not apply."""
    values = {**vars(getattr(measured, "size", measured)), **vars(measured)}
    values.setdefault("latency_min_ms", values.get("latency_ms"))
    forms = [(values[name], form) for name, form in map(COLUMNS.__getitem__, columns)]
    return [number(value or 0) if not form else "-" if value is None else format(value, form) for value, form in forms]


def step_rows(steps: Sequence[Step]) -> list[list[str]]:
    """What every step gave: its name, and `STEP`."""
    return [[step.name, *figures(step, STEP)] for step in steps]


def point_rows(points: Sequence[Point]) -> list[list[str]]:
    """All points of a sweep: the target, `POINT`, and whether it is on the front."""
    return [
        [point.target, *["-"] * len(POINT), "not reached"] if point.failure
        else [point.target, *figures(point, POINT), "yes" if point.front else ""]
        for point in points
    ]  # fmt: skip


def evaluation_text(results: Sequence[Evaluation]) -> str:
    """Measured figures as a table, and which output is farthest from the original's; the first model is the reference."""
    metric = results[-1].metric
    own = (metric,) if metric and metric.lower() not in map(str.lower, (*COLUMNS, *KNOWN)) else ()
    rows = []
    for measured in results:
        rows.append([measured.model, *([text_of(metric, measured.value)] if own else []), *figures(measured)])
    worst = [f"farthest from the original in {measured.model}: {measured.worst}" for measured in results if measured.worst]
    return "\n".join([table(("model", *own, *COLUMNS), rows), *_timing(results), *energy_words(results), *worst])


def text_of(metric: str, value: float | None) -> str:
    """A value of a measure for people: a share in percent where it is one."""
    return "-" if value is None else f"{value:.4f}" if metric in PLAIN else f"{value:.2%}"


def _timing(rows: Sequence[Evaluation | Step | Point]) -> list[str]:
    """How what is in a table was timed."""
    return [f"times: {words}" for words in dict.fromkeys(row.timing for row in rows if row.timing)]


def energy_words(rows: Sequence[Evaluation]) -> list[str]:
    """How the energy in a table was measured, or that it is an estimate."""
    return [f"energy of a run: {words}" for words in dict.fromkeys(row.energy for row in rows if row.energy)]


def steps_text(steps: Sequence[Step]) -> str:
    """What every step gave, as a table."""
    return "\n".join([table(("step", *STEP), step_rows(steps)), *_timing(steps)])


def points_text(points: Sequence[Point]) -> str:
    """All points of a sweep, as a table."""
    return "\n".join([table(("target", *POINT, "front"), point_rows(points)), *_timing(points)])


# ---- scores ----------------------------------------------------------------------------------------------------------


def scores(coupling: Coupling, scored: Scored) -> dict[str, Any]:
    """Scores per group, and what their plug-in tells, as plain data."""
    groups = [{"group": group.name, "width": group.width, "scores": scored.values[group.units].tolist()} for group in coupling.groups]
    return {"score": scored.name, "groups": groups, **(scored.details.data() if scored.details else {})}


def scores_text(coupling: Coupling, scored: Scored) -> str:
    """The same for people: what the plug-in tells, else the range of the scores of each group."""
    if scored.details:
        return scored.details.text()
    rows = []
    for group in coupling.groups:
        values = scored.values[group.units]
        rows.append([group.name, str(group.width), *(f"{value:.4g}" for value in (values.min(), values.mean(), values.max()))])
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
    elif after.value is not None:
        values = [text_of(after.metric, one.value) for one in results]
        lines.append(f"{after.metric} on {after.samples} held-out samples: {' -> '.join(values)}")
    if after.latency_ratio is not None:
        times = f"{before.latency_min_ms:.3f} ms -> {after.latency_min_ms:.3f} ms"
        lines.append(f"latency {times} ({after.latency_ratio:.2f} of the original; {after.timing})")
    return "\n".join(lines)
