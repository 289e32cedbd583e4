"""The floors that lint-imports holds and the table that people read are one list."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def floors() -> list[str]:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    contract = next(c for c in config["contracts"] if c["type"] == "layers")
    assert contract["exhaustive"] is True
    return [package for layer in contract["layers"] for package in layer.split(" | ")]


def test_contributing_lists_the_floors_in_their_order() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text[text.index("| package |") :].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == floors()


def test_the_root_holds_what_users_import_and_nothing_else() -> None:
    package = ROOT / "streamconv"
    modules = {p.stem for p in package.glob("*.py")} - {"__init__"}
    assert modules == {"__main__", "_version", "api", "errors", "options", "units"}
    folders = {p.parent.name for p in package.glob("*/__init__.py")}
    assert modules | folders == set(floors())


@pytest.mark.parametrize(
    ("folder", "strangers"),
    [
        ("streamconv", ("tests", "scripts", "bench")),
        ("scripts", ("tests", "bench")),
        ("bench", ("tests",)),
    ],
)
def test_nothing_imports_what_is_built_on_it(folder: str, strangers: tuple[str, ...]) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in _imported(node)
        if name.partition(".")[0] in strangers
    ]
    assert not wrong


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {k: v for k, v in project["optional-dependencies"].items() if k not in _OF_TESTS}
    declared = _named(project["dependencies"])
    optional = _named([text for texts in extras.values() for text in texts])
    imported = {
        name.partition(".")[0]
        for path in (ROOT / "streamconv").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in _imported(node)
    }
    used = imported - sys.stdlib_module_names - {"streamconv"}
    assert declared <= used <= declared | optional


_OF_TESTS = ("test", "bench", "dev", "docs")


def _named(requirements: list[str]) -> set[str]:
    named = {re.match(r"[\w.-]+", text)[0].lower() for text in requirements}
    return {"yaml" if name == "pyyaml" else name for name in named}


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports for types alone and those inside functions count, too."""
    modules = {_module(path): path for path in (ROOT / "streamconv").rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            for base in _imported(node):
                below = (f"{base}.{a.name}" for a in getattr(node, "names", ()))
                found = {m for m in below if m in modules} or {base} & modules.keys()
                graph.setdefault(name, set()).update(found - {name})
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
