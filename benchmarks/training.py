"""What training on top brings: ``python benchmarks/training.py [CASE ...] [--shared DIR] [--seeds 0,1,2] [--work DIR]``.

CASE is NETWORK:PERCENT[:HOW[:SAMPLES]]: a network, the share of its MACs that is left (any width, ``--align none``), and

  blocks, features, logits, labels   a recipe of `finetune` (default: blocks)
  rounds, cubic                      three rounds with a fine-tuning each, by equal factors or by the schedule of Zhu & Gupta
  groups                             sparse training by groups of channels first, then the cut and its repair alone

Each prints a row: top-1, KL divergence to the original and agreement with it on the 2000 test images, after the repair and after the
training, processor seconds of all that was trained on one thread, and the peak of the memory. Training sees the calibration images
(SAMPLES of them) without their labels, but for ``labels``; the held-out guard judges on an eighth of them (with ``labels`` the repair has
not seen it). The test images are looked at once, at the end. Networks: resnet20, resnet56, vgg11 (2048 of its 4000 images), lite0
(EfficientNet-Lite0; test pictures: imagenet/val).

Other cases: ``lottery`` (tickets and controls on the digits sample, from random first weights), ``dilution:NETWORK`` (ResNet-20's third
stage, VGG-11's convolutions 4 to 7, by AFCC and controls: masked, retrained, re-fitted, both) and ``nodes`` (a small transformer for the
digits sample: nodal performance of its nodes and heads, ANDC masks and controls: masked, re-fitted, both, retrained), ``sparse`` (the
digits sample: moving masks beside one that stays, at three rates; pressure on channels and then the cut beside the cut alone).
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from files import HOME, needed, packages

packages("torch")  # before it is imported
import onnx
import torch
from onnx import helper, numpy_helper

import sfp_onnx
from sfp_onnx.core.options import DataOptions, OutputOptions, PlanOptions, RepairOptions, ScoreOptions
from sfp_onnx.graph import Constants
from sfp_onnx.graph.extract import with_constants
from sfp_onnx.methods.dilution.stages import DiluteOptions, dilute
from sfp_onnx.methods.training import SparseOptions, TicketOptions, TrainOptions
from sfp_onnx.methods.training.lottery import Trainer, ticket
from sfp_onnx.methods.training.sparse import sparsify
from sfp_onnx.methods.training.tuning import finetune
from sfp_onnx.planning import bounds, parse_target, rounds
from sfp_onnx.repair import held_out

IMAGENET = DataOptions(scale=255.0, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), layout="nhwc")
CIFAR100 = DataOptions(scale=255.0, mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761), layout="nhwc")
PIXELS = DataOptions(scale=1.0, mean=(127.0,) * 3, std=(128.0,) * 3)
NETWORKS = {
    "resnet20": ("resnet20_cifar10.onnx", "data/cifar10", IMAGENET), "resnet56": ("resnet56_cifar10_bn.onnx", "data/cifar10", IMAGENET),
    "vgg11": ("vgg11_cifar100.onnx", "data/cifar100", CIFAR100), "lite0": ("efficientnet_lite0_imagenet.onnx", "imagenet", PIXELS),
}  # fmt: skip
MOST = {"lite0": 1000}
DILUTED = {"resnet20": "layer3.*Conv", "vgg11": "^/(15|18|22|25)/Conv$"}  # as in `dilution.py`
SAMPLES = Path(__file__).resolve().parents[1] / "samples"
DIGITS = sfp_onnx.Preprocessing(scale=16.0, mean=(0.3,), std=(0.35,), layout="nhwc")
DEFAULT = ("resnet20:30", "resnet20:50", "resnet56:50", "resnet56:30")
EPOCHS, ROUNDS = 4, 3


class Case:
    """A network at a share of its MACs, its data, and how it is trained."""

    def __init__(self, text: str, seed: int, shared: Path, work: Path) -> None:
        given = text.split(":")
        name, percent, how, samples = [*given, *("", "", "blocks", "0")[len(given) :]]
        self.name, self.how, self.seed, self.work = name, how, seed, work
        file, data, reading = NETWORKS[name]
        self.model, self.reading = needed(shared / "models" / file), reading
        self.options = PlanOptions(targets=(f"macs={percent}%",), align="none")
        self.samples = int(samples) or MOST.get(name, 2048)
        folder = shared / data
        self.calibration = needed(folder / "calib" if data == "imagenet" else Path(f"{folder}_calib.npz"))
        self.test = needed(folder / "val" if data == "imagenet" else Path(f"{folder}_test.npz"))
        apart = f"_{how}{self.samples}" if how == "labels" else ""
        self.path = work / f"{name}_{percent}_{seed}{apart}.onnx"
        self.shown = f"{name} | {percent} % | {seed} | {how}{f' ({samples})' if int(samples) else ''}"

    def data(self, samples: int, labelled: bool = False, without: bool = False) -> object:
        """So many of the calibration images, drawn with the seed (``without`` those of the labelled ones that judge)."""
        if self.calibration.is_dir():
            return self.calibration
        held = np.load(self.calibration)
        order = np.random.default_rng(self.seed).permutation(len(held["images"]))
        drawn, own = np.sort(order[:samples]), np.sort(order[: self.samples])
        judging = np.random.default_rng([self.seed, len(own)]).permutation(len(own))[: held_out(len(own))]
        drawn = np.setdiff1d(drawn, own[judging]) if without else drawn
        images = {"images": held["images"][drawn]}
        return {**images, "labels": held["labels"][drawn]} if labelled else images["images"]

    def cut(self, model: object = None, **more: object) -> sfp_onnx.Model:
        """The model (default: the original) at the share of its MACs, repaired."""
        data = self.data(MOST.get(self.name, 2048), without=self.how == "labels")
        return sfp_onnx.prune(model or self.model, self.options, data=data, score_options=ScoreOptions(seed=self.seed),
                              data_options=self.read(), **more).model  # fmt: skip

    def read(self) -> DataOptions:
        return replace(self.reading, samples=self.samples) if self.calibration.is_dir() else self.reading

    def repaired(self) -> Path:
        """Cut and repaired, with its manifest beside; made once."""
        if not self.path.exists():
            self.cut(output=OutputOptions(path=self.path, manifest=self.path.with_suffix(".json")))
        return self.path

    def trained(self) -> tuple[sfp_onnx.Model, str]:
        """The network trained in the way of the case, and what the guard saw."""
        if self.how in ("rounds", "cubic"):
            schedule = cubic if self.how == "cubic" else rounds.targets_of
            with patch.object(rounds, "targets_of", schedule):
                return self.cut(repair=RepairOptions(finetune=EPOCHS), steps=ROUNDS), "-"
        if self.how == "groups":
            options = SparseOptions(epochs=EPOCHS, max_drop="100%", seed=self.seed)
            found = sparsify(self.model, options, self.data(self.samples), data_options=self.read())
            return self.cut(found.model), f"{found.before:.3f} -> {found.after:.3f}"
        options = TrainOptions(recipe=self.how, epochs=EPOCHS, seed=self.seed)
        data = self.data(self.samples, self.how == "labels")
        result = finetune(self.path, options, data, self.model, data_options=self.read())
        guard = f"{result.before:.3f} -> {result.after:.3f}{'' if result.kept else ' (not kept)'}"
        return result.model, guard

    def row(self) -> str:
        """One line of the table."""
        path = self.repaired()
        began = time.process_time()
        model, guard = self.trained()
        seconds, peak = time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        reading = replace(self.reading, center_crop=(224, 224), labels=self.test / "labels.csv") if self.test.is_dir() else self.reading
        before, after = sfp_onnx.evaluate([self.model, path, model], self.test, latency=False, data_options=reading)[1:]
        figures = [f"{100 * one.top1:.2f} / {one.kl:.3f} / {100 * one.agreement:.2f}" for one in (before, after)]
        return f"| {self.shown} | {figures[0]} | {figures[1]} | {guard} | {seconds:.0f} | {peak:.1f} |"


def cubic(texts: Sequence[str], before: Mapping[str, float], share: float) -> tuple[str, ...]:
    """In place of `rounds.targets_of`: the schedule of Zhu & Gupta (2017), s = s_f (1 - (1 - share)^3) of what leaves."""
    limits = bounds([parse_target(text) for text in texts], before)
    return tuple(f"{name}={limit + (before[name] - limit) * (1 - share) ** 3:.3f}" for name, limit in limits.items())


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
    dense = Trainer(used, judge, options, lambda said: None).train(first, {}, "dense")[0]
    paths = [sfp_onnx.save(made, work / f"{name}_{seed}.onnx") for name, made in (("first", first), ("dense", dense))]
    reading = DataOptions(steps=DIGITS)
    result = ticket(paths[1], options, data, paths[0], test_data=test, data_options=reading)
    rewound = ticket(paths[1], options, data, None, test_data=test, data_options=reading)
    rows = []
    for one, other in zip(result.rounds, rewound.rounds, strict=True):
        shown = [one.left, result.dense, one.ticket, *one.controls.values(), other.ticket]
        rows.append(f"| lottery, seed {seed} | " + " | ".join(f"{100 * value:.2f}" for value in shown) + " |")
    return "\n".join(rows)


# ---- a small transformer for the digits sample -------------------------------------------------------------------------

WIDTH, HEADS, INNER, LAYERS, TOKENS = 32, 4, 64, 2, 16


class Transformer:
    """Patches of 2 x 2 pixels, two layers of attention and feed-forward part behind LayerNormalizations, the mean of tokens."""

    def __init__(self, seed: int) -> None:
        self.random, self.nodes, self.held = np.random.default_rng(seed), list[onnx.NodeProto](), dict[str, np.ndarray]()

    def op(self, kind: str, *inputs: str, name: str = "", **attributes: object) -> str:
        name = name or f"{kind}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [f"{name}.out"], name=name, **attributes))
        return f"{name}.out"

    def const(self, name: str, value: object) -> str:
        self.held[name] = np.asarray(value)
        return name

    def drawn(self, name: str, *shape: int) -> str:
        scale = 1 / np.sqrt(np.prod(shape[1:]) if len(shape) > 2 else shape[0])
        return self.const(name, (self.random.standard_normal(shape) * scale).astype(np.float32))

    def dense(self, data: str, inputs: int, outputs: int, name: str) -> str:
        made = self.op("MatMul", data, self.drawn(f"{name}.weight", inputs, outputs), name=name)
        return self.op("Add", made, self.const(f"{name}.bias", np.zeros(outputs, np.float32)))

    def norm(self, data: str, name: str) -> str:
        scale, shift = (self.const(f"{name}.{part}", np.full(WIDTH, part == "scale", np.float32)) for part in ("scale", "shift"))
        return self.op("LayerNormalization", data, scale, shift, axis=-1)

    def attention(self, data: str, name: str) -> str:
        shape = self.const("heads", np.array([0, 0, HEADS, WIDTH // HEADS]))
        q, k, v = (self.op("Transpose", self.op("Reshape", self.dense(data, WIDTH, WIDTH, f"{name}.{part}"), shape), perm=perm)
                   for part, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])))  # fmt: skip
        logits = self.op("Mul", self.op("MatMul", q, k), self.const("scale", np.float32((WIDTH // HEADS) ** -0.5)))
        mixed = self.op("Transpose", self.op("MatMul", self.op("Softmax", logits, axis=-1), v), perm=[0, 2, 1, 3])
        return self.dense(self.op("Reshape", mixed, self.const("joined", np.array([0, 0, WIDTH]))), WIDTH, WIDTH, f"{name}.proj")

    def model(self) -> onnx.ModelProto:
        patches = self.op("Conv", "x", self.drawn("patches.weight", WIDTH, 1, 2, 2), strides=[2, 2], name="patches")
        flat = self.op("Reshape", patches, self.const("tokens", np.array([0, WIDTH, TOKENS])))
        x = self.op("Add", self.op("Transpose", flat, perm=[0, 2, 1]), self.drawn("places", 1, TOKENS, WIDTH))
        for number in range(LAYERS):
            x = self.op("Add", x, self.attention(self.norm(x, f"{number}.before"), str(number)))
            inner = self.op("Relu", self.dense(self.norm(x, f"{number}.middle"), WIDTH, INNER, f"{number}.up"))
            x = self.op("Add", x, self.dense(inner, INNER, WIDTH, f"{number}.down"))
        mean = self.op("ReduceMean", self.norm(x, "last"), axes=[1], keepdims=0)
        scores = self.dense(mean, WIDTH, 10, "classes")
        ports = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
                 for name, shape in (("x", ["N", 1, 8, 8]), (scores, ["N", 10]))]  # fmt: skip
        kept = [numpy_helper.from_array(value, name) for name, value in self.held.items()]
        made = helper.make_graph(self.nodes, "digits", ports[:1], ports[1:], kept)
        return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def shifted(path: Path) -> dict[str, np.ndarray]:
    """The images of a file and the same one pixel further to each of eight sides: 300 are few for a transformer."""
    held = np.load(path)
    images, labels = held["images"], held["labels"]
    moved = [np.roll(images, (down, right), (1, 2)) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    return {"images": np.concatenate(moved), "labels": np.tile(labels, 9)}


def diluted(network: str, seed: int, shared: Path) -> str:
    """Layers by AFCC, its control, and kernels of smallest L1 norm at the same rate; 1024 labelled images profile, re-fit and retrain."""
    case = Case(f"{network}:50", seed, shared, Path("."))
    analysis, rows, rate = sfp_onnx.inspect(case.model), [], None
    data, test = case.data(1024, True), np.load(case.test)
    for method in ("afcc", "random-afcc", "l1"):
        shown = []
        for more in ({"refit": False}, {"refit": False, "retrain": 3}, {}, {"retrain": 3}):
            given = rate if method == "l1" else None
            options = DiluteOptions(method, given, layers=DILUTED[network], seed=seed, force=True, retrain_lr=1e-3, **more)
            result = dilute(analysis, options, data, test_data=dict(test), data_options=case.reading)
            gone, total = (sum(getattr(item, name) for item in result.layers) for name in ("weights_removed", "weights"))
            rate = gone / total if method == "afcc" else rate
            shown.append(f"{100 * (result.evaluation[1].top1 or 0):.2f}")
        rows.append(f"| {network} | {seed} | {method} | {gone / total:.1%} | {' | '.join(shown)} |")
    return "\n".join(rows)


def nodes(seed: int) -> str:
    """ANDC on the transformer, its control and kernels of smallest L1 norm at the same rate: masked, re-fitted, retrained."""
    data, test = SAMPLES / "digits_calibration.npz", SAMPLES / "digits_heldout.npz"
    first = sfp_onnx.load(Transformer(seed).model())
    used, judge = (sfp_onnx.data_for(first, source, preprocessing=DIGITS) for source in (shifted(data), test))
    trainer = Trainer(used, judge, TicketOptions(epochs=25, lr=3e-3, seed=seed), lambda said: None)
    dense = trainer.train(first, {}, "dense")[0]
    ours = dilute(dense, DiluteOptions("andc", seed=seed, refit=False), used)
    heads = "; ".join(note for note in ours.notes if note.startswith("heads"))
    rows = [f"| {seed} | original | 0 | {100 * trainer.accuracy(dense):.2f} | | | {heads} |"]
    names = "|".join(item.layer.replace(".", r"\.") for item in ours.layers)
    gone, total = (sum(getattr(item, name) for item in ours.layers) for name in ("weights_removed", "weights"))
    for method, rate in (("andc", None), ("random", gone / total), ("l1", gone / total)):
        shown = []
        for more in ({"refit": False}, {}, {"retrain": 10}, {"retrain": 10, "refit": False}):
            options = DiluteOptions(method, rate, layers=f"^({names})$", seed=seed, **more)
            shown.append(f"{100 * trainer.accuracy(dilute(dense, options, used).model):.2f}")
        rows.append(f"| {seed} | {method} | {gone / total:.1%} | {' | '.join(shown)} |")
    return "\n".join(rows)


def sparse(seed: int) -> str:
    """Sparse training of the digits sample by labels: rows of moving masks and of one that stays, then of channels under pressure."""
    model, data, test = SAMPLES / "digits.onnx", SAMPLES / "digits_calibration.npz", SAMPLES / "digits_heldout.npz"
    reading = DataOptions(steps=DIGITS)

    def trained(method: str, **more: Any) -> sfp_onnx.Model:
        return sparsify(model, SparseOptions(method, max_drop="100%", seed=seed, **more), data, data_options=reading).model

    def top1(made: sfp_onnx.Model) -> str:
        return f"{100 * (sfp_onnx.evaluate([made], test, latency=False, data_options=reading)[0].top1 or 0):.2f}"

    rows = []
    for rate in (0.8, 0.9, 0.95):
        how = {"rate": rate, "lr": 3e-3, "epochs": 100}
        masks = [trained(method, moved=moved, **how) for method, moved in (("rigl", 0.3), ("set", 0.3), ("set", 0.0))]
        rows.append(f"| masks, seed {seed} | {1 - rate:.0%} | {' | '.join(map(top1, masks))} |")
    starts = [sfp_onnx.load(model), *(trained(*how) for how in (("groups",), ("slimming",)))]
    for percent in (50, 30, 15):
        options, scores = PlanOptions(targets=(f"macs={percent}%",), align="none"), ScoreOptions(seed=seed)
        cut = [sfp_onnx.prune(start, options, data=data, score_options=scores, data_options=reading).model for start in starts]
        rows.append(f"| channels, seed {seed} | {percent} % | {' | '.join(map(top1, cut))} |")
    return "\n".join(rows)


def made(text: str, seed: int, shared: Path, work: Path) -> str:
    """The rows of a case."""
    if text == "lottery":
        return lottery(seed, work)
    if text in ("nodes", "sparse"):
        return nodes(seed) if text == "nodes" else sparse(seed)
    if text.startswith("dilution:"):
        return diluted(text.partition(":")[2], seed, shared)
    return Case(text, seed, shared, work).row()


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=DEFAULT)
    parser.add_argument("--shared", type=Path, default=HOME)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--work", type=Path, default=Path("."))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    heads = ["network", "MACs left", "seed", "how", "repair: top-1 / KL / agreement", "trained", "held-out agreement", "CPU s", "GB"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for text in arguments.cases:
        for seed in map(int, arguments.seeds.split(",")):
            print(made(text, seed, arguments.shared, arguments.work), flush=True)


if __name__ == "__main__":
    main()
