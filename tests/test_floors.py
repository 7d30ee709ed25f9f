"""The house's floors: imports go down only, doors stay doors, operator names stay in the rules."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sfp_onnx
from sfp_onnx.rules.registry import RULES

ROOT = Path(sfp_onnx.__file__).parent
FLOORS = (
    "core",
    "graph runtime",
    "rules data",
    "coupling",
    "cut scores planning latency repair evaluation export report",
    "pipeline",
    "methods",
    "cli __init__ __main__",
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}
# Rooms of one floor may import each other, without a circle; pairs that go up are named here.
NEIGHBOURS = {
    ("data", "evaluation"),
}  # fmt: skip
# Who may import onnxruntime, and onnx or onnx_graphsurgeon. `report` and `methods` name ModelProto in types.
DOORS = {"onnxruntime": {"runtime"}, "onnx": {"graph", "report", "methods"}, "onnx_graphsurgeon": {"graph"}}
FIVE = {"onnx", "onnxruntime", "onnx_graphsurgeon", "numpy", "click", "google"}  # google.protobuf comes with onnx
OPTIONAL = {"jinja2": {"report"}, "torch": {"methods"}}  # packages of the extras, and who may import them
FILES = sorted(ROOT.rglob("*.py"))


def part(file: Path) -> str:
    """The module or package on a floor that a file belongs to."""
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[tuple[str, ...]]:
    """Absolute dotted names that a file imports."""
    package = ("sfp_onnx", *file.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            yield from ((*base, alias.name) for alias in node.names)


def inside(file: Path) -> Iterator[str]:
    """Parts of this package that a file imports."""
    for name in imports(file):
        if name[0] == "sfp_onnx":
            yield name[1] if len(name) > 1 and name[1] in FLOOR else "__init__"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_down_only(file: Path) -> None:
    own = part(file)
    assert own in FLOOR, f"{own} has no floor yet: add it to FLOORS"
    for other in inside(file):
        if other == own:
            continue
        allowed = FLOOR[other] <= FLOOR[own] or (own, other) in NEIGHBOURS
        assert allowed, f"{own} (floor {FLOOR[own]}) imports {other} (floor {FLOOR[other]})"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_only_doors_import_the_libraries(file: Path) -> None:
    for name in imports(file):
        assert part(file) in DOORS.get(name[0], {part(file)}), f"{part(file)} imports {name[0]}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_only_five_dependencies(file: Path) -> None:
    for name in imports(file):
        known = name[0] == "sfp_onnx" or name[0] in FIVE or name[0] in sys.stdlib_module_names
        assert known or part(file) in OPTIONAL.get(name[0], ()), ".".join(name)


# ---- operator names --------------------------------------------------------------------------------------------------

NAMELESS = tuple("data cut planning latency scores repair evaluation export report pipeline methods".split())
# What operators compute in torch: tables of operators, as the rules are.
TABLES = {f"methods/training/{name}.py" for name in ("functions", "moves", "layers")}
NAMELESS_FILES = tuple("coupling/__init__.py coupling/cost.py coupling/analysis.py".split())
# These write operators into a graph (masks, factors, taps), so they may name them, but never look at one.
WRITERS = {"cut", "scores", "repair", "methods"}


def nameless(file: Path) -> bool:
    name = file.relative_to(ROOT).as_posix()
    return (part(file) in NAMELESS or name in NAMELESS_FILES) and name not in TABLES


def strings(node: ast.AST) -> Iterator[str]:
    for item in ast.walk(node):
        if isinstance(item, ast.Constant) and isinstance(item.value, str):
            yield item.value


@pytest.mark.parametrize("file", [file for file in FILES if nameless(file)], ids=lambda file: str(file.relative_to(ROOT)))
def test_no_operator_names_outside_the_rules(file: Path) -> None:
    tree = ast.parse(file.read_text())
    if part(file) not in WRITERS:
        assert not set(strings(tree)) & set(RULES), f"{part(file)} names operators"
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            assert not set(strings(node)) & set(RULES), f"{part(file)} line {node.lineno} compares with an operator name"
            attributes = {item.attr for item in ast.walk(node) if isinstance(item, ast.Attribute)}
            assert not attributes & {"op", "op_type", "operator"}, f"{part(file)} line {node.lineno} looks at an operator"


def test_every_part_of_the_package_has_a_floor() -> None:
    assert {part(file) for file in FILES} <= set(FLOOR)


# ---- names -----------------------------------------------------------------------------------------------------------


def test_no_two_modules_have_one_name() -> None:
    names = [file.stem for file in FILES if file.stem != "__init__"] + [file.parent.name for file in FILES if file.stem == "__init__"]
    assert sorted(names) == sorted(set(names))


def test_no_public_name_hides_a_module() -> None:
    rooms = {file.relative_to(ROOT).parts[0].removesuffix(".py") for file in FILES}
    assert not rooms & set(sfp_onnx.__all__)
