"""What must never happen to a user's files, tried for real: programs killed at random moments, full disks, folders that cannot be written,
two runs to one name, odd paths.

``python tests/faults.py`` runs the long form and counts (a few minutes); tests/test_faults.py runs a few of each. Linux only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from conftest import ctrl_c

HERE = Path(__file__).resolve().parent
SAMPLES = HERE.parent / "samples"
LARGEST = 1 << 20  # bytes that a temporary file may leave behind
SIGNALS = {"kill -9": signal.SIGKILL, "Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM}
PIXELS = ("--scale", "16", "--mean", "0.3", "--std", "0.35", "--layout", "nhwc")


@dataclass
class Place:
    """A folder with inputs, outputs, temporary files and cache of its own."""

    root: Path
    model: Path = field(init=False)
    data: Path = field(init=False)
    output: Path = field(init=False)
    manifest: Path = field(init=False)
    hashes: dict[Path, str] = field(init=False)

    def __post_init__(self) -> None:
        for name in ("in", "out", "tmp", "cache"):
            (self.root / name).mkdir(parents=True)
        self.model, self.data = self.root / "in" / "digits.onnx", self.root / "in" / "data.npz"
        self.output, self.manifest = self.root / "out" / "small.onnx", self.root / "out" / "small.json"
        shutil.copy(SAMPLES / "digits.onnx", self.model)
        shutil.copy(SAMPLES / "digits_calibration.npz", self.data)
        self.hashes = {path: sha256(path) for path in (self.model, self.data)}

    def prune(self, *options: object) -> list[str]:
        """A run that repairs, writes a manifest, and takes about a second."""
        words = ["prune", self.model, "-o", self.output, "--data", self.data, *PIXELS, "--manifest", self.manifest, *options]
        return [sys.executable, "-m", "sfp_onnx", *map(str, words)]

    def environment(self) -> dict[str, str]:
        """Temporary files and cache inside the place."""
        path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH", ""))))
        own = {"TMPDIR": str(self.root / "tmp"), "SFP_ONNX_CACHE": str(self.root / "cache"), "PYTHONPATH": path}
        return {**os.environ, **own, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

    def start(self, command: list[str], **more: object) -> subprocess.Popen[str]:
        """Run it in a session of its own, words collected."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        with ctrl_c():
            return subprocess.Popen(command, env=self.environment(), **{**pipes, **more})  # type: ignore[call-overload, no-any-return]

    def faults(self) -> list[str]:
        """What is wrong with the files now."""
        found = [f"input {path.name} was changed" for path, digest in self.hashes.items() if sha256(path) != digest]
        for path in self.root.rglob("*"):
            if path.is_file() and path not in (self.model, self.data, *outputs_of(self.output), self.manifest):
                size = path.stat().st_size
                if size > LARGEST:
                    found.append(f"left behind: {path.relative_to(self.root)} ({size} bytes)")
        return found + self.halves()

    def halves(self) -> list[str]:
        """Outputs that are not whole, or do not belong together."""
        found = []
        if self.output.exists():
            try:
                onnx.checker.check_model(str(self.output))
                import onnxruntime

                onnxruntime.InferenceSession(str(self.output), providers=["CPUExecutionProvider"])
            except Exception as error:
                found.append(f"half-written model: {error}")
        if self.manifest.exists():
            try:
                manifest = json.loads(self.manifest.read_text())
                if not self.output.exists() or manifest["output"]["sha256"] != loaded_hash(self.output):
                    found.append("the manifest is not that of the model")
            except ValueError as error:
                found.append(f"half-written manifest: {error}")
        return found


def outputs_of(path: Path) -> list[Path]:
    """A model and what stands beside it."""
    return [path, path.with_name(path.name + ".data"), path.with_suffix(".ort"), path.with_suffix(".required_operators_and_types.config")]


def sha256(path: Path) -> str:
    """Of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def loaded_hash(path: Path) -> str:
    """As the package counts it: the model and, if it refers to any, its external data."""
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    data = path.with_name(path.name + ".data")
    apart = any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in tensors)
    return hashlib.sha256(path.read_bytes() + (data.read_bytes() if apart else b"")).hexdigest()


# ---- killed ----------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, tuple[str, ...]] = {
    "plain": ("--target", "macs=50%", "--align", "8"),
    "external": ("--ratio", "0.3", "--external-data"),
    "packaged": ("--ratio", "0.3", "--quantize", "int8", "--save-ort", "{ort}"),
    "latency": ("--target", "latency=70%", "--threads", "1"),
}


def large_model(path: Path) -> None:
    """A model of 3.4 MB with the inputs of the sample, so that a leftover would be seen."""
    from onnx import helper, numpy_helper

    normal = np.random.default_rng(0).standard_normal
    shapes = {"w0": (96, 1, 3, 3), "w1": (192, 96, 3, 3), "w2": (384, 192, 3, 3), "w3": (10, 384)}
    arrays = {name: (normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32) for name, shape in shapes.items()}
    nodes = []
    for index, name in enumerate(("x", "r0", "r1")):
        step = 1 if index == 0 else 2
        nodes.append(helper.make_node("Conv", [name, f"w{index}"], [f"c{index}"], f"conv{index}", pads=[1] * 4, strides=[step] * 2))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"r{index}"], f"relu{index}"))
    nodes += [helper.make_node("GlobalAveragePool", ["r2"], ["p"]), helper.make_node("Flatten", ["p"], ["f"])]
    nodes.append(helper.make_node("Gemm", ["f", "w3"], ["y"], "head", transB=1))
    ends = [[helper.make_tensor_value_info(name, 1, shape)] for name, shape in (("x", ["N", 1, 8, 8]), ("y", ["N", 10]))]
    net = helper.make_graph(nodes, "net", *ends, [numpy_helper.from_array(array, name) for name, array in arrays.items()])
    onnx.save(helper.make_model(net, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def killed(runs: int, seed: int = 0, show: Callable[[str], None] = lambda text: None) -> tuple[Counter[str], list[str]]:
    """Stop runs at random moments; returns how they ended, and faults. The output of earlier runs stays there to be replaced."""
    draw = random.Random(seed)
    counts: Counter[str] = Counter()
    faults: list[str] = []
    with tempfile.TemporaryDirectory(prefix="faults ") as folder:
        place = Place(Path(folder) / "p")
        large_model(place.model)
        place.hashes[place.model] = sha256(place.model)
        takes: dict[str, float] = {}
        for number in range(runs):
            kind = list(OPTIONS)[number % len(OPTIONS)] if runs >= 8 else "plain"
            options = [text.format(ort=place.output.with_suffix(".ort")) for text in OPTIONS[kind]]
            how = draw.choice(list(SIGNALS))
            process = place.start(place.prune(*options))
            begun = time.monotonic()
            # Half of the moments anywhere, half near the end, when files are written.
            whole = takes.get(kind, 2.5)
            moment = draw.uniform(0, whole * 1.02) if draw.random() < 0.5 else whole * draw.uniform(0.75, 1.02)
            try:
                _, said = process.communicate(timeout=moment)
                takes[kind] = time.monotonic() - begun
                end = f"done ({process.returncode})"
                if process.returncode != 0:
                    faults.append(f"run {number} ({kind}) failed by itself: {said[-300:]}")
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, SIGNALS[how])
                _, said = process.communicate()
                end = f"{how} ({process.returncode})"
                takes.setdefault(kind, 2.5)
                if process.returncode == 0:
                    takes[kind] = time.monotonic() - begun
            counts[end] += 1
            time.sleep(0.15)  # the guard of the temporary folder removes it
            found = place.faults()
            if "Internal error" in said:
                found.append(f"message: {said[-300:]}")
            faults += [f"run {number} ({kind}, {end} after {moment:.2f} s): {text}" for text in found]
            for text in faults[len(faults) - len(found) :] if found else ():
                show(text)
            if draw.random() < 0.3:
                for path in (*outputs_of(place.output), place.manifest):
                    path.unlink(missing_ok=True)
    return counts, faults


def hunted(runs: int) -> tuple[int, list[str]]:
    """Kill -9 at the worst moments: as soon as a temporary file over 1 MB is seen. Returns how often one was, and faults."""
    seen, faults = 0, []
    with tempfile.TemporaryDirectory(prefix="faults ") as folder:
        place = Place(Path(folder) / "p")
        large_model(place.model)
        place.hashes[place.model] = sha256(place.model)
        for number in range(runs):
            options = [text.format(ort=place.output.with_suffix(".ort")) for text in OPTIONS["packaged"]]
            process = place.start(place.prune(*options, "--repair", "none"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            wanted = number % 4 + 1  # the first, second, ... of its kind
            names: set[Path] = set()
            while process.poll() is None:
                names |= {path for path in _large(place) if path not in names}
                if len(names) >= wanted:
                    os.killpg(process.pid, signal.SIGKILL)
                    seen += 1
                    break
            process.wait()
            time.sleep(0.3)
            faults += [f"hunt {number}: {text}" for text in place.faults()]
    return seen, faults


def _large(place: Place) -> list[Path]:
    found = []
    for root, _, files in os.walk(place.root):
        for name in files:
            path = Path(root) / name
            try:
                large = path.stat().st_size > LARGEST
            except OSError:
                continue
            if large and path not in (place.model, place.data, *outputs_of(place.output)):
                found.append(path)
    return found


# ---- two at once -----------------------------------------------------------------------------------------------------


def raced(rounds: int, seed: int = 0) -> list[str]:
    """Two runs with different options to the same names at once: afterwards the files are those of one of them."""
    faults = []
    draw = random.Random(seed)
    for number in range(rounds):
        with tempfile.TemporaryDirectory(prefix="faults ") as folder:
            place = Place(Path(folder) / "p")
            external = ["--external-data"] if number % 2 else []
            first = place.start(place.prune("--ratio", "0.3", *external))
            time.sleep(draw.uniform(0, 0.1))
            second = place.start(place.prune("--ratio", "0.6", *external))
            for process in (first, second):
                _, said = process.communicate()
                if process.returncode != 0:
                    faults.append(f"round {number}: exit {process.returncode}: {said[-300:]}")
            faults += [f"round {number}: {text}" for text in place.faults()]
    return faults


# ---- disks -----------------------------------------------------------------------------------------------------------


def expect_refusal(place: Place, process: subprocess.Popen[str], what: str, kept: bytes | None = None) -> list[str]:
    """Exit code 4, one error, nothing half, nothing left; an older output as it was."""
    _, said = process.communicate()
    found = place.faults()
    if process.returncode != 4 or said.count("Error: ") != 1 or "Internal" in said or "Traceback" in said:
        found.append(f"exit {process.returncode}: {said[-400:]}")
    if place.output.exists() != (kept is not None) or (kept is not None and place.output.read_bytes() != kept):
        found.append("the output is not as it was before")
    return [f"{what}: {text}" for text in found]


def full_disk(size: int = 300_000) -> list[str] | None:
    """Outputs on a tmpfs that is too small, with and without an older output; None if nothing can be mounted here."""
    faults: list[str] = []
    with tempfile.TemporaryDirectory(prefix="faults ") as folder:
        place = Place(Path(folder) / "p")
        large_model(place.model)
        place.hashes[place.model] = sha256(place.model)
        target = place.root / "out"
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", target], capture_output=True).returncode:
            return None
        try:
            for kept in (None, b"older"):
                if kept:
                    place.output.write_bytes(kept)
                for options in (["--ratio", "0.2"], ["--ratio", "0.2", "--external-data"]):
                    before = sorted(path.name for path in target.iterdir())
                    process = place.start(place.prune(*options))
                    _, said = process.communicate()
                    after = sorted(path.name for path in target.iterdir())
                    if process.returncode != 4 or "No space left" not in said or said.count("Error: ") != 1:
                        faults.append(f"full disk {options}: exit {process.returncode}: {said[-400:]}")
                    if after != before or (kept and place.output.read_bytes() != kept):
                        faults.append(f"full disk {options}: files {before} became {after}")
                place.output.unlink(missing_ok=True)
        finally:
            subprocess.run(["umount", target], check=True)
        temporary = place.root / "tmp"
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", temporary], check=True)
        try:  # a full temporary folder
            process = place.start(place.prune("--ratio", "0.2", "--quantize", "int8", "--repair", "none"))
            _, said = process.communicate()
            if process.returncode != 4 or "Internal" in said or "Traceback" in said or place.output.exists():
                faults.append(f"full temporary folder: exit {process.returncode}: {said[-400:]}")
        finally:
            subprocess.run(["umount", temporary], check=True)
    return faults


def limited_file() -> list[str]:
    """No file over 20 kB (RLIMIT_FSIZE): as a full disk, without the right to mount one."""
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    faults = []
    with tempfile.TemporaryDirectory(prefix="faults ") as folder:
        place = Place(Path(folder) / "p")
        for kept in (None, (SAMPLES / "digits.onnx").read_bytes()):
            if kept:
                place.output.write_bytes(kept)
            faults += expect_refusal(place, place.start(place.prune("--ratio", "0.2"), preexec_fn=limit), "file size limit", kept)
    return faults


def read_only() -> list[str]:
    """An output folder without the right to write; run as another user if this one may everything."""
    faults = []
    with tempfile.TemporaryDirectory(prefix="faults ") as folder:
        os.chmod(folder, 0o755)
        place = Place(Path(folder) / "p")
        os.chmod(place.root / "out", 0o555)
        for name in ("tmp", "cache"):
            os.chmod(place.root / name, 0o777)
        more = {"user": 65534, "group": 65534} if os.geteuid() == 0 else {}
        try:
            faults += expect_refusal(place, place.start(place.prune("--ratio", "0.2"), **more), "read-only folder")
        except PermissionError:
            return []  # cannot become another user
        finally:
            os.chmod(place.root / "out", 0o755)
    return faults


# ---- paths -----------------------------------------------------------------------------------------------------------

ODD = "Modelle für Gerät 1/模型 ñ (neu) & co's %20 #1"


def odd_paths() -> list[str]:
    """Spaces, quotes and other alphabets in every input and output."""
    faults = []
    with tempfile.TemporaryDirectory(prefix="faults ") as folder:
        root = Path(folder) / ODD
        place = Place(root)
        names = {"model": root / "in" / "mödel 模.onnx", "data": root / "in" / "dåta ñ.npz", "out": root / "out" / "klein 小.onnx"}
        for old, new in ((place.model, names["model"]), (place.data, names["data"])):
            old.rename(new)
        place.model, place.data, place.output = names["model"], names["data"], names["out"]
        place.manifest = root / "out" / "mañifest 1.json"
        place.hashes = {path: sha256(path) for path in (place.model, place.data)}
        report, junit, plan, toml = (root / "out" / name for name in ("r é.html", "j ü.xml", "plän 1.json", "sfp ö.toml"))
        ort = place.output.with_suffix(".ort")
        written = ("--report", report, "--junit", junit, "--save-ort", ort)
        run = [sys.executable, "-m", "sfp_onnx"]
        commands = [
            place.prune("--ratio", "0.3", "--external-data", *written, "--test-data", place.data),
            [*run, "evaluate", str(place.model), str(place.output), "--data", str(place.data), *PIXELS, "--baseline", str(place.manifest)],
            place.prune("--ratio", "0.3", "--quantize", "int8"),
            [*run, "inspect", str(place.output)],
            [*run, "plan", str(place.model), "-o", str(plan), "--ratio", "0.3"],
            [*run, "apply", str(place.model), str(plan), "-o", str(place.output)],
            [*run, "init", str(place.model), "-o", str(toml)],
            [*run, "prune", "--config", str(toml), "-o", str(place.output)],
            [*run, "sweep", str(place.model), "--targets", "macs=80%:60%:20%", "--save-dir", str(root / "swéep x")],
            [*run, "dilute", str(place.model), "-o", str(root / "out" / "dünn 1.onnx"), "--method", "l1", "--rate", "0.5"],
            [*run, "score", str(place.model), "--score", "magnitude", "--save", str(root / "out" / "wért 1.json")],
        ]  # fmt: skip
        for command in commands:
            process = place.start(command)
            _, said = process.communicate()
            if process.returncode not in (0, 3) or (process.returncode == 3 and "evaluate" not in command):
                faults.append(f"odd paths: {command[3]}: exit {process.returncode}: {said[-400:]}")
        faults += [f"odd paths: missing {path.name}" for path in (report, junit, ort, plan, toml, place.manifest) if not path.exists()]
        faults += [f"odd paths: {path.name} was changed" for path, digest in place.hashes.items() if sha256(path) != digest]
    return faults


def main() -> None:
    """The long form."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--killed-only", action="store_true")
    given = parser.parse_args()
    start = time.monotonic()
    counts, faults = killed(given.runs, given.seed, print)
    print(f"killed at random moments: {given.runs} runs, {len(faults)} faults; " + ", ".join(f"{k}: {counts[k]}" for k in sorted(counts)))
    hunts, more = hunted(given.runs // 4)
    print(f"killed when a temporary file over 1 MB was there: {hunts} of {given.runs // 4} runs, {len(more)} faults")
    for text in more:
        print(f"    {text}")
    faults += more
    checks: dict[str, Callable[[], list[str] | None]] = {
        f"two runs to one name ({given.rounds} rounds)": lambda: raced(given.rounds), "full disk (tmpfs)": full_disk,
        "file size limit": limited_file, "read-only folder": read_only, "odd paths": odd_paths,
    }  # fmt: skip
    for name, check in () if given.killed_only else checks.items():
        found = check()
        print(f"{name}: " + ("cannot be tried here" if found is None else f"{len(found)} faults"))
        for text in found or ():
            print(f"    {text}")
        faults += found or []
    print(f"{len(faults)} faults, {time.monotonic() - start:.0f} s")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
