"""Single files that a command is asked to write: reports, plans, metrics, a batch's status.

What streamconv did not write stays as it is: such a file replaces nothing but a former one of its own
kind, which is recognized by how it begins, or an empty file. It appears whole: what is written has a
name of its own (``.streamconv-….part``) until it is complete.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from streamconv.errors import OutputExistsError, UsageError
from streamconv.files import newfile
from streamconv.files.filesystems import lies_in, real_path

# Staging folders, their locks, and what a batch keeps.
_WORKING = re.compile(r"\.(.*\.)?streamconv(\.lock|-batch)?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of file: what to call one, and the bytes that each of them begins with."""

    word: str
    mark: bytes


PAGE = Kind(
    "report",
    b'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    b'<meta name="generator" content="streamconv">\n',
)
PLAN = Kind("plan", b'{"streamconv_plan"')
METRICS = Kind("metrics", b"# HELP streamconv_checkpoints ")
LOG = Kind("log", b"# streamconv log\n")
STATUS = Kind("status", b'{\n "streamconv": "')


def checked(path: Path, kind: Kind, apart: Iterable[tuple[Path, str]] = ()) -> Path:
    """Return where the file that ``path`` names will lie, links followed.

    ``apart`` are folders, with what they are, that it must neither lie in nor take the place of.
    Raises :class:`UsageError` for a place where no such file can lie, :class:`OutputExistsError`
    where something else lies there.
    """
    place = real_path(path)
    if path.is_symlink() and not path.exists():
        raise UsageError(
            f"the {kind.word} would lie behind a link that leads nowhere",
            where=str(path),
            found=str(path.readlink()),
            hint="choose another path",
        )
    working = next((part for part in place.parts if _WORKING.fullmatch(part)), None)
    if working is not None:
        raise UsageError(
            f"the {kind.word} would lie among the working files of a conversion",
            where=str(path),
            found=working,
            hint="choose another path",
        )
    for folder, what in apart:
        inside = lies_in(place, folder)
        if inside or lies_in(folder, place):
            raise UsageError(
                f"the {kind.word} would lie in {what}"
                if inside
                else f"the {kind.word} would take the place of {what}",
                where=str(path),
                found=str(folder),
                hint="choose a path outside of it",
            )
    _refuse_foreign(place, kind)
    return place


def _refuse_foreign(place: Path, kind: Kind) -> None:
    try:
        # A pipe without a writer is opened at once; a link put here meanwhile is not followed.
        fd = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise OutputExistsError(
            f"what lies where the {kind.word} would go cannot be read: {error.strerror}",
            where=str(place),
            hint="choose another path",
        ) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(
                f"the {kind.word} would take the place of "
                + ("a folder" if stat.S_ISDIR(status.st_mode) else "a device, a pipe or a socket"),
                where=str(place),
                hint="choose another path",
            )
        begins = os.read(fd, len(kind.mark))
    finally:
        os.close(fd)
    if begins not in (b"", kind.mark):
        raise OutputExistsError(
            f"a file that is not a {kind.word} of streamconv lies where the {kind.word} would go",
            where=str(place),
            found=f"{status.st_size} bytes, not written by streamconv as a {kind.word}",
            hint="choose another path, or move that file away",
        )


@contextlib.contextmanager
def aside(place: Path, kind: Kind | None = None) -> Iterator[Path]:
    """Yield the path of a new, empty file beside ``place``, which takes its place at the end.

    After an exception it is removed. With a ``kind`` what lies at ``place`` is looked at again then.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f".streamconv-{secrets.token_hex(8)}.part")
    os.close(newfile.create(partial))
    try:
        yield partial
        if kind is not None:
            _refuse_foreign(place, kind)
        partial.replace(place)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


@contextlib.contextmanager
def written(place: Path, kind: Kind | None = None, *, errors: str = "strict") -> Iterator[TextIO]:
    """Yield a stream into a file that appears whole: whoever reads it sees the old or the new one."""
    with aside(place, kind) as partial, partial.open("w", encoding="utf-8", errors=errors) as out:
        yield out
