"""The registry of operator rules."""

from __future__ import annotations

from collections.abc import Callable

from .context import Context
from .labels import Labels
from .traits import Trait, state

Rule = Callable[[Context], "list[Labels]"]
RULES: dict[str, Rule] = {}
SUMMARY: dict[str, str] = {}


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
