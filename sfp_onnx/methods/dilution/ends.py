"""What is measured of the layers to dilute: class profiles at their two ends, and what each kernel is worth."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np

from ...core.options import RepairOptions
from ...core.types import Array, Coupling, FloatArray, IntArray, Layer
from ...coupling.analysis import Analysis, Progress, batch_size, feeds_of, silent
from ...data.dataset import Dataset
from ...graph import Prepared
from ...scores import elimination, statistics
from ..sfp import probe, profiles
from . import METHODS, Ends, Method, Profile, Site, label_profile
from .connections import SkippedLayer, Target, targets


def ends_of(
    analysis: Analysis, data: Dataset, chosen: Sequence[Target], options: probe.ProfileOptions, progress: Progress
) -> tuple[Mapping[str, Ends | str], list[str]]:
    """Class profiles of what each target reads and makes, or why there are none; and what to tell the user.

    A filter stands for the tensor in which a later layer first reads it: its feature map after activation and pooling. Channels of a
    flattened map share the profile of their filter.

    Raises:
        ModelError: the model is no classifier.
        DataError: the labels do not fit it, or are too few.
    """
    free = ", ".join(method.pattern or name for name, method in METHODS.items() if "profiles" not in method.needs)
    readers = {target.name: _read_later(analysis, target.layer) for target in chosen}
    wanted = {target.layer.data_name for target in chosen} | {layer.data_name for layer in readers.values() if layer}
    known = profiles.class_profiles(analysis, data, options, progress, lambda taps: [tap for tap in taps if tap.tensor in wanted], free)
    layers = {Site(read.tensor, read.axis): read for read in known.layers}
    ends = {target.name: _ends(analysis, target, readers[target.name], layers, known) for target in chosen}
    labels = "the labels of the data" if known.labels == "given" else "the model's own argmax as labels"
    notes = [f"class profiles from {known.samples} samples, with {labels}; {len(known.layers)} probes"]
    if known.missing:
        notes.append(f"{len(known.missing)} of {known.classes} labels do not occur in the data")
    notes += [words for read in known.layers if (words := _said_of_heads(read))]
    return ends, notes


def _read_later(analysis: Analysis, layer: Layer) -> Layer | None:
    """The first later layer that reads all channels that this one makes."""
    units = layer.writes
    if not len(units) or (units < 0).any():
        return None
    later = (other for other in analysis.coupling.layers if other.node.index > layer.node.index)
    return next((other for other in later if np.isin(units, other.source).all()), None)


def _ends(
    analysis: Analysis, target: Target, later: Layer | None, layers: Mapping[Site, profiles.LayerProfile], known: profiles.Profiles
) -> Ends | str:
    reads, reasons, node = layers.get(target.site), dict(known.skipped), target.layer.node
    if reads is None:
        return f"no class profile of what it reads: {reasons.get(target.layer.data_name, 'no layer made it')}"
    near = _profile(reads, reads.filters)
    if later is not None:
        writes = layers.get(Site(later.data_name, later.data_axis))
        if writes is None:
            return f"no class profile of what it makes: {reasons.get(later.data_name, 'no layer reads it')}"
        return Ends(near, _made(target.layer, writes))
    last = max(other.node.index for other in analysis.coupling.layers)
    if node.index == last and analysis.prepared.trace.shapes[node.outputs[0]][1:] == (known.classes,):
        return Ends(near, label_profile(node.outputs[0], known.classes))
    return "no single later layer reads all its filters, and they are not the class scores"


def _made(layer: Layer, known: profiles.LayerProfile) -> Profile:
    """The profile of what a layer makes, from that of the tensor in which it is read. Queries and keys are no part of that: they stand for
    their head."""
    heads = known.heads() if (layer.columns >= 0).any() else None
    if heads is None and np.array_equal(known.units, layer.writes):  # dimensions of a head share its unit
        return _profile(known, np.arange(len(known.units)))
    source = known if heads is None else heads
    order = {int(unit): index for index, unit in enumerate(source.units)}
    return _profile(source, np.asarray([order[int(unit)] for unit in layer.writes]))


def _said_of_heads(known: profiles.LayerProfile) -> str:
    """For how many labels the heads speak that a tensor joins; empty if it joins none."""
    heads = known.heads()
    if heads is None:
        return ""
    counts, every = heads.label_sets.sum(1), int(heads.label_sets.all(0).sum())
    return f"heads in front of '{known.tensor}' stand for {', '.join(map(str, counts))} labels, for {every} of them all of them do"


def _profile(known: profiles.LayerProfile, rows: IntArray) -> Profile:
    """Rows of a layer's profile. evidence[f, l] = M_f[l, l] - mean_k M_f[l, k]; activity[f, l] is the mean over positions."""
    means, weights = known.means.astype(np.float64), known.weights.astype(np.float64)
    evidence: FloatArray = (means * (weights - weights.mean(2, keepdims=True))).sum(1)
    noise, signal = float(known.noise.sum()), float(known.signal.sum())
    snr = signal / noise if noise else (np.finfo(np.float64).max if signal else 0.0)
    return Profile(known.tensor, evidence[rows], means.mean(1)[rows], known.label_sets[rows], snr)


# ---- what each kernel is worth where the rest of its filter is re-fitted without it ----------------------------------

RIDGE = 1e-2


def kernel_losses(
    prepared: Prepared, coupling: Coupling, names: Collection[str], batches: Iterable[Mapping[str, Array]], options: RepairOptions,
    advance: Callable[[int], None] = lambda steps: None,
) -> dict[str, FloatArray]:  # fmt: skip
    """Root mean square error of a filter's output without each of its kernels, after the re-fit of the others, (O, I) by name of the node.

    Layers whose covariance would not fit into memory, or that have too many groups, are left out.

    Raises:
        ModelError: the model cannot be run in segments.
    """
    by_layer = {}
    look = elimination.Look(prepared, coupling, lambda layer: layer.node.name in names, options, RIDGE)
    with closing(look.store):
        for layer, step, blocks in look.observed(batches, advance):
            losses = [block_losses(inputs, inverse) for inputs, inverse in blocks]
            if losses and layer.weight is not None:
                joined = 0 if step.linear.form.out_axis == 0 or layer.weight.out_axis == 0 else 1
                by_layer[layer.node.name] = np.concatenate(losses, joined)
    return by_layer


def block_losses(inputs: elimination.Inputs, inverse: FloatArray) -> FloatArray:
    """q[o, i] = sqrt(w' [(C + r I)^-1]_ii^-1 w) with w = W[o, i] and the rows and columns ii of channel i, (O, I).

    The optimal brain surgeon, a kernel at a time: Hassibi and Stork, NeurIPS 1992; Frantar and Alistarh, NeurIPS 2022.
    """
    rows = np.argsort(inputs.channels, kind="stable").reshape(int(inputs.channels.max()) + 1, -1)
    blocks = inverse[rows[:, :, None], rows[:, None, :]]
    weights = inputs.weights.astype(np.float64)[rows]  # (I, K, O)
    squares = (weights * np.linalg.solve(blocks, weights)).sum(1).T
    return np.asarray(np.sqrt(np.maximum(squares, 0.0)))


# ---- all that is measured --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """The layers to dilute, and what was measured of them: RMS per channel of what each reads, and by layer the class profiles of both
    ends (or why there are none) and what each kernel is worth."""

    targets: tuple[Target, ...]
    skipped: tuple[SkippedLayer, ...]
    rms: Mapping[Site, FloatArray]
    ends: Mapping[str, Ends | str]
    notes: tuple[str, ...] = ()
    losses: Mapping[str, FloatArray] = field(default_factory=dict)


def look(
    analysis: Analysis, layers: str | None, data: Dataset | None, options: probe.ProfileOptions | None = None,
    progress: Progress = silent, losses: bool = False,
) -> Measured:  # fmt: skip
    """Find the layers and measure them; class profiles only with ``options`` for them, what kernels are worth only if ``losses``.
    Several dilutions can share the result.

    Raises:
        OptionError: the expression ``layers`` is invalid or matches nothing.
        ModelError, DataError: profiles are asked for, and the model is no classifier or the labels do not do.
    """
    chosen, skipped = targets(analysis.prepared, analysis.coupling, layers)
    rms = _rms(analysis, chosen, data, progress) if data is not None else {}
    ends, notes = ends_of(analysis, data, chosen, options, progress) if options is not None and data is not None else ({}, [])
    worth = losses_of(analysis, chosen, data, progress) if losses and data is not None else {}
    return Measured(tuple(chosen), tuple(skipped), rms, ends, tuple(notes), worth)


def gated(
    chosen: Sequence[Target], ends: Mapping[str, Ends | str], method: Method, force: bool
) -> tuple[list[Target], list[SkippedLayer], list[str]]:
    """Targets with profiles at both ends and, for methods that stand on labels alone, enough signal in them; the others with
    reasons; warnings for those that were forced."""
    kept, refused, warned = [], list[SkippedLayer](), list[str]()
    for target in chosen:
        profiles = ends[target.name]
        if isinstance(profiles, str):
            refused.append(SkippedLayer(target.name, profiles))
            continue
        if method.nodal and (profiles.to_labels or target.layer.grouped):
            refused.append(SkippedLayer(target.name, f"a convolution, or it makes the class scores: {method.name} is of the nodes between"))
            continue
        least = SNR_LABELS if profiles.to_labels else SNR_FEATURES
        if method.gated and min(profiles.reads.snr, profiles.writes.snr) < least:
            ends_text = f"{profiles.reads.snr:.2f}" + ("" if profiles.to_labels else f" and {profiles.writes.snr:.2f}")
            reason = f"signal-to-noise of the labels {ends_text}, under {least:g}: {method.name} has no basis there"
            if not force:
                refused.append(SkippedLayer(target.name, f"{reason} (--force dilutes it all the same)"))
                continue
            warned.append(f"'{target.name}': {reason}; diluted because of --force")
        kept.append(target)
    return kept, refused, warned


def _rms(analysis: Analysis, chosen: Sequence[Target], data: Dataset, progress: Progress) -> dict[Site, FloatArray]:
    """Root mean square of every channel that a target reads."""
    ranks = {name: len(shape) for name, shape in analysis.prepared.trace.shapes.items()}
    wanted = list(dict.fromkeys(target.site for target in chosen if target.data_axis != 0))
    with progress("calibrating", data.samples) as advance:
        parts = replace(data, batch=batch_size(analysis, data)).batches()
        prepared = analysis.prepared
        moments = statistics.calibrate(prepared.model, ranks, wanted, frozenset({"squares"}), parts, advance, prepared.tokens).moments
    return {site: np.sqrt(moments[site].squares / max(moments[site].count, 1)) for site in wanted}


def losses_of(analysis: Analysis, chosen: Sequence[Target], data: Dataset, progress: Progress) -> dict[str, FloatArray]:
    """What each kernel of the targets is worth where the others are re-fitted."""
    with progress("weighing kernels", 0) as advance:
        names, options = {target.name for target in chosen}, RepairOptions(rows_per_input=LOSS_ROWS)
        return kernel_losses(analysis.prepared, analysis.coupling, names, feeds_of(analysis, data), options, advance)


SNR_FEATURES = 0.8
"""Least signal-to-noise ratio of both ends of a connection between filters. Measured: with both ends under 0.3 (VGG-11, convs 4-6) the AFCC
mask was worse than random kernels, at 0.5 (ResNet-20) level with them, over 0.8 (its last layer) better; never better than kernel L1."""
LOSS_ROWS = 4.0
"""Rows per input of a layer that `obs` looks at: an order of kernels needs fewer than the re-fit."""
SNR_LABELS = 0.3
"""The same where one end is the class scores: there AFCC led at 0.41 (VGG-11) and 1.5 (ResNet-20); nothing was measured further down."""
