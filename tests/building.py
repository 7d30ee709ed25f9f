"""Small ONNX models by hand, and the naive answers that the package is compared with.

Nothing here uses sfp_onnx beyond its public functions: the masked reference is built from the list of cuts alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import onnx
import onnx.checker
import onnx.defs
import onnx.helper as oh
import onnx.numpy_helper as nh
import onnx.shape_inference
import onnxruntime as ort

import sfp_onnx
from sfp_onnx.core.options import PlanOptions
from sfp_onnx.core.types import Cut, Plan
from sfp_onnx.coupling.analysis import Analysis
from sfp_onnx.report.manifest import Pruned

FLOAT = onnx.TensorProto.FLOAT
IR_VERSIONS = {7: 3, 8: 3, 9: 4, 10: 5, 11: 6, 12: 7, 13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}


def _newest_opset() -> int:
    """The newest opset that the installed onnx and onnxruntime both know (25 at most: what the cases were written for)."""
    for opset in range(min(25, onnx.defs.onnx_opset_version()), 17, -1):
        graph = oh.make_graph(
            [oh.make_node("Conv", ["x", "w"], ["y"])],
            "probe",
            [oh.make_tensor_value_info(name, FLOAT, [1, 1, 1, 1]) for name in ("x", "w")],
            [oh.make_tensor_value_info("y", FLOAT, None)],
        )
        model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", opset)], ir_version=10)
        try:
            ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        except Exception:
            continue
        return opset
    return 17


NEWEST = _newest_opset()


class Builder:
    """Collects nodes and initializers; every method returns the names of the tensors it makes."""

    def __init__(self, opset: int = 17, seed: int = 0) -> None:
        self.opset = opset
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.domains: dict[str, int] = {}

    def input(self, shape: Sequence[int | str], name: str = "x", dtype: int = FLOAT) -> str:
        self.inputs.append(oh.make_tensor_value_info(name, dtype, shape))
        return name

    def const(self, value: Any, dtype: Any = None, name: str = "") -> str:
        array = np.asarray(value, dtype)
        if array.dtype == np.float64 and dtype is None:
            array = array.astype(np.float32)
        name = name or f"c{len(self.initializers)}"
        self.initializers.append(nh.from_array(array, name))
        return name

    def weight(self, *shape: int, fan_in: int = 0, name: str = "") -> str:
        """Normal numbers of variance 1 / fan_in (default: all axes but the first)."""
        return self.const(self.random.standard_normal(shape) / np.sqrt(fan_in or max(1, prod(shape[1:]))), name=name)

    def uniform(self, *shape: int, low: float = 0.5, high: float = 1.5) -> str:
        return self.const(self.random.uniform(low, high, shape))

    def op(
        self, kind: str, *inputs: str | None, outputs: int | Sequence[str] = 1, domain: str = "", name: str = "", **attributes: Any
    ) -> Any:
        name = name or f"{kind}_{len(self.nodes)}"
        names = [f"{name}.{index}" if index else f"{name}.out" for index in range(outputs)] if isinstance(outputs, int) else list(outputs)
        attributes = {key: value for key, value in attributes.items() if value is not None}
        self.nodes.append(oh.make_node(kind, [item or "" for item in inputs], names, name=name, domain=domain, **attributes))
        if domain:
            self.domains[domain] = 1
        return names[0] if len(names) == 1 else names

    # ---- what changed its form between opsets ------------------------------------------------------------------------

    def axes_op(self, kind: str, x: str, axes: Sequence[int], since: int = 13, **attributes: Any) -> Any:
        """Squeeze, Unsqueeze, Reduce*: axes as an attribute before opset ``since``, then as an input."""
        if self.opset < since:
            return self.op(kind, x, axes=list(axes), **attributes)
        return self.op(kind, x, self.const(list(axes), np.int64), **attributes)

    def reduce(self, kind: str, x: str, axes: Sequence[int], **attributes: Any) -> str:
        return self.axes_op(kind, x, axes, 13 if kind == "ReduceSum" else 18, **attributes)

    def split(self, x: str, sizes: Sequence[int], axis: int = 1) -> list[str]:
        if self.opset < 13:
            return self.op("Split", x, outputs=len(sizes), axis=axis, split=list(sizes))
        return self.op("Split", x, self.const(list(sizes), np.int64), outputs=len(sizes), axis=axis)

    def slice(self, x: str, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int], steps: Sequence[int] | None = None) -> str:
        if self.opset < 10:
            return self.op("Slice", x, starts=list(starts), ends=list(ends), axes=list(axes))
        lists = [starts, ends, axes] + ([steps] if steps else [])
        return self.op("Slice", x, *(self.const(list(item), np.int64) for item in lists))

    def pad(self, x: str, pads: Sequence[int], mode: str = "constant", value: float = 0.0) -> str:
        if self.opset < 11:
            return self.op("Pad", x, pads=list(pads), mode=mode, value=value)
        return self.op("Pad", x, self.const(list(pads), np.int64), self.const(value, np.float32) if value else None, mode=mode)

    def clip(self, x: str, low: float, high: float) -> str:
        if self.opset < 11:
            return self.op("Clip", x, min=low, max=high)
        return self.op("Clip", x, self.const(low, np.float32), self.const(high, np.float32))

    def resize(self, x: str, scales: Sequence[float] | None = None, sizes: Sequence[int] | None = None, **attributes: Any) -> str:
        """Resize by scales or to sizes (from opset 11), Upsample before opset 10."""
        attributes.setdefault("mode", "nearest")
        if self.opset < 11:
            kind, factors = ("Upsample" if self.opset < 10 else "Resize"), self.const if self.opset > 8 else None
            if factors is None:
                return self.op(kind, x, scales=list(map(float, scales or ())), **attributes)
            return self.op(kind, x, self.const(list(scales or ()), np.float32), **attributes)
        empty = self.const([], np.float32) if self.opset < 13 else None
        if sizes is not None:
            return self.op("Resize", x, empty, empty, self.const(list(sizes), np.int64), **attributes)
        return self.op("Resize", x, empty, self.const(list(scales or ()), np.float32), **attributes)

    # ---- layers ------------------------------------------------------------------------------------------------------

    def conv(
        self, x: str, c_in: int, c_out: int, kernel: int = 3, group: int = 1, bias: bool = True, rank: int = 2, name: str = "",
        **attributes: Any,
    ) -> str:  # fmt: skip
        """A convolution that keeps the spatial size (odd kernels, stride 1)."""
        operands = [self.weight(c_out, c_in // group, *[kernel] * rank, name=f"{name}.weight" if name else "")]
        operands += [self.const(self.random.standard_normal(c_out) * 0.3, name=f"{name}.bias" if name else "")] if bias else []
        attributes.setdefault("pads", [kernel // 2] * (2 * rank))
        return self.op("Conv", x, *operands, group=group, kernel_shape=[kernel] * rank, name=name, **attributes)

    def gemm(self, x: str, c_in: int, c_out: int, bias: bool = True, transposed: bool = False, name: str = "") -> str:
        weight = self.weight(*((c_out, c_in) if transposed else (c_in, c_out)), fan_in=c_in)
        operands = [self.const(self.random.standard_normal(c_out) * 0.3)] if bias or self.opset < 11 else []
        return self.op("Gemm", x, weight, *operands, transB=int(transposed), name=name)

    def batch_norm(self, x: str, channels: int, name: str = "") -> str:
        vectors = [self.uniform(channels), self.weight(channels, fan_in=8), self.weight(channels, fan_in=8), self.uniform(channels)]
        return self.op("BatchNormalization", x, *vectors, name=name)

    def model(self, *outputs: str, infer: bool = True) -> onnx.ModelProto:
        """The whole; types and shapes of the outputs, and of everything between, are inferred."""
        made = [onnx.ValueInfoProto(name=name) if infer else oh.make_tensor_value_info(name, FLOAT, None) for name in outputs]
        graph = oh.make_graph(self.nodes, "test", self.inputs, made, self.initializers)
        imports = [oh.make_opsetid("", self.opset), *(oh.make_opsetid(domain, version) for domain, version in self.domains.items())]
        proto = oh.make_model(graph, opset_imports=imports, ir_version=IR_VERSIONS.get(self.opset, 11), producer_name="tests")
        if self.opset < 9:
            for tensor in self.initializers:
                proto.graph.input.append(oh.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        return with_ranks(onnx.shape_inference.infer_shapes(proto)) if infer else proto


def with_ranks(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give outputs that shape inference knows nothing of their rank (the checker asks for one), as one real run shows it."""
    unknown = [item for item in model.graph.output if not item.type.tensor_type.HasField("shape")]
    for item in unknown:
        item.type.tensor_type.elem_type = item.type.tensor_type.elem_type or FLOAT
    if unknown:
        results = dict(zip([item.name for item in model.graph.output], run(model, feeds_for(model)), strict=True))
        for item in unknown:
            kind = item.type.tensor_type.elem_type
            item.CopyFrom(oh.make_tensor_value_info(item.name, kind, [None] * np.ndim(results[item.name])))
    return model


def low_rank(rank: int, kernel: int = 3) -> onnx.ModelProto:
    """A network whose middle layer, the heaviest, is a product of this rank already, and whose channels are all needed."""
    model = Builder()
    y = model.op("Relu", model.conv(model.input(["N", 3, 8, 8]), 3, 24, name="stem"))
    y = model.op("Relu", model.conv(y, 24, 24, kernel, name="middle"))
    proto = model.model(model.op("Flatten", model.op("GlobalAveragePool", model.conv(y, 24, 24, 1, name="last"))))
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == "middle.weight")
    weight = nh.to_array(tensor)
    left, values, right = np.linalg.svd(weight.reshape(24, -1), full_matrices=False)
    product = (left[:, :rank] * values[:rank]) @ right[:rank]
    tensor.CopyFrom(nh.from_array(product.reshape(weight.shape).astype(np.float32), tensor.name))
    return proto


# ---- running ---------------------------------------------------------------------------------------------------------


def run(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """All outputs, without graph optimisation."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


def feeds_for(model: onnx.ModelProto, batch: int = 2, side: int = 8, seed: int = 5) -> dict[str, np.ndarray]:
    """Random normal inputs; named dimensions are ``side``, but the first axis is ``batch``."""
    generator = np.random.default_rng(seed)
    held = {tensor.name for tensor in model.graph.initializer}
    feeds = {}
    for item in model.graph.input:
        if item.name in held:
            continue
        dims = item.type.tensor_type.shape.dim
        shape = [dim.dim_value if dim.HasField("dim_value") else (side if axis else batch) for axis, dim in enumerate(dims)]
        dtype = oh.tensor_dtype_to_np_dtype(item.type.tensor_type.elem_type)
        values = generator.standard_normal(shape)
        feeds[item.name] = (values if dtype.kind == "f" else np.zeros(shape)).astype(dtype)
    return feeds


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """max |found - expected| / max |expected|; infinity for other shapes or types, or where one is not finite."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    a, b = found.astype(np.float64), expected.astype(np.float64)
    agree = (a == b) | (np.isnan(a) & np.isnan(b))
    if not np.isfinite(np.where(agree, 0, a - b)).all():
        return float("inf")
    return float(np.abs(np.where(agree, 0, a - b)).max(initial=0) / (np.abs(b[np.isfinite(b)]).max(initial=0) or 1.0))


# ---- the masked reference --------------------------------------------------------------------------------------------


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every tensor that type inference knows."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    return {item.name: item.type.tensor_type.elem_type for item in [*graph.input, *graph.value_info, *graph.output]}


# Which input of a quantising operator is the zero point of its result.
ZERO_POINTS = {"QuantizeLinear": 2, "QLinearConv": 7, "QLinearMatMul": 7, "QGemm": 8, "QLinearAdd": 7, "QLinearMul": 7}
ZERO_POINTS |= dict.fromkeys(("QLinearSigmoid", "QLinearLeakyRelu", "QLinearAveragePool", "QLinearGlobalAveragePool"), 4)


def zero_points(model: onnx.ModelProto) -> dict[str, str]:
    """Tensor with the zero point of every quantised tensor."""
    found = {}
    for node in model.graph.node:
        if node.op_type == "DynamicQuantizeLinear":
            found[node.output[0]] = node.output[2]
        elif len(node.input) > ZERO_POINTS.get(node.op_type, len(node.input)):
            found[node.output[0]] = node.input[ZERO_POINTS[node.op_type]]
    return found


def masked(model: onnx.ModelProto, cuts: Iterable[Cut], select: bool = False) -> onnx.ModelProto:
    """The model with a Mul by a 0/1 mask after every listed tensor (And for booleans). Recurrence weights, which carry a
    recurrent layer's hidden units from step to step inside of one node, are listed too. In a quantised tensor the zero point is
    the zero, and Where takes the place of Mul.

    ``select``: Where instead of Mul, for tensors that are infinite where they are masked (log of a masked zero).
    """
    result, types, points = onnx.ModelProto(), types_of(model), zero_points(model)
    result.CopyFrom(model)
    constants = {tensor.name: nh.to_array(tensor) for tensor in model.graph.initializer}
    nodes, readers = {}, {}
    for number, cut in enumerate(cuts):
        keep = np.ones(cut.size, bool)
        keep[list(cut.removed)] = False
        keep = keep.reshape([-1 if axis == cut.axis else 1 for axis in range(cut.rank)])
        kind = types.get(cut.tensor) or FLOAT
        dtype = oh.tensor_dtype_to_np_dtype(kind)
        mask, source, target = f"mask{number}", readers.get(cut.tensor, cut.tensor), f"{cut.tensor}/masked{number}"
        if cut.tensor in points:
            zero = constants.get(points[cut.tensor])
            if zero is not None and zero.size > 1:  # one per channel
                result.graph.initializer.append(nh.from_array(zero.reshape(keep.shape), f"zero{number}"))
            single = zero is None or zero.size == 1
            node = oh.make_node("Where", [mask, source, points[cut.tensor] if single else f"zero{number}"], [target])
        elif select:
            result.graph.initializer.append(nh.from_array(np.zeros((), dtype), f"zero{number}"))
            node = oh.make_node("Where", [mask, source, f"zero{number}"], [target])
        else:
            node = oh.make_node("And" if dtype.kind == "b" else "Mul", [source, mask], [target])
            keep = keep.astype(dtype)
        result.graph.initializer.append(nh.from_array(keep, mask))
        nodes.setdefault(cut.tensor, []).append(node)
        readers[cut.tensor] = target
    made = {name for node in model.graph.node for name in node.output}
    ordered = [node for name, own in nodes.items() if name not in made for node in own]
    for node in model.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [readers.get(name, name) for name in node.input]
        ordered += [copy, *(own for name in node.output for own in nodes.get(name, []))]
    del result.graph.node[:]
    result.graph.node.extend(ordered)
    if result.ir_version < 4:
        result.ir_version = 4
    return result


def with_all_tensors(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every intermediate tensor as an output."""
    result, types = onnx.ModelProto(), types_of(model)
    result.CopyFrom(model)
    present = {item.name for item in result.graph.output}
    names = [name for node in model.graph.node for name in node.output if name and name not in present]
    for name in names:
        known = types.get(name)
        result.graph.output.append(oh.make_tensor_value_info(name, known, None) if known else onnx.ValueInfoProto(name=name))
    return result


def shapes_of(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in one real run, and of the initializers."""
    whole = with_all_tensors(model)
    shapes = {item.name: np.shape(value) for item, value in zip(whole.graph.output, run(whole, feeds), strict=True)}
    return {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer} | shapes


def data_free(model: onnx.ModelProto) -> set[str]:
    """Tensors that depend on shapes at most."""
    found = {tensor.name for tensor in model.graph.initializer} | {""}
    for node in model.graph.node:
        if node.op_type in ("Shape", "Size") or found.issuperset(node.input):
            found.update(node.output)
    return found


# ---- plans -----------------------------------------------------------------------------------------------------------


def empty_plan(analysis: Analysis) -> Plan:
    return sfp_onnx.plan(analysis, PlanOptions(ratio=0.0), "random")


def plan_of(analysis: Analysis, chosen: Mapping[str, Sequence[int]]) -> Plan:
    """A plan that removes the given positions of the given groups."""
    plan = empty_plan(analysis)
    assert set(chosen) <= {group.group for group in plan.groups}
    return replace(plan, groups=tuple(replace(group, remove=tuple(chosen.get(group.group, ()))) for group in plan.groups))


def random_plan(analysis: Analysis, seed: int) -> Plan:
    """Random units of random groups; every group and every tensor keeps at least one, at least one unit leaves."""
    generator, coupling = np.random.default_rng(seed), analysis.coupling
    removed, sure = np.zeros(coupling.units, bool), int(generator.integers(len(coupling.groups)))
    for index, group in enumerate(coupling.groups):
        if index == sure or generator.random() < 0.7:
            step = group.width // group.blocks
            count = group.blocks * int(generator.integers(1, step))
            removed[group.units[group.order(generator.random(group.width))[:count]]] = True
    for channels in coupling.tensors.values():
        for own in channels:
            if (own.units >= 0).all() and removed[own.units].all():
                removed[own.units[0]] = False
    if not removed.any():
        group = coupling.groups[sure]
        removed[group.units[:: group.width // group.blocks]] = True
    return plan_of(analysis, {group.name: np.flatnonzero(removed[group.units]).tolist() for group in coupling.groups})


def assert_valid(model: onnx.ModelProto, like: onnx.ModelProto) -> None:
    """onnx.checker passes, as far as it does on ``like`` (it rejects some operators that onnxruntime runs, and its strict shape
    inference fails on some that are functions)."""
    for full in (True, False):
        try:
            onnx.checker.check_model(like, full_check=full)
        except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError):
            continue
        onnx.checker.check_model(model, full_check=full)
        return


def assert_exact(
    model: onnx.ModelProto, result: Pruned, feeds: Mapping[str, np.ndarray] | None = None, tolerance: float = 1e-4, select: bool = False
) -> None:
    """The pruned model is valid and equals the masked original."""
    proto, feeds = result.to_proto(), feeds or feeds_for(model)
    assert_valid(proto, model)
    reference = run(masked(model, result.cuts, select), feeds)
    for name, own, other in zip([item.name for item in model.graph.output], run(proto, feeds), reference, strict=True):
        assert error(own, other) <= tolerance, f"output {name} differs by {error(own, other):.3g}"


def assert_listed(model: onnx.ModelProto, result: Pruned, feeds: Mapping[str, np.ndarray] | None = None) -> None:
    """The cuts list exactly the activations and axes of the original that became smaller, with their real sizes. Axes that change
    with the batch (channels merged with it) have no size to list, quantised integers no zero to mask with."""
    feeds = feeds or feeds_for(model)
    before, after = shapes_of(model, feeds), shapes_of(result.to_proto(), feeds)
    listed = {(cut.tensor, cut.axis): cut for cut in result.cuts}
    for (name, axis), cut in listed.items():
        assert cut.rank == len(before[name]) and cut.size == before[name][axis] and len(set(cut.removed)) == len(cut.removed) > 0
        if name in after:
            assert after[name][axis] == cut.size - len(cut.removed), f"{name} axis {axis}"
    quantised = {name for name, kind in types_of(model).items() if kind in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)}
    for name in (set(before) & set(after)) - data_free(model) - quantised - set(zero_points(model)):
        for axis, (old, new) in enumerate(zip(before[name], after[name], strict=True)):
            if old != new and (name, axis) not in listed:
                other = shapes_of(model, feeds_for(model, batch=5))
                assert other[name][axis] != old, f"{name} axis {axis} lost channels and is not listed"
