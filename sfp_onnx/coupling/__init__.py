"""Who can only leave with whom, what cannot leave, and why. No operator names here: rules state facts, this reads them."""

from dataclasses import replace

from ..graph import Prepared
from ..records import Coupling
from .branches import branches
from .resolve import resolve
from .state import state

__all__ = ["couple"]


def couple(prepared: Prepared, cut_layernorm: bool = False) -> Coupling:
    """Label every tensor, resolve the labels to units, and form groups.

    Args:
        cut_layernorm: allow axes that LayerNormalization normalises over to shrink (it is rewritten, exactly, and slower).

    Raises:
        ModelError: a rule stated labels that contradict the traced shapes (an error in the rule; the node is named).
    """
    coupling = resolve(state(prepared, cut_layernorm), prepared)
    return replace(coupling, branches=branches(coupling, prepared))
