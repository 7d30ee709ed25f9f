"""Which input switches tokens off, and which rows of which tensors are tokens: told by the graph, and confirmed by trial.

An input (batch, positions) that the graph uses as the mask of an attention is one if, with some places switched off,
what other inputs hold there changes no output elsewhere. A tensor holds tokens if its rows change there and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import numpy as np

from ..core.errors import ModelError
from ..core.types import Array, BoolArray, Tokens
from ..graph import Prepared, edit, inputs, outputs
from ..rules.masks import masks
from ..runtime import Feeds, Session, open_model

HIDES = -1e4  # what masks add to hide; float16 holds it
SAME = 1e-5  # of the largest value: rounding
AT_ONCE = 2**28  # bytes of tensors that a trial looks at together


def tokens_of(prepared: Prepared) -> Tokens | None:
    """The input of a model that switches tokens off, and the tensors that hold them; None: there is none, or trial does not confirm it."""
    able = [port.name for port in inputs(prepared.model) if _may_mask(prepared, port.name)]
    if not able:
        return None
    session, names = open_model(prepared.model), [port.name for port in outputs(prepared.model)]
    for name in able:
        batch, length = prepared.feeds[name].shape
        kept = np.arange(length) < length - 1 - np.arange(batch)[:, None] % (length - 1)
        for inverted in (False, True):
            masked: Feeds = {**prepared.feeds, name: _mask(kept, inverted, prepared.feeds[name].dtype)}
            varied = _varied(masked, name, kept)
            masked = masked if _ran(session, varied, names) is None else varied
            trial = _ran(session, masked, names)
            changed = [(feeds, found) for feeds in _changed(masked, name, kept) if (found := _ran(session, feeds, names))]
            if trial and changed and all(_apart(*pair, kept) for _, found in changed for pair in zip(trial, found, strict=True)):
                return Tokens(name, *_laid(prepared, [masked, *(feeds for feeds, _ in changed)], kept), inverted)
    return None


def _mask(kept: BoolArray, inverted: bool, kind: np.dtype[Any]) -> Array:
    """A mask that keeps these; ``inverted``: 0 does, and floating numbers are added."""
    return np.where(kept, 0, HIDES).astype(kind) if inverted and kind.kind == "f" else (kept != inverted).astype(kind)


def _may_mask(prepared: Prepared, name: str) -> bool:
    array = prepared.feeds.get(name)
    return array is not None and array.dtype.kind in "iubf" and array.ndim == 2 and array.shape[1] > 1 and masks(prepared.index, name)


def _ran(session: Session, feeds: Feeds, names: Sequence[str]) -> list[Array] | None:
    """All outputs; None if the model does not run on these inputs (an index that a table does not have)."""
    try:
        return list(session.run(feeds, names))
    except ModelError:
        return None


def _varied(feeds: Feeds, mask: str, kept: BoolArray) -> Feeds:
    """The same inputs with 0 and 1 in turn where integers are all the same: attention to equal tokens is equal, whoever looks."""
    alike = [name for name, array in feeds.items() if name != mask and array.shape == kept.shape and array.dtype.kind in "iu"]
    turns = np.arange(kept.size).reshape(kept.shape) % 2
    return {**feeds, **{name: turns.astype(feeds[name].dtype) for name in alike if np.ptp(feeds[name]) == 0}}


def _changed(feeds: Feeds, mask: str, kept: BoolArray) -> Iterator[Feeds]:
    """The same inputs, one after the other changed where tokens are off."""
    for name, array in feeds.items():
        if name != mask and array.shape[:2] == kept.shape and array.dtype.kind in "iuf":
            other = array + 1 if array.dtype.kind == "f" else np.where(array == 0, 1, 0)
            where = kept.reshape(kept.shape + (1,) * (array.ndim - 2))
            yield {**feeds, name: np.where(where, array, other).astype(array.dtype)}


def _apart(one: Array, other: Array, kept: BoolArray) -> bool:
    """Whether two outputs are the same but for places that are off, along whichever axis these are."""
    if np.shape(one) != np.shape(other) or np.asarray(one).dtype.kind not in "iubf":
        return False
    near = _near(one, other)
    axes = (axis for axis in range(1, near.ndim) if (len(near), near.shape[axis]) == kept.shape)
    return bool(near.all()) or any(np.moveaxis(near, axis, 1)[kept].all() for axis in axes)


def _near(one: Array, other: Array) -> BoolArray:
    scale = SAME * float(np.abs(one[np.isfinite(one)]).max(initial=0)) if one.dtype.kind == "f" else 0.0
    with np.errstate(invalid="ignore"):
        return np.asarray((one == other) | (np.abs(one.astype(np.float64) - other) <= scale))


def _laid(prepared: Prepared, runs: Sequence[Feeds], kept: BoolArray) -> tuple[frozenset[str], frozenset[str]]:
    """Floating tensors whose first axes are (batch, positions), and those whose first axis is both."""
    found: tuple[set[str], set[str]] = set(), set()
    for names in _shares(prepared, kept.shape):
        editor = edit.Editor(prepared.model)
        tapped = [editor.add_output(editor.tensor(name)) for name in names]
        session = open_model(editor.finish())
        before, *others = (session.run(feeds, tapped) for feeds in runs)
        for name, one, *changed in zip(names, before, *others, strict=True):
            rows = np.stack([_near(one, other).reshape(*kept.shape, -1) for other in changed])
            if rows[:, kept].all() and not rows.all():
                found[one.shape[:2] != kept.shape].add(name)
    return frozenset(found[0]), frozenset(found[1])


def _shares(prepared: Prepared, shape: tuple[int, ...]) -> Iterator[list[str]]:
    """Names of floating tensors that may hold tokens, a number of bytes at a time."""
    share, size = list[str](), 0
    for name in [output for node in prepared.nodes for output in node.outputs if output]:
        own = prepared.trace.shapes.get(name, ())
        if np.dtype(prepared.types.get(name) or object).kind != "f" or len(own) < 2 or not (own[:2] == shape or own[0] == prod(shape)):
            continue
        if share and size + 4 * prod(own) > AT_ONCE:
            yield share
            share, size = [], 0
        share.append(name)
        size += 4 * prod(own)
    if share:
        yield share
