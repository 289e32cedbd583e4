"""Writing to the terminal: results to stdout, everything about the way there to stderr."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Protocol

from streamconv.cli import log
from streamconv.errors import StreamconvError, shown
from streamconv.options import is_routine

# What JSON leaves as it is, and a terminal does not; and what is not text.
_UNSEEN = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# 128 and the number of SIGINT or SIGTERM.
_SIGNALLED = (130, 143)


class Line(Protocol):
    """A line at the bottom of the terminal that is drawn again and again."""

    def clear(self) -> None:
        """Remove it, so that others can write there; it comes back by itself."""


class _Bottom:
    line: Line | None = None


# There is one terminal: whoever writes to it must know whether a line is to be removed first.
bottom = _Bottom()


def say(text: str) -> None:
    """Write lines of the result to stdout."""
    if bottom.line is not None:
        bottom.line.clear()
    sys.stdout.write(harmless(text) + "\n")


def tell(text: str, *, logged: bool = True) -> None:
    """Write lines about the way there to stderr, and to the log file where there is one."""
    if bottom.line is not None:
        bottom.line.clear()
    text = harmless(text)
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
    if logged:
        log.printed(text)


@contextmanager
def told_when_stopped(what: Callable[[], str]) -> Iterator[None]:
    """Tell ``what`` is kept, and how to go on, where a signal ends what is done here."""
    try:
        yield
    except SystemExit as end:
        if end.code in _SIGNALLED:
            tell(what())
        raise


def harmless(text: str) -> str:
    """Return lines without what drives a terminal or is not text: names of files may hold both.

    A name goes through :func:`streamconv.errors.shown` before it becomes a part of a line.
    """
    return "\n".join(map(shown, text.split("\n")))


def say_json(data: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Write one JSON object to stdout, at once: somebody may be waiting for the line.

    An event says when it was.
    """
    if "event" in data:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        data = {"event": data["event"], "time": now, **data}
    text = json.dumps(data, indent=indent, ensure_ascii=False)
    sys.stdout.write(_UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")
    sys.stdout.flush()


def render_error(error: StreamconvError) -> str:
    """Return an error as the lines that people see; the first begins with ``error:``."""
    return f"error: {error}"


def sorted_notices(notices: Iterable[str]) -> tuple[list[str], str]:
    """Return the notices that a user should read, and one line about those that come always."""
    told = [n for n in notices if not is_routine(n)]
    routine = {n.partition(":")[0] for n in notices if is_routine(n)}
    if not routine:
        return told, ""
    names = " and ".join(sorted(map(shown, routine)))
    return told, f"{names}: written for transformers 4, too (streamconv.json lists the changes)"


def columns(rows: list[tuple[str, str]], *, indent: str = "") -> str:
    """Return two aligned columns; a value of several lines stays in its column."""
    width = max((len(label) for label, _ in rows), default=0)
    pad = "\n" + " " * (len(indent) + width + 2)
    return "\n".join(
        f"{indent}{label:<{width}}  {value.replace(chr(10), pad)}".rstrip() for label, value in rows
    )
