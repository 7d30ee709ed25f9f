"""The plain script to compare `finetune` with, Torch-Pruning and distillation: ``python benchmarks/training_peer.py SECONDS SHARED [PERCENT
...]``.

ResNet-20 as a module of PyTorch with the weights of the ONNX file; channels inside of the blocks by Torch-Pruning (global L2 norm; its
shortcuts pad channels, which it does not follow) to PERCENT (default 30, 50) of the MACs; then SECONDS of processor time of distillation
from the original on the 2048 calibration images, mirrored and shifted, Adam with a cosine, for each of two learning rates: the best on
an eighth that is held out is looked at on the test images. Needs torch and ``pip install torch-pruning==1.6.1``.
"""

# ruff: noqa: E402
from __future__ import annotations

import copy
import sys
import time
from math import cos, pi
from pathlib import Path

import numpy as np
from files import needed, packages

packages("torch", "torch_pruning")
import torch
import torch_pruning
from torch import nn
from torch.nn import functional

import sfp_onnx
from sfp_onnx.graph import Constants

RATES, BATCH = (1e-3, 3e-4), 128
MEAN, STD = (np.array(values, np.float32) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(inputs, outputs, 3, stride, 1), nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.second(torch.relu(self.first(x)))
        if self.more:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return torch.relu(made + x)


class ResNet20(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1)
        sizes = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
        self.blocks, self.classes = nn.Sequential(*[Block(*size) for size in sizes]), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classes(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


def original(path: object) -> ResNet20:
    """With the weights of the file, in its order."""
    model, network = sfp_onnx.load(path), ResNet20()
    held = Constants(model)
    convs = [node for node in sfp_onnx.graph.nodes(model) if node.operator in ("Conv", "Gemm")]
    layers = [layer for layer in network.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    for node, layer in zip(convs, layers, strict=True):
        layer.weight.data, layer.bias.data = (torch.from_numpy(held[name].copy()) for name in node.inputs[1:3])
    return network.eval()


def pruned(network: ResNet20, share: float) -> ResNet20:
    """Channels inside of the blocks leave, as many as the share of the MACs asks for."""
    example = torch.zeros(1, 3, 32, 32)
    before = torch_pruning.utils.count_ops_and_params(network, example)[0]
    low, high = 0.0, 1.0
    for _ in range(8):
        ratio, made = (low + high) / 2, copy.deepcopy(network)
        ignored = [made.stem, made.classes, *(block.second for block in made.blocks)]
        importance = torch_pruning.importance.MagnitudeImportance(p=2)
        given = {"pruning_ratio": ratio, "global_pruning": True, "ignored_layers": ignored}
        torch_pruning.pruner.MagnitudePruner(made, example, importance, **given).step()
        if torch_pruning.utils.count_ops_and_params(made, example)[0] <= share * before:
            high, found = ratio, made
        else:
            low = ratio
    return found


def divergence(own: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return functional.kl_div(torch.log_softmax(own, 1), torch.log_softmax(target, 1), log_target=True, reduction="batchmean")


def answers(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([network(x[start : start + BATCH]) for start in range(0, len(x), BATCH)])


def distilled(
    student: ResNet20, teacher: ResNet20, x: torch.Tensor, held: torch.Tensor, rate: float, seconds: float
) -> tuple[ResNet20, float]:  # fmt: skip
    """After so many seconds, as it was best on the held-out samples; and its divergence there."""
    student, random, target = copy.deepcopy(student), np.random.default_rng(0), answers(teacher, held)
    optimiser, began = torch.optim.Adam(student.parameters(), lr=rate), time.process_time()
    best, state = float(divergence(answers(student, held), target)), copy.deepcopy(student.state_dict())
    while (spent := time.process_time() - began) < seconds:
        for group in optimiser.param_groups:
            group["lr"] = rate * (1 + cos(pi * spent / seconds)) / 2
        for chosen in np.array_split(random.permutation(len(x)), len(x) // BATCH):
            part = functional.pad(x[chosen], (4, 4, 4, 4))
            down, right = random.integers(0, 9, 2)
            part = part[:, :, down : down + 32, right : right + 32]
            part = part.flip(3) if random.random() < 0.5 else part
            with torch.no_grad():
                wanted = teacher(part)
            optimiser.zero_grad()
            divergence(student(part), wanted).backward()
            optimiser.step()
        found = float(divergence(answers(student, held), target))
        if found < best:
            best, state = found, copy.deepcopy(student.state_dict())
    student.load_state_dict(state)
    return student, best


def images(path: object) -> tuple[torch.Tensor, np.ndarray]:
    held = np.load(path)
    return torch.from_numpy(((held["images"] / np.float32(255) - MEAN) / STD).transpose(0, 3, 1, 2).copy()), held["labels"]


def main() -> None:
    """A row per share."""
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    seconds, shared = float(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    teacher = original(needed(shared / "models" / "resnet20_cifar10.onnx"))
    x, _ = images(needed(shared / "data" / "cifar10_calib.npz"))
    test, labels = images(needed(shared / "data" / "cifar10_test.npz"))
    print(f"original: {100 * (answers(teacher, test).argmax(1).numpy() == labels).mean():.2f}")
    order = np.random.default_rng(0).permutation(len(x))
    for percent in map(int, sys.argv[3:] or ["30", "50"]):
        cut = pruned(teacher, percent / 100)
        tried = [distilled(cut, teacher, x[order[256:]], x[order[:256]], rate, seconds) for rate in RATES]
        rate, (best, found) = min(zip(RATES, tried, strict=True), key=lambda pair: pair[1][1])
        shown = [100 * (answers(network, test).argmax(1).numpy() == labels).mean() for network in (cut, best)]
        told = f"{seconds:.0f} s: {shown[1]:.2f} (rate {rate:g}, held-out KL {found:.3f})"
        print(f"| {percent} % | cut {shown[0]:.2f} | {told} |", flush=True)


if __name__ == "__main__":
    main()
