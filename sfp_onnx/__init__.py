"""sfp_onnx: makes exported ONNX models smaller and faster by removing channels, and proves the result.

>>> import sfp_onnx
>>> result = sfp_onnx.prune("model.onnx", sfp_onnx.PlanOptions(ratio=0.5))        # doctest: +SKIP
>>> result.save("smaller.onnx")                                                   # doctest: +SKIP
"""

from . import methods  # noqa: F401  (registration)
from .core.errors import (
    DataError,
    ModelError,
    OptionError,
    OutputError,
    PlanError,
    SfpError,
    TargetError,
    VerificationError,
)
from .core.options import BanditOptions, PlanOptions, RepairOptions, ScoreOptions
from .core.types import Cut, Evaluation, Group, LayerProfile, Plan, Profiles, Size, Verification
from .coupling.analysis import Analysis, data_for, inspect, load
from .data import Preprocessing
from .data.dataset import Dataset, open_data
from .evaluation import evaluate
from .graph.model import Model
from .graph.save import save
from .latency import profiling  # noqa: F401  (registration)
from .methods.sfp.profiles import ProfileOptions
from .pipeline import apply, plan, prune
from .report.manifest import Pruned, manifest, read_plan
from .scores.scoring import Scored, profile, save_scores, score, scored

__all__ = [
    "Analysis",
    "BanditOptions",
    "Cut",
    "DataError",
    "Dataset",
    "Evaluation",
    "Group",
    "LayerProfile",
    "Model",
    "ModelError",
    "OptionError",
    "OutputError",
    "Plan",
    "PlanError",
    "PlanOptions",
    "Preprocessing",
    "ProfileOptions",
    "Profiles",
    "Pruned",
    "RepairOptions",
    "ScoreOptions",
    "Scored",
    "SfpError",
    "Size",
    "TargetError",
    "Verification",
    "VerificationError",
    "apply",
    "data_for",
    "evaluate",
    "inspect",
    "load",
    "manifest",
    "open_data",
    "plan",
    "profile",
    "prune",
    "read_plan",
    "save",
    "save_scores",
    "score",
    "scored",
]
