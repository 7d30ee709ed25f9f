"""One contract for all operator rules: minimal models of every operator and opset generation, random legal cuts, exact."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx.defs
import onnxruntime as ort
import pytest
from building import NEWEST, assert_exact, assert_listed, random_plan
from rule_cases import CASES, CHANNELS, Case, model_of, schema_model

import sfp_onnx
from sfp_onnx.core.types import Trace
from sfp_onnx.coupling.analysis import couple
from sfp_onnx.graph import Model, Prepared, nodes
from sfp_onnx.rules.registry import RULES, SUMMARY

# Known faults: (operator, case), where "" stands for any -> (lowest and highest opset concerned, what is wrong).
OLD_RUNTIME = tuple(int(part) for part in ort.__version__.split(".")[:2]) < (1, 25)
FAULTS: dict[tuple[str, str], tuple[int, int, str]] = {
}


def every() -> Iterator[object]:
    for own in (own for cases in CASES.values() for own in cases):
        keys = [(own.operator, own.build.__name__), ("", own.build.__name__), (own.operator, "")]
        low, high, reason = next((FAULTS[key] for key in keys if key in FAULTS), (0, 0, ""))
        for opset in own.opsets():
            marks = [pytest.mark.xfail(strict=True, reason=reason)] if low <= opset <= high else []
            yield pytest.param(own, opset, marks=marks, id=f"{own.operator}-{own.build.__name__}-{opset}")


@pytest.mark.parametrize(("own", "opset"), list(every()))
def test_rule_is_exact(own: Case, opset: int) -> None:
    try:
        check_rule(own, opset)
    except Exception as error:
        if OLD_RUNTIME and type(error).__module__.startswith("onnxruntime"):
            pytest.skip("this onnxruntime has no kernel for the model or for its masked reference")
        raise


@pytest.mark.parametrize("own", [own for cases in CASES.values() for own in cases], ids=lambda own: f"{own.operator}-{own.build.__name__}")
def test_rule_is_exact_where_channels_are_put_back(own: Case) -> None:
    """The newest generation of every operator, with all that may be expanded."""
    model = model_of(own, max(own.opsets()))
    analysis = sfp_onnx.inspect(model, cut_layernorm=True)
    for seed in range(2 if analysis.coupling.expanded and analysis.coupling.groups else 0):
        assert_exact(model, sfp_onnx.apply(analysis, random_plan(analysis, seed)), select=own.select)


def check_rule(own: Case, opset: int) -> None:
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
        plan = random_plan(analysis, seed)
        if OLD_RUNTIME and own.operator.endswith(("RMSNormalization", "SimplifiedLayerNormalization")) and _one_left(plan):
            continue  # old versions refuse to normalise over one channel
        result = sfp_onnx.apply(analysis, plan, verify=True)
        assert_exact(model, result, select=own.select)
        assert_listed(model, result)


def _one_left(plan: sfp_onnx.Plan) -> bool:
    return any(group.width - len(group.remove) == 1 for group in plan.groups)


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
    assert set(missing) <= {("GlobalLpPool", 22), ("RoiAlign", 22)}  # onnxruntime has no kernel for them


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
