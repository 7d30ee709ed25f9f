"""The registry of operator rules, and facts of operators that hold whatever is around them: rules state them, other stages ask for them
by what they mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Flag, auto
from typing import TYPE_CHECKING

from ..core.types import Array, Node
from ..graph import Constants, Model, nodes

if TYPE_CHECKING:
    from .context import Context
    from .labels import Labels


class Trait(Flag):
    """What an operator is like.

    ALONE: what it gives for one channel depends on that channel of its inputs alone. Behind such operators a mask does the work of a
    mask in front of them, so that one mask at the end of a chain of them is enough.
    SPREADS: it treats a value per channel, of size 1 along all other axes, as if it were spread over them.
    SIZES: it reads only the shape of its input, so that its result is known without data.
    UNSTEADY: it gives another result every time, or no tensor.
    ROUNDS: it turns weights into integers or back, which must not be computed once and for all (that would undo it).
    TAKES: output 0 is what is found in input 0 at the indices in input 1.
    RESHAPES: output 0 holds the elements of input 0 in their order.
    CHOOSES: input 0 says which of two sub-graphs is run.
    RUNS: it runs graphs of its own.
    STEPS: the last bit of an input, or chance, may change its floating result by a whole step.
    """

    NONE = 0
    ALONE = auto()
    SPREADS = auto()
    SIZES = auto()
    UNSTEADY = auto()
    ROUNDS = auto()
    TAKES = auto()
    RESHAPES = auto()
    STEPS = auto()
    CHOOSES = auto()
    RUNS = auto()


Rule = Callable[["Context"], "list[Labels]"]
RULES: dict[str, Rule] = {}
SUMMARY: dict[str, str] = {}
TRAITS: dict[str, Trait] = {}
Training = Callable[[Node, int, Mapping[str, Array]], bool]
TRAINING: dict[str, Training] = {}


def rule(*operators: str, does: str, traits: Trait = Trait.NONE) -> Callable[[Rule], Rule]:
    """Register a rule for operators (``Conv``, or ``domain.Op`` outside ONNX's own domain); ``does`` is one line for the
    operator table, ``traits`` what they are like."""

    def register(function: Rule) -> Rule:
        for operator in operators:
            if operator in RULES:
                raise ValueError(f"operator {operator} has two rules")
            RULES[operator] = function
            SUMMARY[operator] = does
        state(traits, *operators)
        return function

    return register


def state(traits: Trait, *operators: str) -> None:
    """State traits of operators (``Conv``, or ``domain.Op`` outside ONNX's own domain), be there a rule for them or not."""
    for operator in operators:
        TRAITS[operator] = TRAITS.get(operator, Trait.NONE) | traits


def has(node: Node, traits: Trait) -> bool:
    """Whether a node has any of these traits."""
    return bool(TRAITS.get(node.operator, Trait.NONE) & traits)


def in_training(operator: str) -> Callable[[Training], Training]:
    """Register when a node of an operator behaves as in training, from its operator set and the constants of the model."""

    def register(function: Training) -> Training:
        TRAINING[operator] = function
        return function

    return register


def training_nodes(model: Model) -> list[str]:
    """Names of nodes that a model exported for training has, and none exported for inference: random zeros, statistics of the batch."""
    constants = Constants(model)
    trained = ((node, TRAINING[node.operator]) for node in nodes(model) if node.operator in TRAINING)
    return [node.name for node, trains in trained if trains(node, model.opset, constants)]
