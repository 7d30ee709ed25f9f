"""A finished model in the forms that small devices take: half-precision weights, 8-bit integers, onnxruntime's own format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from . import graph, runtime, scratch
from .errors import OptionError, OutputError
from .graph import Model
from .records import Array

QUANTIZERS = ("int8",)


@dataclass(frozen=True)
class OrtFile:
    """A model in onnxruntime's format, and the operators and types that a reduced build of onnxruntime needs for it.

    Unlike everything else here, ``data`` may differ from run to run: onnxruntime writes some of its tables in an order left to chance.
    """

    data: bytes
    operators: str

    def save(self, path: Path, inputs: Iterable[Path] = ()) -> tuple[Path, Path]:
        """Write ``path`` and, beside it, its configuration of operators, atomically.

        Raises:
            OutputError: a path cannot be written.
        """
        paths = (path, operators_path(path))
        for own in paths:
            graph.check_output(own, inputs)
        try:
            with graph.atomic(*paths) as streams:
                for stream, content in zip(streams, (self.data, self.operators.encode()), strict=True):
                    stream.write(content)
        except OSError as error:
            raise OutputError(f"{path}: cannot write: {error.strerror or error}") from error
        return paths


def operators_path(path: Path) -> Path:
    """Where the configuration of operators goes, by onnxruntime's convention."""
    return path.with_suffix(".required_operators_and_types.config")


def halved(model: Model) -> tuple[Model, Model, str]:
    """The model with float16 weights, the same with the rounded weights as float32, and what to tell the user.

    Raises:
        OptionError: no weight can be stored so.
    """
    small, rounded, left = graph.half_weights(model)
    if len(small.weights) == len(left) or small.proto == model.proto:
        raise OptionError("--half: the model has no float32 weights of more than 1 KiB that float16 can hold")
    said = f"; {len(left)} weights are too large for float16 and stay float32" if left else ""
    return small, rounded, f"half: weights are stored as float16 and computed with as float32{said}"


def quantized(model: Model, batches: Iterable[Mapping[str, Array]] | None) -> Model:
    """The model on 8-bit integers: static (QuantizeLinear/DequantizeLinear, ranges from ``batches``) or, without data, dynamic.

    Raises:
        ModelError: onnxruntime cannot quantise it.
    """
    with TemporaryDirectory(dir=scratch.folder()) as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        graph.save(replace(model, source=None, files=()), source)
        runtime.quantize(source, target, batches, model.name)
        found = graph.load(target)
        weights = {name: array.copy() for name, array in found.weights.items()}  # the files go
    return replace(found, weights=weights, source=model.source, files=model.files, edited=True)


def ort_file(model: Model) -> OrtFile:
    """The model in onnxruntime's format, optimised for any processor.

    Raises:
        ModelError: over 2 GB, or onnxruntime cannot convert it.
    """
    proto = graph.to_proto(model)
    with TemporaryDirectory(dir=scratch.folder()) as folder:
        path = Path(folder) / "model.ort"
        operators = runtime.save_ort(proto.SerializeToString(deterministic=True), path, model.name)
        return OrtFile(path.read_bytes(), operators)
