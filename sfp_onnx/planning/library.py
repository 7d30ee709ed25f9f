"""What planning measured of a model, kept in a file: any further target is solved from it, without data and without measuring again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import DataError, PlanError
from ..core.options import InspectOptions, MeasureOptions, RepairOptions
from ..core.system import versions
from ..core.types import FloatArray, Group, Spectrum
from ..graph import Model
from ..graph.arrays import Arrays, Named, write_arrays

FORMAT, VERSION, MADE_BY = "sfp_onnx plan library", 1, "`sfp-onnx plan --save-library`"


@dataclass(frozen=True)
class Library:
    """What was measured of a model: the score of every unit, the error of a group by the number of units that it keeps (``errors``), both
    with what sensitivity they were weighed by, and notes on how; what is ``recorded`` of score, data, repair and shapes goes into every
    plan. ``profile``: latency tables of a device (None: no time was asked for). ``spectra``: of layers that may become two."""

    recorded: Mapping[str, Any]
    scores: FloatArray
    errors: Mapping[str, FloatArray]
    notes: tuple[str, ...] = ()
    profile: Mapping[str, Any] | None = None
    model_sha256: str = ""
    versions: Mapping[str, str] = field(default_factory=versions)
    spectra: Mapping[str, Spectrum] = field(default_factory=dict)

    @property
    def repair(self) -> RepairOptions | None:
        """The repair that the scores are for."""
        known = self.recorded.get("repair")
        return None if known is None else RepairOptions(fit=known["fit"], seed=known["seed"], finetune=known.get("finetune", 0))

    @property
    def measures(self) -> MeasureOptions:
        """What the outputs meant."""
        return MeasureOptions(**self.recorded.get("measures", {}))


def save_library(path: str | Path, library: Library, inputs: Iterable[Path] = ()) -> None:
    """Write a library, atomically; equal ones give equal bytes.

    Raises:
        OutputError: the path cannot be written.
    """
    facts = {name: getattr(library, name) for name in ("model_sha256", "versions", "recorded", "notes", "profile")}
    arrays = [Named("scores", library.scores), *(Named(f"errors/{at}", row) for at, row in enumerate(library.errors.values()))]
    arrays += [Named(f"{part}/{at}", value) for at, row in enumerate(library.spectra.values()) for part, value in vars(row).items()]
    facts |= {"format": FORMAT, "version": VERSION, "groups": list(library.errors), "layers": list(library.spectra)}
    write_arrays(Path(path), arrays, inputs, json.loads(json.dumps(facts)))


def read_library(path: str | Path) -> Library:
    """Read a library.

    Raises:
        DataError: no such file, or another one.
    """
    with closing(Arrays(path, FORMAT, VERSION, MADE_BY)) as held:
        names, sha256 = held.fact("groups", list), held.fact("model_sha256", str)
        scores, errors = held["scores"], {str(name): held[f"errors/{at}"] for at, name in enumerate(names)}
        recorded, notes = held.fact("recorded", dict), tuple(map(str, held.fact("notes", list)))
        layers, parts = held.facts.get("layers", ()), [part.name for part in fields(Spectrum)]
        spectra = {str(name): Spectrum(*(held[f"{part}/{at}"] for part in parts)) for at, name in enumerate(layers)}
        profile, made_by = held.fact("profile", (dict, type(None))), held.fact("versions", dict)
        return Library(recorded, scores, errors, notes, profile, sha256, made_by, spectra)


def checked(path: str | Path, model: Model, groups: Sequence[Group], asked: Mapping[str, Any]) -> Library:
    """The library of a model, as ``asked`` for (see `compare`).

    Raises:
        DataError: no such file, or another one. PlanError: it was made of another model, with other data, options or versions; which.
    """
    library = read_library(path)
    compare(f"{path}: the library was made", vars(library), model, asked)
    finite = np.isfinite(library.scores).all() and library.scores.shape == (sum(group.width for group in groups),)
    widths = {group.name: group.width + 1 for group in groups}
    if not finite or any(row.shape != (widths.get(name),) for name, row in library.errors.items()):
        raise DataError(f"{path}: the library is damaged: its scores are not those of this model. Make it again with --save-library.")
    return library


def compare(made: str, facts: Mapping[str, Any], model: Model, asked: Mapping[str, Any]) -> None:
    """Refuse what was measured of another model, with other versions, or otherwise than it is asked for now; what is recorded counts as
    far as both sides know it. ``made`` begins the message.

    Raises:
        PlanError: what differs.
    """
    if facts["model_sha256"] != model.sha256:
        both = f"SHA-256 {facts['model_sha256'][:12]}..., that of {model.name} is {model.sha256[:12]}..."
        raise PlanError(f"{made} of another model: {both}. Make it again, of this model.")
    now, then = versions(), _flat(facts["recorded"])
    pairs = {f"version of {name}": (facts["versions"].get(name), now[name]) for name in now}
    pairs |= {what: (then.get(what), value) for what, value in _flat(asked).items()}
    differ = [f"{what}: {old} then, {new} now" for what, (old, new) in pairs.items() if old != new]
    if differ:
        raise PlanError(f"{made} otherwise: {'; '.join(differ)}. Ask for the same, or make it again.")


def _flat(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """What is compared, by names for people; where files lie is not."""
    plain = json.loads(json.dumps(recorded))
    parts = ("data", "repair", "measures", "sample_shapes")
    nested = {f"{part} {name}": value for part in parts if part in plain for name, value in (plain[part] or {"fit": "none"}).items()}
    return {key: value for key, value in {**plain, **nested}.items() if key not in (*parts, "data name")}


def traced_as(recorded: Mapping[str, Any], options: InspectOptions) -> InspectOptions:
    """How a model is traced without the data: with the shapes that something was measured on."""
    return replace(expanded_as(recorded, options), input_shapes=options.input_shapes or recorded.get("sample_shapes"))


def expanded_as(recorded: Mapping[str, Any], options: InspectOptions) -> InspectOptions:
    """The same options, and what is expanded of what was measured."""
    layernorm, projected = (bool(getattr(options, name) or recorded.get(name)) for name in ("cut_layernorm", "expand_outputs"))
    return replace(options, cut_layernorm=layernorm, expand_outputs=projected)
