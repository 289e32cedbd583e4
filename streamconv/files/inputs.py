"""Input that the system refuses to read: the same error from every command, and no open that hangs.

Where a file is read stands :func:`readable`; around a whole command stands :func:`reading`, for what
is met while folders are looked through. Only what the system refuses on account of the file is bad
input: a full disk, or too few descriptors or memory, says nothing about it.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from streamconv.errors import BadInputError, UsageError
from streamconv.storage.address import Address, ObjectStream, StrPath, place

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


def local_path(path: StrPath) -> Path:
    """Return ``path`` as a path of a file system; raises :class:`UsageError` for an address (``s3://``).

    Every path that a user gives goes through here, or through :func:`place` where an address will do:
    taken for a path, an address would become a folder of that name.
    """
    found = place(path)
    if isinstance(found, Address):
        raise UsageError(
            f"{found.scheme}:// is not supported here: only checkpoints and outputs may lie in a store",
            where=str(found),
            hint="give a path of this machine",
        )
    return found


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


class LocalFile:
    """An open file of a file system, by its descriptor."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self.name = name

    @property
    def status(self) -> os.stat_result:
        """Return what the system says of it now."""
        return os.fstat(self._fd)

    def pread(self, nbytes: int, offset: int) -> bytes:
        """Return bytes from ``offset`` on, fewer where the file ends or the system gives no more."""
        with readable(self.name):
            return os.pread(self._fd, nbytes, offset)

    def stream(self) -> io.RawIOBase:
        """Return a stream of its bytes, from the first one."""
        return io.FileIO(os.dup(self._fd), "rb")

    def close(self) -> None:
        """Close it."""
        os.close(self._fd)


class RemoteFile:
    """An object of a store: a :class:`LocalFile` in all that is asked of one."""

    def __init__(self, path: Address) -> None:
        check_regular(path.stat().st_mode, path)
        self._object = path.bucket.stat(path.key)
        self.name = str(path)

    @property
    def status(self) -> os.stat_result:
        """Return what the store says of it."""
        return self._object.status

    def pread(self, nbytes: int, offset: int) -> bytes:
        """Return bytes from ``offset`` on, fewer where the object ends."""
        return self._object.read(offset, nbytes)

    def stream(self) -> io.RawIOBase:
        """Return a stream of its bytes, from the first one."""
        return ObjectStream(self._object)

    def close(self) -> None:
        """Do nothing: nothing is open."""


InputFile = LocalFile | RemoteFile


@contextmanager
def opened(path: Path) -> Iterator[InputFile]:
    """Yield a regular file or an object, to be read at any place; it closes at the end.

    Raises :class:`BadInputError` for anything else, and where there is nothing.
    """
    try:
        file: InputFile = (
            RemoteFile(path)
            if isinstance(path, Address)
            else LocalFile(open_input(path), str(path))
        )
    except OSError as error:
        if error.errno in _OURS:
            raise
        raise cannot_read(error, path) from error
    try:
        yield file
    finally:
        file.close()


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
        told = of_input(error, [place(p) for p in places if p is not None], but)
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
    if but is not None and not isinstance(but, Address):
        output = Path(but)
        # What is staged lies beside it, under a name made of its own.
        beside = any(s.name.startswith(f".{output.name}.") for s in (path, *path.parents))
        if beside or _within(path, output):
            return None
    return cannot_read(error, path) if any(_within(path, place) for place in places) else None


def _within(path: Path, place: Path) -> bool:
    """Whether ``path`` is ``place`` or lies in it, as they are written or where they lead."""
    if isinstance(place, Address):
        return False
    paths = {path.absolute(), Path(os.path.realpath(path))}
    starts = {place.absolute(), Path(os.path.realpath(place))}
    return any(p.is_relative_to(s) for p in paths for s in starts)
