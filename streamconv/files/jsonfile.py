"""JSON that a stranger wrote: read within bounds, and held against the shape that it must have.

A shape is plain data, and mirrors what it describes: a dict of shapes is an object with these keys
(one that ends in ``?`` may be missing), ``{str: shape}`` an object with any, ``[shape]`` an array of
any length, a tuple of shapes an array of that length, and a leaf is a :class:`Leaf`. Keys that a shape
does not speak of are let be: a later release may have written them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamconv.errors import BadInputError, UnsafeInputError
from streamconv.files.inputs import cannot_read, check_regular, readable
from streamconv.files.memory_limit import too_much

_SHOWN = 80


@dataclass(frozen=True, slots=True)
class Leaf:
    """A value that is not a container: what it must be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]

    def or_null(self) -> Leaf:
        """Return the same, or null."""
        return Leaf(f"{self.words} or null", lambda v: v is None or self.holds(v))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


TEXT = Leaf("a string", lambda v: isinstance(v, str))
COUNT = Leaf("a count", _is_count)
NUMBER = Leaf(
    "a number",
    lambda v: math.isfinite(v) if type(v) is float else type(v) is int and abs(v) < 1 << 63,
)
FLAG = Leaf("true or false", lambda v: isinstance(v, bool))


def read_json(
    path: Path,
    *,
    most_bytes: int,
    make: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """Return what a file says; ``make`` makes an object of its pairs of names and values.

    Raises :class:`UnsafeInputError` for more than ``most_bytes``, :class:`BadInputError` for what is no
    JSON, nests too deep, or is not a file at all, and where ``make`` raises ``ValueError``.
    """
    try:
        with readable(path):
            status = path.stat()
    except FileNotFoundError as error:
        raise cannot_read(error, path) from error
    check_regular(status.st_mode, path)  # opening a pipe would wait for a writer
    size = status.st_size
    if size > most_bytes:
        raise UnsafeInputError(
            f"{path.name} is too large",
            where=str(path),
            expected=f"at most {most_bytes} bytes",
            found=f"{size} bytes",
        )
    try:
        with readable(path):
            text = path.read_text(encoding="utf-8")
        return json.loads(text, object_pairs_hook=make)
    except MemoryError:
        raise too_much(str(path), size) from None
    except (ValueError, RecursionError) as error:
        raise BadInputError(
            f"{path.name} is not valid JSON", where=str(path), found=str(error)[:200]
        ) from error


def object_or_empty(path: Path, *, most_bytes: int) -> dict[str, Any]:
    """Return the object in a file that need not be there; an empty one where it cannot be had."""
    try:
        found = read_json(path, most_bytes=most_bytes)
    except (BadInputError, UnsafeInputError, OSError):
        return {}
    return found if isinstance(found, dict) else {}


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its pairs; raises ``ValueError`` where two readers could see two of them."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def mismatches(value: Any, shape: Any, at: str = "the whole") -> Iterator[str]:
    """Yield where ``value`` has not the shape, and what it has there."""
    if isinstance(shape, Leaf):
        if not shape.holds(value):
            yield f"{at}: {_short(value)} is not {shape.words}"
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            yield f"{at}: {_short(value)} is not an object"
        elif str in shape:
            for key, item in value.items():
                yield from mismatches(item, shape[str], f"{at}[{_short(key)}]")
        else:
            for key, inner in shape.items():
                name = key.removesuffix("?")
                where = name if at == "the whole" else f"{at}.{name}"
                if name in value:
                    yield from mismatches(value[name], inner, where)
                elif name == key:
                    yield f"{where}: missing"
    elif not isinstance(value, list):
        yield f"{at}: {_short(value)} is not an array"
    elif isinstance(shape, tuple) and len(value) != len(shape):
        yield f"{at}: an array of {len(value)}, not of {len(shape)}"
    else:
        inners = shape if isinstance(shape, tuple) else shape * len(value)
        for k, (item, inner) in enumerate(zip(value, inners, strict=True)):
            yield from mismatches(item, inner, f"{at}[{k}]")


def _short(value: Any) -> str:
    """Return a value as it is told; a container is told by its kind, however large or deep it is."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    if type(value) is int and abs(value) >= 1 << 63:
        return "a huge number"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
