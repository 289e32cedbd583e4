"""The user's cache: what can be found out again, kept in files that nobody else can have written.

An entry bears the seal of this user's key over its name and its bytes. What is damaged, planted or cut
off counts as absent; nothing that fails here fails anything else.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
import zlib
from pathlib import Path

from streamconv.files import newfile
from streamconv.files.userkey import Sealer, same_seal, user_key

MOST_BYTES = 256 << 20
"""What all entries together may take on disk; the oldest go first."""
MOST_ENTRY_BYTES = 64 << 20

_SUFFIX = ".entry"
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
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not self._is_private():
                return False
            path = self._folder / f"{key}{_SUFFIX}"
            with newfile.replacing(path) as fd:
                os.fchmod(fd, 0o600)
                with os.fdopen(fd, "wb", closefd=False) as stream:
                    stream.write(seal.encode() + b"\n" + packed)
            self._make_room(path)
            return True
        return False

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
