"""Imports point one way: a package imports only what stands above it, at the top of its files, and in no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.paths import ROOT

#: From the ground up; each may import itself and what stands before it.
ORDER = (
    *("errors", "config", "io", "method", "metrics", "policies", "planner", "models", "cache", "data", "runtime"),
    *("benchmarks", "evaluation", "report", "export", "compressor", "acckv", "tiny", "plugins"),
    *(f"lightning_modules.{name}" for name in ("interrupted", "evaluation", "calibration", "cli")),
)
#: Imported where they are used, and not with the package.
OPTIONAL = {"lmms_eval", "pycocoevalcap", "resource", "torchao"}
#: What still breaks a rule. A line goes with the last import it stands for: the tests fail on one that does not hold.
UPWARD: set[str] = set()
INSIDE: set[str] = set()


def modules() -> dict[str, Path]:
    """Dotted name -> file, of both packages."""
    files = [file for package in ("acckv", "lightning_modules") for file in (ROOT / package).rglob("*.py")]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(tree: ast.AST) -> Iterator[str]:
    """Names that the import statements anywhere in a tree ask for, `package.name` for `from package import name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


MODULES = modules()
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in MODULES.items()}
GRAPH = {
    name: {found if found in MODULES else found.rpartition(".")[0] for found in imports(tree)} & set(MODULES) - {name}
    for name, tree in TREES.items()
}


def layer(module: str) -> str:
    """The entry of ORDER that a module belongs to."""
    first, _, rest = module.partition(".")
    return (rest.partition(".")[0] or first) if first == "acckv" else ".".join(module.split(".")[:2])


def test_every_module_has_a_layer() -> None:
    assert {layer(module) for module in MODULES} - {"lightning_modules"} <= set(ORDER)


def test_a_layer_imports_only_what_stands_above_it() -> None:
    place = {name: index for index, name in enumerate(ORDER)}
    arrows = {(module, found) for module, targets in GRAPH.items() for found in targets}
    upward = {f"{one} -> {other}" for one, other in arrows if place[layer(one)] < place[layer(other)]}
    assert upward == UPWARD


def test_only_optional_dependencies_are_imported_inside_functions() -> None:
    inside = set()
    for name, tree in TREES.items():
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        late = {found for function in functions for found in imports(function)}
        packages = {".".join(found.split(".")[: 2 if found.startswith("acckv") else 1]) for found in late}
        inside |= {f"{name} -> {package}" for package in packages - OPTIONAL}
    assert inside == INSIDE


def test_no_file_imports_itself_by_way_of_others() -> None:
    def reached(module: str) -> set[str]:
        found: set[str] = set()
        new = {module}
        while new := set().union(*(GRAPH[name] for name in new)) - found:
            found |= new
        return found

    assert {name for name in MODULES if name in reached(name)} == set()


def test_each_test_file_says_what_it_holds_right() -> None:
    for file in (ROOT / "tests").rglob("test_*.py"):
        first = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]
        assert len(first.split()) >= 6 and first.endswith("."), file
