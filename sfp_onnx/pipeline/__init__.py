"""The one place that knows the order of the stages: load, prepare, couple, calibrate, score, plan, cut, verify, save."""

from ..latency import device
from .analysis import Analysis, DataSource, ModelSource, Progress, data_for, describe, inspect, load, reasons, silent
from .cutting import Pruned, apply, prune
from .deciding import Candidates, plan_for
from .diluting import Seen, check_dilution, default_method, dilute, look, masked
from .dilution import Diluted, DiluteOptions, dilution_manifest
from .doctoring import Finding, examine
from .evaluating import evaluate
from .examples import few_examples
from .gating import Verdict, against, dropped, reached, read_baseline
from .judging import held_out
from .layering import LayerTimes, layer_times
from .locking import clocked, differences, locked_plan, plain_options, read_manifest, version_differences
from .manifest import manifest, read_plan, versions, write_json
from .noticing import training_mode, wrong_reading
from .packaging import Packaged, PackagingOptions, Step, package
from .planning import candidates, default_score, plan, planned
from .profiling import clock_of, measure_profile, profile_rows, read_profile
from .repairing import REPAIRS, Repaired
from .reporting import Context, evaluate_page, prune_page, sweep_page, write_page
from .scoring import Scored, profile, save_scores, score, scored
from .searching import MASKS, ROUND_REPAIRS
from .sweeping import Point, parse_sweep, sweep, sweep_data

__all__ = [
    "Analysis",
    "Candidates",
    "Context",
    "DataSource",
    "DiluteOptions",
    "Diluted",
    "Finding",
    "LayerTimes",
    "MASKS",
    "ModelSource",
    "Packaged",
    "PackagingOptions",
    "Point",
    "Progress",
    "Pruned",
    "REPAIRS",
    "ROUND_REPAIRS",
    "Repaired",
    "Scored",
    "Seen",
    "Step",
    "Verdict",
    "against",
    "apply",
    "candidates",
    "check_dilution",
    "clock_of",
    "clocked",
    "data_for",
    "default_method",
    "default_score",
    "describe",
    "device",
    "differences",
    "dilute",
    "dilution_manifest",
    "dropped",
    "evaluate",
    "evaluate_page",
    "examine",
    "few_examples",
    "held_out",
    "inspect",
    "layer_times",
    "load",
    "locked_plan",
    "look",
    "manifest",
    "masked",
    "measure_profile",
    "package",
    "parse_sweep",
    "plain_options",
    "plan",
    "plan_for",
    "planned",
    "profile",
    "profile_rows",
    "prune",
    "prune_page",
    "reached",
    "read_baseline",
    "read_manifest",
    "read_plan",
    "read_profile",
    "reasons",
    "save_scores",
    "score",
    "scored",
    "silent",
    "sweep",
    "sweep_data",
    "sweep_page",
    "training_mode",
    "version_differences",
    "versions",
    "write_json",
    "write_page",
    "wrong_reading",
]
