"""Top-1 after pruning without any repair, per score: ``python benchmarks/ranking.py [folder with models/ and data/]``.

Removes 30 % of the block-internal channels of two CIFAR-10 ResNets (the same share of every group), calibrated on 512 unlabelled
training images, and prints a Markdown table of top-1 on the 2000 test images. ``random`` is the mean of five seeds.
"""

from __future__ import annotations

import sys
from pathlib import Path

import sfp_onnx
from sfp_onnx.scores import SCORES

NORMALISATION = sfp_onnx.Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), scale=255, layout="nhwc")
MODELS = {"ResNet-56": ("resnet56_cifar10_bn.onnx", r"layer\d/layer\d\.\d/conv1"), "ResNet-20": ("resnet20_cifar10.onnx", r"layer.*conv1")}
RATIO = 0.3


def accuracies(path: Path, only: str, data: Path) -> tuple[float, float, dict[str, float]]:
    """Top-1 of the original, share of MACs left, and top-1 per score."""
    analysis = sfp_onnx.inspect(path)
    calibration = sfp_onnx.data_for(analysis.model, data / "cifar10_calib.npz", preprocessing=NORMALISATION, samples=512)
    test = sfp_onnx.data_for(analysis.model, data / "cifar10_test.npz", preprocessing=NORMALISATION)
    options = sfp_onnx.PlanOptions(ratio=RATIO, only=only)
    found: dict[str, float] = {}
    dense = share = 0.0
    for name in SCORES:
        seeds = range(5) if name == "random" else range(1)
        results = []
        for seed in seeds:
            plan = sfp_onnx.plan(analysis, options, name, calibration, sfp_onnx.ScoreOptions(seed=seed))
            pruned = sfp_onnx.apply(analysis, plan)
            before, after = sfp_onnx.evaluate([analysis.model, pruned.model], test, latency=False)
            dense, share = before.top1 or 0.0, plan.after.macs / plan.before.macs
            results.append(after.top1 or 0.0)
        found[name] = sum(results) / len(results)
    return dense, share, found


def main() -> None:
    """Measure and print."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent.parent / "shared"
    columns = {}
    for title, (file, only) in MODELS.items():
        columns[title] = accuracies(root / "models" / file, only, root / "data")
    heads = [f"{title} (dense {dense:.2%}, {share:.1%} of the MACs left)" for title, (dense, share, _) in columns.items()]
    print(f"| score | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    names = sorted(SCORES, key=lambda name: -next(iter(columns.values()))[2][name])
    for name in names:
        print(f"| `{name}` | {' | '.join(f'{found[name]:.2%}' for _, _, found in columns.values())} |")


if __name__ == "__main__":
    main()
