"""A dilution from beginning to end: its options, its result with the manifest, and `dilute`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx

from ... import graph
from ...core.errors import DataError, ModelError, OptionError, TargetError, VerificationError
from ...core.options import AMOUNT, CHANNELS, REPAIR, Checked, DataOptions, InspectOptions, MeasureOptions, RepairOptions, option, rare
from ...core.system import log, need, versions
from ...core.types import Array, BoolArray, Shown, Size
from ...coupling.analysis import Analysis, DataSource, Progress, describe, feeds_of, inspect, silent
from ...coupling.trace import random_feeds
from ...cut import cut, verify
from ...data.dataset import Dataset
from ...evaluation import Evaluation, evaluate
from ...graph.load import ModelSource, nested
from ...graph.save import file_bytes, fingerprint, full_size, save, to_proto, together
from ...pipeline.opened import Sources, tell
from ...repair.lockstep import repair
from ...report.manifest import write_json
from ...runtime import open_model
from ...scores.statistics import scales
from ..sfp.probe import PROBES, ProfileOptions
from . import METHODS, Method, connections, ends, find_method

METHOD_NAMES = ", ".join(method.pattern or name for name, method in METHODS.items())


@dataclass(frozen=True)
class DiluteOptions(Checked):
    """How to dilute.

    ``method``: None means `obs` with data, else `l1`. ``rate``: share of the kernels (weights, blocks) that leaves; None for methods that
    set it. ``scope``: the same share of every "layer" or "filter", or one ranking of all ("global"). ``layers``: a regular expression on
    names of nodes or weights. ``refit``: None means with data. ``retrain``: epochs of training of what is left. ``force``: dilute
    layers whose labels carry too little signal, too.
    ``probe``, ``pool``: as in `ProfileOptions`. ``repair``: how the rest is re-fitted.
    """

    method: str | None = option(None, f"How connections are chosen: {METHOD_NAMES}.  [default: obs with data, else l1]", CHANNELS,
                                metavar="NAME")  # fmt: skip
    rate: float | None = option(None, "Share of the kernels (weights, blocks) to remove; AFCC and nm set it themselves.", AMOUNT,
                                low=0, high=1, high_open=True)  # fmt: skip
    scope: str = option("layer", "The same share of every layer, one ranking over all layers, or the same share of every filter.", AMOUNT,
                        choices=("layer", "global", "filter"))  # fmt: skip
    layers: str | None = option(None, "Layers (node or weight names) to dilute.  [default: all]", CHANNELS, metavar="REGEX")
    refit: bool | None = option(None, "Re-fit the remaining weights by least squares.  [default: with data]", REPAIR,
                                flag="refit/--no-refit")  # fmt: skip
    retrain: int = option(0, "Afterwards train what is left so many epochs, by labels or else by the original (extra `train`).", REPAIR,
                          low=0)  # fmt: skip
    retrain_lr: float = rare(1e-3, "Learning rate of --retrain at the start.", REPAIR, low=0, low_open=True, high=1)
    force: bool = option(False, "Methods by labels (afcc): dilute layers even where labels carry too little signal.", CHANNELS)
    seed: int = 0
    probe: str = rare("sgd", "Methods by labels (afcc): how class profiles are learned.", CHANNELS, choices=tuple(PROBES))
    pool: int = rare(4, "Methods by labels (afcc): side to which class profiles pool maps.", CHANNELS, low=1)
    repair: RepairOptions = RepairOptions(fit="lstsq")


@dataclass(frozen=True, repr=False)
class Diluted(Shown):
    """The result of `dilute`. ``cut`` units were physically removed; ``checks`` is the relative difference that each exact step
    (the removal of dead channels) made; ``traced`` says for which sizes of dynamic inputs multiply-accumulates were counted."""

    model: graph.Model
    original: graph.Model
    options: DiluteOptions
    layers: tuple[connections.DilutedLayer, ...]
    skipped: tuple[connections.SkippedLayer, ...]
    notes: tuple[str, ...]
    cut: int
    checks: Mapping[str, float]
    before: Size
    after: Size
    data: Mapping[str, Any] = field(default_factory=dict)
    traced: Mapping[str, Any] = field(default_factory=dict)
    evaluation: tuple[Evaluation, ...] = ()
    manifest: Mapping[str, Any] = field(default_factory=dict)

    def summary(self) -> str:
        """How much is zero."""
        share = connections.removed_share(self.layers)
        return f"{self.original.name}, {share:.1%} of the weights of {len(self.layers)} layers are zero; {len(self.skipped)} layers skipped"

    def save(self, path: str | Path, external: bool | None = None, sparse: bool = False) -> Path:
        """Write the model atomically; ``sparse``: with sparse initializers where they are smaller."""
        return save(self.model, path, external, sparse)

    def to_proto(self, sparse: bool = False) -> onnx.ModelProto:
        """The model as a self-contained ModelProto."""
        return to_proto(self.model, sparse)


def dilution_manifest(result: Diluted, output: Path | None = None, sparse: bool = False) -> dict[str, Any]:
    """Everything needed to check or repeat a dilution, as plain data for JSON. ``output``: where it is (to be) saved, ``sparse`` or not."""
    digest, size = fingerprint(result.model, output, sparse=sparse) if output else (None, full_size(result.model))
    return {
        "format": "sfp_onnx dilution manifest", "version": 1, "versions": versions(),
        "model": {"path": str(result.original.source), "sha256": result.original.sha256, "bytes": file_bytes(result.original)},
        "output": {"path": str(output) if output else None, "sha256": digest, "bytes": size},
        "options": asdict(result.options), "data": dict(result.data) or None,
        "traced": dict(result.traced), "before": asdict(result.before), "after": asdict(result.after),
        "removed_channels": result.cut, "checks": dict(result.checks),
        "layers": [asdict(item) for item in result.layers], "skipped": [asdict(item) for item in result.skipped],
        "notes": list(result.notes), "evaluation": [asdict(one) for one in result.evaluation] or None,
    }  # fmt: skip


# ---- after the dilution ----------------------------------------------------------------------------------------------


def batches(analysis: Analysis, data: Dataset | None) -> dict[str, Mapping[str, Array]]:
    """A few inputs to check on: random ones, and calibration data."""
    feeds: dict[str, Mapping[str, Array]] = {"random": random_feeds(graph.inputs(analysis.model), analysis.prepared.feeds, seed=1)}
    if data is not None and (first := next(iter(data.batches()), None)):
        feeds["calibration"] = first[0]
    return feeds


def check(model: graph.Model, masks: Mapping[str, BoolArray], feeds: Mapping[str, Mapping[str, Array]]) -> None:
    """Masked weights are zero, outputs are finite.

    Raises:
        VerificationError: else.
    """
    constants = graph.Constants(model)
    for name, mask in masks.items():
        if np.any(constants[name][~mask]):
            raise VerificationError(f"{model.name}: internal error: a masked weight of '{name}' is not zero. Please report it.")
    session = open_model(model)
    for kind, inputs in feeds.items():
        for port, value in zip(graph.outputs(model), session.run(inputs), strict=True):
            if isinstance(value, np.ndarray) and value.dtype.kind == "f" and not np.isfinite(value).all():
                raise VerificationError(f"{model.name}: output '{port.name}' of the diluted model is not finite on {kind} input")


def without_dead(result: Diluted, data: Dataset | None) -> Diluted:
    """Fold constant channels, then cut what nobody reads, until nothing is left to do."""
    model, notes, checks = result.model, list(result.notes), dict(result.checks)
    left = units = zero = folded = 0
    while True:
        analysis = inspect(model, data=data)
        feeds = batches(analysis, data)
        known = connections.fold_constants(analysis.prepared.model, analysis.prepared, analysis.coupling, list(feeds.values()))
        dead = connections.unread(known.model, analysis.coupling)
        if not dead.any():
            left = known.left
            break
        try:
            smaller = nested(cut(replace(analysis.prepared, model=known.model), analysis.coupling, dead), analysis.prepared.nest)
            error = max(verify.compare(model, smaller, graph.tensor_types(model), [], feeds).errors.values(), default=0.0)
        except (VerificationError, ModelError):
            notes.append(f"{int(dead.sum())} channels without connections were left: the model would not stay the same without them")
            break
        model, units, zero, folded = smaller, units + int(dead.sum()), zero + known.zero, folded + known.folded
        checks["dead channels"] = max(checks.get("dead channels", 0.0), error)
    if units:
        notes.append(f"{units} channels without connections were removed ({zero} of them constant at zero, {folded} folded into biases)")
    if left:
        notes.append(f"{left} constant channels were left: a padded convolution, or a layer without a bias of its own, reads them")
    return replace(result, model=model, cut=units, checks=checks, notes=tuple(notes), after=analysis.size())


def dilute(
    source: ModelSource | Analysis, options: DiluteOptions, data: DataSource | None = None, progress: Progress = silent,
    measured: ends.Measured | None = None, *, test_data: DataSource | None = None, data_options: DataOptions = DataOptions(),
    inspect_options: InspectOptions = InspectOptions(), output: Path | None = None, manifest: Path | None = None, sparse: bool = False,
    measure_options: MeasureOptions = MeasureOptions(),
) -> Diluted:  # fmt: skip
    """Zero connections without changing a shape, re-fit the rest, and remove channels that are left without any; then measure and write
    what is asked for.

    Args:
        measured: what `look` measured of the same analysis before.
        test_data: data that the original and the result are measured on.
        output, manifest: where the model (``sparse``: with sparse initializers where they are smaller) and its manifest go.

    Raises:
        OptionError: unknown method, rate out of range or missing.
        DataError: the method or the re-fit needs data or labels.
        ModelError: the method needs a classifier.
        TargetError: nothing was diluted.
        VerificationError: a step changed what it must not change.
    """
    named = options.method is not None
    options = options if named else replace(options, method=default_method(data is not None))
    check_dilution(options, data is not None)
    inputs = Sources(data, None, test_data, data_options, inspect_options, (), measure_options).open(source, [output, manifest])
    log.info(f"method: {options.method}{'' if named else ' (default)'}")
    tell(inputs.reading, inputs.test_data is not None)
    result = _diluted(inputs.analysis, options, inputs.data, progress, measured)
    if inputs.test_data is not None:
        first, last = evaluate([result.original, result.model], inputs.test_data, progress=progress, how=inputs.read(inputs.test_data))
        result = replace(result, evaluation=(first, replace(last, model=str(output or last.model))))
    recorded = dilution_manifest(result, output, sparse)
    with together():
        if output is not None:
            result.save(output, sparse=sparse)
        if manifest is not None:
            write_json(manifest, recorded, [*inputs.paths, *filter(None, [output])])
    return replace(result, manifest=recorded)


def _diluted(
    analysis: Analysis, options: DiluteOptions, data: Dataset | None, progress: Progress, measured: ends.Measured | None
) -> Diluted:
    needs = check_dilution(options, data is not None).needs
    if measured is None:
        wanted = ProfileOptions(options.probe, options.pool, seed=options.seed) if "profiles" in needs else None
        measured = ends.look(analysis, options.layers, data, wanted, progress, "losses" in needs)
    masked = choose_masks(analysis, measured, options)
    diluted, notes = connections.zeroed(analysis.prepared.model, masked.masks), masked.notes
    if data is not None and options.refit is not False:
        diluted, words = refitted(analysis, diluted, masked.masks, data, replace(options.repair, seed=options.seed), progress)
        notes += (words,)
    if options.retrain:
        diluted, words = _retrained(analysis, diluted, masked.masks, data, options)
        notes += (words,)
    check(diluted, masked.masks, batches(analysis, data))
    size, told = analysis.size(), describe(data) if data else {}
    diluted = nested(diluted, analysis.prepared.nest)
    result = Diluted(
        graph.stamped(diluted), analysis.model, options, masked.figures, masked.skipped, notes, 0, {}, size, size, told, analysis.traced
    )
    with progress("removing dead channels", 1) as advance:
        result = without_dead(result, data)
        advance(1)
    graph.check(result.model)
    return result


def _retrained(
    analysis: Analysis, diluted: graph.Model, masks: Mapping[str, BoolArray], data: Dataset | None, options: DiluteOptions
) -> tuple[graph.Model, str]:
    """The masks stay as they are, the weights that they leave are trained (Tzach et al. do so by labels; without labels, the original is
    asked)."""
    assert data is not None
    from ..training import words
    from ..training.engine import Schedule
    from ..training.masked import DECAY, MOMENTUM, retrained

    schedule = Schedule(options.retrain, options.retrain_lr, 64, seed=options.seed, momentum=MOMENTUM, decay=DECAY)
    return retrained(analysis, diluted, masks, data, schedule, lambda said: log.info(words(said)))


class Masked(NamedTuple):
    """Masks by name of the weight, in its layout (True: may be other than zero); what they remove; skipped layers; notes."""

    masks: dict[str, BoolArray]
    figures: tuple[connections.DilutedLayer, ...]
    skipped: tuple[connections.SkippedLayer, ...]
    notes: tuple[str, ...]


def choose_masks(analysis: Analysis, measured: ends.Measured, options: DiluteOptions) -> Masked:
    """What a method removes from the layers that it suits.

    Raises:
        OptionError: unknown method.
        TargetError: the method suits no layer.
    """
    method, given = find_method(options.method or default_method(True), options.seed)
    suited, skipped, notes = list(measured.targets), list(measured.skipped), list[str]()
    if method.tile(given).whole:
        deep = "depthwise: a kernel is a channel there, which `prune` removes"
        skipped += [connections.SkippedLayer(target.name, deep) for target in suited if target.channelwise]
        suited = [target for target in suited if not target.channelwise]
    if "profiles" in method.needs:
        suited, refused, warned = ends.gated(suited, measured.ends, method, options.force)
        skipped, notes = skipped + refused, [*measured.notes, *warned]
    if not suited:
        raise TargetError("nothing was diluted. " + " ".join(f"'{item.layer}': {item.reason}." for item in skipped[:5]))
    if method.fixed and options.rate is not None:
        sets = "the labels set" if "profiles" in method.needs else "the pattern sets"
        notes.append(f"--rate {options.rate:g} is ignored: with {options.method} {sets} the rate")
    model, factors = analysis.prepared.model, scales(analysis.prepared.index, analysis.coupling)
    weights, held = {target.name: target.weight for target in suited}, graph.initializers(model)
    chosen = connections.choose(
        lambda: connections.layer_views(model, suited, factors, measured.rms, measured.ends, measured.losses),
        weights, method, given, options.rate or 0.0, options.scope,
    )  # fmt: skip
    pairs = zip(suited, chosen, strict=True)
    masks = {target.weight: connections.as_weight(item.mask, target.axes, held[target.weight][0]) for target, item in pairs}
    return Masked(masks, tuple(item.figures for item in chosen), tuple(skipped), tuple(notes))


def default_method(with_data: bool) -> str:
    """The method that is used if none is named."""
    return "obs" if with_data else "l1"


def check_dilution(options: DiluteOptions, with_data: bool) -> Method:
    """The method, after a check of the options that needs no model.

    Raises:
        OptionError, DataError: as `dilute`.
    """
    method, _ = find_method(options.method or default_method(True))
    if options.rate is None and not method.fixed:
        raise OptionError(f"method {options.method} needs --rate, the share of the connections to remove, such as --rate 0.5")
    if options.retrain and not with_data:
        raise DataError("--retrain needs --data")
    if options.retrain:
        need("torch", "train", "--retrain")
    if method.needs and not with_data:
        free = ", ".join(item.pattern or name for name, item in METHODS.items() if not item.needs)
        raise DataError(f"method {options.method} needs calibration data: give --data, or use a method that needs none: {free}")
    if options.refit and not with_data:
        raise DataError("--refit needs calibration data: give --data")
    return method


def refitted(
    analysis: Analysis, diluted: graph.Model, masks: Mapping[str, BoolArray], data: Dataset, options: RepairOptions, progress: Progress
) -> tuple[graph.Model, str]:
    """The diluted model with what remains re-fitted, layer by layer, so that it answers like the original; and what was done.

    The one place that calls the repair. Layers behind a diluted one are re-fitted, too: their input has changed.
    """
    feeds, none = feeds_of(analysis, data), np.zeros(analysis.coupling.units, bool)
    with progress("re-fitting", 0) as advance:
        model, fits = repair(analysis.prepared, analysis.coupling, none, diluted, feeds, options, masks, advance)
    weights, bias, unchanged = (sum(fit.kind == kind for fit in fits) for kind in ("weights", "bias", "unchanged"))
    return model, f"re-fit on {data.samples} samples: weights of {weights} layers, the bias alone of {bias}; {unchanged} unchanged"
