"""All commands together: importing the modules declares them. :func:`run` runs one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import typer.main

from streamconv.cli import average as _average  # noqa: F401 - declares its commands
from streamconv.cli import batch as _batch  # noqa: F401 - declares its commands
from streamconv.cli import families as _families  # noqa: F401 - declares its commands
from streamconv.cli import parts as _parts  # noqa: F401 - declares its commands
from streamconv.cli.app import app
from streamconv.cli.command import ParseError, as_ours
from streamconv.cli.default import with_command
from streamconv.cli.output import tell

__all__ = ["app", "root", "run"]


def root() -> Any:
    """Return the tree of commands."""
    return typer.main.get_command(app)


def _name(command: Any) -> str:
    return str(command.name or typer.main.get_command_name(command.callback.__name__))


def _root_for(arguments: Sequence[str]) -> Any:
    """Return the tree of commands, or as much of it as is needed for the one that is named first.

    Making all of them takes as long as reading a plan. ``help`` tells of any.
    """
    named = [c for c in app.registered_commands if arguments[:1] == [_name(c)]]
    if not named or _name(named[0]) == "help":
        return root()
    one = copy.copy(app)
    one.registered_commands, one.registered_groups = named, []
    return typer.main.get_group(one)


def run(arguments: Sequence[str]) -> int:
    """Run the command that ``arguments`` ask for and return the exit code; raises what it raises."""
    top = _root_for(arguments)
    try:
        code = top.main(
            args=with_command(arguments, top.commands),
            prog_name="streamconv",
            standalone_mode=False,
        )
    except ParseError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # the list of commands is what to say then
            tell(str(error))
            return 2
        raise as_ours(error) from None
    return code if isinstance(code, int) else 0
