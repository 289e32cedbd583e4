"""Writing to the terminal: results to stdout, everything about the way there to stderr."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from typing import Any

from streamconv.errors import StreamconvError

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def say(text: str) -> None:
    """Write lines of the result to stdout."""
    sys.stdout.write(harmless(text) + "\n")


def tell(text: str) -> None:
    """Write lines about the way there to stderr."""
    sys.stderr.write(harmless(text) + "\n")
    sys.stderr.flush()


def harmless(text: str) -> str:
    """Return ``text`` without what drives a terminal or is no text: names of files may hold both.

    >>> print(harmless("a\\x1b[31mb"))
    a\\x1b[31mb
    """
    return _encodable(_CONTROLS.sub(lambda found: repr(found[0])[1:-1], text))


def _encodable(text: str) -> str:
    """Return ``text`` with escapes for the bytes of a file's name that are no text."""
    return text.encode(errors="backslashreplace").decode()


def one_line(text: str) -> str:
    """Return a name as one line, however odd."""
    return harmless(text.replace("\n", "\\n"))


def say_json(data: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Write one JSON object to stdout, at once: somebody may be waiting for the line."""
    sys.stdout.write(_encodable(json.dumps(data, indent=indent, ensure_ascii=False)) + "\n")
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
