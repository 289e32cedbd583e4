"""``streamconv SRC DST`` means ``streamconv convert SRC DST``; options may come before the command."""

from __future__ import annotations

from collections.abc import Sequence

COMMANDS = frozenset(
    {"convert", "plan", "run", "verify", "inspect", "doctor", "batch", "status", "verl"}
)
# Options followed by a value: what must not be mistaken for the command. A test holds this against
# what the commands declare.
VALUE_OPTIONS = frozenset(
    {
        "--max-mem",
        "--max-shard-size",
        "--dtype",
        "--keep-dtype",
        "--layout",
        "--family",
        "--hf-config",
        "--config",
        "--strip-prefix",
        "--model",
        "--lora",
        "--base",
        "--lora-alpha",
        "--lora-rank",
        "--value-head",
        "--masters",
        "--hf-upload-path",
        "--hook-limit",
        "--checksum",
        "--io-threads",
        "--output",
        "--source",
        "--reference",
        "--prompt",
        "--token-ids",
        "--logits-atol",
        "--atol",
        "--rtol",
        "-o",
        "--jobs",
        "--every",
        "--steps",
        "--last",
        "--name",
        "--settle",
        "--watch",
        "--retries",
        "--keep-last",
        "--keep-every",
        "--on-done",
        "--on-error",
        "--prometheus",
        "--report",
    }
)
_ALONE = frozenset({"--help", "-h", "--version"})


def with_command(arguments: Sequence[str]) -> list[str]:
    """Return ``arguments`` with the command first; ``convert`` where none is named.

    >>> with_command(["--max-mem", "32GB", "SRC", "DST"])
    ['convert', '--max-mem', '32GB', 'SRC', 'DST']
    >>> with_command(["--json", "plan", "SRC"])
    ['plan', '--json', 'SRC']
    """
    args = list(arguments)
    position = _first_positional(args)
    if position is not None and args[position] in COMMANDS and args[:position][-1:] != ["--"]:
        return [args[position], *args[:position], *args[position + 1 :]]
    if position is None and (not args or _ALONE & set(args)):
        return args
    return ["convert", *args]


def _first_positional(args: Sequence[str]) -> int | None:
    i = 0
    while i < len(args):
        if args[i] == "--":
            return i + 1 if i + 1 < len(args) else None
        if not args[i].startswith("-") or args[i] == "-":
            return i
        i += 2 if args[i] in VALUE_OPTIONS else 1
    return None
