"""Top-1 after pruning without any repair, per score: ``python benchmarks/ranking.py [folder with models/ and data/]``.

Removes 30 % of the block-internal channels of two CIFAR-10 ResNets (the same share of every group), calibrated on 512 training
images (with labels where a score asks for them), and prints a Markdown table of top-1 on the 2000 test images. ``random`` is the mean of
five seeds. `sfp.py` uses the same functions for other networks, rates and numbers of images.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from files import HOME, needed

import sfp_onnx
from sfp_onnx.core.options import RepairOptions
from sfp_onnx.cut import cut
from sfp_onnx.planning.widths import choose, eligible
from sfp_onnx.repair import repaired
from sfp_onnx.scores.scoring import SCORES

CIFAR10 = sfp_onnx.Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), scale=255, layout="nhwc")
CIFAR100 = sfp_onnx.Preprocessing(mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762), scale=255, layout="nhwc")
RATIO = 0.3
SHARED = HOME


@dataclass(frozen=True)
class Case:
    """A network, the layers whose outputs are block-internal, and its data."""

    title: str
    file: str
    only: str
    data: str
    preprocessing: sfp_onnx.Preprocessing

    def analysis(self, root: Path) -> sfp_onnx.Analysis:
        return sfp_onnx.inspect(needed(root / "models" / self.file))

    def images(self, root: Path, part: str, samples: int | None = None) -> sfp_onnx.Dataset:
        """``part`` is "calib" or "test"."""
        path, model = needed(root / "data" / f"{self.data}_{part}.npz"), self.analysis(root).model
        images = sfp_onnx.data_for(model, path, preprocessing=self.preprocessing, samples=samples)
        assert images is not None
        return images


RESNET56 = Case("ResNet-56", "resnet56_cifar10_bn.onnx", r"layer\d/layer\d\.\d/conv1", "cifar10", CIFAR10)
RESNET20 = Case("ResNet-20", "resnet20_cifar10.onnx", r"layer.*conv1", "cifar10", CIFAR10)
VGG11 = Case("VGG-11", "vgg11_cifar100.onnx", "Conv", "cifar100", CIFAR100)


@dataclass(frozen=True)
class Ranking:
    """Top-1 of the original, and per ratio the share of MACs left and top-1 per score, without repair and (if asked for) with it."""

    dense: float
    shares: dict[float, float]
    top1: dict[float, dict[str, float]]
    repaired: dict[float, dict[str, float]]


def top1(model: sfp_onnx.Model, data: sfp_onnx.Dataset) -> float:
    return sfp_onnx.evaluate([model], data, latency=False)[0].top1 or 0.0


def ranking(
    case: Case,
    ratios: Sequence[float],
    names: Sequence[str],
    data: tuple[sfp_onnx.Analysis, sfp_onnx.Dataset, sfp_onnx.Dataset],
    seeds: int,
    repair: tuple[sfp_onnx.Dataset, RepairOptions] | None = None,
) -> Ranking:
    """Score once per name and seed, then cut at every ratio. ``data`` are the analysis, calibration and test data. ``repair``: data and
    options of the repair, which is measured for the first seed."""
    analysis, calibration, test = data
    found: dict[float, dict[str, float]] = {ratio: {} for ratio in ratios}
    mended: dict[float, dict[str, float]] = {ratio: {} for ratio in ratios}
    shares: dict[float, float] = {}
    for name in names:
        every = range(seeds) if name == "random" else range(1)
        values = [sfp_onnx.scored(analysis, name, calibration, sfp_onnx.ScoreOptions(seed=seed)).values for seed in every]
        for ratio in ratios:
            options = sfp_onnx.PlanOptions(ratio=ratio, only=case.only)
            groups = eligible(analysis.coupling, options, {})
            every = [choose(analysis.coupling, groups, own, options, analysis.size) for own in values]
            smaller = [cut(analysis.prepared, analysis.coupling, removed) for removed in every]
            shares[ratio] = analysis.size(every[0]).macs / analysis.size().macs
            found[ratio][name] = sum(top1(own, test) for own in smaller) / len(smaller)
            said = f"{case.title} {ratio:.0%} {name}: {found[ratio][name]:.2%}"
            if repair is not None:
                again = repaired(analysis, smaller[0], every[0], *repair).model
                mended[ratio][name] = top1(again, test)
                said += f", repaired {mended[ratio][name]:.2%}"
            print(said, file=sys.stderr, flush=True)
    return Ranking(top1(analysis.model, test), shares, found, mended)


def ranking_table(columns: dict[str, tuple[Ranking, float]]) -> str:
    """Markdown: one row per score, in the order of the first column; columns are (ranking, ratio) by title."""
    heads, cells = [], []
    for title, (own, ratio) in columns.items():
        heads.append(f"{title} (dense {own.dense:.2%}, {own.shares[ratio]:.1%} of the MACs left)")
        cells.append(own.top1[ratio])
        if own.repaired[ratio]:
            heads.append("the same, repaired")
            cells.append(own.repaired[ratio])
    lines = [f"| score | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for name in sorted(cells[0], key=lambda name: -cells[0][name]):
        lines.append(f"| `{name}` | {' | '.join(f'{own[name]:.2%}' for own in cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else SHARED
    columns = {}
    for case in (RESNET56, RESNET20):
        data = (case.analysis(root), case.images(root, "calib", 512), case.images(root, "test"))
        columns[case.title] = (ranking(case, [RATIO], [name for name in SCORES if ":" not in name], data, seeds=5), RATIO)
    print(ranking_table(columns))


if __name__ == "__main__":
    main()
