"""``streamconv SRC DST`` means ``streamconv convert SRC DST``; options may come before the command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from streamconv.errors import UsageError

_ALONE = frozenset({"--help", "-h", "--version", "-V", "--install-completion", "--show-completion"})
# Words that people try, as other tools have them.
_OTHERS = {"merge": "verl merge", "compare": "diff", "check": "verify", "info": "inspect"}


def value_options(commands: Mapping[str, Any]) -> frozenset[str]:
    """Return the options that a value follows: it must not be mistaken for the command."""
    return frozenset(
        name
        for command in commands.values()
        for option in command.params
        if option.param_type_name == "option" and not option.is_flag and not option.count
        for name in option.opts
    )


def with_command(arguments: Sequence[str], commands: Mapping[str, Any]) -> list[str]:
    """Return ``arguments`` with the command first; ``convert`` where none of ``commands`` is named.

    Raises :class:`UsageError` where the first word is nearly a command, and not a file.
    """
    args = list(arguments)
    position = _first_positional(args, value_options(commands))
    if position is not None and args[position] == "help":
        return [*args[:position], *args[position + 1 :], "--help"]
    if position is not None and args[position] in commands and args[:position][-1:] != ["--"]:
        return [args[position], *args[:position], *args[position + 1 :]]
    if position is None and (not args or _ALONE & set(args)):
        return args
    if position is not None and args[:position][-1:] != ["--"]:
        _refuse_mistyped(args[position], commands)
    return ["convert", *args]


def _refuse_mistyped(word: str, commands: Mapping[str, Any]) -> None:
    if not word.isidentifier() and not word.replace("-", "").isalpha():
        return  # a path
    near = get_close_matches(word, commands, 1, cutoff=0.75)
    meant = near[0] if near else _OTHERS.get(word)
    if meant is not None and not Path(word).exists():
        raise UsageError(
            f"there is neither a command {word!r} nor a checkpoint of that name",
            hint=f"did you mean `streamconv {meant}`? `streamconv help` lists the commands",
        )


def _first_positional(args: Sequence[str], takes_value: AbstractSet[str]) -> int | None:
    i = 0
    while i < len(args):
        if args[i] == "--":
            return i + 1 if i + 1 < len(args) else None
        if not args[i].startswith("-") or args[i] == "-":
            return i
        i += 2 if args[i] in takes_value else 1
    return None
