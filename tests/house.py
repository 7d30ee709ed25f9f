"""How tidy the package is, in numbers: size, layers, imports, length of functions, options shown.

``python tests/house.py [PACKAGE_FOLDER]`` prints them as a table; tests/test_house.py holds them to budgets. Standard library only, and
only the count of options runs the package: any checkout can be measured.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

HERE = Path(__file__).resolve().parent
PLUGINS = ("methods", "bandits", "pulls", "dilute", "sfp", "profiles")  # those that there are count
FRONT = ("__init__", "__main__", "cli")  # may import plug-ins, as these may each other
SILENT = (
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER,
)  # fmt: skip
Function = ast.FunctionDef | ast.AsyncFunctionDef
Import = ast.Import | ast.ImportFrom


@dataclass
class Module:
    """A file of the package: ``name`` is its path in dots below the package, which is itself ``__init__``."""

    name: str
    path: Path

    @cached_property
    def tree(self) -> ast.Module:
        """What is written there."""
        return ast.parse(self.path.read_bytes())

    @property
    def package(self) -> list[str]:
        """Parts of the name of the package that its relative imports start from."""
        if self.path.name == "__init__.py":
            return [] if self.name == "__init__" else self.name.split(".")
        return self.name.split(".")[:-1]


class House:
    """The modules of a package and what can be counted in them."""

    def __init__(self, folder: Path, plugins: tuple[str, ...] = PLUGINS, front: tuple[str, ...] = FRONT) -> None:
        self.folder, self.plugins, self.front = folder.resolve(), plugins, front
        self.modules: dict[str, Module] = {}
        for path in sorted(self.folder.rglob("*.py")):
            parts = path.relative_to(self.folder).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
            self.modules[name] = Module(name, path)

    # ---- size --------------------------------------------------------------------------------------------------------

    def code_lines(self) -> int:
        """Lines that hold code: no docstrings, comments or blanks; lines inside other long strings count."""
        return sum(len(_code(module)) for module in self.modules.values())

    def files(self) -> int:
        """Python files."""
        return len(self.modules)

    def top_names(self) -> int:
        """Modules and sub-packages right below the package."""
        return len({name.partition(".")[0] for name in self.modules} - {"__init__"})

    # ---- imports -----------------------------------------------------------------------------------------------------

    def imported(self, module: Module, statements: Iterable[Import]) -> set[str]:
        """Modules of the package that the statements name."""
        found = {target for statement in statements for target in self._targets(module, statement)}
        return found - {module.name}

    def _targets(self, module: Module, statement: Import) -> Iterator[str]:
        if isinstance(statement, ast.Import):
            own = [alias.name.split(".") for alias in statement.names]
            yield from (_dotted(parts[1:]) for parts in own if parts[0] == self.folder.name)
            return
        inner = statement.module.split(".") if statement.module else []
        if statement.level:
            package = module.package
            base = package[: len(package) + 1 - statement.level] + inner
        elif inner and inner[0] == self.folder.name:
            base = inner[1:]
        else:
            return
        for alias in statement.names:
            yield _dotted([*base, alias.name] if _dotted([*base, alias.name]) in self.modules else base)

    @cached_property
    def graph(self) -> dict[str, set[str]]:
        """For each module, what it imports of the package when it is itself imported (by its own text)."""
        return {name: self.imported(module, _at_import(module.tree)) for name, module in self.modules.items()}

    def cycle(self) -> list[str]:
        """Modules that import each other in a circle; empty if there are none."""
        try:
            TopologicalSorter(self.graph).prepare()
        except CycleError as error:
            return list(error.args[1])
        return []

    def longest_chain(self) -> list[str]:
        """The longest chain of modules each of which imports the next.

        Raises:
            CycleError: there are cycles.
        """
        chains: dict[str, list[str]] = {}
        for name in TopologicalSorter(self.graph).static_order():
            below = (chains[own] for own in sorted(self.graph.get(name, ())))
            chains[name] = [name, *max(below, key=len, default=[])]
        return max(chains.values(), key=len)

    def to_plugins(self) -> list[tuple[str, str]]:
        """Imports anywhere in the core (also inside functions) of a plug-in: importing and imported module."""
        found = []
        for name, module in self.modules.items():
            if not _below(name, (*self.plugins, *self.front)):
                targets = self.imported(module, (own for own in ast.walk(module.tree) if isinstance(own, Import)))
                found += [(name, target) for target in sorted(targets) if _below(target, self.plugins)]
        return found

    def import_lines(self) -> int:
        """Lines of import statements and of ``__all__``."""
        return sum(_import_span(own) for module in self.modules.values() for own in ast.walk(module.tree))

    # ---- functions ---------------------------------------------------------------------------------------------------

    def function_lengths(self) -> list[int]:
        """Lines of each function from ``def`` to its end, without its docstring; sorted."""
        return sorted(_span(own) - _docstring_lines(own) for own in self._functions())

    def longest_function(self) -> int:
        """Lines of the longest."""
        return self.function_lengths()[-1]

    def usual_function(self) -> int:
        """Lines that 95 % of the functions do not exceed."""
        lengths = self.function_lengths()
        return lengths[-(-95 * len(lengths) // 100) - 1]

    def mixed_tuples(self) -> int:
        """Parameters that take tuples of different kinds of things."""
        return sum(_mixed(own.annotation) for function in self._functions() for own in _parameters(function))

    def _functions(self) -> Iterator[Function]:
        for module in self.modules.values():
            yield from (own for own in ast.walk(module.tree) if isinstance(own, Function))

    # ---- options -----------------------------------------------------------------------------------------------------

    def shown_options(self, command: str = "prune") -> int:
        """Options in the help of a command."""
        path = os.pathsep.join(filter(None, (str(self.folder.parent), os.environ.get("PYTHONPATH"))))
        words = [sys.executable, "-m", self.folder.name, command, "--help"]
        done = subprocess.run(words, env={**os.environ, "PYTHONPATH": path}, cwd=HERE, capture_output=True, text=True, check=True)
        return sum(line.startswith("  -") for line in done.stdout.splitlines())

    def numbers(self) -> dict[str, int]:
        """All of them, by name."""
        return {
            "lines of code": self.code_lines(),
            "Python files": self.files(),
            "names at the top level": self.top_names(),
            "longest chain of imports": len(self.longest_chain()),
            "imports of plug-ins by the core": len(self.to_plugins()),
            "lines of imports and __all__": self.import_lines(),
            "lines of a function, 95th percentile": self.usual_function(),
            "lines of a function, most": self.longest_function(),
            "parameters that are mixed tuples": self.mixed_tuples(),
            "options shown by prune --help": self.shown_options(),
        }


def _dotted(parts: list[str]) -> str:
    return ".".join(parts) or "__init__"


def _code(module: Module) -> set[int]:
    """Numbers of the lines with code."""
    lines: set[int] = set()
    with tokenize.open(module.path) as stream:
        for token in tokenize.generate_tokens(stream.readline):
            if token.type not in SILENT:
                lines.update(range(token.start[0], token.end[0] + 1))
    for own in ast.walk(module.tree):
        if (string := _docstring(own)) is not None:
            lines.difference_update(range(string.lineno, (string.end_lineno or string.lineno) + 1))
    return lines


def _docstring(node: ast.AST) -> ast.Expr | None:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            return first
    return None


def _docstring_lines(node: ast.AST) -> int:
    string = _docstring(node)
    return 0 if string is None else _span(string)


def _span(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _at_import(tree: ast.Module) -> Iterator[Import]:
    """Import statements that run when the module is imported: not those in functions or under ``if TYPE_CHECKING``."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        own = waiting.pop()
        if isinstance(own, Import):
            yield own
        elif isinstance(own, ast.If) and ast.unparse(own.test).endswith("TYPE_CHECKING"):
            waiting += own.orelse
        elif not isinstance(own, Function):
            waiting += _children(own)


def _children(node: ast.stmt) -> list[ast.stmt]:
    """Statements right inside another."""
    parts = [*ast.iter_child_nodes(node)]
    parts += [inner for own in parts if isinstance(own, (ast.ExceptHandler, ast.match_case)) for inner in own.body]
    return [own for own in parts if isinstance(own, ast.stmt)]


def _import_span(node: ast.AST) -> int:
    if isinstance(node, Import):
        return _span(node)
    if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return _span(node) if any(isinstance(own, ast.Name) and own.id == "__all__" for own in targets) else 0
    return 0


def _below(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == own or name.startswith(own + ".") for own in prefixes)


def _parameters(function: Function) -> list[ast.arg]:
    own = function.args
    return [*own.posonlyargs, *own.args, *own.kwonlyargs, *(one for one in (own.vararg, own.kwarg) if one is not None)]


def _mixed(annotation: ast.expr | None) -> bool:
    """Whether ``tuple[A, B]`` stands in an annotation, by itself or in another type."""
    for own in ast.walk(annotation) if annotation is not None else ():
        if isinstance(own, ast.Subscript) and isinstance(own.slice, ast.Tuple) and ast.unparse(own.value) == "tuple":
            kinds = {ast.unparse(kind) for kind in own.slice.elts}
            if "..." not in kinds and len(kinds) > 1:
                return True
    return False


def main() -> None:
    """Print the table."""
    house = House(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "sfp_onnx")
    if cycle := house.cycle():
        sys.exit("imports in a circle: " + " -> ".join(cycle))
    print("| Measure | Value |\n|---|---:|")
    for name, value in house.numbers().items():
        print(f"| {name} | {value:,} |")
    print("\nLongest chain of imports: " + " -> ".join(house.longest_chain()))
    print("\nImports of plug-ins by the core: " + ("; ".join(f"{one} -> {other}" for one, other in house.to_plugins()) or "none"))


if __name__ == "__main__":
    main()
