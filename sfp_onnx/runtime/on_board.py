"""Times models where this package need not be: `boards` sends this file along, and runs it there with Python, numpy and onnxruntime.

``python on_board.py`` in a folder with job.json, models 0.onnx, 1.onnx ... and inputs 0.npz ... prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Sequence  # noqa: UP035 - boards have old Pythons, too

BURST = 5
MARK = "sfp_onnx:"


def cpu_name() -> str:
    """Name of the CPU, with what tells apart machines that give it the same name."""
    name = platform.processor() or platform.machine()
    try:
        if sys.platform.startswith("linux"):
            lines = reversed(Path("/proc/cpuinfo").read_text().splitlines())  # of several values the first counts
            fields = {name.strip(): value.strip() for name, colon, value in (line.partition(":") for line in lines) if colon}
            flags = (fields.get("flags") or fields.get("Features", "")).split()
            known = [fields[key] for key in ("model name", "CPU implementer", "CPU part", "cpu family", "model") if key in fields]
            name = " ".join([*known, *(flag for flag in ("avx512f", "avx2", "asimd", "sve") if flag in flags)]) or name
        elif sys.platform == "darwin":
            asked = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            name = subprocess.run(asked, capture_output=True, text=True).stdout.strip() or name
    except (OSError, ValueError):
        pass
    return f"{name} ({platform.machine()}, {os.cpu_count()} cores)"


def clock_of(threads: int, cpu: bool) -> Callable[[], float]:
    """What to time with. One thread: the processor time of the calling thread, in which the model then runs, so that other programs on
    the machine do not count (where the system counts it finely enough); else wall time."""
    fine = time.get_clock_info("thread_time").resolution <= 1e-6
    return time.thread_time if threads == 1 and fine and cpu else time.perf_counter


def interleaved(runs: Sequence[Callable[[], Any]], repeats: int, clock: Callable[[], float]) -> list[list[float]]:
    """Seconds of ``repeats`` calls of each, interleaved so that all see the same state of the machine; each is called once before.

    They take turns of `BURST` calls, not of one: a model that has just run finds its weights in the caches, as in an application.
    """
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    for done in range(0, repeats, BURST):
        for seconds, run in zip(times, runs):  # noqa: B905 - Python 3.8
            for _ in range(min(BURST, repeats - done)):
                start = clock()
                run()
                seconds.append(clock() - start)
    return times


def kernels_in(recorded: Sequence[Any]) -> dict[str, list[float]]:
    """Seconds of every run of each kernel, by kernel name in the order of execution, from onnxruntime's recording."""
    times: dict[str, list[float]] = {}
    ending = "_kernel_time"
    for event in recorded:
        if event.get("cat") == "Node" and event["name"].endswith(ending):
            times.setdefault(event["name"][: -len(ending)], []).append(event["dur"] * 1e-6)
    return times


def main() -> dict[str, Any]:
    """Do the job of this folder."""
    try:
        import numpy
        import onnxruntime
    except ImportError as error:
        return {"missing": error.name or str(error), "python": platform.python_version(), "machine": platform.machine()}
    onnxruntime.set_default_logger_severity(4)
    job = json.loads(Path("job.json").read_text())
    known = {name.lower().replace("executionprovider", ""): name for name in onnxruntime.get_available_providers()}
    provider = known.get(job["provider"].lower().replace("executionprovider", ""))
    about = {"onnxruntime": onnxruntime.__version__, "cpu": cpu_name(), "provider": provider, "providers": sorted(known)}
    if provider is None:
        return about

    def opened(model: int, events: bool) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads, options.inter_op_num_threads = job["threads"], 1
        options.enable_profiling, options.profile_file_prefix = events, f"events{model}"
        return onnxruntime.InferenceSession(f"{model}.onnx", options, providers=list(dict.fromkeys([provider, "CPUExecutionProvider"])))

    try:
        sessions = [opened(model, events) for events in ([False, True] if job["events"] else [False]) for model in range(job["models"])]
        feeds = [dict(numpy.load(f"{name}.npz")) for name in job["feeds"]] * (2 if job["events"] else 1)
        runs = [lambda session=session, own=own: session.run(None, own) for session, own in zip(sessions, feeds)]  # noqa: B905
        clock, start = clock_of(job["threads"], provider == "CPUExecutionProvider"), time.perf_counter()
        warm = interleaved(runs, job["warm"], clock) if runs else []
        each, repeats = (time.perf_counter() - start) / (job["warm"] + 1), 0
        if runs:
            repeats = int(min(max(job["seconds"] / max(sum(map(min, warm)), 1e-6), job["low"]), job["high"]))
            repeats = int(min(max(job["wall"] / each, job["least"]), repeats)) if job["wall"] else repeats
        times = interleaved(runs, repeats, clock)
        recorded = [kernels_in(json.loads(Path(session.end_profiling()).read_text())) for session in sessions[job["models"] :]]
    except Exception as error:  # onnxruntime's exception classes share no base but Exception
        return {**about, "failure": f"{type(error).__name__}: {error}"[:2000]}
    return {**about, "seconds": times[: job["models"]], "kernels": recorded, "runs": job["warm"] + 2 + repeats}


if __name__ == "__main__":
    print(MARK + json.dumps(main()))
