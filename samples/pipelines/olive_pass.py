"""A pass of Olive (https://github.com/microsoft/Olive, package olive-ai) that removes channels: one call of `sfp_onnx.prune`.

    from olive.passes.olive_pass import create_pass_from_dict

    smaller = create_pass_from_dict(ChannelPruning, {"targets": ["macs=50%"], "data": "calibration.npz"}, disable_search=True)
    smaller.run(ONNXModelHandler(model_path="model.onnx"), "smaller.onnx")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from olive.model import ONNXModelHandler
from olive.model.utils import resolve_onnx_path
from olive.passes import Pass
from olive.passes.pass_config import PassConfigParam

import sfp_onnx


class ChannelPruning(Pass):
    """Removes channels from an ONNX model; the result carries the manifest's verdict and sizes as attributes of the model."""

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, PassConfigParam]:
        return {
            "targets": PassConfigParam(type_=list, default_value=["macs=50%"], description="What to reach, as `sfp-onnx prune --target`."),
            "data": PassConfigParam(type_=str, default_value=None, description="Calibration data; without them weights are ranked."),
            "data_options": PassConfigParam(type_=dict, default_value=None, description="Fields of `sfp_onnx.DataOptions`: mean, std ..."),
            "max_drop": PassConfigParam(type_=str, default_value=None, description="How much accuracy may fall at most, such as 1%."),
        }

    def _run_for_config(self, model: ONNXModelHandler, config: Any, output_model_path: str) -> ONNXModelHandler:
        path = Path(resolve_onnx_path(output_model_path, Path(model.model_path).name))
        path.parent.mkdir(parents=True, exist_ok=True)
        result = sfp_onnx.prune(
            model.model_path,
            sfp_onnx.PlanOptions(targets=tuple(config.targets), max_drop=config.max_drop),
            data=config.data,
            data_options=sfp_onnx.DataOptions(**(config.data_options or {})),
            output=sfp_onnx.OutputOptions(path=path),
        )
        told = {name: result.manifest[name] for name in ("verdict", "before", "after")}
        return ONNXModelHandler(model_path=str(path), model_attributes={**(model.model_attributes or {}), "sfp_onnx": told})
