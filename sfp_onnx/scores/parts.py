"""Calibration in parts: each part runs its share of the data, and all parts together give the scores that one pass over all data gives.

What a part knows is what `obs` and the scores from statistics of activations need: sums per layer (`shares.Seen`), sums per channel
(`Moments`), and (the first part) the samples that sensitivity is told on, so that whoever joins the parts needs no data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any, Protocol

import numpy as np

from ..core.errors import DataError, OptionError
from ..core.options import RepairOptions, ScoreOptions, parse_part
from ..core.system import versions
from ..core.types import Array, FloatArray, Moments
from ..coupling.analysis import Analysis, Progress, batch_size, batched, feeds_of
from ..data.dataset import Dataset
from ..graph import inputs
from ..graph.arrays import Arrays as Arrays, Named
from ..repair.heads import Pair, moments
from ..repair.ridge import SETTLED
from . import elimination, sensitivity
from .dimensions import judged
from .scoring import SCORES, OfGroups, parse
from .shares import Seen, Share, joined
from .statistics import Site, moments_of, sites

FORMAT, VERSION = "sfp_onnx statistics", 1
WRITTEN = FORMAT, VERSION, "`sfp-onnx plan --part 1/4 --statistics FILE`"
OBS = "obs"


class Source(Protocol):
    """A part: facts, and arrays by name."""

    facts: dict[str, Any]

    def names(self) -> list[str]:
        """Of the arrays."""

    def __getitem__(self, name: str) -> Array:
        """An array."""


@dataclass(frozen=True)
class Held:
    """A part that was not written."""

    facts: dict[str, Any]
    arrays: Mapping[str, Array]

    def names(self) -> list[str]:
        """Of the arrays."""
        return list(self.arrays)

    def __getitem__(self, name: str) -> Array:
        """An array."""
        return self.arrays[name]


# ---- a part ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Collection:
    """A part that is measured while it is read: facts at once, ``arrays`` one after the other."""

    facts: dict[str, Any]
    arrays: Iterator[Named]


def needs_of(text: str) -> frozenset[str]:
    """Statistics of activations that a score needs.

    Raises:
        OptionError: it needs something else of the data, or no data.
    """
    request = parse(text)
    able = [name for name, own in SCORES.items() if name == OBS or (isinstance(own.prepare, OfGroups) and own.prepare.needs)]
    for single in request.scores:
        if single.needs_data and single.name not in able:
            raise OptionError(f"score '{single.name}' cannot be measured in parts; these can: {', '.join(able)}")
    if not any(single.needs_data for single in request.scores):
        raise OptionError(f"score '{text}' needs no data, so that there is nothing to measure in parts")
    return frozenset[str]().union(*(single.prepare.needs for single in request.scores if isinstance(single.prepare, OfGroups)))


def collected(
    analysis: Analysis, text: str, data: Dataset, part: str, options: ScoreOptions, recorded: Mapping[str, Any], progress: Progress
) -> Collection:
    """A part ("3/16") of the statistics that a score needs; ``recorded``: what all parts must have in common.

    Raises:
        OptionError: no such part, or a score that cannot be measured so. DataError, ModelError: as one pass.
    """
    needs, (number, count) = needs_of(text), parse_part(part)
    looks = sensitivity.looks(analysis, data, options.seed, options.memory)
    ports, whole = [port.name for port in inputs(analysis.model)], replace(data, batch=batch_size(analysis, data))
    fitted = batched(analysis, looks.fitted)
    runs = min([*([whole.runs] if needs else []), *([fitted.runs] if OBS in _names(text) else [])])
    uneven = any(None in reader.shape for reader in data.readers.values())  # stretches of shares end together where batches are alike
    runs = 1 if uneven else runs
    if count > runs:
        why = "samples of different shapes, which are measured in one pass" if uneven else f"{runs} batches"
        raise OptionError(f"--part {part}: the data are {why}; expected at most {runs} parts")
    facts: dict[str, Any] = {
        "format": FORMAT, "version": VERSION, "part": number, "parts": count, "recorded": dict(recorded), "text": text,
        "looks": {"shares": list(looks.shares), "fitted": looks.fitted.samples, "held": looks.held.samples},
        "ports": ports, "runs": runs, "model_sha256": analysis.model.sha256, "versions": versions(),
    }  # fmt: skip
    found: list[Iterator[Named]] = []
    if needs:
        found.append(_moments(analysis, whole.stretch(*_bounds(number, count, whole.runs)), needs, progress))
    if OBS in _names(text):
        found.append(_layers(analysis, fitted, number, count, options, progress))
        found.append(_dimensions(analysis, fitted.stretch(*_bounds(number, count, fitted.runs))))
        if number == 1:
            found.append(_held(analysis, looks.held, ports))
    return Collection(facts, chain.from_iterable(found))


def _bounds(number: int, count: int, runs: int) -> tuple[int, int]:
    """The batches of a part."""
    return runs * (number - 1) // count, runs * number // count


def _moments(analysis: Analysis, data: Dataset, needs: frozenset[str], progress: Progress) -> Iterator[Named]:
    found = moments_of(analysis, data, needs, progress)
    for place, site in enumerate(sites(analysis.coupling)):
        yield Named(f"moments/{place}/count", np.asarray(found[site].count))
        for kind, sums in found[site].sums.items():
            yield Named(f"moments/{place}/{kind}", sums)


def _layers(
    analysis: Analysis, data: Dataset, number: int, count: int, options: ScoreOptions, progress: Progress
) -> Iterator[Named]:
    first, last = _bounds(number, count, data.runs)
    lead = next((at for at, samples in enumerate(accumulate(data.sizes), 1) if samples >= SETTLED), data.runs)
    lead = 0 if first == 0 and last >= lead else lead
    told = RepairOptions(seed=options.seed, rows_per_input=elimination.ROWS, memory=options.memory)
    look = elimination.look_of(analysis.prepared, analysis.coupling, told)
    given = chain(data.stretch(0, lead).batches(), data.stretch(first, last).batches())
    with closing(look.store), progress("reading layers", len(look.layers)) as advance:
        for layer, seen in enumerate(look.seen((feeds for feeds, _ in given), advance, Share(first, data.runs, lead))):
            for name, array in seen.arrays() if seen is not None else ():
                yield Named(f"layers/{layer}/{name}", array)


def _dimensions(analysis: Analysis, data: Dataset) -> Iterator[Named]:
    pairs = judged(analysis)
    prepared = analysis.prepared
    found = moments(prepared.model, pairs, (feeds for feeds, _ in data.batches()), prepared.tokens) if pairs else {}
    for place, pair in enumerate(pairs):
        yield Named(f"dimensions/{place}", found[pair.group.name])


def _held(analysis: Analysis, data: Dataset, ports: Sequence[str]) -> Iterator[Named]:
    """The inputs that tell what reaches the outputs."""
    for batch, feeds in enumerate(feeds_of(analysis, data)):
        for place, name in enumerate(ports):
            if feeds[name].dtype.kind not in "biuf":
                raise OptionError(f"input '{name}' is text, which cannot be kept: measure in one pass")
            yield Named(f"held/{batch}/{place}", feeds[name])


# ---- all parts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Counted:
    """As many samples."""

    samples: int


@dataclass(frozen=True)
class Joined:
    """All parts, in order, as `elimination` reads them."""

    parts: Sequence[Source]

    @property
    def looks(self) -> Any:
        """How often every group is looked at, and the number of samples."""
        known = self.parts[0].facts["looks"]
        return sensitivity.Looks(tuple(known["shares"]), _Counted(known["fitted"]), _Counted(known["held"]))  # type: ignore[arg-type]

    def layers(self) -> Iterator[Seen | None]:
        """What was seen of every layer."""
        at = 0
        while True:  # as many as are asked for
            yield joined([_reader(part, f"layers/{at}/") for part in self.parts])
            at += 1

    def dimensions(self, pairs: Sequence[Pair]) -> dict[str, FloatArray]:
        """Second moments of these queries and keys, by group."""
        every = ([part[f"dimensions/{place}"] for part in self.parts] for place in range(len(pairs)))
        return {pair.group.name: sum(arrays[1:], arrays[0]) for pair, arrays in zip(pairs, every, strict=True)}

    def held(self) -> list[dict[str, Array]]:
        """The inputs that tell what reaches the outputs."""
        first, ports = self.parts[0], self.parts[0].facts["ports"]
        batches = 1 + max((int(name.split("/")[1]) for name in first.names() if name.startswith("held/")), default=-1)
        return [{name: first[f"held/{batch}/{place}"] for place, name in enumerate(ports)} for batch in range(batches)]


def _reader(part: Source, prefix: str) -> Callable[[str], Array | None]:
    names = {name for name in part.names() if name.startswith(prefix)}
    return lambda name: part[prefix + name] if prefix + name in names else None


def shared_by(analysis: Analysis, parts: Sequence[Source]) -> dict[str, Any]:
    """What scores share (`Setting.shared`), of all parts in any order.

    Raises:
        DataError: parts of different runs, or damaged ones. OptionError: parts are missing, or there twice.
    """
    first, count = parts[0].facts, int(parts[0].facts["parts"])
    for part in parts:
        differ = [name for name in first if name != "part" and part.facts.get(name) != first[name]]
        if differ:
            raise DataError(f"--statistics: parts of different runs: they differ in {', '.join(differ)}. Make all with the same command.")
    numbers = [int(part.facts["part"]) for part in parts]
    missing, twice = sorted({*range(1, count + 1)} - {*numbers}), sorted({number for number in numbers if numbers.count(number) > 1})
    if missing or twice:
        texts = [f"{what}: {', '.join(map(str, these))}" for what, these in (("missing", missing), ("there twice", twice)) if these]
        raise OptionError(f"--statistics: parts of {count} {'; '.join(texts)}. Give each part once.")
    ordered = sorted(parts, key=lambda part: int(part.facts["part"]))
    shared: dict[str, Any] = {elimination.SEEN: Joined(ordered)} if OBS in _names(first["text"]) else {}
    needs = needs_of(first["text"])
    return {**shared, "moments": _summed(analysis, ordered, needs)} if needs else shared


def _names(text: str) -> list[str]:
    return [single.name for single in parse(text).scores]


def _summed(analysis: Analysis, parts: Sequence[Source], needs: frozenset[str]) -> dict[Site, Moments]:
    found: dict[Site, Moments] = {}
    for place, site in enumerate(sites(analysis.coupling)):
        every = {kind: [part[f"moments/{place}/{kind}"] for part in parts] for kind in ("count", *sorted(needs))}
        sums = {kind: sum(arrays[1:], arrays[0]) for kind, arrays in every.items()}  # in the order of the parts
        found[site] = Moments({kind: sums[kind] for kind in sorted(needs)}, sums["count"].item())
    return found
