"""Run a model over many batches in segments: every node runs once, and what later nodes need is remembered between segments."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .. import graph, runtime
from ..errors import ModelError
from ..graph import Model
from ..records import Array, Node
from .store import Store


@dataclass
class Walk:
    """A model in the middle of a run over batches. ``overrides`` are constants that were changed on the way;
    they must not feed nodes that have run."""

    model: Model
    store: Store
    overrides: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.nodes: Sequence[Node] = graph.nodes(self.model)
        self._types = graph.tensor_types(self.model)
        self._made_by = {name: node.index for node in self.nodes for name in node.outputs if name}
        self._values = graph.Constants(self.model)
        self._constants = set(self._values)
        self._done: set[int] = set()
        self._live: set[str] = {port.name for port in graph.inputs(self.model)}
        self.batches = 0
        self._readers: dict[str, list[int]] = {}
        for node in self.nodes:
            for name in {*node.inputs, *node.captures} - {""} - self._constants:
                self._readers.setdefault(name, []).append(node.index)

    def feed(self, feeds: Mapping[str, Array]) -> int:
        """Remember the model's inputs of one more batch; returns how many there are now."""
        for name, array in feeds.items():
            if name in self._live:
                self.store.put((name, self.batches), array)
        self.batches += 1
        return self.batches

    def constant(self, name: str) -> Array:
        """The present value of an initializer."""
        return self.overrides[name] if name in self.overrides else self._values[name]

    def is_tensor(self, name: str) -> bool:
        """Whether a name is an activation or input of the model."""
        return bool(name) and name not in self._constants

    def _reads(self, index: int) -> set[str]:
        node = self.nodes[index]
        return {*node.inputs, *node.captures} - {""} - self._constants

    def waiting(self, names: Collection[str]) -> list[int]:
        """Nodes that must run before all ``names`` are known."""
        needed: set[int] = set()
        stack = [name for name in names if name not in self._live]
        while stack:
            index = self._made_by.get(stack.pop())
            if index is not None and index not in needed and index not in self._done:
                needed.add(index)
                stack += self._reads(index)
        return sorted(needed)

    def advance(self, names: Collection[str]) -> Segment:
        """Run on until ``names`` are known. Run the segment on every batch, then `finish` it."""
        fresh = self.waiting(names)
        inside = set(fresh)
        reads = {name for index in fresh for name in self._reads(index)}
        made = {name for index in fresh for name in self.nodes[index].outputs if name}
        done = self._done | inside
        outputs = sorted(name for name in made if name in names or any(own not in done for own in self._readers.get(name, ())))
        known = sorted(name for name in names if name not in made)
        segment = Segment(self, self._session(sorted(reads - made), outputs), sorted(reads - made), outputs, known)
        self._done = done
        self._live |= set(outputs)
        return segment

    def finish(self) -> None:
        """Forget what no later node reads; call it when a segment has run on every batch."""
        for name in sorted(self._live):
            if all(own in self._done for own in self._readers.get(name, ())):
                self._live.discard(name)
                for batch in range(self.batches):
                    self.store.drop((name, batch))

    def side(self, given: Collection[str], target: str) -> tuple[runtime.Session | None, list[str]]:
        """A session that computes ``target`` from live tensors and ``given`` ones (also constants), and the live tensors that it reads."""
        indices = graph.between(self.nodes, {*given, *self._live}, [target])
        reads = {name for index in indices for name in self._reads(index) | ({*self.nodes[index].inputs} & {*given})}
        made = {name for index in indices for name in self.nodes[index].outputs}
        inputs = sorted(reads - made)
        return self._session(inputs, [target]), [name for name in inputs if name not in given]

    def _session(self, inputs: Sequence[str], outputs: Sequence[str]) -> runtime.Session | None:
        if not outputs:
            return None
        unknown = [name for name in (*inputs, *outputs) if self._types.get(name) is None]
        if unknown:
            raise ModelError(f"{self.model.name}: the type of tensor '{unknown[0]}' is unknown, so the model cannot be run in segments")
        part = graph.segment(
            self.model,
            {name: (self._types[name], None) for name in inputs},
            {name: self._types[name] for name in outputs},
            self.nodes,
        )
        part = graph.with_constants(part, self.overrides)
        return runtime.open_session(graph.serialized(part), part.weights, self.model.name)


@dataclass
class Segment:
    """Nodes that run now: reads ``inputs`` (remembered), makes ``outputs`` (remembered unless nobody reads them later)."""

    walk: Walk
    session: runtime.Session | None
    inputs: list[str]
    outputs: list[str]
    known: list[str]

    def run(self, batch: int) -> dict[str, Array]:
        """Outputs, and asked-for tensors that were known already, of one batch."""
        found = {name: self.walk.store.get((name, batch)) for name in self.known}
        if self.session is not None:
            feeds = {name: self.walk.store.get((name, batch)) for name in self.inputs}
            for name, array in zip(self.outputs, self.session.run(feeds, self.outputs), strict=True):
                found[name] = np.asarray(array)
                self.walk.store.put((name, batch), found[name])
        return found
