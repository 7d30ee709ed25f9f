"""The sample ends to end with the defaults: its depthwise convolutions have more groups than `obs` solves for."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

import sfp_onnx
from sfp_onnx.cli import main

SAMPLES = Path(__file__).parent.parent / "samples"


@pytest.mark.parametrize("target", ["params=80%", "macs=50%"])
def test_defaults_prune_the_sample(tmp_path: Path, target: str) -> None:
    output = tmp_path / "small.onnx"
    options = ["--scale", "16", "--mean", "0.3", "--std", "0.35", "--layout", "nhwc", "--target", target]
    arguments = ["prune", str(SAMPLES / "digits.onnx"), "-o", str(output), "--data", str(SAMPLES / "digits_calibration.npz"), *options]
    found = CliRunner().invoke(main, ["-q", *arguments])
    assert found.exit_code == 0, found.output
    assert sfp_onnx.inspect(output).size().macs < sfp_onnx.inspect(SAMPLES / "digits.onnx").size().macs
