"""The only door to onnxruntime: open sessions, run them, time them."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import onnxruntime as ort

from .errors import ModelError
from .records import Array

ort.set_default_logger_severity(4)
PROVIDERS = ("CPUExecutionProvider",)


@dataclass(frozen=True)
class Session:
    """An open onnxruntime session. ``name`` is what messages call the model."""

    handle: Any
    name: str

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> list[Any]:
        """Run once.

        Raises:
            ModelError: onnxruntime's words.
        """
        if outputs is not None and not outputs:
            return []  # onnxruntime takes an empty list for all outputs
        try:
            result: list[Any] = self.handle.run(None if outputs is None else list(outputs), dict(feeds))
        except Exception as error:  # onnxruntime's exception classes share no base but Exception
            raise ModelError(f"{self.name}: onnxruntime cannot run the model: {_words(error)}") from error
        return result


def _words(error: Exception) -> str:
    """onnxruntime's message without its prefix of codes and source locations, on one line."""
    text = " ".join(str(error).split())
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ", "", text)
    text = re.sub(r"/\S*onnxruntime\S*\.(cc|h):\d+ .*?\) (?=[A-Z])", "", text)
    return text[:600]


class Optimize(Enum):
    """How much onnxruntime rewrites the graph: nothing (its plain meaning), constant folding and the like, or all."""

    NONE = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    BASIC = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    ALL = ort.GraphOptimizationLevel.ORT_ENABLE_ALL


def open_session(
    serialized: bytes, weights: Mapping[str, Array], name: str, optimize: Optimize = Optimize.ALL, threads: int = 0
) -> Session:
    """Open a session on a protobuf whose large weights are handed over from memory.

    Raises:
        ModelError: onnxruntime cannot load the model (unknown operator, no kernel for a type, ...).
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = optimize.value
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # planning memory makes the first two runs slow, and most sessions here live for a few runs
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # numpy's threads take turns with onnxruntime's
    if optimize is Optimize.NONE:
        options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        if weights:
            values = [ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for array in weights.values()]
            options.add_external_initializers(list(weights), values)
        return Session(ort.InferenceSession(serialized, options, providers=list(PROVIDERS)), name)
    except Exception as error:  # onnxruntime's exception classes share no base but Exception
        raise ModelError(f"{name}: onnxruntime cannot load the model: {_words(error)}") from error


def latencies(sessions: Sequence[Session], feeds: Mapping[str, Array], repeats: int) -> list[list[float]]:
    """Seconds of ``repeats`` runs of each session, interleaved so that all see the same state of the machine."""
    times: list[list[float]] = [[] for _ in sessions]
    for session in sessions:
        session.run(feeds)
    for _ in range(repeats):
        for own, session in zip(times, sessions, strict=True):
            start = time.perf_counter()
            session.run(feeds)
            own.append(time.perf_counter() - start)
    return times


def version() -> str:
    """onnxruntime's version."""
    return str(ort.__version__)
