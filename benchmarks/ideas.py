"""Ideas for a better repair, each on images that nothing was fitted on: ``python benchmarks/ideas.py [FOLDER [DRAWS [PART]]]``.

ResNet-20, block-internal channels, any width, score `obs`. Each draw splits the training images anew: some to fit on, 1024 to judge on.
Cells are the means over the draws: KL divergence from the original, and agreement with it in %. FOLDER holds models/ and data/
(default: ../shared beside the repository); PART is a part of an idea's name. Prints Markdown.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from ranking import RESNET20, SHARED

import sfp_onnx
from sfp_onnx import graph
from sfp_onnx.core.options import RepairOptions
from sfp_onnx.core.types import IntArray, Layer
from sfp_onnx.coupling.cost import keep_mask
from sfp_onnx.pipeline.opened import Inputs
from sfp_onnx.pipeline.scored import Scoring, candidates
from sfp_onnx.planning import removal_of
from sfp_onnx.planning.search import plan_for
from sfp_onnx.repair import lockstep, repaired
from sfp_onnx.repair.lockstep import Setting
from sfp_onnx.runtime import open_model

CUTS = (30, 50, 70)
DRAWS = 4
GOLDEN = (5**0.5 - 1) / 2
PLASTIC = 1.324717957244746  # x^3 = x + 1: the generalised golden ratio of two dimensions


class Case:
    """ResNet-20 with one draw of images, and the plans for its cuts."""

    def __init__(self, root: Path, draw: int) -> None:
        self.analysis = RESNET20.analysis(root)
        every = replace(RESNET20.images(root, "calib"), labels=None)
        order = np.random.default_rng(draw).permutation(every.samples)
        self.judge, self.rest = every.part(np.sort(order[:1024])), every.part(order[1024:])
        self.data = self.images(1024)
        options = [sfp_onnx.PlanOptions(targets=(f"macs={100 - cut}%",), only=RESNET20.only, align=None) for cut in CUTS]
        scored = candidates(Inputs(self.analysis, self.data), options[0], Scoring("obs", repair=None))
        self.plans = [plan_for(scored, own) for own in options]
        self.pruned = [sfp_onnx.apply(self.analysis, plan, verify=False).model for plan in self.plans]
        self.removed = [removal_of(plan, self.analysis.coupling, plan.model_sha256) for plan in self.plans]

    def images(self, count: int) -> sfp_onnx.Dataset:
        return self.rest.part(np.arange(count))

    def fitted(self, number: int, start: graph.Model | None = None, data: sfp_onnx.Dataset | None = None, **options: object) -> graph.Model:
        """The model of a cut after the repair; from ``start``, if it is not as the cut left it."""
        wanted = replace(RepairOptions(force=True), **options)
        return repaired(self.analysis, start or self.pruned[number], self.removed[number], data or self.data, wanted).model

    def worth(self, model: graph.Model) -> tuple[float, float]:
        """KL divergence, agreement in %."""
        found = sfp_onnx.evaluate([self.analysis.model, model], self.judge, latency=False)[1]
        return found.kl or 0.0, 100 * (found.agreement or 0)


# ---- ideas -----------------------------------------------------------------------------------------------------------


def cut_only(case: Case, number: int) -> graph.Model:
    return case.pruned[number]


def second_sweep(case: Case, number: int) -> graph.Model:
    return case.fitted(number, case.fitted(number))


def classifier_kept(case: Case, number: int) -> graph.Model:
    """All layers re-fitted but the last; nothing reads it, so that it can be put back afterwards."""
    last = graph.nodes(case.pruned[number])[-1]
    assert last.op == "Gemm"
    values = graph.Constants(case.pruned[number])
    return graph.extract.with_constants(case.fitted(number), {name: values[name] for name in last.inputs[1:]})


def classifier_only(case: Case, number: int) -> graph.Model:
    """Only the last layer re-fitted, on what the unrepaired network gives it."""
    last, full = graph.nodes(case.pruned[number])[-1], case.fitted(number)
    before = {name: value for name, value in graph.Constants(case.pruned[number]).items() if name not in last.inputs}
    shifted = graph.extract.with_constants(full, before)
    with fitting_only(last.name):
        return case.fitted(number, shifted)


@contextmanager
def fitting_only(name: str) -> Iterator[None]:
    """The repair looks at one layer alone."""
    kept = lockstep.candidates

    def one(*given: object) -> tuple[list[list[Layer]], list[str]]:
        tasks, left = kept(*given)
        return [own for own in tasks if own[0].node.name == name], left

    lockstep.candidates = one
    try:
        yield
    finally:
        lockstep.candidates = kept


def merged(case: Case, number: int) -> graph.Model:
    """Each removed channel j is what its best kept channel i tells of it, j = a i + b, put into the layer that reads both."""
    coupling, removed, model = case.analysis.coupling, case.removed[number], case.pruned[number]
    cut = [layer for layer in coupling.layers if removed[layer.source].any()]
    values, nodes, fresh = graph.Constants(model), {node.outputs[0]: node for node in graph.nodes(model)}, {}
    original = graph.Constants(case.analysis.model)
    for layer, (mean, covariance) in zip(cut, moments(case, [layer.data_name for layer in cut]), strict=True):
        keep = keep_mask(layer.source, removed)
        node = nodes[layer.node.outputs[0]]
        weight, bias = values[node.inputs[1]].astype(np.float64), values[node.inputs[2]].astype(np.float64)
        own = np.compress(keep_mask(layer.writes, removed), original[layer.node.inputs[1]].astype(np.float64), 0)
        spread = np.maximum(np.diag(covariance), 1e-12)
        for lost in np.flatnonzero(~keep):
            likeness = covariance[lost] ** 2 / spread * keep
            best = int(np.argmax(likeness))
            slope = covariance[lost, best] / spread[best]
            weight[:, keep[:best].sum()] += slope * own[:, lost]
            bias += own[:, lost].sum((1, 2)) * (mean[lost] - slope * mean[best])
        fresh |= {node.inputs[1]: weight.astype(np.float32), node.inputs[2]: bias.astype(np.float32)}
    return graph.extract.with_constants(model, fresh)


def moments(case: Case, names: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Mean and covariance of the channels of some tensors of the original, over images and positions."""
    types = graph.tensor_types(case.analysis.model)
    ports = [replace(port, shape=None) for port in graph.inputs(case.analysis.model)]
    model = graph.extract.segment(case.analysis.model, ports, {name: types[name] for name in names})
    session = open_model(model)
    sums = [(0, 0.0, 0.0)] * len(names)
    for feeds, _ in case.data.batches():
        for at, found in enumerate(session.run(feeds, list(names))):
            rows = np.moveaxis(found, 1, -1).reshape(-1, found.shape[1]).astype(np.float64)
            count, first, second = sums[at]
            sums[at] = count + len(rows), first + rows.sum(0), second + rows.T @ rows
    return [(first / count, second / count - np.outer(first, first) / count**2) for count, first, second in sums]


# ---- where to look ---------------------------------------------------------------------------------------------------


def random_positions(count: int, size: int, rng: np.random.Generator, samples: int) -> IntArray:
    """Drawn at random, without stretches."""
    return np.argsort(rng.random((samples, size)), 1)[:, :count]


def golden_positions(count: int, size: int, rng: np.random.Generator, samples: int) -> IntArray:
    """Kronecker sequence of the golden ratio along the flattened map, from a random start."""
    places = (rng.random((samples, 1)) + GOLDEN * np.arange(count)) % 1
    return (places * size).astype(np.int64)


def plane_positions(count: int, size: int, rng: np.random.Generator, samples: int) -> IntArray:
    """Kronecker sequence of the plane (R2, Roberts 2018) over height and width, from a random start."""
    side = round(size**0.5)
    if side * side != size:
        return golden_positions(count, size, rng, samples)
    steps = np.asarray([1 / PLASTIC, 1 / PLASTIC**2])
    places = (rng.random((samples, 1, 2)) + steps * np.arange(count)[:, None]) % 1
    row, column = np.moveaxis((places * side).astype(np.int64), -1, 0)
    return row * side + column


def looking(case: Case, number: int, draw: Callable[..., IntArray]) -> graph.Model:
    """The repair with other positions, as many as it would take."""
    kept = lockstep.positions

    def other(setting: Setting, step: object, seed: tuple[int, ...], output: Sequence[int], inputs: int) -> IntArray:
        usual = kept(setting, step, seed, output, inputs)
        samples, size = step.linear.form.positions(output)
        return usual if usual.shape[1] == size else draw(usual.shape[1], size, np.random.default_rng(seed), samples)

    lockstep.positions = other
    try:
        return case.fitted(number)
    finally:
        lockstep.positions = kept


def option(case: Case, number: int, **options: object) -> graph.Model:
    return case.fitted(number, **options)


def fewer(case: Case, number: int, images: int) -> graph.Model:
    return case.fitted(number, data=case.images(images))


def mirrored(case: Case, number: int) -> graph.Model:
    """Every image is followed by its mirror image, so that both are fitted on, or both judge."""
    images = np.concatenate([feeds["input"][:count] for feeds, count in case.data.batches()])
    twice = np.stack([images, images[..., ::-1]], 1).reshape(-1, *images.shape[1:])
    return case.fitted(number, data=sfp_onnx.data_for(case.analysis.model, {"input": twice}))


IDEAS: dict[str, Callable[[Case, int], graph.Model]] = {
    "**as it is**: 1024 images, 128 rows per input": option,
    "no repair": cut_only,
    "biases only": partial(option, fit="bias"),
    "merging each removed channel into the likeliest kept one": merged,
    "the classifier alone re-fitted": classifier_only,
    "all layers but the classifier": classifier_kept,
    "a second sweep": second_sweep,
    "mirror images, too": mirrored,
    "64 rows per input": partial(option, rows_per_input=64.0),
    "256 rows per input": partial(option, rows_per_input=256.0),
    "512 images, as many rows": partial(fewer, images=512),
    "256 images, as many rows": partial(fewer, images=256),
    "positions at random": partial(looking, draw=random_positions),
    "positions by the golden ratio": partial(looking, draw=golden_positions),
    "positions by R2 in the plane": partial(looking, draw=plane_positions),
    "finer ridges": partial(option, ridges=(1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
}


def main() -> None:
    """Run all."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else SHARED
    draws = int(sys.argv[2]) if len(sys.argv) > 2 else DRAWS
    part = sys.argv[3] if len(sys.argv) > 3 else ""
    usual = next(iter(IDEAS))
    ideas = {name: idea for name, idea in IDEAS.items() if part in name or name == usual}
    found: dict[str, list[np.ndarray]] = {name: [] for name in ideas}
    for draw in range(draws):
        case = Case(root, draw)
        for name, idea in ideas.items():
            found[name].append(np.asarray([case.worth(idea(case, number)) for number in range(len(CUTS))]))
            print(f"# draw {draw}: {name}: {np.round(found[name][-1], 4).tolist()}", file=sys.stderr, flush=True)
    print(f"| repair | {' | '.join(f'{cut} %' for cut in CUTS)} |\n|---|{'---|' * len(CUTS)}")
    for name, values in found.items():
        mean = np.mean(values, 0)
        gap = np.asarray(values)[:, :, 1] - np.asarray(found[usual])[:, :, 1]
        spread = gap.std(0, ddof=1) / len(gap) ** 0.5 if len(gap) > 1 else np.zeros(len(CUTS))
        parts = zip(mean, gap.mean(0), spread, strict=True)
        cells = [f"{kl:.3f}; {agreement:.1f} ({more:+.1f} ± {error:.1f})" for (kl, agreement), more, error in parts]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
