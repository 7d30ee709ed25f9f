"""One contract for all operator rules: minimal models of every operator and opset generation, random legal cuts, exact."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx.defs
import pytest
from building import assert_exact, assert_listed, random_plan
from rule_cases import CASES, CHANNELS, NEWEST, Case, model_of, schema_model

import sfp_onnx
from sfp_onnx.coupling import couple
from sfp_onnx.graph import Model, Prepared, nodes
from sfp_onnx.records import Trace
from sfp_onnx.rules import RULES, SUMMARY

# Known faults: (operator or "", case) -> (lowest and highest opset concerned, what is wrong).
INFINITE = "verify multiplies by 0 where the original is infinite, or a type has no Mul kernel"
OPTIMISED = "verify runs optimised sessions, which do not compute this to 1e-4"
STIFF = "the rule breaks on an axis that it has just pinned"
OLD_WHERE = "the cut inserts Where, which opsets before 9 do not have"
CHECKED = "onnx.checker rejects an operator that onnxruntime runs"
STALE = "value_info of a tensor that is (now) an initializer keeps the old shape"
SCALAR = "a folded scalar becomes a vector of one element"
FAULTS: dict[tuple[str, str], tuple[int, int, str]] = {
    ("", "over_one"): (7, 99, INFINITE),
    ("Div", "by_branch"): (7, 99, INFINITE),
    ("Mod", "by_branch"): (7, 99, INFINITE),
    ("BitShift", "shift"): (7, 99, INFINITE),
    ("ReduceLogSum", "reduce_log_space"): (7, 99, INFINITE),
    ("MeanVarianceNormalization", "mean_variance"): (7, 99, INFINITE),
    ("", "quantized_activation"): (7, 18, INFINITE),
    ("", "quantized_activation_per_channel"): (7, 18, INFINITE),
    ("DynamicQuantizeLinear", "dynamically_quantized"): (7, 99, INFINITE),
    ("", "conv_integer"): (7, 99, INFINITE),
    ("", "matmul_integer"): (7, 99, INFINITE),
    ("", "conv_integer_zero_points"): (7, 99, "a masked 0 is not the zero point"),
    ("", "matmul_integer_zero_points"): (7, 99, "a masked 0 is not the zero point"),
    ("DequantizeLinear", "quantized_weight_per_tensor"): (7, 99, OPTIMISED),
    ("Pad", "pad_reflect_channels"): (7, 99, STIFF),
    ("Pad", "pad_crop_channels"): (7, 99, STIFF),
    ("Slice", "slice_channel_steps"): (7, 99, STIFF),
    ("Gather", "gather_grid"): (7, 99, STIFF),
    ("Reshape", "reshape_computed"): (7, 8, OLD_WHERE),
    ("Expand", "expand_rank"): (7, 8, OLD_WHERE),
    ("GroupNormalization", "group_norm_old"): (18, 20, CHECKED),
    ("SimplifiedLayerNormalization", "simplified_layer_norm"): (7, 99, CHECKED),
    ("SimplifiedLayerNormalization", "layer_norm_space"): (7, 99, CHECKED),
    ("Size", "sizes"): (7, 99, "Size of a cut tensor, used as a number, changes"),
    ("Expand", "expand_over_channels"): (7, 99, "an axis that Expand makes gets no labels and pins what it meets"),
    ("Conv", "conv_with_computed_weight"): (8, 99, STALE),
    ("Shape", "sizes"): (8, 99, SCALAR),
    ("Gather", "gather_computed_position"): (7, 99, SCALAR),
}


def every() -> Iterator[object]:
    for own in (own for cases in CASES.values() for own in cases):
        low, high, reason = FAULTS.get((own.operator, own.build.__name__)) or FAULTS.get(("", own.build.__name__), (0, 0, ""))
        for opset in own.opsets():
            marks = [pytest.mark.xfail(strict=True, reason=reason)] if low <= opset <= high else []
            yield pytest.param(own, opset, marks=marks, id=f"{own.operator}-{own.build.__name__}-{opset}")


@pytest.mark.parametrize(("own", "opset"), list(every()))
def test_rule_is_exact(own: Case, opset: int) -> None:
    model = model_of(own, opset)
    analysis = sfp_onnx.inspect(model)
    writers = {name for group in analysis.coupling.groups for name in group.producers}
    if own.pinned:
        assert "first" not in writers
        assert any(own.pinned in pin.reason for pin in analysis.coupling.pinned if "first" in pin.layers)
    else:
        assert "first" in writers
    if not analysis.coupling.groups:
        return
    for seed in range(3):
        result = sfp_onnx.apply(analysis, random_plan(analysis, seed), verify=True)
        assert_exact(model, result, select=own.select)
        assert_listed(model, result)


def test_every_rule_has_a_case() -> None:
    assert set(RULES) - set(CASES) == set(), "registered without a case in rule_cases.py"
    assert set(CASES) - set(RULES) == set(), "cases of operators that have no rule"


def test_every_generation_of_every_operator_has_a_case() -> None:
    """Wherever onnx changed an operator's schema, some case runs on the new form."""
    missing = []
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "" and schema.name in CASES and 7 <= schema.since_version <= NEWEST and not schema.deprecated:
            covered = {opset for own in CASES[schema.name] for opset in own.opsets()}
            if not any(opset >= schema.since_version for opset in covered):
                missing.append((schema.name, schema.since_version))
    assert missing == [("GlobalLpPool", 22)]  # onnxruntime has no kernel for it


@pytest.mark.parametrize("operator", sorted(RULES))
def test_every_rule_says_what_it_does(operator: str) -> None:
    assert 5 < len(SUMMARY[operator]) < 100


# ---- operators without a rule ----------------------------------------------------------------------------------------

UNKNOWN = sorted(
    {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""} - set(RULES) - {"Constant"}
)


@pytest.mark.parametrize("operator", UNKNOWN)
def test_an_operator_without_a_rule_pins_what_it_reads(operator: str) -> None:
    """The coupling alone, on a made-up trace: most of these graphs are not valid, but nothing crashes and the reason is given."""
    model = schema_model(onnx.defs.get_schema(operator), 21)
    prepared = fake(model)
    coupling = couple(prepared)
    assert [group.producers for group in coupling.groups] == [("beside",)]
    pin = next(pin for pin in coupling.pinned if "first" in pin.layers)
    assert pin.channels == CHANNELS
    if pin.reason != "graph output":
        assert operator in pin.reason and pin.node == "unknown"


def fake(model: onnx.ModelProto) -> Prepared:
    """What tracing would give, if every output of the unknown operator had the shape of its input."""
    loaded = Model(model, {}, "")
    own = tuple(nodes(loaded))
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    shapes["x"] = (2, 3, 8, 8)
    for node in own:
        channels = {"first": 8, "beside": 4, "last": 5}.get(node.name)
        like = shapes[node.inputs[0]] if node.inputs else (2, CHANNELS, 8, 8)
        for name in node.outputs:
            shapes[name] = like if channels is None else (2, channels, 8, 8)
    return Prepared(loaded, own, Trace(shapes, {}, {}, {}), {"x": np.zeros((2, 3, 8, 8), np.float32)})
