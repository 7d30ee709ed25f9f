"""How to dilute, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx

from .. import graph
from ..dilute import DilutedLayer, SkippedLayer
from ..graph import Model
from ..records import RepairOptions, Size
from .manifest import versions


@dataclass(frozen=True)
class DiluteOptions:
    """How to dilute.

    ``rate``: share of the kernels (weights, blocks) that leaves; None for methods that set it. ``scope``: see `masks.keep_by_rank`.
    ``layers``: a regular expression on names of nodes or weights. ``refit``: None means with data. ``force``: dilute layers whose
    labels carry too little signal, too. ``probe``, ``pool``: as in `ProfileOptions`. ``repair``: how the rest is re-fitted.
    """

    method: str = "obs"
    rate: float | None = None
    scope: str = "layer"
    layers: str | None = None
    refit: bool | None = None
    regroup: bool = False
    force: bool = False
    seed: int = 0
    probe: str = "sgd"
    pool: int = 4
    repair: RepairOptions = field(default_factory=RepairOptions)


@dataclass(frozen=True)
class Diluted:
    """The result of `dilute`. ``cut`` units were physically removed; ``checks`` are the relative differences that each exact step
    (removal of dead channels, regrouping) made."""

    model: Model
    original: Model
    options: DiluteOptions
    layers: tuple[DilutedLayer, ...]
    skipped: tuple[SkippedLayer, ...]
    notes: tuple[str, ...]
    cut: int
    checks: Mapping[str, float]
    before: Size
    after: Size
    data: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path, external: bool | None = None, sparse: bool = False) -> Path:
        """Write the model atomically; ``sparse``: with sparse initializers where they are smaller."""
        return graph.save(self.model, path, external, sparse)

    def to_proto(self, sparse: bool = False) -> onnx.ModelProto:
        """The model as a self-contained ModelProto."""
        return graph.to_proto(self.model, sparse)


def dilution_manifest(result: Diluted, output: Path | None = None, sparse: bool = False) -> dict[str, Any]:
    """Everything needed to check or repeat a dilution, as plain data for JSON. ``output``: where it is (to be) saved, ``sparse`` or not."""
    digest, size = graph.fingerprint(result.model, output, sparse=sparse) if output else (None, graph.full_size(result.model))
    return {
        "format": "sfp_onnx dilution manifest",
        "version": 1,
        "versions": versions(),
        "model": {"path": str(result.original.source), "sha256": result.original.sha256, "bytes": graph.file_bytes(result.original)},
        "output": {
            "path": str(output) if output else None,
            "sha256": digest,
            "bytes": size,
        },
        "options": asdict(result.options),
        "data": dict(result.data) or None,
        "before": asdict(result.before),
        "after": asdict(result.after),
        "removed_channels": result.cut,
        "checks": dict(result.checks),
        "layers": [asdict(item) for item in result.layers],
        "skipped": [asdict(item) for item in result.skipped],
        "notes": list(result.notes),
    }
