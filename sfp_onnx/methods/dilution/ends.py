"""Which class profiles stand at the two ends of a layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing

import numpy as np

from ...core.options import RepairOptions
from ...core.types import Array, Coupling, FloatArray, IntArray, Layer
from ...coupling.analysis import Analysis, Progress
from ...data.dataset import Dataset
from ...graph.model import Prepared
from ...scores.elimination import Inputs, Look
from ..sfp.probe import ProfileOptions
from ..sfp.profiles import LayerProfile, class_profiles
from . import METHODS
from .connections import Target
from .masks import Ends, Profile, label_profile


def ends_of(
    analysis: Analysis, data: Dataset, found: Sequence[Target], options: ProfileOptions, progress: Progress
) -> tuple[Mapping[str, Ends | str], list[str]]:
    """Class profiles of what each target reads and makes, or why there are none; and what to tell the user.

    A filter stands for the tensor in which a later layer first reads it: its feature map after activation and pooling. Channels of a
    flattened map share the profile of their filter.

    Raises:
        ModelError: the model is no classifier.
        DataError: the labels do not fit it, or are too few.
    """
    free = ", ".join(own.pattern or name for name, own in METHODS.items() if "profiles" not in own.needs)
    made = {target.name: _read_later(analysis, target.layer) for target in found}
    wanted = {target.layer.data_name for target in found} | {layer.data_name for layer in made.values() if layer}
    known = class_profiles(analysis, data, options, progress, lambda taps: [tap for tap in taps if tap.tensor in wanted], free)
    classes = known.classes
    layers = {(own.tensor, own.axis): own for own in known.layers}
    reasons = dict(known.skipped)
    ends = {target.name: _ends(analysis, target, made[target.name], layers, reasons, classes) for target in found}
    labels = "the labels of the data" if known.labels == "given" else "the model's own argmax as labels"
    notes = [f"class profiles from {known.samples} samples, with {labels}; {len(known.layers)} probes"]
    if known.missing:
        notes.append(f"{len(known.missing)} of {classes} labels do not occur in the data")
    return ends, notes


def _read_later(analysis: Analysis, layer: Layer) -> Layer | None:
    """The first later layer that reads all channels that this one makes."""
    units = layer.writes
    if not len(units) or (units < 0).any():
        return None
    later = (own for own in analysis.coupling.layers if own.node.index > layer.node.index)
    return next((own for own in later if np.isin(units, own.source).all()), None)


def _ends(
    analysis: Analysis, target: Target, later: Layer | None, layers: Mapping[tuple[str, int], LayerProfile], reasons: Mapping[str, str],
    classes: int,
) -> Ends | str:  # fmt: skip
    reads = layers.get(target.site)
    if reads is None:
        return f"no class profile of what it reads: {reasons.get(target.layer.data_name, 'no layer made it')}"
    near = _profile(reads, reads.filters)
    if later is not None:
        writes = layers.get((later.data_name, later.data_axis))
        if writes is None:
            return f"no class profile of what it makes: {reasons.get(later.data_name, 'no layer reads it')}"
        order = {int(unit): index for index, unit in enumerate(writes.units)}
        return Ends(near, _profile(writes, np.asarray([order[int(unit)] for unit in target.layer.writes])))
    shape = analysis.prepared.trace.shapes[target.layer.node.outputs[0]]
    if len(shape) == 2 and shape[1] == classes and _is_last(analysis, target.layer):
        return Ends(near, label_profile(target.layer.node.outputs[0], classes))
    return "no single later layer reads all its filters, and they are not the class scores"


def _is_last(analysis: Analysis, layer: Layer) -> bool:
    return max(own.node.index for own in analysis.coupling.layers) == layer.node.index


def _profile(own: LayerProfile, rows: IntArray) -> Profile:
    """Rows of a layer's profile. evidence[f, l] = M_f[l, l] - mean_k M_f[l, k]; activity[f, l] is the mean over positions."""
    means, weights = own.means.astype(np.float64), own.weights.astype(np.float64)
    evidence: FloatArray = (means * (weights - weights.mean(2, keepdims=True))).sum(1)
    noise, signal = float(own.noise.sum()), float(own.signal.sum())
    snr = signal / noise if noise else (np.finfo(np.float64).max if signal else 0.0)
    return Profile(own.tensor, evidence[rows], means.mean(1)[rows], own.label_sets[rows], snr)


# ---- what each kernel is worth where the rest of its filter is re-fitted without it ----------------------------------

RIDGE = 1e-2


def kernel_losses(
    prepared: Prepared,
    coupling: Coupling,
    names: Collection[str],
    batches: Iterable[Mapping[str, Array]],
    options: RepairOptions,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, FloatArray]:
    """Root mean square error of a filter's output without each of its kernels, after the re-fit of the others, (O, I) by name of the node.

    Layers whose covariance would not fit into memory, or that have too many groups, are left out.

    Raises:
        ModelError: the model cannot be run in segments.
    """
    found = {}
    look = Look.at(prepared, coupling, lambda layer: layer.node.name in names, options, RIDGE)
    with closing(look.store()) as store:
        for layer, step, blocks in look.observed(store, batches, progress):
            losses = [block_losses(own, inverse) for own, inverse in blocks]
            if losses and layer.weight is not None:
                joined = 0 if step.linear.form.out_axis == 0 or layer.weight.out_axis == 0 else 1
                found[layer.node.name] = np.concatenate(losses, joined)
    return found


def block_losses(inputs: Inputs, inverse: FloatArray) -> FloatArray:
    """q[o, i] = sqrt(w' [(C + r I)^-1]_ii^-1 w) with w = W[o, i] and the rows and columns ii of channel i, (O, I).

    The optimal brain surgeon, a kernel at a time: Hassibi and Stork, NeurIPS 1992; Frantar and Alistarh, NeurIPS 2022.
    """
    rows = np.argsort(inputs.channels, kind="stable").reshape(int(inputs.channels.max()) + 1, -1)
    own = inverse[rows[:, :, None], rows[:, None, :]]
    weights = inputs.weights.astype(np.float64)[rows]  # (I, K, O)
    squares = (weights * np.linalg.solve(own, weights)).sum(1).T
    found: FloatArray = np.sqrt(np.maximum(squares, 0.0))
    return found
