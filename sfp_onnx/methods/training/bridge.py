"""ONNX graphs on torch tensors: the graph stays what it is, its weights become parameters under their own names and are written back
under them.

What depends on shapes and constants alone is computed by onnxruntime, once for every shape of the inputs. An operator without a function
is computed by onnxruntime, too, as long as no gradient has to go through it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ... import graph
from ...core.errors import ModelError
from ...core.types import Array, Node, Port
from ...graph.extract import segment, with_constants
from ...graph.load import ModelSource, load
from ...graph.save import atomic, check_output, save, writing
from ...runtime import Session, open_model
from . import layers, moves
from .functions import FUNCTIONS, LIMITS, Call, Entry, Tensor, Unsupported, along_axis, rounded

TABLES = (layers, moves)  # imported for what they register
LARGEST = 1e4  # constants beyond are masks (minus infinity by another name), not weights


@dataclass(frozen=True)
class Grid:
    """The whole numbers that a quantised weight may take: ``scale`` and ``zero`` meet the weight."""

    scale: Tensor
    zero: Tensor
    low: int
    high: int

    def snap(self, weight: Tensor) -> Tensor:
        """The stored numbers of a real weight, as floats; gradients go through as if there were no rounding."""
        return rounded(weight / self.scale + self.zero, self.low, self.high)


class Network:
    """A model as a function of torch tensors. ``parameters`` are its weights by name, which an optimiser may change in place: floats (in
    float32 where they are stored as float16), and integers behind DequantizeLinear as what they stand for."""

    def __init__(self, source: ModelSource, device: str = "cpu") -> None:
        """Read a model.

        Raises:
            ModelError: it cannot be read.
        """
        self.model, self.device = load(source), device
        self.index = graph.GraphIndex(graph.nodes(self.model))
        self.types = graph.tensor_types(self.model)
        self.constants = graph.Constants(self.model)
        self.grids = {name: grid for name in self.constants if (grid := self._grid(name)) is not None}
        self.parameters: dict[str, Tensor] = {}
        for name, array in self.constants.items():
            grid = self.grids.get(name)
            if grid is not None:
                self.parameters[name] = (as_tensor(array, device).to(torch.float32) - grid.zero) * grid.scale
            elif self._trains(name, array):
                self.parameters[name] = as_tensor(array, device).clone()
        for value in self.parameters.values():
            value.requires_grad_(True)
        self._fixed: dict[str, Tensor] = {}
        self._sessions: dict[int, Session] = {}
        self._steps: dict[Any, list[tuple[Node, list[str]]]] = {}
        self._known: dict[Any, dict[str, Array]] = {}
        self._steady = True

    # ---- what is trained ---------------------------------------------------------------------------------------------

    def _trains(self, name: str, array: Array) -> bool:
        """Whether a constant is a weight: floats that a function reads as data, and more than one number unless they are weights there."""
        if array.dtype.kind != "f" or not array.size or not np.abs(array).max() < LARGEST:
            return False
        entries = [(FUNCTIONS.get(node.operator), place) for node, place in self.index.readers(name)]
        if not entries or any(entry is None or place == graph.CAPTURED for entry, place in entries):
            return False
        return any(_takes(entry, place, array.size > 1) for entry, place in entries if entry is not None)

    def _grid(self, name: str) -> Grid | None:
        """The grid of a constant that is only read by nodes that dequantise it, all with the same constants."""
        array, readers = self.constants[name], self.index.readers(name)
        if array.dtype.name not in LIMITS or not readers or any(not _dequantises(node, place) for node, place in readers):
            return None
        node = readers[0][0]
        operands = node.inputs[1:]
        if any(other.inputs[1:] != operands for other, _ in readers) or any(item and item not in self.constants for item in operands):
            return None
        axis, limit = node.attributes.get("axis", 1), LIMITS[array.dtype.name]
        scale = along_axis(as_tensor(self.constants[operands[0]], self.device), axis, array.ndim)
        zeros = self.constants[operands[1]] if len(operands) > 1 and operands[1] else np.zeros(1, np.float32)
        zero = along_axis(as_tensor(zeros, self.device).to(torch.float32), axis, array.ndim)
        scale, zero = (item.reshape(()) if item.numel() == 1 else item for item in (scale, zero))
        return Grid(scale, zero, limit.min, limit.max)

    # ---- running -----------------------------------------------------------------------------------------------------

    def run(self, given: Mapping[str, Tensor], wanted: Sequence[str]) -> list[Tensor]:
        """Compute tensors of the graph from others (its inputs, or any that separate it).

        Raises:
            ModelError: a gradient would have to go through an operator that has no function here; which.
        """
        key = (tuple(given), tuple(wanted))
        if key not in self._steps:
            self._steps[key] = self._schedule(*key)
        shapes = (*key, tuple(tuple(value.shape) for value in given.values()))
        known, found = self._known.get(shapes, {}), dict[str, Array]()
        values: dict[str, Any] = {name: as_tensor(value, self.device) for name, value in given.items()}
        for node, done in self._steps[key]:
            made = [name for name in node.outputs if name]
            if all(name in known for name in made):
                values.update((name, known[name]) for name in made)
            else:
                results = self._compute(node, [self._value(name, values) for name in _operands(node)])
                for name, value in zip(node.outputs, results, strict=False):
                    values[name] = value
                    if isinstance(value, np.ndarray):
                        found[name] = value
            for name in done:
                values.pop(name, None)
        if shapes not in self._known and self._steady:
            self._known[shapes] = found
        return [as_tensor(self._value(name, values), self.device) for name in wanted]

    def _schedule(self, given: Sequence[str], wanted: Sequence[str]) -> list[tuple[Node, list[str]]]:
        """The nodes to run, each with the tensors that nobody reads later."""
        nodes = self.index.needed(wanted, set(given))
        last = {name: node.index for node in nodes for name in node.reads}
        done: dict[int, list[str]] = {}
        for name, place in last.items():
            if name not in wanted:
                done.setdefault(place, []).append(name)
        return [(node, done.get(node.index, [])) for node in nodes]

    def _value(self, name: str, values: Mapping[str, Any]) -> Any:
        """A tensor that depends on data or weights, or else an array."""
        if not name:
            return None
        if name in values:
            return values[name]
        if name in self.parameters:
            return self.grids[name].snap(self.parameters[name]) if name in self.grids else self.parameters[name]
        if name not in self.constants:
            raise ModelError(f"{self.model.name}: internal error: tensor '{name}' was not computed. Please report it.")
        return self.constants[name]

    def _compute(self, node: Node, inputs: list[Any]) -> Sequence[Any]:
        entry, call = FUNCTIONS.get(node.operator), Call(node, self.model.opset)
        if entry is None or not any(isinstance(item, torch.Tensor) for item in inputs):
            return self._by_runtime(node, inputs, "has no gradient here")
        named = enumerate(zip(node.inputs, inputs, strict=False))
        operands = [item if place in entry.host else self._tensor(name, item) for place, (name, item) in named]
        for place in entry.host:
            if place < len(operands) and isinstance(operands[place], torch.Tensor):
                operands[place], self._steady = operands[place].detach().cpu().numpy(), False
        try:
            made = entry.function(call, *operands)
        except Unsupported as error:
            return self._by_runtime(node, inputs, f"has no gradient here in this form ({error})")
        return made if isinstance(made, list) else [made]

    def _tensor(self, name: str, value: Any) -> Any:
        """An operand as a tensor; those of constants are kept."""
        if value is None or isinstance(value, torch.Tensor):
            return value
        if name not in self.constants:
            return as_tensor(value, self.device)
        if name not in self._fixed:
            self._fixed[name] = as_tensor(value, self.device)
        return self._fixed[name]

    def _by_runtime(self, node: Node, inputs: Sequence[Any], why: str) -> list[Any]:
        """Let onnxruntime compute a node.

        Raises:
            ModelError: a gradient would have to go through it.
        """
        tensors = [item for item in inputs if isinstance(item, torch.Tensor)]
        if any(item.requires_grad for item in tensors):
            raise ModelError(
                f"{self.model.name}: node '{node.name}' ({node.operator}) {why}, and weights in front of it are to be trained. "
                "Train a part of the model that ends in front of it, or export the model without it."
            )
        self._steady = self._steady and not tensors
        given = {name: item for name, item in zip(_operands(node), inputs, strict=True) if item is not None}
        feeds = {name: self._array(name, item) for name, item in given.items()}
        if node.index not in self._sessions:
            ports = [Port(name, array.dtype, None) for name, array in feeds.items()]
            part = segment(self.model, ports, dict.fromkeys(filter(None, node.outputs)), self.index)
            self._sessions[node.index] = open_model(part, threads=1)
        results = iter(self._sessions[node.index].run(feeds))
        made = [next(results) if name else None for name in node.outputs]
        return [as_tensor(item, self.device) for item in made] if tensors else made

    def _array(self, name: str, value: Any) -> Array:
        """A value as onnxruntime takes it, in the type that the graph gives it."""
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        kind = self.types.get(name)
        return array if kind is None else array.astype(kind, copy=False)

    # ---- writing back ------------------------------------------------------------------------------------------------

    def written(self) -> graph.Model:
        """The model with the parameters as they are now, in the types that they are stored in; itself if none has changed.

        Raises:
            ModelError: a weight is not finite, or too large for its type.
        """
        changed = {}
        for name, value in self.parameters.items():
            old, grid = self.constants[name], self.grids.get(name)
            now = (value if grid is None else grid.snap(value)).detach().cpu().numpy()
            with np.errstate(over="ignore"):
                stored = now.astype(old.dtype)
            if not np.isfinite(stored).all():
                raise ModelError(f"{self.model.name}: weight '{name}' is no longer finite as {old.dtype}. Train with a smaller --lr.")
            if not np.array_equal(stored, old):
                changed[name] = stored
        return with_constants(self.model, changed) if changed else self.model


def _operands(node: Node) -> tuple[str, ...]:
    """Inputs of a node, empty where one is left out, and what its sub-graphs capture."""
    return (*node.inputs, *node.captures)


def _takes(entry: Entry, place: int, several: bool) -> bool:
    return place not in (*entry.host, *entry.fixed) and (several or place in entry.weights)


def _dequantises(node: Node, place: int) -> bool:
    """Whether a node reads an input as stored numbers that stand for others."""
    entry = FUNCTIONS.get(node.operator)
    return place == 0 and entry is not None and entry.stored and not node.attributes.get("block_size")


def as_tensor(value: Any, device: str) -> Tensor:
    """An array as a tensor (what torch computes slowly or does not know, in float32)."""
    if isinstance(value, torch.Tensor):
        return value
    array = np.asarray(value)
    if array.dtype == np.float16 or array.dtype.isbuiltin != 1:
        array = array.astype(np.float32)
    return torch.from_numpy(np.array(array, order="C")).to(device)


def write(model: graph.Model, path: Path) -> Path:
    """Write a model as it was stored: weights in a file of their own if they were, and a file that has not changed byte for byte.

    Raises:
        OutputError: the path cannot be written.
    """
    if model.edited or model.source is None or model.files:
        return save(model, path, bool(model.files) or None)
    check_output(path, model.paths)
    with writing(path), atomic(path) as (stream,):
        stream.write(model.source.read_bytes())
    return path
