"""The pages of the documentation that are made of the code: run by mkdocs (``mkdocs-gen-files``).

Commands and options, families, formats, exit codes, and what plans and manifests hold: each function
returns a page, so that tests can ask for one.
"""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
from collections.abc import Callable, Iterator
from typing import Any

from streamconv import errors
from streamconv.cli.command import COMMON, OUTPUT
from streamconv.cli.commands import root
from streamconv.families import native
from streamconv.families.known import table
from streamconv.formats import FORMATS
from streamconv.planning import version_4


def commands() -> str:
    """Return the page of all commands with all their options."""
    parts = [
        "# Commands",
        "",
        "`streamconv SRC DST` is short for `streamconv convert SRC DST`.",
        "",
    ]
    for path, command in _all_commands(root(), "streamconv"):
        parts += [f"## {path}", "", _paragraph(command.help or ""), ""]
        context = _Context(command, path)
        usage = " ".join(context.pieces()).replace("{", "").replace("}", "")
        parts += ["```", f"{path} {usage}", "```", ""]
        for group, rows in context.groups().items():
            parts += [f"**{group}**", "", "| option | means |", "|---|---|"]
            parts += [f"| `{names}` | {_cell(text)} |" for names, text in rows] + [""]
        if command.epilog:
            parts += ["```", command.epilog, "```", ""]
    return "\n".join(parts)


class _Context:
    """A command as typer's own context shows it."""

    def __init__(self, command: Any, path: str) -> None:
        self._command = command
        self._context = command.make_context(path, [], resilient_parsing=True)

    def pieces(self) -> list[str]:
        return list(self._command.collect_usage_pieces(self._context))

    def groups(self) -> dict[str, list[tuple[str, str]]]:
        found: dict[str, list[tuple[str, str]]] = {}
        for param in self._command.get_params(self._context):
            record = param.get_help_record(self._context)
            if record is None:
                continue
            argument = param.param_type_name == "argument"
            panel = getattr(param, "rich_help_panel", None) or (
                OUTPUT if "--help" in param.opts else COMMON
            )
            found.setdefault("Arguments" if argument else panel, []).append(record)
        return found


def _all_commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _all_commands(command, f"{path} {name}")
        elif name != "help":
            yield f"{path} {shlex.quote(name)}", command


def families() -> str:
    """Return the page of model families: Megatron's, and those of trainers with names of their own."""
    own = [
        f"| {d.name} | {', '.join(t for f in d.families for t in f.model_types)} |"
        for d in native.dialects()
    ]
    return "\n".join(
        [
            "# Families",
            "",
            "Whose rules turn a trainer's tensors into HuggingFace's. The model type in config.json",
            "chooses, unless `--family NAME` does.",
            "",
            "## Megatron",
            "",
            table().rstrip("\n"),
            "",
            "## Trainers with models of their own",
            "",
            "| whose names | model types in config.json |",
            "|---|---|",
            *own,
            "",
        ]
    )


def formats() -> str:
    """Return the page of input formats, as ``inspect`` calls them."""
    rows = [f"| `{f.NAME}` | {_cell(_first(f))} |" for f in FORMATS]
    return "\n".join(
        [
            "# Formats",
            "",
            "What `streamconv inspect` calls a checkpoint, in the order in which formats are tried.",
            "Who leaves which of them: [What it reads](layouts.md).",
            "",
            "| format | what it is |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def transformers_4() -> str:
    """Return the page of models of which transformers 4 does not make what version 5 makes."""
    ties = {None: "", True: "tied embeddings", False: "embeddings that are not tied"}
    rows = [
        f"| {', '.join(u.model_types)} | {_cell(u.classes.replace('|', ', ')) or 'all'} "
        f"| {ties[u.tied]} | {_cell(u.does)} |"
        for u in version_4.UNLIKE
    ]
    return "\n".join(
        [
            "# transformers 4",
            "",
            "Models that transformers 4.57 does not read as they were trained, whatever config.json says.",
            "`plan`, `convert` and the manifest say so of each. The list is held true by",
            "`python -m scripts.campaigns.older_release`, which tries every class that both versions",
            "have; [what comes out](output.md#transformers-4) says what is done so that it reads the rest.",
            "",
            "| model types | classes with | where they have | transformers 4 |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def exit_codes() -> str:
    """Return the page of exit codes, with the class of each in Python."""
    classes = [c for c in vars(errors).values() if isinstance(c, type)]
    ours = [c for c in classes if issubclass(c, errors.StreamconvError)]
    rows = []
    for c in sorted(ours, key=lambda c: c.exit_code):
        meaning = re.sub(r" \(exit code [0-9]+\)", "", _first(c))
        rows.append(f"| {c.exit_code} | `{c.__name__}` | {_cell(meaning)} |")
    return "\n".join(
        [
            "# Exit codes and errors",
            "",
            "0 is done, or nothing to do. 3 is a batch of which a part failed. 130 and 143 are",
            "SIGINT and SIGTERM. An error says what, where, expected, found and what to do next;",
            "`--json` prints it as an event, and Python raises its class.",
            "",
            "| code | class | means |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def specification(title: str, module: str, more: str) -> Callable[[], str]:
    """Return what makes a page of a module's docstring, which specifies what it reads and writes."""

    def page() -> str:
        text = inspect.getdoc(importlib.import_module(module)) or ""
        # A literal block of reStructuredText is an indented one of Markdown.
        text = re.sub(r"::\n\n    ", ":\n\n    ", text)
        text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text).replace("``", "`")
        return f"# {title}\n\n{text}\n\n{more}"

    return page


_RULE = """## Versions

The number in the first line changes whenever a reader of the release before could misunderstand what is written;
keys that may be passed over come without a new number. A release executes plans of its own number alone and says
so of others: make the plan again, which takes seconds.
"""
_MANIFEST_RULE = """## Keys

| key | holds |
|---|---|
| `streamconv` | the version that wrote it |
| `job` | format, options, what identifies the source and each file beside it, and the digest of all that |
| `plan_digest` | the digest of the plan that was executed |
| `unverifiable_bytes` | bytes of the source that no checksum stands for |
| `notices`, `skipped` | what a user should know; what was left out, and why |
| `files` | every file but this one: name, bytes, xxh3_128, and sha256 where that was asked for |
| `source_files` | the files that tensors were read from, numbered from 0 |
| `tensors` | by name: file, dtype, shape, xxh3_128 of its bytes, the source tensors (`sources`), the ranges of source files (`0-7`) and the number of shards |
| `run` | seconds, peak, budget, bytes read, where the source lay, and the seal of the user who ran it |

## Versions

Keys are added, never given another meaning; whoever reads a manifest passes over those that it does not know.
An output outlives the release that wrote it: every later one verifies it.
"""

PAGES: dict[str, Callable[[], str]] = {
    "reference/commands.md": commands,
    "reference/families.md": families,
    "reference/formats.md": formats,
    "reference/exit-codes.md": exit_codes,
    "reference/transformers-4.md": transformers_4,
    "reference/plan.md": specification("The plan", "streamconv.ir.planfile", _RULE),
    "reference/manifest.md": specification(
        "The manifest", "streamconv.output.manifest", _MANIFEST_RULE
    ),
}


def _first(thing: Any) -> str:
    return _paragraph(inspect.getdoc(thing) or "")


def _paragraph(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split()).replace("``", "`")


def _cell(text: str) -> str:
    text = re.sub(r"\s+\[x>=0\]|\s+\[required\]", "", " ".join(text.split()))
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def main() -> None:
    """Hand the pages to mkdocs."""
    import mkdocs_gen_files

    for path, page in PAGES.items():
        with mkdocs_gen_files.open(path, "w") as out:
            out.write(page())


def on_page_content(html: str, **_: Any) -> str:
    """Remove what reStructuredText says of a name's kind (a hook of mkdocs, see mkdocs.yml)."""
    return re.sub(r":(?:class|func|mod|meth|attr):(?=<code>)", "", html)


if __name__ == "<run_path>":  # what mkdocs-gen-files calls a script
    main()
