"""What came of a run, in one sentence; and the same with all figures as a model card in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.types import number
from ..evaluation.measures import MEASURES
from .text import PLAIN, text_of

if TYPE_CHECKING:  # what is only told
    from ..evaluation import Evaluation
    from .manifest import Pruned

PARTS = ((0.48, 0.52, "half"), (0.32, 0.345, "a third of"), (0.24, 0.26, "a quarter of"))
SAME, MUCH = 0.03, 1.15  # times within this are equal; factors from this on are said as such
FINE, BAD = 1.0, 5.0  # points that accuracy may fall, in green, and from which on it is red


@dataclass(frozen=True)
class Conclusion:
    """A sentence, and whether it is good news; None: it depends."""

    text: str
    good: bool | None = None


@dataclass(frozen=True)
class Judged:
    """What a model is worth: the ``before`` and ``after`` of a measure on ``samples``. ``percent``: it is a share; ``larger`` is better;
    ``to_original``: it compares with the original, whose own value says nothing."""

    name: str
    before: float
    after: float
    samples: int
    percent: bool = True
    larger: bool = True
    to_original: bool = False

    @property
    def lost(self) -> float | None:
        """Points lost, where it is a share of what is right."""
        return 100 * (self.before - self.after) if self.percent and self.larger else None

    def told(self) -> str:
        """In words."""
        old, new = (f"{100 * value:.1f}" if self.percent else f"{value:.4g}" for value in (self.before, self.after))
        unit, on = " %" if self.percent else "", f"on {self.samples} samples"
        if self.to_original:
            return f"{WORDS.get(self.name, f'{self.name} with the original')} {new}{unit} {on}"
        figures, change = f"({old} -> {new}{unit} {on})", 100 * (self.after - self.before)
        if self.lost is None:
            return f"{self.name} {old} -> {new}{unit} {on}"
        right = self.name == "top-1"
        if not round(change, 1):
            return f"{'as right' if right else f'{self.name} as high'} as before {figures}"
        way = ("more right" if change > 0 else "less right") if right else f"{'more' if change > 0 else 'less'} {self.name}"
        return f"{abs(change):.1f} points {way} {figures}"


WORDS = {"agreement": "the same answer as the original:", "centred error": "error to the original", "cosine": "cosine to the original"}


def judged(first: Evaluation, last: Evaluation) -> Judged | None:
    """The main measure of two models; None where nothing can be compared."""
    if last.value is None:
        return None
    measure = MEASURES.get(last.metric)
    own = measure is None or measure.labelled
    percent = measure is not None and last.metric not in PLAIN
    larger = measure is None or measure.larger
    return Judged(last.metric, first.value or 0.0, last.value, last.samples, percent, larger, not own)


def pace(ratio: float) -> str:
    """A time relative to the original's."""
    if ratio < 1 - SAME:
        return f"{1 / ratio:.1f}x faster" if 1 / ratio >= MUCH else f"{1 / ratio - 1:.0%} faster"
    if ratio <= 1 + SAME:
        return "as fast as before"
    return f"{ratio:.1f}x slower" if ratio >= MUCH else f"{ratio - 1:.0%} slower"


def _ratio(first: Evaluation, last: Evaluation) -> float | None:
    """Of the times: that of the least and that of the medians, whichever says less; 1 where they contradict each other."""
    least = last.latency_ratio
    if least is None or not first.latency_median_ms or not last.latency_median_ms:
        return least
    low, high = sorted((least, last.latency_median_ms / first.latency_median_ms))
    return min(max(1.0, low), high)


def part_of(share: float, what: str) -> str:
    """A share of something."""
    if abs(share - 1) < 0.005:
        return f"all {what}" if what.startswith("of") else f"the same {what.removeprefix('the ')}"
    word = next((word for low, high, word in PARTS if low <= share <= high), f"{share:.0%} of")
    return f"{word} {what}"


def concluded(
    before: Mapping[str, Any], after: Mapping[str, Any], ratio: float | None, worth: Judged | None, source: str = ""
) -> Conclusion:
    """The sentence: ``before`` and ``after`` hold macs and bytes; ``ratio`` is that of times (None: not measured), from a ``source``."""
    parts = [pace(ratio) + source] if ratio is not None else []
    if ratio is None and before.get("macs"):
        parts.append(part_of(after["macs"] / before["macs"], "the multiplications"))
    if before.get("bytes") and after.get("bytes"):
        parts.append(part_of(after["bytes"] / before["bytes"], "the size"))
    parts += [worth.told()] if worth is not None else []
    missing = " and ".join(name for name, there in (("time", ratio), ("accuracy", worth)) if there is None)
    text = ", ".join(parts) + (f"; {missing} not measured" if missing else "")
    lost = worth.lost if worth is not None else None
    if (lost is not None and lost > BAD) or (ratio is not None and ratio > 1 + SAME):
        return Conclusion(text, False)
    return Conclusion(text, True if lost is not None and lost <= FINE else None)


def of_models(results: Sequence[Evaluation]) -> Conclusion | None:
    """What the last of some measured models is against the first; None if there is but one."""
    if len(results) < 2:
        return None
    first, last = results[0], results[-1]
    said = concluded(vars(first.size), vars(last.size), _ratio(first, last), judged(first, last))
    return Conclusion(f"{last.model} against {first.model}: {said.text}", said.good)


def of_run(result: Pruned, sizes: tuple[int, int]) -> Conclusion:
    """What a pruned model is against the original; ``sizes``: bytes of both files. Times that only a plan measured are taken where there
    are no others."""
    latency = result.plan.figures.get("latency")
    ratio = latency["actual"] / latency["before"] if latency else None
    elsewhere = ratio is not None and result.plan.options.get("device_profile") is not None
    worth, source = None, " (predicted from the profile)" if elsewhere else ""
    if result.packaged is not None and not elsewhere:
        ratio = [step.latency_ratio for step in result.packaged.steps if step.name != "ort"][-1]
    if result.evaluation:
        worth = judged(*result.evaluation)
        if not elsewhere:
            ratio = _ratio(*result.evaluation) or ratio
    (before, after), plan = sizes, result.plan
    return concluded({"macs": plan.before.macs, "bytes": before}, {"macs": plan.after.macs, "bytes": after}, ratio, worth, source)


# ---- the model card --------------------------------------------------------------------------------------------------


def card(result: Pruned, command: str) -> str:
    """A model card in Markdown, from what the manifest records and the ``command`` that was typed."""
    known = result.manifest
    name, model, output = (known["output"]["path"] or "the pruned model"), known["model"], known["output"]
    rows = [("MACs per sample", *(number(known[when]["macs"]) for when in ("before", "after")))]
    rows += [("parameters", *(number(known[when]["params"]) for when in ("before", "after")))]
    rows += [("bytes of the file", number(model["bytes"]), number(output["bytes"]))]
    if result.evaluation:
        first, last = result.evaluation
        if last.value is not None:
            rows += [(last.metric, text_of(last.metric, first.value), text_of(last.metric, last.value))]
        for title, field, form in CARD:
            if getattr(last, field) is not None and last.metric != field:
                how = {"latency_min_ms": last.timing, "energy_mj": last.energy}.get(field)
                title = f"{title} ({how})" if how else title
                rows += [(title, *(format(getattr(one, field), form) for one in result.evaluation))]
    lines = [f"# {name.rsplit('/', 1)[-1]}", "", f"{model['path']}, with channels removed by sfp_onnx: {known['verdict']}.", ""]
    lines += ["| | original | this model |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    lines += ["", "## Data", ""]
    uses = (("data", "Scored and repaired with"), ("test_data", "Measured on"))
    seen = [_data(words, known[key]) for key, words in uses if known[key]]
    lines += seen or ["No data were used: channels were scored by their weights, and nothing is known of the accuracy."]
    lines += ["", "## How it was made", "", f"    {command}", ""]
    options = known["options"]
    lines += [f"- Score `{options.get('score')}`, allocation `{options.get('allocation')}`, seed {options.get('seed')}."]
    lines += [f"- Repair: {result.repaired.kind}." if result.repaired else "- No repair: what is left has the weights of the original."]
    lines += [f"- {', '.join(f'{package} {version}' for package, version in known['versions'].items())}."]
    lines += [f"- SHA-256 of the original {model['sha256']}", f"- SHA-256 of this model {output['sha256']}", "", "## Limits", ""]
    lines += ["- The purpose, the licence and the limits of the original are those of this model."]
    lines += ["- " + ("Equal to the original with the removed channels at zero (checked before the repair)." if result.verification
                      else "Not verified.")]  # fmt: skip
    if not result.evaluation:
        lines += ["- Accuracy and time were not measured (no test data)."]
    return "\n".join([*lines, *(f"- {note}" for note in result.notes)]) + "\n"


CARD = (
    ("agreement with the original", "agreement", ".2%"), ("latency, ms", "latency_min_ms", ".3f"),
    ("energy of a run, mJ", "energy_mj", ".4g"),
)  # fmt: skip


def _data(words: str, data: Mapping[str, Any]) -> str:
    return f"- {words} {data['samples']} samples of {data['name']}, labels {data['labels']}, SHA-256 {data['sha256']}"
