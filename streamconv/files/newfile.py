"""Files of our own where a stranger may have put others: made anew, never written through a link."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PRIVATE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


def create(path: Path, mode: int = 0o666) -> int:
    """Make a file that was not there, and return its descriptor, for reading and writing.

    Raises ``FileExistsError`` for whatever is there, links to nowhere among it.
    """
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _PRIVATE, mode)


def reopen(path: Path, flags: int = os.O_RDONLY) -> int | None:
    """Return a descriptor of a regular file that has this name alone; None where it is anything else.

    A second name may be anybody's file, and what is written here would be written there.
    """
    try:
        fd = os.open(path, flags | _PRIVATE)
    except OSError:
        return None
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
        return fd
    os.close(fd)
    return None


def is_own(status: os.stat_result, others: int) -> bool:
    """Whether a file or folder is this user's, and nobody else has one of the rights ``others``."""
    return status.st_uid == os.geteuid() and not stat.S_IMODE(status.st_mode) & others


def read_own(path: Path, most_bytes: int, others: int) -> bytes | None:
    """Return what is in a file of at most ``most_bytes``; None unless :func:`is_own` holds of it."""
    fd = reopen(path)
    if fd is None:
        return None
    try:
        status = os.fstat(fd)
        if not is_own(status, others) or status.st_size > most_bytes:
            return None
        with os.fdopen(fd, "rb", closefd=False) as stream:
            return stream.read()
    except OSError:
        return None
    finally:
        os.close(fd)


def partial_name(path: Path) -> Path:
    """Return a name beside ``path`` that no other process takes, for what will be ``path``."""
    return path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")


@contextmanager
def replacing(path: Path) -> Iterator[int]:
    """Yield a file to write; it becomes ``path`` at the end, and is removed where that fails."""
    partial = partial_name(path)
    fd = create(partial)
    try:
        yield fd
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    finally:
        os.close(fd)
