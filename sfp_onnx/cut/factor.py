"""Layers that become two: a weight as a product of lower rank, with fewer channels between both factors than the layer reads and makes.

The weight as a matrix W (inputs k, outputs o) becomes L R, L (k, r) and R (r, o), from the first r singular values of W: no other product
of that rank is nearer. A convolution reads its window into r channels (L) and makes the outputs of these one by one (R); or, with the
matrix arranged as (channels, taps x outputs), makes r channels of its inputs one by one (L) and reads the window of these (R). A repair has
brought W to that rank before, so that what the layer makes stays nearest (`repair.ridge.lowered`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.types import INPUTS, Array, BoolArray, Factor, FloatArray, Node
from ..coupling.cost import Whole
from ..graph import Constants, GraphIndex, Model, nodes
from ..graph.edit import Editor
from ..graph.extract import with_constants
from ..graph.stored import AS_IS, Store


def by_weight(wholes: Mapping[str, Whole], factors: Sequence[Factor]) -> dict[str, Factor]:
    """Factors by the name of the layer's weight."""
    return {wholes[factor.layer].weight: factor for factor in factors}


# ---- matrices --------------------------------------------------------------------------------------------------------


def arranged(matrix: Array, taps: int, narrow: str) -> Array:
    """A weight (taps x channels, outputs) as the matrix whose rank counts: as it is, or (channels, taps x outputs)."""
    if narrow != INPUTS:
        return matrix
    moved: Array = matrix.reshape(taps, -1, matrix.shape[1]).transpose(1, 0, 2)
    return moved.reshape(len(moved), -1)


def restored(matrix: Array, taps: int, narrow: str) -> Array:
    """The inverse of `arranged`."""
    if narrow != INPUTS:
        return matrix
    moved: Array = matrix.reshape(len(matrix), taps, -1).transpose(1, 0, 2)
    return moved.reshape(taps * len(matrix), -1)


def halves(matrix: Array, rank: int) -> tuple[FloatArray, FloatArray]:
    """L (k, rank) and R (rank, o), equally large, whose product is nearest to a matrix (k, o)."""
    left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    root = np.sqrt(values[:rank])
    return np.asarray(left[:, :rank] * root), np.asarray(root[:, None] * right[:rank])


# ---- graphs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Half:
    """A factor of a model: its layer and node there, its weight, and L and R."""

    factor: Factor
    whole: Whole
    node: Node
    weight: Array
    left: FloatArray
    right: FloatArray


def _factors(model: Model, layers: Mapping[str, Whole], factors: Sequence[Factor]) -> Iterator[_Half]:
    index, constants = GraphIndex(nodes(model)), Constants(model)
    for factor in factors:
        whole = layers[factor.layer]
        node = whole.node(index)
        weight = constants[node.inputs[whole.at]]
        matrix = arranged(whole.form.matrix(weight, 1)[0], whole.taps, factor.narrow)
        yield _Half(factor, whole, node, weight, *halves(matrix, factor.rank))


def lowered(model: Model, layers: Mapping[str, Whole], factors: Sequence[Factor]) -> Model:
    """The model in which the weights of these layers are products of lower rank; each layer is still one."""
    values = {}
    for half in _factors(model, layers, factors):
        form, product = half.whole.form, restored(half.left @ half.right, half.whole.taps, half.factor.narrow)
        values[half.node.inputs[half.whole.at]] = form.weight(product[None], half.weight.shape).astype(half.weight.dtype)
    return with_constants(model, values)


def original(model: Model, layers: Mapping[str, Whole], removed: BoolArray, low: Model) -> Model:
    """The original in which what stays of the weights of these layers is what it is in a model that is cut and `lowered`: masked, it must
    answer as that one does when it is split."""
    constants, given, index, values = Constants(model), Constants(low), GraphIndex(nodes(low)), {}
    for whole in layers.values():
        values[whole.weight] = constants[whole.weight].copy()
        values[whole.weight][np.ix_(*whole.masks(removed))] = given[whole.node(index).inputs[whole.at]]
    return with_constants(model, values)


def split(model: Model, layers: Mapping[str, Whole], factors: Sequence[Factor]) -> Model:
    """The model in which each of these layers is two. The second keeps name, output and bias; new names derive from the old ones."""
    if not factors:
        return model
    editor = Editor(model)
    for half in _factors(model, layers, factors):
        whole, at, name = half.whole, half.node.index, half.node.inputs[half.whole.at]
        attributes: Mapping[str, Any] = {}
        if whole.form.kernel and half.factor.narrow != INPUTS:  # the window goes to the half in front
            attributes = editor.take_attributes(at)
        first, second = (array.astype(half.weight.dtype) for array in _weights(half))
        operands = [editor.input(at, whole.layer.data), editor.constant(f"{name}/first", first)]
        editor.set_input(at, whole.layer.data, editor.insert_before(at, whole.form.front, operands, attributes))
        editor.set_input(at, whole.at, editor.constant(f"{name}/second", second))
    return editor.finish()


def both(model: Model, layers: Mapping[str, Whole], factors: Sequence[Factor], stores: Sequence[Store]) -> list[Store]:
    """How the weights of a model are stored that was `split`, from how those of whole layers are: a half as the layer, the front one of a
    layer that nothing is said of as it is."""
    index, kinds, found = GraphIndex(nodes(model)), {store.layer: store.kind for store in stores}, list(stores)
    for whole in (layers[factor.layer] for factor in factors):
        node = whole.node(index)
        front, axis = index.makers[node.inputs[whole.layer.data]], 0 if whole.form.kernel else 1
        found.append(Store(front.outputs[0], 1, kinds.get(node.outputs[0], AS_IS), axis))
    return found


def _weights(half: _Half) -> tuple[Array, Array]:
    """The weights of both halves, as their operators take them."""
    whole, left, right = half.whole, half.left, half.right
    form, rank, shape = whole.form, left.shape[1], list(half.weight.shape)
    ones = [1] * len(form.kernel)
    if form.kernel and half.factor.narrow != INPUTS:
        return form.weight(left[None], [rank, *shape[1:]]), right.T.reshape(-1, rank, *ones)
    shape[whole.reads] = rank
    second = form.weight(restored(right, whole.taps, half.factor.narrow)[None], shape)
    return (left.T.reshape(rank, -1, *ones) if form.kernel else left), second
