"""The one place that knows the order of the stages: load, prepare, couple, calibrate, score, plan, cut, verify, save."""

from .analysis import Analysis, DataSource, ModelSource, Progress, data_for, describe, inspect, load, reasons, silent
from .cutting import Pruned, apply, prune
from .diluting import Seen, check_dilution, default_method, dilute, look, masked
from .dilution import Diluted, DiluteOptions, dilution_manifest
from .evaluating import evaluate
from .manifest import manifest, read_plan, versions, write_json
from .planning import default_score, plan
from .scoring import Scored, profile, save_scores, score, scored

__all__ = [
    "Analysis",
    "DataSource",
    "DiluteOptions",
    "Diluted",
    "ModelSource",
    "Progress",
    "Pruned",
    "Seen",
    "Scored",
    "apply",
    "check_dilution",
    "data_for",
    "default_method",
    "default_score",
    "describe",
    "dilute",
    "dilution_manifest",
    "evaluate",
    "inspect",
    "load",
    "look",
    "manifest",
    "masked",
    "plan",
    "profile",
    "prune",
    "read_plan",
    "reasons",
    "save_scores",
    "score",
    "scored",
    "silent",
    "versions",
    "write_json",
]
