"""Single filter performance: what it says of real networks, what it costs, and how it ranks channels.

``python benchmarks/sfp.py [folder with models/ and data/] [layers] [cost] [channels] [title ...]`` prints Markdown (default: all).

- layers: per layer probe accuracy (on held-out calibration images), clusters, noise, SNR.
- cost: the pass against a plain forward pass (processor time, interleaved, sessions included, minimum of several repeats), and seconds per
  probe.
- channels: top-1 after removing 20 and 40 % of the block-internal channels, without repair and with the re-fit (lstsq), for all scores of
  the registry. On VGG-11 every convolution is internal, and at 40 % nothing is left of it without repair.

Titles (``VGG-11``, ``ResNet-20``, ``ResNet-56``) among the arguments leave the other networks out, names of scores the other scores.

Calibration images come from the training sets (the networks know them by heart), accuracies from the test sets.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import ranking

import sfp_onnx
from sfp_onnx.core.options import RepairOptions
from sfp_onnx.coupling.analysis import pass_batches
from sfp_onnx.methods.sfp import profiles
from sfp_onnx.methods.sfp.probe import PROBES, Samples, room
from sfp_onnx.methods.sfp.profiles import classes_of, collect
from sfp_onnx.runtime import open_model, version
from sfp_onnx.scores.scoring import SCORES

REPEATS, TIMED, CALIBRATION = 5, 512, 2000
RESNET_REPAIR = RepairOptions(force=True)
VGG_REPAIR = RepairOptions(ridges=(1e-2,), rows_per_input=4, force=True)  # layers of 4608 inputs: one ridge instead of four, fewer rows
STATISTICS = {
    "probe acc.": "probe_accuracy", "cluster size": "cluster_size", "clusters/filter": "clusters_per_filter",
    "labels/filter": "labels_per_filter", "one cluster": "one_cluster", "noise": "noise", "SNR": "snr", "no cluster": "no_cluster",
}  # fmt: skip


def layer_table(found: sfp_onnx.Profiles) -> str:
    """Markdown: one row per layer."""
    head = ("layer", "filters", *STATISTICS)
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for layer in found.layers:
        own = layer.statistics
        values = [f"{own[name]:.3g}" for name in STATISTICS.values()]
        lines.append(f"| {layer.layer} | {len(layer.units)} | {' | '.join(values)} |")
    return "\n".join(lines)


def pass_cost(analysis: sfp_onnx.Analysis, data: sfp_onnx.Dataset) -> str:
    """The pass against a plain forward pass over the same batches, and seconds per probe on all its images."""
    scores, taps, rows = classes_of(analysis), profiles.taps(analysis, 4)[0], np.arange(data.samples)
    batches, widths = list(pass_batches(analysis, data)), [tap.width for tap in taps]
    plain, passes = [], []
    for _ in range(REPEATS):
        start = time.process_time()
        session = open_model(analysis.prepared.model)
        for feeds, _count in batches:
            session.run(feeds)
        plain.append(time.process_time() - start)
        start = time.process_time()
        with room(rows, widths) as store:
            collect(analysis.prepared.model, taps, scores, batches, data.labels, store, lambda steps: None)
        passes.append(time.process_time() - start)
    assert data.labels is not None
    seconds: dict[str, list[float]] = {name: [] for name in PROBES}
    with room(rows, widths) as store:
        collect(analysis.prepared.model, taps, scores, batches, data.labels, store, lambda steps: None)
        for index in range(len(taps)):
            own = store.get(index)
            for name, train in PROBES.items():
                start = time.process_time()
                train(Samples(own, data.labels, rows), scores.classes, 0)
                seconds[name].append(time.process_time() - start)
    probes = ", ".join(f"{name} {np.mean(own):.2f} s per layer (largest {max(own):.2f} s)" for name, own in seconds.items())
    return (
        f"{data.samples} images: plain {min(plain):.2f} s, profile pass {min(passes):.2f} s, ratio {min(passes) / min(plain):.2f}; "
        f"features {sum(widths) * 4 / 1024:.0f} KiB per image; probes on these images: {probes}"
    )


def layers(root: Path, titles: Sequence[str]) -> None:
    """What the measure says per layer, and what it costs."""
    for case in (ranking.VGG11, ranking.RESNET20, ranking.RESNET56):
        if titles and case.title not in titles:
            continue
        analysis = case.analysis(root)
        start = time.process_time()
        found = sfp_onnx.class_profiles(analysis, case.images(root, "calib"))
        seconds = time.process_time() - start
        print(f"\n## {case.title}\n\n{layer_table(found)}\n")
        print(f"{found.samples} images ({found.trained} train the probes, {found.held_out} held out), {seconds:.0f} s in all.", flush=True)


def cost(root: Path, titles: Sequence[str]) -> None:
    """What the pass costs, in processor time."""
    for case in (ranking.VGG11, ranking.RESNET20, ranking.RESNET56):
        if not titles or case.title in titles:
            print(f"{case.title}: {pass_cost(case.analysis(root), case.images(root, 'calib', TIMED))}.", flush=True)


def channels(root: Path, titles: Sequence[str]) -> None:
    """Single filter performance among all scores, as channel scores."""
    every = [*(name for name in SCORES if ":" not in name), "sfp+contribution"]
    names = [name for name in every if name in sys.argv] or every
    for case, images, options in ((ranking.RESNET56, 512, RESNET_REPAIR), (ranking.VGG11, 256, VGG_REPAIR)):
        if titles and case.title not in titles:
            continue
        data = (case.analysis(root), case.images(root, "calib", CALIBRATION), case.images(root, "test"))
        found = ranking.ranking(case, (0.2, 0.4), names, data, 3, (replace(case.images(root, "calib", images), labels=None), options))
        columns = {f"{case.title} {ratio:.0%}": (found, ratio) for ratio in (0.2, 0.4)}
        print(f"\n## As channel scores: {case.title}\n\n{ranking.ranking_table(columns)}", flush=True)


def main() -> None:
    """Run the parts that were asked for."""
    every = {"layers": layers, "cost": cost, "channels": channels}
    parts = [name for name in every if name in sys.argv] or list(every)
    titles = [case.title for case in (ranking.RESNET56, ranking.RESNET20, ranking.VGG11) if case.title in sys.argv]
    folders = [Path(item) for item in sys.argv[1:] if item not in (*every, *titles, *SCORES, "sfp+contribution")]
    root = folders[0] if folders else ranking.SHARED
    print(f"onnxruntime {version()}, numpy {np.__version__}")
    for name in parts:
        every[name](root, titles)


if __name__ == "__main__":
    main()
