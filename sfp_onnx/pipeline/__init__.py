"""The one place that knows the order of the stages: load, prepare, couple, calibrate, score, plan, cut, verify, save."""

from ..latency import device
from .analysis import Analysis, DataSource, ModelSource, Progress, data_for, describe, inspect, load, reasons, silent
from .cutting import Pruned, apply, prune
from .evaluating import evaluate
from .manifest import manifest, read_plan, versions, write_json
from .planning import default_score, plan, score
from .profiling import clock_of, measure_profile, profile_rows, read_profile

__all__ = [
    "Analysis",
    "DataSource",
    "ModelSource",
    "Progress",
    "Pruned",
    "apply",
    "clock_of",
    "data_for",
    "default_score",
    "describe",
    "device",
    "evaluate",
    "inspect",
    "load",
    "manifest",
    "measure_profile",
    "plan",
    "profile_rows",
    "prune",
    "read_plan",
    "read_profile",
    "reasons",
    "score",
    "silent",
    "versions",
    "write_json",
]
