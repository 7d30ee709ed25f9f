"""Scores that know the repair."""

from __future__ import annotations

from ..records import FloatArray, GroupView, ScoreOptions
from .registry import score
from .weights import magnitude


@score(
    "obs",
    "error that the channel's leaving adds after its readers are re-fitted (backward elimination)",
    "Hassibi & Stork, NIPS 1992; Frantar & Alistarh, NeurIPS 2022",
    ("elimination",),
)
def obs(view: GroupView, options: ScoreOptions) -> FloatArray:
    """tr(X_u' (H^-1_uu)^-1 X_u) when unit u leaves, summed over readers, each relative to the variance of what its output goes into
    (see `sfp_onnx.obs`). Groups that no layer with a constant weight reads fall back to `magnitude`."""
    return view.elimination if view.elimination is not None else magnitude(view, options)
