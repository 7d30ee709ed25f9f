"""Zeroing connections without changing a shape: AFCC and the other ways."""

from . import weights, labelled  # noqa: F401, I001  (registration, in the order of the help)
from .apply import Chosen, Target, as_weight, choose, layer_views, targets, zeroed
from .dead import Folded, fold_constants, unread
from .registry import METHODS, Method, find_method
from .regroup import Blocks, Grouping, absorbable, blocks, can_group, regrouped
from .view import DilutedLayer, Ends, KernelView, MethodOptions, Profile, SkippedLayer, label_profile, removed_share

__all__ = [
    "Blocks",
    "Folded",
    "Grouping",
    "Target",
    "absorbable",
    "as_weight",
    "blocks",
    "can_group",
    "fold_constants",
    "regrouped",
    "unread",
    "METHODS",
    "Chosen",
    "DilutedLayer",
    "Ends",
    "KernelView",
    "Method",
    "MethodOptions",
    "Profile",
    "SkippedLayer",
    "choose",
    "find_method",
    "label_profile",
    "layer_views",
    "removed_share",
    "targets",
    "zeroed",
]
