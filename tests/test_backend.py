"""The models that the onnx package ships for testing backends: none crashes; each is pruned exactly, or says why nothing can go."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

import sfp_onnx
from sfp_onnx.coupling.analysis import reasons

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
FILES = sorted(DATA.rglob("*.onnx"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: "-".join(path.relative_to(DATA).with_suffix("").parts))
def test_shipped_model(path: Path) -> None:
    try:
        analysis = sfp_onnx.inspect(path)
    except sfp_onnx.ModelError as error:
        assert "onnxruntime cannot" in str(error) or "onnx-graphsurgeon cannot" in str(error)
        return
    if not analysis.coupling.groups:
        assert reasons(analysis.coupling)
        with pytest.raises(sfp_onnx.TargetError, match="nothing can be pruned"):
            sfp_onnx.prune(analysis, sfp_onnx.PlanOptions(ratio=0.5))
        return
    result = sfp_onnx.prune(analysis, sfp_onnx.PlanOptions(ratio=0.5))
    assert result.verification is not None and result.plan.after.macs < result.plan.before.macs


def test_files_are_there() -> None:
    assert len(FILES) > 100
