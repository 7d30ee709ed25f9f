"""What training on top brings: ``python benchmarks/training.py [network:target:epochs ...] [--shared DIR] [--seeds 0,1,2] [--work DIR]``.

Prints a Markdown row per network, target and seed: top-1, KL divergence to the original and agreement with it on the 2000 test images,
after the repair and after `finetune` (block-wise, no labels), processor seconds of the training on one thread, and the peak of the
memory. The training sees the 2048 calibration images without their labels; the held-out guard judges on an eighth of them. The test
images are looked at once, at the end. The case ``lottery``: tickets and controls on the digits sample, from random first weights.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import numpy as np
from files import HOME, needed, packages

packages("torch")  # before it is imported
import torch

import sfp_onnx
from sfp_onnx.core.options import DataOptions, OutputOptions, PlanOptions, ScoreOptions
from sfp_onnx.graph import Constants
from sfp_onnx.graph.extract import with_constants
from sfp_onnx.methods.training import TicketOptions, TrainOptions
from sfp_onnx.methods.training.lottery import Trainer, ticket
from sfp_onnx.methods.training.tuning import Finetuned, finetune

IMAGENET = DataOptions(scale=255.0, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), layout="nhwc")
CIFAR100 = DataOptions(scale=255.0, mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761), layout="nhwc")
NETWORKS = {
    "resnet20": ("resnet20_cifar10.onnx", "cifar10", IMAGENET), "resnet56": ("resnet56_cifar10_bn.onnx", "cifar10", IMAGENET),
    "vgg11": ("vgg11_cifar100.onnx", "cifar100", CIFAR100),
}  # fmt: skip
SAMPLES = Path(__file__).resolve().parents[1] / "samples"
DIGITS = sfp_onnx.Preprocessing(scale=16.0, mean=(0.3,), std=(0.35,), layout="nhwc")
DEFAULT = ("resnet20:30:4", "resnet20:50:4", "resnet56:50:4", "resnet56:30:4")


def images(path: Path) -> dict[str, np.ndarray]:
    """The images of a file without its labels."""
    return {"images": np.load(path)["images"]}


def pruned(name: str, percent: int, seed: int, shared: Path, work: Path) -> Path:
    """The model at a share of its MACs, with its manifest beside; made once."""
    file, data, reading = NETWORKS[name]
    path = work / f"{name}_{percent}_{seed}.onnx"
    if not path.exists():
        output = OutputOptions(path=path, manifest=path.with_suffix(".json"))
        options, source = PlanOptions(targets=(f"macs={percent}%",)), images(needed(shared / "data" / f"{data}_calib.npz"))
        model = needed(shared / "models" / file)
        sfp_onnx.prune(model, options, data=source["images"], score_options=ScoreOptions(seed=seed), data_options=reading, output=output)
    return path


def row(case: str, seed: int, shared: Path, work: Path) -> str:
    """One line of the table."""
    name, percent, epochs = case.split(":")
    file, data, reading = NETWORKS[name]
    path = pruned(name, int(percent), seed, shared, work)
    source = images(needed(shared / "data" / f"{data}_calib.npz"))["images"]
    began = time.process_time()
    result: Finetuned = finetune(path, TrainOptions(epochs=int(epochs), seed=seed), source, shared / "models" / file, data_options=reading)
    seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    models = [shared / "models" / file, path, result.model]
    before, after = sfp_onnx.evaluate(models, needed(shared / "data" / f"{data}_test.npz"), latency=False, data_options=reading)[1:]
    shown = [f"{100 * one.top1:.2f} / {one.kl:.3f} / {100 * one.agreement:.2f}" for one in (before, after)]
    guard = f"{result.before:.3f} -> {result.after:.3f}{'' if result.kept else ' (not kept)'}"
    return f"| {name} | {percent} % | {seed} | {shown[0]} | {shown[1]} | {guard} | {epochs} | {seconds:.0f} | {peak:.1f} |"


def lottery(seed: int, work: Path) -> str:
    """Tickets on the digits sample, 40 % of the weights left by each round: rows of a table."""
    data, test = SAMPLES / "digits_calibration.npz", SAMPLES / "digits_heldout.npz"
    model = sfp_onnx.load(SAMPLES / "digits.onnx")
    held, random = Constants(model), np.random.default_rng(seed)
    drawn = {name: random.standard_normal(array.shape) * (2 / np.prod(array.shape[1:])) ** 0.5 for name, array in held.items()
             if array.ndim > 1}  # fmt: skip
    ones = {name: np.full(array.shape, name.endswith(("bn.weight", "var"))) for name, array in held.items() if array.ndim == 1}
    first = with_constants(model, {name: array.astype(np.float32) for name, array in (drawn | ones).items()})
    options = TicketOptions(rounds=3, rate=0.6, epochs=20, seed=seed, controls=True)
    used, judge = (sfp_onnx.data_for(first, path, preprocessing=DIGITS) for path in (data, test))
    dense = Trainer(used, judge, options, lambda said: None).train(first, {}, "dense")
    paths = [sfp_onnx.save(made, work / f"{name}_{seed}.onnx") for name, made in (("first", first), ("dense", dense))]
    reading = DataOptions(steps=DIGITS)
    result = ticket(paths[1], options, data, paths[0], test_data=test, data_options=reading)
    rewound = ticket(paths[1], options, data, None, test_data=test, data_options=reading)
    rows = []
    for one, other in zip(result.rounds, rewound.rounds, strict=True):
        shown = [one.left, result.dense, one.ticket, *one.controls.values(), other.ticket]
        rows.append(f"| lottery, seed {seed} | " + " | ".join(f"{100 * value:.2f}" for value in shown) + " |")
    return "\n".join(rows)


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=DEFAULT)
    parser.add_argument("--shared", type=Path, default=HOME)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--work", type=Path, default=Path("."))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    heads = ["network", "MACs left", "seed", "repair: top-1 / KL / agreement", "trained", "held-out agreement", "epochs", "CPU s", "GB"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for case in arguments.cases:
        for seed in map(int, arguments.seeds.split(",")):
            made = lottery(seed, arguments.work) if case == "lottery" else row(case, seed, arguments.shared, arguments.work)
            print(made, flush=True)


if __name__ == "__main__":
    main()
