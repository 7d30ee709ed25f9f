"""Scores of the package itself: from weights, from statistics of activations, and from a re-fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..core.options import CHANNELS, option
from ..core.types import Array, FloatArray, GroupView, IntArray, WeightSlices
from .scoring import SCORES, Scored, Setting, prepared, score, statistic

if TYPE_CHECKING:
    from ..coupling.analysis import Analysis
    from ..data.dataset import Dataset
    from ..graph.edit import Editor

BLOCK = 1024


def per_unit(unit: IntArray, values: FloatArray, width: int) -> FloatArray:
    """Mean of ``values`` (one per row) over the rows of each unit; 0 for units without rows."""
    inside = unit >= 0
    total = np.bincount(unit[inside], values[inside], minlength=width)
    count = np.bincount(unit[inside], minlength=width)
    return total / np.maximum(count, 1)


def relative(values: FloatArray) -> FloatArray:
    """Divided by their mean, so that layers of different scale compare; zeros stay zeros."""
    mean = float(values.mean()) if len(values) else 0.0
    return values / mean if mean > 0 else np.zeros_like(values)


@dataclass(frozen=True)
class MagnitudeOptions:
    """``p`` of the norm."""

    p: int = option(2, "Which norm.", CHANNELS, low=1)


@score(
    "magnitude", "norm of all weights that make or read the coupled channels, relative to the mean of each layer",
    "Li et al., ICLR 2017; Fang et al., CVPR 2023", options=MagnitudeOptions,
)  # fmt: skip
def magnitude(view: GroupView, setting: Setting) -> FloatArray:
    """(mean over layers of mean over the unit's rows of (||w_row||_p / mean row norm of the layer)^p)^(1/p)."""
    p: int = setting.options.p
    total = np.zeros(view.width)
    for weights in view.weights:
        rows = np.linalg.norm(weights.values.astype(np.float64), ord=p, axis=1)
        total += per_unit(weights.unit, relative(rows) ** p, view.width)
    return (total / max(1, len(view.weights))) ** (1 / p)


@score("bn-scale", "absolute gamma of the BatchNormalizations on the coupled channels (1 where there is none)", "Liu et al., ICCV 2017")
def bn_scale(view: GroupView, setting: Setting) -> FloatArray:
    """mean over BatchNormalizations of |gamma| / mean |gamma|."""
    if not view.gammas:
        return np.ones(view.width)
    return sum((per_unit(unit, relative(gamma), view.width) for unit, gamma in view.gammas), np.zeros(view.width)) / len(view.gammas)


@score("fpgm", "summed distance to the other channels' weights (far from the geometric median = keep)", "He et al., CVPR 2019")
def fpgm(view: GroupView, setting: Setting) -> FloatArray:
    """mean over layers of sum_j ||w_i - w_j||_2, relative to the layer's mean. With
    ||a - b||^2 = ||a||^2 + ||b||^2 - 2 a.b the distances need one matrix product.

    The paper looks at the filters that make a channel; here the weights that read it count as well.
    """
    total = np.zeros(view.width)
    for weights in view.weights:
        total += per_unit(weights.unit, relative(_distances(weights.values)), view.width)
    return total / max(1, len(view.weights))


def _distances(values: Array) -> FloatArray:
    """Summed distance of every row to all others, a block of rows at a time (a flattened layer has tens of thousands)."""
    rows = values.astype(np.float64)
    squares = (rows**2).sum(1)
    distances = np.empty(len(rows))
    for start in range(0, len(rows), BLOCK):
        part = slice(start, start + BLOCK)
        distances[part] = np.sqrt(np.maximum(squares[part, None] + squares[None, :] - 2 * rows[part] @ rows.T, 0)).sum(1)
    return distances


@score("random", "uniform random numbers (the control)", "Mittal et al., WACV 2018")
def random(view: GroupView, setting: Setting) -> FloatArray:
    """Independent of the order in which groups are visited."""
    return np.random.default_rng([setting.seed, view.index]).random(view.width)


# ---- scores that need calibration data -------------------------------------------------------------------------------


@statistic("squares", finish=np.sqrt)
def squares(editor: Editor, tensor: Any, name: str) -> Any:
    """a^2; scores see the root mean square."""
    return editor.append("Mul", [tensor, tensor], name=f"{name}/square")


@statistic("zeros")
def zeros(editor: Editor, tensor: Any, name: str) -> Any:
    """1 where a = 0, else 0; scores see the share of zeros."""
    nonzero = editor.append("Cast", [tensor], {"to": 9}, name=f"{name}/nonzero")  # Equal takes no floats before opset 11
    return editor.append("Cast", [editor.append("Not", [nonzero], name=f"{name}/zero")], {"to": 1}, name=f"{name}/is_zero")


class Read(NamedTuple):
    """A layer that reads a group, and a value for each of its rows."""

    weights: WeightSlices
    values: FloatArray


def readers(view: GroupView, statistic: str) -> list[Read]:
    """The layers that read the group, each with a statistic of what its rows read."""
    return [Read(weights, weights.activation[statistic]) for weights in view.weights if statistic in weights.activation]


def _over_readers(view: GroupView, rows: list[Read]) -> FloatArray:
    """Mean over reading layers of the per-unit root mean square of row values, relative to each layer's mean."""
    total = np.zeros(view.width)
    for weights, values in rows:
        total += np.sqrt(per_unit(weights.unit, relative(values) ** 2, view.width))
    return total / max(1, len(rows))


@score("activation", "root mean square of the activation that is read", "Molchanov et al., ICLR 2017 (as a criterion)", {"squares"})
def activation(view: GroupView, setting: Setting) -> FloatArray:
    """rms_c = sqrt(mean over samples and positions of a_c^2), over all layers that read the unit."""
    return _over_readers(view, readers(view, "squares"))


@score(
    "apoz", "share of non-zeros of the activation that is read (1 - average percentage of zeros)", "Hu et al., arXiv:1607.03250 (2016)",
    {"zeros"},
)  # fmt: skip
def apoz(view: GroupView, setting: Setting) -> FloatArray:
    """1 - APoZ_c, mean over all layers that read the unit."""
    shares = [per_unit(weights.unit, 1 - zeros, view.width) for weights, zeros in readers(view, "zeros")]
    return sum(shares, np.zeros(view.width)) / max(1, len(shares))


@score(
    "contribution", "activation RMS times the norm of the weights that read it", "Sun et al., ICLR 2024 (Wanda), for channels", {"squares"}
)
def contribution(view: GroupView, setting: Setting) -> FloatArray:
    """rms_c ||W[:, c]||_2: what the channel adds to its readers' outputs."""
    rows = []
    for weights, rms in readers(view, "squares"):
        norms = np.linalg.norm(weights.values.astype(np.float64), axis=1) if weights.values.size else np.ones(len(weights.unit))
        rows.append(Read(weights, rms * norms))
    return _over_readers(view, rows)


# ---- scores that know the repair -------------------------------------------------------------------------------------


@prepared(
    "obs", "error that the channel's leaving adds after its readers are re-fitted (backward elimination)",
    "Hassibi & Stork, NIPS 1992; Frantar & Alistarh, NeurIPS 2022",
)  # fmt: skip
def obs(analysis: Analysis, data: Dataset | None, setting: Setting) -> Scored:
    """tr(X_u' (H^-1_uu)^-1 X_u) when unit u leaves, summed over readers, each relative to the variance of what its output goes into
    (see `elimination`). Groups that no layer with a constant weight reads fall back to `magnitude`."""
    from .elimination import eliminated

    result = eliminated(analysis, data, setting)
    if not result.blind:
        return Scored("obs", result.scores, result.errors, result.notes, spectra=result.spectra, reach=result.reach)
    values = SCORES["magnitude"].prepare(analysis, None, replace(setting, options=MagnitudeOptions(), names=())).values
    for group in analysis.coupling.groups:
        if group.name in result.errors:
            values[group.units] = result.scores[group.units]
    note = f"{len(result.blind)} groups are read by no layer that could be re-fitted; `magnitude` stands for `obs` there"
    return Scored("obs", values, result.errors, (*result.notes, note), spectra=result.spectra, reach=result.reach)
