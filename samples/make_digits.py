"""Make the sample: a small digit classifier as an ONNX file, with calibration and held-out images.

Needs torch==2.13.0, scikit-learn, onnx and numpy (the CPU build of torch is enough)::

    python -m pip install "torch==2.13.0" scikit-learn onnx numpy
    python samples/make_digits.py

It takes about 20 seconds on one CPU core and writes next to itself (or into ``--out DIR``):

``digits.onnx``
    The network. Input ``image``: float32, ``batch`` x 1 x 8 x 8; output ``logits``: float32, ``batch`` x 10.
    BatchNormalization nodes are kept, not folded into the convolutions.
``digits_calibration.npz``, ``digits_heldout.npz``
    ``images``: uint8, N x 8 x 8 x 1 (NHWC), raw values 0..16; ``labels``: int64, N.

The network expects ``(images / 16 - 0.3) / 0.35``, transposed to NCHW.

The images are the 1797 handwritten digits that come with scikit-learn, so nothing is downloaded. They are
split, stratified by class and with a fixed seed, into three disjoint parts: 1097 for training, 300 for
calibration and 400 held out. Neither of the last two plays any part in training: the number of epochs is
fixed and the last weights are the ones exported.
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

SEED = 0
CLASSES = 10
SCALE = 16.0  # raw values are 0..16
MEAN = 0.3
STD = 0.35

N_CALIBRATION = 300
N_HELDOUT = 400

EPOCHS = 40
BATCH_SIZE = 64
LEARNING_RATE = 0.1
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4

OPSET = 17


class Split(NamedTuple):
    """Images (uint8, N x 8 x 8 x 1, values 0..16) and their labels (int64, N)."""

    images: np.ndarray
    labels: np.ndarray


class ConvBn(nn.Module):
    """Convolution without bias, BatchNormalization and, if asked for, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU() if relu else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        return y if self.relu is None else self.relu(y)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with an identity shortcut (ResNet's basic block)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvBn(channels, channels, 3)
        self.conv2 = ConvBn(channels, channels, 3, relu=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(x + self.conv2(self.conv1(x)))
        return y


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise convolution, linear 1x1 projection; a shortcut where the shapes allow it."""

    def __init__(self, inputs: int, outputs: int, hidden: int, stride: int) -> None:
        super().__init__()
        self.expand = ConvBn(inputs, hidden, 1)
        self.depthwise = ConvBn(hidden, hidden, 3, stride, groups=hidden)
        self.project = ConvBn(hidden, outputs, 1, relu=False)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.shortcut else y


class DigitNet(nn.Module):
    """Stem, residual block, two inverted residuals (8x8 to 4x4), global average pooling, linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBn(1, 32, 3)
        self.residual = ResidualBlock(32)
        self.down = InvertedResidual(32, 64, hidden=128, stride=2)
        self.inverted = InvertedResidual(64, 64, hidden=128, stride=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(64, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = self.inverted(self.down(self.residual(self.stem(image))))
        logits: Tensor = self.classifier(self.flatten(self.pool(x)))
        return logits


def make_splits() -> tuple[Split, Split, Split]:
    """Return the disjoint training, calibration and held-out parts."""
    digits = load_digits()
    images = digits.images.astype(np.uint8)[..., np.newaxis]
    labels = digits.target.astype(np.int64)
    rest, heldout = train_test_split(np.arange(len(labels)), test_size=N_HELDOUT, stratify=labels, random_state=SEED)
    training, calibration = train_test_split(rest, test_size=N_CALIBRATION, stratify=labels[rest], random_state=SEED)
    first, second, third = (Split(images[index], labels[index]) for index in (training, calibration, heldout))
    return first, second, third


def preprocess(images: np.ndarray) -> Tensor:
    """Turn raw NHWC images into what the network expects: normalised float32, NCHW."""
    normalised = (images.astype(np.float32) / SCALE - MEAN) / STD
    return torch.from_numpy(np.ascontiguousarray(normalised.transpose(0, 3, 1, 2), dtype=np.float32))


def shift(images: Tensor) -> Tensor:
    """Move each image by -1, 0 or 1 pixel along each axis, filling with background (raw value 0)."""
    count, _, height, width = images.shape
    padded = pad(images, (1, 1, 1, 1), value=-MEAN / STD)
    rows = torch.randint(0, 3, (count, 1)) + torch.arange(height)
    columns = torch.randint(0, 3, (count, 1)) + torch.arange(width)
    return padded[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def train(model: nn.Module, data: Split) -> None:
    """Train in place for a fixed number of epochs: SGD with momentum, weight decay and a one-cycle rate."""
    images, labels = preprocess(data.images), torch.from_numpy(data.labels)
    steps = len(labels) // BATCH_SIZE
    optimizer = torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=EPOCHS * steps)
    model.train()
    for epoch in range(1, EPOCHS + 1):
        total = 0.0
        for batch in torch.randperm(len(labels))[: steps * BATCH_SIZE].split(BATCH_SIZE):
            loss = cross_entropy(model(shift(images[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        if epoch % 10 == 0:
            print(f"epoch {epoch:3d}/{EPOCHS}: training loss {total / steps:.4f}")
    model.eval()


@torch.no_grad()
def count_correct(model: nn.Module, data: Split) -> int:
    """Return how many images of ``data`` the model, in evaluation mode, labels correctly."""
    return int((model(preprocess(data.images)).argmax(dim=1).numpy() == data.labels).sum())


def export(model: nn.Module, path: Path) -> None:
    """Export with BatchNormalization kept as nodes, and check the file.

    In evaluation mode this exporter fuses each convolution with its BatchNormalization as a part of constant
    folding; ``do_constant_folding=False`` turns both off.
    """
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the TorchScript exporter is meant here
        torch.onnx.export(
            model,
            (torch.zeros(1, 1, 8, 8),),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            do_constant_folding=False,
            training=torch.onnx.TrainingMode.EVAL,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        )
    exported = onnx.load(path)
    onnx.checker.check_model(exported, full_check=True)
    kept = sum(node.op_type == "BatchNormalization" for node in exported.graph.node)
    expected = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    if kept != expected:
        raise RuntimeError(f"{path.name} has {kept} BatchNormalization nodes, expected {expected}")
    counts = Counter(node.op_type for node in exported.graph.node)
    print(f"{path.name}: {path.stat().st_size} bytes, " + ", ".join(f"{op} {n}" for op, n in sorted(counts.items())))


def save(data: Split, path: Path) -> None:
    """Write a split as a compressed ``.npz`` file."""
    np.savez_compressed(path, images=data.images, labels=data.labels)
    print(f"{path.name}: {path.stat().st_size} bytes, {len(data.labels)} images")


def main() -> None:
    """Train the network and write the three files."""
    parser = argparse.ArgumentParser(description="Make digits.onnx and its calibration and held-out images.")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="folder to write into")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)

    training, calibration, heldout = make_splits()
    model = DigitNet()
    print(f"{sum(parameter.numel() for parameter in model.parameters())} parameters")
    train(model, training)
    for name, data in (("training", training), ("calibration", calibration), ("held-out", heldout)):
        correct, total = count_correct(model, data), len(data.labels)
        print(f"{name} accuracy: {correct}/{total} = {correct / total:.2%}")

    export(model, out / "digits.onnx")
    save(calibration, out / "digits_calibration.npz")
    save(heldout, out / "digits_heldout.npz")


if __name__ == "__main__":
    main()
