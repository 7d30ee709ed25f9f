"""sfp_onnx: makes exported ONNX models smaller and faster by removing channels, and proves the result.

>>> import sfp_onnx
>>> result = sfp_onnx.prune("model.onnx", sfp_onnx.PlanOptions(ratio=0.5))        # doctest: +SKIP
>>> result.save("smaller.onnx")                                                   # doctest: +SKIP
"""

from .data import Dataset, Preprocessing, open_data
from .errors import (
    DataError,
    ModelError,
    OptionError,
    OutputError,
    PlanError,
    SfpError,
    TargetError,
    VerificationError,
)
from .graph import Model, save
from .pipeline import (
    Analysis,
    Pruned,
    apply,
    data_for,
    evaluate,
    inspect,
    load,
    manifest,
    plan,
    prune,
    read_plan,
    score,
)
from .records import BanditOptions, Cut, Evaluation, Group, Plan, PlanOptions, ScoreOptions, Size, Verification

__all__ = [
    "Analysis",
    "BanditOptions",
    "Cut",
    "DataError",
    "Dataset",
    "Evaluation",
    "Group",
    "Model",
    "ModelError",
    "OptionError",
    "OutputError",
    "Plan",
    "PlanError",
    "PlanOptions",
    "Preprocessing",
    "Pruned",
    "ScoreOptions",
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
    "prune",
    "read_plan",
    "save",
    "score",
]
