"""How commands look and what all of them take: help in groups, options about the command itself.

typer's classes write plain help already; ours put the options into groups, the common ones first, print
examples as they are and the summary of each command in full, and add ``-v``, ``--log-file`` and
``--debug``, which no command needs to know of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any, ClassVar

import typer.core

from streamconv.cli import log
from streamconv.cli.output import tell
from streamconv.errors import UsageError

# The groups of options in the order in which help shows them; what names none stands first.
COMMON = "Options"
MODEL = "Which model, and its names"
LORA = "LoRA adapters"
WHICH = "Which checkpoints"
KEEP = "Keeping and deleting"
HOOKS = "Telling others"
SPEED = "Speed and safety"
OUTPUT = "What is printed"
_ORDER = (COMMON, MODEL, LORA, WHICH, KEEP, HOOKS, SPEED, OUTPUT)

# Errors of typer's parser: the class has moved between its releases.
ParseError: type[Exception] = typer.BadParameter.__mro__[2]


def _shared_options() -> Iterator[Any]:
    """Yield the options of every command that are about the command itself."""
    yield typer.core.TyperOption(
        param_decls=["verbose", "--verbose", "-v"],
        count=True,
        default=0,
        expose_value=False,
        callback=lambda _ctx, _param, value: log.to_stderr(value, _tell),
        help="Say more on stderr, with times; -vv says most.",
        rich_help_panel=OUTPUT,
    )
    yield typer.core.TyperOption(
        param_decls=["log_file", "--log-file"],
        type=str,
        metavar="FILE",
        envvar="STREAMCONV_LOG_FILE",
        show_envvar=True,
        expose_value=False,
        callback=lambda _ctx, _param, value: log.to_file(value),
        help="Append to this file what happens, with times, and what is printed on stderr.",
        rich_help_panel=OUTPUT,
    )
    # Read before the commands are: here, so that --help shows it.
    yield typer.core.TyperOption(
        param_decls=["debug", "--debug"],
        is_flag=True,
        default=False,
        expose_value=False,
        help="Show tracebacks.",
        rich_help_panel=OUTPUT,
    )


def _tell(text: str) -> None:
    tell(text, logged=False)  # the log file has it already


class Command(typer.core.TyperCommand):
    """A command whose help is grouped, with the options that all commands share."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.params += list(_shared_options())

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, then the options by group."""
        arguments, groups = [], dict[str, list[tuple[str, str]]]()
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            if param.param_type_name == "argument":
                arguments.append((record[0], record[1].replace("  [required]", "")))
            else:
                is_help = "--help" in param.opts
                group = OUTPUT if is_help else getattr(param, "rich_help_panel", None) or COMMON
                groups.setdefault(group, []).append((record[0], record[1].replace("  [x>=0]", "")))
        sections = [("Arguments", arguments)]
        sections += sorted(groups.items(), key=lambda item: _ORDER.index(item[0]))
        for title, rows in sections:
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows, col_max=26)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples as they are."""
        _write_lines(formatter, self.epilog)

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        """Write the usage without the braces that typer puts around what is required."""
        pieces = " ".join(self.collect_usage_pieces(ctx)).replace("{", "").replace("}", "")
        formatter.write_usage(ctx.command_path, pieces)


class Group(typer.core.TyperGroup):
    """The commands: what the main one most often needs, and the summary of each in full."""

    usage: ClassVar[tuple[str, ...]] = ()
    main_options: ClassVar[tuple[str, ...]] = ()

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        """Write the lines that people begin with."""
        if not self.usage:
            super().format_usage(ctx, formatter)
            return
        formatter.write("Usage: " + "\n       ".join(self.usage) + "\n")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options of the main command that matter most, the commands, and our own options."""
        convert = self.commands.get("convert")
        if convert is not None and self.main_options:
            records = {
                param.opts[0]: param.get_help_record(ctx)
                for param in convert.params
                if param.param_type_name == "option"
            }
            with formatter.section("Main options of a conversion (all: streamconv help convert)"):
                formatter.write_dl([records[name] for name in self.main_options])
        self.format_commands(ctx, formatter)
        own = [r for p in self.get_params(ctx) if (r := p.get_help_record(ctx)) is not None]
        with formatter.section("Options"):
            formatter.write_dl(own)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the whole summary of each command."""
        rows = [
            (name, (command.help or "").strip().split("\n\n")[0].replace("\n", " "))
            for name, command in self.commands.items()
            if not command.hidden
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples as they are."""
        _write_lines(formatter, self.epilog)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that is meant; for completion, ``convert`` where none is named."""
        if ctx.resilient_parsing and args and args[0] not in self.commands:
            default = self.commands.get("convert")
            if default is not None:
                return default.name, default, args
        return super().resolve_command(ctx, args)


def _write_lines(formatter: Any, text: str | None) -> None:
    if text:
        with formatter.section("Examples"):
            for line in text.splitlines():
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


def as_ours(error: Any) -> UsageError:
    """Return what typer's parser refused as an error of ours: all of them look alike, as JSON, too."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "streamconv"
    text = error.format_message().strip().rstrip(".")
    name = getattr(error, "option_name", None)
    near: Sequence[str] = getattr(error, "possibilities", None) or ()
    if name is not None:
        if not near and context is not None:
            known = [o for p in context.command.params for o in p.opts if o.startswith("--")]
            near = get_close_matches(name, known, 1)
        text = f"unknown option {name}"
    elif text.startswith("Got unexpected extra argument"):
        text = f"too many arguments: {text.rpartition('(')[2].rstrip(')')}"
    else:
        text = text[:1].lower() + text[1:]
    help_line = f"`{path} --help` says what there is"
    likely = f"did you mean {' or '.join(near)}? " if near else ""
    return UsageError(text, hint=f"{likely}{help_line}")
