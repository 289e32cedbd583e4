"""Input that the system refuses to read: the same error from every command, and no open that hangs.

Where a file is read stands :func:`readable`; around a whole command stands :func:`reading`, for what
is met while folders are looked through. Only what the system refuses on account of the file is bad
input: a full disk, or too few descriptors or memory, says nothing about it.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from streamconv.errors import BadInputError, UsageError

# These are this machine's or this process's own.
_OURS = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.EPIPE,
        errno.ECHILD,
    }
)
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_HINTS = {
    errno.EACCES: "the user who runs this may not read it: see its owner and mode, and its folder's",
    errno.EPERM: "the user who runs this may not read it: see its owner and mode, and its folder's",
    errno.EIO: "the disk or the network failed: copy the file again from where it was made",
    errno.ELOOP: "links lead in a circle",
}


def cannot_read(error: OSError, path: Path | str) -> BadInputError:
    """Return what the system says of reading ``path`` as bad input."""
    made = BadInputError(
        f"cannot read {_shown(path)}: {error.strerror or error}",
        where=str(path),
        hint=_HINTS.get(error.errno or 0),
    )
    made.__cause__ = error
    return made


def _shown(path: Path | str) -> str:
    return Path(path).name or str(path)


StrPath = str | os.PathLike[str]
# An address begins with a scheme; of its slashes a Path keeps one. ./s3:/x is a path in any case.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def local_path(path: StrPath) -> Path:
    """Return ``path`` as a path of a file system; raises :class:`UsageError` for an address (``s3://``).

    Every path that a user gives goes through here: taken for a path, an address would become a folder
    of that name.
    """
    text = os.fspath(path)
    if _ADDRESS.match(text):
        scheme, _, rest = text.partition(":")
        raise UsageError(
            f"{scheme}:// is not supported: streamconv reads and writes files and folders",
            where=f"{scheme}://{rest.lstrip('/')}",
            hint="give the path alone"
            if scheme == "file"
            else "copy the checkpoint to a disk, or mount the store, and name that folder",
        )
    return Path(path)


@contextmanager
def readable(path: Path | str) -> Iterator[None]:
    """Raise what the system says of reading ``path`` as :class:`BadInputError`.

    ``FileNotFoundError`` is let pass: the caller knows whether the file has gone or never was there.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in _OURS:
            raise
        raise cannot_read(error, path) from error


def open_input(path: Path) -> int:
    """Open a regular file and return its descriptor; a pipe is not waited for.

    Raises :class:`BadInputError` for anything else, ``FileNotFoundError`` where there is nothing.
    """
    with readable(path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        check_regular(os.fstat(fd).st_mode, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def check_regular(mode: int, path: Path | str) -> None:
    """Raise :class:`BadInputError` for the mode of what is not a regular file."""
    if not stat.S_ISREG(mode):
        kind = next((words for test, words in _KINDS if test(mode)), "something else")
        raise BadInputError(
            f"{_shown(path)} is not a file", where=str(path), expected="a regular file", found=kind
        )


@contextmanager
def reading(*places: StrPath | None, but: StrPath | None = None) -> Iterator[None]:
    """Raise as :class:`BadInputError` what the system refuses at or below one of ``places``.

    ``but`` is where the output goes, which may lie among them.
    """
    try:
        yield
    except OSError as error:
        told = of_input(error, [Path(p) for p in places if p is not None], but)
        if told is None:
            raise
        raise told from error


def of_input(
    error: OSError, places: Iterable[Path], but: StrPath | None = None
) -> BadInputError | None:
    """Return an error of the system as bad input, where it is about what lies in one of ``places``."""
    name = error.filename
    if error.errno in _OURS or not isinstance(name, str | bytes) or error.filename2 is not None:
        return None
    path = Path(os.fsdecode(name))
    if but is not None:
        output = Path(but)
        # What is staged lies beside it, under a name made of its own.
        beside = any(s.name.startswith(f".{output.name}.") for s in (path, *path.parents))
        if beside or _within(path, output):
            return None
    return cannot_read(error, path) if any(_within(path, place) for place in places) else None


def _within(path: Path, place: Path) -> bool:
    """Whether ``path`` is ``place`` or lies in it, as they are written or where they lead."""
    paths = {path.absolute(), Path(os.path.realpath(path))}
    starts = {place.absolute(), Path(os.path.realpath(place))}
    return any(p.is_relative_to(s) for p in paths for s in starts)
