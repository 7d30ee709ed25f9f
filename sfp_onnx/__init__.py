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
    Scored,
    apply,
    data_for,
    evaluate,
    inspect,
    load,
    manifest,
    plan,
    profile,
    prune,
    read_plan,
    save_scores,
    score,
    scored,
)
from .profiles import ProfileOptions
from .records import (
    BanditOptions,
    Cut,
    Evaluation,
    Group,
    LayerProfile,
    Plan,
    PlanOptions,
    Profiles,
    RepairOptions,
    ScoreOptions,
    Size,
    Verification,
)

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
