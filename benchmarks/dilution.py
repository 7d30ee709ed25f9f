"""What dilution costs: ``python benchmarks/dilution.py [network ...] [--shared DIR] [--rates 0.5,afcc] [--methods l1,...] [--held-out]``.

Prints a Markdown row per network, method and rate: top-1 and KL divergence to the original, of the mask alone and after the re-fit. On
the 2000 test images; with ``--held-out`` on images of the training set that no statistic saw, which is where forms are chosen.
Calibration and re-fit see images of the training set only. The rate ``afcc`` stands for what AFCC removes, layer by layer. Methods:
those of the registry, and the trial forms below. Networks: vgg (convs 4-7), vgg-classifier, vgg-both, resnet20 and resnet56 (third
stage), resnet20-classifier. ``--no-refit``: masks alone.
"""

from __future__ import annotations

import argparse
import pickle
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from files import HOME, needed
from ranking import CIFAR10, CIFAR100

import sfp_onnx
from sfp_onnx import graph
from sfp_onnx.core.options import RepairOptions
from sfp_onnx.core.types import Array, BoolArray
from sfp_onnx.coupling.analysis import silent
from sfp_onnx.methods.dilution import KERNEL, KernelView, MethodOptions, correlation, find_method, method as register, tile_sums
from sfp_onnx.methods.dilution.connections import zeroed
from sfp_onnx.methods.dilution.ends import Measured, look, losses_of
from sfp_onnx.methods.dilution.stages import DiluteOptions, choose_masks, refitted
from sfp_onnx.methods.sfp.probe import ProfileOptions
from sfp_onnx.runtime import open_model

NETWORKS = {
    "vgg": ("vgg11_cifar100.onnx", "cifar100", CIFAR100, "^/(15|18|22|25)/Conv$"),
    "vgg-classifier": ("vgg11_cifar100.onnx", "cifar100", CIFAR100, "Gemm"),
    "vgg-both": ("vgg11_cifar100.onnx", "cifar100", CIFAR100, "^/(15|18|22|25)/Conv$|Gemm"),
    "resnet20": ("resnet20_cifar10.onnx", "cifar10", CIFAR10, "layer3.*Conv"),
    "resnet20-classifier": ("resnet20_cifar10.onnx", "cifar10", CIFAR10, "Gemm"),
    "resnet56": ("resnet56_cifar10_bn.onnx", "cifar10", CIFAR10, "layer3.*Conv"),
}
METHODS = ("obs", "soft-afcc", "l1", "wanda", "random")
REFIT_SAMPLES = 1000
HELD_OUT = 4  # every so many-th image of the calibration set, in random order, is held out
REPAIR = RepairOptions(rows_per_input=32)  # a quarter of the default, for time
Masks = dict[str, BoolArray]


# ---- trial forms -----------------------------------------------------------------------------------------------------


def trial(name: str, function: Callable[..., Array]) -> None:
    """Register a form of ``soft-afcc`` as a function of L2 norms n, L1 norms m, RMS r, losses q after a re-fit of the others, correlations
    of profiles rho and of class means rmu, signs s of sums."""

    def form(view: KernelView, options: MethodOptions) -> Array:
        assert view.ends is not None
        ends, pair = view.ends, lambda values: values[view.filter, view.channel][:, :, None]
        norms = {"n": np.sqrt(tile_sums(view.values.astype(np.float64) ** 2, KERNEL)), "m": tile_sums(np.abs(view.values), KERNEL)}
        rho = pair(correlation(ends.writes.evidence, ends.reads.evidence))
        rmu = pair(correlation(ends.writes.activity, ends.reads.activity))
        q = np.ones(1) if view.losses is None else view.losses[:, :, None]
        return function(**norms, q=q, r=view.read_rms[:, :, None], rho=rho, rmu=rmu, s=np.sign(tile_sums(view.values, KERNEL)))

    register(name, name, "trial", needs=("activations", "profiles") + (("losses",) if name.startswith("q") else ()))(form)


trial("l-r", lambda m, r, **_: m * np.sqrt(r))
trial("l-r-rmu", lambda m, r, rmu, **_: m * np.sqrt(r) * (1 + abs(rmu)))
trial("l-r-rho", lambda m, r, rho, s, **_: m * np.sqrt(r) * (1 + abs(rho) + s * rho / 2))
trial("w-rho", lambda n, r, rho, s, **_: n * r * (1 + abs(rho) + s * rho / 2))
trial("w-rmu", lambda n, r, rmu, **_: n * r * (1 + abs(rmu)))
trial("q", lambda q, **_: q)
trial("q-rmu", lambda q, rmu, **_: q * (1 + abs(rmu)))
trial("q-rho", lambda q, rho, s, **_: q * (1 + abs(rho) + s * rho / 2))
trial("q-m-rmu", lambda q, m, rmu, **_: np.sqrt(q * m) * (1 + abs(rmu)))
trial("q-m-half", lambda q, m, rmu, **_: np.sqrt(q * m) * (1 + abs(rmu) / 2))
trial("q-m-less", lambda q, m, rmu, **_: np.sqrt(q * m) * (1 - abs(rmu) / 4))


# ---- measuring -------------------------------------------------------------------------------------------------------


def data_of(analysis: sfp_onnx.Analysis, name: str, root: Path, held_out: bool, fitted: int = REFIT_SAMPLES) -> list[sfp_onnx.Dataset]:
    """Data to calibrate on, to fit on and to measure on."""
    _, images, steps, _ = NETWORKS[name]
    calibration = sfp_onnx.data_for(analysis.model, needed(root / "data" / f"{images}_calib.npz"), preprocessing=steps)
    test = sfp_onnx.data_for(analysis.model, needed(root / "data" / f"{images}_test.npz"), preprocessing=steps)
    assert calibration is not None and test is not None
    order = np.random.default_rng(0).permutation(calibration.samples)
    if held_out:
        count = calibration.samples // HELD_OUT
        calibration, test = calibration.part(np.sort(order[count:])), calibration.part(np.sort(order[:count]))
        order = np.random.default_rng(0).permutation(calibration.samples)
    return [calibration, calibration.part(np.sort(order[:fitted])), test]


def looked(
    analysis: sfp_onnx.Analysis, name: str, calibration: sfp_onnx.Dataset, labelled: bool, given: argparse.Namespace
) -> Measured:
    """What is measured of the layers, from an earlier run if that kept it."""
    path = kept(name, labelled, given)
    if path is not None and path.exists():
        return pickle.loads(path.read_bytes())
    seen = look(analysis, NETWORKS[name][3], calibration, ProfileOptions() if labelled else None)
    keep(seen, name, labelled, given)
    return seen


def kept(name: str, labelled: bool, given: argparse.Namespace) -> Path | None:
    return given.keep / f"{name}-{labelled}-{given.held_out}.pickle" if given.keep else None


def keep(seen: Measured, name: str, labelled: bool, given: argparse.Namespace) -> None:
    """Write what was measured, if asked to."""
    if (path := kept(name, labelled, given)) is not None:
        path.write_bytes(pickle.dumps(seen))


def masks_of(analysis: sfp_onnx.Analysis, seen: Measured, method: str, rate: str | None) -> tuple[Masks, float]:
    """Masks, and the share of kernels that they remove (mean over layers)."""
    masks: Masks = {}
    shares = []
    for target in seen.targets:
        own = replace(seen, targets=(target,), skipped=())
        at = None if rate is None else afcc_rate(analysis, own) if rate == "afcc" else float(rate)
        found, (figures,), _, _ = choose_masks(analysis, own, DiluteOptions(method, at, force=True))
        masks.update(found)
        shares.append(figures.removed / figures.total)
    return masks, float(np.mean(shares))


def afcc_rate(analysis: sfp_onnx.Analysis, seen: Measured) -> float:
    _, (figures,), _, _ = choose_masks(analysis, seen, DiluteOptions("afcc", None, force=True))
    return figures.removed / figures.total


def rows(name: str, given: argparse.Namespace) -> None:
    """Measure one network and print a row per method and rate."""
    methods: list[str] = given.methods.split(",")
    analysis = sfp_onnx.inspect(needed(given.shared / "models" / NETWORKS[name][0]))
    calibration, fitting, judge = data_of(analysis, name, given.shared, given.held_out, given.images)
    start = time.process_time()
    labelled = "afcc" in given.rates or any("profiles" in find_method(method)[0].needs for method in methods)
    seen = looked(analysis, name, calibration, labelled, given)
    if not seen.losses and any("losses" in find_method(method)[0].needs for method in methods):
        seen = replace(seen, losses=losses_of(analysis, seen.targets, fitting, silent))
        keep(seen, name, labelled, given)
    print(f"# {name}: looked at {len(seen.targets)} layers in {time.process_time() - start:.0f} s", flush=True)
    known = answers(analysis.model, judge)
    print(f"| {name} | original | 0.0% | {figures(known, known, judge)} | - | - | - |", flush=True)
    for method in methods:
        fixed = find_method(method)[0].fixed
        for rate in [None] if fixed else given.rates.split(","):
            masks, share = masks_of(analysis, seen, method, rate)
            model = zeroed(analysis.prepared.model, masks)
            sparse = len(graph.save.to_proto(model, sparse=True).SerializeToString())
            cells = f"| {name} | {method} | {share:.1%} | {figures(known, answers(model, judge), judge)}"
            start = time.process_time()
            after = "-"
            if given.refit:
                again, _ = refitted(analysis, model, masks, fitting, REPAIR, silent)
                after = figures(known, answers(again, judge), judge)
            print(f"{cells} | {after} | {sparse} | {time.process_time() - start:.0f} s |", flush=True)


def answers(model: graph.Model, judge: sfp_onnx.Dataset) -> Array:
    """Logits of all images, in float64."""
    session = open_model(model)
    return np.concatenate([session.run(feeds)[0][:count] for feeds, count in judge.batches()]).astype(np.float64)


def figures(known: Array, found: Array, judge: sfp_onnx.Dataset) -> str:
    """Top-1 and KL divergence to the original."""
    first, second = (own - own.max(1, keepdims=True) for own in (known, found))
    first, second = (own - np.log(np.exp(own).sum(1, keepdims=True)) for own in (first, second))
    divergence = (np.exp(first) * (first - second)).sum(1).mean()
    return f"{(found.argmax(1) == judge.labels).mean():.4f} / {divergence:.4f}"


def main() -> None:
    """Measure and print."""
    take = argparse.ArgumentParser(description=__doc__)
    take.add_argument("networks", nargs="*", default=list(NETWORKS))
    take.add_argument("--shared", type=Path, default=HOME)
    take.add_argument("--rates", default="0.5,0.66,0.8")
    take.add_argument("--methods", default=",".join(METHODS))
    take.add_argument("--no-refit", dest="refit", action="store_false")
    take.add_argument("--held-out", action="store_true")
    take.add_argument("--images", type=int, default=REFIT_SAMPLES, help="images that the re-fit sees")
    take.add_argument("--keep", type=Path, help="folder that keeps statistics between runs")
    given = take.parse_args()
    print("| network | method | removed | choose_masks: top-1 / KL | re-fit: top-1 / KL | bytes sparse | time of the re-fit |")
    print("|---|---|---|---|---|---|---|")
    for name in given.networks:
        rows(name, given)


if __name__ == "__main__":
    main()
