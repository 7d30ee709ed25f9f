"""What each target of a sweep costs in accuracy, size and latency."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..core.errors import DataError, OptionError, TargetError
from ..core.options import MeasureOptions, PlanOptions, parse_part, quantity
from ..core.types import Shown, Size, number
from ..coupling.analysis import Analysis
from ..data.dataset import Dataset
from ..evaluation import evaluate, loss_of
from ..evaluation.meaning import Reading
from ..graph import Model
from ..graph.save import file_bytes
from ..latency.timing import Latency
from ..planning import Target, parse_target
from ..planning.search import Candidates
from .manifest import Pruned, manifest, write_json

MOST = 100
ACCURACY = ("top1", "agreement", "kl", "relative_error", "metric", "value", "measures", "worst")


@dataclass(frozen=True, repr=False)
class Point(Shown):
    """One target of a sweep: what came out, or why nothing did (``failure``).

    ``latency_ratio`` is to the original, from minima of interleaved runs at the options' batch size; ``front``: no other point is at
    least as good in accuracy (the measure of the task), file size and latency, and better in one.
    """

    target: str
    size: Size | None = None
    top1: float | None = None
    agreement: float | None = None
    kl: float | None = None
    relative_error: float | None = None
    metric: str = ""
    value: float | None = None
    measures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    worst: str = ""
    latency_ms: float | None = None
    latency_ratio: float | None = None
    front: bool = False
    file: str | None = None
    manifest: str | None = None
    failure: str = ""
    timing: str = ""

    def summary(self) -> str:
        """The target, and what came out or why nothing did."""
        worth = "" if self.value is None else f", {self.metric} {self.value:.4g}"
        return f"{self.target}, {self.failure or f'{number(self.size.macs if self.size else 0)} MACs'}{worth}"


def parse_sweep(text: str) -> list[str]:
    """Read ``macs=90%:20%:10%`` (first, last, step) into single targets.

    Raises:
        OptionError: not of that form, or a step that leads nowhere.
    """
    match = re.fullmatch(r"\s*(\w+)\s*=\s*([^:]+):([^:]+):([^:]+)", text)
    if match is None:
        raise OptionError(f"targets '{text}': expected first:last:step, such as macs=90%:20%:10% or latency=8ms:2ms:1ms")
    texts = [part.strip().lower() for part in match.groups()[1:]]
    if all(part.endswith("x") for part in texts):  # times less: evenly spaced as they are written
        parsed = [Target(match[1], quantity(part, {"x": 1.0}, "a number of times, such as 2x"), True) for part in texts]
    else:
        parsed = [parse_target(f"{match[1]}={part}") for part in texts]
    first, last, step = parsed
    unit = re.sub(r"[0-9.\s]", "", match[2])
    if len({part.relative for part in (first, last, step)}) > 1:
        raise OptionError(f"targets '{text}': first, last and step must be all percentages or all absolute numbers")
    sign = 1 if last.value >= first.value else -1
    count = int(abs(last.value - first.value) / step.value + 1e-9) + 1
    if count > MOST:
        raise OptionError(f"targets '{text}': {count} targets; expected at most {MOST}")
    scale = first.value / float(re.sub(r"[^0-9.]", "", match[2]))
    values = [(first.value + sign * index * step.value) / scale for index in range(count)]
    wanted = [f"{first.what}={value:.10g}{unit}" for value in values]
    parse_target(wanted[0])
    return wanted


def saved_point(result: Pruned, target: str, analysis: Analysis, folder: Path | None) -> Point:
    """The point of a result, which is written into a folder (if there is one) with its manifest."""
    if folder is None:
        return Point(target, size=result.plan.after)
    stem = analysis.model.source.stem if analysis.model.source else "model"
    file = result.save(folder / f"{stem}-{re.sub(r'[^A-Za-z0-9.]+', '-', target.replace('%', 'pct'))}.onnx")
    notes = file.with_suffix(".json")
    write_json(notes, manifest(result, file), [*result.original.paths, file])
    return Point(target, size=result.plan.after, file=str(file), manifest=str(notes))


def measured_points(
    analysis: Analysis, points: Sequence[Point], models: Sequence[Model], judge: Dataset | None, options: PlanOptions,
    how: Reading | MeasureOptions = MeasureOptions(),
) -> list[Point]:  # fmt: skip
    """The points with figures, the original first; ``how``: what the outputs mean."""
    times = Latency.of(vars(options)).of_models(models, analysis)
    measured = [] if judge is None else evaluate(models, judge, None, how=how)
    rows = [Point("original", size=analysis.size()), *points]
    for place, index in enumerate(index for index, point in enumerate(rows) if not point.failure):
        accuracy = {name: getattr(measured[place], name) for name in ACCURACY} if measured else {}
        size, time = replace(rows[index].size or analysis.size(), bytes=file_bytes(models[place])), times[place]
        shown = {"latency_ms": time["latency_min_ms"], "latency_ratio": time["latency_ratio"], "timing": time["timing"]}
        rows[index] = replace(rows[index], size=size, **shown, **accuracy)
    return front(rows)


def front(points: Sequence[Point]) -> list[Point]:
    """The points, with those marked that no other dominates."""

    def costs(point: Point) -> tuple[float, float, float]:
        assert point.size is not None and point.latency_ratio is not None
        return loss_of(point.metric, point.value), float(point.size.bytes or 0), point.latency_ratio

    rows = [(point, costs(point)) for point in points if not point.failure]
    best = {
        point.target for point, cost in rows
        if not any(all(a <= b for a, b in zip(other, cost, strict=True)) and other != cost for _, other in rows)
    }  # fmt: skip
    return [replace(point, front=not point.failure and point.target in best) for point in points]


def part_of(wanted: Sequence[str], part: str) -> list[str]:
    """The targets of a part ("3/16": every 16th from the third on); there may be none.

    Raises:
        OptionError: not of that form.
    """
    number, count = parse_part(part)
    return list(wanted[number - 1 :: count])


def joined(paths: Sequence[str | Path]) -> dict[str, Any]:
    """The data of a whole sweep from those of all its parts (`sweep_data` with ``part``), in any order.

    Raises:
        DataError: what is no part, or parts of different sweeps. OptionError: a part is missing, or there twice.
        TargetError: no target was reached.
    """
    parts = [_read(Path(path)) for path in paths]
    first, count = parts[0], int(parts[0]["part"]["part"].split("/")[1])
    for path, data in zip(paths, parts, strict=True):
        differ = [name for name, value in _shared(data).items() if value != _shared(first)[name]]
        if differ:
            what = f"{path} and {paths[0]} are parts of different sweeps: they differ in {', '.join(differ)}"
            raise DataError(f"{what}. Make all parts with the same command.")
    numbers = [int(data["part"]["part"].split("/")[0]) for data in parts]
    missing, twice = sorted({*range(1, count + 1)} - {*numbers}), sorted({number for number in numbers if numbers.count(number) > 1})
    if missing or twice:
        texts = [f"{what}: {', '.join(map(str, these))}" for what, these in (("missing", missing), ("there twice", twice)) if these]
        raise OptionError(f"--join: parts of {count} {'; '.join(texts)}. Give each part once.")
    first = parts[numbers.index(1)]
    known = {point.target: point for data in (*parts, first) for point in points_of(data)}  # the original is that of the first
    points = [known[target] for target in ("original", *first["part"]["targets"])]
    refuse_none(points[1:])
    whole = {key: value for key, value in first.items() if key != "part"}
    return {**whole, "points": [asdict(point) for point in front(points)]}


def _shared(data: Mapping[str, Any]) -> dict[str, Any]:
    """What all parts of a sweep have in common."""
    own = data["part"]
    return {
        "number of parts": own["part"].split("/")[1], "model": data["model"]["sha256"], "targets": own["targets"],
        "options of the plan": own["plan"], "data, scores or repair": data["options"],
    }  # fmt: skip


def refuse_none(points: Sequence[Point]) -> None:
    """Raises:
    TargetError: no target was reached.
    """
    if all(point.failure for point in points):
        raise TargetError(f"none of the {len(points)} targets can be reached. The first: {points[0].failure}")


def points_of(data: Mapping[str, Any]) -> list[Point]:
    """Points from the data of a sweep."""
    return [Point(**{**row, "size": row["size"] and Size(**row["size"])}) for row in data["points"]]


def _read(path: Path) -> dict[str, Any]:
    try:
        data = dict(json.loads(path.read_text(encoding="utf-8")))
        number, count = map(int, data["part"]["part"].split("/"))
        assert data["format"] == "sfp_onnx sweep" and 1 <= number <= count and points_of(data) and data["options"] is not None
        assert {"targets", "plan"} <= data["part"].keys() and data["model"]["sha256"]
    except OSError as error:
        raise DataError(f"{path}: cannot read it: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise DataError(f"{path}: no part of a sweep. Expected the JSON that `sfp-onnx sweep --part 1/4 -o FILE` writes.") from error
    return data


def sweep_data(
    points: Sequence[Point], analysis: Analysis, scored: Candidates, part: Mapping[str, Any] | None = None
) -> dict[str, Any]:  # fmt: skip
    """A sweep as plain data for JSON; ``part``: which part of which targets, and the options that all parts must share."""
    model = {"path": str(analysis.model.source), "sha256": analysis.model.sha256}
    data = {
        "format": "sfp_onnx sweep", "version": 1, "model": model, "options": dict(scored.recorded),
        "points": [asdict(point) for point in points],
    }  # fmt: skip
    return data if part is None else {**data, "part": json.loads(json.dumps(part, default=str))}
