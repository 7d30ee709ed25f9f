"""Tiny models and data for all tests."""

from __future__ import annotations

import inspect
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner, Result
from onnx import helper, numpy_helper

from sfp_onnx.cli import main

CLASSES = 5
IMAGE = (3, 8, 8)


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are as wide as where there is no terminal; processes that share out tests set a width."""
    monkeypatch.delenv("COLUMNS", raising=False)


def weights_of(dtype: Any = np.float32, seed: int = 0, widths: tuple[int, int] = (8, 12)) -> dict[str, np.ndarray]:
    """Random weights of `classifier`."""
    random = np.random.default_rng(seed)
    first, second = widths

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape) / max(1, np.sqrt(np.prod(shape[1:])))

    found = {
        "w1": normal(first, IMAGE[0], 3, 3), "b1": normal(first), "gamma": 1 + 0.1 * normal(first), "beta": 0.1 * normal(first),
        "mean": 0.1 * normal(first), "var": 1 + 0.1 * np.abs(normal(first)), "w2": normal(second, first, 3, 3), "b2": normal(second),
        "w3": normal(CLASSES, second), "b3": normal(CLASSES),
    }  # fmt: skip
    return {name: array.astype(dtype) for name, array in found.items()}


def classifier_nodes() -> list[onnx.NodeProto]:
    """conv-bn-relu-conv-relu-gap-flatten-gemm."""
    return [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "conv1", pads=[1] * 4),
        helper.make_node("BatchNormalization", ["c1", "gamma", "beta", "mean", "var"], ["n1"], "bn1"),
        helper.make_node("Relu", ["n1"], ["r1"], "relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], "conv2", pads=[1] * 4),
        helper.make_node("Relu", ["c2"], ["r2"], "relu2"),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["logits"], "head", transB=1),
    ]


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: list[tuple[str, Any, list[Any]]],
    outputs: list[tuple[str, Any, list[Any]]],
    constants: dict[str, np.ndarray],
    *,
    opset: int = 17,
    ir: int = 8,
    value_info: list[onnx.ValueInfoProto] | None = None,
) -> onnx.ModelProto:
    """A ModelProto; inputs and outputs are (name, numpy type, shape)."""

    def info(name: str, dtype: Any, shape: list[Any]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)

    held = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(
        nodes, "net", [info(*item) for item in inputs], [info(*item) for item in outputs], held, value_info=value_info
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir, producer_name="tests")
    return model


def classifier(
    *, opset: int = 17, ir: int = 8, dtype: Any = np.float32, batch: int | str = "N", seed: int = 0, widths: tuple[int, int] = (8, 12)
) -> onnx.ModelProto:
    """An image classifier with inputs x (batch, 3, 8, 8) and logits (batch, 5)."""
    return model_of(
        classifier_nodes(),
        [("x", dtype, [batch, *IMAGE])],
        [("logits", dtype, [batch, CLASSES])],
        weights_of(dtype, seed, widths),
        opset=opset,
        ir=ir,
    )


def images(count: int = 10, seed: int = 1) -> np.ndarray:
    """Inputs of `classifier`."""
    return np.random.default_rng(seed).standard_normal((count, *IMAGE)).astype(np.float32)


def labels_of(count: int = 10, seed: int = 2) -> np.ndarray:
    """Labels of `classifier`."""
    return np.random.default_rng(seed).integers(0, CLASSES, count)


def run_model(
    model: onnx.ModelProto | Path | str | bytes, feeds: dict[str, np.ndarray], outputs: list[str] | None = None
) -> list[np.ndarray]:
    """Plain onnxruntime."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model) if isinstance(model, Path) else model
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"]).run(outputs, feeds)


WIDE = {"widths": (32, 48)}  # of a classifier whose weights are large enough to be stored in fewer bits
LEVELS = [getattr(ort.GraphOptimizationLevel, f"ORT_{name}") for name in ("DISABLE_ALL", "ENABLE_BASIC", "ENABLE_EXTENDED", "ENABLE_ALL")]


def at_all_levels(proto: onnx.ModelProto, feeds: dict[str, Any], **entries: str) -> list[np.ndarray]:
    """The first output at every level of optimisation; ``entries`` of the session's configuration, by their last part."""
    answers = []
    for level in LEVELS:
        options = ort.SessionOptions()
        options.graph_optimization_level, options.intra_op_num_threads = level, 1
        for name, value in entries.items():
            options.add_session_config_entry(f"session.{name}", value)
        answers.append(ort.InferenceSession(proto.SerializeToString(), options).run(None, feeds)[0])
    return answers


@pytest.fixture
def wide_model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(classifier(**WIDE), path)
    return path


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """max |found - expected| / max |expected|."""
    return float(np.abs(found.astype(np.float64) - expected).max() / np.abs(expected.astype(np.float64)).max())


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Mean over filters of |A and B| / |A or B| of two label sets (F, L); two empty sets agree fully."""
    union = (first | second).sum(1)
    return float(np.where(union > 0, (first & second).sum(1) / np.maximum(union, 1), 1.0).mean())


def masked_reference(model: onnx.ModelProto, cuts: list[dict[str, Any]]) -> onnx.ModelProto:
    """The original with a Mul by 0/1 after every cut tensor: plain onnx, independent of the package."""
    reference = onnx.ModelProto()
    reference.CopyFrom(model)
    for number, cut in enumerate(cuts):
        mask = np.ones(cut["size"], np.float32)
        mask[cut["removed"]] = 0
        shape = [1] * cut["rank"]
        shape[cut["axis"]] = cut["size"]
        masked, name = f"masked_{number}", f"mask_{number}"
        renamed = [[masked if item == cut["tensor"] else item for item in node.input] for node in reference.graph.node]
        for node, names in zip(reference.graph.node, renamed, strict=True):
            node.input[:] = names
        reference.graph.initializer.append(numpy_helper.from_array(mask.reshape(shape), name))
        position = next(index for index, node in enumerate(reference.graph.node) if cut["tensor"] in node.output)
        reference.graph.node.insert(position + 1, helper.make_node("Mul", [cut["tensor"], name], [masked]))
    return reference


def sizes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shape of each initializer."""
    return {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}


def external(model: onnx.ModelProto, path: Path, threshold: int = 0) -> Path:
    """Save with all weights in ``<name>.data``."""
    copy = onnx.ModelProto()  # saving changes the ModelProto
    copy.CopyFrom(model)
    onnx.save_model(copy, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=threshold)
    return path


def tensor_file(path: Path, array: np.ndarray, name: str = "") -> None:
    """A serialized TensorProto."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(numpy_helper.from_array(array, name).SerializeToString())


def files_in(folder: Path) -> dict[str, bytes]:
    """All files under a folder and what they hold."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def invoke(*arguments: object) -> Result:
    """Run the command line in this process."""
    apart = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}
    return CliRunner(**apart).invoke(main, [str(item) for item in arguments])


@contextmanager
def ctrl_c(handler: Any = signal.default_int_handler) -> Iterator[None]:
    """Programs that are started inside end by SIGINT, even if these tests are to ignore it, as after ``nohup pytest &``."""
    older = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, older)


@pytest.fixture
def shared() -> Path:
    """Folder of larger models and data that is not part of the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "models").is_dir():
        pytest.skip("the folder ../shared with larger models is not here")
    return folder


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    """`classifier` as a file."""
    path = tmp_path / "model.onnx"
    onnx.save(classifier(), path)
    return path


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    """Ten labelled samples for `classifier`."""
    path = tmp_path / "data.npz"
    np.savez(path, x=images(), labels=labels_of())
    return path


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Save a ModelProto, or arrays, in the test's folder."""

    def write(what: onnx.ModelProto | dict[str, np.ndarray] | np.ndarray | bytes | str, name: str = "") -> Path:
        if isinstance(what, onnx.ModelProto):
            path = tmp_path / (name or "own.onnx")
            onnx.save(what, path)
        elif isinstance(what, dict):
            path = tmp_path / (name or "own.npz")
            np.savez(path, **what)
        elif isinstance(what, np.ndarray):
            path = tmp_path / (name or "own.npy")
            np.save(path, what)
        else:
            path = tmp_path / (name or "own.bin")
            path.write_bytes(what.encode() if isinstance(what, str) else what)
        return path

    return write
