"""Sections of a report about what was measured: time per layer, the steps of the packaging, all figures."""

from __future__ import annotations

from collections.abc import Sequence

from ..evaluation import Evaluation
from ..export import Packaged
from ..latency.profiling import LayerTimes
from . import Section, Table, pair_bars, short_names
from .text import number

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

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.2%}"

    rows = [
        (
            own.name, number(own.bytes) + "B", share(own.top1), share(own.agreement),
            "-" if own.relative_error is None else f"{own.relative_error:.4f}", f"{own.latency_ms:.3f}", f"{own.latency_ratio:.2f}",
        )
        for own in packaged.steps
    ]  # fmt: skip
    bars = pair_bars(
        "Bytes of the original (pale) and of every form", [own.name for own in packaged.steps],
        [packaged.steps[0].bytes] * len(rows), [own.bytes for own in packaged.steps], ("original", "this form"),
    )  # fmt: skip
    table = Table(("step", "file", "top-1", "agreement", "rel. error", "min ms", "ratio"), tuple(rows))
    words = "Each step starts from the one before. Agreement and error are to the pruned float model, the ratio of times to the original."
    return [Section("Packaging", (words,), (bars,), table)]


def figures_section(measured: Sequence[Evaluation]) -> Section:
    """All that was measured of every model."""
    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    rows = [
        (
            own.model, shown(own.top1, ".2%"), shown(own.agreement, ".2%"), shown(own.kl, ".4f"), shown(own.relative_error, ".4f"),
            number(own.size.macs), number(own.size.params), number(own.size.bytes or 0), shown(own.latency_min_ms, ".3f"),
            shown(own.latency_ratio, ".2f"),
        )
        for own in measured
    ]  # fmt: skip
    header = ("model", "top-1", "agreement", "KL", "rel. error", "MACs", "params", "bytes", "min ms", "ratio")
    return Section("All figures", (), (), Table(header, tuple(rows)))
