"""sfp_onnx: makes exported ONNX models smaller and faster by removing channels, and proves the result.

>>> import sfp_onnx
>>> result = sfp_onnx.prune("model.onnx", sfp_onnx.PlanOptions(ratio=0.5))        # doctest: +SKIP
>>> result.save("smaller.onnx")                                                   # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .core import PLUGINS

PLUGINS.append(f"{__name__}.methods")

# Where everything public is; it is imported when it is first asked for, so that `import sfp_onnx` and `--help` cost nothing. Type checkers
# read the same from __init__.pyi.
PLACES = {
    "core.errors": "DataError ModelError OptionError OutputError PlanError SfpError TargetError VerificationError",
    "core.options": "DataOptions InspectOptions MeasureOptions OutputOptions PlanOptions RepairOptions ScoreOptions",
    "core.types": "Cut Group Plan Size",
    "coupling.analysis": "Analysis data_for inspect load",
    "cut.verify": "Verification",
    "data": "Preprocessing",
    "data.dataset": "Dataset open_data",
    "evaluation": "Evaluation",
    "graph": "Model",
    "graph.save": "save",
    "methods.dilution.stages": "DiluteOptions Diluted dilute",
    "methods.sfp.probe": "ProfileOptions",
    "methods.sfp.profiles": "LayerProfile Profiles class_profiles",
    "pipeline.applied": "apply",
    "pipeline.measured": "device_profile evaluate",
    "pipeline.planned": "plan",
    "pipeline.pruned": "prune",
    "pipeline.scored": "calibrate score",
    "pipeline.swept": "Sweep sweep",
    "report.manifest": "Pruned manifest read_plan",
    "report.points": "Point",
    "scores.scoring": "Scored save_scores scored",
}
WHERE = {name: place for place, names in PLACES.items() for name in names.split()}
__all__ = sorted(WHERE)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module(".core.system", __name__).version_of(__name__)
    if name not in WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module(".latency.profiling", __name__)  # its figure registers itself, as scores and methods do
    value = getattr(import_module(f".{WHERE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
