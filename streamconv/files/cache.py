"""The user's cache: what can be found out again, kept in files that nobody else can have written.

An entry bears the seal of this user's key over its name and its bytes. What is damaged, planted or cut
off counts as absent; nothing that fails here fails anything else.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
import zlib
from pathlib import Path
from typing import IO

from streamconv.files import newfile
from streamconv.files.userkey import Sealer, same_seal, user_key

MOST_BYTES = 256 << 20
"""What all entries together may take on disk; the oldest go first."""
MOST_ENTRY_BYTES = 64 << 20

_SUFFIX = ".entry"
_CLAIMS = "claims"
# How long what another process is finding out is waited for, and how often it is asked whether it has.
_WAIT_SECONDS = 60.0
_ASK_SECONDS = 0.05
_WRITE = 0o022  # of a group, of everybody
# What a process that was killed has left half written is nobody's after that time.
_LEFT_SECONDS = 3600


def cache_folder() -> Path | None:
    """Return where the cache is or will be: STREAMCONV_CACHE, else in the user's; None for nowhere."""
    given = os.environ.get("STREAMCONV_CACHE", "")
    if given:
        return Path(given) if given.startswith("/") else None
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(given) if given.startswith("/") else Path.home() / ".cache"
    except RuntimeError:
        return None
    return base / "streamconv" if base.is_absolute() else None


class Cache:
    """Entries by their keys, which are hex digests of all that an entry depends on."""

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES) -> None:
        self._folder = folder
        self._most_bytes = most_bytes
        self._sealer = Sealer(user_key(), "cache")
        self._claims: IO[bytes] | None = None

    def get_or_claim(self, key: str, *, wait_seconds: float = _WAIT_SECONDS) -> bytes | None:
        """Return an entry as :meth:`get` does; what another process is finding out is waited for.

        Where there is none the next ones wait for this process, until :meth:`close` or its end. That
        saves them work and promises nothing.
        """
        found = self.get(key)
        if found is not None or not self._make_folder():
            return found
        place = int(key[:15], 16)  # a byte of the file for each key, which need not be there
        with contextlib.suppress(OSError):
            if self._claims is None:
                fd = newfile.reopen(self._folder / _CLAIMS, os.O_RDWR | os.O_CREAT)
                if fd is None:
                    return None
                self._claims = os.fdopen(fd, "r+b", buffering=0)
                os.fchmod(fd, 0o600)
            if not _try_lock(self._claims, fcntl.LOCK_EX, place):
                end = time.monotonic() + wait_seconds
                # Shared: where there is no entry in the end, all who waited find out at once.
                while not _try_lock(self._claims, fcntl.LOCK_SH, place):
                    if time.monotonic() > end:
                        break
                    time.sleep(_ASK_SECONDS)
                fcntl.lockf(self._claims, fcntl.LOCK_UN, 1, place)
        return self.get(key)  # it may have come since the first look

    def close(self) -> None:
        """Let nobody wait any more for what was claimed."""
        if self._claims is not None:
            self._claims.close()
            self._claims = None

    def get(self, key: str) -> bytes | None:
        """Return an entry, None where there is none that can be trusted."""
        if not self._is_private():
            return None
        path = self._folder / f"{key}{_SUFFIX}"
        data = newfile.read_own(path, MOST_ENTRY_BYTES + 100, _WRITE)
        if data is None:
            return None
        seal, _, packed = data.partition(b"\n")
        wanted = self._sealer.seal("entry", key.encode(), packed)
        if not same_seal(seal.decode("latin-1"), wanted):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the oldest are those that nobody has asked for
        return zlib.decompress(packed)

    def put(self, key: str, data: bytes) -> bool:
        """Keep an entry, in the place of one with this key; return whether that could be."""
        packed = zlib.compress(data, 1)
        if len(packed) > min(MOST_ENTRY_BYTES, self._most_bytes):
            return False
        seal = self._sealer.seal("entry", key.encode(), packed)
        with contextlib.suppress(OSError):
            if not self._make_folder():
                return False
            path = self._folder / f"{key}{_SUFFIX}"
            with newfile.replacing(path) as fd:
                os.fchmod(fd, 0o600)
                with os.fdopen(fd, "wb", closefd=False) as stream:
                    stream.write(seal.encode() + b"\n" + packed)
            self._make_room(path)
            return True
        return False

    def _make_folder(self) -> bool:
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return self._is_private()

    def _is_private(self) -> bool:
        """Whether the folder is this user's, and nobody else can put files into it."""
        try:
            status = self._folder.lstat()
        except OSError:
            return False
        return stat.S_ISDIR(status.st_mode) and newfile.is_own(status, _WRITE)

    def _make_room(self, newest: Path) -> None:
        found = []
        for entry in os.scandir(self._folder):
            with contextlib.suppress(OSError):  # another process may be as quick
                status = entry.stat(follow_symlinks=False)
                if entry.name.endswith(".part"):
                    if status.st_mtime < time.time() - _LEFT_SECONDS:
                        Path(entry.path).unlink()
                elif entry.name.endswith(_SUFFIX):
                    found.append((status.st_mtime_ns, status.st_size, Path(entry.path)))
        total = sum(nbytes for _, nbytes, _ in found)
        for _, nbytes, path in sorted(found):
            if total <= self._most_bytes:
                return
            if path != newest:
                with contextlib.suppress(OSError):
                    path.unlink()
                total -= nbytes


def _try_lock(file: IO[bytes], kind: int, place: int) -> bool:
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB, 1, place)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        return False
    return True
