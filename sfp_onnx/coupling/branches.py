"""Which groups may leave altogether, so that a branch beside a residual vanishes.

If no channel of a group is left, the layers that read it see zeros and give a constant (their bias). The branch can vanish if that constant
only ever meets, element by element, a tensor of full shape that carries on without it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .. import graph
from ..core.types import Branch, Coupling, Group
from ..graph.model import Prepared, initializers
from ..rules.traits import Trait, has


@dataclass
class _Walk:
    """What one group's end makes constant, while it is followed."""

    constant: dict[str, None] = field(default_factory=dict)
    ends: dict[str, None] = field(default_factory=dict)
    carriers: set[str] = field(default_factory=set)


def branches(coupling: Coupling, prepared: Prepared) -> dict[str, Branch]:
    """Branches by the name of the group that must leave for them to vanish. Any of them may vanish together."""
    outputs = {port.name for port in graph.outputs(prepared.model)}
    found: dict[str, Branch] = {}
    constant: set[str] = set()
    carriers: set[str] = set()
    for group in coupling.groups:
        walk = _branch(group, coupling, prepared, outputs)
        if walk is None:
            continue
        branch, own = walk
        if own.carriers & (constant | set(own.constant)) or carriers & set(own.constant):
            continue  # two constants would meet
        constant |= set(own.constant)
        carriers |= own.carriers
        found[group.name] = branch
    return found


def _branch(group: Group, coupling: Coupling, prepared: Prepared, outputs: set[str]) -> tuple[Branch, _Walk] | None:
    inside = np.zeros(coupling.units + 1, bool)
    inside[group.units] = True  # the last place stands for -1
    dead = {name for name, channels in coupling.tensors.items() if any(inside[own.units].all() for own in channels)}
    layers = {layer.node.index: layer for layer in coupling.layers}
    sources: dict[str, None] = {}
    walk = _Walk()
    for name in sorted(dead):
        if name in outputs:
            return None
        for node in prepared.index.reading(name):
            if all(made in dead for made in node.outputs if made):
                continue
            layer = layers.get(node.index)
            if layer is None or layer.weight is None or layer.data_name != name or not inside[layer.reads].all() or not len(layer.reads):
                return None
            if not all(other == name or _fixed(other, prepared) for other in node.inputs if other):
                return None
            sources[name] = None
            if not all(_follow(made, dead, prepared, outputs, walk) for made in node.outputs if made):
                return None
    if not walk.ends:
        return None
    return Branch(tuple(sorted(dead)), tuple(sources), tuple(walk.ends), tuple(walk.constant)), walk


def _fixed(name: str, prepared: Prepared) -> bool:
    return name in initializers(prepared.model)


def _follow(name: str, dead: set[str], prepared: Prepared, outputs: set[str], walk: _Walk) -> bool:
    """Whether a constant tensor only meets tensors that carry on; collects where."""
    walk.constant[name] = None
    if name in outputs:
        return False
    shapes = prepared.trace.shapes
    for node in prepared.index.reading(name):
        made = [own for own in node.outputs if own]
        if all(own in dead for own in made):
            continue
        if not has(node, Trait.SPREADS) or node.captures:
            return False
        others = [own for own in node.inputs if own and own != name and not _fixed(own, prepared)]
        full = [own for own in others if shapes.get(own) == shapes.get(made[0])]
        if others and not full:
            return False
        if full:
            walk.ends[name] = None
            walk.carriers.update(full)
        elif not all(_follow(own, dead, prepared, outputs, walk) for own in made):
            return False
    return True
