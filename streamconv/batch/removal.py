"""Removes a folder, but nothing in it that was not listed before.

The folder is renamed to a hidden one first, so that no reader ever sees a part of it under its name;
looked at once more; and then its files go, one by one, if they are still those of the list. A note says
what is under way: who is killed meanwhile has the next batch put the folder back, or finish. It knows
the folder by its files, also where that was moved meanwhile.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamconv.batch.walk import walk
from streamconv.errors import StreamconvError
from streamconv.files.durable import fsync_directory
from streamconv.files.jsonfile import COUNT, TEXT, Leaf, mismatches, read_json
from streamconv.storage.address import Address

_ASIDE = ".streamconv-deleted"
_MAX_NOTE_BYTES = 256 << 20
_WHOLE = Leaf("a whole number", lambda v: type(v) is int)

Mark = tuple[int, int, int]
"""Bytes, time of change, inode: another file of the same name has another one."""


def listing(folder: Path) -> dict[str, Mark]:
    """Return every file and link below a folder, with its mark; raises ``OSError``."""
    return {entry.name: _mark(entry.status) for entry in walk(folder) if not entry.is_folder}


def _mark(status: os.stat_result) -> Mark:
    return status.st_size, status.st_mtime_ns, status.st_ino


def aside_of(path: Path) -> Path:
    """Return where a folder is put aside: beside its place, so that a rename will do."""
    return path.with_name(f".{path.name}{_ASIDE}")


def place_of(aside: Path) -> Path:
    """Return the place of a folder that was put aside: where :func:`aside_of` found it."""
    return aside.with_name(aside.name.removeprefix(".").removesuffix(_ASIDE))


def is_aside(name: str) -> bool:
    """Whether a folder of this name was put aside."""
    return name.startswith(".") and name.endswith(_ASIDE)


def put_aside(aside: Path) -> str:
    """Return what to tell of a folder that was put aside, and that nobody takes care of."""
    return (
        f"{aside}: put aside by a removal that did not end: where none is at work, delete it or, if "
        f"all is in it, call it {place_of(aside).name} again"
    )


def asides_below(folder: Path) -> Iterator[Path]:
    """Yield the folders in a tree that were put aside; those that cannot be looked into hold none."""
    if isinstance(folder, Address):
        return
    for where, below, _ in os.walk(folder):
        yield from (Path(where, name) for name in below if is_aside(name))
        below[:] = sorted(name for name in below if not is_aside(name))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a removal: ``refused`` says why nothing was removed, ``left`` what stayed.

    ``partly``: something was removed before the system refused the rest.
    """

    refused: str = ""
    left: tuple[str, ...] = ()
    partly: bool = False


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
    closed = _closed_folder(path)
    if closed is not None:
        return Outcome(f"nothing can be deleted in {closed}: it is not writable")
    _write_note(note, path, listed)
    try:
        path.rename(aside)
    except OSError:
        note.unlink(missing_ok=True)
        raise
    if listing(aside) != listed:
        if not os.path.lexists(path):
            aside.rename(path)
        note.unlink(missing_ok=True)
        where = f"; what was there is in {aside}" if aside.exists() else ""
        return Outcome(f"it changed meanwhile{where}")
    return _finish(path, listed, note)


def _closed_folder(path: Path) -> Path | None:
    """Return a folder in which nothing can be deleted: better to know before the first file goes."""
    own = os.access in os.supports_effective_ids
    folders = [path.parent, path, *(Path(e.path) for e in walk(path) if e.is_folder)]
    mode = os.W_OK | os.X_OK
    return next((f for f in folders if not os.access(f, mode, effective_ids=own)), None)


def _finish(path: Path, listed: Mapping[str, Mark], note: Path) -> Outcome:
    """Delete what is listed of a folder that was put aside, and give back the place of the rest.

    Where the system refuses the first file, all is put back, and ``OSError`` raised.
    """
    aside = aside_of(path)
    try:
        _delete(aside, listed)
    except OSError as error:
        if listing(aside) == listed and not os.path.lexists(path):
            aside.rename(path)
            note.unlink(missing_ok=True)
            raise
        return Outcome(f"removed in part: {error.strerror}: {error.filename}", partly=True)
    left: tuple[str, ...] = ()
    if aside.is_dir():
        if not os.path.lexists(path):
            aside.rename(path)
        place = path if path.exists() and not aside.exists() else aside
        left = tuple(str(place / name) for name in sorted(listing(place)))
    note.unlink(missing_ok=True)
    return Outcome(left=left)


def _delete(aside: Path, listed: Mapping[str, Mark]) -> None:
    for name, mark in listed.items():
        file = aside / name
        with suppress(FileNotFoundError):
            if _mark(file.lstat()) == mark:
                file.unlink()
    for folder, _, _ in os.walk(aside, topdown=False):
        with suppress(OSError):  # not empty
            Path(folder).rmdir()


def _write_note(note: Path, path: Path, listed: Mapping[str, Mark]) -> None:
    note.parent.mkdir(parents=True, exist_ok=True)
    # As JSON escapes: names of files may be any bytes.
    text = json.dumps({"path": str(path), "files": {k: list(v) for k, v in listed.items()}})
    partial = note.with_name(f".{note.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="ascii") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(note)
    finally:
        partial.unlink(missing_ok=True)
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


def is_remainder(aside: Path, listed: Mapping[str, Mark]) -> bool:
    """Whether a folder that was put aside holds files that are ``listed``, wherever it lies by now."""
    try:
        return any(listed.get(name) == mark for name, mark in listing(aside).items())
    except OSError:
        return False


def resume(note: Path, path: Path, why_not: str) -> Outcome | None:
    """Settle the removal of ``path`` that was stopped: put it back where all is there, else finish.

    ``why_not`` is why what was removed in part must stay. Returns None where nothing had been removed.
    """
    found = noted(note)
    aside = aside_of(path)
    if found is None or aside.is_symlink() or not aside.is_dir():
        note.unlink(missing_ok=True)
        return None
    listed, there = found[1], listing(aside)
    if _without_inodes(there) == _without_inodes(listed) and not os.path.lexists(path):
        aside.rename(path)
        note.unlink(missing_ok=True)
        return None
    if there and not is_remainder(aside, listed):
        return Outcome(
            "what is left of it was copied or changed since: nobody but you can delete it"
        )
    return Outcome(why_not) if why_not else _finish(path, listed, note)


def _without_inodes(listed: Mapping[str, Mark]) -> dict[str, tuple[int, int]]:
    """Return files as a copy of them looks, too."""
    return {name: (nbytes, mtime) for name, (nbytes, mtime, _) in listed.items()}
