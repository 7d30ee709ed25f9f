"""Who makes and who reads the tensors of a graph."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..core.types import Node

CAPTURED = -1
"""The position at which a sub-graph of a node reads an outer tensor."""


@dataclass(frozen=True)
class GraphIndex:
    """Makers and readers of all tensors of ``nodes``; built in linear time, and only when they are asked for."""

    nodes: Sequence[Node]

    @cached_property
    def makers(self) -> Mapping[str, Node]:
        """The node that makes each tensor; inputs and constants have none."""
        return {name: node for node in self.nodes for name in node.outputs if name}

    @cached_property
    def _readers(self) -> Mapping[str, list[tuple[Node, int]]]:
        readers: dict[str, list[tuple[Node, int]]] = {}
        for node in self.nodes:
            for place in (*enumerate(node.inputs), *((CAPTURED, name) for name in node.captures)):
                if place[1]:
                    readers.setdefault(place[1], []).append((node, place[0]))
        return readers

    def maker(self, name: str) -> Node | None:
        """The node that makes a tensor."""
        return self.makers.get(name)

    def readers(self, name: str) -> Sequence[tuple[Node, int]]:
        """(node, input position) of everything that reads a tensor, in the order of the nodes; sub-graphs at position `CAPTURED`."""
        return self._readers.get(name, ())

    def operands(self, name: str) -> list[tuple[Node, int]]:
        """The readers of a tensor without sub-graphs."""
        return [(node, position) for node, position in self.readers(name) if position != CAPTURED]

    def reading(self, name: str) -> list[Node]:
        """The nodes that read a tensor, each once."""
        return list({node.index: node for node, _ in self.readers(name)}.values())

    def needed(self, outputs: Iterable[str], stop: Container[str] = ()) -> list[Node]:
        """The nodes, in their order, that compute ``outputs``, as far up as the tensors of ``stop``, which are given."""
        needed: dict[int, Node] = {}
        waiting = [name for name in outputs if name not in stop]
        while waiting:
            node = self.makers.get(waiting.pop())
            if node is not None and node.index not in needed:
                needed[node.index] = node
                waiting += [name for name in node.reads if name not in stop]
        return [needed[index] for index in sorted(needed)]

    def reached(self, names: Iterable[str]) -> list[Node]:
        """The nodes, in their order, that depend on any of these tensors."""
        reached: dict[int, Node] = {}
        waiting = list(names)
        while waiting:
            for node, _ in self.readers(waiting.pop()):
                if node.index not in reached:
                    reached[node.index] = node
                    waiting += [name for name in node.outputs if name]
        return [reached[index] for index in sorted(reached)]
