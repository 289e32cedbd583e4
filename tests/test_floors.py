"""The floors that lint-imports holds and the table that people read are one list."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

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
