"""README and docs/: links lead somewhere, and pages that are made of the code tell all of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts.docs_pages import PAGES, commands, exit_codes, families, formats, transformers_4
from streamconv import errors
from streamconv.cli.commands import root
from streamconv.families import families as all_families
from streamconv.formats import FORMATS
from streamconv.planning import version_4

ROOT = Path(__file__).parents[1]
WRITTEN = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    made = {ROOT / "docs" / name for name in PAGES}
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target) or target.startswith("#"):
            continue
        place = (path.parent / target.partition("#")[0]).resolve()
        assert place.exists() or place in made, f"{path.name}: {target}"


def test_readme_is_read_in_a_minute() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 170
    for name in root().commands:
        if name not in ("run", "begin", "part", "finish", "ray", "help", "convert", "average"):
            assert f"streamconv {name}" in text, name


def test_every_model_that_transformers_4_reads_otherwise_has_its_line() -> None:
    page = transformers_4()
    for known in version_4.UNLIKE:
        assert known.does in page
        assert all(t in page for t in known.model_types)


def test_every_command_and_option_has_its_line() -> None:
    page = commands()
    for name, command in root().commands.items():
        if name == "help":
            continue
        assert f"## streamconv {name}" in page
        for param in getattr(command, "params", ()):
            if param.param_type_name == "option" and not hasattr(command, "commands"):
                assert param.opts[-1] in page


def test_the_other_pages_are_whole() -> None:
    assert all(f"| {f.name} | {', '.join(f.model_types)} |" in families() for f in all_families())
    assert all(f"`{f.NAME}`" in formats() for f in FORMATS)
    kinds = [c for c in vars(errors).values() if isinstance(c, type)]
    ours = [c for c in kinds if issubclass(c, errors.StreamconvError)]
    assert all(f"| {c.exit_code} | `{c.__name__}` |" in exit_codes() for c in ours)
    shown = (ROOT / "docs/reference/options.md").read_text().partition("## Exit codes")[2]
    assert all(f"\n| {c.exit_code}" in shown for c in ours)
    assert '{"streamconv_plan"' in PAGES["reference/plan.md"]()
    assert "`source_files`" in PAGES["reference/manifest.md"]()
