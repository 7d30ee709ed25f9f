"""Make the CIFAR-10 networks and images that the benchmarks use: ``python benchmarks/make_cifar.py FOLDER``.

Writes ``FOLDER/data/cifar10_calib.npz`` (2048 images of the training split), ``FOLDER/data/cifar10_test.npz`` (2000 of the test split), and
``FOLDER/models/resnet20_cifar10.onnx`` and ``resnet56_cifar10_bn.onnx`` (input ``input``: float32, N x 3 x 32 x 32; the images divided
by 255, less mean (0.485, 0.456, 0.406), by std (0.229, 0.224, 0.225)). With the package onnxscript also the export by PyTorch's newer
exporter, ``resnet56_cifar10_dynamo.onnx``. What is there already is left alone. Needs torch==2.13.0 (the CPU build is enough), onnx and
numpy::

    python -m pip install torch==2.13.0 onnx numpy onnxscript
    python benchmarks/make_cifar.py cifar
    python benchmarks/accuracy.py cuts cifar

- Images: `cifar-10-python.tar.gz` of the data set's authors (170 MB), fetched, or from ``--images FILE``.
- Networks: the public checkpoints of the GitHub repository akamaster/pytorch_resnet_cifar10 (BSD-2-Clause), fetched, or ``.th`` files of
  that form in ``--checkpoints FOLDER``. They are the networks of the README's accuracy rows: 91.7 and 93.4 % on all test images. Which
  images were drawn differs, so the figures agree within their standard errors.
- ``--train EPOCHS``: train instead of fetching (one-cycle SGD, flips and shifts); an epoch of ResNet-20 took about 13 minutes of processor
  time. (`samples/make_digits.py` trains the README's first example in 20 seconds, from images that come with scikit-learn.)
"""

from __future__ import annotations

import argparse
import io
import pickle
import sys
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
from files import packages

packages("torch", "onnx")
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.functional import cross_entropy, pad, relu  # noqa: E402

IMAGES = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CHECKPOINTS = "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models/"
FILES = {20: "resnet20-12fca82f.th", 56: "resnet56-4bfd9763.th"}
NAMES = {20: "resnet20_cifar10.onnx", 56: "resnet56_cifar10_bn.onnx"}
PARTS = {"calib": (2048, tuple(f"data_batch_{number}" for number in range(1, 6))), "test": (2000, ("test_batch",))}
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
BATCH = 128


class Block(nn.Module):
    """Two convolutions and a shortcut; where the map shrinks, the shortcut takes every second pixel and pads zeros (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        shortcut = pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more, self.more)) if self.stride > 1 else x
        return relu(y + shortcut)


class ResNet(nn.Module):
    """He et al. 2016, section 4.2: 6 n + 2 layers of 16, 32 and 64 channels; names as in the public checkpoints."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (self._stage(depth, *stage) for stage in ((16, 16, 1), (16, 32, 2), (32, 64, 2)))
        self.linear = nn.Linear(64, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(depth: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
        later = (Block(outputs, outputs, 1) for _ in range((depth - 2) // 6 - 1))
        return nn.Sequential(Block(inputs, outputs, stride), *later)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


# ---- what is fetched -------------------------------------------------------------------------------------------------


def fetched(address: str, own: Path | None, option: str) -> bytes:
    """A file of one's own, or what lies at the address; else the end of the program with a sentence."""
    try:
        if own is not None:
            return own.read_bytes()
        print(f"fetching {address}", file=sys.stderr)
        with urllib.request.urlopen(address, timeout=60) as stream:
            return bytes(stream.read())
    except (OSError, urllib.error.URLError) as error:
        sys.exit(f"{own or address}: cannot be read: {error}. Fetch {address} by other means, and give it with {option}.")


def batches(archive: bytes, names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Images (uint8, N x 32 x 32 x 3) and labels (int64) of some files of the archive."""
    images, labels = [], []
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for name in names:
            stream = tar.extractfile(f"cifar-10-batches-py/{name}")
            assert stream is not None
            read = pickle.loads(stream.read(), encoding="bytes")
            images.append(np.asarray(read[b"data"], np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            labels.append(np.asarray(read[b"labels"], np.int64))
    return np.concatenate(images), np.concatenate(labels)


def checkpoint(depth: int, folder: Path | None) -> ResNet:
    """The public network."""
    own = None if folder is None else folder / FILES[depth]
    read = torch.load(io.BytesIO(fetched(CHECKPOINTS + FILES[depth], own, "--checkpoints")), map_location="cpu", weights_only=True)
    net = ResNet(depth)
    net.load_state_dict({name.removeprefix("module."): value for name, value in read["state_dict"].items()})
    return net


# ---- what is trained -------------------------------------------------------------------------------------------------


def normalised(images: np.ndarray) -> Tensor:
    """As the networks take them: float32, N x 3 x 32 x 32."""
    return ((torch.from_numpy(images).float() / 255 - MEAN) / STD).permute(0, 3, 1, 2).contiguous()


def trained(depth: int, images: np.ndarray, labels: np.ndarray, epochs: int) -> ResNet:
    """A network after so many epochs; the last weights are kept."""
    torch.manual_seed(0)
    net, x, y = ResNet(depth), normalised(images), torch.from_numpy(labels)
    steps = len(x) // BATCH
    descent = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(descent, 0.4, total_steps=epochs * steps)
    for epoch in range(epochs):
        right = 0
        for rows in torch.randperm(len(x))[: steps * BATCH].view(steps, BATCH):
            dx, dy = torch.randint(0, 9, (2,)).tolist()
            batch = pad(x[rows], (4, 4, 4, 4))[:, :, dy : dy + 32, dx : dx + 32]
            answers = net(batch.flip(3) if torch.rand(()) < 0.5 else batch)
            right += int((answers.argmax(1) == y[rows]).sum())
            descent.zero_grad()
            cross_entropy(answers, y[rows]).backward()
            descent.step()
            schedule.step()
        print(f"ResNet-{depth}: epoch {epoch + 1} of {epochs}, {right / (steps * BATCH):.1%} of the training images right", file=sys.stderr)
    return net


# ---- what is written -------------------------------------------------------------------------------------------------


def export(net: ResNet, path: Path, dynamo: bool = False) -> None:
    """An ONNX file; BatchNormalization stays for ResNet-56, and is folded into the convolutions for ResNet-20, as the exporter does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sample, names = torch.zeros(2, 3, 32, 32), {"input_names": ["input"], "output_names": ["logits"]}
    if dynamo:
        shapes = {"x": {0: torch.export.Dim("batch", min=1, max=4096)}}
        torch.onnx.export(net, (sample,), str(path), dynamo=True, dynamic_shapes=shapes, **names)
    else:
        kept = torch.onnx.TrainingMode.PRESERVE if path.name.endswith("_bn.onnx") else torch.onnx.TrainingMode.EVAL
        fold = path.name != NAMES[56]
        axes = {"input": {0: "batch"}, "logits": {0: "batch"}}
        torch.onnx.export(
            net, (sample,), str(path), dynamo=False, opset_version=17, dynamic_axes=axes, training=kept, do_constant_folding=fold, **names
        )
    print(f"wrote {path}")


def main() -> None:
    """Fetch or train, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=Path, help="cifar-10-python.tar.gz, if it is there already")
    parser.add_argument("--checkpoints", type=Path, help="folder with the .th files, if they are there already")
    parser.add_argument("--train", type=int, metavar="EPOCHS", help="train instead of fetching checkpoints")
    parser.add_argument("--depth", type=int, action="append", choices=(20, 56), help="only this network")
    given = parser.parse_args()
    archive = fetched(IMAGES, given.images, "--images")
    for part, (count, names) in PARTS.items():
        path = given.folder / "data" / f"cifar10_{part}.npz"
        if not path.exists():
            images, labels = batches(archive, names)
            rows = np.sort(np.random.default_rng(0).permutation(len(images))[:count])
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(path, images=images[rows], labels=labels[rows])
            print(f"wrote {path}")
    images, labels = batches(archive, PARTS["test"][1])
    for depth in given.depth or FILES:
        path = given.folder / "models" / NAMES[depth]
        if path.exists():
            continue
        fetch = given.train is None
        net = (checkpoint(depth, given.checkpoints) if fetch else trained(depth, *batches(archive, PARTS["calib"][1]), given.train)).eval()
        with torch.inference_mode():
            right = sum(int((net(normalised(images[k::20])).argmax(1).numpy() == labels[k::20]).sum()) for k in range(20))
        print(f"ResNet-{depth}: {right / len(images):.2%} of {len(images)} test images right")
        export(net, path)
        if depth == 56:
            try:
                export(net, path.with_name("resnet56_cifar10_dynamo.onnx"), dynamo=True)
            except ImportError as error:
                print(f"no export by the newer exporter: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
