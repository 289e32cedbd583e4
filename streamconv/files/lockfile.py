"""Locks on a path that last as long as anything of the job lives.

``flock`` belongs to an open file and not to a process: the descriptor is handed to the child
processes, so that one that outlives a killed parent keeps the lock until it has ended, too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from streamconv.errors import LockedError, OutputExistsError

# The children of a killed process die with it, but not in the same instant.
_ORPHAN_SECONDS = 5.0
_POLL_SECONDS = 0.02
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def locked_file(path: Path, what: Path, *, wait_seconds: float | None = None) -> Iterator[int]:
    """Hold the lock ``path`` of ``what``; yield the descriptor that a child process inherits.

    Raises :class:`LockedError` where another process has it: at once, or after ``wait_seconds`` where
    that one is dead and a process that it had started lives on. The file is removed in the end.
    """
    fd = _acquire(path, what, _ORPHAN_SECONDS if wait_seconds is None else wait_seconds)
    try:
        yield fd
    finally:
        # Removed while it is still held: whoever waits for it notices that the path has changed.
        _remove(fd, path)


def _acquire(path: Path, what: Path, wait_seconds: float) -> int:
    deadline = time.monotonic() + wait_seconds
    while True:
        fd = _open(path)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(fd)
            if error.errno in _NO_LOCKS:
                _remove(fd, path)
                return _without_file_locks(what)
            os.close(fd)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            if holder or time.monotonic() > deadline:
                raise _locked(what, holder, None if holder else _orphan(path)) from error
            time.sleep(_POLL_SECONDS)
            continue
        if _same_file(fd, path):
            return fd
        os.close(fd)  # it was removed between the two calls, by whoever had held it


def _open(path: Path) -> int:
    """Open the lock file, whatever a stranger put there: never through a link, never waiting."""
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
        except PermissionError:
            if not os.path.lexists(path):
                raise
            fd = os.open(path, os.O_RDONLY | flags)  # somebody else's: that is enough to lock it
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _no_lock_file(path) from error
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise _no_lock_file(path)
    return fd


def _no_lock_file(path: Path) -> OutputExistsError:
    return OutputExistsError(
        "something else lies where the lock of this output goes",
        where=str(path),
        expected="no file, or the empty one of an earlier run",
        found="a link" if path.is_symlink() else "a folder, a pipe or a device",
        hint="move it away, or choose another output folder",
    )


def _locked(what: Path, holder: int | None = None, orphan: int | None = None) -> LockedError:
    found = f"process {holder}" if holder else None
    hint = "wait for it to end, or choose another folder"
    if orphan:
        found = (
            f"process {orphan}, which a run that was killed had started, and which has not ended"
        )
        hint = f"wait for it to end, or end it: kill -9 {orphan}"
    return LockedError(
        "another process is writing this output", where=str(what), found=found, hint=hint
    )


def _orphan(path: Path) -> int | None:
    """Return a process of this machine that has inherited the lock, where it can be seen."""
    for opened in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            pid = int(opened.parts[2])
            if pid != os.getpid() and str(opened.readlink()) == str(path):
                return pid
    return None


def _same_file(fd: int, path: Path) -> bool:
    try:
        there = path.lstat()
    except FileNotFoundError:
        return False
    held = os.fstat(fd)
    return (held.st_dev, held.st_ino) == (there.st_dev, there.st_ino)


def _remove(fd: int, path: Path) -> None:
    """Close the lock and remove its file: one that is not empty is not ours, and stays."""
    status = os.fstat(fd)
    with contextlib.suppress(OSError):
        if stat.S_ISREG(status.st_mode) and status.st_size == 0 and _same_file(fd, path):
            path.unlink()
    os.close(fd)


def _holder(fd: int) -> int | None:
    """Return the process that took the lock, where it can be seen and lives.

    The kernel names the one that took it, not the children that have inherited it.
    """
    inode = os.fstat(fd).st_ino
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        fields = line.split()
        if len(fields) > 5 and fields[5].rpartition(":")[2] == str(inode):
            pid = int(fields[4])
            if pid > 0 and _lives(pid):
                return pid
    return None


def _lives(pid: int) -> bool:
    try:
        # What follows the name, which may hold anything, in parentheses.
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in ("Z", "X")


def _without_file_locks(what: Path) -> int:
    """Lock by a name that this machine's kernel keeps, where the file system has no locks.

    It keeps apart the runs on this machine, which is as much as can be had there.
    """
    name = b"\0streamconv/" + xxhash.xxh3_128_hexdigest(os.fsencode(what)).encode()
    deadline = time.monotonic() + _ORPHAN_SECONDS
    held = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    while True:
        try:
            held.bind(name)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                held.close()
                raise _locked(what) from error
            time.sleep(_POLL_SECONDS)
            continue
        return held.detach()
