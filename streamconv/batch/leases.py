"""Leases: a file that is locked for as long as its holder lives, whatever becomes of it.

The kernel gives the lock back when the last process that has the file open ends. So it tells who lives
across PID namespaces and containers, where a host's name and a process's number tell nothing. What
the holder starts may have the file open as well, and then holds it, too.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Literal

_UNSUPPORTED = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
# What open says of what lies where a file should, and is a folder, a link or a socket.
NO_FILE = frozenset({errno.EISDIR, errno.ELOOP, errno.ENXIO})

Life = Literal["held", "free", "unknown"]


def boot_clock() -> tuple[str, float]:
    """Return which running kernel this is, and its seconds: nobody sets that clock.

    Seconds of two kernels say nothing about one another.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return boot, time.clock_gettime(time.CLOCK_BOOTTIME)
    except (OSError, AttributeError):  # not Linux
        return os.uname().nodename, time.monotonic()


class Lease:
    """A lease that is held; given back by :meth:`release`, or when nobody refers to it any more.

    ``locked`` is False where the file system knows no locks; then only :meth:`beat` shows life.
    """

    def __init__(self, path: Path, fd: int, *, locked: bool) -> None:
        self.path = path
        self.fd = fd
        self.locked = locked
        self._close = weakref.finalize(self, os.close, fd)

    def say(self, text: str) -> None:
        """Write what others are to read of the holder."""
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, text.encode(), 0)

    def beat(self) -> None:
        """Show that the holder is alive, to whom the lock does not."""
        with suppress(OSError):
            os.utime(self.fd)

    def release(self) -> None:
        """Give it back, and take its file away."""
        if self._close.alive:
            with suppress(OSError):
                if os.path.samestat(os.fstat(self.fd), self.path.lstat()):
                    self.path.unlink()
            self._close()


def take(path: Path, *, wait: bool = False) -> Lease | None:
    """Return a lease on ``path``, which is made where it is not there; None where another holds it.

    ``wait`` for that one to end: for who knows that it only looks whether the lease is free.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        lease = Lease(path, fd, locked=True)
        state = _lock(fd, wait=wait)
        if state == "held":
            return None
        lease.locked = state == "free"
        try:
            # Whoever held it may have taken the file away before we had the lock.
            if os.path.samestat(os.fstat(fd), path.lstat()):
                return lease
        except FileNotFoundError:
            continue


def _lock(fd: int, *, wait: bool = False) -> Life:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return "held"
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return "unknown"
        raise
    return "free"
