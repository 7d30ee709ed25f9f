"""Where the networks and images of the benchmarks are, and a sentence where one is missing.

A folder with ``models/`` and ``data/`` (some benchmarks: ``zoo/``), by default ``shared`` beside the repository. `make_cifar.py` makes the
CIFAR-10 part of it; the other networks are named below.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

HOME = Path(__file__).parent.parent.parent / "shared"
CIFAR10 = "`python benchmarks/make_cifar.py FOLDER` makes both CIFAR-10 ResNets and their images; then give that FOLDER to this script"
VGG = "The VGG-11 for CIFAR-100 was trained by the authors: name the other networks, or put one of your own and its images there"
OTHER = "Any ONNX model of that name will do: the networks there are public architectures with random weights"


PACKAGES = {"sklearn": "scikit-learn", "torch": "torch==2.13.0", "torch_pruning": "torch-pruning==1.6.1"}


def needed(path: Path) -> Path:
    """A file that is needed, or the end of the program with a sentence."""
    if not path.exists():
        how = VGG if "cifar100" in path.name else CIFAR10 if "cifar10" in path.name else OTHER
        sys.exit(f"{path}: there is no such file. {how}.")
    return path


def packages(*modules: str) -> None:
    """Modules that are needed, or the end of the program with a sentence."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        sys.exit(f"Python does not find {', '.join(missing)}: pip install {' '.join(PACKAGES.get(name, name) for name in missing)}")
