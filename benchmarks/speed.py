"""Speed and memory of pruning and calibration: ``python benchmarks/speed.py``.

1. Data-free prune (load, analyse, score, plan, cut, verify, save) of a ResNet-50 with random weights, in a fresh process: seconds
   and peak memory above that of an empty process that has imported the package.
2. The statistics pass against a plain onnxruntime forward pass over the same data, interleaved, minimum of several repeats.
3. Peak memory of the statistics pass for different numbers of samples.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx

sys.path.insert(0, str(Path(__file__).parent))
import models

REPEATS = 7



def child(code: str, *arguments: str) -> list[float]:
    """Run Python code in a fresh process; it prints numbers."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return [float(item) for item in done.stdout.split()]


PRUNE = """
import resource, sys, time
import sfp_onnx
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
idle, start = peak(), time.perf_counter()
result = sfp_onnx.prune(sys.argv[1], sfp_onnx.PlanOptions(ratio=0.5), verify=sys.argv[3] == "1")
result.save(sys.argv[2])
print(time.perf_counter() - start, peak() - idle)
"""

CALIBRATE = """
import resource, sys, time
import numpy as np, sfp_onnx
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
analysis = sfp_onnx.inspect(sys.argv[1], {"input": [2, 3, 64, 64]})
data = sfp_onnx.data_for(analysis.model, sys.argv[2], samples=int(sys.argv[3]), preprocessing=sfp_onnx.Preprocessing(scale=255))
sfp_onnx.score(analysis, "contribution", data)
print(peak())
"""


def prune_benchmark(folder: Path) -> None:
    path = folder / "resnet50.onnx"
    onnx.save(models.resnet50(), path)
    size = path.stat().st_size / 2**20
    for verify in ("1", "0"):
        runs = [child(PRUNE, str(path), str(folder / "out.onnx"), verify) for _ in range(3)]
        seconds, memory = min(run[0] for run in runs), max(run[1] for run in runs)
        label = "with verification" if verify == "1" else "without verification"
        extra = f"{memory:.0f} MiB extra = {memory / size:.2f} x the model"
        print(f"prune ResNet-50 ({size:.0f} MiB), data-free, {label}: {seconds:.2f} s, {extra}")


def statistics_benchmark(folder: Path) -> None:
    """The pass that `contribution` needs, against a forward pass of the same model on the same batches."""
    import sfp_onnx
    from sfp_onnx.runtime import open_model
    from sfp_onnx.scores.statistics import calibrate, sites


    path = folder / "resnet50.onnx"
    analysis = sfp_onnx.inspect(path)
    images = np.random.default_rng(0).standard_normal((32, 3, 224, 224)).astype(np.float32)
    batches = [({"input": images[start : start + 8]}, 8) for start in range(0, 32, 8)]
    ranks = {name: len(shape) for name, shape in analysis.prepared.trace.shapes.items()}
    for name, needs in (("squares", frozenset({"squares"})), ("squares and zeros", frozenset({"squares", "zeros"}))):
        plain, passes = [], []
        for _ in range(REPEATS):
            start = time.perf_counter()
            session = open_model(analysis.model)
            for feeds, _count in batches:
                session.run(feeds)
            plain.append(time.perf_counter() - start)
            start = time.perf_counter()
            calibrate(analysis.prepared.model, ranks, sites(analysis.coupling), needs, batches)
            passes.append(time.perf_counter() - start)
        ratio = min(passes) / min(plain)
        times = f"{min(passes):.2f} s, plain forward {min(plain):.2f} s, ratio {ratio:.2f}"
        print(f"statistics pass ({name}) over 32 images, session included: {times}")


def memory_benchmark(folder: Path) -> None:
    path, data = folder / "resnet50-any-size.onnx", folder / "images.npz"
    onnx.save(models.resnet50(side="side"), path)
    np.savez(data, images=np.random.default_rng(0).integers(0, 256, (4096, 3, 64, 64), dtype=np.uint8))
    for samples in (128, 512, 2048):
        (memory,) = child(CALIBRATE, str(path), str(data), str(samples))
        print(f"statistics pass over {samples} of 4096 images in an .npz of {data.stat().st_size / 2**20:.0f} MiB: peak {memory:.0f} MiB")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        prune_benchmark(Path(temporary))
        statistics_benchmark(Path(temporary))
        memory_benchmark(Path(temporary))
