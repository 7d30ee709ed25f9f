"""The one place that knows the order of the stages: load, prepare, couple, calibrate, score, plan, cut, verify, save."""

from ..latency import device
from .analysis import Analysis, DataSource, ModelSource, Progress, data_for, describe, inspect, load, reasons, silent
from .cutting import Pruned, apply, prune
from .deciding import Scored, plan_scored
from .dropping import held_out
from .evaluating import evaluate
from .manifest import manifest, read_plan, versions, write_json
from .planning import default_score, plan, score, scored
from .profiling import clock_of, measure_profile, profile_rows, read_profile
from .sweeping import Point, parse_sweep, sweep, sweep_data

__all__ = [
    "Analysis",
    "DataSource",
    "ModelSource",
    "Point",
    "Progress",
    "Pruned",
    "Scored",
    "apply",
    "clock_of",
    "data_for",
    "default_score",
    "describe",
    "device",
    "evaluate",
    "held_out",
    "inspect",
    "load",
    "manifest",
    "measure_profile",
    "parse_sweep",
    "plan",
    "plan_scored",
    "profile_rows",
    "prune",
    "read_plan",
    "read_profile",
    "reasons",
    "score",
    "scored",
    "silent",
    "sweep",
    "sweep_data",
    "versions",
    "write_json",
]
