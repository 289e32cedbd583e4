"""Writing to the terminal: results to stdout, everything about the way there to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from streamconv.errors import StreamconvError


def say(text: str) -> None:
    """Write a line of the result to stdout."""
    sys.stdout.write(text + "\n")


def tell(text: str) -> None:
    """Write a line about the way there to stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def say_json(data: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Write one JSON object to stdout, at once: somebody may be waiting for the line."""
    sys.stdout.write(json.dumps(data, indent=indent, ensure_ascii=False) + "\n")
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
