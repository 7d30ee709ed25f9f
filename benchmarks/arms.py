"""What the parts of benchmarks/bandits.py share: networks, tables of all rewards, policies replayed on them, figures that are kept."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from files import needed

import sfp_onnx
from sfp_onnx.cut import cut
from sfp_onnx.methods.bandits.ablation import Ablations, Block
from sfp_onnx.methods.bandits.bandit_search import Aim, gather, make_reward
from sfp_onnx.methods.bandits.policies import POLICIES, Setting, order
from sfp_onnx.planning.widths import eligible
from sfp_onnx.repair import repaired
from sfp_onnx.runtime import open_model

NORMALISATION = sfp_onnx.Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), scale=255, layout="nhwc")
MODELS = {"ResNet-20": ("resnet20_cifar10.onnx", r"layer.*conv1"), "ResNet-56": ("resnet56_cifar10_bn.onnx", r"layer\d/layer\d\.\d/conv1")}
TEST_IMAGES, REPAIR_IMAGES = 1000, 512
NAMES = [name for name in POLICIES if name != "leave-one-out"]


def line(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def head(*cells: object) -> None:
    line(*cells)
    print("|" + "---|" * len(cells))


class Net:
    """A CIFAR network, its groups that may shrink, and its data."""

    def __init__(self, title: str, shared: Path) -> None:
        self.title, (file, only) = title, MODELS[title]
        self.analysis = sfp_onnx.inspect(needed(shared / "models" / file))
        calib, test = (needed(shared / "data" / f"cifar10_{part}.npz") for part in ("calib", "test"))
        self.calib = sfp_onnx.data_for(self.analysis.model, calib, preprocessing=NORMALISATION)
        self.test = sfp_onnx.data_for(self.analysis.model, test, preprocessing=NORMALISATION, samples=TEST_IMAGES)
        drawn = np.random.default_rng(0).permutation(self.calib.samples)
        self.fitted = self.calib.part(np.sort(drawn[:REPAIR_IMAGES]))
        self.groups = eligible(self.analysis.coupling, sfp_onnx.PlanOptions(ratio=0.5, only=only), {})

    def blocks(self, images: int, batch: int) -> list[Block]:
        return gather(self.calib, np.random.default_rng(0).permutation(self.calib.samples)[:images], batch)

    def removed(self, scores: np.ndarray, ratio: float, allocation: str = "uniform") -> np.ndarray:
        return Aim(self.analysis, self.groups, sfp_onnx.PlanOptions(ratio=ratio, allocation=allocation)).removed(scores)

    def whole(self, engine: Ablations, values: np.ndarray) -> np.ndarray:
        """Scores of all units from those of the arms."""
        scores = np.ones(self.analysis.coupling.units)
        scores[engine.units] = values
        return scores

    def pruned(self, removed: np.ndarray, repair: str = "none") -> Any:
        if not removed.any():
            return self.analysis.model
        model = cut(self.analysis.prepared, self.analysis.coupling, removed)
        if repair == "none":
            return model
        return repaired(self.analysis, model, removed, self.fitted, sfp_onnx.RepairOptions(fit=repair, force=True)).model

    def top1(self, removed: np.ndarray, repair: str = "none") -> float:
        return _top1(self.pruned(removed, repair), self.test)


def _top1(model: Any, data: Any) -> float:
    session = open_model(model)
    right = start = 0
    for feeds, count in data.batches():
        right += int((session.run(feeds)[0].argmax(1) == data.labels[start : start + count]).sum())
        start += count
    return right / start


class Known:
    """Figures by what was done, kept in a file so that a run that is cut off can go on; after ``deadline`` (of the monotonic clock)
    nothing more is measured."""

    def __init__(self, file: Path | None, deadline: float = math.inf) -> None:
        self.file, self.deadline = file, deadline
        self.held = json.loads(file.read_text()) if file and file.exists() else {}

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """A figure; None if it is unknown and the time is over."""
        if key not in self.held:
            if time.monotonic() > self.deadline:
                return None
            self.held[key] = make()
            if self.file:
                self.file.write_text(json.dumps(self.held))
        return self.held[key]

    def top1(self, net: Net, removed: np.ndarray, repair: str) -> float | None:
        key = f"{net.title} {repair} {hashlib.sha256(removed.tobytes()).hexdigest()}"
        found: float | None = self.get(key, lambda: net.top1(removed, repair))
        return found


# ---- replaying policies on a table of rewards ------------------------------------------------------------------------


def table_of(engine: Ablations) -> np.ndarray:
    """Rewards (arms, images) of all arms on all blocks."""
    reward = make_reward(None, engine.references, None)
    found = np.zeros((len(engine.units), sum(block.count for block in engine.blocks)))
    size = engine.blocks[0].count
    for block in range(len(engine.blocks)):
        for run in engine.runs(np.arange(len(engine.units))):
            for arm, outputs in zip(run, engine.outputs(run, block), strict=True):
                found[arm, block * size : (block + 1) * size] = reward(engine.references[block], outputs, None)
    return found


def replayed(name: str, table: np.ndarray, batch: int, pulls: int, seed: int, quota: Any, **more: float) -> np.ndarray:
    """Importance per arm of a policy, images in an order drawn with the seed."""
    images = np.random.default_rng(seed).permutation(table.shape[1])
    blocks = table[:, images[: len(images) // batch * batch]].reshape(len(table), -1, batch).mean(2)
    horizon = pulls * len(table)
    policy = POLICIES[name](Setting(len(table), horizon, seed, quota=quota, **more))
    done = 0
    while done < horizon:
        arms, places = order(policy, horizon - done, blocks.shape[1])
        if not len(arms):
            break
        policy.update(arms, blocks[arms, places])
        done += len(arms)
    return 1 - policy.standing()


def quota_of(engine: Ablations, ratio: float, allocation: str = "uniform") -> Any:
    """What a removal gives up of every group, or of all arms."""
    if allocation == "global":
        return lambda means: (np.zeros(len(means), np.int64), np.array([int(ratio * len(means) + 1e-9)]))
    widths = np.bincount(engine.owner)
    return lambda means: (engine.owner, np.array([int(ratio * width + 1e-9) for width in widths]))
