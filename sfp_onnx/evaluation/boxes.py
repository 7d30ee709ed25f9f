"""Boxes as detectors give them: read from one output or several, those of a sample matched with others, precision over recall."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..core.types import Array, BoolArray, FloatArray, IntArray

OVERLAP = 0.5  # intersection over union from which on two boxes are the same
SHOWN, FAINT = 0.25, 0.05  # scores from which on a box counts for a match, and for precision over recall
MOST_KEPT, MOST_LOOKED_AT = 100, 1000  # boxes of a sample behind and in front of the suppression
MOST_LISTED = 1000  # rows of six numbers: more are not boxes that were suppressed, but one class at every anchor


class Boxes(NamedTuple):
    """Boxes of one sample, the surest first: corners x1, y1, x2, y2 (n, 4), scores (n,) and classes (n,)."""

    corners: FloatArray
    scores: FloatArray
    classes: IntArray

    def picked(self, which: IntArray | BoolArray) -> Boxes:
        """Some of them."""
        return Boxes(self.corners[which], self.scores[which], self.classes[which])


def read_pair(old: Sequence[Array], new: Sequence[Array], least: float) -> list[tuple[Boxes, Boxes]]:
    """For every sample (for the whole batch, if its boxes are listed one after the other) the boxes of two models.

    Boxes count from a score of ``least`` on, or of half of the first model's best. What overlaps a surer box of its class is left out.
    """
    (first, ghost), second = _rows(old), _rows(new)[0]
    centred = first.corners.size > 0 and _upright(first.corners) < 0.9
    pairs = []
    for row in range(min(len(first.scores), len(second.scores))):
        one, other = (Boxes(part.corners[row], part.scores[row], part.classes[row]) for part in (first, second))
        floor = min(least, 0.5 * float(one.scores[one.classes != ghost].max(initial=2 * least)))
        pairs.append((_kept(one, floor, ghost, centred), _kept(other, floor, ghost, centred)))
    return pairs


def _rows(arrays: Sequence[Array]) -> tuple[Boxes, int]:
    """Boxes of all samples (a leading axis more), and the number of the class that is background, -1 if there is none."""
    corners = arrays[0].astype(np.float64)
    if len(arrays) == 1:
        return _of_one(corners if corners.ndim == 3 else corners[None]), -1
    scores, lead = arrays[1].astype(np.float64), corners.shape[:-1]
    ghost, classes = -1, np.zeros(lead, np.int64)
    if scores.ndim > len(lead):
        sums = scores.size > 0 and scores.shape[-1] > 1 and (scores >= 0).all() and np.allclose(scores.sum(-1), 1, atol=1e-3)
        classes, scores = scores.argmax(-1), scores.max(-1)
        ghost = int(np.bincount(classes.reshape(-1)).argmax()) if sums else -1  # most places of an image show nothing
    if len(arrays) > 2:
        classes = arrays[2].astype(np.int64)
    found = Boxes(corners, _shares(scores), classes)
    return found if len(lead) == 2 else Boxes(*(part[None] for part in found)), ghost  # type: ignore[arg-type]


def _of_one(rows: FloatArray) -> Boxes:
    """One output (N, places, numbers): listed boxes with score and class, or at every anchor centre, size, and a score for each class."""
    if rows.shape[1] < rows.shape[2] and rows.shape[2] > 7:  # (N, 4 + classes, anchors)
        rows = rows.transpose(0, 2, 1)
        scores = rows[..., 4:]
    elif rows.shape[2] == 7 and rows.shape[1] <= MOST_LISTED:  # image, class, score, corners; or image, corners, class, score
        order = [3, 4, 5, 6, 2, 1] if (np.abs(rows[..., 2] - 0.5) <= 0.5).all() else [1, 2, 3, 4, 6, 5]
        rows = rows[..., order]
        return Boxes(rows[..., :4], _shares(rows[..., 4]), rows[..., 5].astype(np.int64))
    elif rows.shape[2] == 6 and rows.shape[1] <= MOST_LISTED:
        return Boxes(rows[..., :4], _shares(rows[..., 4]), rows[..., 5].astype(np.int64))
    else:  # (N, anchors, 5 + classes): the fifth number is whether there is anything
        scores = rows[..., 4:5] * rows[..., 5:] if rows.shape[2] > 5 else rows[..., 4:5]
    half = rows[..., 2:4] / 2
    corners = np.concatenate([rows[..., :2] - half, rows[..., :2] + half], -1)
    return Boxes(corners, _shares(scores.max(-1)), scores.argmax(-1))


def _shares(scores: FloatArray) -> FloatArray:
    """Scores from 0 to 1, whatever they were before."""
    inside = not scores.size or (scores.min() >= 0 and scores.max() <= 1)
    return scores if inside else 1 / (1 + np.exp(-np.clip(scores, -500, 500)))


def _upright(corners: FloatArray) -> float:
    """Share of boxes whose second corner is right of and below the first."""
    return float((corners[..., 2:] >= corners[..., :2]).all(-1).mean())


def _kept(boxes: Boxes, least: float, ghost: int, centred: bool) -> Boxes:
    """Those that count, the surest first, without what overlaps a surer one of its class."""
    order = np.argsort(-boxes.scores, kind="stable")
    order = order[(boxes.scores[order] >= least) & (boxes.classes[order] != ghost)][:MOST_LOOKED_AT]
    boxes = boxes.picked(order)
    if centred:
        half = boxes.corners[:, 2:] / 2
        boxes = boxes._replace(corners=np.concatenate([boxes.corners[:, :2] - half, boxes.corners[:, :2] + half], 1))
    same = (overlaps(boxes.corners, boxes.corners) > OVERLAP) & (boxes.classes[:, None] == boxes.classes)
    left = np.ones(len(order), bool)
    for index in range(len(order)):
        if left[index]:
            left[index + 1 :] &= ~same[index, index + 1 :]
    return boxes.picked(np.flatnonzero(left)[:MOST_KEPT])


def overlaps(one: FloatArray, other: FloatArray) -> FloatArray:
    """Intersection over union of boxes (n, 4) and (m, 4) -> (n, m)."""
    low, high = np.maximum(one[:, None, :2], other[:, :2]), np.minimum(one[:, None, 2:], other[:, 2:])
    common = np.maximum(high - low, 0).prod(-1)
    areas = [np.maximum(part[:, 2:] - part[:, :2], 0).prod(-1) for part in (one, other)]
    return np.asarray(common / np.maximum(areas[0][:, None] + areas[1] - common, 1e-12))


def matched(found: Boxes, wanted: Boxes) -> BoolArray:
    """Which of the found boxes are the same as a wanted one of their class that no surer one has taken."""
    near = np.where(found.classes[:, None] == wanted.classes, overlaps(found.corners, wanted.corners), 0.0)
    hits = np.zeros(len(near), bool)
    for index, row in enumerate(near):
        best = int(row.argmax()) if len(row) else 0
        if len(row) and row[best] >= OVERLAP:
            hits[index], near[:, best] = True, 0.0
    return hits


def labelled(rows: Array) -> Boxes:
    """Labels of one sample, rows of x1, y1, x2, y2, class; those with a class below 0 (or none) are padding."""
    rows = rows.astype(np.float64)
    rows = rows[np.nan_to_num(rows[:, 4], nan=-1.0) >= 0]
    return Boxes(rows[:, :4], np.ones(len(rows)), rows[:, 4].astype(np.int64))


def average_precision(scores: FloatArray, hits: FloatArray, wanted: float) -> float:
    """Area under precision over recall (the precision made monotone) of one class, as VOC 2010 and COCO take it.

    Args:
        wanted: how many boxes there are.
    """
    order = np.argsort(-scores, kind="stable")
    right = np.cumsum(hits[order])
    precision = right / np.arange(1, len(order) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float((precision * hits[order]).sum() / wanted)
