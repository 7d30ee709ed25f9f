"""The one place that knows the order of the stages: load, prepare, couple, calibrate, score, plan, cut, verify, save."""

from .analysis import Analysis, DataSource, ModelSource, Progress, data_for, describe, inspect, load, reasons, silent
from .cutting import Pruned, apply, prune
from .evaluating import evaluate
from .manifest import manifest, read_plan, versions, write_json
from .planning import default_score, plan
from .scoring import Scored, profile, save_scores, score, scored

__all__ = [
    "Analysis",
    "DataSource",
    "ModelSource",
    "Progress",
    "Pruned",
    "Scored",
    "apply",
    "data_for",
    "default_score",
    "describe",
    "evaluate",
    "inspect",
    "load",
    "manifest",
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
