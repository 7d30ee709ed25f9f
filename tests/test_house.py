"""The package stays as tidy as it is: budgets for the numbers of tests/house.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from house import House

BUDGETS = {  # a later change stays within them, or argues for new ones in its commit
    "lines of code": 23_340,
    "Python files": 148,
    "names at the top level": 18,
    "longest chain of imports": 20,
    "imports of plug-ins by the core": 0,
    "lines of imports and __all__": 1_990,
    "lines of a function, 95th percentile": 30,
    "lines of a function, most": 55,
    "parameters that are mixed tuples": 0,
    "options shown by prune --help": 30,
}
PACKAGE = Path(__file__).resolve().parents[1] / "sfp_onnx"


@pytest.fixture(scope="module")
def numbers() -> dict[str, int]:
    return House(PACKAGE).numbers()


@pytest.mark.parametrize("name", BUDGETS)
def test_budget(name: str, numbers: dict[str, int]) -> None:
    assert numbers[name] <= BUDGETS[name]


def test_all_numbers_have_budgets(numbers: dict[str, int]) -> None:
    assert set(numbers) == set(BUDGETS)


def test_no_imports_in_circles() -> None:
    assert House(PACKAGE).cycle() == []


ONE = '''
# a comment
from typing import TYPE_CHECKING
from .inner import deep

if TYPE_CHECKING:
    from . import methods

@property
def f(a: tuple[int, str], b: list[tuple[int, float]], c: tuple[int, ...], d: tuple[int, int] | None):
    """Words

    of words."""
    from .methods.own import g

    return "x"
'''
SMALL = {
    "__init__.py": '"""Words\nof words."""\nfrom .one import f\n__all__ = [\n    "f"\n]\n',
    "one.py": ONE,
    "inner/__init__.py": "",
    "inner/deep.py": "try:\n    import small.inner.deeper\nexcept ImportError:\n    from .. import absent\n",
    "inner/deeper.py": "x = 1\n",
    "absent.py": "",
    "methods/__init__.py": "",
    "methods/own.py": "from .. import inner\n",
}


def test_the_measures_count_what_they_say(tmp_path: Path) -> None:
    for name, text in SMALL.items():
        path = tmp_path / "small" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    house = House(tmp_path / "small")
    assert (house.code_lines(), house.files(), house.top_names(), house.import_lines()) == (18, 8, 4, 11)
    assert house.longest_chain() == ["__init__", "one", "inner.deep", "absent"]
    assert house.graph["inner.deep"] == {"inner.deeper", "absent"} and house.graph["methods.own"] == {"inner"}
    assert house.to_plugins() == [("one", "methods"), ("one", "methods.own")]
    assert (house.function_lengths(), house.mixed_tuples()) == ([4], 2)
    (tmp_path / "small" / "absent.py").write_text("import small\n")
    assert set(House(tmp_path / "small").cycle()) == {"__init__", "one", "inner.deep", "absent"}
