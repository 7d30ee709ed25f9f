"""What the check of the preprocessing notices: ``python benchmarks/readings.py --shared FOLDER``.

Every usual normalisation on networks whose own is known; prints a Markdown row each: top-1 on all samples, the points that it costs, and
whether the check (which looks at 256 samples at most) says that another reading is clearly better.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from files import needed

import sfp_onnx
from sfp_onnx.core.options import DataOptions
from sfp_onnx.data.checks import opened, wrong_reading
from sfp_onnx.evaluation import outputs

IMAGENET, CIFAR = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
PLAIN = {"[-1, 1]": ((0.5,), (0.5,)), "[0, 1]": ((0.0,), (1.0,)), "MNIST's": ((0.1307,), (0.3081,))}
USUAL = {"ImageNet's": IMAGENET, "CIFAR-10's": CIFAR, **PLAIN}
RIGHT = {
    "resnet20_cifar10": IMAGENET, "resnet56_cifar10_bn": IMAGENET, "vgg11_cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mobilenet_v1_075_imagenet": USUAL["[-1, 1]"],
}  # fmt: skip


def main() -> None:
    """Measure all networks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    shared = parser.parse_args().shared
    print("| network | read with | top-1 | costs | said |\n|---|---|---:|---:|---|")
    for name, right in RIGHT.items():
        model = sfp_onnx.load(needed(shared / "models" / f"{name}.onnx"))
        source = shared / "imagenet" / "val" if "imagenet" in name else shared / "data" / f"{name.partition('_')[2].split('_')[0]}_test.npz"
        best = None
        for words, (mean, std) in {"its own": right, **USUAL}.items():
            if words != "its own" and (mean, std) == right:
                continue
            facts = {"resize": (224,), "center_crop": (224, 224)} if source.is_dir() else {"layout": "nhwc"}
            steps = DataOptions(scale=255.0, mean=mean, std=std, **facts)
            data = opened(model, source, steps)
            assert data is not None and data.classes is not None
            answers = outputs(model, data.batches())[0].argmax(1)
            top1 = float((answers == data.classes).mean())
            best = top1 if best is None else best
            said = wrong_reading(model, data)
            print(f"| {name} | {words} | {top1:.2%} | {100 * (best - top1):.1f} | {'yes' if said else 'no'} |", flush=True)


if __name__ == "__main__":
    main()
