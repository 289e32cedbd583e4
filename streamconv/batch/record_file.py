"""The files that records lie in: whoever damages one costs a batch that record, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

from streamconv.errors import StreamconvError
from streamconv.files.jsonfile import COUNT, FLAG, TEXT, Leaf, mismatches, read_json

# Goes up when an older release would misunderstand what a record says.
SCHEMA = 1
_MOST_BYTES = 16 << 20
_MOST_SECONDS = 6e10  # in the year 3871: what calendars can show


class NewerRecordError(Exception):
    """A later release wrote this record: it knows what it means, and we do not."""


def _is_name(value: Any) -> bool:
    try:
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def _is_number(most: float) -> Callable[[Any], bool]:
    return lambda v: type(v) in (int, float) and abs(v) <= most


_NAME = Leaf("a name", _is_name)
_TIME = Leaf("a time", _is_number(_MOST_SECONDS))
_NUMBER = Leaf("a number", _is_number(1e18))
_WHOLE = Leaf("a whole number", lambda v: type(v) is int and abs(v) < 1 << 63)
_ERROR: dict[str, Any] = {
    **{f"{key}?": TEXT.or_null() for key in ("kind", "what", "where", "expected", "found", "hint")},
    **{f"{key}?": COUNT.or_null() for key in ("exit_code", "errno")},
}
_ERROR_OR_NULL = Leaf("an error or null", lambda v: v is None or not any(mismatches(v, _ERROR)))


def shape_of(kind: type[Any], states: Collection[str]) -> dict[str, Any]:
    """Return what each field of a record must be, by its name and its type as it is declared."""
    by_type = {
        "str": _NAME,
        "int": COUNT,
        "int | None": COUNT.or_null(),
        "float": _NUMBER,
        "float | None": _NUMBER.or_null(),
        "bool | None": FLAG.or_null(),
        "State": Leaf("a state", lambda v: isinstance(v, str) and v in states),
        "list[str]": [TEXT],
        "list[list[Any]]": [(_NAME, COUNT, _WHOLE)],
        "dict[str, float]": {str: _NUMBER},
        "dict[str, Any] | None": _ERROR_OR_NULL,
    }
    by_name = {"reason": TEXT}
    by_name |= dict.fromkeys(("started_at", "finished_at"), _TIME.or_null())
    return {
        f"{field.name}?": by_name.get(field.name, by_type[str(field.type)])
        for field in fields(kind)
    } | {"name": _NAME}


def read_record_file(path: Path, shape: Any) -> dict[str, Any] | None:
    """Return what a record says; None where there is none, or what lies there is not one.

    Raises :class:`NewerRecordError` where a later release wrote it.
    """
    try:
        data = read_json(path, most_bytes=_MOST_BYTES)
    except (StreamconvError, OSError):
        return None
    if not isinstance(data, dict):
        return None
    schema = data.get("schema", 0)
    if type(schema) is int and schema > SCHEMA:
        raise NewerRecordError
    return None if any(mismatches(data, shape)) else data
