"""Writing to the terminal: results to stdout, everything about the way there to stderr."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from typing import Any

from streamconv.errors import StreamconvError, shown

# What JSON leaves as it is, and a terminal does not; and what is no text.
_UNSEEN = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def say(text: str) -> None:
    """Write lines of the result to stdout."""
    sys.stdout.write(harmless(text) + "\n")


def tell(text: str) -> None:
    """Write lines about the way there to stderr."""
    sys.stderr.write(harmless(text) + "\n")
    sys.stderr.flush()


def harmless(text: str) -> str:
    """Return lines without what drives a terminal or is no text: names of files may hold both.

    A name goes through :func:`streamconv.errors.shown` before it becomes a part of a line.
    """
    return "\n".join(map(shown, text.split("\n")))


def say_json(data: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Write one JSON object to stdout, at once: somebody may be waiting for the line."""
    text = json.dumps(data, indent=indent, ensure_ascii=False)
    sys.stdout.write(_UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")
    sys.stdout.flush()


def render_error(error: StreamconvError) -> str:
    """Return an error as the lines that people see; the first begins with ``error:``."""
    return f"error: {error}"


def columns(rows: list[tuple[str, str]], *, indent: str = "") -> str:
    """Return two aligned columns; a value of several lines stays in its column."""
    width = max((len(label) for label, _ in rows), default=0)
    pad = "\n" + " " * (len(indent) + width + 2)
    return "\n".join(
        f"{indent}{label:<{width}}  {value.replace(chr(10), pad)}".rstrip() for label, value in rows
    )
