"""Removes a folder, but nothing in it that was not listed before.

The folder is renamed to a hidden one first, so that no reader ever sees a part of it under its name;
looked at once more; and then its files go, one by one, if they are still those of the list. A note says
what is under way: who is killed meanwhile has the next batch put the folder back, or finish.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamconv.errors import StreamconvError
from streamconv.files.durable import fsync_directory
from streamconv.files.jsonfile import COUNT, TEXT, Leaf, mismatches, read_json

_ASIDE = ".streamconv-deleted"
_MAX_NOTE_BYTES = 256 << 20
_WHOLE = Leaf("a whole number", lambda v: type(v) is int)

Mark = tuple[int, int, int]
"""Bytes, time of change, inode: another file of the same name has another one."""


def listing(folder: Path) -> dict[str, Mark]:
    """Return every file and link below a folder, with its mark; raises ``OSError``."""
    found: dict[str, Mark] = {}
    pending = [str(folder)]
    prefix = len(str(folder)) + 1
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                else:
                    found[entry.path[prefix:]] = _mark(entry.stat(follow_symlinks=False))
    return found


def _mark(status: os.stat_result) -> Mark:
    return status.st_size, status.st_mtime_ns, status.st_ino


def aside_of(path: Path) -> Path:
    """Return where a folder is put aside: beside its place, so that a rename will do."""
    return path.with_name(f".{path.name}{_ASIDE}")


def is_aside(name: str) -> bool:
    """Whether a folder of this name was put aside."""
    return name.startswith(".") and name.endswith(_ASIDE)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a removal: ``refused`` says why nothing was removed, ``left`` what stayed."""

    refused: str = ""
    left: tuple[str, ...] = ()


def remove(
    path: Path, listed: Mapping[str, Mark], note: Path, *, recheck: Callable[[], str] = lambda: ""
) -> Outcome:
    """Remove the files that are ``listed`` and the folders that this leaves empty.

    ``recheck`` is asked last, directly before the rename, and returns why not. ``note`` is where the
    next batch finds what was under way. Raises ``OSError`` where the system refuses.
    """
    aside = aside_of(path)
    refused = recheck()
    if refused:
        return Outcome(refused)
    if os.path.lexists(aside):
        return Outcome(f"{aside} is in the way")
    if listing(path) != listed:
        return Outcome("it changed meanwhile")
    _write_note(note, path, listed)
    path.rename(aside)
    if listing(aside) != listed:
        if not os.path.lexists(path):
            aside.rename(path)
        note.unlink(missing_ok=True)
        where = f"; what was there is in {aside}" if aside.exists() else ""
        return Outcome(f"it changed meanwhile{where}")
    return _finish(path, listed, note)


def _finish(path: Path, listed: Mapping[str, Mark], note: Path) -> Outcome:
    """Delete what is listed of a folder that was put aside, and give back the place of the rest."""
    aside = aside_of(path)
    for name, mark in listed.items():
        file = aside / name
        with suppress(FileNotFoundError):
            if _mark(file.lstat()) == mark:
                file.unlink()
    for folder, _, _ in os.walk(aside, topdown=False):
        with suppress(OSError):  # not empty
            Path(folder).rmdir()
    left: tuple[str, ...] = ()
    if aside.is_dir():
        if not os.path.lexists(path):
            aside.rename(path)
        place = path if path.exists() and not aside.exists() else aside
        left = tuple(str(place / name) for name in sorted(listing(place)))
    note.unlink(missing_ok=True)
    return Outcome(left=left)


def _write_note(note: Path, path: Path, listed: Mapping[str, Mark]) -> None:
    note.parent.mkdir(parents=True, exist_ok=True)
    # As JSON escapes: names of files may be any bytes.
    text = json.dumps({"path": str(path), "files": {k: list(v) for k, v in listed.items()}})
    partial = note.with_name(f".{note.name}.{os.getpid()}")
    with partial.open("w", encoding="ascii") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(note)
    fsync_directory(note.parent)


_NOTE: dict[str, Any] = {"path": TEXT, "files": {str: (COUNT, _WHOLE, COUNT)}}


def noted(note: Path) -> tuple[Path, dict[str, Mark]] | None:
    """Return what a note says is under way: the folder, and its files; None for none of ours."""
    try:
        data = read_json(note, most_bytes=_MAX_NOTE_BYTES)
    except (StreamconvError, OSError):
        return None
    if any(mismatches(data, _NOTE)):
        return None
    return Path(data["path"]), {name: tuple(mark) for name, mark in data["files"].items()}


def resume(note: Path, path: Path, why_not: str) -> Outcome | None:
    """Settle the removal of ``path`` that was stopped: put it back where all is there, else finish.

    ``why_not`` is why what was removed in part must stay. Returns None where nothing had been removed.
    """
    found = noted(note)
    aside = aside_of(path)
    if found is None or found[0] != path or aside.is_symlink() or not aside.is_dir():
        note.unlink(missing_ok=True)
        return None
    if listing(aside) == found[1] and not os.path.lexists(path):
        aside.rename(path)
        note.unlink(missing_ok=True)
        return None
    return Outcome(why_not) if why_not else _finish(path, found[1], note)
