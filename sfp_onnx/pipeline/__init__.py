"""The one place that knows the order of the stages: load, prepare, couple, calibrate, score, plan, cut, verify, save."""

from .analysis import Analysis, DataSource, ModelSource, Progress, data_for, describe, inspect, load, reasons, silent
from .cutting import Pruned, apply, prune
from .diluting import Diluted, DiluteOptions, check_dilution, default_method, dilute, dilution_manifest
from .evaluating import evaluate
from .manifest import manifest, read_plan, versions, write_json
from .planning import default_score, plan, score

__all__ = [
    "Analysis",
    "DataSource",
    "DiluteOptions",
    "Diluted",
    "ModelSource",
    "Progress",
    "Pruned",
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
    "manifest",
    "plan",
    "prune",
    "read_plan",
    "reasons",
    "score",
    "silent",
    "versions",
    "write_json",
]
